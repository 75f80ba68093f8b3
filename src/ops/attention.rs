//! Attention over a tree: a prompt attends to itself, every branch to the prompt and to itself.
//!
//! Grouped queries, optional soft-cap and sliding window (Gemma 2). Scores exist for one block of queries at a time; the
//! backward recomputes them from the log-sum-exp kept per query, as FlashAttention does (Dao et al. 2022, algorithm 4).

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::matmul::{Matrix, Threads, matmul};
use super::{exp, output, values, vectorized, with_values};

/// Consecutive query rows of one sequence, and the key rows that hold its context.
///
/// The context is `prefix` followed by `own`, in logical order; the last query sees all of it, the one before it one key
/// less, and so on. A prompt has an empty prefix; a branch has the prompt's rows as its prefix.
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

/// Queries [rows, query · dim] over keys and values [key rows, key · dim]: [rows, query · dim].
///
/// # Errors
/// If a span points outside the rows, or a tensor is not f32.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, spans: &Arc<[Span]>) -> Result<Tensor> {
    let ((queries, width), (keys, key_width)) = (q.dims2()?, k.dims2()?);
    if width != heads.query * heads.dim || key_width != heads.key * heads.dim || k.dims() != v.dims() {
        bail!("attention: {:?}, {:?}, {:?} do not fit {heads:?}", q.dims(), k.dims(), v.dims());
    }
    let fits = |span: &Span| {
        span.queries.end <= queries
            && span.prefix.end <= keys
            && span.own.end <= keys
            && span.queries.len() <= span.own.len()
    };
    if let Some(span) = spans.iter().find(|span| !fits(span)) {
        bail!("attention: {span:?} points outside {queries} queries and {keys} keys");
    }
    q.apply_op3(k, v, Attention { heads, spans: spans.clone(), log_sums: OnceLock::new() })
}

struct Attention {
    heads: Heads,
    spans: Arc<[Span]>,
    /// Log-sum-exp of the scores of every (query row, head), kept by the forward for the backward.
    log_sums: OnceLock<Vec<f32>>,
}

/// Queries whose scores are computed together.
const BLOCK: usize = 32;

/// One block of queries of one span with the heads that share a key head.
struct Block<'a> {
    span: &'a Span,
    /// Number of the first query of the block within the span, and how many.
    first: usize,
    len: usize,
    key_head: usize,
}

impl Attention {
    fn group(&self) -> usize {
        self.heads.query / self.heads.key
    }

    fn blocks<'a>(&self, span: &'a Span, key_head: usize) -> impl Iterator<Item = Block<'a>> + use<'a> {
        let queries = span.queries.len();
        (0..queries).step_by(BLOCK).map(move |first| Block { span, first, len: BLOCK.min(queries - first), key_head })
    }

    /// The block's rows of a [rows, query · dim] matrix as [len · group, dim].
    fn gather(&self, block: &Block, rows: &[f32]) -> Vec<f32> {
        let (width, chunk) = (self.heads.query * self.heads.dim, self.group() * self.heads.dim);
        let first = block.span.queries.start + block.first;
        (first..first + block.len)
            .flat_map(|row| &rows[row * width + block.key_head * chunk..][..chunk])
            .copied()
            .collect()
    }

    /// The key head's [rows, dim] part of the keys or values in a range of rows.
    fn head<'a>(&self, rows: &'a [f32], range: &Range<usize>, key_head: usize) -> Matrix<'a> {
        let width = self.heads.key * self.heads.dim;
        let start = (range.start * width + key_head * self.heads.dim).min(rows.len());
        Matrix::new(&rows[start..], range.len(), self.heads.dim, width)
    }

    /// Prefix and own rows that the last query of the block can see, with the logical position where each begins.
    fn context(&self, block: &Block) -> [(Range<usize>, usize); 2] {
        let Span { prefix, own, .. } = block.span;
        let end = block.span.visible(block.first + block.len - 1, None).end;
        [(prefix.clone(), 0), (own.start..own.start + (end - prefix.len()), prefix.len())]
    }

    /// Scores before the softmax, capped: [len · group, keys].
    fn scores(&self, block: &Block, queries: &[f32], k: &[f32], keys: usize) -> Vec<f32> {
        let mut scores = vec![0.0; block.len * self.group() * keys];
        for (rows, start) in self.context(block) {
            let (q, k) = (Matrix::dense(queries, self.heads.dim), self.head(k, &rows, block.key_head).t());
            matmul(&mut scores[start..], keys, 0.0, self.heads.scale, q, k, Threads::One);
        }
        if let Some(cap) = self.heads.soft_cap {
            vectorized(
                #[inline(always)]
                || scores.iter_mut().for_each(|score| *score = cap * tanh(*score / cap)),
            );
        }
        scores
    }

    /// `weights` [len · group, keys] times the keys or values of the block's context: [len · group, dim].
    fn combine(&self, block: &Block, weights: &[f32], rows: &[f32], keys: usize, scale: f32) -> Vec<f32> {
        let (m, dim) = (block.len * self.group(), self.heads.dim);
        let mut combined = vec![0.0; m * dim];
        for (range, start) in self.context(block) {
            let weights = Matrix::new(&weights[start..], m, range.len(), keys);
            let rows = self.head(rows, &range, block.key_head);
            matmul(&mut combined, dim, 1.0, scale, weights, rows, Threads::One);
        }
        combined
    }

    /// Attention of one block: ([len · group, dim] outputs, [len · group] log-sum-exps).
    fn forward(&self, block: &Block, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let group = self.group();
        let keys = block.span.visible(block.first + block.len - 1, None).end;
        let mut weights = self.scores(block, &self.gather(block, q), k, keys);
        let log_sums = weights.chunks_exact_mut(keys).enumerate().map(|(row, weights)| {
            let visible = block.span.visible(block.first + row / group, self.heads.window);
            weights[..visible.start].fill(0.0);
            weights[visible.end..].fill(0.0);
            vectorized(
                #[inline(always)]
                || softmax(&mut weights[visible]),
            )
        });
        let log_sums = log_sums.collect();
        (self.combine(block, &weights, v, keys, 1.0), log_sums)
    }
}

/// Replaces scores by their softmax and returns their log-sum-exp.
#[inline(always)]
fn softmax(scores: &mut [f32]) -> f32 {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut lanes = [0.0f32; 16];
    let mut chunks = scores.chunks_exact_mut(16);
    for chunk in &mut chunks {
        for (score, lane) in chunk.iter_mut().zip(&mut lanes) {
            *score = exp(*score - max);
            *lane += *score;
        }
    }
    let mut sum: f32 = lanes.iter().sum();
    for score in chunks.into_remainder() {
        *score = exp(*score - max);
        sum += *score;
    }
    let inverse = 1.0 / sum;
    scores.iter_mut().for_each(|score| *score *= inverse);
    max + sum.ln()
}

#[inline(always)]
fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (1.0 + exp(2.0 * x))
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "tree-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (values(q, q_layout)?, values(k, k_layout)?, values(v, v_layout)?);
        let (rows, width) = q_layout.shape().dims2()?;
        let (group, chunk) = (self.group(), self.group() * self.heads.dim);
        let pairs = self.spans.iter().flat_map(|span| (0..self.heads.key).map(move |head| (span, head)));
        let blocks: Vec<Block> = pairs.flat_map(|(span, head)| self.blocks(span, head)).collect();
        let results: Vec<_> = blocks.par_iter().map(|block| self.forward(block, q, k, v)).collect();
        let (mut y, mut log_sums) = (vec![0.0; rows * width], vec![0.0; rows * self.heads.query]);
        for (block, (outputs, sums)) in blocks.iter().zip(&results) {
            let first = block.span.queries.start + block.first;
            for i in 0..block.len {
                y[(first + i) * width + block.key_head * chunk..][..chunk]
                    .copy_from_slice(&outputs[i * chunk..][..chunk]);
                let start = (first + i) * self.heads.query + block.key_head * group;
                log_sums[start..][..group].copy_from_slice(&sums[i * group..][..group]);
            }
        }
        // A second forward through the same operation would write the same numbers.
        let _ = self.log_sums.set(log_sums);
        output(y, (rows, width))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let Some(log_sums) = self.log_sums.get() else { bail!("attention: backward before forward") };
        let pairs = self.spans.iter().flat_map(|span| (0..self.heads.key).map(move |head| (span, head)));
        let pairs: Vec<_> = pairs.collect();
        let (dq, dk, dv) = with_values([q, k, v, y, &grad], |[q, k, v, y, grad]| {
            let saved = Saved { q, k, v, y, grad, log_sums };
            let parts: Vec<_> = pairs.par_iter().map(|(span, head)| self.backward(span, *head, &saved)).collect();
            let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            // Added up in one order, whatever the number of threads: keys of a prompt collect from all its branches.
            for ((span, head), part) in pairs.iter().zip(&parts) {
                let dim = self.heads.dim;
                let keys = || span.prefix.clone().chain(span.own.clone());
                add_rows(&mut dq, span.queries.clone(), self.heads.query * dim, head * self.group() * dim, &part.dq);
                add_rows(&mut dk, keys(), self.heads.key * dim, head * dim, &part.dk);
                add_rows(&mut dv, keys(), self.heads.key * dim, head * dim, &part.dv);
            }
            (dq, dk, dv)
        })?;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

/// What the backward of every block reads.
struct Saved<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    y: &'a [f32],
    grad: &'a [f32],
    log_sums: &'a [f32],
}

/// Gradients of one span and key head: `dq` [queries, group · dim], `dk` and `dv` [context, dim].
struct Gradients {
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Attention {
    /// With P the weights, D = rowsum(dO · O) and dS = P · (dO Vᵀ − D): dQ = dS K, dK = dSᵀ Q, dV = Pᵀ dO.
    fn backward(&self, span: &Span, key_head: usize, saved: &Saved) -> Gradients {
        let (dim, group, scale) = (self.heads.dim, self.group(), self.heads.scale);
        let context = span.context() * dim;
        let mut all = Gradients { dq: Vec::new(), dk: vec![0.0; context], dv: vec![0.0; context] };
        for block in self.blocks(span, key_head) {
            let keys = span.visible(block.first + block.len - 1, None).end;
            let m = block.len * group;
            let queries = self.gather(&block, saved.q);
            let d_outputs = self.gather(&block, saved.grad);
            let outputs = self.gather(&block, saved.y);
            let mut weights = self.scores(&block, &queries, saved.k, keys);
            let mut d_scores = vec![0.0; m * keys];
            for (rows, start) in self.context(&block) {
                let v = self.head(saved.v, &rows, key_head).t();
                matmul(&mut d_scores[start..], keys, 0.0, 1.0, Matrix::dense(&d_outputs, dim), v, Threads::One);
            }
            for (row, (weights, d_scores)) in
                weights.chunks_exact_mut(keys).zip(d_scores.chunks_exact_mut(keys)).enumerate()
            {
                let query = block.first + row / group;
                let visible = span.visible(query, self.heads.window);
                let log_sum =
                    saved.log_sums[(span.queries.start + query) * self.heads.query + key_head * group + row % group];
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
                let pull = dot(&d_outputs[row * dim..][..dim], &outputs[row * dim..][..dim]);
                for outside in [0..visible.start, visible.end..keys] {
                    weights[outside.clone()].fill(0.0);
                    d_scores[outside].fill(0.0);
                }
                let (weights, d_scores) = (&mut weights[visible.clone()], &mut d_scores[visible]);
                vectorized(
                    #[inline(always)]
                    || score_gradient(weights, d_scores, log_sum, pull, self.heads.soft_cap),
                );
            }
            all.dq.extend(self.combine(&block, &d_scores, saved.k, keys, scale));
            let transposed = |values| Matrix::new(values, m, keys, keys).t();
            let (queries, d_outputs) = (Matrix::dense(&queries, dim), Matrix::dense(&d_outputs, dim));
            matmul(&mut all.dk, dim, 1.0, scale, transposed(&d_scores), queries, Threads::One);
            matmul(&mut all.dv, dim, 1.0, 1.0, transposed(&weights), d_outputs, Threads::One);
        }
        all
    }
}

/// Turns scores into weights, and the gradient of the weights into that of the scores before the cap.
#[inline(always)]
fn score_gradient(scores: &mut [f32], d_scores: &mut [f32], log_sum: f32, pull: f32, soft_cap: Option<f32>) {
    let inverse_cap = soft_cap.map_or(0.0, f32::recip);
    for (score, d_score) in scores.iter_mut().zip(d_scores) {
        let weight = exp(*score - log_sum);
        let capped = *score * inverse_cap;
        *d_score = weight * (*d_score - pull) * (1.0 - capped * capped);
        *score = weight;
    }
}

/// Adds consecutive chunks of `part` to the given rows of a matrix of `width` columns, starting at `column`.
fn add_rows(matrix: &mut [f32], rows: impl Iterator<Item = usize> + Clone, width: usize, column: usize, part: &[f32]) {
    let count = rows.clone().count();
    if count == 0 {
        return;
    }
    let chunk = part.len() / count;
    for (row, part) in rows.zip(part.chunks_exact(chunk)) {
        for (sum, value) in matrix[row * width + column..][..chunk].iter_mut().zip(part) {
            *sum += value;
        }
    }
}
