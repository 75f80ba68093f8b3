//! How families are read: `config.json` as newer and older transformers write it, GGUF files as llama.cpp's converter
//! writes them, and what is refused.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value as Gguf};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candor::model::{Architecture, Model};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::check;
use crate::model::{ids, logits, tensors, tiny_models, values};
use crate::tokenizer_gguf;

/// The description of a tiny model with some keys changed; null removes a key.
pub fn changed(folder: &Path, changes: &Value) -> Value {
    let mut config = check::json(&folder.join("config.json"));
    let keys = config.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        if value.is_null() {
            keys.shift_remove(key);
        } else {
            keys.insert(key.clone(), value.clone());
        }
    }
    config
}

/// The tiny models' files say everything twice; each half alone must be enough.
#[test]
fn older_and_newer_files_describe_the_same_model() {
    for folder in tiny_models() {
        let config = check::json(&folder.join("config.json"));
        let whole = Architecture::from_config(&config).unwrap();
        let newer = json!({"rope_theta": null, "rope_scaling": null, "rope_local_base_freq": null});
        let period = if config["model_type"] == "gemma3_text" { json!(3) } else { json!(null) };
        let older = json!({"rope_parameters": null, "layer_types": null, "sliding_window_pattern": period});
        for half in [newer, older] {
            assert_eq!(Architecture::from_config(&changed(&folder, &half)).unwrap(), whole, "{folder:?} {half}");
        }
    }
}

#[test]
fn what_is_left_out_is_what_transformers_takes_or_an_error() {
    let read = |name: &str, changes: Value| {
        let folder = check::golden(&format!("tiny/{name}"))?;
        Some(Architecture::from_config(&changed(&folder, &changes)).map_err(|error| format!("{error:#}")))
    };
    for (name, tied) in [("llama", false), ("qwen2", false), ("gemma2", true), ("gemma3_text", true)] {
        let Some(read) = read(name, json!({"tie_word_embeddings": null})) else { continue };
        assert_eq!(read.unwrap().tied, tied, "{name}");
    }
    if let Some(gemma) = read("gemma3_text", json!({"layer_types": null, "num_hidden_layers": 12})) {
        assert_eq!(gemma.unwrap().layers, [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]);
    }
    // Qwen 2.5's published files have a window that is switched off.
    if let Some(qwen) = read("qwen2", json!({"layer_types": null, "sliding_window": 32768})) {
        assert_eq!(qwen.unwrap().attention.len(), 1);
    }
    for (name, changes, reason) in [
        ("llama", json!({"model_type": "mamba"}), "\"mamba\" is not supported; supported: llama, qwen2, qwen3, gemma2"),
        ("llama", json!({"model_type": null}), "`model_type` is missing"),
        ("llama", json!({"rope_theta": null, "rope_parameters": null}), "neither `rope_theta`"),
        ("llama", json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}), "\"yarn\" is not supported"),
        ("llama", json!({"rope_parameters": {"rope_theta": 0.0}}), "not positive"),
        ("llama", json!({"partial_rotary_factor": 0.5}), "part of a head"),
        ("llama", json!({"attention_bias": true}), "`attention_bias`"),
        ("llama", json!({"hidden_act": "relu"}), "relu"),
        ("llama", json!({"num_hidden_layers": 1u64 << 40}), "not a possible size"),
        ("llama", json!({"num_hidden_layers": 1 << 20}), "1048576 layers"),
        ("llama", json!({"num_attention_heads": 0}), "`num_attention_heads` is 0"),
        ("llama", json!({"num_attention_heads": 3, "head_dim": 16}), "not a multiple"),
        ("llama", json!({"head_dim": 15}), "head_dim of 15"),
        ("llama", json!({"rms_norm_eps": 0.0}), "norm epsilon"),
        ("llama", json!({"final_logit_softcapping": 30.0}), "`final_logit_softcapping` is not supported for llama"),
        ("llama3rope", json!({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}), "no number `factor`"),
        ("qwen2", json!({"layer_types": null, "use_sliding_window": true}), "without `layer_types`"),
        ("qwen2", json!({"layer_types": vec!["sliding_attention"; 4], "sliding_window": 8}), "is false"),
        ("qwen3", json!({"head_dim": null}), "`head_dim` is null"),
        ("gemma2", json!({"attn_logit_softcapping": null}), "`attn_logit_softcapping` is missing"),
        ("gemma2", json!({"final_logit_softcapping": -1.0}), "soft cap"),
        ("gemma2", json!({"query_pre_attn_scalar": null}), "`query_pre_attn_scalar`"),
        ("gemma2", json!({"sliding_window": null}), "`sliding_window`"),
        ("gemma2", json!({"layer_types": ["full_attention"]}), "1 layer types for 4 layers"),
        ("gemma2", json!({"layer_types": vec!["chunked_attention"; 4]}), "chunked_attention"),
        ("gemma3_text", json!({"rope_parameters": null, "rope_local_base_freq": null}), "rope_local_base_freq"),
        ("gemma3_text", json!({"use_bidirectional_attention": true}), "`use_bidirectional_attention`"),
        ("gemma3_text", json!({"use_bidirectional_attention": "all"}), "\"all\", which is not supported"),
        ("gemma3_text", json!({"attn_logit_softcapping": 50.0}), "not supported for gemma3_text"),
    ] {
        let Some(read) = read(name, changes.clone()) else { continue };
        let error = read.expect_err(&format!("{name} {changes}"));
        assert!(error.contains(reason), "{name} {changes}: {error}");
    }
}

/// The tensors of a tiny model under the names, and with the values, that llama.cpp's converter gives them.
pub fn converted(folder: &Path, family: &str) -> Vec<(String, Tensor)> {
    let config = check::json(&folder.join("config.json"));
    let gemma = family.starts_with("gemma");
    // GGUF has no word for the scale of Gemma's scores, which is the width of a head in published models of this size; here
    // it is not, so the queries take it over.
    let scalar = config["query_pre_attn_scalar"].as_f64().unwrap_or(1.0);
    let rescale = (config["head_dim"].as_f64().unwrap_or(1.0) / scalar).sqrt();
    let convert = |(name, tensor): (String, Tensor)| {
        let mut tensor = if gemma && name.ends_with("norm.weight") { (tensor + 1.0).unwrap() } else { tensor };
        if family == "gemma2" && name.contains("q_proj") || family == "gemma3" && name.contains("q_norm") {
            tensor = (tensor * rescale).unwrap();
        }
        if family == "llama" && (name.contains("q_proj") || name.contains("k_proj")) {
            let (out, width) = tensor.dims2().unwrap();
            let halves = tensor.reshape((out / 16, 2, 8, width)).unwrap();
            tensor = halves.transpose(1, 2).unwrap().reshape((out, width)).unwrap();
        }
        let after = if gemma { "post_attention_norm" } else { "ffn_norm" };
        let renamed = [
            ("model.layers", "blk"),
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", after),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.", "attn_"),
            ("mlp.", "ffn_"),
            ("_proj", ""),
        ];
        (renamed.iter().fold(name, |name, (from, to)| name.replace(from, to)), tensor)
    };
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|file| {
        let name = file.file_name().unwrap().to_str().unwrap();
        name.starts_with("model") && name.ends_with(".safetensors")
    });
    let mut all: Vec<_> = files.flat_map(|file| tensors(&file)).map(convert).collect();
    if config["rope_parameters"]["rope_type"] == "llama3" {
        let plain = changed(folder, &json!({"rope_parameters": null, "rope_scaling": null}));
        let frequencies =
            [&plain, &config].map(|config| Architecture::from_config(config).unwrap().attention[0].frequencies.clone());
        let divisors: Vec<f32> =
            frequencies[0].iter().zip(&frequencies[1]).map(|(plain, scaled)| (plain / scaled) as f32).collect();
        all.push(("rope_freqs.weight".into(), Tensor::new(divisors, &Device::Cpu).unwrap()));
    }
    all
}

/// The metadata that llama.cpp's converter writes for a tiny model.
pub fn metadata(folder: &Path, family: &str) -> HashMap<String, Gguf> {
    let config = check::json(&folder.join("config.json"));
    let whole = |key: &str| Gguf::U32(config[key].as_u64().unwrap() as u32);
    let float = |key: &str| Gguf::F32(config[key].as_f64().unwrap() as f32);
    let head_dim = Gguf::U32(config["head_dim"].as_u64().unwrap_or(16) as u32);
    let mut entries = vec![
        ("context_length", whole("max_position_embeddings")),
        ("embedding_length", whole("hidden_size")),
        ("block_count", whole("num_hidden_layers")),
        ("feed_forward_length", whole("intermediate_size")),
        ("attention.head_count", whole("num_attention_heads")),
        ("attention.head_count_kv", whole("num_key_value_heads")),
        ("attention.layer_norm_rms_epsilon", float("rms_norm_eps")),
        ("attention.key_length", head_dim.clone()),
        ("attention.value_length", head_dim.clone()),
    ];
    if family != "gemma2" {
        entries.push(("rope.freq_base", float("rope_theta")));
    }
    match family {
        "llama" => entries.push(("rope.dimension_count", head_dim)),
        "gemma2" => entries.extend([
            ("attn_logit_softcapping", float("attn_logit_softcapping")),
            ("final_logit_softcapping", float("final_logit_softcapping")),
            ("attention.sliding_window", whole("sliding_window")),
        ]),
        "gemma3" => entries.extend([
            ("attention.sliding_window", whole("sliding_window")),
            ("attention.sliding_window_pattern", Gguf::U32(3)),
            ("rope.scaling.type", Gguf::String("linear".into())),
            ("rope.scaling.factor", Gguf::F32(2.0)),
        ]),
        _ => {}
    }
    let general = ("general.architecture".to_string(), Gguf::String(family.into()));
    entries.into_iter().map(|(key, value)| (format!("{family}.{key}"), value)).chain([general]).collect()
}

/// A tiny model with its tokenizer as a GGUF file.
pub fn gguf(folder: &Path) -> NamedTempFile {
    let config = check::json(&folder.join("config.json"));
    let family = config["model_type"].as_str().unwrap().trim_end_matches("_text");
    let (mut metadata, converted) = (metadata(folder, family), converted(folder, family));
    metadata.extend(tokenizer_gguf::metadata(folder, "smollm"));
    metadata.insert("tokenizer.ggml.add_bos_token".into(), Gguf::Bool(family.starts_with("gemma")));
    let metadata: Vec<(&str, &Gguf)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let stored: Vec<(&str, QTensor)> = converted
        .iter()
        .map(|(name, tensor)| (name.as_str(), QTensor::quantize(tensor, GgmlDType::F32).unwrap()))
        .collect();
    let stored: Vec<(&str, &QTensor)> = stored.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
    gguf_file::write(&mut file.as_file(), &metadata, &stored).unwrap();
    file
}

#[test]
fn golden_logits_from_gguf_files() {
    for folder in tiny_models() {
        let file = gguf(&folder);
        let model = Model::open(file.path(), check::f32_kernel()).unwrap();
        let golden = tensors(&folder.join("golden_logits.safetensors"));
        let got = logits(&model, &[ids(&golden["ids_a"])], None);
        check::all_close(&format!("{folder:?} as gguf"), &got, &values(&golden["logits_a"]), 1e-4);
    }
}

#[test]
fn gguf_metadata_that_is_not_understood_is_refused() {
    let string = |text: &str| Gguf::String(text.into());
    for (name, family, key, value, reason) in [
        ("llama", "llama", "general.architecture", Some(string("mamba")), "\"mamba\" is not supported"),
        ("llama", "llama", "general.architecture", None, "`general.architecture` is missing"),
        ("llama", "llama", "llama.rope.freq_base", None, "`llama.rope.freq_base` is missing"),
        ("llama", "llama", "llama.block_count", None, "`llama.block_count` is missing"),
        ("llama", "llama", "llama.block_count", Some(string("four")), "`llama.block_count`"),
        ("llama", "llama", "llama.rope.dimension_count", Some(Gguf::U32(8)), "llama.rope.dimension_count"),
        ("llama", "llama", "llama.attention.value_length", Some(Gguf::U32(8)), "llama.attention.value_length"),
        ("llama", "llama", "llama.rope.scaling.type", Some(string("yarn")), "\"yarn\" is not supported"),
        ("llama", "llama", "llama.rope.scale_linear", Some(Gguf::F32(4.0)), "scale_linear"),
        ("llama", "llama", "llama.attention.sliding_window", Some(Gguf::U32(4096)), "attention.sliding_window"),
        ("gemma2", "gemma2", "gemma2.attn_logit_softcapping", None, "`attn_logit_softcapping` is missing"),
        ("gemma2", "gemma2", "gemma2.attention.sliding_window", None, "`sliding_window`"),
    ] {
        let Some(folder) = check::golden(&format!("tiny/{name}")) else { continue };
        let mut metadata = metadata(&folder, family);
        assert!(Architecture::from_gguf(&metadata, 320, true, None).is_ok());
        metadata.remove(key);
        metadata.extend(value.map(|value| (key.to_string(), value)));
        let error = format!("{:#}", Architecture::from_gguf(&metadata, 320, true, None).expect_err(key));
        assert!(error.contains(reason), "{key}: {error}");
    }
    let Some(folder) = check::golden("tiny/llama") else { return };
    let error = Architecture::from_gguf(&metadata(&folder, "llama"), 320, true, Some(&[1.0; 3])).unwrap_err();
    assert!(error.to_string().contains("rope_freqs.weight has 3 values"), "{error}");
}

/// llama.cpp scales the scores of the largest Gemma models, known by their layers, as their makers do.
#[test]
fn the_largest_gemma_models_scale_scores_by_the_hidden_width() {
    for (name, family, layers, want) in [
        ("gemma2", "gemma2", 26, 32.0f64),
        ("gemma2", "gemma2", 46, 16.0),
        ("gemma3_text", "gemma3", 62, 16.0),
        ("gemma3_text", "gemma3", 46, 32.0),
    ] {
        let Some(folder) = check::golden(&format!("tiny/{name}")) else { continue };
        let mut metadata = metadata(&folder, family);
        metadata.insert(format!("{family}.block_count"), Gguf::U32(layers));
        let architecture = Architecture::from_gguf(&metadata, 320, true, None).unwrap();
        assert_eq!(architecture.score_scale, 1.0 / want.sqrt(), "{family} of {layers} layers");
    }
}
