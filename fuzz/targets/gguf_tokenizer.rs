//! The metadata of a GGUF file without tensors: the input follows its header, and begins with the number of entries.
//! What is accepted as a tokenizer encodes and decodes.

#![no_main]

use candor::model::gguf;
use candor::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;

const HEADER: &[u8] = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0";

fuzz_target!(|bytes: &[u8]| {
    let bytes = [HEADER, bytes].concat();
    let Ok(content) = gguf::read(bytes.as_slice(), bytes.len() as u64) else { return };
    let Ok(tokenizer) = Tokenizer::from_gguf(&content.metadata) else { return };
    let Ok(ids) = tokenizer.encode("It's 12 o'clock, naïve 🦀!\n") else { return };
    let (text, ranges) = tokenizer.token_ranges(&ids);
    assert_eq!(ranges.len(), ids.len());
    assert!(ranges.into_iter().all(|range| text.get(range).is_some()));
});
