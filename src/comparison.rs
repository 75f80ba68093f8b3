//! `candor compare`: two evaluations of the same tasks, side by side, with what the first one is worth after a post-hoc map: training has
//! to beat that too.

use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::calibration::{answers, by_environment};
use crate::calibration_map::Confidence;
use crate::evaluation::answers::Answers;
use crate::evaluation::bootstrap::{Interval, Resampling};
use crate::evaluation::comparison::{Difference, Verdict, compare};
use crate::evaluation::measures::METRICS;
use crate::evaluation::posthoc::{Kind, cross_fitted};
use crate::record::shown;
use crate::run::Row;

/// The second evaluation of an environment against the first.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The environment's name.
    pub environment: String,
    /// Tasks of both.
    pub tasks: usize,
    /// The share of answers with a confidence, before and after.
    pub parse_rates: [f64; 2],
    /// Against the first as it is.
    pub raw: Vec<Difference>,
    /// Against the first through a cross-fitted Platt map; `None` where none could be fitted.
    pub platt: Option<Vec<Difference>>,
    /// Against the first through a cross-fitted isotonic map.
    pub isotonic: Option<Vec<Difference>>,
}

/// Compares one kind of confidence in the rows of two evaluations, environment by environment.
///
/// # Errors
/// If the environments or their tasks are not the same, with counts; if a confidence is not in [0, 1], or none is there.
pub fn comparisons(before: &[Row], after: &[Row], of: Confidence, resampling: Resampling) -> Result<Vec<Comparison>> {
    let [before, after] = [before, after].map(by_environment);
    let names = |all: &std::collections::BTreeMap<&str, Vec<&Row>>| all.keys().copied().collect::<Vec<_>>().join(", ");
    ensure!(
        before.keys().eq(after.keys()),
        "not the same environments: the first has {}, the second has {}",
        names(&before),
        names(&after)
    );
    let mut comparisons = Vec::new();
    for ((environment, before), after) in before.iter().zip(after.values()) {
        let read = |rows: &Vec<&Row>| answers(rows, of)?.context("there is no answer whose correctness is known");
        let compared = || -> Result<Comparison> {
            let (before, after) = (read(before)?, read(after)?);
            let against =
                |kind| cross_fitted(&before, kind).map(|fitted| compare(&fitted, &after, resampling)).transpose();
            Ok(Comparison {
                environment: environment.to_string(),
                tasks: before.questions().len(),
                parse_rates: [&before, &after].map(parse_rate),
                raw: compare(&before, &after, resampling)?,
                platt: against(Kind::Platt)?,
                isotonic: against(Kind::Isotonic)?,
            })
        };
        comparisons.push(compared().with_context(|| environment.to_string())?);
    }
    Ok(comparisons)
}

fn parse_rate(answers: &Answers) -> f64 {
    let rows = answers.rows();
    rows.iter().filter(|answer| answer.confidence.is_some()).count() as f64 / rows.len() as f64
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { environment, tasks, parse_rates: [before, after], .. } = self;
        writeln!(f, "{environment}: the same {tasks} tasks; parse rate {before:.3} before, {after:.3} after")?;
        let tables = [("", Some(&self.raw)), ("+Platt", self.platt.as_ref()), ("+isotonic", self.isotonic.as_ref())];
        for (how, differences) in tables {
            let Some(differences) = differences else {
                writeln!(f, "  before {how}: too few answers to fit a map, or all are right or wrong")?;
                continue;
            };
            let head = format!("before{how}");
            writeln!(f, "  {:<21} {head:>16} {:>8} {:>11}  95% interval", "", "after", "difference")?;
            for (metric, one) in METRICS.iter().zip(differences) {
                let interval =
                    one.interval.map_or("-".into(), |Interval { low, high, .. }| format!("{low:+.3} to {high:+.3}"));
                let verdict = match one.verdict {
                    Some(Verdict::Improved) => "improved",
                    Some(Verdict::Worse) => "worse",
                    Some(Verdict::Unclear) | None => "",
                };
                let [before, after] = [one.before, one.after].map(|value| shown(value, 3));
                let difference = one.difference.map_or("-".into(), |value| format!("{value:+.3}"));
                let line =
                    format!("  {:<21} {before:>16} {after:>8} {difference:>11}  {interval} {verdict}", metric.title);
                writeln!(f, "{}", line.trim_end())?;
            }
        }
        Ok(())
    }
}
