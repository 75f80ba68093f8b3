//! `candor bench`: how fast this machine samples and learns with a model, on random tokens. One JSON line per measurement.
//!
//! A figure is the median over repetitions, after one that is not counted; all of them are printed beside it.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use serde_json::{Value, json};

use crate::config::{Device as Where, Dtype, Learner as LearnerSettings, Lora};
use crate::cuda::Place;
use crate::event::Observer;
use crate::learner::portion::{Loss, Portion};
use crate::learner::tree::{Branch, Signal, Tree};
use crate::learner::{Learner, StepShape};
use crate::model::{Architecture, Footprint, KeyValueStore, Model, Projection};
use crate::model_files::{ModelFiles, Policy};
use crate::ops::head;
use crate::ops::kernel::Kernel;
use crate::ops::left::Left;
use crate::ops::panels::{Panels, Threads};
use crate::ops::rows::in_blocks;
use crate::policy::Adapter;
use crate::random::SplitMix64;
use crate::record::{page_faults, peak_memory, resident_memory};
use crate::sampler::local::LocalSampler;
use crate::sampler::local::{group_rows, stored_rows};
use crate::sampler::{Generation, Request, Sampler, Settings as Sampling};
use crate::tokenizer::Tokenizer;

/// What is measured, and on what.
#[derive(Clone, Debug)]
pub struct Settings<'a> {
    /// The model, as `model.source` is.
    pub source: &'a str,
    /// What is computed in.
    pub dtype: Dtype,
    /// With which instructions; absent, the fastest.
    pub kernel: Option<Kernel>,
    /// Where.
    pub device: Where,
    /// Rank of the adapter on q, k, v and o.
    pub rank: usize,
    /// Rows per forward and backward pass of the learner.
    pub micro_tokens: usize,
    /// Repetitions that count.
    pub repeats: usize,
}

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Measurement {
    /// Products of matrices in the cache: the peak that others are compared with.
    Products,
    /// The learner's forward and backward pass over `sequences` of `tokens`.
    Learner {
        /// Sequences, which share nothing.
        sequences: usize,
        /// Tokens of each.
        tokens: usize,
    },
    /// The sampler alone: every prompt continued `group` times by exactly `new` tokens.
    Decode(Shape),
    /// A whole step: sampling, forward, backward, update.
    Step(Shape),
}

/// How much is sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Prompts, each with tokens of its own.
    pub prompts: usize,
    /// Completions of each.
    pub group: usize,
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens of a completion.
    pub new: usize,
}

/// A loaded model with a fresh adapter.
pub struct Bench {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    adapter: Arc<Adapter>,
    repeats: usize,
    micro_tokens: usize,
    footprint: Footprint,
    /// What was resident before the weights were read, in bytes.
    program: u64,
    /// From the start of loading to its end.
    loading_seconds: f64,
}

impl Bench {
    /// Loads the model.
    ///
    /// # Errors
    /// If it cannot be had, or this machine cannot compute what is asked for.
    pub fn prepare(settings: &Settings, observer: Observer) -> Result<Self> {
        let &Settings { source, dtype, kernel, device, rank, micro_tokens, repeats } = settings;
        ensure!(repeats > 0 && rank > 0, "there is nothing to measure with {repeats} repetitions and rank {rank}");
        let files = ModelFiles::open(source, observer)?.computed_by(Place::choose(device, dtype, kernel)?)?;
        let (program, footprint) = (resident_memory().unwrap_or(0), files.footprint);
        let started = Instant::now();
        let Policy { model, tokenizer, .. } = files.policy(None, &Device::Cpu, observer)?;
        let loading_seconds = started.elapsed().as_secs_f64();
        let tokenizer =
            Arc::new(Arc::into_inner(tokenizer).context("the tokenizer is still in use")?.without_end_tokens());
        let lora = Lora { rank, ..Lora::default() };
        let adapter = Arc::new(Adapter::initialize(&model.architecture, &lora, 0, &Device::Cpu)?);
        Ok(Self { model, tokenizer, adapter, repeats, micro_tokens, footprint, program, loading_seconds })
    }

    /// Measures one thing.
    ///
    /// # Errors
    /// If it does not fit the model or `micro_tokens`.
    pub fn measure(&self, measurement: Measurement) -> Result<Value> {
        let learns = !matches!(measurement, Measurement::Decode(_));
        ensure!(!learns || self.model.kernel != Kernel::Int8, "int8 is for decoding; leave --dtype out");
        let products = matches!(measurement, Measurement::Products);
        ensure!(!products || self.model.gpu().is_none(), "products are those of the processor; use --device cpu");
        let mut line = match measurement {
            Measurement::Products => self.products(),
            Measurement::Learner { sequences, tokens } => self.learner(sequences, tokens),
            Measurement::Decode(shape) => self.decode(shape),
            Measurement::Step(shape) => self.step(shape),
        }?;
        line["kernel"] = json!(self.model.kernel);
        line["threads"] = json!(rayon::current_num_threads());
        line["loading_seconds"] = json!(self.loading_seconds);
        line["peak_bytes"] = json!(peak_memory());
        line["device"] = json!(self.model.gpu().map(|gpu| gpu.memory()).transpose()?);
        Ok(line)
    }

    fn products(&self) -> Result<Value> {
        const ROWS: usize = 1024;
        let Architecture { hidden, intermediate, .. } = *self.model.architecture;
        let mut stream = SplitMix64::new(0);
        let mut random = |len: usize| (0..len).map(|_| stream.next_f64() as f32 - 0.5).collect::<Vec<_>>();
        let weight = Panels::pack(&random(intermediate * hidden), hidden, self.model.kernel);
        let (rows, mut product) = (random(ROWS * hidden), vec![0.0; ROWS * intermediate]);
        let seconds = self.timed(|| {
            for _ in 0..10 {
                let product = [(&mut *product, intermediate)];
                in_blocks(
                    ROWS,
                    product,
                    || (),
                    |(), block, [product]| {
                        let rows = &rows[block.start * hidden..block.end * hidden];
                        let left = Left::new(rows, hidden, self.model.kernel);
                        weight.multiply(&left, 0..intermediate, product, intermediate, false, Threads::All);
                    },
                );
            }
            Ok(())
        })?;
        let operations = 10.0 * 2.0 * (ROWS * hidden * intermediate) as f64;
        Ok(json!({
            "measurement": "products", "shape": [ROWS, hidden, intermediate],
            "gflops": operations / median(&seconds) / 1e9, "seconds": seconds,
        }))
    }

    fn learner(&self, sequences: usize, tokens: usize) -> Result<Value> {
        ensure!(tokens > 1, "a sequence has at least two tokens");
        // The prompt is one token, and the last token of a completion needs no row: as many rows as tokens.
        let branch = |index: usize| Branch::demonstration(self.ids(1000 + index, tokens));
        let trees = (0..sequences).map(|index| self.tree(index, 1, vec![branch(index)])).collect();
        let portions = [Portion { loss: Loss::Demonstration, share: 1.0, trees }];
        let learner = self.new_learner()?;
        let faults = page_faults();
        let seconds =
            self.timed(|| learner.gradient(&portions, &self.shape(tokens), &mut |_, _| Ok(())).map(|_| ()))?;
        let rows = sequences * tokens;
        Ok(json!({
            "measurement": "learner", "sequences": sequences, "tokens": tokens,
            "tokens_per_second": rows as f64 / median(&seconds),
            "gflops": self.operations(rows, rows) / median(&seconds) / 1e9,
            "page_faults": self.each_time(faults), "seconds": seconds,
        }))
    }

    fn decode(&self, shape: Shape) -> Result<Value> {
        let mut sampler = self.sampler();
        let faults = page_faults();
        let prefill = self.timed(|| self.sample(&mut sampler, Shape { new: 1, ..shape }).map(|_| ()))?;
        let seconds = self.timed(|| self.sample(&mut sampler, shape).map(|_| ()))?;
        let (rollouts, Shape { prompts, group, prompt, new }) = (shape.prompts * shape.group, shape);
        let alone = median(&seconds) - median(&prefill);
        Ok(json!({
            "measurement": "decode", "prompts": prompts, "group": group, "prompt": prompt, "new": new,
            "tokens_per_second": (rollouts * new) as f64 / median(&seconds),
            "decode_tokens_per_second": (rollouts * (new - 1)) as f64 / alone,
            "prefill_tokens_per_second": (prompts * prompt) as f64 / median(&prefill),
            "page_faults": self.each_time(faults), "seconds": seconds, "prefill_seconds": prefill,
        }))
    }

    fn step(&self, shape: Shape) -> Result<Value> {
        let (mut sampler, mut learner) = (self.sampler(), self.new_learner()?);
        let mut sampling = Vec::new();
        let faults = page_faults();
        let seconds = self.timed(|| {
            let started = Instant::now();
            let generations = self.sample(&mut sampler, shape)?;
            sampling.push(started.elapsed().as_secs_f64());
            learner.step(&self.rolled_out(shape, &generations), &self.shape(shape.new), &mut |_, _| Ok(())).map(|_| ())
        })?;
        let (share, sampling) = (median(&sampling[1..]) / median(&seconds), &sampling[1..]);
        let Shape { prompts, group, prompt, new } = shape;
        let trained = prompts * group * new;
        let rows = prompts * (prompt + group * (new - 1));
        let learning = median(&seconds) - median(sampling);
        Ok(json!({
            "measurement": "step", "prompts": prompts, "group": group, "prompt": prompt, "new": new,
            "step_seconds": median(&seconds), "sampling_seconds": median(sampling), "learning_seconds": learning,
            "trained_tokens_per_second": trained as f64 / median(&seconds),
            "sampler_idle": 1.0 - share, "learner_idle": share,
            "learner_gflops": self.operations(rows, trained) / learning / 1e9,
            "memory": self.memory(shape), "page_faults": self.each_time(faults), "seconds": seconds,
        }))
    }

    /// Runs once without counting, then as often as asked for; seconds of each.
    fn timed(&self, mut f: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
        f()?;
        let mut once = || {
            let started = Instant::now();
            f().map(|()| started.elapsed().as_secs_f64())
        };
        (0..self.repeats).map(|_| once()).collect()
    }

    /// Page faults since then, for each repetition.
    fn each_time(&self, before: Option<u64>) -> Option<u64> {
        Some((page_faults()? - before?) / (self.repeats as u64 + 1))
    }

    /// Operations with frozen weights in a learner's pass: forward, the recomputation, which leaves the last projection out,
    /// and backward; the head forward and backward, and on a GPU forward again in between.
    fn operations(&self, rows: usize, targets: usize) -> f64 {
        let architecture = &self.model.architecture;
        let weights = |projection: Projection| {
            let (wide, narrow) = architecture.dimensions(projection);
            architecture.layers.len() * wide * narrow
        };
        let all: usize = Projection::ALL.into_iter().map(weights).sum();
        let recomputed = if architecture.output_norms { all } else { all - weights(Projection::DownProj) };
        let times = if self.model.place().gpu.is_some() { 3 } else { 2 };
        let head = times * architecture.vocabulary * architecture.hidden;
        2.0 * ((2 * all + recomputed) * rows + head * targets) as f64
    }

    /// Where the peak went, in bytes; activations are what the other terms leave of it.
    fn memory(&self, shape: Shape) -> Value {
        let sampling = self.sampling(shape.new);
        let groups = (0..shape.prompts).map(|_| group_rows(shape.prompt, shape.group, &sampling));
        let keys = KeyValueStore::bytes(
            &self.model.architecture,
            stored_rows(groups, self.model.stored_tokens(), 1),
            self.model.kernel,
        );
        let (base, head, adapter) = (
            self.footprint.resident,
            head::bytes(shape.prompts * shape.group * shape.new, self.model.architecture.hidden),
            4 * 4 * self.adapter.numbers(),
        );
        let known = self.program as usize + base + adapter + keys + head;
        let activations = peak_memory().map(|peak| (peak as usize).saturating_sub(known));
        json!({
            "program": self.program, "base": base, "adapter_and_moments": adapter, "keys_and_values": keys, "head": head,
            "activations": activations,
        })
    }

    fn ids(&self, index: usize, len: usize) -> Vec<u32> {
        let mut stream = SplitMix64::new(index as u64);
        let vocabulary = self.model.architecture.vocabulary as f64;
        (0..len).map(|_| (stream.next_f64() * vocabulary) as u32).collect()
    }

    fn tree(&self, index: usize, prompt: usize, branches: Vec<Branch>) -> Tree {
        Tree { name: format!("bench-{index}"), prompt_ids: self.ids(index, prompt), branches }
    }

    fn rolled_out(&self, shape: Shape, generations: &[Generation]) -> [Portion; 1] {
        let mut trees: Vec<Tree> = (0..shape.prompts).map(|index| self.tree(index, shape.prompt, Vec::new())).collect();
        for Generation { group, rollout, ids, behavior_t, .. } in generations {
            let behavior_t = behavior_t.iter().copied().map(f64::from).collect();
            let advantage = if rollout % 2 == 0 { 1.0 } else { -1.0 };
            let signal = Signal::Reward { behavior_t, advantage };
            let branch = Branch { rollout: *rollout, ids: ids.clone(), mask_t: vec![true; ids.len()], signal };
            trees[*group].branches.push(branch);
        }
        [Portion::sampled(trees)]
    }

    fn new_learner(&self) -> Result<Learner> {
        Learner::new(self.model.clone(), &self.adapter, None, &LearnerSettings::default())
    }

    fn shape(&self, max_tokens: usize) -> StepShape {
        StepShape { micro_tokens: self.micro_tokens, max_tokens, temperature: 1.0, learning_rate: 1e-5, dropout: None }
    }

    fn sampler(&self) -> LocalSampler {
        LocalSampler::new(self.model.clone(), self.tokenizer.clone())
    }

    fn sampling(&self, max_tokens: usize) -> Sampling {
        Sampling { max_tokens, temperature: 1.0, stop: Vec::new(), seed: 0, step: 0 }
    }

    fn sample(&self, sampler: &mut LocalSampler, shape: Shape) -> Result<Vec<Generation>> {
        let request = |index: usize| Request {
            name: format!("bench-{index}"),
            prompt_ids: self.ids(index, shape.prompt),
            rollouts: shape.group,
        };
        let requests: Vec<Request> = (0..shape.prompts).map(request).collect();
        let mut generations = Vec::new();
        sampler.sample(&requests, &Some(self.adapter.clone()), &self.sampling(shape.new), &mut |generation| {
            generations.push(generation);
            Ok(())
        })?;
        Ok(generations)
    }
}

fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

impl Shape {
    /// From `4x8x97+64`: prompts, completions of each, tokens of a prompt and of a completion; `32x150+128` has groups of one.
    ///
    /// # Errors
    /// If it is written otherwise, or a number is zero.
    pub fn parse(text: &str) -> Result<Self> {
        let form =
            || format!("{text:?} is not like 4x8x97+64: prompts, completions of each, prompt tokens + new tokens");
        let (counts, new) = text.split_once('+').with_context(form)?;
        let counts = counts.split('x').map(str::parse).collect::<Result<Vec<usize>, _>>().with_context(form)?;
        let (prompts, group, prompt) = match counts[..] {
            [prompts, prompt] => (prompts, 1, prompt),
            [prompts, group, prompt] => (prompts, group, prompt),
            _ => anyhow::bail!(form()),
        };
        let shape = Self { prompts, group, prompt, new: new.parse().with_context(form)? };
        ensure!(prompts > 0 && group > 0 && prompt > 0 && shape.new > 0, "{text:?}: there must be one of everything");
        Ok(shape)
    }
}
