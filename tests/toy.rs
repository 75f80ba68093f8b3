//! What the tests of the flow share: a toy environment that behaves as its options say, and runs of it on the tiny model.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use candor::config::Config;
use candor::event::Observer;
use candor::setup::{Options, Run};
use candor::train::{Outcome, train};
use candor_environments::{
    Completion, Context, Environment, Finish, Judgment, Load, Message, ParseStatus, Score, ScoreError, Split, Target,
    Task,
};
use serde::Deserialize;
use serde_json::Value;

/// What a test does not change. Stop strings make completions of different lengths.
pub const BASE: &str = r#"
name = "toy"
steps = 4

[lora]
rank = 4
alpha = 8.0

[[environment]]
name = "toy"

[batch]
prompts = 3
group = 4
micro_tokens = 256

[sampling]
max_tokens = 12
stop = ["t", "7"]

[learner]
learning_rate = 2e-2
schedule = "constant"
warmup_steps = 0

[evaluation]
tasks = 2
max_tokens = 12

[checkpoint]
every = 1
keep = 100
"#;

/// The tiny model that the project keeps.
pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/tiny/llama")
}

/// The toy's config, with the given keys in place of its own.
pub fn config(changes: &str) -> Config {
    let text = changed(BASE, changes, &model().display().to_string());
    Config::parse(&text, "toy.toml").unwrap_or_else(|error| panic!("{error:#}\n{text}"))
}

/// A config's text with `model.source` and other changes merged into it.
pub fn changed(base: &str, changes: &str, source: &str) -> String {
    let mut table: toml::Table = base.parse().unwrap();
    merge(&mut table, changes.parse().unwrap());
    merge(&mut table, format!("model.source = {source:?}").parse().unwrap());
    toml::to_string(&table).unwrap()
}

fn merge(into: &mut toml::Table, changes: toml::Table) {
    for (key, value) in changes {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(into)), toml::Value::Table(changes)) => merge(into, changes),
            (_, value) => drop(into.insert(key, value)),
        }
    }
}

/// Runs until the end, or until somebody sets `interrupted`.
pub fn start(
    results: &Path,
    config: &Config,
    resume: bool,
    observer: Observer,
    interrupted: &AtomicBool,
) -> Result<Outcome> {
    let options = Options { results, resume, environments: &[("toy", load as Load)], observer };
    train(&mut Run::prepare(config.clone(), &options)?, observer, interrupted)
}

/// A whole run that nobody watches.
pub fn run(results: &Path, config: &Config) {
    let outcome = start(results, config, false, &|_| {}, &AtomicBool::new(false));
    assert_eq!(outcome.unwrap(), Outcome::Finished);
}

/// Why a run with these changes fails, whether it is a new one or not.
#[track_caller]
pub fn failure(results: &Path, changes: &str, resume: bool) -> String {
    let (results, config) = (results.to_path_buf(), config(changes));
    let outcome = within(60, move || start(&results, &config, resume, &|_| {}, &AtomicBool::new(false)));
    format!("{:#}", outcome.expect_err("the run fails"))
}

/// What `f` gives; panics if it panics or is not done after so many seconds.
#[track_caller]
pub fn within<T: Send + 'static>(seconds: u64, f: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(f()));
    receiver.recv_timeout(Duration::from_secs(seconds)).expect("it ends, and neither hangs nor panics")
}

/// The objects of a file of JSON lines.
pub fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
}

/// What the steps of a run say in its `metrics.jsonl`, evaluations left out.
pub fn step_metrics(run: &Path) -> Vec<Value> {
    let mut rows = lines(&run.join("metrics.jsonl"));
    rows.retain(|row| row["split"] == "train");
    rows
}

/// The rows of a run's `generations.jsonl`.
pub fn generations(results: &Path) -> Vec<Value> {
    lines(&results.join("toy/generations.jsonl"))
}

/// The rows of one split and step.
pub fn rows_of<'a>(rows: &'a [Value], split: &str, step: u64) -> Vec<&'a Value> {
    rows.iter().filter(|row| row["split"] == split && row["step"] == step).collect()
}

/// Mean reward of rows that all have one.
pub fn mean_reward(rows: &[&Value]) -> f64 {
    assert!(!rows.is_empty());
    rows.iter().map(|row| row["reward"].as_f64().unwrap()).sum::<f64>() / rows.len() as f64
}

/// What is odd about the toy environment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Behavior {
    /// Nothing.
    #[default]
    Plain,
    /// Scoring panics.
    Panics,
    /// Completions are compared; `place` in the metrics is a completion's index in what was given.
    Compares,
    /// As `Compares`, with one score too few.
    ForgetsOne,
    /// Of every four completions of task i, `JUDGE_FAILS[i]` get no verdict.
    JudgeFails,
    /// The reward of every fourth completion is no number.
    NotANumber,
    /// Rewards so large that the gradient is infinite.
    Huge,
    /// Rewards are said to be a scoring rule of a probability.
    StatesProbabilities,
    /// Only bytes that no token covers may be trained on.
    TrainsOnNothing,
    /// Tasks carry their completions.
    Demonstrates,
}

/// How many of a task's four completions the judge fails on: the group is dropped, kept, dropped, kept.
pub const JUDGE_FAILS: [usize; 4] = [4, 1, 3, 2];

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ToyOptions {
    tasks: usize,
    behavior: Behavior,
    /// Characters of the first prompt, about.
    prompt: usize,
    /// Characters by which every prompt is longer than the one before it, about.
    growth: usize,
}

impl Default for ToyOptions {
    fn default() -> Self {
        Self { tasks: 5, behavior: Behavior::Plain, prompt: 21, growth: 0 }
    }
}

/// Rewards the letters of the first half of the alphabet; longer is a little worse.
struct Toy {
    split: Split,
    options: ToyOptions,
    /// Completions seen of every task.
    seen: Mutex<Vec<usize>>,
}

/// What the registry entry "toy" loads.
pub fn load(context: &Context) -> Result<Box<dyn Environment>> {
    let options: ToyOptions = context.typed_options()?;
    let seen = Mutex::new(vec![0; options.tasks]);
    Ok(Box::new(Toy { split: context.split, options, seen }))
}

impl Toy {
    /// The number of this completion among those of its task, from 0.
    fn number(&self, index: usize) -> usize {
        let mut seen = self.seen.lock().unwrap();
        seen[index] += 1;
        seen[index] - 1
    }
}

impl Environment for Toy {
    fn num_tasks(&self) -> usize {
        self.options.tasks
    }

    fn task(&self, index: usize) -> Task {
        let ToyOptions { prompt, growth, .. } = self.options;
        let prompt: String = format!("{index}. ") + &"say it ".repeat((prompt + growth * index) / 7);
        let target = match self.options.behavior {
            Behavior::Demonstrates => Target::Demonstration { completion: "it".to_string() },
            _ => Target::Reward,
        };
        let id = format!("toy/{}/{index}", if self.split == Split::Train { "train" } else { "heldout" });
        Task { id, prompt: vec![Message::user(prompt)], target }
    }

    fn score(&self, index: usize, completion: &Completion) -> Result<Score, ScoreError> {
        assert!(completion.num_tokens <= completion.max_tokens);
        let behavior = self.options.behavior;
        assert_ne!(behavior, Behavior::Panics, "the toy panics");
        let letters = completion.text.chars().filter(|letter| ('a'..='m').contains(letter)).count() as f64;
        let mut parts = vec![("letters", letters / 12.0), ("length", -0.01 * completion.num_tokens as f64)];
        match behavior {
            Behavior::JudgeFails if self.number(index) % 4 < JUDGE_FAILS[index] => {
                let judgment = Judgment {
                    id: "toy:judge".to_string(),
                    prompt_version: 1,
                    verdict: Err("connection reset".to_string()),
                    cached: false,
                    attempts: 3,
                    p_correct: None,
                };
                return Err(ScoreError::Judge { judgment, parse: ParseStatus::Ok });
            }
            Behavior::NotANumber if self.number(index).is_multiple_of(4) => parts.push(("odd", f64::NAN)),
            Behavior::Huge => parts.iter_mut().for_each(|(_, value)| *value *= 1e300),
            _ => {}
        }
        let nowhere = completion.text.len()..completion.text.len() + 1;
        Ok(Score {
            reward: parts.iter().map(|(_, value)| value).sum(),
            parts,
            metrics: vec![("tokens", completion.num_tokens as f64)],
            parse: if completion.finish == Finish::Stop { ParseStatus::Ok } else { ParseStatus::Missing },
            flags: vec!["toy"],
            answer: None,
            train_on: (behavior == Behavior::TrainsOnNothing).then_some(nowhere),
            judge: None,
        })
    }

    fn rewards_probabilities(&self) -> bool {
        self.options.behavior == Behavior::StatesProbabilities
    }

    fn compares(&self) -> bool {
        matches!(self.options.behavior, Behavior::Compares | Behavior::ForgetsOne)
    }

    fn score_group(&self, index: usize, completions: &[Completion]) -> Vec<Result<Score, ScoreError>> {
        let placed = |(place, completion): (usize, &Completion)| {
            let mut score = self.score(index, completion)?;
            score.metrics.push(("place", place as f64));
            Ok(score)
        };
        let forgotten = usize::from(self.options.behavior == Behavior::ForgetsOne);
        completions.iter().enumerate().skip(forgotten).map(placed).collect()
    }
}
