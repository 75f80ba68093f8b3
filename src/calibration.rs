//! What the rows of an evaluation say: how good each kind of confidence is, beside what post-hoc maps make of it.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candor_environments::rows::all_rows;
use serde::Serialize;
use serde_json::{Value, json};

use crate::calibration_map::{CalibrationMap, Confidence};
use crate::evaluation::Predictions;
use crate::evaluation::answers::Answers;
use crate::evaluation::binned::{Norm, calibration_error_hle, expected_calibration_error};
use crate::evaluation::bootstrap::Resampling;
use crate::evaluation::collapse::Collapse;
use crate::evaluation::measures::{Estimate, METRICS, Measures};
use crate::evaluation::posthoc::{Kind, combined, cross_fitted};
use crate::grades::{Grades, breakdown};
use crate::record::shown;
use crate::run::{GENERATIONS, Row, RowSplit};

/// The rows of one evaluation: those of a file of rows, or of a folder that holds one; of a run, those of the last evaluation. `@STEP` after the
/// path takes the one after so many steps.
///
/// # Errors
/// If the file cannot be read, or holds no such evaluation.
pub fn read_rows(source: &Path) -> Result<Vec<Row>> {
    let text = source.to_string_lossy();
    let at_step = text.rsplit_once('@').and_then(|(path, step)| Some((Path::new(path), step.parse::<u64>().ok()?)));
    let (path, step) = match at_step.filter(|_| !source.exists()) {
        Some((path, step)) => (path.to_path_buf(), Some(step)),
        None => (source.to_path_buf(), None),
    };
    let file = if path.is_dir() { path.join(GENERATIONS) } else { path };
    let mut rows: Vec<Row> = all_rows(&file)?;
    rows.retain(|row| row.split == RowSplit::Eval);
    let steps: Vec<u64> = rows.iter().map(|row| row.step).collect();
    let wanted = step.or(steps.iter().copied().max());
    let wanted = wanted.with_context(|| format!("{}: there is no row of an evaluation", file.display()))?;
    rows.retain(|row| row.step == wanted);
    ensure!(
        !rows.is_empty(),
        "{}: there is no evaluation after {wanted} steps; the last one is after {}",
        file.display(),
        steps.iter().max().copied().unwrap_or(0)
    );
    Ok(rows)
}

/// The rows of every environment, in the order of their tasks, so that two evaluations of the same tasks number them the same.
pub fn by_environment<'a>(rows: impl IntoIterator<Item = &'a Row>) -> BTreeMap<&'a str, Vec<&'a Row>> {
    let mut by_environment: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    rows.into_iter().for_each(|row| by_environment.entry(&row.environment).or_default().push(row));
    by_environment.values_mut().for_each(|rows| rows.sort_by_key(|row| (&row.task, row.rollout)));
    by_environment
}

/// The answers whose correctness is known, with one kind of confidence; `None` where there are none.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn answers(rows: &[&Row], confidence: Confidence) -> Result<Option<Answers>> {
    let answer = |row: &&&Row| row.metric("correct").is_some();
    let of = |row: &&Row| match confidence {
        Confidence::Stated => row.metric("confidence"),
        Confidence::Token => row.token_confidence,
    };
    let known: Vec<&&Row> = rows.iter().filter(answer).collect();
    let each = || known.iter().map(|row| (row.task.as_str(), of(row), row.metric("correct") == Some(1.0)));
    (!known.is_empty()).then(|| Answers::new(each())).transpose()
}

/// One kind of confidence: as it is, and as post-hoc maps make it that were fitted on other questions.
#[derive(Clone, Debug, Serialize)]
pub struct Calibrated {
    /// As it is.
    pub raw: Measures,
    /// Through a cross-fitted Platt map; `None` where there are too few answers to fit one, or all are right or wrong.
    pub platt: Option<Measures>,
    /// Through a cross-fitted isotonic map.
    pub isotonic: Option<Measures>,
    /// Through the map that was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mapped: Option<Measures>,
}

impl Calibrated {
    fn of(answers: &Answers, map: Option<&CalibrationMap>, resampling: Resampling) -> Result<Self> {
        let fitted = |kind| cross_fitted(answers, kind).map(|answers| Measures::of(&answers, resampling));
        let mapped = |map: &CalibrationMap| {
            let stated = answers.rows().iter().map(|answer| answer.confidence.map(|stated| map.map.apply(stated)));
            answers.with_confidences(&stated.collect::<Vec<_>>()).map(|answers| Measures::of(&answers, resampling))
        };
        Ok(Self {
            raw: Measures::of(answers, resampling),
            platt: fitted(Kind::Platt),
            isotonic: fitted(Kind::Isotonic),
            mapped: map.map(mapped).transpose()?,
        })
    }
}

/// The calibration error of Humanity's Last Exam, as published tables have it.
#[derive(Clone, Debug, Serialize)]
pub struct HleError {
    /// In [0, 1]; `None` for fewer than 100 answers, where their script fails.
    pub value: Option<f64>,
    /// As they print it: percent, of the value rounded to two decimals.
    pub published: Option<f64>,
}

/// Rows in a bin of HLE's script.
const HLE_BETA: usize = 100;

impl HleError {
    fn of(predictions: &Predictions) -> Self {
        let value = calibration_error_hle(predictions, Norm::L2, HLE_BETA).ok();
        Self { value, published: value.map(|value| (100.0 * value).round_ties_even()) }
    }
}

/// One evaluation of one environment.
#[derive(Clone, Debug, Serialize)]
pub struct Calibration {
    /// Tasks.
    pub tasks: usize,
    /// Completions of them.
    pub completions: usize,
    /// Completions without a score.
    pub errors: usize,
    /// How often each way of stating a confidence, or of not stating one, occurred.
    pub parse: BTreeMap<String, usize>,
    /// How often each oddity occurred.
    pub flags: BTreeMap<String, usize>,
    /// Who judged, and by which version of the prompt.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub judges: Vec<Value>,
    /// The mean of the reward's outcome part over all scored completions: no length term.
    pub reward: Option<f64>,
    /// The confidence that completions state.
    pub stated: Option<Calibrated>,
    /// The one that their answers' probabilities state.
    pub token: Option<Calibrated>,
    /// A logistic regression of both, fitted on other questions.
    pub combined: Option<Measures>,
    /// Expected calibration error, 10 bins, of P(YES) rather than of the stated answer; only where the environment tells both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ece_10_of_yes: Option<f64>,
    /// Of the stated confidence, where it is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hle_calibration_error: Option<HleError>,
    /// What the judge said of all completions; only where one was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grades: Option<Grades>,
    /// The same by label, as `topic: History`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub grades_by_label: BTreeMap<String, Grades>,
}

/// What an evaluation is measured with.
#[derive(Clone, Copy, Default)]
pub struct Measuring<'a> {
    /// How intervals are made.
    pub resampling: Resampling,
    /// A map to apply.
    pub map: Option<&'a CalibrationMap>,
    /// Whether HLE's calibration error is wanted.
    pub hle: bool,
}

impl Calibration {
    /// Measures the rows of one environment.
    ///
    /// # Errors
    /// If a confidence is not in [0, 1].
    pub fn of(rows: &[&Row], measuring: Measuring) -> Result<Self> {
        let Measuring { resampling, map, hle } = measuring;
        let [stated, token] = [Confidence::Stated, Confidence::Token].map(|kind| answers(rows, kind));
        let (stated, token) = (stated?, token?.filter(|answers| answers.predictions().is_some()));
        let calibrated = |answers: &Option<Answers>, kind: Confidence| {
            let map = map.filter(|map| map.of == kind);
            answers.as_ref().map(|answers| Calibrated::of(answers, map, resampling)).transpose()
        };
        let both = stated.as_ref().zip(token.as_ref()).and_then(|(stated, token)| combined(stated, token));
        let both = both.filter(|answers| answers.predictions().is_some());
        let outcomes: Vec<f64> = rows.iter().filter_map(|row| row.outcome()).collect();
        let yes: Vec<(f64, f64)> = rows.iter().filter_map(|row| row.metric("p_yes").zip(row.metric("y"))).collect();
        let (p_yes, y): (Vec<f64>, Vec<bool>) = yes.into_iter().map(|(p, y)| (p, y == 1.0)).unzip();
        let yes = (!y.is_empty()).then(|| Predictions::new(&p_yes, &y)).transpose()?;
        let mut judges: Vec<Value> = Vec::new();
        for judge in rows.iter().filter_map(|row| row.judge.as_ref()) {
            let judge = json!({ "id": judge["id"], "prompt_version": judge["prompt_version"] });
            if !judges.contains(&judge) {
                judges.push(judge);
            }
        }
        let mut tasks: Vec<&str> = rows.iter().map(|row| row.task.as_str()).collect();
        tasks.dedup();
        let (grades, grades_by_label) = Grades::of(rows).map_or((None, BTreeMap::new()), |(all, by)| (Some(all), by));
        let predictions = stated.as_ref().and_then(Answers::predictions);
        Ok(Self {
            tasks: tasks.len(),
            completions: rows.len(),
            errors: rows.iter().filter(|row| row.error.is_some()).count(),
            parse: counts(rows.iter().filter_map(|row| Some(row.parse?.name().to_string()))),
            flags: counts(rows.iter().flat_map(|row| row.flags.iter().cloned())),
            judges,
            reward: (!outcomes.is_empty()).then(|| outcomes.iter().sum::<f64>() / outcomes.len() as f64),
            stated: calibrated(&stated, Confidence::Stated)?,
            token: calibrated(&token, Confidence::Token)?,
            combined: both.map(|answers| Measures::of(&answers, resampling)),
            ece_10_of_yes: yes.map(|yes| expected_calibration_error(&yes, 10)),
            hle_calibration_error: predictions.filter(|_| hle).map(|all| HleError::of(&all)),
            grades,
            grades_by_label,
        })
    }

    /// All columns of a table: whose confidence, what was done to it, and what came of it.
    fn columns(&self) -> Vec<(&'static str, &'static str, &Measures)> {
        let mut columns = Vec::new();
        for (kind, calibrated) in [("stated", &self.stated), ("token", &self.token)] {
            let Some(Calibrated { raw, platt, isotonic, mapped }) = calibrated else { continue };
            columns.push((kind, "raw", raw));
            for (how, measures) in [("+Platt", platt), ("+isot.", isotonic), ("+map", mapped)] {
                columns.extend(measures.as_ref().map(|measures| (kind, how, measures)));
            }
        }
        columns.extend(self.combined.as_ref().map(|measures| ("both", "fitted", measures)));
        columns
    }

    /// What was not read, for above everything else, where it is more than one in a hundred.
    fn unread(&self) -> Option<String> {
        let read = self.parse.get("ok").copied().unwrap_or(0);
        let count = |counts: &BTreeMap<String, usize>| {
            counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
        };
        let flags = if self.flags.is_empty() { String::new() } else { format!("\n  odd: {}", count(&self.flags)) };
        let few = (read as f64) < 0.99 * self.completions as f64;
        few.then(|| format!("read {read} of {} answers: {}{flags}", self.completions, count(&self.parse)))
    }
}

fn counts(words: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    words.for_each(|word| *counts.entry(word).or_default() += 1);
    counts
}

/// What is wrong with how confidences are spread, in words.
fn warnings(measures: &Measures) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(Collapse {
        flat,
        collapsed,
        two_atom,
        spans,
        mode,
        mode_share,
        top2_share,
        q05,
        q95,
        occupied_02_09,
        ..
    }) = measures.collapse
    {
        warnings.push(match (flat, collapsed, two_atom, spans) {
            (true, ..) => format!("FLAT: every confidence is {mode:.3}"),
            (_, true, ..) => {
                format!("COLLAPSED: {:.0}% are {mode:.3}, 90% are {q05:.3} to {q95:.3}", 100.0 * mode_share)
            }
            (_, _, true, _) => format!("TWO_ATOM: two confidences have {:.0}%", 100.0 * top2_share),
            (.., false) => {
                format!("not spread out: 90% are {q05:.3} to {q95:.3}, in {occupied_02_09} of 7 tenths from 0.2")
            }
            _ => String::new(),
        });
    }
    if measures.uninformative == Some(true) {
        warnings.push("UNINFORMATIVE: AUROC may be chance, or Brier skill is not above 0".to_string());
    }
    warnings.retain(|warning| !warning.is_empty());
    warnings
}

impl fmt::Display for Calibration {
    /// At most 80 columns, but for labels.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if let Some(unread) = self.unread() {
            writeln!(f, "  {unread}")?;
        }
        writeln!(f, "  mean outcome, without shaping: {}; errors: {}", shown(self.reward, 3), self.errors)?;
        let columns = self.columns();
        let mut line = |name: &str, cells: &mut dyn Iterator<Item = String>| {
            let cells: String = cells.map(|cell| format!(" {cell:>7}")).collect();
            writeln!(f, "{}", format!("  {name:<21}{cells}").trim_end())
        };
        if !columns.is_empty() {
            line("confidence", &mut columns.iter().map(|(kind, ..)| kind.to_string()))?;
            line("", &mut columns.iter().map(|(_, how, _)| how.to_string()))?;
            line("parse rate", &mut columns.iter().map(|(.., all)| shown(all.parse_rate.value, 3)))?;
        }
        for metric in METRICS.iter().filter(|_| !columns.is_empty()) {
            let value = |all: &Measures| shown(all.get(metric.name).and_then(|estimate| estimate.value), 3);
            line(metric.title, &mut columns.iter().map(|(.., all)| value(all)))?;
            if metric.name == "ece_10" {
                let level = |all: &Measures| shown(all.ece_10_null.map(|level| level.mean), 3);
                line("  if calibrated", &mut columns.iter().map(|(.., all)| level(all)))?;
            }
        }
        let raw: Vec<_> = columns.iter().filter(|(_, how, _)| matches!(*how, "raw" | "fitted")).collect();
        self.intervals(f, &raw)?;
        for (kind, _, measures) in raw {
            warnings(measures).iter().try_for_each(|warning| writeln!(f, "  {kind}: {warning}"))?;
        }
        if let Some(error) = self.ece_10_of_yes {
            writeln!(f, "  ECE of P(YES), 10 bins: {error:.3}")?;
        }
        if let Some(HleError { value, published }) = &self.hle_calibration_error {
            let percent = shown(*published, 0);
            writeln!(f, "  HLE calibration error, its last bin not scored: {} ({percent}%)", shown(*value, 3))?;
        }
        for (name, value, note) in self.grades.iter().flat_map(Grades::lines) {
            writeln!(f, "{}", format!("  {name:<21} {:>7}  {note}", shown(value, 3)).trim_end())?;
        }
        f.write_str(&breakdown(&self.grades_by_label))
    }
}

impl Calibration {
    fn intervals(&self, f: &mut impl Write, raw: &[&(&str, &str, &Measures)]) -> fmt::Result {
        let cells = |of: &dyn Fn(&Measures) -> Option<Estimate>| -> String {
            let cell = |estimate: Option<Estimate>| {
                let interval = estimate.and_then(|estimate| estimate.interval);
                interval.map_or("-".to_string(), |interval| format!("{:.3} to {:.3}", interval.low, interval.high))
            };
            raw.iter().map(|(.., all)| format!(" {:>18}", cell(of(all)))).collect()
        };
        if raw.is_empty() {
            return Ok(());
        }
        let heads: String = raw.iter().map(|(kind, ..)| format!(" {kind:>18}")).collect();
        writeln!(f, "  {:<21}{heads}", "95% intervals")?;
        writeln!(f, "  {:<21}{}", "parse rate", cells(&|all| Some(all.parse_rate)))?;
        METRICS
            .iter()
            .filter(|metric| metric.headline)
            .try_for_each(|metric| writeln!(f, "  {:<21}{}", metric.title, cells(&|all| all.get(metric.name))))
    }
}
