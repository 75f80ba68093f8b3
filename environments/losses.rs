//! How tasks that carry their completions are learned from: the settings of their losses, which the engine computes.

use serde::{Deserialize, Serialize};

use crate::KeyError;

/// The loss of a preference pair; ε is the smoothing, the chance that the pair is labeled the wrong way round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreferenceLoss {
    /// −ln σ(βΔ): DPO.
    #[default]
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

/// How preference pairs are learned from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preference {
    /// The loss.
    pub loss: PreferenceLoss,
    /// How strongly the reference holds.
    pub beta: f64,
    /// ε of `smoothed` and `robust`.
    pub smoothing: f64,
}

impl Default for Preference {
    fn default() -> Preference {
        Preference { loss: PreferenceLoss::Sigmoid, beta: 0.1, smoothing: 0.0 }
    }
}

impl Preference {
    /// Fails on settings that mean nothing, or nothing together; the error names the key.
    pub fn check(&self) -> Result<(), KeyError> {
        let Preference { beta, smoothing, loss } = *self;
        let smooth = matches!(loss, PreferenceLoss::Smoothed | PreferenceLoss::Robust);
        if !(beta > 0.0 && beta.is_finite()) {
            return Err(KeyError::new("beta", format!("is {beta}; it must be above 0")));
        }
        if !(0.0..0.5).contains(&smoothing) {
            return Err(KeyError::new("smoothing", format!("is {smoothing}; it must be in [0, 0.5)")));
        }
        if !smooth && smoothing != 0.0 {
            let text = format!("is {smoothing}, which only loss = \"smoothed\" and \"robust\" use; remove it");
            return Err(KeyError::new("smoothing", text));
        }
        Ok(())
    }
}

/// How a completion's likelihood p is pulled toward its correctness y.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JudgedLoss {
    /// λ(p − y)².
    #[default]
    Mse,
    /// −λ[y ln p + (1 − y) ln(1 − p)], continued as a straight line in ln p where its slope would exceed 5.
    Log,
}

/// How judged completions are learned from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Implicit {
    /// The form of the calibration term.
    pub loss: JudgedLoss,
    /// Its weight.
    pub lambda: f64,
    /// Leave the likelihood of wrong completions out: otherwise a small λ goes on raising it.
    pub lm_on_correct_only: bool,
}

impl Default for Implicit {
    fn default() -> Implicit {
        Implicit { loss: JudgedLoss::Mse, lambda: 0.1, lm_on_correct_only: true }
    }
}

impl Implicit {
    /// Fails on settings that mean nothing; the error names the key.
    pub fn check(&self) -> Result<(), KeyError> {
        if !(self.lambda > 0.0 && self.lambda.is_finite()) {
            return Err(KeyError::new("lambda", format!("is {}; it must be above 0", self.lambda)));
        }
        Ok(())
    }
}
