//! The learner: trees of completions in, one optimizer step of the adapter out.
//!
//! For each micro-batch: the model's forward pass to the log-probabilities of the completion tokens, the objective's coefficients
//! ∂L/∂ℓ, and the model's backward pass from them.
//!
//! * [`tree`]: trees, and how they are packed into micro-batches
//! * [`portion`]: trees of one kind of tasks, and what is minimized on them
//! * [`optimizer`]: AdamW, clipping, schedules

pub mod optimizer;
pub mod portion;
pub mod tree;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use candle_core::{Device, Tensor};
use tracing::debug;

use crate::config::Learner as Settings;
use crate::cuda::Place;
use crate::model::{Call, Gradients, Model, Question, Trace};
use crate::objective::{Counts, Metrics};
use crate::ops::kernel::Kernel;
use crate::policy::Adapter;
use optimizer::AdamW;
use portion::{Loss, Portion};
use tree::{MicroBatch, Tree, pack};

/// The adapter being trained, its optimizer, and the frozen policies that it is compared with.
pub struct Learner {
    model: Arc<Model>,
    settings: Settings,
    adapter: Adapter,
    /// AdamW's moments and count.
    pub optimizer: AdamW,
    /// What `learner.kl` and preference pairs compare with; `None` is the base model.
    reference: Option<Adapter>,
}

/// How a step is computed, beside the learner's settings.
#[derive(Clone, Copy, Debug)]
pub struct StepShape {
    /// Rows per forward and backward pass.
    pub micro_tokens: usize,
    /// The longest completion allowed, in tokens.
    pub max_tokens: usize,
    /// The sampling temperature: log-probabilities are those of the tempered softmax.
    pub temperature: f64,
    /// The learning rate of this step.
    pub learning_rate: f64,
    /// Dropout of the adapter's inputs, where there is any.
    pub dropout: Option<StepDropout>,
}

/// What decides which of the adapter's inputs a step drops.
#[derive(Clone, Copy, Debug)]
pub struct StepDropout {
    /// The probability of each to be dropped.
    pub share: f64,
    /// The run's seed.
    pub seed: u64,
    /// The step's number.
    pub step: u64,
}

/// What a step did.
#[derive(Debug)]
pub struct StepReport {
    /// The step's loss: about zero for an on-policy step with centered advantages; the gradient is not.
    pub loss: f64,
    /// The loss of each kind of tasks, before its share.
    pub losses: BTreeMap<&'static str, f64>,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Rows that went through forward and backward.
    pub tokens: usize,
    /// Means and maxima over completion tokens.
    pub metrics: Metrics,
    /// What a GPU's memory was used for at most so far, and what it holds ready, in bytes.
    pub gpu: Vec<(&'static str, usize)>,
}

/// Told after each layer's backward pass how many are done, of how many; an error ends the step.
pub type LayerDone<'a> = &'a mut dyn FnMut(usize, usize) -> Result<()>;

/// The gradient of one step, in the order of [`Adapter::tensors`].
pub struct StepGradient {
    /// One per adapter tensor.
    pub gradients: Vec<Tensor>,
    /// What was computed on the way; `grad_norm` is still zero.
    pub report: StepReport,
}

impl Learner {
    /// A learner that starts from `adapter`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn new(model: Arc<Model>, adapter: &Adapter, reference: Option<Adapter>, settings: &Settings) -> Result<Self> {
        let optimizer = AdamW::new(adapter, model.gpu())?;
        Ok(Self { model, settings: settings.clone(), adapter: adapter.clone(), optimizer, reference })
    }

    /// The adapter as it is now.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// What computes.
    pub fn place(&self) -> Place {
        self.model.place()
    }

    /// What its matrices are multiplied with.
    pub fn kernel(&self) -> Kernel {
        self.model.kernel
    }

    /// Where adapters live that no GPU made.
    pub fn device(&self) -> &Device {
        &self.model.device
    }

    /// One optimizer step.
    ///
    /// # Errors
    /// If a completion does not fit, a number is not finite, the device or `layer_done` fails. Nothing is updated then.
    pub fn step(&mut self, portions: &[Portion], shape: &StepShape, layer_done: LayerDone) -> Result<StepReport> {
        let (gradients, mut report) = self.summed(portions, shape, layer_done)?;
        report.grad_norm = self.optimizer.step(&mut self.adapter, gradients, shape.learning_rate, &self.settings)?;
        self.adapter.version += 1;
        Ok(report)
    }

    /// The gradient of the loss over all portions; micro-batches only change how it is summed up.
    ///
    /// # Errors
    /// As [`Learner::step`].
    pub fn gradient(&self, portions: &[Portion], shape: &StepShape, layer_done: LayerDone) -> Result<StepGradient> {
        let (gradients, report) = self.summed(portions, shape, layer_done)?;
        Ok(StepGradient { gradients: gradients.into_tensors(&self.adapter)?, report })
    }

    /// The same, where it was computed.
    fn summed(
        &self,
        portions: &[Portion],
        shape: &StepShape,
        layer_done: LayerDone,
    ) -> Result<(Gradients, StepReport)> {
        let mut gradients = self.model.gradients(&self.adapter)?;
        let mut report = StepReport {
            loss: 0.0,
            losses: BTreeMap::new(),
            grad_norm: 0.0,
            tokens: 0,
            metrics: Metrics::default(),
            gpu: Vec::new(),
        };
        let packed = portions.iter().map(|portion| Ok((portion, pack(&portion.trees, shape.micro_tokens)?)));
        let packed = packed.collect::<Result<Vec<_>>>()?;
        let layers = self.model.architecture.layers.len();
        let (mut done, total) =
            (0, layers * packed.iter().map(|(_, micro_batches)| micro_batches.len()).sum::<usize>());
        let mut layer_done = || {
            done += 1;
            layer_done(done, total)
        };
        let mut earlier = 0;
        for (portion, mut micro_batches) in packed {
            let counts = portion.counts(portions, shape.max_tokens);
            for micro in &mut micro_batches {
                micro.dropout =
                    shape.dropout.map(|StepDropout { share, seed, step }| micro.dropout(share, seed, step, earlier));
                debug!(rows = micro.ids.len(), branches = micro.branches.len(), "micro-batch");
                self.accumulate(micro, (portion, &counts), shape, &mut gradients, &mut report, &mut layer_done)?;
            }
            earlier += portion.trees.len();
        }
        report.gpu = self.model.gpu().map(|gpu| gpu.shares()).transpose()?.unwrap_or_default();
        Ok((gradients, report))
    }

    fn accumulate(
        &self,
        micro: &MicroBatch,
        (portion, counts): (&Portion, &Counts),
        shape: &StepShape,
        gradients: &mut Gradients,
        report: &mut StepReport,
        layer_done: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let (model, temperature) = (&*self.model, portion.temperature(shape.temperature));
        let adapters = [(0..micro.ids.len(), Some(&self.adapter))];
        let trace = trace(model, micro, &adapters, temperature, true)?;
        let logprobs_t = floats(&trace.logprobs);
        let compared = self.settings.kl > 0.0 && portion.loss == Loss::Reward;
        let kl_t = compared.then(|| logprobs(model, self.reference.as_ref(), micro, temperature)).transpose()?;
        let objective = portion.objective(&micro.branches, &logprobs_t, kl_t.as_deref(), &self.settings, counts)?;
        let entropy: f64 = trace.entropies.iter().copied().map(f64::from).sum();
        let scaled = objective.coefficients.concat().into_iter().map(|w| (portion.share * w) as f32);
        model.backward(trace, &scaled.collect::<Vec<_>>(), gradients, layer_done)?;
        report.loss += portion.share * objective.loss;
        *report.losses.entry(portion.loss.name()).or_default() += objective.loss;
        report.tokens += micro.ids.len();
        report.metrics.merge(objective.metrics);
        report.metrics.mean("entropy", entropy, logprobs_t.len() as f64);
        Ok(())
    }

    /// The reference's log-probability of every token of one tree's completions. A tree is computed alone, so the numbers do
    /// not depend on when it was its turn.
    ///
    /// # Errors
    /// If a completion does not fit into `micro_tokens`, or the device fails.
    pub fn reference_logprobs(&self, tree: &Tree, micro_tokens: usize) -> Result<Vec<Vec<f64>>> {
        completion_logprobs(&self.model, self.reference.as_ref(), std::slice::from_ref(tree), micro_tokens, 1.0)
    }
}

/// The log-probability of every completion token of every branch, in the order of the trees.
///
/// # Errors
/// If a completion does not fit into `micro_tokens`, or the device fails.
pub fn completion_logprobs(
    model: &Model,
    adapter: Option<&Adapter>,
    trees: &[Tree],
    micro_tokens: usize,
    temperature: f64,
) -> Result<Vec<Vec<f64>>> {
    let mut all = Vec::new();
    for micro in pack(trees, micro_tokens)? {
        let logprobs = logprobs(model, adapter, &micro, temperature)?;
        all.extend(micro.branches.iter().map(|(_, range)| logprobs[range.clone()].to_vec()));
    }
    Ok(all)
}

/// The log-probability of every target of a micro-batch; nothing is kept for a backward pass, and nothing is dropped.
fn logprobs(model: &Model, adapter: Option<&Adapter>, micro: &MicroBatch, temperature: f64) -> Result<Vec<f64>> {
    let adapters = [(0..micro.ids.len(), adapter)];
    Ok(floats(&trace(model, micro, &adapters, temperature, false)?.logprobs))
}

/// The model's forward pass over a micro-batch, for the learner's own backward pass or for none.
fn trace<'a>(
    model: &Model,
    micro: &'a MicroBatch,
    adapters: &'a [(Range<usize>, Option<&'a Adapter>)],
    temperature: f64,
    learns: bool,
) -> Result<Trace<'a>> {
    let MicroBatch { ids, positions, spans, stores, predicting, targets, .. } = micro;
    let dropout = micro.dropout.as_ref().filter(|_| learns);
    let question = Question { predicting, targets, logits: model.logits(temperature), dropout };
    model.trace(Call { ids, positions, spans, stores, adapters }, question, learns)
}

fn floats(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}
