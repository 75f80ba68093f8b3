//! A `chat_template.jinja` beside a good tokenizer. It ends, and renders a message or says why not.

#![no_main]

use candor::tokenizer::Tokenizer;
use candor_environments::Message;
use candor_fuzz::folder_with;
use libfuzzer_sys::fuzz_target;

const TOKENIZER: &[u8] = include_bytes!("../seeds/tokenizer/bpe");
const CONFIG: &[u8] = br#"{"bos_token": "<e>", "eos_token": "<e>"}"#;

fuzz_target!(|bytes: &[u8]| {
    let files = [("tokenizer.json", TOKENIZER), ("tokenizer_config.json", CONFIG), ("chat_template.jinja", bytes)];
    let folder = folder_with(&files);
    let Ok(tokenizer) = Tokenizer::from_folder(folder.path()) else { return };
    drop(tokenizer.prompt_ids(&[Message::user("abba")]));
});
