//! Percentile bootstrap intervals. Questions are drawn, not rows: the answers to one question are not independent.

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use serde::Serialize;

use crate::random::SplitMix64;

/// Resamples of a bootstrap.
pub const RESAMPLES: usize = 2000;

/// The ends of a 95% interval.
pub const TAILS: [f64; 2] = [0.025, 0.975];

/// A 95% percentile interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// Resamples in which the statistic was defined.
    pub used: usize,
}

impl Interval {
    /// Of one statistic's values in the resamples that define it.
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let [low, high] = TAILS.map(|share| quantile(&values, share));
        Some(Self { low: low?, high: high?, used: values.len() })
    }
}

/// How resamples are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Resampling {
    /// How many.
    pub resamples: usize,
    /// Every number is a function of this, the resample and the draw: threads change nothing.
    pub seed: u64,
}

impl Default for Resampling {
    fn default() -> Self {
        Self { resamples: RESAMPLES, seed: 0 }
    }
}

impl Resampling {
    /// The intervals of several statistics of `questions` questions, resampled together; `None` where no resample defines one.
    /// `statistics` are given how often each question was drawn.
    pub fn intervals<const N: usize>(
        &self,
        questions: usize,
        statistics: impl Fn(&[u32]) -> [Option<f64>; N] + Sync,
    ) -> [Option<Interval>; N] {
        let resample = |index: usize| {
            // One stream over all resamples, entered where this one begins.
            let mut random = SplitMix64::new(self.seed).ahead(index as u64 * questions as u64);
            let mut counts = vec![0_u32; questions];
            (0..questions).for_each(|_| counts[random.below(questions)] += 1);
            statistics(&counts)
        };
        let values: Vec<[Option<f64>; N]> = (0..self.resamples).into_par_iter().map(resample).collect();
        std::array::from_fn(|index| Interval::of(values.iter().filter_map(|values| values[index]).collect()))
    }
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
    let mean_difference = |counts: &[u32]| {
        let rows = before.iter().zip(after).zip(counts);
        let total: f64 = rows.map(|((before, after), &count)| f64::from(count) * (after - before)).sum();
        [(!counts.is_empty()).then(|| total / counts.len() as f64)]
    };
    let [interval] = Resampling { resamples: RESAMPLES, seed }.intervals(before.len(), mean_difference);
    interval.context("no row to compare")
}

/// The type-7 quantile (R's and NumPy's default) of sorted values; `None` where there are none.
pub fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let position = share * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
    Some(below + (above - below) * position.fract())
}
