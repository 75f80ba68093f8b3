//! A `tokenizer.json`. What is accepted encodes and decodes.

#![no_main]

use candor::tokenizer::Tokenizer;
use candor_environments::Message;
use candor_fuzz::folder_with;
use libfuzzer_sys::fuzz_target;

const CONFIG: &[u8] = br#"{"chat_template": "{{ messages[0].content }}<|im_end|>"}"#;

// The fuzzer's own hook ends the process at a panic, also at those of the tokenizers crate that become errors. Whatever
// else panics still ends it.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |bytes: &[u8]| {
    let folder = folder_with(&[("tokenizer.json", bytes), ("tokenizer_config.json", CONFIG)]);
    let Ok(tokenizer) = Tokenizer::from_folder(folder.path()) else { return };
    let Ok(ids) = tokenizer.prompt_ids(&[Message::user("It's 12 o'clock, naïve 🦀!\n")]) else { return };
    let (text, ranges) = tokenizer.token_ranges(&ids);
    assert_eq!(ranges.len(), ids.len());
    assert!(ranges.into_iter().all(|range| text.get(range).is_some()));
});
