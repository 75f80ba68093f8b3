//! The run folder: `config.toml`, `generations.jsonl`, `metrics.jsonl` and event files, written as things happen.
//!
//! Lines are appended whole and folders appear by renaming, so a kill at any instant leaves at worst a torn last line.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candor_environments::{Finish, Judgment, Message, ParseStatus, Score, ScoreError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::metrics::MetricsRow;
use crate::rollout::{Group, Rollout};
use crate::tensorboard::EventFile;
use crate::timeline::Span;
use crate::tokenizer::Tokenizer;

/// Version of the rows of `generations.jsonl`.
pub const SCHEMA: u64 = 1;

/// Which tasks a row belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowSplit {
    /// Trained on.
    Train,
    /// Held out.
    Eval,
}

/// One line of `generations.jsonl`: one rollout.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Version of this format.
    pub schema: u64,
    /// Train or eval.
    pub split: RowSplit,
    /// The training step, from 0; an evaluation carries the number of steps done before it.
    pub step: u64,
    /// Optimizer steps in the adapter that sampled it.
    pub policy_version: u64,
    /// The environment's name.
    pub environment: String,
    /// The task's id.
    pub task: String,
    /// Index of the group within the step.
    pub group: usize,
    /// Index of the rollout within the group.
    pub rollout: usize,
    /// What kind of task it is, such as its topic; only where the environment says.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub labels: Map<String, Value>,
    /// The messages of the prompt; a kept slice may leave them out.
    #[serde(default)]
    pub prompt: Vec<Message>,
    /// What the model wrote.
    pub completion: String,
    /// Why it ended.
    pub finish: Finish,
    /// How many tokens it has.
    pub tokens: usize,
    /// The reward; null on error.
    pub reward: Option<f64>,
    /// The reward's parts, the outcome first.
    pub parts: Map<String, Value>,
    /// The advantage; null on error, in a dropped group, and in evaluations.
    pub advantage: Option<f64>,
    /// What the environment measured.
    pub metrics: Map<String, Value>,
    /// How the completion was read; null on an error of the environment's.
    pub parse: Option<ParseStatus>,
    /// What was odd about it.
    pub flags: Vec<String>,
    /// What the judge said; null without one.
    pub judge: Option<Value>,
    /// Mean log-probability of its tokens at temperature 1.
    pub mean_logprob: f64,
    /// The geometric mean of the probabilities of its answer's tokens; only where the environment finds an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_confidence: Option<f64>,
    /// Why there is no score.
    pub error: Option<String>,
}

impl Row {
    /// One row per rollout, in order.
    pub fn all(split: RowSplit, step: u64, groups: &[Group]) -> Vec<Self> {
        let of_group = |(index, group): (usize, &Group)| {
            group.rollouts.iter().map(|rollout| Self::new(split, step, index, group, rollout)).collect::<Vec<_>>()
        };
        groups.iter().enumerate().flat_map(of_group).collect()
    }

    fn new(split: RowSplit, step: u64, group_index: usize, group: &Group, rollout: &Rollout) -> Self {
        let mut row = Self {
            schema: SCHEMA,
            split,
            step,
            policy_version: rollout.generation.version,
            environment: group.environment.clone(),
            task: group.task.id.clone(),
            group: group_index,
            rollout: rollout.generation.rollout,
            labels: group.labels.iter().map(|(name, label)| (name.to_string(), Value::from(label.as_str()))).collect(),
            prompt: group.task.prompt.clone(),
            completion: rollout.text.clone(),
            finish: rollout.generation.finish,
            tokens: rollout.tokens(),
            reward: None,
            parts: Map::new(),
            advantage: rollout.advantage,
            metrics: Map::new(),
            parse: None,
            flags: Vec::new(),
            judge: None,
            mean_logprob: rollout.generation.mean_logprob(),
            token_confidence: rollout.token_confidence,
            error: None,
        };
        row.set_score(&rollout.score);
        row
    }

    /// What the environment measured under this name, where it did.
    pub fn metric(&self, name: &str) -> Option<f64> {
        self.metrics.get(name)?.as_f64()
    }

    /// The reward's outcome part, without shaping; `None` without a score.
    pub fn outcome(&self) -> Option<f64> {
        self.parts.values().next()?.as_f64()
    }

    /// Puts a score, or why there is none, in place of the one that it has. The advantage stays.
    pub fn set_score(&mut self, score: &Result<Score, ScoreError>) {
        let failed = match score {
            Err(ScoreError::Judge { judgment, parse }) => Some((judgment, *parse)),
            _ => None,
        };
        self.error = score.as_ref().err().map(ToString::to_string);
        let score = score.as_ref().ok();
        let numbers = |pairs: &[(&'static str, f64)]| {
            pairs.iter().map(|(name, value)| (name.to_string(), Value::from(*value))).collect()
        };
        self.reward = score.map(|score| score.reward);
        self.parts = score.map(|score| numbers(&score.parts)).unwrap_or_default();
        self.metrics = score.map(|score| numbers(&score.metrics)).unwrap_or_default();
        self.parse = score.map(|score| score.parse).or(failed.map(|(_, parse)| parse));
        self.flags = score.map(|score| score.flags.iter().map(|flag| flag.to_string()).collect()).unwrap_or_default();
        self.judge = score.and_then(|score| score.judge.as_ref()).or(failed.map(|(judgment, _)| judgment)).map(said);
    }
}

/// One line of `logprobs.jsonl`, which `sampling.logprobs` asks for: the tokens of one rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenRow {
    /// Train or eval.
    pub split: RowSplit,
    /// See [`Row::step`].
    pub step: u64,
    /// Index of the group within the step.
    pub group: usize,
    /// Index of the rollout within the group.
    pub rollout: usize,
    /// The tokens, the end token included if there is one.
    pub ids: Vec<u32>,
    /// Where each token's text is: from which byte to which. What ended the completion is beyond its text.
    pub ranges: Vec<(usize, usize)>,
    /// The log-probability of each at temperature 1.
    pub logprobs: Vec<f32>,
}

/// A judgment as rows hold it; without a verdict, the row's error has the cause.
pub fn said(judgment: &Judgment) -> Value {
    let Judgment { id, prompt_version, verdict, cached, attempts, p_correct } = judgment;
    let mut said = json!({
        "id": id,
        "prompt_version": prompt_version,
        "verdict": verdict.as_ref().ok(),
        "cached": cached,
        "attempts": attempts,
    });
    if let (Some(p_correct), Some(said)) = (p_correct, said.as_object_mut()) {
        said.insert("p_correct".into(), json!(p_correct));
    }
    said
}

/// An open run folder.
pub struct RunFolder {
    /// Where it lies.
    pub path: PathBuf,
    generations: Lines,
    metrics: Lines,
    events: EventFile,
    spans: Lines,
    /// How long the run has taken until now, in seconds.
    pub seconds: f64,
    /// Where the config asks for it.
    logprobs: Option<Lines>,
}

impl RunFolder {
    /// Refuses what [`create`](Self::create) or [`resume`](Self::resume) could not go on with, before anything is loaded.
    ///
    /// # Errors
    /// If a new run's folder exists, or a resumed run's does not or has another config.
    pub fn check(results: &Path, config: &Config, resume: bool) -> Result<()> {
        let path = results.join(&config.name);
        if !resume {
            ensure!(
                !path.exists(),
                "{} exists already: continue that run with --resume, or give this one another `name`",
                path.display()
            );
            return Ok(());
        }
        let saved = path.join("config.toml");
        ensure!(saved.exists(), "{}: there is no run to resume; start it without --resume", path.display());
        if let Some((key, change)) = differences(&Config::load(&saved, &[])?, config)?.first() {
            bail!(
                "{}: the run was started with another `{key}`, {change}; resume it with that config, or give this one another \
                 `name`",
                saved.display()
            );
        }
        ensure!(!path.join(SUMMARY).exists(), "{}: the run is finished; {SUMMARY} says how it went", path.display());
        Ok(())
    }

    /// Makes `results/<name>/` with the resolved config.
    ///
    /// # Errors
    /// If it exists already (see [`check`](Self::check)), or the disk fails.
    pub fn create(results: &Path, config: &Config) -> Result<Self> {
        let path = results.join(&config.name);
        let unfinished = results.join(format!(".{}.new", config.name));
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).with_context(|| format!("{}: cannot remove", unfinished.display()))?;
        }
        let made = fs::create_dir_all(unfinished.join("checkpoints"));
        made.with_context(|| format!("{}: cannot create", unfinished.display()))?;
        write_whole(&unfinished.join("config.toml"), config.to_toml()?.as_bytes())?;
        fs::rename(&unfinished, &path).with_context(|| format!("{}: cannot create", path.display()))?;
        Self::open(path, config, None)
    }

    /// Opens a run again: rows of steps from `next_step` on, which the checkpoint does not contain, move to
    /// `interrupted-<n>.jsonl`. Returns what was moved or dropped, in words.
    ///
    /// # Errors
    /// If a row cannot be read, or the disk fails.
    pub fn resume(results: &Path, config: &Config, next_step: u64) -> Result<(Self, Vec<String>)> {
        let path = results.join(&config.name);
        let aside = (1..).map(|n| path.join(format!("interrupted-{n}.jsonl"))).find(|path| !path.exists());
        let aside = aside.context("no free name for interrupted rows")?;
        let mut notes = Vec::new();
        for name in [GENERATIONS, METRICS, LOGPROBS] {
            notes.extend(cut_back(&path.join(name), next_step, &aside)?);
        }
        // What was done is done, whether it was in vain or not.
        notes.extend(cut_back(&path.join(SPANS), u64::MAX, &aside)?);
        Ok((Self::open(path, config, Some(next_step))?, notes))
    }

    fn open(path: PathBuf, config: &Config, resumed_at: Option<u64>) -> Result<Self> {
        let (generations, metrics) = (Lines::append(path.join(GENERATIONS))?, Lines::append(path.join(METRICS))?);
        let events = EventFile::create(&path, resumed_at)?;
        let logprobs = config.sampling.logprobs.then(|| Lines::append(path.join(LOGPROBS))).transpose()?;
        let spans = path.join(SPANS);
        let seconds = each_span(&spans)?.iter().map(|span| span.end).fold(0.0, f64::max);
        Ok(Self { path, generations, metrics, events, spans: Lines::append(spans)?, seconds, logprobs })
    }

    /// Appends one row per rollout.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn record_generations(&mut self, rows: &[Row]) -> Result<()> {
        rows.iter().try_for_each(|row| self.generations.write(row))?;
        self.generations.flush()
    }

    /// Appends the tokens of every rollout to `logprobs.jsonl`, where the config asks for it.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn record_logprobs(
        &mut self,
        split: RowSplit,
        step: u64,
        groups: &[Group],
        tokenizer: &Tokenizer,
    ) -> Result<()> {
        let Some(lines) = &mut self.logprobs else { return Ok(()) };
        for (group, of_group) in groups.iter().enumerate() {
            for Rollout { generation, .. } in &of_group.rollouts {
                let ranges = tokenizer.token_ranges(&generation.ids).1;
                lines.write(&TokenRow {
                    split,
                    step,
                    group,
                    rollout: generation.rollout,
                    ids: generation.ids.clone(),
                    ranges: ranges.into_iter().map(|range| (range.start, range.end)).collect(),
                    logprobs: generation.untempered_t.clone(),
                })?;
            }
        }
        lines.flush()
    }

    /// Appends one object to `metrics.jsonl`, and its numbers to the event file.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn record_metrics(&mut self, row: &MetricsRow) -> Result<()> {
        self.metrics.write(&row.to_json())?;
        self.metrics.flush()?;
        let (step, scalars) = row.scalars();
        self.events.scalars(step, &scalars)
    }

    /// Appends to `spans.jsonl`.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn record_spans(&mut self, mut spans: impl Iterator<Item = Span>) -> Result<()> {
        spans.try_for_each(|span| self.spans.write(&span))?;
        self.spans.flush()
    }

    /// Makes sure that everything written so far is on the disk: a checkpoint must not be newer than its rows.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn sync(&mut self) -> Result<()> {
        self.generations.sync()?;
        self.metrics.sync()?;
        self.logprobs.as_mut().map_or(Ok(()), Lines::sync)?;
        self.events.sync()
    }
}

/// File names within the run folder.
pub const GENERATIONS: &str = "generations.jsonl";
/// See [`GENERATIONS`].
pub const METRICS: &str = "metrics.jsonl";
/// See [`GENERATIONS`]; written where `sampling.logprobs` asks for it.
pub const LOGPROBS: &str = "logprobs.jsonl";
/// See [`GENERATIONS`].
pub const SPANS: &str = "spans.jsonl";
/// See [`GENERATIONS`]; written when a run is finished.
pub const SUMMARY: &str = "summary.json";

/// The spans of a run in the order of their ends; a torn last line is left out, and a file that is not there is empty.
///
/// # Errors
/// If the file cannot be read, or a line is no span.
pub fn each_span(path: &Path) -> Result<Vec<Span>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(path).with_context(|| format!("{}: cannot read", path.display()))?;
    let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n')).enumerate();
    whole
        .map(|(index, line)| {
            serde_json::from_str(line).with_context(|| format!("{}: line {}: not a span", path.display(), index + 1))
        })
        .collect()
}

/// The keys whose values differ in two configs, sorted, each with `OLD and not NEW`; a list is one value.
///
/// # Errors
/// If a config cannot be written.
pub fn differences(old: &Config, new: &Config) -> Result<Vec<(String, String)>> {
    fn leaves(value: &toml::Value, key: &str, into: &mut BTreeMap<String, String>) {
        let Some(table) = value.as_table() else { return drop(into.insert(key.to_string(), value.to_string())) };
        table.iter().for_each(|(name, value)| leaves(value, format!("{key}.{name}").trim_start_matches('.'), into));
    }
    let all = |config: &Config| -> Result<BTreeMap<String, String>> {
        let mut all = BTreeMap::new();
        leaves(&config.to_toml()?.parse::<toml::Table>()?.into(), "", &mut all);
        Ok(all)
    };
    let (old, new) = (all(old)?, all(new)?);
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).filter(|key| old.get(*key) != new.get(*key)).collect();
    let shown = |all: &BTreeMap<String, String>, key: &str| all.get(key).map_or("unset".into(), String::clone);
    Ok(keys
        .into_iter()
        .map(|key| (key.clone(), format!("{} and not {}", shown(&old, key), shown(&new, key))))
        .collect())
}

/// A file of JSON lines that only grows.
struct Lines {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Lines {
    fn append(path: PathBuf) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("{}: cannot open", path.display()))?;
        Ok(Self { path, file: BufWriter::new(file) })
    }

    fn write(&mut self, row: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(row)?;
        line.push(b'\n');
        self.file.write_all(&line).with_context(|| format!("{}: cannot write", self.path.display()))
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush().with_context(|| format!("{}: cannot write", self.path.display()))
    }

    fn sync(&mut self) -> Result<()> {
        self.flush()?;
        self.file.get_ref().sync_data().with_context(|| format!("{}: cannot write", self.path.display()))
    }
}

/// Writes a file through a temporary one, so that it is there whole or not at all.
///
/// # Errors
/// If the disk fails.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("tmp");
    let written = fs::write(&temporary, bytes).and_then(|()| File::open(&temporary)?.sync_all());
    written.and_then(|()| fs::rename(&temporary, path)).with_context(|| format!("{}: cannot write", path.display()))
}

/// Moves complete lines with step ≥ `next_step` from a file of JSON lines to the end of `aside`, and drops a torn last line.
fn cut_back(path: &Path, next_step: u64, aside: &Path) -> Result<Vec<String>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read(path).with_context(|| format!("{}: cannot read", path.display()))?;
    let (mut kept, mut moved, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    for (number, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
        let step = serde_json::from_slice::<Value>(line).ok().and_then(|row| row["step"].as_u64());
        match step {
            _ if line.last() != Some(&b'\n') => notes.push(format!("{}: dropped a torn last line", path.display())),
            Some(step) if step < next_step => kept.extend(line),
            Some(_) => moved.extend(line),
            None => bail!("{}: line {}: not a row with a step; remove the line to resume", path.display(), number + 1),
        }
    }
    if kept.len() == text.len() {
        return Ok(notes);
    }
    if !moved.is_empty() {
        let rows = moved.iter().filter(|&&byte| byte == b'\n').count();
        let mut file = OpenOptions::new().create(true).append(true).open(aside)?;
        file.write_all(&moved)
            .and_then(|()| file.sync_all())
            .with_context(|| format!("{}: cannot write", aside.display()))?;
        notes.push(format!(
            "{}: moved {rows} rows that the checkpoint does not contain to {}",
            path.display(),
            aside.display()
        ));
    }
    write_whole(path, &kept)?;
    Ok(notes)
}
