//! `candor judge`: a file of answers is graded, many at a time, into a file that a later call goes on with.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Error, Result, bail, ensure};
use candor_environments::confidence::stated_answer;
use candor_environments::parsing::Mode;
use candor_environments::rows::{each_row, field};
use candor_environments::simpleqa::{gold, question};
use candor_environments::{Judge, Verdict};
use crossbeam::channel::unbounded;
use serde_json::{Map, Value, json};

use super::Panel;
use super::agreement::Agreement;
use crate::event::{Event, Observer};
use crate::grades::Grades;
use crate::run::{said, write_whole};

/// An answer to be graded.
struct Answer {
    row: Map<String, Value>,
    question: String,
    gold: Vec<String>,
    answer: String,
    /// The grade by hand, where it is compared with one.
    label: Option<Verdict>,
}

/// A file of answers.
pub struct Answers {
    path: PathBuf,
    answers: Vec<Answer>,
}

/// What became of a file.
pub struct Graded {
    /// All grades.
    pub grades: Grades,
    /// By label of the row, as `topic: History`.
    pub by_label: BTreeMap<String, Grades>,
    /// Answers that were graded before.
    pub done_before: usize,
    /// Verdicts that cost nothing now, because the same was asked before.
    pub cached: usize,
    /// Requests and tokens (prompts, replies), and what they cost, in dollars, where the prices are known.
    pub requests: u64,
    /// See `requests`.
    pub tokens: [u64; 2],
    /// See `requests`.
    pub dollars: Option<f64>,
    /// Why there was no verdict, with counts.
    pub reasons: BTreeMap<String, usize>,
}

/// An answer longer than this is none, and would cost as much as it likes.
const LONGEST_ANSWER: usize = 8192;

/// Names that a grade by hand may have: SimpleQA's letters and ours.
fn label(text: &str) -> Result<Verdict> {
    super::reply::read(text).with_context(|| {
        format!("field `label`: {text:?} is no grade; write A or correct, B or incorrect, C or not_attempted")
    })
}

impl Answer {
    /// Reads a row. The answer is the field `prediction` as it is, or what `completion` states after `Answer:`.
    fn of(row: Map<String, Value>, is_labeled: bool) -> Result<Self> {
        let answer = match (row.contains_key("prediction"), row.contains_key("completion")) {
            (true, _) => field::<String>(&row, "prediction")?,
            (_, true) => {
                let text: String = field(&row, "completion")?;
                stated_answer(&text, Mode::Lenient).answer.map(|range| text[range].to_string()).unwrap_or_default()
            }
            _ => bail!("there is no field `prediction` or `completion`"),
        };
        let length = answer.len();
        ensure!(length <= LONGEST_ANSWER, "an answer of {length} bytes, more than {LONGEST_ANSWER}; shorten it");
        let label = is_labeled.then(|| label(&field::<String>(&row, "label")?)).transpose()?;
        Ok(Self { question: question(&row)?, gold: gold(&row)?, answer, label, row })
    }
}

impl Answers {
    /// Reads a file; every row names a question, gold answers and an answer, and a grade by hand if that is asked for.
    ///
    /// # Errors
    /// If a row is not what it should be, with its line, or there are none.
    pub fn read(path: &Path, is_labeled: bool) -> Result<Self> {
        let mut answers = Vec::new();
        each_row(path, |_, row| {
            answers.push(Answer::of(row, is_labeled)?);
            Ok(())
        })?;
        ensure!(!answers.is_empty(), "{}: there are no rows", path.display());
        Ok(Self { path: path.to_owned(), answers })
    }

    /// Where the verdicts go: `answers.jsonl` to `answers.judged.jsonl`.
    pub fn output(&self) -> PathBuf {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let stem = name.strip_suffix(".gz").unwrap_or(&name);
        let stem = stem.rsplit_once('.').map_or(stem, |(stem, _)| stem);
        self.path.with_file_name(format!("{stem}.judged.jsonl"))
    }

    /// Compares the judge with the grades by hand.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn agreement(&self, judge: &Arc<Panel>, observer: Observer) -> Result<Agreement> {
        let (mut agreement, all) = (Agreement::default(), (0..self.answers.len()).collect::<Vec<_>>());
        self.judge(&all, judge, observer, &mut |index, graded| {
            let verdict = graded["judge"]["verdict"].as_str().and_then(verdict_named);
            self.answers[index].label.into_iter().for_each(|label| agreement.add(label, verdict));
            Ok(())
        })?;
        Ok(agreement)
    }

    /// Grades what `output` does not hold yet, and appends to it as verdicts come; when all are there, they are put in the
    /// order of the file. Answers that got no verdict the last time are judged again.
    ///
    /// # Errors
    /// If `output` is of another file, or the disk fails.
    pub fn grade(&self, output: &Path, judge: &Arc<Panel>, prices: [f64; 2], observer: Observer) -> Result<Graded> {
        let mut done = self.done(output)?;
        let done_before = done.len();
        let missing: Vec<usize> = (0..self.answers.len()).filter(|index| !done.contains_key(index)).collect();
        let place = || format!("{}: cannot write", output.display());
        // What is torn or failed goes, before anything is appended.
        write_whole(output, &lines(&done)?).with_context(place)?;
        let mut file = OpenOptions::new().append(true).open(output).with_context(place)?;
        let (mut cached, mut reasons) = (0, BTreeMap::new());
        self.judge(&missing, judge, observer, &mut |index, graded| {
            cached += usize::from(graded["judge"]["cached"] == true);
            if let Some(reason) = graded["error"].as_str() {
                *reasons.entry(reason.to_string()).or_default() += 1;
            }
            let mut line = serde_json::to_vec(&graded)?;
            line.push(b'\n');
            file.write_all(&line).with_context(place)?;
            done.insert(index, graded);
            Ok(())
        })?;
        write_whole(output, &lines(&done)?).with_context(place)?;
        let (mut grades, mut by_label) = (Grades::default(), BTreeMap::<String, Grades>::new());
        for row in done.values() {
            let verdict = row["judge"]["verdict"].as_str().and_then(verdict_named);
            grades.add(verdict);
            if let Some(topic) = row["row"].get("topic").and_then(Value::as_str) {
                by_label.entry(format!("topic: {topic}")).or_default().add(verdict);
            }
        }
        let totals = &judge.totals;
        let tokens = [0, 1].map(|kind: usize| totals.tokens[kind].load(Ordering::Relaxed));
        let dollars = tokens.iter().zip(prices).map(|(tokens, price)| *tokens as f64 * price / 1e6).sum::<f64>();
        let dollars = (prices != [0.0, 0.0]).then_some(dollars);
        let requests = totals.requests.load(Ordering::Relaxed);
        Ok(Graded { grades, by_label, done_before, cached, requests, tokens, dollars, reasons })
    }

    /// The rows of an earlier call that have a verdict, by index. A torn last line is none.
    fn done(&self, output: &Path) -> Result<BTreeMap<usize, Value>> {
        let mut done = BTreeMap::new();
        if !output.exists() {
            return Ok(done);
        }
        let text = fs::read(output).with_context(|| format!("{}: cannot read", output.display()))?;
        for (number, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
            if line.last() != Some(&b'\n') {
                break;
            }
            let place = || format!("{}, line {}", output.display(), number + 1);
            let graded: Value = serde_json::from_slice(line).with_context(place)?;
            let index = graded["index"].as_u64().and_then(|index| usize::try_from(index).ok());
            let of_this = index.filter(|index| {
                self.answers.get(*index).is_some_and(|answer| graded["row"].as_object() == Some(&answer.row))
            });
            let index = of_this.with_context(|| {
                format!("{}: not of {}; move that file away, or judge another", place(), self.path.display())
            })?;
            if !graded["judge"]["verdict"].is_null() {
                done.insert(index, graded);
            }
        }
        Ok(done)
    }

    /// Has answers judged, as many at a time as a judge may be asked; `graded` is given each as it comes.
    fn judge(
        &self,
        chosen: &[usize],
        judge: &Arc<Panel>,
        observer: Observer,
        graded: &mut dyn FnMut(usize, Value) -> Result<()>,
    ) -> Result<()> {
        let next = Mutex::new(chosen.iter());
        let (sender, receiver) = unbounded();
        let work = || {
            loop {
                let Some(&index) = next.lock().unwrap_or_else(PoisonError::into_inner).next() else { return };
                let answer = &self.answers[index];
                let judgment = judge.judge(&answer.question, &answer.gold, &answer.answer);
                let error = judgment.verdict.is_err().then(|| format!("judge: {judgment}"));
                let line = json!({"index": index, "row": answer.row, "judge": said(&judgment), "error": error});
                if sender.send((index, line)).is_err() {
                    return;
                }
            }
        };
        thread::scope(|scope| {
            let failed = (0..chosen.len().min(judge.at_once()))
                .map(|_| thread::Builder::new().spawn_scoped(scope, work).map_err(Error::new).map(drop))
                .collect::<Result<Vec<_>>>();
            let outcome = failed.and_then(|_| {
                for (done, (index, line)) in receiver.iter().take(chosen.len()).enumerate() {
                    graded(index, line)?;
                    observer(Event::Progress { what: "answers", done: done + 1, total: chosen.len() });
                }
                Ok(())
            });
            if outcome.is_err() {
                // Nobody takes another one.
                next.lock().unwrap_or_else(PoisonError::into_inner).by_ref().for_each(drop);
            }
            outcome
        })
    }
}

fn verdict_named(name: &str) -> Option<Verdict> {
    Verdict::ALL.into_iter().find(|verdict| verdict.name() == name)
}

fn lines(rows: &BTreeMap<usize, Value>) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    for row in rows.values() {
        serde_json::to_writer(&mut text, row)?;
        text.push(b'\n');
    }
    Ok(text)
}

impl fmt::Display for Graded {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { grades, by_label, done_before, cached, requests, tokens: [prompts, replies], dollars, reasons } =
            self;
        writeln!(f, "{} answers graded, {} without a verdict", grades.graded(), grades.errors)?;
        for (name, value, note) in grades.lines() {
            writeln!(f, "{}", format!("  {name:<22} {:>8}  {note}", crate::record::shown(value, 3)).trim_end())?;
        }
        f.write_str(&crate::grades::breakdown(by_label))?;
        let cost = dollars.map_or(String::new(), |dollars| format!(", {dollars:.4} dollars"));
        writeln!(
            f,
            "{done_before} graded before, {cached} from the cache, {requests} requests, {prompts} + {replies} tokens{cost}"
        )?;
        reasons.iter().try_for_each(|(reason, count)| writeln!(f, "{count} × {reason}"))
    }
}
