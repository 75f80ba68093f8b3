//! Continuous batching: a group's prompt is computed once and shared, finished rows make room at once.
//!
//! Which rows share a forward call depends only on the requests and on the lengths of the completions, never on time.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::rows::Rows;
use super::{Generation, Interrupted, PolicyFeed, Request, Sampler, Settings, check, version};
use crate::model::{KeyValueStore, Model};
use crate::ops::head::Choice;
use crate::ops::keys::padded;
use crate::policy::Adapter;
use crate::tokenizer::Tokenizer;

/// Tokens whose keys and values are kept at once, unless one group alone needs more.
const STORED_TOKENS: usize = 16 * 1024;
/// Prompt tokens computed in one forward call, unless one prompt alone is longer.
const PREFILL_TOKENS: usize = 2048;

/// Samples in this process.
pub struct LocalSampler {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    /// Kept between calls: fresh memory costs more than it should.
    store: Option<KeyValueStore>,
    /// The first group that is sampled, and the distance to each next one.
    part: (usize, usize),
}

/// A completion being sampled.
struct Branch {
    group: usize,
    rollout: usize,
    /// What its group was admitted with.
    adapter: Option<Arc<Adapter>>,
    /// Rows of the store that hold the prompt, and those reserved for this completion.
    prompt: Range<usize>,
    own: Range<usize>,
    ids: Vec<u32>,
    behavior_t: Vec<f32>,
    untempered_t: Vec<f32>,
}

impl Rows {
    /// Adds the last token of every running branch, and says which row predicts each branch's next one: that token's row,
    /// or, for branches that were just admitted, the last row of their prompt.
    fn predict(&mut self, branches: &[Branch], running: usize) -> Result<()> {
        for branch in &branches[..running] {
            self.predicting.push(self.ids.len() as u32);
            let last = branch.ids.last().context("a running branch has a token")?;
            self.push(
                &[*last],
                branch.prompt.clone(),
                branch.own.start..branch.own.start + branch.ids.len(),
                branch.adapter.as_ref(),
            );
        }
        for branch in &branches[running..] {
            let prompt = self.spans.iter().find(|span| span.own == branch.prompt);
            let prompt = prompt.context("an admitted branch has its prompt in the call")?;
            self.predicting.push(prompt.queries.end as u32 - 1);
        }
        Ok(())
    }
}

impl LocalSampler {
    /// A sampler over a loaded model.
    pub fn new(model: Arc<Model>, tokenizer: Arc<Tokenizer>) -> Self {
        Self::of_part(model, tokenizer, 0, 1)
    }

    /// A sampler of every group whose index is `part` modulo `parts`.
    pub(super) fn of_part(model: Arc<Model>, tokenizer: Arc<Tokenizer>, part: usize, parts: usize) -> Self {
        Self { model, tokenizer, store: None, part: (part, parts) }
    }

    /// Makes sure that the store holds what the requests need, within the limit.
    fn prepare_store(&mut self, requests: &[Request], settings: &Settings) -> Result<KeyValueStore> {
        let (first, distance) = self.part;
        let own = requests.iter().skip(first).step_by(distance);
        let sizes = own.map(|request| group_rows(request.prompt_ids.len(), request.rollouts, settings));
        let rows = stored_rows(sizes, self.model.stored_tokens(), distance);
        match self.store.take().filter(|store| store.rows() >= rows) {
            Some(mut store) => {
                store.restrict(rows);
                Ok(store)
            }
            None => self.model.store(rows),
        }
    }
}

/// Rows of the store that a whole group needs: prompt and completions start with a block each.
pub fn group_rows(prompt_tokens: usize, rollouts: usize, settings: &Settings) -> usize {
    padded(prompt_tokens) + rollouts * padded(settings.max_tokens)
}

/// Rows of the store for groups of these sizes: all at once, within the limit, which a GPU has for all its samplers.
pub fn stored_rows(groups: impl Iterator<Item = usize> + Clone, room: Option<usize>, samplers: usize) -> usize {
    let limit = room.map_or(STORED_TOKENS, |room| room / samplers);
    groups.clone().sum::<usize>().min(limit).max(groups.max().unwrap_or(0))
}

/// How many completions of one prompt the store holds together; one more than it holds is always possible.
pub fn most_rollouts(prompt_tokens: usize, settings: &Settings) -> usize {
    (STORED_TOKENS.saturating_sub(padded(prompt_tokens)) / padded(settings.max_tokens)).max(1)
}

/// The most rows of one forward call over groups with these prompts: prompts being read beside a token of every other rollout.
pub fn forward_rows(prompt_tokens: &[usize], rollouts: usize) -> usize {
    let prompts = prompt_tokens.iter().sum::<usize>().min(PREFILL_TOKENS);
    prompts.max(prompt_tokens.iter().copied().max().unwrap_or(0)) + prompt_tokens.len() * rollouts
}

/// Admits waiting groups while their rows fit: their prompts become rows of the next call, their completions branches of the
/// policy that is the newest now.
fn admit(
    waiting: &mut VecDeque<usize>,
    requests: &[Request],
    (policy, settings): (&dyn PolicyFeed, &Settings),
    store: &mut KeyValueStore,
    rows: &mut Rows,
    branches: &mut Vec<Branch>,
) {
    while let Some(&group) = waiting.front() {
        let request = &requests[group];
        if !rows.ids.is_empty() && rows.ids.len() + request.prompt_ids.len() > PREFILL_TOKENS {
            return;
        }
        let Some(taken) = store.take(group_rows(request.prompt_ids.len(), request.rollouts, settings)) else { return };
        waiting.pop_front();
        let prompt = taken.start..taken.start + request.prompt_ids.len();
        let adapter = policy.newest();
        rows.push(&request.prompt_ids, 0..0, prompt.clone(), adapter.as_ref());
        branches.extend((0..request.rollouts).map(|rollout| {
            let start = padded(prompt.end) + rollout * padded(settings.max_tokens);
            let own = start..start + settings.max_tokens;
            let (ids, behavior_t, untempered_t) = (Vec::new(), Vec::new(), Vec::new());
            let (adapter, prompt) = (adapter.clone(), prompt.clone());
            Branch { group, rollout, adapter, prompt, own, ids, behavior_t, untempered_t }
        }));
    }
}

impl Sampler for LocalSampler {
    fn sample(
        &mut self,
        requests: &[Request],
        policy: &dyn PolicyFeed,
        settings: &Settings,
        finished: &mut dyn FnMut(Generation) -> Result<()>,
    ) -> Result<()> {
        check(requests, self.model.architecture.context, settings)?;
        let mut store = self.prepare_store(requests, settings)?;
        let mut waiting: VecDeque<usize> = (self.part.0..requests.len()).step_by(self.part.1).collect();
        let mut unfinished: Vec<usize> = requests.iter().map(|request| request.rollouts).collect();
        let mut branches: Vec<Branch> = Vec::new();
        while !waiting.is_empty() || !branches.is_empty() {
            if policy.stopped() {
                bail!(Interrupted);
            }
            let mut rows = Rows::default();
            let running = branches.len();
            admit(&mut waiting, requests, (policy, settings), &mut store, &mut rows, &mut branches);
            if let (true, Some(&group)) = (branches.is_empty(), waiting.front()) {
                bail!("{}: there is no room for its completions, though nothing else is sampled", requests[group].name);
            }
            rows.predict(&branches, running)?;
            let choice = |branch: &Branch| settings.choice(branch.group, branch.rollout, branch.ids.len());
            let choices: Vec<Choice> = branches.iter().map(choice).collect();
            let chosen = rows.next_tokens(&self.model, &mut store, &choices, settings)?;
            let mut still = Vec::with_capacity(branches.len());
            for (mut branch, chosen) in branches.into_iter().zip(chosen) {
                branch.ids.push(chosen.token);
                branch.behavior_t.push(chosen.logprob);
                branch.untempered_t.push(chosen.untempered);
                let Some(finish) = settings.finish(&branch.ids, &self.tokenizer) else {
                    still.push(branch);
                    continue;
                };
                let Branch { group, rollout, adapter, prompt, own, ids, behavior_t, untempered_t } = branch;
                store.give(own);
                unfinished[group] -= 1;
                if unfinished[group] == 0 {
                    store.give(prompt);
                }
                let version = version(adapter.as_ref());
                finished(Generation { group, rollout, version, ids, behavior_t, untempered_t, finish })?;
            }
            branches = still;
        }
        self.store = Some(store);
        Ok(())
    }
}
