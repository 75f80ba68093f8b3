//! Recorded rollouts, read again: `generations.jsonl` of a finished run, of one that still runs, or alone and compressed.
//!
//! Lines are parsed in parallel, a batch at a time. What a table shows of a rollout stays in memory, its texts do not.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candor_environments::rows::{LONGEST_LINE, in_line, unpacked};
use candor_environments::{Finish, ParseStatus};
use rayon::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::run::{GENERATIONS, Row, RowSplit, SCHEMA};

/// Bytes that are read before their lines are parsed.
const BATCH: u64 = 8 << 20;

/// A line of a file, read.
pub struct Line<T> {
    /// What it says.
    pub row: T,
    /// Its number in the file, from 1.
    pub number: usize,
    /// Where it begins in the file's text after unpacking, in bytes.
    pub offset: u64,
    /// Its length in bytes, without the line's end.
    pub length: usize,
}

/// Reads a file of JSON lines, which may be compressed (`.gz`, `.zst`) and still be written to: `visit` is given some
/// lines' bytes and what they say, in order. Blank lines are left out, and so is what a writer that was stopped left of a last line;
/// then the result says so.
///
/// # Errors
/// If the file cannot be read, a line is not a `T` or longer than 64 MiB, with file and line, or `visit` fails.
pub fn each_batch<T: DeserializeOwned + Send>(
    path: &Path,
    mut visit: impl FnMut(&[u8], Vec<Line<T>>) -> Result<()>,
) -> Result<Option<String>> {
    let name = || path.display().to_string();
    let mut reader = File::open(path).and_then(|file| unpacked(path, file)).with_context(name)?;
    let (mut bytes, mut offset, mut first_line, mut torn) = (Vec::new(), 0, 1, None);
    loop {
        let before = bytes.len();
        match reader.by_ref().take(BATCH).read_to_end(&mut bytes) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                torn = Some(format!("{}: the compressed file ends early, so what follows is missing", path.display()));
            }
            Err(error) => return Err(error).with_context(name),
        }
        let at_end = bytes.len() == before || torn.is_some();
        // What follows the last line's end is a line only if nothing more can come and it is whole.
        let mut end = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
        if at_end && end < bytes.len() {
            match serde_json::from_slice::<Value>(&bytes[end..]) {
                Err(error) if error.is_eof() => {
                    torn.get_or_insert_with(|| format!("{}: left out a torn last line", path.display()));
                }
                _ => end = bytes.len(),
            }
        }
        let lines = parse(&bytes[..end], offset, first_line).with_context(name)?;
        visit(&bytes[..end], lines)?;
        if at_end {
            return Ok(torn);
        }
        offset += end as u64;
        first_line += bytes[..end].iter().filter(|&&byte| byte == b'\n').count();
        bytes.drain(..end);
        ensure!(
            (bytes.len() as u64) < LONGEST_LINE,
            "{}: line {first_line}: {LONGEST_LINE} bytes or more",
            path.display()
        );
    }
}

/// The rows of whole lines. `offset` and `first_line` are the place of the first.
fn parse<T: DeserializeOwned + Send>(bytes: &[u8], offset: u64, first_line: usize) -> Result<Vec<Line<T>>> {
    let mut start = offset;
    let mut place = |(index, line): (usize, &[u8])| {
        start += line.len() as u64;
        (first_line + index, start - line.len() as u64)
    };
    let lines = bytes.split_inclusive(|&byte| byte == b'\n').enumerate();
    let lines: Vec<_> = lines.map(|(index, line)| (place((index, line)), line.trim_ascii_end())).collect();
    let parsed = lines.into_par_iter().filter(|(_, line)| !line.is_empty()).map(|((number, offset), line)| {
        let row = serde_json::from_slice(line).map_err(|error| in_line(&error));
        let row = row.with_context(|| format!("line {number}"))?;
        Ok(Line { row, number, offset, length: line.len() })
    });
    // In order first: threads would otherwise give whichever error they meet first, and a file with two wrong lines another at times.
    parsed.collect::<Vec<_>>().into_iter().collect()
}

/// The file of a run's rollouts: of a run's folder, `generations.jsonl`, which may have been compressed since; a file is itself.
///
/// # Errors
/// If there is no such file.
pub fn generations_file(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let names = ["", ".zst", ".gz"].map(|packed| path.join(format!("{GENERATIONS}{packed}")));
    let found = names.into_iter().find(|name| name.is_file());
    found.with_context(|| format!("{}: there is no {GENERATIONS} in it, so it is not a run's folder", path.display()))
}

/// Reads rows of `generations.jsonl`; see [`each_batch`].
///
/// # Errors
/// As [`each_batch`]; or if a row is of another version of the format.
pub fn each_rollout(path: &Path, mut visit: impl FnMut(&[u8], Vec<Line<Row>>) -> Result<()>) -> Result<Option<String>> {
    each_batch(path, |bytes, lines: Vec<Line<Row>>| {
        if let Some(Line { row, number, .. }) = lines.iter().find(|line| line.row.schema != SCHEMA) {
            bail!("{}: line {number}: schema {}, and this program reads {SCHEMA}", path.display(), row.schema);
        }
        visit(bytes, lines)
    })
}

/// What a table shows of a rollout.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// Train or eval.
    pub split: RowSplit,
    /// See [`Row::step`].
    pub step: u64,
    /// The environment's name.
    pub environment: String,
    /// The task's id.
    pub task: String,
    /// Index of the group within the step.
    pub group: usize,
    /// Index of the rollout within the group.
    pub rollout: usize,
    /// Why it ended.
    pub finish: Finish,
    /// Its length in tokens.
    pub tokens: usize,
    /// The reward; `None` on error.
    pub reward: Option<f64>,
    /// The advantage; `None` on error, in a dropped group, and in evaluations.
    pub advantage: Option<f64>,
    /// How it was read; `None` on an error of the environment's.
    pub parse: Option<ParseStatus>,
    /// Whether it is right, where the environment says.
    pub correct: Option<bool>,
    /// The confidence that it states, if it does.
    pub confidence: Option<f64>,
    /// Whether it could not be scored.
    pub failed: bool,
}

impl Recorded {
    /// What a table shows of a row.
    pub fn of(row: &Row) -> Self {
        Self {
            split: row.split,
            step: row.step,
            environment: row.environment.clone(),
            task: row.task.clone(),
            group: row.group,
            rollout: row.rollout,
            finish: row.finish,
            tokens: row.tokens,
            reward: row.reward,
            advantage: row.advantage,
            parse: row.parse,
            correct: row.metric("correct").map(|correct| correct == 1.0),
            confidence: row.metric("confidence"),
            failed: row.error.is_some(),
        }
    }

    /// The confidence and whether the answer is right, where it states one: what calibration is measured on.
    pub fn prediction(&self) -> Option<(f64, bool)> {
        self.confidence.zip(self.correct)
    }
}

/// The recorded rollouts of a file: what a table shows, and where the rest of each is.
pub struct Generations {
    /// In the file's order: by step, evaluations between them, then group and rollout.
    pub rollouts: Vec<Recorded>,
    /// What was left out of the file, in words.
    pub torn: Option<String>,
    path: PathBuf,
    /// The rows' text; of a compressed file, a copy that vanishes with the process.
    text: File,
    /// Where each row begins in it, and its length.
    places: Vec<(u64, usize)>,
}

impl Generations {
    /// Reads a run's folder or a file of rollouts.
    ///
    /// # Errors
    /// As [`each_rollout`]; or if there is no place for the text of a compressed file.
    pub fn read(path: &Path) -> Result<Self> {
        let path = generations_file(path)?;
        let packed = path.extension().is_some_and(|extension| extension == "gz" || extension == "zst");
        let text = if packed { tempfile::tempfile() } else { File::open(&path) };
        let mut text = text.with_context(|| path.display().to_string())?;
        let (mut rollouts, mut places) = (Vec::new(), Vec::new());
        let torn = each_rollout(&path, |bytes, lines| {
            if packed {
                text.write_all(bytes).with_context(|| format!("{}: cannot unpack", path.display()))?;
            }
            rollouts.extend(lines.iter().map(|line| Recorded::of(&line.row)));
            places.extend(lines.iter().map(|line| (line.offset, line.length)));
            Ok(())
        })?;
        Ok(Self { rollouts, torn, path, text, places })
    }

    /// The whole row of a rollout, prompt and completion included.
    ///
    /// # Errors
    /// If the file has changed since.
    ///
    /// # Panics
    /// If there is no rollout of that index.
    pub fn row(&self, index: usize) -> Result<Row> {
        let (offset, length) = self.places[index];
        let mut line = vec![0; length];
        let read = self.text.read_exact_at(&mut line, offset).map_err(anyhow::Error::from);
        let row = read.and_then(|()| serde_json::from_slice(&line).map_err(|error| in_line(&error)));
        row.with_context(|| format!("{}: byte {offset}: changed since it was first read", self.path.display()))
    }
}
