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
//! * [`layer`]: one layer, forward and backward
//! * [`cache`]: keys and values of past tokens, for the sampler

pub mod architecture;
pub mod cache;
pub mod family;
pub mod gguf;
mod layer;
pub mod metadata;
mod parts;
pub mod safetensors;
pub mod stored;
pub mod weights;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::Device;

pub use architecture::{Architecture, AttentionKind, Projection};
pub use cache::KeyValueStore;
pub use layer::{AdapterGradient, Attended};
pub use parts::Footprint;
pub use weights::Weights;

use crate::config::Quantization;
use crate::ops::attention::Span;
use crate::ops::buffer::Buffer;
use crate::ops::dropout::{Dropout, Mask};
use crate::ops::head::Logits;
use crate::ops::kernel::Kernel;
use crate::ops::keys::{Keys, Store};
use crate::ops::norm::RmsNorm;
use crate::ops::panels::Panels;
use crate::ops::rope::Rotation;
use crate::ops::rows::on_the_pool;
use crate::policy::Adapter;
use layer::{Frozen, Layer, Work};
use parts::{Parts, Reading};

/// A frozen decoder. Its tensors exist once; whoever needs them shares the model in an `Arc`.
pub struct Model {
    /// What it looks like.
    pub architecture: Architecture,
    /// Where its tensors live.
    pub device: Device,
    /// What multiplies matrices.
    pub kernel: Kernel,
    embedding: Arc<Panels>,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Arc<Panels>,
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

/// What every layer of one call needs beside its input.
pub struct LayerCall<'a> {
    /// By layer, the number of its rotation; by kind of attention.
    kinds: &'a [usize],
    rotations: Vec<Rotation>,
    call: &'a Call<'a>,
    dropout: Option<&'a Dropout>,
}

impl<'a> LayerCall<'a> {
    /// The same call, in which adapters do not see all of their inputs.
    pub fn with_dropout(self, dropout: Option<&'a Dropout>) -> Self {
        Self { dropout, ..self }
    }

    fn mask(&self, rows: Range<usize>, layer: usize, projection: Projection) -> Option<Mask<'_>> {
        self.dropout.map(|dropout| dropout.mask(rows, layer, projection as usize))
    }

    fn rotation(&self, layer: usize) -> &Rotation {
        &self.rotations[self.kinds[layer]]
    }

    /// The parts of a block of rows that have an adapter in common, counted from the block's first row.
    fn adapters(&self, rows: &Range<usize>) -> impl Iterator<Item = (Range<usize>, Option<&Adapter>)> {
        let (first, last) = (rows.start, rows.end);
        self.call.adapters.iter().filter_map(move |(range, adapter)| {
            let (start, end) = (range.start.max(first), range.end.min(last));
            (start < end).then(|| (start - first..end - first, *adapter))
        })
    }

    /// The adapter of a call whose rows have all the same.
    fn only_adapter(&self) -> Option<&Adapter> {
        self.call.adapters.first().and_then(|(_, adapter)| *adapter)
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
        let architecture = &weights.architecture()?;
        Self::assemble(architecture, kernel, device, &mut Reading { weights, architecture, quantization, kernel })
    }

    fn assemble(architecture: &Architecture, kernel: Kernel, device: &Device, parts: &mut impl Parts) -> Result<Self> {
        let table = [architecture.vocabulary, architecture.hidden];
        let embedding = Arc::new(parts.table("model.embed_tokens.weight", &table)?);
        let head = if architecture.tied { embedding.clone() } else { Arc::new(parts.table("lm_head.weight", &table)?) };
        let layers = (0..architecture.layers.len()).map(|index| Layer::load(index, architecture, parts));
        let layers = layers.collect::<Result<_>>()?;
        let norm = norm("model.norm.weight", architecture.hidden, architecture, parts)?;
        let (architecture, device) = (architecture.clone(), device.clone());
        Ok(Self { architecture, device, kernel, embedding, layers, norm, head })
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
        &self.head
    }

    /// How logits are made at a temperature.
    pub fn logits(&self, temperature: f64) -> Logits {
        Logits { soft_cap: self.architecture.logit_cap.map(|cap| cap as f32), temperature: temperature as f32 }
    }

    /// Prepares what all layers of a call share.
    ///
    /// # Errors
    /// If the parts of the call disagree about its rows, or a token or position is outside what the model knows.
    pub fn begin<'a>(&'a self, call: &'a Call<'a>) -> Result<LayerCall<'a>> {
        let rows = call.ids.len();
        ensure!(call.positions.len() == rows, "{} positions for {rows} rows", call.positions.len());
        let covered = call.adapters.iter().try_fold(0, |end, (range, _)| (range.start == end).then_some(range.end));
        ensure!(covered == Some(rows), "adapters do not cover the {rows} rows of the call in order");
        let (vocabulary, context) = (self.architecture.vocabulary, self.architecture.context);
        if let Some(id) = call.ids.iter().find(|&&id| id as usize >= vocabulary) {
            anyhow::bail!("token {id} is outside the model's vocabulary of {vocabulary}");
        }
        if let Some(position) = call.positions.iter().find(|&&position| position >= context) {
            anyhow::bail!("position {position} is outside the model's context of {context} tokens");
        }
        let fits = |span: &Span| span.queries.end <= rows && span.queries.len() <= span.own.len();
        if let Some(span) = call.spans.iter().find(|span| !fits(span)) {
            anyhow::bail!("{span:?} does not fit the {rows} rows of the call");
        }
        let kinds = self.architecture.attention.iter();
        let rotations = kinds.map(|kind| Rotation::new(call.positions, &kind.frequencies)).collect();
        Ok(LayerCall { kinds: &self.architecture.layers, rotations, call, dropout: None })
    }

    /// Embeds the call's tokens: [rows, hidden].
    pub fn embed(&self, call: &Call) -> Buffer {
        let (hidden, scale) = (self.architecture.hidden, self.architecture.embedding_scale as f32);
        let mut embedded = Buffer::new(call.ids.len() * hidden);
        for (row, id) in embedded.chunks_exact_mut(hidden).zip(call.ids) {
            self.embedding.row(*id as usize, row);
            if scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= scale);
            }
        }
        embedded
    }

    /// One layer: `x` [rows, hidden] to the output, of the same shape, and what attention did on the way. The call's keys and
    /// values are added to `keys`.
    ///
    /// # Errors
    /// If packed weights cannot be unpacked.
    pub fn layer(&self, index: usize, x: &[f32], context: &LayerCall, keys: &mut Keys) -> Result<(Buffer, Attended)> {
        on_the_pool(|| {
            let mut y = Buffer::new(x.len());
            let attended = self.work(index, context)?.forward(x, keys, &mut y);
            Ok((y, attended))
        })
    }

    /// The same layer backward: replaces `grad`, the gradient of its output, by that of its input `x`, and returns the adapter's
    /// gradients. What attention did is computed again unless it was kept. `room` is for the call's keys and values.
    ///
    /// # Errors
    /// As [`Model::layer`].
    pub fn layer_backward(
        &self,
        index: usize,
        (x, kept): (&[f32], Option<Attended>),
        grad: &mut [f32],
        context: &LayerCall,
        room: [&mut Keys; 2],
    ) -> Result<AdapterGradient> {
        on_the_pool(|| Ok(self.work(index, context)?.backward(x, kept, grad, room)))
    }

    fn work<'a>(&'a self, index: usize, context: &'a LayerCall) -> Result<Work<'a>> {
        Work::new(&self.layers[index], index, &self.architecture, context, self.kernel)
    }

    /// Selected rows of the last layer's output: [rows.len(), hidden].
    pub fn select(&self, x: &[f32], rows: &[u32]) -> Buffer {
        let hidden = self.architecture.hidden;
        let mut selected = Buffer::new(rows.len() * hidden);
        for (to, row) in selected.chunks_exact_mut(hidden).zip(rows) {
            to.copy_from_slice(&x[*row as usize * hidden..][..hidden]);
        }
        selected
    }

    /// The final norm of rows of the last layer's output: ready for the head.
    pub fn final_norm(&self, x: &[f32]) -> Buffer {
        let mut normed = Buffer::new(x.len());
        self.norm.forward(x, &mut normed);
        normed
    }

    /// The gradient of the last layer's output [rows of `x`, hidden] from that of the normed `selected` rows of it.
    pub fn select_backward(&self, x: &[f32], selected: &[u32], grad: &[f32]) -> Buffer {
        let hidden = self.architecture.hidden;
        let mut dx = Buffer::zeros(x.len());
        for (row, grad) in selected.iter().zip(grad.chunks_exact(hidden)) {
            let place = *row as usize * hidden..(*row as usize + 1) * hidden;
            self.norm.backward(&x[place.clone()], grad, &mut dx[place]);
        }
        dx
    }

    /// All layers: the normed last hidden states of selected rows, [selected.len(), hidden].
    ///
    /// # Errors
    /// As [`Model::begin`] and [`Model::layer`].
    pub fn forward(&self, call: &Call, store: &mut KeyValueStore, selected: &[u32]) -> Result<Buffer> {
        let context = self.begin(call)?;
        let mut x = self.embed(call);
        for index in 0..self.layers.len() {
            x = self.layer(index, &x, &context, store.layer(index))?.0;
        }
        Ok(self.final_norm(&self.select(&x, selected)))
    }
}

/// A normalization as the model applies it.
fn norm(name: &str, width: usize, architecture: &Architecture, parts: &mut impl Parts) -> Result<RmsNorm> {
    let mut gain = parts.tensor(name, &[width])?;
    gain.iter_mut().for_each(|gain| *gain = (f64::from(*gain) + architecture.norm_offset) as f32);
    Ok(RmsNorm { gain, epsilon: architecture.norm_epsilon })
}

impl Layer {
    fn load(index: usize, architecture: &Architecture, parts: &mut impl Parts) -> Result<Self> {
        let name = |part: &str, what: &str| format!("model.layers.{index}.{part}.{what}");
        let mut projections = Vec::new();
        for projection in Projection::ALL {
            let ((wide, narrow), module) = (architecture.dimensions(projection), projection.module());
            let weight = parts.matrix(&name(module, "weight"), &[wide, narrow])?;
            let bias = architecture.has_bias(projection).then(|| parts.tensor(&name(module, "bias"), &[wide]));
            let bias = bias.transpose()?;
            projections.push(Frozen { weight, bias });
        }
        let mut norm = |part: &str, width: usize| norm(&name(part, "weight"), width, architecture, parts);
        let Architecture { hidden, head_dim, output_norms, head_norms, .. } = *architecture;
        let attention_norm = norm("input_layernorm", hidden)?;
        let after_attention = norm("post_attention_layernorm", hidden)?;
        // Where only inputs are normalized, the feed-forward block's norm is called after what comes before it.
        let (attention_output_norm, feed_forward_norm) = match output_norms {
            true => (Some(after_attention), norm("pre_feedforward_layernorm", hidden)?),
            false => (None, after_attention),
        };
        let mut norm_if = |there: bool, part: &str, width: usize| there.then(|| norm(part, width)).transpose();
        Ok(Self {
            attention_norm,
            attention_output_norm,
            feed_forward_norm,
            feed_forward_output_norm: norm_if(output_norms, "post_feedforward_layernorm", hidden)?,
            query_norm: norm_if(head_norms, "self_attn.q_norm", head_dim)?,
            key_norm: norm_if(head_norms, "self_attn.k_norm", head_dim)?,
            projections: projections.try_into().ok().expect("one was pushed per projection"),
        })
    }
}
