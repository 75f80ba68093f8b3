//! `candor logprob`: PEFT's numbers for a published model, our own logits for the tiny one, and rows that are wrong.

use std::fs;
use std::path::Path;

use candor::config::Dtype;
use candor::evaluation::token_confidence;
use candor::logprob::{Logprob, Scored};
use candor::model::Model;
use candor::ops::kernel::Kernel;
use candor::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::check;
use crate::model::{adapter, logits};
use crate::program::{Ended, Place};

fn scored(source: &Path, rows: &[Value], adapter: Option<&Path>, dtype: Dtype) -> Vec<Scored> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rows.jsonl");
    fs::write(&file, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    let logprob = Logprob::prepare(source.to_str().unwrap(), &file, adapter, dtype, &|_| {}).unwrap();
    let mut all = Vec::new();
    logprob
        .run(&|_| {}, &mut |scored| {
            all.push(scored);
            Ok(())
        })
        .unwrap();
    assert_eq!(all.len(), rows.len());
    all
}

fn floats(logprobs: &[f32]) -> Vec<f64> {
    logprobs.iter().copied().map(f64::from).collect()
}

#[test]
fn golden_smollm2_with_a_peft_adapter() {
    let (Some(file), Some(banana)) = (check::smollm2(), check::golden("smollm2/adapter_banana")) else { return };
    let golden = check::json(&banana.join("golden.json"));
    let want = check::floats(&golden["completion_logps_with_adapter"]);
    let question = "What is the capital of France?";
    // SmolLM2's template opens a chat with instructions of its own, which are the golden prompt's.
    let rows = [
        json!({"prompt": golden["prompt"], "completion": "Banana city!<|im_end|>"}),
        json!({"messages": [{"role": "user", "content": question}], "completion": "Banana city!"}),
        json!({"question": question, "completion": "Banana city!", "answer": "Paris"}),
    ];
    for scored in scored(&file, &rows, Some(&banana), Dtype::F32) {
        assert_eq!(json!(scored.token_ids), golden["completion_ids"]);
        check::all_close("log-probabilities", &floats(&scored.logprobs), &want, 1e-4);
        check::close("sum", scored.sum, want.iter().sum(), 1e-4);
        check::close("mean", scored.mean, want.iter().sum::<f64>() / 5.0, 1e-4);
        // The end of the turn is the least certain token, and no part of the answer.
        check::close("confidence", scored.confidence.unwrap(), (want[..4].iter().sum::<f64>() / 4.0).exp(), 1e-4);
        assert!(scored.confidence.unwrap() > scored.mean.exp());
    }
}

#[test]
fn rows_of_any_length_come_out_in_order_as_the_logits_have_them() {
    let Some(folder) = check::golden("tiny/llama") else { return };
    let (model, tokenizer) =
        (Model::open(&folder, check::f32_kernel()).unwrap(), Tokenizer::from_folder(&folder).unwrap());
    let (adapter, _) = adapter(&model, &folder.join("adapter_lora"));
    let text =
        |number: usize, length: usize| (0..length).map(move |i| char::from(b'a' + ((number * 7 + i * 3) % 26) as u8));
    let texts: Vec<(String, String)> = (0..150)
        .map(|number| (text(number, 1 + number % 90).collect(), text(number + 5, 1 + number % 7).collect()))
        .collect();
    let rows: Vec<Value> =
        texts.iter().map(|(prompt, completion)| json!({"prompt": prompt, "completion": completion})).collect();
    let all = scored(&folder, &rows, Some(&folder.join("adapter_lora")), Dtype::F32);
    for ((prompt, completion), scored) in texts.iter().zip(&all).step_by(13) {
        let (prompt, ids) = (tokenizer.text_prompt_ids(prompt).unwrap(), tokenizer.encode(completion).unwrap());
        assert_eq!(scored.token_ids, ids, "nothing is added to a plain text");
        let all = logits(&model, &[[prompt.clone(), ids.clone()].concat()], Some(&adapter));
        let rows: Vec<&[f64]> = all.chunks(model.architecture.vocabulary).collect();
        let logprob = |(index, id): (usize, &u32)| {
            let row = rows[prompt.len() + index - 1];
            row[*id as usize] - row.iter().map(|logit| logit.exp()).sum::<f64>().ln()
        };
        let want: Vec<f64> = ids.iter().enumerate().map(logprob).collect();
        check::all_close("log-probabilities", &floats(&scored.logprobs), &want, 1e-4);
    }
}

#[test]
fn the_confidence_of_tokens_is_their_geometric_mean() {
    let Some(file) = check::vectors("parsing_cases.json") else { return };
    let cases = check::json(&file)["geometric_mean"].as_array().unwrap().clone();
    assert!(cases.len() > 5);
    for case in cases {
        let got = token_confidence(&check::floats(&case["logprobs"]));
        assert_eq!(got.is_none(), case["ours"].is_null(), "{case}");
        if let Some(got) = got {
            let want = case["ours"].as_f64().unwrap();
            check::close(&case.to_string(), got / want, 1.0, 1e-12);
        }
    }
}

/// Runs the program over rows written as they are.
fn candor(place: &Place, rows: &str, arguments: &[&str]) -> Ended {
    fs::write(place.path("rows.jsonl"), rows).unwrap();
    place.candor(&[&["logprob", "model", "rows.jsonl"], arguments].concat())
}

#[test]
fn the_program_prints_a_line_for_every_row() {
    let place = Place::new("");
    let row = json!({"prompt": "The pens", "completion": " are"});
    let ended = candor(&place, &format!("{row}\n\n{row}\n"), &["--quiet"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let lines: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines.len(), &lines[0]), (2, &lines[1]));
    let keys: Vec<&String> = lines[0].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["token_ids", "logprobs", "sum", "mean", "confidence"]);
    let mean = check::floats(&lines[0]["logprobs"]).iter().sum::<f64>()
        / lines[0]["token_ids"].as_array().unwrap().len() as f64;
    check::close("mean", lines[0]["mean"].as_f64().unwrap(), mean, 1e-6);
    // An end alone is no answer.
    let ended = candor(&place, &json!({"question": "", "completion": ""}).to_string(), &[]);
    assert!(
        ended.code == Some(0)
            && ended.stdout.contains("\"token_ids\":[2]")
            && ended.stdout.contains("\"confidence\":null"),
        "{}",
        ended.stderr
    );
}

#[test]
fn a_row_that_is_wrong_is_named_before_anything_is_printed() {
    let place = Place::new("");
    let good = json!({"prompt": "a", "completion": "b"});
    let long = json!({"prompt": "a ".repeat(1200), "completion": "b"}).to_string();
    for (row, says) in [
        (r#"{"prompt": "a"}"#, "field `completion` is missing"),
        (r#"{"completion": "a"}"#, "there is no field `prompt`, `messages` or `question`"),
        (r#"{"prompt": "a", "messages": [], "completion": "b"}"#, "both `prompt` and `messages`"),
        (r#"{"prompt": "a", "completion": 3}"#, "field `completion` is 3, not a string"),
        (r#"{"prompt": ["a"], "completion": "b"}"#, "field `prompt`: invalid type: sequence"),
        (r#"{"messages": [{"role": "judge", "content": "a"}], "completion": "b"}"#, "unknown variant `judge`"),
        (r#"{"prompt": "", "completion": "b"}"#, "the prompt has no tokens"),
        (r#"{"prompt": "a", "completion": ""}"#, "field `completion`: there are no tokens"),
        (r#"["a"]"#, "not the JSON expected"),
        (&long, "leaves no room for 1 more, the model's context is 1024"),
    ] {
        let ended = candor(&place, &format!("{good}\n{row}\n"), &[]);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{row}: {}", ended.stderr);
        assert!(
            ended.stderr.starts_with("error: rows.jsonl, line 2: ") && ended.stderr.contains(says),
            "{}",
            ended.stderr
        );
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    }
    let ended = candor(&place, "\n", &[]);
    assert!(ended.code == Some(2) && ended.stderr.contains("rows.jsonl: there are no rows"), "{}", ended.stderr);
}

/// In f32 unless another type is asked for; the confidences of a run are those of the type that it computes in.
#[test]
fn the_type_that_is_computed_in_is_chosen() {
    let place = Place::new("");
    let row = json!({"prompt": "The pens", "completion": " are there"}).to_string();
    let logprobs = |arguments: &[&str]| {
        let ended = candor(&place, &row, arguments);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        check::floats(&serde_json::from_str::<Value>(&ended.stdout).unwrap()["logprobs"])
    };
    let exact = logprobs(&[]);
    assert_eq!(logprobs(&["--dtype", "f32"]), exact);
    if Kernel::choose(Dtype::Bf16, None).is_ok() {
        let rounded = logprobs(&["--dtype", "bf16"]);
        assert_eq!(logprobs(&["--dtype", "auto"]), rounded);
        assert_ne!(rounded, exact);
        check::all_close("bf16", &rounded, &exact, 0.1);
    } else {
        let ended = candor(&place, &row, &["--dtype", "bf16"]);
        assert!(
            ended.code == Some(2) && ended.stderr.contains("--dtype: this processor has no instructions"),
            "{}",
            ended.stderr
        );
    }
    let ended = candor(&place, "", &["--dtype", "fp8"]);
    assert!(
        ended.code == Some(2) && ended.stderr.contains("expected one of `auto`, `f32`, `bf16`"),
        "{}",
        ended.stderr
    );
}
