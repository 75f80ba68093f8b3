//! Packed base weights: 4-bit normal floats against bitsandbytes, and models that compute what they would with the same
//! weights unpacked.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candor::config::{Dtype, Quantization};
use candor::learner::Learner;
use candor::model::stored::Stored;
use candor::model::{Model, Projection, Weights};
use candor::ops::kernel::Kernel;
use candor::ops::linear::LowRank;
use candor::ops::nf4::{Blocks, Nf4};
use candor::ops::panels::Panels;
use candor::ops::quantized::{Packed, Values, Weight};
use candor::record::GIB;
use candor::sampler::local::LocalSampler;
use candor::tokenizer::Tokenizer;
use serde_json::Value;
use tempfile::{TempDir, tempdir};

use crate::check;
use crate::hostile::assert_error;
use crate::learner::{gradient, imitation, on_policy, settings, shape};
use crate::loading::{planned, synthetic, write_gguf};
use crate::model::{adapter, ids, logits, tensors, values};
use crate::ops::{floats, narrowed, product, random};
use crate::program::Place;
use crate::sampler;
use crate::toy::{model as tiny, step_metrics};

const ALL: [Quantization; 3] = [Quantization::Nf4, Quantization::Q8, Quantization::Keep];

fn numbers(value: &Value) -> Vec<f32> {
    check::floats(value).into_iter().map(|number| number as f32).collect()
}

fn bytes(value: &Value) -> Vec<u8> {
    check::floats(value).into_iter().map(|number| number as u8).collect()
}

#[test]
fn normal_floats_are_bitsandbytes_bit_for_bit() {
    let Some(golden) = check::golden("nf4.json") else { return };
    let golden = check::json(&golden);
    let rows = golden["rows"].as_array().unwrap();
    for row in rows {
        let weights = numbers(&row["weights"]);
        // In two parts, as a large tensor is packed.
        let (first, last) = weights.split_at(64);
        let packed = Nf4::new(vec![Blocks::of(first), Blocks::of(last)]);
        let (codes, scales, nested, offset) = packed.parts();
        assert_eq!(codes, bytes(&row["packed"]), "{}", row["shape"]);
        if row["double_quant"] == true {
            assert_eq!(scales, bytes(&row["absmax_codes"]), "{}", row["shape"]);
            assert_eq!(nested, numbers(&row["nested_absmax"]), "{}", row["shape"]);
            assert_eq!(offset, row["offset"].as_f64().unwrap() as f32, "{}", row["shape"]);
            let mut unpacked = vec![f32::NAN; weights.len()];
            packed.unpack(&mut unpacked);
            // Where rows are not whole blocks, bitsandbytes 0.50 packs across their ends, as here, but its CPU kernel unpacks as
            // if each row began a block: its numbers are far from what was packed, and ours must not be.
            let across = row["shape"][1] == 96;
            assert_eq!(unpacked != numbers(&row["dequantized"]), across, "{}", row["shape"]);
            let off = |(got, want): (&f32, &f32)| (got - want).abs();
            assert!(unpacked.iter().zip(&weights).map(off).fold(0.0, f32::max) < 0.01, "{}", row["shape"]);
        }
    }
    assert!(rows.iter().filter(|row| row["double_quant"] == true).count() >= 3);
}

/// Many blocks of scales, and an odd number of values: each within half the widest step of its block's largest.
#[test]
fn unpacked_normal_floats_are_near_what_was_packed() {
    for length in [1, 2, 63, 64, 65, 16_384, 16_385, 50_001] {
        let weights = values(&random(1, (1, length))).into_iter().map(|x| x as f32).collect::<Vec<_>>();
        let mut unpacked = vec![f32::NAN; length];
        let packed = Nf4::new(weights.chunks(6400).map(Blocks::of).collect());
        packed.unpack(&mut unpacked);
        for (got, want) in unpacked.chunks(64).zip(weights.chunks(64)) {
            let largest = want.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() <= 0.16 * largest + 0.05, "{length}: {got} for {want} below {largest}");
            }
        }
        let (codes, scales, nested, _) = packed.parts();
        assert_eq!(Nf4::bytes(length), codes.len() + scales.len() + 4 * nested.len());
    }
    let mut zeros = [f32::NAN; 130];
    Nf4::new(vec![Blocks::of(&[0.0; 130])]).unpack(&mut zeros);
    assert_eq!(zeros, [0.0; 130]);
}

/// Value and gradients of an adapted and biased product with a frozen weight.
fn products(weight: &Weight, kernel: Kernel, (wide, narrow): (usize, usize), rows: usize) -> Vec<Vec<f32>> {
    let numbers = |(seed, shape)| floats(&random(seed, shape));
    let [x, a, b, bias, seed] =
        [(1, (rows, narrow)), (2, (3, narrow)), (3, (wide, 3)), (6, (1, wide)), (4, (rows, wide))].map(numbers);
    let weight = weight.unpacked(kernel).unwrap();
    let result = product(&x, &weight, Some(&bias), Some(LowRank::new(a, b, 3, 0.5, kernel)));
    std::iter::once(result.value).chain((result.backward)(&seed)).collect()
}

#[test]
fn a_product_with_a_packed_weight_is_that_with_its_unpacked_copy() {
    let dims = (70, 256);
    let weight = narrowed(&random(5, dims));
    let block = |kind, rows: std::ops::Range<usize>| {
        QTensor::quantize(&weight.narrow(0, rows.start, rows.len()).unwrap().force_contiguous().unwrap(), kind).unwrap()
    };
    let flat: Vec<f32> = weight.flatten_all().unwrap().to_vec1().unwrap();
    let kinds = [GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q6K, GgmlDType::BF16];
    let blocks = |kind| Values::Blocks(vec![block(kind, 0..64), block(kind, 64..70)]);
    for values in kinds.into_iter().map(blocks).chain([Values::Nf4(Nf4::new(vec![Blocks::of(&flat)]))]) {
        let packed = Packed { dims, values };
        let copy = packed.unpack().unwrap();
        let packed = Weight::Packed(packed);
        for kernel in check::kernels() {
            let dense = Weight::Panels(Panels::pack(&copy, dims.1, kernel));
            for rows in [1, 17, 300] {
                let [got, want] = [&packed, &dense].map(|weight| products(weight, kernel, dims, rows));
                assert!(got == want, "{kernel:?}, {rows} rows");
            }
        }
    }
}

/// The tiny model as a GGUF file of a type with blocks of 32.
fn tiny_gguf() -> TempDir {
    let folder = tempdir().unwrap();
    write_gguf(&tiny(), GgmlDType::Q5_1, &folder.path().join("m.gguf"));
    folder
}

/// A model with packed projections, and one of the same weights unpacked into a folder.
fn packed_and_copy(quantization: Quantization, kernel: Kernel) -> [Arc<Model>; 2] {
    let (gguf, folder) = (tiny_gguf(), tempdir().unwrap());
    let weights = Weights::open(gguf.path()).unwrap();
    let architecture = weights.architecture().unwrap();
    let mut all: HashMap<String, Tensor> = tensors(&tiny().join("model.safetensors"));
    for (name, tensor) in &mut all {
        if !Projection::ALL.iter().any(|projection| name.contains(projection.module())) {
            *tensor = weights.tensor(name, tensor.dims(), &architecture, &Device::Cpu).unwrap();
            continue;
        }
        let weight = weights.matrix(name, tensor.dims(), &architecture, Some(quantization), kernel).unwrap();
        let Weight::Packed(packed) = weight else { panic!("{name} is not packed") };
        *tensor = Tensor::from_slice(&packed.unpack().unwrap(), tensor.dims(), &Device::Cpu).unwrap();
    }
    candle_core::safetensors::save(&all, folder.path().join("model.safetensors")).unwrap();
    fs::copy(tiny().join("config.json"), folder.path().join("config.json")).unwrap();
    let packed = Model::load(&weights, Some(quantization), kernel, &Device::Cpu).unwrap();
    [Arc::new(packed), Arc::new(Model::open(folder.path(), kernel).unwrap())]
}

#[test]
fn logits_and_gradients_are_those_of_the_unpacked_copy() {
    let golden = tensors(&tiny().join("golden_logits.safetensors"));
    let (a, want) = (ids(&golden["ids_a"]), values(&golden["logits_a"]));
    for quantization in ALL {
        let got = packed_and_copy(quantization, check::f32_kernel()).map(|model| {
            let (adapter, _) = adapter(&model, &tiny().join("adapter_lora_all_rs"));
            let mut trees = [imitation(&a)];
            on_policy(&model, &adapter, &mut trees);
            let learner = Learner::new(model.clone(), &adapter, None, &settings()).unwrap();
            (logits(&model, std::slice::from_ref(&a), Some(&adapter)), gradient(&learner, &trees, &shape()))
        });
        assert!(got[0] == got[1], "{quantization:?}");
        let golden = tensors(&tiny().join("golden_lora_all_rs.safetensors"));
        assert_ne!(got[0].0, values(&golden["logits_a"]), "{quantization:?}: nothing is packed");
        assert_eq!(got[0].0.len(), want.len());
    }
}

#[test]
fn sampler_and_learner_agree_on_packed_weights() {
    let tokenizer = Arc::new(Tokenizer::from_folder(&tiny()).unwrap());
    for (quantization, kernel) in
        ALL.into_iter().flat_map(|quantization| check::kernels().into_iter().map(move |kernel| (quantization, kernel)))
    {
        let [model, _] = packed_and_copy(quantization, kernel);
        let (adapter, _) = adapter(&model, &tiny().join("adapter_lora"));
        let requests = [sampler::request(0, 20, 3), sampler::request(1, 7, 2)];
        let mut local = LocalSampler::new(model.clone(), tokenizer.clone());
        sampler::assert_learner_agrees(&model, &mut local, &requests, Some(&adapter), 1.0);
    }
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("numbers");
    let mut numbers = [0f32; 96];
    let stored = |numbers: &[f32], width: usize, quantization| {
        fs::write(&path, numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
        let (file, shape) = (File::open(&path).unwrap(), vec![numbers.len() / width, width]);
        let stored = Stored { file: &file, offset: 0, kind: GgmlDType::F32, shape, interleaved: None };
        stored.packed_bytes(quantization).and_then(|bytes| stored.pack(quantization).map(|_| bytes))
    };
    assert_eq!(stored(&numbers, 32, Quantization::Q8).unwrap(), 3 * 34);
    assert_error(stored(&numbers, 48, Quantization::Q8).map(drop), &["rows of 48", "blocks of 32", "Q8_0", "\"nf4\""]);
    numbers[70] = f32::NAN;
    for quantization in [Quantization::Nf4, Quantization::Q8] {
        assert_error(stored(&numbers, 32, quantization).map(drop), &["NaN"]);
    }
    let place = Place::new("model.quantization = \"keep\"");
    let ended = place.candor(&["train", "run.toml"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("run.toml:") && ended.stderr.contains("model.quantization: \"keep\""),
        "{}",
        ended.stderr
    );
}

/// Runs to the end, and gives what the last step's row says.
fn train(place: &Place, changes: &str) -> Value {
    place.configure(changes);
    place.finish(&[]);
    let row = step_metrics(&place.path("results/tiny")).pop().unwrap();
    fs::remove_dir_all(place.path("results")).unwrap();
    row
}

/// Puts a file in the place of the model's folder.
fn replace_model(place: &Place, file: &Path) {
    fs::remove_dir_all(place.path("model")).unwrap();
    fs::create_dir(place.path("model")).unwrap();
    fs::copy(file, place.path("model/m.gguf")).unwrap();
}

#[test]
fn the_program_trains_on_every_packed_form() {
    let place = Place::new("");
    let train = |quantization: &str| train(&place, &format!("{quantization}\nsteps = 2"));
    let unpacked = train("");
    assert!(unpacked["grad_norm"].as_f64().unwrap() > 0.0, "{unpacked}");
    for quantization in ["nf4", "q8_0"] {
        let row = train(&format!("model.quantization = {quantization:?}"));
        assert_ne!(row["grad_norm"], unpacked["grad_norm"], "{quantization}");
    }
    write_gguf(&place.path("model"), GgmlDType::Q5_1, &place.path("m.gguf"));
    replace_model(&place, &place.path("m.gguf"));
    let [unpacked, kept] = ["", "model.quantization = \"keep\""].map(train);
    assert_eq!(kept["grad_norm"], unpacked["grad_norm"]);
    let Some(smollm2) = check::smollm2() else { return };
    replace_model(&place, &smollm2);
    let row = train("batch = { prompts = 1, group = 2 }\nmodel.quantization = \"keep\"");
    let most = if Kernel::choose(Dtype::Auto, None).unwrap().row_invariant() { 0.0 } else { 1e-3 };
    assert!(row["tokens/learner"].as_u64().unwrap() > 0);
    assert!(row["mismatch/max"].as_f64().unwrap() <= most, "{row}");
}

#[test]
fn the_memory_of_packed_weights_is_foretold() {
    for (form, gguf) in [("nf4", None), ("q8_0", None), ("keep", Some(GgmlDType::Q4_0))] {
        let place = synthetic(&format!("model.quantization = {form:?}"), DType::BF16, gguf);
        let ended = place.candor(&["train", "run.toml", "--dry-run"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let foretold = planned(&ended.stdout, "peak");
        place.finish(&[]);
        let row = step_metrics(&place.path("results/tiny")).remove(0);
        let measured = row["perf/peak_gib"].as_f64().unwrap() * GIB / 1e9;
        assert!((foretold / measured - 1.0).abs() < 0.1, "{form}: measured {measured} GB\n{}", ended.stdout);
    }
}
