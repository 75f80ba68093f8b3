//! One decoder-only transformer described by data.
//!
//! Sampler, learner and reference run this one forward path on the same frozen tensors; the adapter is an argument.
//! Rows are tokens, without batch dimension or padding: [`Call`] says which sequence each row continues.
//!
//! * [`architecture`]: what a decoder looks like
//! * [`family`]: the families that are known, read from `config.json`; [`metadata`]: the same in GGUF's words
//! * [`weights`]: tensors by name from safetensors or GGUF
//! * [`gguf`], [`safetensors`]: the two kinds of files
//! * [`stored`]: a tensor in a file, read in pieces
//! * [`parts`]: what a model is put together from
//! * [`host`]: the decoder on this processor; [`layer`]: one layer of it, forward and backward
//! * [`cache`]: keys and values of past tokens, for the sampler

pub mod architecture;
pub mod cache;
pub mod family;
pub mod gguf;
pub mod host;
mod layer;
pub mod metadata;
pub(crate) mod parts;
pub mod safetensors;
pub mod stored;
pub mod weights;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::Device;

pub use architecture::{Architecture, AttentionKind, Projection};
pub use cache::KeyValueStore;
pub use parts::Footprint;
pub use weights::Weights;

use crate::config::Quantization;
use crate::ops::attention::Span;
use crate::ops::buffer::Buffer;
use crate::ops::dropout::Dropout;
use crate::ops::head::{Choice, Chosen, Logits};
use crate::ops::kernel::Kernel;
use crate::ops::keys::{Store, padded};
use crate::ops::panels::Panels;
use crate::policy::Adapter;
use host::LayerCall;
use parts::{Reading, Tensors};

/// A frozen decoder. Its tensors exist once; whoever needs them shares the model in an `Arc`.
pub struct Model {
    /// What it looks like.
    pub architecture: Arc<Architecture>,
    /// Where adapters live.
    pub device: Device,
    /// What multiplies matrices.
    pub kernel: Kernel,
    decoder: host::Decoder,
}

/// The rows of one forward call: consecutive rows of one or several sequences.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    /// Token of every row.
    pub ids: &'a [u32],
    /// Logical position of every row in its sequence.
    pub positions: &'a [usize],
    /// Which keys every row attends to.
    pub spans: &'a [Span],
    /// Where the keys and values of the call's rows go.
    pub stores: &'a [Store],
    /// Which adapter applies to which rows; the ranges cover all rows in order.
    pub adapters: &'a [(Range<usize>, Option<&'a Adapter>)],
}

/// What a call over whole trees is asked: the log-probabilities of tokens.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    /// The rows that predict.
    pub predicting: &'a [u32],
    /// The token that each of them predicts.
    pub targets: &'a [u32],
    /// How logits are made.
    pub logits: Logits,
    /// What adapters do not see of their inputs.
    pub dropout: Option<&'a Dropout>,
}

/// The answer, and what a backward pass starts from.
pub struct Trace<'a> {
    /// The log-probability of every target, [targets].
    pub logprobs: Vec<f32>,
    /// The entropy of the distribution that each is of, in nats, [targets].
    pub entropies: Vec<f32>,
    call: Call<'a>,
    question: Question<'a>,
    /// What a backward pass needs, if there will be one.
    kept: Option<host::Kept>,
}

/// Gradients of one adapter's tensors on their way to being summed up, in the order of [`Adapter::tensors`].
pub struct Gradients(Vec<Vec<f32>>);

/// Told after each layer's backward pass; an error ends it.
pub type LayerDone<'a> = &'a mut dyn FnMut() -> Result<()>;

impl Call<'_> {
    /// Refuses a call whose parts disagree about its rows, or a token or position outside what the model knows.
    fn check(&self, architecture: &Architecture) -> Result<()> {
        let rows = self.ids.len();
        ensure!(self.positions.len() == rows, "{} positions for {rows} rows", self.positions.len());
        let covered = self.adapters.iter().try_fold(0, |end, (range, _)| (range.start == end).then_some(range.end));
        ensure!(covered == Some(rows), "adapters do not cover the {rows} rows of the call in order");
        let Architecture { vocabulary, context, .. } = *architecture;
        if let Some(id) = self.ids.iter().find(|&&id| id as usize >= vocabulary) {
            anyhow::bail!("token {id} is outside the model's vocabulary of {vocabulary}");
        }
        if let Some(position) = self.positions.iter().find(|&&position| position >= context) {
            anyhow::bail!("position {position} is outside the model's context of {context} tokens");
        }
        let fits = |span: &Span| span.queries.end <= rows && span.queries.len() <= span.own.len();
        if let Some(span) = self.spans.iter().find(|span| !fits(span)) {
            anyhow::bail!("{span:?} does not fit the {rows} rows of the call");
        }
        Ok(())
    }

    /// How many key rows the calls' rows take, up to the end of the last block.
    fn key_rows(&self) -> usize {
        self.stores.last().map_or(0, |last| padded(last.to + last.from.len()))
    }

    /// The adapter of a call whose rows have all the same.
    fn only_adapter(&self) -> Option<&Adapter> {
        self.adapters.first().and_then(|(_, adapter)| *adapter)
    }
}

impl Gradients {
    /// Zeros for each tensor.
    pub fn zeros(adapter: &Adapter) -> Self {
        Self(adapter.tensors().iter().map(|(_, tensor)| vec![0.0; tensor.elem_count()]).collect())
    }

    /// The values of each tensor, row by row.
    pub fn into_values(self) -> Vec<Vec<f32>> {
        self.0
    }
}

impl Model {
    /// Loads a model from an opened file or folder. If a quantization is given, the layers' projections stay packed.
    ///
    /// # Errors
    /// If a tensor is missing, has the wrong shape or cannot be packed like this.
    pub fn load(
        weights: &Weights,
        quantization: Option<Quantization>,
        kernel: Kernel,
        device: &Device,
    ) -> Result<Self> {
        let architecture = Arc::new(weights.architecture()?);
        let reading = &mut Reading { weights, architecture: &architecture, quantization, kernel };
        let decoder = host::Decoder::new(architecture.clone(), kernel, Tensors::assemble(&architecture, reading)?);
        Ok(Self { architecture, device: device.clone(), kernel, decoder })
    }

    /// Opens and loads a model, nothing packed: see [`Weights::open`].
    ///
    /// # Errors
    /// As [`Weights::open`] and [`Model::load`].
    pub fn open(path: &Path, kernel: Kernel) -> Result<Self> {
        Self::load(&Weights::open(path)?, None, kernel, &Device::Cpu)
    }

    /// The head's weight [vocabulary, hidden].
    pub fn head(&self) -> &Panels {
        self.decoder.head()
    }

    /// How logits are made at a temperature.
    pub fn logits(&self, temperature: f64) -> Logits {
        Logits { soft_cap: self.architecture.logit_cap.map(|cap| cap as f32), temperature: temperature as f32 }
    }

    /// Room for the keys and values of `rows` tokens.
    pub fn store(&self, rows: usize) -> KeyValueStore {
        KeyValueStore::new(&self.architecture, rows, self.kernel)
    }

    /// All layers: the normed last hidden states of selected rows, [selected.len(), hidden].
    ///
    /// # Errors
    /// If the parts of the call disagree about its rows, a token or position is outside what the model knows, or packed weights
    /// cannot be unpacked.
    pub fn forward(&self, call: &Call, store: &mut KeyValueStore, selected: &[u32]) -> Result<Buffer> {
        call.check(&self.architecture)?;
        self.decoder.forward(call, store.layers(), selected)
    }

    /// Runs a call and chooses the token that follows each of the `predicting` rows.
    ///
    /// # Errors
    /// As [`Model::forward`], or if a distribution has no finite sum.
    pub fn choose(
        &self,
        call: &Call,
        store: &mut KeyValueStore,
        predicting: &[u32],
        choices: &[Choice],
        logits: Logits,
    ) -> Result<Vec<Chosen>> {
        call.check(&self.architecture)?;
        self.decoder.choose(call, store.layers(), predicting, choices, logits)
    }

    /// The log-probabilities that a call over whole trees is asked for. What a backward pass needs is kept if there will be one.
    ///
    /// # Errors
    /// As [`Model::forward`], or if a target is outside the vocabulary.
    pub fn trace<'a>(&self, call: Call<'a>, question: Question<'a>, keep: bool) -> Result<Trace<'a>> {
        call.check(&self.architecture)?;
        self.decoder.trace(call, question, keep)
    }

    /// Adds the gradient of Σ coefficient · log-probability over the targets of a trace that was kept, with respect to the
    /// adapter that all rows have. From the last layer to the first, each computed again from its input.
    ///
    /// # Errors
    /// As [`Model::forward`], or if `layer_done` fails.
    pub fn backward(
        &self,
        trace: Trace,
        coefficients: &[f32],
        gradients: &mut Gradients,
        layer_done: LayerDone,
    ) -> Result<()> {
        let Trace { call, question, kept, .. } = trace;
        let kept = kept.context("nothing was kept of the forward pass for a backward one")?;
        self.decoder.backward((&call, &question, kept), coefficients, &mut gradients.0, layer_done)
    }
}
