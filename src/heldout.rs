//! Held-out tasks: completed with a policy and scored, during a run or by `candor eval`.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::Device;

use crate::config::Config;
use crate::event::Observer;
use crate::inputs::Inputs;
use crate::model_files::Policy;
use crate::peft;
use crate::policy::Adapter;
use crate::rollout::{Collector, SCORE_TIMEOUT, ScoreErrors, Unscored};
use crate::run::{Row, RowSplit};
use crate::sampler::local::LocalSampler;
use crate::sampler::{PolicyFeed, Sampler, Settings};
use crate::selection::{Source, choose_heldout};
use crate::setup::Options;
use crate::tokenizer::Tokenizer;

/// What held-out tasks are completed with.
pub struct HeldOut<'a> {
    /// How many tasks, and how they are sampled.
    pub config: &'a Config,
    /// Completions of each.
    pub samples: usize,
    /// Where the tasks come from.
    pub sources: &'a [Source],
    /// Turns prompts into tokens and tokens into text.
    pub tokenizer: &'a Tokenizer,
    /// Who hears how far it is.
    pub observer: Observer<'a>,
}

impl HeldOut<'_> {
    /// Completes the tasks of every source, with the policy as it is after `step` steps, and has them scored.
    ///
    /// # Errors
    /// As [`Collector::sample`].
    pub fn sample(&self, sampler: &mut dyn Sampler, policy: &dyn PolicyFeed, step: u64) -> Result<Unscored> {
        let Self { config, samples, sources, tokenizer, observer } = *self;
        let chosen = choose_heldout(sources, config.evaluation.tasks, config.seed);
        let collector = Collector { sources, tokenizer, observer, what: "held-out tasks" };
        let sampled = collector.sample(&chosen, samples, sampler, policy, &Settings::evaluation(config, step));
        sampled.with_context(|| format!("evaluation after {step} steps"))
    }
}

/// An evaluation that is ready to start.
pub struct Evaluation {
    config: Config,
    samples: usize,
    sources: Vec<Source>,
    tokenizer: Arc<Tokenizer>,
    sampler: LocalSampler,
    adapter: Option<Arc<Adapter>>,
}

impl Evaluation {
    /// Loads the model and held-out tasks of a config, and the PEFT adapter in a folder if there is one. The adapter's rank,
    /// scale and targets are its own, not the config's. Every task is to be completed `samples` times.
    ///
    /// # Errors
    /// If anything that the config names, or the adapter, is not what it should be; several completions that would all be the same.
    pub fn prepare(config: Config, adapter: Option<&Path>, samples: usize, options: &Options) -> Result<Self> {
        ensure!(config.evaluation.tasks > 0, "evaluation.tasks is 0, so there is nothing to evaluate; raise it");
        ensure!(
            samples == 1 || config.evaluation.temperature > 0.0,
            "evaluation.temperature is 0, so {samples} completions of a task would be the same; raise it"
        );
        // A slip in its name is told before anything is fetched.
        adapter.map(peft::described).transpose().context("--adapter")?;
        let Inputs { model, heldout, judges, .. } =
            Inputs::for_evaluation(&config, options.environments, options.observer)?;
        let Policy { model, tokenizer, adapter } = model.policy(adapter, &Device::Cpu, options.observer)?;
        let base = || Ok((model.clone(), tokenizer.clone()));
        judges.iter().try_for_each(|judge| judge.load(&base, options.observer))?;
        let sampler = LocalSampler::new(model, tokenizer.clone());
        Ok(Self { config, samples, sources: heldout, tokenizer, sampler, adapter })
    }

    /// Completes and scores the tasks: a row for every completion.
    ///
    /// # Errors
    /// As [`Collector::sample`] and [`Unscored::scored`].
    pub fn run(&mut self, observer: Observer) -> Result<Vec<Row>> {
        let Self { config, samples, sources, tokenizer, sampler, adapter } = self;
        let heldout = HeldOut { config, samples: *samples, sources, tokenizer, observer };
        let unscored = heldout.sample(sampler, adapter, 0)?;
        let rows = Row::all(RowSplit::Eval, 0, &unscored.scored(tokenizer, SCORE_TIMEOUT, &mut |_| Ok(()))?.groups);
        ScoreErrors::default().observe(&rows)?;
        Ok(rows)
    }
}
