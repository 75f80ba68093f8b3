//! Rows of prompts, as the commands that ask a model read them: plain text to be continued, or a chat to be answered.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use candor_environments::Message;
use candor_environments::rows::{each_row, field};
use serde_json::{Map, Value, json};

use crate::model_files::ModelFiles;
use crate::tokenizer::Tokenizer;

/// The fields that a row may have its prompt in.
const TEXT: &str = "prompt";
const CHAT: &str = "messages";
const QUESTION: &str = "question";

/// A row and the tokens of its prompt.
pub struct Prompt {
    /// The row as it was read.
    pub row: Map<String, Value>,
    /// Tokens of the prompt, at least one.
    pub ids: Vec<u32>,
    /// Whether what continues it is an assistant's turn.
    pub is_chat: bool,
}

impl Prompt {
    /// Reads the prompt of a row. `prompt` is a text and is encoded as it is; `messages` go through the chat template, and so
    /// does a `question`, as the only one of a chat, where there is a template.
    ///
    /// # Errors
    /// If none of the fields is there, or both `prompt` and `messages`, or one is of another type, or the prompt has no tokens.
    pub fn of(row: Map<String, Value>, tokenizer: &Tokenizer) -> Result<Self> {
        let has = |name: &str| row.contains_key(name);
        let (ids, is_chat) = match (has(TEXT), has(CHAT), has(QUESTION)) {
            (true, true, _) => bail!("both `{TEXT}` and `{CHAT}` are there; which of them is meant?"),
            (true, ..) => (tokenizer.text_prompt_ids(&field::<String>(&row, TEXT)?)?, false),
            (_, true, _) => (tokenizer.prompt_ids(&field::<Vec<Message>>(&row, CHAT)?)?, true),
            (.., true) => {
                let question: String = field(&row, QUESTION)?;
                let is_chat = tokenizer.has_template();
                let chat = || tokenizer.prompt_ids(&[Message::user(&question)]);
                (if is_chat { chat()? } else { tokenizer.text_prompt_ids(&question)? }, is_chat)
            }
            _ => bail!("there is no field `{TEXT}`, `{CHAT}` or `{QUESTION}`"),
        };
        ensure!(!ids.is_empty(), "the prompt has no tokens");
        Ok(Self { row, ids, is_chat })
    }

    /// The row of a text that stands on the command line: a question where the model knows chats.
    ///
    /// # Errors
    /// As [`Prompt::of`].
    pub fn written(text: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let (name, value) =
            if tokenizer.has_template() { (CHAT, json!([Message::user(text)])) } else { (TEXT, json!(text)) };
        Self::of(Map::from_iter([(name.to_string(), value)]), tokenizer)
    }

    /// Reads the rows of a file: all of them, so that a row that is wrong is found before any work is done.
    ///
    /// # Errors
    /// As [`Prompt::of`] or `make`, with the file and line, or if there are no rows.
    pub fn read<T>(path: &Path, model: &ModelFiles, make: impl Fn(Self) -> Result<T>) -> Result<Vec<T>> {
        let mut all = Vec::new();
        each_row(path, |_, row| {
            all.push(make(Self::of(row, &model.tokenizer)?)?);
            Ok(())
        })?;
        ensure!(!all.is_empty(), "{}: there are no rows", path.display());
        Ok(all)
    }
}

/// Refuses what the model's context cannot hold.
///
/// # Errors
/// If prompt and completion together are longer.
pub fn check_room(model: &ModelFiles, prompt: usize, completion: usize) -> Result<()> {
    let context = model.architecture.context;
    ensure!(
        prompt.saturating_add(completion) <= context,
        "a prompt of {prompt} tokens leaves no room for {completion} more, the model's context is {context}"
    );
    Ok(())
}
