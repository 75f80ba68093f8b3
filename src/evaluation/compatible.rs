//! Calibration errors of the project's first notes, which divided by the wrong number: to recognize their tables by, never to
//! report.

use super::Predictions;
use super::binned::Bin;

/// The bins of the notes' script.
const BINS: usize = 100;

/// The root of the mean square gap over 100 bins, and how many predictions the script left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NotesError {
    /// The squares are divided by 100, whatever is in the bins: as the script printed.
    pub over_all_bins: f64,
    /// The squares are divided by the number of bins that are not empty, the last of them closed: as the formula said.
    pub over_nonempty_bins: f64,
    /// Predictions with a confidence of 1, for which the script has no bin.
    pub dropped: usize,
}

/// Computes it as `numpy.digitize` over `linspace(0, 1, 101)` does.
pub fn notes_error(predictions: &Predictions) -> NotesError {
    let (mut scored, mut all, mut dropped) = ([Bin::default(); BINS], [Bin::default(); BINS], 0.0);
    for atom in predictions.atoms() {
        let index = (1..=BINS).filter(|&edge| edge as f64 * (1.0 / BINS as f64) <= atom.confidence).count();
        all[index.min(BINS - 1)].add(atom);
        match scored.get_mut(index) {
            Some(bin) => bin.add(atom),
            None => dropped += atom.count,
        }
    }
    let squares = |bins: &[Bin]| -> Vec<f64> { bins.iter().filter_map(|bin| Some(bin.gap()?.powi(2))).collect() };
    let nonempty = squares(&all);
    NotesError {
        over_all_bins: (squares(&scored).iter().sum::<f64>() / BINS as f64).sqrt(),
        over_nonempty_bins: (nonempty.iter().sum::<f64>() / nonempty.len() as f64).sqrt(),
        dropped: dropped as usize,
    }
}
