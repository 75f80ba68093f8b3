//! The gradients of attention, by blocks of 32 keys: for some queries, scores and their gradients exist for one block at a time and
//! stay in the first-level cache. Scores are computed again, and become weights by the log-sum-exp that was kept of each query
//! (Dao et al. 2022, algorithm 4).

use std::ops::Range;

use rayon::prelude::*;

use super::attention::{Block, Heads, LogSums, Part, Span, dot, fill, joined, tanh};
use super::buffer::Buffer;
use super::keys::{BLOCK, Keys, padded};
use super::left::{Left, transpose};
use super::rounded::RoundedRows;
use super::shared::SharedRows;
use super::{exp_below_89, vectorized};

/// What the backward pass reads: rows of the call, and its keys and values in both layouts.
pub struct Saved<'a> {
    /// [rows, query · dim], multiplied with the scale.
    pub queries: RoundedRows<'a>,
    /// Keys and values as the forward pass had them.
    pub keys: &'a Keys,
    /// The same with the roles changed: values in blocks, keys row by row.
    pub swapped: &'a Keys,
    /// [rows, query heads].
    pub log_sums: &'a LogSums,
    /// Of [`pulls`].
    pub pulls: &'a [f32],
    /// The gradient of what it returned.
    pub grad: RoundedRows<'a>,
}

/// Where gradients go, by rows of the call.
pub struct Gradients<'a> {
    /// Of what was multiplied with the scale, [rows, query · dim].
    pub queries: &'a mut [f32],
    /// [rows, key · dim].
    pub keys: &'a mut [f32],
    /// [rows, key · dim].
    pub values: &'a mut [f32],
}

/// D = rowsum(dO · O) of every query and head [rows, query heads], what all gradients of its weights have in common: from the gradient of
/// what the forward pass returned, and what it returned, both [rows, query · dim].
pub fn pulls(heads: Heads, grad: &[f32], attended: RoundedRows, to: &mut [f32]) {
    let (dim, width) = (heads.dim, heads.query * heads.dim);
    let mut room = Buffer::new(width);
    vectorized(
        #[inline(always)]
        || {
            for (row, (to, grad)) in to.chunks_exact_mut(heads.query).zip(grad.chunks_exact(width)).enumerate() {
                let attended = attended.part(row * width..(row + 1) * width).in_f32(&mut room);
                for ((to, grad), attended) in to.iter_mut().zip(grad.chunks_exact(dim)).zip(attended.chunks_exact(dim))
                {
                    *to = dot(grad, attended);
                }
            }
        },
    );
}

/// The gradients of a forward pass over whole trees: each begins with the span of its prompt, which has no prefix, its keys lie
/// together, and every span's own keys are those of its queries.
pub fn backward(heads: Heads, saved: &Saved, spans: &[Span], gradients: Gradients) {
    let starts = (0..spans.len()).filter(|&index| spans[index].prefix.is_empty());
    let mut starts: Vec<usize> = starts.collect();
    starts.push(spans.len());
    let trees = starts.windows(2).map(|pair| &spans[pair[0]..pair[1]]);
    let tasks: Vec<(&[Span], usize)> = trees.flat_map(|tree| (0..heads.key).map(move |head| (tree, head))).collect();
    let (dim, chunk) = (heads.dim, heads.group() * heads.dim);
    let d_queries = SharedRows::new(gradients.queries, heads.query * dim);
    let d_keys = SharedRows::new(gradients.keys, heads.key * dim);
    let d_values = SharedRows::new(gradients.values, heads.key * dim);
    tasks.par_iter().with_max_len(1).for_each(|(tree, head)| {
        let _tiles = saved.keys.kernel().tiles();
        let mut own = TreeGradient::new(tree, dim);
        for part in joined(tree, 0).iter().flatten() {
            let queries = own.add(heads, part, *head, saved);
            for (to, from) in part.queries().zip(queries.chunks_exact(chunk)) {
                // SAFETY: each query row's heads belong to one block.
                unsafe { d_queries.part(to, head * chunk..head * chunk + chunk) }.copy_from_slice(from);
            }
        }
        let mut block = Buffer::new(BLOCK * dim);
        for (to, from_t) in [(&d_keys, &own.keys_t), (&d_values, &own.values_t)] {
            for span in *tree {
                let blocks = from_t[(span.own.start - own.first) * dim..].chunks_exact(dim * BLOCK);
                for (first, from_t) in span.queries.clone().step_by(BLOCK).zip(blocks) {
                    transpose(from_t, BLOCK, &mut block);
                    for (row, from) in (first..span.queries.end).zip(block.chunks_exact(dim)) {
                        // SAFETY: each span has its own rows, and each task its own columns.
                        unsafe { to.part(row, head * dim..head * dim + dim) }.copy_from_slice(from);
                    }
                }
            }
        }
    });
}

/// Gradients of the keys and values of one tree and key head, by blocks, transposed: [blocks, dim, 32].
struct TreeGradient {
    /// The first key row.
    first: usize,
    keys_t: Buffer,
    values_t: Buffer,
}

/// What is known of a query's scores before they are computed again.
struct Known {
    log_sum: f32,
    /// Of [`pulls`].
    pull: f32,
    /// The columns that it sees of prefix and own rows.
    visible: [Range<usize>; 2],
}

impl TreeGradient {
    fn new(tree: &[Span], dim: usize) -> Self {
        let rows = tree.iter().map(|span| span.own.start).min().unwrap_or(0)
            ..tree.iter().map(|span| span.own.end).max().unwrap_or(0);
        let [keys_t, values_t] = [(); 2].map(|()| Buffer::zeros(padded(rows.len()) * dim));
        Self { first: rows.start, keys_t, values_t }
    }

    /// With P the weights, D = rowsum(dO · O) and dS = P · (dO Vᵀ − D): adds dK = dSᵀ Q and dV = Pᵀ dO of some queries, and returns
    /// dQ = dS K.
    fn add(&mut self, heads: Heads, part: &Part, head: usize, saved: &Saved) -> Buffer {
        let (dim, Saved { keys, swapped, .. }) = (heads.dim, saved);
        let (kernel, block) = (keys.kernel(), Block { parts: std::slice::from_ref(part), key_head: head });
        let inputs = [saved.queries, saved.grad].map(|x| heads.gather(block, x));
        let lefts = inputs.each_ref().map(|x| Left::of(x.rows(), dim));
        let ([queries, d_outputs], [queries_t, d_outputs_t]) = (&lefts, lefts.each_ref().map(Left::transposed));
        let rows = known(heads, block, saved);
        let room = keys.room(rows.len());
        let [mut weights, mut d_scores] = [(); 2].map(|()| Buffer::new(room * BLOCK));
        let (mut d_queries, mut add) = (Buffer::new(room * dim), false);
        for (of_context, (blocks, start)) in part.context().into_iter().enumerate() {
            for (number, block) in blocks.enumerate() {
                keys.scores(queries, head, block..block + 1, (&mut weights, BLOCK), room);
                swapped.scores(d_outputs, head, block..block + 1, (&mut d_scores, BLOCK), room);
                let column = start + number * BLOCK;
                score_gradients(&mut weights, &mut d_scores, &rows, (of_context, column), heads.soft_cap);
                let at = (block * BLOCK - self.first) * dim..(block * BLOCK + BLOCK - self.first) * dim;
                keys.add_product(&queries_t, &d_scores, &mut self.keys_t[at.clone()]);
                keys.add_product(&d_outputs_t, &weights, &mut self.values_t[at]);
                let left = Left::new(&d_scores[..rows.len() * BLOCK], BLOCK, kernel);
                swapped.combine(&left, head, &[(block..block + 1, 0)], &mut d_queries, room, add);
                add = true;
            }
        }
        d_queries.truncate(rows.len() * dim);
        d_queries
    }
}

/// Of a block of one part: by queries and the heads that share the key head.
fn known(heads: Heads, block: Block, saved: &Saved) -> Vec<Known> {
    let group = heads.group();
    let of_query = |(row, visible): (usize, [Range<usize>; 2])| {
        let first = row * heads.query + block.key_head * group;
        let known = move |index: usize| Known {
            log_sum: saved.log_sums[index],
            pull: saved.pulls[index],
            visible: visible.clone(),
        };
        (first..first + group).map(known)
    };
    block.parts[0].queries().zip(heads.visible(block)).flat_map(of_query).collect()
}

/// Turns scores before the cap into weights, and the gradients of the weights into those of these scores, for some queries and a block
/// of keys, [queries, 32] each; zeros where they are not visible.
fn score_gradients(
    scores: &mut [f32],
    d_scores: &mut [f32],
    queries: &[Known],
    at: (usize, usize),
    soft_cap: Option<f32>,
) {
    // Each by itself: in one loop the compiler computes both for every score. Without a cap a slope of 1 is exact.
    match soft_cap {
        None => each_score_gradient(scores, d_scores, queries, at, |score| (score, 1.0)),
        Some(cap) => each_score_gradient(scores, d_scores, queries, at, |score| {
            let ratio = tanh(score / cap);
            (cap * ratio, 1.0 - ratio * ratio)
        }),
    }
}

#[inline(always)]
fn each_score_gradient(
    scores: &mut [f32],
    d_scores: &mut [f32],
    queries: &[Known],
    (of_context, first): (usize, usize),
    capped: impl Fn(f32) -> (f32, f32),
) {
    vectorized(
        #[inline(always)]
        || {
            let (scores, d_scores) = (scores.as_chunks_mut::<BLOCK>().0, d_scores.as_chunks_mut::<BLOCK>().0);
            for ((scores, d_scores), query) in scores.iter_mut().zip(d_scores.iter_mut()).zip(queries) {
                for (score, d_score) in scores.iter_mut().zip(d_scores) {
                    let (capped, slope) = capped(*score);
                    // Never above its row's sum; what is not visible may be anything, and is overwritten.
                    let weight = exp_below_89(capped - query.log_sum);
                    *d_score = weight * (*d_score - query.pull) * slope;
                    *score = weight;
                }
            }
            for ((scores, d_scores), query) in scores.iter_mut().zip(d_scores).zip(queries) {
                let Range { start, end } = query.visible[of_context];
                let (start, end) = (start.clamp(first, first + BLOCK) - first, end.clamp(first, first + BLOCK) - first);
                fill(scores, 0..start, 0.0);
                fill(scores, end..BLOCK, 0.0);
                fill(d_scores, 0..start, 0.0);
                fill(d_scores, end..BLOCK, 0.0);
            }
        },
    );
}
