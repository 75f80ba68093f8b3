//! What a model is put together from: tensors that are read, or what their headers say of them.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::{Architecture, Model, Projection, Weights};
use crate::config::Quantization;
use crate::cuda::tensors;
use crate::ops::kernel::Kernel;
use crate::ops::panels::Panels;
use crate::ops::quantized::Weight;

/// Tensors by their Hugging Face names, as whoever computes holds them.
pub(crate) trait Parts {
    /// A norm's gain or a bias.
    type Vector;
    /// An embedding table or head.
    type Table;
    /// A projection's weight.
    type Matrix;

    /// A vector, to whose values `offset` is added.
    fn vector(&mut self, name: &str, width: usize, offset: f64) -> Result<Self::Vector>;
    /// An embedding table or head.
    fn table(&mut self, name: &str, shape: &[usize; 2]) -> Result<Self::Table>;
    /// A projection's weight, which may be packed.
    fn matrix(&mut self, name: &str, shape: &[usize; 2]) -> Result<Self::Matrix>;
}

/// All frozen tensors of a decoder.
pub(crate) struct Tensors<V, T, M> {
    pub embedding: Arc<T>,
    /// Where they are tied, the embedding.
    pub head: Arc<T>,
    pub norm: V,
    pub layers: Vec<LayerTensors<V, M>>,
}

/// Those of a layer.
pub(crate) struct LayerTensors<V, M> {
    pub attention_norm: V,
    /// Of what attention returns.
    pub attention_output_norm: Option<V>,
    pub feed_forward_norm: V,
    /// Of what the feed-forward block returns.
    pub feed_forward_output_norm: Option<V>,
    /// Of every head, [head_dim].
    pub query_norm: Option<V>,
    pub key_norm: Option<V>,
    /// Weight [out, in] and bias [out] by [`Projection`].
    pub projections: [(M, Option<V>); 7],
}

impl<V, T, M> Tensors<V, T, M> {
    /// Asks for every tensor of such a model.
    pub fn assemble(
        architecture: &Architecture,
        parts: &mut impl Parts<Vector = V, Table = T, Matrix = M>,
    ) -> Result<Self> {
        let Architecture { vocabulary, hidden, norm_offset, .. } = *architecture;
        let table = [vocabulary, hidden];
        let embedding = Arc::new(parts.table("model.embed_tokens.weight", &table)?);
        let head = if architecture.tied { embedding.clone() } else { Arc::new(parts.table("lm_head.weight", &table)?) };
        let layers = (0..architecture.layers.len()).map(|index| LayerTensors::assemble(index, architecture, parts));
        let layers = layers.collect::<Result<_>>()?;
        let norm = parts.vector("model.norm.weight", hidden, norm_offset)?;
        Ok(Self { embedding, head, norm, layers })
    }
}

impl<V, M> LayerTensors<V, M> {
    fn assemble(
        index: usize,
        architecture: &Architecture,
        parts: &mut impl Parts<Vector = V, Matrix = M>,
    ) -> Result<Self> {
        let name = |part: &str, what: &str| format!("model.layers.{index}.{part}.{what}");
        let mut projections = Vec::new();
        for projection in Projection::ALL {
            let ((wide, narrow), module) = (architecture.dimensions(projection), projection.module());
            let weight = parts.matrix(&name(module, "weight"), &[wide, narrow])?;
            let biased = architecture.has_bias(projection);
            let bias = biased.then(|| parts.vector(&name(module, "bias"), wide, 0.0)).transpose()?;
            projections.push((weight, bias));
        }
        let Architecture { hidden, head_dim, output_norms, head_norms, norm_offset, .. } = *architecture;
        let mut norm = |part: &str, width: usize| parts.vector(&name(part, "weight"), width, norm_offset);
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

/// Reads them for this processor.
pub(super) struct Reading<'a> {
    pub weights: &'a Weights,
    pub architecture: &'a Architecture,
    pub quantization: Option<Quantization>,
    pub kernel: Kernel,
}

impl Parts for Reading<'_> {
    type Vector = Vec<f32>;
    type Table = Panels;
    type Matrix = Weight;

    fn vector(&mut self, name: &str, width: usize, offset: f64) -> Result<Vec<f32>> {
        self.weights.vector(name, width, offset, self.architecture)
    }

    fn table(&mut self, name: &str, shape: &[usize; 2]) -> Result<Panels> {
        self.weights.panels(name, shape, self.architecture, self.kernel)
    }

    fn matrix(&mut self, name: &str, shape: &[usize; 2]) -> Result<Weight> {
        self.weights.matrix(name, shape, self.architecture, self.quantization, self.kernel)
    }
}

/// What a model's weights take, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// All the time.
    pub resident: usize,
    /// The projections of one layer as products want them: the transposed copy in a backward pass.
    pub layer: usize,
    /// Those of them that are packed, while the layer is used.
    pub unpacked: usize,
}

/// Looks at headers only.
struct Headers<'a> {
    weights: &'a Weights,
    architecture: &'a Architecture,
    quantization: Option<Quantization>,
    kernel: Kernel,
    /// Of all layers together, as long as they are counted.
    footprint: Footprint,
}

impl Parts for Headers<'_> {
    type Vector = ();
    type Table = ();
    type Matrix = ();

    fn vector(&mut self, name: &str, width: usize, _: f64) -> Result<()> {
        self.weights.stored(name, &[width], self.architecture)?;
        self.footprint.resident += size_of::<f32>() * width;
        Ok(())
    }

    fn table(&mut self, name: &str, shape: &[usize; 2]) -> Result<()> {
        self.footprint.resident += self.weights.stored(name, shape, self.architecture)?.panel_bytes(self.kernel);
        Ok(())
    }

    fn matrix(&mut self, name: &str, shape: &[usize; 2]) -> Result<()> {
        let stored = self.weights.stored(name, shape, self.architecture)?;
        let form = match self.kernel {
            Kernel::Cuda => tensors::form(&stored, self.quantization),
            _ => stored.form(self.quantization),
        };
        match form {
            None => {
                self.footprint.layer += stored.transposed_bytes(self.kernel);
                self.footprint.resident += stored.panel_bytes(self.kernel);
            }
            Some(form) => {
                let bytes = Panels::bytes(shape[0], shape[1], self.kernel);
                self.footprint.layer += bytes;
                self.footprint.unpacked += bytes;
                let bytes = stored.packed_bytes(form);
                self.footprint.resident +=
                    bytes.with_context(|| format!("{}: tensor {name}", self.weights.path().display()))?;
            }
        }
        Ok(())
    }
}

/// Notes what is asked for.
#[derive(Default)]
struct Names(Vec<(String, Vec<usize>)>);

impl Parts for Names {
    type Vector = ();
    type Table = ();
    type Matrix = ();

    fn vector(&mut self, name: &str, width: usize, _: f64) -> Result<()> {
        self.0.push((name.to_string(), vec![width]));
        Ok(())
    }

    fn table(&mut self, name: &str, shape: &[usize; 2]) -> Result<()> {
        self.0.push((name.to_string(), shape.to_vec()));
        Ok(())
    }

    fn matrix(&mut self, name: &str, shape: &[usize; 2]) -> Result<()> {
        self.table(name, shape)
    }
}

impl Model {
    /// Name and shape of every tensor of such a model.
    ///
    /// # Errors
    /// None that a description which was read can bring about.
    pub fn tensors(architecture: &Architecture) -> Result<Vec<(String, Vec<usize>)>> {
        let mut names = Names::default();
        Tensors::assemble(architecture, &mut names)?;
        Ok(names.0)
    }

    /// What the weights will take, from the headers alone, which must have every tensor in its shape.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn footprint(
        weights: &Weights,
        architecture: &Architecture,
        quantization: Option<Quantization>,
        kernel: Kernel,
    ) -> Result<Footprint> {
        let footprint = Footprint::default();
        let mut headers = Headers { weights, architecture, quantization, kernel, footprint };
        Tensors::assemble(architecture, &mut headers)?;
        let layers = architecture.layers.len().max(1);
        headers.footprint.layer /= layers;
        headers.footprint.unpacked /= layers;
        Ok(headers.footprint)
    }
}
