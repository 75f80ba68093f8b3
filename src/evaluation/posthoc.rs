//! Maps from stated confidences to calibrated ones, fitted on answers whose correctness is known: what a trained model has to beat.
//!
//! Cross-fitting gives every answer a confidence from a map that was fitted on other questions.

use serde::{Deserialize, Serialize};

use super::Predictions;
use super::answers::Answers;
use super::binned::equal_width;
use super::decomposition::isotonic_fit;
use super::logistic::{Observation, logistic, sigmoid};
use crate::random::SplitMix64;

/// What a confidence is clipped to, [ε, 1 − ε], before its logarithm is taken.
pub const EPSILON: f64 = 1e-4;

/// How much a slope is pulled toward 1 where the data alone do not determine it.
const RIDGE: f64 = 1e-3;

/// Bins of a histogram map.
pub const BINS: usize = 10;

/// The parts that questions are divided into for cross-fitting, and the seed of the division.
pub const FOLDS: usize = 5;
/// See [`FOLDS`].
pub const FOLD_SEED: u64 = 42;

/// What can be fitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// σ(l/T), with l the log-odds of the confidence (Guo et al. 2017).
    Temperature,
    /// σ(al + b) (Platt 1999).
    Platt,
    /// The same, with Platt's targets (n₁ + 1)/(n₁ + 2) and 1/(n₀ + 2) in place of 1 and 0.
    PlattSmoothed,
    /// The isotonic fit, linear between its steps (Zadrozny and Elkan 2002).
    Isotonic,
    /// The isotonic fit as a step function.
    IsotonicStep,
    /// σ(a ln c − b ln(1 − c) + m), a and b not below 0 (Kull et al. 2017).
    Beta,
    /// The accuracy of each tenth of [0, 1]; of an empty one its middle.
    Histogram,
    /// The same with one more answer in each tenth, at its middle.
    HistogramPrior,
}

impl Kind {
    /// All of them with their names.
    pub const ALL: [(&'static str, Self); 8] = [
        ("temperature", Self::Temperature),
        ("platt", Self::Platt),
        ("platt_smoothed", Self::PlattSmoothed),
        ("isotonic", Self::Isotonic),
        ("isotonic_step", Self::IsotonicStep),
        ("beta", Self::Beta),
        ("histogram", Self::Histogram),
        ("histogram_prior", Self::HistogramPrior),
    ];
}

/// A fitted map.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Map {
    /// σ(l/T).
    Temperature {
        /// T.
        temperature: f64,
    },
    /// σ(al + b).
    Platt {
        /// Slope.
        a: f64,
        /// Intercept.
        b: f64,
    },
    /// Piecewise, constant outside.
    Isotonic {
        /// Confidences, ascending.
        x: Vec<f64>,
        /// What each becomes, ascending.
        y: Vec<f64>,
        /// Constant from each x to the next one, rather than linear between them.
        step: bool,
    },
    /// σ(a ln c − b ln(1 − c) + m).
    Beta {
        /// At least 0.
        a: f64,
        /// At least 0.
        b: f64,
        /// Intercept.
        m: f64,
    },
    /// By bin of equal width.
    Histogram {
        /// What the confidences of each bin become.
        values: Vec<f64>,
    },
}

impl Map {
    /// Fits a map; `None` where the answers do not determine one: all are correct, or none is.
    pub fn fit(kind: Kind, predictions: &Predictions) -> Option<Self> {
        match kind {
            Kind::Temperature => Some(Self::Temperature { temperature: temperature(predictions) }),
            Kind::Platt => platt(predictions, [1.0, 0.0]),
            Kind::PlattSmoothed => {
                let right: f64 = predictions.atoms().iter().map(|atom| atom.correct).sum();
                let wrong = predictions.len() as f64 - right;
                platt(predictions, [(right + 1.0) / (right + 2.0), 1.0 / (wrong + 2.0)])
            }
            Kind::Isotonic => Some(isotonic(predictions, false)),
            Kind::IsotonicStep => Some(isotonic(predictions, true)),
            Kind::Beta => beta(predictions),
            Kind::Histogram => Some(histogram(predictions, 0.0)),
            Kind::HistogramPrior => Some(histogram(predictions, 1.0)),
        }
    }

    /// The calibrated confidence, in [0, 1], of one in [0, 1].
    pub fn apply(&self, confidence: f64) -> f64 {
        match self {
            Self::Temperature { temperature } => sigmoid(log_odds(confidence) / temperature),
            Self::Platt { a, b } => sigmoid(a * log_odds(confidence) + b),
            Self::Isotonic { x, y, step } => {
                // How many of them are not above it.
                let passed = x.partition_point(|x| *x <= confidence);
                match (passed.checked_sub(1), y.get(passed)) {
                    (None, _) => y[0],
                    (Some(last), None) => y[last],
                    (Some(below), Some(_)) if *step => y[below],
                    (Some(below), Some(above)) => {
                        let share = (confidence - x[below]) / (x[passed] - x[below]);
                        y[below] + share * (above - y[below])
                    }
                }
            }
            Self::Beta { a, b, m } => {
                let [ln, ln_rest] = logarithms(confidence);
                sigmoid(a * ln - b * ln_rest + m)
            }
            Self::Histogram { values } => {
                let edges = (1..values.len()).map(|edge| edge as f64 / values.len() as f64);
                values[edges.filter(|edge| *edge <= confidence).count()]
            }
        }
    }
}

/// [ln c, ln(1 − c)] of a clipped confidence.
fn logarithms(confidence: f64) -> [f64; 2] {
    let confidence = confidence.clamp(EPSILON, 1.0 - EPSILON);
    [confidence.ln(), (1.0 - confidence).ln()]
}

fn log_odds(confidence: f64) -> f64 {
    let [ln, ln_rest] = logarithms(confidence);
    ln - ln_rest
}

/// The T of [0.05, 20] with the smallest negative log-likelihood: where its derivative by 1/T, which only grows, is 0.
fn temperature(predictions: &Predictions) -> f64 {
    let (mut low, mut high) = (0.05_f64.ln(), 20_f64.ln());
    let slope = |log_temperature: f64| -> f64 {
        let of = |atom: &super::Atom| {
            let odds = log_odds(atom.confidence);
            odds * (atom.count * sigmoid(odds / log_temperature.exp()) - atom.correct)
        };
        predictions.atoms().iter().map(of).sum()
    };
    if slope(0.0) == 0.0 {
        return 1.0;
    }
    while high - low > 1e-12 {
        let middle = 0.5 * (low + high);
        if slope(middle) > 0.0 { low = middle } else { high = middle }
    }
    (0.5 * (low + high)).exp()
}

/// Without a ridge where the data determine everything, else with one that pulls the slopes toward 1.
fn with_ridge_if_needed<const D: usize>(
    observations: &[Observation<D>],
    start: [f64; D],
    fixed: [bool; D],
) -> Option<[f64; D]> {
    // A coefficient that is fixed has no feature; any ridge keeps it where it starts.
    let ridge = |strength: f64| {
        std::array::from_fn(|j| {
            if fixed[j] {
                1.0
            } else if j + 1 < D {
                strength
            } else {
                0.0
            }
        })
    };
    logistic(observations, start, ridge(0.0)).or_else(|| logistic(observations, start, ridge(RIDGE)))
}

/// `targets` are what a correct and a wrong answer count as.
fn platt(predictions: &Predictions, targets: [f64; 2]) -> Option<Map> {
    let observation = |atom: &super::Atom| {
        let correct = atom.correct * targets[0] + (atom.count - atom.correct) * targets[1];
        Observation { features: [log_odds(atom.confidence), 1.0], correct, wrong: atom.count - correct }
    };
    let observations: Vec<_> = predictions.atoms().iter().map(observation).collect();
    let [a, b] = with_ridge_if_needed(&observations, [1.0, 0.0], [false; 2])?;
    Some(Map::Platt { a, b })
}

/// Fitted again without the first term that is negative, until none is.
fn beta(predictions: &Predictions) -> Option<Map> {
    let mut fixed = [false; 3];
    loop {
        let used = |j: usize| if fixed[j] { 0.0 } else { 1.0 };
        let observation = |atom: &super::Atom| {
            let [ln, ln_rest] = logarithms(atom.confidence);
            let features = [used(0) * ln, -used(1) * ln_rest, 1.0];
            Observation { features, correct: atom.correct, wrong: atom.count - atom.correct }
        };
        let observations: Vec<_> = predictions.atoms().iter().map(observation).collect();
        let [a, b, m] = with_ridge_if_needed(&observations, [used(0), used(1), 0.0], fixed)?;
        match [a, b].iter().position(|value| *value < 0.0) {
            Some(negative) => fixed[negative] = true,
            None => return Some(Map::Beta { a, b, m }),
        }
    }
}

/// The ends of the fit's constant stretches.
fn isotonic(predictions: &Predictions, step: bool) -> Map {
    let (fit, atoms) = (isotonic_fit(predictions), predictions.atoms());
    let differs = |one: usize, other: Option<usize>| other.and_then(|other| fit.get(other)) != Some(&fit[one]);
    let kept = (0..fit.len()).filter(|&index| differs(index, index.checked_sub(1)) || differs(index, Some(index + 1)));
    let (x, y) = kept.map(|index| (atoms[index].confidence, fit[index])).unzip();
    Map::Isotonic { x, y, step }
}

/// `prior` more answers in every bin, at its middle.
fn histogram(predictions: &Predictions, prior: f64) -> Map {
    let value = |(index, bin): (usize, super::binned::Bin)| {
        let middle = (index as f64 + 0.5) / BINS as f64;
        if bin.count > 0.0 { (bin.correct + prior * middle) / (bin.count + prior) } else { middle }
    };
    Map::Histogram { values: equal_width(predictions, BINS).into_iter().enumerate().map(value).collect() }
}

/// The part that each question belongs to: its place in a shuffled order, modulo the number of parts.
pub fn folds(questions: usize, parts: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..questions).collect();
    let mut random = SplitMix64::new(seed);
    for last in (1..questions).rev() {
        order.swap(last, random.below(last + 1));
    }
    let mut fold = vec![0; questions];
    order.into_iter().enumerate().for_each(|(place, question)| fold[question] = place % parts);
    fold
}

/// The same answers, each with the confidence that a map makes of its own; the map is fitted without its question's part. `None` where
/// a part has no map.
pub fn cross_fitted(answers: &Answers, kind: Kind) -> Option<Answers> {
    out_of_fold(answers, |keep| {
        let map = Map::fit(kind, &answers.predictions_where(keep)?)?;
        Some(move |row: usize| Some(map.apply(answers.rows()[row].confidence?)))
    })
}

/// The same answers with the confidence that a logistic regression makes of two kinds of it, fitted without each question's part: of
/// answers that have both. `None` where a part has no fit, or the answers are not the same.
pub fn combined(stated: &Answers, token: &Answers) -> Option<Answers> {
    let features = |row: usize| {
        let [one, other] = [stated, token].map(|answers| answers.rows().get(row)?.confidence.map(log_odds));
        Some([one?, other?, 1.0])
    };
    out_of_fold(stated, |keep| {
        let observation = |(row, answer): (usize, &super::answers::Answer)| {
            let correct = f64::from(answer.correct);
            let features = features(row).filter(|_| keep(answer.question))?;
            Some(Observation { features, correct, wrong: 1.0 - correct })
        };
        let observations: Vec<_> = stated.rows().iter().enumerate().filter_map(observation).collect();
        let weights = with_ridge_if_needed(&observations, [0.5, 0.5, 0.0], [false; 3])?;
        Some(move |row: usize| {
            let features = features(row)?;
            Some(sigmoid(features.iter().zip(weights).map(|(feature, weight)| feature * weight).sum()))
        })
    })
}

/// Confidences by row, each from what `fit` makes of the questions that its own part does not hold.
fn out_of_fold<F: Fn(usize) -> Option<f64>>(
    answers: &Answers,
    fit: impl Fn(&dyn Fn(u32) -> bool) -> Option<F>,
) -> Option<Answers> {
    let fold = folds(answers.questions().len(), FOLDS, FOLD_SEED);
    let mut confidences = vec![None; answers.rows().len()];
    for part in 0..FOLDS.min(answers.questions().len()) {
        let predict = fit(&|question| fold[question as usize] != part)?;
        for (row, answer) in
            answers.rows().iter().enumerate().filter(|(_, answer)| fold[answer.question as usize] == part)
        {
            confidences[row] = answer.confidence.and_then(|_| predict(row));
        }
    }
    answers.with_confidences(&confidences).ok()
}
