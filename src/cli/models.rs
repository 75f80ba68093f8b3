//! The commands on a model rather than on a config.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Args, value_parser};
use serde::Serialize;
use serde::de::value::{Error as ValueError, StrDeserializer};
use serde::de::{DeserializeOwned, IntoDeserializer};

use super::Failure;
use super::console::Console;
use crate::calibration_map::CalibrationMap;
use crate::config::Dtype;
use crate::event::{Event, Observer};
use crate::export;
use crate::logprob;
use crate::sample::{self, Prompts};
use crate::sampler::Settings;

/// What all of them take.
#[derive(Args)]
pub struct Base {
    /// A folder, a .gguf file, hf:org/name[@revision][/path] or pip:name==version[/path]
    pub model: String,
    /// A PEFT adapter folder, such as results/NAME/checkpoints/step-000020; without it, the model as it is
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
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
    /// What is computed in: f32, bf16, or auto for the fastest
    #[arg(long, value_parser = word::<Dtype>, default_value = "f32")]
    dtype: Dtype,
}

impl Logprob {
    /// Runs it.
    pub fn run(&self, observer: Observer, console: &Console) -> Result<u8, Failure> {
        let Self { base: Base { model, adapter, .. }, file, dtype } = self;
        let prepared = logprob::Logprob::prepare(model, file, adapter.as_deref(), *dtype, observer);
        let prepared = prepared.map_err(Failure::Input)?;
        let print = &mut |scored| print(&scored, console);
        prepared.run(observer, print).map_err(Failure::Run)?;
        Ok(0)
    }
}

const SAMPLE: &str = "\
Every row holds one of:
  prompt    a text that is continued as it is
  messages  a chat, [{\"role\": \"user\", \"content\": \"...\"}], for the chat template
  question  a chat of one message; a plain text if there is no chat template

Printed: every row, in order, with \"completion\", \"finish\", \"tokens\",
\"mean_logprob\" and \"confidence\" in place of its own fields of these names. Mean
and confidence are at temperature 1; the confidence is the geometric mean of the
probabilities of the completion's tokens that are text. With --calibrate also
\"uncalibrated_confidence\" and \"calibrated_confidence\": what the map is for, as
the completion or the probabilities of its answer state it, and what it becomes.";

/// `candor sample`.
#[derive(Args)]
#[command(override_usage = "candor sample [OPTIONS] <MODEL> <FILE|--prompt <TEXT>...>")]
#[command(after_help = SAMPLE, group = ArgGroup::new("prompts").required(true).args(["file", "prompt"]))]
pub struct Sample {
    #[command(flatten)]
    pub base: Base,
    /// Rows as JSON lines, plain or .gz, or .parquet
    file: Option<PathBuf>,
    /// A question, or a text to continue if there is no chat template; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Vec<String>,
    /// Completions of every prompt
    #[arg(long, value_name = "N", default_value = "1", value_parser = value_parser!(u32).range(1..=65536))]
    samples: u32,
    /// A text that ends a completion; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    #[command(flatten)]
    sampling: Sampling,
    /// The softmax temperature; 0 takes the most likely token
    #[arg(long, value_name = "T", default_value = "1", value_parser = temperature)]
    temperature: f64,
    /// A map of candor eval: rows get the confidence that it is for, and the calibrated one
    #[arg(long, value_name = "FILE")]
    calibrate: Option<PathBuf>,
    #[command(flatten)]
    format: Format,
}

/// What a model that only talks is computed in.
#[derive(Args)]
pub struct Format {
    /// f32, bf16, int8 (weights rounded: half the memory to walk through, faster for few completions at a time), or auto
    #[arg(long, value_parser = word::<Dtype>, default_value = "auto")]
    pub dtype: Dtype,
}

/// How completions are made.
#[derive(Args)]
pub struct Sampling {
    /// Tokens after which a completion is cut
    #[arg(long, value_name = "N", default_value = "512")]
    max_tokens: NonZeroUsize,
    /// The same seed gives the same completions
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
}

impl Sampling {
    /// With the temperature and stop strings, all that a sampler is told.
    pub fn settings(&self, temperature: f64, stop: &[String]) -> Settings {
        let Self { max_tokens, seed } = *self;
        Settings { max_tokens: max_tokens.get(), temperature, stop: stop.to_vec(), seed, step: 0 }
    }
}

impl Sample {
    /// Runs it.
    pub fn run(&self, observer: Observer, console: &Console) -> Result<u8, Failure> {
        let Self { base, file, prompt, samples, stop, sampling, temperature, calibrate, format } = self;
        let Base { model, adapter, .. } = base;
        let (samples, settings) = (*samples as usize, sampling.settings(*temperature, stop));
        let map = calibrate.as_deref().map(CalibrationMap::read).transpose().map_err(Failure::Input)?;
        map.as_ref().map_or(Ok(()), |map| map.reader().map(drop)).context("--calibrate").map_err(Failure::Input)?;
        let prompts = file.as_deref().map_or(Prompts::Written(prompt), Prompts::File);
        let sample =
            sample::Sample::prepare((model, format.dtype), prompts, adapter.as_deref(), samples, settings, observer);
        let print = &mut |row| print(&row, console);
        sample.map_err(Failure::Input)?.run(map.as_ref(), observer, print).map_err(Failure::Run)?;
        Ok(0)
    }
}

const EXPORT: &str = "\
Weights become W + scale * B * A, computed in f32 and then written as --dtype.
A folder holds safetensors, config.json and the tokenizer's files, for
transformers and vLLM; a GGUF file is for llama.cpp, its vectors stay f32.";

/// `candor export`.
#[derive(Args)]
#[command(after_help = EXPORT)]
pub struct Export {
    #[command(flatten)]
    pub base: Base,
    /// The folder, or the .gguf file, to be made; nothing is overwritten
    out: PathBuf,
    /// safetensors or gguf; without it, as OUT's name ends
    #[arg(long, value_parser = word::<export::Format>)]
    format: Option<export::Format>,
    /// f32, f16 or bf16
    #[arg(long, value_parser = word::<export::Dtype>, default_value = "f32")]
    dtype: export::Dtype,
}

impl Export {
    /// Runs it.
    pub fn run(&self, observer: Observer) -> Result<u8, Failure> {
        let Self { base: Base { model, adapter, .. }, out, format, dtype } = self;
        let (source, adapter, format, dtype, shard) = (model, adapter.as_deref(), *format, *dtype, export::SHARD);
        let settings = export::Settings { source, adapter, out, format, dtype, shard };
        let export = export::Export::prepare(&settings, observer).map_err(Failure::Input)?;
        export.write(observer).map_err(Failure::Run)?;
        observer(Event::Line(&format!("wrote {}", out.display())));
        Ok(0)
    }
}

/// Prints a row as one line, whole even if the program is ended.
pub(super) fn print(row: &impl Serialize, console: &Console) -> Result<()> {
    console.write(&format!("{}\n", serde_json::to_string(row)?))
}

/// A temperature that a softmax can be taken at, or 0.
pub fn temperature(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| *number == 0.0 || (0.01..=100.0).contains(number));
    number.ok_or_else(|| "not 0, nor a number from 0.01 to 100".to_string())
}

/// A word that a config's key could have as its value.
pub(super) fn word<T: DeserializeOwned>(text: &str) -> Result<T, ValueError> {
    let word: StrDeserializer<ValueError> = text.into_deserializer();
    T::deserialize(word)
}
