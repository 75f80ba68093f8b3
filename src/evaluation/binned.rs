//! Calibration errors over bins: how far mean confidence and accuracy are apart.

use anyhow::{Result, ensure};
use rayon::prelude::*;
use serde::Serialize;

use super::bootstrap::{TAILS, quantile};
use super::{Atom, Prediction, Predictions};
use crate::random::SplitMix64;

/// Predictions whose confidences are close.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bin {
    /// How many there are; 0 in an empty one.
    pub count: f64,
    /// The sum of their confidences.
    pub confidence: f64,
    /// How many are correct.
    pub correct: f64,
}

impl Bin {
    /// |mean confidence − accuracy|; `None` where it is empty.
    pub fn gap(&self) -> Option<f64> {
        (self.count > 0.0).then(|| (self.confidence / self.count - self.correct / self.count).abs())
    }

    pub(super) fn add(&mut self, &Atom { confidence, count, correct }: &Atom) {
        self.count += count;
        self.confidence += confidence * count;
        self.correct += correct;
    }

    fn of<'a>(predictions: impl Iterator<Item = &'a Prediction>) -> Self {
        let mut bin = Self::default();
        predictions.for_each(|&Prediction { confidence, correct, .. }| {
            bin.add(&Atom { confidence, count: 1.0, correct: f64::from(correct) });
        });
        bin
    }
}

/// How the gaps of bins become one number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// Their weighted mean.
    L1,
    /// The root of their weighted mean square.
    L2,
    /// The largest of bins that are not empty.
    Max,
}

impl Norm {
    /// The norm of some bins of `total` predictions.
    pub(super) fn of(self, bins: &[Bin], total: usize) -> f64 {
        let gaps = || bins.iter().filter_map(|bin| Some((bin.count / total as f64, bin.gap()?)));
        match self {
            Self::L1 => gaps().map(|(weight, gap)| weight * gap).sum(),
            Self::L2 => gaps().map(|(weight, gap)| weight * gap * gap).sum::<f64>().sqrt(),
            Self::Max => gaps().map(|(_, gap)| gap).fold(0.0, f64::max),
        }
    }
}

/// Bins of equal width over [0, 1]: [k/M, (k + 1)/M), the last one closed. The edges are divided, not added up: 3 × 0.1 is more
/// than 0.3, and would move a stated 0.3 to the bin below.
pub fn equal_width(predictions: &Predictions, bins: usize) -> Vec<Bin> {
    let mut all = vec![Bin::default(); bins];
    let mut bin = 0;
    for atom in predictions.atoms() {
        while bin + 1 < bins && (bin + 1) as f64 / bins as f64 <= atom.confidence {
            bin += 1;
        }
        all[bin].add(atom);
    }
    all
}

/// Expected calibration error over bins of equal width (Naeini et al. 2015): L1. Of the same bins, L2 is RMSCE and Max is MCE.
pub fn equal_width_error(predictions: &Predictions, bins: usize, norm: Norm) -> f64 {
    norm.of(&equal_width(predictions, bins), predictions.len())
}

/// ECE: [`equal_width_error`] in L1.
pub fn expected_calibration_error(predictions: &Predictions, bins: usize) -> f64 {
    equal_width_error(predictions, bins, Norm::L1)
}

/// ACE (Nixon et al. 2019): L1 over bins that hold the same number each, the first ones one more where it does not divide.
pub fn adaptive_calibration_error(predictions: &Predictions, bins: usize) -> f64 {
    let (each, more) = (predictions.len() / bins, predictions.len() % bins);
    let sizes = (0..bins).map(|bin| each + usize::from(bin < more));
    Norm::L1.of(&of_sizes(predictions, sizes), predictions.len())
}

/// Consecutive bins of the given sizes.
fn of_sizes(predictions: &Predictions, sizes: impl Iterator<Item = usize>) -> Vec<Bin> {
    let mut ascending = predictions.ascending();
    sizes.map(|size| Bin::of(ascending.by_ref().take(size))).collect()
}

/// The number of predictions per bin of [`calibration_error`] that is used where none is given: 100, a tenth of fewer than 1000,
/// and at least 10.
pub fn default_beta(count: usize) -> usize {
    if count >= 1000 { 100 } else { (count / 10).max(10) }
}

/// Calibration error over bins of at least `beta` predictions that never split a confidence: whole atoms, ascending, are put
/// together until there are enough; what is left over goes to the last bin. It does not depend on the order of the rows, and a
/// constant confidence gives exactly its distance from the accuracy. L2 is "RMS calibration error".
pub fn calibration_error(predictions: &Predictions, norm: Norm, beta: usize) -> f64 {
    let mut bins: Vec<Bin> = Vec::new();
    let mut open = Bin::default();
    for atom in predictions.atoms() {
        open.add(atom);
        if open.count >= beta as f64 {
            bins.push(std::mem::take(&mut open));
        }
    }
    match bins.last_mut() {
        Some(Bin { count, confidence, correct }) => {
            *count += open.count;
            *confidence += open.confidence;
            *correct += open.correct;
        }
        None => bins.push(open),
    }
    norm.of(&bins, predictions.len())
}

/// Bins of `beta` rows by ascending confidence, the last one up to twice as large; one bin where there are fewer rows.
fn chunks(predictions: &Predictions, beta: usize) -> Vec<Bin> {
    let count = (predictions.len() / beta.max(1)).max(1);
    let sizes = (1..=count).map(|bin| if bin < count { beta } else { predictions.len() });
    of_sizes(predictions, sizes)
}

/// The calibration error of Humanity's Last Exam with every bin scored. Rows of one confidence may lie in two bins, so it depends
/// on the rows' order.
pub fn calibration_error_by_rows(predictions: &Predictions, norm: Norm, beta: usize) -> f64 {
    norm.of(&chunks(predictions, beta), predictions.len())
}

/// The calibration error of Humanity's Last Exam as its script (after hendrycks/outlier-exposure) computes it: the last bin, that of
/// the most confident answers, is not scored, while the others' weights stay what they were. Only for comparison with published
/// tables. Where the script leaves the order of ties open, it is the rows' own here.
///
/// # Errors
/// Fewer predictions than `beta`: the script fails there.
pub fn calibration_error_hle(predictions: &Predictions, norm: Norm, beta: usize) -> Result<f64> {
    let rows = predictions.len();
    ensure!(rows >= beta, "HLE's calibration error is not defined for {rows} rows, fewer than its bins of {beta}");
    let mut bins = chunks(predictions, beta);
    bins.pop();
    Ok(norm.of(&bins, rows))
}

/// What a statistic is under perfect calibration: it is above 0 where rows are few.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct NullLevel {
    /// Its mean.
    pub mean: f64,
    /// Its 95% quantile.
    pub quantile_95: f64,
}

/// Draws of a null level.
const DRAWS: u64 = 200;

/// The level of a statistic if every answer were correct with the probability that its confidence states, of 200 draws.
pub fn null_level(predictions: &Predictions, seed: u64, statistic: impl Fn(&Predictions) -> f64 + Sync) -> NullLevel {
    let drawn = |draw: u64| {
        let mut random = SplitMix64::new(seed).ahead(draw * predictions.len() as u64);
        let rows = predictions.ascending();
        let rows = rows.map(|row| Prediction { correct: random.next_f64() < row.confidence, count: 1, ..*row });
        statistic(&Predictions::of_sorted(rows.collect()).expect("as many as there are predictions"))
    };
    let mut levels: Vec<f64> = (0..DRAWS).into_par_iter().map(drawn).collect();
    levels.sort_by(f64::total_cmp);
    let mean = levels.iter().sum::<f64>() / levels.len() as f64;
    NullLevel { mean, quantile_95: quantile(&levels, 2.0 * TAILS[1] - 1.0).expect("there are levels") }
}
