//! The sampler: prompts in, completions out, each handed over as soon as it ends.
//!
//! * [`local`]: continuous batching in this process, on the learner's own copy of the base weights
//! * [`parallel`]: several of these side by side
//! * [`conversation`]: one sequence that goes on turn by turn, each token handed over at once
//! * [`remote`]: on servers, each one an [`endpoint`] with a [`standing`]; [`completions`] is what is said to them and believed
//!   of them, [`publication`] how adapters reach them

pub mod completions;
pub mod conversation;
pub mod endpoint;
pub mod local;
pub mod parallel;
pub mod publication;
pub mod remote;
mod rows;
pub mod standing;

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, ensure};
use candor_environments::{Completion, Finish};

use crate::config::{Config, Evaluation, Sampling};
use crate::evaluation::token_confidence;
use crate::ops::head::Choice;
use crate::policy::Adapter;
use crate::random::{self, Purpose};
use crate::tokenizer::Tokenizer;

/// A prompt to continue several times.
#[derive(Clone, Debug)]
pub struct Request {
    /// What errors call it: the task's id.
    pub name: String,
    /// Tokens of the prompt.
    pub prompt_ids: Vec<u32>,
    /// Completions to sample.
    pub rollouts: usize,
}

/// Refuses what a model with this context could not continue, before anything is.
fn check(requests: &[Request], context: usize, settings: &Settings) -> Result<()> {
    for Request { name, prompt_ids, rollouts } in requests {
        let (prompt, longest) = (prompt_ids.len(), settings.max_tokens);
        ensure!(prompt > 0, "{name}: the prompt has no tokens");
        ensure!(*rollouts > 0, "{name}: no completion is asked for");
        ensure!(
            prompt + longest <= context,
            "{name}: a prompt of {prompt} tokens leaves no room for {longest}, the model's context is {context}"
        );
    }
    Ok(())
}

/// How completions are sampled.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Tokens after which a completion is cut.
    pub max_tokens: usize,
    /// The softmax temperature; 0 takes the most likely token.
    pub temperature: f64,
    /// Strings that end a completion, beside the model's own end tokens.
    pub stop: Vec<String>,
    /// The run's seed; with the step, group, rollout and position it decides every random number.
    pub seed: u64,
    /// The step that is being sampled for.
    pub step: u64,
}

impl Settings {
    /// How a step's training rollouts are sampled.
    pub fn training(config: &Config, step: u64) -> Self {
        let Sampling { max_tokens, temperature, ref stop, .. } = config.sampling;
        Self { max_tokens, temperature, stop: stop.clone(), seed: config.seed, step }
    }

    /// How held-out tasks are completed after `step` steps.
    pub fn evaluation(config: &Config, step: u64) -> Self {
        let Evaluation { max_tokens, temperature, .. } = config.evaluation;
        Self { max_tokens, temperature, ..Self::training(config, step) }
    }

    /// Greedy, or the random number that belongs to this position of a completion.
    fn choice(&self, group: usize, rollout: usize, position: usize) -> Choice {
        if self.temperature == 0.0 {
            return Choice::Greedy;
        }
        let counters = [self.step, group as u64, rollout as u64, position as u64];
        Choice::Sample(random::uniform(random::key(self.seed, Purpose::Sampling, &counters)))
    }

    /// Why a completion ends after its last token, if it does.
    fn finish(&self, ids: &[u32], tokenizer: &Tokenizer) -> Option<Finish> {
        let ended = ids.last().is_some_and(|id| tokenizer.end_tokens().contains(id));
        if ended || (!self.stop.is_empty() && self.stopped(&tokenizer.decode(ids)).is_some()) {
            return Some(Finish::Stop);
        }
        (ids.len() >= self.max_tokens).then_some(Finish::Length)
    }

    /// Where the first stop string in a text begins.
    fn stopped(&self, text: &str) -> Option<usize> {
        self.stop.iter().filter_map(|stop| text.find(stop.as_str())).min()
    }
}

/// One sampled completion.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// Index of its request.
    pub group: usize,
    /// Index within the request.
    pub rollout: usize,
    /// Optimizer steps in the adapter that sampled it; 0 for the base model.
    pub version: u64,
    /// Its tokens, the end token included if there is one.
    pub ids: Vec<u32>,
    /// Log-probability of each under the full softmax at the sampling temperature.
    pub behavior_t: Vec<f32>,
    /// Log-probability of each at temperature 1.
    pub untempered_t: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

impl Generation {
    /// Its text, without what ended it.
    pub fn completion(&self, tokenizer: &Tokenizer, settings: &Settings) -> Completion {
        let mut text = tokenizer.decode(&self.ids);
        text.truncate(settings.stopped(&text).unwrap_or(text.len()));
        Completion { text, finish: self.finish, num_tokens: self.ids.len(), max_tokens: settings.max_tokens }
    }

    /// The confidence that the model's own probabilities state in the tokens that spell these bytes of its text.
    pub fn answer_confidence(&self, bytes: Range<usize>, tokenizer: &Tokenizer) -> Option<f64> {
        let logprobs_t: Vec<f64> = self.untempered_t.iter().copied().map(f64::from).collect();
        answer_confidence(&self.ids, &logprobs_t, bytes, tokenizer)
    }

    /// The mean log-probability of its tokens at temperature 1.
    pub fn mean_logprob(&self) -> f64 {
        self.untempered_t.iter().copied().map(f64::from).sum::<f64>() / self.untempered_t.len() as f64
    }
}

/// The [`token_confidence`] of the tokens that spell these bytes of a completion's text: special tokens and the end of a turn are no
/// part of an answer.
pub fn answer_confidence(ids: &[u32], logprobs_t: &[f64], bytes: Range<usize>, tokenizer: &Tokenizer) -> Option<f64> {
    let (_, ranges) = tokenizer.token_ranges(ids);
    let spells = |(id, range): (&u32, &Range<usize>)| {
        !range.is_empty() && range.start < bytes.end && bytes.start < range.end && !tokenizer.end_tokens().contains(id)
    };
    let answer =
        ids.iter().zip(&ranges).zip(logprobs_t).filter_map(|(token, logprob)| spells(token).then_some(*logprob));
    token_confidence(&answer.collect::<Vec<_>>())
}

/// Nobody wants what is being done any more.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Where a sampler gets its policy while it works.
pub trait PolicyFeed: Sync {
    /// The newest adapter that is published; `None` is the base model.
    fn newest(&self) -> Option<Arc<Adapter>>;

    /// Whether nobody wants the rest of the completions any more.
    fn stopped(&self) -> bool;
}

/// One policy for all, whose completions are wanted to the last.
impl PolicyFeed for Option<Arc<Adapter>> {
    fn newest(&self) -> Option<Arc<Adapter>> {
        self.clone()
    }

    fn stopped(&self) -> bool {
        false
    }
}

/// Optimizer steps in an adapter; 0 for the base model.
pub fn version(adapter: Option<&Arc<Adapter>>) -> u64 {
    adapter.map_or(0, |adapter| adapter.version)
}

/// What continues prompts.
pub trait Sampler: Send {
    /// Continues every request with the base model plus an adapter, and calls `finished` for each completion as it ends. A
    /// request is admitted with the adapter that is the newest then, and keeps it for all of its completions. Whether to stop is
    /// asked before every forward call and during every wait.
    ///
    /// # Errors
    /// [`Interrupted`] when it is to stop; or if a prompt leaves no room for a completion, the device fails, or `finished`
    /// fails: that error is passed on.
    fn sample(
        &mut self,
        requests: &[Request],
        policy: &dyn PolicyFeed,
        settings: &Settings,
        finished: &mut dyn FnMut(Generation) -> Result<()>,
    ) -> Result<()>;
}
