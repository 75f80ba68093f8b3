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
//! * [`cache`]: keys and values of past tokens, for the sampler

pub mod architecture;
pub mod cache;
pub mod family;
pub mod gguf;
pub mod metadata;
mod parts;
pub mod safetensors;
pub mod stored;
pub mod weights;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};

pub use architecture::{Architecture, AttentionKind, Projection};
pub use cache::{KeyValueStore, Store};
pub use parts::Footprint;
pub use weights::Weights;

use crate::config::Quantization;
use crate::ops::attention::{Heads, Span, attention};
use crate::ops::gate::gated;
use crate::ops::head::Logits;
use crate::ops::linear::{Frozen, linear};
use crate::ops::norm::rms_norm;
use crate::ops::rope::{Rotation, rope};
use crate::policy::Adapter;
use parts::{Parts, Reading};

/// A frozen decoder. Its tensors exist once; whoever needs them shares the model in an `Arc`.
pub struct Model {
    /// What it looks like.
    pub architecture: Architecture,
    /// Where its tensors live.
    pub device: Device,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
}

struct Layer {
    attention_norm: Tensor,
    /// Of what attention returns.
    attention_output_norm: Option<Tensor>,
    feed_forward_norm: Tensor,
    /// Of what the feed-forward block returns.
    feed_forward_output_norm: Option<Tensor>,
    /// Of every head, [head_dim].
    query_norm: Option<Tensor>,
    key_norm: Option<Tensor>,
    /// By [`Projection`].
    projections: [Frozen; 7],
}

/// The rows of one forward call: consecutive rows of one or several sequences.
pub struct Call<'a> {
    /// Token of every row.
    pub ids: &'a [u32],
    /// Logical position of every row in its sequence.
    pub positions: &'a [usize],
    /// Which keys every row attends to: rows of this call, or of the store if there is one.
    pub spans: Arc<[Span]>,
    /// Which adapter applies to which rows; the ranges cover all rows in order.
    pub adapters: &'a [(Range<usize>, Option<&'a Adapter>)],
    /// Where keys and values go and come from; without it they are the call's own.
    pub store: Option<(&'a KeyValueStore, &'a [Store])>,
}

/// What every layer of one call needs beside its input.
pub struct LayerCall<'a> {
    /// By kind of attention.
    rotations: Vec<Rotation>,
    call: &'a Call<'a>,
}

impl Model {
    /// Loads a model from an opened file or folder. If a quantization is given, the layers' projections stay packed.
    ///
    /// # Errors
    /// If a tensor is missing, has the wrong shape or cannot be packed like this.
    pub fn load(weights: &Weights, quantization: Option<Quantization>, device: &Device) -> Result<Self> {
        let architecture = &weights.architecture()?;
        Self::assemble(architecture, device, &mut Reading { weights, architecture, quantization, device })
    }

    fn assemble(architecture: &Architecture, device: &Device, parts: &mut impl Parts) -> Result<Self> {
        let table = [architecture.vocabulary, architecture.hidden];
        let embedding = parts.tensor("model.embed_tokens.weight", &table)?;
        let head = if architecture.tied { embedding.clone() } else { parts.tensor("lm_head.weight", &table)? };
        let layers = (0..architecture.layers.len()).map(|index| Layer::load(index, architecture, parts));
        let layers = layers.collect::<Result<_>>()?;
        let norm = (parts.tensor("model.norm.weight", &[architecture.hidden])? + architecture.norm_offset)?;
        let (architecture, device) = (architecture.clone(), device.clone());
        Ok(Self { architecture, device, embedding, layers, norm, head })
    }

    /// Opens and loads a model, nothing packed: see [`Weights::open`].
    ///
    /// # Errors
    /// As [`Weights::open`] and [`Model::load`].
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        Self::load(&Weights::open(path)?, None, device)
    }

    /// The head's weight [vocabulary, hidden].
    pub fn head(&self) -> &Tensor {
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
    pub fn begin<'a>(&self, call: &'a Call<'a>) -> Result<LayerCall<'a>> {
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
        let kinds = self.architecture.attention.iter();
        Ok(LayerCall { rotations: kinds.map(|kind| Rotation::new(call.positions, &kind.frequencies)).collect(), call })
    }

    /// Embeds the call's tokens: [rows, hidden].
    ///
    /// # Errors
    /// If the device fails.
    pub fn embed(&self, call: &Call) -> Result<Tensor> {
        let embedded = self.embedding.index_select(&Tensor::new(call.ids, &self.device)?, 0)?;
        let scale = self.architecture.embedding_scale;
        Ok(if scale == 1.0 { embedded } else { (embedded * scale)? })
    }

    /// One layer: [rows, hidden] to [rows, hidden].
    ///
    /// # Errors
    /// If the device fails.
    pub fn layer(&self, index: usize, x: &Tensor, context: &LayerCall) -> Result<Tensor> {
        let (layer, epsilon) = (&self.layers[index], self.architecture.norm_epsilon);
        let kind = self.architecture.layers[index];
        let project = |x: &Tensor, projection: Projection| self.project(index, projection, x, context.call.adapters);
        let rotation = &context.rotations[kind];
        let normed = |x: Tensor, gain: &Option<Tensor>| match gain {
            Some(gain) => rms_norm(&x, gain, epsilon),
            None => Ok(x),
        };
        let h = rms_norm(x, &layer.attention_norm, epsilon)?;
        let q = rope(&normed(project(&h, Projection::QProj)?, &layer.query_norm)?, rotation)?;
        let k = rope(&normed(project(&h, Projection::KProj)?, &layer.key_norm)?, rotation)?;
        let v = project(&h, Projection::VProj)?;
        let (k, v) = match context.call.store {
            Some((store, stores)) => store.write(index, &k, &v, stores)?,
            None => (k, v),
        };
        let attended = attention(&q, &k, &v, self.heads(kind), &context.call.spans)?;
        let x = (x + normed(project(&attended, Projection::OProj)?, &layer.attention_output_norm)?)?;
        let h = rms_norm(&x, &layer.feed_forward_norm, epsilon)?;
        let (gate, up) = (project(&h, Projection::GateProj)?, project(&h, Projection::UpProj)?);
        let gated = gated(&gate, &up, self.architecture.activation)?;
        Ok((x + normed(project(&gated, Projection::DownProj)?, &layer.feed_forward_output_norm)?)?)
    }

    fn heads(&self, kind: usize) -> Heads {
        let Architecture { heads, key_value_heads, head_dim, score_scale, score_cap, .. } = self.architecture;
        Heads {
            query: heads,
            key: key_value_heads,
            dim: head_dim,
            scale: score_scale as f32,
            soft_cap: score_cap.map(|cap| cap as f32),
            window: self.architecture.attention[kind].window,
        }
    }

    fn project(
        &self,
        index: usize,
        projection: Projection,
        x: &Tensor,
        adapters: &[(Range<usize>, Option<&Adapter>)],
    ) -> Result<Tensor> {
        let frozen = &self.layers[index].projections[projection as usize];
        let mut parts = Vec::with_capacity(adapters.len());
        for (rows, adapter) in adapters {
            let low_rank = adapter.and_then(|adapter| adapter.low_rank(index, projection));
            // With one adapter this is all of x, and no copy is made.
            parts.push(linear(&x.narrow(0, rows.start, rows.len())?, frozen, low_rank)?);
        }
        if parts.len() == 1 { Ok(parts.remove(0)) } else { Ok(Tensor::cat(&parts, 0)?) }
    }

    /// The final norm of selected rows of the last layer's output: [rows.len(), hidden], ready for the head.
    ///
    /// # Errors
    /// If a row does not exist.
    pub fn select(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let selected = x.index_select(&Tensor::new(rows, &self.device)?, 0)?;
        Ok(rms_norm(&selected, &self.norm, self.architecture.norm_epsilon)?)
    }

    /// All layers, without keeping anything for a backward pass: the last layer's output [rows, hidden].
    ///
    /// # Errors
    /// As [`Model::begin`], or if the device fails.
    pub fn forward(&self, call: &Call) -> Result<Tensor> {
        let context = self.begin(call)?;
        let mut x = self.embed(call)?;
        for index in 0..self.layers.len() {
            x = self.layer(index, &x, &context)?;
        }
        Ok(x)
    }
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
        let mut norm = |part: &str, width: usize| -> Result<Tensor> {
            Ok((parts.tensor(&name(part, "weight"), &[width])? + architecture.norm_offset)?)
        };
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
