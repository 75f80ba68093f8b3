//! What a report is made of: a run's rollouts, metrics and config, read once; texts are packed as they come.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candor_environments::Message;
use flate2::Compression;
use flate2::write::ZlibEncoder;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::generations::{Line, Recorded, each_batch, each_rollout, generations_file};
use crate::run::{METRICS, Row, RowSplit, SPANS, SUMMARY, each_span};
use crate::timeline::Span;

/// Rollouts whose texts are packed together: what a page unpacks to show one of them.
const CHUNK: usize = 128;

/// A run that has been read.
pub struct RecordedRun {
    /// The name of its folder or file.
    pub name: String,
    /// What was read.
    pub path: PathBuf,
    /// The resolved config, where there is one.
    pub config: Option<String>,
    /// The rows of `metrics.jsonl`; empty where there is none.
    pub metrics: Vec<Map<String, Value>>,
    /// What `spans.jsonl` says; empty where there is none.
    pub spans: Vec<Span>,
    /// Every rollout, in the file's order.
    pub rollouts: Vec<Recorded>,
    /// The texts of consecutive rollouts, packed.
    pub texts: Vec<Texts>,
    /// The rows of the first and the last step; of evaluations where there was no training.
    pub ends: [Vec<Row>; 2],
    /// What there is to say about the files: what is torn or not there yet.
    pub notes: Vec<String>,
}

/// Prompts and completions of consecutive rollouts: JSON, as zlib packs it.
pub struct Texts {
    /// Index of the first rollout.
    pub first: usize,
    /// `{"prompts": [messages], "rows": [[index of the prompt, completion, details]]}`.
    pub packed: Vec<u8>,
}

impl RecordedRun {
    /// Reads a run's folder, finished or not, or a file of rollouts alone.
    ///
    /// # Errors
    /// If a file cannot be read or a row is wrong, with file and line; if there is no rollout, or a confidence is no probability.
    pub fn read(path: &Path) -> Result<Self> {
        let file = generations_file(path)?;
        let folder = path.is_dir().then_some(path);
        let mut run = Self {
            name: name(path),
            path: path.to_owned(),
            config: folder.and_then(|folder| fs::read_to_string(folder.join("config.toml")).ok()),
            metrics: Vec::new(),
            spans: folder.map(|folder| each_span(&folder.join(SPANS))).transpose()?.unwrap_or_default(),
            rollouts: Vec::new(),
            texts: Vec::new(),
            ends: [Vec::new(), Vec::new()],
            notes: Vec::new(),
        };
        let torn = each_rollout(&file, |_, lines| run.take(lines).with_context(|| file.display().to_string()))?;
        run.notes.extend(torn);
        ensure!(!run.rollouts.is_empty(), "{}: there is no rollout in it yet", file.display());
        let metrics = folder.map(|folder| folder.join(METRICS)).filter(|metrics| metrics.is_file());
        if let Some(metrics) = metrics {
            let torn = each_batch(&metrics, |_, lines: Vec<Line<Map<String, Value>>>| {
                run.metrics.extend(lines.into_iter().map(|line| line.row));
                Ok(())
            })?;
            run.notes.extend(torn);
        }
        if folder.is_some_and(|folder| !folder.join(SUMMARY).is_file()) {
            run.notes.push(format!("{}: the run is not finished; this is what it had written so far", path.display()));
        }
        Ok(run)
    }

    /// Takes the next rows of the file.
    fn take(&mut self, lines: Vec<Line<Row>>) -> Result<()> {
        let first = self.rollouts.len();
        for Line { row, number, .. } in &lines {
            let recorded = Recorded::of(row);
            let stated = recorded.confidence.unwrap_or(0.0);
            ensure!((0.0..=1.0).contains(&stated), "line {number}: the confidence {stated} is not in [0, 1]");
            self.rollouts.push(recorded);
        }
        let packed: Vec<Vec<u8>> = lines.par_chunks(CHUNK).map(pack).collect::<Result<_>>()?;
        let texts =
            packed.into_iter().enumerate().map(|(chunk, packed)| Texts { first: first + chunk * CHUNK, packed });
        self.texts.extend(texts);
        lines.into_iter().for_each(|line| self.keep_ends(line.row));
        Ok(())
    }

    /// Keeps a row if it is, so far, of the first or the last step. Evaluations are kept only until there is training.
    fn keep_ends(&mut self, row: Row) {
        let [first, last] = &mut self.ends;
        let same = |rows: &[Row]| rows.first().is_none_or(|kept| kept.step == row.step && kept.split == row.split);
        let training = first.first().is_some_and(|kept| kept.split == RowSplit::Train);
        if training && row.split == RowSplit::Eval {
            return;
        }
        if !training && row.split == RowSplit::Train {
            first.clear();
            last.clear();
        }
        if same(first) {
            first.push(row.clone());
        }
        if !same(last) {
            last.clear();
        }
        last.push(row);
    }
}

/// What a run is called: its folder's name, or its file's without endings.
fn name(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or(path.to_owned());
    let name = whole.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
    if path.is_dir() { name } else { name.split(".jsonl").next().unwrap_or(&name).to_string() }
}

/// The texts of some rows. A prompt that several consecutive rows share is there once.
fn pack(lines: &[Line<Row>]) -> Result<Vec<u8>> {
    let (mut prompts, mut rows): (Vec<&[Message]>, Vec<Value>) = (Vec::new(), Vec::new());
    for Line { row, .. } in lines {
        if prompts.last() != Some(&row.prompt.as_slice()) {
            prompts.push(&row.prompt);
        }
        let Row { parts, metrics, labels, flags, judge, error, mean_logprob, policy_version, .. } = row;
        let details = json!({
            "parts": parts, "metrics": metrics, "labels": labels, "flags": flags, "judge": judge, "error": error,
            "mean log-probability": mean_logprob, "policy version": policy_version,
        });
        rows.push(json!([prompts.len() - 1, row.completion, details]));
    }
    zlib(&serde_json::to_vec(&json!({ "prompts": prompts, "rows": rows }))?)
}

/// Packs bytes so that a browser can unpack them: its name for zlib is `deflate`.
///
/// # Errors
/// If there is no memory left.
pub fn zlib(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut packer = ZlibEncoder::new(Vec::new(), Compression::fast());
    packer.write_all(bytes)?;
    Ok(packer.finish()?)
}
