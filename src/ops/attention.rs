//! Attention over a tree: a prompt attends to itself, every branch to the prompt and to itself.
//!
//! Grouped queries, optional soft-cap and sliding window (Gemma 2). Scores exist for one block of queries at a time; the
//! backward recomputes them from the log-sum-exp kept per query, as FlashAttention does (Dao et al. 2022, algorithm 4).
//!
//! Every sum runs over whole blocks of keys in the order of their positions, of which a prompt and a branch each begin with one: a
//! query's result is the same bits whether it is computed with others or by itself. Branches of one prompt walk over its keys
//! together.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::Buffer;
use super::keys::{BLOCK, Keys, padded};
use super::left::Left;
use super::panels::Threads;
use super::rows::in_turns;
use super::shared::SharedRows;
use super::{exp, vectorized};

/// Consecutive query rows of one sequence, and the key rows that hold its context.
///
/// The context is `prefix` followed by `own`, in logical order; the last query sees all of it, the one before it one key
/// less, and so on. A prompt has an empty prefix; a branch has the prompt's rows as its prefix. Both start with a block.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Rows of the queries of this call.
    pub queries: Range<usize>,
    /// Rows of the keys that come first: the prompt's.
    pub prefix: Range<usize>,
    /// Rows of the keys that follow; the last of them belong to the queries themselves.
    pub own: Range<usize>,
}

impl Span {
    fn context(&self) -> usize {
        self.prefix.len() + self.own.len()
    }

    /// The logical key positions that query number `i` of this span sees.
    fn visible(&self, i: usize, window: Option<usize>) -> Range<usize> {
        let end = self.context() - self.queries.len() + i + 1;
        end.saturating_sub(window.unwrap_or(end))..end
    }
}

/// The shape of attention in one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; divides `query`.
    pub key: usize,
    /// Width of one head.
    pub dim: usize,
    /// What scores are multiplied with, usually 1 / sqrt(dim).
    pub scale: f32,
    /// c in c · tanh(score / c), before the softmax.
    pub soft_cap: Option<f32>,
    /// A query sees itself and this many keys minus one before it.
    pub window: Option<usize>,
}

/// Queries whose scores are computed together.
const QUERIES: usize = 32;
/// Blocks that each thread should have at least, where there are so many queries.
const BLOCKS_PER_THREAD: usize = 4;
/// Strands of a sum over keys.
const LANES: usize = 16;

/// Consecutive queries of one span.
struct Part<'a> {
    span: &'a Span,
    /// Number of the first query within the span, and how many.
    first: usize,
    len: usize,
}

impl Part<'_> {
    /// Its queries in rows of the call.
    fn queries(&self) -> Range<usize> {
        let first = self.span.queries.start + self.first;
        first..first + self.len
    }

    /// Keys that the last query can see.
    fn keys(&self) -> usize {
        self.span.visible(self.first + self.len - 1, None).end
    }

    /// Blocks of prefix and own rows among the first keys, with the column where each begins.
    fn context(&self) -> [(Range<usize>, usize); 2] {
        let Span { prefix, own, .. } = self.span;
        let blocks = |start: usize, rows: usize| start / BLOCK..(start + rows).div_ceil(BLOCK);
        let own_rows = self.keys() - prefix.len();
        [(blocks(prefix.start, prefix.len()), 0), (blocks(own.start, own_rows), padded(prefix.len()))]
    }

    /// The columns of logical key positions: prefix and own rows each begin with a block.
    fn columns(&self, visible: Range<usize>) -> [Range<usize>; 2] {
        let prefix = self.span.prefix.len();
        let own = |position: usize| padded(prefix) + position.max(prefix) - prefix;
        [visible.start.min(prefix)..visible.end.min(prefix), own(visible.start)..own(visible.end)]
    }
}

/// Spans in parts of at most [`QUERIES`]. Neighbors with the same prefix are together as long as they have at most `most` queries:
/// they walk over it once.
fn joined(spans: &[Span], most: usize) -> Vec<Vec<Part<'_>>> {
    let mut all: Vec<Vec<Part>> = Vec::with_capacity(spans.len());
    let parts = spans.iter().flat_map(|span| {
        let queries = span.queries.len();
        (0..queries).step_by(QUERIES).map(move |first| Part { span, first, len: QUERIES.min(queries - first) })
    });
    for part in parts {
        let joins = |before: &&mut Vec<Part>| {
            let queries = before.iter().map(|part| part.len).sum::<usize>() + part.len;
            !part.span.prefix.is_empty() && before[0].span.prefix == part.span.prefix && queries <= most
        };
        match all.last_mut().filter(joins) {
            Some(before) => before.push(part),
            None => all.push(vec![part]),
        }
    }
    all
}

/// Parts with one prefix, at least one, and the heads that share a key head.
#[derive(Clone, Copy)]
struct Block<'a> {
    parts: &'a [Part<'a>],
    key_head: usize,
}

impl<'a> Block<'a> {
    fn queries(&self) -> usize {
        self.parts.iter().map(|part| part.len).sum()
    }

    /// How many columns scores have.
    fn stride(&self) -> usize {
        let columns = |part: &Part| part.columns(0..part.keys())[1].end.next_multiple_of(BLOCK);
        self.parts.iter().map(columns).max().unwrap_or(0)
    }

    /// The parts with the rows of each, of which a query has so many.
    fn rows(&self, group: usize) -> impl Iterator<Item = (&'a Part<'a>, Range<usize>)> {
        self.parts.iter().scan(0, move |end, part| {
            let first = *end;
            *end += part.len * group;
            Some((part, first..*end))
        })
    }
}

/// What attention returns beside its values: the log-sum-exp of the scores of every (query row, head), [rows, query heads].
pub type LogSums = Buffer;

/// Attends with `queries` [rows, query · dim] over stored keys: writes [rows, query · dim] for the rows in the spans.
pub fn forward(
    heads: Heads,
    queries: &[f32],
    keys: &Keys,
    spans: &[Span],
    attended: &mut [f32],
    log_sums: &mut LogSums,
) {
    let (group, width) = (heads.group(), heads.query * heads.dim);
    let queries_of_all: usize = spans.iter().map(|span| span.queries.len()).sum();
    let most = queries_of_all * heads.key / (BLOCKS_PER_THREAD * rayon::current_num_threads());
    let joined = joined(spans, most.min(QUERIES));
    let blocks = joined.iter().flat_map(|parts| (0..heads.key).map(move |key_head| Block { parts, key_head }));
    let all: Vec<Block> = blocks.collect();
    let (attended, log_sums) = (SharedRows::new(attended, width), SharedRows::new(log_sums, heads.query));
    let attend = |block: Block| {
        let (stride, chunk) = (block.stride(), group * heads.dim);
        let queries = heads.gather(block, queries, heads.scale);
        let mut weights = heads.scores(block, &queries, keys);
        let mut sums = Buffer::<f32>::new(block.queries() * group);
        for (part, rows) in block.rows(group) {
            let first = rows.start;
            for row in rows {
                let visible = part.span.visible(part.first + (row - first) / group, heads.window);
                sums[row] = softmax(&mut weights[row * stride..][..stride], part.columns(visible), heads.soft_cap);
            }
        }
        let values = heads.combine(block, &weights, keys);
        let from = values.chunks_exact(chunk).zip(sums.chunks_exact(group));
        for (to, (values, sums)) in block.parts.iter().flat_map(Part::queries).zip(from) {
            let first = block.key_head * group;
            // SAFETY: each query row's heads belong to one block.
            let (attended, log_sums) = unsafe {
                let attended = attended.part(to, block.key_head * chunk..block.key_head * chunk + chunk);
                (attended, log_sums.part(to, first..first + group))
            };
            attended.copy_from_slice(values);
            log_sums.copy_from_slice(sums);
        }
    };
    in_turns(all.len(), Threads::All, |turns| {
        let _tiles = keys.kernel().tiles();
        turns.for_each(|number| attend(all[number]));
    });
}

impl Heads {
    fn group(&self) -> usize {
        self.query / self.key
    }

    /// The block's part of a [rows, query · dim] matrix as [queries · group, dim], multiplied with `scale`.
    fn gather(&self, block: Block, rows: &[f32], scale: f32) -> Buffer {
        let (width, chunk) = (self.query * self.dim, self.group() * self.dim);
        let mut gathered = Buffer::new(block.queries() * chunk);
        vectorized(
            #[inline(always)]
            || {
                for (to, row) in gathered.chunks_exact_mut(chunk).zip(block.parts.iter().flat_map(Part::queries)) {
                    let from = &rows[row * width + block.key_head * chunk..][..chunk];
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = scale * from);
                }
            },
        );
        gathered
    }

    /// `rows` [queries · group, dim] times the keys of the block's context: [queries · group, stride]. What is not visible holds
    /// anything.
    fn scores(&self, block: Block, rows: &[f32], keys: &Keys) -> Buffer {
        let (dim, head, stride) = (self.dim, block.key_head, block.stride());
        let left = Left::new(rows, dim, keys.kernel());
        let room = keys.room(left.rows());
        let mut scores = Buffer::new(room * stride);
        let [(prefix, _), _] = block.parts[0].context();
        keys.scores(&left, head, prefix, (&mut scores, stride), room);
        for (part, of_part) in block.rows(self.group()) {
            let [_, (own, start)] = part.context();
            if of_part.len() == left.rows() {
                keys.scores(&left, head, own, (&mut scores[start..], stride), room);
            } else {
                let left = Left::new(&rows[of_part.start * dim..of_part.end * dim], dim, keys.kernel());
                let to = (&mut scores[of_part.start * stride + start..], stride);
                keys.scores(&left, head, own, to, of_part.len());
            }
        }
        scores.truncate(left.rows() * stride);
        scores
    }

    /// `weights` [queries · group, stride] times the values of the block's context: [queries · group, dim].
    fn combine(&self, block: Block, weights: &[f32], keys: &Keys) -> Buffer {
        let (dim, head, stride) = (self.dim, block.key_head, block.stride());
        let rows = weights.len() / stride;
        let room = keys.room(rows);
        let mut combined = Buffer::new(room * dim);
        let left = |rows: Range<usize>, columns: Range<usize>| {
            let mut left = Left::room(rows.len(), columns.len(), keys.kernel());
            left.write(0..columns.len(), &weights[rows.start * stride + columns.start..], stride);
            left
        };
        if let [part] = block.parts {
            let left = Left::new(weights, stride, keys.kernel());
            keys.combine(&left, head, &part.context(), &mut combined, room, false);
        } else {
            let [prefix, (_, start)] = block.parts[0].context();
            keys.combine(&left(0..rows, 0..start), head, &[prefix], &mut combined, room, false);
            for (part, of_part) in block.rows(self.group()) {
                let [_, (own, _)] = part.context();
                let left = left(of_part.clone(), start..start + own.len() * BLOCK);
                keys.combine(&left, head, &[(own, 0)], &mut combined[of_part.start * dim..], of_part.len(), true);
            }
        }
        combined.truncate(rows * dim);
        combined
    }
}

/// Replaces scores by their softmax, zero where they are not visible, and returns their log-sum-exp.
fn softmax(scores: &mut [f32], visible: [Range<usize>; 2], soft_cap: Option<f32>) -> f32 {
    let [prefix, own] = visible;
    vectorized(
        #[inline(always)]
        || {
            if let Some(cap) = soft_cap {
                scores.iter_mut().for_each(|score| *score = cap * tanh(*score / cap));
            }
            for outside in [0..prefix.start, prefix.end..own.start, own.end..scores.len()] {
                scores[outside].fill(f32::NEG_INFINITY);
            }
            let mut most = [f32::NEG_INFINITY; LANES];
            for chunk in scores.chunks_exact(LANES) {
                most.iter_mut().zip(chunk).for_each(|(most, score)| *most = most.max(*score));
            }
            let max = most.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut lanes = [0.0f32; LANES];
            for chunk in scores.chunks_exact_mut(LANES) {
                for (score, lane) in chunk.iter_mut().zip(&mut lanes) {
                    *score = exp(*score - max);
                    *lane += *score;
                }
            }
            let sum: f32 = lanes.iter().sum();
            let inverse = 1.0 / sum;
            scores.iter_mut().for_each(|score| *score *= inverse);
            max + sum.ln()
        },
    )
}

#[inline(always)]
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (1.0 + exp(2.0 * x))
}

/// What the backward pass reads: rows of the call, and its keys and values in both layouts.
pub struct Saved<'a> {
    /// [rows, query · dim].
    pub queries: &'a [f32],
    /// Keys and values as the forward pass had them.
    pub keys: &'a Keys,
    /// The same with the roles changed: values in blocks, keys row by row.
    pub swapped: &'a Keys,
    /// What the forward pass returned, and its log-sums.
    pub attended: &'a [f32],
    /// [rows, query heads].
    pub log_sums: &'a LogSums,
    /// The gradient of what it returned.
    pub grad: &'a [f32],
}

/// Where gradients go: of queries by rows of the call, of keys and values by key rows.
pub struct Gradients<'a> {
    /// [rows, query · dim].
    pub queries: &'a mut [f32],
    /// [key rows, key · dim].
    pub keys: &'a mut [f32],
    /// [key rows, key · dim].
    pub values: &'a mut [f32],
}

/// The gradients of a forward pass over whole trees: each begins with the span of its prompt, which has no prefix, and its
/// keys lie together.
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
        let rows = tree.iter().map(|span| span.own.start).min().unwrap_or(0)
            ..tree.iter().map(|span| span.own.end).max().unwrap_or(0);
        let whole = padded(rows.len());
        let [keys_t, values_t] = [(); 2].map(|()| Buffer::zeros(whole * dim));
        let mut own = TreeGradient { first: rows.start, rows: whole, keys_t, values_t };
        for part in joined(tree, 0).iter().flatten() {
            let queries = own.add(heads, part, *head, saved);
            for (to, from) in part.queries().zip(queries.chunks_exact(chunk)) {
                // SAFETY: each query row's heads belong to one block.
                let to = unsafe { d_queries.part(to, head * chunk..head * chunk + chunk) };
                to.iter_mut().zip(from).for_each(|(to, from)| *to = heads.scale * from);
            }
        }
        for (index, row) in rows.enumerate() {
            // SAFETY: each tree has its own key rows, and each task its own columns.
            let to = unsafe { [&d_keys, &d_values].map(|gradient| gradient.part(row, head * dim..head * dim + dim)) };
            for (to, from_t) in to.into_iter().zip([&own.keys_t, &own.values_t]) {
                to.iter_mut().zip(from_t[index..].iter().step_by(whole)).for_each(|(to, from)| *to = *from);
            }
        }
    });
}

/// Gradients of the keys and values of one tree and key head, transposed: [dim, rows].
struct TreeGradient {
    /// The first key row, and how many there are, in whole blocks.
    first: usize,
    rows: usize,
    keys_t: Buffer,
    values_t: Buffer,
}

impl TreeGradient {
    /// With P the weights, D = rowsum(dO · O) and dS = P · (dO Vᵀ − D): adds dK = dSᵀ Q and dV = Pᵀ dO of a block of queries,
    /// and returns dQ = dS K before the scale.
    fn add(&mut self, heads: Heads, part: &Part, key_head: usize, saved: &Saved) -> Buffer {
        let block = Block { parts: std::slice::from_ref(part), key_head };
        let (dim, group, stride) = (heads.dim, heads.group(), block.stride());
        let queries = heads.gather(block, saved.queries, heads.scale);
        let d_outputs = heads.gather(block, saved.grad, 1.0);
        let outputs = heads.gather(block, saved.attended, 1.0);
        let mut weights = heads.scores(block, &queries, saved.keys);
        let mut d_scores = heads.scores(block, &d_outputs, saved.swapped);
        for (row, (weights, d_scores)) in
            weights.chunks_exact_mut(stride).zip(d_scores.chunks_exact_mut(stride)).enumerate()
        {
            let visible = part.span.visible(part.first + row / group, heads.window);
            let log_sum =
                saved.log_sums[(part.queries().start + row / group) * heads.query + key_head * group + row % group];
            let [prefix, own] = part.columns(visible);
            for outside in [0..prefix.start, prefix.end..own.start, own.end..stride] {
                weights[outside.clone()].fill(0.0);
                d_scores[outside].fill(0.0);
            }
            let (d_output, output) = (&d_outputs[row * dim..][..dim], &outputs[row * dim..][..dim]);
            vectorized(
                #[inline(always)]
                || {
                    let pull = dot(d_output, output);
                    for part in [prefix, own] {
                        let (weights, d_scores) = (&mut weights[part.clone()], &mut d_scores[part]);
                        score_gradient(weights, d_scores, log_sum, pull, heads.soft_cap);
                    }
                },
            );
        }
        let (keys, rows) = (saved.keys, self.rows);
        let [queries_t, d_outputs_t] = [&queries, &d_outputs].map(|rows| Left::transposed(rows, dim, keys.kernel()));
        for (blocks, start) in part.context().into_iter().filter(|(blocks, _)| !blocks.is_empty()) {
            let (at, columns) = (blocks.start * BLOCK - self.first, start..start + blocks.len() * BLOCK);
            keys.add_product(&queries_t, (&d_scores, stride), columns.clone(), (&mut self.keys_t[at..], rows));
            keys.add_product(&d_outputs_t, (&weights, stride), columns, (&mut self.values_t[at..], rows));
        }
        heads.combine(block, &d_scores, saved.swapped)
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, b) = (a.chunks(LANES), b.chunks(LANES));
    a.zip(b).for_each(|(a, b)| lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(lane, (a, b))| *lane += a * b));
    lanes.iter().sum()
}

/// Turns scores before the cap into weights, and the gradient of the weights into that of these scores.
#[inline(always)]
fn score_gradient(scores: &mut [f32], d_scores: &mut [f32], log_sum: f32, pull: f32, soft_cap: Option<f32>) {
    // Each by itself: in one loop the compiler computes both for every score. Without a cap a slope of 1 is exact.
    match soft_cap {
        None => each_score_gradient(scores, d_scores, log_sum, pull, |score| (score, 1.0)),
        Some(cap) => each_score_gradient(scores, d_scores, log_sum, pull, |score| {
            let ratio = tanh(score / cap);
            (cap * ratio, 1.0 - ratio * ratio)
        }),
    }
}

#[inline(always)]
fn each_score_gradient(
    scores: &mut [f32],
    d_scores: &mut [f32],
    log_sum: f32,
    pull: f32,
    capped: impl Fn(f32) -> (f32, f32),
) {
    for (score, d_score) in scores.iter_mut().zip(d_scores) {
        let (capped, slope) = capped(*score);
        let weight = exp(capped - log_sum);
        *d_score = weight * (*d_score - pull) * slope;
        *score = weight;
    }
}
