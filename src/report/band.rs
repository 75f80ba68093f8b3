//! 95% bands of curves, by resampling questions.

use rayon::prelude::*;

use crate::evaluation::bootstrap::{Resampling, TAILS, quantile};

/// Resamples of a band.
const RESAMPLES: usize = 200;

/// The pointwise 95% band, at every x, of a curve that is computed of how often each question was drawn. A curve ascends in x and has
/// at least one point, or is `None` where a resample leaves none.
pub fn band(
    questions: usize,
    x: &[f64],
    curve: impl Fn(&[u32]) -> Option<Vec<(f64, f64)>> + Sync,
) -> Vec<(f64, f64, f64)> {
    let resampling = Resampling { resamples: RESAMPLES, ..Resampling::default() };
    let resampled = (0..RESAMPLES).into_par_iter().filter_map(|index| curve(&resampling.draw(index, questions)));
    let curves: Vec<Vec<(f64, f64)>> = resampled.collect();
    let edges = |&x: &f64| {
        let mut values: Vec<f64> = curves.iter().filter_map(|curve| between(curve, x)).collect();
        values.sort_by(f64::total_cmp);
        let [low, high] = TAILS.map(|share| quantile(&values, share));
        Some((x, low?, high?))
    };
    x.iter().filter_map(edges).collect()
}

/// A curve's value between its points, that of its nearest end outside them.
fn between(curve: &[(f64, f64)], x: f64) -> Option<f64> {
    let after = curve.partition_point(|point| point.0 < x);
    match (after.checked_sub(1).map(|before| curve[before]), curve.get(after)) {
        (Some((x0, y0)), Some(&(x1, y1))) => Some(y0 + (y1 - y0) * (x - x0) / (x1 - x0)),
        (Some((_, y)), None) | (None, Some(&(_, y))) => Some(y),
        (None, None) => None,
    }
}
