//! Attention over trees and caches against full score matrices in f64, and queries whose results do not depend on which others
//! are computed with them.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};
use candle_nn::ops::softmax;
use candor::ops::attention::{self, Heads, Span};
use candor::ops::attention_backward::{self, Gradients, Saved};
use candor::ops::buffer::Buffer;
use candor::ops::gate::Activation;
use candor::ops::kernel::Kernel;
use candor::ops::keys::{BLOCK, Keys, Store, padded};
use candor::ops::rounded::Rounded;
use proptest::prelude::*;

use crate::check;
use crate::ops::{Computed, ROWS, check_op, computed, floats, random, same, value_and_gradients};

/// The spans of a prompt and branches over the rows of one call, as the learner lays them out, after other trees.
pub fn tree(before: &[Span], prompt: usize, branches: &[usize]) -> Vec<Span> {
    let mut spans = before.to_vec();
    let mut add = |rows: usize, prefix: &Range<usize>| {
        let (queries, keys) = spans.last().map_or((0, 0), |last| (last.queries.end, padded(last.own.end)));
        spans.push(Span { queries: queries..queries + rows, prefix: prefix.clone(), own: keys..keys + rows });
        keys..keys + rows
    };
    let prompt = add(prompt, &(0..0));
    for branch in branches {
        add(*branch, &prompt);
    }
    spans
}

/// Attention by full score matrices, one span and head at a time; spans cover the queries in order.
fn slow_attention(x: &[Tensor], heads: Heads, spans: &[Span]) -> Result<Tensor> {
    let head = |x: &Tensor, rows: &Range<usize>, head: usize| {
        x.narrow(0, rows.start, rows.len())?.narrow(1, head * heads.dim, heads.dim)
    };
    let mut all = Vec::new();
    for Span { queries, prefix, own } in spans {
        let mut outputs = Vec::new();
        for index in 0..heads.query {
            let key = index / (heads.query / heads.key);
            let context = |x: &Tensor| match prefix.is_empty() {
                true => head(x, own, key),
                false => Tensor::cat(&[head(x, prefix, key)?, head(x, own, key)?], 0),
            };
            let mut scores = (head(&x[0], queries, index)?.matmul(&context(&x[1])?.t()?)? * f64::from(heads.scale))?;
            if let Some(cap) = heads.soft_cap.map(f64::from) {
                scores = ((scores / cap)?.tanh()? * cap)?;
            }
            let (n, keys) = scores.dims2()?;
            let hidden = |i: usize, j: usize| {
                let own_position = keys - n + i;
                j > own_position || heads.window.is_some_and(|window| j + window <= own_position)
            };
            let mask = (0..n).flat_map(|i| (0..keys).map(move |j| if hidden(i, j) { -1e30 } else { 0.0 }));
            let mask = Tensor::from_vec(mask.collect::<Vec<f64>>(), (n, keys), &Device::Cpu)?;
            outputs.push(softmax(&(scores + mask)?, 1)?.matmul(&context(&x[2])?)?);
        }
        all.push(Tensor::cat(&outputs, 1)?);
    }
    Tensor::cat(&all, 0)
}

/// Keys and values of these rows, one after the other. Those that no span has are somebody else's leftovers, and must not be seen.
pub fn stored(heads: Heads, keys: &[f32], values: &[f32], spans: &[Span], kernel: Kernel) -> Keys {
    let rows = keys.len() / (heads.key * heads.dim);
    let [keys, values] = [keys, values].map(|rows| Rounded::of(rows, kernel));
    let mut stored = Keys::new(rows, heads, kernel, false);
    stored.write(keys.rows(), values.rows(), &[Store { from: 0..rows, to: 0 }]);
    let own = |span: &Span| Store { from: span.own.clone(), to: span.own.start };
    stored.write(keys.rows(), values.rows(), &spans.iter().map(own).collect::<Vec<_>>());
    stored
}

/// Queries as attention takes them.
fn scaled(heads: Heads, queries: &[f32], kernel: Kernel) -> Rounded {
    Rounded::of(&queries.iter().map(|x| heads.scale * x).collect::<Vec<_>>(), kernel)
}

/// In f32.
fn exact(rounded: &Rounded) -> Vec<f32> {
    let rows = rounded.rows();
    rows.in_f32(&mut vec![0.0; rows.numbers()]).to_vec()
}

/// What is returned, and the log-sums.
pub fn attend(heads: Heads, queries: &[f32], keys: &Keys, spans: &[Span], kernel: Kernel) -> (Vec<f32>, Buffer) {
    let mut attended = Rounded::of(&vec![f32::NAN; queries.len()], kernel);
    let mut log_sums = Buffer::new(queries.len() / heads.dim);
    let queries = scaled(heads, queries, kernel);
    attention::forward(heads, queries.rows(), keys, spans, attended.rows_mut(), &mut log_sums);
    (exact(&attended), log_sums)
}

/// Attention of queries over rows of keys and values.
pub fn attention<'a>(x: &[Vec<f32>], heads: Heads, spans: &'a [Span], kernel: Kernel) -> Computed<'a> {
    let keys = stored(heads, &x[1], &x[2], spans, kernel);
    let (value, log_sums) = attend(heads, &x[0], &keys, spans, kernel);
    let (attended, x) = (value.clone(), x.to_vec());
    let backward = move |grad: &[f32]| {
        let swapped = stored(heads, &x[2], &x[1], spans, kernel);
        let (rows, width) = (x[0].len() / (heads.query * heads.dim), heads.key * heads.dim);
        let mut by_rows = [x[0].len(), rows * width, rows * width].map(|len| vec![f32::NAN; len]);
        let [queries, d_keys, values] = &mut by_rows;
        let mut pulls = vec![f32::NAN; log_sums.len()];
        attention_backward::pulls(heads, grad, Rounded::of(&attended, kernel).rows(), &mut pulls);
        let (of_queries, grad) = (scaled(heads, &x[0], kernel), Rounded::of(grad, kernel));
        let (log_sums, pulls) = (&log_sums, &*pulls);
        let [of_queries, grad] = [of_queries.rows(), grad.rows()];
        let saved = Saved { queries: of_queries, keys: &keys, swapped: &swapped, log_sums, pulls, grad };
        attention_backward::backward(heads, &saved, spans, Gradients { queries, keys: d_keys, values });
        queries.iter_mut().for_each(|grad| *grad *= heads.scale);
        let [queries, d_keys, values] = by_rows;
        let stored = [d_keys, values].map(|rows| {
            let mut stored = vec![0.0; x[1].len()];
            for Span { queries, own, .. } in spans {
                let rows = &rows[queries.start * width..queries.end * width];
                stored[own.start * width..own.end * width].copy_from_slice(rows);
            }
            stored
        });
        [vec![queries], stored.into()].concat()
    };
    Computed { value, backward: Box::new(backward) }
}

/// Every combination of what families add to attention.
pub const KINDS: [(Option<f32>, Option<usize>); 4] =
    [(None, None), (Some(1.5), None), (None, Some(16)), (Some(1.5), Some(5))];

/// Queries, keys and values.
fn inputs(heads: Heads, queries: usize, keys: usize) -> [Tensor; 3] {
    let shape = (keys, heads.key * heads.dim);
    [random(1, (queries, heads.query * heads.dim)), random(2, shape), random(3, shape)]
}

#[test]
fn attention_over_trees() {
    let mut layouts: Vec<Vec<Span>> = ROWS.iter().map(|&rows| tree(&[], rows, &[])).collect();
    layouts.extend([tree(&[], 40, &[1, 35, 70]), tree(&[], 1, &[1, 10]), tree(&[], 32, &[32, 64])]);
    layouts.push(tree(&tree(&tree(&[], 17, &[3, 40]), 5, &[]), 33, &[1, 2]));
    for (query, key, dim) in [(6, 2, 16), (2, 2, 64)] {
        for spans in &layouts {
            let last = spans.last().unwrap();
            let (queries, keys) = (last.queries.end, last.own.end);
            for (soft_cap, window) in KINDS {
                let heads = Heads { query, key, dim, scale: 0.2, soft_cap, window };
                let name = format!("attention, {queries} queries, {keys} keys, {heads:?}");
                let inputs = inputs(heads, queries, keys);
                check_op(
                    &name,
                    &inputs,
                    |x| attention(x, heads, spans, check::f32_kernel()),
                    |x| slow_attention(x, heads, spans),
                );
            }
        }
    }
}

#[test]
fn attention_over_caches() {
    let spans = [
        // Two branches of one prompt, decoding; their keys lie before and after it, one token is the branch's first.
        Span { queries: 0..1, prefix: 32..49, own: 96..101 },
        Span { queries: 1..2, prefix: 32..49, own: 0..1 },
        // A prompt of more queries than one block, a branch without a prompt, and a chunk in the middle of a branch.
        Span { queries: 2..37, prefix: 0..0, own: 128..163 },
        Span { queries: 37..38, prefix: 0..0, own: 64..73 },
        Span { queries: 38..78, prefix: 128..163, own: 192..241 },
    ];
    for (query, key, dim) in [(6, 2, 16), (2, 2, 64)] {
        for (soft_cap, window) in KINDS {
            let heads = Heads { query, key, dim, scale: 0.2, soft_cap, window };
            let inputs = inputs(heads, 78, 256);
            let want = slow_attention(&inputs, heads, &spans).unwrap();
            let [q, k, v] = inputs.each_ref().map(floats);
            let kernel = check::f32_kernel();
            let got: Vec<f64> = attend(heads, &q, &stored(heads, &k, &v, &spans, kernel), &spans, kernel)
                .0
                .into_iter()
                .map(f64::from)
                .collect();
            same(&format!("attention over a cache, {heads:?}"), &got, &crate::model::values(&want), 5e-6);
        }
    }
}

#[test]
fn attention_with_saturated_scores_stays_finite() {
    let heads = Heads { query: 2, key: 1, dim: 16, scale: 1.0, soft_cap: None, window: None };
    let inputs = [(random(1, (40, 32)) * 30.0).unwrap(), (random(2, (52, 16)) * 30.0).unwrap(), random(3, (52, 16))];
    let spans = tree(&[], 20, &[20]);
    let got = computed(|x| attention(x, heads, &spans, check::f32_kernel()), &inputs, 5);
    let want = value_and_gradients(|x| slow_attention(x, heads, &spans), &inputs, 5);
    // Scores in the thousands carry absolute errors of 1e-3 in f32.
    got.iter().zip(&want).for_each(|(got, want)| same("saturated", got, want, 1e-2));
}

/// A kernel in bf16 rounds queries, keys, values and weights, and sums in f32: what it returns is off by that, and no more. A
/// pair in the wrong order, or a channel that is missing, is off by its whole size.
#[test]
fn attention_in_bf16_is_off_by_rounding() {
    let spans = tree(&tree(&[], 17, &[3, 40]), 33, &[1, 70]);
    let last = spans.last().unwrap();
    for kernel in check::kernels().into_iter().filter(|kernel| kernel.rounds_inputs()) {
        for ((query, key, dim), (soft_cap, window)) in
            [(6, 2, 16), (2, 2, 64), (3, 1, 33)].into_iter().flat_map(|heads| KINDS.map(|kind| (heads, kind)))
        {
            let heads = Heads { query, key, dim, scale: 0.2, soft_cap, window };
            let inputs = inputs(heads, last.queries.end, last.own.end);
            let got = computed(|x| attention(x, heads, &spans, kernel), &inputs, 5);
            let want = value_and_gradients(|x| slow_attention(x, heads, &spans), &inputs, 5);
            for (part, (got, want)) in got.iter().zip(&want).enumerate() {
                let size = (want.iter().map(|x| x * x).sum::<f64>() / want.len() as f64).sqrt();
                let off: Vec<f64> = got.iter().zip(want).map(|(got, want)| got - want).collect();
                let mean = (off.iter().map(|x| x * x).sum::<f64>() / off.len() as f64).sqrt();
                assert!(mean < 0.01 * size, "{kernel:?}, {heads:?}, {part}: off by {mean} of {size}");
            }
        }
    }
}

/// What lies behind a sequence's last row, up to the end of its last block, is somebody else's leftovers.
#[test]
fn rows_that_no_span_has_are_never_seen() {
    let heads = Heads { query: 2, key: 1, dim: 16, scale: 0.2, soft_cap: None, window: Some(20) };
    let spans = tree(&[], 35, &[3, 40]);
    let last = spans.last().unwrap();
    let [q, k, v] = inputs(heads, last.queries.end, last.own.end).each_ref().map(floats);
    let own = |row: usize| spans.iter().any(|span| span.own.contains(&row));
    let spoiled = |values: &[f32]| -> Vec<f32> {
        let width = heads.key * heads.dim;
        values.iter().enumerate().map(|(index, x)| if own(index / width) { *x } else { f32::NAN }).collect()
    };
    let grad = floats(&random(4, (1, q.len())));
    let run = |k: Vec<f32>, v: Vec<f32>, kernel| {
        let x = [q.clone(), k, v];
        let Computed { value, backward } = attention(&x, heads, &spans, kernel);
        let gradients = backward(&grad);
        (value, gradients)
    };
    for kernel in check::kernels() {
        let (got, want) = (run(spoiled(&k), spoiled(&v), kernel), run(k.clone(), v.clone(), kernel));
        assert!(got == want && got.0.iter().all(|x| x.is_finite()), "{kernel:?}");
    }
}

/// eˣ decides every softmax. For x ≥ 17, silu(−x) = −x · e⁻ˣ up to f32's rounding, and of two keys whose scores differ by x
/// the second has the weight e⁻ˣ: both show its relative error over (almost) all of its range, and where it ends.
#[test]
fn the_exponential_is_accurate_to_a_few_roundings() {
    let xs: Vec<f32> = (0..7_000).map(|i| 17.0 + i as f32 * 1e-2).collect();
    let negative: Vec<f32> = xs.iter().map(|x| -x).collect();
    let silu = |x: &[f32]| {
        let mut rows = [x, &vec![1.0; x.len()], &vec![f32::NAN; x.len()]].concat();
        Activation::Silu.forward(&mut rows, x.len());
        rows.split_off(2 * x.len())
    };
    let heads = Heads { query: 1, key: 1, dim: 1, scale: 1.0, soft_cap: None, window: None };
    let kernel = check::f32_kernel();
    let mut keys = Keys::new(2 * BLOCK, heads, kernel, false);
    let stores = [Store { from: 0..1, to: 0 }, Store { from: 1..2, to: BLOCK }];
    let both = Rounded::of(&[0.0, 1.0], kernel);
    keys.write(both.rows(), both.rows(), &stores);
    let weights = |queries: &[f32]| {
        let span = |row| Span { queries: row..row + 1, prefix: 0..1, own: BLOCK..BLOCK + 1 };
        let spans: Vec<Span> = (0..queries.len()).map(span).collect();
        attend(heads, queries, &keys, &spans, kernel).0
    };
    for ((&x, silu), weight) in xs.iter().zip(silu(&negative)).zip(weights(&negative)) {
        let want = (-f64::from(x)).exp();
        for (name, got) in [("silu", -f64::from(silu) / f64::from(x)), ("attention", f64::from(weight))] {
            assert!((got / want - 1.0).abs() < 3e-7, "{name}: e^-{x} is {got:e}, not {want:e}");
        }
    }
    assert_eq!(weights(&[-87.8, -200.0, -1e30]), [0.0; 3]);
    assert_eq!(silu(&[100.0, 1e30]), [100.0, 1e30]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Sampling computes one query at a time, over a prompt's rows and its own; the learner whole spans. Catches sums whose order
    /// depends on the block a query is in, or on where rows are stored.
    #[test]
    fn a_query_has_the_same_bits_alone_and_over_any_layout(
        prompt in 0usize..100,
        own in 1usize..100,
        queries in 1usize..100,
        kind in 0usize..4,
        shape in prop::sample::select(vec![(6, 2, 16), (2, 2, 64), (3, 1, 24), (4, 4, 8)]),
        gap in 0usize..3,
    ) {
        let ((query, key, dim), (soft_cap, window)) = (shape, KINDS[kind]);
        let heads = Heads { query, key, dim, scale: 0.2, soft_cap, window };
        let (rows, queries) = (prompt + own, queries.min(own));
        let [q, k, v] = inputs(heads, queries, rows).each_ref().map(floats);
        for kernel in check::row_invariant_kernels() {
            // A prompt with its branch right behind it, and with something between.
            let stored = |apart: usize| {
                let mut keys = Keys::new(apart + own, heads, kernel, true);
                let [k, v] = [&k, &v].map(|rows| Rounded::of(rows, kernel));
                let stores = [Store { from: 0..prompt, to: 0 }, Store { from: prompt..rows, to: apart }];
                keys.write(k.rows(), v.rows(), &stores);
                let span = Span { queries: 0..queries, prefix: 0..prompt, own: apart..apart + own };
                let attended = attend(heads, &q, &keys, &[span], kernel);
                (keys, attended)
            };
            let apart = padded(prompt) + gap * BLOCK;
            let ((_, together), (split, elsewhere)) = (stored(padded(prompt)), stored(apart));
            check::same_bits("elsewhere", &elsewhere.0, &together.0);
            check::same_bits("log-sums elsewhere", &elsewhere.1, &together.1);
            for (number, alone) in q.chunks(query * dim).enumerate() {
                let seen = own - queries + number + 1;
                let span = Span { queries: 0..1, prefix: 0..prompt, own: apart..apart + seen };
                let got = attend(heads, alone, &split, &[span], kernel);
                check::same_bits("alone", &got.0, &together.0[number * query * dim..][..query * dim]);
                check::same_bits("log-sums alone", &got.1, &together.1[number * query..][..query]);
            }
            // Branches that share their prompt, of which each is at its own token.
            let branch = |number: usize| {
                let seen = own - queries + number + 1;
                Span { queries: number..number + 1, prefix: 0..prompt, own: apart..apart + seen }
            };
            let branches: Vec<Span> = (0..queries).map(branch).collect();
            let side_by_side = attend(heads, &q, &split, &branches, kernel);
            check::same_bits("side by side", &side_by_side.0, &together.0);
            check::same_bits("log-sums side by side", &side_by_side.1, &together.1);
        }
    }
}
