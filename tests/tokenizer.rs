//! Tokenizers and chat templates against transformers, and what bad files are answered. GGUF has a module of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value as Gguf};
use candor::tokenizer::Tokenizer;
use candor_environments::{Message, Role};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::check;
use crate::tokenizer_gguf::metadata;

pub const TEXTS: [&str; 8] = [
    "",
    "Hello, world!",
    " leading and trailing ",
    "line\r\n\n\n  indented\tby tabs\t",
    "In 2024, 1234567 of them (12.5%) didn't; they'LL.",
    "naïve café, ｆｕｌｌ, Ⅻ ½ ٣, 東京, שלום, 🦀👩‍👩‍👧",
    "a\u{0} \u{7f} \u{ad} \u{a0}z \u{85} \u{2028}",
    "p = 0.85 -> <answer>yes</answer> ~|^$+=",
];

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

fn smollm2() -> Option<Tokenizer> {
    let mut file = File::open(check::smollm2()?).unwrap();
    Some(Tokenizer::from_gguf(&Content::read(&mut file).unwrap().metadata).unwrap())
}

/// The tiny model that the repository keeps: a byte-level tokenizer of 320 tokens.
pub fn tiny_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/tiny/llama")
}

pub fn tiny() -> Tokenizer {
    Tokenizer::from_folder(&tiny_folder()).unwrap()
}

/// A folder with the tiny `tokenizer.json`, a plain `tokenizer_config.json`, and `files` over them.
pub fn folder_with(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer_json = fs::read_to_string(tiny_folder().join("tokenizer.json")).unwrap();
    let plain =
        [("tokenizer.json", tokenizer_json.as_str()), ("tokenizer_config.json", r#"{"eos_token": "<|im_end|>"}"#)];
    for (name, text) in plain.iter().chain(files) {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn load(files: &[(&str, &str)]) -> anyhow::Result<Tokenizer> {
    Tokenizer::from_folder(folder_with(files).path())
}

#[track_caller]
pub fn assert_error<T>(result: anyhow::Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("no error; expected {parts:?}") };
    let text = format!("{error:#}");
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

#[track_caller]
fn assert_round_trip(tokenizer: &Tokenizer, text: &str) {
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(tokenizer.decode_with_special(&ids), text, "{ids:?}");
    assert_covers(tokenizer, &ids);
}

/// The ranges cover the text in order and do not cut a character.
#[track_caller]
fn assert_covers(tokenizer: &Tokenizer, ids: &[u32]) {
    let (text, ranges) = tokenizer.token_ranges(ids);
    assert_eq!(text, tokenizer.decode(ids));
    assert_eq!(ranges.len(), ids.len());
    let (mut start, mut covered) = (0, 0);
    for range in ranges {
        assert!(start <= range.start, "{range:?} begins before {start}");
        assert!(range.start <= covered, "{covered}..{} of {text:?} is covered by no token", range.start);
        assert!(text.get(range.clone()).is_some(), "{range:?} cuts a character of {text:?}");
        start = range.start;
        covered = covered.max(range.end);
    }
    assert_eq!(covered, text.len());
}

#[test]
fn golden_smollm2_tokenization() {
    let (Some(tokenizer), Some(path)) = (smollm2(), check::golden("smollm2/tokenization.json")) else { return };
    for row in check::json(&path)["rows"].as_array().unwrap() {
        let expected = ids(&row["ids"]);
        assert_eq!(tokenizer.encode(row["text"].as_str().unwrap()).unwrap(), expected, "{row}");
        assert_eq!(tokenizer.decode_with_special(&expected), row["decoded"].as_str().unwrap());
        assert_eq!(tokenizer.decode(&expected), row["decoded_skip_special"].as_str().unwrap());
        assert_covers(&tokenizer, &expected);
    }
    // Its vocabulary lacks this control character, which transformers leaves out too.
    assert_eq!(tokenizer.decode(&tokenizer.encode("a\u{13}b").unwrap()), "ab");
}

#[test]
fn golden_smollm2_chat_template() {
    let (Some(tokenizer), Some(path)) = (smollm2(), check::golden("smollm2/chat_template.json")) else { return };
    for case in check::json(&path)["cases"].as_array().unwrap() {
        let expected = case["text"].as_str().unwrap();
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
        assert_eq!(tokenizer.render(&messages, add_generation_prompt).unwrap(), expected);
        if add_generation_prompt {
            assert_eq!(tokenizer.prompt_ids(&messages).unwrap(), tokenizer.encode(expected).unwrap());
        }
    }
    assert_eq!(tokenizer.end_tokens(), [2]);
    assert_eq!((tokenizer.vocab_size(), tokenizer.token_id("<|im_end|>")), (49152, Some(2)));
}

#[test]
fn golden_smollm2_greedy_texts() {
    let (Some(tokenizer), Some(path)) = (smollm2(), check::golden("smollm2/greedy.json")) else { return };
    for row in check::json(&path)["rows"].as_array().unwrap() {
        assert_eq!(tokenizer.encode(row["prompt"].as_str().unwrap()).unwrap(), ids(&row["prompt_ids"]));
        assert_eq!(tokenizer.decode_with_special(&ids(&row["ids"])), row["text"].as_str().unwrap());
    }
}

#[test]
fn golden_tiny_tokenizers() {
    let Some(tiny) = check::golden("tiny") else { return };
    let folders = fs::read_dir(tiny).unwrap().map(|entry| entry.unwrap().path());
    for folder in folders.filter(|folder| folder.join("tokenizer.json").exists()) {
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        assert_eq!((tokenizer.end_tokens(), tokenizer.vocab_size()), ([2].as_slice(), 320), "{folder:?}");
        TEXTS.iter().for_each(|text| assert_round_trip(&tokenizer, text));
        assert_eq!(tokenizer.encode("<|im_start|>a<|im_end|>").unwrap(), [1, 68, 2]);
        let prompt = tokenizer.prompt_ids(&[Message::user("1+1?")]).unwrap();
        assert_eq!(tokenizer.decode_with_special(&prompt), "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n");
    }
}

#[test]
fn published_tokenizers() {
    let hello = [
        ("qwen2_5", [9707, 1879], vec![151645]),
        ("llama3_2", [9906, 1917], vec![128009]),
        ("gemma2", [4521, 2134], vec![1, 107]),
    ];
    for (name, expected, end_tokens) in hello {
        let Some(folder) = check::data(&format!("tokenizers/{name}")) else { continue };
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        assert_eq!(tokenizer.encode("Hello world").unwrap(), expected, "{name}");
        assert_eq!(tokenizer.end_tokens(), end_tokens, "{name}");
        TEXTS.iter().for_each(|text| assert_round_trip(&tokenizer, text));
        // A character in no vocabulary is spelled by bytes, each of which covers the whole character.
        let (text, ranges) = tokenizer.token_ranges(&tokenizer.encode("a𒐫z").unwrap());
        assert_eq!((text.as_str(), &ranges[ranges.len() - 2..]), ("a𒐫z", [1..5, 5..6].as_slice()), "{name}");
    }
}

#[test]
fn published_chat_templates() {
    let conversation = [Message { role: Role::System, content: " Be brief. ".into() }, Message::user("Hi")];
    if let Some(folder) = check::data("tokenizers/qwen2_5") {
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        assert_eq!(
            tokenizer.render(&conversation, true).unwrap(),
            "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
    }
    if let Some(folder) = check::data("tokenizers/llama3_2") {
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        let text = tokenizer.render(&conversation, true).unwrap();
        let (before, after) = text.split_once("Today Date: ").unwrap();
        assert_eq!(
            before,
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        );
        let words: Vec<&str> = after.split('\n').next().unwrap().split(' ').collect();
        assert_eq!(words.iter().map(|word| word.len()).collect::<Vec<_>>(), [2, 3, 4], "{words:?}");
        assert!(after.ends_with(
            "\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ));
        let prompt = tokenizer.prompt_ids(&conversation).unwrap();
        assert_eq!(prompt.iter().filter(|id| **id == 128000).count(), 1);
        assert_eq!(prompt[0], 128000);
    }
}

/// Gemma 2's tokenizer comes without a template; its turns are known, and they have no place for a system role.
#[test]
fn gemma_2_is_given_its_turns_and_told_instructions_by_the_user() {
    let Some(folder) = check::data("tokenizers/gemma2") else { return };
    let tokenizer = Tokenizer::from_folder(&folder).unwrap();
    assert!(tokenizer.borrows_template() && tokenizer.folds_system());
    let turns = [
        Message { role: Role::System, content: "Be brief.".into() },
        Message::user(" Hi "),
        Message { role: Role::Assistant, content: "Hello".into() },
        Message::user("Bye"),
    ];
    let text = "<bos><start_of_turn>user\nBe brief.\n\n Hi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n\
        <start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n";
    assert_eq!(tokenizer.render(&turns, true).unwrap(), text);
    let prompt = tokenizer.prompt_ids(&turns).unwrap();
    assert_eq!(tokenizer.decode_with_special(&prompt), text);
    assert_eq!((prompt[0], prompt.iter().filter(|id| **id == 2).count()), (2, 1));
    assert_error(tokenizer.render(&turns[2..], true), &["roles must alternate"]);
    let [qwen, llama] = ["qwen2_5", "llama3_2"].map(|name| check::data(&format!("tokenizers/{name}")));
    for folder in qwen.into_iter().chain(llama) {
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        assert!(!tokenizer.borrows_template() && !tokenizer.folds_system(), "{folder:?}");
    }
}

#[test]
fn instructions_are_folded_where_a_template_would_refuse_or_lose_them() {
    let system = Message { role: Role::System, content: "S".into() };
    let answer = Message { role: Role::Assistant, content: "A".into() };
    let each = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
    let raises = format!("{{% if messages[0].role == 'system' %}}{{{{ raise_exception('no') }}}}{{% endif %}}{each}");
    let loses = "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}";
    let takes = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}{{ messages[0].content }}";
    for (template, folds, expected) in
        [(each, false, "[S][U][A]"), (&raises, true, "[S\n\nU][A]"), (loses, true, "[S\n\nU][A]"), (takes, false, "SU")]
    {
        let tokenizer = load(&[("chat_template.jinja", template)]).unwrap();
        assert_eq!(tokenizer.folds_system(), folds, "{template}");
        let conversation = [system.clone(), Message::user("U"), answer.clone()];
        assert_eq!(tokenizer.render(&conversation, true).unwrap(), expected, "{template}");
    }
    // Nothing else is touched: instructions without a question are the template's to judge.
    let tokenizer = load(&[("chat_template.jinja", &raises)]).unwrap();
    assert_eq!(tokenizer.render(&[Message::user("U"), answer], true).unwrap(), "[U][A]");
    assert_error(tokenizer.render(&[system], true), &["does not render these messages", "no"]);
    assert!(!load(&[]).unwrap().folds_system());
}

#[test]
fn tokens_inside_one_character_cover_it_together() {
    let tokenizer = tiny();
    let bytes = tokenizer.encode("🦀").unwrap();
    assert_eq!(bytes.len(), 4, "the tiny vocabulary has no token for a crab");
    assert_eq!(tokenizer.token_ranges(&bytes), ("🦀".into(), vec![0..4; 4]));
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    let a = tokenizer.token_id("a").unwrap();
    // One byte of a crab is not text; a special token and an id beyond the vocabulary have no text.
    let (text, ranges) = tokenizer.token_ranges(&[bytes[0], end, a, 100_000, a]);
    assert_eq!((text.as_str(), ranges), ("\u{fffd}aa", vec![0..3, 3..3, 3..4, 4..4, 4..5]));
    assert_eq!(tokenizer.decode_with_special(&[a, end]), "a<|im_end|>");
}

proptest! {
    #[test]
    fn text_survives_encoding(text in any::<String>()) {
        assert_round_trip(&tiny(), &text);
    }

    #[test]
    fn any_ids_decode_as_in_the_tokenizers_crate(ids in prop::collection::vec(0u32..330, 0..40)) {
        let reference = tokenizers::Tokenizer::from_file(tiny_folder().join("tokenizer.json")).unwrap();
        let tokenizer = tiny();
        prop_assert_eq!(tokenizer.decode(&ids), reference.decode(&ids, true).unwrap());
        prop_assert_eq!(tokenizer.decode_with_special(&ids), reference.decode(&ids, false).unwrap());
        assert_covers(&tokenizer, &ids);
    }
}

#[test]
fn prompts_begin_with_one_bos() {
    let bos = "<|endoftext|>";
    let plain = "{{ messages[0].content }}";
    for (adds_bos, template, expected) in [
        (true, plain, 1),
        (false, plain, 0),
        (true, "{{ bos_token }}{{ messages[0].content }}", 1),
        (false, "{{ bos_token }}{{ messages[0].content }}", 1),
        (false, "{{ bos_token }}<|endoftext|>{{ messages[0].content }}", 1),
    ] {
        let config = json!({"bos_token": {"content": bos}, "add_bos_token": adds_bos, "chat_template": template});
        let tokenizer = load(&[("tokenizer_config.json", &config.to_string())]).unwrap();
        let prompt = tokenizer.prompt_ids(&[Message::user("hi")]).unwrap();
        let text = tokenizer.decode_with_special(&prompt);
        assert_eq!(text, format!("{}hi", bos.repeat(expected)), "adds_bos {adds_bos}, {template}");
        assert_eq!(tokenizer.encode("hi").unwrap(), prompt[expected..], "encode adds nothing");
    }
}

#[test]
fn a_bos_that_only_the_post_processor_knows_is_added() {
    let path = tiny_folder().join("tokenizer.json");
    let mut tokenizer_json = check::json(&path);
    tokenizer_json["post_processor"]["single"] =
        json!([{"SpecialToken": {"id": "<pad>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    tokenizer_json["post_processor"]["special_tokens"] =
        json!({"<pad>": {"id": "<pad>", "ids": [3], "tokens": ["<pad>"]}});
    let tokenizer = load(&[
        ("tokenizer.json", &tokenizer_json.to_string()),
        ("tokenizer_config.json", r#"{"bos_token": "<pad>"}"#),
        ("chat_template.jinja", "{{ messages[0].content }}"),
    ])
    .unwrap();
    assert_eq!(tokenizer.prompt_ids(&[Message::user("a")]).unwrap(), [3, 68]);
}

/// Gemma 3's tokenizer knows a token for images that its text models have no row for.
#[test]
fn a_token_added_beyond_the_vocabulary_is_not_counted() {
    let mut tokenizer_json = check::json(&tiny_folder().join("tokenizer.json"));
    let mut image = tokenizer_json["added_tokens"][0].clone();
    (image["id"], image["content"]) = (json!(320), json!("<image>"));
    tokenizer_json["added_tokens"].as_array_mut().unwrap().push(image);
    let tokenizer = load(&[("tokenizer.json", &tokenizer_json.to_string())]).unwrap();
    assert_eq!((tokenizer.vocab_size(), tokenizer.encode("a<image>").unwrap()), (320, vec![68, 320]));
}

#[test]
fn end_tokens_come_from_every_place() {
    let answer = "{% for m in messages %}{{ m.content }}";
    let chat = |end: &str| format!("{answer}{end}\n{{% endfor %}}");
    let ends = |files: &[(&str, &str)]| load(files).unwrap().end_tokens().to_vec();
    let no_eos = ("tokenizer_config.json", "{}");
    assert_eq!(ends(&[no_eos]), [0; 0]);
    assert_eq!(ends(&[]), [2]);
    assert_eq!(ends(&[("config.json", r#"{"eos_token_id": 3}"#)]), [2, 3]);
    assert_eq!(ends(&[("generation_config.json", r#"{"eos_token_id": [3, 0, 99999]}"#)]), [0, 2, 3]);
    assert_eq!(ends(&[no_eos, ("chat_template.jinja", &chat("<|im_end|>"))]), [2]);
    assert_eq!(ends(&[("chat_template.jinja", &chat(" <pad>"))]), [2, 3]);
    assert_eq!(ends(&[no_eos, ("chat_template.jinja", &chat("### next"))]), [0; 0]);
    assert_eq!(ends(&[("chat_template.jinja", "{{ raise_exception('no answers') }}")]), [2]);

    let mut metadata = metadata(&tiny_folder(), "smollm");
    metadata.insert("tokenizer.ggml.eot_token_id".into(), Gguf::U32(3));
    metadata.insert("tokenizer.ggml.eom_token_id".into(), Gguf::U32(0));
    metadata.insert("tokenizer.chat_template".into(), Gguf::String(chat("<|im_start|>")));
    assert_eq!(Tokenizer::from_gguf(&metadata).unwrap().end_tokens(), [0, 1, 2, 3]);
}

#[test]
fn templates_render_as_in_transformers() {
    let conversation = [Message { role: Role::System, content: " S ".into() }, Message::user("Ünï")];
    for (template, expected) in [
        // A block takes the blanks before it and the newline after it; the template's last newline goes.
        (
            "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\nend\n",
            "system\nuser\nend",
        ),
        ("{{ messages[0]['content'].strip() + messages[1].content.upper() }}", "SÜNÏ"),
        ("{%- set tail = messages[1:] -%} {{ tail | length }}{{ messages[0].content | trim }}", "1S"),
        (
            "{% if messages[0].role.startswith('sys') and not tools %}{{ eos_token }}{{ bos_token }}{% endif %}",
            "<|im_end|>",
        ),
        ("{% if bos_token is defined %}bos{% endif %}{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("{{ '<' + messages[1].content + '>' }}{{ strftime_now('%Y') | length }}", "<Ünï>4"),
    ] {
        let tokenizer = load(&[("chat_template.jinja", template)]).unwrap();
        assert_eq!(tokenizer.render(&conversation, true).unwrap(), expected, "{template}");
    }
    let named = json!({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]});
    let config = ("tokenizer_config.json", named.to_string());
    assert_eq!(load(&[(config.0, &config.1)]).unwrap().render(&[], true).unwrap(), "d");
    let both = load(&[(config.0, &config.1), ("chat_template.jinja", "file")]).unwrap();
    assert_eq!(both.render(&[], true).unwrap(), "file");
}

#[test]
fn bad_templates_are_explained() {
    let hi = [Message::user("hi")];
    assert_error(load(&[]).unwrap().render(&hi, true), &["no chat template", "chat_template.jinja"]);
    let unfinished = "line one\n{% if messages %}";
    assert_error(
        load(&[("chat_template.jinja", unfinished)]),
        &["does not compile", "syntax error", "chat_template:2"],
    );
    for (template, reason) in [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ strftime_now('%!') }}", "strftime"),
        ("{{ messages[0].content.frobnicate() }}", "frobnicate"),
    ] {
        let tokenizer = load(&[("chat_template.jinja", template)]).unwrap();
        assert_error(tokenizer.prompt_ids(&hi), &["does not render these messages", reason]);
    }
}

/// Also where the tokenizer adds BOS: a token that begins every text asks nothing. Told before anything is sampled.
#[test]
fn an_empty_prompt_is_refused_with_and_without_bos() {
    let hi = [Message::user("hi")];
    for (adds_bos, template) in [(false, ""), (true, ""), (true, "{{ bos_token }}"), (false, "{{ bos_token }}")] {
        let config = json!({"bos_token": "<|endoftext|>", "add_bos_token": adds_bos, "chat_template": template});
        let tokenizer = load(&[("tokenizer_config.json", &config.to_string())]).unwrap();
        assert_error(tokenizer.prompt_ids(&hi).map(drop), &["the chat template makes an empty prompt"]);
        if template.is_empty() {
            assert_error(tokenizer.prompt_fits(&hi, 100).map(drop), &["the chat template makes an empty prompt"]);
        }
    }
}

#[test]
fn bad_folders_are_explained() {
    assert_error(
        Tokenizer::from_folder(Path::new("/nonexistent")),
        &["the tokenizer cannot be used: tokenizer.json is missing"],
    );
    let folder = folder_with(&[]);
    fs::remove_file(folder.path().join("tokenizer_config.json")).unwrap();
    assert_error(Tokenizer::from_folder(folder.path()), &["tokenizer_config.json is missing"]);

    let tokenizer_json = check::json(&tiny_folder().join("tokenizer.json"));
    let changed = |pointer: &str, value: Value| {
        let mut changed = tokenizer_json.clone();
        *changed.pointer_mut(pointer).unwrap() = value;
        changed.to_string()
    };
    let mut empty = tokenizer_json.clone();
    empty["model"]["vocab"] = json!({});
    empty["model"]["merges"] = json!([]);
    empty["added_tokens"] = json!([]);
    let vocabulary = tokenizer_json["model"]["vocab"].as_object().unwrap();
    let longest = vocabulary.keys().max_by_key(|token| token.len()).unwrap();
    // The tokenizers crate panics on this one.
    let too_long = changed("/model/merges", json!([[longest, longest]]));
    for (file, text, parts) in [
        ("tokenizer.json", &*too_long, ["tokenizer.json", "merges"]),
        ("tokenizer.json", "{not json", ["tokenizer.json is not JSON", "line 1"]),
        ("tokenizer.json", "{}", ["tokenizer.json is not a tokenizer", "Model missing"]),
        ("tokenizer.json", &empty.to_string(), ["the vocabulary is empty", ""]),
        ("tokenizer.json", &changed("/model/merges", json!([["zz", "a"]])), ["zz", "not a tokenizer"]),
        ("tokenizer.json", &changed("/decoder", json!(null)), ["decoder is null", "ByteLevel"]),
        ("tokenizer.json", &changed("/decoder", json!({"type": "Fuse"})), ["Fuse", "ByteLevel"]),
        ("tokenizer_config.json", "[", ["tokenizer_config.json is not JSON", "line 1"]),
        ("tokenizer_config.json", r#"{"eos_token": 7}"#, ["tokenizer_config.json", "expected form"]),
        ("tokenizer_config.json", r#"{"eos_token": "</s>"}"#, ["an end token", "\"</s>\" is not in the vocabulary"]),
        ("tokenizer_config.json", r#"{"add_bos_token": true}"#, ["BOS token is to be added", "none is named"]),
        ("generation_config.json", r#"{"eos_token_id": "2"}"#, ["generation_config.json", "expected form"]),
        ("config.json", "", ["config.json is not JSON", "EOF"]),
    ] {
        assert_error(load(&[(file, text)]), &parts);
    }
}

#[test]
fn tokenizers_are_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Tokenizer>();
}
