//! A model in this process as a judge: of the letters A, B and C, the one that it finds most probable as the reply.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, ensure};
use candor_environments::{Message, Verdict};

use super::Question;
use super::prompt::Style;
use super::referee::Decision;
use super::reply::LETTERS;
use crate::config::Dtype;
use crate::cuda::Place;
use crate::event::Observer;
use crate::learner::completion_logprobs;
use crate::learner::tree::{Branch, Tree};
use crate::model::Model;
use crate::model_files::load_model;
use crate::tokenizer::Tokenizer;

/// Gives the policy's base model, which exists once.
pub type PolicyBase<'a> = &'a dyn Fn() -> Result<(Arc<Model>, Arc<Tokenizer>)>;

/// A model that is loaded after the environments are.
pub struct Local {
    source: String,
    is_policy: bool,
    loaded: OnceLock<(Arc<Model>, Arc<Tokenizer>)>,
    /// One judgment at a time: a forward pass uses all cores.
    turn: Mutex<()>,
}

impl Local {
    /// The model of a source, or the base of the policy, whose source is given too.
    pub fn new(own: Option<&str>, policy: &str) -> Self {
        let is_policy = own.is_none_or(|own| own == policy);
        let source = own.unwrap_or(policy).to_string();
        Self { source, is_policy, loaded: OnceLock::new(), turn: Mutex::new(()) }
    }

    /// Where the model comes from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Takes the policy's base, or loads its own model.
    ///
    /// # Errors
    /// If that model cannot be loaded, or its context does not hold the instructions.
    pub fn load(&self, policy: PolicyBase, observer: Observer) -> Result<()> {
        let loaded = match self.is_policy {
            true => policy()?,
            false => {
                load_model(&self.source, Place::automatic(Dtype::Auto)?, observer).context("environment.judge.model")?
            }
        };
        let (room, needed) = (loaded.0.architecture.context, prompt_ids("", &[], "", &loaded.1)?.len());
        ensure!(
            needed < room,
            "environment.judge: the judge's instructions are {needed} tokens, the context of {} is {room}; use another model",
            self.source
        );
        // Whoever was faster loaded the same.
        self.loaded.set(loaded).ok();
        Ok(())
    }

    /// Decides by the probabilities of the first reply tokens.
    pub fn decide(&self, question: &Question) -> Decision {
        match self.probabilities(question) {
            Err(error) => Decision::free(Err(format!("{error:#}"))),
            Ok(probabilities) => {
                let best = (0..3).max_by(|&a, &b| probabilities[a].total_cmp(&probabilities[b]));
                let verdict = Verdict::ALL[best.unwrap_or(2)];
                Decision { attempts: 1, p_correct: Some(probabilities[0]), ..Decision::free(Ok(verdict)) }
            }
        }
    }

    /// Of A, B and C among themselves.
    fn probabilities(&self, Question { text, gold, answer }: &Question) -> Result<[f64; 3]> {
        let (model, tokenizer) = self.loaded.get().context("its model is loaded when a run or an evaluation starts")?;
        let prompt_ids = prompt_ids(text, gold, answer, tokenizer)?;
        let branch = |letter: &str| {
            let ids = tokenizer.encode(letter)?;
            Ok(Branch::demonstration(ids))
        };
        let branches = LETTERS.into_iter().map(branch).collect::<Result<Vec<_>>>()?;
        let (rows, room) = (
            prompt_ids.len() + branches.iter().map(|branch| branch.ids.len()).sum::<usize>(),
            model.architecture.context,
        );
        ensure!(
            rows <= room,
            "the question and answer take {rows} tokens with the instructions, the context is {room}"
        );
        let tree = Tree { name: "judge".into(), prompt_ids, branches };
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let logprobs = completion_logprobs(model, None, &[tree], rows, 1.0)?;
        drop(turn);
        let sums: Vec<f64> = logprobs.iter().map(|logprobs_t| logprobs_t.iter().sum()).collect();
        let [a, b, c] = sums.try_into().ok().context("three letters have three probabilities")?;
        let largest = f64::max(a, f64::max(b, c));
        ensure!(largest.is_finite(), "the model gives no probability to A, B or C");
        let shares = [a, b, c].map(|logprob: f64| (logprob - largest).exp());
        let total: f64 = shares.iter().sum();
        Ok(shares.map(|share| share / total))
    }
}

/// The prompt as a chat; where the model knows none, as a text that a letter continues.
fn prompt_ids(question: &str, gold: &[String], answer: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let prompt = Style::Simpleqa.prompt(question, gold, answer, false);
    match tokenizer.has_template() {
        true => tokenizer.prompt_ids(&[Message::user(prompt)]),
        false => tokenizer.text_prompt_ids(&format!("{prompt}\nGrade: ")),
    }
}
