//! The loop: sample, score, learn, record.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::advantage::advantages;
use crate::checkpoint;
use crate::event::{Event, Observer};
use crate::given;
use crate::heldout::HeldOut;
use crate::learner::{StepDropout, StepShape, optimizer::learning_rate, portion::Portion};
use crate::policy::Adapter;
use crate::record::{self, StepRecord, Timing};
use crate::rollout::{Collected, Collector, Group, SCORE_TIMEOUT, ScoreErrors, trees};
use crate::run::{Row, RowSplit};
use crate::sampler::{Interrupted, PolicyFeed, Settings};
use crate::selection::{Choice, choose_tasks};
use crate::setup::Run;

/// How a run ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// It was interrupted and saved.
    Interrupted,
}

/// Trains until the last step, or until `interrupted` is set: then the step at hand is finished and saved first; an evaluation
/// is dropped, and done again on resume.
///
/// # Errors
/// The first error of any stage; the last checkpoint stays as it is.
pub fn train(run: &mut Run, observer: Observer, interrupted: &AtomicBool) -> Result<Outcome> {
    let stop = || interrupted.load(Ordering::Relaxed);
    let (steps, mut errors) = (run.steps, ScoreErrors::default());
    for step in run.next_step..steps {
        if (is_due(run.config.evaluation.every, step) || step == 0)
            && evaluate(run, step, observer, &mut errors, &stop)? == Outcome::Interrupted
        {
            save(run, step)?;
            return Ok(Outcome::Interrupted);
        }
        observer(Event::Progress { what: "steps", done: step as usize, total: steps as usize });
        let started = Instant::now();
        let chosen = choose_tasks(&run.training, run.config.batch.prompts, run.config.seed, step);
        let collected = collect(run, &chosen, step, observer).with_context(|| format!("step {step}: sampling"))?;
        let Collected { groups, sample, score } = collected;
        let rows = Row::all(RowSplit::Train, step, &groups);
        run.folder.record_generations(&rows)?;
        run.folder.record_logprobs(RowSplit::Train, step, &groups, &run.tokenizer)?;
        errors.observe(&rows)?;

        let learning = Instant::now();
        let shape = step_shape(run, step);
        let portions = portions(run, &chosen, &groups).with_context(|| format!("step {step}"))?;
        let report = run.learner.step(&portions, &shape, observer).with_context(|| format!("step {step}"))?;
        let timing = Timing { sample, score, learn: learning.elapsed(), step: started.elapsed() };
        let record = StepRecord { step, rows: &rows, portions: &portions, report: &report, shape: &shape, timing };
        run.folder.record_metrics(&record.to_row())?;
        observer(Event::Line(&record.to_line(steps)));
        if step == 0 {
            record.advice().iter().for_each(|advice| observer(Event::Line(advice)));
        }

        let next = step + 1;
        if stop() || next == steps || is_due(run.config.checkpoint.every, next) {
            save(run, next)?;
        }
        if stop() && next < steps {
            return Ok(Outcome::Interrupted);
        }
    }
    observer(Event::Progress { what: "steps", done: steps as usize, total: steps as usize });
    evaluate(run, steps, observer, &mut errors, &stop)
}

/// A checkpoint, never newer than its rows on the disk.
fn save(run: &mut Run, next_step: u64) -> Result<()> {
    run.folder.sync()?;
    checkpoint::save(&run.folder.path, &run.config, &run.learner, next_step)
}

/// Samples and scores the rollouts of those chosen tasks that do not carry their completions, and gives them their
/// advantages.
fn collect(run: &mut Run, chosen: &[Choice], step: u64, observer: Observer) -> Result<Collected> {
    let Run { config, training, tokenizer, sampler, learner, .. } = run;
    let sampled = given::to_sample(training, chosen)?;
    if sampled.is_empty() {
        return Ok(Collected::default());
    }
    let adapter = Some(Arc::new(learner.adapter().publish(step)));
    let collector = Collector { sources: training, tokenizer, observer, patience: SCORE_TIMEOUT, what: "rollouts" };
    let settings = Settings::training(config, step);
    let mut collected = collector.collect(&sampled, config.batch.group, &mut **sampler, &adapter, &settings)?;
    for group in &mut collected.groups {
        let Some(advantages) = advantages(&group.rewards(), config.learner.advantage) else { continue };
        group.rollouts.iter_mut().zip(advantages).for_each(|(rollout, advantage)| rollout.advantage = advantage);
    }
    Ok(collected)
}

/// What a step learns from: its rollouts, and the completions that tasks carry.
fn portions(run: &mut Run, chosen: &[Choice], groups: &[Group]) -> Result<Vec<Portion>> {
    let Run { config, training, tokenizer, given, learner, .. } = run;
    let sampled = trees(groups, tokenizer)?;
    given.portions((training, chosen), sampled, learner, tokenizer, config.batch.micro_tokens)
}

/// Completes the held-out tasks with the adapter as it is after `step` steps, and records the rows: all of them or none.
fn evaluate(
    run: &mut Run,
    step: u64,
    observer: Observer,
    errors: &mut ScoreErrors,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Outcome> {
    let Run { config, heldout, tokenizer, sampler, learner, folder, .. } = run;
    if heldout.is_empty() {
        return Ok(Outcome::Finished);
    }
    let started = Instant::now();
    let policy = Until { adapter: Arc::new(learner.adapter().publish(step)), stop };
    let held_out = HeldOut { config, samples: 1, sources: heldout, tokenizer, observer };
    let groups = match held_out.complete(&mut **sampler, &policy, step) {
        Err(error) if error.is::<Interrupted>() => return Ok(Outcome::Interrupted),
        groups => groups?,
    };
    let rows = Row::all(RowSplit::Eval, step, &groups);
    errors.observe(&rows)?;
    folder.record_generations(&rows)?;
    folder.record_logprobs(RowSplit::Eval, step, &groups, tokenizer)?;
    folder.record_metrics(&record::evaluation_row(step, &rows, started.elapsed())?)?;
    observer(Event::Line(&record::evaluation_line(step, &rows)));
    Ok(Outcome::Finished)
}

/// One policy until somebody wants to stop.
struct Until<'a> {
    adapter: Arc<Adapter>,
    stop: &'a (dyn Fn() -> bool + Sync),
}

impl PolicyFeed for Until<'_> {
    fn newest(&self) -> Option<Arc<Adapter>> {
        Some(self.adapter.clone())
    }

    fn stopped(&self) -> bool {
        (self.stop)()
    }
}

/// Whether something that is done every so many steps is done before this one; 0 is never.
pub fn is_due(every: u64, step: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

fn step_shape(run: &Run, step: u64) -> StepShape {
    let (config, share) = (&run.config, run.config.lora.dropout);
    StepShape {
        micro_tokens: config.batch.micro_tokens,
        max_tokens: config.sampling.max_tokens,
        temperature: config.sampling.temperature,
        learning_rate: learning_rate(&config.learner, step, run.steps),
        dropout: (share > 0.0).then_some(StepDropout { share, seed: config.seed, step }),
    }
}
