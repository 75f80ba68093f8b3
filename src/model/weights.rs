//! Weights by their Hugging Face names, from a GGUF file or a folder of safetensors, converted once.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value as Metadata};
use candle_core::{Device, Tensor};
use serde_json::Value;

use super::architecture::{Architecture, Projection};
use super::safetensors::Safetensors;
use super::stored::Stored;
use super::{Model, gguf};
use crate::config::Quantization;
use crate::ops::kernel::Kernel;
use crate::ops::panels::Panels;
use crate::ops::quantized::Weight;
use crate::source::single_file;

/// An opened model file or folder.
pub enum Weights {
    /// A GGUF file; its metadata also describes the model and its tokenizer.
    Gguf {
        /// Where it lies, for messages.
        path: PathBuf,
        /// Header and metadata.
        content: Content,
        /// The file itself.
        file: File,
    },
    /// A folder with `config.json` and one or several safetensors files.
    Folder {
        /// Where it lies, for messages.
        path: PathBuf,
        /// Its opened files.
        tensors: Safetensors,
    },
}

impl Weights {
    /// Opens a `.gguf` file, a folder that holds exactly one however deep, or a Hugging Face folder.
    ///
    /// # Errors
    /// If there is no model, more than one, or its header cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        if path.join("config.json").exists() {
            return Ok(Self::Folder { path: path.into(), tensors: Safetensors::in_folder(path)? });
        }
        let path = if path.is_dir() {
            single_file(path, "gguf").context("expected config.json with safetensors, or one .gguf file")?
        } else {
            path.to_path_buf()
        };
        let file = File::open(&path).with_context(|| format!("{}: cannot open", path.display()))?;
        let bytes = file.metadata()?.len();
        let content = gguf::read(BufReader::new(&file), bytes);
        let content = content.with_context(|| format!("{}: not a readable gguf file", path.display()))?;
        Ok(Self::Gguf { path, content, file })
    }

    /// The model's description.
    ///
    /// # Errors
    /// If the description is missing or of an unsupported family.
    pub fn architecture(&self) -> Result<Architecture> {
        match self {
            Self::Gguf { path, content, file } => {
                let embedding = content.tensor_infos.get("token_embd.weight").map(|info| info.shape.dims().to_vec());
                let Some([vocabulary, _]) = embedding.as_deref() else {
                    bail!("{}: tensor token_embd.weight is missing or not a matrix", path.display());
                };
                let tied = !content.tensor_infos.contains_key("output.weight");
                // Llama 3's scaling comes as what each rotary frequency is divided by.
                let divisors = content.tensor_infos.get("rope_freqs.weight").map(|info| {
                    let stored = place(content, file, info, None);
                    stored.load(&Device::Cpu)?.to_vec1::<f32>().map_err(anyhow::Error::from)
                });
                let divisors = divisors.transpose();
                let divisors = divisors.with_context(|| format!("{}: tensor rope_freqs.weight", path.display()))?;
                Architecture::from_gguf(&content.metadata, *vocabulary, tied, divisors.as_deref())
                    .with_context(|| path.display().to_string())
            }
            Self::Folder { path, .. } => {
                Architecture::from_config(&config(path)?).with_context(|| path.display().to_string())
            }
        }
    }

    /// The GGUF metadata, or `None` for a folder.
    pub fn metadata(&self) -> Option<&HashMap<String, Metadata>> {
        match self {
            Self::Gguf { content, .. } => Some(&content.metadata),
            Self::Folder { .. } => None,
        }
    }

    /// Refuses tensors of layers that such a model does not have: they would be left out, and another model would run than
    /// the one that the file holds. What lies outside the layers, such as a copy of a tied head, may be there.
    ///
    /// # Errors
    /// If there is one; the message names the first.
    pub fn check_layers(&self, architecture: &Architecture) -> Result<()> {
        let tensors = Model::tensors(architecture)?.into_iter();
        let (names, known): (Vec<&str>, HashSet<String>) = match self {
            Self::Gguf { content, .. } => (
                content.tensor_infos.keys().map(String::as_str).collect(),
                tensors.map(|(name, _)| gguf_name(&name, architecture)).collect(),
            ),
            Self::Folder { tensors: files, .. } => (files.names(), tensors.map(|(name, _)| name).collect()),
        };
        let in_layer = |name: &str| name.starts_with("model.layers.") || name.starts_with("blk.");
        // Rotary frequencies, which older checkpoints carry, follow from the description.
        let left_out = |name: &&str| in_layer(name) && !known.contains(*name) && !name.ends_with("rotary_emb.inv_freq");
        let Some(name) = names.into_iter().filter(left_out).min() else { return Ok(()) };
        let (path, layers) = (self.path().display(), architecture.layers.len());
        bail!(
            "{path}: tensor {name} would be left out: the model's description, of {layers} layers, has no place for it; use \
             the description that was made for these weights"
        )
    }

    /// How many numbers all tensors hold.
    pub fn elements(&self) -> usize {
        match self {
            Self::Gguf { content, .. } => content.tensor_infos.values().map(|info| info.shape.elem_count()).sum(),
            Self::Folder { tensors, .. } => tensors.elements(),
        }
    }

    /// Where the model lies.
    pub fn path(&self) -> &Path {
        match self {
            Self::Gguf { path, .. } | Self::Folder { path, .. } => path,
        }
    }

    /// The shape of the tensor of this Hugging Face name, from the header: no data is read.
    ///
    /// # Errors
    /// If it is missing.
    pub fn shape(&self, name: &str, architecture: &Architecture) -> Result<Vec<usize>> {
        match self {
            Self::Folder { tensors, .. } => tensors.shape(name),
            Self::Gguf { path, content, .. } => Ok(named(path, content, name, architecture)?.shape.dims().to_vec()),
        }
    }

    /// Where the tensor of this Hugging Face name lies, from the header: no data is read.
    ///
    /// # Errors
    /// If it is missing, its shape is not the one that the model's description asks for, or its numbers are of a type that
    /// cannot be read.
    pub fn stored(&self, name: &str, shape: &[usize], architecture: &Architecture) -> Result<Stored<'_>> {
        let found = self.shape(name, architecture)?;
        ensure!(
            found == shape,
            "{}: tensor {name} has shape {found:?}, the model's description asks for {shape:?}",
            self.path().display()
        );
        match self {
            Self::Folder { tensors, .. } => tensors.stored(name),
            Self::Gguf { path, content, file } => {
                let info = named(path, content, name, architecture)?;
                // Files of some families interleave the two halves of each head of queries and keys.
                let heads = [Projection::QProj, Projection::KProj].iter().any(|heads| name.contains(heads.module()));
                Ok(place(content, file, info, (heads && architecture.interleaved).then_some(architecture.head_dim)))
            }
        }
    }

    /// The tensor of this Hugging Face name, in f32.
    ///
    /// # Errors
    /// As [`Weights::stored`], or if the file cannot be read any more.
    pub fn tensor(&self, name: &str, shape: &[usize], architecture: &Architecture, device: &Device) -> Result<Tensor> {
        let loaded = self.stored(name, shape, architecture)?.load(device);
        loaded.with_context(|| format!("{}: tensor {name}", self.path().display()))
    }

    /// The vector of this Hugging Face name in f32, to whose values `offset` is added.
    ///
    /// # Errors
    /// As [`Weights::tensor`].
    pub fn vector(&self, name: &str, width: usize, offset: f64, architecture: &Architecture) -> Result<Vec<f32>> {
        let mut values = self.tensor(name, &[width], architecture, &Device::Cpu)?.to_vec1::<f32>()?;
        values.iter_mut().for_each(|value| *value = (f64::from(*value) + offset) as f32);
        Ok(values)
    }

    /// The matrix of this Hugging Face name, as products want it.
    ///
    /// # Errors
    /// As [`Weights::tensor`].
    pub fn panels(&self, name: &str, shape: &[usize], architecture: &Architecture, kernel: Kernel) -> Result<Panels> {
        let loaded = self.stored(name, shape, architecture)?.panels(kernel);
        loaded.with_context(|| format!("{}: tensor {name}", self.path().display()))
    }

    /// The same, packed if that is asked for.
    ///
    /// # Errors
    /// As [`Weights::tensor`], or if it cannot be packed like this.
    pub fn matrix(
        &self,
        name: &str,
        shape: &[usize],
        architecture: &Architecture,
        quantization: Option<Quantization>,
        kernel: Kernel,
    ) -> Result<Weight> {
        let stored = self.stored(name, shape, architecture)?;
        let Some(form) = stored.form(quantization) else {
            return self.panels(name, shape, architecture, kernel).map(Weight::Panels);
        };
        let packed = stored.pack(form).map(Weight::Packed);
        packed.with_context(|| format!("{}: tensor {name}", self.path().display()))
    }
}

/// The `config.json` of a folder.
///
/// # Errors
/// If it cannot be read or is not JSON.
pub fn config(folder: &Path) -> Result<Value> {
    let file = folder.join("config.json");
    let text = std::fs::read_to_string(&file).with_context(|| format!("{}: cannot read", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{}: not json", file.display()))
}

/// What a GGUF file's header says of the tensor of this Hugging Face name.
fn named<'a>(path: &Path, content: &'a Content, name: &str, architecture: &Architecture) -> Result<&'a TensorInfo> {
    let stored = gguf_name(name, architecture);
    let info = content.tensor_infos.get(&stored);
    info.with_context(|| format!("{}: tensor {stored} ({name}) is missing", path.display()))
}

/// Where a tensor of a GGUF file lies.
fn place<'a>(content: &Content, file: &'a File, info: &TensorInfo, interleaved: Option<usize>) -> Stored<'a> {
    let offset = content.tensor_data_offset + info.offset;
    Stored { file, offset, kind: info.ggml_dtype, shape: info.shape.dims().to_vec(), interleaved }
}

/// GGUF's name of a tensor: `model.layers.3.self_attn.q_proj.weight` is `blk.3.attn_q.weight`.
pub(crate) fn gguf_name(name: &str, architecture: &Architecture) -> String {
    const PARTS: [(&str, &str); 16] = [
        ("model.embed_tokens.", "token_embd."),
        ("model.norm.", "output_norm."),
        ("lm_head.", "output."),
        ("model.layers.", "blk."),
        ("input_layernorm.", "attn_norm."),
        ("pre_feedforward_layernorm.", "ffn_norm."),
        ("post_feedforward_layernorm.", "post_ffw_norm."),
        ("self_attn.q_norm.", "attn_q_norm."),
        ("self_attn.k_norm.", "attn_k_norm."),
        ("self_attn.q_proj.", "attn_q."),
        ("self_attn.k_proj.", "attn_k."),
        ("self_attn.v_proj.", "attn_v."),
        ("self_attn.o_proj.", "attn_output."),
        ("mlp.gate_proj.", "ffn_gate."),
        ("mlp.up_proj.", "ffn_up."),
        ("mlp.down_proj.", "ffn_down."),
    ];
    // One name in checkpoints for two things: the norm after attention, or that before the feed-forward block.
    let after_attention = if architecture.output_norms { "post_attention_norm." } else { "ffn_norm." };
    let parts = PARTS.into_iter().chain([("post_attention_layernorm.", after_attention)]);
    parts.fold(name.to_string(), |name, (from, to)| name.replace(from, to))
}
