//! Preference pairs: DPO and its relatives (SCIENCE 6). With Δ = Σ(ℓ − reference) over the chosen completion minus the
//! same over the rejected one, each loss is a function of Δ alone, so tokens that both share get opposite coefficients.

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{Counts, Objective, Sequence, sum};

/// The loss of a pair; ε is the smoothing, the chance that the pair is labeled the wrong way round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreferenceLoss {
    /// −ln σ(βΔ): DPO.
    Sigmoid,
    /// −(1 − ε) ln σ(βΔ) − ε ln σ(−βΔ): conservative DPO.
    Smoothed,
    /// [−(1 − ε) ln σ(βΔ) + ε ln σ(−βΔ)] / (1 − 2ε): robust DPO.
    Robust,
    /// (Δ − 1/(2β))²: IPO.
    Ipo,
    /// IPO with each completion's sum divided by its length, as TRL has it.
    IpoMean,
    /// max(0, 1 − βΔ).
    Hinge,
}

/// Two completions of one prompt; both need their reference.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    /// The better one.
    pub chosen: Sequence<'a>,
    /// The worse one.
    pub rejected: Sequence<'a>,
}

/// The settings of [`preference`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preference {
    /// The loss.
    pub loss: PreferenceLoss,
    /// How strongly the reference holds.
    pub beta: f64,
    /// ε of `smoothed` and `robust`.
    pub smoothing: f64,
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
        let (value, slope) = settings.loss_at(delta);
        objective.loss += value / counts.sequences;
        for (sequence, side, sign) in [(&pair.chosen, &chosen, 1.0), (&pair.rejected, &rejected, -1.0)] {
            let coefficient = sign * slope * per_token(side) / counts.sequences;
            objective.push(sequence.mask_t.len(), &side.live, side.live.iter().map(|_| coefficient));
        }

        let (better, worse) = (settings.beta * chosen.log_ratio, settings.beta * rejected.log_ratio);
        let metrics = &mut objective.metrics;
        metrics.mean("reward_chosen", better, 1.0);
        metrics.mean("reward_rejected", worse, 1.0);
        metrics.mean("reward_margin", better - worse, 1.0);
        metrics.mean("reward_accuracy", f64::from(better > worse), 1.0);
        metrics.mean("logprob_chosen", chosen.logprob, 1.0);
        metrics.mean("logprob_rejected", rejected.logprob, 1.0);
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

impl Preference {
    /// Fails on settings that mean nothing, or nothing together.
    pub fn check(&self) -> Result<()> {
        let smooth = matches!(self.loss, PreferenceLoss::Smoothed | PreferenceLoss::Robust);
        ensure!(self.beta > 0.0 && self.beta.is_finite(), "beta is {}; it must be above 0", self.beta);
        ensure!((0.0..0.5).contains(&self.smoothing), "smoothing is {}; it must be in [0, 0.5)", self.smoothing);
        ensure!(
            smooth || self.smoothing == 0.0,
            "smoothing is {}, which only loss = \"smoothed\" and \"robust\" use",
            self.smoothing
        );
        Ok(())
    }

    /// The loss at Δ, and its derivative.
    fn loss_at(&self, delta: f64) -> (f64, f64) {
        let Self { beta, smoothing, .. } = *self;
        let x = beta * delta;
        // The loss weighs −ln σ(x) by `right` and −ln σ(−x) by `wrong`.
        let logistic = |right: f64, wrong: f64| {
            (-right * log_sigmoid(x) - wrong * log_sigmoid(-x), beta * (wrong * sigmoid(x) - right * sigmoid(-x)))
        };
        match self.loss {
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
}

fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    log_sigmoid(x).exp()
}
