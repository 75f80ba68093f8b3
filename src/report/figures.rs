//! The figures over steps, and those of the first answers against the last.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Map, Value};

use super::chart::{Axis, Chart, Dot, Figure, Layer, Mark};
use super::read::RecordedRun;
use super::subject::{Subject, mean, parse_rate, predictions};
use crate::evaluation::binned::{equal_width, expected_calibration_error};
use crate::evaluation::{Predictions, accuracy, base_rate_brier, brier};
use crate::generations::Recorded;
use crate::metrics::METRICS;

/// Bins of the histograms of confidences.
const HISTOGRAM_BINS: usize = 20;

/// What is measured of the rollouts of one step.
type Measured = fn(&[&Recorded], Option<&Predictions>) -> Option<f64>;

/// A chart over steps.
struct Course {
    title: &'static str,
    /// The name of the y axis, with its unit.
    label: &'static str,
    of: Measured,
    /// What is drawn broken beside it, and its name.
    baseline: Option<(&'static str, Measured)>,
}

const BRIER: Course = Course {
    title: "Brier score (lower is better)",
    label: "mean (confidence − correct)²",
    of: |_, stated| stated.map(brier),
    baseline: Some(("always stating the accuracy", |_, stated| stated.map(base_rate_brier))),
};

const COURSES: [Course; 6] = [
    Course {
        title: "Reward",
        label: "mean reward per rollout",
        of: |all, _| mean(all.iter().filter_map(|rollout| rollout.reward)),
        baseline: None,
    },
    BRIER,
    Course {
        title: "Expected calibration error",
        label: "ECE, 10 bins of equal width",
        of: |_, stated| stated.map(|stated| expected_calibration_error(stated, 10)),
        baseline: None,
    },
    Course {
        title: "Accuracy",
        label: "share correct of parsed answers",
        of: |_, stated| stated.map(accuracy),
        baseline: None,
    },
    Course {
        title: "Length",
        label: "mean tokens per completion",
        of: |all, _| mean(all.iter().map(|rollout| rollout.tokens as f64)),
        baseline: None,
    },
    Course {
        title: "Parse rate",
        label: "share of rollouts that can be read",
        of: |all, _| parse_rate(all),
        baseline: None,
    },
];

/// Reward, Brier score, ECE, accuracy, length and parse rate over steps.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn over_steps(subjects: &[Subject]) -> Result<Figure> {
    let charts = COURSES.iter().map(|course| course.chart(subjects)).collect::<Result<Vec<_>>>()?;
    Ok(Figure {
        name: "over_steps",
        title: "Over the steps".into(),
        caption:
            "Lines are the rollouts of training, dots the held-out tasks. A gap is a step in which nothing could be \
                  measured: where no answer could be read there is no Brier score."
                .into(),
        charts: charts.into_iter().flatten().collect(),
    })
}

/// What is drawn of `metrics.jsonl`.
const LEARNER: [&str; 6] = ["loss", "grad_norm", "entropy", "mismatch/mean", "frac_reward_zero_std", "lr"];

/// What the learner said of itself, step by step; nothing where there is no `metrics.jsonl`.
pub fn learner(runs: &[RecordedRun]) -> Figure {
    let (mut charts, mut meanings) = (Vec::new(), Vec::new());
    for metric in METRICS.iter().filter(|metric| LEARNER.contains(&metric.name)) {
        let point =
            |row: &Map<String, Value>| Some((row.get("step")?.as_f64()?, Some(row.get(metric.name)?.as_f64()?)));
        let line = |(color, run): (usize, &RecordedRun)| Layer {
            name: (runs.len() > 1).then(|| run.name.clone()),
            ..Layer::line("", color, run.metrics.iter().filter_map(point).collect())
        };
        let layers: Vec<Layer> = runs.iter().enumerate().map(line).filter(|layer| !values(layer).is_empty()).collect();
        let Some(chart) = over(metric.name, metric.name, None, layers) else { continue };
        charts.push(chart);
        meanings.push(format!("{}: {}.", metric.name, metric.meaning));
    }
    Figure { name: "learner", title: "The learner".into(), caption: meanings.join(" "), charts }
}

/// A chart over steps; `None` where there is nothing to draw.
fn over(title: &str, label: &str, range: Option<(f64, f64)>, layers: Vec<Layer>) -> Option<Chart> {
    let all = || layers.iter().flat_map(values);
    let around = Axis::around(label, all().map(|(_, y)| y))?;
    let y = Axis { range: range.unwrap_or(around.range), ..around };
    let last = all().map(|(x, _)| x).fold(1.0, f64::max);
    let x = Axis { label: "optimizer steps done".into(), range: (0.0, last), whole: true, names: &[] };
    Some(Chart { title: title.into(), x, y, layers, strip: Vec::new() })
}

/// The Brier score over steps, alone.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn brier_over_time(subjects: &[Subject]) -> Result<Figure> {
    Ok(Figure {
        name: "brier_over_time",
        title: "Brier score over time".into(),
        caption: "Of the answers whose confidence could be read.".into(),
        charts: BRIER.chart(subjects)?.into_iter().collect(),
    })
}

impl Course {
    /// `None` where there is nothing to draw.
    fn chart(&self, subjects: &[Subject]) -> Result<Option<Chart>> {
        let mut layers = Vec::new();
        for (color, subject) in subjects.iter().enumerate() {
            let single = subjects.len() == 1;
            let name = |what: &str| if single { what.to_string() } else { subject.title.clone() };
            if let Some((title, of)) = self.baseline.filter(|_| single) {
                let points = course(&subject.training, of)?;
                let mark = Mark::Line { points, dashed: true };
                layers.push(Layer { name: Some(title.into()), color: None, mark });
            }
            layers.push(Layer::line(name("training"), color, course(&subject.training, self.of)?));
            let held_out = course(&subject.evaluations, self.of)?;
            let dots = held_out.into_iter().filter_map(|(x, y)| Some(Dot { at: (x, y?), radius: 4.0, interval: None }));
            let (name, color) = if single { (Some("held out".into()), 1) } else { (None, color) };
            layers.push(Layer { name, color: Some(color), mark: Mark::Dots(dots.collect()) });
        }
        layers.retain(|layer| !values(layer).is_empty());
        Ok(over(self.title, self.label, self.label.starts_with("share").then_some((0.0, 1.0)), layers))
    }
}

/// A number over steps, missing where it is not defined or a step has no rollouts.
fn course(steps: &BTreeMap<u64, Vec<&Recorded>>, of: Measured) -> Result<Vec<(f64, Option<f64>)>> {
    let mut points: Vec<(f64, Option<f64>)> = Vec::new();
    for (&step, rollouts) in steps {
        let x = step as f64;
        if points.last().is_some_and(|(before, _)| *before + 1.0 < x) {
            points.push((x - 0.5, None));
        }
        points.push((x, of(rollouts, predictions(rollouts)?.as_ref())));
    }
    Ok(points)
}

/// The points of a layer that are drawn.
fn values(layer: &Layer) -> Vec<(f64, f64)> {
    match &layer.mark {
        Mark::Line { points, .. } => points.iter().filter_map(|&(x, y)| Some((x, y?))).collect(),
        Mark::Dots(dots) => dots.iter().map(|dot| dot.at).collect(),
        Mark::Band(_) | Mark::Bars(_) | Mark::Spans(_) => Vec::new(),
    }
}

/// How confidences are distributed, first and last, by whether the answer is right.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn confidence_histogram(subjects: &[Subject]) -> Result<Figure> {
    let mut charts = Vec::new();
    for subject in subjects {
        for part in subject.ends() {
            let Some(stated) = predictions(&part.rollouts)? else { continue };
            let (width, total) = (1.0 / HISTOGRAM_BINS as f64, stated.len() as f64);
            let bins = equal_width(&stated, HISTOGRAM_BINS);
            let bars = |from: f64, count: fn(f64, f64) -> f64| {
                let bar = |(index, (all, right)): (usize, (f64, f64))| {
                    let left = (index as f64 + from) * width;
                    (left, left + width * 0.45, count(all, right) / total)
                };
                let counts = bins.iter().map(|bin| (bin.count, bin.correct)).enumerate();
                Mark::Bars(counts.map(bar).filter(|bar| bar.2 > 0.0).collect())
            };
            let (right, wrong) = (bars(0.05, |_, right| right), bars(0.5, |all, right| all - right));
            let highest = [&right, &wrong].into_iter().flat_map(|mark| match mark {
                Mark::Bars(bars) => bars.as_slice(),
                _ => &[],
            });
            let highest = highest.map(|bar| bar.2).fold(0.0, f64::max);
            let layers = [("right", 0, right), ("wrong", 1, wrong)];
            let title = format!("{} (n = {})", titled(subjects, subject, &part.title), thousands(stated.len()));
            charts.push(Chart {
                title,
                x: Axis::share("stated confidence"),
                y: Axis {
                    label: "share of parsed answers".into(),
                    range: (0.0, highest * 1.05),
                    whole: false,
                    names: &[],
                },
                layers: layers
                    .map(|(name, color, mark)| Layer { name: Some(name.into()), ..Layer::of(color, mark) })
                    .into(),
                strip: Vec::new(),
            });
        }
    }
    Ok(Figure {
        name: "confidence_histogram",
        title: "Confidences, first and last".into(),
        caption: "How often each confidence is stated, by whether the answer is right.".into(),
        charts,
    })
}

/// A part's title, after its subject's where there are several.
pub fn titled(subjects: &[Subject], subject: &Subject, part: &str) -> String {
    if subjects.len() > 1 { format!("{}: {part}", subject.title) } else { part.to_string() }
}

/// A count with commas: 51,200.
pub fn thousands(count: usize) -> String {
    let digits = count.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",")
}
