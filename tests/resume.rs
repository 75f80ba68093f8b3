//! A run that is stopped anywhere and resumed is the same run, bit for bit, and what a checkpoint is made of.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use candle_core::{Device, safetensors};
use candor::config::Config;
use candor::event::Event;
use candor::train::Outcome;
use serde_json::Value;
use tempfile::tempdir;

use crate::toy::{changed, config, failure, generations, lines, model, rows_of, run, start, step_metrics};
use candor::metrics::MEASURED;

/// Evaluations in between, checkpoints not after every step, and the moments matter.
const CHANGES: &str = "steps = 5\nevaluation.every = 2\ncheckpoint.every = 2\nlearner.schedule = \"cosine\"";

/// Everything that a finished run leaves, times excepted.
#[derive(PartialEq)]
pub struct Left {
    adapter: Vec<u8>,
    moments: Vec<u8>,
    state: String,
    config: String,
    generations: String,
    metrics: Vec<Value>,
}

pub fn left(results: &Path) -> Left {
    let run = results.join("toy");
    let checkpoint = candor::checkpoint::newest(&run).unwrap().expect("there is a checkpoint");
    let mut metrics = lines(&run.join("metrics.jsonl"));
    for row in &mut metrics {
        let row = row.as_object_mut().unwrap();
        let before = row.len();
        row.retain(|name, _| !MEASURED.iter().any(|prefix| name.starts_with(prefix)));
        assert!(row.len() < before, "every row has its times");
    }
    let text = |path: PathBuf| fs::read_to_string(path).unwrap();
    Left {
        adapter: fs::read(checkpoint.join("adapter_model.safetensors")).unwrap(),
        moments: fs::read(checkpoint.join("optimizer.safetensors")).unwrap(),
        state: text(checkpoint.join("state.json")),
        config: text(run.join("config.toml")),
        generations: text(run.join("generations.jsonl")),
        metrics,
    }
}

#[track_caller]
pub fn assert_same(got: &Left, want: &Left, what: &str) {
    for (index, (got, want)) in got.generations.lines().zip(want.generations.lines()).enumerate() {
        assert_eq!(got, want, "{what}: row {index}");
    }
    assert_eq!(got.generations.len(), want.generations.len(), "{what}: number of rows");
    assert_eq!(got.metrics, want.metrics, "{what}");
    assert_eq!((&got.state, &got.config), (&want.state, &want.config), "{what}");
    assert!(got.adapter == want.adapter, "{what}: the adapters differ");
    assert!(got.moments == want.moments, "{what}: the moments differ");
}

/// The uninterrupted run, in which something was learned.
pub fn straight(config: &Config) -> Left {
    let results = tempdir().unwrap();
    run(results.path(), config);
    let left = left(results.path());
    assert!(step_metrics(&results.path().join("toy")).iter().all(|row| row["grad_norm"].as_f64().unwrap() > 0.0));
    left
}

/// Runs or resumes until the step after which somebody presses ctrl-C.
pub fn run_until(results: &Path, config: &Config, resume: bool, steps: u64) -> Outcome {
    run_until_said(results, config, resume, &format!("step {steps}/"))
}

/// Runs or resumes until a line that begins so, at which somebody presses ctrl-C; held-out tasks are a line too.
fn run_until_said(results: &Path, config: &Config, resume: bool, beginning: &str) -> Outcome {
    let (interrupted, evaluations) = (AtomicBool::new(false), AtomicUsize::new(0));
    let observer = |event: Event| {
        let line = match event {
            Event::Line(line) => line.to_string(),
            Event::Progress { what: "held-out tasks", done: 1, .. } => {
                format!("held-out tasks {}", evaluations.fetch_add(1, Ordering::Relaxed))
            }
            _ => return,
        };
        if line.starts_with(beginning) {
            interrupted.store(true, Ordering::Relaxed);
        }
    };
    start(results, config, resume, &observer, &interrupted).unwrap()
}

/// Resumes until the end; gives what it said.
pub fn resume(results: &Path, config: &Config) -> Vec<String> {
    let said = Mutex::new(Vec::new());
    let observer = |event: Event| {
        if let Event::Line(line) = event {
            said.lock().unwrap().push(line.to_string());
        }
    };
    let outcome = start(results, config, true, &observer, &AtomicBool::new(false));
    assert_eq!(outcome.unwrap(), Outcome::Finished);
    said.into_inner().unwrap()
}

/// No step follows an evaluation in which somebody wanted to stop: on a real model that would be minutes.
#[test]
fn a_run_interrupted_in_an_evaluation_and_resumed_is_the_same_run() {
    let config = config(CHANGES);
    let want = straight(&config);
    for (evaluation, steps) in [0, 2, 4, 5].into_iter().enumerate() {
        let results = tempdir().unwrap();
        let said = format!("held-out tasks {evaluation}");
        assert_eq!(run_until_said(results.path(), &config, false, &said), Outcome::Interrupted);
        assert_eq!(step_metrics(&results.path().join("toy")).len(), steps);
        let rows = generations(results.path());
        assert!(rows_of(&rows, "eval", steps as u64).is_empty(), "an evaluation is all there or not at all");
        resume(results.path(), &config);
        assert_same(&left(results.path()), &want, &format!("stopped in the evaluation after {steps} steps"));
        assert!(!results.path().join("toy/interrupted-1.jsonl").exists(), "nothing was done in vain");
    }
}

#[test]
fn a_run_interrupted_after_any_steps_and_resumed_is_the_same_run() {
    let config = config(CHANGES);
    let want = straight(&config);
    for stops in [&[1][..], &[2], &[1, 4], &[1, 2, 3, 4]] {
        let results = tempdir().unwrap();
        for (index, &stop) in stops.iter().enumerate() {
            assert_eq!(run_until(results.path(), &config, index > 0, stop), Outcome::Interrupted);
            let newest = candor::checkpoint::newest(&results.path().join("toy")).unwrap().unwrap();
            assert_eq!(candor::checkpoint::state(&newest).unwrap().next_step, stop, "it is saved at once");
        }
        resume(results.path(), &config);
        assert_same(&left(results.path()), &want, &format!("stopped after {stops:?}"));
        assert!(!results.path().join("toy/interrupted-1.jsonl").exists(), "an interrupted run saves all it did");
    }

    // Ctrl-C in the last step leaves the last evaluation.
    let results = tempdir().unwrap();
    assert_eq!(run_until(results.path(), &config, false, 5), Outcome::Interrupted);
    resume(results.path(), &config);
    assert_same(&left(results.path()), &want, "stopped in the last step");
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() {
            copy_folder(&path, &to);
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

/// Runs to the end, and gives copies of the results as they were at some events: what is left when the process dies there.
fn dead(config: &Config) -> Vec<(String, tempfile::TempDir)> {
    let results = tempdir().unwrap();
    let (copies, counter) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
    let observer = |event: Event| {
        let (number, folder) = (counter.fetch_add(1, Ordering::Relaxed), results.path().join("toy"));
        // Every seventh rollout, and between a step's rows and its checkpoint.
        let due = matches!(event, Event::Progress { .. }) && number % 7 == 0
            || matches!(event, Event::Line(line) if line.starts_with("step"));
        if due && folder.exists() {
            let copy = tempdir().unwrap();
            copy_folder(&folder, &copy.path().join("toy"));
            copies.lock().unwrap().push((format!("died at event {number}, {event:?}"), copy));
        }
    };
    start(results.path(), config, false, &observer, &AtomicBool::new(false)).unwrap();
    copies.into_inner().unwrap()
}

#[test]
fn a_run_that_died_anywhere_and_is_resumed_is_the_same_run_and_no_row_is_lost() {
    let config = config(CHANGES);
    let want = straight(&config);
    let copies = dead(&config);
    assert!(copies.len() >= 12, "{} copies", copies.len());
    let mut moved_somewhere = false;
    for (what, results) in &copies {
        let folder = results.path().join("toy");
        let before = fs::read_to_string(folder.join("generations.jsonl")).unwrap();
        let rows_before = before.lines().count() + lines(&folder.join("metrics.jsonl")).len();
        let said = resume(results.path(), &config);
        assert_same(&left(results.path()), &want, what);

        // What was written after the checkpoint is moved, the rest stays: together that is what was there.
        let newest = said.iter().find_map(|line| line.split_once("at step ")).expect("it says where it goes on").1;
        let newest: u64 = newest.parse().unwrap();
        let stays = |row: &Value| row["step"].as_u64().unwrap() < newest;
        let kept = generations(results.path()).iter().filter(|row| stays(row)).count()
            + lines(&folder.join("metrics.jsonl")).iter().filter(|row| stays(row)).count();
        let aside = folder.join("interrupted-1.jsonl");
        let moved = if aside.exists() { lines(&aside) } else { Vec::new() };
        assert!(moved.iter().all(|row| !stays(row)), "{what}");
        assert_eq!(kept + moved.len(), rows_before, "{what}");
        assert_eq!(moved.is_empty(), !said.iter().any(|line| line.contains("moved")), "{what}: {said:?}");
        moved_somewhere |=
            moved.iter().any(|row| row["split"] == "train") && moved.iter().any(|row| row["loss"].is_f64());
    }
    assert!(moved_somewhere);
}

#[test]
fn torn_last_lines_are_dropped_and_reported_and_other_damage_is_refused() {
    let config = config(CHANGES);
    let want = straight(&config);
    let results = tempdir().unwrap();
    run_until(results.path(), &config, false, 3);
    let append = |name: &str, text: &str| {
        let path = results.path().join("toy").join(name);
        fs::write(&path, fs::read_to_string(&path).unwrap() + text).unwrap();
    };
    append("generations.jsonl", "{\"schema\":1,\"split\":\"train\",\"step\":3,\"policy_ver");
    append("metrics.jsonl", "{\"step\":3}");
    let said = resume(results.path(), &config);
    let torn: Vec<&String> = said.iter().filter(|line| line.contains("torn")).collect();
    assert!(torn.len() == 2 && torn[0].contains("generations.jsonl") && torn[1].contains("metrics.jsonl"), "{said:?}");
    assert!(!results.path().join("toy/interrupted-1.jsonl").exists());
    assert_same(&left(results.path()), &want, "torn");

    append("metrics.jsonl", "not a row\n");
    let error = failure(results.path(), CHANGES, true);
    assert!(error.contains("metrics.jsonl: line 10: not a row"), "{error}");
}

#[test]
fn a_second_resume_puts_its_rows_into_another_file() {
    let config = config(CHANGES);
    let copies = dead(&config);
    let (_, results) = copies.last().unwrap();
    let append_row_of = |step: u64| {
        let path = results.path().join("toy/generations.jsonl");
        let row = format!("{{\"step\":{step}}}\n");
        fs::write(&path, fs::read_to_string(&path).unwrap() + &row).unwrap();
    };
    append_row_of(90);
    resume(results.path(), &config);
    append_row_of(91);
    resume(results.path(), &config);
    let last = |number: u64| lines(&results.path().join(format!("toy/interrupted-{number}.jsonl")));
    assert!(last(1).iter().any(|row| row["step"] == 90) && last(1).iter().all(|row| row["step"] != 91));
    assert!(last(2).iter().any(|row| row["step"] == 91));
}

#[test]
fn a_finished_run_can_be_resumed_and_stays_the_same() {
    let config = config(CHANGES);
    let results = tempdir().unwrap();
    run(results.path(), &config);
    let want = left(results.path());
    resume(results.path(), &config);
    assert_same(&left(results.path()), &want, "resumed when finished");
}

#[test]
fn what_cannot_be_resumed_or_started_is_refused_and_left_alone() {
    let results = tempdir().unwrap();
    run(results.path(), &config("steps = 2"));
    let want = left(results.path());
    for (changes, resume, says) in [
        ("steps = 2", false, "toy exists already: continue that run with --resume, or give this one another `name`"),
        ("steps = 3", true, "the run was started with another `steps`, 2 and not 3"),
        ("steps = 2\nlearner.learning_rate = 1e-3", true, "another `learner.learning_rate`, 0.02 and not 0.001"),
    ] {
        let error = failure(results.path(), changes, resume);
        assert!(error.contains(says), "{changes}: {error}");
    }
    assert_same(&left(results.path()), &want, "refused");
}

#[test]
fn resuming_another_adapter_or_no_run_at_all_says_so() {
    let results = tempdir().unwrap();
    run(results.path(), &config("steps = 2"));
    let error = failure(results.path(), "steps = 2\nlora.rank = 8", true);
    assert!(error.contains("the run was started with another `lora.rank`, 4 and not 8"), "{error}");
    let error = failure(tempdir().unwrap().path(), "", true);
    assert!(error.contains("there is no run to resume"), "{error}");
}

#[test]
fn the_newest_checkpoints_are_kept_and_nothing_else() {
    for (every, keep, kept) in [
        (1, 2, &["step-000004", "step-000005"][..]),
        (2, 9, &["step-000002", "step-000004", "step-000005"]),
        (0, 1, &["step-000005"]),
    ] {
        let results = tempdir().unwrap();
        run(results.path(), &config(&format!("steps = 5\ncheckpoint.every = {every}\ncheckpoint.keep = {keep}")));
        let entries = fs::read_dir(results.path().join("toy/checkpoints")).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, kept);
    }
}

/// The parts of rows that two runs have in common when their policies are the same.
fn sampled(rows: &[Value], step: u64) -> Vec<[Value; 4]> {
    let part = |row: &&Value| ["task", "completion", "mean_logprob", "reward"].map(|key| row[key].clone());
    rows_of(rows, "eval", step).iter().map(part).collect()
}

#[test]
fn an_adapter_to_start_from_is_the_adapter_that_was_saved() {
    let first = tempdir().unwrap();
    run(first.path(), &config("evaluation.tasks = 5\nsampling.stop = []"));
    let saved = first.path().join("toy/checkpoints/step-000004");
    let start_from = format!("start_from = {:?}", saved.to_str().unwrap());

    // The reference is the adapter that it starts from, also after a stop.
    let kept = "evaluation.tasks = 5\nsampling.stop = []\nlearner.kl = 0.1\n[lora]\n";
    let config = config(&format!("{kept}{start_from}"));
    let (straight, stopped) = (tempdir().unwrap(), tempdir().unwrap());
    run(straight.path(), &config);
    run_until(stopped.path(), &config, false, 2);
    resume(stopped.path(), &config);
    assert_same(&left(stopped.path()), &left(straight.path()), "with a reference");
    let (before, after) = (generations(first.path()), generations(straight.path()));
    assert_eq!(sampled(&before, 4), sampled(&after, 0));
    assert_ne!(sampled(&before, 0), sampled(&after, 0), "the adapter does something");
    let kl: Vec<f64> =
        step_metrics(&straight.path().join("toy")).iter().map(|row| row["kl"].as_f64().unwrap()).collect();
    assert!(kl[0].abs() < 1e-6 && kl[3] > 1e-3, "{kl:?}");

    for (change, key) in [
        ("rank = 8", "lora.rank"),
        ("alpha = 16.0", "lora.alpha"),
        ("rslora = true", "lora.rslora"),
        ("targets = [\"q_proj\"]", "lora.targets"),
        ("targets = [\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\", \"up_proj\"]", "lora.targets"),
    ] {
        let results = tempdir().unwrap();
        let error = failure(results.path(), &format!("[lora]\n{change}\n{start_from}"), false);
        assert!(error.contains("lora.start_from") && error.contains(key), "{change}: {error}");
        assert_eq!(fs::read_dir(results.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_checkpoint_is_an_adapter_as_peft_writes_them() {
    let results = tempdir().unwrap();
    run(results.path(), &config("steps = 1\nevaluation.tasks = 0"));
    let folder = results.path().join("toy/checkpoints/step-000001");
    let ours = safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    let theirs = safetensors::load(model().join("adapter_lora/adapter_model.safetensors"), &Device::Cpu).unwrap();
    let shapes = |tensors: &std::collections::HashMap<String, candle_core::Tensor>| {
        let named =
            tensors.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec(), tensor.dtype().as_str()));
        named.collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(shapes(&ours), shapes(&theirs));
    let config: Value = serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    let peft: Value =
        serde_json::from_slice(&fs::read(model().join("adapter_lora/adapter_config.json")).unwrap()).unwrap();
    for key in ["peft_type", "task_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "fan_in_fan_out"] {
        assert_eq!(config[key], peft[key], "{key}");
    }
}

/// Rows that an evaluation reserved must not change how many groups of a step are sampled together: a resumed run does not
/// evaluate first. The model's context is made longer, so that an evaluation can ask for more rows than are kept usually.
#[test]
fn an_evaluation_with_room_for_longer_completions_changes_nothing_of_a_step() {
    let folder = tempdir().unwrap();
    copy_folder(&model(), folder.path());
    let text = fs::read_to_string(model().join("config.json")).unwrap();
    fs::remove_file(folder.path().join("config.json")).unwrap();
    let longer = text.replace("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 40000");
    fs::write(folder.path().join("config.json"), longer).unwrap();
    let changes = "name = \"toy\"\nsteps = 2\ncheckpoint.every = 1\nbatch = { prompts = 3, group = 4, micro_tokens = 4096 }\n\
                   lora.rank = 4\nlearner.learning_rate = 2e-2\n\
                   sampling = { max_tokens = 1500, stop = [\"t\", \"7\", \"e\", \"a\", \"1\"] }\n\
                   evaluation = { tasks = 1, max_tokens = 20000, temperature = 1.0 }\n[[environment]]\nname = \"toy\"";
    let text = changed("", changes, folder.path().to_str().unwrap());
    let config = Config::parse(&text, "long.toml").unwrap();
    let results = tempdir().unwrap();
    run_until(results.path(), &config, false, 1);
    resume(results.path(), &config);
    assert_same(&left(results.path()), &straight(&config), "resumed");
}
