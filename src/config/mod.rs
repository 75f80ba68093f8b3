//! The config file: a typed mirror of every key, read once, checked at once, written back resolved.

mod sections;
mod validate;

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use toml::de::{DeTable, DeValue};

pub use sections::{
    Batch, Checkpoint, Device, Dtype, Endpoint, Environment, Evaluation, Learner, Lora, Model, Projection,
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
    /// Passes over the tasks, in place of `steps`, where every task carries its completions.
    pub epochs: Option<u64>,
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
}

fn default_seed() -> u64 {
    17
}

fn default_steps() -> u64 {
    20
}

impl Config {
    /// Reads and checks a config file.
    ///
    /// # Errors
    /// A file that cannot be read, is not TOML, has an unknown key or a wrong type, or asks for what cannot work;
    /// the message names the file, the line and the key.
    pub fn load(path: &Path) -> Result<Config> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read the config {}", path.display()))?;
        Config::parse(&text, &path.display().to_string())
    }

    /// Checks a config's text; `file` is what errors call it.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, file: &str) -> Result<Config> {
        let mut config: Config = toml::from_str(text).map_err(|error| match error.span().map(|span| span.start) {
            Some(start) => anyhow!("{}: `{}`: {}", place(file, text, start), line_at(text, start), error.message()),
            None => anyhow!("{file}: {}", error.message()),
        })?;
        config.validate().map_err(|problem| match key_start(text, &problem.key) {
            Some(start) => anyhow!("{}: {problem}", place(file, text, start)),
            None => anyhow!("{file}: {problem}"),
        })?;
        config.learner.reference = Some(config.reference());
        Ok(config)
    }

    /// The resolved config as TOML: every key, defaults included. Loading it gives an equal config.
    ///
    /// # Errors
    /// A value that TOML cannot hold, such as a seed above 2⁶³ − 1; no loaded config has one.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).context("cannot write the config as TOML")
    }

    /// The policy that the KL term is taken to: as configured, else the starting adapter where there is one.
    pub fn reference(&self) -> Reference {
        let started = self.lora.start_from.is_some();
        self.learner.reference.unwrap_or(if started { Reference::Start } else { Reference::Base })
    }
}

/// `file:line` of a byte offset, the line counted from 1.
fn place(file: &str, text: &str, start: usize) -> String {
    format!("{file}:{}", text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1)
}

/// The line around a byte offset.
fn line_at(text: &str, start: usize) -> &str {
    let (before, after) = text.split_at_checked(start).unwrap_or((text, ""));
    let (begin, end) = (before.rfind('\n').map_or(0, |newline| newline + 1), after.find('\n').unwrap_or(after.len()));
    text.get(begin..start + end).unwrap_or_default().trim()
}

/// The offset of a key such as `environment.0.weight`, or of the nearest table around it that is in the text.
fn key_start(text: &str, key: &str) -> Option<usize> {
    let root = DeTable::parse(text).ok()?;
    let mut here = &DeValue::Table(root.into_inner());
    let mut start = None;
    for part in key.split('.') {
        let next = match here {
            DeValue::Table(table) => table.get_key_value(part).map(|(name, value)| (name.span(), value)),
            DeValue::Array(items) => {
                part.parse().ok().and_then(|index: usize| items.get(index)).map(|value| (value.span(), value))
            }
            _ => None,
        };
        let Some((span, value)) = next else { break };
        start = Some(span.start);
        here = value.get_ref();
    }
    start
}
