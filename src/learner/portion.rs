//! One kind of tasks within a step: its trees, what is minimized on them, and what that is divided by.

use std::mem::discriminant;
use std::ops::Range;

use anyhow::{Context as _, Result, bail, ensure};
use candor_environments::{Environment, Target};

use crate::config::Learner as Settings;
use crate::learner::tree::{Branch, Signal, Tree};
use crate::objective::{
    Counts, Implicit, Judged, KlEstimator, Objective, Pair, PolicyGradient, Preference, Sampled, Sequence,
    demonstration, judged, policy_gradient, preference,
};

/// What is minimized on some trees; the target of their tasks decides it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Loss {
    /// The policy gradient of sampled completions, as the learner's settings say.
    Reward,
    /// Supervised fine-tuning.
    Demonstration,
    /// DPO and its relatives, on trees of two branches: chosen, then rejected.
    Preference(Preference),
    /// Implicit calibration.
    Judged(Implicit),
}

impl Loss {
    /// The loss of an environment's tasks with this target.
    pub fn of(target: &Target, environment: &dyn Environment) -> Self {
        match target {
            Target::Reward => Self::Reward,
            Target::Demonstration { .. } => Self::Demonstration,
            Target::Preference { .. } => Self::Preference(environment.preference()),
            Target::Judged { .. } => Self::Judged(environment.implicit()),
        }
    }

    /// Whether both are about the same kind of tasks, and so divided by the same count.
    pub fn is_like(&self, other: &Self) -> bool {
        discriminant(self) == discriminant(other)
    }

    /// What metrics call it: the kind of the tasks.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Reward => "reward",
            Self::Demonstration => "demonstration",
            Self::Preference(_) => "preference",
            Self::Judged(_) => "judged",
        }
    }
}

/// Trees of one step that share a loss.
#[derive(Clone, Debug)]
pub struct Portion {
    /// What is minimized.
    pub loss: Loss,
    /// The weight of this kind of tasks in the step's loss.
    pub share: f64,
    /// The trees.
    pub trees: Vec<Tree>,
}

impl Portion {
    /// A step that has sampled completions only.
    pub fn sampled(trees: Vec<Tree>) -> Self {
        Self { loss: Loss::Reward, share: 1.0, trees }
    }

    /// The temperature of its log-probabilities: what is given was not sampled at any.
    pub fn temperature(&self, sampling: f64) -> f64 {
        if self.loss == Loss::Reward { sampling } else { 1.0 }
    }

    /// The denominators of this portion's kind over the whole step.
    pub fn counts(&self, step: &[Self], max_tokens: usize) -> Counts {
        let of_kind = step.iter().filter(|portion| portion.loss.is_like(&self.loss));
        let trees: Vec<&Tree> = of_kind.flat_map(|portion| &portion.trees).collect();
        let masks = trees.iter().flat_map(|tree| tree.branches.iter().map(|branch| branch.mask_t.as_slice()));
        let mut counts = Counts::of(masks, max_tokens);
        if matches!(self.loss, Loss::Preference(_)) {
            counts.sequences = trees.len() as f64;
        }
        counts
    }

    /// Loss and coefficients, before the share, of branches whose log-probabilities are `logprobs_t` at their ranges;
    /// `kl_t` are the reference's, where `learner.kl` asks for them.
    ///
    /// # Errors
    /// A branch that this loss cannot learn from, a pair that was taken apart, or those of the objective.
    pub fn objective(
        &self,
        branches: &[(&Branch, Range<usize>)],
        logprobs_t: &[f64],
        kl_t: Option<&[f64]>,
        settings: &Settings,
        counts: &Counts,
    ) -> Result<Objective> {
        let sequences = branches.iter().map(|(branch, range)| Sequence {
            logprobs_t: &logprobs_t[range.clone()],
            reference_t: kl_t.map(|kl_t| &kl_t[range.clone()]),
            mask_t: &branch.mask_t,
        });
        let sequences: Vec<Sequence> = sequences.collect();
        let signals = branches.iter().map(|(branch, _)| &branch.signal);
        let each = sequences.iter().zip(signals);
        let wrong = |signal: &Signal| format!("{} tasks cannot be learned from {signal:?}", self.loss.name());
        match &self.loss {
            Loss::Reward => {
                let sampled = each.map(|(&sequence, signal)| match signal {
                    Signal::Reward { behavior_t, advantage } => {
                        Ok(Sampled { sequence, behavior_t, advantage: *advantage })
                    }
                    other => bail!(wrong(other)),
                });
                policy_gradient(&sampled.collect::<Result<Vec<_>>>()?, &policy_settings(settings), counts)
            }
            Loss::Demonstration => demonstration(&sequences, settings.loss_mean, counts),
            Loss::Preference(preferred) => {
                let compared = each.map(|(&sequence, signal)| match signal {
                    Signal::Preference { reference_t } => Ok(Sequence { reference_t: Some(reference_t), ..sequence }),
                    other => bail!(wrong(other)),
                });
                let compared = compared.collect::<Result<Vec<_>>>()?;
                let whole = branches.iter().enumerate().all(|(index, (branch, _))| branch.rollout == index % 2);
                ensure!(whole && compared.len() % 2 == 0, "a pair was split; raise batch.micro_tokens");
                let pairs = compared.chunks_exact(2).map(|pair| Pair { chosen: pair[0], rejected: pair[1] });
                preference(&pairs.collect::<Vec<_>>(), preferred, counts)
            }
            Loss::Judged(implicit) => {
                let rows = each.map(|(&sequence, signal)| match signal {
                    Signal::Judged { correct } => Ok(Judged { sequence, correct: *correct }),
                    other => bail!(wrong(other)),
                });
                judged(&rows.collect::<Result<Vec<_>>>()?, implicit, counts)
            }
        }
        .with_context(|| format!("the {} loss", self.loss.name()))
    }
}

fn policy_settings(settings: &Settings) -> PolicyGradient {
    let Settings { policy_loss, ratio, clip, delta, loss_mean, importance, kl, kl_estimator, .. } = *settings;
    let kl_estimator = kl_estimator.unwrap_or(KlEstimator::K3);
    PolicyGradient { policy_loss, ratio, clip, delta, loss_mean, importance, kl, kl_estimator }
}
