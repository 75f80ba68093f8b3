//! The program in a folder of its own: BoolQ's environment over rows of our own, and the tiny model.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::toy::{changed, lines, model};

/// The tiny model never answers, so only the length of its completions, which stop strings cut, is rewarded.
const BASE: &str = r#"
name = "tiny"
steps = 3

[lora]
rank = 2
alpha = 4.0
targets = ["v_proj"]

[[environment]]
name = "boolq"
source = "rows"
examples = "none"
length = { mode = "soft", weight = 0.25 }

[batch]
prompts = 3
group = 4
micro_tokens = 1024

[sampling]
max_tokens = 10
stop = ["t", "7", "e"]

[learner]
learning_rate = 2e-2
schedule = "constant"
warmup_steps = 0

[evaluation]
tasks = 3
max_tokens = 10

[checkpoint]
every = 1
"#;

/// A folder to run the program in: `rows/` with questions of our own, `model/` with a longer context than the tiny model
/// has, and `run.toml`.
pub struct Place(pub TempDir);

/// How a process ended: its exit code, `None` if a signal did it, and what it said.
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Place {
    pub fn new(changes: &str) -> Self {
        let place = Self(tempdir().unwrap());
        for folder in ["rows", "model"] {
            fs::create_dir(place.path(folder)).unwrap();
        }
        fs::write(place.path("rows/train.jsonl"), questions(0..28)).unwrap();
        fs::write(place.path("rows/dev.jsonl"), questions(28..40)).unwrap();
        for entry in fs::read_dir(model()).unwrap() {
            let name = entry.unwrap().file_name();
            symlink(model().join(&name), place.path("model").join(&name)).unwrap();
        }
        let text = fs::read_to_string(model().join("config.json")).unwrap();
        fs::remove_file(place.path("model/config.json")).unwrap();
        let longer = text.replace("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 1024");
        assert_ne!(longer, text);
        fs::write(place.path("model/config.json"), longer).unwrap();
        place.configure(changes);
        place
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.0.path().join(relative)
    }

    pub fn configure(&self, changes: &str) {
        fs::write(self.path("run.toml"), changed(BASE, changes, "model")).unwrap();
    }

    /// Starts a command line in the folder, with its output in files.
    pub fn start(&self, line: &[&str]) -> Child {
        let file = |name: &str| Stdio::from(File::create(self.path(name)).unwrap());
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).current_dir(self.0.path()).env_remove("RUST_LOG");
        command.stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr")).spawn().unwrap()
    }

    /// Waits for the end, a minute at most.
    pub fn wait(&self, mut child: Child) -> Ended {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if started.elapsed() > Duration::from_secs(60) {
                child.kill().unwrap();
                panic!("still running after a minute: {}", self.said());
            }
            thread::sleep(Duration::from_millis(2));
        };
        Ended { code: status.code(), stdout: fs::read_to_string(self.path("stdout")).unwrap(), stderr: self.said() }
    }

    /// What it has said on standard error so far.
    pub fn said(&self) -> String {
        fs::read_to_string(self.path("stderr")).unwrap()
    }

    pub fn candor(&self, arguments: &[&str]) -> Ended {
        self.wait(self.start(&[&[CANDOR], arguments].concat()))
    }

    /// Runs or resumes to the end.
    #[track_caller]
    pub fn finish(&self, arguments: &[&str]) -> Ended {
        let ended = self.candor(&[&["train", "run.toml"], arguments].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        ended
    }

    pub fn rows(&self) -> Vec<Value> {
        lines(&self.path("results/tiny/generations.jsonl"))
    }

    /// What a finished run leaves that does not depend on the time.
    pub fn left(&self) -> (Vec<u8>, Vec<u8>, String) {
        let run = self.path("results/tiny");
        let newest = candor::checkpoint::newest(&run).unwrap().unwrap();
        let tensors = |name: &str| fs::read(newest.join(name)).unwrap();
        let text = fs::read_to_string(run.join("generations.jsonl")).unwrap();
        (tensors("adapter_model.safetensors"), tensors("optimizer.safetensors"), text)
    }
}

/// The program.
pub const CANDOR: &str = env!("CARGO_BIN_EXE_candor");

/// Rows as BoolQ's, about half of which are true.
fn questions(numbers: std::ops::Range<usize>) -> String {
    let row = |number: usize| {
        let (pens, asked) = (number % 7 + 2, number % 7 + 2 + number % 2);
        json!({
            "question": format!("does box {number} hold {asked} pens"),
            "title": format!("Box {number}"),
            "answer": pens == asked,
            "passage": format!("Box {number} holds {pens} pens."),
        })
    };
    numbers.map(|number| format!("{}\n", row(number))).collect()
}
