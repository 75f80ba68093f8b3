//! Two sets of answers to the same questions: what differs, and whether it is more than chance. Questions are resampled for both at once.

use anyhow::{Result, ensure};
use serde::Serialize;

use super::answers::Answers;
use super::bootstrap::{Interval, Resampling};
use super::measures::{METRIC_COUNT, METRICS};

/// What a difference shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Better, and the interval excludes 0.
    Improved,
    /// Worse, and the interval excludes 0.
    Worse,
    /// The interval holds 0.
    Unclear,
}

/// One metric of both.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// `parse_rate`, or its name in [`METRICS`].
    pub metric: &'static str,
    /// Of the first answers.
    pub before: Option<f64>,
    /// Of the second.
    pub after: Option<f64>,
    /// After minus before.
    pub difference: Option<f64>,
    /// Its 95% interval; `None` where the metric is not resampled, or a resample defines it for both nowhere.
    pub interval: Option<Interval>,
    /// What that shows; `None` without an interval.
    pub verdict: Option<Verdict>,
}

/// The parse rate, then all [`METRICS`].
const COUNT: usize = METRIC_COUNT + 1;

/// The differences of the parse rate and of all [`METRICS`], in their order.
///
/// # Errors
/// If the questions are not the same, with how many each lacks; they must be numbered alike.
pub fn compare(before: &Answers, after: &Answers, resampling: Resampling) -> Result<Vec<Difference>> {
    let lacks = |one: &Answers, other: &Answers| {
        let known: std::collections::HashSet<&String> = one.questions().iter().collect();
        other.questions().iter().filter(|question| !known.contains(question)).count()
    };
    let (first, second) = (lacks(before, after), lacks(after, before));
    let counts = (before.questions().len(), after.questions().len());
    ensure!(
        first == 0 && second == 0,
        "not the same questions: the first has {}, of which the second lacks {second}; the second has {}, of which the first \
         lacks {first}",
        counts.0,
        counts.1
    );
    ensure!(before.questions() == after.questions(), "the questions are the same but not in the same order");
    let both = [before, after].map(|answers| (answers, answers.predictions()));
    let once = vec![1; before.questions().len()];
    let values = |counts: &[u32], is_resample: bool| -> [[Option<f64>; COUNT]; 2] {
        both.each_ref().map(|(answers, predictions)| {
            let predictions = predictions.as_ref().and_then(|all| all.resampled(counts));
            let value = |metric: &super::measures::Metric| {
                predictions.as_ref().filter(|_| metric.resampled || !is_resample).and_then(metric.of)
            };
            let mut values = [answers.parse_rate(counts); COUNT];
            METRICS.iter().zip(&mut values[1..]).for_each(|(metric, into)| *into = value(metric));
            values
        })
    };
    let subtract = |[before, after]: [[Option<f64>; COUNT]; 2]| -> [Option<f64>; COUNT] {
        std::array::from_fn(|index| Some(after[index]? - before[index]?))
    };
    let intervals = resampling.intervals(before.questions().len(), |counts| subtract(values(counts, true)));
    let points = values(&once, false);
    let differences = subtract(points);
    let names = [("parse_rate", true)].into_iter().chain(METRICS.iter().map(|one| (one.name, one.higher_is_better)));
    let of = |(index, (metric, higher_is_better)): (usize, (&'static str, bool))| {
        let interval = intervals[index];
        let verdict = interval.map(|Interval { low, high, .. }| match (low > 0.0, high < 0.0) {
            (false, false) => Verdict::Unclear,
            (rose, _) if rose == higher_is_better => Verdict::Improved,
            _ => Verdict::Worse,
        });
        let [before, after] = points.map(|values| values[index]);
        Difference { metric, before, after, difference: differences[index], interval, verdict }
    };
    Ok(names.enumerate().map(of).collect())
}
