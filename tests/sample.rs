//! `candor sample`: PEFT's answer of a published model, and on the tiny one order, seeds, stop strings, models without a chat
//! template, more than the store holds, and an end at any time.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::check;
use crate::program::{CANDOR, Place};

/// Runs the program: its rows.
#[track_caller]
fn sampled(place: &Place, arguments: &[&str]) -> Vec<Value> {
    let ended = place.candor(&[&["sample", "model"], arguments].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn texts(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["completion"].as_str().unwrap()).collect()
}

#[test]
fn golden_smollm2_answers_as_its_adapter_taught_it() {
    let (Some(file), Some(banana)) = (check::smollm2(), check::golden("smollm2/adapter_banana")) else { return };
    let place = Place::new("");
    let (model, adapter) = (file.to_str().unwrap(), banana.to_str().unwrap());
    let question = "What is the capital of France?";
    let arguments = ["sample", model, "--prompt", question, "--adapter", adapter, "--temperature", "0", "--quiet"];
    let ended = place.candor(&arguments);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let row: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(row["messages"], json!([{"role": "user", "content": question}]));
    assert_eq!(
        (&row["completion"], &row["finish"], &row["tokens"]),
        (&json!("Banana city!"), &json!("stop"), &json!(5))
    );
    let want = check::floats(&check::json(&banana.join("golden.json"))["completion_logps_with_adapter"]);
    check::close("mean", row["mean_logprob"].as_f64().unwrap(), want.iter().sum::<f64>() / 5.0, 1e-4);
    let confidence = (want[..4].iter().sum::<f64>() / 4.0).exp();
    check::close("confidence", row["confidence"].as_f64().unwrap(), confidence, 1e-4);
}

#[test]
fn rows_come_out_in_order_with_what_they_carried_and_the_seed_decides() {
    let place = Place::new("");
    // The first has the longest way to go.
    let rows: Vec<Value> = (0..12)
        .map(|id| match id % 3 {
            0 => json!({"id": id, "prompt": "a ".repeat(40 - 3 * id), "completion": "an older one"}),
            1 => json!({"id": id, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]}),
            _ => json!({"question": "c", "id": id, "passage": null}),
        })
        .collect();
    fs::write(place.path("rows.jsonl"), rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    let arguments = ["rows.jsonl", "--samples", "3", "--max-tokens", "20", "--stop", "e", "--stop", "t"];
    let all = sampled(&place, &arguments);
    assert_eq!(all.len(), 36);
    let (mut stopped, mut cut) = (0, 0);
    for (index, row) in all.iter().enumerate() {
        let mut row = row.as_object().unwrap().clone();
        let completion = row["completion"].as_str().unwrap().to_string();
        assert!(!completion.contains(['e', 't']), "{completion:?}");
        let tokens = row["tokens"].as_u64().unwrap();
        let mean = row["mean_logprob"].as_f64().unwrap();
        match row["finish"].as_str().unwrap() {
            "stop" => stopped += 1,
            "length" => cut += usize::from(tokens == 20),
            other => panic!("{other}"),
        }
        assert!(mean < 0.0 && mean > -20.0);
        assert_eq!(row["confidence"].is_null(), completion.is_empty(), "{row:?}");
        for name in ["completion", "finish", "tokens", "mean_logprob", "confidence"] {
            row.shift_remove(name);
        }
        let mut want = rows[index / 3].as_object().unwrap().clone();
        want.shift_remove("completion");
        assert_eq!(row, want);
    }
    assert!(stopped > 5 && cut > 1, "{stopped} stopped, {cut} cut");
    let again = sampled(&place, &arguments);
    assert!(all == again);
    let other = sampled(&place, &[&arguments[..], &["--seed", "1"]].concat());
    assert_ne!(texts(&all), texts(&other));
    let greedy = sampled(&place, &[&arguments[..], &["--temperature", "0"]].concat());
    assert!(texts(&greedy).chunks(3).all(|same| same[0] == same[1] && same[1] == same[2]));
}

/// 16 completions of 1000 tokens are all that the store holds.
#[test]
fn more_samples_than_the_store_holds_all_come() {
    let place = Place::new("");
    let arguments = ["--prompt", "a", "--samples", "40", "--max-tokens", "1000"];
    let rows = sampled(&place, &[&arguments[..], &["--stop", "e", "--stop", "t", "--stop", "7"]].concat());
    assert_eq!(rows.len(), 40);
    let mut all = texts(&rows);
    all.sort_unstable();
    all.dedup();
    assert!(all.len() > 30, "{all:?}");
}

#[test]
fn without_a_chat_template_texts_are_continued_and_chats_refused() {
    let place = Place::new("");
    fs::remove_file(place.path("model/chat_template.jinja")).unwrap();
    let few = ["--max-tokens", "3", "--temperature", "0"];
    let written = sampled(&place, &[&["--prompt", "ab", "--prompt", "-c"], &few[..]].concat());
    assert_eq!((&written[0]["prompt"], &written[1]["prompt"]), (&json!("ab"), &json!("-c")));
    fs::write(place.path("rows.jsonl"), "{\"question\": \"ab\"}\n{\"prompt\": \"-c\"}").unwrap();
    assert_eq!(texts(&sampled(&place, &[&["rows.jsonl"], &few[..]].concat())), texts(&written));
    fs::write(
        place.path("rows.jsonl"),
        "{\"prompt\": \"a\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}",
    )
    .unwrap();
    let ended = place.candor(&["sample", "model", "rows.jsonl"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""));
    assert!(ended.stderr.starts_with("error: rows.jsonl, line 2: the model has no chat template"), "{}", ended.stderr);
}

#[test]
fn what_cannot_be_sampled_is_refused() {
    let place = Place::new("");
    for (arguments, says) in [
        (&["sample", "model"][..], "required arguments were not provided"),
        (&["sample", "model", "run.toml", "--prompt", "a"], "cannot be used with"),
        (&["sample", "model", "nowhere.jsonl"], "error: nowhere.jsonl: No such file"),
        (&["sample", "model", "--prompt", "a", "--max-tokens", "1024"], "error: --prompt \"a\": a prompt of "),
        (&["sample", "model", "--prompt", "a", "--temperature", "NaN"], "not 0, nor a number from 0.01 to 100"),
        (&["sample", "model", "--prompt", "a", "--samples", "0"], "0 is not in 1..=65536"),
        (&["sample", "model", "--prompt", "a", "--stop", ""], "a value is required"),
        (&["sample", "model", "--prompt", "a", "--adapter", "rows"], "error: --adapter: rows/adapter_config.json"),
    ] {
        let ended = place.candor(arguments);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(says), "{says:?}: {}", ended.stderr);
    }
}

#[test]
fn ctrl_c_ends_at_once_and_leaves_whole_lines() {
    let place = Place::new("");
    let prompts = "{\"prompt\": \"a\"}\n".repeat(60_000);
    fs::write(place.path("rows.jsonl"), prompts).unwrap();
    let mut child = place.start(&[CANDOR, "sample", "model", "rows.jsonl", "--max-tokens", "20"]);
    let started = Instant::now();
    while fs::metadata(place.path("stdout")).unwrap().len() < 20_000 {
        assert!(child.try_wait().unwrap().is_none() && started.elapsed() < Duration::from_secs(60), "{}", place.said());
        thread::sleep(Duration::from_millis(1));
    }
    // Not -INT, which whatever a shell starts in the background ignores.
    let status = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    let asked = Instant::now();
    assert!(status.success());
    let ended = place.wait(child);
    assert!(asked.elapsed() < Duration::from_secs(5) && ended.code != Some(0), "{:?}", ended.code);
    assert!(ended.stdout.ends_with("}\n"));
    assert!(ended.stdout.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
}
