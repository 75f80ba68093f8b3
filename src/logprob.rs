//! `candor logprob`: the log-probability that a model gives to each token of completions that are already there.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use candor_environments::rows::field;
use serde::Serialize;

use crate::config::{Batch, Dtype};
use crate::cuda::Place;
use crate::event::{Event, Observer};
use crate::learner::completion_logprobs;
use crate::learner::tree::{Branch, Tree};
use crate::model_files::{ModelFiles, Policy};
use crate::prompts::{Prompt, check_room};
use crate::sampler::answer_confidence;
use crate::tokenizer::Tokenizer;

/// Rows that are computed before the next are begun; how they share forward calls depends on their lengths.
const ROWS: usize = 64;

/// Completions that are ready to be looked at.
pub struct Logprob {
    policy: Policy,
    rows: Vec<Tree>,
}

/// What the model says of one completion, untempered.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scored {
    /// The completion's tokens, with the end of the turn where it is an assistant's.
    pub token_ids: Vec<u32>,
    /// The natural logarithm of each one's probability.
    pub logprobs: Vec<f32>,
    /// Their sum.
    pub sum: f64,
    /// Their mean.
    pub mean: f64,
    /// The geometric mean of the probabilities of the tokens that are text, or null if there is none.
    pub confidence: Option<f64>,
}

impl Logprob {
    /// Reads a file of rows and loads the model. A completion is encoded apart from its prompt; one that answers a chat is
    /// followed by the token that ends a turn, which training is about too.
    ///
    /// # Errors
    /// If a row, named by file and line, the model or the adapter is not what it should be.
    pub fn prepare(
        source: &str,
        file: &Path,
        adapter: Option<&Path>,
        dtype: Dtype,
        observer: Observer,
    ) -> Result<Self> {
        let place = Place::automatic(dtype).context("--dtype")?;
        let model = ModelFiles::open(source, observer)?.computed_by(place)?;
        let rows = Prompt::read(file, &model, |Prompt { row, ids: prompt_ids, is_chat }| {
            let mut ids = model.tokenizer.encode(&field::<String>(&row, "completion")?)?;
            ids.extend(model.tokenizer.end_of_turn().filter(|_| is_chat));
            ensure!(!ids.is_empty(), "field `completion`: there are no tokens");
            check_room(&model, prompt_ids.len(), ids.len())?;
            Ok(Tree { name: file.display().to_string(), prompt_ids, branches: vec![Branch::demonstration(ids)] })
        })?;
        Ok(Self { policy: model.policy(adapter, &Device::Cpu, observer)?, rows })
    }

    /// Computes all rows and hands each to `scored`, in order.
    ///
    /// # Errors
    /// If the device fails, or `scored` does.
    pub fn run(&self, observer: Observer, scored: &mut dyn FnMut(Scored) -> Result<()>) -> Result<()> {
        let Policy { model, tokenizer, adapter } = &self.policy;
        let (mut done, total) = (0, self.rows.len());
        let longest = self.rows.iter().map(|row| row.prompt_ids.len() + row.branches[0].ids.len()).max();
        let budget = Batch::default().micro_tokens.max(longest.unwrap_or(0));
        for rows in self.rows.chunks(ROWS) {
            let logprobs = completion_logprobs(model, adapter.as_deref(), rows, budget, 1.0)?;
            for (row, logprobs) in rows.iter().zip(logprobs) {
                scored(Scored::new(row.branches[0].ids.clone(), &logprobs, tokenizer))?;
            }
            done += rows.len();
            observer(Event::Progress { what: "completions", done, total });
        }
        Ok(())
    }
}

impl Scored {
    fn new(token_ids: Vec<u32>, logprobs_t: &[f64], tokenizer: &Tokenizer) -> Self {
        let sum: f64 = logprobs_t.iter().sum();
        Self {
            confidence: answer_confidence(&token_ids, logprobs_t, 0..usize::MAX, tokenizer),
            // They were computed in f32; as such they are short to write.
            logprobs: logprobs_t.iter().map(|&logprob| logprob as f32).collect(),
            sum,
            mean: sum / logprobs_t.len() as f64,
            token_ids,
        }
    }
}
