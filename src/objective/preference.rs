//! Preference pairs: DPO and its relatives (SCIENCE 6). With Δ = Σ(ℓ − reference) over the chosen completion minus the
//! same over the rejected one, each loss is a function of Δ alone, so tokens that both share get opposite coefficients.

use anyhow::{Context as _, Result, ensure};
use candor_environments::losses::{Preference, PreferenceLoss};

use super::{Counts, Objective, Sequence, sum};

/// Two completions of one prompt; both need their reference.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    /// The better one.
    pub chosen: Sequence<'a>,
    /// The worse one.
    pub rejected: Sequence<'a>,
}

/// The mean loss over pairs; `counts.sequences` are the pairs of the whole step. The coefficients alternate: chosen,
/// rejected, chosen, …
///
/// # Errors
/// Settings that mean nothing; a missing reference; a completion without a token under its mask; slices of different
/// lengths; a number in use that is not finite, with its pair and token.
pub fn preference(batch: &[Pair], settings: &Preference, counts: &Counts) -> Result<Objective> {
    settings.check()?;
    let mut objective = Objective::default();
    for (index, pair) in batch.iter().enumerate() {
        let chosen = margin(&pair.chosen).with_context(|| format!("pair {index}, chosen"))?;
        let rejected = margin(&pair.rejected).with_context(|| format!("pair {index}, rejected"))?;
        let per_token = |side: &Margin| match settings.loss {
            PreferenceLoss::IpoMean => 1.0 / side.live.len() as f64,
            _ => 1.0,
        };
        let delta = chosen.log_ratio * per_token(&chosen) - rejected.log_ratio * per_token(&rejected);
        let (value, slope) = loss_at(settings, delta);
        objective.loss += value / counts.sequences;
        for (sequence, side, sign) in [(&pair.chosen, &chosen, 1.0), (&pair.rejected, &rejected, -1.0)] {
            let coefficient = sign * slope * per_token(side) / counts.sequences;
            objective.push(sequence.mask_t.len(), &side.live, side.live.iter().map(|_| coefficient));
        }

        let (better, worse) = (settings.beta * chosen.log_ratio, settings.beta * rejected.log_ratio);
        let metrics = &mut objective.metrics;
        metrics.mean("rewards/chosen", better, 1.0);
        metrics.mean("rewards/rejected", worse, 1.0);
        metrics.mean("rewards/margins", better - worse, 1.0);
        metrics.mean("rewards/accuracies", f64::from(better > worse), 1.0);
        metrics.mean("logps/chosen", chosen.logprob, 1.0);
        metrics.mean("logps/rejected", rejected.logprob, 1.0);
    }
    Ok(objective)
}

/// One completion's sums over its live tokens.
struct Margin {
    live: Vec<usize>,
    logprob: f64,
    log_ratio: f64,
}

fn margin(sequence: &Sequence) -> Result<Margin> {
    let live = sequence.live()?;
    ensure!(!live.is_empty(), "no token to compare");
    let reference_t = sequence.reference_t.context("a preference needs the reference's log-probabilities")?;
    let logprob = sum(sequence.logprobs_t, &live);
    Ok(Margin { logprob, log_ratio: logprob - sum(reference_t, &live), live })
}

/// The loss at Δ, and its derivative.
fn loss_at(settings: &Preference, delta: f64) -> (f64, f64) {
    let Preference { loss, beta, smoothing } = *settings;
    let x = beta * delta;
    // The loss weighs −ln σ(x) by `right` and −ln σ(−x) by `wrong`.
    let logistic = |right: f64, wrong: f64| {
        (-right * log_sigmoid(x) - wrong * log_sigmoid(-x), beta * (wrong * sigmoid(x) - right * sigmoid(-x)))
    };
    match loss {
        PreferenceLoss::Sigmoid => logistic(1.0, 0.0),
        PreferenceLoss::Smoothed => logistic(1.0 - smoothing, smoothing),
        PreferenceLoss::Robust => {
            let scale = 1.0 / (1.0 - 2.0 * smoothing);
            logistic(scale * (1.0 - smoothing), -scale * smoothing)
        }
        PreferenceLoss::Ipo | PreferenceLoss::IpoMean => {
            let miss = delta - 1.0 / (2.0 * beta);
            (miss * miss, 2.0 * miss)
        }
        PreferenceLoss::Hinge if x < 1.0 => (1.0 - x, -beta),
        PreferenceLoss::Hinge => (0.0, 0.0),
    }
}

fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    log_sigmoid(x).exp()
}
