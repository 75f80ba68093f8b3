//! Everything a run needs before its first step: sources, model, environments, folder, and the state it goes on from.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use candle_core::Device;
use candor_environments::{Context, Load, REGISTRY, Split};

use crate::checkpoint;
use crate::config::{self, Config, Reference};
use crate::event::{Event, Observer};
use crate::learner::Learner;
use crate::model::{Model, Weights};
use crate::policy::Adapter;
use crate::run::RunFolder;
use crate::sampler::Sampler;
use crate::sampler::local::LocalSampler;
use crate::selection::{Source, shares};
use crate::source;
use crate::tokenizer::Tokenizer;

/// What a run is started with, beside its config.
pub struct Options<'a> {
    /// The folder that run folders are made in, usually `results`.
    pub results: &'a Path,
    /// Whether an existing run is continued.
    pub resume: bool,
    /// Environments of one's own, found before the built-in ones.
    pub environments: &'a [(&'a str, Load)],
    /// Who is told what happens.
    pub observer: Observer<'a>,
}

/// A run that is ready for its next step.
pub struct Run {
    /// The resolved config.
    pub config: Config,
    /// Where everything is written.
    pub folder: RunFolder,
    /// Turns text into tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// What is trained on.
    pub training: Vec<Source>,
    /// What is evaluated on.
    pub heldout: Vec<Source>,
    /// Who writes completions.
    pub sampler: Box<dyn Sampler>,
    /// Who learns from them.
    pub learner: Learner,
    /// The step that comes next.
    pub next_step: u64,
}

impl Run {
    /// Loads everything. Nothing is written before all input has been found good.
    ///
    /// # Errors
    /// If a source, the model, an environment or the run folder is not what the config says.
    pub fn prepare(config: Config, options: &Options) -> Result<Self> {
        RunFolder::check(options.results, &config, options.resume)?;
        let training = load_sources(&config.environments, Split::Train, options)?;
        check_shares(&training, config.batch.prompts)?;
        let mut heldout = Vec::new();
        if config.evaluation.tasks > 0 {
            heldout = load_sources(&config.environments, Split::Heldout, options)?;
            heldout.extend(load_sources(&config.evaluation.environments, Split::Heldout, options)?);
        }
        let device = Device::Cpu;
        let (model, tokenizer) = load_model(&config.model.source, &device, options.observer)?;
        let (folder, learner, next_step) = begin(&config, &model, options)?;
        let sampler = Box::new(LocalSampler::new(model.clone(), tokenizer.clone()));
        Ok(Self { config, folder, tokenizer, training, heldout, sampler, learner, next_step })
    }
}

/// The model and its tokenizer from a source string.
///
/// # Errors
/// If the source cannot be had or is not a model.
pub fn load_model(source: &str, device: &Device, observer: Observer) -> Result<(Arc<Model>, Arc<Tokenizer>)> {
    let path = resolve(source, observer).context("model.source")?;
    observer(Event::Line(&format!("loading the model from {}", path.display())));
    let mut weights = Weights::open(&path)?;
    let tokenizer = match weights.metadata() {
        Some(metadata) => Tokenizer::from_gguf(metadata),
        None => Tokenizer::from_folder(&path),
    };
    let tokenizer = tokenizer.with_context(|| weights.path().display().to_string())?;
    let model = Model::load(&mut weights, device)?;
    ensure!(
        tokenizer.vocab_size() <= model.architecture.vocabulary,
        "{}: the tokenizer needs {} token ids, the model has only {}",
        weights.path().display(),
        tokenizer.vocab_size(),
        model.architecture.vocabulary
    );
    Ok((Arc::new(model), Arc::new(tokenizer)))
}

fn resolve(source: &str, observer: Observer) -> Result<PathBuf> {
    source::resolve(source, &|line| observer(Event::Line(line)))
}

fn load_sources(environments: &[config::Environment], split: Split, options: &Options) -> Result<Vec<Source>> {
    let load = |(index, environment): (usize, &config::Environment)| {
        let name = environment.name.as_str();
        let all = || options.environments.iter().chain(REGISTRY);
        let known = || all().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let found = all().find(|(known, _)| *known == name);
        let (_, load) =
            found.with_context(|| format!("environment.{index}.name: no environment {name:?}; known: {}", known()))?;
        let context = Context {
            split,
            options: &environment.options,
            resolve: &|source: &str| resolve(source, options.observer),
            judge: None,
        };
        let loaded = load(&context).with_context(|| format!("environment.{index} ({name})"))?;
        ensure!(loaded.num_tasks() > 0, "environment.{index} ({name}): there are no tasks");
        Ok(Source { name: name.to_string(), weight: environment.weight, environment: loaded.into() })
    };
    environments.iter().enumerate().map(load).collect()
}

fn check_shares(sources: &[Source], prompts: usize) -> Result<()> {
    let weights: Vec<f64> = sources.iter().map(|source| source.weight).collect();
    for (index, share) in shares(&weights, prompts).into_iter().enumerate() {
        ensure!(
            share > 0,
            "environment.{index}.weight: its share of {prompts} prompts rounds to none; raise it or batch.prompts"
        );
    }
    Ok(())
}

/// The run folder and the learner, fresh or as the newest checkpoint left them.
fn begin(config: &Config, model: &Arc<Model>, options: &Options) -> Result<(RunFolder, Learner, u64)> {
    let (architecture, device) = (&model.architecture, &model.device);
    let start = || match &config.lora.start_from {
        Some(folder) => {
            checkpoint::load_adapter(Path::new(folder), architecture, &config.lora, device).context("lora.start_from")
        }
        None => Adapter::initialize(architecture, &config.lora, config.seed, device),
    };
    let reference = match config.reference() {
        Reference::Start if config.learner.kl > 0.0 => Some(start()?),
        Reference::Start | Reference::Base => None,
    };
    let learner = |adapter: &Adapter| Learner::new(model.clone(), adapter, reference, &config.learner);
    let newest = checkpoint::newest(&options.results.join(&config.name))?;
    let Some(newest) = newest.filter(|_| options.resume) else {
        let learner = learner(&start()?)?;
        let folder =
            if options.resume { resumed(options, config, 0)? } else { RunFolder::create(options.results, config)? };
        return Ok((folder, learner, 0));
    };
    let state = checkpoint::state(&newest)?;
    let mut adapter = checkpoint::load_adapter(&newest, architecture, &config.lora, device)?;
    adapter.version = state.updates;
    let mut learner = learner(&adapter)?;
    checkpoint::restore_moments(&newest, &mut learner, &state)?;
    Ok((resumed(options, config, state.next_step)?, learner, state.next_step))
}

fn resumed(options: &Options, config: &Config, next_step: u64) -> Result<RunFolder> {
    let (folder, notes) = RunFolder::resume(options.results, config, next_step)?;
    notes.iter().for_each(|note| (options.observer)(Event::Line(note)));
    (options.observer)(Event::Line(&format!("resuming {} at step {next_step}", folder.path.display())));
    Ok(folder)
}
