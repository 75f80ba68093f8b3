//! The decoder against transformers and PEFT: logits, padded batches, adapters, and the log-probabilities of RL.
//!
//! Every test of golden numbers runs over one table of tiny models, one of each family.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use candle_core::{Device, Tensor};
use candor::config::{Lora, Projection};
use candor::learner::Learner;
use candor::learner::portion::Portion;
use candor::model::{Call, Gradients, Model, Question};
use candor::ops::attention::Span;
use candor::ops::keys::{Store, padded};
use candor::ops::left::Left;
use candor::ops::panels::Threads;
use candor::policy::Adapter;

use crate::{check, learner, toy};

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

/// The normalized last hidden states of whole sequences, each with an adapter or none, that share one forward call: [all rows,
/// hidden].
pub fn hidden(model: &Model, sequences: &[(&[u32], Option<&Adapter>)]) -> Result<Vec<f32>> {
    let (mut ids, mut positions, mut spans, mut stores, mut adapters) =
        <(Vec<_>, Vec<_>, Vec<_>, Vec<_>, Vec<_>)>::default();
    let mut to = 0;
    for (sequence, adapter) in sequences {
        let rows = ids.len()..ids.len() + sequence.len();
        spans.push(Span { queries: rows.clone(), prefix: 0..0, own: to..to + rows.len() });
        stores.push(Store { from: rows.clone(), to });
        to = padded(to + rows.len());
        positions.extend(0..rows.len());
        ids.extend_from_slice(sequence);
        adapters.push((rows, *adapter));
    }
    let call = Call { ids: &ids, positions: &positions, spans: &spans, stores: &stores, adapters: &adapters };
    let rows: Vec<u32> = (0..ids.len() as u32).collect();
    model.forward(&call, &mut model.store(to)?, &rows)
}

/// Logits of whole sequences that share one forward call: [all rows, vocabulary].
pub fn logits(model: &Model, sequences: &[Vec<u32>], adapter: Option<&Adapter>) -> Vec<f64> {
    let with: Vec<(&[u32], Option<&Adapter>)> =
        sequences.iter().map(|sequence| (sequence.as_slice(), adapter)).collect();
    head(model, &hidden(model, &with).unwrap())
}

/// The logits of normalized rows, in the plain way.
fn head(model: &Model, hidden: &[f32]) -> Vec<f64> {
    let weight = model.head().unwrap();
    let (vocabulary, width) = weight.dims();
    let mut logits = vec![0.0; hidden.len() / width * vocabulary];
    let rows = Left::new(hidden, width, model.kernel);
    weight.multiply(&rows, 0..vocabulary, &mut logits, vocabulary, false, Threads::One);
    let logits = logits.into_iter().map(f64::from);
    match model.logits(1.0).soft_cap.map(f64::from) {
        Some(cap) => logits.map(|logit| cap * (logit / cap).tanh()).collect(),
        None => logits.collect(),
    }
}

#[test]
fn golden_logits_alone_and_batched() {
    for folder in tiny_models() {
        let model = Model::open(&folder, check::f32_kernel()).unwrap();
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
        let model = Model::open(&folder, check::f32_kernel()).unwrap();
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
    let model = Model::open(&folder, check::f32_kernel()).unwrap();
    let (one, _) = adapter(&model, &folder.join("adapter_lora"));
    let (two, _) = adapter(&model, &folder.join("adapter_lora_all_rs"));
    let golden = tensors(&folder.join("golden_logits.safetensors"));
    let sequences = [ids(&golden["ids_a"]), ids(&golden["ids_b"]), ids(&golden["ids_a"])];
    let adapters = [Some(&one), None, Some(&two)];
    let together: Vec<(&[u32], Option<&Adapter>)> = sequences.iter().map(Vec::as_slice).zip(adapters).collect();
    let mixed = head(&model, &hidden(&model, &together).unwrap());
    let apart: Vec<f64> =
        sequences.iter().zip(adapters).flat_map(|(s, a)| logits(&model, std::slice::from_ref(s), a)).collect();
    check::all_close("mixed adapters", &mixed, &apart, 1e-5);
}

/// What would read or write outside of its rows if it were let through.
#[test]
fn a_call_whose_parts_do_not_fit_is_refused() {
    let model = Model::open(&toy::model(), check::f32_kernel()).unwrap();
    let stores = [Store { from: 0..3, to: 0 }];
    let span = Span { queries: 0..3, prefix: 0..0, own: 0..3 };
    let good = Call {
        ids: &[5, 6, 7],
        positions: &[0, 1, 2],
        spans: std::slice::from_ref(&span),
        stores: &stores,
        adapters: &[(0..3, None)],
    };
    let forward = |call: Call| model.forward(&call, &mut model.store(3)?, &[]);
    let refused = |call: Call| format!("{:#}", forward(call).expect_err("the call is refused"));
    assert!(forward(good).is_ok());
    assert!(refused(Call { positions: &[0, 1], ..good }).contains("2 positions for 3 rows"));
    assert!(refused(Call { ids: &[5, 320, 7], ..good }).contains("token 320 is outside the model's vocabulary of 320"));
    assert!(
        refused(Call { positions: &[0, 1, 1024], ..good }).contains("position 1024 is outside the model's context")
    );
    for adapters in [&[(1..3, None)][..], &[(0..2, None)], &[(0..2, None), (1..3, None)], &[(0..4, None)]] {
        assert!(refused(Call { adapters, ..good }).contains("adapters do not cover"), "{} ranges", adapters.len());
    }
    for span in [Span { queries: 1..4, ..span.clone() }, Span { own: 0..2, prefix: 0..3, ..span.clone() }] {
        assert!(refused(Call { spans: &[span], ..good }).contains("does not fit"));
    }
}

/// Memory is used again, if it is large: what a call leaves behind must not be seen by the next, even if it is NaN.
#[test]
fn nothing_is_read_that_an_earlier_call_left() {
    for folder in tiny_models() {
        for kernel in check::kernels() {
            let model = Arc::new(Model::open(&folder, kernel).unwrap());
            let (small, large): (Vec<u32>, Vec<u32>) = ((5..145).collect(), (10..250).collect());
            let (good, _) = adapter(&model, &folder.join("adapter_lora"));
            let mut broken = good.clone();
            broken
                .replace(good.tensors().unwrap().into_iter().map(|(_, tensor)| (tensor * f64::NAN).unwrap()).collect());
            let run = |ids: &[u32], adapter: &Adapter| {
                let mut trees = [learner::imitation(ids)];
                learner::on_policy(&model, &good, &mut trees);
                let learner = Learner::new(model.clone(), adapter, None, &learner::settings()).unwrap();
                let gradients =
                    learner.gradient(&[Portion::sampled(trees.into())], &learner::shape(), &mut |_, _| Ok(()));
                let gradients =
                    gradients.map(|gradient| gradient.gradients.iter().flat_map(values).collect::<Vec<f64>>());
                (hidden(&model, &[(ids, Some(adapter))]).unwrap(), gradients.ok())
            };
            let want = run(&small, &good);
            assert!(want.0.iter().all(|x| x.is_finite()) && want.1.is_some());
            for between in [&large, &small] {
                assert!(run(between, &broken).0.iter().any(|x| x.is_nan()), "the adapter breaks nothing");
                assert!(run(&small, &good) == want, "{}, {kernel:?}", folder.display());
            }
        }
    }
}

/// There may be no room for what attention did on the way to the log-probabilities. Catches a backward pass that computes it again in
/// another way, or leaves out a part that only some families have.
#[test]
fn gradients_do_not_depend_on_what_was_kept() {
    const ROWS: usize = 150;
    let ids: Vec<u32> = (10..10 + ROWS as u32).collect();
    let rows: Vec<u32> = (0..ROWS as u32).collect();
    let coefficients: Vec<f32> = (0..ROWS).map(|row| (row as f32).sin()).collect();
    for folder in tiny_models() {
        for kernel in check::kernels() {
            let model = Model::open(&folder, kernel).unwrap();
            let (adapter, _) = adapter(&model, &folder.join("adapter_lora"));
            let gradients = |forget: bool| {
                let spans = [Span { queries: 0..ROWS, prefix: 0..0, own: 0..ROWS }];
                let (stores, adapters) = ([Store { from: 0..ROWS, to: 0 }], [(0..ROWS, Some(&adapter))]);
                let positions: Vec<usize> = (0..ROWS).collect();
                let call =
                    Call { ids: &ids, positions: &positions, spans: &spans, stores: &stores, adapters: &adapters };
                let logits = model.logits(1.0);
                let question = Question { predicting: &rows, targets: &ids, logits, dropout: None };
                let mut trace = model.trace(call, question, true).unwrap();
                if forget {
                    trace.forget();
                }
                let mut gradients = model.gradients(&adapter).unwrap();
                model.backward(trace, &coefficients, &mut gradients, &mut || Ok(())).unwrap();
                let Gradients::Host(gradients) = gradients else { unreachable!("the model is on this processor") };
                gradients.concat()
            };
            let (kept, again) = (gradients(false), gradients(true));
            assert!(kept.iter().any(|x| *x != 0.0), "{}: no gradient", folder.display());
            check::same_bits(&format!("{}, {kernel:?}", folder.display()), &again, &kept);
        }
    }
}

/// A fresh adapter changes nothing, is the same for the same seed, and fills PEFT's range for A.
#[test]
fn a_fresh_adapter_is_the_identity() {
    let Some(folder) = check::golden("tiny/llama") else { return };
    let model = Model::open(&folder, check::f32_kernel()).unwrap();
    let fresh = |seed| Adapter::initialize(&model.architecture, &Lora::default(), seed, &Device::Cpu).unwrap();
    let flat =
        |adapter: &Adapter| adapter.tensors().unwrap().iter().map(|(_, tensor)| values(tensor)).collect::<Vec<_>>();
    assert_eq!(flat(&fresh(1)), flat(&fresh(1)));
    assert_ne!(flat(&fresh(1)), flat(&fresh(2)));
    let tokens: Vec<u32> = (10..40).collect();
    let with = logits(&model, std::slice::from_ref(&tokens), Some(&fresh(1)));
    assert_eq!(with, logits(&model, &[tokens], None));
    for (name, tensor) in fresh(1).tensors().unwrap() {
        let largest = values(&tensor).into_iter().fold(0.0, |most: f64, value| most.max(value.abs()));
        let bound = if name.contains("lora_B") { 0.0 } else { 1.0 / (tensor.dims()[1] as f64).sqrt() };
        assert!(largest <= bound && largest >= 0.95 * bound, "{name}: {largest}, bound {bound}");
    }
}
