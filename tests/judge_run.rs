//! Judges in whole runs and in `candor judge`: verdicts while sampling goes on, failures that leave the denominators, a
//! model in the same process, and files that are graded, stopped and gone on with.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use candor::config::Config;
use candor::judge::Panel;
use candor::judge::options::JudgeOptions;
use candor::model_files::load_model;
use candor::sampler::{Generation, PolicyFeed, Request, Sampler, Settings};
use candor::setup::{Options, Run};
use candor::tokenizer::Tokenizer;
use candor::train::train;
use candor_environments::Finish;
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::check::{self, close};
use crate::judge_server::{Answer, Seen, Server, judged, says, short, variable};
use crate::program::{CANDOR, Place};
use crate::toy::{lines, model, rows_of, step_metrics, within};

/// The tiny model with a context that holds a judge's instructions.
fn roomy_model(folder: &Path) -> PathBuf {
    let roomy = folder.join("model");
    fs::create_dir(&roomy).unwrap();
    for entry in fs::read_dir(model()).unwrap() {
        let name = entry.unwrap().file_name();
        symlink(model().join(&name), roomy.join(&name)).unwrap();
    }
    let text = fs::read_to_string(model().join("config.json")).unwrap();
    fs::remove_file(roomy.join("config.json")).unwrap();
    fs::write(roomy.join("config.json"), text.replace("embeddings\": 256", "embeddings\": 8192")).unwrap();
    roomy
}

/// A sampler that says what it is told: the completion of a group's rollout.
struct Scripted {
    tokenizer: Arc<Tokenizer>,
    says: fn(usize, usize) -> String,
    /// After each completion it waits until a server has been asked about it.
    waits_for: Option<Arc<Seen>>,
}

impl Sampler for Scripted {
    fn sample(
        &mut self,
        requests: &[Request],
        _: &dyn PolicyFeed,
        _: &Settings,
        finished: &mut dyn FnMut(Generation) -> Result<()>,
    ) -> Result<()> {
        for (group, rollout) in requests
            .iter()
            .enumerate()
            .flat_map(|(group, request)| (0..request.rollouts).map(move |rollout| (group, rollout)))
        {
            let asked = || self.waits_for.as_ref().map(|seen| seen.asked.lock().unwrap().len());
            let (before, since) = (asked(), Instant::now());
            let ids = self.tokenizer.encode(&(self.says)(group, rollout))?;
            let logprobs = vec![-1.0; ids.len()];
            let (behavior_t, untempered_t) = (logprobs.clone(), logprobs);
            finished(Generation { group, rollout, version: 0, ids, behavior_t, untempered_t, finish: Finish::Stop })?;
            while asked() == before && self.waits_for.is_some() {
                ensure!(since.elapsed() < Duration::from_secs(20), "nobody is judging while sampling goes on");
                thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }
}

/// A run of one step on questions about Paris, its completions scripted and judged by a server.
fn run(server: &Server, says: fn(usize, usize) -> String, changes: &str, waits: bool) -> (TempDir, Result<()>) {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let rows: Vec<String> = (0..40)
        .map(|row| json!({"question": format!("Capital {row}?"), "answer": "Paris", "topic": "Cities"}).to_string())
        .collect();
    fs::write(at("rows.jsonl"), rows.join("\n")).unwrap();
    let text = format!(
        "name = \"toy\"\nsteps = 1\nmodel.source = {:?}\nlora.rank = 2\nsampling.max_tokens = 64\nevaluation.tasks = 0\n\
         {changes}\n[[environment]]\nname = \"simpleqa\"\nsource = {:?}\nexamples = \"none\"\n[environment.judge]\n\
         kind = \"openai\"\nbase_url = {:?}\nmodel = \"m\"\ncache = {:?}\n",
        roomy_model(folder.path()).display().to_string(),
        at("rows.jsonl"),
        server.address,
        at("verdicts.jsonl")
    );
    let config = Config::parse(&text, "run.toml").unwrap_or_else(|error| panic!("{error:#}\n{text}"));
    let (results, seen) = (folder.path().to_path_buf(), server.seen.clone());
    let outcome = within(120, move || {
        let options = Options { results: &results, resume: false, environments: &[], observer: &|_| {} };
        let mut run = Run::prepare(config, &options)?;
        let tokenizer = run.tokenizer.clone();
        run.sampler = Box::new(Scripted { tokenizer, says, waits_for: waits.then_some(seen) });
        train(&mut run, &|_| {}, &AtomicBool::new(false)).map(drop)
    });
    (folder, outcome)
}

fn city(group: usize, rollout: usize) -> String {
    format!("Answer: city {group}.{rollout}\nConfidence: 0.50")
}

/// Fails if judging begins only when sampling has ended: the sampler waits for each verdict to be asked for.
#[test]
fn verdicts_are_asked_for_while_sampling_goes_on_and_stand_in_the_rows() {
    let server = Server::new(|_, asked| match () {
        // The server finds one rollout of each group right, and does not say anything about another.
        () if asked.prompt().contains(".1\"") => says("A"),
        () if asked.prompt().contains(".2\"") => says("perhaps"),
        () => says("B"),
    });
    let (folder, outcome) = run(&server, city, "batch = { prompts = 3, group = 4 }", true);
    outcome.unwrap();
    let rows = lines(&folder.path().join("toy/generations.jsonl"));
    for row in rows_of(&rows, "train", 0) {
        let judge = |verdict: Value, attempts: usize| json!({"id": "openai:m", "prompt_version": 1, "verdict": verdict, "cached": false, "attempts": attempts});
        assert_eq!(row["labels"], json!({"topic": "Cities"}));
        assert_eq!((&row["parse"], &row["completion"].as_str().unwrap().contains("0.50")), (&json!("ok"), &true));
        match row["rollout"].as_u64().unwrap() {
            1 => {
                assert_eq!(row["judge"], judge(json!("correct"), 1));
                // The mean is over the three that have a verdict.
                close("advantage", row["advantage"].as_f64().unwrap(), 0.75 - (0.75 - 0.5) / 3.0, 1e-12);
            }
            2 => {
                assert_eq!(row["judge"], judge(Value::Null, 3));
                assert_eq!(row["error"], "judge: no verdict after 3 attempts: the reply \"perhaps\" is no verdict");
                assert!(row["reward"].is_null() && row["advantage"].is_null() && row["metrics"] == json!({}));
            }
            _ => assert_eq!(row["judge"], judge(json!("incorrect"), 1)),
        }
    }
    let metrics = &step_metrics(&folder.path().join("toy"))[0];
    assert_eq!(metrics["score_errors"], 3);
    close("correct", metrics["metrics/correct"].as_f64().unwrap(), 1.0 / 3.0, 1e-12);
    close("error rate", metrics["grades/judge_error_rate"].as_f64().unwrap(), 0.25, 1e-12);
}

/// Fails if fewer threads score than a judge may be asked at once.
#[test]
fn a_run_has_a_hundred_requests_in_flight() {
    let server = Server::new(|_, _| Answer { delay: Duration::from_millis(500), ..says("B") });
    let changes = "batch = { prompts = 3, group = 50 }\nlora.targets = [\"v_proj\"]";
    let (_folder, outcome) = run(&server, city, changes, false);
    outcome.unwrap();
    assert_eq!((server.asked().len(), server.seen.most_in_flight.load(Ordering::SeqCst)), (150, 100));
}

#[test]
fn identical_answers_of_a_group_cost_one_request() {
    let server = Server::new(|_, _| Answer { delay: Duration::from_millis(50), ..says("A") });
    let says = |group: usize, rollout: usize| format!("Answer: Paris\nConfidence: 0.{}", 10 * group + rollout + 1);
    let (folder, outcome) = run(&server, says, "batch = { prompts = 2, group = 8 }", false);
    outcome.unwrap();
    assert_eq!(server.asked().len(), 2);
    let rows = lines(&folder.path().join("toy/generations.jsonl"));
    assert_eq!(rows.iter().filter(|row| row["judge"]["cached"] == true).count(), 14);
}

/// Fails if a failing judge is taken for anything but the end of the run, with its reasons.
#[test]
fn a_judge_that_fails_too_often_ends_the_run_and_nothing_is_learned() {
    let server = Server::new(|number, _| says(if number % 2 == 0 { "maybe" } else { "I cannot say" }));
    let (folder, outcome) = run(&server, city, "batch = { prompts = 4, group = 4 }", false);
    let error = format!("{:#}", outcome.unwrap_err());
    for part in
        ["16 of the last 16 rollouts could not be scored", " × judge: no verdict after 3 attempts", "is no verdict"]
    {
        assert!(error.contains(part), "{part:?} in: {error}");
    }
    assert!(step_metrics(&folder.path().join("toy")).is_empty(), "no step was made");
}

#[test]
fn a_local_judge_shares_the_policys_model_and_states_its_probability() {
    let folder = tempdir().unwrap();
    let cache = folder.path().join("verdicts.jsonl").display().to_string();
    let options = JudgeOptions::of(&format!("kind = \"local\"\ncache = {cache:?}").parse().unwrap()).unwrap();
    let panel = Panel::of(&options, "the-policy", short(), &variable, &|_| {}).unwrap();
    let unloaded = judged(&panel, "Rome");
    assert!(unloaded.verdict.unwrap_err().contains("its model is loaded when"));

    let load = |path: &Path| load_model(path.to_str().unwrap(), check::f32_kernel(), &|_| {});
    let error = panel.load(&|| load(&model()), &|_| {}).unwrap_err().to_string();
    assert!(error.contains("the context of the-policy is 256"), "{error}");
    let (roomy, tokenizer) = load(&roomy_model(folder.path())).unwrap();
    panel.load(&|| Ok((roomy.clone(), tokenizer.clone())), &|_| {}).unwrap();
    assert_eq!(Arc::strong_count(&roomy), 2, "the base exists once");
    let judgment = judged(&panel, "Paris");
    assert!(judgment.verdict.is_ok() && judgment.id == "local:the-policy", "{judgment:?}");
    let p_correct = judgment.p_correct.unwrap();
    assert!(0.0 < p_correct && p_correct < 1.0);
    let again = judged(&panel, "Paris");
    assert_eq!((again.cached, again.attempts, again.p_correct), (true, 0, Some(p_correct)));
}

const ANSWERS: &str = r#"{"question": "a?", "answer": "Paris", "prediction": "Paris", "topic": "Cities", "label": "A"}
{"question": "b?", "answers": ["Paris", "P."], "completion": "Answer: Rome\nConfidence: 0.9", "topic": "Cities", "label": "B\n"}
{"question": "c?", "answer": "1998", "prediction": "I do not know", "label": "not_attempted"}
{"question": "d?", "answer": "Goedel", "prediction": "Gödel", "label": "correct"}
"#;

#[test]
fn a_file_is_graded_gone_on_with_and_compared() {
    let place = Place::new("");
    fs::write(place.path("answers.jsonl"), ANSWERS).unwrap();
    let ended = place.candor(&["judge", "answers.jsonl"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    for part in
        ["4 answers graded, 0 without a verdict", "correct                   0.250", "topic: Cities", "0 requests"]
    {
        assert!(ended.stdout.contains(part), "{part:?} in:\n{}", ended.stdout);
    }
    let output = place.path("answers.judged.jsonl");
    let whole = fs::read_to_string(&output).unwrap();
    let rows = lines(&output);
    let verdicts: Vec<&Value> = rows.iter().map(|row| &row["judge"]["verdict"]).collect();
    assert_eq!(verdicts, ["correct", "incorrect", "not_attempted", "incorrect"]);
    assert_eq!((&rows[1]["index"], &rows[1]["row"]["topic"]), (&json!(1), &json!("Cities")));

    // As a kill leaves it: the first line whole, the second torn.
    let first = whole.find('\n').unwrap() + 1;
    fs::write(&output, &whole[..first + 30]).unwrap();
    let ended = place.candor(&["judge", "answers.jsonl"]);
    assert!(ended.stdout.contains("1 graded before"), "{}", ended.stdout);
    assert_eq!(fs::read_to_string(&output).unwrap(), whole);

    let ended = place.candor(&["judge", "--agreement", "answers.jsonl"]);
    for part in
        ["hand \\ judge", "n = 4, agreement 0.750, no verdict 0", "not_attempted            1.000         1.000"]
    {
        assert!(ended.stdout.contains(part), "{part:?} in:\n{}", ended.stdout);
    }
    fs::write(place.path("answers.jsonl"), ANSWERS.replace("a?", "z?")).unwrap();
    let ended = place.candor(&["judge", "answers.jsonl"]);
    assert!(ended.code == Some(1) && ended.stderr.contains("line 1: not of answers.jsonl"), "{}", ended.stderr);
    for (row, wanted) in [
        ("{\"question\": \"a?\", \"answer\": \"x\"}", "line 1: there is no field `prediction` or `completion`"),
        ("{\"question\": \"a?\", \"prediction\": \"x\"}", "line 1: field `answer` is missing"),
        ("", "there are no rows"),
        ("{", "line 1: not the JSON expected"),
    ] {
        fs::write(place.path("bad.jsonl"), row).unwrap();
        let ended = place.candor(&["judge", "bad.jsonl"]);
        assert!(ended.code == Some(2) && ended.stderr.contains(wanted), "{wanted:?} in: {}", ended.stderr);
    }
    fs::write(place.path("bad.jsonl"), ANSWERS.replace("\"A\"", "\"good\"")).unwrap();
    let ended = place.candor(&["judge", "--agreement", "bad.jsonl"]);
    assert!(ended.code == Some(2) && ended.stderr.contains("line 1: field `label`: \"good\" is no grade"));
}

/// Fails if the key is in anything that the program says or writes, however much is logged; or if failures are not judged
/// again.
#[test]
fn the_program_keeps_the_key_and_counts_what_it_cost() {
    let server = Server::new(|number, _| if number == 0 { crate::judge_server::refuses(400, "no") } else { says("A") });
    let place = Place::new("");
    fs::write(place.path("answers.jsonl"), ANSWERS).unwrap();
    let judge = format!(
        "[[environment]]\nname = \"simpleqa\"\nsource = \"rows\"\n[environment.judge]\nkind = \"openai\"\nmodel = \"m\"\n\
         base_url = \"{}\"\nkey_variable = \"A_KEY\"\ncache = \"verdicts.jsonl\"\ndollars_per_million_tokens = [100.0, 1000.0]",
        server.address
    );
    place.configure(&judge);
    let line = ["env", "RUST_LOG=trace", "A_KEY=sk-secret", CANDOR, "judge", "answers.jsonl", "--config", "run.toml"];
    let first = place.wait(place.start(&line));
    assert_eq!(first.code, Some(0), "{}", first.stderr);
    assert!(first.stdout.contains("3 answers graded, 1 without a verdict"), "{}", first.stdout);
    assert!(first.stdout.contains("4 requests, 3000 + 6 tokens, 0.3060 dollars"), "{}", first.stdout);
    assert!(first.stdout.contains("1 × judge: no verdict after 1 attempts: the server answered 400: no"));
    let second = place.wait(place.start(&line));
    assert!(second.stdout.contains("3 graded before, 0 from the cache, 1 requests"), "{}", second.stdout);
    for said in [&first.stdout, &first.stderr, &second.stderr] {
        assert!(!said.contains("sk-secret"), "{said}");
    }
    for file in ["answers.judged.jsonl", "verdicts.jsonl", "run.toml"] {
        assert!(!fs::read_to_string(place.path(file)).unwrap().contains("sk-secret"), "{file}");
    }
    assert!(server.asked().iter().all(|asked| asked.authorization.as_deref() == Some("Bearer sk-secret")));
}
