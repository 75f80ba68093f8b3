//! What is minimized. Every objective depends on the parameters through token log-probabilities ℓ alone, so each one
//! here takes plain numbers and returns the loss, w = ∂loss/∂ℓ of every token, and metrics; the learner propagates w.
//!
//! Denominators ([`Counts`]) are taken once over the whole optimizer step and passed in: the losses and coefficients of
//! any split into micro-batches then add up to those of the whole. Values under a false mask are never read, so they
//! may be NaN; a value in use that is not finite is an error that names its sequence and token.

mod imitation;
mod metrics;
mod policy;
mod preference;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

pub use candor_environments::losses::{Implicit, JudgedLoss, Preference, PreferenceLoss};
pub use imitation::{Judged, demonstration, judged};
pub use metrics::Metrics;
pub use policy::{
    Importance, ImportanceLevel, ImportanceMode, KlEstimator, PolicyGradient, PolicyLoss, Ratio, Sampled,
    policy_gradient,
};
pub use preference::{Pair, preference};

/// The tokens of one completion; all slices have one entry per token.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// The learner's log-probability of each token, in nats.
    pub logprobs_t: &'a [f64],
    /// The reference policy's, where the objective compares with one.
    pub reference_t: Option<&'a [f64]>,
    /// Which tokens the objective sees.
    pub mask_t: &'a [bool],
}

/// The denominators of one kind of task over a whole optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counts {
    /// Tokens under a true mask.
    pub tokens: f64,
    /// Completions; pairs for preferences. A completion without a token under its mask counts.
    pub sequences: f64,
    /// The longest completion allowed, in tokens.
    pub max_tokens: f64,
}

/// What the sum over tokens is divided by (SCIENCE 6).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossMean {
    /// The step's tokens.
    Token,
    /// Each completion's own tokens, then the step's completions.
    Sequence,
    /// The step's completions times the token limit (Dr. GRPO).
    Constant,
}

/// A loss and its derivative; the coefficients are all zero under a false mask.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objective {
    /// This micro-batch's part of the step's loss.
    pub loss: f64,
    /// w = ∂loss/∂ℓ, one list per sequence in the order given (a pair: chosen, then rejected), one entry per token.
    pub coefficients: Vec<Vec<f64>>,
    /// What to log.
    pub metrics: Metrics,
}

impl Counts {
    /// Counts the masks of every completion of the step.
    pub fn of<'a>(masks: impl IntoIterator<Item = &'a [bool]>, max_tokens: usize) -> Self {
        let mut counts = Self { tokens: 0.0, sequences: 0.0, max_tokens: max_tokens as f64 };
        for mask_t in masks {
            counts.tokens += mask_t.iter().filter(|live| **live).count() as f64;
            counts.sequences += 1.0;
        }
        counts
    }

    /// The weight of each of a completion's `num_live` tokens in the loss.
    fn weight(&self, mean: LossMean, num_live: usize) -> f64 {
        1.0 / match mean {
            LossMean::Token => self.tokens,
            LossMean::Sequence => self.sequences * num_live as f64,
            LossMean::Constant => self.sequences * self.max_tokens,
        }
    }
}

impl Sequence<'_> {
    /// The positions under a true mask, after checking that the values there are finite.
    fn live(&self) -> Result<Vec<usize>> {
        let live = (0..self.mask_t.len()).filter(|&t| self.mask_t[t]).collect::<Vec<_>>();
        check("learner", self.logprobs_t, self.mask_t.len(), &live)?;
        if let Some(reference_t) = self.reference_t {
            check("reference", reference_t, self.mask_t.len(), &live)?;
        }
        Ok(live)
    }
}

impl Objective {
    /// Appends a sequence of `length` tokens whose `live` positions have the given coefficients.
    fn push(&mut self, length: usize, live: &[usize], coefficients: impl IntoIterator<Item = f64>) {
        let mut coefficients_t = vec![0.0; length];
        live.iter().zip(coefficients).for_each(|(&t, coefficient)| coefficients_t[t] = coefficient);
        self.coefficients.push(coefficients_t);
    }
}

fn check(whose: &str, values_t: &[f64], length: usize, live: &[usize]) -> Result<()> {
    ensure!(values_t.len() == length, "{} {whose} log-probabilities for a mask of {length} tokens", values_t.len());
    for &t in live {
        ensure!(values_t[t].is_finite(), "token {t}: the {whose} log-probability is {}", values_t[t]);
    }
    Ok(())
}

fn sum(values_t: &[f64], live: &[usize]) -> f64 {
    live.iter().map(|&t| values_t[t]).sum()
}
