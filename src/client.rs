//! One request to a server that speaks JSON, and what its failure means. Judges and servers that sample are asked this way.

use std::ffi::OsString;
use std::io::Read;
use std::time::{Duration, SystemTime};

use candor_environments::KeyError;
use serde_json::Value;
use thiserror::Error;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use crate::source::{Token, agent, header};

/// More requests at once than threads should wait for.
pub const MOST_IN_FLIGHT: usize = 1024;

/// What is said of an address that is none. It is not repeated: it may hold a password.
pub const NO_ADDRESS: &str = "is not an address such as https://api.openai.com/v1, without a user's name and a query";

/// How long is waited for a server, and how often it is tried.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// The wait before the second try; it doubles from try to try.
    pub backoff: Duration,
    /// Tries of one request.
    pub tries: u32,
    /// Failures in a row, of whichever requests, after which the server is left alone for a while.
    pub broken_after: u32,
    /// That while. Then one request finds out.
    pub cool_down: Duration,
    /// How long a server may fail, or ask not to be asked, until requests are given up.
    pub give_up: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            backoff: Duration::from_secs(1),
            tries: 5,
            broken_after: 20,
            cool_down: Duration::from_secs(10),
            give_up: Duration::from_secs(150),
        }
    }
}

/// What an environment variable holds.
pub type Variable<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// The key in an environment variable.
///
/// # Errors
/// If there is none, or what no key is.
pub fn key_in(name: &str, variable: Variable) -> Result<Token, KeyError> {
    let problem = |text: String| KeyError::new("key_variable", text);
    let key = variable(name).and_then(|key| key.into_string().ok()).ok_or_else(|| {
        problem(format!("the environment variable {name} is not set, or is no text; put the server's key there"))
    })?;
    Token::new(&key).map_err(|error| problem(format!("the environment variable {name} {error}")))
}

/// The way to one server.
pub struct Client {
    agent: Agent,
    /// What paths are appended to.
    address: String,
    key: Option<Token>,
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
    /// Asking the same again will not help.
    #[error("{what}")]
    Lasting {
        /// The status of the refusal.
        status: u16,
        /// What the server said.
        what: String,
    },
}

impl CallError {
    /// A failure that may pass, of which the server said nothing.
    pub fn passing(what: impl Into<String>) -> Self {
        Self::Passing { what: what.into(), after: None }
    }
}

/// What is shown of a server's own words.
const SHOWN: usize = 200;

impl Client {
    /// A client of the server at `address`, whose requests take `timeout` at most. As many connections are kept as there are
    /// requests in flight.
    pub fn new(address: &str, key: Option<Token>, timeout: Duration, in_flight: usize) -> Self {
        let agent = agent()
            .timeout_global(Some(timeout))
            .max_idle_connections(in_flight)
            .max_idle_connections_per_host(in_flight);
        let address = address.trim_end_matches('/').to_string();
        Self { agent: agent.build().new_agent(), address, key, timeout }
    }

    /// A path below the server's address; one that begins with a slash is below its host.
    fn at(&self, path: &str) -> String {
        let host_ends =
            || self.address.split_once("://").and_then(|(scheme, rest)| Some(scheme.len() + 3 + rest.find('/')?));
        match path.starts_with('/') {
            true => format!("{}{path}", &self.address[..host_ends().unwrap_or(self.address.len())]),
            false => format!("{}/{path}", self.address),
        }
    }

    /// Gets what is at a path, of at most `longest` bytes.
    ///
    /// # Errors
    /// As [`Client::post`].
    pub fn get(&self, path: &str, longest: u64) -> Result<Vec<u8>, CallError> {
        let mut request = self.agent.get(self.at(path));
        if let Some(key) = &self.key {
            request = request.header("authorization", key.authorization());
        }
        self.read(request.call(), longest)
    }

    /// Posts to a path, and gets a reply of at most `longest` bytes.
    ///
    /// # Errors
    /// If there is no whole reply in time, or it is a refusal; the message never holds the key.
    pub fn post(&self, path: &str, body: &Value, longest: u64) -> Result<Vec<u8>, CallError> {
        let mut request = self.agent.post(self.at(path)).header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", key.authorization());
        }
        self.read(request.send(body.to_string()), longest)
    }

    fn read(&self, response: Result<Response<Body>, ureq::Error>, longest: u64) -> Result<Vec<u8>, CallError> {
        let (parts, body) = response.map_err(|error| self.unreachable(&error))?.into_parts();
        let mut bytes = Vec::new();
        let read = body.into_reader().take(longest + 1).read_to_end(&mut bytes);
        if parts.status != StatusCode::OK {
            let after = header(&parts.headers, "retry-after").and_then(|after| wait(&after, SystemTime::now()));
            return Err(self.refusal(parts.status, after, &bytes));
        }
        read.map_err(|error| CallError::passing(format!("the reply was cut: {error}")))?;
        match bytes.len() as u64 > longest {
            true => Err(CallError::passing(format!("a reply of more than {longest} bytes"))),
            false => Ok(bytes),
        }
    }

    fn unreachable(&self, error: &ureq::Error) -> CallError {
        let what = match error {
            ureq::Error::Timeout(_) => format!("no reply within {} s", self.timeout.as_secs_f64()),
            other => format!("the server was not reached: {other}"),
        };
        CallError::passing(self.without_key(&what))
    }

    fn refusal(&self, status: StatusCode, after: Option<Duration>, bytes: &[u8]) -> CallError {
        let what = format!("the server answered {}: {}", status.as_u16(), self.shown(bytes));
        // A quota that is used up is refused with the status of a rate that is too high.
        let used_up = String::from_utf8_lossy(bytes).contains("insufficient_quota");
        let passing = status.is_server_error() || [408, 409, 425, 429].contains(&status.as_u16());
        match passing && !used_up {
            true => CallError::Passing { what, after },
            false => CallError::Lasting { status: status.as_u16(), what },
        }
    }

    /// The beginning of a server's words, on one line, without the key.
    pub fn shown(&self, bytes: &[u8]) -> String {
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
