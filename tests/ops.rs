//! Every fused operation against the same mathematics composed of plain candle operations in f64 under candle's own
//! autograd, and against finite differences of itself. The head has a module of its own.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::ops::{sigmoid, softmax};
use candor::ops::attention::{Heads, Span, attention};
use candor::ops::gate::{Activation, gated};
use candor::ops::linear::{Frozen, LowRank, linear};
use candor::ops::norm::rms_norm;
use candor::ops::quantized::Weight;
use candor::ops::rope::{Rotation, rope};
use candor::random::SplitMix64;

use crate::model::values;

/// Row counts that are no multiple of any block.
const ROWS: [usize; 4] = [1, 17, 33, 300];

/// Independent values of variance 1, in f64 but representable in f32.
pub fn random(seed: u64, shape: (usize, usize)) -> Tensor {
    let mut stream = SplitMix64::new(seed);
    let mut value = || f64::from(((stream.next_f64() + stream.next_f64() - 1.0) * 6f64.sqrt()) as f32);
    let values: Vec<f64> = (0..shape.0 * shape.1).map(|_| value()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

pub fn narrowed(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F32).unwrap()
}

/// Every difference is small beside the largest wanted value (or 0.1, where sums of terms of order 1 cancel).
#[track_caller]
fn same(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}: lengths differ");
    let largest = want.iter().fold(0.1, |largest: f64, x| largest.max(x.abs()));
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        // Written so that NaN fails.
        let fits = (got - want).abs() <= tolerance * largest;
        assert!(fits, "{name}[{index}]: got {got}, want {want}, largest {largest}");
    }
}

/// Value and gradients of Σ f(inputs) · seed with respect to every input.
fn value_and_gradients(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor], seed: u64) -> Vec<Vec<f64>> {
    let variables: Vec<Var> = inputs.iter().map(|input| Var::from_tensor(input).unwrap()).collect();
    let tensors: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
    let y = f(&tensors).unwrap();
    let seed = random(seed, (1, y.elem_count())).reshape(y.shape()).unwrap().to_dtype(y.dtype()).unwrap();
    let grads = (&y * seed).unwrap().sum_all().unwrap().backward().unwrap();
    let gradient = |variable: &Var| values(grads.get(variable).expect("the operation cut the graph"));
    std::iter::once(values(&y)).chain(variables.iter().map(gradient)).collect()
}

/// Checks the f32 operation `got` against its f64 composition `want`, and its gradients against both `want`'s and central
/// differences of its own values along one random direction per input.
#[track_caller]
pub fn check_op(
    name: &str,
    inputs: &[Tensor],
    got: impl Fn(&[Tensor]) -> Result<Tensor>,
    want: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    const SEED: u64 = 99;
    let inputs32: Vec<Tensor> = inputs.iter().map(narrowed).collect();
    let results = value_and_gradients(&got, &inputs32, SEED);
    let wanted = value_and_gradients(&want, inputs, SEED);
    for (part, (result, wanted)) in results.iter().zip(&wanted).enumerate() {
        same(
            &format!("{name}, {}", if part == 0 { "value".into() } else { format!("gradient {part}") }),
            result,
            wanted,
            5e-6,
        );
    }
    let seed = values(&random(SEED, (1, results[0].len())));
    for (index, input) in inputs.iter().enumerate() {
        let direction =
            random(index as u64, input.dims2().unwrap_or((1, input.elem_count()))).reshape(input.shape()).unwrap();
        let moved = |step: f64| {
            let mut inputs = inputs32.clone();
            inputs[index] = narrowed(&(input + (&direction * step).unwrap()).unwrap());
            values(&got(&inputs).unwrap())
        };
        const STEP: f64 = 1e-3;
        let terms = moved(STEP)
            .into_iter()
            .zip(moved(-STEP))
            .zip(&seed)
            .map(|((up, down), seed)| (up - down) / (2.0 * STEP) * seed);
        let slopes: Vec<f64> = terms.collect();
        let products: Vec<f64> = results[index + 1].iter().zip(values(&direction)).map(|(g, d)| g * d).collect();
        // Each value is rounded at about 1e-7 of the largest one; the roundings add up like a random walk.
        let largest = results[0].iter().fold(0.0, |largest: f64, y| largest.max(y.abs()));
        let noise = 1e-6 * largest / STEP * (slopes.len() as f64).sqrt();
        let (got, want) = (products.iter().sum::<f64>(), slopes.iter().sum::<f64>());
        let size = products.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!(
            (got - want).abs() <= noise + 3e-3 * size,
            "{name}, slope {index}: {got} by gradient, {want} by differences"
        );
    }
}

/// A frozen f32 weight.
fn dense(weight: &Tensor) -> Frozen {
    Frozen { weight: Weight::Dense(narrowed(weight)), bias: None }
}

#[test]
fn linear_without_and_with_an_adapter() {
    for rows in ROWS {
        let (wide, narrow, rank) = (37, 21, 3);
        let (x, w) = (random(1, (rows, narrow)), random(2, (wide, narrow)));
        let (a, b) = (random(3, (rank, narrow)), random(4, (wide, rank)));
        let bias = random(5, (1, wide)).flatten_all().unwrap();
        let frozen = dense(&w);
        let shifted = Frozen { bias: Some(narrowed(&bias)), ..frozen.clone() };
        let plain = |x: &[Tensor]| x[0].matmul(&w.t()?);
        let one = std::slice::from_ref(&x);
        check_op(&format!("frozen linear, {rows} rows"), one, |x| linear(&x[0], &frozen, None), plain);
        let biased = |x: &[Tensor]| linear(&x[0], &shifted, None);
        check_op(&format!("biased linear, {rows} rows"), one, biased, |x| plain(x)?.broadcast_add(&bias));
        let adapted = |x: &[Tensor]| plain(x)? + (x[0].matmul(&x[1].t()?)?.matmul(&x[2].t()?)? * 0.7)?;
        let low_rank = |x: &[Tensor]| linear(&x[0], &frozen, Some(LowRank { a: &x[1], b: &x[2], scale: 0.7 }));
        check_op(&format!("adapted linear, {rows} rows"), &[x.clone(), a.clone(), b.clone()], low_rank, adapted);
        let both = |x: &[Tensor]| linear(&x[0], &shifted, Some(LowRank { a: &x[1], b: &x[2], scale: 0.7 }));
        check_op(&format!("adapted and biased linear, {rows} rows"), &[x.clone(), a.clone(), b.clone()], both, |x| {
            adapted(x)?.broadcast_add(&bias)
        });
        // Part of the rows, as for a call with several adapters: the storage starts before the values.
        let rest = |x: &[Tensor]| -> Result<Vec<Tensor>> {
            Ok(vec![x[0].narrow(0, rows / 2, rows - rows / 2)?, x[1].clone(), x[2].clone()])
        };
        check_op(&format!("narrowed, {rows} rows"), &[x, a, b], |x| low_rank(&rest(x)?), |x| adapted(&rest(x)?));
    }
}

#[test]
fn rms_norm_with_a_gain() {
    const EPSILON: f64 = 1e-2;
    for (rows, width) in [(1, 16), (17, 21), (33, 64), (300, 19)] {
        let gain = random(2, (1, width)).flatten_all().unwrap();
        let composed = |x: &[Tensor]| {
            let mean = (x[0].sqr()?.sum_keepdim(1)? / width as f64)?;
            x[0].broadcast_div(&(mean + EPSILON)?.sqrt()?)?.broadcast_mul(&gain)
        };
        let gain32 = narrowed(&gain);
        for scale in [1.0, 0.01, 300.0] {
            let x = (random(1, (rows, width)) * scale).unwrap();
            // Unit scale also goes through finite differences; the others would need other steps, so they are scaled inside.
            let unit = [(&x / scale).unwrap()];
            let name = format!("rms_norm {rows} × {width} at scale {scale}");
            check_op(
                &name,
                &unit,
                |x| rms_norm(&(&x[0] * scale)?, &gain32, EPSILON),
                |x| composed(&[(&x[0] * scale)?]),
            );
        }
    }
}

#[test]
fn rms_norm_of_every_head() {
    const EPSILON: f64 = 1e-2;
    for (rows, heads, dim) in [(1, 3, 16), (17, 1, 21), (300, 3, 8)] {
        let gain = random(2, (1, dim)).flatten_all().unwrap();
        let gain32 = narrowed(&gain);
        let composed = |x: &[Tensor]| {
            let x = x[0].reshape((rows, heads, dim))?;
            let mean = (x.sqr()?.sum_keepdim(2)? / dim as f64)?;
            x.broadcast_div(&(mean + EPSILON)?.sqrt()?)?.broadcast_mul(&gain)?.reshape((rows, heads * dim))
        };
        let x = random(1, (rows, heads * dim));
        let name = format!("rms_norm of {rows} × {heads} × {dim}");
        check_op(&name, &[x], |x| rms_norm(&x[0], &gain32, EPSILON), composed);
    }
}

#[test]
fn rope_at_scattered_positions() {
    for (rows, heads, dim) in [(1, 3, 16), (17, 1, 64), (33, 2, 16), (300, 3, 64)] {
        let half = dim / 2;
        let positions: Vec<usize> = (0..rows).map(|row| (row * 37 + 5) % 191).collect();
        let frequencies: Vec<f64> = (0..half).map(|i| 10_000f64.powf(-(i as f64) / half as f64)).collect();
        let rotation = Rotation::new(&positions, &frequencies);
        let angles = positions.iter().flat_map(|&p| frequencies.iter().map(move |f| f64::from(p as f32 * *f as f32)));
        let angles = Tensor::from_vec(angles.collect::<Vec<f64>>(), (rows, 1, half), &Device::Cpu).unwrap();
        let (cosines, sines) = (angles.cos().unwrap(), angles.sin().unwrap());
        let composed = |x: &[Tensor]| {
            let x = x[0].reshape((rows, heads, dim))?;
            let (x1, x2) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
            let y1 = (x1.broadcast_mul(&cosines)? - x2.broadcast_mul(&sines)?)?;
            let y2 = (x2.broadcast_mul(&cosines)? + x1.broadcast_mul(&sines)?)?;
            Tensor::cat(&[y1, y2], 2)?.reshape((rows, heads * dim))
        };
        let x = random(1, (rows, heads * dim));
        check_op(&format!("rope {rows} × {heads} × {dim}"), &[x], |x| rope(&x[0], &rotation), composed);
    }
}

#[test]
fn gated_activations() {
    let silu = |x: &Tensor| x * sigmoid(x)?;
    let gelu = |x: &Tensor| {
        let inner = ((x + (x.powf(3.0)? * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
        (x * 0.5)? * (inner.tanh()? + 1.0)?
    };
    // 300 × 77 values are more than one chunk of the thread pool.
    for (rows, width) in [(1, 1), (17, 5), (33, 16), (300, 77)] {
        let inputs = [(random(1, (rows, width)) * 2.0).unwrap(), random(2, (rows, width))];
        check_op(
            &format!("silu {rows} × {width}"),
            &inputs,
            |x| gated(&x[0], &x[1], Activation::Silu),
            |x| silu(&x[0])? * &x[1],
        );
        check_op(
            &format!("gelu {rows} × {width}"),
            &inputs,
            |x| gated(&x[0], &x[1], Activation::GeluTanh),
            |x| gelu(&x[0])? * &x[1],
        );
    }
}

/// eˣ decides every softmax. For x ≥ 17, silu(−x) = −x · e⁻ˣ up to f32's rounding, and of two keys whose scores differ by x
/// the second has the weight e⁻ˣ: both show its relative error over (almost) all of its range, and where it ends.
#[test]
fn the_exponential_is_accurate_to_a_few_roundings() {
    let xs: Vec<f32> = (0..7_000).map(|i| 17.0 + i as f32 * 1e-2).collect();
    let column = |values: Vec<f32>| {
        let rows = values.len();
        Tensor::from_vec(values, (rows, 1), &Device::Cpu).unwrap()
    };
    let negative = column(xs.iter().map(|x| -x).collect());
    let ones = negative.ones_like().unwrap();
    let silu = values(&gated(&negative, &ones, Activation::Silu).unwrap());
    let heads = Heads { query: 1, key: 1, dim: 1, scale: 1.0, soft_cap: None, window: None };
    let spans: Arc<[Span]> = (0..xs.len()).map(|row| Span { queries: row..row + 1, prefix: 0..1, own: 1..2 }).collect();
    let (k, v) = (column(vec![0.0, 1.0]), column(vec![0.0, 1.0]));
    let weights = values(&attention(&negative, &k, &v, heads, &spans).unwrap());
    for ((&x, silu), weight) in xs.iter().zip(silu).zip(weights) {
        let want = (-f64::from(x)).exp();
        for (name, got) in [("silu", -silu / f64::from(x)), ("attention", weight)] {
            assert!((got / want - 1.0).abs() < 4e-7, "{name}: e^-{x} is {got:e}, not {want:e}");
        }
    }
    let far = column(vec![-87.5, -200.0, -1e30]);
    let far_weights = values(&attention(&far, &k, &v, heads, &spans[..3].into()).unwrap());
    assert_eq!(far_weights, [0.0; 3]);
    let huge = values(&gated(&column(vec![100.0, 1e30]), &column(vec![1.0, 1.0]), Activation::Silu).unwrap());
    assert_eq!(huge, [100.0, f64::from(1e30f32)]);
}

/// The spans of a prompt and branches over the rows of one call, as the learner lays them out.
fn tree(prompt: usize, branches: &[usize]) -> Vec<Span> {
    let mut spans = vec![Span { queries: 0..prompt, prefix: 0..0, own: 0..prompt }];
    for &branch in branches {
        let start = spans.last().map_or(0, |span| span.queries.end);
        let rows = start..start + branch;
        spans.push(Span { queries: rows.clone(), prefix: 0..prompt, own: rows });
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

#[test]
fn attention_over_trees_and_caches() {
    let cache = vec![
        // Two branches of one prompt, decoding; their keys lie before and after it, one token is the branch's first.
        Span { queries: 0..1, prefix: 20..37, own: 60..65 },
        Span { queries: 1..2, prefix: 20..37, own: 3..4 },
        // A prompt of more queries than one block, a branch without a prompt, and a chunk in the middle of a branch.
        Span { queries: 2..37, prefix: 0..0, own: 66..101 },
        Span { queries: 37..38, prefix: 0..0, own: 10..19 },
        Span { queries: 38..78, prefix: 66..101, own: 101..150 },
    ];
    let mut layouts: Vec<(usize, Vec<Span>)> = ROWS.iter().map(|&rows| (rows, tree(rows, &[]))).collect();
    layouts.extend([(146, tree(40, &[1, 35, 70])), (12, tree(1, &[1, 10])), (150, cache)]);
    for (query, key, dim) in [(6, 2, 16), (2, 2, 64)] {
        for (keys, spans) in &layouts {
            let queries = spans.last().unwrap().queries.end;
            let shape = (*keys, key * dim);
            let inputs = [random(1, (queries, query * dim)), random(2, shape), random(3, shape)];
            let spans: Arc<[Span]> = spans.as_slice().into();
            for (soft_cap, window) in [(None, None), (Some(1.5), None), (None, Some(16)), (Some(1.5), Some(5))] {
                let heads = Heads { query, key, dim, scale: 0.2, soft_cap, window };
                let name = format!("attention, {queries} queries, {keys} keys, {heads:?}");
                check_op(
                    &name,
                    &inputs,
                    |x| attention(&x[0], &x[1], &x[2], heads, &spans),
                    |x| slow_attention(x, heads, &spans),
                );
            }
        }
    }
}

#[test]
fn attention_with_saturated_scores_stays_finite() {
    let heads = Heads { query: 2, key: 1, dim: 16, scale: 1.0, soft_cap: None, window: None };
    let inputs = [(random(1, (40, 32)) * 30.0).unwrap(), (random(2, (40, 16)) * 30.0).unwrap(), random(3, (40, 16))];
    let spans: Arc<[Span]> = tree(20, &[20]).into();
    let inputs32: Vec<Tensor> = inputs.iter().map(narrowed).collect();
    let got = value_and_gradients(|x| attention(&x[0], &x[1], &x[2], heads, &spans), &inputs32, 5);
    let want = value_and_gradients(|x| slow_attention(x, heads, &spans), &inputs, 5);
    // Scores in the thousands carry absolute errors of 1e-3 in f32.
    got.iter().zip(&want).for_each(|(got, want)| same("saturated", got, want, 1e-2));
}

#[track_caller]
pub fn error<T>(result: Result<T>) -> String {
    result.err().expect("this must be an error").to_string()
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let x = |rows, width| narrowed(&random(1, (rows, width)));
    let heads = Heads { query: 2, key: 1, dim: 4, scale: 0.5, soft_cap: None, window: None };
    let attend = |q: &Tensor, k: &Tensor, queries: Range<usize>, prefix: Range<usize>, own: Range<usize>| {
        error(attention(q, k, k, heads, &[Span { queries, prefix, own }].into()))
    };
    attend(&x(3, 8), &x(3, 8), 0..3, 0..0, 0..3);
    for (queries, prefix, own) in [(0..4, 0..0, 0..3), (0..3, 0..0, 1..4), (0..3, 3..5, 0..3), (0..3, 0..1, 1..2)] {
        assert!(attend(&x(3, 8), &x(3, 4), queries, prefix, own).contains("points outside"));
    }
    // More queries than keys of their own, many enough that a block of them has none at all.
    assert!(attend(&x(80, 8), &x(80, 4), 0..80, 0..80, 0..3).contains("points outside"));
    let w = dense(&x(7, 5));
    let bias = Some(x(1, 5).flatten_all().unwrap());
    error(linear(&x(2, 6), &w, None));
    error(linear(&x(5, 4), &w, None));
    error(linear(&x(2, 5), &Frozen { bias, ..w.clone() }, None));
    error(linear(&x(2, 5), &w, Some(LowRank { a: &x(3, 4), b: &x(7, 3), scale: 1.0 })));
    error(linear(&x(2, 5), &w, Some(LowRank { a: &x(3, 5), b: &x(6, 3), scale: 1.0 })));
    error(rms_norm(&x(2, 7), &x(1, 3).flatten_all().unwrap(), 1e-5));
    error(gated(&x(2, 6), &x(2, 5), Activation::Silu));
    error(rope(&x(2, 6), &Rotation::new(&[0, 1], &[1.0, 0.1])));
    error(rope(&x(2, 8), &Rotation::new(&[0, 1, 2, 3], &[1.0, 0.1])));
}
