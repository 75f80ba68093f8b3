//! The decoder against transformers and PEFT: logits, padded batches, adapters, and the log-probabilities of RL.
//!
//! Every test of golden numbers runs over one table of tiny models, one of each family.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use candor::config::{Lora, Projection};
use candor::model::{Call, Model};
use candor::ops::attention::Span;
use candor::policy::Adapter;

use crate::check;

/// Folders of tiny models, one of each family and one more with Llama 3's rope.
pub fn tiny_models() -> Vec<PathBuf> {
    let names = ["llama", "llama3rope", "qwen2", "qwen3", "gemma2", "gemma3_text"];
    names.iter().filter_map(|name| check::golden(&format!("tiny/{name}"))).collect()
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
    let modules: Vec<&str> =
        config["target_modules"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
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
pub fn logits(model: &Model, sequences: &[Vec<u32>], adapter: Option<&Adapter>) -> Vec<f64> {
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
    head(model, &model.select(&model.forward(&call).unwrap(), &rows).unwrap())
}

/// The logits of normalized rows, in the plain way.
fn head(model: &Model, hidden: &Tensor) -> Vec<f64> {
    let logits = values(&hidden.matmul(&model.head().t().unwrap()).unwrap());
    match model.logits(1.0).soft_cap.map(f64::from) {
        Some(cap) => logits.into_iter().map(|logit| cap * (logit / cap).tanh()).collect(),
        None => logits,
    }
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

/// A call may mix adapters by row ranges, as an asynchronous sampler does: each row must see its own and no other.
#[test]
fn rows_of_one_call_may_have_different_adapters() {
    let Some(folder) = check::golden("tiny/llama") else { return };
    let model = Model::open(&folder, &Device::Cpu).unwrap();
    let (one, _) = adapter(&model, &folder.join("adapter_lora"));
    let (two, _) = adapter(&model, &folder.join("adapter_lora_all_rs"));
    let golden = tensors(&folder.join("golden_logits.safetensors"));
    let sequences = [ids(&golden["ids_a"]), ids(&golden["ids_b"]), ids(&golden["ids_a"])];
    let adapters = [Some(&one), None, Some(&two)];
    let (mut all, mut positions, mut spans, mut ranges) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (sequence, adapter) in sequences.iter().zip(adapters) {
        let rows = all.len()..all.len() + sequence.len();
        spans.push(Span { queries: rows.clone(), prefix: 0..0, own: rows.clone() });
        ranges.push((rows, adapter));
        positions.extend(0..sequence.len());
        all.extend(sequence);
    }
    let call = Call { ids: &all, positions: &positions, spans: spans.into(), adapters: &ranges, store: None };
    let rows: Vec<u32> = (0..all.len() as u32).collect();
    let mixed = model.select(&model.forward(&call).unwrap(), &rows).unwrap();
    let mixed = head(&model, &mixed);
    let apart: Vec<f64> =
        sequences.iter().zip(adapters).flat_map(|(s, a)| logits(&model, std::slice::from_ref(s), a)).collect();
    check::all_close("mixed adapters", &mixed, &apart, 1e-5);
    let gap = Call { adapters: &ranges[1..], ..call };
    assert!(model.forward(&gap).unwrap_err().to_string().contains("adapters do not cover"));
}

/// A fresh adapter changes nothing, is the same for the same seed, and fills PEFT's range for A.
#[test]
fn a_fresh_adapter_is_the_identity() {
    let Some(folder) = check::golden("tiny/llama") else { return };
    let model = Model::open(&folder, &Device::Cpu).unwrap();
    let fresh = |seed| Adapter::initialize(&model.architecture, &Lora::default(), seed, &Device::Cpu).unwrap();
    let flat = |adapter: &Adapter| adapter.tensors().iter().map(|(_, tensor)| values(tensor)).collect::<Vec<_>>();
    assert_eq!(flat(&fresh(1)), flat(&fresh(1)));
    assert_ne!(flat(&fresh(1)), flat(&fresh(2)));
    let tokens: Vec<u32> = (10..40).collect();
    let with = logits(&model, std::slice::from_ref(&tokens), Some(&fresh(1)));
    assert_eq!(with, logits(&model, &[tokens], None));
    for (name, tensor) in fresh(1).tensors() {
        let largest = values(&tensor).into_iter().fold(0.0, |most: f64, value| most.max(value.abs()));
        let bound = if name.contains("lora_B") { 0.0 } else { 1.0 / (tensor.dims()[1] as f64).sqrt() };
        assert!(largest <= bound && largest >= 0.95 * bound, "{name}: {largest}, bound {bound}");
    }
}
