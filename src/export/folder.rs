//! A model as a Hugging Face folder: weights as safetensors, their description, the tokenizer.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Export, Form, show};
use crate::event::Observer;
use crate::model::weights::config;
use crate::model::{Architecture, Weights};
use crate::model_files::ModelFiles;
use crate::run::write_whole;
use crate::source::MODEL_FILES;
use crate::tensors;
use crate::tokenizer::Tokenizer;

/// The most bytes of weights in one file, as the hub has them.
pub const SHARD: u64 = 5_000_000_000;

/// What only others read a tokenizer from.
const FOR_OTHERS: [&str; 3] = ["tokenizer.model", "vocab.json", "merges.txt"];

/// `config.json`, and how such a folder stores weights.
pub(super) fn describe(model: &ModelFiles) -> Result<(Form, Architecture)> {
    let ModelFiles { weights, architecture, tokenizer, .. } = model;
    let config = match weights {
        Weights::Folder { path, .. } => config(path)?,
        Weights::Gguf { content, .. } => {
            ensure!(
                !content.tensor_infos.contains_key("rope_freqs.weight"),
                "tensor rope_freqs.weight scales positions by numbers of its own; export with --format gguf"
            );
            let mut config =
                Architecture::config_of_gguf(&content.metadata, architecture.vocabulary, architecture.tied)?;
            (config["bos_token_id"], config["eos_token_id"]) = (json!(tokenizer.bos()), json!(tokenizer.end_tokens()));
            config
        }
    };
    let written = Architecture::from_config(&config)?;
    Ok((Form::Folder(config), written))
}

/// Writes the folder.
pub(super) fn write(export: &Export, config: &Value, path: &Path, observer: Observer) -> Result<()> {
    fs::create_dir(path).with_context(|| format!("{}: cannot create", path.display()))?;
    write_tokenizer(export, config, path)?;
    let (mut config, dtype) = (config.clone(), export.dtype.of_tensors());
    let name = match dtype.as_str() {
        "f32" => "float32",
        "f16" => "float16",
        _ => "bfloat16",
    };
    // transformers loads in what the description says; older versions call it otherwise.
    (config["dtype"], config["torch_dtype"]) = (json!(name), json!(name));
    write_whole(&path.join("config.json"), &serde_json::to_vec_pretty(&config)?)?;
    let files = shards(export.tensors()?, dtype.size_in_bytes() as u64, export.shard);
    let total: usize = files.iter().map(Vec::len).sum();
    let (count, mut places, mut bytes) = (files.len(), BTreeMap::new(), 0);
    for (index, all) in files.into_iter().enumerate() {
        let file = match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let mut held = Vec::new();
        for (name, shape) in all {
            let merged = export.merged(&name, &shape)?;
            bytes += (merged.elem_count() * dtype.size_in_bytes()) as u64;
            places.insert(name.clone(), file.clone());
            held.push((name, merged.to_dtype(dtype)?.contiguous()?));
            show(observer, places.len(), total);
        }
        tensors::save(&path.join(file), held)?;
    }
    if count > 1 {
        let index = json!({"metadata": {"total_size": bytes}, "weight_map": places});
        write_whole(&path.join("model.safetensors.index.json"), &serde_json::to_vec_pretty(&index)?)?;
    }
    Ok(())
}

/// Tensors by file, in order, each file as full as may be.
fn shards(tensors: Vec<(String, Vec<usize>)>, size: u64, limit: u64) -> Vec<Vec<(String, Vec<usize>)>> {
    let (mut files, mut filled) = (vec![Vec::new()], 0);
    for (name, shape) in tensors {
        let bytes = shape.iter().product::<usize>() as u64 * size;
        if filled > 0 && filled + bytes > limit {
            files.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(file) = files.last_mut() {
            file.push((name, shape));
        }
    }
    files
}

/// Writes the tokenizer, and what ends a generation.
fn write_tokenizer(export: &Export, config: &Value, path: &Path) -> Result<()> {
    let weights = &export.model.weights;
    if let Some(metadata) = weights.metadata() {
        let ends = json!({"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]});
        write_whole(&path.join("generation_config.json"), &serde_json::to_vec_pretty(&ends)?)?;
        return Tokenizer::write_folder(metadata, path);
    }
    for name in MODEL_FILES.iter().chain(&FOR_OTHERS).filter(|name| weights.path().join(name).exists()) {
        // Its text and not its permissions: the hub's cache is read-only.
        let text = fs::read(weights.path().join(name)).with_context(|| format!("{name}: cannot read"))?;
        write_whole(&path.join(name), &text)?;
    }
    Ok(())
}
