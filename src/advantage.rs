//! The rewards of a group become advantages (SCIENCE 3.6): plain numbers in, plain numbers out.

use serde::{Deserialize, Serialize};

/// What keeps the division by a tiny standard deviation bounded; TRL's value.
const STD_EPSILON: f64 = 1e-4;

/// How the rewards of one group become advantages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdvantageKind {
    /// R − mean: the default, which keeps a proper scoring rule proper.
    Centered,
    /// R − the mean of the others.
    Rloo,
    /// (R − mean) / (sample standard deviation + 1e-4); under a scoring rule this teaches overconfidence.
    Std,
    /// (R − mean) / mean; zeros where the mean is not positive.
    Maxrl,
}

/// The advantage of each rollout of a group; a rollout without a reward (an error) has none, and is in no mean.
///
/// `None` drops the group: fewer than two, or fewer than half, of its rollouts have a reward. Equal rewards give exact
/// zeros.
pub fn advantages(rewards_g: &[Option<f64>], kind: AdvantageKind) -> Option<Vec<Option<f64>>> {
    let valid = rewards_g.iter().flatten().copied().collect::<Vec<_>>();
    if valid.len() < 2 || 2 * valid.len() < rewards_g.len() {
        return None;
    }
    // Measured from the first reward, the mean of equal rewards is that reward exactly.
    let count = valid.len() as f64;
    let first = valid[0];
    let shift = valid.iter().map(|reward| reward - first).sum::<f64>() / count;
    let centered = |reward: f64| reward - first - shift;

    let scale = match kind {
        AdvantageKind::Centered => 1.0,
        AdvantageKind::Rloo => count / (count - 1.0),
        AdvantageKind::Std => {
            let squares = valid.iter().map(|&reward| centered(reward).powi(2)).sum::<f64>();
            1.0 / ((squares / (count - 1.0)).sqrt() + STD_EPSILON)
        }
        AdvantageKind::Maxrl if first + shift > 0.0 => 1.0 / (first + shift),
        AdvantageKind::Maxrl => 0.0,
    };
    Some(rewards_g.iter().map(|reward| reward.map(|reward| scale * centered(reward))).collect())
}

/// Whether a group's rewards differ, so that it teaches anything.
pub fn is_mixed(rewards_g: &[Option<f64>]) -> bool {
    let mut valid = rewards_g.iter().flatten();
    valid.next().is_some_and(|first| valid.any(|reward| reward != first))
}
