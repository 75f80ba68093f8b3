//! Everything that is printed of a set of answers, with 95% intervals: proper scores and discrimination first, because a constant at the
//! base rate has no calibration error.

use serde::{Serialize, Serializer};

use super::answers::{Answer, Answers};
use super::binned::{
    Norm, NullLevel, adaptive_calibration_error, calibration_error, default_beta, expected_calibration_error,
    null_level,
};
use super::bootstrap::{Interval, Resampling};
use super::collapse::{Collapse, collapse};
use super::decomposition::corp;
use super::selective::{accuracy_at_coverage, aurc, auroc};
use super::smooth::smooth_ece;
use super::{Predictions, accuracy, brier, brier_skill, negative_log_likelihood};

/// What confidences of 0 and 1 are moved by before their logarithm is taken.
pub const NLL_EPSILON: f64 = 1e-3;

/// One number of a set of predictions.
pub struct Metric {
    /// Its name in files.
    pub name: &'static str,
    /// Its name in tables.
    pub title: &'static str,
    /// What to know when reading it.
    pub note: &'static str,
    /// Whether more is better.
    pub higher_is_better: bool,
    /// Whether it is among the first things to look at.
    pub headline: bool,
    /// Whether it has an interval: all but what would take minutes.
    pub resampled: bool,
    /// Computes it; `None` where it is not defined.
    pub of: fn(&Predictions) -> Option<f64>,
}

/// The columns of the table below that few rows change.
const HEADLINE: Metric =
    Metric { name: "", title: "", note: "", higher_is_better: true, headline: true, resampled: true, of: |_| None };
const ERROR: Metric = Metric { higher_is_better: false, headline: false, ..HEADLINE };

/// How many there are.
pub const METRIC_COUNT: usize = 14;

/// Everything that is computed of predictions, in the order it is printed in.
pub const METRICS: [Metric; METRIC_COUNT] = [
    Metric { name: "accuracy", title: "accuracy", note: "of parsed answers", of: |p| Some(accuracy(p)), ..HEADLINE },
    Metric {
        name: "brier",
        title: "Brier score",
        note: "lower is better",
        higher_is_better: false,
        of: |p| Some(brier(p)),
        ..HEADLINE
    },
    Metric {
        name: "brier_skill",
        title: "Brier skill",
        note: "above 0 beats the constant accuracy",
        of: brier_skill,
        ..HEADLINE
    },
    Metric { name: "auroc", title: "AUROC", note: "0.5 is chance", of: auroc, ..HEADLINE },
    Metric {
        name: "miscalibration",
        title: "CORP miscalibration",
        note: "lower is better",
        higher_is_better: false,
        of: |p| Some(corp(p).miscalibration),
        ..HEADLINE
    },
    Metric {
        name: "discrimination",
        title: "CORP discrimination",
        note: "higher is better",
        of: |p| Some(corp(p).discrimination),
        ..HEADLINE
    },
    Metric {
        name: "rms_calibration_error",
        title: "RMS calibration err.",
        note: "0 for a constant at the base rate, as all below",
        of: |p| Some(calibration_error(p, Norm::L2, default_beta(p.len()))),
        ..ERROR
    },
    Metric { name: "ece_10", title: "ECE, 10 bins", of: |p| Some(expected_calibration_error(p, 10)), ..ERROR },
    Metric { name: "smooth_ece", title: "smooth ECE", resampled: false, of: |p| Some(smooth_ece(p)), ..ERROR },
    Metric { name: "ace_15", title: "ACE, 15 bins", of: |p| Some(adaptive_calibration_error(p, 15)), ..ERROR },
    Metric {
        name: "nll",
        title: "negative log-lik.",
        note: "confidences clipped to [0.001, 0.999]",
        of: |p| Some(negative_log_likelihood(p, NLL_EPSILON)),
        ..ERROR
    },
    Metric { name: "aurc", title: "AURC", note: "area under risk-coverage", of: |p| Some(aurc(p)), ..ERROR },
    Metric {
        name: "accuracy_at_coverage_50",
        title: "accuracy, surest 50%",
        of: |p| Some(accuracy_at_coverage(p, 0.5)),
        headline: false,
        ..HEADLINE
    },
    Metric {
        name: "accuracy_at_coverage_80",
        title: "accuracy, surest 80%",
        of: |p| Some(accuracy_at_coverage(p, 0.8)),
        headline: false,
        ..HEADLINE
    },
];

/// All metrics of some predictions, in the order of [`METRICS`]; of those that are not resampled none where `resampled` is set.
fn all(predictions: Option<&Predictions>, resampled: bool) -> [Option<f64>; METRIC_COUNT] {
    METRICS.each_ref().map(|metric| {
        let predictions = predictions.filter(|_| metric.resampled || !resampled)?;
        (metric.of)(predictions)
    })
}

/// A number and its 95% interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The number; `None` where it is not defined.
    pub value: Option<f64>,
    /// Its interval, where one was made.
    #[serde(flatten)]
    pub interval: Option<Interval>,
}

/// One estimate of every metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimates(pub [Estimate; METRIC_COUNT]);

impl Serialize for Estimates {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(METRICS.iter().map(|metric| metric.name).zip(&self.0))
    }
}

/// Everything that is printed of a set of answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measures {
    /// Questions that were asked.
    pub questions: usize,
    /// Answers to them.
    pub answers: usize,
    /// Answers that state a confidence; all but the next line is of them.
    pub parsed: usize,
    /// Their share.
    pub parse_rate: Estimate,
    /// The [`METRICS`] by name.
    #[serde(flatten)]
    pub estimates: Estimates,
    /// ECE over 10 bins if every confidence were right.
    pub ece_10_null: Option<NullLevel>,
    /// How the confidences are spread.
    pub collapse: Option<Collapse>,
    /// Whether the confidences may tell nothing: the AUROC's interval holds 0.5, or the Brier skill is not above 0.
    pub uninformative: Option<bool>,
    /// Predictions per bin of the RMS calibration error.
    pub beta: usize,
    /// See [`NLL_EPSILON`].
    pub nll_epsilon: f64,
    /// How the intervals were made.
    pub bootstrap: Resampling,
}

impl Measures {
    /// Measures a set of answers; questions are resampled.
    pub fn of(answers: &Answers, bootstrap: Resampling) -> Self {
        let (questions, predictions) = (answers.questions().len(), answers.predictions());
        let mut by_question = vec![[0_u64; 2]; questions];
        for Answer { question, confidence, .. } in answers.rows() {
            let [asked, parsed] = &mut by_question[*question as usize];
            (*asked, *parsed) = (*asked + 1, *parsed + u64::from(confidence.is_some()));
        }
        let share = |counts: &[u32]| {
            let count = |which: usize| -> u64 {
                by_question.iter().zip(counts).map(|(all, &n)| all[which] * u64::from(n)).sum()
            };
            Some(count(1) as f64 / count(0) as f64)
        };
        let resampled = |counts: &[u32]| {
            let predictions = predictions.as_ref().and_then(|predictions| predictions.resampled(counts));
            all(predictions.as_ref(), true)
        };
        let [parse_interval] = bootstrap.intervals(questions, |counts| [share(counts)]);
        let intervals = bootstrap.intervals(questions, resampled);
        let values = all(predictions.as_ref(), false);
        let estimates =
            Estimates(std::array::from_fn(|index| Estimate { value: values[index], interval: intervals[index] }));
        let parsed = predictions.as_ref().map_or(0, Predictions::len);
        let mut measures = Self {
            questions,
            answers: answers.rows().len(),
            parsed,
            parse_rate: Estimate { value: share(&vec![1; questions]), interval: parse_interval },
            estimates,
            ece_10_null: predictions
                .as_ref()
                .map(|all| null_level(all, bootstrap.seed, |p| expected_calibration_error(p, 10))),
            collapse: predictions.as_ref().map(collapse),
            uninformative: None,
            beta: default_beta(parsed),
            nll_epsilon: NLL_EPSILON,
            bootstrap,
        };
        measures.uninformative = measures.says_nothing();
        measures
    }

    /// The estimate of a metric by its name; `None` where no metric has it.
    pub fn get(&self, name: &str) -> Option<Estimate> {
        let index = METRICS.iter().position(|metric| metric.name == name)?;
        Some(self.estimates.0[index])
    }

    fn says_nothing(&self) -> Option<bool> {
        let (auroc, skill) = (self.get("auroc")?.interval?, self.get("brier_skill")?.value?);
        Some((auroc.low <= 0.5 && 0.5 <= auroc.high) || skill <= 0.0)
    }
}
