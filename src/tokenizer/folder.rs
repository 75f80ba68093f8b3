//! The tokenizer in a Hugging Face folder: `tokenizer.json`, and what the files beside it say about its special tokens.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use tokenizers::Tokenizer;

use super::Parts;

/// Reads the tokenizer, its special tokens and the chat template.
pub(super) fn read(folder: &Path) -> Result<Parts> {
    let text = required(folder, "tokenizer.json")?;
    json::<IgnoredAny>("tokenizer.json", &text)?;
    // The crate panics on some damaged files, such as one with a merge longer than its longest token.
    let mut tokenizer = std::panic::catch_unwind(|| Tokenizer::from_bytes(text))
        .map_err(|_| anyhow!("tokenizer.json is damaged: do its merges and its vocabulary fit?"))?
        .map_err(anyhow::Error::from_boxed)
        .context("tokenizer.json is not a tokenizer")?;
    // First of all: padding to an absurd length would be done for every text.
    tokenizer.with_padding(None).with_truncation(None).map_err(anyhow::Error::from_boxed)?;
    let config: TokenizerConfig = json("tokenizer_config.json", &required(folder, "tokenizer_config.json")?)?;
    let bos_token = config.bos_token.map(SpecialToken::text);
    let adds_bos = match config.add_bos_token {
        Some(adds_bos) => adds_bos,
        None => bos_token.is_some() && first_added(&tokenizer)? == bos_token,
    };

    let mut end_tokens = Vec::new();
    for name in ["generation_config.json", "config.json"] {
        let Some(text) = optional(folder, name)? else { continue };
        let ids = match json::<EndTokens>(name, &text)?.eos_token_id {
            None => Vec::new(),
            Some(EndTokenIds::One(id)) => vec![id],
            Some(EndTokenIds::Many(ids)) => ids,
        };
        // An id without a token ends nothing: some configurations name a padding row of the embedding.
        end_tokens.extend(ids.into_iter().filter_map(|id| tokenizer.id_to_token(id)));
    }
    let chat_template = match optional(folder, "chat_template.jinja")? {
        Some(text) => Some(text),
        None => config.chat_template.and_then(ChatTemplates::plain),
    };
    let eos_token = config.eos_token.map(SpecialToken::text);
    Ok(Parts { tokenizer, bos_token, adds_bos, eos_token, end_tokens, chat_template })
}

/// The token that the tokenizer itself puts before every text, if any.
fn first_added(tokenizer: &Tokenizer) -> Result<Option<String>> {
    let encoding = tokenizer.encode_fast("", true).map_err(anyhow::Error::from_boxed)?;
    Ok(encoding.get_ids().first().and_then(|id| tokenizer.id_to_token(*id)))
}

fn required(folder: &Path, name: &str) -> Result<String> {
    optional(folder, name)?.with_context(|| format!("{name} is missing"))
}

/// The text of a file; `None` if there is none.
fn optional(folder: &Path, name: &str) -> Result<Option<String>> {
    match fs::read_to_string(folder.join(name)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some).with_context(|| format!("cannot read {name}")),
    }
}

fn json<T: DeserializeOwned>(name: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).with_context(|| format!("{name} is not JSON of the expected form"))
}

/// What we use of `tokenizer_config.json`.
#[derive(Deserialize)]
struct TokenizerConfig {
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    add_bos_token: Option<bool>,
    chat_template: Option<ChatTemplates>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Described { content: String },
}

impl SpecialToken {
    fn text(self) -> String {
        let (Self::Text(text) | Self::Described { content: text }) = self;
        text
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ChatTemplates {
    One(String),
    Several(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl ChatTemplates {
    /// The template for conversations without tools or documents.
    fn plain(self) -> Option<String> {
        match self {
            Self::One(text) => Some(text),
            Self::Several(named) => named.into_iter().find(|one| one.name == "default").map(|one| one.template),
        }
    }
}

/// What we use of `generation_config.json` and `config.json`.
#[derive(Deserialize)]
struct EndTokens {
    eos_token_id: Option<EndTokenIds>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum EndTokenIds {
    One(u32),
    Many(Vec<u32>),
}
