//! Evaluations through the program: rows that were written before, folders that it makes, two evaluations compared, routing, and
//! calibration maps as files, damaged ones too.

use std::fs;
use std::path::Path;

use candor::calibration_map::{CalibrationMap, Confidence};
use candor::evaluation::posthoc::{EPSILON, Map};
use candor::random::SplitMix64;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::program::{Ended, Place};
use crate::toy::lines;

/// The row of one answer.
fn row(step: u64, task: usize, rollout: usize, stated: Option<f64>, token: Option<f64>, correct: bool) -> Value {
    let mut metrics = json!({ "correct": f64::from(correct) });
    if let Some(stated) = stated {
        metrics["confidence"] = json!(stated);
    }
    json!({
        "schema": 1, "split": "eval", "step": step, "policy_version": step, "environment": "boolq",
        "task": format!("boolq/validation/{task}"), "group": task, "rollout": rollout, "prompt": [], "completion": "",
        "finish": "stop", "tokens": 5, "reward": 0.5, "parts": { "brier": 0.5 }, "advantage": null, "metrics": metrics,
        "parse": if stated.is_some() { "ok" } else { "missing" }, "flags": [], "judge": null, "mean_logprob": -0.5,
        "token_confidence": token, "error": null,
    })
}

/// Writes the rows of an evaluation of 200 tasks: answers are right with probability p, of which `state` makes the stated confidence and
/// about one in twelve states none; the tokens' probability is p itself.
fn write_rows(path: &Path, step: u64, each: usize, state: impl Fn(f64) -> f64) {
    let mut random = SplitMix64::new(4);
    let mut text = String::new();
    for task in 0..200 {
        for rollout in 0..each {
            let [p, luck, read] = std::array::from_fn(|_| random.next_f64());
            let stated = (read > 0.08).then(|| (100.0 * state(p)).round() / 100.0);
            text += &format!("{}\n", row(step, task, rollout, stated, Some(p), luck < p));
        }
    }
    let before = fs::read_to_string(path).unwrap_or_default();
    fs::write(path, before + &text).unwrap();
}

fn done(ended: Ended) -> String {
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.stdout
}

/// Exit code 2, nothing printed, and one line that says all these things.
#[track_caller]
fn refused(ended: Ended, says: &[&str]) {
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{}", ended.stderr);
    assert!(says.iter().all(|says| ended.stderr.contains(says)), "{says:?}: {}", ended.stderr);
}

fn json_at(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// An overconfident model: half of what is missing to certainty is left out.
fn overconfident(p: f64) -> f64 {
    0.5 + p / 2.0
}

/// Catches numbers that are not those of the rows, a kind of confidence or a map that is left out, and parse reasons that hide below.
#[test]
fn rows_are_measured_without_a_model_and_written_whole() {
    let place = Place::new("");
    write_rows(&place.path("rows.jsonl"), 0, 2, overconfident);
    let arguments = ["eval", "rows.jsonl", "--out", "out", "--compat", "hle", "--resamples", "200", "--quiet"];
    let ended = place.candor(&arguments);
    assert_eq!(ended.stderr, "");
    let table = done(ended);
    let table: Vec<&str> = table.lines().collect();
    assert_eq!(table[0], "boolq: 200 held-out tasks, 400 completions, rows.jsonl");
    assert!(table[1].starts_with("  read 3") && table[1].contains(": missing "), "above everything: {}", table[1]);
    let cells = |name: &str| -> Vec<f64> {
        let line =
            table.iter().find_map(|line| line.strip_prefix(&format!("  {name} "))).unwrap_or_else(|| panic!("{name}"));
        line.split_whitespace().map_while(|cell| cell.parse().ok()).collect()
    };
    let [stated, platt, isotonic, token, token_platt, _, both] = cells("Brier score")[..] else {
        panic!("seven columns")
    };
    assert!(platt < stated - 0.02 && isotonic < stated - 0.02, "maps mend overconfidence: {stated} {platt} {isotonic}");
    assert!(token < stated && token_platt < token + 0.01 && both < stated);
    assert!(cells("Brier skill")[0] < cells("Brier skill")[3]);
    assert_eq!((cells("AUROC").len(), cells("ECE, 10 bins").len(), cells("  if calibrated").len()), (7, 7, 7));
    assert!(table.iter().any(|line| line.contains("HLE calibration error")));
    assert!(table.iter().all(|line| line.chars().count() <= 80), "{table:?}");

    let metrics = json_at(&place.path("out/metrics.json"));
    let boolq = &metrics["environments"]["boolq"];
    assert_eq!((&boolq["tasks"], &boolq["completions"], &boolq["errors"]), (&200.into(), &400.into(), &0.into()));
    let raw = &boolq["stated"]["raw"];
    let (brier, parsed) = (&raw["brier"], raw["parsed"].as_u64().unwrap());
    assert!(
        (brier["value"].as_f64().unwrap() - stated).abs() < 5e-4 && brier["low"].as_f64() < brier["value"].as_f64()
    );
    assert_eq!(boolq["parse"], json!({ "missing": 400 - parsed, "ok": parsed }));
    assert_eq!((&raw["bootstrap"]["resamples"], &raw["beta"]), (&200.into(), &(parsed / 10).into()));
    assert!(boolq["hle_calibration_error"]["published"].as_f64().unwrap() > 5.0);
    assert_eq!(lines(&place.path("out/generations.jsonl")), lines(&place.path("rows.jsonl")));
    assert!(!place.path("out.new").exists());

    // What was written is read again, and says the same.
    let again = done(place.candor(&["eval", "out", "--resamples", "200", "--compat", "hle"]));
    assert_eq!(again.lines().skip(1).collect::<Vec<_>>(), table[1..]);
    refused(place.candor(&arguments), &["--out: out exists already"]);
    refused(place.candor(&["eval", "rows.jsonl", "--samples", "2"]), &["--samples", "does not end in .toml"]);
    refused(place.candor(&["eval", "rows.jsonl@7"]), &["no evaluation after 7 steps", "last one is after 0"]);
    refused(place.candor(&["eval", "nowhere"]), &["nowhere"]);
    fs::write(place.path("odd.jsonl"), format!("{}\n", row(0, 0, 0, Some(85.0), None, true))).unwrap();
    refused(place.candor(&["eval", "odd.jsonl"]), &["row 0", "85 is not in [0, 1]"]);
    fs::write(place.path("torn.jsonl"), "{\"schema\": 1, \"spl").unwrap();
    refused(place.candor(&["eval", "torn.jsonl"]), &["torn.jsonl", "line 1"]);
}

/// Catches samples that are not taken, or are all the same, and a folder that appears though the evaluation failed.
#[test]
fn a_model_is_asked_as_often_as_wanted() {
    let place = Place::new("evaluation.temperature = 1.0");
    done(place.candor(&["eval", "run.toml", "--samples", "3", "--out", "out", "--quiet"]));
    let rows = lines(&place.path("out/generations.jsonl"));
    let samples: Vec<u64> = rows.iter().map(|row| row["rollout"].as_u64().unwrap()).collect();
    assert_eq!(samples, [0, 1, 2].repeat(3));
    assert!(rows.iter().any(|row| row["completion"] != rows[0]["completion"]));
    let metrics = json_at(&place.path("out/metrics.json"));
    let boolq = &metrics["environments"]["boolq"];
    assert_eq!((&metrics["samples"], &boolq["parse"]["missing"]), (&3.into(), &9.into()));
    assert_eq!((&boolq["stated"]["raw"]["parsed"], &boolq["stated"]["platt"]), (&0.into(), &Value::Null));
    assert_eq!((&boolq["token"], fs::read_dir(place.path("out/maps")).unwrap().count()), (&Value::Null, 0));
    let cold = ["eval", "run.toml", "--samples", "3", "--out", "other", "--set", "evaluation.temperature=0"];
    refused(place.candor(&cold), &["evaluation.temperature is 0", "would be the same"]);
    assert!(!place.path("other").exists());
}

/// Catches an improvement that is claimed of chance, one that is missed, and a comparison of different questions.
#[test]
fn two_evaluations_are_compared_question_by_question() {
    let place = Place::new("");
    write_rows(&place.path("run.jsonl"), 0, 1, overconfident);
    write_rows(&place.path("run.jsonl"), 20, 1, |p| p);
    let compare = |arguments: &[&str]| place.candor(&[&["compare"], arguments, &["--resamples", "400"]].concat());
    let table = done(compare(&["run.jsonl@0", "run.jsonl", "--out", "difference.json"]));
    assert!(table.starts_with("boolq: the same 200 tasks; parse rate 0.9"), "{table}");
    let result = json_at(&place.path("difference.json"));
    let verdict = |how: &str, metric: &str| -> Value {
        let all = result[0][how].as_array().unwrap();
        all.iter().find(|one| one["metric"] == metric).unwrap()["verdict"].clone()
    };
    assert_eq!((verdict("raw", "brier"), verdict("raw", "brier_skill")), ("improved".into(), "improved".into()));
    // The order of the answers did not change, nor did their correctness; and a map does as well as this training.
    assert_eq!((verdict("raw", "auroc"), verdict("raw", "accuracy")), ("unclear".into(), "unclear".into()));
    assert_ne!(verdict("platt", "brier"), Value::from("worse"));
    assert_eq!(verdict("raw", "smooth_ece"), Value::Null, "it has no interval");
    let backward = done(compare(&["run.jsonl", "run.jsonl@0"]));
    assert!(backward.contains(" worse") && !table.contains(" worse"), "{backward}{table}");
    let same = done(compare(&["run.jsonl", "run.jsonl"]));
    assert!(!same.contains("before\n") && same.contains("+0.000 to +0.000"), "{same}");
    let raw = same.split("before+Platt").next().unwrap();
    assert!(!raw.contains("improved") && !raw.contains("worse"), "{same}");

    let text = fs::read_to_string(place.path("run.jsonl")).unwrap();
    let fewer: String = text.lines().skip(200 + 30).map(|line| format!("{line}\n")).collect();
    fs::write(place.path("fewer.jsonl"), fewer + &format!("{}\n", row(20, 900, 0, Some(0.5), None, true))).unwrap();
    let counts =
        ["not the same questions", "the first has 200, of which the second lacks 30", "of which the first lacks 1"];
    refused(compare(&["run.jsonl", "fewer.jsonl"]), &counts);
    fs::write(place.path("other.jsonl"), text.replace("\"environment\":\"boolq\"", "\"environment\":\"simpleqa\""))
        .unwrap();
    refused(compare(&["run.jsonl", "other.jsonl"]), &["not the same environments", "boolq", "simpleqa"]);
}

/// Catches a threshold that is reported on the half it was chosen on, and a map that is forgotten.
#[test]
fn routing_chooses_thresholds_from_two_evaluations() {
    let place = Place::new("");
    write_rows(&place.path("small.jsonl"), 0, 2, overconfident);
    let large: String = (0..200).map(|task| format!("{}\n", row(0, task, 0, Some(0.9), None, task % 10 > 0))).collect();
    fs::write(place.path("large.jsonl"), large).unwrap();
    let rules = ["--budget", "0.3", "--target", "0.8", "--target", "1", "--value", "40", "--out", "routing.json"];
    let table = done(place.candor(&[&["route", "small.jsonl", "large.jsonl"], &rules[..]].concat()));
    assert!(table.contains("large model 0.900") && table.contains("escalate at most 0.3"), "{table}");
    let routed = &json_at(&place.path("routing.json"))[0];
    let choices = routed["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 5);
    let of = |index: usize, half: &str, name: &str| choices[index][half][name].as_f64();
    assert!(of(0, "chosen", "escalation_rate").unwrap() <= 0.3);
    assert_eq!(of(0, "chosen", "threshold"), of(0, "held_out", "threshold"));
    assert_ne!(of(0, "chosen", "accuracy"), of(0, "held_out", "accuracy"));
    assert!(of(1, "chosen", "accuracy").unwrap() >= 0.8 && choices[2]["chosen"].is_null(), "{choices:?}");
    assert!(routed["routing"]["normalized_area"].as_f64().unwrap() > 0.2);
    // What is not read is escalated whatever the threshold.
    assert!(routed["routing"]["points"][0]["escalation_rate"].as_f64().unwrap() > 0.02);

    done(place.candor(&["eval", "small.jsonl", "--out", "small", "--resamples", "100", "--quiet"]));
    let map = "small/maps/boolq.stated.platt.json";
    let known = [
        "route",
        "small.jsonl",
        "--large-accuracy",
        "0.9",
        "--value",
        "40",
        "--calibrate",
        map,
        "--out",
        "mapped.json",
    ];
    done(place.candor(&known));
    let mapped = &json_at(&place.path("mapped.json"))[0];
    let threshold = mapped["choices"][1]["chosen"]["threshold"].as_f64().unwrap();
    assert!((threshold - (0.9 - 10.0 / 40.0)).abs() < 1e-12, "{threshold}");

    let fewer: String = fs::read_to_string(place.path("large.jsonl"))
        .unwrap()
        .lines()
        .skip(3)
        .map(|line| format!("{line}\n"))
        .collect();
    fs::write(place.path("fewer.jsonl"), fewer).unwrap();
    refused(place.candor(&["route", "small.jsonl", "fewer.jsonl"]), &["has 200, the large one lacks 3"]);
    assert_eq!(place.candor(&["route", "small.jsonl"]).code, Some(2));
    refused(
        place.candor(&["route", "small.jsonl", "large.jsonl", "--confidence", "token", "--calibrate", map]),
        &["--calibrate"],
    );
}

/// Catches a map that changes on its way through a file, is applied to the wrong confidence, or to completions that it cannot read.
#[test]
fn maps_are_written_read_and_used() {
    let place = Place::new("");
    write_rows(&place.path("rows.jsonl"), 0, 1, overconfident);
    done(place.candor(&["eval", "rows.jsonl", "--out", "out", "--resamples", "100", "--quiet"]));
    let mut names: Vec<String> = fs::read_dir(place.path("out/maps"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names.len(), 10, "{names:?}");
    let mapped = "out/maps/boolq.stated.isotonic.json";
    let table = done(place.candor(&["eval", "rows.jsonl", "--calibrate", mapped, "--resamples", "100"]));
    assert!(table.contains("+map"), "{table}");
    for name in &names {
        let path = place.path("out/maps").join(name);
        let map = CalibrationMap::read(&path).unwrap();
        map.write(&place.path("copy.json")).unwrap();
        assert_eq!(fs::read(place.path("copy.json")).unwrap(), fs::read(&path).unwrap(), "{name}");
    }
    let map = CalibrationMap::read(&place.path("out/maps/boolq.stated.platt.json")).unwrap();
    let text = "ANSWER: NO with 85% probability";
    assert_eq!(map.confidence(text, |_| panic!("not asked for")).unwrap(), Some(0.85));
    assert_eq!(map.confidence("I do not know.", |_| None).unwrap(), None);
    let token = CalibrationMap { of: Confidence::Token, ..map.clone() };
    assert_eq!(token.confidence(text, |range| (&text[range] == "NO").then_some(0.4)).unwrap(), Some(0.4));
    assert!(map.map.apply(0.85) < 0.8, "it takes off what was too much");

    // The tiny model states nothing, so there is nothing to map, and that is said.
    let sampled = done(place.candor(&[
        "sample",
        "model",
        "--prompt",
        "Is it?",
        "--max-tokens",
        "5",
        "--quiet",
        "--calibrate",
        mapped,
    ]));
    let row: Value = serde_json::from_str(&sampled).unwrap();
    assert_eq!((&row["uncalibrated_confidence"], &row["calibrated_confidence"]), (&Value::Null, &Value::Null));
    assert!(row.as_object().unwrap().contains_key("calibrated_confidence"));
    let foreign = CalibrationMap { environment: "sums".to_string(), ..map };
    foreign.write(&place.path("foreign.json")).unwrap();
    let ended = place.candor(&["sample", "model", "--prompt", "Is it?", "--calibrate", "foreign.json"]);
    refused(ended, &["--calibrate", "\"sums\"", "known here: boolq, simpleqa"]);
}

/// A map's file, with some of its fields replaced.
fn file(changes: &Value) -> String {
    let mut fields = json!({
        "format": "candor calibration map", "version": 1, "environment": "boolq", "of": "stated", "answers": 9,
        "epsilon": 1e-4, "kind": "isotonic", "x": [0.1, 0.5], "y": [0.2, 0.9], "step": false,
    });
    for (name, value) in changes.as_object().unwrap() {
        fields[name] = value.clone();
    }
    fields.to_string()
}

/// Catches a file that is believed: each of these would give confidences that are none.
#[test]
fn damaged_maps_are_refused_with_what_is_wrong() {
    let whole = file(&json!({}));
    let halfway = CalibrationMap::parse(&whole).unwrap().map.apply(0.3);
    assert!((halfway - 0.55).abs() < 1e-12, "{halfway}");
    for (changes, says) in [
        (json!({ "format": "other" }), "`format` is \"other\""),
        (json!({ "version": 2 }), "`version` is 2, this program reads 1"),
        (json!({ "version": "1" }), "`version`"),
        (json!({ "epsilon": 0.5 }), "`epsilon` is 0.5"),
        (json!({ "of": "guessed" }), "guessed"),
        (json!({ "kind": "oracle" }), "oracle"),
        (json!({ "answers": -1 }), "-1"),
        (json!({ "x": [], "y": [] }), "at least one"),
        (json!({ "x": [0.1] }), "1 and 2 numbers"),
        (json!({ "x": [0.5, 0.5] }), "`x` does not ascend"),
        (json!({ "x": [0.5, 85.0] }), "number 1, 85, is not in [0, 1]"),
        (json!({ "y": [0.9, 0.2] }), "`y` falls"),
        (json!({ "y": [0.2, null] }), "null"),
        (json!({ "kind": "histogram", "values": [0.5] }), "1 numbers and not 10"),
        (json!({ "kind": "temperature", "temperature": 0.0 }), "`temperature`: 0"),
        (json!({ "kind": "platt", "a": 1.0 }), "`b`"),
        (json!({ "kind": "beta", "a": -1.0, "b": 1.0, "m": 0.0 }), "must not be below 0"),
    ] {
        let error = format!("{:#}", CalibrationMap::parse(&file(&changes)).unwrap_err());
        assert!(error.contains(says), "{says}: {error}");
    }
    for end in 0..whole.len() {
        assert!(CalibrationMap::parse(&whole[..end]).is_err(), "cut after {end} bytes");
    }
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("map.json"), "1e999").unwrap();
    let error = format!("{:#}", CalibrationMap::read(&place.path().join("map.json")).unwrap_err());
    assert!(error.contains("map.json"), "{error}");
}

proptest! {
    /// Catches a panic on any text, and a map that leaves [0, 1].
    #[test]
    fn any_text_is_a_map_or_an_error(text in ".{0,80}", name in "[a-z]{1,9}", value in any::<f64>(), stated in 0.0..=1.0_f64) {
        prop_assert!(CalibrationMap::parse(&text).is_err());
        for changes in [json!({ &name: value }), json!({ "kind": "platt", "a": value, "b": -value }), json!({ "y": [value, value] })] {
            if let Ok(map) = CalibrationMap::parse(&file(&changes)) {
                prop_assert!((0.0..=1.0).contains(&map.map.apply(stated)), "{:?} of {stated}", map.map);
            }
        }
    }
}

/// Catches the largest numbers that a file can hold: their product overflows.
#[test]
fn an_absurd_slope_still_gives_a_probability_or_is_refused() {
    for (a, b) in [(f64::MAX, f64::MAX), (f64::MAX, -f64::MAX), (-f64::MAX, f64::MAX)] {
        let map = CalibrationMap {
            environment: "boolq".into(),
            of: Confidence::Stated,
            answers: 1,
            epsilon: EPSILON,
            map: Map::Platt { a, b },
        };
        let folder = tempfile::tempdir().unwrap();
        map.write(&folder.path().join("map.json")).unwrap();
        let Ok(map) = CalibrationMap::read(&folder.path().join("map.json")) else { continue };
        assert!([0.0, 0.2, 0.5, 1.0].iter().all(|&stated| (0.0..=1.0).contains(&map.map.apply(stated))), "{a} {b}");
    }
}
