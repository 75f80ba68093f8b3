//! The loop: sample, score, learn, record.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::advantage::advantages;
use crate::checkpoint;
use crate::event::{Event, Observer};
use crate::learner::{StepShape, optimizer::learning_rate};
use crate::report::{self, StepRecord, Timing};
use crate::rollout::{Collector, Group, SCORE_TIMEOUT, ScoreErrors, trees};
use crate::run::RowSplit;
use crate::sampler::Settings;
use crate::selection::{choose_heldout, choose_tasks};
use crate::setup::Run;

/// How a run ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// It was interrupted after a step and saved.
    Interrupted,
}

/// Trains until the last step, or until `interrupted` is set: then the step is finished and saved first.
///
/// # Errors
/// The first error of any stage; the last checkpoint stays as it is.
pub fn train(run: &mut Run, observer: Observer, interrupted: &AtomicBool) -> Result<Outcome> {
    let mut errors = ScoreErrors::default();
    for step in run.next_step..run.config.steps {
        if is_due(run.config.evaluation.every, step) || step == 0 {
            evaluate(run, step, observer)?;
        }
        let started = Instant::now();
        let adapter = run.learner.adapter().publish(step)?;
        let chosen = choose_tasks(&run.training, run.config.batch.prompts, run.config.seed, step);
        let collector =
            Collector { sources: &run.training, tokenizer: &run.tokenizer, observer, patience: SCORE_TIMEOUT };
        let sampling = training_settings(run, step);
        let groups = collector.collect(&chosen, run.config.batch.group, &mut *run.sampler, Some(&adapter), &sampling);
        let mut groups = groups.with_context(|| format!("step {step}: sampling"))?;
        let sampled = started.elapsed();
        give_advantages(&mut groups, run);
        run.folder.record_generations(RowSplit::Train, step, &groups)?;
        errors.observe(&groups)?;

        let shape = step_shape(run, step);
        let report =
            run.learner.step(&trees(&groups, &run.tokenizer)?, &shape).with_context(|| format!("step {step}"))?;
        let timing = Timing { sampling: sampled, step: started.elapsed() };
        let record = StepRecord { step, groups: &groups, report: &report, shape: &shape, timing };
        run.folder.record_metrics(&record.to_json())?;
        observer(Event::Line(&record.to_line(run.config.steps)));
        if step == 0 {
            record.advice().iter().for_each(|advice| observer(Event::Line(advice)));
        }

        let (next, stop) = (step + 1, interrupted.load(Ordering::Relaxed));
        if stop || next == run.config.steps || is_due(run.config.checkpoint.every, next) {
            run.folder.sync()?;
            checkpoint::save(&run.folder.path, &run.config, &run.learner, next)?;
        }
        if stop && next < run.config.steps {
            return Ok(Outcome::Interrupted);
        }
    }
    evaluate(run, run.config.steps, observer)?;
    Ok(Outcome::Finished)
}

/// Completes the held-out tasks with the adapter as it is after `step` steps, and records the rows.
fn evaluate(run: &mut Run, step: u64, observer: Observer) -> Result<()> {
    let config = &run.config;
    if config.evaluation.tasks == 0 {
        return Ok(());
    }
    let adapter = run.learner.adapter().publish(step)?;
    let chosen = choose_heldout(&run.heldout, config.evaluation.tasks, config.seed);
    let collector = Collector { sources: &run.heldout, tokenizer: &run.tokenizer, observer, patience: SCORE_TIMEOUT };
    let settings = Settings {
        max_tokens: config.evaluation.max_tokens,
        temperature: config.evaluation.temperature,
        ..training_settings(run, step)
    };
    let groups = collector.collect(&chosen, 1, &mut *run.sampler, Some(&adapter), &settings);
    let groups = groups.with_context(|| format!("evaluation after {step} steps"))?;
    run.folder.record_generations(RowSplit::Eval, step, &groups)?;
    observer(Event::Line(&report::evaluation_line(step, &groups)));
    Ok(())
}

fn is_due(every: u64, step: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

fn give_advantages(groups: &mut [Group], run: &Run) {
    for group in groups {
        let Some(advantages) = advantages(&group.rewards(), run.config.learner.advantage) else { continue };
        group.rollouts.iter_mut().zip(advantages).for_each(|(rollout, advantage)| rollout.advantage = advantage);
    }
}

fn training_settings(run: &Run, step: u64) -> Settings {
    let sampling = &run.config.sampling;
    Settings {
        max_tokens: sampling.max_tokens,
        temperature: sampling.temperature,
        stop: sampling.stop.clone(),
        seed: run.config.seed,
        step,
    }
}

fn step_shape(run: &Run, step: u64) -> StepShape {
    let config = &run.config;
    StepShape {
        micro_tokens: config.batch.micro_tokens,
        max_tokens: config.sampling.max_tokens,
        temperature: config.sampling.temperature,
        learning_rate: learning_rate(&config.learner, step, config.steps),
    }
}
