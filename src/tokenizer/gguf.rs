//! The tokenizer in a GGUF file's metadata: byte-level BPE whose text splitting is known only by name (`tokenizer.ggml.pre`).

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Value;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::Parts;

type Metadata = HashMap<String, Value>;

/// One kind of `tokenizer.ggml.pre`, with what llama.cpp takes for granted about its files.
struct PreTokenizer {
    name: &'static str,
    /// Text is cut by these in turn; a match and what lies between two matches are pieces.
    splits: &'static [&'static str],
    /// A piece that is a token is taken whole, without going through the merges.
    ignores_merges: bool,
    /// Used where the file has no `tokenizer.ggml.add_bos_token`.
    adds_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The kinds we know.
const PRE_TOKENIZERS: [PreTokenizer; 3] = [
    PreTokenizer { name: "smollm", splits: &[r"\p{N}", GPT2], ignores_merges: false, adds_bos: false },
    PreTokenizer { name: "llama-bpe", splits: &[LLAMA3], ignores_merges: true, adds_bos: true },
    PreTokenizer {
        name: "default",
        splits: &[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ignores_merges: false,
        adds_bos: false,
    },
];

/// Token types of GGUF that are recognized inside text; control tokens are also left out when decoding.
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;

/// Reads the tokenizer, its special tokens and the chat template.
pub(super) fn read(metadata: &Metadata) -> Result<Parts> {
    let model = required(metadata, "tokenizer.ggml.model", string)?;
    ensure!(model == "gpt2", "`tokenizer.ggml.model` is {model:?}; only \"gpt2\" (byte-level BPE) can be read");
    let name = required(metadata, "tokenizer.ggml.pre", string)?;
    let Some(pre_tokenizer) = PRE_TOKENIZERS.iter().find(|known| known.name == name) else {
        let known = PRE_TOKENIZERS.map(|known| known.name).join(", ");
        bail!("`tokenizer.ggml.pre` is {name:?}; the kinds known are {known}");
    };
    let tokens = list(metadata, "tokenizer.ggml.tokens", string)?;
    let types = list(metadata, "tokenizer.ggml.token_type", integer)?;
    let (tokens_len, types_len) = (tokens.len(), types.len());
    ensure!(tokens_len > 0, "`tokenizer.ggml.tokens` is empty");
    ensure!(
        tokens_len == types_len,
        "`tokenizer.ggml.tokens` has {tokens_len} tokens but `tokenizer.ggml.token_type` has {types_len} types"
    );

    let merges = list(metadata, "tokenizer.ggml.merges", string)?;
    let bpe = bpe(&tokens, &merges, pre_tokenizer.ignores_merges)?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(splitting(pre_tokenizer.splits)?)).with_decoder(Some(ByteLevel::default()));
    let added = tokens.iter().zip(&types).filter(|(_, kind)| [CONTROL, USER_DEFINED].contains(*kind));
    tokenizer
        .add_tokens(added.map(|(token, &kind)| AddedToken::from(*token, kind == CONTROL).normalized(false)))
        .map_err(anyhow::Error::from_boxed)?;

    let token = |key: &str| -> Result<Option<String>> {
        let Some(id) = optional(metadata, key, integer)? else { return Ok(None) };
        let token = tokens.get(id as usize).with_context(|| format!("`{key}` is {id} of {tokens_len} tokens"))?;
        Ok(Some((*token).to_owned()))
    };
    let eos_token = token("tokenizer.ggml.eos_token_id")?;
    let end_of_turn = token("tokenizer.ggml.eot_token_id")?;
    Ok(Parts {
        tokenizer,
        bos_token: token("tokenizer.ggml.bos_token_id")?,
        adds_bos: optional(metadata, "tokenizer.ggml.add_bos_token", boolean)?.unwrap_or(pre_tokenizer.adds_bos),
        end_tokens: end_of_turn.into_iter().collect(),
        eos_token,
        chat_template: optional(metadata, "tokenizer.chat_template", string)?.map(str::to_owned),
    })
}

/// The merges are checked here, with their row, because the builder assumes that each makes a token.
fn bpe(tokens: &[&str], merges: &[&str], ignores_merges: bool) -> Result<BPE> {
    let vocabulary: Vocab = tokens.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), id)).collect();
    ensure!(vocabulary.len() == tokens.len(), "`tokenizer.ggml.tokens` lists a token twice");
    let merge = |(row, merge): (usize, &&str)| {
        let (left, right) = merge
            .split_once(' ')
            .with_context(|| format!("`tokenizer.ggml.merges` row {row} {merge:?} is not two tokens with a space"))?;
        for token in [left, right, &format!("{left}{right}")] {
            ensure!(
                vocabulary.contains_key(token),
                "`tokenizer.ggml.merges` row {row} {merge:?} needs {token:?}, which is not among the tokens"
            );
        }
        Ok((left.to_owned(), right.to_owned()))
    };
    let merges: Merges = merges.iter().enumerate().map(merge).collect::<Result<_>>()?;
    let builder = BPE::builder().vocab_and_merges(vocabulary, merges).ignore_merges(ignores_merges);
    builder.build().map_err(anyhow::Error::from_boxed)
}

fn splitting(patterns: &[&str]) -> Result<Sequence> {
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for pattern in patterns {
        let split = Split::new(SplitPattern::Regex((*pattern).into()), SplitDelimiterBehavior::Isolated, false);
        steps.push(split.map_err(anyhow::Error::from_boxed)?.into());
    }
    steps.push(ByteLevel::new(false, false, false).into());
    Ok(Sequence::new(steps))
}

/// The value of `key` as `read` takes it; a value of another type is an error, an absent one is not.
fn optional<'a, T>(metadata: &'a Metadata, key: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
    let Some(value) = metadata.get(key) else { return Ok(None) };
    let wrong_type = || format!("`{key}` cannot have a value of type {:?}", value.value_type());
    read(value).map(Some).with_context(wrong_type)
}

fn required<'a, T>(metadata: &'a Metadata, key: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<T> {
    optional(metadata, key, read)?.with_context(|| format!("`{key}` is missing"))
}

fn list<'a, T>(metadata: &'a Metadata, key: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Vec<T>> {
    let values = required(metadata, key, array)?;
    let wrong_type =
        |row: usize| format!("`{key}` row {row} cannot have a value of type {:?}", values[row].value_type());
    values.iter().enumerate().map(|(row, value)| read(value).with_context(|| wrong_type(row))).collect()
}

fn string(value: &Value) -> Option<&str> {
    if let Value::String(text) = value { Some(text) } else { None }
}

fn array(value: &Value) -> Option<&[Value]> {
    if let Value::Array(values) = value { Some(values) } else { None }
}

fn boolean(value: &Value) -> Option<bool> {
    if let Value::Bool(flag) = value { Some(*flag) } else { None }
}

fn integer(value: &Value) -> Option<u32> {
    match value {
        Value::U32(number) => Some(*number),
        Value::I32(number) => u32::try_from(*number).ok(),
        _ => None,
    }
}
