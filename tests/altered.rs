//! Runs of the toy with something in their way: a sampler or an environment that waits, fails or lies.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};
use candor::checkpoint;
use candor::config::Config;
use candor::event::Event;
use candor::run::each_span;
use candor::sampler::{Generation, PolicyFeed, Request, Sampler, Settings};
use candor::setup::{Options, Run};
use candor::timeline::Span;
use candor::train::{Outcome, train};
use candor_environments::{Completion, Environment, Load, Score, ScoreError, Task};
use tempfile::{TempDir, tempdir};

use crate::toy::{config, load, within};

/// What is done before each batch is sampled; told the step, and whether anybody still wants it.
pub type Before = Box<dyn FnMut(u64, &dyn PolicyFeed) -> Result<()> + Send>;

/// The run's own sampler, with something done before each batch and to each completion.
struct Altered {
    own: Box<dyn Sampler>,
    before: Before,
    after: fn(&Settings, &mut Generation),
}

impl Sampler for Altered {
    fn sample(
        &mut self,
        requests: &[Request],
        policy: &dyn PolicyFeed,
        settings: &Settings,
        finished: &mut dyn FnMut(Generation) -> Result<()>,
    ) -> Result<()> {
        (self.before)(settings.step, policy)?;
        self.own.sample(requests, policy, settings, &mut |mut generation| {
            (self.after)(settings, &mut generation);
            finished(generation)
        })
    }
}

/// What a test does to a run before it starts.
pub type Change = Box<dyn FnOnce(&mut Run) + Send>;

pub fn unchanged() -> Change {
    Box::new(|_| {})
}

pub fn before(f: impl FnMut(u64, &dyn PolicyFeed) -> Result<()> + Send + 'static) -> Change {
    altered(f, |_, _| {})
}

pub fn altered(
    f: impl FnMut(u64, &dyn PolicyFeed) -> Result<()> + Send + 'static,
    after: fn(&Settings, &mut Generation),
) -> Change {
    Box::new(move |run: &mut Run| {
        let own = std::mem::replace(&mut run.sampler, Box::new(Nobody));
        run.sampler = Box::new(Altered { own, before: Box::new(f), after });
    })
}

/// Who samples while a sampler is taken out of a run.
struct Nobody;

impl Sampler for Nobody {
    fn sample(
        &mut self,
        _: &[Request],
        _: &dyn PolicyFeed,
        _: &Settings,
        _: &mut dyn FnMut(Generation) -> Result<()>,
    ) -> Result<()> {
        bail!("nobody samples")
    }
}

/// Events as a test keeps them: lines, warnings after `warning: `, and the progress of learning.
pub type Said = Arc<Mutex<Vec<String>>>;

/// A run and what became of it.
pub struct Ended {
    pub results: TempDir,
    pub outcome: Result<Outcome>,
    pub said: Vec<String>,
}

impl Ended {
    pub fn folder(&self) -> PathBuf {
        self.results.path().join("toy")
    }

    #[track_caller]
    pub fn error(&self) -> String {
        format!("{:#}", self.outcome.as_ref().expect_err("the run fails"))
    }

    pub fn spans(&self) -> Vec<Span> {
        each_span(&self.folder().join("spans.jsonl")).unwrap()
    }

    /// The step that the newest checkpoint goes on with.
    pub fn saved(&self) -> Option<u64> {
        Some(checkpoint::state(&checkpoint::newest(&self.folder()).unwrap()?).unwrap().next_step)
    }
}

/// What is done at each layer that the learner is through with, and at which lines somebody presses ctrl-C.
pub type Watched<'a> = (&'a (dyn Fn(usize, usize) + Sync), fn(&str) -> bool);

/// A run that must end within minutes. `learning` is called at each layer that the learner is through with, `interrupts` with every
/// line: whether somebody presses ctrl-C at it.
pub fn run_with(
    config: Config,
    change: Change,
    learning: impl Fn(usize, usize) + Send + Sync + 'static,
    interrupts: fn(&str) -> bool,
) -> Ended {
    within(180, move || {
        let (results, said) = (tempdir().unwrap(), Said::default());
        let outcome = go_on(results.path(), &config, false, change, (&learning, interrupts), &said);
        let said = std::mem::take(&mut *said.lock().unwrap());
        Ended { results, outcome, said }
    })
}

pub fn go_on(
    results: &Path,
    config: &Config,
    resume: bool,
    change: Change,
    (learning, interrupts): Watched,
    said: &Said,
) -> Result<Outcome> {
    let interrupted = AtomicBool::new(false);
    let observer = |event: Event| {
        let line = match event {
            Event::Line(line) => line.to_string(),
            Event::Warning(warning) => format!("warning: {warning}"),
            Event::Progress { what: "learning", done, total } => return learning(done, total),
            Event::Progress { .. } => return,
        };
        if interrupts(&line) {
            interrupted.store(true, Ordering::Relaxed);
        }
        said.lock().unwrap().push(line);
    };
    let options = Options { results, resume, environments: &[("toy", load as Load)], observer: &observer };
    let mut run = Run::prepare(config.clone(), &options)?;
    change(&mut run);
    train(&mut run, &observer, &interrupted)
}

pub fn at_level(level: u64, changes: &str) -> Config {
    config(&format!("sampling.async_level = {level}\n{changes}"))
}

pub fn no_pause(_: usize, _: usize) {}

pub fn never(_: &str) -> bool {
    false
}

/// An environment whose scores wait for something, or fail, by their number.
struct Gated {
    own: Arc<dyn Environment>,
    gate: Box<dyn Fn(u64) + Send + Sync>,
    asked: AtomicU64,
}

impl Environment for Gated {
    fn num_tasks(&self) -> usize {
        self.own.num_tasks()
    }

    fn task(&self, index: usize) -> Task {
        self.own.task(index)
    }

    fn score(&self, index: usize, completion: &Completion) -> Result<Score, ScoreError> {
        (self.gate)(self.asked.fetch_add(1, Ordering::Relaxed));
        self.own.score(index, completion)
    }
}

pub fn gated(gate: impl Fn(u64) + Send + Sync + 'static) -> Change {
    Box::new(move |run: &mut Run| {
        let own = run.training[0].environment.clone();
        run.training[0].environment = Arc::new(Gated { own, gate: Box::new(gate), asked: AtomicU64::new(0) });
    })
}
