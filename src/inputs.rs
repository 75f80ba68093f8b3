//! What is read before anything is computed: the model's header, its tokenizer, the environments and their tasks, and
//! whether they fit each other. A run, a dry run, a check and an evaluation all begin with this.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::Device;
use candor_environments::keys::{self, KeyError};
use candor_environments::{Context, Judge, Load, REGISTRY, Split, Target};
use rayon::prelude::*;

use crate::advantage::AdvantageKind;
use crate::client::Patience;
use crate::config::{self, Config, LongPrompts};
use crate::cuda::Place;
use crate::event::{Event, Observer};
use crate::given;
use crate::judge::Panel;
use crate::judge::options::JudgeOptions;
use crate::model_files::{ModelFiles, resolve};
use crate::peft;
use crate::policy::Adapter;
use crate::scorers::{caught, no_panic};
use crate::selection::{Source, shares};
use crate::source::Kind;
use crate::tokenizer::Tokenizer;

/// Everything that a config names, opened and found to fit together.
pub struct Inputs {
    /// The model's files.
    pub model: ModelFiles,
    /// What is trained on.
    pub training: Vec<Source>,
    /// What is evaluated on: the held-out split of the training environments that sample, in their order, then the others.
    pub heldout: Vec<Source>,
    /// The adapter of `lora.start_from`.
    pub start: Option<Adapter>,
    /// The environments' judges; local ones still have to be given the model.
    pub judges: Vec<Arc<Panel>>,
    /// Optimizer steps of the whole run.
    pub steps: u64,
}

impl Inputs {
    /// Opens the model and loads the environments; `environments` are found before the built-in ones.
    ///
    /// # Errors
    /// If a source, the model, the starting adapter or an environment is not what the config says, or they do not fit together.
    pub fn open(config: &Config, environments: &[(&str, Load)], observer: Observer) -> Result<Self> {
        let loader = Loader::new(config, environments, observer)?;
        let training = loader.load_training()?;
        let heldout = if config.evaluation.tasks > 0 { loader.load_heldout()? } else { Vec::new() };
        if config.evaluation.tasks > 0 && heldout.is_empty() {
            observer(Event::Line(NOTHING_HELD_OUT));
        }
        loader.fit(training, heldout)
    }

    /// Whether something is compared with a reference policy.
    ///
    /// # Errors
    /// If an environment panics.
    pub fn has_reference(&self, config: &Config) -> Result<bool> {
        Ok(config.learner.kl > 0.0 || given::has_pairs(&self.training)?)
    }

    /// The same without anything to train on.
    ///
    /// # Errors
    /// As [`Inputs::open`].
    pub fn for_evaluation(config: &Config, environments: &[(&str, Load)], observer: Observer) -> Result<Self> {
        let loader = Loader::new(config, environments, observer)?;
        let heldout = loader.load_heldout()?;
        ensure!(!heldout.is_empty(), NOTHING_HELD_OUT);
        loader.fit(Vec::new(), heldout)
    }
}

/// The environments of a config, for completions that are there already: those that are trained on, and the held-out ones.
/// Local judges have their model.
///
/// # Errors
/// As [`Inputs::open`], but for what concerns the model where no judge needs one.
pub fn environments(
    config: &Config,
    environments: &[(&str, Load)],
    observer: Observer,
) -> Result<(Vec<Source>, Vec<Source>)> {
    let loader = Loader::new(config, environments, observer)?;
    let training = loader.load_training()?;
    let heldout = loader.load_heldout()?;
    let policy = || {
        let files = loader.model()?;
        let tokenizer = files.tokenizer.clone();
        Ok((files.load(&Device::Cpu, observer)?, tokenizer))
    };
    loader.judges.borrow().iter().try_for_each(|(_, judge)| judge.load(&policy, observer))?;
    Ok((training, heldout))
}

const NOTHING_HELD_OUT: &str = "nothing to evaluate on: every environment carries its completions; name one that samples \
     under [[evaluation.environment]]";

/// What a prompt and its completion must fit into.
#[derive(Clone, Copy)]
struct Room {
    tokens: usize,
    name: &'static str,
    /// The model's context, whatever the smaller limit is.
    context: usize,
}

/// More tasks than this are a mistake in counting them.
const MOST_TASKS: usize = 1 << 28;

/// What environments are loaded with.
struct Loader<'a> {
    config: &'a Config,
    environments: &'a [(&'a str, Load)],
    observer: Observer<'a>,
    /// The judges so far: environments with the same keys share one, and its limits.
    judges: RefCell<Vec<(JudgeOptions, Arc<Panel>)>>,
}

impl<'a> Loader<'a> {
    /// Finds every environment by its name.
    fn new(config: &'a Config, environments: &'a [(&'a str, Load)], observer: Observer<'a>) -> Result<Self> {
        let loader = Self { config, environments, observer, judges: RefCell::default() };
        loader.check_names()?;
        Ok(loader)
    }

    /// What is trained on, if it could teach anything.
    fn load_training(&self) -> Result<Vec<Source>> {
        let training = self.load_all("environment", &self.config.environments, Split::Train)?;
        self.check_training(&training)?;
        Ok(training)
    }

    /// Opens the model, and finds out whether the tasks and the starting adapter fit it.
    fn fit(&self, mut training: Vec<Source>, mut heldout: Vec<Source>) -> Result<Inputs> {
        let Config { batch, sampling, evaluation, lora, .. } = self.config;
        let model = self.model()?;
        let start = lora.start_from.as_deref().filter(|_| !training.is_empty()).map(|folder| {
            let adapter = peft::load(Path::new(folder), &model.architecture, lora, &Device::Cpu);
            adapter.with_context(|| self.at("lora.start_from"))
        });
        let start = start.transpose()?;
        let tokens = model.architecture.context;
        let context = Room { tokens, name: "the model's context", context: tokens };
        let micro = Room { tokens: batch.micro_tokens, name: "batch.micro_tokens", ..context };
        let room = if micro.tokens < context.tokens { micro } else { context };
        let completion = ("sampling.max_tokens", sampling.max_tokens);
        self.leave_out_long_prompts(&mut training, &model.tokenizer, room, completion)?;
        let completion = ("evaluation.max_tokens", evaluation.max_tokens);
        self.leave_out_long_prompts(&mut heldout, &model.tokenizer, context, completion)?;
        let judges = self.judges.take().into_iter().map(|(_, judge)| judge).collect();
        let steps = self.steps(&training)?;
        Ok(Inputs { model, training, heldout, start, judges, steps })
    }

    /// The model's files, to be computed as the config says.
    fn model(&self) -> Result<ModelFiles> {
        let config::Model { ref source, device, dtype, kernel, quantization } = self.config.model;
        let model = ModelFiles::open(source, self.observer).with_context(|| self.at("model.source"))?;
        let key = if matches!(device, config::Device::Cuda(_)) { "model.device" } else { "model.kernel" };
        let model = model.computed_by(Place::choose(device, dtype, kernel).with_context(|| self.at(key))?)?;
        let Some(quantization) = quantization else { return Ok(model) };
        model.packed(quantization).with_context(|| self.at("model.quantization"))
    }

    /// Optimizer steps: as configured, or as many as every environment needs for its passes, the last one filled up.
    fn steps(&self, training: &[Source]) -> Result<u64> {
        let Config { steps, epochs, batch, learner, .. } = self.config;
        let Some(epochs) = *epochs else { return Ok(*steps) };
        let weights: Vec<f64> = training.iter().map(|source| source.weight).collect();
        let needed =
            |(source, share): (&Source, usize)| (epochs * source.tasks.len() as u64).div_ceil(share.max(1) as u64);
        let steps = training.iter().zip(shares(&weights, batch.prompts)).map(needed).max().unwrap_or(0);
        let warmup = learner.warmup_steps;
        if warmup >= steps && warmup > config::Learner::default().warmup_steps {
            let text = format!("{warmup} steps of warm-up leave none of the {steps} in epochs = {epochs}; lower it");
            return Err(self.config.locate(KeyError::new("learner.warmup_steps", text)));
        }
        Ok(steps)
    }

    /// The held-out split of every environment that is named and samples: a given completion is not the model's to be scored.
    fn load_heldout(&self) -> Result<Vec<Source>> {
        let mut heldout = Vec::new();
        for source in self.load_all("environment", &self.config.environments, Split::Heldout)? {
            if source.samples()? {
                heldout.push(source);
            }
        }
        let others = &self.config.evaluation.environments;
        for (index, mut other) in
            self.load_all("evaluation.environment", others, Split::Heldout)?.into_iter().enumerate()
        {
            // Rows are told apart by the name.
            if heldout.iter().any(|source| source.name == other.name) {
                other.name = format!("evaluation.environment.{index} ({})", other.name);
            }
            heldout.push(other);
        }
        Ok(heldout)
    }

    /// Every environment by its name, before any source is fetched.
    fn check_names(&self) -> Result<()> {
        let Config { environments, evaluation, .. } = self.config;
        for (list, environments) in
            [("environment", environments), ("evaluation.environment", &evaluation.environments)]
        {
            for (index, environment) in environments.iter().enumerate() {
                self.find(&environment.name, &format!("{list}.{index}"))?;
            }
        }
        Ok(())
    }

    /// What loads an environment.
    fn find(&self, name: &str, key: &str) -> Result<Load> {
        let all = || self.environments.iter().chain(REGISTRY);
        all().find(|(known, _)| *known == name).map(|(_, load)| *load).ok_or_else(|| {
            let known: Vec<&str> = all().map(|(name, _)| *name).collect();
            let meant = keys::nearest(name, known.iter().copied());
            let meant = meant.map_or(String::new(), |meant| format!("did you mean {meant:?}? "));
            let text = format!("no environment {name:?}; {meant}known: {}", known.join(", "));
            self.config.locate(KeyError::new(format!("{key}.name"), text))
        })
    }

    /// A key with the place where it was written.
    fn at(&self, key: &str) -> String {
        self.config.place(key).map_or(key.to_string(), |place| format!("{place}: {key}"))
    }

    /// The judge that an environment's options ask for.
    fn judge(&self, options: &toml::Table, key: &str) -> Result<Option<Arc<dyn Judge>>> {
        let Some(table) = options.get("judge").and_then(toml::Value::as_table) else { return Ok(None) };
        let open = || -> Result<Arc<Panel>> {
            let options = JudgeOptions::of(table)?;
            let mut judges = self.judges.borrow_mut();
            if let Some((_, judge)) = judges.iter().find(|(known, _)| *known == options) {
                return Ok(judge.clone());
            }
            let (policy, variable) = (&self.config.model.source, |name: &str| std::env::var_os(name));
            let panel = Panel::of(&options, policy, Patience::default(), &variable, self.observer)?;
            judges.push((options, Arc::new(panel)));
            Ok(judges[judges.len() - 1].1.clone())
        };
        Ok(Some(open().map_err(|error| self.config.locate_within(&format!("{key}.judge"), error))?))
    }

    /// The environments of one list of the config, at least one task each.
    fn load_all(&self, list: &str, environments: &[config::Environment], split: Split) -> Result<Vec<Source>> {
        let load = |(index, environment): (usize, &config::Environment)| {
            let name = environment.name.as_str();
            let key = format!("{list}.{index}");
            let load = self.find(name, &key)?;
            let resolve = |source: &str| {
                let resolved = resolve(source, Kind::Data, self.observer);
                // The option that names the source tells where it was written.
                let option = environment.options.iter().find(|(_, value)| value.as_str() == Some(source));
                resolved.map_err(|error| match option {
                    Some((option, _)) => KeyError::new(option, format!("{error:#}")).into(),
                    None => error,
                })
            };
            let judge = self.judge(&environment.options, &key)?;
            let context = Context::new(split, &environment.options, &resolve, judge);
            let place = || format!("{} ({name})", self.at(&key));
            let loaded = caught(|| load(&context)).unwrap_or_else(|said| bail!("it panicked when loaded: {said}"));
            let loaded = loaded.map_err(|error| match error.downcast::<KeyError>() {
                Ok(problem) => self.config.locate(problem.within(&key)),
                Err(error) => error.context(place()),
            })?;
            if let Some(option) = context.unread_option() {
                let problem = KeyError::unknown(option, format!("{name} takes no options"));
                return Err(self.config.locate(problem.within(&key)));
            }
            let tasks = caught(|| loaded.num_tasks()).unwrap_or(0);
            ensure!(tasks > 0, "{}: there are no tasks", place());
            ensure!(tasks <= MOST_TASKS, "{}: {tasks} tasks are more than {MOST_TASKS}", place());
            let label = match environments[..index].iter().any(|other| other.name == name) {
                true => format!("{key} ({name})"),
                false => name.to_string(),
            };
            Ok(Source::new(&label, environment.weight, loaded.into()))
        };
        environments.iter().enumerate().map(load).collect()
    }

    /// Refuses combinations of environments and settings that could not teach anything.
    fn check_training(&self, sources: &[Source]) -> Result<()> {
        let Config { batch, learner, .. } = self.config;
        let weights: Vec<f64> = sources.iter().map(|source| source.weight).collect();
        let prompts = batch.prompts;
        for (index, (share, source)) in shares(&weights, prompts).into_iter().zip(sources).enumerate() {
            let Source { name, environment, .. } = source;
            ensure!(
                share > 0,
                "{}: its share of {prompts} prompts rounds to none; raise it or batch.prompts",
                self.at(&format!("environment.{index}.weight"))
            );
            let sampled = source.samples()?;
            if sampled && self.config.lora.dropout > 0.0 {
                let text = format!(
                    "{name} samples, without dropout: its completions would not be those of the policy that learns; use 0.0"
                );
                return Err(self.config.locate(KeyError::new("lora.dropout", text)));
            }
            if sampled && self.config.epochs.is_some() {
                let text =
                    format!("counts passes over tasks that carry their completions, but {name} samples; set steps");
                return Err(self.config.locate(KeyError::new("epochs", text)));
            }
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

    /// Leaves out the tasks whose prompt and the longest completion exceed the room, or refuses them, as the config says. The
    /// completions that a task carries are counted as they are.
    fn leave_out_long_prompts(
        &self,
        sources: &mut [Source],
        tokenizer: &Tokenizer,
        room: Room,
        (key, longest): (&str, usize),
    ) -> Result<()> {
        let (micro, context) = (self.config.batch.micro_tokens, room.context);
        let also = if room.name.contains('.') { format!(", raise {}", room.name) } else { String::new() };
        for source in sources {
            let (key, why, remedy) = match source.samples()? {
                true => {
                    let why = format!("leaves no room for {key} = {longest} within {} = {}", room.name, room.tokens);
                    (key, why, format!("lower it{also}"))
                }
                false => {
                    let why = "with its completions exceeds batch.micro_tokens";
                    let why = format!("{why} = {micro} or the model's context = {context}");
                    ("batch.micro_tokens", why, "raise it".to_string())
                }
            };
            let Source { name, environment, tasks, .. } = source;
            let fits = |&index: &usize| -> Result<bool> {
                let task = no_panic(name, index, || environment.task(index))?;
                let fits = match task.target {
                    Target::Reward => tokenizer.prompt_fits(&task.prompt, room.tokens.saturating_sub(longest)),
                    _ => given::fits(&task, tokenizer, micro, context),
                };
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
            ensure!(
                !tasks.is_empty(),
                "{}: every prompt of {name} {why}; {remedy}, or shorten the prompts",
                self.at(key)
            );
            let left_out = all - tasks.len();
            if left_out > 0 {
                let line = format!("{name}: left out {left_out} of {all} tasks: the prompt {why}");
                (self.observer)(Event::Line(&line));
            }
        }
        Ok(())
    }
}
