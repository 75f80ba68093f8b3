//! Recorded rollouts to read: rows as a run would have written them, made by the numbers of a counter.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use candor::random::SplitMix64;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

/// A run's sizes.
#[derive(Clone, Copy)]
pub struct Sizes {
    /// Training steps, from 0.
    pub steps: u64,
    /// Groups per step.
    pub groups: usize,
    /// Rollouts per group.
    pub rollouts: usize,
    /// Held-out tasks before and after.
    pub held_out: usize,
    /// Words of a prompt and of a completion.
    pub words: (usize, usize),
}

/// A run that is over in a moment.
pub const SMALL: Sizes = Sizes { steps: 12, groups: 3, rollouts: 4, held_out: 8, words: (12, 9) };

/// The largest run that the notes speak of: 51,200 rollouts in training.
pub const LARGE: Sizes = Sizes { steps: 50, groups: 64, rollouts: 16, held_out: 256, words: (130, 120) };

const WORDS: &str = "the passage says that a river which ends in the sea was named after its first settlers and so the \
                     answer follows from the second sentence although it is not stated there in these words";

fn text(random: &mut SplitMix64, words: usize) -> String {
    let all: Vec<&str> = WORDS.split(' ').collect();
    (0..words).map(|_| all[random.below(all.len())]).collect::<Vec<_>>().join(" ")
}

/// One row. Confidences move toward what is right as the steps go by, and fewer completions cannot be read.
fn row(sizes: Sizes, (split, step): (&str, u64), group: usize, rollout: usize, random: &mut SplitMix64) -> Value {
    let learned = step as f64 / sizes.steps as f64;
    let parsed = random.next_f64() < 0.7 + 0.3 * learned;
    let correct = random.next_f64() < 0.65;
    let tenths = if correct { 5 + random.below(6) } else { 10 - random.below(1 + (9.0 * learned) as usize) };
    let confidence = tenths as f64 / 10.0;
    let brier = 1.0 - (confidence - f64::from(correct)).powi(2);
    let reward = if parsed { brier } else { -0.25 };
    let task = if split == "eval" { group } else { (step as usize * sizes.groups + group) % 1000 };
    let prompt = text(&mut SplitMix64::new(task as u64), sizes.words.0);
    let words = sizes.words.1 / 2 + random.below(sizes.words.1);
    let thoughts = text(random, words);
    let yes = if correct { "YES" } else { "NO" };
    let answer = format!("ANSWER: {yes} with {:.0}% probability", 100.0 * confidence);
    json!({
        "schema": 1, "split": split, "step": step, "policy_version": step, "environment": "boolq",
        "task": format!("boolq/{}/{task}", if split == "eval" { "validation" } else { "train" }),
        "group": group, "rollout": rollout,
        "prompt": [{"role": "user", "content": prompt}],
        "completion": if parsed { format!("{thoughts}\n{answer}") } else { thoughts },
        "finish": if parsed { "stop" } else { "length" }, "tokens": sizes.words.1,
        "reward": reward, "parts": if parsed { json!({"brier": reward}) } else { json!({"unparsed": reward}) },
        "advantage": if split == "eval" { Value::Null } else { json!(reward - 0.5) },
        "metrics": if parsed {
            json!({"correct": f64::from(correct), "confidence": confidence})
        } else {
            json!({"correct": 0.0})
        },
        "parse": if parsed { "ok" } else { "missing" }, "flags": [], "judge": null, "mean_logprob": -0.5, "error": null,
    })
}

/// The rows of a run, in the order in which it writes them.
pub fn rows(sizes: Sizes) -> impl Iterator<Item = Value> {
    let mut random = SplitMix64::new(17);
    let training = (0..sizes.steps).map(move |step| (("train", step), sizes.groups, sizes.rollouts));
    let before = std::iter::once((("eval", 0), sizes.held_out, 1));
    let after = std::iter::once((("eval", sizes.steps), sizes.held_out, 1));
    before.chain(training).chain(after).flat_map(move |(when, groups, rollouts)| {
        let places = (0..groups).flat_map(|group| (0..rollouts).map(move |rollout| (group, rollout)));
        places.map(|(group, rollout)| row(sizes, when, group, rollout, &mut random)).collect::<Vec<_>>()
    })
}

/// Rows as lines of a file.
pub fn lines(rows: impl IntoIterator<Item = Value>) -> String {
    rows.into_iter().map(|row| format!("{row}\n")).collect()
}

/// Writes a file, compressed as its name says.
pub fn write(path: &Path, bytes: &[u8]) {
    match path.extension().unwrap().to_str().unwrap() {
        "gz" => {
            let mut packed = GzEncoder::new(File::create(path).unwrap(), Compression::default());
            packed.write_all(bytes).and_then(|()| packed.finish().map(drop)).unwrap();
        }
        "zst" => fs::write(path, zstd::encode_all(bytes, 0).unwrap()).unwrap(),
        _ => fs::write(path, bytes).unwrap(),
    }
}
