//! A Hugging Face folder's tokenizer as the metadata of a GGUF file.
//!
//! `tokenizer.json` spells out how text is split, GGUF has names for some ways to do it. Which one is meant is found as
//! llama.cpp's converter finds it: by a text on which they differ.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Value;
use serde::Deserialize;

use super::gguf::{CONTROL, NORMAL, PRE_TOKENIZERS, USER_DEFINED};
use super::{Parts, Tokenizer, folder};

/// Digits, contractions, blanks, signs and letters of many kinds, composed and not.
const PROBE: &str = "I'Ve 1234567 they'RE 20%  a  b   c\n\n\n\te \t f\u{a0}g e\u{301}galite\u{301} don't naïve 😀 🦀🦀 ▁ 東京の夜 \
    нет != !=\r\n   x =    y <h1></h1> 3.14159 ___ \u{200d}ü ﷺ ½ ٣٤ foo_bar(baz)[0];\n\n  // ok";

/// Further token types of GGUF: what stands for the unknown, a row of the embedding without a token, a byte.
const UNKNOWN: u32 = 2;
const UNUSED: u32 = 5;
const BYTE: u32 = 6;

/// What we use of the model in `tokenizer.json`.
#[derive(Deserialize)]
struct Bpe {
    vocab: HashMap<String, usize>,
    merges: Vec<(String, String)>,
    unk_token: Option<String>,
    byte_fallback: bool,
}

impl Tokenizer {
    /// What a GGUF file says of this tokenizer, which was read from `folder`, beside an embedding table of so many `rows`. Read
    /// again, it is the same tokenizer.
    ///
    /// # Errors
    /// If GGUF has no words for it, or a file cannot be read.
    pub fn in_gguf(&self, folder: &Path, rows: usize) -> Result<HashMap<String, Value>> {
        self.described(folder, rows).context("the tokenizer cannot be written as GGUF metadata")
    }

    fn described(&self, folder: &Path, rows: usize) -> Result<HashMap<String, Value>> {
        let parts = folder::read(folder)?;
        let model = serde_json::to_value(parts.tokenizer.get_model())?;
        let model: Bpe = serde_json::from_value(model).context("its model is not BPE")?;
        let (texts, types): (Vec<_>, Vec<_>) = tokens(&parts, &model, rows).into_iter().unzip();
        let mut entries =
            HashMap::from([("add_bos_token", Value::Bool(self.adds_bos)), ("token_type", integers(types))]);
        entries.extend(if model.byte_fallback { scored(&model, &texts) } else { merged(&model) });
        entries.insert("tokens", strings(texts));
        entries.extend(self.bos.map(|bos| ("bos_token_id", Value::U32(bos))));
        entries.extend(self.ends(&parts)?);
        let mut metadata: HashMap<String, Value> =
            entries.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
        metadata.extend(parts.chat_template.map(|text| ("tokenizer.chat_template".into(), Value::String(text))));
        if model.byte_fallback {
            ensure!(self.is_read_from(&metadata)?, "it does not join what its scores would");
            return Ok(metadata);
        }
        for kind in &PRE_TOKENIZERS {
            metadata.insert("tokenizer.ggml.pre".into(), Value::String(kind.name.into()));
            if self.is_read_from(&metadata)? {
                return Ok(metadata);
            }
        }
        let known = PRE_TOKENIZERS.map(|kind| kind.name).join(", ");
        bail!("it splits text in none of the ways that have a name there and are known here: {known}")
    }

    /// The keys of every token that ends a generation.
    fn ends(&self, Parts { tokenizer, eos_token, .. }: &Parts) -> Result<Vec<(&'static str, Value)>> {
        let eos = eos_token.as_ref().and_then(|eos| tokenizer.token_to_id(eos));
        let mut ends = self.end_tokens.clone();
        ends.sort_by_key(|end| (Some(*end) != eos, Some(*end) != self.end_of_turn));
        let keys = ["eos_token_id", "eot_token_id", "eom_token_id"];
        ensure!(ends.len() <= keys.len(), "it has {} end tokens, for which there are {} keys", ends.len(), keys.len());
        Ok(keys.into_iter().zip(ends.into_iter().map(Value::U32)).collect())
    }

    fn is_read_from(&self, metadata: &HashMap<String, Value>) -> Result<bool> {
        let read = Self::from_gguf(metadata)?;
        Ok(read.text_prompt_ids(PROBE)? == self.text_prompt_ids(PROBE)? && read.end_tokens == self.end_tokens)
    }
}

/// Text and type of the token of every row of the embedding.
fn tokens(Parts { tokenizer, .. }: &Parts, model: &Bpe, rows: usize) -> Vec<(String, u32)> {
    let mut tokens: Vec<(String, u32)> = (0..rows).map(|row| (format!("[PAD{row}]"), UNUSED)).collect();
    let kind = |token: &String| match token {
        token if model.unk_token.as_ref() == Some(token) => UNKNOWN,
        token if model.byte_fallback && token.starts_with("<0x") => BYTE,
        _ => NORMAL,
    };
    let known = model.vocab.iter().map(|(token, id)| (*id, (token.clone(), kind(token))));
    let added = tokenizer.get_added_tokens_decoder().into_iter().map(|(id, added)| {
        // A user-defined run of spaces is written as such where all others stand with ▁ for a space.
        let plain = if model.byte_fallback { added.content.replace('▁', " ") } else { added.content.clone() };
        (id as usize, if added.special { (added.content, CONTROL) } else { (plain, USER_DEFINED) })
    });
    for (id, token) in known.chain(added) {
        // A token beyond the table, such as Gemma 3's for images, is none of this model.
        if let Some(place) = tokens.get_mut(id) {
            *place = token;
        }
    }
    tokens
}

/// Byte-level BPE.
fn merged(model: &Bpe) -> Vec<(&'static str, Value)> {
    let merges = model.merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
    vec![("model", Value::String("gpt2".into())), ("merges", strings(merges))]
}

/// SentencePiece's BPE, whose scores fall in the order of the merges.
fn scored(model: &Bpe, texts: &[String]) -> Vec<(&'static str, Value)> {
    let mut ranks = HashMap::new();
    for (rank, (left, right)) in model.merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let score = |text: &String| Value::F32(-(ranks.get(text).copied().unwrap_or(model.merges.len()) as f32));
    let unknown = model.unk_token.as_ref().and_then(|token| model.vocab.get(token));
    let unknown = unknown.map(|id| ("unknown_token_id", Value::U32(*id as u32)));
    let all = [
        ("model", Value::String("llama".into())),
        ("pre", Value::String("default".into())),
        ("scores", Value::Array(texts.iter().map(score).collect())),
        ("add_space_prefix", Value::Bool(false)),
    ];
    all.into_iter().chain(unknown).collect()
}

fn strings(texts: Vec<String>) -> Value {
    Value::Array(texts.into_iter().map(Value::String).collect())
}

fn integers(numbers: Vec<u32>) -> Value {
    Value::Array(numbers.into_iter().map(|number| Value::I32(number as i32)).collect())
}
