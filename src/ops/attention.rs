//! Attention over a tree: a prompt attends to itself, every branch to the prompt and to itself.
//!
//! Grouped queries, optional soft-cap and sliding window (Gemma 2). Scores exist for one block of queries at a time; the
//! backward recomputes them from the log-sum-exp kept per query, as FlashAttention does (Dao et al. 2022, algorithm 4).
//!
//! Every sum runs over whole blocks of keys in the order of their positions, of which a prompt and a branch each begin with one: a
//! query's result is the same bits whether it is computed with others or by itself. Branches of one prompt walk over its keys
//! together.

use std::hint::black_box;
use std::ops::Range;

use super::buffer::Buffer;
use super::keys::{BLOCK, Keys, padded};
use super::left::Left;
use super::panels::Threads;
use super::rounded::{Rounded, RoundedRows, RoundedRowsMut};
use super::rows::in_turns;
use super::shared::{SharedRounded, SharedRows};
use super::{LANES, across, exp, exp_below_89, largest, vectorized};

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

/// Consecutive queries of one span.
pub(super) struct Part<'a> {
    span: &'a Span,
    /// Number of the first query within the span, and how many.
    first: usize,
    len: usize,
}

impl Part<'_> {
    /// Its queries in rows of the call.
    pub(super) fn queries(&self) -> Range<usize> {
        let first = self.span.queries.start + self.first;
        first..first + self.len
    }

    /// Keys that the last query can see.
    fn keys(&self) -> usize {
        self.span.visible(self.first + self.len - 1, None).end
    }

    /// Blocks of prefix and own rows among the first keys, with the column where each begins.
    pub(super) fn context(&self) -> [(Range<usize>, usize); 2] {
        let Span { prefix, own, .. } = self.span;
        let blocks = |start: usize, rows: usize| start / BLOCK..(start + rows).div_ceil(BLOCK);
        let own_rows = self.keys() - prefix.len();
        [(blocks(prefix.start, prefix.len()), 0), (blocks(own.start, own_rows), padded(prefix.len()))]
    }

    /// The columns of prefix and own rows that a query of the span sees.
    fn visible(&self, query: usize, window: Option<usize>) -> [Range<usize>; 2] {
        self.columns(self.span.visible(query, window))
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
pub(super) fn joined(spans: &[Span], most: usize) -> Vec<Vec<Part<'_>>> {
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
pub(super) struct Block<'a> {
    pub(super) parts: &'a [Part<'a>],
    pub(super) key_head: usize,
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

/// Attends with `queries` [rows, query · dim], multiplied with the scale, over stored keys: writes [rows, query · dim] for the rows in the
/// spans.
pub fn forward(
    heads: Heads,
    queries: RoundedRows,
    keys: &Keys,
    spans: &[Span],
    attended: RoundedRowsMut,
    log_sums: &mut LogSums,
) {
    let (group, width) = (heads.group(), heads.query * heads.dim);
    let queries_of_all: usize = spans.iter().map(|span| span.queries.len()).sum();
    let most = queries_of_all * heads.key / (BLOCKS_PER_THREAD * rayon::current_num_threads());
    let joined = joined(spans, most.min(QUERIES));
    let blocks = joined.iter().flat_map(|parts| (0..heads.key).map(move |key_head| Block { parts, key_head }));
    let all: Vec<Block> = blocks.collect();
    let (attended, log_sums) = (SharedRounded::new(attended, width), SharedRows::new(log_sums, heads.query));
    let attend = |block: Block| {
        let chunk = group * heads.dim;
        let queries = heads.gather(block, queries);
        let mut scores = heads.scores(block, queries.rows(), keys);
        let (visible, mut sums) = (heads.visible(block), Buffer::<f32>::new(block.queries() * group));
        let values = heads.combine(block, &mut scores, keys, |first, scores, factors| {
            let visible = |row: usize| &visible[(first + row) / group];
            exponentials(scores, &mut sums[first..], factors, visible, heads.soft_cap);
        });
        let from = values.chunks_exact(chunk).zip(sums.chunks_exact(group));
        for (to, (values, sums)) in block.parts.iter().flat_map(Part::queries).zip(from) {
            let first = block.key_head * group;
            // SAFETY: each query row's heads belong to one block.
            let (attended, log_sums) = unsafe {
                let attended = attended.part(to, block.key_head * chunk..block.key_head * chunk + chunk);
                (attended, log_sums.part(to, first..first + group))
            };
            attended.write(values);
            log_sums.copy_from_slice(sums);
        }
    };
    in_turns(all.len(), Threads::All, |turns| {
        let _tiles = keys.kernel().tiles();
        turns.for_each(|number| attend(all[number]));
    });
}

impl Heads {
    pub(super) fn group(&self) -> usize {
        self.query / self.key
    }

    /// The block's part of a [rows, query · dim] matrix as [queries · group, dim].
    pub(super) fn gather(&self, block: Block, rows: RoundedRows) -> Rounded {
        let (width, chunk) = (self.query * self.dim, self.group() * self.dim);
        let starts = block.parts.iter().flat_map(Part::queries).map(|row| row * width + block.key_head * chunk);
        rows.gather((block.queries(), chunk), starts)
    }

    /// `rows` [queries · group, dim] times the keys of the block's context: [queries · group, stride]. What is not visible holds
    /// anything.
    fn scores(&self, block: Block, rows: RoundedRows, keys: &Keys) -> Buffer {
        let (dim, head, stride) = (self.dim, block.key_head, block.stride());
        let left = Left::of(rows, dim);
        let room = keys.room(left.rows());
        let mut scores = Buffer::new(room * stride);
        let [(prefix, _), _] = block.parts[0].context();
        keys.scores(&left, head, prefix, (&mut scores, stride), room);
        for (part, of_part) in block.rows(self.group()) {
            let [_, (own, start)] = part.context();
            if of_part.len() == left.rows() {
                keys.scores(&left, head, own, (&mut scores[start..], stride), room);
            } else {
                let left = Left::of(rows.part(of_part.start * dim..of_part.end * dim), dim);
                let to = (&mut scores[of_part.start * stride + start..], stride);
                keys.scores(&left, head, own, to, of_part.len());
            }
        }
        scores.truncate(left.rows() * stride);
        scores
    }

    /// The columns that each query of the block sees of prefix and own rows.
    pub(super) fn visible(&self, block: Block) -> Vec<[Range<usize>; 2]> {
        let queries = |part: &'_ Part| {
            (part.first..part.first + part.len).map(|query| part.visible(query, self.window)).collect::<Vec<_>>()
        };
        block.parts.iter().flat_map(queries).collect()
    }

    /// Weights times the values of the block's context: [queries · group, dim]. `weigh(first, scores, factors)` makes weights of
    /// consecutive rows of the scores [queries · group, stride], and says what is left to multiply each row of the product with.
    fn combine(
        &self,
        block: Block,
        scores: &mut [f32],
        keys: &Keys,
        mut weigh: impl FnMut(usize, &mut [f32], &mut [f32]),
    ) -> Buffer {
        let (dim, head, stride, kernel) = (self.dim, block.key_head, block.stride(), keys.kernel());
        let rows = scores.len() / stride;
        let (room, mut factors) = (keys.room(rows), Buffer::<f32>::new(rows));
        let mut weigh = |first: usize, scores: &mut [f32]| {
            weigh(first, scores, &mut factors[first..first + scores.len() / stride]);
        };
        let mut combined = Buffer::new(room * dim);
        if let [part] = block.parts {
            let left = Left::finished(scores, stride, kernel, weigh);
            keys.combine(&left, head, &part.context(), &mut combined, room, false);
        } else {
            weigh(0, scores);
            let left = |rows: Range<usize>, columns: Range<usize>| {
                let mut left = Left::room(rows.len(), columns.len(), kernel);
                left.write(0..columns.len(), &scores[rows.start * stride + columns.start..], stride);
                left
            };
            let [prefix, (_, start)] = block.parts[0].context();
            keys.combine(&left(0..rows, 0..start), head, &[prefix], &mut combined, room, false);
            for (part, of_part) in block.rows(self.group()) {
                let [_, (own, _)] = part.context();
                let left = left(of_part.clone(), start..start + own.len() * BLOCK);
                keys.combine(&left, head, &[(own, 0)], &mut combined[of_part.start * dim..], of_part.len(), true);
            }
        }
        combined.truncate(rows * dim);
        vectorized(
            #[inline(always)]
            || {
                for (row, factor) in combined.chunks_exact_mut(dim).zip(&*factors) {
                    row.iter_mut().for_each(|value| *value *= factor);
                }
            },
        );
        combined
    }
}

/// Replaces scores s of some rows by exp(s − m), zero where they are not visible, where m is the largest of a row that is. Writes the
/// log-sum-exp of each row, and one by the sum.
#[inline(always)]
fn exponentials<'a>(
    scores: &mut [f32],
    log_sums: &mut [f32],
    factors: &mut [f32],
    visible: impl Fn(usize) -> &'a [Range<usize>; 2],
    soft_cap: Option<f32>,
) {
    vectorized(
        #[inline(always)]
        || {
            if let Some(cap) = soft_cap {
                scores.iter_mut().for_each(|score| *score = cap * tanh(*score / cap));
            }
            // In a loop of its own: together they need more registers than there are.
            let stride = scores.len() / factors.len();
            for (row, scores) in scores.chunks_exact_mut(stride).enumerate() {
                let [prefix, own] = visible(row);
                fill(scores, 0..prefix.start, f32::NEG_INFINITY);
                fill(scores, prefix.end..own.start, f32::NEG_INFINITY);
                fill(scores, own.end..stride, f32::NEG_INFINITY);
            }
            let rows = scores.chunks_exact_mut(stride).zip(log_sums.iter_mut().zip(&mut *factors));
            for (scores, (log_sum, factor)) in rows {
                let max = largest(scores, f32::NEG_INFINITY);
                let mut sums = [0.0f32; LANES];
                for chunk in scores.as_chunks_mut::<LANES>().0 {
                    chunk.iter_mut().for_each(|score| *score = exp_below_89(*score - max));
                    for lane in 0..LANES {
                        sums[lane] += chunk[lane];
                    }
                }
                (*log_sum, *factor) = (max, total(sums));
            }
        },
    );
    for (log_sum, factor) in log_sums.iter_mut().zip(factors) {
        *log_sum += factor.ln();
        *factor = 1.0 / *factor;
    }
}

/// Fills some columns of a row of whole vectors, as whole vectors: whoever loads one that was stored in pieces waits for them.
#[inline(always)]
pub(super) fn fill(row: &mut [f32], columns: Range<usize>, value: f32) {
    /// All bits of lanes in the first half, none in the second.
    static HALVES: [u32; 2 * LANES] = {
        let mut halves = [0; 2 * LANES];
        let mut lane = 0;
        while lane < LANES {
            halves[lane] = u32::MAX;
            lane += 1;
        }
        halves
    };
    if columns.is_empty() {
        return;
    }
    let vectors = columns.start / LANES..columns.end.div_ceil(LANES);
    for (vector, number) in row.as_chunks_mut::<LANES>().0[vectors.clone()].iter_mut().zip(vectors) {
        // All bits of lanes before a column.
        let before = |column: usize| -> &[u32; LANES] {
            let lanes = column.saturating_sub(number * LANES).min(LANES);
            HALVES[LANES - lanes..].first_chunk().expect("there are as many after half")
        };
        let (start, end, mut filled) = (before(columns.start), before(columns.end), [0.0; LANES]);
        for lane in 0..LANES {
            let keep = start[lane] | !end[lane];
            filled[lane] = f32::from_bits(vector[lane].to_bits() & keep | value.to_bits() & !keep);
        }
        *vector = filled;
    }
}

/// Σ a · b.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut strands = [0.0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            strands[lane] += a[lane] * b[lane];
        }
    }
    rest_a.iter().zip(rest_b).fold(total(strands), |sum, (a, b)| sum + a * b)
}

/// Out of the compiler's sight: where it sees how strands are added up, it computes them two at a time.
#[inline(always)]
fn total(strands: [f32; LANES]) -> f32 {
    across(black_box(strands), |a, b| a + b)
}

#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (1.0 + exp(2.0 * x))
}
