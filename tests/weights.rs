//! GGUF and safetensors files: read as candle reads them, and refused by name where they say the impossible.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candor::model::{Weights, gguf};
use candor::model_files::ModelFiles;
use serde_json::{Value as Json, json};
use tempfile::{TempDir, tempdir};

use crate::check;
use crate::hostile::{TENSORS, assert_error, micro_folder, micro_gguf, micro_tensors};
use crate::loading::{KINDS, write_gguf};
use crate::model::values;
use crate::toy;

const ABSURD: [u64; 4] = [1 << 40, 1 << 60, i64::MAX as u64, u64::MAX];

/// Both readers say the same of a file.
fn assert_as_candle(bytes: &[u8]) {
    let ours = gguf::read(bytes, bytes.len() as u64).unwrap();
    let theirs = Content::read(&mut Cursor::new(bytes)).unwrap();
    assert_eq!(format!("{:?}", ours.magic), format!("{:?}", theirs.magic));
    assert_eq!(ours.tensor_data_offset, theirs.tensor_data_offset);
    assert_eq!(ours.metadata.len(), theirs.metadata.len());
    for (key, value) in &theirs.metadata {
        assert_eq!(format!("{:?}", ours.metadata[key]), format!("{value:?}"), "{key}");
    }
    assert_eq!(ours.tensor_infos.len(), theirs.tensor_infos.len());
    for (name, info) in &theirs.tensor_infos {
        assert_eq!(format!("{:?}", ours.tensor_infos[name]), format!("{info:?}"), "{name}");
    }
}

#[test]
fn gguf_files_are_read_as_candle_reads_them() {
    let strings = |texts: [&str; 2]| Value::Array(texts.map(|text| Value::String(text.into())).to_vec());
    let entries = [
        ("general.alignment", Value::U32(32)),
        ("u8", Value::U8(200)),
        ("i8", Value::I8(-100)),
        ("u16", Value::U16(60_000)),
        ("i16", Value::I16(-30_000)),
        ("i32", Value::I32(-5)),
        ("u64", Value::U64(u64::MAX)),
        ("i64", Value::I64(i64::MIN)),
        ("f32", Value::F32(0.1)),
        ("f64", Value::F64(0.1)),
        ("bool", Value::Array(vec![Value::Bool(true), Value::Bool(false)])),
        ("text", Value::String("naïve 🦀".into())),
        ("nested", Value::Array(vec![strings(["a", ""]), strings(["b", "c d"])])),
        ("none", Value::Array(Vec::new())),
    ];
    let numbers = Tensor::arange(0f32, 512., &Device::Cpu).unwrap().reshape((2, 256)).unwrap();
    let tensors = KINDS.map(|kind| (format!("{kind:?}"), QTensor::quantize(&numbers, kind).unwrap()));
    let mut file = Cursor::new(Vec::new());
    let entries: Vec<(&str, &Value)> = entries.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut file, &entries, &tensors).unwrap();
    assert_as_candle(file.get_ref());
    let ours = gguf::read(file.get_ref().as_slice(), file.get_ref().len() as u64).unwrap();
    for (name, tensor) in tensors {
        let read = ours.tensor(&mut file, name, &Device::Cpu).unwrap();
        assert_eq!(read.data().unwrap(), tensor.data().unwrap(), "{name}");
    }
    assert_as_candle(&micro_gguf());
}

#[test]
fn smollm2_is_read_as_candle_reads_it() {
    let Some(path) = check::smollm2() else { return };
    assert_as_candle(&fs::read(path).unwrap());
}

/// Writes a GGUF header piece by piece.
struct Header(Vec<u8>);

impl Header {
    fn new(tensors: u64, entries: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(3).u64(tensors).u64(entries)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn u32(self, number: u32) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    fn u64(self, number: u64) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    fn text(self, text: &[u8]) -> Self {
        self.u64(text.len() as u64).bytes(text)
    }

    /// A key, and a value of this type.
    fn entry(self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.text(key.as_bytes()).u32(kind).bytes(value)
    }

    fn tensor(self, name: &str, dimensions: &[u64], kind: u32, offset: u64) -> Self {
        let start = self.text(name.as_bytes()).u32(dimensions.len() as u32);
        dimensions.iter().fold(start, |header, &dimension| header.u64(dimension)).u32(kind).u64(offset)
    }
}

/// Why a file with these bytes cannot be opened; the message names the file.
#[track_caller]
fn assert_refused(name: &str, bytes: &[u8], parts: &[&str]) {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    let file = folder.path().join(name);
    fs::write(&file, bytes).unwrap();
    let opened = Weights::open(if name.ends_with(".gguf") { &file } else { folder.path() });
    assert_error(opened.map(drop), &[&[file.to_str().unwrap()], parts].concat());
}

#[test]
fn a_gguf_header_that_says_the_impossible_is_refused() {
    let long = "k".repeat(70_000);
    let one = || Header::new(0, 1);
    let nested = |depth| (0..depth).fold(one().text(b"k").u32(9), |header, _| header.u32(9).u64(1)).u32(0).u64(0);
    let align = |value: u32| one().entry("general.alignment", 4, &value.to_le_bytes());
    for (header, parts) in [
        (Header(Vec::new()), vec!["m.gguf", "the file is empty"]),
        (Header(b"GG".to_vec()), vec!["cut short or damaged: 1 × 4 bytes at byte 0", "2 left of the file"]),
        (Header(b"PK\x03\x04....".to_vec()), vec!["begins with \"PK\\x03\\x04\"", "GGUF"]),
        (Header(b"GGUF".to_vec()).u32(1), vec!["gguf version 1", "2 and 3"]),
        (Header(b"GGUF".to_vec()).u32(0), vec!["gguf version 0"]),
        (Header(b"GGUF".to_vec()).u32(3u32.swap_bytes()), vec!["big-endian"]),
        (one().text(b"\xff\xfe"), vec!["key of metadata entry 0 of 1", "not UTF-8"]),
        (one().text(long.as_bytes()), vec!["entry 0", "70000"]),
        (one().entry("k", 13, &[0]), vec!["key \"k\"", "value type 13"]),
        (one().entry("k", 7, &[2]), vec!["key \"k\"", "2 is not a boolean"]),
        (one().entry("k", 8, &[]).text(b"\xff"), vec!["key \"k\"", "not UTF-8"]),
        (one().entry("k", 9, &[]).u32(99).u64(0), vec!["key \"k\"", "value type 99"]),
        (one().entry("k", 9, &[]).u32(8).u64(3).text(b"a").text(b"\xff"), vec!["key \"k\"", "row 1 of 3", "UTF-8"]),
        (nested(5), vec!["key \"k\"", "deep"]),
        (nested(60_000), vec!["key \"k\"", "deep"]),
        (Header::new(0, 2).entry("k", 0, &[1]).entry("k", 0, &[1]), vec!["key \"k\" stands there twice"]),
        (align(0), vec!["general.alignment", "0 is not a power of two"]),
        (align(24), vec!["general.alignment", "24 is not a power of two"]),
        (align(1 << 31), vec!["general.alignment", "2147483648"]),
        (one().entry("general.alignment", 8, &[]).text(b"32"), vec!["general.alignment", "not a u32"]),
    ] {
        assert_refused("m.gguf", &header.0, &parts);
    }
    for absurd in ABSURD {
        for (header, parts) in [
            (Header::new(absurd, 0), vec!["number of tensors"]),
            (Header::new(0, absurd), vec!["number of metadata entries"]),
            (one().u64(absurd), vec!["key of metadata entry 0 of 1", "left of the file"]),
            (one().entry("k", 8, &[]).u64(absurd), vec!["key \"k\"", "left of the file"]),
            (one().entry("k", 9, &[]).u32(0).u64(absurd), vec!["key \"k\"", "array"]),
            (one().entry("k", 9, &[]).u32(9).u64(1).u32(12).u64(absurd), vec!["key \"k\"", "row 0 of 1", "array"]),
        ] {
            assert_refused("m.gguf", &header.0, &parts);
        }
    }
}

#[test]
fn a_gguf_tensor_that_cannot_be_is_refused_by_name() {
    let of = |dimensions: &[u64], kind, offset| Header::new(1, 0).tensor("t", dimensions, kind, offset);
    for (header, parts) in [
        (of(&[], 0, 0), vec!["0 dimensions"]),
        (of(&[1; 5], 0, 0), vec!["5 dimensions"]),
        (of(&[4, 0], 0, 0), vec!["impossible shape [4, 0]"]),
        (of(&[1 << 32, 1 << 32], 0, 0), vec!["impossible shape"]),
        (of(&[1 << 62], 0, 0), vec!["impossible shape"]),
        (of(&[32], 9, 0), vec!["ggml type 9", "F32, F16, Q4_0"]),
        (of(&[32], u32::MAX, 0), vec!["ggml type 4294967295"]),
        (of(&[48, 2], 2, 0), vec!["rows of 48", "blocks of 32", "Q4_0"]),
        (of(&[128, 2], 14, 0), vec!["rows of 128", "blocks of 256", "Q6K"]),
        (of(&[8], 0, 4), vec!["offset 4 is not a multiple of the alignment, 32"]),
        (of(&[8], 0, 32), vec!["32 bytes at offset 32"]),
        (of(&[9], 0, 0), vec!["36 bytes at offset 0"]),
        (of(&[1 << 40], 0, 0), vec!["bytes at offset 0"]),
        (of(&[8], 0, u64::MAX - 31), vec!["bytes at offset 18446744073709551584"]),
        (Header::new(2, 0).tensor("t", &[8], 0, 0).tensor("t", &[8], 0, 0), vec!["stands there twice"]),
    ] {
        let mut bytes = header.0;
        bytes.resize(bytes.len().next_multiple_of(32) + 32, 0);
        assert_refused("m.gguf", &bytes, &[&["tensor \"t\""], parts.as_slice()].concat());
    }
}

/// A safetensors file of this header and this many bytes of data.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

/// The header's text of one tensor.
fn entry(name: &str, kind: &str, shape: &[u64], begin: u64, end: u64) -> String {
    format!("{}:{}", json!(name), json!({"dtype": kind, "shape": shape, "data_offsets": [begin, end]}))
}

#[test]
fn a_safetensors_header_that_says_the_impossible_is_refused() {
    let (a, b) = (entry("a", "F32", &[2], 0, 8), |begin, end| entry("b", "F32", &[2], begin, end));
    for (bytes, part) in [
        (Vec::new(), "too small"),
        (vec![1, 2, 3], "too small"),
        (99_000_000u64.to_le_bytes().to_vec(), "invalid header length"),
        (safetensors("{not json", 0), "invalid JSON in header"),
        (safetensors("[]", 0), "invalid JSON in header"),
        ([&2u64.to_le_bytes(), b"\xff\xfe".as_slice()].concat(), "UTF-8"),
        (safetensors(&format!("{{{a},{}}}", b(8, 16)), 8), "not fully covered"),
        (safetensors(&format!("{{{a},{}}}", b(8, 16)), 17), "not fully covered"),
        (safetensors(&format!("{{{a},{}}}", b(4, 12)), 12), "invalid offset for tensor `b`"),
        (safetensors(&format!("{{{a},{}}}", b(12, 20)), 20), "invalid offset for tensor `b`"),
        (safetensors(&format!("{{{}}}", b(8, 0)), 8), "invalid offset for tensor `b`"),
        (safetensors(&format!("{{{}}}", entry("a", "F32", &[3], 0, 8)), 8), "invalid shape"),
        (safetensors(&format!("{{{}}}", entry("a", "F32", &[1 << 40, 1 << 40], 0, 8)), 8), "overflow"),
        (safetensors(&format!("{{{}}}", entry("a", "F33", &[2], 0, 8)), 8), "F33"),
        (safetensors(r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8), "-2"),
    ] {
        assert_refused("model.safetensors", &bytes, &[part]);
    }
    for absurd in ABSURD {
        assert_refused("model.safetensors", &absurd.to_le_bytes(), &["header too large"]);
    }
}

/// The micro model's folder with one tensor stored as other bytes.
fn with_tensor(kind: &str, shape: &[u64], bytes: u64) -> TempDir {
    let folder = micro_folder(DType::F32);
    let header = format!("{{{}}}", entry("model.embed_tokens.weight", kind, shape, 0, bytes));
    fs::write(folder.path().join("model.safetensors"), safetensors(&header, bytes as usize)).unwrap();
    folder
}

#[test]
fn floats_of_16_and_32_bits_are_read_and_nothing_else() {
    for kind in [DType::F32, DType::F16, DType::BF16] {
        let folder = micro_folder(kind);
        let weights = Weights::open(folder.path()).unwrap();
        let architecture = weights.architecture().unwrap();
        for (name, tensor) in micro_tensors() {
            let read = weights.tensor(&name, tensor.dims(), &architecture, &Device::Cpu).unwrap();
            assert_eq!((read.dtype(), values(&read)), (DType::F32, values(&tensor)), "{name} as {kind:?}");
        }
    }
    for (kind, bytes) in
        [("F64", 8), ("I64", 8), ("U8", 1), ("I8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("F8_E5M2", 1), ("C64", 8)]
    {
        let folder = with_tensor(kind, &[6, 32], 6 * 32 * bytes);
        let weights = Weights::open(folder.path()).unwrap();
        let architecture = weights.architecture().unwrap();
        let path = folder.path().join("model.safetensors");
        let read = weights.tensor("model.embed_tokens.weight", &[6, 32], &architecture, &Device::Cpu);
        assert_error(read.map(drop), &[path.to_str().unwrap(), "model.embed_tokens.weight", kind, "F32, F16 and BF16"]);
    }
}

/// The shape is checked before the kind: nothing was converted when it is refused.
#[test]
fn another_shape_is_refused_from_the_header_alone() {
    for shape in [vec![0, 32], vec![6, 0], vec![6, 31], vec![6 * 32], vec![], vec![6, 32, 1]] {
        let folder = with_tensor("I64", &shape, 8 * shape.iter().product::<u64>());
        let weights = Weights::open(folder.path()).unwrap();
        let architecture = weights.architecture().unwrap();
        let read = weights.tensor("model.embed_tokens.weight", &[6, 32], &architecture, &Device::Cpu);
        let place = folder.path().to_str().unwrap();
        assert_error(read.map(drop), &[place, "model.embed_tokens.weight", &format!("{shape:?}"), "[6, 32]"]);
    }
}

#[test]
fn shapes_come_from_headers() {
    let (folder, file) = (micro_folder(DType::F16), tempdir().unwrap());
    let stored = file.path().join("m.gguf");
    fs::write(&stored, micro_gguf()).unwrap();
    for (path, stored) in [(folder.path(), folder.path().join("model.safetensors")), (file.path(), stored)] {
        let weights = Weights::open(path).unwrap();
        let architecture = weights.architecture().unwrap();
        for (name, _, shape) in TENSORS {
            assert_eq!(weights.shape(name, &architecture).unwrap(), shape, "{name}");
        }
        assert_error(
            weights.shape("lm_head.weight", &architecture).map(drop),
            &[stored.to_str().unwrap(), "lm_head.weight", "missing"],
        );
    }
}

/// Else a description of fewer layers, or of another family, would silently run another model. What older checkpoints and
/// copies of tied heads hold beside the layers harms nothing.
#[test]
fn a_tensor_that_the_description_has_no_place_for_is_refused_by_name() {
    let layer = "model.layers.0";
    for (extra, part) in [
        ("lm_head.weight".to_string(), None),
        ("vision.blocks.0.weight".to_string(), None),
        (format!("{layer}.self_attn.rotary_emb.inv_freq"), None),
        (format!("{layer}.self_attn.q_proj.bias"), Some("would be left out")),
        (format!("{layer}.self_attn.q_norm.weight"), Some("would be left out")),
        ("model.layers.1.mlp.up_proj.weight".to_string(), Some("of 1 layers")),
        ("model.layers.10.mlp.up_proj.weight".to_string(), Some("of 1 layers")),
    ] {
        let folder = micro_folder(DType::F32);
        let mut tensors = micro_tensors();
        tensors.push((extra.clone(), Tensor::ones(4, DType::F32, &Device::Cpu).unwrap()));
        candle_core::safetensors::save(&tensors.into_iter().collect(), folder.path().join("model.safetensors"))
            .unwrap();
        let opened = ModelFiles::open(folder.path().to_str().unwrap(), &|_| {}).map(drop);
        match part {
            None => opened.unwrap(),
            Some(part) => assert_error(opened, &[folder.path().to_str().unwrap(), &format!("tensor {extra} "), part]),
        }
    }
    let folder = tempdir().unwrap();
    let file = folder.path().join("m.gguf");
    write_gguf(&toy::model(), GgmlDType::F32, &file);
    ModelFiles::open(file.to_str().unwrap(), &|_| {}).map(drop).unwrap();
    let (mut bytes, key) = (fs::read(&file).unwrap(), b"llama.block_count");
    let layers = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
    assert_eq!(bytes[layers], 4);
    bytes[layers] = 3;
    fs::write(&file, bytes).unwrap();
    let opened = ModelFiles::open(file.to_str().unwrap(), &|_| {}).map(drop);
    assert_error(opened, &[file.to_str().unwrap(), "tensor blk.3.attn_k.weight ", "of 3 layers"]);
}

/// The micro model in two files, and the index that says so.
fn split_folder() -> (TempDir, Json) {
    let folder = micro_folder(DType::F32);
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let mut weight_map = serde_json::Map::new();
    for (number, half) in micro_tensors().chunks(6).enumerate() {
        let file = format!("model-{number}.safetensors");
        candle_core::safetensors::save(&half.iter().cloned().collect(), folder.path().join(&file)).unwrap();
        weight_map.extend(half.iter().map(|(name, _)| (name.clone(), json!(file))));
    }
    (folder, json!({"metadata": {"total_size": 1}, "weight_map": weight_map}))
}

fn write_index(folder: &Path, index: &Json) -> PathBuf {
    let path = folder.join("model.safetensors.index.json");
    fs::write(&path, index.to_string()).unwrap();
    path
}

#[test]
fn a_model_in_several_files_is_one_model() {
    let (folder, index) = split_folder();
    // What the index does not name is not looked at.
    fs::write(folder.path().join("other.safetensors"), "not one").unwrap();
    write_index(folder.path(), &index);
    let weights = Weights::open(folder.path()).unwrap();
    let architecture = weights.architecture().unwrap();
    assert!(TENSORS.iter().all(|(name, _, shape)| weights.shape(name, &architecture).unwrap() == *shape));
}

#[test]
fn an_index_that_does_not_fit_its_files_is_refused_by_name() {
    let (folder, good) = split_folder();
    let mapped = |tensor: &str, file: Json| {
        let mut index = good.clone();
        index["weight_map"][tensor] = file;
        index
    };
    let norm = "model.norm.weight";
    for (index, parts) in [
        (json!([]), vec!["not an index"]),
        (json!({}), vec!["weight_map"]),
        (mapped(norm, json!(3)), vec!["not an index"]),
        (mapped(norm, json!("model-7.safetensors")), vec!["model-7.safetensors", "missing"]),
        (mapped(norm, json!("../model-1.safetensors")), vec!["../model-1.safetensors", "beside it"]),
        (mapped(norm, json!("/etc/passwd")), vec!["/etc/passwd", "beside it"]),
        (mapped(norm, json!("")), vec!["beside it"]),
        (mapped(norm, json!("config.json")), vec!["config.json", "not a readable safetensors file"]),
        (mapped(norm, json!("model-1.safetensors")), vec![norm, "is not in model-1.safetensors"]),
        (mapped("lm_head.weight", json!("model-0.safetensors")), vec!["lm_head.weight", "is not in model-0"]),
    ] {
        let path = write_index(folder.path(), &index);
        assert_error(Weights::open(folder.path()).map(drop), &[&[path.to_str().unwrap()], parts.as_slice()].concat());
    }
    write_index(folder.path(), &good);
    fs::copy(folder.path().join("model-1.safetensors"), folder.path().join("model-0.safetensors")).unwrap();
    let first = TENSORS[6..].iter().map(|(name, ..)| *name).min().unwrap();
    assert_error(Weights::open(folder.path()).map(drop), &[first, "is in both", "model-0.", "model-1."]);
}
