//! What a Brier score is made of: how wrong the confidences are as probabilities, and how well they tell right from wrong.

use serde::Serialize;

use super::binned::equal_width;
use super::{Predictions, accuracy, base_rate_brier, brier};

/// Brier = reliability − resolution + uncertainty + variance − covariance, exactly (Murphy 1973; the last two within bins, Stephenson
/// et al. 2008, and 0 where each bin is one confidence).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Murphy {
    /// The mean square gap of the bins: 0 is calibrated.
    pub reliability: f64,
    /// The variance of the bins' accuracies: 0 tells nothing apart.
    pub resolution: f64,
    /// ȳ(1 − ȳ).
    pub uncertainty: f64,
    /// The mean of (c − c̄)² within bins.
    pub variance: f64,
    /// Twice the mean of (c − c̄)(y − ȳ) within bins.
    pub covariance: f64,
}

/// Murphy's decomposition over the distinct confidences.
pub fn murphy(predictions: &Predictions) -> Murphy {
    let rate = accuracy(predictions);
    let mut sums = [0.0; 2];
    for atom in predictions.atoms() {
        let right = atom.correct / atom.count;
        sums[0] += atom.count * (atom.confidence - right).powi(2);
        sums[1] += atom.count * (right - rate).powi(2);
    }
    let [reliability, resolution] = sums.map(|sum| sum / predictions.len() as f64);
    Murphy { reliability, resolution, uncertainty: base_rate_brier(predictions), variance: 0.0, covariance: 0.0 }
}

/// Murphy's decomposition over bins of equal width.
pub fn murphy_binned(predictions: &Predictions, bins: usize) -> Murphy {
    let rate = accuracy(predictions);
    let mut sums = [0.0; 4];
    let mut atoms = predictions.atoms();
    for bin in equal_width(predictions, bins).iter().filter(|bin| bin.count > 0.0) {
        let (mean, right) = (bin.confidence / bin.count, bin.correct / bin.count);
        sums[0] += bin.count * (mean - right).powi(2);
        sums[1] += bin.count * (right - rate).powi(2);
        let mut left = bin.count;
        while left > 0.0 {
            let (atom, rest) = atoms.split_first().expect("bins hold whole atoms, in their order");
            (atoms, left) = (rest, left - atom.count);
            let off = atom.confidence - mean;
            sums[2] += atom.count * off * off;
            sums[3] += 2.0 * off * (atom.correct - atom.count * right);
        }
    }
    let [reliability, resolution, variance, covariance] = sums.map(|sum| sum / predictions.len() as f64);
    Murphy { reliability, resolution, uncertainty: base_rate_brier(predictions), variance, covariance }
}

/// Brier = miscalibration − discrimination + uncertainty, without bins (CORP: Dimitriadis, Gneiting and Jordan 2021).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Corp {
    /// What the best monotone recalibration would take off the Brier score.
    pub miscalibration: f64,
    /// How much better than the base rate the recalibrated confidences are.
    pub discrimination: f64,
    /// ȳ(1 − ȳ).
    pub uncertainty: f64,
}

/// The CORP decomposition.
pub fn corp(predictions: &Predictions) -> Corp {
    let fit = isotonic_fit(predictions);
    let square = |(atom, fit): (&super::Atom, f64)| {
        atom.correct * (fit - 1.0).powi(2) + (atom.count - atom.correct) * fit.powi(2)
    };
    let recalibrated = predictions.atoms().iter().zip(fit).map(square).sum::<f64>() / predictions.len() as f64;
    let uncertainty = base_rate_brier(predictions);
    Corp { miscalibration: brier(predictions) - recalibrated, discrimination: uncertainty - recalibrated, uncertainty }
}

/// A point of the CORP reliability diagram.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ReliabilityPoint {
    /// A stated confidence.
    pub confidence: f64,
    /// How many answers stated it.
    pub count: f64,
    /// How many of them are correct.
    pub correct: f64,
    /// The accuracy that the isotonic fit gives it.
    pub fit: f64,
}

/// The CORP reliability diagram: the isotonic fit at every stated confidence, ascending.
pub fn reliability(predictions: &Predictions) -> Vec<ReliabilityPoint> {
    let points = predictions.atoms().iter().zip(isotonic_fit(predictions));
    points
        .map(|(atom, fit)| ReliabilityPoint {
            confidence: atom.confidence,
            count: atom.count,
            correct: atom.correct,
            fit,
        })
        .collect()
}

/// The isotonic fit of correctness on confidence, at every atom.
pub fn isotonic_fit(predictions: &Predictions) -> Vec<f64> {
    pool_adjacent_violators(predictions.atoms().iter().map(|atom| (atom.correct, atom.count)))
}

/// The non-decreasing sequence nearest in weighted squares to the means sum/weight (pool adjacent violators; Ayer et al. 1955). Weights
/// must be above 0.
pub fn pool_adjacent_violators(points: impl Iterator<Item = (f64, f64)>) -> Vec<f64> {
    struct Block {
        sum: f64,
        weight: f64,
        points: usize,
    }
    let mut blocks: Vec<Block> = Vec::new();
    for (sum, weight) in points {
        let mut block = Block { sum, weight, points: 1 };
        while let Some(last) = blocks.pop_if(|last| last.sum * block.weight >= block.sum * last.weight) {
            block.sum += last.sum;
            block.weight += last.weight;
            block.points += last.points;
        }
        blocks.push(block);
    }
    blocks.iter().flat_map(|block| std::iter::repeat_n(block.sum / block.weight, block.points)).collect()
}
