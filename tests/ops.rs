//! Every operation against the same mathematics composed of plain candle operations in f64 under candle's own autograd, and
//! against finite differences of itself. Attention, the head and products have modules of their own.

use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::ops::sigmoid;
use candor::config::Dtype;
use candor::ops::buffer::{Buffer, Pool, SPARE};
use candor::ops::gate::Activation;
use candor::ops::kernel::Kernel;
use candor::ops::left::Left;
use candor::ops::linear::{Linear, LowRank};
use candor::ops::norm::RmsNorm;
use candor::ops::panels::{Panels, Threads};
use candor::ops::rope::{Direction, Rotation};
use candor::ops::rows::in_turns;
use candor::random::SplitMix64;
use rayon::prelude::*;

use crate::model::values;
use crate::{check, toy};

/// Row counts that are no multiple of any block.
pub const ROWS: [usize; 4] = [1, 17, 33, 300];

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

/// The numbers of a tensor, as operations take them.
pub fn floats(x: &Tensor) -> Vec<f32> {
    narrowed(x).flatten_all().unwrap().to_vec1().unwrap()
}

/// From the gradient of a value to those of its inputs.
pub type Backward<'a> = Box<dyn Fn(&[f32]) -> Vec<Vec<f32>> + 'a>;

/// What an operation returns: its value, and its backward: the gradients of all inputs, given that of the value.
pub struct Computed<'a> {
    pub value: Vec<f32>,
    pub backward: Backward<'a>,
}

/// Every difference is small beside the largest wanted value (or 0.1, where sums of terms of order 1 cancel).
#[track_caller]
pub fn same(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}: lengths differ");
    let largest = want.iter().fold(0.1, |largest: f64, x| largest.max(x.abs()));
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        // Written so that NaN fails.
        let fits = (got - want).abs() <= tolerance * largest;
        assert!(fits, "{name}[{index}]: got {got}, want {want}, largest {largest}");
    }
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// Value and gradients of Σ f(inputs) · seed with respect to every input.
pub fn value_and_gradients(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor], seed: u64) -> Vec<Vec<f64>> {
    let variables: Vec<Var> = inputs.iter().map(|input| Var::from_tensor(input).unwrap()).collect();
    let tensors: Vec<Tensor> = variables.iter().map(|variable| variable.as_tensor().clone()).collect();
    let y = f(&tensors).unwrap();
    let seed = random(seed, (1, y.elem_count())).reshape(y.shape()).unwrap().to_dtype(y.dtype()).unwrap();
    let grads = (&y * seed).unwrap().sum_all().unwrap().backward().unwrap();
    let gradient = |variable: &Var| values(grads.get(variable).expect("the operation cut the graph"));
    std::iter::once(values(&y)).chain(variables.iter().map(gradient)).collect()
}

/// The same of an operation, its inputs as plain numbers.
pub fn computed<'a>(f: impl Fn(&[Vec<f32>]) -> Computed<'a>, inputs: &[Tensor], seed: u64) -> Vec<Vec<f64>> {
    let inputs: Vec<Vec<f32>> = inputs.iter().map(floats).collect();
    let Computed { value, backward } = f(&inputs);
    let gradients = backward(&floats(&random(seed, (1, value.len()))));
    std::iter::once(&value).chain(&gradients).map(|values| widened(values)).collect()
}

/// Checks the f32 operation `got` against its f64 composition `want`, and its gradients against both `want`'s and central
/// differences of its own values along one random direction per input.
#[track_caller]
pub fn check_op<'a>(
    name: &str,
    inputs: &[Tensor],
    got: impl Fn(&[Vec<f32>]) -> Computed<'a>,
    want: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    const SEED: u64 = 99;
    let results = computed(&got, inputs, SEED);
    let wanted = value_and_gradients(&want, inputs, SEED);
    assert_eq!(results.len(), wanted.len(), "{name}: one gradient per input");
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
            let mut inputs: Vec<Vec<f32>> = inputs.iter().map(floats).collect();
            inputs[index] = floats(&(input + (&direction * step).unwrap()).unwrap());
            widened(&got(&inputs).value)
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

/// `x Wᵀ` with a bias and an adapter, if there are; the gradients are those of x, A and B.
pub fn product<'a>(x: &[f32], weight: &'a Panels, bias: Option<&'a [f32]>, adapter: Option<LowRank>) -> Computed<'a> {
    let x = x.to_vec();
    let ((wide, narrow), kernel) = (weight.dims(), weight.kernel());
    let linear = Linear { weight, bias, adapter: adapter.as_ref(), mask: None, backward: false };
    let left = Left::new(&x, narrow, kernel);
    let (mut value, down) = (vec![f32::NAN; x.len() / narrow * wide], linear.down(&left));
    linear.apply_all(&left, down.as_ref(), &mut value, false, Threads::One);
    let backward = move |grad: &[f32]| {
        let transposed = weight.transposed(0..wide, Threads::One);
        let linear = Linear { weight: &transposed, bias: None, adapter: adapter.as_ref(), mask: None, backward: true };
        let left = Left::new(grad, wide, kernel);
        let (d_down, mut dx, mut added) = (linear.down(&left), vec![f32::NAN; x.len()], vec![0.0; x.len()]);
        linear.apply_all(&left, d_down.as_ref(), &mut dx, false, Threads::One);
        linear.apply_all(&left, d_down.as_ref(), &mut added, true, Threads::All);
        check::same_bits("the gradient added to zeros", &added, &dx);
        let mut gradients = vec![dx];
        if let (Some(adapter), Some(down), Some(d_down)) = (&adapter, &down, &d_down) {
            let mut gradient = adapter.zeros();
            adapter.add_gradient(&Left::new(&x, narrow, kernel), down, &left, d_down, &mut gradient);
            let of_b = gradient.b();
            gradients.extend([gradient.a, of_b]);
        }
        gradients
    };
    Computed { value, backward: Box::new(backward) }
}

/// Small integers, whose products and sums every kernel has exactly: the gradients of an adapter are those of the plain kernel. Catches
/// rows that change places on their way into tiles, what lies after the last row, and columns of a neighbor.
#[test]
fn gradients_of_adapters_are_the_same_with_every_kernel() {
    for (rows, wide, narrow, rank) in
        [(1, 37, 21, 3), (15, 64, 96, 16), (17, 37, 33, 1), (40, 33, 64, 40), (300, 96, 64, 16)]
    {
        let integers = |seed, shape| -> Vec<f32> { floats(&random(seed, shape)).iter().map(|x| x.round()).collect() };
        let (x, grad) = (integers(1, (rows, narrow)), integers(2, (rows, wide)));
        let (w, a, b) = (integers(3, (wide, narrow)), integers(4, (rank, narrow)), integers(5, (wide, rank)));
        let gradients = |kernel| {
            let (frozen, adapter) =
                (Panels::pack(&w, narrow, kernel), LowRank::new(a.clone(), b.clone(), rank, 0.5, kernel));
            (product(&x, &frozen, None, Some(adapter)).backward)(&grad)
        };
        let want = gradients(Kernel::Gemm);
        assert!(want[1..].iter().all(|gradient| gradient.iter().any(|x| *x != 0.0)), "nothing to compare");
        for kernel in check::kernels().into_iter().filter(|kernel| *kernel != Kernel::Int8) {
            for (name, got, want) in [("A", &gradients(kernel)[1], &want[1]), ("B", &gradients(kernel)[2], &want[2])] {
                check::same_bits(&format!("gradient of {name}, {rows} rows, {kernel:?}"), got, want);
            }
        }
    }
}

#[test]
fn linear_without_and_with_an_adapter() {
    for (rows, kernel) in
        ROWS.into_iter().flat_map(|rows| check::kernels().into_iter().map(move |kernel| (rows, kernel)))
    {
        if kernel.dtype() != Dtype::F32 {
            continue;
        }
        let (wide, narrow, rank) = (37, 21, 3);
        let (x, w) = (random(1, (rows, narrow)), random(2, (wide, narrow)));
        let (a, b) = (random(3, (rank, narrow)), random(4, (wide, rank)));
        let bias = random(5, (1, wide)).flatten_all().unwrap();
        let (frozen, shift) = (Panels::pack(&floats(&w), narrow, kernel), floats(&bias));
        let plain = |x: &[Tensor]| x[0].matmul(&w.t()?);
        let one = std::slice::from_ref(&x);
        let name = |what: &str| format!("{what} linear, {rows} rows, {kernel:?}");
        check_op(&name("frozen"), one, |x| product(&x[0], &frozen, None, None), plain);
        check_op(
            &name("biased"),
            one,
            |x| product(&x[0], &frozen, Some(&shift), None),
            |x| plain(x)?.broadcast_add(&bias),
        );
        let adapted = |x: &[Tensor]| plain(x)? + (x[0].matmul(&x[1].t()?)?.matmul(&x[2].t()?)? * 0.7)?;
        let low_rank = |x: &[Vec<f32>]| Some(LowRank::new(x[1].clone(), x[2].clone(), rank, 0.7, kernel));
        let all = [x.clone(), a, b];
        check_op(&name("adapted"), &all, |x| product(&x[0], &frozen, None, low_rank(x)), adapted);
        check_op(
            &name("adapted and biased"),
            &all,
            |x| product(&x[0], &frozen, Some(&shift), low_rank(x)),
            |x| adapted(x)?.broadcast_add(&bias),
        );
    }
}

/// A normalization of `scale · x`.
fn normalized<'a>(x: &[f32], scale: f32, norm: &'a RmsNorm) -> Computed<'a> {
    let x: Vec<f32> = x.iter().map(|x| scale * x).collect();
    let mut value = vec![f32::NAN; x.len()];
    norm.forward(&x, &mut value);
    let backward = move |grad: &[f32]| {
        // It is added to what is there.
        let mut dx = vec![0.0; x.len()];
        norm.backward(&x, grad, &mut dx);
        let mut twice = dx.clone();
        norm.backward(&x, grad, &mut twice);
        check::same_bits("twice the gradient", &twice, &dx.iter().map(|x| x + x).collect::<Vec<_>>());
        vec![dx.into_iter().map(|dx| scale * dx).collect()]
    };
    Computed { value, backward: Box::new(backward) }
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
        let norm = RmsNorm { gain: floats(&gain), epsilon: EPSILON };
        for scale in [1.0, 0.01, 300.0] {
            let x = (random(1, (rows, width)) * scale).unwrap();
            // Unit scale also goes through finite differences; the others would need other steps, so they are scaled inside.
            let unit = [(&x / scale).unwrap()];
            let name = format!("rms_norm {rows} × {width} at scale {scale}");
            check_op(&name, &unit, |x| normalized(&x[0], scale as f32, &norm), |x| composed(&[(&x[0] * scale)?]));
        }
    }
}

#[test]
fn rms_norm_of_every_head() {
    const EPSILON: f64 = 1e-2;
    for (rows, heads, dim) in [(1, 3, 16), (17, 1, 21), (300, 3, 8)] {
        let gain = random(2, (1, dim)).flatten_all().unwrap();
        let norm = RmsNorm { gain: floats(&gain), epsilon: EPSILON };
        let composed = |x: &[Tensor]| {
            let x = x[0].reshape((rows, heads, dim))?;
            let mean = (x.sqr()?.sum_keepdim(2)? / dim as f64)?;
            x.broadcast_div(&(mean + EPSILON)?.sqrt()?)?.broadcast_mul(&gain)?.reshape((rows, heads * dim))
        };
        let x = random(1, (rows, heads * dim));
        let name = format!("rms_norm of {rows} × {heads} × {dim}");
        check_op(&name, &[x], |x| normalized(&x[0], 1.0, &norm), composed);
    }
}

#[test]
fn rope_at_scattered_positions() {
    for (rows, heads, dim) in [(1, 3, 16), (17, 1, 64), (33, 2, 16), (300, 3, 64)] {
        let half = dim / 2;
        let positions: Vec<usize> = (0..rows).map(|row| (row * 37 + 5) % 191).collect();
        let frequencies: Vec<f64> = (0..half).map(|i| 10_000f64.powf(-(i as f64) / half as f64)).collect();
        // The rows come after others of the same call.
        const BEFORE: usize = 3;
        let rotation = Rotation::new(&[&[11; BEFORE], positions.as_slice()].concat(), &frequencies);
        const SCALE: f32 = 0.3;
        let rotate = |x: &[f32], direction| {
            let mut x = x.to_vec();
            rotation.apply(&mut x, BEFORE..BEFORE + rows, direction, SCALE);
            x
        };
        let angles = positions.iter().flat_map(|&p| frequencies.iter().map(move |f| f64::from(p as f32 * *f as f32)));
        let angles = Tensor::from_vec(angles.collect::<Vec<f64>>(), (rows, 1, half), &Device::Cpu).unwrap();
        let (cosines, sines) = (angles.cos().unwrap(), angles.sin().unwrap());
        let composed = |x: &[Tensor]| {
            let x = x[0].reshape((rows, heads, dim))?;
            let (x1, x2) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
            let y1 = (x1.broadcast_mul(&cosines)? - x2.broadcast_mul(&sines)?)?;
            let y2 = (x2.broadcast_mul(&cosines)? + x1.broadcast_mul(&sines)?)?;
            Tensor::cat(&[y1, y2], 2)?.reshape((rows, heads * dim))? * f64::from(SCALE)
        };
        let x = random(1, (rows, heads * dim));
        let rotated = |x: &[Vec<f32>]| Computed {
            value: rotate(&x[0], Direction::Forward),
            backward: Box::new(|grad: &[f32]| vec![rotate(grad, Direction::Backward)]),
        };
        check_op(&format!("rope {rows} × {heads} × {dim}"), &[x], rotated, composed);
    }
}

fn gated(gate: &[f32], up: &[f32], activation: Activation) -> Computed<'static> {
    let width = gate.len();
    let mut rows = [gate, up, &vec![f32::NAN; width]].concat();
    activation.forward(&mut rows, width);
    let value = rows.split_off(2 * width);
    let backward = move |grad: &[f32]| {
        let mut rows = [&rows[..], grad].concat();
        activation.backward(&mut rows, width);
        rows[..2 * width].chunks(width).map(<[f32]>::to_vec).collect()
    };
    Computed { value, backward: Box::new(backward) }
}

#[test]
fn gated_activations() {
    let silu = |x: &Tensor| x * sigmoid(x)?;
    let gelu = |x: &Tensor| {
        let inner = ((x + (x.powf(3.0)? * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
        (x * 0.5)? * (inner.tanh()? + 1.0)?
    };
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

/// The first product prepares an adapter, and many begin at once. Catches preparation that waits for parallel work of its own: the
/// thread that prepares would take over another product meanwhile, and two would wait for each other.
#[test]
fn parallel_work_that_begins_with_the_same_adapters_does_not_wait_for_itself() {
    const RANK: usize = 8;
    toy::within(120, || {
        let prepare = || LowRank::new(vec![1.0; 64 * RANK], vec![1.0; 2048 * RANK], RANK, 1.0, check::f32_kernel());
        for _ in 0..60 {
            let adapters: Vec<OnceLock<LowRank>> = (0..32).map(|_| OnceLock::new()).collect();
            let begin = |first: usize| {
                let order: Vec<usize> = (0..32).map(|number| (first + 5 * number) % 32).collect();
                order.into_par_iter().with_max_len(1).for_each(|number| {
                    adapters[number].get_or_init(prepare);
                });
            };
            let begin = &begin;
            std::thread::scope(|scope| (0..4).for_each(|thread| drop(scope.spawn(move || begin(8 * thread)))));
        }
    });
}

/// Catches buffers that begin in the middle of a line: every row of a tile would be loaded twice.
#[test]
fn buffers_begin_with_a_line_of_the_cache() {
    for len in [0, 1, 7, 63, 4096, 8191, 8192, 100_000, 1 << 20] {
        assert_eq!(Buffer::<f32>::new(len).as_ptr() as usize % 64, 0, "{len} f32");
        assert_eq!(Buffer::<u16>::new(len).as_ptr() as usize % 64, 0, "{len} u16");
        assert_eq!(Buffer::<f32>::new(len).len(), len);
    }
}

/// Steps whose micro-batches have ever other sizes. Catches a pool that keeps what no size fits any more, and one that asks for new
/// memory where it has some.
#[test]
fn memory_that_is_used_again_does_not_grow_with_the_sizes_that_were_asked_for() {
    let (mut pool, mut random, mut most) = (Pool::<f32>::EMPTY, SplitMix64::new(3), 0);
    for step in 0..200 {
        let rows = 1000 + (4000.0 * random.next_f64()) as usize;
        let taken: Vec<Vec<f32>> = (0..20).map(|layer| pool.take(rows * [64, 20, 90][layer % 3])).collect();
        most = most.max(taken.iter().map(Vec::len).sum());
        taken.into_iter().for_each(|values| pool.give(values));
        assert!(pool.held() <= most + most / SPARE, "step {step}: {} numbers are held, {most} were used", pool.held());
    }
    let held = pool.held();
    for _ in 0..3 {
        let taken: Vec<Vec<f32>> = (0..20).map(|_| pool.take(64_000)).collect();
        taken.into_iter().for_each(|values| pool.give(values));
        let again: Vec<Vec<f32>> = (0..20).map(|_| pool.take(64_000)).collect();
        let addresses = |all: &[Vec<f32>]| all.iter().map(|values| values.as_ptr()).collect::<BTreeSet<_>>();
        let before = addresses(&again);
        again.into_iter().for_each(|values| pool.give(values));
        let taken: Vec<Vec<f32>> = (0..20).map(|_| pool.take(64_000)).collect();
        assert_eq!(addresses(&taken), before, "the same memory serves the same sizes");
        taken.into_iter().for_each(|values| pool.give(values));
    }
    assert!(pool.held() <= held.max(most + most / SPARE));
}

/// Catches tasks that are left out or done twice, tasks that stay with a slow thread while others have nothing to do, and a panic in
/// one of them that hangs or is lost.
#[test]
fn every_task_is_done_once_and_a_panic_in_one_ends_all() {
    for (tasks, threads) in
        [0, 1, 3, 97, 1000].into_iter().flat_map(|tasks| [(tasks, Threads::One), (tasks, Threads::All)])
    {
        let done: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        in_turns(tasks, threads, |turns| {
            for task in turns {
                done[task].fetch_add(1, Ordering::Relaxed);
            }
        });
        assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1), "{tasks} tasks");
    }
    toy::within(60, || {
        if rayon::current_num_threads() > 1 {
            let done = AtomicUsize::new(0);
            in_turns(100, Threads::All, |turns| {
                for task in turns {
                    // The first waits until all others are done.
                    while task == 0 && done.load(Ordering::Acquire) < 99 {
                        std::thread::yield_now();
                    }
                    done.fetch_add(1, Ordering::Release);
                }
            });
        }
        for part in [0, 1, 3] {
            let caught = std::panic::catch_unwind(|| {
                in_turns(4, Threads::All, |turns| turns.for_each(|task| assert_ne!(task, part, "on purpose")))
            });
            assert!(caught.is_err(), "part {part} panicked");
        }
    });
}
