//! Completions that are given: supervised fine-tuning, and the implicit calibration loss, which also moves a
//! completion's own likelihood p = exp(mean ℓ) toward whether it is correct (SCIENCE 5.4, 6.4).

use anyhow::{Context as _, Result, ensure};
use candor_environments::losses::{Implicit, JudgedLoss};

use super::{Counts, LossMean, Objective, Sequence, sum};

/// The steepest slope by mean ℓ with which the log form pushes a wrong completion down (SCIENCE 6.4).
const STEEPEST: f64 = 5.0;

/// A completion that was judged.
#[derive(Clone, Copy, Debug)]
pub struct Judged<'a> {
    /// Its tokens.
    pub sequence: Sequence<'a>,
    /// Whether it is correct.
    pub correct: bool,
}

/// Supervised fine-tuning: −ℓ under the given mean; `counts` are those of the whole step.
///
/// # Errors
/// Slices of different lengths; a log-probability in use that is not finite, with its sequence and token.
pub fn demonstration(batch: &[Sequence], mean: LossMean, counts: &Counts) -> Result<Objective> {
    let mut objective = Objective::default();
    for (index, sequence) in batch.iter().enumerate() {
        let live = sequence.live().with_context(|| format!("sequence {index}"))?;
        let weight = counts.weight(mean, live.len());
        let logprobs = live.iter().map(|&t| sequence.logprobs_t[t]);
        objective.loss -= logprobs.map(|logprob| weight * logprob).sum::<f64>();
        objective.metrics.mean("logps/mean", sum(sequence.logprobs_t, &live), live.len() as f64);
        objective.push(sequence.mask_t.len(), &live, live.iter().map(|_| -weight));
    }
    Ok(objective)
}

/// Implicit calibration: the mean over rows of −mean ℓ plus the calibration term; `counts` are those of the whole step.
///
/// # Errors
/// λ that is not positive; a row without a token under its mask; the errors of [`demonstration`].
pub fn judged(batch: &[Judged], settings: &Implicit, counts: &Counts) -> Result<Objective> {
    settings.check()?;
    let mut objective = Objective::default();
    for (index, Judged { sequence, correct }) in batch.iter().enumerate() {
        let live = sequence.live().with_context(|| format!("sequence {index}"))?;
        ensure!(!live.is_empty(), "sequence {index}: no token to take the likelihood of");
        let mean_logprob = sum(sequence.logprobs_t, &live) / live.len() as f64;
        let (mut value, mut slope) = calibration(settings, mean_logprob, *correct);
        if *correct || !settings.lm_on_correct_only {
            value -= mean_logprob;
            slope -= 1.0;
        }
        objective.loss += value / counts.sequences;
        let coefficient = slope * counts.weight(LossMean::Sequence, live.len());
        objective.push(sequence.mask_t.len(), &live, live.iter().map(|_| coefficient));

        let name = if *correct { "likelihood/correct" } else { "likelihood/wrong" };
        objective.metrics.mean(name, mean_logprob.exp(), 1.0);
    }
    Ok(objective)
}

/// The calibration term and its derivative by the mean log-probability x = ln p.
fn calibration(settings: &Implicit, x: f64, correct: bool) -> (f64, f64) {
    let Implicit { loss, lambda, .. } = *settings;
    let p = x.exp();
    match (loss, correct) {
        (JudgedLoss::Mse, _) => {
            let miss = p - f64::from(correct);
            (lambda * miss * miss, 2.0 * lambda * miss * p)
        }
        (JudgedLoss::Log, true) => (-lambda * x, -lambda),
        (JudgedLoss::Log, false) => {
            // λp/(1 − p) reaches the steepest slope here; beyond, the tangent keeps value and slope finite up to p = 1.
            let steep = STEEPEST / (STEEPEST + lambda);
            if p < steep {
                (-lambda * (-p).ln_1p(), lambda * p / (1.0 - p))
            } else {
                (-lambda * (-steep).ln_1p() + STEEPEST * (x - steep.ln()), STEEPEST)
            }
        }
    }
}
