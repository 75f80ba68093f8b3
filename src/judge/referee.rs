//! One judge of a panel: rules, a local model, or a server that is asked until it gives a verdict or up.

use std::thread;
use std::time::{Duration, Instant};

use candor_environments::Verdict;
use candor_environments::lexical::grade;
use sha2::{Digest, Sha256};

use super::chat::{Chat, Reply};
use super::gate::{Gate, Limits};
use super::local::Local;
use super::options::{JudgeKind, JudgeOptions};
use super::prompt::Style;
use super::{Question, reply};
use crate::client::{CallError, Patience};
use crate::random::SplitMix64;
use crate::source::Token;

/// Who judges.
pub enum Referee {
    /// Rules.
    Lexical,
    /// A model in this process.
    Local(Local),
    /// A server.
    Server(Box<Server>),
}

/// What a referee came to.
#[derive(Clone, Debug)]
pub struct Decision {
    /// The grade, or why there is none.
    pub verdict: Result<Verdict, String>,
    /// Requests that it took.
    pub attempts: usize,
    /// The probability of "correct" among the grades, where it is known.
    pub p_correct: Option<f64>,
    /// Tokens of prompts and replies, as far as the server counts.
    pub tokens: [u64; 2],
}

impl Decision {
    /// One that took no request.
    pub fn free(verdict: Result<Verdict, String>) -> Self {
        Self { verdict, attempts: 0, p_correct: None, tokens: [0, 0] }
    }
}

impl Referee {
    /// For checked options; `policy` is the source of the policy's base.
    pub fn new(options: &JudgeOptions, policy: &str, key: Option<Token>, patience: Patience) -> Self {
        match options.kind {
            JudgeKind::Lexical => Self::Lexical,
            JudgeKind::Local => Self::Local(Local::new(options.model.as_deref(), policy)),
            JudgeKind::Openai => Self::Server(Box::new(Server::new(options, key, patience))),
        }
    }

    /// Who this is, in rows and in reports.
    pub fn id(&self) -> String {
        match self {
            Self::Lexical => "lexical".into(),
            Self::Local(local) => format!("local:{}", local.source()),
            Self::Server(server) => server.id.clone(),
        }
    }

    /// Version of its rules or prompt.
    pub fn version(&self) -> u32 {
        match self {
            Self::Lexical => 1,
            Self::Local(_) => Style::Simpleqa.version(),
            Self::Server(server) => server.style.version(),
        }
    }

    /// What a verdict depends on beside the version: a model of the same name on another server is another judge.
    pub fn identity(&self) -> String {
        match self {
            Self::Server(server) => format!("{} at {}", server.id, server.address),
            _ => self.id(),
        }
    }

    /// Questions that it takes at once: a model in this process uses all cores for one.
    pub fn at_once(&self) -> usize {
        match self {
            Self::Lexical | Self::Local(_) => 1,
            Self::Server(server) => server.gate.limits.concurrency,
        }
    }

    /// Whether its verdicts are worth being kept.
    pub fn is_costly(&self) -> bool {
        !matches!(self, Self::Lexical)
    }

    /// Decides.
    pub fn decide(&self, question: &Question) -> Decision {
        match self {
            Self::Lexical => Decision::free(Ok(grade(question.answer, question.gold).0)),
            Self::Local(local) => local.decide(question),
            Self::Server(server) => server.decide(question),
        }
    }
}

/// A server, and how it is treated.
pub struct Server {
    id: String,
    address: String,
    style: Style,
    chat: Chat,
    gate: Gate,
    patience: Patience,
}

impl Server {
    fn new(options: &JudgeOptions, key: Option<Token>, patience: Patience) -> Self {
        let JudgeOptions { style, concurrency, requests_per_minute, tokens_per_minute, .. } = *options;
        let limits = Limits { concurrency, requests_per_minute, tokens_per_minute };
        let model = options.model.as_deref().unwrap_or_default();
        let suffix = if style == Style::Hle { " (hle)" } else { "" };
        Self {
            id: format!("openai:{model}{suffix}"),
            address: options.base_url.clone().unwrap_or_default(),
            style,
            chat: Chat::new(options, key),
            gate: Gate::new(limits, patience),
            patience,
        }
    }

    /// Asks; where the reply cannot be read, once more the same, and then with a reminder of what a reply is. What was said
    /// so far is never shown to the judge again: it is no part of the question.
    fn decide(&self, Question { text, gold, answer }: &Question) -> Decision {
        let (mut decision, mut began) = (Decision::free(Err(String::new())), None);
        for reminded in [false, false, true] {
            if self.is_overdue(began) {
                break;
            }
            let prompt = self.style.prompt(text, gold, answer, reminded);
            match self.ask(&prompt, &mut decision, &mut began) {
                Err(cause) => {
                    decision.verdict = Err(cause);
                    return decision;
                }
                Ok(Reply { text, is_whole, .. }) => match reply::read(&text).filter(|_| is_whole) {
                    Some(verdict) => {
                        decision.verdict = Ok(verdict);
                        return decision;
                    }
                    None => decision.verdict = Err(unread(&text, is_whole)),
                },
            }
        }
        decision
    }

    /// Whether a question has taken so long since its first request that it is given up.
    fn is_overdue(&self, began: Option<Instant>) -> bool {
        began.is_some_and(|began| began.elapsed() > self.patience.give_up)
    }

    /// A reply, however often it takes. Waiting for one's turn is no part of the time that a question may take.
    fn ask(&self, prompt: &str, decision: &mut Decision, began: &mut Option<Instant>) -> Result<Reply, String> {
        let mut last = String::new();
        for attempt in 0..self.patience.tries {
            if attempt > 0 {
                thread::sleep(self.backoff(prompt, attempt));
            }
            if self.is_overdue(*began) {
                break;
            }
            let pass = self.gate.enter(self.chat.estimate(prompt)).map_err(|broken| match last.as_str() {
                "" => broken,
                last => format!("{broken}; before: {last}"),
            })?;
            began.get_or_insert_with(Instant::now);
            decision.attempts += 1;
            match self.chat.ask(prompt) {
                Ok(reply) => {
                    pass.succeeded();
                    decision.tokens = [0, 1].map(|kind| decision.tokens[kind] + reply.tokens[kind]);
                    return Ok(reply);
                }
                // The server is there: it is the request that it does not want.
                Err(CallError::Lasting { what, .. }) => {
                    pass.succeeded();
                    return Err(what);
                }
                Err(CallError::Passing { what, after }) => {
                    pass.failed(after);
                    if after.is_some_and(|after| after > self.patience.give_up) {
                        return Err(format!(
                            "{what}; it wants to be asked again in {} s",
                            after.unwrap_or_default().as_secs()
                        ));
                    }
                    last = what;
                }
            }
        }
        Err(last)
    }

    /// 1, 2, 4, 8 times the first wait, and up to half of that more: requests that failed together must not come back
    /// together. The share is a function of the prompt and the attempt.
    fn backoff(&self, prompt: &str, attempt: u32) -> Duration {
        let digest = Sha256::digest(prompt);
        let seed = digest.iter().take(8).fold(u64::from(attempt), |seed, byte| seed.rotate_left(8) ^ u64::from(*byte));
        let jitter = SplitMix64::new(seed).below(1000) as f64 / 2000.0;
        self.patience.backoff.mul_f64(f64::from(1u32 << (attempt - 1)) * (1.0 + jitter))
    }
}

/// Why a reply is no verdict.
fn unread(text: &str, is_whole: bool) -> String {
    let shown: String = text.chars().take(80).collect();
    match is_whole {
        true => format!("the reply {shown:?} is no verdict"),
        false => format!("the reply {shown:?} was cut at max_tokens"),
    }
}
