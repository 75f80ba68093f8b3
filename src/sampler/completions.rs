//! The wire format of completions that a server samples, `/v1/completions` as vLLM speaks it: token ids there and back, and
//! what has to be true of a reply before anything is learned from it.

use anyhow::{Context, Result, bail, ensure};
use candor_environments::Finish;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Request, Settings};
use crate::random::{self, Purpose};
use crate::tokenizer::Tokenizer;

/// What a server sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The tokens, the end token included if there is one.
    pub ids: Vec<u32>,
    /// Log-probability of each under the full softmax at temperature 1.
    pub logprobs_t: Vec<f32>,
    /// Why it ended, as the server says.
    pub finish: Finish,
}

/// Who asked, and what a reply is measured by.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    /// The prompt.
    pub request: &'a Request,
    /// How it is continued.
    pub settings: &'a Settings,
    /// Turns ids into text; its end tokens end completions.
    pub tokenizer: &'a Tokenizer,
    /// Rows of the embedding: every id is below.
    pub vocabulary: usize,
}

#[derive(Deserialize)]
struct Body {
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    text: String,
    finish_reason: Option<String>,
    token_ids: Option<Vec<u32>>,
    prompt_token_ids: Option<Vec<u32>>,
    logprobs: Option<Logprobs>,
}

#[derive(Deserialize)]
struct Logprobs {
    token_logprobs: Vec<Option<f64>>,
}

/// A log-probability of 0 may be computed as this much more.
const ROUNDING: f64 = 1e-5;
/// Servers write less than this where the probability is 0, and nobody samples that.
const LEAST: f64 = -1000.0;

impl Asked<'_> {
    /// The body of the request for one completion by `model`. Everything that decides how tokens are drawn is said: a server's
    /// defaults are its own, and the model's files have theirs.
    pub fn body(&self, model: &str, rollout: (usize, usize)) -> Value {
        let Settings { max_tokens, temperature, stop, seed, step } = self.settings;
        let counters = [*step, rollout.0 as u64, rollout.1 as u64];
        json!({
            "model": model,
            "prompt": self.request.prompt_ids,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            // Some servers' seeds have 32 bits, with a sign.
            "seed": random::key(*seed, Purpose::Sampling, &counters) >> 33,
            "stop": stop,
            "stop_token_ids": self.tokenizer.end_tokens(),
            "logprobs": 1,
            "return_token_ids": true,
            "stream": false,
        })
    }

    /// The most bytes that an honest reply takes: some for the prompt's ids, more for each token with its alternatives.
    pub fn longest_reply(&self) -> u64 {
        (1 << 16) + 16 * self.request.prompt_ids.len() as u64 + 1024 * self.settings.max_tokens as u64
    }

    /// Reads a reply.
    ///
    /// # Errors
    /// If anything about it is not as asked for: then it is not known from which distribution its tokens came, or which they are.
    pub fn read(&self, bytes: &[u8]) -> Result<Sampled> {
        let body: Body = serde_json::from_slice(bytes).context("the reply is not a completion")?;
        let [choice] = <[Choice; 1]>::try_from(body.choices)
            .map_err(|choices| anyhow::anyhow!("{} completions for one", choices.len()))?;
        let Choice { text, finish_reason, token_ids, prompt_token_ids, logprobs } = choice;
        let ids = token_ids.context(
            "the reply has no token_ids; text is never tokenized again to be trained on, so the server must return the ids that \
             it sampled (vLLM does, for return_token_ids)",
        )?;
        let prompt = prompt_token_ids.is_none_or(|ids| ids == self.request.prompt_ids);
        ensure!(
            prompt,
            "the server continued another prompt than it was given; does it add tokens to the ids that it gets?"
        );
        let logprobs = logprobs.context("the reply has no logprobs")?.token_logprobs;
        ensure!(logprobs.len() == ids.len(), "{} log-probabilities for {} tokens", logprobs.len(), ids.len());
        let beyond = ids.iter().find(|id| **id as usize >= self.vocabulary);
        ensure!(beyond.is_none(), "token {} is outside the vocabulary of {}", beyond.unwrap_or(&0), self.vocabulary);
        let checked = |(index, logprob): (usize, Option<f64>)| match logprob {
            Some(logprob) if (LEAST..=ROUNDING).contains(&logprob) => Ok(logprob as f32),
            Some(logprob) => bail!("the log-probability of token {index} is {logprob}"),
            None => bail!("the log-probability of token {index} is missing"),
        };
        let logprobs_t = logprobs.into_iter().enumerate().map(checked).collect::<Result<Vec<f32>>>()?;
        let finish = self.finish(&ids, finish_reason.as_deref())?;
        self.check_text(&ids, &text)?;
        Ok(Sampled { ids, logprobs_t, finish })
    }

    /// Why the completion ended, which is what the server says if its tokens say so too.
    fn finish(&self, ids: &[u32], reason: Option<&str>) -> Result<Finish> {
        let finish = match reason {
            Some("stop") => Finish::Stop,
            Some("length") => Finish::Length,
            other => bail!("the finish reason is {}", other.map_or("missing".into(), |reason| format!("{reason:?}"))),
        };
        let (settings, tokenizer) = (self.settings, self.tokenizer);
        let (_, before) = ids.split_last().context("the completion has no tokens")?;
        let went_on = |id: &u32| tokenizer.end_tokens().contains(id);
        ensure!(
            ids.len() <= settings.max_tokens
                && !before.iter().any(went_on)
                && (before.is_empty() || settings.finish(before, tokenizer).is_none()),
            "the completion goes on after its end"
        );
        let found = settings.finish(ids, tokenizer);
        ensure!(
            found == Some(finish),
            "the server ended the completion with {:?} after {} tokens, the last of which is {}: by its tokens {}",
            reason.unwrap_or_default(),
            ids.len(),
            ids[ids.len() - 1],
            match found {
                None => "it would have gone on",
                Some(Finish::Stop) => "it stopped by itself",
                Some(Finish::Length) => "it was cut at max_tokens",
            }
        );
        Ok(finish)
    }

    /// Whether a server means the same by its ids. Texts are compared where both sides spell them alike: but for spaces, not
    /// around special tokens, nor where bytes are no characters.
    fn check_text(&self, ids: &[u32], text: &str) -> Result<()> {
        let spelled: &[u32] = match ids.split_last() {
            Some((last, before)) if self.tokenizer.is_special(*last) => before,
            _ => ids,
        };
        let mut ours = self.tokenizer.decode(spelled);
        ours.truncate(self.settings.stopped(&ours).unwrap_or(ours.len()));
        let comparable = !ours.contains('\u{fffd}') && !spelled.iter().any(|id| self.tokenizer.is_special(*id));
        let letters = |text: &str| text.chars().filter(|one| !one.is_whitespace()).collect::<String>();
        ensure!(
            !comparable || letters(&ours) == letters(text),
            "the server spells the tokens {text:?}, this model's tokenizer {ours:?}: the two are not the same"
        );
        Ok(())
    }
}
