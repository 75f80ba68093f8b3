//! One sequence that goes on turn by turn. What a turn has in common with those before it is not computed again, and every
//! token is handed over as it is chosen.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::rows::Rows;
use super::{Generation, Settings, version};
use crate::model::{KeyValueStore, Model};
use crate::policy::Adapter;
use crate::tokenizer::Tokenizer;

/// A model, and the keys and values of what was said so far.
pub struct Conversation {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    store: Option<KeyValueStore>,
    /// The tokens whose keys and values are in the first rows of the store.
    stored: Vec<u32>,
}

impl Conversation {
    /// One in which nothing has been said.
    pub fn new(model: Arc<Model>, tokenizer: Arc<Tokenizer>) -> Self {
        Self { model, tokenizer, store: None, stored: Vec::new() }
    }

    /// Continues a prompt with the completion that a sampler would make of it as its only request. `chosen` is called with all
    /// tokens of the completion so far whenever there is one more. The adapter must be the same in every call.
    ///
    /// # Errors
    /// If the prompt is empty or leaves no room for `max_tokens` more, the device fails, or `chosen` does.
    pub fn answer(
        &mut self,
        prompt_ids: &[u32],
        adapter: Option<&Arc<Adapter>>,
        settings: &Settings,
        chosen: &mut dyn FnMut(&[u32]) -> Result<()>,
    ) -> Result<Generation> {
        let (rows, context) = (prompt_ids.len() + settings.max_tokens, self.model.architecture.context);
        ensure!(!prompt_ids.is_empty(), "the prompt has no tokens");
        ensure!(rows <= context, "{rows} tokens, prompt and completion, exceed the model's context of {context}");
        self.make_room(rows, context)?;
        let store = self.store.as_mut().context("there is room")?;
        let common = self.stored.iter().zip(prompt_ids).take_while(|(stored, id)| stored == id).count();
        // The last token's row predicts the first of the completion, so it is always computed.
        self.stored.truncate(common.min(prompt_ids.len() - 1));
        let mut next = prompt_ids[self.stored.len()..].to_vec();
        let (mut ids, mut behavior_t, mut untempered_t) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            let mut rows = Rows::default();
            rows.push(&next, 0..0, 0..self.stored.len() + next.len(), adapter);
            rows.predicting.push(next.len() as u32 - 1);
            let choices = [settings.choice(0, 0, ids.len())];
            let one = rows.next_tokens(&self.model, store, &choices, settings)?;
            let one = one.first().context("one token was asked for")?;
            self.stored.append(&mut next);
            next.push(one.token);
            ids.push(one.token);
            behavior_t.push(one.logprob);
            untempered_t.push(one.untempered);
            chosen(&ids)?;
            if let Some(finish) = settings.finish(&ids, &self.tokenizer) {
                let version = version(adapter);
                return Ok(Generation { group: 0, rollout: 0, version, ids, behavior_t, untempered_t, finish });
            }
        }
    }

    /// A store of so many rows or more. It doubles, so that a long conversation is computed again only a few times.
    fn make_room(&mut self, rows: usize, context: usize) -> Result<()> {
        if self.store.as_ref().is_none_or(|store| store.rows() < rows) {
            let rows = rows.next_power_of_two().min(context);
            (self.store, self.stored) = (None, Vec::new());
            self.store = Some(self.model.store(rows)?);
        }
        Ok(())
    }
}
