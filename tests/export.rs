//! `candor export`: merged weights, read again by our own loader, are the model with its adapter; whatever it was read from.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};
use candor::export::{Dtype, Export, SHARD, Settings};
use candor::model::{Model, Weights};
use candor::policy::Adapter;
use candor::tokenizer::Tokenizer;
use serde_json::json;

use crate::check;
use crate::family::{changed, gguf};
use crate::model::{adapter, ids, logits, tensors, tiny_models, values};
use crate::program::Place;

fn settings<'a>(source: &'a Path, adapter: Option<&'a Path>, out: &'a Path) -> Settings<'a> {
    Settings { source: source.to_str().unwrap(), adapter, out, format: None, dtype: Dtype::F32, shard: SHARD }
}

fn export(settings: &Settings) {
    Export::prepare(settings, &|_| {}).unwrap().write(&|_| {}).unwrap();
}

/// The adapters that a tiny model has.
fn adapters(folder: &Path) -> Vec<PathBuf> {
    let both = ["adapter_lora", "adapter_lora_all_rs"].map(|name| folder.join(name));
    both.into_iter().filter(|path| path.exists()).collect()
}

fn some_logits(path: &Path, with: Option<&dyn Fn(&Model) -> Adapter>) -> Vec<f64> {
    let model = Model::open(path, check::f32_kernel()).unwrap();
    let adapter = with.map(|with| with(&model));
    logits(&model, &[(5..45).collect()], adapter.as_ref())
}

#[test]
fn golden_logits_of_merged_folders() {
    for folder in tiny_models() {
        let place = tempfile::tempdir().unwrap();
        let a = ids(&tensors(&folder.join("golden_logits.safetensors"))["ids_a"]);
        for (path, shard) in adapters(&folder).into_iter().zip([SHARD, 100_000]) {
            let out = place.path().join("a/b").join(path.file_name().unwrap());
            export(&Settings { shard, ..settings(&folder, Some(&path), &out) });
            let name = path.file_name().unwrap().to_str().unwrap().replace("adapter_", "golden_");
            let golden = tensors(&folder.join(format!("{name}.safetensors")));
            let merged = Model::open(&out, check::f32_kernel()).unwrap();
            let got = logits(&merged, std::slice::from_ref(&a), None);
            check::all_close(&path.display().to_string(), &got, &values(&golden["logits_a"]), 1e-4);
            for copied in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
                assert_eq!(fs::read(out.join(copied)).unwrap(), fs::read(folder.join(copied)).unwrap());
            }
            let names: Vec<String> =
                fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            let parts = names.iter().filter(|name| name.ends_with(".safetensors")).count();
            let index = out.join("model.safetensors.index.json");
            assert!(
                if shard == SHARD { parts == 1 && !index.exists() } else { parts > 3 && index.exists() },
                "{names:?}"
            );
            for part in names.iter().filter(|name| name.ends_with(".safetensors")) {
                let bytes = fs::read(out.join(part)).unwrap();
                let header = String::from_utf8_lossy(&bytes[8..200.min(bytes.len())]).into_owned();
                assert!(header.starts_with(r#"{"__metadata__":{"format":"pt"}"#), "{header}");
                // The embedding alone is larger than a part; no part holds more beside such a tensor.
                assert!(shard == SHARD || bytes.len() < 110_000, "{part}: {} bytes", bytes.len());
            }
        }
        assert!(
            fs::read_dir(place.path().join("a/b")).unwrap().count() == adapters(&folder).len(),
            "something is left"
        );
    }
}

#[test]
fn a_gguf_file_becomes_a_merged_gguf_file_and_a_merged_folder() {
    for folder in tiny_models() {
        let (file, place) = (gguf(&folder), tempfile::tempdir().unwrap());
        let path = folder.join("adapter_lora");
        let want = some_logits(file.path(), Some(&|model| adapter(model, &path).0));
        let without = some_logits(file.path(), None);
        assert!(
            want.iter().zip(&without).any(|(with, without)| (with - without).abs() > 1e-2),
            "an adapter that does nothing"
        );
        let name = folder.display();
        let out = place.path().join("merged.gguf");
        export(&settings(file.path(), Some(&path), &out));
        check::all_close(&format!("{name} as gguf"), &some_logits(&out, None), &want, 1e-4);
        let [before, after] = [file.path(), &out].map(|path| Weights::open(path).unwrap());
        let texts = |weights: &Weights| -> HashMap<String, String> {
            let entries = weights.metadata().unwrap().iter().map(|(key, value)| (key.clone(), format!("{value:?}")));
            entries.filter(|(key, _)| key != "general.file_type").collect()
        };
        assert_eq!(texts(&before), texts(&after));

        let out = place.path().join("merged");
        let settings = settings(file.path(), Some(&path), &out);
        if folder.ends_with("llama3rope") {
            let error = format!("{:#}", Export::prepare(&settings, &|_| {}).err().unwrap());
            assert!(error.ends_with("export with --format gguf"), "{error}");
            continue;
        }
        export(&settings);
        check::all_close(&format!("{name} as folder"), &some_logits(&out, None), &want, 1e-4);
        let [from_gguf, from_folder] =
            [Tokenizer::from_gguf(before.metadata().unwrap()).unwrap(), Tokenizer::from_folder(&out).unwrap()];
        for text in ["", "How many pens?  11 of\n\nthem", "<|im_start|>user\nnaïve 😀<|im_end|>", "<|endoftext|>a"] {
            assert_eq!(from_gguf.text_prompt_ids(text).unwrap(), from_folder.text_prompt_ids(text).unwrap(), "{name}");
        }
        assert_eq!(from_gguf.end_tokens(), from_folder.end_tokens());
        // What transformers goes by: the tokenizer itself puts BOS before a text, or it does not.
        let alone = tokenizers_encode(&out, "a");
        assert_eq!(alone, from_gguf.text_prompt_ids("a").unwrap(), "{name}");
    }
}

/// Read again it is the merged model, and its metadata are what llama.cpp's converter writes: a key that only our reader
/// understands, or heads that are not interleaved as other programs expect, would show.
#[test]
fn a_folder_becomes_a_merged_gguf_file() {
    for folder in tiny_models() {
        let (place, path) = (tempfile::tempdir().unwrap(), folder.join("adapter_lora"));
        let (out, plain) = (place.path().join("merged.gguf"), place.path().join("plain.gguf"));
        export(&settings(&folder, Some(&path), &out));
        let golden = tensors(&folder.join("golden_lora.safetensors"));
        let a = ids(&tensors(&folder.join("golden_logits.safetensors"))["ids_a"]);
        let got = logits(&Model::open(&out, check::f32_kernel()).unwrap(), &[a], None);
        check::all_close(&format!("{folder:?} as gguf"), &got, &values(&golden["logits_a"]), 1e-4);

        export(&settings(&folder, None, &plain));
        let reference = gguf(&folder);
        let [ours, converted] = [plain.as_path(), reference.path()].map(|path| {
            let mut file = fs::File::open(path).unwrap();
            let content = Content::read(&mut file).unwrap();
            let tensor = |name: &String| {
                let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
                (name.clone(), values(&tensor.dequantize(&Device::Cpu).unwrap()))
            };
            let tensors: BTreeMap<String, Vec<f64>> = content.tensor_infos.keys().map(tensor).collect();
            (content.metadata, tensors)
        });
        // Whether BOS is added is the tokenizer's to say, which the reference made up.
        for (key, value) in converted.0.iter().filter(|(key, _)| *key != "tokenizer.ggml.add_bos_token") {
            let ours = ours.0.get(key).unwrap_or_else(|| panic!("{folder:?}: {key} is missing"));
            match (ours, value) {
                (Value::F32(ours), Value::F32(value)) => check::close(key, (*ours).into(), (*value).into(), 1e-6),
                _ => assert_eq!(format!("{ours:?}"), format!("{value:?}"), "{folder:?}: {key}"),
            }
        }
        assert!(ours.1.keys().eq(converted.1.keys()), "{folder:?}: {:?}", ours.1.keys());
        for (name, value) in &converted.1 {
            check::all_close(&format!("{folder:?} {name}"), &ours.1[name], value, 1e-6);
        }
    }
}

/// The tokens that `tokenizer.json` gives a text where special ones are added.
fn tokenizers_encode(folder: &Path, text: &str) -> Vec<u32> {
    let tokenizer = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    tokenizer.encode(text, true).unwrap().get_ids().to_vec()
}

#[test]
fn a_narrower_number_format_is_near_and_says_what_it_is() {
    let Some(folder) = check::golden("tiny/llama") else { return };
    let (place, path) = (tempfile::tempdir().unwrap(), folder.join("adapter_lora_all_rs"));
    let want = some_logits(&folder, Some(&|model| adapter(model, &path).0));
    let file = gguf(&folder);
    let size = |path: &Path| fs::metadata(path).unwrap().len();
    export(&settings(&folder, Some(&path), &place.path().join("f32")));
    let exact = tensors(&place.path().join("f32/model.safetensors"));
    for (dtype, name, rounding, tolerance) in
        [(Dtype::F16, "float16", 0.5_f64.powi(11), 5e-2), (Dtype::Bf16, "bfloat16", 0.5_f64.powi(8), 0.4)]
    {
        let out = place.path().join(name);
        export(&Settings { dtype, ..settings(&folder, Some(&path), &out) });
        for (tensor, rounded) in tensors(&out.join("model.safetensors")) {
            for (got, want) in values(&rounded).into_iter().zip(values(&exact[&tensor])) {
                assert!((got - want).abs() <= rounding * want.abs() + 1e-7, "{tensor}: {got} for {want}");
            }
        }
        let config = check::json(&out.join("config.json"));
        assert_eq!((config["dtype"].as_str(), config["torch_dtype"].as_str()), (Some(name), Some(name)));
        let ratio =
            size(&out.join("model.safetensors")) as f64 / size(&place.path().join("f32/model.safetensors")) as f64;
        assert!((0.48..0.52).contains(&ratio), "{ratio}");
        let out = place.path().join(format!("{name}.gguf"));
        export(&Settings { dtype, ..settings(file.path(), Some(&path), &out) });
        check::all_close(name, &some_logits(&out, None), &want, tolerance);
        assert!((size(&out) as f64) < 0.6 * size(file.path()) as f64);
    }
}

#[test]
fn a_weight_too_large_for_the_format_is_named_and_nothing_is_left() {
    let place = Place::new("");
    let mut all = tensors(&place.path("model/model.safetensors"));
    let name = "model.layers.2.mlp.up_proj.weight";
    all.insert(name.into(), (&all[name] * 1e7).unwrap());
    fs::remove_file(place.path("model/model.safetensors")).unwrap();
    candle_core::safetensors::save(&all, place.path("model/model.safetensors")).unwrap();
    let ended = place.candor(&["export", "model", "out/half", "--dtype", "f16"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{}", ended.stderr);
    assert!(ended.stderr.contains(&format!("error: tensor {name} holds ")), "{}", ended.stderr);
    assert_eq!(fs::read_dir(place.path("out")).unwrap().count(), 0);
    let ended = place.candor(&["export", "model", "out/half", "--dtype", "bf16", "--quiet"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

#[test]
fn what_cannot_be_exported_is_refused_before_anything_is_written() {
    let place = Place::new("");
    fs::create_dir(place.path("there")).unwrap();
    // GGUF knows no layers that see the whole sequence but every so often.
    let Some(gemma) = check::golden("tiny/gemma3_text") else { return };
    fs::create_dir(place.path("odd")).unwrap();
    for entry in fs::read_dir(&gemma).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file()) {
        fs::copy(entry.path(), place.path("odd").join(entry.file_name())).unwrap();
    }
    let [full, sliding] = ["full_attention", "sliding_attention"];
    let config = changed(&gemma, &json!({"layer_types": [full, sliding, sliding, full]}));
    fs::write(place.path("odd/config.json"), config.to_string()).unwrap();
    for (arguments, says) in [
        (&["model", "there"][..], "error: there exists already; it is never overwritten"),
        (&["model", "there/../there"], "exists already"),
        (&["odd", "new.gguf"], "odd: it cannot be a GGUF file: GGUF has no words for all that config.json says"),
        (&["model", "new", "--format", "onnx"], "expected `safetensors` or `gguf`"),
        (&["model", "new", "--dtype", "q4_0"], "expected one of `f32`, `f16`, `bf16`"),
        (&["model", "new", "--adapter", "rows"], "error: --adapter: rows/adapter_config.json: cannot read"),
        (&["nowhere", "new"], "\"nowhere\" is neither a folder nor a file"),
    ] {
        let ended = place.candor(&[&["export"], arguments].concat());
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(says), "{says:?}: {}", ended.stderr);
    }
    assert!(!place.path("new").exists() && fs::read_dir(place.path("there")).unwrap().count() == 0);
}
