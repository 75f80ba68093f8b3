//! The policy gradient: sampled completions, their advantages, and what keeps the learner near the policy that sampled
//! them (SCIENCE 6). With r = exp(ℓ − behavior), A the advantage, and all means as [`LossMean`] says, a token's loss is
//!
//! * `clip`: −min(r·A, clamp(r, 1 − clip\[0\], 1 + clip\[1\])·A); with `delta`, the first r is at most `delta`
//! * `cispo`: −min(r, 1 + clip\[1\])·A·ℓ, with the factor before ℓ detached; clip\[0\] is not used
//! * `prime`: −A·r + 0.001·(ℓ − behavior)², without the first term where exp(ℓ) − exp(behavior) > clip\[1\] and A > 0,
//!   or < −clip\[0\] and A ≤ 0
//!
//! plus `kl` times k3 = exp(u) − u − 1, u = reference − ℓ.

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{Counts, LossMean, Metrics, Objective, Sequence, check};

/// The weight of prime-rl's squared log-ratio.
const PRIME_SQUARE: f64 = 1e-3;

/// What is done about a ratio that strays from 1; the formulas are at the top of this file.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyLoss {
    /// PPO's clipped surrogate.
    Clip,
    /// The capped ratio, detached, weighs the log-probability: no token loses its gradient (MiniMax-M1).
    Cispo,
    /// prime-rl's default: a token whose probability moved too far along its advantage is left out.
    Prime,
}

/// Whether a ratio belongs to one token or to the whole completion.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ratio {
    /// exp(ℓ − behavior) of each token.
    Token,
    /// GSPO: exp of the mean of ℓ − behavior over the completion, its gradient shared by all of the completion's tokens.
    Sequence,
}

/// How the divergence from the reference is estimated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// k3 itself; its gradient is that of the forward divergence, from the reference.
    K3,
    /// k3 times the ratio, differentiated too: value and gradient of KL(learner ‖ reference) are unbiased. TRL's.
    Unbiased,
}

/// Whether, and over what, samples of an older policy are reweighted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceLevel {
    /// Not at all.
    None,
    /// Each token by exp(ℓ − behavior).
    Token,
    /// Each token by its completion's exp(Σ(ℓ − behavior)).
    Sequence,
}

/// What happens to an importance weight above the limit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceMode {
    /// It becomes the limit.
    Truncate,
    /// It becomes zero.
    Mask,
}

/// Detached weights of the policy loss for samples of an older policy. With a level other than `none` the ratio is taken
/// to the learner's own detached log-probabilities, so it is 1 and nothing is clipped. The KL term is not weighted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Importance {
    /// Whether a weight belongs to a token or to a completion.
    pub level: ImportanceLevel,
    /// What happens above `max`.
    #[serde(default = "default_mode")]
    pub mode: ImportanceMode,
    /// The limit of a weight.
    #[serde(default = "default_max")]
    pub max: f64,
}

fn default_mode() -> ImportanceMode {
    ImportanceMode::Truncate
}

fn default_max() -> f64 {
    2.0
}

/// A sampled completion.
#[derive(Clone, Copy, Debug)]
pub struct Sampled<'a> {
    /// Its tokens; the reference is needed where `kl` > 0.
    pub sequence: Sequence<'a>,
    /// The log-probabilities that the sampler recorded, in nats.
    pub behavior_t: &'a [f64],
    /// Its advantage, the same for all tokens.
    pub advantage: f64,
}

/// The settings of [`policy_gradient`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyGradient {
    /// The token loss.
    pub policy_loss: PolicyLoss,
    /// What a ratio belongs to.
    pub ratio: Ratio,
    /// How far below and above 1 a ratio may go; for `prime`, how far a probability may fall and rise.
    pub clip: [f64; 2],
    /// `clip` only: an upper bound on the ratio where the advantage is negative (two-sided clipping).
    pub delta: Option<f64>,
    /// What the sum over tokens is divided by.
    pub loss_mean: LossMean,
    /// Weights for samples of an older policy.
    pub importance: Importance,
    /// The weight of the divergence from the reference.
    pub kl: f64,
    /// How that divergence is estimated.
    pub kl_estimator: KlEstimator,
}

impl PolicyGradient {
    /// Fails on settings that mean nothing, or nothing together.
    pub fn check(&self) -> Result<()> {
        let [low, high] = self.clip;
        let max = self.importance.max;
        ensure!((0.0..=1.0).contains(&low), "clip: the low end is {low}; it must be in [0, 1]");
        ensure!(high >= 0.0 && high.is_finite(), "clip: the high end is {high}; it must be 0 or more");
        ensure!(self.kl >= 0.0 && self.kl.is_finite(), "kl is {}; it must be 0 or more", self.kl);
        ensure!(max > 0.0 && max.is_finite(), "importance: max is {max}; it must be above 0");
        if let Some(delta) = self.delta {
            ensure!(self.policy_loss == PolicyLoss::Clip, "delta belongs to policy_loss = \"clip\" only");
            ensure!(delta > 1.0 + high && delta.is_finite(), "delta is {delta}; it must be above 1 + {high}");
        }
        let plain = self.ratio == Ratio::Token && self.importance.level == ImportanceLevel::None;
        ensure!(
            plain || self.policy_loss != PolicyLoss::Prime,
            "policy_loss = \"prime\" has its own ratio: it needs ratio = \"token\" and importance level \"none\""
        );
        Ok(())
    }
}

/// The policy-gradient loss of a micro-batch; `counts` are those of the whole step.
///
/// # Errors
/// Settings that mean nothing; slices of different lengths; a missing reference; a number in use that is not finite,
/// with its sequence (index in `batch`) and token.
pub fn policy_gradient(batch: &[Sampled], settings: &PolicyGradient, counts: &Counts) -> Result<Objective> {
    settings.check()?;
    let mut objective = Objective::default();
    for (index, sampled) in batch.iter().enumerate() {
        let sequence = &sampled.sequence;
        let at = || format!("sequence {index}");
        let live = sequence.live().with_context(at)?;
        let terms = terms(sampled, &live, settings, &mut objective.metrics).with_context(at)?;
        let shared = match settings.ratio {
            Ratio::Token => None,
            Ratio::Sequence => Some(terms.iter().map(|term| term.through_ratio).sum::<f64>() / live.len() as f64),
        };
        let weight = counts.weight(settings.loss_mean, live.len());
        objective.loss += terms.iter().map(|term| weight * term.value).sum::<f64>();
        let coefficients = terms.iter().map(|term| weight * (term.direct + shared.unwrap_or(term.through_ratio)));
        objective.push(sequence.mask_t.len(), &live, coefficients);
    }
    Ok(objective)
}

/// One token's loss and its derivative by ℓ: directly, and through the logarithm of the ratio, which may be shared.
#[derive(Default)]
struct Term {
    value: f64,
    direct: f64,
    through_ratio: f64,
    fate: Fate,
}

/// What became of a token's policy gradient.
#[derive(Clone, Copy, Default, PartialEq)]
enum Fate {
    #[default]
    Used,
    ClippedLow,
    ClippedHigh,
    Masked,
}

/// The terms of the tokens at `live`.
fn terms(sampled: &Sampled, live: &[usize], settings: &PolicyGradient, metrics: &mut Metrics) -> Result<Vec<Term>> {
    let Sampled { sequence, behavior_t, advantage } = sampled;
    check("behavior", behavior_t, sequence.mask_t.len(), live)?;
    ensure!(advantage.is_finite(), "the advantage is {advantage}");
    ensure!(settings.kl == 0.0 || sequence.reference_t.is_some(), "kl is {} but there is no reference", settings.kl);

    let gap = |t: usize| sequence.logprobs_t[t] - behavior_t[t];
    let total_gap = live.iter().map(|&t| gap(t)).sum::<f64>();
    let token_term = |&t: &usize| {
        let weight = importance_weight(&settings.importance, gap(t), total_gap);
        let token_ratio = gap(t).exp();
        let behavior_ratio = match settings.ratio {
            Ratio::Token => token_ratio,
            Ratio::Sequence => (total_gap / live.len() as f64).exp(),
        };
        let ratio = if weight.is_some() { 1.0 } else { behavior_ratio };
        let mut term = surrogate(settings, ratio, sequence.logprobs_t[t], behavior_t[t], *advantage);
        if let Some(weight) = weight {
            term.scale(weight);
        }
        if let Some(reference_t) = sequence.reference_t {
            let divergence = term.add_kl(settings, ratio, reference_t[t] - sequence.logprobs_t[t]);
            metrics.mean("kl", divergence, 1.0);
        }
        ensure!(
            token_ratio.is_finite() && (term.value + term.direct + term.through_ratio).is_finite(),
            "token {t}: the loss overflows; log-probabilities: learner {}, behavior {}, reference {:?}",
            sequence.logprobs_t[t],
            behavior_t[t],
            sequence.reference_t.map(|reference_t| reference_t[t])
        );
        record(metrics, &term, behavior_ratio, gap(t));
        Ok(term)
    };
    live.iter().map(token_term).collect()
}

fn importance_weight(importance: &Importance, gap: f64, total_gap: f64) -> Option<f64> {
    let weight = match importance.level {
        ImportanceLevel::None => return None,
        ImportanceLevel::Token => gap.exp(),
        ImportanceLevel::Sequence => total_gap.exp(),
    };
    Some(match importance.mode {
        ImportanceMode::Truncate => weight.min(importance.max),
        ImportanceMode::Mask if weight > importance.max => 0.0,
        ImportanceMode::Mask => weight,
    })
}

fn surrogate(settings: &PolicyGradient, ratio: f64, logprob: f64, behavior: f64, advantage: f64) -> Term {
    let [low, high] = settings.clip;
    match settings.policy_loss {
        PolicyLoss::Clip => clipped(ratio, [1.0 - low, 1.0 + high], settings.delta, advantage),
        PolicyLoss::Cispo => {
            let direct = -ratio.min(1.0 + high) * advantage;
            let fate = if ratio > 1.0 + high { Fate::ClippedHigh } else { Fate::Used };
            Term { value: direct * logprob, direct, fate, ..Term::default() }
        }
        PolicyLoss::Prime => {
            let moved = logprob.exp() - behavior.exp();
            let masked = if advantage > 0.0 { moved > high } else { moved < -low };
            let through_ratio = if masked { 0.0 } else { -advantage * ratio };
            let gap = logprob - behavior;
            let fate = if masked { Fate::Masked } else { Fate::Used };
            let value = through_ratio + PRIME_SQUARE * gap * gap;
            Term { value, direct: 2.0 * PRIME_SQUARE * gap, through_ratio, fate }
        }
    }
}

/// −min(min(r, delta)·A, clamp(r)·A), whose derivative by log r is −r·A where the minimum follows r, and 0 elsewhere.
fn clipped(ratio: f64, [low, high]: [f64; 2], delta: Option<f64>, advantage: f64) -> Term {
    let bounded = delta.map_or(ratio, |delta| ratio.min(delta));
    let value = (bounded * advantage).min(ratio.clamp(low, high) * advantage);
    let fate = if (advantage > 0.0 && ratio > high) || bounded < ratio {
        Fate::ClippedHigh
    } else if advantage < 0.0 && ratio < low {
        Fate::ClippedLow
    } else {
        Fate::Used
    };
    let through_ratio = if fate == Fate::Used { -ratio * advantage } else { 0.0 };
    Term { value: -value, direct: 0.0, through_ratio, fate }
}

impl Term {
    fn scale(&mut self, weight: f64) {
        self.value *= weight;
        self.direct *= weight;
        self.through_ratio *= weight;
        if weight == 0.0 {
            self.fate = Fate::Masked;
        }
    }

    /// Adds the divergence from the reference, u = reference − ℓ, and returns its estimate.
    fn add_kl(&mut self, settings: &PolicyGradient, ratio: f64, u: f64) -> f64 {
        let k3 = u.exp_m1() - u;
        let (estimate, direct, through_ratio) = match settings.kl_estimator {
            KlEstimator::K3 => (k3, -u.exp_m1(), 0.0),
            KlEstimator::Unbiased => (ratio * k3, -ratio * u.exp_m1(), ratio * k3),
        };
        self.value += settings.kl * estimate;
        self.direct += settings.kl * direct;
        self.through_ratio += settings.kl * through_ratio;
        estimate
    }
}

fn record(metrics: &mut Metrics, term: &Term, behavior_ratio: f64, gap: f64) {
    let share = |fate| f64::from(term.fate == fate);
    metrics.mean("clip/low", share(Fate::ClippedLow), 1.0);
    metrics.mean("clip/high", share(Fate::ClippedHigh), 1.0);
    metrics.mean("mismatch/masked", share(Fate::Masked), 1.0);
    metrics.mean("ratio/mean", behavior_ratio, 1.0);
    metrics.max("ratio/max", behavior_ratio);
    // k3 of KL(behavior ‖ learner), estimated on the behavior policy's samples.
    metrics.mean("mismatch/k3", gap.exp_m1() - gap, 1.0);
    metrics.mean("mismatch/mean", gap.abs(), 1.0);
    metrics.max("mismatch/max", gap.abs());
}
