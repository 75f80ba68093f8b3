//! `candor train --dry-run`: what a run will do and how much memory it will take, from headers, prompts and counts. No weight
//! is read.
//!
//! Memory is what the code allocates at its fullest moment, term by term, with every completion as long as it may be.

use std::fmt;

use anyhow::Result;

use crate::config::{Config, Reference};
use crate::given;
use crate::inputs::Inputs;
use crate::learner::tree::{Piece, batches, pieces};
use crate::model::stored::reading_bytes;
use crate::model::{Architecture, KeyValueStore, Projection};
use crate::ops::head;
use crate::report::{available_memory, resident_memory};
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
}

/// The memory of a run by what it is for, in bytes. The two kinds of activations do not exist at once.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// This process before the weights are read: program, tokenizer, rows of the environments.
    pub program: usize,
    /// The frozen weights.
    pub base: usize,
    /// The largest packed projection, while it is unpacked.
    pub unpacked: usize,
    /// The adapter, its gradient, both moments, and the copies for the sampler and the reference.
    pub adapter: usize,
    /// The sampler's keys and values.
    pub cache: usize,
    /// One forward pass of the sampler.
    pub sampling: usize,
    /// The learner: every layer's input, and one layer with its gradients.
    pub learning: usize,
    /// Selected hidden states and a block of logits.
    pub head: usize,
    /// What is taken only while the weights are read.
    pub loading: usize,
}

impl Memory {
    /// The activations of the larger of the two kinds.
    fn activations(&self) -> usize {
        self.sampling.max(self.learning)
    }

    /// What freed activations leave in pieces that the allocator neither uses nor returns: measured with glibc, nothing to a
    /// quarter of the activations.
    fn pieces(&self) -> usize {
        self.activations() / 7
    }

    /// The most that is resident at once.
    pub fn peak(&self) -> usize {
        let working = self.unpacked + self.adapter + self.cache + self.head + self.activations() + self.pieces();
        self.program + self.base + working.max(self.loading)
    }
}

impl Plan {
    /// Plans a run.
    ///
    /// # Errors
    /// If a prompt cannot be rendered.
    pub fn of(config: &Config, inputs: &Inputs) -> Result<Self> {
        let program = resident_memory().unwrap_or(0) as usize;
        let Inputs { model, training, heldout, .. } = inputs;
        let shapes = |sources: &[Source], chosen: &[Choice]| shapes(sources, chosen, &model.tokenizer);
        let mut work = Work::default();
        let mut prompt_tokens = Vec::new();
        for step in 0..looked_at(config, inputs.steps) {
            let shapes = shapes(training, &choose_tasks(training, config.batch.prompts, config.seed, step))?;
            work.sample(&shapes, config.batch.group, &Settings::training(config, step));
            work.learn(&shapes, config);
            prompt_tokens.extend(shapes.iter().map(|shape| shape.prompt));
        }
        let held_out = choose_heldout(heldout, config.evaluation.tasks, config.seed);
        work.sample(&shapes(heldout, &held_out)?, 1, &Settings::evaluation(config, 0));
        let memory = work.memory(config, inputs, program)?;
        Ok(Self { derived: derived(config, inputs, &prompt_tokens, held_out.len())?, memory })
    }
}

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
struct Work {
    stored_rows: usize,
    forward_rows: usize,
    micro_rows: usize,
    targets: usize,
}

impl Work {
    fn sample(&mut self, shapes: &[Shape], rollouts: usize, settings: &Settings) {
        let prompts: Vec<usize> =
            shapes.iter().filter(|shape| shape.given.is_empty()).map(|shape| shape.prompt).collect();
        let groups = prompts.iter().map(|&prompt| group_rows(prompt, rollouts, settings));
        self.stored_rows = self.stored_rows.max(stored_rows(groups));
        self.forward_rows = self.forward_rows.max(forward_rows(&prompts, rollouts));
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
            self.micro_rows = self.micro_rows.max(rows[batch.clone()].iter().sum());
            self.targets = self.targets.max(all[batch].iter().map(|(_, targets)| targets).sum());
        }
    }

    fn memory(&self, config: &Config, inputs: &Inputs, program: usize) -> Result<Memory> {
        let architecture = &inputs.model.architecture;
        let width = |projection: &Projection| {
            let (wide, narrow) = architecture.dimensions(*projection);
            config.lora.rank * (wide + narrow)
        };
        let adapter = architecture.layers.len() * config.lora.targets.iter().map(width).sum::<usize>();
        // Trained, its gradient (or, while sampling, the published copy) and two moments; the reference where there is one.
        let reference = inputs.has_reference(config)? && config.reference() == Reference::Start;
        let copies = 4 + usize::from(reference);
        let layers = architecture.layers.len();
        let inputs_of_layers = self.micro_rows * (layers + 1) * architecture.hidden;
        let footprint = inputs.model.footprint;
        Ok(Memory {
            program,
            base: footprint.resident,
            unpacked: footprint.unpacked,
            adapter: FLOAT * copies * adapter,
            cache: KeyValueStore::bytes(architecture, self.stored_rows),
            sampling: FLOAT * self.forward_rows * forward_width(architecture),
            learning: FLOAT * (inputs_of_layers + self.micro_rows * backward_width(architecture)),
            head: FLOAT * (3 * self.targets * architecture.hidden + head::BLOCK),
            loading: reading_bytes(),
        })
    }
}

/// Numbers per row alive at the end of a layer's forward pass: its input and output, two norms, the middle and both sums;
/// queries and attended values, keys and values; gate, up and their product.
fn forward_width(architecture: &Architecture) -> usize {
    let Architecture { hidden, intermediate, heads, key_value_heads, head_dim, .. } = *architecture;
    7 * hidden + 2 * heads * head_dim + 2 * key_value_heads * head_dim + 3 * intermediate
}

/// The same in the backward pass, where what came before the rotation lives too. Gradients come on top, most of them at the
/// gate: that of the product, and those of both factors with their sums.
fn backward_width(architecture: &Architecture) -> usize {
    let Architecture { hidden, intermediate, heads, key_value_heads, head_dim, .. } = *architecture;
    forward_width(architecture) + 4 * hidden + heads * head_dim + key_value_heads * head_dim + 6 * intermediate
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
        let Memory { program, base, unpacked, adapter, cache, sampling, learning, head, loading } = self.memory;
        let gigabytes = |bytes: usize| bytes as f64 / 1e9;
        let form = match unpacked {
            0 => "f32".to_string(),
            bytes => format!("packed, {:.2} more for the projection in use", gigabytes(bytes)),
        };
        writeln!(f, "#\n# memory at its fullest, completions as long as they may be (GB)")?;
        let rows = [
            ("program, tokenizer, data", program, String::new(), "take fewer rows"),
            (
                "base weights",
                base,
                format!("{form}; while they are read, {:.2} more", gigabytes(loading)),
                "choose a smaller model",
            ),
            ("adapter", adapter, "with its gradient, moments and copies".into(), "lower lora.rank"),
            ("keys and values", cache, "of the sampler".into(), "lower batch.group or the max_tokens"),
            (
                "activations",
                self.memory.activations(),
                format!("learning {:.2}, sampling {:.2}", gigabytes(learning), gigabytes(sampling)),
                "lower batch.micro_tokens",
            ),
            ("allocator", self.memory.pieces(), "pieces that freed activations leave".into(), ""),
            ("head", head, String::new(), "lower batch.micro_tokens"),
        ];
        let mut line = |name: &str, bytes: usize, note: &str| {
            writeln!(f, "{}", format!("#   {name:<26}{:>7.2}  {note}", gigabytes(bytes)).trim_end())
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
