//! Calibration error without bins: smooth ECE (Błasiok and Nakkiran 2023, arXiv 2309.12236).
//!
//! Residuals c − y are smoothed by a Gaussian that is reflected at 0 and 1, and the smoothed curve's size is averaged. A reflected
//! Gaussian of width s multiplies the k-th cosine coefficient of what it smooths by exp(−(πks)²/2), so no kernel is ever summed.

use std::f64::consts::PI;

use super::Predictions;

/// The narrowest smoothing.
const NARROWEST: f64 = 1e-3;

/// Cells of the integral over confidence.
const CELLS: usize = 2000;

/// Coefficients that are smaller than this share of what they were change nothing.
const VANISHED: f64 = 1e-16;

/// The smooth ECE: that of the width which equals it, or of 0.001 where that is narrower.
pub fn smooth_ece(predictions: &Predictions) -> f64 {
    let coefficients = coefficients(predictions, terms(NARROWEST));
    let cosines = cosines();
    let error = |width: f64| smoothed(&coefficients, &cosines, width);
    let (mut low, mut high) = (NARROWEST, 1.0);
    // What bisection needs to tell two widths of this size apart.
    while high - low > 1e-9 {
        let middle = 0.5 * (low + high);
        if error(middle) > middle { low = middle } else { high = middle }
    }
    error(low)
}

/// The calibration error after smoothing with a given width, at least 0.001.
pub fn smoothed_ece(predictions: &Predictions, width: f64) -> f64 {
    let width = width.max(NARROWEST);
    smoothed(&coefficients(predictions, terms(width)), &cosines(), width)
}

/// cos(πi/CELLS) over a whole turn.
fn cosines() -> Vec<f64> {
    (0..2 * CELLS).map(|index| (PI * index as f64 / CELLS as f64).cos()).collect()
}

/// How many coefficients a width leaves.
fn terms(width: f64) -> usize {
    ((-2.0 * VANISHED.ln()).sqrt() / (PI * width)).ceil() as usize + 1
}

/// The first cosine coefficients of the residuals: mean (c − y) cos(πkc).
fn coefficients(predictions: &Predictions, terms: usize) -> Vec<f64> {
    let mut sums = vec![0.0; terms];
    for atom in predictions.atoms() {
        let residual = atom.confidence * atom.count - atom.correct;
        let step = 2.0 * (PI * atom.confidence).cos();
        // cos((k + 1)x) = 2 cos(x) cos(kx) − cos((k − 1)x).
        let (mut this, mut next) = (1.0, 0.5 * step);
        for sum in &mut sums {
            *sum += residual * this;
            (this, next) = (next, step * next - this);
        }
    }
    sums.iter().map(|sum| sum / predictions.len() as f64).collect()
}

/// The integral over [0, 1] of the smoothed residuals' size, by trapezoids. `cosines` are those of [`cosines()`].
fn smoothed(coefficients: &[f64], cosines: &[f64], width: f64) -> f64 {
    let kept = coefficients.iter().take(terms(width)).enumerate();
    let damped = |(k, coefficient): (usize, &f64)| {
        let weight = if k == 0 { 1.0 } else { 2.0 };
        weight * coefficient * (-0.5 * (PI * k as f64 * width).powi(2)).exp()
    };
    let damped: Vec<f64> = kept.map(damped).collect();
    let size = |node: usize| {
        let terms = damped.iter().enumerate().map(|(k, value)| value * cosines[k * node % cosines.len()]);
        terms.sum::<f64>().abs()
    };
    let inner: f64 = (1..CELLS).map(size).sum();
    (inner + 0.5 * (size(0) + size(CELLS))) / CELLS as f64
}
