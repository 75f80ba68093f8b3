//! Loading a model: every type of number that files hold, and how much memory it takes.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use candle_core::quantized::gguf_file::{self, Value as Gguf};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, safetensors};
use candor::config::Dtype;
use candor::model::{Architecture, Model, Weights};
use candor::ops::kernel::Kernel;
use serde_json::json;

use crate::family::{converted, metadata};
use crate::model::{ids, logits, tensors, values};
use crate::ops::{narrowed, random};
use crate::program::{CANDOR, Place};
use crate::toy::{model, within};
use crate::{check, tokenizer_gguf};

/// Writes the GGUF file of a folder's model, its matrices quantized to this type.
pub fn write_gguf(folder: &Path, kind: GgmlDType, file: &Path) {
    let template = fs::read_to_string(folder.join("chat_template.jinja")).unwrap();
    let mut entries = metadata(folder, "llama");
    entries.extend(tokenizer_gguf::metadata(folder, "smollm"));
    entries.insert("tokenizer.chat_template".into(), Gguf::String(template));
    let entries: Vec<(&str, &Gguf)> = entries.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let quantized = |(name, tensor): (String, Tensor)| {
        let fits = tensor.rank() == 2 && tensor.dims()[1].is_multiple_of(kind.block_size());
        (name, QTensor::quantize(&narrowed(&tensor), if fits { kind } else { GgmlDType::F32 }).unwrap())
    };
    let stored: Vec<(String, QTensor)> = converted(folder, "llama").into_iter().map(quantized).collect();
    let stored: Vec<(&str, &QTensor)> = stored.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(file).unwrap(), &entries, &stored).unwrap();
}

/// Fills a folder with a model of 47 million random weights in two files, and the tiny model's tokenizer.
pub fn write_synthetic(folder: &Path, kind: DType) {
    const HIDDEN: usize = 512;
    const INTERMEDIATE: usize = 1536;
    const LAYERS: usize = 13;
    // Many more than the tokenizer's, so that one tensor is a good part of the model.
    const VOCABULARY: usize = 16_384;
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"] {
        fs::copy(model().join(name), folder.join(name)).unwrap();
    }
    let mut config = check::json(&model().join("config.json"));
    let sizes = [
        ("hidden_size", HIDDEN),
        ("intermediate_size", INTERMEDIATE),
        ("num_hidden_layers", LAYERS),
        ("vocab_size", VOCABULARY),
        ("num_attention_heads", HIDDEN / 16),
        ("num_key_value_heads", HIDDEN / 64),
        ("max_position_embeddings", 1024),
    ];
    sizes.into_iter().for_each(|(key, value)| config[key] = json!(value));
    config["tie_word_embeddings"] = json!(true);
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut made = HashMap::new();
    let mut of_shape = |shape: &[usize]| -> Tensor {
        let new = || (Tensor::randn(0f32, 0.05, shape, &Device::Cpu).unwrap()).to_dtype(kind).unwrap();
        made.entry(shape.to_vec()).or_insert_with(new).clone()
    };
    let mut weight_map = serde_json::Map::new();
    let mut parts = [HashMap::new(), HashMap::new()];
    let mut add = |name: String, shape: &[usize]| {
        let part = usize::from(!name.contains(".1"));
        weight_map.insert(name.clone(), json!(format!("model-{part}.safetensors")));
        parts[part].insert(name, of_shape(shape));
    };
    add("model.embed_tokens.weight".into(), &[VOCABULARY, HIDDEN]);
    add("model.norm.weight".into(), &[HIDDEN]);
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", &[HIDDEN][..]),
            ("post_attention_layernorm", &[HIDDEN]),
            ("self_attn.q_proj", &[HIDDEN, HIDDEN]),
            ("self_attn.k_proj", &[HIDDEN / 4, HIDDEN]),
            ("self_attn.v_proj", &[HIDDEN / 4, HIDDEN]),
            ("self_attn.o_proj", &[HIDDEN, HIDDEN]),
            ("mlp.gate_proj", &[INTERMEDIATE, HIDDEN]),
            ("mlp.up_proj", &[INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", &[HIDDEN, INTERMEDIATE]),
        ] {
            add(format!("model.layers.{layer}.{name}.weight"), shape);
        }
    }
    for (part, tensors) in parts.iter().enumerate() {
        safetensors::save(tensors, folder.join(format!("model-{part}.safetensors"))).unwrap();
    }
    fs::write(folder.join("model.safetensors.index.json"), json!({ "weight_map": weight_map }).to_string()).unwrap();
}

/// Every type of GGUF that can be read.
pub const KINDS: [GgmlDType; 13] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

/// Of several pieces each, the last a short one.
#[test]
fn every_type_of_gguf_is_loaded_as_candle_dequantizes_it() {
    let mut architecture = Architecture::from_config(&check::json(&model().join("config.json"))).unwrap();
    architecture.interleaved = true;
    let (head, shape) = (architecture.head_dim, (2064, 256));
    let numbers = narrowed(&random(1, shape));
    for kind in KINDS {
        let stored = QTensor::quantize(&numbers, kind).unwrap();
        let names = ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_v.weight"];
        let place = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
        gguf_file::write(&mut place.as_file(), &[], &names.map(|name| (name, &stored))).unwrap();
        let weights = Weights::open(place.path()).unwrap();
        let load = |name: &str| {
            let loaded = weights.tensor(name, &[shape.0, shape.1], &architecture, &Device::Cpu).unwrap();
            assert_eq!((loaded.dtype(), loaded.dims()), (DType::F32, &[shape.0, shape.1][..]));
            values(&loaded)
        };
        let candles = stored.dequantize(&Device::Cpu).unwrap();
        assert!(load("model.embed_tokens.weight") == values(&candles), "{kind:?}");
        assert!(load("model.layers.0.self_attn.v_proj.weight") == values(&candles), "{kind:?}");
        // The two halves of each head of the queries are interleaved in the files of this family.
        let heads = candles.reshape((shape.0 / head, head / 2, 2, shape.1)).unwrap();
        let apart = heads.transpose(1, 2).unwrap().contiguous().unwrap();
        assert!(load("model.layers.0.self_attn.q_proj.weight") == values(&apart), "{kind:?}");
    }
}

#[test]
fn logits_of_a_gguf_file_are_golden_within_the_error_of_its_type() {
    let golden = tensors(&model().join("golden_logits.safetensors"));
    let want = values(&golden["logits_a"]);
    for (kind, error) in [(GgmlDType::F16, 0.02), (GgmlDType::BF16, 0.2), (GgmlDType::Q8_0, 0.6)] {
        let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
        write_gguf(&model(), kind, file.path());
        let model = Model::open(file.path(), check::f32_kernel()).unwrap();
        let got = logits(&model, &[ids(&golden["ids_a"])], None);
        let off = got.iter().zip(&want).map(|(got, want)| (got - want).abs()).fold(0.0, f64::max);
        assert!(
            off > error / 100.0 && off < error,
            "{kind:?}: the largest difference is {off}, expected up to {error}"
        );
    }
}

/// Keys that make a run about loading its model.
const SMALL: &str = "steps = 1\nevaluation.tasks = 0\nbatch = { prompts = 1, group = 2 }\nsampling.max_tokens = 2";

/// What a dry run's plan says of a term, in GB.
pub fn planned(plan: &str, term: &str) -> f64 {
    let line = plan.lines().find_map(|line| line.strip_prefix(&format!("#   {term}")));
    let number = line.and_then(|line| line.split_whitespace().find_map(|word| word.parse().ok()));
    number.unwrap_or_else(|| panic!("{term} in {plan}"))
}

/// What the program has taken at most when its model is loaded and has said one token, in GB.
fn peak_of_loading(place: &Place) -> f64 {
    let (pipe, said) = (place.path("lines"), place.path("stdout"));
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let child = place.start(&["sh", "-c", &format!("exec {CANDOR} chat model --quiet --max-tokens 1 <lines")]);
    // Opened for writing only once somebody reads.
    let mut lines = within(60, move || File::options().write(true).open(&pipe).unwrap());
    writeln!(lines, "hello").unwrap();
    within(60, move || {
        while fs::read(&said).unwrap().last() != Some(&b'\n') {
            thread::sleep(Duration::from_millis(2));
        }
    });
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    drop(lines);
    assert_eq!(place.wait(child).code, Some(0), "{}", place.said());
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().strip_suffix(" kB").unwrap().parse::<f64>().unwrap() * 1024.0 / 1e9
}

/// A place with the synthetic model as a folder or, if a type is given, as a GGUF file.
pub fn synthetic(changes: &str, kind: DType, gguf: Option<GgmlDType>) -> Place {
    let place = Place::new(&format!("{SMALL}\n{changes}"));
    let folder = place.path("model");
    fs::remove_dir_all(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    write_synthetic(&folder, kind);
    if let Some(gguf) = gguf {
        write_gguf(&folder, gguf, &place.path("m.gguf"));
        fs::remove_dir_all(&folder).unwrap();
        fs::create_dir(&folder).unwrap();
        fs::rename(place.path("m.gguf"), folder.join("m.gguf")).unwrap();
    }
    place
}

/// The model's own memory and 15% more, beside the program's, whatever the files hold.
#[test]
fn loading_takes_hardly_more_than_the_model() {
    for (kind, gguf) in [
        (DType::F32, None),
        (DType::BF16, None),
        (DType::F16, None),
        (DType::F32, Some(GgmlDType::Q4_0)),
        (DType::F32, Some(GgmlDType::F32)),
    ] {
        let place = synthetic("", kind, gguf);
        let ended = place.candor(&["train", "run.toml", "--dry-run"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let (base, program) = (planned(&ended.stdout, "base weights"), planned(&ended.stdout, "program"));
        let peak = peak_of_loading(&place);
        let least = if Kernel::choose(Dtype::Auto, None).unwrap().dtype() == Dtype::Bf16 { 0.09 } else { 0.18 };
        // A file's 4 bits stay 4, with 2 for scale and minimum.
        let least = if gguf == Some(GgmlDType::Q4_0) && least == 0.09 { 0.03 } else { least };
        let fits = base > least && peak > base && peak < 1.15 * base + program;
        assert!(fits, "{kind:?} {gguf:?}: {peak} GB\n{}", ended.stdout);
    }
}
