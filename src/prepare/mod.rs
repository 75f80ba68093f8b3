//! `candor prepare`: from questions to what is trained on, stage by stage, each a file of JSON lines that says of every row where it
//! came from.
//!
//! questions ─► answers ─► judged ─► sft-binary, sft-ground-truth, sft-knn, sft-sampled, dpo; `split` before any of them
//!
//! * [`answers`]: a model answers
//! * [`labels`]: answers become confidences and pairs
//! * [`embedding`]: which questions are alike

pub mod answers;
pub mod embedding;
pub mod labels;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candor_environments::Verdict;
use candor_environments::lexical::grade;
use candor_environments::rows::is_held_out;
use candor_environments::rows::{each_row, field};
use candor_environments::simpleqa::{gold, question};
use serde_json::{Map, Value, json};

use crate::event::{Event, Observer};
use crate::source::{self, Kind};
use embedding::Encoder;
use labels::{Confidences, Formula, LEVELS, Targets, levels, neighbor_confidences, prompt, stated};

/// A row of a file.
pub type Object = Map<String, Value>;

/// Answers to one question below which a share of right ones says too little for levels.
const FEWEST_ANSWERS: usize = 8;

/// A pair that gains less than this in expected Brier score teaches nothing.
const LEAST_GAIN: f64 = 1e-9;

/// What is made of judged answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Stage {
    /// Answers become judged ones.
    Judged,
    /// Confidence 0.9 where the answer is right, else 0.1.
    SftBinary,
    /// Wrong answers are replaced by right ones, all with 0.9: as the original notes have it.
    SftGroundTruth,
    /// The confidence of an answer is how the answers to similar questions fared.
    SftNeighbors {
        /// The number of neighbors.
        neighbors: usize,
        /// How they become a confidence.
        formula: Formula,
        /// The source of the sentence encoder.
        encoder: String,
    },
    /// The confidence of a question's first answer is the share of its answers that are right.
    SftSampled,
    /// Pairs of confidences; the rejected one is what was stated, or the target's mirror image.
    Dpo {
        /// What is chosen.
        targets: Targets,
        /// Whether the rejected one is the other target.
        mirrored: bool,
    },
    /// Pairs of levels, by the share of a question's answers that are right.
    DpoLevels,
}

impl Stage {
    /// What the rows it makes say that they come from.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Judged => "judged",
            Self::SftBinary => "sft-binary",
            Self::SftGroundTruth => "sft-ground-truth",
            Self::SftNeighbors { .. } => "sft-knn",
            Self::SftSampled => "sft-sampled",
            Self::Dpo { .. } | Self::DpoLevels => "dpo",
        }
    }

    /// Makes a file of another.
    ///
    /// # Errors
    /// If a row, named by file and line, is not what the stage reads, or nothing is left of them; if the output exists.
    pub fn run(&self, input: &Path, output: &Path, observer: Observer) -> Result<()> {
        let mut writer = Writer::create(output, json!({"stage": self.name(), "file": input.display().to_string()}))?;
        match self {
            Self::Judged => {
                each_row(input, |row, object: Object| writer.take(row, object.get("from").cloned(), judge(object)?))?
            }
            Self::SftBinary | Self::SftGroundTruth | Self::Dpo { .. } => each_row(input, |row, object: Object| {
                let judged = Judged::of(&object)?;
                writer.take(row, judged.origin(), self.of_one(&judged))
            })?,
            Self::SftNeighbors { .. } | Self::SftSampled | Self::DpoLevels => {
                let mut all = Vec::new();
                each_row(input, |_, object: Object| {
                    all.push(Judged::of(&object)?);
                    Ok(())
                })?;
                self.of_all(&all, &mut writer, observer)?;
            }
        }
        if *self == Self::SftGroundTruth {
            observer(Event::Warning(
                "every row has the confidence 0.9: there is nothing to learn about it from a constant",
            ));
        }
        writer.finish(observer)
    }

    /// What one judged answer gives, or why it gives nothing.
    fn of_one(&self, judged: &Judged) -> Result<Object, String> {
        let Judged { question, answer, correct, .. } = judged;
        match self {
            Self::SftGroundTruth if !correct => {
                let gold = judged.gold.first().ok_or("no_right_answer_known")?;
                Ok(imitated(question, &stated(gold, Targets::BINARY.right, 1)))
            }
            Self::SftBinary | Self::SftGroundTruth => {
                Ok(imitated(question, &stated(answer, Targets::BINARY.of(*correct), 1)))
            }
            Self::Dpo { targets, mirrored: true } => {
                Ok(preferred(judged, Confidences::mirrored(*correct, *targets), None))
            }
            Self::Dpo { targets, mirrored: false } => {
                let confidence = judged.confidence.ok_or("no_confidence")?;
                let pair = Confidences::of_stated(confidence, *correct, *targets).map_err(|why| why.to_string())?;
                Ok(preferred(judged, pair, None))
            }
            _ => Err("not_made_one_by_one".to_string()),
        }
    }

    /// What all judged answers together give.
    fn of_all(&self, all: &[Judged], writer: &mut Writer, observer: Observer) -> Result<()> {
        if let Self::SftNeighbors { neighbors, formula, encoder } = self {
            let confidences = by_neighbors(all, *neighbors, *formula, encoder, observer)?;
            for (row, (judged, confidence)) in all.iter().zip(confidences).enumerate() {
                let imitated = imitated(&judged.question, &stated(&judged.answer, confidence, 2));
                writer.take(row, judged.origin(), Ok(imitated))?;
            }
            return Ok(());
        }
        let mut by_question: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        all.iter().enumerate().for_each(|(row, judged)| by_question.entry(&judged.question).or_default().push(row));
        let mut groups: Vec<Vec<usize>> = by_question.into_values().collect();
        groups.sort();
        for rows in groups {
            let (row, first) = (rows[0], &all[rows[0]]);
            let right = rows.iter().filter(|&&row| all[row].correct).count();
            let accuracy = right as f64 / rows.len() as f64;
            let fewest = if *self == Self::DpoLevels { FEWEST_ANSWERS } else { 2 };
            if rows.len() < fewest {
                writer.take(row, first.origin(), Err(format!("fewer_than_{fewest}_answers")))?;
            } else if *self == Self::SftSampled {
                let imitated = imitated(&first.question, &stated(&first.answer, accuracy, 2));
                writer.take(row, first.origin(), Ok(imitated))?;
            } else {
                for (pair, gain) in levels(accuracy, &LEVELS) {
                    let gains = (gain > LEAST_GAIN).then(|| preferred(first, pair, Some(gain)));
                    writer.take(row, first.origin(), gains.ok_or("no_gain".to_string()))?;
                }
            }
        }
        Ok(())
    }
}

/// Confidences from the answers to similar questions.
fn by_neighbors(all: &[Judged], k: usize, formula: Formula, encoder: &str, observer: Observer) -> Result<Vec<f64>> {
    ensure!(all.len() > k, "{} answers have no {k} neighbors each; give more, or lower --neighbors", all.len());
    let folder = source::resolve(encoder, Kind::Model, &|line| observer(Event::Line(line)))?;
    let questions: Vec<String> = all.iter().map(|judged| judged.question.clone()).collect();
    let total = questions.len();
    let progress = |what| move |done| observer(Event::Progress { what, done, total });
    let embeddings = Encoder::open(&folder)?.embed(&questions, &progress("questions embedded"))?;
    let nearest = labels::nearest(&embeddings, k, &progress("questions compared"));
    let correct: Vec<bool> = all.iter().map(|judged| judged.correct).collect();
    Ok(neighbor_confidences(formula, &correct, &nearest))
}

/// A row to be imitated.
fn imitated(question: &str, output: &str) -> Object {
    Object::from_iter([("input".to_string(), json!(prompt(question))), ("output".to_string(), json!(output))])
}

/// A pair, with what it gains where that is known.
fn preferred(judged: &Judged, pair: Confidences, gain: Option<f64>) -> Object {
    let text = |confidence| json!(stated(&judged.answer, confidence, 2));
    let fields =
        [("prompt", json!(prompt(&judged.question))), ("chosen", text(pair.chosen)), ("rejected", text(pair.rejected))];
    let gain = gain.map(|gain| ("weight", json!(gain)));
    fields.into_iter().chain(gain).map(|(name, value)| (name.to_string(), value)).collect()
}

/// An answer that was judged.
struct Judged {
    question: String,
    answer: String,
    /// What the model stated; it need not have.
    confidence: Option<f64>,
    correct: bool,
    gold: Vec<String>,
    /// Where the row says that it comes from.
    from: Option<Value>,
}

impl Judged {
    fn of(object: &Object) -> Result<Self> {
        let answer: String = field(object, "model_answer")?;
        ensure!(!answer.trim().is_empty(), "field `model_answer` is empty");
        let confidence: Option<f64> = match object.get("confidence") {
            None => None,
            Some(_) => field(object, "confidence")?,
        };
        let in_range = confidence.is_none_or(|confidence| (0.0..=1.0).contains(&confidence));
        ensure!(in_range, "field `confidence` is not a probability: {confidence:?}");
        let known = ["answers", "answer"].iter().any(|name| object.contains_key(*name));
        Ok(Self {
            question: question(object)?,
            answer,
            confidence,
            correct: field(object, "is_correct")?,
            gold: if known { gold(object)? } else { Vec::new() },
            from: object.get("from").cloned(),
        })
    }

    /// What the rows made of it say of it.
    fn origin(&self) -> Option<Value> {
        let Self { question, correct, from, .. } = self;
        Some(json!({"question": question, "is_correct": correct, "from": from}))
    }
}

/// An answer with its verdict: `candor judge`'s, or where it has none, the lexical judge's.
fn judge(mut object: Object) -> Result<Result<Object, String>> {
    let graded = object.contains_key("row") && object.contains_key("judge");
    let verdict = if graded {
        let Value::Object(judged) = object.remove("judge").unwrap_or_default() else {
            return Ok(Err("no_verdict".into()));
        };
        if judged.get("verdict").is_none_or(Value::is_null) {
            return Ok(Err("no_verdict".into()));
        }
        let verdict: Verdict = field(&judged, "verdict")?;
        let Some(Value::Object(row)) = object.remove("row") else { bail!("field `row` is no object") };
        object = row;
        object.insert("judge".into(), judged.get("id").cloned().unwrap_or_default());
        verdict
    } else {
        let Some(answer) = object.get("model_answer").filter(|answer| !answer.is_null()) else {
            return Ok(Err("no_answer".into()));
        };
        let answer = answer.as_str().context("field `model_answer` is no text")?;
        let (verdict, rule) = grade(answer, &gold(&object)?);
        object.insert("judge".into(), json!(format!("lexical: {rule}")));
        verdict
    };
    let answered = object.get("model_answer").is_some_and(Value::is_string);
    object.insert("is_correct".into(), json!(verdict == Verdict::Correct));
    Ok(if answered { Ok(object) } else { Err("no_answer".into()) })
}

/// Parts a file of rows with questions: `train.jsonl` and `dev.jsonl`. The side depends on the question's text alone, and is that of
/// the environments that hold out part of a single file; so no question is ever on both.
///
/// # Errors
/// If a row has no question, or a side has no rows.
pub fn split(input: &Path, folder: &Path, observer: Observer) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("{}: cannot create", folder.display()))?;
    let origin = json!({"stage": "split", "file": input.display().to_string()});
    let [train, dev] = ["train.jsonl", "dev.jsonl"].map(|name| Writer::create(&folder.join(name), origin.clone()));
    let (mut train, mut dev) = (train?, dev?);
    each_row(input, |row, object: Object| {
        let side = if is_held_out(&question(&object)?) { &mut dev } else { &mut train };
        side.take(row, object.get("from").cloned(), Ok(object))
    })?;
    train.finish(observer)?;
    dev.finish(observer)
}

/// A file of rows that appears when it is whole; until then it is `NAME.part`.
struct Writer {
    path: PathBuf,
    part: PathBuf,
    file: BufWriter<File>,
    /// What every row says that it comes from, but for its place.
    origin: Value,
    kept: usize,
    refused: BTreeMap<String, usize>,
}

impl Writer {
    fn create(path: &Path, origin: Value) -> Result<Self> {
        ensure!(!path.exists(), "{} exists already; name another file, or remove it", path.display());
        let part = PathBuf::from(format!("{}.part", path.display()));
        let file = File::create(&part).with_context(|| format!("{}: cannot create", part.display()))?;
        let (file, kept, refused) = (BufWriter::new(file), 0, BTreeMap::new());
        Ok(Self { path: path.to_path_buf(), part, file, origin, kept, refused })
    }

    /// Writes what came of row `row`, or counts why nothing did.
    fn take(&mut self, row: usize, before: Option<Value>, made: Result<Object, String>) -> Result<()> {
        let mut made = match made {
            Ok(made) => made,
            Err(reason) => {
                *self.refused.entry(reason).or_default() += 1;
                return Ok(());
            }
        };
        let mut from = self.origin.clone();
        from["row"] = json!(row);
        if let Some(before) = before {
            from["of"] = before;
        }
        made.insert("from".to_string(), from);
        let mut line = serde_json::to_vec(&made)?;
        line.push(b'\n');
        self.kept += 1;
        self.file.write_all(&line).with_context(|| format!("{}: cannot write", self.part.display()))
    }

    /// Gives the file its name, and says how many rows it has and why others are not there.
    fn finish(mut self, observer: Observer) -> Result<()> {
        let flushed = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        let Self { path, part, kept, refused, .. } = &self;
        let why: Vec<String> = refused.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        let why = if why.is_empty() { String::new() } else { format!("; left out: {}", why.join(", ")) };
        ensure!(*kept > 0, "{}: no row is left to write{why}", path.display());
        flushed.and_then(|()| fs::rename(part, path)).with_context(|| format!("{}: cannot write", path.display()))?;
        observer(Event::Line(&format!("{}: {kept} rows{why}", path.display())));
        Ok(())
    }
}
