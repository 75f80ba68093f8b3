//! Damaged and hostile files of every kind that is read when a run starts: an error that names the file, never a panic,
//! and nothing allocated on a file's word.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candor::checkpoint;
use candor::config::Lora;
use candor::model::Model;
use candor::model_files::load_model;
use candor::peft;
use candor::policy::Adapter;
use candor_environments::Message;
use proptest::prelude::*;
use serde_json::{Value as Json, json};
use tempfile::{TempDir, tempdir};

use crate::check;

/// The tensors of the smallest model there can be: name, name in GGUF, shape.
pub const TENSORS: [(&str, &str, &[usize]); 11] = [
    ("model.embed_tokens.weight", "token_embd.weight", &[6, 32]),
    ("model.norm.weight", "output_norm.weight", &[32]),
    ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight", &[32]),
    ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight", &[32]),
    ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight", &[32, 32]),
    ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight", &[16, 32]),
    ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight", &[16, 32]),
    ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight", &[32, 32]),
    ("model.layers.0.mlp.gate_proj.weight", "blk.0.ffn_gate.weight", &[32, 32]),
    ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight", &[32, 32]),
    ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", &[32, 32]),
];

/// Values that every float of 16 bits has exactly.
pub fn micro_tensors() -> Vec<(String, Tensor)> {
    let tensor = |(name, _, shape): &(&str, &str, &[usize])| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i % 17) as f32 / 8.0 - 1.0).collect();
        (name.to_string(), Tensor::from_vec(values, *shape, &Device::Cpu).unwrap())
    };
    TENSORS.iter().map(tensor).collect()
}

fn config_json() -> Json {
    json!({
        "model_type": "llama", "vocab_size": 6, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 16, "tie_word_embeddings": true, "eos_token_id": 3
    })
}

fn tokenizer_json() -> Json {
    json!({
        "version": "1.0", "normalizer": null, "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "added_tokens": [{"id": 3, "content": "<e>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    })
}

/// The smallest model as a folder, its tensors stored as this type.
pub fn micro_folder(kind: DType) -> TempDir {
    let folder = tempdir().unwrap();
    let tensors = micro_tensors().into_iter().map(|(name, tensor)| (name, tensor.to_dtype(kind).unwrap())).collect();
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    for (name, json) in [
        ("config.json", config_json()),
        ("tokenizer.json", tokenizer_json()),
        ("tokenizer_config.json", json!({"eos_token": "<e>", "chat_template": "{{ messages[0].content }}<e>"})),
        ("generation_config.json", json!({"eos_token_id": [3]})),
    ] {
        fs::write(folder.path().join(name), json.to_string()).unwrap();
    }
    folder
}

/// The smallest model as a GGUF file.
pub fn micro_gguf() -> Vec<u8> {
    let text = |text: &str| Value::String(text.into());
    let entries = [
        ("general.architecture", text("llama")),
        ("llama.embedding_length", Value::U32(32)),
        ("llama.feed_forward_length", Value::U32(32)),
        ("llama.block_count", Value::U32(1)),
        ("llama.attention.head_count", Value::U32(2)),
        ("llama.attention.head_count_kv", Value::U32(1)),
        ("llama.rope.dimension_count", Value::U32(16)),
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.context_length", Value::U32(16)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.tokens", Value::Array(["a", "b", "ab", "<e>"].map(text).to_vec())),
        ("tokenizer.ggml.token_type", Value::Array([1, 1, 1, 3].map(Value::I32).to_vec())),
        ("tokenizer.ggml.merges", Value::Array(vec![text("a b")])),
        ("tokenizer.ggml.eos_token_id", Value::U32(3)),
        ("tokenizer.chat_template", text("{{ messages[0].content }}<e>")),
    ];
    let kinds = [GgmlDType::F32, GgmlDType::Q4_0, GgmlDType::F16, GgmlDType::Q8_0, GgmlDType::BF16];
    let tensors = micro_tensors().into_iter().zip(TENSORS).enumerate().map(|(index, ((_, tensor), (_, name, _)))| {
        let kind = if tensor.rank() == 1 { GgmlDType::F32 } else { kinds[index % kinds.len()] };
        (name, QTensor::quantize(&tensor, kind).unwrap())
    });
    let tensors: Vec<(&str, QTensor)> = tensors.collect();
    let mut file = Cursor::new(Vec::new());
    let entries: Vec<(&str, &Value)> = entries.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    gguf_file::write(&mut file, &entries, &tensors).unwrap();
    file.into_inner()
}

/// The error says all of this.
#[track_caller]
pub fn assert_error(result: Result<()>, parts: &[&str]) {
    let Err(error) = result else { panic!("no error; expected {parts:?}") };
    let text = format!("{error:#}");
    assert!(parts.iter().all(|part| text.contains(part)), "{parts:?} in: {text}");
}

fn lora() -> Lora {
    Lora { rank: 2, ..Lora::default() }
}

/// Everything that a start reads, on the disk.
struct Start {
    folder: TempDir,
}

/// The files of a start, and how many of their bytes may be missing without anybody noticing: padding.
const FILES: [(&str, usize); 9] = [
    ("model/config.json", 0),
    ("model/model.safetensors", 0),
    ("model/tokenizer.json", 0),
    ("model/tokenizer_config.json", 0),
    ("model/generation_config.json", 0),
    ("m.gguf", 31),
    ("step-000007/adapter_config.json", 0),
    ("step-000007/adapter_model.safetensors", 0),
    ("step-000007/state.json", 0),
];

impl Start {
    fn new() -> Self {
        let (folder, model) = (tempdir().unwrap(), micro_folder(DType::BF16));
        fs::create_dir(folder.path().join("model")).unwrap();
        for file in fs::read_dir(model.path()).unwrap().map(|entry| entry.unwrap()) {
            fs::copy(file.path(), folder.path().join("model").join(file.file_name())).unwrap();
        }
        fs::write(folder.path().join("m.gguf"), micro_gguf()).unwrap();
        let this = Self { folder };
        let model = Model::open(model.path(), check::f32_kernel()).unwrap();
        let adapter = Adapter::initialize(&model.architecture, &lora(), 0, &Device::Cpu).unwrap();
        let checkpoint = this.path("step-000007");
        fs::create_dir(&checkpoint).unwrap();
        peft::save(&checkpoint, &lora(), "base", &adapter).unwrap();
        fs::write(checkpoint.join("state.json"), r#"{"next_step": 7, "updates": 6}"#).unwrap();
        this
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// Reads what this file is part of.
    fn read(&self, file: &str) -> Result<()> {
        let model = |path: &Path| load_model(path.to_str().unwrap(), check::f32_kernel(), &|_| {});
        match file.split_once('/') {
            None => model(&self.path(file)).map(drop),
            Some((_, "state.json")) => checkpoint::state(&self.path("step-000007")).map(drop),
            Some(("model", _)) => model(&self.path("model")).map(drop),
            Some(_) => {
                let (model, _) = model(&self.path("m.gguf"))?;
                peft::load(&self.path("step-000007"), &model.architecture, &lora(), &Device::Cpu).map(drop)
            }
        }
    }

    /// What reading says once a file has these bytes; the file is then as before.
    fn read_with(&self, file: &str, bytes: &[u8]) -> Result<()> {
        let good = fs::read(self.path(file)).unwrap();
        fs::write(self.path(file), bytes).unwrap();
        let result = self.read(file);
        fs::write(self.path(file), good).unwrap();
        result
    }

    /// [`read_with`](Self::read_with) fails and says where, and all of this.
    #[track_caller]
    fn assert_refused(&self, file: &str, bytes: &[u8], parts: &[&str]) {
        let place = self.path(file.split('/').next().unwrap());
        let name = file.split('/').next_back().unwrap();
        assert_error(self.read_with(file, bytes), &[&[place.to_str().unwrap(), name], parts].concat());
    }
}

#[test]
fn a_file_that_is_cut_off_is_an_error_that_names_it() {
    let start = Start::new();
    for (file, padding) in FILES {
        start.read(file).unwrap();
        let bytes = fs::read(start.path(file)).unwrap();
        // Every length near the beginning, where headers are, and near the end; others sparsely.
        for length in (0..bytes.len() - padding).filter(|n| *n < 200 || n % 97 == 0 || bytes.len() - n < 40) {
            start.assert_refused(file, &bytes[..length], &[]);
        }
    }
}

#[test]
fn an_empty_or_cut_model_says_so_and_names_its_place_once() {
    let start = Start::new();
    let gguf = fs::read(start.path("m.gguf")).unwrap();
    start.assert_refused("m.gguf", b"", &["the file is empty"]);
    start.assert_refused("m.gguf", &gguf[..100], &["cut short or damaged"]);
    start.assert_refused("m.gguf", &gguf[..gguf.len() - 100], &["tensor \"", "cut short or damaged"]);
    let error = format!("{:#}", start.read_with("model/tokenizer.json", b"{}").unwrap_err());
    assert_eq!(error.matches(start.path("model").to_str().unwrap()).count(), 1, "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A damaged byte may go unnoticed in a number or a text; else the error names the place.
    #[test]
    fn damaged_bytes_are_harmless_or_an_error(places in prop::collection::vec((0..FILES.len(), any::<prop::sample::Index>(), 1u8..), 20)) {
        let start = Start::new();
        for (file, index, change) in places {
            let file = FILES[file].0;
            let mut bytes = fs::read(start.path(file)).unwrap();
            *index.get_mut(&mut bytes) ^= change;
            if let Err(error) = start.read_with(file, &bytes) {
                let place = start.path(file.split('/').next().unwrap());
                let text = format!("{error:#}");
                prop_assert!(text.contains(place.to_str().unwrap()), "{file} {index:?} {change}: {text}");
            }
        }
    }
}

/// A JSON file with one value replaced.
fn replaced(good: &Json, pointer: &str, value: Json) -> Vec<u8> {
    let mut changed = good.clone();
    match changed.pointer_mut(pointer) {
        Some(place) => *place = value,
        None => changed[pointer.trim_start_matches('/')] = value,
    }
    changed.to_string().into_bytes()
}

#[test]
fn a_model_description_that_cannot_be_is_refused() {
    let start = Start::new();
    let refused = |text: &[u8], parts: &[&str]| {
        let place = start.path("model");
        assert_error(start.read_with("model/config.json", text), &[&[place.to_str().unwrap()], parts].concat());
    };
    for text in ["[]", "null", "3", "\"llama\"", "[[[["] {
        refused(text.as_bytes(), &["config.json"]);
    }
    let sizes = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ];
    for key in sizes {
        for value in [json!(0), json!(1u64 << 40), json!(u64::MAX)] {
            refused(&replaced(&config_json(), key, value), &["size"]);
        }
        for value in [json!(-1), json!("32"), json!(1.5), json!([]), json!(1e300)] {
            refused(&replaced(&config_json(), key, value), &["config.json", key]);
        }
    }
    let mut without_head_dim = config_json();
    without_head_dim.as_object_mut().unwrap().remove("head_dim");
    without_head_dim["num_attention_heads"] = json!(1);
    for value in [json!(1u64 << 27), json!(1u64 << 60)] {
        refused(&replaced(&without_head_dim, "hidden_size", value), &["config.json"]);
    }
    let llama3 = |factor: f64| {
        json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 1.0, "original_max_position_embeddings": 16, "rope_theta": 1e4})
    };
    for (key, value, part) in [
        ("head_dim", json!(0), "head_dim"),
        ("head_dim", json!(15), "head_dim"),
        ("head_dim", json!(1u64 << 50), "head_dim"),
        ("num_key_value_heads", json!(3), "heads"),
        ("rms_norm_eps", json!(0), "epsilon"),
        ("rms_norm_eps", json!(-1e-5), "epsilon"),
        ("rms_norm_eps", json!("1e-5"), "rms_norm_eps"),
        ("rope_theta", json!(0), "frequencies"),
        ("rope_theta", json!(-1), "frequencies"),
        ("rope_theta", json!("x"), "rope_theta"),
        ("rope_parameters", llama3(0.0), "frequencies"),
        ("rope_parameters", llama3(-1.0), "frequencies"),
        ("vocab_size", json!(7), "[6, 32]"),
        ("num_hidden_layers", json!(2), "model.layers.1."),
    ] {
        refused(&replaced(&config_json(), key, value), &[part]);
    }
}

#[test]
fn a_tokenizer_that_would_take_all_memory_or_all_time_is_refused_or_harmless() {
    let start = Start::new();
    let (absurd, good) = (1u64 << 40, tokenizer_json());
    // Padding and truncation are what training needs none of; they are dropped before they can do anything.
    let padding = json!({"strategy": {"Fixed": absurd}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "a"});
    let bos = json!({"eos_token": "<e>", "bos_token": "a"});
    fs::write(start.path("model/tokenizer_config.json"), bos.to_string()).unwrap();
    start.read_with("model/tokenizer.json", &replaced(&good, "padding", padding)).unwrap();
    let far = start.read_with("model/tokenizer.json", &replaced(&good, "/model/vocab/ab", json!(u32::MAX)));
    assert_error(far, &[start.path("model").to_str().unwrap(), "4294967296 token ids", "only 6"]);
    for (pointer, value, part) in [
        ("/model/vocab/ab", json!(-1), "not a tokenizer"),
        ("/model/merges", json!([["a", "c"]]), "not a tokenizer"),
        ("/model/type", json!("Unigram"), "not a tokenizer"),
        ("/added_tokens/0/id", json!(absurd), "not a tokenizer"),
        ("/model", json!(null), "not a tokenizer"),
    ] {
        start.assert_refused("model/tokenizer.json", &replaced(&good, pointer, value), &[part]);
    }
}

/// Catches a template that is rendered for as long as it likes, already when the model is loaded.
#[test]
fn an_endless_chat_template_is_given_up() {
    let start = Start::new();
    let nested = "{% for i in range(99999) %}".repeat(4) + "x" + &"{% endfor %}".repeat(4);
    let endless = json!({"eos_token": "<e>", "chat_template": nested}).to_string();
    fs::write(start.path("model/tokenizer_config.json"), endless).unwrap();
    let (_, tokenizer) = load_model(start.path("model").to_str().unwrap(), check::f32_kernel(), &|_| {}).unwrap();
    assert_error(tokenizer.prompt_ids(&[Message::user("a")]).map(drop), &["does not render", "fuel"]);
}

#[test]
fn an_adapter_that_does_not_belong_to_the_run_is_refused() {
    let start = Start::new();
    let path = "step-000007/adapter_config.json";
    let good: Json = serde_json::from_slice(&fs::read(start.path(path)).unwrap()).unwrap();
    for text in ["[]", "null", "3", "\"LORA\""] {
        start.assert_refused(path, text.as_bytes(), &["peft_type is null"]);
    }
    for (key, value, part) in [
        ("r", json!(3), "lora.rank"),
        ("r", json!("2"), "r is not a rank"),
        ("r", json!(1u64 << 60), "r is not a rank"),
        ("lora_alpha", json!(null), "lora_alpha"),
        ("lora_alpha", json!(3.5), "lora.alpha"),
        ("peft_type", json!("IA3"), "peft_type is \"IA3\""),
        ("bias", json!("all"), "bias is \"all\""),
        ("use_dora", json!(true), "use_dora"),
        ("modules_to_save", json!(["lm_head"]), "modules_to_save"),
        ("rank_pattern", json!({"q_proj": 4}), "rank_pattern"),
        ("layer_replication", json!([[0, 2], [1, 3]]), "layer_replication"),
        ("init_lora_weights", json!("pissa_niter_16"), "init_lora_weights is \"pissa_niter_16\""),
        ("use_rslora", json!(true), "lora.rslora"),
        ("target_modules", json!(["q_proj"]), "lora.targets"),
        ("target_modules", json!([1, 2]), "target_modules: 1 is not"),
        ("target_modules", json!(["lm_head"]), "target_modules: \"lm_head\" is not"),
        ("target_modules", json!(["proj"]), "target_modules: \"proj\" is not"),
        ("target_modules", json!("all-linear"), "target_modules"),
    ] {
        start.assert_refused(path, &replaced(&good, key, value), &[part]);
    }
}

#[test]
fn an_adapters_tensors_are_checked_by_name() {
    let start = Start::new();
    let path = "step-000007/adapter_model.safetensors";
    let good = candle_core::safetensors::load(start.path(path), &Device::Cpu).unwrap();
    let name = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight";
    let full = |value: f32, shape: &[usize]| Tensor::full(value, shape, &Device::Cpu).unwrap();
    let changed = |change: &dyn Fn(&mut std::collections::HashMap<String, Tensor>)| {
        let (mut tensors, folder) = (good.clone(), tempdir().unwrap());
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, folder.path().join("t")).unwrap();
        fs::read(folder.path().join("t")).unwrap()
    };
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let bytes = changed(&|tensors| drop(tensors.insert(name.into(), full(value, &[16, 2]))));
        start.assert_refused(path, &bytes, &[name, "NaN or infinity"]);
    }
    // The largest numbers are numbers, also added up.
    let bytes = changed(&|tensors| drop(tensors.insert(name.into(), full(f32::MAX, &[16, 2]))));
    start.read_with(path, &bytes).unwrap();
    let other_model = changed(&|tensors| drop(tensors.insert(name.into(), full(0.0, &[8, 2]))));
    start.assert_refused(path, &other_model, &[name, "[8, 2]", "(16, 2)"]);
    let missing = changed(&|tensors| drop(tensors.remove(name)));
    start.assert_refused(path, &missing, &[name, "missing"]);
    let more = changed(&|tensors| drop(tensors.insert("more".into(), full(0.0, &[1]))));
    start.assert_refused(path, &more, &["no place for: more"]);
    let kind = changed(&|tensors| {
        let tensor = tensors[name].to_dtype(DType::F64).unwrap();
        tensors.insert(name.into(), tensor);
    });
    start.assert_refused(path, &kind, &[name, "F64", "F32, F16 and BF16"]);
}

#[test]
fn a_state_that_is_not_its_folders_is_refused() {
    let start = Start::new();
    for text in [
        "[]",
        "{}",
        "null",
        r#"{"next_step": 7}"#,
        r#"{"next_step": -7, "updates": 6}"#,
        r#"{"next_step": "7", "updates": 6}"#,
        r#"{"next_step": 8, "updates": 6}"#,
        r#"{"next_step": 7, "updates": 8}"#,
        r#"{"next_step": 18446744073709551615, "updates": 6}"#,
        r#"{"next_step": 7, "updates": 18446744073709551615}"#,
    ] {
        start.assert_refused("step-000007/state.json", text.as_bytes(), &["damaged"]);
    }
}
