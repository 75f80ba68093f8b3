//! `candor report`, the program itself: what it writes is all there, its numbers are those of the evaluation functions, nothing that
//! a model wrote becomes markup, and what is missing stays missing.

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use candor::evaluation::answers::Answers;
use candor::evaluation::bootstrap::Resampling;
use candor::evaluation::measures::{METRICS, Measures};
use candor::evaluation::{Predictions, brier};
use candor::report::chart::Axis;
use candor_environments::rows::each_row;
use flate2::read::ZlibDecoder;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::check::close;
use crate::program::{Ended, Place};
use crate::recorded::{LARGE, SMALL, lines, rows, write};

/// A place with a run's folder `results/small` of these rows.
fn place(rows: impl IntoIterator<Item = Value>) -> Place {
    let place = Place(tempfile::tempdir().unwrap());
    fs::create_dir_all(place.path("results/small")).unwrap();
    fs::write(place.path("results/small/generations.jsonl"), lines(rows)).unwrap();
    place
}

#[track_caller]
fn reported(place: &Place, arguments: &[&str]) -> Ended {
    let ended = place.candor(&[&["report"], arguments].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended
}

fn read(place: &Place, path: &str) -> String {
    fs::read_to_string(place.path(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A CSV file's rows, as another reader of CSV than the writer sees them.
fn table(place: &Place, path: &str) -> Vec<Map<String, Value>> {
    let mut rows = Vec::new();
    let read = each_row(&place.path(path), |_, row| {
        rows.push(row);
        Ok(())
    });
    read.unwrap();
    rows
}

fn cell(row: &Map<String, Value>, column: &str) -> Option<f64> {
    let text = row[column].as_str().unwrap();
    (!text.is_empty()).then(|| text.parse().unwrap())
}

/// (confidence, correct) of the rows of a step that state a confidence.
fn stated(rows: &[Value], split: &str, step: u64) -> (Vec<f64>, Vec<bool>) {
    let of_step = rows.iter().filter(|row| row["split"] == split && row["step"] == step);
    of_step.filter_map(|row| Some((row["metrics"]["confidence"].as_f64()?, row["metrics"]["correct"] == 1.0))).unzip()
}

/// What the page has packed: its index, and every rollout's prompt and completion.
fn unpacked(page: &str) -> (Value, Vec<(Value, String)>) {
    let script = |line: &str| {
        let packed = STANDARD.decode(line.split_once('>').unwrap().1.split_once('<').unwrap().0).unwrap();
        serde_json::from_reader::<_, Value>(ZlibDecoder::new(&packed[..])).unwrap()
    };
    let data = |start: &'static str| page.lines().filter(move |line| line.starts_with(start));
    let index = script(data("<script type=\"text/plain\" id=\"index\">").next().unwrap());
    let mut texts = Vec::new();
    for line in data("<script type=\"text/plain\" class=\"texts\"") {
        assert!(line.contains(&format!("data-first=\"{}\"", texts.len())), "{}", &line[..80]);
        let chunk = script(line);
        for row in chunk["rows"].as_array().unwrap() {
            let prompt = chunk["prompts"][row[0].as_u64().unwrap() as usize].clone();
            texts.push((prompt, row[1].as_str().unwrap().to_string()));
        }
    }
    (index, texts)
}

/// Would catch a number that the report computes by itself, a row that is lost, a picture that is none, and a page that needs a
/// network or that cannot find a rollout's text.
#[test]
fn everything_is_written_and_the_numbers_are_those_of_the_evaluation() {
    let all: Vec<Value> = rows(SMALL).collect();
    let place = place(all.clone());
    const LEARNER: [&str; 6] = ["loss", "grad_norm", "entropy", "mismatch/mean", "frac_reward_zero_std", "lr"];
    let metrics = (0..SMALL.steps).map(|step| {
        let mut row = json!({"step": step, "split": "train", "reward/mean": 0.25, "grades": {"correct": 0.5}});
        LEARNER.iter().for_each(|name| row[name] = json!(1e-6 * step as f64));
        row
    });
    fs::write(place.path("results/small/metrics.jsonl"), lines(metrics)).unwrap();
    fs::write(place.path("results/small/config.toml"), "name = \"small\"\nsteps = 12\n[model]\nsource = \"m\"\n")
        .unwrap();
    let stages = [("sample", 0.0, 2.0), ("score", 0.5, 3.0), ("learn", 3.0, 5.0)];
    let span = |step: u64, (stage, start, end): (&str, f64, f64)| {
        let later = 5.0 * step as f64;
        json!({"stage": stage, "step": step, "start": later + start, "end": later + end})
    };
    let spans = (0..12).flat_map(|step| stages.map(|stage| span(step, stage)));
    fs::write(place.path("results/small/spans.jsonl"), lines(spans)).unwrap();
    let ended = reported(&place, &["results/small"]);
    assert_eq!(ended.stdout.trim(), "results/small/report/index.html");
    assert!(ended.stderr.contains("not finished"), "there is no summary.json: {}", ended.stderr);

    let figures = "over_steps reliability_phases confidence_histogram coverage_accuracy routing calibration_curves learner \
                   brier_over_time timeline";
    for name in figures.split(' ') {
        let bytes = fs::read(place.path(&format!("results/small/report/{name}.png"))).unwrap();
        let mut decoder = png::Decoder::new(Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; decoder.output_buffer_size().unwrap()];
        decoder.next_frame(&mut pixels).unwrap();
        assert!(pixels.iter().any(|&byte| byte < 64), "{name}: nothing is drawn");
        assert!(read(&place, &format!("results/small/report/{name}.svg")).contains("</svg>"));
    }

    let timeline = read(&place, "results/small/report/timeline.svg");
    for words in ["sampler", "scorers", "learner", "rollouts", "steps 1 to 8", "steps 5 to 12"] {
        assert!(timeline.contains(&format!("\n{words}\n")), "{words} is not in the timeline");
    }
    // Twice eight steps of three bars, each filled and outlined, three swatches, and the background.
    assert_eq!(timeline.matches("<rect").count(), 2 * (2 * 3 * 8 + 3) + 1);

    let learner = read(&place, "results/small/report/learner.svg");
    assert!(LEARNER.iter().all(|name| learner.contains(&format!("\n{name}\n"))), "a metric has another name now");

    let csv = table(&place, "results/small/report/calibration_metrics.csv");
    assert_eq!(csv.len(), all.len());
    for (row, want) in csv.iter().zip(&all) {
        assert_eq!(cell(row, "confidence"), want["metrics"]["confidence"].as_f64());
        assert_eq!(cell(row, "reward"), want["reward"].as_f64());
    }
    let steps = table(&place, "results/small/report/metrics.csv");
    assert_eq!(steps.len(), SMALL.steps as usize + 1, "one per step, and one of the evaluation after them");
    for (step, row) in steps.iter().enumerate() {
        let last = step as u64 == SMALL.steps;
        let (split, prefix) = if last { ("eval", "eval/calibration") } else { ("train", "calibration") };
        let (confidences, correct) = stated(&all, split, step as u64);
        let predictions = Predictions::new(&confidences, &correct).unwrap();
        for metric in &METRICS {
            assert_eq!(cell(row, &format!("{prefix}/{}", metric.name)), (metric.of)(&predictions), "{}", metric.name);
        }
        assert_eq!(cell(row, "reward/mean"), (!last).then_some(0.25));
        assert_eq!(cell(row, "grades/correct"), (!last).then_some(0.5));
        let step = step.to_string();
        let of_step = csv.iter().filter(|row| row["split"] == split && row["step"] == step);
        let briers: Vec<f64> = of_step.filter_map(|row| cell(row, "brier")).collect();
        close("mean of the column", briers.iter().sum::<f64>() / briers.len() as f64, brier(&predictions), 1e-12);
    }

    let page = read(&place, "results/small/report/index.html");
    let after = all.iter().filter(|row| row["split"] == "eval" && row["step"] == SMALL.steps);
    let answers = after.map(|row| {
        let correct = row["metrics"]["correct"] == 1.0;
        (row["task"].as_str().unwrap(), row["metrics"]["confidence"].as_f64(), correct)
    });
    let measures = Measures::of(&Answers::new(answers).unwrap(), Resampling::default());
    for estimate in [measures.parse_rate].iter().chain(&measures.estimates.0) {
        let number = |value: f64| format!("{value:.3}").replace("-0.000", "0.000").replace('-', "−");
        let (Some(value), Some(both)) = (estimate.value, estimate.interval) else { continue };
        let want = format!("<td>{}<small>{} to {}</small></td>", number(value), number(both.low), number(both.high));
        assert!(page.contains(&want), "{want}");
    }
    let without_names = page.replace("http://www.w3.org/2000/svg", "");
    assert!(!without_names.contains("http:") && !without_names.contains("https:"), "the page needs no network");
    let (index, texts) = unpacked(&page);
    for ((prompt, completion), want) in texts.iter().zip(&all) {
        assert_eq!((prompt, completion.as_str()), (&want["prompt"], want["completion"].as_str().unwrap()));
    }
    assert_eq!((texts.len(), index["columns"]["reward"].as_array().unwrap().len()), (all.len(), all.len()));
    let samples = read(&place, "results/small/report/cot_samples.txt");
    assert_eq!(samples.matches("--- boolq/train/").count(), 20);
    assert!(
        samples.contains("small, step 0: 10 of 12 rollouts") && samples.contains("small, step 11: 10 of 12 rollouts")
    );
}

/// Would catch markup of the model's, of a data set's or of a folder's name that becomes part of the page, and cells that end early.
#[test]
fn nothing_that_was_written_by_others_becomes_markup_or_a_cell_of_its_own() {
    const HOSTILE: &str = "</script><img src=x onerror=alert(1)>\"',\r\n<!--data-->{{ title }}";
    let all = rows(SMALL).map(|mut row| {
        for field in ["completion", "environment", "task"] {
            row[field] = json!(HOSTILE);
        }
        row["prompt"][0]["content"] = json!(HOSTILE);
        row["labels"] = json!({ HOSTILE: HOSTILE });
        row["flags"] = json!([HOSTILE]);
        row
    });
    let all: Vec<Value> = all.collect();
    let place = place(all.clone());
    let folder = "results/<img src=x onerror=alert(1)>";
    fs::rename(place.path("results/small"), place.path(folder)).unwrap();
    fs::write(place.path(folder).join("config.toml"), format!("# {}\n", HOSTILE.replace("\r\n", ""))).unwrap();
    reported(&place, &[folder]);
    let page = read(&place, &format!("{folder}/report/index.html"));
    assert!(!page.contains("<img"), "{}", &page[page.find("<img").unwrap() - 200..][..300]);
    let chunks = page.matches("class=\"texts\"").count();
    assert_eq!(page.matches("<script").count(), 2 + chunks, "the index, the texts and the page's own");
    let (_, texts) = unpacked(&page);
    assert!(texts.iter().all(|(_, completion)| completion == HOSTILE));
    let csv = table(&place, &format!("{folder}/report/calibration_metrics.csv"));
    assert_eq!(csv.len(), all.len());
    assert!(csv.iter().all(|row| row["task"] == HOSTILE && row["environment"] == HOSTILE));
    let svg = read(&place, &format!("{folder}/report/over_steps.svg"));
    assert!(!svg.contains("<img"));
}

/// Would catch a Brier score of 0 where there is none, a curve through steps that say nothing, and a table of dashes.
#[test]
fn what_nobody_could_read_has_no_numbers() {
    let unreadable = |step: Option<u64>| {
        rows(SMALL).map(move |mut row| {
            if step.is_none_or(|step| row["step"] == step) {
                row["parse"] = json!("missing");
                row["metrics"] = json!({});
            }
            row
        })
    };
    let none = place(unreadable(None));
    reported(&none, &["results/small"]);
    assert!(!none.path("results/small/report/brier_over_time.png").exists(), "there is nothing to draw");
    let page = read(&none, "results/small/report/index.html");
    assert!(page.contains("<h3>Over the steps</h3>") && !page.contains("id=\"numbers\"") && !page.contains("NaN"));
    for row in table(&none, "results/small/report/metrics.csv") {
        let blank = |column: &str| row.get(column).is_none_or(|cell| cell == "");
        assert!(blank("calibration/brier") && blank("eval/calibration/brier"));
    }
    assert!(table(&none, "results/small/report/calibration_metrics.csv").iter().all(|row| row["brier"] == ""));

    // A gap is two lines: one up to step 4, one from step 6.
    let [whole, gap] = [rows(SMALL).collect::<Vec<_>>(), unreadable(Some(5)).collect()].map(|rows| {
        let place = place(rows);
        reported(&place, &["results/small"]);
        let steps = table(&place, "results/small/report/metrics.csv");
        assert!(steps.iter().all(|row| cell(row, "calibration/parsed").is_none_or(|parsed| parsed >= 0.0)));
        read(&place, "results/small/report/brier_over_time.svg").matches("stroke-width=\"4\"").count()
    });
    assert_eq!(gap, whole + 1);
}

/// Would catch a report that depends on how a file is packed, or that fails on a run that is just writing.
#[test]
fn packed_torn_and_several_files_are_read_and_empty_ones_are_refused() {
    let place = place(rows(SMALL));
    let text = lines(rows(SMALL));
    for name in ["one.jsonl.gz", "two.jsonl.zst"] {
        write(&place.path(name), text.as_bytes());
    }
    fs::write(place.path("three.jsonl"), format!("{text}{{\"schema\":1,\"spl")).unwrap();
    let files = ["one.jsonl.gz", "two.jsonl.zst", "three.jsonl"];
    let refused = place.candor(&["report", files[0]]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("give it with --output"), "{}", refused.stderr);
    let mut csv: BTreeMap<String, usize> = BTreeMap::new();
    for file in files {
        let ended = reported(&place, &[file, "--output", "out"]);
        assert_eq!(ended.stderr.contains("left out a torn last line"), file == "three.jsonl", "{}", ended.stderr);
        let text = read(&place, "out/calibration_metrics.csv").replace(&file[..file.find('.').unwrap()], "");
        *csv.entry(text).or_default() += 1;
    }
    assert_eq!(csv.len(), 1, "the same rollouts");
    reported(&place, &[&files[..], &["results/small", "--output", "all", "--quiet"]].concat());
    let page = read(&place, "all/index.html");
    for name in ["one", "two", "three", "small"] {
        assert!(page.contains(&format!("<th scope=\"col\">{name}: Held out, after 12 steps</th>")), "{name}");
    }
    assert_eq!(unpacked(&page).1.len(), 4 * rows(SMALL).count());
    let columns = table(&place, "all/calibration_metrics.csv");
    assert_eq!(columns.iter().filter(|row| row["run"] == "two").count(), rows(SMALL).count());

    fs::write(place.path("empty.jsonl"), "").unwrap();
    let mut wrong: Vec<Value> = rows(SMALL).take(2).collect();
    wrong[1]["metrics"]["confidence"] = json!(70.0);
    fs::write(place.path("wrong.jsonl"), lines(wrong)).unwrap();
    for (file, says) in [
        ("empty.jsonl", "empty.jsonl: there is no rollout in it yet"),
        ("wrong.jsonl", "wrong.jsonl: line 2: the confidence 70 is not in [0, 1]"),
        ("nowhere", "nowhere: No such file"),
    ] {
        let ended = place.candor(&["report", file, "--output", "x"]);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""));
        assert!(ended.stderr.contains(says) && ended.stderr.lines().count() == 1, "{}", ended.stderr);
    }
    assert!(!place.path("x").exists(), "nothing is written before all input is found good");
}

proptest! {
    /// Would catch an axis without numbers or with hundreds, and numbers that look alike.
    #[test]
    fn an_axis_has_a_few_numbers_that_differ(low in -1e6..1e6, size in 1e-6..1e6, count in 5_usize..9, whole: bool) {
        let axis = Axis { label: String::new(), range: (low, low + size), whole, names: &[] };
        let ticks = axis.ticks(count);
        prop_assert!(ticks.len() <= count + 1);
        prop_assert!(whole || ticks.len() >= 2, "{ticks:?}");
        prop_assert!(ticks.iter().all(|tick| *tick >= low - size * 1e-6 && *tick <= low + size * (1.0 + 1e-6)));
        let mut said: Vec<String> = ticks.iter().map(|tick| axis.tick(*tick, count)).collect();
        said.dedup();
        prop_assert_eq!(said.len(), ticks.len());
    }
}

/// `cargo test --test all -- --ignored writes_a_large_run` leaves a run of 51,200 rollouts in target/large-run, to measure with.
#[test]
#[ignore = "writes 80 MB"]
fn writes_a_large_run() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target/large-run");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("generations.jsonl"), lines(rows(LARGE))).unwrap();
}
