//! The names of metrics: what `metrics.jsonl` and TensorBoard's event files call them, and what they mean. `METRICS.md` is
//! written from this table.

use serde_json::{Map, Value, json};

use crate::run::RowSplit;

/// A metric, or several whose names end in a word of the run's own, where `name` ends in `*`.
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// Whether `NAME/ENVIRONMENT` says the same of one environment.
    pub per_environment: bool,
    /// What it is.
    pub meaning: &'static str,
}

/// What begins the names of metrics that differ from run to run; all others are functions of the config.
pub const MEASURED: [&str; 2] = ["time/", "perf/"];

const fn of_step(name: &'static str, meaning: &'static str) -> Metric {
    Metric { name, per_environment: false, meaning }
}

const fn of_environment(name: &'static str, meaning: &'static str) -> Metric {
    Metric { name, per_environment: true, meaning }
}

/// Every metric there is.
pub const METRICS: &[Metric] = &[
    of_environment("reward/mean", "mean reward of the scored rollouts"),
    of_environment("reward/std", "standard deviation of these rewards, over n − 1, across groups"),
    of_environment("frac_reward_zero_std", "share of groups whose rewards are all the same and teach nothing"),
    of_environment("advantage/abs_mean", "mean absolute advantage of the rollouts that have one"),
    of_environment("parse_rate", "share of scored rollouts that could be read"),
    of_environment("length/mean", "tokens of a completion"),
    of_environment("length/clip_ratio", "share of completions that were cut at `sampling.max_tokens`"),
    of_environment("parts/*", "mean of a part of the reward, over the rollouts that have it"),
    of_environment("metrics/*", "mean of what an environment measures, over the rollouts that have it"),
    of_environment("grades/*", "what a judge said, by SimpleQA's measures (arXiv 2411.04368)"),
    of_environment("score_errors", "rollouts that could not be scored"),
    of_environment("dropped_groups", "groups with too few scores, left out"),
    of_step("loss", "what is minimized; about zero on policy with centered advantages"),
    of_step("loss/*", "the loss of one kind of tasks, before its share"),
    of_step("grad_norm", "L2 norm of the gradient before clipping"),
    of_step("lr", "learning rate"),
    of_step("entropy", "mean entropy of the learner's distributions over tokens, in nats"),
    of_step("clip/low", "share of tokens whose ratio was clipped from below"),
    of_step("clip/high", "share of tokens whose ratio was clipped from above"),
    of_step("ratio/mean", "mean of learner / behavior probability"),
    of_step("ratio/max", "its maximum"),
    of_step("mismatch/mean", "mean |ℓ − behavior ℓ| of a token's log-probabilities, learner and sampler"),
    of_step("mismatch/max", "its maximum; exactly 0 on policy with a row-invariant kernel"),
    of_step("mismatch/k3", "k3 estimate of KL(behavior ‖ learner) per token (Schulman 2020)"),
    of_step("mismatch/masked", "share of tokens that a mask on the mismatch left out"),
    of_step("kl", "estimate of KL(learner ‖ reference) per token, where `learner.kl` asks for it"),
    of_step("rewards/chosen", "DPO: mean of β times log-probability over the reference's, of chosen completions"),
    of_step("rewards/rejected", "the same of rejected ones"),
    of_step("rewards/margins", "chosen minus rejected"),
    of_step("rewards/accuracies", "share of pairs with a positive margin"),
    of_step("logps/chosen", "mean log-probability of chosen completions"),
    of_step("logps/rejected", "the same of rejected ones"),
    of_step("logps/mean", "SFT: mean log-probability of a token"),
    of_step("likelihood/correct", "implicit calibration: mean likelihood of a right answer, by token"),
    of_step("likelihood/wrong", "the same of a wrong one"),
    of_step("given_completions", "completions that tasks carried"),
    of_step(
        "age/mean",
        "optimizer steps between the policy that sampled a rollout and the one that learns from it, on average",
    ),
    of_step("age/max", "the most of them"),
    of_step("age/*", "share of rollouts with so many"),
    of_step("tokens/completion", "tokens of all completions, sampled and given"),
    of_step("tokens/learner", "rows that went through forward and backward"),
    of_environment("eval/reward", "held-out tasks: mean outcome, without shaping"),
    of_environment("eval/parse_rate", "share with a confidence; the four below are over these"),
    of_environment("eval/accuracy", "share that is right"),
    of_environment("eval/brier", "mean (confidence − correct)²"),
    of_environment("eval/bss", "Brier skill score: 1 − Brier / Brier of always stating the accuracy"),
    of_environment("eval/auroc", "chance that a right answer has the higher confidence"),
    of_step("time/sample", "seconds until the last completion; scores are made beside it"),
    of_step("time/score", "seconds from there until the last score"),
    of_step("time/learn", "seconds of the learner"),
    of_step("time/score_wait", "seconds that the learner waited for scores"),
    of_step("time/step", "seconds since the step or evaluation before"),
    of_step("time/eval", "seconds of an evaluation"),
    of_step("perf/tokens_per_s", "tokens of completions per second of the whole step"),
    of_step("perf/sampler_idle", "share of `time/step` in which the sampler waited for a version of the adapter"),
    of_step("perf/learner_idle", "share of it in which the learner waited for completions or scores"),
    of_step("perf/peak_gib", "largest resident size so far, in GiB"),
    of_step(
        "gpu/*",
        "GiB of a GPU's memory: the most so far of base, adapter, keys, activations and head, and the slack that is held ready",
    ),
];

/// A row of `metrics.jsonl`: a step, or an evaluation after so many.
#[derive(Clone, Debug)]
pub struct MetricsRow {
    step: u64,
    split: RowSplit,
    values: Map<String, Value>,
}

impl MetricsRow {
    /// A row that says nothing yet.
    pub fn new(split: RowSplit, step: u64) -> Self {
        Self { step, split, values: Map::new() }
    }

    /// Adds a number; what is not there is left out.
    pub fn put(&mut self, name: impl Into<String>, value: impl Into<Value>) {
        let value = value.into();
        if !value.is_null() {
            self.values.insert(name.into(), value);
        }
    }

    /// A number by its name.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    /// The row in `metrics.jsonl`.
    pub fn to_json(&self) -> Value {
        let mut row = json!({ "step": self.step, "split": self.split });
        row.as_object_mut().expect("it is an object").extend(self.values.clone());
        row
    }

    /// The step, and every number by name.
    pub fn scalars(&self) -> (u64, Vec<(&str, f64)>) {
        let number = |(name, value): (_, &Value)| Some((String::as_str(name), value.as_f64()?));
        (self.step, self.values.iter().filter_map(number).collect())
    }
}
