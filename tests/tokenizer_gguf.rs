//! Tokenizers in GGUF metadata against `tokenizer.json`, and what bad metadata is answered.

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::gguf_file::Value as Gguf;
use candor::tokenizer::Tokenizer;
use candor_environments::Message;
use proptest::prelude::*;
use serde_json::Value;

use crate::check;
use crate::tokenizer::{TEXTS, assert_error, tiny, tiny_folder};

proptest! {
    #[test]
    fn gguf_metadata_makes_the_same_tokenizer(text in any::<String>(), words in "[ a-e0-9'.\n]{0,40}") {
        let (from_folder, from_gguf) = (tiny(), Tokenizer::from_gguf(&metadata(&tiny_folder(), "smollm")).unwrap());
        for text in [text, words] {
            prop_assert_eq!(from_gguf.encode(&text).unwrap(), from_folder.encode(&text).unwrap());
        }
    }
}

/// The GGUF metadata that a converter would write for the tokenizer in `folder`.
pub fn metadata(folder: &Path, pre: &str) -> HashMap<String, Gguf> {
    let tokenizer = check::json(&folder.join("tokenizer.json"));
    let (model, added) = (&tokenizer["model"], tokenizer["added_tokens"].as_array().unwrap());
    let mut vocabulary: Vec<(u64, &str)> =
        model["vocab"].as_object().unwrap().iter().map(|(token, id)| (id.as_u64().unwrap(), token.as_str())).collect();
    vocabulary.extend(added.iter().map(|one| (one["id"].as_u64().unwrap(), one["content"].as_str().unwrap())));
    vocabulary.sort_unstable();
    vocabulary.dedup();
    let special = |token: &str| added.iter().any(|one| one["content"] == token);
    let strings = |texts: Vec<String>| Gguf::Array(texts.into_iter().map(Gguf::String).collect());
    let entries = [
        ("model", Gguf::String("gpt2".into())),
        ("pre", Gguf::String(pre.into())),
        ("tokens", strings(vocabulary.iter().map(|(_, token)| (*token).to_owned()).collect())),
        (
            "token_type",
            Gguf::Array(vocabulary.iter().map(|(_, token)| Gguf::I32(if special(token) { 3 } else { 1 })).collect()),
        ),
        (
            "merges",
            strings(model["merges"].as_array().unwrap().iter().map(|merge| merge_parts(merge).join(" ")).collect()),
        ),
        ("bos_token_id", Gguf::U32(0)),
        ("eos_token_id", Gguf::U32(2)),
    ];
    entries.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect()
}

/// `tokenizer.json` writes a merge as a pair, or with a space between its parts.
fn merge_parts(merge: &Value) -> Vec<&str> {
    match merge.as_array() {
        Some(pair) => pair.iter().map(|part| part.as_str().unwrap()).collect(),
        None => merge.as_str().unwrap().split(' ').collect(),
    }
}

/// Texts on which kinds of text splitting differ, beside those that all tokenizers are tried on.
const MORE_TEXTS: [&str; 6] = [
    "a written \u{2581} before a space",
    "e\u{301}galite\u{301}",
    "a  b   c    d\n\n\n\te \t f\u{a0}g 𒐫 <h1></h1>",
    "   indented by three, 31 and 32:                                                                 x",
    "<bos><start_of_turn>user\nwhy?<end_of_turn>\n<|im_start|>user<|eot_id|>",
    "I'Ve 1234567 they'RE 20% <unused7>",
];

#[test]
fn gguf_of_published_tokenizers_is_their_tokenizer_json() {
    for (name, pre, first) in [("llama3_2", "llama-bpe", 0), ("qwen2_5", "qwen2", -1), ("gemma2", "default", 2)] {
        let Some(folder) = check::data(&format!("tokenizers/{name}")) else { continue };
        let from_folder = Tokenizer::from_folder(&folder).unwrap();
        let mut metadata = if name == "gemma2" { scored(&folder) } else { metadata(&folder, pre) };
        metadata.insert("tokenizer.chat_template".into(), Gguf::String("{{ messages[0].content }}".into()));
        let from_gguf = Tokenizer::from_gguf(&metadata).unwrap();
        for text in TEXTS.iter().chain(&MORE_TEXTS) {
            let ids = from_gguf.encode(text).unwrap();
            assert_eq!(ids, from_folder.encode(text).unwrap(), "{name} {text:?}");
            assert_eq!(from_gguf.decode_with_special(&ids), from_folder.decode_with_special(&ids), "{name} {text:?}");
        }
        let prompt = from_gguf.prompt_ids(&[Message::user("why?")]).unwrap();
        let plain = from_gguf.encode("why?").unwrap();
        let begin: Vec<u32> = u32::try_from(first).into_iter().collect();
        assert_eq!(prompt, [begin, plain].concat(), "{name}: whether files of this kind add a BOS token");
    }
}

/// The GGUF metadata that a converter would write for Gemma's tokenizer: SentencePiece's scores fall in the order of the
/// merges, and what users defined is written with spaces.
fn scored(folder: &Path) -> HashMap<String, Gguf> {
    let mut metadata = metadata(folder, "default");
    let tokenizer = check::json(&folder.join("tokenizer.json"));
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, merge) in tokenizer["model"]["merges"].as_array().unwrap().iter().enumerate() {
        ranks.entry(merge_parts(merge).concat()).or_insert(rank);
    }
    let added = tokenizer["added_tokens"].as_array().unwrap();
    let added: HashMap<&str, bool> =
        added.iter().map(|one| (one["content"].as_str().unwrap(), one["special"] == true)).collect();
    let Gguf::Array(tokens) = &metadata["tokenizer.ggml.tokens"] else { panic!("tokens are a list") };
    let (mut texts, mut types, mut scores) = (Vec::new(), Vec::new(), Vec::new());
    for token in tokens {
        let token = token.to_string().unwrap();
        let (text, kind) = match added.get(token.as_str()) {
            Some(true) => (token.clone(), 3),
            Some(false) => (token.replace('▁', " "), 4),
            None => (token.clone(), 1),
        };
        scores.push(Gguf::F32(ranks.get(token).map_or(-1e6, |rank| -(*rank as f32))));
        texts.push(Gguf::String(text));
        types.push(Gguf::I32(kind));
    }
    metadata.remove("tokenizer.ggml.merges");
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    metadata.insert(key("model"), Gguf::String("llama".into()));
    metadata.insert(key("tokens"), Gguf::Array(texts));
    metadata.insert(key("token_type"), Gguf::Array(types));
    metadata.insert(key("scores"), Gguf::Array(scores));
    metadata.insert(key("add_space_prefix"), Gguf::Bool(false));
    metadata.insert(key("unknown_token_id"), Gguf::U32(3));
    metadata.insert(key("bos_token_id"), Gguf::U32(2));
    metadata
}

/// Catches a kind of text splitting that is not the tokenizer's, and tokens of the wrong type, number or spelling.
#[test]
fn published_tokenizers_are_written_as_gguf() {
    for (name, pre, rows) in
        [("llama3_2", "llama-bpe", 128_256), ("qwen2_5", "qwen2", 151_936), ("gemma2", "default", 256_000)]
    {
        let Some(folder) = check::data(&format!("tokenizers/{name}")) else { continue };
        let from_folder = Tokenizer::from_folder(&folder).unwrap();
        let written = from_folder.in_gguf(&folder, rows).unwrap();
        let list = |key: &str| match &written[&format!("tokenizer.ggml.{key}")] {
            Gguf::Array(values) => values.iter().map(|value| format!("{value:?}")).collect::<Vec<_>>(),
            other => panic!("{key} is {other:?}"),
        };
        assert_eq!(written["tokenizer.ggml.pre"].to_string().unwrap(), pre, "{name}");
        assert_eq!((list("tokens").len(), list("token_type").len()), (rows, rows), "{name}");
        let reference = if name == "gemma2" { scored(&folder) } else { metadata(&folder, pre) };
        let Gguf::Array(tokens) = &reference["tokenizer.ggml.tokens"] else { panic!("tokens are a list") };
        let tokens: Vec<String> = tokens.iter().map(|token| format!("{token:?}")).collect();
        assert_eq!(list("tokens")[..tokens.len()], tokens, "{name}");
        if name != "gemma2" {
            let Gguf::Array(merges) = &reference["tokenizer.ggml.merges"] else { panic!("merges are a list") };
            assert_eq!(list("merges"), merges.iter().map(|merge| format!("{merge:?}")).collect::<Vec<_>>(), "{name}");
        }
        let from_gguf = Tokenizer::from_gguf(&written).unwrap();
        for text in TEXTS.iter().chain(&MORE_TEXTS) {
            let ids = from_gguf.text_prompt_ids(text).unwrap();
            assert_eq!(ids, from_folder.text_prompt_ids(text).unwrap(), "{name} {text:?}");
            assert_eq!(from_gguf.decode(&ids), from_folder.decode(&ids), "{name} {text:?}");
        }
        let chat = [Message::user("why?")];
        assert_eq!(from_gguf.prompt_ids(&chat).unwrap(), from_folder.prompt_ids(&chat).unwrap(), "{name}");
        assert_eq!(from_gguf.end_tokens(), from_folder.end_tokens(), "{name}");
    }
}

#[test]
fn what_gguf_has_no_words_for_is_not_written() {
    let text = std::fs::read_to_string(tiny_folder().join("tokenizer.json")).unwrap();
    let mut described: Value = serde_json::from_str(&text).unwrap();
    let written = |described: &Value, config: &str| {
        let folder = crate::tokenizer::folder_with(&[
            ("tokenizer.json", &described.to_string()),
            ("generation_config.json", config),
        ]);
        Tokenizer::from_folder(folder.path()).unwrap().in_gguf(folder.path(), 320)
    };
    assert!(written(&described, "{}").is_ok());
    assert_error(written(&described, r#"{"eos_token_id": [0, 1, 2, 3]}"#), &["4 end tokens", "3 keys"]);
    described["normalizer"] = serde_json::json!({"type": "Lowercase"});
    assert_error(written(&described, "{}"), &["splits text in none of the ways", "smollm, llama-bpe, qwen2, default"]);
}

#[test]
fn gguf_kinds_cut_text_differently() {
    let tokens = ["<0>", "Ġ", "!", "=", "1", "2", "3", "4", "a", "12", "123", "1234", "Ġ!", "a!", "!=", "Ġa"];
    let merges = ["1 2", "12 3", "123 4", "Ġ !", "a !", "! =", "Ġ a"];
    let cases = [
        ("smollm", "1234", vec!["1", "2", "3", "4"]),
        ("llama-bpe", "1234", vec!["123", "4"]),
        ("default", "1234", vec!["123", "4"]),
        ("smollm", "a !=", vec!["a", "Ġ!", "="]),
        ("llama-bpe", "a !=", vec!["a", "Ġ!", "="]),
        ("default", "a !=", vec!["a", "Ġ", "!="]),
        ("default", "a a", vec!["a", "Ġa"]),
    ];
    let strings = |texts: &[&str]| Gguf::Array(texts.iter().map(|text| Gguf::String((*text).into())).collect());
    for (pre, text, expected) in cases {
        let mut metadata = metadata(&tiny_folder(), pre);
        metadata.insert("tokenizer.ggml.tokens".into(), strings(&tokens));
        metadata.insert("tokenizer.ggml.merges".into(), strings(&merges));
        metadata.insert("tokenizer.ggml.token_type".into(), Gguf::Array(vec![Gguf::I32(1); tokens.len()]));
        let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
        let expected: Vec<u32> = expected.iter().map(|token| tokenizer.token_id(token).unwrap()).collect();
        assert_eq!(tokenizer.encode(text).unwrap(), expected, "{pre} {text:?}");
    }
}

#[test]
fn gguf_token_types_say_what_is_special() {
    let mut metadata = metadata(&tiny_folder(), "smollm");
    let mut types = vec![Gguf::I32(1); 320];
    (types[2], types[3]) = (Gguf::I32(3), Gguf::I32(4));
    metadata.insert("tokenizer.ggml.token_type".into(), Gguf::Array(types));
    let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
    let ids = tokenizer.encode("<|im_start|><|im_end|><pad>").unwrap();
    assert!(ids.len() > 3 && ids.ends_with(&[2, 3]), "{ids:?}: only control and user-defined tokens are seen in text");
    assert_eq!(tokenizer.decode(&ids), "<|im_start|><pad>", "only control tokens are left out");
}

#[test]
fn bad_gguf_metadata_is_explained() {
    let good = metadata(&tiny_folder(), "smollm");
    assert!(Tokenizer::from_gguf(&good).is_ok());
    let strings = |texts: &[&str]| Gguf::Array(texts.iter().map(|text| Gguf::String((*text).into())).collect());
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    for name in ["model", "pre", "tokens", "token_type", "merges"] {
        let mut metadata = good.clone();
        metadata.remove(&key(name));
        assert_error(Tokenizer::from_gguf(&metadata), &[&key(name), "is missing"]);
        metadata.insert(key(name), Gguf::F32(1.0));
        assert_error(Tokenizer::from_gguf(&metadata), &[&key(name), "type F32"]);
    }
    for (name, value, parts) in [
        ("model", Gguf::String("t5".into()), ["\"t5\"", "gpt2"]),
        ("model", Gguf::String("llama".into()), ["add_space_prefix` is not false", ""]),
        ("pre", Gguf::String("tekken".into()), ["\"tekken\"", "smollm, llama-bpe, qwen2, default"]),
        ("tokens", strings(&[]), ["tokens` is empty", ""]),
        ("tokens", strings(&["a", "b"]), ["2 tokens", "320 types"]),
        ("tokens", strings(&["a"; 320]), ["twice", "tokens"]),
        ("tokens", Gguf::Array(vec![Gguf::U32(1)]), ["row 0", "type U32"]),
        ("token_type", Gguf::Array(vec![Gguf::I32(-1)]), ["token_type` row 0", "type I32"]),
        ("merges", strings(&["a b", "ab"]), ["merges` row 0", "\"ab\""]),
        ("merges", strings(&["ab"]), ["row 0", "not two tokens"]),
        ("merges", strings(&["zz a"]), ["row 0", "\"zz\", which is not among the tokens"]),
        // The tokenizers crate panics on a merge longer than every token.
        ("merges", strings(&["<|endoftext|> <|endoftext|>"]), ["row 0", "not among the tokens"]),
        ("eos_token_id", Gguf::U32(5000), ["eos_token_id` is 5000", "320 tokens"]),
        ("add_bos_token", Gguf::U32(1), ["add_bos_token", "type U32"]),
    ] {
        let mut metadata = good.clone();
        metadata.insert(key(name), value);
        assert_error(Tokenizer::from_gguf(&metadata), &parts);
    }
}

#[test]
fn bad_scores_are_explained() {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let strings = |texts: &[&str]| Gguf::Array(texts.iter().map(|text| Gguf::String((*text).into())).collect());
    let scores = |scores: &[f32]| Gguf::Array(scores.iter().map(|score| Gguf::F32(*score)).collect());
    let long = "a".repeat(2000);
    let good = HashMap::from([
        (key("model"), Gguf::String("llama".into())),
        (key("tokens"), strings(&["<unk>", "a", "b", "ab"])),
        (key("token_type"), Gguf::Array(vec![Gguf::I32(3), Gguf::I32(1), Gguf::I32(1), Gguf::I32(1)])),
        (key("scores"), scores(&[0.0, -2.0, -3.0, -1.0])),
        (key("add_space_prefix"), Gguf::Bool(false)),
        (key("add_bos_token"), Gguf::Bool(false)),
    ]);
    assert_eq!(Tokenizer::from_gguf(&good).unwrap().encode("aabb").unwrap(), [1, 3, 2]);
    for (name, value, parts) in [
        ("scores", scores(&[0.0]), ["1 scores for 4 tokens", ""]),
        ("scores", scores(&[0.0, f32::NAN, 0.0, 0.0]), ["scores` row 1", "NaN"]),
        ("scores", Gguf::U32(1), ["scores", "type U32"]),
        ("tokens", strings(&["<unk>", "a", "b", &long]), ["tokens` row 3", "2000 bytes"]),
        ("tokens", strings(&["<unk>", "a", "b", "b"]), ["twice", ""]),
        ("add_space_prefix", Gguf::Bool(true), ["add_space_prefix", "not supported"]),
    ] {
        let mut metadata = good.clone();
        metadata.insert(key(name), value);
        assert_error(Tokenizer::from_gguf(&metadata), &parts);
    }
}
