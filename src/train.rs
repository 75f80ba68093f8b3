//! The loop: sample, score, learn, record.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::advantage::advantages;
use crate::alarm::Alarm;
use crate::checkpoint;
use crate::config::Config;
use crate::event::{Event, Observer};
use crate::flow::{Batch, Flow, LearnerEnd, SamplerEnd};
use crate::given::{Given, to_sample};
use crate::heldout::HeldOut;
use crate::learner::{Learner, StepDropout, StepShape, optimizer::learning_rate};
use crate::record::{self, StepRecord, Timing};
use crate::rollout::{Collected, Collector, Group, SCORE_TIMEOUT, ScoreErrors, trees};
use crate::run::{Row, RowSplit, RunFolder};
use crate::sampler::{Interrupted, Sampler, Settings};
use crate::selection::{Source, choose_tasks};
use crate::setup::Run;
use crate::timeline::{Side, Stage, Timeline};
use crate::tokenizer::Tokenizer;

/// How a run ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// It was interrupted and saved.
    Interrupted,
}

/// Trains until the last step, or until `interrupted` is set: then the step at hand is finished and saved first. An evaluation is
/// dropped, and so is what was sampled ahead; both are done again on resume.
///
/// # Errors
/// The first error of any stage; the last checkpoint stays as it is.
pub fn train(run: &mut Run, observer: Observer, interrupted: &AtomicBool) -> Result<Outcome> {
    let timeline = Timeline::new(run.folder.seconds);
    let heard = |event: Event| {
        timeline.heard();
        observer(event);
    };
    let (first, steps) = (run.next_step, run.steps);
    let (mut sampling, mut learning) = sides(run, &heard, &timeline);
    let Config { silence_seconds, checkpoint, .. } = learning.config;
    let (level, silence) = (learning.config.level(), Duration::from_secs(*silence_seconds));
    let flow = Flow { level, silence, observer: &heard, interrupted, timeline: &timeline };

    let start = learning.learner.adapter().publish(first);
    let sample = |learner: &SamplerEnd| {
        for step in first..=steps {
            if sampling.evaluates(step, steps) {
                learner.wait_for(step)?;
                learner.pass_on(sampling.evaluation(step, learner)?)?;
            }
            if step < steps {
                learner.wait_for(step.saturating_sub(level))?;
                learner.pass_on(sampling.batch(step, learner)?)?;
            }
        }
        Ok(())
    };
    let learn = |sampler: &mut LearnerEnd| loop {
        let next = learning.next_step;
        heard(Event::Progress { what: "steps", done: next as usize, total: steps as usize });
        match sampler.next_batch() {
            Ok(None) => return Ok(Outcome::Finished),
            Ok(Some(batch)) if batch.split == RowSplit::Eval => learning.evaluation(batch, sampler)?,
            Ok(Some(batch)) => {
                learning.step(batch, sampler)?;
                let (next, stop) = (learning.next_step, interrupted.load(Ordering::Relaxed));
                if stop || next == steps || is_due(checkpoint.every, next) {
                    learning.save()?;
                }
                if stop && next < steps {
                    return Ok(Outcome::Interrupted);
                }
                sampler.publish(learning.learner.adapter().publish(next))?;
            }
            Err(error) if error.is::<Interrupted>() => {
                learning.save()?;
                return Ok(Outcome::Interrupted);
            }
            Err(error) => return Err(error),
        }
    };
    flow.run(start, sample, learn)
}

/// What each of the two threads works with.
fn sides<'a>(run: &'a mut Run, observer: Observer<'a>, timeline: &'a Timeline) -> (Sampling<'a>, Learning<'a>) {
    let Run { config, folder, tokenizer, training, heldout, sampler, given, learner, steps, next_step } = run;
    let sampling = Sampling { config, training, heldout, tokenizer, sampler: &mut **sampler, observer, timeline };
    let alarm = Alarm::new(config, learner.kernel());
    let learning = Learning {
        config,
        training,
        tokenizer,
        folder,
        given,
        learner,
        observer,
        timeline,
        steps: *steps,
        next_step: *next_step,
        errors: ScoreErrors::default(),
        alarm,
        through: Instant::now(),
        waited: [Duration::ZERO; 2],
    };
    (sampling, learning)
}

/// The sampler's side.
struct Sampling<'a> {
    config: &'a Config,
    training: &'a [Source],
    heldout: &'a [Source],
    tokenizer: &'a Tokenizer,
    sampler: &'a mut dyn Sampler,
    observer: Observer<'a>,
    timeline: &'a Timeline,
}

impl Sampling<'_> {
    /// The rollouts of a step: of those of its tasks that do not carry their completions.
    fn batch(&mut self, step: u64, learner: &SamplerEnd) -> Result<Batch> {
        let Self { config, training, tokenizer, observer, .. } = *self;
        self.timeline.works(Side::Sampler, format!("sampling for step {step}"));
        let chosen = to_sample(training, &choose_tasks(training, config.batch.prompts, config.seed, step))?;
        let collector = Collector { sources: training, tokenizer, observer, what: "rollouts" };
        let (policy, settings) = (learner.policy(step, RowSplit::Train), Settings::training(config, step));
        let unscored = collector.sample(&chosen, config.batch.group, self.sampler, &policy, &settings);
        let unscored = unscored.with_context(|| format!("step {step}: sampling"))?;
        Ok(Batch { step, split: RowSplit::Train, unscored })
    }

    /// Whether the held-out tasks are completed after so many steps.
    fn evaluates(&self, step: u64, steps: u64) -> bool {
        !self.heldout.is_empty() && (step == 0 || step == steps || is_due(self.config.evaluation.every, step))
    }

    /// Completions of the held-out tasks with the adapter as it is after `step` steps.
    fn evaluation(&mut self, step: u64, learner: &SamplerEnd) -> Result<Batch> {
        let Self { config, heldout, tokenizer, observer, .. } = *self;
        self.timeline.works(Side::Sampler, format!("evaluating after {step} steps"));
        let held_out = HeldOut { config, samples: 1, sources: heldout, tokenizer, observer };
        let unscored = held_out.sample(self.sampler, &learner.policy(step, RowSplit::Eval), step)?;
        Ok(Batch { step, split: RowSplit::Eval, unscored })
    }
}

/// The learner's side.
struct Learning<'a> {
    config: &'a Config,
    training: &'a [Source],
    tokenizer: &'a Tokenizer,
    folder: &'a mut RunFolder,
    given: &'a mut Given,
    learner: &'a mut Learner,
    observer: Observer<'a>,
    timeline: &'a Timeline,
    steps: u64,
    next_step: u64,
    errors: ScoreErrors,
    alarm: Alarm,
    /// When the batch before was done with, and how long each side had waited until then.
    through: Instant,
    waited: [Duration; 2],
}

impl Learning<'_> {
    /// Waits for the scores of a step's rollouts, learns from them and from completions that tasks carry, and records it all.
    fn step(&mut self, batch: Batch, sampler: &mut LearnerEnd) -> Result<()> {
        let (step, config, tokenizer, observer) = (batch.step, self.config, self.tokenizer, self.observer);
        let waiting = Instant::now();
        let Collected { mut groups, sampled, scored } = self.scored(batch, sampler, config.level())?;
        let score_wait = waiting.elapsed();
        for group in &mut groups {
            let Some(advantages) = advantages(&group.rewards(), config.learner.advantage) else { continue };
            group.rollouts.iter_mut().zip(advantages).for_each(|(rollout, advantage)| rollout.advantage = advantage);
        }
        let rows = Row::all(RowSplit::Train, step, &groups);
        self.folder.record_generations(&rows)?;
        self.folder.record_logprobs(RowSplit::Train, step, &groups, tokenizer)?;
        self.errors.observe(&rows)?;

        let (learning, shape) = (Instant::now(), self.shape(step));
        let failed = || format!("step {step}");
        self.timeline.works(Side::Learner, format!("learning from step {step}"));
        let chosen = choose_tasks(self.training, config.batch.prompts, config.seed, step);
        let trees = trees(&groups, tokenizer).with_context(failed)?;
        let tasks = (self.training, &chosen[..]);
        let portions = self.given.portions(tasks, trees, self.learner, tokenizer, config.batch.micro_tokens);
        let portions = portions.with_context(failed)?;
        let mut layer_done = |done, total| {
            observer(Event::Progress { what: "learning", done, total });
            sampler.go_on()
        };
        let report = self.learner.step(&portions, &shape, &mut layer_done).with_context(failed)?;
        let learned = Instant::now();
        let timing = self.timing([sampled, scored, [learning, learned]], score_wait);
        let record = StepRecord { step, rows: &rows, portions: &portions, report: &report, shape: &shape, timing };
        self.folder.record_metrics(&record.to_row())?;
        observer(Event::Line(&record.to_line(self.steps)));
        if step == 0 {
            record.advice().iter().for_each(|advice| observer(Event::Line(advice)));
        }
        let stages = [(Stage::Sample, sampled), (Stage::Score, scored), (Stage::Learn, [learning, learned])];
        self.record_spans(step, &stages)?;
        self.next_step = step + 1;
        self.alarm.hear(step, &report, observer)
    }

    /// Waits for the scores of held-out tasks and records them: all of them or none.
    fn evaluation(&mut self, batch: Batch, sampler: &mut LearnerEnd) -> Result<()> {
        let (step, split) = (batch.step, RowSplit::Eval);
        let Collected { groups, sampled, scored } = self.scored(batch, sampler, 0)?;
        let rows = Row::all(split, step, &groups);
        self.errors.observe(&rows)?;
        self.folder.record_generations(&rows)?;
        self.folder.record_logprobs(split, step, &groups, self.tokenizer)?;
        self.folder.record_metrics(&record::evaluation_row(step, &rows, sampled[0].elapsed())?)?;
        (self.observer)(Event::Line(&record::evaluation_line(step, &rows)));
        (self.through, self.waited) = (Instant::now(), self.timeline.waited());
        self.record_spans(step, &[(Stage::Evaluate, sampled), (Stage::Score, scored)])
    }

    /// The scores of a batch, of which no rollout may be from a version older than `level` steps.
    fn scored(&self, batch: Batch, sampler: &mut LearnerEnd, level: u64) -> Result<Collected> {
        let Batch { step, split, unscored } = batch;
        let mut go_on = |missing| {
            self.timeline.waits(Side::Learner, format!("waiting for {missing} scores of step {step}"));
            sampler.go_on()
        };
        let collected = unscored.scored(self.tokenizer, SCORE_TIMEOUT, &mut go_on);
        let collected = collected.with_context(|| match split {
            RowSplit::Train => format!("step {step}: sampling"),
            RowSplit::Eval => format!("evaluation after {step} steps"),
        })?;
        self.timeline.works(Side::Learner, format!("recording step {step}"));
        check_versions(&collected.groups, step.saturating_sub(level)..=step)?;
        Ok(collected)
    }

    /// A checkpoint, never newer than its rows on the disk.
    fn save(&mut self) -> Result<()> {
        let (started, next) = (Instant::now(), self.next_step);
        self.timeline.works(Side::Learner, format!("saving after {next} steps"));
        self.folder.sync()?;
        checkpoint::save(&self.folder.path, self.config, self.learner, next)?;
        self.record_spans(next, &[(Stage::Save, [started, Instant::now()])])
    }

    fn record_spans(&mut self, step: u64, stages: &[(Stage, [Instant; 2])]) -> Result<()> {
        let spans = stages.iter().map(|&(stage, times)| self.timeline.span(stage, step, times));
        self.folder.record_spans(spans)
    }

    /// How long the parts of a step took, and how much of the time since the last one each side waited.
    fn timing(&mut self, [sampled, scored, learned]: [[Instant; 2]; 3], score_wait: Duration) -> Timing {
        let (step, waited) = (self.through.elapsed(), self.timeline.waited());
        let idle = [0, 1].map(|side| (waited[side] - self.waited[side]).as_secs_f64() / step.as_secs_f64());
        (self.through, self.waited) = (Instant::now(), waited);
        Timing {
            sample: sampled[1] - sampled[0],
            score: scored[1].saturating_duration_since(sampled[1]),
            score_wait,
            learn: learned[1] - learned[0],
            step,
            idle,
        }
    }

    fn shape(&self, step: u64) -> StepShape {
        let (config, share) = (self.config, self.config.lora.dropout);
        StepShape {
            micro_tokens: config.batch.micro_tokens,
            max_tokens: config.sampling.max_tokens,
            temperature: config.sampling.temperature,
            learning_rate: learning_rate(&config.learner, step, self.steps),
            dropout: (share > 0.0).then_some(StepDropout { share, seed: config.seed, step }),
        }
    }
}

/// Staleness is prevented where groups are admitted; a sampler that does it wrong is not believed.
fn check_versions(groups: &[Group], allowed: RangeInclusive<u64>) -> Result<()> {
    let versions = |group: &Group| group.rollouts.iter().map(|rollout| rollout.generation.version).collect::<Vec<_>>();
    let (first, last) = (allowed.start(), allowed.end());
    for (group, version) in groups.iter().flat_map(|group| versions(group).into_iter().map(move |one| (group, one))) {
        ensure!(
            allowed.contains(&version),
            "task {}: a completion is from version {version} of the adapter, where only {first} to {last} may be sampled",
            group.task.id
        );
    }
    Ok(())
}

/// Whether something that is done every so many steps is done before this one; 0 is never.
pub fn is_due(every: u64, step: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
