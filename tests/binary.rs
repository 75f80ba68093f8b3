//! The program itself on BoolQ's environment and the tiny model: exit codes and what is said where, a disk that fills up,
//! ctrl-C, and kills at any instant.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use candor::random::SplitMix64;
use serde_json::Value;

use crate::program::{CANDOR, Ended, Place};
use crate::toy::{rows_of, step_metrics};

/// Lines that a run says on standard error, by what they begin with.
const MESSAGES: [&str; 7] =
    ["computing on ", "loading the model", "evaluation after", "step ", "only ", "resuming ", "results/"];

#[test]
fn a_run_says_its_progress_on_standard_error_and_its_summary_on_standard_output() {
    let place = Place::new("");
    let ended = place.finish(&[]);
    for line in ended.stderr.lines() {
        assert!(MESSAGES.iter().any(|message| line.starts_with(message)), "{line:?}");
    }
    assert_eq!(ended.stderr.lines().filter(|line| line.starts_with("step ")).count(), 3);
    assert!(ended.stderr.contains("only 0.0% of the first rollouts could be read"), "{}", ended.stderr);
    for word in ["boolq: 3 held-out tasks", "parse rate", "mean reward", "Brier", "AUROC", "s per step", "peak memory"]
    {
        assert!(ended.stdout.contains(word), "{word}: {}", ended.stdout);
    }
    let rows = place.rows();
    assert_eq!((rows.len(), rows_of(&rows, "eval", 0).len(), rows_of(&rows, "eval", 3).len()), (3 * 12 + 6, 3, 3));
    for row in &rows {
        let (train, parts) = (row["split"] == "train", row["parts"].as_object().unwrap());
        assert_eq!((&row["environment"], &row["parse"]), (&"boolq".into(), &"missing".into()));
        assert!(row["task"].as_str().unwrap().starts_with(if train { "boolq/train/" } else { "boolq/validation/" }));
        assert_eq!(parts["unparsed"], -0.25);
        assert_eq!(parts.contains_key("length"), train, "length is not shaped on held-out tasks");
        assert_eq!(row["metrics"].get("confidence"), None, "there is no confidence where none was stated");
    }
    let metrics = step_metrics(&place.path("results/tiny"));
    assert!(metrics.iter().all(|row| row["grad_norm"].as_f64().unwrap() > 0.0), "there is something to learn");
    let summary: Value =
        serde_json::from_str(&fs::read_to_string(place.path("results/tiny/summary.json")).unwrap()).unwrap();
    assert_eq!((&summary["steps"], &summary["comparisons"][0]["after"]["parsed"]), (&3.into(), &0.into()));
    assert!(summary["device"].as_str().unwrap().starts_with("this processor ("), "{summary}");
}

#[test]
fn a_quiet_run_says_its_summary_only() {
    let place = Place::new("steps = 1");
    let ended = place.finish(&["--quiet"]);
    assert_eq!(ended.stderr, "");
    assert!(ended.stdout.contains("s per step"));
}

#[test]
fn wrong_input_is_one_line_and_exit_code_2_and_leaves_nothing() {
    let place = Place::new("");
    let refused = |changes: &str, file: &str, says: &[&str]| {
        place.configure(changes);
        let ended = place.candor(&["train", file]);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{changes}: {}", ended.stderr);
        let errors: Vec<&str> = ended.stderr.lines().filter(|line| !line.starts_with("loading the model")).collect();
        assert!(matches!(errors[..], [error] if error.starts_with("error: ")), "{changes}: {}", ended.stderr);
        assert!(says.iter().all(|says| errors[0].contains(says)), "{says:?}: {}", errors[0]);
    };
    refused("", "none.toml", &["none.toml", "No such file"]);
    refused("learner.lerning_rate = 1.0", "run.toml", &["run.toml:", "lerning_rate"]);
    refused("[[environment]]\nname = \"bolq\"", "run.toml", &["environment.0.name", "\"bolq\"", "known: boolq"]);
    refused(
        "[[environment]]\nname = \"boolq\"\nsource = \"rows\"\nlenght = 1",
        "run.toml",
        &["environment.0", "lenght"],
    );
    refused(
        "[[environment]]\nname = \"boolq\"\nsource = \"nowhere\"",
        "run.toml",
        &["environment.0.source: \"nowhere\" is neither"],
    );
    refused("[lora]\nstart_from = \"nowhere\"", "run.toml", &["lora.start_from", "nowhere"]);
    refused("sampling.async_level = 65", "run.toml", &["sampling.async_level", "at most 64"]);
    fs::rename(place.path("model"), place.path("gone")).unwrap();
    refused("", "run.toml", &["model.source", "\"model\" is neither a folder nor a file"]);
    assert!(!place.path("results").exists(), "nothing is written before all input is found good");

    fs::rename(place.path("gone"), place.path("model")).unwrap();
    place.configure("steps = 1");
    place.finish(&[]);
    refused("steps = 1", "run.toml", &["results/tiny exists already", "--resume"]);
    let ended = place.candor(&["tain", "run.toml"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""));
}

#[test]
fn help_names_the_commands() {
    let place = Place(tempfile::tempdir().unwrap());
    let ended = place.candor(&["--help"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    assert!(ended.stdout.contains("train"), "{}", ended.stdout);
    assert!(place.candor(&["train", "--help"]).stdout.contains("--resume"));
}

/// Runs where no file may grow beyond so many blocks of 512 bytes: as if the disk were full.
fn run_on_a_full_disk(place: &Place, blocks: usize) -> Ended {
    let line = format!("trap '' XFSZ; ulimit -f {blocks}; exec {CANDOR} train run.toml");
    place.wait(place.start(&["sh", "-c", &line]))
}

#[test]
fn a_full_disk_ends_the_run_with_the_files_name_and_the_last_checkpoint_goes_on() {
    let want = Place::new("steps = 4");
    want.finish(&[]);
    let place = Place::new("steps = 4");
    let size = want.rows().len();
    // Room for the evaluation and two steps or so, and for every checkpoint.
    let bytes = fs::metadata(want.path("results/tiny/generations.jsonl")).unwrap().len() as usize;
    let ended = run_on_a_full_disk(&place, bytes / 512 * (3 + 2 * 12 + 6) / size);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{}", ended.stderr);
    let error = ended.stderr.lines().last().unwrap();
    assert!(error.starts_with("error: results/tiny/generations.jsonl: cannot write: File too large"), "{error}");
    let newest = candor::checkpoint::newest(&place.path("results/tiny")).unwrap().unwrap();
    assert!(newest.ends_with("step-000002"), "{newest:?}");
    let ended = place.finish(&["--resume"]);
    assert!(ended.stderr.contains("dropped a torn last line"), "{}", ended.stderr);
    assert!(place.left() == want.left());
}

#[test]
fn a_checkpoint_that_does_not_fit_is_an_error_and_the_run_can_go_on() {
    let changes = "steps = 2\nevaluation.tasks = 0\n[lora]\nrank = 64\ntargets = [\"q_proj\", \"o_proj\"]";
    let want = Place::new(changes);
    want.finish(&[]);
    let place = Place::new(changes);
    let ended = run_on_a_full_disk(&place, 200);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let error = ended.stderr.lines().last().unwrap();
    assert!(error.starts_with("error: results/tiny/checkpoints/.step-000001.new/adapter_model.safetensors"), "{error}");
    assert_eq!(candor::checkpoint::newest(&place.path("results/tiny")).unwrap(), None);
    place.finish(&["--resume"]);
    assert!(place.left() == want.left());
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// Waits until a running child has said something.
fn wait_until_said(place: &Place, child: &mut Child, words: &str) {
    let started = Instant::now();
    while !place.said().contains(words) {
        assert!(child.try_wait().unwrap().is_none() && started.elapsed() < Duration::from_secs(60), "{}", place.said());
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn ctrl_c_finishes_the_step_saves_it_and_says_how_to_go_on() {
    const STEPS: u64 = 8;
    let changes = format!("steps = {STEPS}\ncheckpoint.every = 0");
    let (want, place) = (Place::new(&changes), Place::new(&changes));
    want.finish(&[]);
    let mut child = place.start(&[CANDOR, "train", "run.toml"]);
    wait_until_said(&place, &mut child, "step 2/");
    signal(&child, "-INT");
    let ended = place.wait(child);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(130), ""), "{}", ended.stderr);
    assert!(ended.stderr.ends_with("go on with: candor train run.toml --resume\n"), "{}", ended.stderr);
    let newest = candor::checkpoint::newest(&place.path("results/tiny")).unwrap().unwrap();
    let saved = candor::checkpoint::state(&newest).unwrap().next_step;
    assert!((2..STEPS).contains(&saved));
    let steps = step_metrics(&place.path("results/tiny")).len() as u64;
    assert_eq!(steps, saved, "the step that ran is finished");
    place.finish(&["--resume"]);
    assert!(place.left() == want.left());
}

#[test]
fn a_second_ctrl_c_stops_at_once_and_saves_nothing() {
    let place = Place::new(
        "evaluation.tasks = 0\nbatch = { prompts = 28, group = 64 }\nsampling = { max_tokens = 300, stop = [] }",
    );
    let mut child = place.start(&[CANDOR, "train", "run.toml"]);
    wait_until_said(&place, &mut child, "loading the model");
    // The folder is there when everything is loaded, and the first step, which takes many seconds, begins.
    while !place.path("results/tiny/log.txt").exists() {
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_millis(200));
    signal(&child, "-INT");
    wait_until_said(&place, &mut child, "finishing the step");
    signal(&child, "-INT");
    let ended = place.wait(child);
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    assert!(!ended.stderr.contains("interrupted and saved") && !ended.stderr.contains("step 1/"), "{}", ended.stderr);
    assert_eq!(candor::checkpoint::newest(&place.path("results/tiny")).unwrap(), None);
}

#[test]
fn a_run_killed_at_any_instants_and_resumed_ends_as_if_nothing_had_happened() {
    const KILLS: usize = 10;
    let changes = "steps = 20\nevaluation.every = 3";
    let (want, place) = (Place::new(changes), Place::new(changes));
    want.finish(&[]);

    let resume = || if place.path("results/tiny").exists() { &["--resume"][..] } else { &[] };
    let mut random = SplitMix64::new(5);
    let mut killed = 0;
    for _ in 0..KILLS {
        let mut child = place.start(&[&[CANDOR, "train", "run.toml"], resume()].concat());
        // Anywhere while it loads, or within or between its first steps, however fast they are.
        let steps = random.below(3);
        let done = || place.said().lines().filter(|line| line.starts_with("step ")).count();
        while done() < steps && child.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_secs_f64(0.08 * random.next_f64()));
        child.kill().unwrap();
        let ended = place.wait(child);
        assert!(matches!(ended.code, None | Some(0)), "{:?}: {}", ended.code, ended.stderr);
        killed += usize::from(ended.code.is_none());
    }
    place.finish(resume());
    assert!(killed >= KILLS / 2, "only {killed} of {KILLS} kills found a running process");
    assert!(place.left() == want.left());
}

#[test]
fn environments_can_name_no_tensor_no_token_and_no_device() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(env!("CARGO"));
    command.args(["tree", "--offline", "-p", "candor-environments", "-e", "normal", "--prefix", "none"]);
    let output = command.current_dir(root).output().unwrap();
    let tree = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(tree.starts_with("candor-environments v") && tree.contains("serde v"), "{tree}");
    for forbidden in ["candle", "tokenizers", "cudarc", "candor v"] {
        assert!(!tree.lines().any(|line| line.starts_with(forbidden)), "{forbidden}: {tree}");
    }
}
