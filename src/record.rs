//! What a step and an evaluation say about themselves: the row of `metrics.jsonl`, the line that a person reads, and advice
//! after the first step.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::Result;
use candor_environments::{Finish, ParseStatus};
use serde_json::{Map, Value};

use crate::advantage::is_mixed;
use crate::grades::Grades;
use crate::learner::portion::{Loss, Portion};
use crate::learner::{StepReport, StepShape};
use crate::metrics::MetricsRow;
use crate::run::{Row, RowSplit};
use crate::summary::Evaluated;

/// How long the parts of a step took.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Until the last completion.
    pub sample: Duration,
    /// From there until the last score.
    pub score: Duration,
    /// What the learner waited for scores.
    pub score_wait: Duration,
    /// The learner.
    pub learn: Duration,
    /// Since the step or evaluation before.
    pub step: Duration,
    /// The shares of that in which the sampler waited, and the learner.
    pub idle: [f64; 2],
}

/// Everything there is to say about one training step.
pub struct StepRecord<'a> {
    /// The step, from 0.
    pub step: u64,
    /// Its rollouts as `generations.jsonl` holds them, with advantages.
    pub rows: &'a [Row],
    /// What it learned from, by kind of tasks.
    pub portions: &'a [Portion],
    /// What the learner did.
    pub report: &'a StepReport,
    /// How it did it.
    pub shape: &'a StepShape,
    /// How long it took.
    pub timing: Timing,
}

/// Bytes of a GiB.
pub const GIB: f64 = (1u64 << 30) as f64;

/// What is to be said of a step's rollouts: of all, and of each environment's.
pub fn put_rollouts(metrics: &mut MetricsRow, rows: &[&Row]) {
    put_rows(metrics, "", rows);
    let mut by_environment: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    rows.iter().for_each(|row| by_environment.entry(&row.environment).or_default().push(row));
    for (environment, rows) in by_environment {
        put_rows(metrics, &format!("/{environment}"), &rows);
    }
}

/// The same of some rollouts, under names that end in `suffix`.
fn put_rows(metrics: &mut MetricsRow, suffix: &str, rows: &[&Row]) {
    if rows.is_empty() {
        return;
    }
    let counts = Counts::of(rows.iter().copied());
    let share = |count: usize, of: usize| (of > 0).then(|| count as f64 / of as f64);
    let mut put = |name: &str, value: Option<f64>| metrics.put(format!("{name}{suffix}"), value);
    put("reward/mean", counts.mean_reward());
    put("reward/std", standard_deviation(&rows.iter().filter_map(|row| row.reward).collect::<Vec<_>>()));
    put("frac_reward_zero_std", share(counts.flat, counts.groups - counts.dropped));
    put("advantage/abs_mean", mean(&rows.iter().filter_map(|row| row.advantage.map(f64::abs)).collect::<Vec<_>>()));
    put("parse_rate", counts.parse_rate());
    put("length/mean", share(counts.tokens, counts.rollouts));
    put("length/clip_ratio", share(counts.cut, counts.rollouts));
    for (kind, fields) in
        [("parts", (|row| &row.parts) as fn(&Row) -> &Map<String, Value>), ("metrics", |row| &row.metrics)]
    {
        let mut values: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for (name, value) in rows.iter().flat_map(|row| fields(row)) {
            values.entry(name).or_default().extend(value.as_f64());
        }
        values.into_iter().for_each(|(name, values)| put(&format!("{kind}/{name}"), mean(&values)));
    }
    let grades = Grades::of(rows).map(|(grades, _)| grades.to_json()).unwrap_or_default();
    grades.into_iter().for_each(|(name, value)| metrics.put(format!("grades/{name}{suffix}"), value));
    metrics.put(format!("score_errors{suffix}"), counts.rollouts - counts.scored);
    metrics.put(format!("dropped_groups{suffix}"), counts.dropped);
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Of a sample: over n − 1.
fn standard_deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values)?;
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt())
}

/// Counts over the rollouts of a batch.
#[derive(Default)]
struct Counts {
    rollouts: usize,
    scored: usize,
    reward: f64,
    parsed: usize,
    cut: usize,
    tokens: usize,
    groups: usize,
    /// Groups whose rewards differ.
    mixed: usize,
    /// Groups that were not dropped, though their rewards are all the same.
    flat: usize,
    dropped: usize,
}

impl Counts {
    fn of<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Self {
        let rows: Vec<&Row> = rows.into_iter().collect();
        let mut counts = Self::default();
        for row in &rows {
            counts.rollouts += 1;
            counts.scored += usize::from(row.error.is_none());
            counts.reward += row.reward.unwrap_or(0.0);
            counts.parsed += usize::from(row.error.is_none() && row.parse == Some(ParseStatus::Ok));
            counts.cut += usize::from(row.finish == Finish::Length);
            counts.tokens += row.tokens;
        }
        for group in rows.chunk_by(|one, other| (one.step, one.group) == (other.step, other.group)) {
            let mixed = is_mixed(&group.iter().map(|row| row.reward).collect::<Vec<_>>());
            let dropped = group.iter().all(|row| row.advantage.is_none());
            counts.groups += 1;
            counts.mixed += usize::from(mixed);
            counts.flat += usize::from(!mixed && !dropped);
            counts.dropped += usize::from(dropped);
        }
        counts
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
    /// The row of `metrics.jsonl`.
    pub fn to_row(&self) -> MetricsRow {
        let mut row = MetricsRow::new(RowSplit::Train, self.step);
        put_rollouts(&mut row, &self.rows.iter().collect::<Vec<_>>());
        let Self { report, shape, timing, .. } = self;
        let (given, given_tokens) = self.given();
        let tokens = given_tokens + Counts::of(self.rows).tokens;
        row.put("given_completions", given);
        row.put("loss", report.loss);
        report.losses.iter().for_each(|(kind, loss)| row.put(format!("loss/{kind}"), *loss));
        row.put("grad_norm", report.grad_norm);
        row.put("lr", shape.learning_rate);
        report.metrics.values().into_iter().for_each(|(name, value)| row.put(name, value));
        row.put("tokens/completion", tokens);
        row.put("tokens/learner", report.tokens);
        self.put_ages(&mut row);
        let Timing { sample, score, score_wait, learn, step, idle: [sampler, learner] } = timing;
        for (name, took) in
            [("sample", sample), ("score", score), ("score_wait", score_wait), ("learn", learn), ("step", step)]
        {
            row.put(format!("time/{name}"), took.as_secs_f64());
        }
        row.put("perf/tokens_per_s", tokens as f64 / step.as_secs_f64());
        row.put("perf/sampler_idle", *sampler);
        row.put("perf/learner_idle", *learner);
        row.put("perf/peak_gib", peak_memory().map(|bytes| bytes as f64 / GIB));
        report.gpu.iter().for_each(|(name, bytes)| row.put(format!("gpu/{name}_gib"), *bytes as f64 / GIB));
        row
    }

    /// How many steps old the policies of the rollouts were.
    fn put_ages(&self, row: &mut MetricsRow) {
        let ages: Vec<u64> = self.rows.iter().map(|row| row.step.saturating_sub(row.policy_version)).collect();
        let Some(&oldest) = ages.iter().max() else { return };
        row.put("age/mean", ages.iter().sum::<u64>() as f64 / ages.len() as f64);
        row.put("age/max", oldest);
        for age in 0..=oldest {
            row.put(format!("age/{age}"), ages.iter().filter(|&&one| one == age).count() as f64 / ages.len() as f64);
        }
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
        let counts = Counts::of(self.rows);
        let (given, given_tokens) = self.given();
        let mut line = format!("step {:>width$}/{steps}", self.step + 1, width = steps.to_string().len());
        if !self.rows.is_empty() {
            let (reward, parsed) = (counts.mean_reward(), counts.parse_rate().map(|rate| 100.0 * rate));
            let (reward, parsed) = (shown(reward, 3), shown(parsed, 0));
            line += &format!("  reward {reward:>6}  parsed {parsed:>3}%  mixed {}/{}", counts.mixed, counts.groups);
        }
        for (kind, loss) in self.report.losses.iter().filter(|(kind, _)| **kind != Loss::Reward.name()) {
            line += &format!("  {kind} loss {loss:.4}");
        }
        for (metric, words) in [("rewards/margins", "margin"), ("rewards/accuracies", "preferred")] {
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
        let counts = Counts::of(self.rows);
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
        if (counts.mixed as f64) < 0.3 * counts.groups as f64 {
            advice.push(format!(
                "only {} of the first {} groups have rewards that differ, and only those teach: raise batch.group or \
                 sampling.temperature, or choose tasks that the model does not always fail or always solve",
                counts.mixed, counts.groups
            ));
        }
        advice
    }
}

/// The row of `metrics.jsonl` after an evaluation, from its rows of `generations.jsonl`.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn evaluation_row(step: u64, rows: &[Row], took: Duration) -> Result<MetricsRow> {
    let mut metrics = MetricsRow::new(RowSplit::Eval, step);
    let rows: Vec<&Row> = rows.iter().collect();
    let mut put = |suffix: &str, evaluated: &Evaluated| {
        let Evaluated { reward, accuracy, brier, brier_skill, auroc, .. } = *evaluated;
        let parse_rate = (evaluated.tasks > 0).then(|| evaluated.parsed as f64 / evaluated.tasks as f64);
        let named = [
            ("reward", reward),
            ("parse_rate", parse_rate),
            ("accuracy", accuracy),
            ("brier", brier),
            ("bss", brier_skill),
            ("auroc", auroc),
        ];
        named.into_iter().for_each(|(name, value)| metrics.put(format!("eval/{name}{suffix}"), value));
    };
    put("", &Evaluated::of(&rows)?);
    for (environment, evaluated) in Evaluated::by_environment(&rows)? {
        put(&format!("/{environment}"), &evaluated);
    }
    metrics.put("time/eval", took.as_secs_f64());
    Ok(metrics)
}

/// The line after an evaluation.
pub fn evaluation_line(step: u64, rows: &[Row]) -> String {
    let counts = Counts::of(rows);
    format!(
        "evaluation after {step} steps  reward {}  parsed {}%  ({} tasks)",
        shown(counts.mean_reward(), 3),
        shown(counts.parse_rate().map(|rate| 100.0 * rate), 0),
        counts.groups
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
