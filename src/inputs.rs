//! What is read before anything is computed: the model's header, its tokenizer, the environments and their tasks, and
//! whether they fit each other. A run, a dry run, a check and an evaluation all begin with this.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use candle_core::Device;
use candor_environments::keys::{self, KeyError};
use candor_environments::{Context, Load, REGISTRY, Split, Target};
use rayon::prelude::*;

use crate::advantage::AdvantageKind;
use crate::config::{self, Config, LongPrompts, Quantization};
use crate::event::{Event, Observer};
use crate::model::{Architecture, Footprint, Model, Weights};
use crate::scorers::no_panic;
use crate::selection::{Source, shares};
use crate::source::{self, Kind};
use crate::tokenizer::Tokenizer;

/// A model whose header has been read; its weights have not.
pub struct ModelFiles {
    /// The opened file or folder.
    pub weights: Weights,
    /// What it describes.
    pub architecture: Architecture,
    /// Its tokenizer and chat template.
    pub tokenizer: Arc<Tokenizer>,
    /// How the layers' projections are packed, if they are.
    pub quantization: Option<Quantization>,
    /// What its weights will take.
    pub footprint: Footprint,
}

impl ModelFiles {
    /// Opens a model from a source string, as `model.source` is.
    ///
    /// # Errors
    /// If the source cannot be had, a tensor is missing or has the wrong shape, or the tokenizer is not this model's.
    pub fn open(source: &str, observer: Observer) -> Result<Self> {
        let path = resolve(source, Kind::Model, observer)?;
        let weights = Weights::open(&path)?;
        let architecture = weights.architecture()?;
        let footprint = Model::footprint(&weights, &architecture, None)?;
        let tokenizer = match weights.metadata() {
            Some(metadata) => Tokenizer::from_gguf(metadata),
            None => Tokenizer::from_folder(&path),
        };
        let tokenizer = tokenizer.with_context(|| weights.path().display().to_string())?;
        let (tokens, vocabulary) = (tokenizer.vocab_size(), architecture.vocabulary);
        ensure!(
            tokens <= vocabulary,
            "{}: the tokenizer needs {tokens} token ids, the model has only {vocabulary}; are they of one model?",
            weights.path().display()
        );
        Ok(Self { weights, architecture, tokenizer: Arc::new(tokenizer), quantization: None, footprint })
    }

    /// The same model, its projections to be packed.
    ///
    /// # Errors
    /// If they cannot be packed like this.
    pub fn packed(self, quantization: Quantization) -> Result<Self> {
        ensure!(
            quantization != Quantization::Keep || self.weights.metadata().is_some(),
            "\"keep\" leaves a GGUF file's weights as they are packed, but {} is a folder of unpacked ones; use \"nf4\" or \"q8_0\"",
            self.weights.path().display()
        );
        let footprint = Model::footprint(&self.weights, &self.architecture, Some(quantization))?;
        Ok(Self { quantization: Some(quantization), footprint, ..self })
    }

    /// Reads the weights.
    ///
    /// # Errors
    /// If a tensor is missing or has the wrong shape.
    pub fn load(self, device: &Device, observer: Observer) -> Result<Arc<Model>> {
        observer(Event::Line(&format!("loading the model from {}", self.weights.path().display())));
        Ok(Arc::new(Model::load(&self.weights, self.quantization, device)?))
    }
}

/// The model and its tokenizer from a source string.
///
/// # Errors
/// As [`ModelFiles::open`] and [`ModelFiles::load`].
pub fn load_model(source: &str, device: &Device, observer: Observer) -> Result<(Arc<Model>, Arc<Tokenizer>)> {
    let files = ModelFiles::open(source, observer)?;
    let tokenizer = files.tokenizer.clone();
    Ok((files.load(device, observer)?, tokenizer))
}

/// Everything that a config names, opened and found to fit together.
pub struct Inputs {
    /// The model's files.
    pub model: ModelFiles,
    /// What is trained on.
    pub training: Vec<Source>,
    /// What is evaluated on.
    pub heldout: Vec<Source>,
}

impl Inputs {
    /// Opens the model and loads the environments; `environments` are found before the built-in ones.
    ///
    /// # Errors
    /// If a source, the model or an environment is not what the config says, or they do not fit each other.
    pub fn open(config: &Config, environments: &[(&str, Load)], observer: Observer) -> Result<Self> {
        let loader = Loader { config, environments, observer };
        let mut training = loader.load_all("environment", &config.environments, Split::Train)?;
        loader.check_training(&training)?;
        let mut heldout = Vec::new();
        if config.evaluation.tasks > 0 {
            heldout = loader.load_all("environment", &config.environments, Split::Heldout)?;
            let others = &config.evaluation.environments;
            heldout.extend(loader.load_all("evaluation.environment", others, Split::Heldout)?);
        }
        let mut model = ModelFiles::open(&config.model.source, observer).with_context(|| loader.at("model.source"))?;
        if let Some(quantization) = config.model.quantization {
            model = model.packed(quantization).with_context(|| loader.at("model.quantization"))?;
        }
        let Config { batch, sampling, evaluation, .. } = config;
        let context = Room { tokens: model.architecture.context, name: "the model's context" };
        let micro = Room { tokens: batch.micro_tokens, name: "batch.micro_tokens" };
        let room = if micro.tokens < context.tokens { micro } else { context };
        let completion = ("sampling.max_tokens", sampling.max_tokens);
        loader.leave_out_long_prompts(&mut training, &model.tokenizer, room, completion)?;
        let completion = ("evaluation.max_tokens", evaluation.max_tokens);
        loader.leave_out_long_prompts(&mut heldout, &model.tokenizer, context, completion)?;
        Ok(Self { model, training, heldout })
    }
}

/// What a prompt and its completion must fit into.
#[derive(Clone, Copy)]
struct Room {
    tokens: usize,
    name: &'static str,
}

/// What environments are loaded with.
struct Loader<'a> {
    config: &'a Config,
    environments: &'a [(&'a str, Load)],
    observer: Observer<'a>,
}

impl Loader<'_> {
    /// A key with the place where it was written.
    fn at(&self, key: &str) -> String {
        self.config.place(key).map_or(key.to_string(), |place| format!("{place}: {key}"))
    }

    /// The environments of one list of the config, at least one task each.
    fn load_all(&self, list: &str, environments: &[config::Environment], split: Split) -> Result<Vec<Source>> {
        let load = |(index, environment): (usize, &config::Environment)| {
            let name = environment.name.as_str();
            let key = format!("{list}.{index}");
            let all = || self.environments.iter().chain(REGISTRY);
            let (_, load) = all().find(|(known, _)| *known == name).ok_or_else(|| {
                let known: Vec<&str> = all().map(|(name, _)| *name).collect();
                let meant = keys::nearest(name, known.iter().copied());
                let meant = meant.map_or(String::new(), |meant| format!("did you mean {meant:?}? "));
                let text = format!("no environment {name:?}; {meant}known: {}", known.join(", "));
                self.config.locate(KeyError::new(format!("{key}.name"), text))
            })?;
            let context = Context {
                split,
                options: &environment.options,
                resolve: &|source: &str| resolve(source, Kind::Data, self.observer),
                judge: None,
            };
            let place = || format!("{} ({name})", self.at(&key));
            let loaded = load(&context).map_err(|error| match error.downcast::<KeyError>() {
                Ok(problem) => self.config.locate(problem.within(&key)),
                Err(error) => error.context(place()),
            })?;
            ensure!(loaded.num_tasks() > 0, "{}: there are no tasks", place());
            Ok(Source::new(name, environment.weight, loaded.into()))
        };
        environments.iter().enumerate().map(load).collect()
    }

    /// Refuses combinations of environments and settings that could not teach anything.
    fn check_training(&self, sources: &[Source]) -> Result<()> {
        let Config { batch, learner, .. } = self.config;
        let weights: Vec<f64> = sources.iter().map(|source| source.weight).collect();
        let prompts = batch.prompts;
        for (index, (share, source)) in shares(&weights, prompts).into_iter().zip(sources).enumerate() {
            let Source { name, environment, tasks, .. } = source;
            ensure!(
                share > 0,
                "{}: its share of {prompts} prompts rounds to none; raise it or batch.prompts",
                self.at(&format!("environment.{index}.weight"))
            );
            let sampled = no_panic(name, tasks[0], || environment.task(tasks[0]))?.target == Target::Reward;
            ensure!(
                !sampled || batch.group >= 2,
                "{}: {} rollout of a prompt has nothing to be compared with, so {name} would teach nothing; use at least 2",
                self.at("batch.group"),
                batch.group
            );
            if learner.advantage == AdvantageKind::Std && environment.rewards_probabilities() {
                (self.observer)(Event::Warning(&format!(
                    "{}: \"std\" divides by each group's standard deviation, which turns the scoring rule of {name} into a \
                     reward for overconfidence (arXiv 2508.11800); use \"centered\"",
                    self.at("learner.advantage")
                )));
            }
        }
        Ok(())
    }

    /// Leaves out the tasks whose prompt and the longest completion exceed the room, or refuses them, as the config says.
    fn leave_out_long_prompts(
        &self,
        sources: &mut [Source],
        tokenizer: &Tokenizer,
        room: Room,
        (key, longest): (&str, usize),
    ) -> Result<()> {
        let why = format!("leaves no room for {key} = {longest} within {} = {}", room.name, room.tokens);
        for Source { name, environment, tasks, .. } in sources {
            let fits = |&index: &usize| -> Result<bool> {
                let task = no_panic(name, index, || environment.task(index))?;
                let fits = tokenizer.prompt_fits(&task.prompt, room.tokens.saturating_sub(longest));
                let fits = fits.with_context(|| format!("task {}", task.id))?;
                ensure!(
                    fits || self.config.batch.long_prompts == LongPrompts::Skip,
                    "task {}: its prompt {why}; shorten it, or set batch.long_prompts = \"skip\"",
                    task.id
                );
                Ok(fits)
            };
            // All of them first, so that the first error is always the same one.
            let fitting = tasks.par_iter().map(fits).collect::<Vec<_>>().into_iter().collect::<Result<Vec<bool>>>()?;
            let (all, mut fitting) = (tasks.len(), fitting.into_iter());
            tasks.retain(|_| fitting.next().unwrap_or(true));
            ensure!(!tasks.is_empty(), "{name}: every prompt {why}; raise that, or shorten the prompts");
            let left_out = all - tasks.len();
            if left_out > 0 {
                let line = format!("{name}: left out {left_out} of {all} tasks: the prompt {why}");
                (self.observer)(Event::Line(&line));
            }
        }
        Ok(())
    }
}

fn resolve(source: &str, kind: Kind, observer: Observer) -> Result<PathBuf> {
    source::resolve(source, kind, &|line| observer(Event::Line(line)))
}
