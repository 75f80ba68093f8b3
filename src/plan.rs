//! `candor train --dry-run`: what a run will do and how much memory it will take, from headers, prompts and counts. No weight
//! is read.
//!
//! Memory is what the code allocates at its fullest moment, term by term, with every completion as long as it may be.

use std::fmt;

use anyhow::Result;

use crate::config::{Config, Reference, SamplerKind, Sampling};
use crate::cuda::plan;
use crate::given;
use crate::inputs::Inputs;
use crate::learner::tree::{Piece, batches, pieces};
use crate::model::host::{kept_bytes, kept_layers};
use crate::model::stored::reading_bytes;
use crate::model::{Architecture, Footprint, KeyValueStore, Projection};
use crate::ops::kernel::Kernel;
use crate::ops::keys::BLOCK;
use crate::ops::rounded::Rounded;
use crate::ops::{head, rows};
use crate::record::{available_memory, resident_memory};
use crate::sampler::Settings;
use crate::sampler::local::{forward_rows, group_rows, stored_rows};
use crate::selection::{Choice, Source, choose_heldout, choose_tasks, shares};
use crate::tokenizer::Tokenizer;
use crate::train::is_due;

/// How many prompts are looked at, about.
const PROMPTS: usize = 1000;

/// Bytes of one number.
const FLOAT: usize = 4;

/// What a run will do, and what it needs.
pub struct Plan {
    /// Lines about rollouts, tokens, passes and evaluations.
    derived: Vec<String>,
    /// The memory.
    pub memory: Memory,
    /// That of a GPU, where one computes.
    pub gpu: Option<plan::Memory>,
}

/// The memory of a run by what it is for, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// This process before the weights are read: program, tokenizer, rows of the environments.
    pub program: usize,
    /// The frozen weights.
    pub base: usize,
    /// The projections of one layer, transposed for the backward pass, and unpacked if they are packed.
    pub layer: usize,
    /// The adapter, its gradient, both moments, and the copies for the sampler and the reference.
    pub adapter: usize,
    /// The sampler's keys and values.
    pub cache: usize,
    /// One forward pass of the sampler.
    pub sampling: usize,
    /// The learner: every layer's input, what attention keeps there, and one layer with its gradients.
    pub learning: usize,
    /// Selected hidden states and a block of logits.
    pub head: usize,
    /// What is taken only while the weights are read.
    pub loading: usize,
    /// Whether sampler and learner compute at once.
    pub together: bool,
}

impl Memory {
    /// The activations of both kinds, or of the larger where they do not exist at once.
    fn activations(&self) -> usize {
        if self.together { self.sampling + self.learning } else { self.sampling.max(self.learning) }
    }

    /// What buffers of activations hold beyond what is asked of them: some spare, and larger ones than were asked for. Over a run's
    /// steps it was measured to grow from nothing to a third of the activations.
    fn spare(&self) -> usize {
        self.activations() / 4
    }

    /// The most that is resident at once.
    pub fn peak(&self) -> usize {
        let working = self.layer + self.adapter + self.cache + self.head + self.activations() + self.spare();
        self.program + self.base + working.max(self.loading)
    }
}

impl Plan {
    /// Plans a run.
    ///
    /// # Errors
    /// If a prompt cannot be rendered.
    pub fn of(config: &Config, inputs: &Inputs) -> Result<Self> {
        let program = resident_memory().unwrap_or(0) as usize + LATER_CODE;
        let Inputs { model, training, heldout, .. } = inputs;
        let shapes = |sources: &[Source], chosen: &[Choice]| shapes(sources, chosen, &model.tokenizer);
        let mut work = Work::default();
        let mut prompt_tokens = Vec::new();
        for step in 0..looked_at(config, inputs.steps) {
            let shapes = shapes(training, &choose_tasks(training, config.batch.prompts, config.seed, step))?;
            let settings = Settings::training(config, step);
            work.sample(&shapes, config.batch.group, &settings, &config.sampling, model.stored_tokens());
            work.learn(&shapes, config);
            prompt_tokens.extend(shapes.iter().map(|shape| shape.prompt));
        }
        let held_out = choose_heldout(heldout, config.evaluation.tasks, config.seed);
        let (shapes, settings) = (shapes(heldout, &held_out)?, Settings::evaluation(config, 0));
        work.sample(&shapes, 1, &settings, &config.sampling, model.stored_tokens());
        let (memory, gpu) = work.memory(config, inputs, program)?;
        Ok(Self { derived: derived(config, inputs, &prompt_tokens, held_out.len())?, memory, gpu })
    }
}

/// Pages of the program's own code that sampling and learning touch first: measured 3 to 5 MB.
const LATER_CODE: usize = 4 << 20;

/// Steps whose prompts are looked at.
fn looked_at(config: &Config, steps: u64) -> u64 {
    steps.min(PROMPTS.div_ceil(config.batch.prompts) as u64)
}

/// Lengths of a task in tokens.
struct Shape {
    prompt: usize,
    /// Those of the completions that it carries; none where they are sampled.
    given: Vec<usize>,
}

/// The lengths of every chosen task.
fn shapes(sources: &[Source], chosen: &[Choice], tokenizer: &Tokenizer) -> Result<Vec<Shape>> {
    let shape = |&(source, task): &Choice| {
        let tree = given::tree(&sources[source].environment.task(task), tokenizer)?;
        let given = tree.branches.iter().map(|branch| branch.ids.len()).collect();
        Ok(Shape { prompt: tree.prompt_ids.len(), given })
    };
    chosen.iter().map(shape).collect()
}

/// The largest of each kind of work that is met.
#[derive(Default)]
pub(crate) struct Work {
    /// Rows of the sampler's keys and values.
    pub stored_rows: usize,
    /// Rows of a forward call of the sampler.
    pub forward_rows: usize,
    /// Tokens that are chosen at once.
    pub rollouts: usize,
    /// Rows of a micro-batch, and those of its keys.
    pub micro_rows: usize,
    /// As above.
    pub key_rows: usize,
    /// Tokens that a micro-batch predicts.
    pub targets: usize,
}

impl Work {
    /// Sampling takes memory where it is done here: of each sampler, for its part of the groups.
    fn sample(
        &mut self,
        shapes: &[Shape],
        rollouts: usize,
        settings: &Settings,
        sampling: &Sampling,
        room: Option<usize>,
    ) {
        if sampling.kind != SamplerKind::Local {
            return;
        }
        let prompts: Vec<usize> =
            shapes.iter().filter(|shape| shape.given.is_empty()).map(|shape| shape.prompt).collect();
        let (mut stored, mut forward) = (0, 0);
        for part in 0..sampling.samplers.min(prompts.len()) {
            let own: Vec<usize> = prompts.iter().skip(part).step_by(sampling.samplers).copied().collect();
            let groups = own.iter().map(|&prompt| group_rows(prompt, rollouts, settings));
            stored += stored_rows(groups, room, sampling.samplers);
            forward += forward_rows(&own, rollouts);
        }
        self.stored_rows = self.stored_rows.max(stored);
        self.forward_rows = self.forward_rows.max(forward);
        self.rollouts = self.rollouts.max(prompts.len() * rollouts);
    }

    /// Packs a step as the learner does, but for kinds of tasks, which the learner keeps apart.
    fn learn(&mut self, shapes: &[Shape], config: &Config) {
        let (group, longest, budget) = (config.batch.group, config.sampling.max_tokens, config.batch.micro_tokens);
        let mut all: Vec<(Piece, usize)> = Vec::new();
        for Shape { prompt, given } in shapes {
            let lengths = if given.is_empty() { vec![longest; group] } else { given.clone() };
            let targets = |piece: &Piece| lengths[piece.branches.clone()].iter().sum();
            let cut = pieces(*prompt, lengths.iter().copied(), budget).into_iter();
            all.extend(cut.map(|piece| (piece.clone(), targets(&piece))));
        }
        let rows: Vec<usize> = all.iter().map(|(piece, _)| piece.rows).collect();
        for batch in batches(&rows, budget) {
            let branches: usize = all[batch.clone()].iter().map(|(piece, _)| piece.branches.len()).sum();
            self.micro_rows = self.micro_rows.max(rows[batch.clone()].iter().sum());
            // Every prompt and branch fills its last block of keys, half of it with nothing.
            self.key_rows =
                self.key_rows.max(rows[batch.clone()].iter().sum::<usize>() + (batch.len() + branches) * BLOCK / 2);
            self.targets = self.targets.max(all[batch].iter().map(|(_, targets)| targets).sum());
        }
    }

    fn memory(&self, config: &Config, inputs: &Inputs, program: usize) -> Result<(Memory, Option<plan::Memory>)> {
        let architecture = &inputs.model.architecture;
        let width = |projection: &Projection| {
            let (wide, narrow) = architecture.dimensions(*projection);
            config.lora.rank * (wide + narrow)
        };
        let adapter = architecture.layers.len() * config.lora.targets.iter().map(width).sum::<usize>();
        // Trained, its gradient (or, while sampling, the published copy) and two moments; the reference where there is one, and the
        // older versions that are still sampled from.
        let reference = inputs.has_reference(config)? && config.reference() == Reference::Start;
        let copies = 4 + usize::from(reference) + config.sampling.async_level;
        let Footprint { resident, layer, unpacked } = inputs.model.footprint;
        let (blocks, together) = (rows::scratch(block_width(architecture), self.micro_rows), config.level() > 0);
        if let Some(gpu) = &inputs.model.place.gpu {
            let (weights, adapters) = ([resident, unpacked], [adapter, copies - 3]);
            let memory = plan::Memory::of(gpu, architecture, weights, adapters, self, together);
            // The table of embeddings is rounded here before it goes to the GPU.
            let loading = reading_bytes() + 2 * architecture.vocabulary * architecture.hidden;
            // While a checkpoint is saved: the adapter and two moments, and one of them on its way.
            let adapter = FLOAT * copies * adapter;
            return Ok((Memory { program, adapter, loading, together, ..Memory::default() }, Some(memory)));
        }
        let kernel = inputs.model.place.kernel;
        let memory = Memory {
            program,
            base: resident,
            layer: layer + unpacked,
            adapter: FLOAT * copies * adapter,
            cache: KeyValueStore::bytes(architecture, self.stored_rows, kernel),
            sampling: self.forward_rows * forward_bytes(architecture, kernel)
                + FLOAT * (self.rollouts * architecture.vocabulary + blocks),
            learning: self.learning(architecture, kernel) + FLOAT * blocks,
            head: FLOAT * 2 * self.targets * architecture.hidden + head::bytes(self.targets, architecture.hidden),
            loading: reading_bytes(),
            together,
        };
        Ok((memory, None))
    }

    /// What is alive in the backward pass of the last layer, in bytes.
    fn learning(&self, architecture: &Architecture, kernel: Kernel) -> usize {
        let Architecture { hidden, heads, key_value_heads, head_dim, ref layers, .. } = *architecture;
        let kept = kept_layers(architecture, self.micro_rows, kernel).max(1) * kept_bytes(architecture, kernel);
        // The inputs of all layers and a gradient; those of queries, keys and values, and of what attention returned.
        let widths = FLOAT * ((layers.len() + 2) * hidden + (heads + 2 * key_value_heads) * head_dim);
        let row = kept + widths + Rounded::bytes(kernel) * heads * head_dim;
        // Keys and values in both layouts, and their gradients.
        self.micro_rows * row + FLOAT * 6 * self.key_rows * key_value_heads * head_dim
    }
}

/// What is alive per row in a layer's forward pass, in bytes: its input and output, and what attention is given and returns.
fn forward_bytes(architecture: &Architecture, kernel: Kernel) -> usize {
    FLOAT * 2 * architecture.hidden + architecture.attention_bytes(Rounded::bytes(kernel))
}

/// Numbers per row of a block of rows in a layer's backward pass: about six hidden states, and three inner ones in half precision.
fn block_width(architecture: &Architecture) -> usize {
    6 * architecture.hidden + 3 * architecture.intermediate / 2
}

/// What follows from the config: a name and a sentence each.
fn derived(config: &Config, inputs: &Inputs, prompt_tokens: &[usize], held_out: usize) -> Result<Vec<String>> {
    let (Config { batch, sampling, evaluation, .. }, steps) = (config, inputs.steps);
    let mut lengths = prompt_tokens.to_vec();
    lengths.sort_unstable();
    let at = |share: usize| lengths.get(share * lengths.len().saturating_sub(1) / 2).copied().unwrap_or(0);
    let (mut lines, mut sampled) = (Vec::new(), 0);
    let weights: Vec<f64> = inputs.training.iter().map(|source| source.weight).collect();
    for (source, share) in inputs.training.iter().zip(shares(&weights, batch.prompts)) {
        let Source { name, tasks, .. } = source;
        sampled += if source.samples()? { share } else { 0 };
        let pass = tasks.len() as f64 / share as f64;
        lines.push(format!("{name}: {} training tasks, {share} a step: a pass takes {pass:.1} steps", tasks.len()));
    }
    let rollouts = sampled * batch.group;
    let longest = rollouts * sampling.max_tokens;
    let step = match (sampled, batch.prompts - sampled) {
        (0, given) => format!("a step: {given} tasks with their completions"),
        (_, given) => {
            let also = if given > 0 { format!(", and {given} tasks with theirs") } else { String::new() };
            let rollouts = format!("{sampled} prompts x {} rollouts = {rollouts} rollouts", batch.group);
            format!("a step: {rollouts}, at most {longest} completion tokens{also}")
        }
    };
    let (looked, all) = (looked_at(config, steps), u128::from(steps) * rollouts as u128);
    let sampled_in_all = if sampled > 0 { format!(", {all} rollouts") } else { String::new() };
    let first = [
        step,
        format!("prompts: {} to {} tokens, median {} (the first {looked} steps)", at(0), at(2), at(1)),
        format!("in all: {steps} steps{sampled_in_all}"),
    ];
    lines.splice(0..0, first);
    lines.extend(sampling.endpoints.iter().map(|endpoint| format!("sampled by {endpoint}")));
    let between = (1..steps).filter(|&step| is_due(evaluation.every, step)).count();
    lines.push(match held_out {
        0 => "evaluations: none".to_string(),
        tasks => format!("evaluations: {} of {tasks} held-out tasks, before, {between} between, after", between + 2),
    });
    Ok(lines)
}

impl fmt::Display for Plan {
    /// As TOML comments, so that a config stays one with its plan below it.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.derived.iter().try_for_each(|line| writeln!(f, "# {line}"))?;
        let Memory { program, base, layer, adapter, cache, sampling, learning, head, loading, .. } = self.memory;
        let gigabytes = |bytes: usize| bytes as f64 / 1e9;
        if let Some(gpu) = &self.gpu {
            write!(f, "#\n{gpu}")?;
        }
        writeln!(f, "#\n# memory at its fullest, completions as long as they may be (GB)")?;
        let rows = [
            ("program, tokenizer, data", program, String::new(), "take fewer rows"),
            (
                "base weights",
                base,
                format!("while they are read, {:.3} more", gigabytes(loading)),
                "choose a smaller model",
            ),
            ("one layer's weights", layer, "transposed, for the backward pass".into(), "choose a smaller model"),
            ("adapter", adapter, "with its gradient, moments and copies".into(), "lower lora.rank"),
            ("keys and values", cache, "of the sampler".into(), "lower batch.group or the max_tokens"),
            (
                "activations",
                self.memory.activations(),
                format!("learning {:.3}, sampling {:.3}", gigabytes(learning), gigabytes(sampling)),
                "lower batch.micro_tokens",
            ),
            ("spare", self.memory.spare(), "buffers that later steps may need".into(), ""),
            ("head", head, String::new(), "lower batch.micro_tokens"),
        ];
        let mut line = |name: &str, bytes: usize, note: &str| {
            writeln!(f, "{}", format!("#   {name:<26}{:>8.3}  {note}", gigabytes(bytes)).trim_end())
        };
        rows.iter().try_for_each(|(name, bytes, note, _)| line(name, *bytes, note))?;
        line("peak", self.memory.peak(), "")?;
        let largest = rows.iter().max_by_key(|(_, bytes, ..)| *bytes);
        let (name, .., hint) = largest.expect("there are rows");
        match available_memory().map(|bytes| bytes as usize) {
            Some(available) if available < self.memory.peak() => {
                write!(f, "# only {:.2} GB are free here, and most goes to the {name}: {hint}", gigabytes(available))
            }
            Some(available) => write!(f, "# free here: {:.2} GB", gigabytes(available)),
            None => Ok(()),
        }
    }
}
