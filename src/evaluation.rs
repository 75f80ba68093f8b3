//! How good stated confidences are (SCIENCE 1.3, 1.4, 1.6), and the one that token probabilities state (SCIENCE 2.4).

use anyhow::{Result, ensure};

use crate::random::SplitMix64;

/// Resamples of a bootstrap.
pub const RESAMPLES: usize = 2000;

/// The least that a token's probability counts as in a confidence: one surprise must not decide alone.
const SMALLEST: f64 = 1e-10;

/// The ends of a 95% interval.
const TAILS: [f64; 2] = [0.025, 0.975];

/// Confidences and whether each answer was correct: checked once, so that no metric has to clamp or guess.
#[derive(Clone, Debug, PartialEq)]
pub struct Predictions {
    confidences: Vec<f64>,
    correct: Vec<bool>,
}

impl Predictions {
    /// Parsed answers only: a missing confidence is no prediction.
    ///
    /// # Errors
    /// No prediction; lists of different lengths; a confidence that is NaN or outside [0, 1], with its row.
    pub fn new(confidences: Vec<f64>, correct: Vec<bool>) -> Result<Self> {
        ensure!(!confidences.is_empty(), "no prediction to evaluate");
        ensure!(confidences.len() == correct.len(), "{} confidences for {} verdicts", confidences.len(), correct.len());
        for (row, confidence) in confidences.iter().enumerate() {
            ensure!((0.0..=1.0).contains(confidence), "row {row}: the confidence {confidence} is not in [0, 1]");
        }
        Ok(Self { confidences, correct })
    }

    /// How many there are; never 0.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.correct.len()
    }

    /// The predictions at the given rows, repeated as the rows are: one resample of a bootstrap.
    ///
    /// # Panics
    /// If `rows` is empty or names a row that does not exist.
    pub fn at(&self, rows: &[usize]) -> Self {
        assert!(!rows.is_empty(), "a resample has at least one row");
        Self {
            confidences: rows.iter().map(|&row| self.confidences[row]).collect(),
            correct: rows.iter().map(|&row| self.correct[row]).collect(),
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (f64, bool)> {
        self.confidences.iter().copied().zip(self.correct.iter().copied())
    }
}

/// The share of correct answers.
pub fn accuracy(predictions: &Predictions) -> f64 {
    predictions.pairs().filter(|(_, correct)| *correct).count() as f64 / predictions.len() as f64
}

/// The Brier score: the mean of (c − y)².
pub fn brier(predictions: &Predictions) -> f64 {
    let squares = predictions.pairs().map(|(confidence, correct)| (confidence - f64::from(correct)).powi(2));
    squares.sum::<f64>() / predictions.len() as f64
}

/// The Brier score of always saying the base rate: ȳ(1 − ȳ).
pub fn base_rate_brier(predictions: &Predictions) -> f64 {
    let rate = accuracy(predictions);
    rate * (1.0 - rate)
}

/// 1 − Brier / base-rate Brier; `None` where all answers are correct or all wrong.
pub fn brier_skill(predictions: &Predictions) -> Option<f64> {
    let constant = base_rate_brier(predictions);
    (constant > 0.0).then(|| 1.0 - brier(predictions) / constant)
}

/// The chance that a correct answer has a higher confidence than a wrong one, ties counting half (Mann-Whitney); `None`
/// where all answers are correct or all wrong.
pub fn auroc(predictions: &Predictions) -> Option<f64> {
    let mut pairs = predictions.pairs().collect::<Vec<_>>();
    pairs.sort_by(|left, right| left.0.total_cmp(&right.0));
    let (mut wins, mut rights, mut wrongs) = (0.0, 0.0, 0.0);
    // −0.0 sorts before 0.0 but is the same confidence, hence ==.
    for atom in pairs.chunk_by(|left, right| left.0 == right.0) {
        let right = atom.iter().filter(|(_, correct)| *correct).count() as f64;
        let wrong = atom.len() as f64 - right;
        wins += right * (wrongs + wrong / 2.0);
        rights += right;
        wrongs += wrong;
    }
    (rights > 0.0 && wrongs > 0.0).then(|| wins / (rights * wrongs))
}

/// The confidence that a model's own probabilities state: the geometric mean of those of its answer's tokens, given as
/// natural logarithms of the untempered softmax. One below 1e-10 counts as that much. `None` where there is no token.
pub fn token_confidence(logprobs_t: &[f64]) -> Option<f64> {
    let floored = logprobs_t.iter().map(|logprob| logprob.max(SMALLEST.ln()));
    (!logprobs_t.is_empty()).then(|| (floored.sum::<f64>() / logprobs_t.len() as f64).exp())
}

/// A 95% percentile interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// Resamples in which the statistic was defined.
    pub used: usize,
}

/// The percentile bootstrap of a statistic of `count` rows; `None` where no resample defines it. The statistic is given
/// each resample's rows.
pub fn bootstrap(
    count: usize,
    resamples: usize,
    seed: u64,
    statistic: impl Fn(&[usize]) -> Option<f64>,
) -> Option<Interval> {
    let mut random = SplitMix64::new(seed);
    let mut resample = || (0..count).map(|_| random.below(count)).collect::<Vec<_>>();
    let mut values = (0..resamples).filter_map(|_| statistic(&resample())).collect::<Vec<_>>();
    values.sort_by(f64::total_cmp);
    let [low, high] = TAILS.map(|share| quantile(&values, share));
    Some(Interval { low: low?, high: high?, used: values.len() })
}

/// The bootstrap interval of mean(after) − mean(before) over the same rows, resampled together.
///
/// # Errors
/// Lists of different lengths, or empty ones; a number that is not finite, with its row.
pub fn paired_bootstrap(before: &[f64], after: &[f64], seed: u64) -> Result<Interval> {
    ensure!(before.len() == after.len(), "{} rows before and {} after: not the same rows", before.len(), after.len());
    for (row, value) in before.iter().zip(after).enumerate() {
        ensure!(value.0.is_finite() && value.1.is_finite(), "row {row}: {} before and {} after", value.0, value.1);
    }
    let mean_difference = |rows: &[usize]| {
        let total = rows.iter().map(|&row| after[row] - before[row]).sum::<f64>();
        (!rows.is_empty()).then(|| total / rows.len() as f64)
    };
    let interval = bootstrap(before.len(), RESAMPLES, seed, mean_difference);
    interval.ok_or_else(|| anyhow::anyhow!("no row to compare"))
}

/// The type-7 quantile of sorted values.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let position = share * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
    Some(below + (above - below) * position.fract())
}
