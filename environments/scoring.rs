//! Scoring rules (SCIENCE 3.3): what a stated probability `p` is worth once the outcome `y` is known. All are *proper*:
//! whatever the true chance of `y` is, stating it earns the most on average. A `p` outside [0, 1] is an error.
//!
//! [`Rule`] holds those that fit a question whose outcome does not depend on the model, as BoolQ's gold answer. Where the
//! outcome is the model's own correctness, a rule needs a term that rewards being right, or being wrong on purpose with
//! confidence 0 pays as much as being right with confidence 1 (SCIENCE 3.4): [`rlcr`], [`rlcr_code`] and
//! [`rewarding_doubt`] have one.

use serde::{Deserialize, Serialize};

/// [`log_raw`] keeps this distance from 0 and 1, so that being certain and wrong costs something finite.
pub const LOG_EPSILON: f64 = 0.01;

/// A number given as a probability that is not one.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{0} is not a probability in [0, 1]")]
pub struct NotAProbability(pub f64);

/// A bounded proper scoring rule, by its name in a config; p_y is the probability given to what happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// 1 − (p − y)², in [0, 1].
    #[default]
    Brier,
    /// 1 − 2(p − y)², in [−1, 1].
    BrierPm1,
    /// 1 − ln clip(p_y, ε, 1 − ε) / ln ε with ε = 0.01, in [0, 1).
    Log,
    /// p_y / √(p² + (1 − p)²), in [0, 1].
    Spherical,
}

impl Rule {
    /// The name in a config and in a reward's parts.
    pub fn name(self) -> &'static str {
        match self {
            Rule::Brier => "brier",
            Rule::BrierPm1 => "brier_pm1",
            Rule::Log => "log",
            Rule::Spherical => "spherical",
        }
    }

    /// The score of stating `p` for an outcome that turned out to be `y`.
    pub fn score(self, p: f64, y: bool) -> Result<f64, NotAProbability> {
        Ok(match self {
            Rule::Brier => 1.0 - squared_error(p, y)?,
            Rule::BrierPm1 => 1.0 - 2.0 * squared_error(p, y)?,
            Rule::Log => 1.0 - log_raw(p, y)? / LOG_EPSILON.ln(),
            Rule::Spherical => probability_of(p, y)? / p.hypot(1.0 - p),
        })
    }

    /// The lowest score that a probability can get: that of being certain and wrong.
    pub fn worst(self) -> f64 {
        match self {
            Rule::BrierPm1 => -1.0,
            Rule::Brier | Rule::Log | Rule::Spherical => 0.0,
        }
    }
}

/// The logarithmic score: ln clip(p_y, ε, 1 − ε) with ε = [`LOG_EPSILON`]; in [ln ε, ln(1 − ε)].
pub fn log_raw(p: f64, y: bool) -> Result<f64, NotAProbability> {
    Ok(probability_of(p, y)?.clamp(LOG_EPSILON, 1.0 - LOG_EPSILON).ln())
}

/// y − (p − y)² with `y` the answer's correctness, in [−1, 1].
pub fn rlcr(p: f64, y: bool) -> Result<f64, NotAProbability> {
    Ok(f64::from(y) - squared_error(p, y)?)
}

/// The reward of RLCR's code: ½ for the format, ½ for a correct answer `y`, ½ (1 − (p − y)²); nothing without the
/// format, that is without a `p`. In [0, 1.5].
pub fn rlcr_code(p: Option<f64>, y: bool) -> Result<f64, NotAProbability> {
    p.map_or(Ok(0.0), |p| Ok(0.5 + 0.5 * f64::from(y) + 0.5 * (1.0 - squared_error(p, y)?)))
}

/// The reward of Rewarding Doubt's code: `level` is the stated confidence from 0 to 10 and `y` the
/// answer's correctness; a log score scaled to about [−10, 10], plus 2.5 for a correct answer; −30 without a valid level.
pub fn rewarding_doubt(level: Option<u32>, y: bool) -> f64 {
    let Some(level) = level.filter(|level| *level <= 10) else {
        return -30.0;
    };
    let confidence = (f64::from(level) / 10.0).clamp(0.001, 0.999);
    let score = if y { confidence.ln() } else { (1.0 - confidence).ln() };
    let (low, high) = (0.001_f64.ln() / 2.0, 0.999_f64.ln());
    10.0 * ((score - low) / (high - low) + 0.25 * f64::from(y))
}

/// (p − y)².
fn squared_error(p: f64, y: bool) -> Result<f64, NotAProbability> {
    Ok((1.0 - probability_of(p, y)?).powi(2))
}

/// The probability that `p` gave to the outcome `y`.
fn probability_of(p: f64, y: bool) -> Result<f64, NotAProbability> {
    if !(0.0..=1.0).contains(&p) {
        return Err(NotAProbability(p));
    }
    Ok(if y { p } else { 1.0 - p })
}
