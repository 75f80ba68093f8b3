//! What a step says about itself: the row of `metrics.jsonl`, the line that a person reads, and advice after the first.

use std::fs;
use std::time::Duration;

use candor_environments::{Finish, ParseStatus};
use serde_json::{Value, json};

use crate::advantage::is_mixed;
use crate::grades::Grades;
use crate::learner::portion::{Loss, Portion};
use crate::learner::{StepReport, StepShape};
use crate::objective::Metrics;
use crate::rollout::{Group, Rollout};

/// How long the parts of a step took.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Sampling and scoring.
    pub sampling: Duration,
    /// The whole step.
    pub step: Duration,
}

/// Everything there is to say about one training step.
pub struct StepRecord<'a> {
    /// The step, from 0.
    pub step: u64,
    /// Its rollouts, with advantages.
    pub groups: &'a [Group],
    /// What it learned from, by kind of tasks.
    pub portions: &'a [Portion],
    /// What the learner did.
    pub report: &'a StepReport,
    /// How it did it.
    pub shape: &'a StepShape,
    /// How long it took.
    pub timing: Timing,
}

/// Counts over the rollouts of a batch.
struct Counts {
    rollouts: usize,
    scored: usize,
    reward: f64,
    parsed: usize,
    cut: usize,
    tokens: usize,
    mixed: usize,
    dropped: usize,
}

impl Counts {
    fn of(groups: &[Group]) -> Self {
        let all = || groups.iter().flat_map(|group| &group.rollouts);
        let count = |f: fn(&Rollout) -> bool| all().filter(|rollout| f(rollout)).count();
        Self {
            rollouts: all().count(),
            scored: count(|rollout| rollout.score.is_ok()),
            reward: all().filter_map(Rollout::reward).sum(),
            parsed: count(|rollout| rollout.score.as_ref().is_ok_and(|score| score.parse == ParseStatus::Ok)),
            cut: count(|rollout| rollout.generation.finish == Finish::Length),
            tokens: all().map(|rollout| rollout.generation.ids.len()).sum(),
            mixed: groups.iter().filter(|group| is_mixed(&group.rewards())).count(),
            dropped: groups
                .iter()
                .filter(|group| group.rollouts.iter().all(|rollout| rollout.advantage.is_none()))
                .count(),
        }
    }

    fn mean_reward(&self) -> Option<f64> {
        (self.scored > 0).then(|| self.reward / self.scored as f64)
    }

    fn parse_rate(&self) -> Option<f64> {
        (self.scored > 0).then(|| self.parsed as f64 / self.scored as f64)
    }
}

/// A number for people, or a dash where there is none.
pub fn shown(value: Option<f64>, decimals: usize) -> String {
    value.map_or("-".into(), |value| format!("{value:.decimals$}"))
}

impl StepRecord<'_> {
    /// The row of `metrics.jsonl`. Everything under `timing` differs from run to run, nothing else does.
    pub fn to_json(&self) -> Value {
        let counts = Counts::of(self.groups);
        let mut environment = Metrics::default();
        let scores =
            self.groups.iter().flat_map(|group| &group.rollouts).filter_map(|rollout| rollout.score.as_ref().ok());
        for (name, value) in scores.flat_map(|score| score.metrics.iter().chain(&score.parts)) {
            environment.mean(name, *value, 1.0);
        }
        let share = |count: usize, of: usize| (of > 0).then(|| count as f64 / of as f64);
        let (given, given_tokens) = self.given();
        json!({
            "step": self.step,
            "reward": counts.mean_reward(),
            "parse_rate": counts.parse_rate(),
            "mixed_groups": share(counts.mixed, self.groups.len()),
            "dropped_groups": counts.dropped,
            "score_errors": counts.rollouts - counts.scored,
            "cut_share": share(counts.cut, counts.rollouts),
            "mean_tokens": share(counts.tokens, counts.rollouts),
            "environment": environment.values(),
            "grades": Grades::of_groups(self.groups),
            "given_completions": given,
            "loss": self.report.loss,
            "losses": self.report.losses,
            "grad_norm": self.report.grad_norm,
            "learning_rate": self.shape.learning_rate,
            "objective": self.report.metrics.values(),
            "completion_tokens": counts.tokens + given_tokens,
            "learner_rows": self.report.tokens,
            "timing": {
                "sampling_seconds": self.timing.sampling.as_secs_f64(),
                "step_seconds": self.timing.step.as_secs_f64(),
                "peak_memory_bytes": peak_memory(),
            },
        })
    }

    /// The completions that were given, and their tokens.
    fn given(&self) -> (usize, usize) {
        let given = self.portions.iter().filter(|portion| portion.loss != Loss::Reward);
        let branches = given.flat_map(|portion| &portion.trees).flat_map(|tree| &tree.branches);
        branches.fold((0, 0), |(count, tokens), branch| (count + 1, tokens + branch.ids.len()))
    }

    /// The line that a person reads while it runs, in 80 columns where one kind of tasks is trained on. The loss of an on-policy
    /// step is about zero by construction, so the gradient norm stands in its place.
    pub fn to_line(&self, steps: u64) -> String {
        let counts = Counts::of(self.groups);
        let (given, given_tokens) = self.given();
        let mut line = format!("step {:>width$}/{steps}", self.step + 1, width = steps.to_string().len());
        if !self.groups.is_empty() {
            let (reward, parsed) = (counts.mean_reward(), counts.parse_rate().map(|rate| 100.0 * rate));
            let (reward, parsed) = (shown(reward, 3), shown(parsed, 0));
            line += &format!("  reward {reward:>6}  parsed {parsed:>3}%  mixed {}/{}", counts.mixed, self.groups.len());
        }
        for (kind, loss) in self.report.losses.iter().filter(|(kind, _)| **kind != Loss::Reward.name()) {
            line += &format!("  {kind} loss {loss:.4}");
        }
        for (metric, words) in [("reward_margin", "margin"), ("reward_accuracy", "preferred")] {
            let value = self.report.metrics.values().get(metric).copied();
            line += &value.map(|value| format!("  {words} {value:.3}")).unwrap_or_default();
        }
        let completions = counts.rollouts + given;
        let tokens = (completions > 0).then(|| (counts.tokens + given_tokens) as f64 / completions as f64);
        let seconds = self.timing.step.as_secs_f64();
        let decimals = if seconds < 10.0 { 1 } else { 0 };
        line + &format!("  tokens {}  grad {:.3}  {seconds:.decimals$} s", shown(tokens, 0), self.report.grad_norm)
    }

    /// What to change when the first step shows that there is little to learn from.
    pub fn advice(&self) -> Vec<String> {
        let counts = Counts::of(self.groups);
        let mut advice = Vec::new();
        if let Some(rate) = counts.parse_rate().filter(|rate| *rate < 0.05) {
            advice.push(format!(
                "only {:.1}% of the first rollouts could be read, so almost nothing is rewarded: show the format in the \
                 prompt (examples = \"two\"), raise sampling.max_tokens if completions are cut ({} of {} were), or start \
                 from an adapter that knows the format (lora.start_from)",
                100.0 * rate,
                counts.cut,
                counts.rollouts
            ));
        }
        if (counts.mixed as f64) < 0.3 * self.groups.len() as f64 {
            advice.push(format!(
                "only {} of the first {} groups have rewards that differ, and only those teach: raise batch.group or \
                 sampling.temperature, or choose tasks that the model does not always fail or always solve",
                counts.mixed,
                self.groups.len()
            ));
        }
        advice
    }
}

/// The line after an evaluation.
pub fn evaluation_line(step: u64, groups: &[Group]) -> String {
    let counts = Counts::of(groups);
    format!(
        "evaluation after {step} steps  reward {}  parsed {}%  ({} tasks)",
        shown(counts.mean_reward(), 3),
        shown(counts.parse_rate().map(|rate| 100.0 * rate), 0),
        groups.len()
    )
}

/// The largest resident size of this process so far, in bytes, where the system tells.
pub fn peak_memory() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM:")
}

/// The resident size of this process now, in bytes, where the system tells.
pub fn resident_memory() -> Option<u64> {
    kilobytes("/proc/self/status", "VmRSS:")
}

/// The memory of this machine that is free to be used, in bytes, where the system tells.
pub fn available_memory() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemAvailable:")
}

/// Pages that this process has touched for the first time so far, where the system tells.
pub fn page_faults() -> Option<u64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // Fields are counted from behind the program's name, which may hold anything: the eighth is minflt, the tenth majflt.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(7)?.parse::<u64>().ok()? + fields.get(9)?.parse::<u64>().ok()?)
}

fn kilobytes(file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}
