//! GGUF metadata: what `config.json` says in other words, translated both ways.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Value as Metadata;
use serde_json::{Value, json};

use super::architecture::{Architecture, AttentionKind};
use super::family::{Family, LAYER_TYPES, find, layers};

impl Architecture {
    /// Reads the metadata of a GGUF file, and what only its tensors show: the size of the `vocabulary`, whether the head is
    /// `tied`, and the `divisors` [head_dim / 2] of rotary frequencies.
    ///
    /// # Errors
    /// If a key is missing or of the wrong type, or the model is of a family, or has a feature, that is not described here.
    pub fn from_gguf(
        metadata: &HashMap<String, Metadata>,
        vocabulary: usize,
        tied: bool,
        divisors: Option<&[f32]>,
    ) -> Result<Self> {
        let family = family_of(metadata)?;
        let config = translated(&Keys { metadata, family: family.gguf }, family, vocabulary, tied)?;
        let read = Self::from_config(&config).context("gguf metadata, in config.json's words")?;
        // Converters add the offset.
        let mut architecture = Self { norm_offset: 0.0, interleaved: family.interleaved, ..read };
        if let Some(divisors) = divisors {
            for AttentionKind { frequencies, .. } in &mut architecture.attention {
                let (found, needed) = (divisors.len(), frequencies.len());
                ensure!(found == needed, "rope_freqs.weight has {found} values, a head of this model needs {needed}");
                frequencies.iter_mut().zip(divisors).for_each(|(frequency, by)| *frequency /= f64::from(*by));
            }
        }
        architecture.checked()
    }

    /// What `config.json` says of a GGUF file's model, so that transformers reads it too: what the family's class would have
    /// by default is spelled out, and what older versions ask for stands beside what newer ones do.
    ///
    /// # Errors
    /// As [`Architecture::from_gguf`].
    pub fn config_of_gguf(metadata: &HashMap<String, Metadata>, vocabulary: usize, tied: bool) -> Result<Value> {
        let family = family_of(metadata)?;
        let mut config = translated(&Keys { metadata, family: family.gguf }, family, vocabulary, tied)?;
        config["architectures"] = json!([family.class]);
        let rope = LAYER_TYPES.map(|name| {
            let mut rope = config["rope_parameters"][name].clone();
            if rope["rope_type"].is_null() {
                rope["rope_type"] = json!("default");
            }
            rope
        });
        let [full, local] = &rope;
        config["rope_theta"] = full["rope_theta"].clone();
        config["rope_scaling"] = if full["rope_type"] == "default" { Value::Null } else { full.clone() };
        config["rope_parameters"] = full.clone();
        if family.local_rope {
            config["rope_local_base_freq"] = local["rope_theta"].clone();
            config["rope_parameters"] = json!({LAYER_TYPES[0]: full, LAYER_TYPES[1]: local});
        }
        if family.full_every > 1 {
            let types = layers(&config, family)?.into_iter().map(|kind| LAYER_TYPES[kind]);
            config["layer_types"] = types.collect();
        }
        Ok(config)
    }
}

/// A model as a GGUF file describes it.
pub struct InGguf {
    /// By key; nothing about tokenizer and file.
    pub metadata: HashMap<String, Metadata>,
    /// What rotary frequencies are divided by [head_dim / 2], if they are not those of a base and a factor.
    pub divisors: Option<Vec<f32>>,
    /// How it is read again: the weights stand in the file accordingly.
    pub architecture: Architecture,
}

impl Architecture {
    /// Describes the model as a GGUF file does; `model_type` is `config.json`'s.
    ///
    /// # Errors
    /// If GGUF has no words for something of this model.
    pub fn in_gguf(&self, model_type: &str) -> Result<InGguf> {
        let family = find("config.json: model_type", model_type, |family| family.config)?;
        let (full, local) = self.attention.split_first().context("there is no attention")?;
        let (factor, divisors) = divided(full);
        let mut entries =
            vec![("attention.layer_norm_rms_epsilon", float(self.norm_epsilon)), ("rope.freq_base", float(full.base))];
        for (_, theirs, size) in SIZES {
            entries.push((theirs, Metadata::U32(u32::try_from(size(self))?)));
        }
        entries.extend(HEAD_WIDTHS.map(|key| (key, Metadata::U32(self.head_dim as u32))));
        for (_, theirs, value) in OPTIONAL {
            entries.extend(value(self).map(|value| (theirs, value)));
        }
        if factor != 1.0 {
            entries.extend([
                ("rope.scaling.type", Metadata::String("linear".into())),
                ("rope.scaling.factor", float(factor)),
            ]);
        }
        if family.local_rope {
            entries.extend(local.iter().map(|local| ("rope.freq_base_swa", float(local.base))));
        }
        ensure!(
            divisors.is_none() || family.gguf == "llama",
            "GGUF cannot scale the rotary frequencies of {model_type}"
        );
        let mut metadata: HashMap<String, Metadata> =
            entries.into_iter().map(|(key, value)| (format!("{}.{key}", family.gguf), value)).collect();
        metadata.insert("general.architecture".into(), Metadata::String(family.gguf.into()));
        let architecture = Self::from_gguf(&metadata, self.vocabulary, self.tied, divisors.as_deref())?;
        ensure!(self.is_near(&architecture), "GGUF has no words for all that config.json says of this model");
        Ok(InGguf { metadata, divisors, architecture })
    }

    /// Whether this is the same model but for rounding to f32 and for how weights are stored, the scale of scores among it.
    fn is_near(&self, other: &Self) -> bool {
        let numbers = |one: &Self| -> Vec<f64> {
            let frequencies = one.attention.iter().flat_map(|kind| kind.frequencies.clone());
            let caps = [one.score_cap, one.logit_cap].map(Option::unwrap_or_default);
            frequencies.chain(caps).chain([one.norm_epsilon]).collect()
        };
        let (ours, theirs) = (numbers(self), numbers(other));
        let near = |(ours, theirs): (&f64, &f64)| (ours - theirs).abs() <= 1e-6 * ours;
        let Self { norm_epsilon, score_cap, logit_cap, score_scale, norm_offset, interleaved, .. } = *self;
        let mut same =
            Self { norm_epsilon, score_cap, logit_cap, score_scale, norm_offset, interleaved, ..other.clone() };
        for (kind, ours) in same.attention.iter_mut().zip(&self.attention) {
            *kind = AttentionKind { window: kind.window, ..ours.clone() };
        }
        ours.len() == theirs.len() && ours.iter().zip(&theirs).all(near) && same == *self
    }
}

/// How often layers see the whole sequence: the first of them does so after that many.
fn period(architecture: &Architecture) -> Option<Metadata> {
    let first = architecture.layers.iter().position(|kind| *kind == 0)?;
    (architecture.attention.len() > 1).then(|| Metadata::U32(first as u32 + 1))
}

fn float(value: f64) -> Metadata {
    Metadata::F32(value as f32)
}

/// What rotary frequencies were divided by: a factor, or else numbers of their own.
fn divided(AttentionKind { base, frequencies, .. }: &AttentionKind) -> (f64, Option<Vec<f32>>) {
    let plain = (0..frequencies.len()).map(|i| base.powf(-(i as f64) / frequencies.len() as f64));
    let by: Vec<f64> = plain.zip(frequencies).map(|(plain, frequency)| plain / frequency).collect();
    if by.iter().all(|other| (other - by[0]).abs() <= 1e-9 * by[0]) {
        return (by[0], None);
    }
    (1.0, Some(by.into_iter().map(|by| by as f32).collect()))
}

/// The family that a GGUF file's metadata names.
fn family_of(metadata: &HashMap<String, Metadata>) -> Result<&'static Family> {
    let name = metadata.get("general.architecture").context("gguf metadata: `general.architecture` is missing")?;
    find("gguf metadata: architecture", name.to_string()?, |family| family.gguf)
}

/// GGUF metadata, seen through the keys of one family.
struct Keys<'a> {
    metadata: &'a HashMap<String, Metadata>,
    family: &'static str,
}

impl Keys<'_> {
    fn optional(&self, key: &str) -> Option<(String, &Metadata)> {
        let key = format!("{}.{key}", self.family);
        self.metadata.get(&key).map(|value| (key, value))
    }

    fn number(&self, key: &str) -> Result<f64> {
        let missing = || format!("gguf metadata: `{}.{key}` is missing", self.family);
        self.optional_number(key)?.with_context(missing)
    }

    fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        let Some((key, value)) = self.optional(key) else { return Ok(None) };
        let number = value.to_f32().map(f64::from).or_else(|_| value.to_u64().map(|whole| whole as f64));
        Ok(Some(number.with_context(|| format!("gguf metadata: `{key}`"))?))
    }

    /// A size, as JSON.
    fn count(&self, key: &str) -> Result<Value> {
        let number = self.number(key)?;
        ensure!(number.fract() == 0.0, "gguf metadata: `{}.{key}` is {number}, not a whole number", self.family);
        Ok(json!(number as u64))
    }
}

/// The names of something in `config.json` and in GGUF, and where it stands.
type Words<T> = (&'static str, &'static str, fn(&Architecture) -> T);

const SIZES: [Words<usize>; 6] = [
    ("hidden_size", "embedding_length", |model| model.hidden),
    ("num_attention_heads", "attention.head_count", |model| model.heads),
    ("num_key_value_heads", "attention.head_count_kv", |model| model.key_value_heads),
    ("intermediate_size", "feed_forward_length", |model| model.intermediate),
    ("num_hidden_layers", "block_count", |model| model.layers.len()),
    ("max_position_embeddings", "context_length", |model| model.context),
];

/// What all stand for the width of a head.
const HEAD_WIDTHS: [&str; 3] = ["attention.key_length", "rope.dimension_count", "attention.value_length"];

/// What only some models have.
const OPTIONAL: [Words<Option<Metadata>>; 4] = [
    ("attn_logit_softcapping", "attn_logit_softcapping", |model| model.score_cap.map(float)),
    ("final_logit_softcapping", "final_logit_softcapping", |model| model.logit_cap.map(float)),
    ("sliding_window", "attention.sliding_window", |model| {
        model.attention.iter().find_map(|kind| kind.window).map(|window| Metadata::U32(window as u32))
    }),
    ("sliding_window_pattern", "attention.sliding_window_pattern", period),
];

/// The rotary base that llama.cpp takes where a file has none; converters leave Gemma's out.
const UNSTATED_BASE: f64 = 10_000.0;

/// GGUF metadata in the words of `config.json`.
fn translated(keys: &Keys, family: &Family, vocabulary: usize, tied: bool) -> Result<Value> {
    let (hidden, heads) = (keys.number("embedding_length")?, keys.number("attention.head_count")?);
    let widths = HEAD_WIDTHS.map(|key| keys.optional_number(key).map(|width| (key, width)));
    let widths = widths.into_iter().collect::<Result<Vec<_>>>()?;
    let head_dim = widths[..2].iter().find_map(|(_, width)| *width).unwrap_or_else(|| (hidden / heads).floor());
    for (key, other) in widths {
        let fits = other.is_none_or(|other| other == head_dim);
        ensure!(fits, "gguf metadata: `{}.{key}` is {other:?}, a head's width is {head_dim}", family.gguf);
    }
    let mut config = json!({
        "model_type": family.config,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "head_dim": head_dim as u64,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon")?,
        "hidden_act": if family.gemma { "gelu_pytorch_tanh" } else { "silu" },
        "rope_parameters": rope(keys, family)?,
    });
    for (key, theirs, _) in SIZES {
        config[key] = keys.count(theirs)?;
    }
    if family.gemma {
        let wide = family.wide_scale_layers.is_some_and(|wide| config["num_hidden_layers"] == wide);
        let scalar = if wide { hidden / heads } else { head_dim };
        // transformers takes whole numbers only.
        config["query_pre_attn_scalar"] = if scalar.fract() == 0.0 { json!(scalar as u64) } else { json!(scalar) };
    }
    for (key, theirs, _) in OPTIONAL {
        let Some(value) = keys.optional_number(theirs)? else { continue };
        let whole = key.starts_with("sliding");
        ensure!(!whole || family.full_every > 1, "gguf metadata: `{}.{theirs}` is not supported", family.gguf);
        config[key] = if whole { keys.count(theirs)? } else { json!(value) };
    }
    Ok(config)
}

/// `rope_parameters` by layer type, from GGUF metadata.
fn rope(keys: &Keys, family: &Family) -> Result<Value> {
    let base = match keys.optional_number("rope.freq_base")? {
        None if family.gemma => UNSTATED_BASE,
        _ => keys.number("rope.freq_base")?,
    };
    let local = keys.optional_number("rope.freq_base_swa")?;
    let local = local.unwrap_or(if family.local_rope { UNSTATED_BASE } else { base });
    ensure!(keys.optional("rope.scale_linear").is_none(), "gguf metadata: `rope.scale_linear` is not supported");
    let kind = match keys.optional("rope.scaling.type") {
        Some((_, kind)) => kind.to_string()?.as_str(),
        None => "none",
    };
    let full = match kind {
        "none" => json!({"rope_theta": base}),
        "linear" => {
            json!({"rope_theta": base, "rope_type": "linear", "factor": keys.number("rope.scaling.factor")?})
        }
        other => bail!("gguf metadata: rope scaling {other:?} is not supported; supported: none, linear"),
    };
    let sliding = if family.local_rope { json!({"rope_theta": local}) } else { full.clone() };
    Ok(json!({LAYER_TYPES[0]: full, LAYER_TYPES[1]: sliding}))
}
