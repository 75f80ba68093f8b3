//! The config file: a typed mirror of every key, read once, checked at once, written back resolved.

mod layers;
mod names;
mod sections;
mod validate;

use std::path::Path;

use anyhow::{Context, Result};
use candor_environments::keys::{self, KeyError};
use serde::{Deserialize, Serialize};

use crate::objective::{Importance, ImportanceLevel, PolicyLoss, Ratio};
use layers::{Layers, Places};
pub use sections::{
    Batch, Checkpoint, Device, Dtype, Endpoint, Environment, Evaluation, Learner, LongPrompts, Lora, Model, Projection,
    Quantization, Reference, SamplerKind, Sampling, Schedule,
};

/// A whole config file. Unknown keys are errors; absent keys take their defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The run's name, which is also its folder's: `results/<name>/`.
    pub name: String,
    /// What every random number of the run is derived from.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// Optimizer steps.
    #[serde(default = "default_steps")]
    pub steps: u64,
    /// Passes over the tasks, in place of `steps`, where every task carries its completions; the last step is filled up from the
    /// pass after.
    pub epochs: Option<u64>,
    /// After so many seconds in which nothing was done, who waits for whom is told; the run goes on.
    #[serde(default = "default_silence")]
    pub silence_seconds: u64,
    /// The frozen base model.
    pub model: Model,
    /// The adapter being trained.
    #[serde(default)]
    pub lora: Lora,
    /// Where tasks and rewards come from; one or several.
    #[serde(default, rename = "environment")]
    pub environments: Vec<Environment>,
    /// The batch sizes.
    #[serde(default)]
    pub batch: Batch,
    /// How completions are sampled in training.
    #[serde(default)]
    pub sampling: Sampling,
    /// The objective and the optimizer.
    #[serde(default)]
    pub learner: Learner,
    /// How the held-out tasks are evaluated.
    #[serde(default)]
    pub evaluation: Evaluation,
    /// When the run is saved.
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// Where the keys were written.
    #[serde(skip)]
    places: Places,
}

fn default_seed() -> u64 {
    17
}

fn default_silence() -> u64 {
    120
}

fn default_steps() -> u64 {
    20
}

impl Config {
    /// Reads and checks a config: the file over the files that it extends, and over it each of `sets`
    /// (`key.path=value`).
    ///
    /// # Errors
    /// A file that cannot be read, is not TOML, has an unknown key or a wrong type, or asks for what cannot work;
    /// the message names the file and line, or the `--set`, and the key.
    pub fn load(path: &Path, sets: &[String]) -> Result<Config> {
        let mut layers = Layers::of(&layers::read(path)?, path)?;
        sets.iter().try_for_each(|set| layers.set(set).with_context(|| format!("--set {set}")))?;
        Config::of(layers)
    }

    /// Checks a config's text; `file` is what errors call it, and where `extends` starts from.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, file: &str) -> Result<Config> {
        Config::of(Layers::of(text, Path::new(file))?)
    }

    fn of(layers: Layers) -> Result<Config> {
        let written = |key: &str| layers.root.get(key).is_some();
        if written("steps") && written("epochs") {
            let problem = KeyError::new("epochs", "stands in place of `steps`, which is set too; remove one of them");
            return Err(layers.places.locate(&problem));
        }
        let weighs = layers.root.get("learner").is_some_and(|learner| learner.get("importance").is_some());
        let mut config: Config =
            keys::typed(layers.root).map_err(|problem| layers.places.locate(&names::explained(problem)))?;
        config.places = layers.places;
        if !weighs {
            config.learner.importance = config.importance();
        }
        config.validate().map_err(|problem| config.locate(problem))?;
        config.learner.reference = Some(config.reference());
        Ok(config)
    }

    /// Where a key such as `environment.0.source` was written: `run.toml:12`, or `--set environment.0.source=…`. For a
    /// key that was not, the table around it; at last the file. A config that was not loaded has no places.
    pub fn place(&self, key: &str) -> Option<String> {
        self.places.nearest(key).map(str::to_string)
    }

    /// The error of a key, its place before it. A key that an environment does not know may be one of another section.
    pub fn locate(&self, problem: KeyError) -> anyhow::Error {
        self.places.locate(&names::explained(problem))
    }

    /// The error of a table's reader, as seen from the whole config: with the place of the key, or of the table.
    pub fn locate_within(&self, table: &str, error: anyhow::Error) -> anyhow::Error {
        match error.downcast::<KeyError>() {
            Ok(problem) => self.locate(problem.within(table)),
            Err(error) => error.context(self.place(table).map_or(table.into(), |place| format!("{place}: {table}"))),
        }
    }

    /// The resolved config as TOML: every key, defaults included. Loading it gives an equal config.
    ///
    /// # Errors
    /// A value that TOML cannot hold, such as a seed above 2⁶³ − 1; no loaded config has one.
    pub fn to_toml(&self) -> Result<String> {
        let written = "cannot write the config as TOML";
        let mut table = toml::Table::try_from(self).context(written)?;
        if self.epochs.is_some() {
            table.remove("steps");
        }
        toml::to_string(&table).context(written)
    }

    /// How samples of an older policy are weighed unless it is said: truncated by the token above level 0, because PPO's clip alone learned
    /// less there (results/reported-async-levels). Losses that treat the ratio in a way of their own are left alone.
    fn importance(&self) -> Importance {
        let Learner { policy_loss, ratio, delta, importance, .. } = &self.learner;
        let plain = (*policy_loss, *ratio, *delta) == (PolicyLoss::Clip, Ratio::Token, None);
        let level = if self.level() > 0 && plain { ImportanceLevel::Token } else { importance.level };
        Importance { level, ..*importance }
    }

    /// How many optimizer steps the sampler may be ahead.
    pub fn level(&self) -> u64 {
        self.sampling.async_level as u64
    }

    /// The policy that the KL term is taken to: as configured, else the starting adapter where there is one.
    pub fn reference(&self) -> Reference {
        let started = self.lora.start_from.is_some();
        self.learner.reference.unwrap_or(if started { Reference::Start } else { Reference::Base })
    }
}
