//! Shaping of a completion's length (SCIENCE 3.2): a term that is added to the outcome's score. With L the token limit,
//! lengths from a = L/5 to b = 4L/5 cost nothing. Added, never multiplied, and independent of the stated probability, it
//! leaves a proper scoring rule proper.

use serde::{Deserialize, Serialize};

use crate::KeyError;

/// How lengths outside [a, b] are penalised: a config's `length = { mode = "soft", weight = 0.25 }`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case", deny_unknown_fields)]
#[serde(expecting = "a table such as { mode = \"soft\" }")]
pub enum Length {
    /// Not at all.
    None {},
    /// By weight · s(x), s(x) = 3x² − 2x³: without a step or a kink at a and b.
    Soft {
        /// The largest penalty.
        #[serde(default = "default_weight")]
        weight: f64,
    },
    /// By the whole weight.
    Hard {
        /// The penalty.
        #[serde(default = "default_weight")]
        weight: f64,
    },
    /// By x, as the BoolQ reference run (SPAR) did: up to 1, more than the scores of a group differ, so that length is
    /// learned first.
    Spar {},
}

impl Default for Length {
    fn default() -> Length {
        Length::None {}
    }
}

/// Larger penalties outweigh the differences between scores (SCIENCE 3.5).
fn default_weight() -> f64 {
    0.25
}

impl Length {
    /// Fails on a weight that is no penalty.
    pub fn check(&self) -> Result<(), KeyError> {
        match *self {
            Length::Soft { weight } | Length::Hard { weight } if !(weight.is_finite() && weight >= 0.0) => {
                Err(KeyError::new("weight", format!("{weight} should be a number from 0 up")))
            }
            _ => Ok(()),
        }
    }

    /// The penalty, zero or negative, on a completion of `tokens` tokens where at most `limit` were allowed; `None` where
    /// length is not shaped. Fractional counts serve the reference run, which counted characters / 4.
    pub fn penalty(&self, tokens: f64, limit: f64) -> Option<f64> {
        // How far outside: 0 on [a, b], 1 at no tokens and at the limit.
        let (low, high) = (limit / 5.0, 4.0 * limit / 5.0);
        let outside = if tokens < low {
            (low - tokens) / low
        } else if tokens > high {
            ((tokens - high) / (limit - high)).min(1.0)
        } else {
            0.0
        };
        match *self {
            Length::None {} => None,
            Length::Soft { weight } => Some(-weight * outside * outside * (3.0 - 2.0 * outside)),
            Length::Hard { weight } => Some(if outside > 0.0 { -weight } else { 0.0 }),
            Length::Spar {} => Some(-outside),
        }
    }
}
