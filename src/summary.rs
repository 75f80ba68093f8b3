//! What a run amounts to: held-out tasks before and after, speed and memory.
//!
//! It is computed from the run folder, so it says the same of a run that was stopped and resumed; only the name of what computed is
//! not there.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::Result;
use candor_environments::rows::all_rows;
use serde::Serialize;
use serde_json::Value;

use crate::calibration::{answers, by_environment};
use crate::calibration_map::Confidence;
use crate::evaluation::answers::Answers;
use crate::evaluation::bootstrap::{Interval, paired_bootstrap};
use crate::evaluation::posthoc::{Kind, cross_fitted};
use crate::evaluation::selective::auroc;
use crate::evaluation::{Predictions, accuracy, base_rate_brier, brier, brier_skill};
use crate::grades::{Grades, breakdown};
use crate::record::{GIB, peak_memory, shown};
use crate::run::{GENERATIONS, METRICS, Row, RowSplit};

/// Seed of the bootstrap.
const BOOTSTRAP_SEED: u64 = 0;

/// One evaluation of one environment. Confidence metrics are over parsed rows only; `None` where they are not defined.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluated {
    /// Tasks, and how many were scored and could be read.
    pub tasks: usize,
    /// Rows with a score.
    pub scored: usize,
    /// Rows with a confidence.
    pub parsed: usize,
    /// The reward's outcome part over all scored rows: no length term.
    pub reward: Option<f64>,
    /// Share of parsed rows that are right.
    pub accuracy: Option<f64>,
    /// Mean (confidence − correct)².
    pub brier: Option<f64>,
    /// 1 − Brier / the Brier score of always stating the accuracy (SCIENCE 1.3).
    pub brier_skill: Option<f64>,
    /// The Brier score of always stating the accuracy, on the same rows.
    pub constant_accuracy_brier: Option<f64>,
    /// The Brier score of always stating the base rate of YES, on the same rows; only where the environment tells `y`.
    pub constant_base_rate_brier: Option<f64>,
    /// The Brier score of the same confidences through a Platt map that was fitted on other questions.
    pub platt_brier: Option<f64>,
    /// The same through an isotonic map.
    pub isotonic_brier: Option<f64>,
    /// Chance that a right answer has the higher confidence.
    pub auroc: Option<f64>,
    /// What the judge said of all rows; only where one was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grades: Option<Grades>,
    /// The same by label, as `topic: History`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub grades_by_label: BTreeMap<String, Grades>,
    /// Outcome by task, for pairing.
    #[serde(skip)]
    outcomes: BTreeMap<String, f64>,
}

impl Evaluated {
    /// One per environment of the rows of one evaluation.
    ///
    /// # Errors
    /// If a confidence is not in [0, 1].
    pub fn by_environment(rows: &[&Row]) -> Result<BTreeMap<String, Self>> {
        by_environment(rows.iter().copied())
            .into_iter()
            .map(|(name, rows)| Ok((name.to_string(), Self::of(&rows)?)))
            .collect()
    }

    /// Of the rows of one evaluation together.
    ///
    /// # Errors
    /// As [`by_environment`](Self::by_environment).
    pub fn of(rows: &[&Row]) -> Result<Self> {
        let outcome = |row: &Row| Some((row.task.clone(), row.outcome()?));
        let outcomes: BTreeMap<String, f64> = rows.iter().filter_map(|row| outcome(row)).collect();
        let stated = answers(rows, Confidence::Stated)?;
        let predictions = stated.as_ref().and_then(Answers::predictions);
        let mapped = |kind| {
            let answers = cross_fitted(stated.as_ref()?, kind)?;
            answers.predictions().as_ref().map(brier)
        };
        let parsed = predictions.as_ref().map_or(0, Predictions::len);
        let gold: Vec<f64> = rows.iter().filter_map(|row| row.metric("y")).collect();
        let base_rate = gold.iter().sum::<f64>() / gold.len() as f64;
        let (grades, grades_by_label) = Grades::of(rows).map_or((None, BTreeMap::new()), |(all, by)| (Some(all), by));
        let some = |f: fn(&Predictions) -> f64| predictions.as_ref().map(f);
        Ok(Self {
            tasks: rows.len(),
            scored: outcomes.len(),
            parsed,
            reward: (!outcomes.is_empty()).then(|| outcomes.values().sum::<f64>() / outcomes.len() as f64),
            accuracy: some(accuracy),
            brier: some(brier),
            brier_skill: predictions.as_ref().and_then(brier_skill),
            constant_accuracy_brier: some(base_rate_brier),
            constant_base_rate_brier: (!gold.is_empty() && gold.len() == parsed)
                .then_some(base_rate * (1.0 - base_rate)),
            platt_brier: mapped(Kind::Platt),
            isotonic_brier: mapped(Kind::Isotonic),
            auroc: predictions.as_ref().and_then(auroc),
            grades,
            grades_by_label,
            outcomes,
        })
    }
}

/// Before and after training on one environment.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The environment's name.
    pub environment: String,
    /// Before the first step.
    pub before: Evaluated,
    /// After the last.
    pub after: Evaluated,
    /// After minus before of the mean outcome over the tasks that both scored, and its 95% interval.
    pub difference: Option<(f64, f64, f64)>,
}

/// What a finished run amounts to.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// What computed at the end: a GPU, or this processor.
    pub device: String,
    /// One per environment that was evaluated twice.
    pub comparisons: Vec<Comparison>,
    /// Training steps recorded.
    pub steps: usize,
    /// Median seconds per step.
    pub seconds_per_step: Option<f64>,
    /// Completion tokens, sampled and trained on, per second of all steps.
    pub tokens_per_second: Option<f64>,
    /// Largest resident size, in bytes.
    pub peak_memory_bytes: Option<u64>,
}

impl Summary {
    /// Reads the folder of a run that was computed on `device`.
    ///
    /// # Errors
    /// If a file is missing or a row damaged.
    pub fn of(run: &Path, device: String) -> Result<Self> {
        let rows: Vec<Row> = all_rows(&run.join(GENERATIONS))?;
        let mut metrics: Vec<Value> = all_rows(&run.join(METRICS))?;
        metrics.retain(|row| row["split"] == "train");
        let mut seconds: Vec<f64> = metrics.iter().filter_map(|row| row["time/step"].as_f64()).collect();
        seconds.sort_by(f64::total_cmp);
        let total: f64 = seconds.iter().sum();
        let tokens: f64 = metrics.iter().filter_map(|row| row["tokens/completion"].as_f64()).sum();
        let peaks = metrics.iter().filter_map(|row| Some((row["perf/peak_gib"].as_f64()? * GIB) as u64));
        Ok(Self {
            device,
            comparisons: compare(&rows)?,
            steps: metrics.len(),
            seconds_per_step: seconds.get(seconds.len() / 2).copied(),
            tokens_per_second: (total > 0.0).then(|| tokens / total),
            peak_memory_bytes: peaks.max().max(peak_memory()),
        })
    }
}

/// The first evaluation against the last, where there are two.
fn compare(rows: &[Row]) -> Result<Vec<Comparison>> {
    let evaluated = || rows.iter().filter(|row| row.split == RowSplit::Eval);
    let (first, last) = (evaluated().map(|row| row.step).min(), evaluated().map(|row| row.step).max());
    if first == last {
        return Ok(Vec::new());
    }
    let at = |step| Evaluated::by_environment(&evaluated().filter(|row| Some(row.step) == step).collect::<Vec<_>>());
    let mut befores = at(first)?;
    let mut comparisons = Vec::new();
    for (environment, after) in at(last)? {
        let Some(before) = befores.remove(&environment) else { continue };
        let pairs = before.outcomes.iter().filter_map(|(task, before)| Some((*before, *after.outcomes.get(task)?)));
        let (was, is): (Vec<f64>, Vec<f64>) = pairs.unzip();
        let difference = (!was.is_empty()).then(|| paired_bootstrap(&was, &is, BOOTSTRAP_SEED)).transpose()?;
        let mean = is.iter().zip(&was).map(|(is, was)| is - was).sum::<f64>() / was.len() as f64;
        let difference = difference.map(|Interval { low, high, .. }| (mean, low, high));
        comparisons.push(Comparison { environment, before, after, difference });
    }
    Ok(comparisons)
}

/// The lines of a table of evaluations, one column each; `note` follows the mean reward.
fn table(f: &mut impl fmt::Write, columns: &[(&str, &Evaluated)], note: &str) -> fmt::Result {
    type Cell = fn(&Evaluated) -> String;
    let lines: [(&str, Cell, &str); 11] = [
        ("parse rate", |e| shown(Some(e.parsed as f64 / e.tasks as f64), 3), ""),
        ("mean reward, all rows", |e| shown(e.reward, 3), note),
        ("parsed rows", |e| e.parsed.to_string(), "the rows below are over these"),
        ("accuracy", |e| shown(e.accuracy, 3), ""),
        ("Brier score", |e| shown(e.brier, 3), "lower is better"),
        ("  constant base rate", |e| shown(e.constant_base_rate_brier, 3), "always stating the share of YES"),
        ("  constant accuracy", |e| shown(e.constant_accuracy_brier, 3), "always stating the accuracy"),
        ("  through Platt", |e| shown(e.platt_brier, 3), "fitted on other questions"),
        ("  through isotonic", |e| shown(e.isotonic_brier, 3), "the same; training has to beat these"),
        ("Brier skill", |e| shown(e.brier_skill, 3), "above 0 beats the constant accuracy"),
        ("AUROC", |e| shown(e.auroc, 3), "0.5 is chance"),
    ];
    let mut line = |name: &str, cells: Vec<String>, note: &str| {
        let cells: String = cells.iter().map(|cell| format!(" {cell:>8}")).collect();
        writeln!(f, "{}", format!("  {name:<22}{cells}  {note}").trim_end())
    };
    line("", columns.iter().map(|(head, _)| head.to_string()).collect(), "")?;
    lines.into_iter().try_for_each(|(name, cell, note)| {
        line(name, columns.iter().map(|(_, evaluated)| cell(evaluated)).collect(), note)
    })?;
    let graded: Vec<_> = columns.iter().filter_map(|(_, evaluated)| Some(evaluated.grades?.lines())).collect();
    // Both columns are of the same environment: either all of them are graded or none.
    for (index, (name, _, note)) in graded.first().into_iter().flatten().enumerate() {
        line(name, graded.iter().map(|lines| shown(lines[index].1, 3)).collect(), note)?;
    }
    Ok(())
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for Comparison { environment, before, after, difference } in &self.comparisons {
            let (tasks, steps) = (after.tasks, self.steps);
            writeln!(f, "{environment}: {tasks} held-out tasks, the same before and after {steps} steps")?;
            let interval =
                difference.map_or("-".into(), |(mean, low, high)| format!("{mean:+.3} (95%: {low:+.3} to {high:+.3})"));
            table(f, &[("before", before), ("after", after)], &interval)?;
            f.write_str(&breakdown(&after.grades_by_label))?;
        }
        let gigabytes = self.peak_memory_bytes.map(|bytes| bytes as f64 / 1e9);
        write!(
            f,
            "{} s per step (median), {} completion tokens/s, peak memory {} GB",
            shown(self.seconds_per_step, 1),
            shown(self.tokens_per_second, 1),
            shown(gigabytes, 2)
        )
    }
}
