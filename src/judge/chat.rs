//! One request to a server that speaks OpenAI's chat protocol, and what its failure means.

use std::io::Read;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;
use ureq::Agent;
use ureq::http::StatusCode;

use super::options::JudgeOptions;
use crate::source::{Token, agent, header};

/// A server's chat endpoint and what it is asked with.
pub struct Chat {
    agent: Agent,
    address: String,
    model: String,
    key: Option<Token>,
    max_tokens: u32,
    response_format: Option<Value>,
    timeout: Duration,
}

/// Why there is no reply.
#[derive(Debug, Error)]
pub enum CallError {
    /// It may pass; the server may have said when.
    #[error("{what}")]
    Passing {
        /// What happened.
        what: String,
        /// How long the server wants not to be asked.
        after: Option<Duration>,
    },
    /// Asking again will not help.
    #[error("{0}")]
    Lasting(String),
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

/// What is shown of a server's own words.
const SHOWN: usize = 200;

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
        let (most, address) = (options.concurrency, options.base_url.as_deref().unwrap_or_default());
        let agent =
            agent().timeout_global(Some(timeout)).max_idle_connections(most).max_idle_connections_per_host(most);
        Self {
            agent: agent.build().new_agent(),
            address: format!("{}/chat/completions", address.trim_end_matches('/')),
            model: options.model.clone().unwrap_or_default(),
            key,
            max_tokens: options.max_tokens.unwrap_or(options.style.max_tokens()),
            response_format: options.style.response_format(),
            timeout,
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
        let mut request = self.agent.post(&self.address).header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", key.authorization());
        }
        let response = request.send(body.to_string()).map_err(|error| self.unreachable(&error))?;
        let (parts, body) = response.into_parts();
        let mut bytes = Vec::new();
        let read = body.into_reader().take(LONGEST_BODY + 1).read_to_end(&mut bytes);
        let after = header(&parts.headers, "retry-after").and_then(|after| wait(&after, SystemTime::now()));
        if parts.status != StatusCode::OK {
            return Err(self.refusal(parts.status, after, &bytes));
        }
        let passing = |what: String| CallError::Passing { what, after };
        read.map_err(|error| passing(format!("the reply was cut: {error}")))?;
        if bytes.len() as u64 > LONGEST_BODY {
            return Err(passing(format!("a reply of more than {LONGEST_BODY} bytes")));
        }
        let body: Body = serde_json::from_slice(&bytes)
            .map_err(|error| passing(format!("the reply is not a chat completion: {error}: {}", self.shown(&bytes))))?;
        let choice = body.choices.into_iter().next().ok_or_else(|| passing("the reply has no choices".into()))?;
        Ok(Reply {
            is_whole: choice.finish_reason.as_deref() != Some("length"),
            text: choice.message.content.unwrap_or_default(),
            tokens: body.usage.map_or([0, 0], |usage| [usage.prompt_tokens, usage.completion_tokens]),
        })
    }

    fn unreachable(&self, error: &ureq::Error) -> CallError {
        let what = match error {
            ureq::Error::Timeout(_) => format!("no reply within {} s", self.timeout.as_secs()),
            other => format!("the server was not reached: {other}"),
        };
        CallError::Passing { what: self.without_key(&what), after: None }
    }

    fn refusal(&self, status: StatusCode, after: Option<Duration>, bytes: &[u8]) -> CallError {
        let what = format!("the server answered {}: {}", status.as_u16(), self.shown(bytes));
        // A quota that is used up is refused with the status of a rate that is too high.
        let used_up = String::from_utf8_lossy(bytes).contains("insufficient_quota");
        let passing = status.is_server_error() || [408, 409, 425, 429].contains(&status.as_u16());
        if passing && !used_up { CallError::Passing { what, after } } else { CallError::Lasting(what) }
    }

    /// The beginning of a server's words, on one line.
    fn shown(&self, bytes: &[u8]) -> String {
        // Shortened last: a part of the key must not be left of it.
        let text = self.without_key(&String::from_utf8_lossy(&bytes[..bytes.len().min(4096)]));
        let line = text.chars().map(|one| if one.is_control() { ' ' } else { one });
        line.take(SHOWN).collect::<String>().split_whitespace().collect::<Vec<_>>().join(" ")
    }

    fn without_key(&self, text: &str) -> String {
        self.key.as_ref().map_or(text.to_string(), |key| key.hidden_in(text))
    }
}

/// How long a `Retry-After` asks to wait: seconds, or a date.
pub fn wait(text: &str, now: SystemTime) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let until = jiff::fmt::rfc2822::parse(text.trim()).ok()?.timestamp();
    Some(SystemTime::from(until).duration_since(now).unwrap_or_default())
}
