//! One request to a server that speaks OpenAI's chat protocol.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::options::JudgeOptions;
use crate::client::{CallError, Client};
use crate::source::Token;

/// A server's chat endpoint and what it is asked with.
pub struct Chat {
    client: Client,
    model: String,
    max_tokens: u32,
    response_format: Option<Value>,
}

/// What a server replied.
#[derive(Debug, PartialEq)]
pub struct Reply {
    /// The text; empty where the server gave none.
    pub text: String,
    /// Whether it ended before it was cut.
    pub is_whole: bool,
    /// Tokens of the prompt and of the reply, as far as the server counts.
    pub tokens: [u64; 2],
}

/// Longer replies are garbage: an honest one has a few hundred bytes.
const LONGEST_BODY: u64 = 1 << 20;

#[derive(Deserialize)]
struct Body {
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    message: Said,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Said {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
}

impl Chat {
    /// For checked options of the kind `openai`. Connections are kept, one for each request in flight.
    pub fn new(options: &JudgeOptions, key: Option<Token>) -> Self {
        let timeout = Duration::from_secs(options.timeout_seconds);
        let address = options.base_url.as_deref().unwrap_or_default();
        Self {
            client: Client::new(address, key, timeout, options.concurrency),
            model: options.model.clone().unwrap_or_default(),
            max_tokens: options.max_tokens.unwrap_or(options.style.max_tokens()),
            response_format: options.style.response_format(),
        }
    }

    /// Tokens that a request will about take: a token of English has four bytes or so.
    pub fn estimate(&self, prompt: &str) -> u64 {
        prompt.len() as u64 / 4 + u64::from(self.max_tokens)
    }

    /// Asks once.
    ///
    /// # Errors
    /// If there is no reply of the protocol's form in time; the message never holds the key.
    pub fn ask(&self, prompt: &str) -> Result<Reply, CallError> {
        let mut body = json!({
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        });
        if let (Some(format), Some(body)) = (&self.response_format, body.as_object_mut()) {
            body.insert("response_format".into(), format.clone());
        }
        let bytes = self.client.post("chat/completions", &body, LONGEST_BODY)?;
        let body: Body = serde_json::from_slice(&bytes).map_err(|error| {
            CallError::passing(format!("the reply is not a chat completion: {error}: {}", self.client.shown(&bytes)))
        })?;
        let choice = body.choices.into_iter().next().ok_or_else(|| CallError::passing("the reply has no choices"))?;
        Ok(Reply {
            is_whole: choice.finish_reason.as_deref() != Some("length"),
            text: choice.message.content.unwrap_or_default(),
            tokens: body.usage.map_or([0, 0], |usage| [usage.prompt_tokens, usage.completion_tokens]),
        })
    }
}
