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

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};

pub use architecture::{Architecture, AttentionKind, Projection};
pub use cache::KeyValueStore;
pub use parts::Footprint;
pub use weights::Weights;

use crate::config::Quantization;
use crate::cuda::Place;
use crate::cuda::decoder;
use crate::cuda::device::{Array, Gpu, Purpose};
use crate::ops::attention::Span;
use crate::ops::dropout::Dropout;
use crate::ops::head::{Choice, Chosen, Logits};
use crate::ops::kernel::Kernel;
use crate::ops::keys::{Store, padded};
use crate::ops::panels::Panels;
use crate::policy::Adapter;
use cache::Layers;
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
    decoder: Decoder,
}

/// What computes a model, on the tensors it holds.
enum Decoder {
    Host(host::Decoder),
    Gpu(decoder::Decoder),
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
    kept: Option<Kept>,
}

enum Kept {
    Host(host::Kept),
    Gpu(Box<decoder::Kept>),
}

/// The same, as what computes returns it.
pub(crate) struct Traced<K> {
    pub logprobs: Vec<f32>,
    pub entropies: Vec<f32>,
    pub kept: Option<K>,
}

/// Gradients of one adapter's tensors, on their way to being summed up or when that is done, in the order of [`Adapter::tensors`].
pub enum Gradients {
    /// Of each tensor, row by row, on this processor.
    Host(Vec<Vec<f32>>),
    /// Of all tensors, one after the other.
    Gpu(Array<f32>),
}

const OTHER_STORE: &str = "the store of keys and values is on another device than the model";

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
            bail!("token {id} is outside the model's vocabulary of {vocabulary}");
        }
        if let Some(position) = self.positions.iter().find(|&&position| position >= context) {
            bail!("position {position} is outside the model's context of {context} tokens");
        }
        let fits = |span: &Span| span.queries.end <= rows && span.queries.len() <= span.own.len();
        if let Some(span) = self.spans.iter().find(|span| !fits(span)) {
            bail!("{span:?} does not fit the {rows} rows of the call");
        }
        Ok(())
    }

    /// How many key rows the calls' rows take, up to the end of the last block.
    pub(crate) fn key_rows(&self) -> usize {
        self.stores.last().map_or(0, |last| padded(last.to + last.from.len()))
    }

    /// The adapter of a call whose rows have all the same.
    fn only_adapter(&self) -> Option<&Adapter> {
        self.adapters.first().and_then(|(_, adapter)| *adapter)
    }
}

impl Gradients {
    /// As tensors of the adapter's shapes, on this processor.
    ///
    /// # Errors
    /// If the device fails.
    pub fn into_tensors(self, adapter: &Adapter) -> Result<Vec<Tensor>> {
        match self {
            Self::Host(values) => {
                let shaped = values.into_iter().zip(adapter.layout().shapes());
                shaped.map(|(values, shape)| Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)).collect()
            }
            Self::Gpu(values) => adapter.layout().tensors(&values.download()?),
        }
    }
}

impl<'a> Trace<'a> {
    fn new<K>(traced: Traced<K>, call: Call<'a>, question: Question<'a>, kept: impl Fn(K) -> Kept) -> Self {
        let Traced { logprobs, entropies, kept: own } = traced;
        Self { logprobs, entropies, call, question, kept: own.map(kept) }
    }

    /// Gives back the memory of what attention did on this processor: a backward pass computes it again, to the same bits, as it does
    /// where there is no room for it.
    pub fn forget(&mut self) {
        if let Some(Kept::Host(kept)) = &mut self.kept {
            kept.forget();
        }
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
        Ok(Self { architecture, device: device.clone(), kernel, decoder: Decoder::Host(decoder) })
    }

    /// The same on a GPU.
    ///
    /// # Errors
    /// As [`Model::load`], or if there is not enough memory.
    pub fn load_on(gpu: &Arc<Gpu>, weights: &Weights, quantization: Option<Quantization>) -> Result<Self> {
        let architecture = Arc::new(weights.architecture()?);
        let decoder = Decoder::Gpu(decoder::Decoder::load(gpu, &architecture, weights, quantization)?);
        Ok(Self { architecture, device: Device::Cpu, kernel: Kernel::Cuda, decoder })
    }

    /// Opens and loads a model, nothing packed: see [`Weights::open`].
    ///
    /// # Errors
    /// As [`Weights::open`] and [`Model::load`].
    pub fn open(path: &Path, kernel: Kernel) -> Result<Self> {
        Self::load(&Weights::open(path)?, None, kernel, &Device::Cpu)
    }

    /// The head's weight [vocabulary, hidden], where this processor computes.
    pub fn head(&self) -> Option<&Panels> {
        match &self.decoder {
            Decoder::Host(decoder) => Some(decoder.head()),
            Decoder::Gpu(_) => None,
        }
    }

    /// The GPU that computes it, if one does.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        match &self.decoder {
            Decoder::Host(_) => None,
            Decoder::Gpu(decoder) => Some(decoder.gpu()),
        }
    }

    /// What computes it.
    pub fn place(&self) -> Place {
        Place { kernel: self.kernel, gpu: self.gpu().cloned() }
    }

    /// How many tokens' keys and values all samplers may hold beside the model, where a GPU's memory decides on that.
    pub fn stored_tokens(&self) -> Option<usize> {
        match &self.decoder {
            Decoder::Host(_) => None,
            Decoder::Gpu(decoder) => Some(decoder.stored_tokens()),
        }
    }

    /// How logits are made at a temperature.
    pub fn logits(&self, temperature: f64) -> Logits {
        Logits { soft_cap: self.architecture.logit_cap.map(|cap| cap as f32), temperature: temperature as f32 }
    }

    /// Room for the keys and values of `rows` tokens.
    ///
    /// # Errors
    /// If a GPU has no room for them.
    pub fn store(&self, rows: usize) -> Result<KeyValueStore> {
        match &self.decoder {
            Decoder::Host(_) => Ok(KeyValueStore::new(&self.architecture, rows, self.kernel)),
            Decoder::Gpu(decoder) => Ok(KeyValueStore::on_gpu(decoder.keys(rows)?, rows)),
        }
    }

    /// Zeros for the gradients of an adapter.
    ///
    /// # Errors
    /// If a GPU has no room for them.
    pub fn gradients(&self, adapter: &Adapter) -> Result<Gradients> {
        Ok(match &self.decoder {
            Decoder::Host(_) => {
                Gradients::Host(adapter.layout().shapes().map(|(rows, columns)| vec![0.0; rows * columns]).collect())
            }
            Decoder::Gpu(decoder) => Gradients::Gpu(decoder.gpu().zeros(Purpose::Adapter, adapter.numbers())?),
        })
    }

    /// Refuses a call that does not fit. What a GPU made of adapters is read before this processor multiplies with it.
    fn check(&self, call: &Call) -> Result<()> {
        call.check(&self.architecture)?;
        let here = call.adapters.iter().filter_map(|(_, adapter)| adapter.filter(|_| self.gpu().is_none()));
        here.map(Adapter::host_tensors).try_for_each(|tensors| tensors.map(drop))
    }

    /// All layers: the normed last hidden states of selected rows, [selected.len(), hidden].
    ///
    /// # Errors
    /// If the parts of the call disagree about its rows, a token or position is outside what the model knows, or packed weights
    /// cannot be unpacked.
    pub fn forward(&self, call: &Call, store: &mut KeyValueStore, selected: &[u32]) -> Result<Vec<f32>> {
        self.check(call)?;
        match (&self.decoder, store.layers()) {
            (Decoder::Host(decoder), Layers::Host(keys)) => Ok(decoder.forward(call, keys, selected)?.to_vec()),
            (Decoder::Gpu(decoder), Layers::Gpu(keys)) => decoder.forward(call, keys, selected),
            _ => bail!(OTHER_STORE),
        }
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
        self.check(call)?;
        match (&self.decoder, store.layers()) {
            (Decoder::Host(decoder), Layers::Host(keys)) => decoder.choose(call, keys, predicting, choices, logits),
            (Decoder::Gpu(decoder), Layers::Gpu(keys)) => decoder.choose(call, keys, predicting, choices, logits),
            _ => bail!(OTHER_STORE),
        }
    }

    /// The log-probabilities that a call over whole trees is asked for. What a backward pass needs is kept if there will be one.
    ///
    /// # Errors
    /// As [`Model::forward`], or if a target is outside the vocabulary.
    pub fn trace<'a>(&self, call: Call<'a>, question: Question<'a>, keep: bool) -> Result<Trace<'a>> {
        self.check(&call)?;
        Ok(match &self.decoder {
            Decoder::Host(decoder) => Trace::new(decoder.trace(&call, &question, keep)?, call, question, Kept::Host),
            Decoder::Gpu(decoder) => {
                Trace::new(decoder.trace(&call, &question, keep)?, call, question, |kept| Kept::Gpu(kept.into()))
            }
        })
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
        match (&self.decoder, kept, gradients) {
            (Decoder::Host(decoder), Kept::Host(kept), Gradients::Host(gradients)) => {
                decoder.backward((&call, &question, kept), coefficients, gradients, layer_done)
            }
            (Decoder::Gpu(decoder), Kept::Gpu(kept), Gradients::Gpu(gradient)) => {
                decoder.backward((&call, &question, *kept), coefficients, gradient, layer_done)
            }
            _ => bail!("a trace and gradients of models on different devices"),
        }
    }
}
