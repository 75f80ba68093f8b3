//! Whether confidences still differ: a constant at the base rate has no calibration error, and says nothing.

use serde::Serialize;

use super::bootstrap::quantile;
use super::{Predictions, mean_confidence};

/// How confidences are spread. Shares and counts are over confidences rounded to three decimals.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Collapse {
    /// Different confidences.
    pub distinct: usize,
    /// The most frequent one, the lowest of several.
    pub mode: f64,
    /// Its share.
    pub mode_share: f64,
    /// The share of the two most frequent.
    pub top2_share: f64,
    /// Standard deviation.
    pub std: f64,
    /// The 5% quantile.
    pub q05: f64,
    /// The 95% quantile.
    pub q95: f64,
    /// Entropy in nats.
    pub entropy: f64,
    /// How many of the seven tenths from 0.2 to 0.9 hold at least 1% of the confidences.
    pub occupied_02_09: usize,
    /// There is one confidence.
    pub flat: bool,
    /// Flat, or nearly: one value has 95%, or nine tenths lie within 0.1.
    pub collapsed: bool,
    /// Two values have 95%.
    pub two_atom: bool,
    /// Both ends and the middle are used. On hard questions honest confidences never reach the upper end.
    pub spans: bool,
}

/// The spread of the confidences, right or wrong.
pub fn collapse(predictions: &Predictions) -> Collapse {
    let total = predictions.len() as f64;
    let thousandths = |confidence: f64| (1000.0 * confidence).round_ties_even();
    let rounded =
        predictions.atoms().chunk_by(|left, right| thousandths(left.confidence) == thousandths(right.confidence));
    let shares: Vec<(f64, f64)> = rounded
        .map(|same| (thousandths(same[0].confidence) / 1000.0, same.iter().map(|atom| atom.count).sum::<f64>() / total))
        .collect();
    let mut frequent = shares.clone();
    frequent.sort_by(|left, right| right.1.total_cmp(&left.1));
    let mean = mean_confidence(predictions);
    let sorted: Vec<f64> = predictions.ascending().map(|row| row.confidence).collect();
    let [q05, q95] = [0.05, 0.95].map(|share| quantile(&sorted, share).expect("there are predictions"));
    let tenths = super::binned::equal_width(predictions, 10);
    let (mode, mode_share) = frequent[0];
    let top2_share = frequent.iter().take(2).map(|(_, share)| share).sum();
    let occupied_02_09 = tenths[2..9].iter().filter(|bin| bin.count >= (0.01 * total).max(1.0)).count();
    let flat = shares.len() == 1;
    Collapse {
        distinct: shares.len(),
        mode,
        mode_share,
        top2_share,
        std: predictions.mean(|confidence| [(confidence - mean).powi(2); 2]).sqrt(),
        q05,
        q95,
        entropy: -shares.iter().map(|(_, share)| share * share.ln()).sum::<f64>(),
        occupied_02_09,
        flat,
        collapsed: flat || mode_share >= 0.95 || q95 - q05 < 0.1,
        two_atom: !flat && top2_share >= 0.95,
        spans: q05 <= 0.2 && q95 >= 0.9 && occupied_02_09 >= 4,
    }
}
