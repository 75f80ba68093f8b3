//! The decoder against transformers and PEFT: logits, padded batches, adapters, and the log-probabilities of RL.
//!
//! Every folder under golden/tiny is tried; families that this version does not know are listed as skipped.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use candor::config::{Lora, Projection};
use candor::model::{Call, Model};
use candor::ops::attention::Span;
use candor::policy::Adapter;

use crate::check;

/// Folders of tiny models of a supported family.
pub fn tiny_models() -> Vec<PathBuf> {
    let Some(folder) = check::golden("tiny") else { return Vec::new() };
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.join("config.json").exists()).collect();
    folders.sort();
    folders.retain(|folder| {
        let family = check::json(&folder.join("config.json"))["model_type"].clone();
        if family != "llama" {
            eprintln!("skipped: {} ({family} comes later)", folder.display());
        }
        family == "llama"
    });
    folders
}

/// A tensor file of the golden numbers.
pub fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// Token ids stored as integers.
pub fn ids(tensor: &Tensor) -> Vec<u32> {
    tensor.to_dtype(candle_core::DType::U32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Values of any shape as f64, row by row.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.flatten_all().unwrap().to_dtype(candle_core::DType::F64).unwrap();
    flat.to_vec1().unwrap()
}

/// A PEFT adapter and its description, from a folder of the golden numbers.
pub fn adapter(model: &Model, folder: &Path) -> (Adapter, Lora) {
    let config = check::json(&folder.join("adapter_config.json"));
    let modules: Vec<&str> = config["target_modules"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let lora = Lora {
        rank: config["r"].as_u64().unwrap() as usize,
        alpha: config["lora_alpha"].as_f64().unwrap(),
        rslora: config["use_rslora"].as_bool().unwrap(),
        targets: Projection::ALL.into_iter().filter(|p| modules.iter().any(|m| p.module().ends_with(m))).collect(),
        ..Lora::default()
    };
    let tensors = tensors(&folder.join("adapter_model.safetensors"));
    (Adapter::from_tensors(&model.architecture, &lora, tensors, &Device::Cpu).unwrap(), lora)
}

/// Logits of whole sequences that share one forward call: [all rows, vocabulary].
fn logits(model: &Model, sequences: &[Vec<u32>], adapter: Option<&Adapter>) -> Vec<f64> {
    let (mut all, mut positions, mut spans) = (Vec::new(), Vec::new(), Vec::new());
    for sequence in sequences {
        let rows = all.len()..all.len() + sequence.len();
        spans.push(Span { queries: rows.clone(), prefix: 0..0, own: rows });
        positions.extend(0..sequence.len());
        all.extend(sequence);
    }
    let adapters = [(0..all.len(), adapter)];
    let call = Call { ids: &all, positions: &positions, spans: spans.into(), adapters: &adapters, store: None };
    let rows: Vec<u32> = (0..all.len() as u32).collect();
    let hidden = model.select(&model.forward(&call).unwrap(), &rows).unwrap();
    values(&hidden.matmul(&model.head().t().unwrap()).unwrap())
}

#[test]
fn golden_logits_alone_and_batched() {
    for folder in tiny_models() {
        let model = Model::open(&folder, &Device::Cpu).unwrap();
        let golden = tensors(&folder.join("golden_logits.safetensors"));
        let (a, b) = (ids(&golden["ids_a"]), ids(&golden["ids_b"]));
        let name = folder.display().to_string();
        let want = [values(&golden["logits_a"]), values(&golden["logits_b"])];
        check::all_close(&format!("{name} a"), &logits(&model, std::slice::from_ref(&a), None), &want[0], 1e-4);
        // transformers pads the shorter one; here both share a call without padding.
        check::all_close(&format!("{name} a and b"), &logits(&model, &[a, b], None), &want.concat(), 1e-4);
    }
}

#[test]
fn golden_logits_with_peft_adapters() {
    for folder in tiny_models() {
        let model = Model::open(&folder, &Device::Cpu).unwrap();
        let a = ids(&tensors(&folder.join("golden_logits.safetensors"))["ids_a"]);
        for name in ["lora", "lora_all_rs"] {
            let path = folder.join(format!("adapter_{name}"));
            if !path.exists() {
                continue;
            }
            let golden = tensors(&folder.join(format!("golden_{name}.safetensors")));
            let (adapter, _) = adapter(&model, &path);
            let got = logits(&model, std::slice::from_ref(&a), Some(&adapter));
            check::all_close(&path.display().to_string(), &got, &values(&golden["logits_a"]), 1e-4);
        }
    }
}
