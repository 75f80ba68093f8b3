//! The bytes that a token stands for, and which characters of a text they end up in.

use std::ops::Range;

use anyhow::{Result, bail};
use serde_json::json;

/// How the text of a token in the vocabulary stands for bytes.
pub(super) enum Spelling {
    /// One character per byte: GPT-2's printable stand-ins.
    ByteLevel,
    /// `▁` is a space and `<0x0A>` a byte, all else is itself: SentencePiece.
    ByteFallback,
}

impl Spelling {
    pub(super) fn of(tokenizer: &tokenizers::Tokenizer) -> Result<Self> {
        let decoder = serde_json::to_value(tokenizer.get_decoder())?;
        let byte_fallback = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]});
        match decoder["type"].as_str() {
            Some("ByteLevel") => Ok(Self::ByteLevel),
            _ if decoder == byte_fallback => Ok(Self::ByteFallback),
            _ => bail!("its decoder is {decoder}; only ByteLevel or Replace ▁, ByteFallback, Fuse can be used"),
        }
    }

    /// Appends the bytes that `token` stands for.
    pub(super) fn append(&self, token: &str, bytes: &mut Vec<u8>) {
        match self {
            // An added token is plain text, which may hold characters that stand for no byte.
            Self::ByteLevel => match token.chars().map(byte_of_stand_in).collect::<Option<Vec<u8>>>() {
                Some(spelled) => bytes.extend(spelled),
                None => bytes.extend(token.as_bytes()),
            },
            Self::ByteFallback => match byte_of_hexadecimal(token) {
                Some(byte) => bytes.push(byte),
                None => bytes.extend(token.replace('▁', " ").as_bytes()),
            },
        }
    }
}

/// GPT-2's printable character for each byte, backwards: printable Latin-1 stands for itself, and the other 68 bytes
/// are numbered from U+0100 on.
fn byte_of_stand_in(character: char) -> Option<u8> {
    let byte = match u32::from(character) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => code,
        code @ 0x100..=0x120 => code - 0x100,
        code @ 0x121..=0x142 => code - 0x121 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

fn byte_of_hexadecimal(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(digits, 16).ok()
}

/// `bytes` as text with U+FFFD for what is not UTF-8, and for each byte the range in the text of the character that it
/// is part of.
pub(super) fn characters(bytes: &[u8]) -> (String, Vec<Range<usize>>) {
    let mut text = String::new();
    let mut ranges = Vec::with_capacity(bytes.len());
    let mut push = |character: char, num_bytes: usize| {
        let start = text.len();
        text.push(character);
        ranges.extend(std::iter::repeat_n(start..text.len(), num_bytes));
    };
    for chunk in bytes.utf8_chunks() {
        chunk.valid().chars().for_each(|character| push(character, character.len_utf8()));
        if !chunk.invalid().is_empty() {
            push(char::REPLACEMENT_CHARACTER, chunk.invalid().len());
        }
    }
    (text, ranges)
}
