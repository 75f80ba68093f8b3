//! Subjects: what curves and tables are of, one run on one environment; its rollouts by step, phase, and first and last.

use std::collections::BTreeMap;

use anyhow::Result;
use candor_environments::ParseStatus;

use super::read::RecordedRun;
use crate::evaluation::Predictions;
use crate::evaluation::answers::Answers;
use crate::generations::Recorded;
use crate::run::RowSplit;

/// Parts that training is divided into.
const PHASES: [&str; 3] = ["First third of training", "Second third", "Last third"];

/// One run on one environment.
pub struct Subject<'a> {
    /// Its name in legends and tables.
    pub title: String,
    /// Index of the run.
    pub run: usize,
    /// The environment's name.
    pub environment: &'a str,
    /// Training rollouts by step.
    pub training: BTreeMap<u64, Vec<&'a Recorded>>,
    /// Evaluations by the steps done before them.
    pub evaluations: BTreeMap<u64, Vec<&'a Recorded>>,
}

/// Some rollouts with a name.
pub struct Part<'a> {
    /// What they are, such as `Held out, after 20 steps`.
    pub title: String,
    /// The rollouts.
    pub rollouts: Vec<&'a Recorded>,
}

impl<'a> Subject<'a> {
    /// The subjects of some runs: by run, then by environment's name. Runs and environments are named where there are several.
    pub fn of(runs: &'a [RecordedRun]) -> Vec<Self> {
        let mut subjects = Vec::new();
        for (index, run) in runs.iter().enumerate() {
            let mut of_run: BTreeMap<&str, Self> = BTreeMap::new();
            for rollout in &run.rollouts {
                let environment = rollout.environment.as_str();
                let subject = of_run.entry(environment).or_insert_with(|| Self {
                    title: run.name.clone(),
                    run: index,
                    environment,
                    training: BTreeMap::new(),
                    evaluations: BTreeMap::new(),
                });
                let steps = match rollout.split {
                    RowSplit::Train => &mut subject.training,
                    RowSplit::Eval => &mut subject.evaluations,
                };
                steps.entry(rollout.step).or_default().push(rollout);
            }
            subjects.extend(of_run.into_values());
        }
        let several = subjects.iter().any(|subject| subject.environment != subjects[0].environment);
        for subject in subjects.iter_mut().filter(|_| several) {
            let environment = subject.environment;
            subject.title =
                if runs.len() > 1 { format!("{} · {environment}", subject.title) } else { environment.into() };
        }
        subjects
    }

    /// Training in groups of so many steps, from step 0.
    pub fn groups(&self, size: u64) -> BTreeMap<u64, Vec<&'a Recorded>> {
        let mut groups: BTreeMap<u64, Vec<&Recorded>> = BTreeMap::new();
        self.training.iter().for_each(|(step, rollouts)| groups.entry(step / size).or_default().extend(rollouts));
        groups
    }

    /// The parts that reliability is shown of, by name, so that runs of different lengths can be compared: before, thirds of
    /// training, after.
    pub fn phases(&self) -> Vec<Part<'a>> {
        let mut parts = Vec::new();
        let evaluations: Vec<_> = self.evaluations.values().collect();
        let evaluation =
            |title: &str, rollouts: &[&'a Recorded]| Part { title: title.into(), rollouts: rollouts.to_vec() };
        parts.extend(
            evaluations.first().filter(|_| evaluations.len() > 1).map(|first| evaluation("Held out, before", first)),
        );
        let steps = self.training.len();
        let third = |step: usize| if steps < PHASES.len() { 0 } else { step * PHASES.len() / steps };
        for (phase, title) in PHASES.iter().enumerate().take(if steps < PHASES.len() { 1 } else { PHASES.len() }) {
            let of_phase = self.training.values().enumerate().filter(|(step, _)| third(*step) == phase);
            let rollouts: Vec<&Recorded> = of_phase.flat_map(|(_, rollouts)| rollouts.iter().copied()).collect();
            let title = if steps < PHASES.len() { "Training" } else { title };
            parts.extend((!rollouts.is_empty()).then(|| Part { title: title.into(), rollouts }));
        }
        let title = if evaluations.len() > 1 { "Held out, after" } else { "Held out" };
        parts.extend(evaluations.last().map(|last| evaluation(title, last)));
        parts
    }

    /// What is compared as first and last: two evaluations, else the first and last step of training; one where there are not two.
    pub fn ends(&self) -> Vec<Part<'a>> {
        let (steps, what) = match self.evaluations.len() {
            0 | 1 if self.training.len() > 1 || self.evaluations.is_empty() => (&self.training, "Training, step"),
            _ => (&self.evaluations, "Held out, after"),
        };
        let mut ends: Vec<_> = steps.first_key_value().into_iter().chain(steps.last_key_value()).collect();
        ends.dedup_by_key(|(step, _)| **step);
        let part = |(step, rollouts): (&u64, &Vec<&'a Recorded>)| {
            let steps = if what.ends_with("after") { if *step == 1 { " step" } else { " steps" } } else { "" };
            Part { title: format!("{what} {step}{steps}"), rollouts: rollouts.clone() }
        };
        ends.into_iter().map(part).collect()
    }
}

/// The answers among some rollouts: those that are known to be right or wrong. `None` where there is none.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn answers(rollouts: &[&Recorded]) -> Result<Option<Answers>> {
    let mut judged = rollouts.iter().filter(|rollout| rollout.correct.is_some()).peekable();
    if judged.peek().is_none() {
        return Ok(None);
    }
    Answers::new(judged.map(|rollout| (rollout.task.as_str(), rollout.confidence, rollout.correct == Some(true))))
        .map(Some)
}

/// What calibration is measured on: the answers that state a confidence. `None` where there is none.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn predictions(rollouts: &[&Recorded]) -> Result<Option<Predictions>> {
    Ok(answers(rollouts)?.and_then(|answers| answers.predictions()))
}

/// The share of scored rollouts that could be read; `None` where none was scored.
pub fn parse_rate(rollouts: &[&Recorded]) -> Option<f64> {
    let scored: Vec<_> = rollouts.iter().filter(|rollout| rollout.reward.is_some()).collect();
    let parsed = scored.iter().filter(|rollout| rollout.parse == Some(ParseStatus::Ok)).count();
    (!scored.is_empty()).then(|| parsed as f64 / scored.len() as f64)
}

/// The mean of what is known; `None` where nothing is.
pub fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}
