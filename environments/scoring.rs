//! Scoring rules (SCIENCE 3.3): what a stated probability `p` is worth once the outcome `y` is known. All are *proper*:
//! whatever the true chance of `y` is, stating it earns the most on average. A `p` outside [0, 1] is an error.
//!
//! [`Rule`] holds those that fit a question whose outcome does not depend on the model, as BoolQ's gold answer. Where the
//! outcome is the model's own correctness, a rule needs a term that rewards being right, or being wrong on purpose with
//! confidence 0 pays as much as being right with confidence 1 (SCIENCE 3.4): [`OwnRule`] holds those that have one, and
//! those that need it.

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

/// A scoring rule of the confidence c in one's own answer, by its name in a config; y is 1 where the answer is correct.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnRule {
    /// y − (c − y)², in [−1, 1] (RLCR, Damani et al. 2025).
    #[default]
    Rlcr,
    /// As RLCR's code: ½ for the format, ½ y, ½ (1 − (c − y)²); nothing without the format.
    RlcrCode,
    /// As Rewarding Doubt's code: a log score of c in tenths, +2.5 for a correct answer; −30 where c is no whole tenth.
    RewardingDoubt,
    /// 1 − (c − y)², in [0, 1], with `correctness_weight`.
    Brier,
    /// 1 − 2(c − y)², in [−1, 1], with `correctness_weight`.
    BrierPm1,
    /// 1 − ln clip(c_y, ε, 1 − ε) / ln ε with ε = 0.01, in [0, 1), with `correctness_weight`.
    Log,
    /// c_y / √(c² + (1 − c)²), in [0, 1], with `correctness_weight`.
    Spherical,
}

impl OwnRule {
    /// The rule for outcomes that do not depend on who states the probability, where this is one.
    fn exogenous(self) -> Option<Rule> {
        match self {
            OwnRule::Rlcr | OwnRule::RlcrCode | OwnRule::RewardingDoubt => None,
            OwnRule::Brier => Some(Rule::Brier),
            OwnRule::BrierPm1 => Some(Rule::BrierPm1),
            OwnRule::Log => Some(Rule::Log),
            OwnRule::Spherical => Some(Rule::Spherical),
        }
    }

    /// The name in a config and in a reward's parts.
    pub fn name(self) -> &'static str {
        match self {
            OwnRule::Rlcr => "rlcr",
            OwnRule::RlcrCode => "rlcr_code",
            OwnRule::RewardingDoubt => "rewarding_doubt",
            other => other.exogenous().map_or("", Rule::name),
        }
    }

    /// The score of stating `c` for an answer that turned out to be correct or not.
    pub fn score(self, c: f64, correct: bool) -> Result<f64, NotAProbability> {
        match self {
            OwnRule::Rlcr => rlcr(c, correct),
            OwnRule::RlcrCode => rlcr_code(Some(c), correct),
            OwnRule::RewardingDoubt => {
                probability_of(c, correct)?;
                let tenths = (10.0 * c).round();
                Ok(rewarding_doubt(((10.0 * c - tenths).abs() < 1e-9).then_some(tenths as u32), correct))
            }
            other => other.exogenous().map_or(Err(NotAProbability(c)), |rule| rule.score(c, correct)),
        }
    }

    /// The lowest score there is.
    pub fn worst(self) -> f64 {
        match self {
            OwnRule::Rlcr => -1.0,
            OwnRule::RlcrCode => 0.0,
            OwnRule::RewardingDoubt => rewarding_doubt(None, false),
            other => other.exogenous().map_or(0.0, Rule::worst),
        }
    }

    /// What a correct answer has to earn beside the rule, so that being right pays whatever one's chance of it: minus the
    /// least slope of the best expected score. `None` where the rule itself sees to it (SCIENCE 3.4).
    pub fn needed_weight(self) -> Option<f64> {
        self.exogenous().map(|rule| match rule {
            Rule::Brier | Rule::Spherical => 1.0,
            Rule::BrierPm1 => 2.0,
            Rule::Log => ((1.0 - LOG_EPSILON) / LOG_EPSILON).ln() / -LOG_EPSILON.ln(),
        })
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
