//! `candor sample`: rows of prompts are answered, many at a time, and come out in order with their completions.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Device;
use serde_json::{Map, Value, json};

use crate::calibration_map::CalibrationMap;
use crate::config::Dtype;
use crate::cuda::Place;
use crate::event::{Event, Observer};
use crate::model_files::{ModelFiles, Policy};
use crate::prompts::{Prompt, check_room};
use crate::sampler::local::{LocalSampler, most_rollouts};
use crate::sampler::{Generation, Request, Sampler, Settings};
use crate::tokenizer::Tokenizer;

/// Where prompts come from.
#[derive(Clone, Copy)]
pub enum Prompts<'a> {
    /// The rows of a file.
    File(&'a Path),
    /// Texts on the command line.
    Written(&'a [String]),
    /// Rows that were made of others.
    Made(&'a [Map<String, Value>]),
}

/// Is given each completion with its prompt's row.
type Answered<'a> = dyn FnMut(&Map<String, Value>, &Generation) -> Result<()> + 'a;

/// Prompts that are ready to be answered.
pub struct Sample {
    policy: Policy,
    prompts: Vec<Prompt>,
    /// Completions of each.
    samples: usize,
    settings: Settings,
}

impl Sample {
    /// Reads the prompts and loads the model, which computes in `dtype`; `samples` completions are to be made of each.
    ///
    /// # Errors
    /// If a prompt, the model or the adapter is not what it should be, or a prompt leaves no room for a completion.
    pub fn prepare(
        (source, dtype): (&str, Dtype),
        prompts: Prompts,
        adapter: Option<&Path>,
        samples: usize,
        settings: Settings,
        observer: Observer,
    ) -> Result<Self> {
        let model = ModelFiles::open(source, observer)?.computed_by(Place::automatic(dtype)?)?;
        let fitting = |prompt: Prompt| {
            check_room(&model, prompt.ids.len(), settings.max_tokens)?;
            Ok(prompt)
        };
        let written = |text: &String| {
            let prompt = Prompt::written(text, &model.tokenizer).and_then(fitting);
            prompt.with_context(|| format!("--prompt {text:?}"))
        };
        let prompts = match prompts {
            Prompts::File(path) => Prompt::read(path, &model, fitting)?,
            Prompts::Made(rows) => {
                let made = |row: &Map<String, Value>| Prompt::of(row.clone(), &model.tokenizer).and_then(fitting);
                let place = |(index, row)| made(row).with_context(|| format!("row {index}"));
                rows.iter().enumerate().map(place).collect::<Result<_>>()?
            }
            Prompts::Written(texts) => texts.iter().map(written).collect::<Result<_>>()?,
        };
        Ok(Self { policy: model.policy(adapter, &Device::Cpu, observer)?, prompts, samples, settings })
    }

    /// Samples all completions and hands each to `answered`, as its prompt's row with what was sampled: in the order of the
    /// prompts, though they end in another one. With a map, the confidence that it was fitted for is read of each and mapped.
    ///
    /// # Errors
    /// If the device fails, or `answered` does.
    pub fn run(
        &self,
        map: Option<&CalibrationMap>,
        observer: Observer,
        answered: &mut dyn FnMut(Map<String, Value>) -> Result<()>,
    ) -> Result<()> {
        let Self { policy: Policy { tokenizer, .. }, settings, .. } = self;
        self.each(observer, &mut |prompt, generation| {
            let mut row = row(prompt, generation, tokenizer, settings);
            if let Some(map) = map {
                let text = generation.completion(tokenizer, settings).text;
                let confidence = map.confidence(&text, |range| generation.answer_confidence(range, tokenizer))?;
                row.insert("uncalibrated_confidence".to_string(), json!(confidence));
                row.insert("calibrated_confidence".to_string(), json!(confidence.map(|raw| map.map.apply(raw))));
            }
            answered(row)
        })
    }

    /// The tokenizer, and how completions are sampled.
    pub fn reading(&self) -> (&Tokenizer, &Settings) {
        (&self.policy.tokenizer, &self.settings)
    }

    /// Samples all completions and hands each to `answered` with its prompt's row, in the order of the prompts.
    ///
    /// # Errors
    /// If the device fails, or `answered` does.
    pub fn each(&self, observer: Observer, answered: &mut Answered) -> Result<()> {
        let Self { policy: Policy { model, tokenizer, adapter }, prompts, samples, settings } = self;
        let (mut requests, mut owners) = (Vec::new(), Vec::new());
        for (index, prompt) in prompts.iter().enumerate() {
            // No more at once than the store holds: what is asked for must not decide how much memory is taken.
            let together = most_rollouts(prompt.ids.len(), settings);
            for first in (0..*samples).step_by(together) {
                let (name, rollouts) = (format!("prompt {index}"), together.min(samples - first));
                requests.push(Request { name, prompt_ids: prompt.ids.clone(), rollouts });
                owners.push(&prompt.row);
            }
        }
        let mut ended: Vec<Vec<Generation>> = requests.iter().map(|_| Vec::new()).collect();
        let (mut next, mut done, total) = (0, 0, prompts.len() * samples);
        let mut sampler = LocalSampler::new(model.clone(), tokenizer.clone());
        sampler.sample(&requests, adapter, settings, &mut |generation| {
            ended[generation.group].push(generation);
            done += 1;
            observer(Event::Progress { what: "completions", done, total });
            while requests.get(next).is_some_and(|request| ended[next].len() == request.rollouts) {
                let mut group = std::mem::take(&mut ended[next]);
                group.sort_by_key(|generation| generation.rollout);
                group.iter().try_for_each(|one| answered(owners[next], one))?;
                next += 1;
            }
            Ok(())
        })
    }
}

/// The prompt's row with what was sampled; fields of the same names give way.
fn row(
    row: &Map<String, Value>,
    generation: &Generation,
    tokenizer: &Tokenizer,
    settings: &Settings,
) -> Map<String, Value> {
    let completion = generation.completion(tokenizer, settings);
    let confidence = generation.answer_confidence(0..completion.text.len(), tokenizer);
    let mut row = row.clone();
    for (name, value) in [
        ("completion", json!(completion.text)),
        ("finish", json!(completion.finish)),
        ("tokens", json!(completion.num_tokens)),
        ("mean_logprob", json!(generation.mean_logprob())),
        ("confidence", json!(confidence)),
    ] {
        row.insert(name.to_string(), value);
    }
    row
}
