//! Judges: who decides whether a free-form answer is right. A panel has one or two referees and a cache; what it asks and
//! how often is nobody else's business.
//!
//! * [`options`]: the keys of `[environment.judge]`
//! * [`prompt`], [`reply`]: what a judge is asked, and what it may say
//! * [`chat`], [`gate`]: one question to a server; how many, how fast, and when none at all
//! * [`local`]: a model in this process
//! * [`referee`]: one judge, asked until it gives a verdict or up
//! * [`cache`]: verdicts that somebody has paid for
//! * [`answers`], [`agreement`]: `candor judge`: a file of answers graded, and compared with grades by hand

pub mod agreement;
pub mod answers;
pub mod cache;
pub mod chat;
pub mod gate;
pub mod local;
pub mod options;
pub mod prompt;
pub mod referee;
pub mod reply;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use candor_environments::{Judge, Judgment};
use tracing::{debug, warn};

use crate::client::{Patience, Variable, key_in};
use crate::event::{Event, Observer};
use crate::source::Cache as Sources;
use cache::{Cache, Kept};
use local::PolicyBase;
use options::JudgeOptions;
use referee::{Decision, Referee};

/// What a judge is given: never the stated confidence, never any reasoning.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The question.
    pub text: &'a str,
    /// The right answers, any of which will do.
    pub gold: &'a [String],
    /// The answer to be graded.
    pub answer: &'a str,
}

/// A judge and perhaps a second one, with the verdicts that were given before.
pub struct Panel {
    referees: Vec<Referee>,
    cache: Option<Cache>,
    /// Questions that are with a referee now, by key: whoever asks the same waits for that decision.
    pending: Mutex<HashMap<String, Arc<Pending>>>,
    /// What was done so far.
    pub totals: Totals,
}

/// Counts of a panel's work.
#[derive(Debug, Default)]
pub struct Totals {
    /// Requests.
    pub requests: AtomicU64,
    /// Tokens of prompts and of replies, as far as servers count.
    pub tokens: [AtomicU64; 2],
}

/// A decision that is being made.
#[derive(Default)]
struct Pending {
    decision: Mutex<Option<Decision>>,
    made: Condvar,
}

/// Longer than any referee takes with its retries.
const LONGEST: Duration = Duration::from_secs(3600);

impl Panel {
    /// The judge of a config's table. `policy` is the source of the policy's base. The key is what the environment variable
    /// that the table names holds, and is kept nowhere else.
    ///
    /// # Errors
    /// A [`KeyError`] within the table; or if the cache cannot be opened.
    pub fn of(
        options: &JudgeOptions,
        policy: &str,
        patience: Patience,
        variable: Variable,
        observer: Observer,
    ) -> Result<Self> {
        let key_of =
            |options: &JudgeOptions| options.key_variable.as_deref().map(|name| key_in(name, variable)).transpose();
        let mut referees = vec![Referee::new(options, policy, key_of(options)?, patience)];
        if let Some(second) = &options.second {
            let key = key_of(second).map_err(|problem| problem.within("second"))?;
            referees.push(Referee::new(second, policy, key, patience));
        }
        let cache = match referees.iter().any(Referee::is_costly) {
            true => Some(Cache::open(&cache_file(options, variable)?)?),
            false => None,
        };
        if let Some(cache) = cache.as_ref().filter(|cache| cache.damaged() > 0) {
            let (file, damaged) = (cache.path.display(), cache.damaged());
            observer(Event::Line(&format!("{file}: passed over {damaged} damaged lines")));
        }
        Ok(Self { referees, cache, pending: Mutex::default(), totals: Totals::default() })
    }

    /// Questions that are worth being asked at once.
    pub fn at_once(&self) -> usize {
        self.referees.iter().map(Referee::at_once).max().unwrap_or(1)
    }

    /// Gives local judges their model: the policy's, or their own.
    ///
    /// # Errors
    /// If a model cannot be loaded.
    pub fn load(&self, policy: PolicyBase, observer: Observer) -> Result<()> {
        let locals = self.referees.iter().filter_map(|referee| match referee {
            Referee::Local(local) => Some(local),
            _ => None,
        });
        locals.into_iter().try_for_each(|local| local.load(policy, observer))
    }

    /// One referee's decision: kept, being made, or made now. Whether it cost nothing stands beside it.
    fn decide(&self, referee: &Referee, question: &Question) -> (Decision, bool) {
        let Some(cache) = self.cache.as_ref().filter(|_| referee.is_costly()) else {
            return (referee.decide(question), false);
        };
        let key = cache::key(&referee.identity(), referee.version(), question);
        let pending = {
            let mut all = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            // Under the lock: a decision is kept before it is no longer pending.
            if let Some(Kept { verdict, p_correct }) = cache.get(&key) {
                return (Decision { p_correct, ..Decision::free(Ok(verdict)) }, true);
            }
            if let Some(pending) = all.get(&key).cloned() {
                drop(all);
                return (pending.wait(), true);
            }
            all.entry(key.clone()).or_default().clone()
        };
        let leader = Leader { panel: self, key: &key, pending: &pending };
        let decision = referee.decide(question);
        if let Ok(verdict) = decision.verdict {
            let kept = Kept { verdict, p_correct: decision.p_correct };
            if let Err(error) = cache.put(&key, &referee.id(), referee.version(), question, kept) {
                warn!("{error:#}");
            }
        }
        *pending.decision.lock().unwrap_or_else(PoisonError::into_inner) = Some(decision.clone());
        drop(leader);
        (decision, false)
    }
}

impl Judge for Panel {
    fn judge(&self, question: &str, gold: &[String], answer: &str) -> Judgment {
        let question = Question { text: question, gold, answer };
        let mut judgment = Judgment {
            id: String::new(),
            prompt_version: 0,
            verdict: Err(String::new()),
            cached: false,
            attempts: 0,
            p_correct: None,
        };
        let mut causes = Vec::new();
        for referee in &self.referees {
            let (decision, cached) = self.decide(referee, &question);
            (judgment.id, judgment.prompt_version) = (referee.id(), referee.version());
            (judgment.cached, judgment.p_correct) = (cached && decision.verdict.is_ok(), decision.p_correct);
            if !cached || decision.verdict.is_err() {
                judgment.attempts += decision.attempts;
            }
            if !cached {
                self.totals.requests.fetch_add(decision.attempts as u64, Ordering::Relaxed);
                for (total, tokens) in self.totals.tokens.iter().zip(decision.tokens) {
                    total.fetch_add(tokens, Ordering::Relaxed);
                }
            }
            match decision.verdict {
                Ok(verdict) => {
                    judgment.verdict = Ok(verdict);
                    return judgment;
                }
                Err(cause) => {
                    debug!(judge = judgment.id, cause, "no verdict");
                    causes.push(if self.referees.len() > 1 { format!("{}: {cause}", judgment.id) } else { cause });
                }
            }
        }
        judgment.verdict = Err(causes.join("; "));
        judgment
    }
}

/// Ends a pending decision, also where the referee panicked.
struct Leader<'a> {
    panel: &'a Panel,
    key: &'a str,
    pending: &'a Pending,
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        self.panel.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(self.key);
        let mut decision = self.pending.decision.lock().unwrap_or_else(PoisonError::into_inner);
        decision.get_or_insert_with(|| Decision::free(Err("the judge panicked".into())));
        self.pending.made.notify_all();
    }
}

impl Pending {
    fn wait(&self) -> Decision {
        let decision = self.decision.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.made.wait_timeout_while(decision, LONGEST, |decision| decision.is_none());
        let decision = waited.unwrap_or_else(PoisonError::into_inner).0.clone();
        decision.unwrap_or_else(|| Decision::free(Err("the same question is with the judge for too long".into())))
    }
}

/// Where verdicts are kept.
fn cache_file(options: &JudgeOptions, variable: Variable) -> Result<PathBuf> {
    match &options.cache {
        Some(file) => Ok(PathBuf::from(file)),
        None => Ok(Sources::located_by(variable)?.folder.join("judge/verdicts.jsonl")),
    }
}
