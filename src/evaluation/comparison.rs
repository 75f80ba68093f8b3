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
    /// Its name in [`METRICS`].
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

/// The differences of all [`METRICS`], in their order.
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
    let both = [before, after].map(Answers::predictions);
    let values = |counts: Option<&[u32]>| -> [[Option<f64>; METRIC_COUNT]; 2] {
        both.each_ref().map(|all| {
            let resampled = counts.map(|counts| all.as_ref()?.resampled(counts));
            let all = resampled.as_ref().unwrap_or(all).as_ref();
            METRICS.each_ref().map(|metric| all.filter(|_| metric.resampled || counts.is_none()).and_then(metric.of))
        })
    };
    let subtract = |[before, after]: [[Option<f64>; METRIC_COUNT]; 2]| -> [Option<f64>; METRIC_COUNT] {
        std::array::from_fn(|index| Some(after[index]? - before[index]?))
    };
    let intervals = resampling.intervals(before.questions().len(), |counts| subtract(values(Some(counts))));
    let points = values(None);
    let differences = subtract(points);
    let of = |(index, metric): (usize, &super::measures::Metric)| {
        let interval = intervals[index];
        let verdict = interval.map(|Interval { low, high, .. }| match (low > 0.0, high < 0.0) {
            (false, false) => Verdict::Unclear,
            (rose, _) if rose == metric.higher_is_better => Verdict::Improved,
            _ => Verdict::Worse,
        });
        let [before, after] = points.map(|values| values[index]);
        Difference { metric: metric.name, before, after, difference: differences[index], interval, verdict }
    };
    Ok(METRICS.iter().enumerate().map(of).collect())
}
