//! `candor rescore`: nothing changed gives the same rows; what changes is what the formula says; what cannot be scored again is
//! refused before anything is.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candor::rescore::Rescore;
use candor::rescored::Rescored;
use candor::run::RowSplit;
use candor_environments::Load;
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::check::close;
use crate::program::Place;
use crate::toy::{config, lines, load, run};

/// A finished run of the toy.
fn toy_run(changes: &str) -> (TempDir, PathBuf) {
    let results = tempdir().unwrap();
    run(results.path(), &config(changes));
    let folder = results.path().join("toy");
    (results, folder)
}

fn rescored(folder: &Path, sets: &[&str]) -> Result<Rescored> {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    Rescore::prepare(folder, &sets, None, &[("toy", load as Load)], &|_| {})?.run(&|_| {})
}

#[track_caller]
fn refused(folder: &Path, sets: &[&str], said: &str) {
    let error = format!("{:#}", rescored(folder, sets).err().expect("it is refused"));
    assert!(error.contains(said), "{error}");
    let folder = if folder.is_dir() { folder } else { folder.parent().unwrap() };
    let left = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|name| name.starts_with("rescored")).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Fails if rescoring takes another path than training: other counts, another order, other advantages.
#[test]
fn a_run_rescored_with_nothing_changed_is_the_same_rows() {
    for changes in ["", "learner.advantage = \"rloo\"", "environment = [{ name = \"toy\", behavior = \"compares\" }]"] {
        let (_results, folder) = toy_run(changes);
        let before = fs::read(folder.join("generations.jsonl")).unwrap();
        let rescored = rescored(&folder, &[]).unwrap();
        assert_eq!((rescored.changed, rescored.sign_flips()), (0, (0, 0)), "{changes}");
        assert_eq!(rescored.rows(), 52);
        assert_eq!(rescored.output, folder.join("rescored-1.jsonl"));
        assert!(fs::read(&rescored.output).unwrap() == before, "{changes}: other rows");
        assert!(fs::read(folder.join("generations.jsonl")).unwrap() == before, "the original stays");
        let [was, is] = rescored.metrics(RowSplit::Train, None).map(|row| row.to_json());
        assert_eq!(was, is);
    }
}

/// Errors become scores: the judge that failed in the run answers now.
#[test]
fn what_had_no_score_can_get_one() {
    let (_results, folder) = toy_run("environment = [{ name = \"toy\", behavior = \"plain\", tasks = 4 }]\nsteps = 2");
    // What a failed judge leaves.
    let mut rows = lines(&folder.join("generations.jsonl"));
    let failed = rows.iter_mut().filter(|row| row["split"] == "train" && row["group"] == 1);
    let mut count = 0;
    for row in failed {
        (row["reward"], row["advantage"], row["error"]) = (Value::Null, Value::Null, json!("judge: gone"));
        (row["parts"], row["metrics"]) = (json!({}), json!({}));
        count += 1;
    }
    fs::write(folder.join("generations.jsonl"), rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    let rescored = rescored(&folder, &[]).unwrap();
    assert_eq!((rescored.changed, count), (8, 8));
    let [was, is] = rescored.metrics(RowSplit::Train, None).map(|row| row.to_json());
    assert_eq!((&was["score_errors"], &is["score_errors"]), (&json!(8), &json!(0)));
    assert_eq!((&was["dropped_groups"], &is["dropped_groups"]), (&json!(2), &json!(0)));
    assert!(rescored.to_string().contains("8 of 28 rows changed"), "{rescored}");
    assert!(lines(&rescored.output).iter().all(|row| row["error"].is_null()));
}

#[test]
fn what_cannot_be_scored_again_is_refused_before_anything_is() {
    let (_results, folder) = toy_run("");
    let row = "generations.jsonl: line 1: task toy/heldout/";
    refused(&folder, &["environment.0.prompt=35"], row);
    refused(&folder, &["environment.0.prompt=35"], "toy asks something else now");
    refused(&folder, &["environment.0.tasks=1"], "toy has no such task to evaluate on any more");
    refused(&folder, &["environment.0.nonsense=1"], "nonsense");
    for (set, key) in [("sampling.temperature=0.5", "sampling.temperature"), ("batch.group=2", "batch.group")] {
        refused(&folder, &[set], &format!("--set {key}: "));
        refused(&folder, &[set], "completions are scored again, not sampled again");
    }
    refused(&folder, &["environment.0.behavior=panics"], "panicked on task");
    refused(&folder, &["environment.0.behavior=not_a_number"], "the reward is NaN");
    refused(&folder.join("generations.jsonl"), &[], "not a run's folder");

    let path = folder.join("generations.jsonl");
    let rows = fs::read_to_string(&path).unwrap();
    let mut first: Value = serde_json::from_str(rows.lines().next().unwrap()).unwrap();
    first.as_object_mut().unwrap().remove("prompt");
    fs::write(&path, format!("{first}\n{rows}")).unwrap();
    refused(&folder, &[], &format!("line 1: task {}: the row holds no prompt", first["task"].as_str().unwrap()));
    fs::write(&path, rows.replace("\"environment\":\"toy\"", "\"environment\":\"gone\"")).unwrap();
    refused(&folder, &[], "the config has no environment \"gone\"");
    // A comparison of some of a group's completions would be another one.
    fs::write(&path, rows.lines().skip(3).map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    refused(
        &folder,
        &["environment.0.behavior=compares"],
        "toy compares the 4 rollouts of a group, and 3 are in the file",
    );
    fs::write(&path, "{\"schema\":1}\nnot a row\n").unwrap();
    refused(&folder, &[], "generations.jsonl: line 1");
}

/// Through the program, on completions that were written by hand: the rewards are those of the rules' formulas.
#[test]
fn another_reward_gives_what_its_formula_says() {
    let environment = "environment = [{ name = \"boolq\", source = \"rows\", examples = \"none\" }]";
    let place =
        Place::new(&format!("steps = 1\nbatch = {{ prompts = 2, group = 2 }}\nevaluation.tasks = 0\n{environment}"));
    place.finish(&[]);
    let mut rows = place.rows();
    let texts = [
        "ANSWER: YES with 70% probability",
        "ANSWER: NO with 90% probability",
        "no idea \u{1b}[2J",
        "ANSWER: YES with 70% probability",
    ];
    for (row, text) in rows.iter_mut().zip(texts) {
        row["completion"] = json!(text);
    }
    let written: String = rows.iter().map(|row| format!("{row}\n")).collect();
    fs::write(place.path("results/tiny/generations.jsonl"), &written).unwrap();
    let rescore = |sets: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let line: Vec<&str> = ["rescore", "results/tiny"].into_iter().chain(sets).collect();
        let ended = place.candor(&line);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let output = ended.stdout.lines().last().unwrap().to_string();
        (ended.stdout, lines(&place.path(&output)))
    };
    let (_, brier) = rescore(&[]);
    let (said, log) = rescore(&["environment.0.reward=log", "environment.0.unparsed=-2"]);
    for (row, (brier, log)) in brier.iter().zip(&log).enumerate() {
        let (Some(p), Some(y)) = (brier["metrics"]["p_yes"].as_f64(), brier["metrics"]["y"].as_f64()) else {
            assert_eq!(
                (row, &brier["parse"], &brier["reward"], &log["reward"]),
                (2, &json!("missing"), &json!(-0.25), &json!(-2.0))
            );
            continue;
        };
        close("brier", brier["reward"].as_f64().unwrap(), 1.0 - (p - y).powi(2), 1e-12);
        assert!(log["parts"]["log"].is_f64() && log["reward"] != brier["reward"], "{log}");
        assert_eq!(
            (&log["tokens"], &log["finish"], &log["mean_logprob"]),
            (&rows[row]["tokens"], &rows[row]["finish"], &rows[row]["mean_logprob"])
        );
    }
    for part in [
        "training, 1 steps",
        "parse rate",
        "advantages with the other sign",
        "4 of 4 rows changed",
        "no idea ␛[2J",
        "results/tiny/rescored-2.jsonl",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(fs::read_to_string(place.path("results/tiny/generations.jsonl")).unwrap(), written);
    let again = place.candor(&["rescore", "results/tiny", "--output", "results/tiny/rescored-1.jsonl"]);
    assert!(again.code == Some(2) && again.stderr.contains("exists already"), "{}", again.stderr);
}
