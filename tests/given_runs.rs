//! Whole runs on completions that are given: they learn, they are the same run when resumed, they mix with rollouts, and what is
//! wrong with their rows is said before anything is computed.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use candle_core::Device;
use candor::checkpoint;
use candor::config::{Config, Dtype};
use candor::learner::completion_logprobs;
use candor::learner::tree::{Branch, Tree};
use candor::model_files::ModelFiles;
use candor::sample::{Prompts, Sample};
use candor::sampler::Settings;
use candor_environments::Message;
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::program::Place;
use crate::resume::{assert_same, left, resume, run_until, straight};
use crate::toy::{BASE, changed, generations, model, run, start, step_metrics};

/// A folder with rows of every kind, and configs on them.
pub struct Rows(TempDir);

impl Rows {
    pub fn new() -> Self {
        let folder = tempdir().unwrap();
        let write = |name: &str, row: &dyn Fn(usize) -> Value| {
            let rows: String = (0..10).map(|index| format!("{}\n", row(index))).collect();
            fs::write(folder.path().join(name), rows).unwrap();
        };
        write("sft.jsonl", &|i| json!({"prompt": format!("{i}?"), "completion": format!("it is {}", i % 3)}));
        write("dpo.jsonl", &|i| {
            let [better, worse] = [i % 2, 1 - i % 2].map(|digit| format!("it is 0.{digit}"));
            json!({"prompt": format!("{i}?"), "chosen": better, "rejected": worse})
        });
        write("implicit.jsonl", &|i| json!({"question": format!("{i}?"), "answer": "so", "is_correct": i % 2 == 0}));
        Self(folder)
    }

    /// A config on the environments of these names, `toy` among them; `base` may leave out the steps.
    pub fn config(&self, names: &[&str], changes: &str) -> Config {
        let source = model().display().to_string();
        let base = changed(BASE, "batch.prompts = 4\nevaluation.tasks = 0", &source);
        let base = if changes.contains("epochs") { base.replace("steps = 4\n", "") } else { base };
        let table = |name: &&str| match *name {
            "toy" => "[[environment]]\nname = \"toy\"\n".to_string(),
            name => {
                let source = self.0.path().join(name).with_extension("jsonl");
                format!("[[environment]]\nname = {name:?}\nsource = {:?}\n", source.display().to_string())
            }
        };
        let environments: String = names.iter().map(table).collect();
        let text = changed(&base, &format!("{changes}\n{environments}"), &source);
        Config::parse(&text, "given.toml").unwrap_or_else(|error| panic!("{error:#}\n{text}"))
    }
}

/// The metrics of every step of a run.
fn metrics(results: &Path) -> Vec<Value> {
    step_metrics(&results.join("toy"))
}

fn trained(config: &Config) -> TempDir {
    let results = tempdir().unwrap();
    run(results.path(), config);
    results
}

fn value(row: &Value, path: &str) -> f64 {
    row[path].as_f64().unwrap_or_else(|| panic!("{path}: {row}"))
}

/// What the trained adapter answers to a question, greedily, and whether it ended by itself.
fn answer(results: &Path, question: &str) -> (String, Value) {
    let newest = checkpoint::newest(&results.join("toy")).unwrap().unwrap();
    let settings = Settings { temperature: 0.0, ..Settings::training(&Rows::new().config(&["sft"], ""), 0) };
    let settings = Settings { stop: Vec::new(), ..settings };
    let questions = [question.to_string()];
    let source = model().display().to_string();
    let sample =
        Sample::prepare((&source, Dtype::Auto), Prompts::Written(&questions), Some(&newest), 1, settings, &|_| {})
            .unwrap();
    let mut rows = Vec::new();
    sample
        .run(None, &|_| {}, &mut |row| {
            rows.push(row);
            Ok(())
        })
        .unwrap();
    (rows[0]["completion"].as_str().unwrap().to_string(), rows[0]["finish"].clone())
}

/// Catches a completion that is shifted, is not what follows the chat template, or never ends.
#[test]
fn sft_teaches_to_say_what_was_shown_and_to_end() {
    let rows = Rows::new();
    let results = trained(&rows.config(&["sft"], "steps = 80\nbatch.prompts = 10\ncheckpoint.every = 0"));
    let metrics = metrics(results.path());
    let [first, last] = [&metrics[0], &metrics[79]].map(|row| value(row, "loss/demonstration"));
    assert!(first > 2.0 && last < 0.1, "{first} to {last}");
    for index in [0, 4, 8] {
        let (said, finish) = answer(results.path(), &format!("{index}?"));
        assert_eq!((said, finish), (format!("it is {}", index % 3), json!("stop")));
    }
    assert_eq!(fs::read_to_string(results.path().join("toy/generations.jsonl")).unwrap(), "", "nothing was generated");
    let tokens = metrics[0]["tokens/completion"].as_u64().unwrap();
    assert!(metrics.iter().all(|row| row["tokens/completion"] == tokens && row["given_completions"] == 10));
    assert!(metrics[0]["reward/mean"].is_null() && metrics[0]["length/mean"].is_null(), "no mean of nothing");
}

/// The log-probability of a text as the answer to a question.
fn logprob(folder: Option<&Path>, question: &str, text: &str) -> f64 {
    let files = ModelFiles::open(&model().display().to_string(), &|_| {}).unwrap();
    let policy = files.policy(folder, &Device::Cpu, &|_| {}).unwrap();
    let prompt_ids = policy.tokenizer.prompt_ids(&[Message::user(question)]).unwrap();
    let branches = vec![Branch::demonstration(policy.tokenizer.encode(text).unwrap())];
    let tree = Tree { name: "one".into(), prompt_ids, branches };
    completion_logprobs(&policy.model, policy.adapter.as_deref(), &[tree], 4096, 1.0).unwrap()[0].iter().sum()
}

/// Catches pairs that are taken the wrong way round, and a reference that is the policy itself.
#[test]
fn dpo_moves_the_policy_from_the_worse_to_the_better() {
    let rows = Rows::new();
    for options in ["", "loss = \"smoothed\"\nsmoothing = 0.1", "loss = \"ipo\"", "loss = \"hinge\""] {
        let mut config =
            rows.config(&["dpo"], "model.dtype = \"f32\"\nsteps = 20\nbatch.prompts = 10\ncheckpoint.every = 0");
        config.environments[0].options.extend(options.parse::<toml::Table>().unwrap());
        let results = trained(&config);
        let metrics = metrics(results.path());
        assert_eq!(value(&metrics[0], "rewards/margins"), 0.0, "the reference is what the run starts from");
        let last = &metrics[19];
        assert!(value(last, "rewards/margins") > 0.1 && value(last, "rewards/accuracies") == 1.0, "{last}");
        let newest = checkpoint::newest(&results.path().join("toy")).unwrap();
        for (question, better, worse) in [("0?", "it is 0.0", "it is 0.1"), ("3?", "it is 0.1", "it is 0.0")] {
            let [was, is] = [None, newest.as_deref()]
                .map(|folder| logprob(folder, question, better) - logprob(folder, question, worse));
            assert!(is > was + 1.0, "{options}: {was} to {is}");
        }
    }
}

/// Catches a sign that raises the likelihood of wrong answers, which is what the loss without `lm_on_correct_only` does.
#[test]
fn implicit_calibration_moves_likelihoods_toward_correctness() {
    let rows = Rows::new();
    let run = |changes: &str| {
        let mut config = rows.config(&["implicit"], "steps = 40\nbatch.prompts = 10\ncheckpoint.every = 0");
        config.environments[0].options.extend(changes.parse::<toml::Table>().unwrap());
        let results = trained(&config);
        let metrics = metrics(results.path());
        ["correct", "wrong"]
            .map(|kind| [&metrics[0], &metrics[39]].map(|row| value(row, &format!("likelihood/{kind}"))))
    };
    for changes in ["lambda = 1.0", "loss = \"log\"\nlambda = 0.5"] {
        let [correct, wrong] = run(changes);
        assert!(correct[1] > correct[0] + 0.3, "{changes}: {correct:?}");
        assert!(wrong[1] < correct[1] - 0.3, "{changes}: {correct:?} {wrong:?}");
    }
    let [_, wrong] = run("lambda = 0.1\nlm_on_correct_only = false");
    assert!(wrong[1] > wrong[0] + 0.3, "with a small lambda the old form raises wrong answers: {wrong:?}");
}

/// Ten rows in steps of four, twice: five steps. A pass takes every row once, in another order than the pass before.
#[test]
fn epochs_are_passes_over_the_rows() {
    let rows = Rows::new();
    let results = trained(&rows.config(&["sft"], "epochs = 2"));
    assert_eq!(metrics(results.path()).len(), 5);
    let saved = fs::read_to_string(results.path().join("toy/config.toml")).unwrap();
    assert!(saved.contains("epochs = 2\n") && !saved.contains("\nsteps = "), "{saved}");
    let counted: u64 = metrics(results.path()).iter().map(|row| row["given_completions"].as_u64().unwrap()).sum();
    assert_eq!(counted, 20);
}

/// The second pass meets a reference that was computed in another process: of a tree alone, so that it is the same to the bit.
#[test]
fn runs_on_given_completions_resume_bit_for_bit() {
    let rows = Rows::new();
    let first = trained(&rows.config(&["sft"], "steps = 3"));
    let start = checkpoint::newest(&first.path().join("toy")).unwrap().unwrap();
    let started = format!("lora.start_from = {:?}", start.display().to_string());
    for (names, changes) in [
        (&["dpo"][..], format!("epochs = 2\n{started}")),
        (&["dpo"], format!("epochs = 2\nlora.dropout = 0.3\n{started}")),
        (&["implicit", "sft"], "epochs = 1".to_string()),
        (&["toy", "sft", "dpo", "implicit"], format!("steps = 5\n{started}")),
    ] {
        let config = rows.config(names, &changes);
        let want = straight(&config);
        for stop in [1, 4] {
            let results = tempdir().unwrap();
            run_until(results.path(), &config, false, stop);
            resume(results.path(), &config);
            assert_same(&left(results.path()), &want, &format!("{names:?} stopped after {stop}"));
        }
    }
}

/// Catches a reference that is the base although the run starts from an adapter: the first margin would not be zero.
#[test]
fn the_reference_is_the_adapter_that_a_run_starts_from() {
    let rows = Rows::new();
    let first = trained(&rows.config(&["sft"], "steps = 3"));
    let start = checkpoint::newest(&first.path().join("toy")).unwrap().unwrap();
    for (reference, is_zero) in [("", true), ("learner.reference = \"base\"", false)] {
        let changes = format!("steps = 1\nlora.start_from = {:?}\n{reference}", start.display().to_string());
        let results = trained(&rows.config(&["dpo"], &changes));
        let loss = value(&metrics(results.path())[0], "loss/preference");
        assert_eq!((loss - 2f64.ln()).abs() < 1e-6, is_zero, "{reference}: {loss}");
    }
}

#[test]
fn rollouts_and_given_completions_mix_in_one_step() {
    let rows = Rows::new();
    let mut config = rows.config(&["toy", "sft", "dpo"], "steps = 2\nbatch.prompts = 8");
    config.environments[0].weight = 2.0;
    let results = trained(&config);
    assert_eq!(generations(results.path()).len(), 2 * 4 * 4, "half of the prompts sample, four times each");
    for row in metrics(results.path()) {
        let part = |kind: &str| value(&row, &format!("loss/{kind}"));
        let want = 0.5 * part("reward") + 0.25 * part("demonstration") + 0.25 * part("preference");
        crate::check::close("loss", value(&row, "loss"), want, 1e-12);
        assert_eq!(row["given_completions"], 6, "two demonstrations and two pairs");
    }
}

fn failure(config: &Config) -> String {
    let results = tempdir().unwrap();
    let outcome = start(results.path(), config, false, &|_| {}, &AtomicBool::new(false));
    assert!(!results.path().join("toy").exists(), "found before anything is written");
    format!("{:#}", outcome.expect_err("the run fails"))
}

#[test]
fn what_cannot_work_is_refused_before_the_model_is_loaded() {
    let rows = Rows::new();
    let says = |config: &Config, words: &[&str]| {
        let error = failure(config);
        words.iter().for_each(|word| assert!(error.contains(word), "{word}: {error}"));
    };
    says(&rows.config(&["sft", "toy"], "epochs = 1"), &["epochs", "toy samples; set steps"]);
    says(
        &rows.config(&["sft", "toy"], "lora.dropout = 0.1"),
        &["lora.dropout: toy samples, without dropout", "use 0.0"],
    );
    says(
        &rows.config(&["sft"], "epochs = 1\nlearner.warmup_steps = 3"),
        &["learner.warmup_steps", "none of the 3 in epochs = 1"],
    );
    let tight = "batch.micro_tokens = 24\nsampling.max_tokens = 4";
    says(
        &rows.config(&["dpo"], &format!("{tight}\nbatch.long_prompts = \"error\"")),
        &["task dpo/dpo/0", "batch.micro_tokens = 24"],
    );
    says(
        &rows.config(&["dpo"], tight),
        &["batch.micro_tokens: every prompt of dpo with its completions exceeds", "raise it"],
    );
    let with = |name: &str, options: &str| {
        let mut config = rows.config(&[name], "");
        config.environments[0].options.extend(options.parse::<toml::Table>().unwrap());
        config
    };
    says(&with("dpo", "beta = 0.0"), &["environment.0.beta: is 0; it must be above 0"]);
    says(&with("dpo", "smoothing = 0.1"), &["environment.0.smoothing", "only loss = \"smoothed\" and \"robust\" use"]);
    says(&with("dpo", "loss = \"apo\""), &["environment.0.loss", "\"apo\" is unknown", "ipo_mean"]);
    says(&with("implicit", "lambda = -1.0"), &["environment.0.lambda: is -1; it must be above 0"]);
    says(&with("implicit", "pooled = true"), &["environment.0.pooled: unknown key"]);
    says(&with("sft", "loss = \"mse\""), &["environment.0.loss: unknown key"]);
}

/// A row that is wrong is named by its file and line, whatever follows it.
#[test]
fn a_bad_row_is_named_by_file_and_line() {
    let rows = Rows::new();
    let path = rows.0.path().join("sft.jsonl");
    let good = fs::read_to_string(&path).unwrap();
    let judged = "{\"question\": \"a\", \"answer\": \"b\", \"is_correct\": false}";
    for (bad, words) in [
        ("{\"prompt\": \"a\"", "not the JSON expected"),
        ("{\"prompt\": \"a\"}", "fields prompt: not a known shape"),
        ("{\"prompt\": \"a\", \"completion\": \"\"}", "a completion is empty"),
        (judged, "use the environment implicit"),
        ("[1]", "not the JSON expected"),
    ] {
        fs::write(&path, format!("{good}\n{bad}\n{good}")).unwrap();
        let error = failure(&rows.config(&["sft"], ""));
        assert!(error.contains("sft.jsonl, line 12") && error.contains(words), "{bad}: {error}");
    }
    for (empty, words) in [("", "there are no rows"), ("\n\n", "there are no rows")] {
        fs::write(&path, empty).unwrap();
        let error = failure(&rows.config(&["sft"], ""));
        assert!(error.contains(words), "{error}");
    }
}

/// The program on a config that only imitates: checked, planned, trained, with BoolQ beside it to be evaluated on.
#[test]
fn the_program_trains_on_given_completions_and_evaluates_on_others() {
    let place = Place::new("");
    let rows = Rows::new();
    fs::copy(rows.0.path().join("sft.jsonl"), place.path("train.jsonl")).unwrap();
    place.configure(
        "steps = 2\nsampling.stop = []\n[[environment]]\nname = \"sft\"\nsource = \".\"\n\
         [[evaluation.environment]]\nname = \"boolq\"\nsource = \"rows\"\nexamples = \"none\"",
    );
    let checked = place.candor(&["check", "run.toml"]);
    assert_eq!(checked.code, Some(0), "{}", checked.stderr);
    for words in [
        "sft         10 training tasks, with their completions",
        "completion  ",
        "<|im_end|>\"",
        "boolq       12 held-out tasks",
    ] {
        assert!(checked.stdout.contains(words), "{words}: {}", checked.stdout);
    }
    let planned = place.candor(&["train", "run.toml", "--dry-run"]);
    assert_eq!(planned.code, Some(0), "{}", planned.stderr);
    assert!(planned.stdout.contains("# a step: 3 tasks with their completions\n"), "{}", planned.stdout);
    let ended = place.finish(&[]);
    assert!(ended.stderr.contains("step 1/2  demonstration loss "), "{}", ended.stderr);
    assert!(ended.stdout.contains("boolq: 3 held-out tasks"), "{}", ended.stdout);

    // With nothing to evaluate on, a run goes on without, and an evaluation is an error.
    place.configure("name = \"alone\"\nsteps = 2\n[[environment]]\nname = \"sft\"\nsource = \".\"");
    let ended = place.finish(&[]);
    assert!(
        ended.stderr.contains("nothing to evaluate on: every environment carries its completions"),
        "{}",
        ended.stderr
    );
    let ended = place.candor(&["eval", "run.toml"]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("[[evaluation.environment]]"), "{}", ended.stderr);
}
