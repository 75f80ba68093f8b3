//! Trees and their packing: a prompt once, its completions as branches, whole trees per micro-batch.

use anyhow::{Result, ensure};
use std::ops::Range;

use crate::ops::attention::Span;
use crate::ops::dropout::Dropout;
use crate::ops::keys::{Store, padded};
use crate::random::{self, Purpose};

/// One prompt and the completions that continue it.
#[derive(Clone, Debug)]
pub struct Tree {
    /// What errors call it: the task's id.
    pub name: String,
    /// Tokens of the prompt.
    pub prompt_ids: Vec<u32>,
    /// The completions.
    pub branches: Vec<Branch>,
}

impl Tree {
    /// The rows that it takes in a micro-batch: the last token of a branch predicts nothing, so it needs none.
    pub fn rows(&self) -> usize {
        self.prompt_ids.len() + self.branches.iter().map(|branch| branch.ids.len() - 1).sum::<usize>()
    }
}

/// One completion, with one entry per token in every list.
#[derive(Clone, Debug)]
pub struct Branch {
    /// Its index among the rollouts of the task; those without a score are not here.
    pub rollout: usize,
    /// Its tokens.
    pub ids: Vec<u32>,
    /// Which tokens receive gradient.
    pub mask_t: Vec<bool>,
    /// What is learned from it.
    pub signal: Signal,
}

/// What is known of a completion beside its tokens, by the target of its task.
#[derive(Clone, Debug)]
pub enum Signal {
    /// It was sampled and scored.
    Reward {
        /// The sampler's log-probability of each token.
        behavior_t: Vec<f64>,
        /// The advantage of its tokens.
        advantage: f64,
    },
    /// It is to be imitated.
    Demonstration,
    /// It is one of a pair.
    Preference {
        /// The reference's log-probability of each token.
        reference_t: Vec<f64>,
    },
    /// It was judged.
    Judged {
        /// Whether it is right.
        correct: bool,
    },
}

impl Branch {
    /// A completion that is given, all of whose tokens are to be imitated.
    pub fn demonstration(ids: Vec<u32>) -> Self {
        Self { rollout: 0, mask_t: vec![true; ids.len()], ids, signal: Signal::Demonstration }
    }
}

/// The rows of one forward and backward pass, and what they predict.
#[derive(Debug)]
pub struct MicroBatch<'a> {
    /// Token of every row.
    pub ids: Vec<u32>,
    /// Logical position of every row.
    pub positions: Vec<usize>,
    /// Which rows attend to which.
    pub spans: Vec<Span>,
    /// Where the rows' keys go: every prompt and branch starts a block of its own.
    pub stores: Vec<Store>,
    /// The rows that predict, one per completion token: a prompt's last row predicts the first token of every branch.
    pub predicting: Vec<u32>,
    /// The token that each of them predicts.
    pub targets: Vec<u32>,
    /// The branches, and where their tokens lie in `targets`.
    pub branches: Vec<(&'a Branch, Range<usize>)>,
    /// By store: the number of its tree among those that were packed, and of its branch in the tree, from 1; 0 is the prompt.
    pub origins: Vec<[usize; 2]>,
    /// What the adapter being trained does not see of its inputs.
    pub dropout: Option<Dropout>,
}

impl MicroBatch<'_> {
    /// What is dropped with probability `share` in a step whose trees before these are `earlier`: the same whatever else is in
    /// the micro-batch. All branches see the same of their prompt.
    pub fn dropout(&self, share: f64, seed: u64, step: u64, earlier: usize) -> Dropout {
        let rows = self.stores.iter().zip(&self.origins).flat_map(|(store, [tree, branch])| {
            let key = move |&position: &usize| {
                let counters = [step, (earlier + tree) as u64, *branch as u64, position as u64];
                random::key(seed, Purpose::Dropout, &counters)
            };
            self.positions[store.from.clone()].iter().map(key)
        });
        Dropout { share, rows: rows.collect() }
    }
}

/// Packs whole trees, in order, into micro-batches of at most `budget` rows. A tree that is larger is split by branches,
/// its prompt repeated.
///
/// # Errors
/// If a prompt or a completion is empty, or a prompt with one branch exceeds the budget; tree and branch are named.
pub fn pack(trees: &[Tree], budget: usize) -> Result<Vec<MicroBatch<'_>>> {
    let mut all: Vec<(usize, &Tree, Piece)> = Vec::new();
    for (number, tree) in trees.iter().enumerate() {
        ensure!(!tree.prompt_ids.is_empty(), "{}: the prompt has no tokens", tree.name);
        for branch in &tree.branches {
            ensure!(!branch.ids.is_empty(), "{}, rollout {}: the completion has no tokens", tree.name, branch.rollout);
            let rows = tree.prompt_ids.len() + branch.ids.len() - 1;
            ensure!(
                rows <= budget,
                "{}, rollout {}: {rows} tokens do not fit into batch.micro_tokens = {budget}; raise it, or shorten prompts \
                 or sampling.max_tokens",
                tree.name,
                branch.rollout
            );
        }
        let completions = tree.branches.iter().map(|branch| branch.ids.len());
        let cut = pieces(tree.prompt_ids.len(), completions, budget).into_iter();
        all.extend(cut.map(|piece| (number, tree, piece)));
    }
    let sizes: Vec<usize> = all.iter().map(|(.., piece)| piece.rows).collect();
    Ok(batches(&sizes, budget).into_iter().map(|range| lay_out(&all[range])).collect())
}

/// Branches of one tree that share a micro-batch.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The branches.
    pub branches: Range<usize>,
    /// Rows that they and the prompt take.
    pub rows: usize,
}

/// Cuts a tree with completions of these lengths into pieces of at most `budget` rows, or of one branch.
pub fn pieces(prompt: usize, completions: impl Iterator<Item = usize>, budget: usize) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (index, tokens) in completions.enumerate() {
        // The last token predicts nothing, so it needs no row.
        let rows = tokens - 1;
        match pieces.last_mut().filter(|piece| piece.rows + rows <= budget) {
            Some(piece) => (piece.branches.end, piece.rows) = (index + 1, piece.rows + rows),
            None => pieces.push(Piece { branches: index..index + 1, rows: prompt + rows }),
        }
    }
    pieces
}

/// Which consecutive pieces share a micro-batch of at most `budget` rows; a larger piece has one to itself.
pub fn batches(rows: &[usize], budget: usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut total = 0;
    for (index, &rows) in rows.iter().enumerate() {
        match batches.last_mut().filter(|_| total + rows <= budget) {
            Some(batch) => (batch.end, total) = (index + 1, total + rows),
            None => {
                batches.push(index..index + 1);
                total = rows;
            }
        }
    }
    batches
}

fn lay_out<'a>(pieces: &[(usize, &'a Tree, Piece)]) -> MicroBatch<'a> {
    let (mut ids, mut positions, mut spans, mut stores) = (Vec::new(), Vec::new(), Vec::new(), Vec::<Store>::new());
    let (mut predicting, mut targets, mut branches, mut origins) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut store = |rows: &Range<usize>| {
        let to = stores.last().map_or(0, |last| padded(last.to + last.from.len()));
        stores.push(Store { from: rows.clone(), to });
        to..to + rows.len()
    };
    for (number, tree, piece) in pieces {
        let prompt = ids.len()..ids.len() + tree.prompt_ids.len();
        ids.extend(&tree.prompt_ids);
        positions.extend(0..prompt.len());
        let prompt_keys = store(&prompt);
        origins.push([*number, 0]);
        spans.push(Span { queries: prompt.clone(), prefix: 0..0, own: prompt_keys.clone() });
        for index in piece.branches.clone() {
            let branch = &tree.branches[index];
            let inputs = &branch.ids[..branch.ids.len() - 1];
            let rows = ids.len()..ids.len() + inputs.len();
            branches.push((branch, targets.len()..targets.len() + branch.ids.len()));
            predicting.extend(std::iter::once(prompt.end - 1).chain(rows.clone()).map(|row| row as u32));
            targets.extend(&branch.ids);
            ids.extend(inputs);
            positions.extend(prompt.len()..prompt.len() + inputs.len());
            if !rows.is_empty() {
                let own = store(&rows);
                origins.push([*number, index + 1]);
                spans.push(Span { queries: rows, prefix: prompt_keys.clone(), own });
            }
        }
    }
    MicroBatch { ids, positions, spans, stores, predicting, targets, branches, origins, dropout: None }
}
