//! A model as a Hugging Face folder: weights as safetensors, their description, the tokenizer.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Export, show};
use crate::event::Observer;
use crate::inputs::ModelFiles;
use crate::model::{Architecture, Weights};
use crate::run::write_whole;
use crate::source::MODEL_FILES;
use crate::tensors;
use crate::tokenizer::Tokenizer;

/// The most bytes of weights in one file, as the hub has them.
pub const SHARD: u64 = 5_000_000_000;

/// What only others read a tokenizer from.
const FOR_OTHERS: [&str; 3] = ["tokenizer.model", "vocab.json", "merges.txt"];

/// Refuses what `config.json` has no words for.
pub(super) fn check(model: &ModelFiles) -> Result<()> {
    if let Weights::Gguf { path, content, .. } = &model.weights {
        ensure!(
            !content.tensor_infos.contains_key("rope_freqs.weight"),
            "{}: tensor rope_freqs.weight scales positions by numbers of its own; export with --format gguf",
            path.display()
        );
    }
    Ok(())
}

/// Writes the folder.
pub(super) fn write(export: &Export, path: &Path, observer: Observer) -> Result<()> {
    fs::create_dir(path).with_context(|| format!("{}: cannot create", path.display()))?;
    let mut config = describe(export, path)?;
    let dtype = export.dtype.of_tensors();
    let name = match dtype.as_str() {
        "f32" => "float32",
        "f16" => "float16",
        _ => "bfloat16",
    };
    // transformers loads in what the description says; older versions call it otherwise.
    (config["dtype"], config["torch_dtype"]) = (json!(name), json!(name));
    // A file of this description may hold gains less an offset, which a GGUF file's do not.
    let offset = export.model.architecture.norm_offset - Architecture::from_config(&config)?.norm_offset;
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
            let norm = shape.len() == 1 && name.ends_with(".weight");
            let merged = export.merged(&name, &shape)?;
            let merged = if norm && offset != 0.0 { (merged + offset)? } else { merged };
            export.check_range(&name, &merged)?;
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

/// The description of the model; writes the tokenizer beside where it will be.
fn describe(export: &Export, path: &Path) -> Result<Value> {
    let ModelFiles { weights, architecture, tokenizer, .. } = &export.model;
    let Some(metadata) = weights.metadata() else {
        for name in MODEL_FILES.iter().chain(&FOR_OTHERS).filter(|name| weights.path().join(name).exists()) {
            // Its text and not its permissions: the hub's cache is read-only.
            let text = fs::read(weights.path().join(name)).with_context(|| format!("{name}: cannot read"))?;
            write_whole(&path.join(name), &text)?;
        }
        let file = weights.path().join("config.json");
        let text = fs::read(&file).with_context(|| format!("{}: cannot read", file.display()))?;
        return serde_json::from_slice(&text).with_context(|| format!("{}: not json", file.display()));
    };
    let mut config = Architecture::config_of_gguf(metadata, architecture.vocabulary, architecture.tied)?;
    let ends = json!({"bos_token_id": tokenizer.bos(), "eos_token_id": tokenizer.end_tokens()});
    (config["bos_token_id"], config["eos_token_id"]) = (ends["bos_token_id"].clone(), ends["eos_token_id"].clone());
    write_whole(&path.join("generation_config.json"), &serde_json::to_vec_pretty(&ends)?)?;
    Tokenizer::write_folder(metadata, path)?;
    Ok(config)
}
