//! What a decoder looks like, as data: read from `config.json` or from a GGUF file's metadata.
//!
//! A family is described here and nowhere else: `model` runs whatever this says.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Value as Metadata;
use serde_json::Value;

pub use crate::config::Projection;
use crate::ops::gate::Activation;

impl Projection {
    /// Every projection of a layer, in the order of the computation.
    pub const ALL: [Projection; 7] = [
        Projection::QProj,
        Projection::KProj,
        Projection::VProj,
        Projection::OProj,
        Projection::GateProj,
        Projection::UpProj,
        Projection::DownProj,
    ];

    /// The module's path within a layer, as checkpoints and PEFT adapters name it.
    pub fn module(self) -> &'static str {
        match self {
            Projection::QProj => "self_attn.q_proj",
            Projection::KProj => "self_attn.k_proj",
            Projection::VProj => "self_attn.v_proj",
            Projection::OProj => "self_attn.o_proj",
            Projection::GateProj => "mlp.gate_proj",
            Projection::UpProj => "mlp.up_proj",
            Projection::DownProj => "mlp.down_proj",
        }
    }
}

/// The shape of a decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// Tokens in the embedding table.
    pub vocabulary: usize,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Width inside the feed-forward block.
    pub intermediate: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// ε of every RMS normalization.
    pub norm_epsilon: f64,
    /// Activation of the feed-forward gate.
    pub activation: Activation,
    /// Rotary frequencies, [head_dim / 2], scaling applied.
    pub frequencies: Vec<f64>,
    /// Whether the output head is the embedding table.
    pub tied: bool,
    /// Longest sequence the model was made for, in tokens.
    pub context: usize,
}

impl Architecture {
    /// (out, in) of a projection.
    pub fn dimensions(&self, projection: Projection) -> (usize, usize) {
        let (attention, keys) = (self.heads * self.head_dim, self.key_value_heads * self.head_dim);
        match projection {
            Projection::QProj => (attention, self.hidden),
            Projection::KProj | Projection::VProj => (keys, self.hidden),
            Projection::OProj => (self.hidden, attention),
            Projection::GateProj | Projection::UpProj => (self.intermediate, self.hidden),
            Projection::DownProj => (self.hidden, self.intermediate),
        }
    }

    /// Reads Hugging Face's `config.json`.
    ///
    /// # Errors
    /// If a key is missing or of the wrong type, or the model is of a family, or has a feature, that is not described here.
    pub fn from_config(config: &Value) -> Result<Self> {
        let family = config["model_type"].as_str().context("config.json: `model_type` is missing")?;
        ensure!(family == "llama", "config.json: model_type {family:?} is not supported yet; supported: llama");
        for feature in ["attention_bias", "mlp_bias"] {
            ensure!(!config[feature].as_bool().unwrap_or(false), "config.json: `{feature}` is not supported yet");
        }
        let number = |key: &str| -> Result<usize> {
            let value = config[key].as_u64().with_context(|| format!("config.json: `{key}` is not a whole number"))?;
            Ok(usize::try_from(value)?)
        };
        let activation = match config["hidden_act"].as_str() {
            Some("silu") => Activation::Silu,
            Some("gelu_pytorch_tanh") => Activation::GeluTanh,
            other => bail!("config.json: hidden_act {other:?} is not supported; supported: silu, gelu_pytorch_tanh"),
        };
        let (hidden, heads) = (number("hidden_size")?, number("num_attention_heads")?);
        let head_dim = if config["head_dim"].is_null() { hidden / heads.max(1) } else { number("head_dim")? };
        ensure!((2..=1024).contains(&head_dim), "config.json: a head_dim of {head_dim}");
        let epsilon = config["rms_norm_eps"].as_f64().context("config.json: `rms_norm_eps` is not a number")?;
        Self {
            vocabulary: number("vocab_size")?,
            hidden,
            intermediate: number("intermediate_size")?,
            layers: number("num_hidden_layers")?,
            heads,
            key_value_heads: if config["num_key_value_heads"].is_null() {
                heads
            } else {
                number("num_key_value_heads")?
            },
            head_dim,
            norm_epsilon: epsilon,
            activation,
            frequencies: rope_frequencies(config, head_dim)?,
            tied: config["tie_word_embeddings"].as_bool().unwrap_or(false),
            context: number("max_position_embeddings")?,
        }
        .checked()
    }

    /// Reads the metadata of a GGUF file. Whether the head is tied shows in its tensors, so the caller says.
    ///
    /// # Errors
    /// If a key is missing or of the wrong type, or the model is of a family that is not described here.
    pub fn from_gguf(metadata: &HashMap<String, Metadata>, vocabulary: usize, tied: bool) -> Result<Self> {
        let get = |key: &str| metadata.get(key).with_context(|| format!("gguf metadata: `{key}` is missing"));
        let family = get("general.architecture")?.to_string()?;
        ensure!(family == "llama", "gguf metadata: architecture {family:?} is not supported yet; supported: llama");
        let number = |key: &str| -> Result<usize> {
            let value = get(&format!("llama.{key}"))?.to_u32();
            Ok(value.with_context(|| format!("gguf metadata: `llama.{key}`"))? as usize)
        };
        let (hidden, heads) = (number("embedding_length")?, number("attention.head_count")?);
        let head_dim = number("rope.dimension_count").unwrap_or(hidden / heads.max(1));
        ensure!((2..=1024).contains(&head_dim), "gguf metadata: a head_dim of {head_dim}");
        let theta = get("llama.rope.freq_base")?.to_f32()?;
        Self {
            vocabulary,
            hidden,
            intermediate: number("feed_forward_length")?,
            layers: number("block_count")?,
            heads,
            key_value_heads: number("attention.head_count_kv")?,
            head_dim,
            norm_epsilon: f64::from(get("llama.attention.layer_norm_rms_epsilon")?.to_f32()?),
            activation: Activation::Silu,
            frequencies: plain_frequencies(f64::from(theta), head_dim),
            tied,
            context: number("context_length")?,
        }
        .checked()
    }

    fn checked(self) -> Result<Self> {
        let sizes = [
            self.vocabulary,
            self.hidden,
            self.intermediate,
            self.layers,
            self.heads,
            self.key_value_heads,
            self.context,
        ];
        ensure!(
            sizes.iter().all(|&size| (1..1 << 28).contains(&size)),
            "model description: impossible size in {self:?}"
        );
        ensure!(
            self.heads.is_multiple_of(self.key_value_heads),
            "model description: heads are not a multiple of key-value heads"
        );
        ensure!(
            (2..=1024).contains(&self.head_dim) && self.head_dim.is_multiple_of(2),
            "model description: head_dim {}",
            self.head_dim
        );
        let epsilon = self.norm_epsilon;
        ensure!(epsilon.is_finite() && epsilon > 0.0, "model description: norm epsilon {epsilon}");
        let rotates = self.frequencies.iter().all(|frequency| frequency.is_finite() && *frequency > 0.0);
        ensure!(rotates, "model description: rotary frequencies {:?} are not positive numbers", self.frequencies);
        Ok(self)
    }
}

/// 1 / θ^(2i / head_dim).
fn plain_frequencies(theta: f64, head_dim: usize) -> Vec<f64> {
    (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect()
}

/// Rotary frequencies of `config.json`: transformers 5 keeps them in `rope_parameters`, older files in `rope_theta` and
/// `rope_scaling`. A file with neither is refused: 10000 would be a silent guess.
fn rope_frequencies(config: &Value, head_dim: usize) -> Result<Vec<f64>> {
    let parameters = &config["rope_parameters"];
    let theta = parameters["rope_theta"].as_f64().or(config["rope_theta"].as_f64());
    let theta = theta.context("config.json: neither `rope_parameters.rope_theta` nor `rope_theta` is a number")?;
    let plain = plain_frequencies(theta, head_dim);
    let scaling = if parameters.is_null() { &config["rope_scaling"] } else { parameters };
    let number =
        |key: &str| scaling[key].as_f64().with_context(|| format!("config.json: rope scaling without `{key}`"));
    match scaling["rope_type"].as_str().or(scaling["type"].as_str()) {
        None | Some("default") => Ok(plain),
        Some("llama3") => {
            let scaling = Llama3Scaling {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original: number("original_max_position_embeddings")?,
            };
            Ok(plain.into_iter().map(|frequency| scaling.apply(frequency)).collect())
        }
        Some(other) => bail!("config.json: rope type {other:?} is not supported; supported: default, llama3"),
    }
}

/// Llama 3's scaling: long wavelengths are divided by `factor`, short ones kept, those between interpolated.
struct Llama3Scaling {
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
}

impl Llama3Scaling {
    fn apply(&self, frequency: f64) -> f64 {
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        if wavelength < self.original / self.high {
            frequency
        } else if wavelength > self.original / self.low {
            frequency / self.factor
        } else {
            let smooth = (self.original / wavelength - self.low) / (self.high - self.low);
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }
}
