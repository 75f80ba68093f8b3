//! The keys of `[environment.judge]`.

use candor_environments::KeyError;
use candor_environments::keys;
use serde::{Deserialize, Serialize};

use super::prompt::Style;
use crate::client::{MOST_IN_FLIGHT, NO_ADDRESS};
use crate::source::web_address;

/// `[environment.judge]`: who decides whether an answer is right.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JudgeOptions {
    /// Who judges.
    pub kind: JudgeKind,
    /// `openai`: the address that `/chat/completions` is appended to, such as `https://api.openai.com/v1`.
    pub base_url: Option<String>,
    /// `openai`: the model's name on the server; needed there. `local`: another model's source; absent: the policy's own
    /// base, without adapter.
    pub model: Option<String>,
    /// `openai`: the environment variable that holds the key; absent: no key is sent.
    pub key_variable: Option<String>,
    /// `openai`: how it is asked.
    pub style: Style,
    /// `openai`: the longest reply, in tokens; absent: 16, in the style `hle` 1024. A judge that thinks needs more.
    pub max_tokens: Option<u32>,
    /// `openai`: requests in flight at once.
    pub concurrency: usize,
    /// `openai`: requests begun per minute; 0: as many as come.
    pub requests_per_minute: u64,
    /// `openai`: tokens per minute of prompts and replies, estimated; 0: as many as come.
    pub tokens_per_minute: u64,
    /// `openai`: how long one request may take.
    pub timeout_seconds: u64,
    /// `openai`: what a million tokens of prompts and of replies cost, for `candor judge` to add up.
    pub dollars_per_million_tokens: [f64; 2],
    /// `local` and `openai`: the file that verdicts are kept in; absent: `judge/verdicts.jsonl` in the cache of sources.
    pub cache: Option<String>,
    /// Another judge, with keys as these, that is asked where this one gives no verdict.
    pub second: Option<Box<JudgeOptions>>,
}

/// Who judges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JudgeKind {
    /// Rules, offline: for tests, and for data with short answers and aliases.
    #[default]
    Lexical,
    /// A model in this process, by its probabilities of A, B and C.
    Local,
    /// A server that speaks OpenAI's chat protocol.
    Openai,
}

impl Default for JudgeOptions {
    fn default() -> Self {
        Self {
            kind: JudgeKind::Lexical,
            base_url: None,
            model: None,
            key_variable: None,
            style: Style::Simpleqa,
            max_tokens: None,
            concurrency: 100,
            requests_per_minute: 0,
            tokens_per_minute: 0,
            timeout_seconds: 60,
            dollars_per_million_tokens: [0.0, 0.0],
            cache: None,
            second: None,
        }
    }
}

/// A request that takes longer would outlast the run's patience with its retries.
const LONGEST_TIMEOUT: u64 = 100;

/// About what one request needs: fewer tokens per minute would never let one pass.
const LEAST_TOKENS: u64 = 4000;

impl JudgeOptions {
    /// Reads a judge's table.
    ///
    /// # Errors
    /// If a key is unknown, has no effect with this kind, is missing, or holds what cannot work.
    pub fn of(table: &toml::Table) -> Result<Self, KeyError> {
        let options: Self = keys::typed(table.clone())?;
        options.check(table)?;
        if let Some(second) = table.get("second").and_then(toml::Value::as_table) {
            let refused = ["second", "cache"].into_iter().find(|key| second.contains_key(*key));
            let problem = match refused {
                Some(key) => Err(KeyError::new(key, "belongs to the first judge only; remove it")),
                None => options.second.as_ref().map_or(Ok(()), |options| options.check(second)),
            };
            problem.map_err(|problem| problem.within("second"))?;
        }
        Ok(options)
    }

    fn check(&self, table: &toml::Table) -> Result<(), KeyError> {
        let problem = |key: &str, text: String| Err(KeyError::new(key, text));
        let (kind, effective): (_, &[&str]) = match self.kind {
            JudgeKind::Lexical => ("lexical", &["kind", "second"]),
            JudgeKind::Local => ("local", &["kind", "model", "cache", "second"]),
            JudgeKind::Openai => return self.check_server(),
        };
        match table.keys().find(|key| !effective.contains(&key.as_str())) {
            Some(key) => problem(key, format!("has no effect with kind = \"{kind}\"; remove it")),
            None if kind == "lexical" && self.second.is_some() => {
                problem("second", "is never asked, as kind = \"lexical\" always gives a verdict; remove it".into())
            }
            None => Ok(()),
        }
    }

    fn check_server(&self) -> Result<(), KeyError> {
        let problem = |key: &str, text: String| Err(KeyError::new(key, text));
        let missing = |key| KeyError::new(key, "is missing, and kind = \"openai\" needs it; add it");
        let address = self.base_url.as_ref().ok_or_else(|| missing("base_url"))?;
        if web_address(address).is_none() {
            return problem("base_url", NO_ADDRESS.into());
        }
        self.model.as_ref().filter(|model| !model.trim().is_empty()).ok_or_else(|| missing("model"))?;
        let counts = [
            ("max_tokens", u64::from(self.max_tokens.unwrap_or(self.style.max_tokens())), 1, 1 << 16),
            ("concurrency", self.concurrency as u64, 1, MOST_IN_FLIGHT as u64),
            ("timeout_seconds", self.timeout_seconds, 1, LONGEST_TIMEOUT),
        ];
        if let Some((key, value, least, most)) =
            counts.into_iter().find(|(_, value, least, most)| !(least..=most).contains(&value))
        {
            return problem(key, format!("{value} is not between {least} and {most}"));
        }
        if (1..LEAST_TOKENS).contains(&self.tokens_per_minute) {
            let text = format!(
                "{} would hardly let a request pass; use at least {LEAST_TOKENS}, or 0",
                self.tokens_per_minute
            );
            return problem("tokens_per_minute", text);
        }
        if !self.dollars_per_million_tokens.iter().all(|price| price.is_finite() && *price >= 0.0) {
            return problem("dollars_per_million_tokens", "must be two finite numbers, at least 0".into());
        }
        Ok(())
    }
}
