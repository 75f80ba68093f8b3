//! The families of models that are known, and how `config.json` describes one of them.
//!
//! A family is a row of [`FAMILIES`]: what its files leave unsaid. All else is read; what a file says and is not understood
//! here is refused. GGUF metadata says the same in other words, so `metadata` translates it and it is read the same way.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::architecture::{Architecture, AttentionKind};
use crate::ops::gate::Activation;

/// What the files of one family leave unsaid.
pub(super) struct Family {
    /// `model_type` of `config.json`.
    pub(super) config: &'static str,
    /// What transformers calls the model in `architectures`.
    pub(super) class: &'static str,
    /// `general.architecture` of GGUF files.
    pub(super) gguf: &'static str,
    /// What all of Gemma has: norms on both sides of a block, their gains stored minus 1, embeddings multiplied with the
    /// root of their width, scores scaled by a number of their own, GELU, and a head that is the embedding table.
    pub(super) gemma: bool,
    /// Scores and logits are capped; the caps are stated.
    pub(super) soft_caps: bool,
    /// Queries and keys are normalized head by head.
    pub(super) head_norms: bool,
    /// Queries, keys and values have a bias.
    pub(super) biases: bool,
    /// Unless the file says otherwise, one layer in so many sees the whole sequence and the others a sliding window.
    pub(super) full_every: usize,
    /// Layers with a sliding window have a rotary base of their own.
    pub(super) local_rope: bool,
    /// GGUF files interleave the halves of each head of queries and keys.
    pub(super) interleaved: bool,
    /// The number of layers of the one size whose scores are scaled by hidden / heads instead of the width of a head: a
    /// GGUF file does not say, llama.cpp goes by this number.
    pub(super) wide_scale_layers: Option<usize>,
}

const PLAIN: Family = Family {
    config: "llama",
    class: "LlamaForCausalLM",
    gguf: "llama",
    gemma: false,
    soft_caps: false,
    head_norms: false,
    biases: false,
    full_every: 1,
    local_rope: false,
    interleaved: false,
    wide_scale_layers: None,
};

const GEMMA: Family = Family { gemma: true, ..PLAIN };

/// The families that are known.
const FAMILIES: [Family; 5] = [
    Family { interleaved: true, ..PLAIN },
    Family { config: "qwen2", class: "Qwen2ForCausalLM", gguf: "qwen2", biases: true, ..PLAIN },
    Family { config: "qwen3", class: "Qwen3ForCausalLM", gguf: "qwen3", head_norms: true, ..PLAIN },
    Family {
        config: "gemma2",
        class: "Gemma2ForCausalLM",
        gguf: "gemma2",
        soft_caps: true,
        full_every: 2,
        wide_scale_layers: Some(46),
        ..GEMMA
    },
    Family {
        config: "gemma3_text",
        class: "Gemma3ForCausalLM",
        gguf: "gemma3",
        head_norms: true,
        full_every: 6,
        local_rope: true,
        wide_scale_layers: Some(62),
        ..GEMMA
    },
];

/// The family that a file names.
pub(super) fn find(place: &str, name: &str, known: impl Fn(&Family) -> &'static str) -> Result<&'static Family> {
    let all = || FAMILIES.iter().map(&known).collect::<Vec<_>>().join(", ");
    let found = FAMILIES.iter().find(|family| known(family) == name);
    found.with_context(|| format!("{place} {name:?} is not supported; supported: {}", all()))
}

/// The names of the two kinds of layers, in the order of their numbers in [`Architecture::layers`].
pub(super) const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

impl Architecture {
    /// Reads Hugging Face's `config.json`, as transformers 5 or an older one writes it.
    ///
    /// # Errors
    /// If a key is missing or of the wrong type, or the model is of a family, or has a feature, that is not described here.
    pub fn from_config(config: &Value) -> Result<Self> {
        let name = config["model_type"].as_str().context("config.json: `model_type` is missing")?;
        let family = find("config.json: model_type", name, |family| family.config)?;
        for feature in ["attention_bias", "mlp_bias", "use_bidirectional_attention"] {
            let absent = matches!(config[feature], Value::Null | Value::Bool(false));
            ensure!(absent, "config.json: `{feature}` is {}, which is not supported", config[feature]);
        }
        let (hidden, heads) = (count(config, "hidden_size")?, count(config, "num_attention_heads")?);
        let head_dim = match &config["head_dim"] {
            Value::Null if !family.gemma && !family.head_norms => hidden / heads,
            // transformers has numbers of its own for the other families' files that leave it out.
            _ => count(config, "head_dim")?,
        };
        ensure!((2..=1024).contains(&head_dim) && head_dim.is_multiple_of(2), "config.json: a head_dim of {head_dim}");
        let layers = layers(config, family)?;
        let sliding = layers.contains(&1);
        let kinds = LAYER_TYPES.iter().take(if sliding { 2 } else { 1 }).enumerate().map(|(kind, name)| {
            let window = if kind == 1 { Some(count(config, "sliding_window")?) } else { None };
            let (base, frequencies) = rotation(config, name, kind == 1 && family.local_rope, head_dim)?;
            Ok(AttentionKind { window, base, frequencies })
        });
        let scale = if family.gemma { number(config, "query_pre_attn_scalar")? } else { head_dim as f64 };
        let absent = |key: &str| config[key].is_null();
        Self {
            vocabulary: count(config, "vocab_size")?,
            hidden,
            intermediate: count(config, "intermediate_size")?,
            attention: kinds.collect::<Result<_>>()?,
            layers,
            heads,
            key_value_heads: if absent("num_key_value_heads") { heads } else { count(config, "num_key_value_heads")? },
            head_dim,
            score_scale: 1.0 / scale.sqrt(),
            score_cap: cap(config, family, "attn_logit_softcapping")?,
            logit_cap: cap(config, family, "final_logit_softcapping")?,
            embedding_scale: if family.gemma { (hidden as f64).sqrt() } else { 1.0 },
            norm_epsilon: number(config, "rms_norm_eps")?,
            output_norms: family.gemma,
            head_norms: family.head_norms,
            biases: family.biases,
            activation: activation(config)?,
            // Files leave the key out where it has the value that transformers takes for the family.
            tied: config["tie_word_embeddings"].as_bool().unwrap_or(family.gemma),
            context: count(config, "max_position_embeddings")?,
            norm_offset: if family.gemma { 1.0 } else { 0.0 },
            interleaved: false,
        }
        .checked()
    }
}

/// A whole number between 1 and 2²⁸.
fn count(config: &Value, key: &str) -> Result<usize> {
    let value = config[key].as_u64().filter(|value| (1..1 << 28).contains(value));
    let value = value.with_context(|| format!("config.json: `{key}` is {}, not a possible size", config[key]))?;
    Ok(usize::try_from(value)?)
}

fn number(config: &Value, key: &str) -> Result<f64> {
    config[key].as_f64().with_context(|| format!("config.json: `{key}` is {}, not a number", config[key]))
}

fn activation(config: &Value) -> Result<Activation> {
    // Gemma's files have both keys, and transformers obeys this one.
    let key = if config["hidden_activation"].is_null() { "hidden_act" } else { "hidden_activation" };
    match config[key].as_str() {
        Some("silu") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        _ => bail!("config.json: `{key}` is {}; supported: silu, gelu_pytorch_tanh", config[key]),
    }
}

fn cap(config: &Value, family: &Family, key: &str) -> Result<Option<f64>> {
    match config.get(key) {
        None if family.soft_caps => bail!("config.json: `{key}` is missing; null means no cap"),
        None | Some(Value::Null) => Ok(None),
        Some(_) if family.soft_caps => number(config, key).map(Some),
        Some(_) => bail!("config.json: `{key}` is not supported for {}", family.config),
    }
}

/// The kind of every layer: 0 sees the whole sequence, 1 a sliding window.
pub(super) fn layers(config: &Value, family: &Family) -> Result<Vec<usize>> {
    let layers = count(config, "num_hidden_layers")?;
    ensure!(layers <= 1024, "config.json: {layers} layers");
    let slides = &config["use_sliding_window"];
    let kinds: Vec<usize> = match &config["layer_types"] {
        Value::Null => {
            ensure!(slides != true, "config.json: `use_sliding_window` without `layer_types` is not supported");
            let stated = &config["sliding_window_pattern"];
            let every = if stated.is_null() { family.full_every } else { count(config, "sliding_window_pattern")? };
            (1..=layers).map(|layer| usize::from(!layer.is_multiple_of(every))).collect()
        }
        Value::Array(types) => {
            let kind = |stated: &Value| LAYER_TYPES.iter().position(|known| stated == known);
            let kinds = types.iter().map(|stated| {
                kind(stated).with_context(|| format!("config.json: layer type {stated}; known: {LAYER_TYPES:?}"))
            });
            kinds.collect::<Result<_>>()?
        }
        other => bail!("config.json: `layer_types` is {other}, not a list"),
    };
    ensure!(kinds.len() == layers, "config.json: {} layer types for {layers} layers", kinds.len());
    ensure!(slides != false || !kinds.contains(&1), "config.json: sliding layers, but `use_sliding_window` is false");
    Ok(kinds)
}

/// Rotary base and frequencies of the layers of one type. transformers 5 keeps them in `rope_parameters`, one for all layers or one per
/// type; older files in `rope_theta`, `rope_scaling`, and `rope_local_base_freq` for layers with a base of their `own`. A file
/// with none of them is refused: 10000 would be a silent guess.
fn rotation(config: &Value, layer_type: &str, own: bool, head_dim: usize) -> Result<(f64, Vec<f64>)> {
    let all = &config["rope_parameters"];
    let per_type = LAYER_TYPES.iter().any(|known| all[known].is_object());
    let (parameters, older_base) = match own {
        // Older files scale only the other layers.
        true => (if per_type { &all[layer_type] } else { &Value::Null }, "rope_local_base_freq"),
        false if per_type => (&all[layer_type], "rope_theta"),
        false if !all.is_null() => (all, "rope_theta"),
        false => (&config["rope_scaling"], "rope_theta"),
    };
    let place = || format!("config.json: rope of {layer_type}");
    for partial in [&config["partial_rotary_factor"], &parameters["partial_rotary_factor"]] {
        ensure!(partial.is_null() || partial.as_f64() == Some(1.0), "{}: part of a head is not supported", place());
    }
    let base = parameters["rope_theta"].as_f64().or(config[older_base].as_f64());
    let base = base.with_context(|| format!("{}: neither `rope_theta` nor `{older_base}` is a number", place()))?;
    let plain = (0..head_dim / 2).map(|i| base.powf(-2.0 * i as f64 / head_dim as f64));
    let parameter = |key: &str| parameters[key].as_f64().with_context(|| format!("{}: no number `{key}`", place()));
    let frequencies = match parameters["rope_type"].as_str().or(parameters["type"].as_str()) {
        None | Some("default") => plain.collect(),
        Some("linear") => {
            let factor = parameter("factor")?;
            plain.map(|frequency| frequency / factor).collect()
        }
        Some("llama3") => {
            let scaling = Llama3Scaling {
                factor: parameter("factor")?,
                low: parameter("low_freq_factor")?,
                high: parameter("high_freq_factor")?,
                original: parameter("original_max_position_embeddings")?,
            };
            plain.map(|frequency| scaling.apply(frequency)).collect()
        }
        Some(other) => bail!("{}: type {other:?} is not supported; supported: default, linear, llama3", place()),
    };
    Ok((base, frequencies))
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
