//! Every way of failing ends the run with its reason, or is counted and left out; none of them hangs, and none harms the
//! last checkpoint.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{Device, Tensor, safetensors};
use candor::model_files::load_model;
use candor::rollout::{Collector, Group, Rollout, ScoreErrors};
use candor::run::{Row, RowSplit};
use candor::sampler::local::LocalSampler;
use candor::sampler::{Generation, Settings};
use candor::selection::Source;
use candor_environments::{Completion, Environment, Finish, Message, ParseStatus, Score, ScoreError, Target, Task};
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::check::{self, close};
use crate::toy::{JUDGE_FAILS, config, failure, generations, model, rows_of, run, step_metrics, within};

/// A toy of which only the behavior and perhaps the number of its tasks are not as usual.
fn odd(behavior: &str) -> String {
    format!("evaluation.tasks = 0\n[[environment]]\nname = \"toy\"\nbehavior = \"{behavior}\"\n")
}

/// Why a new run of an odd toy fails.
#[track_caller]
fn odd_failure(changes: &str) -> String {
    failure(tempdir().unwrap().path(), changes, false)
}

/// The error says all of this.
#[track_caller]
fn assert_says(error: &str, parts: &[&str]) {
    assert!(parts.iter().all(|part| error.contains(part)), "{parts:?} in: {error}");
}

#[test]
fn an_environment_that_panics_or_forgets_a_score_ends_the_run_by_name() {
    assert_says(&odd_failure(&odd("panics")), &["environment \"toy\" panicked on task"]);
    assert_says(
        &odd_failure(&odd("forgets_one")),
        &["environment \"toy\" gave 3 scores for the 4 completions of task"],
    );
    assert_says(&odd_failure(&odd("trains_on_nothing")), &["task toy/train/", "no token covers"]);
}

#[test]
fn tasks_that_are_too_long_or_absent_are_refused_by_name() {
    let empty = tempdir().unwrap();
    assert_says(
        &failure(empty.path(), &(odd("plain") + "tasks = 0"), false),
        &["environment.0 (toy): there are no tasks"],
    );
    assert_eq!(fs::read_dir(empty.path()).unwrap().count(), 0, "nothing is written before all input is found good");
    assert_says(&odd_failure(&(odd("plain") + "prompt = 900")), &["every prompt of toy", "the model's context = 256"]);
    let small = format!("batch.micro_tokens = 13\n{}", odd("plain"));
    assert_says(&odd_failure(&small), &["batch.micro_tokens = 13", "raise batch.micro_tokens"]);
}

#[test]
fn an_environment_that_compares_is_given_the_whole_group_in_the_order_of_the_rollouts() {
    let results = tempdir().unwrap();
    run(
        results.path(),
        &config("steps = 1\nbatch.group = 8\n[[environment]]\nname = \"toy\"\nbehavior = \"compares\""),
    );
    let rows = generations(results.path());
    let rows = rows_of(&rows, "train", 0);
    for row in &rows {
        assert_eq!(row["metrics"]["place"].as_f64(), row["rollout"].as_f64());
        assert_eq!(row["metrics"]["tokens"].as_f64(), row["tokens"].as_f64());
    }
    let lengths = |group: &[&Value]| group.iter().map(|row| row["tokens"].as_u64().unwrap()).collect::<Vec<_>>();
    assert!(rows.chunks(8).any(|group| !lengths(group).is_sorted()), "some rollout ends after a later one");
}

#[test]
fn rollouts_without_a_verdict_leave_their_groups_mean_and_groups_with_few_left_are_dropped() {
    let results = tempdir().unwrap();
    let changes = |steps: u64| format!("steps = {steps}\nbatch.prompts = 4\n{}tasks = 4", odd("judge_fails"));
    // Ten errors are not more than 2% of 500.
    run(results.path(), &config(&changes(1)));
    let rows = generations(results.path());
    let mut rewards = Vec::new();
    for group in rows.chunks(4) {
        let task = group[0]["task"].as_str().unwrap();
        let fails = JUDGE_FAILS[task.strip_prefix("toy/train/").unwrap().parse::<usize>().unwrap()];
        let valid: Vec<f64> = group.iter().filter_map(|row| row["reward"].as_f64()).collect();
        assert_eq!(valid.len(), 4 - fails, "{task}");
        let mean = valid.iter().sum::<f64>() / valid.len() as f64;
        rewards.extend(valid);
        for row in group {
            let Some(reward) = row["reward"].as_f64() else {
                assert_eq!(row["error"], "judge: no verdict after 3 attempts: connection reset");
                assert!(row["advantage"].is_null() && row["parts"] == json!({}) && row["parse"] == "ok");
                let judge =
                    json!({"id": "toy:judge", "prompt_version": 1, "verdict": null, "cached": false, "attempts": 3});
                assert_eq!(row["judge"], judge);
                continue;
            };
            assert_eq!(row["error"], Value::Null);
            match row["advantage"].as_f64() {
                Some(advantage) => close(task, advantage, reward - mean, 1e-12),
                None => assert!(fails > 2, "{task}: dropped, though half of it is valid"),
            }
            assert_eq!(row["advantage"].is_null(), fails > 2, "{task}");
        }
    }
    let metrics = &step_metrics(&results.path().join("toy"))[0];
    assert_eq!((&metrics["score_errors"], &metrics["dropped_groups"]), (&10.into(), &2.into()));
    close("reward", metrics["reward/mean"].as_f64().unwrap(), rewards.iter().sum::<f64>() / 6.0, 1e-12);
    assert!(metrics["grad_norm"].as_f64().unwrap() > 0.0);

    let error = odd_failure(&changes(2));
    assert_says(&error, &["20 of the last 32 rollouts could not be scored", "connection reset"]);
}

#[test]
fn a_reward_that_is_no_number_is_the_error_of_its_rollout() {
    let results = tempdir().unwrap();
    run(results.path(), &config(&format!("steps = 2\n{}", odd("not_a_number"))));
    let rows = generations(results.path());
    let odd: Vec<&Value> = rows.iter().filter(|row| !row["error"].is_null()).collect();
    assert_eq!((odd.len(), rows.len()), (6, 24));
    assert!(odd.iter().all(|row| row["error"] == "environment: the reward is NaN" && row["reward"].is_null()));
}

/// A step's batch: one group, whose rollouts have an error or not.
fn batch(errors: &[bool]) -> Vec<Row> {
    let rollout = |&error: &bool| Rollout {
        generation: Generation {
            group: 0,
            rollout: 0,
            version: 0,
            ids: vec![5],
            behavior_t: vec![-1.0],
            untempered_t: vec![-1.0],
            finish: Finish::Stop,
        },
        text: String::new(),
        score: if error { Err(ScoreError::Environment("odd".to_string())) } else { Ok(no_score()) },
        token_confidence: None,
        advantage: None,
    };
    let task = Task { id: "toy/0".to_string(), prompt: Vec::new(), target: Target::Reward };
    let rollouts = errors.iter().map(rollout).collect();
    let (environment, prompt_ids) = ("toy".to_string(), vec![5]);
    Row::all(RowSplit::Train, 0, &[Group { environment, task, labels: vec![], prompt_ids, rollouts }])
}

fn no_score() -> Score {
    let (parts, metrics, flags) = (Vec::new(), Vec::new(), Vec::new());
    Score { reward: 0.0, parts, metrics, parse: ParseStatus::Ok, flags, answer: None, train_on: None, judge: None }
}

#[test]
fn errors_are_sustained_when_they_are_more_than_ten_of_the_last_500() {
    let mut errors = ScoreErrors::default();
    errors.observe(&batch(&[true; 10])).unwrap();
    assert_says(&errors.observe(&batch(&[false, true])).unwrap_err().to_string(), &["11 of the last 12", "odd"]);

    let mut errors = ScoreErrors::default();
    errors.observe(&batch(&[true; 10])).unwrap();
    errors.observe(&batch(&[false; 490])).unwrap();
    errors.observe(&batch(&[true; 10])).expect("the first ten are longer ago");
    assert_says(&errors.observe(&batch(&[true])).unwrap_err().to_string(), &["11 of the last 500"]);
}

/// The files of the newest checkpoint by name.
fn newest_checkpoint(results: &Path) -> (String, Vec<(String, Vec<u8>)>) {
    let folder = candor::checkpoint::newest(&results.join("toy")).unwrap().expect("there is one");
    let mut files: Vec<(String, Vec<u8>)> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    files.sort();
    (folder.file_name().unwrap().to_string_lossy().into_owned(), files)
}

#[test]
fn numbers_that_overflow_end_the_run_and_the_checkpoint_stays() {
    // The first step is harmless and saved; what it made of the adapter is of no use in the second.
    let results = tempdir().unwrap();
    let changes = "learner.learning_rate = 1e30\nevaluation.tasks = 0";
    assert_says(&failure(results.path(), changes, false), &["no finite probabilities", "NaN or infinity"]);
    let before = newest_checkpoint(results.path());
    assert_eq!(before.0, "step-000001");
    assert_eq!(before.1.len(), 4);
    assert_says(&failure(results.path(), changes, true), &["no finite probabilities"]);
    assert!(newest_checkpoint(results.path()) == before, "the failed step changed the checkpoint");

    let error = odd_failure(&odd("huge"));
    assert_says(&error, &["step 0: the gradient of base_model.model.model.layers.", "is not finite"]);
}

#[test]
fn an_adapter_with_an_infinite_weight_is_no_start() {
    let results = tempdir().unwrap();
    run(results.path(), &config("steps = 1\nevaluation.tasks = 0"));
    let folder = results.path().join("toy/checkpoints/step-000001");
    let file = folder.join("adapter_model.safetensors");
    let mut tensors = safetensors::load(&file, &Device::Cpu).unwrap();
    let name = tensors.keys().filter(|name| name.ends_with("lora_B.weight")).min().unwrap().clone();
    let infinite = Tensor::full(f32::INFINITY, tensors[&name].dims(), &Device::Cpu).unwrap();
    tensors.insert(name, infinite);
    safetensors::save(&tensors, &file).unwrap();
    let error = odd_failure(&format!("[lora]\nstart_from = {:?}", folder.to_str().unwrap()));
    assert_says(&error, &["NaN or infinity"]);
}

#[test]
fn the_watchdog_of_these_tests_barks() {
    let hung = std::panic::catch_unwind(|| within(0, || std::thread::sleep(std::time::Duration::from_millis(300))));
    assert!(hung.is_err());
}

/// An environment that never comes back, or that panics when it is asked for a task.
struct Broken {
    panics: bool,
}

impl Environment for Broken {
    fn num_tasks(&self) -> usize {
        1
    }

    fn task(&self, _index: usize) -> Task {
        assert!(!self.panics, "this environment has no tasks after all");
        Task { id: "broken/0".into(), prompt: vec![Message::user("a")], target: Target::Reward }
    }

    fn score(&self, _index: usize, _completion: &Completion) -> Result<Score, ScoreError> {
        loop {
            std::thread::park();
        }
    }
}

/// Why a batch of one broken task fails when a score may take a fifth of a second.
fn broken_batch(panics: bool) -> String {
    within(60, move || {
        let (model, tokenizer) = load_model(model().to_str().unwrap(), check::f32_kernel(), &|_| {}).unwrap();
        let environment = Arc::new(Broken { panics });
        let sources = [Source::new("broken", 1.0, environment)];
        let patience = Duration::from_millis(200);
        let collector = Collector { sources: &sources, tokenizer: &tokenizer, observer: &|_| {}, what: "rollouts" };
        let mut sampler = LocalSampler::new(model, tokenizer.clone());
        let settings = Settings { max_tokens: 2, temperature: 1.0, stop: Vec::new(), seed: 0, step: 0 };
        let unscored = collector.sample(&[(0, 0)], 2, &mut sampler, &None, &settings);
        let scored = unscored.and_then(|unscored| unscored.scored(&tokenizer, patience, &mut |_| Ok(())));
        scored.err().unwrap().to_string()
    })
}

/// Catches a batch that waits for the thread that never ends, and not only for its score.
#[test]
fn a_score_that_never_comes_ends_the_batch() {
    assert_says(&broken_batch(false), &["waited", "for the score of 2 completions"]);
}

#[test]
fn an_environment_that_panics_when_asked_for_a_task_is_named() {
    assert_says(&broken_batch(true), &["environment \"broken\" panicked on task 0"]);
}
