//! A run that is ready for its next step: inputs, model, folder, learner, and the state it goes on from.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use candle_core::Device;
use candor_environments::Load;

use crate::checkpoint;
use crate::config::{Config, Reference, SamplerKind};
use crate::event::{Event, Observer};
use crate::given::Given;
use crate::inputs::Inputs;
use crate::learner::Learner;
use crate::model::Model;
use crate::peft;
use crate::plan::Plan;
use crate::policy::Adapter;
use crate::probe;
use crate::run::RunFolder;
use crate::sampler::Sampler;
use crate::sampler::local::LocalSampler;
use crate::sampler::parallel::ParallelSampler;
use crate::selection::Source;
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
    /// What makes trees of completions that tasks carry.
    pub given: Given,
    /// Who learns from them.
    pub learner: Learner,
    /// Optimizer steps of the whole run.
    pub steps: u64,
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
        let inputs = Inputs::open(&config, options.environments, options.observer)?;
        let compares = inputs.has_reference(&config)?;
        if let Some(gpu) = &inputs.model.place.gpu {
            gpu.set_plan(Plan::of(&config, &inputs)?.gpu.map(|plan| plan.to_string()).unwrap_or_default());
        }
        let Inputs { model, training, heldout, start, judges, steps } = inputs;
        let tokenizer = model.tokenizer.clone();
        let model = model.load(&Device::Cpu, options.observer)?;
        let base = || Ok((model.clone(), tokenizer.clone()));
        judges.iter().try_for_each(|judge| judge.load(&base, options.observer))?;
        let sampler: Box<dyn Sampler> = match (config.sampling.kind, config.sampling.samplers) {
            (SamplerKind::Local, 1) => Box::new(LocalSampler::new(model.clone(), tokenizer.clone())),
            (SamplerKind::Local, samplers) => Box::new(ParallelSampler::new(&model, &tokenizer, samplers)?),
            (SamplerKind::Openai, _) => {
                let sources: Vec<&Source> = training.iter().chain(&heldout).collect();
                Box::new(probe::servers(&config, &model, &tokenizer, &sources, options.observer)?)
            }
        };
        let (folder, learner, next_step) = begin(&config, &model, start, compares, options)?;
        let given = Given::default();
        Ok(Self { config, folder, tokenizer, training, heldout, sampler, given, learner, steps, next_step })
    }
}

/// The run folder and the learner, fresh or as the newest checkpoint left them.
fn begin(
    config: &Config,
    model: &Arc<Model>,
    start: Option<Adapter>,
    compares: bool,
    options: &Options,
) -> Result<(RunFolder, Learner, u64)> {
    let (architecture, device) = (&model.architecture, &model.device);
    let start = match start {
        Some(adapter) => adapter,
        None => Adapter::initialize(architecture, &config.lora, config.seed, device)?,
    };
    let reference = (compares && config.reference() == Reference::Start).then(|| start.clone());
    let learner = |adapter: &Adapter| Learner::new(model.clone(), adapter, reference, &config.learner);
    let newest = checkpoint::newest(&options.results.join(&config.name))?;
    let Some(newest) = newest.filter(|_| options.resume) else {
        let learner = learner(&start)?;
        let folder =
            if options.resume { resumed(options, config, 0)? } else { RunFolder::create(options.results, config)? };
        return Ok((folder, learner, 0));
    };
    let state = checkpoint::state(&newest)?;
    let mut adapter = peft::load(&newest, architecture, &config.lora, device)?;
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
