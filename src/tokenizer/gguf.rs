//! The tokenizer in a GGUF file's metadata: byte-level BPE whose text splitting is known only by name
//! (`tokenizer.ggml.pre`), or SentencePiece's BPE.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::Value;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::{Parts, sentencepiece};

type Metadata = HashMap<String, Value>;

/// One kind of `tokenizer.ggml.pre`, with what llama.cpp takes for granted about its files.
pub(super) struct PreTokenizer {
    pub(super) name: &'static str,
    /// Text is cut by these in turn; a match and what lies between two matches are pieces.
    splits: &'static [&'static str],
    /// Characters are composed first (Unicode's NFC).
    composes: bool,
    /// A piece that is a token is taken whole, without going through the merges.
    ignores_merges: bool,
    /// Used where the file has no `tokenizer.ggml.add_bos_token`.
    adds_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PLAIN: PreTokenizer = PreTokenizer {
    name: "default",
    splits: &[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    composes: false,
    ignores_merges: false,
    adds_bos: false,
};

/// The kinds we know.
pub(super) const PRE_TOKENIZERS: [PreTokenizer; 4] = [
    PreTokenizer { name: "smollm", splits: &[r"\p{N}", GPT2], ..PLAIN },
    PreTokenizer { name: "llama-bpe", splits: &[LLAMA3], ignores_merges: true, adds_bos: true, ..PLAIN },
    PreTokenizer { name: "qwen2", splits: &[QWEN2], composes: true, ..PLAIN },
    PLAIN,
];

/// The token type of GGUF that most tokens have.
pub(super) const NORMAL: u32 = 1;
/// Token types of GGUF that are recognized inside text; control tokens are also left out when decoding.
pub(super) const CONTROL: u32 = 3;
pub(super) const USER_DEFINED: u32 = 4;

/// Reads the tokenizer, its special tokens and the chat template.
pub(super) fn read(metadata: &Metadata) -> Result<Parts> {
    let tokens = list(metadata, "tokenizer.ggml.tokens", string)?;
    let types = list(metadata, "tokenizer.ggml.token_type", integer)?;
    let (tokens_len, types_len) = (tokens.len(), types.len());
    ensure!(tokens_len > 0, "`tokenizer.ggml.tokens` is empty");
    ensure!(
        tokens_len == types_len,
        "`tokenizer.ggml.tokens` has {tokens_len} tokens but `tokenizer.ggml.token_type` has {types_len} types"
    );

    let (mut tokenizer, adds_bos) = match required(metadata, "tokenizer.ggml.model", string)? {
        "gpt2" => byte_level(metadata, &tokens)?,
        "llama" => (sentencepiece(metadata, &tokens, &types)?, true),
        model => {
            bail!("`tokenizer.ggml.model` is {model:?}; gpt2 (byte-level BPE) and llama (SentencePiece) are known")
        }
    };
    let added = tokens.iter().zip(&types).filter(|(_, kind)| [CONTROL, USER_DEFINED].contains(*kind));
    // A user-defined run of spaces must be found where the text's spaces have been replaced.
    let added = added.map(|(token, &kind)| AddedToken::from(*token, kind == CONTROL).normalized(kind == USER_DEFINED));
    tokenizer.add_tokens(added).map_err(anyhow::Error::from_boxed)?;

    let token = |key: &str| -> Result<Option<String>> {
        let Some(id) = optional(metadata, key, integer)? else { return Ok(None) };
        let token = tokens.get(id as usize).with_context(|| format!("`{key}` is {id} of {tokens_len} tokens"))?;
        Ok(Some((*token).to_owned()))
    };
    let eos_token = token("tokenizer.ggml.eos_token_id")?;
    let [end_of_turn, end_of_message] = ["eot", "eom"].map(|end| token(&format!("tokenizer.ggml.{end}_token_id")));
    Ok(Parts {
        tokenizer,
        bos_token: token("tokenizer.ggml.bos_token_id")?,
        adds_bos: optional(metadata, "tokenizer.ggml.add_bos_token", boolean)?.unwrap_or(adds_bos),
        end_tokens: end_of_turn?.into_iter().chain(end_of_message?).collect(),
        eos_token,
        chat_template: optional(metadata, "tokenizer.chat_template", string)?.map(str::to_owned),
    })
}

/// Byte-level BPE, and whether its kind adds a BOS token.
fn byte_level(metadata: &Metadata, tokens: &[&str]) -> Result<(tokenizers::Tokenizer, bool)> {
    let name = required(metadata, "tokenizer.ggml.pre", string)?;
    let Some(kind) = PRE_TOKENIZERS.iter().find(|known| known.name == name) else {
        let known = PRE_TOKENIZERS.map(|known| known.name).join(", ");
        bail!("`tokenizer.ggml.pre` is {name:?}; the kinds known are {known}");
    };
    let merges = list(metadata, "tokenizer.ggml.merges", string)?;
    let mut tokenizer = tokenizers::Tokenizer::new(bpe(tokens, &merges, kind.ignores_merges)?);
    tokenizer.with_normalizer(kind.composes.then_some(NFC)).map_err(anyhow::Error::from_boxed)?;
    tokenizer.with_pre_tokenizer(Some(splitting(kind.splits)?)).with_decoder(Some(ByteLevel::default()));
    Ok((tokenizer, kind.adds_bos))
}

/// SentencePiece's BPE, of the kind that puts no space before the text: Gemma's.
fn sentencepiece(metadata: &Metadata, tokens: &[&str], types: &[u32]) -> Result<tokenizers::Tokenizer> {
    const KEY: &str = "tokenizer.ggml.add_space_prefix";
    let prefix = optional(metadata, KEY, boolean)?.unwrap_or(true);
    ensure!(!prefix, "`{KEY}` is not false: tokenizers that put a space before the text are not supported");
    let scores = list(metadata, "tokenizer.ggml.scores", float)?;
    let (tokens_len, scores_len) = (tokens.len(), scores.len());
    ensure!(tokens_len == scores_len, "`tokenizer.ggml.scores` has {scores_len} scores for {tokens_len} tokens");
    let unknown = optional(metadata, "tokenizer.ggml.unknown_token_id", integer)?;
    let unknown = unknown.and_then(|id| tokens.get(id as usize)).copied();
    sentencepiece::tokenizer(tokens, &scores, |id| types[id] == NORMAL, unknown)
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

fn float(value: &Value) -> Option<f32> {
    if let Value::F32(number) = value { Some(*number) } else { None }
}

fn integer(value: &Value) -> Option<u32> {
    match value {
        Value::U32(number) => Some(*number),
        Value::I32(number) => u32::try_from(*number).ok(),
        _ => None,
    }
}
