//! Products with packed weights, for every kernel of this machine: against products in f64, and rows that do not see each other.

use std::ops::Range;

use candle_core::{DType, Tensor};
use candor::config::Dtype;
use candor::ops::kernel::Kernel;
use candor::ops::left::Left;
use candor::ops::linear::{Linear, LowRank};
use candor::ops::panels::{PANEL, Panels, Threads};
use proptest::prelude::*;

use crate::ops::{floats, random};
use crate::{check, toy};

/// Random numbers as a kernel holds them: rounded by candle where that is bf16.
fn numbers(seed: u64, shape: (usize, usize), kernel: Kernel) -> Vec<f32> {
    let numbers: Tensor = random(seed, shape);
    match kernel.dtype() {
        Dtype::Bf16 => floats(&numbers.to_dtype(DType::F32).unwrap().to_dtype(DType::BF16).unwrap()),
        _ => floats(&numbers),
    }
}

/// `x · Wᵀ` for some rows of W, and what it would be without cancellation, Σ |x| |w|: [rows, outputs] each.
fn slow_product(x: &[f32], w: &[f32], narrow: usize, outputs: Range<usize>) -> Vec<(f64, f64)> {
    let dot = |x: &[f32], w: &[f32]| {
        x.iter()
            .zip(w)
            .map(|(x, w)| f64::from(*x) * f64::from(*w))
            .fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
    };
    let w = &w[outputs.start * narrow..outputs.end * narrow];
    x.chunks(narrow).flat_map(|x| w.chunks(narrow).map(move |w| dot(x, w))).collect()
}

/// Rows, outputs and inputs: around every size of block, and much longer than a sum that is set aside.
const SHAPES: [(usize, usize, usize); 14] = [
    (1, 1, 1),
    (1, 32, 32),
    (1, 97, 2050),
    (2, 33, 31),
    (12, 64, 64),
    (13, 70, 33),
    (16, 64, 512),
    (17, 31, 513),
    (31, 95, 100),
    (32, 96, 96),
    (33, 37, 21),
    (49, 130, 1030),
    (257, 33, 40),
    (300, 40, 545),
];

/// What is around the product must stay as it is.
const UNTOUCHED: f32 = 12345.0;

#[track_caller]
fn assert_product(name: &str, panels: &Panels, x: &[f32], w: &[f32], outputs: Range<usize>, threads: Threads) {
    let narrow = panels.dims().1;
    let (stride, rows) = (outputs.len() + 3, x.len() / narrow);
    let want = slow_product(x, w, narrow, outputs.clone());
    for add in [false, true] {
        let mut c = vec![UNTOUCHED; rows * stride];
        let before = if add { 0.5 } else { f32::NAN };
        c.chunks_mut(stride).for_each(|c| c[..outputs.len()].fill(before));
        panels.multiply(&Left::new(x, narrow, panels.kernel()), outputs.clone(), &mut c, stride, add, threads);
        for (row, (c, want)) in c.chunks(stride).zip(want.chunks(outputs.len())).enumerate() {
            assert!(c[outputs.len()..].iter().all(|c| *c == UNTOUCHED), "{name}: columns of others were written");
            for (column, (c, (want, size))) in c.iter().zip(want).enumerate() {
                let got = f64::from(*c) - if add { 0.5 } else { 0.0 };
                let fits = (got - want).abs() <= 1e-6 * (size + if add { 1.0 } else { 0.0 });
                assert!(fits, "{name}, add {add}, [{row}, {column}]: got {got}, want {want} of {size}");
            }
        }
    }
}

/// Catches a wrong order of pairs or panels, padding that is not zero, a sum that is not carried on, and writing outside.
#[test]
fn products_are_those_in_f64() {
    for (kernel, (rows, wide, narrow)) in
        check::kernels().into_iter().flat_map(|kernel| SHAPES.map(|shape| (kernel, shape)))
    {
        let (x, w) = (numbers(1, (rows, narrow), kernel), numbers(2, (wide, narrow), kernel));
        let panels = Panels::pack(&w, narrow, kernel);
        let last = (wide - 1) / PANEL * PANEL;
        let ranges = [0..wide, last..wide, 0..wide.div_ceil(2), wide / 2 / PANEL * PANEL..wide / 2 / PANEL * PANEL + 1];
        for (threads, outputs) in
            [Threads::One, Threads::All].into_iter().flat_map(|threads| ranges.clone().map(|range| (threads, range)))
        {
            let name = format!("{kernel:?}, {rows} × {wide} × {narrow}, {outputs:?}, {threads:?}");
            assert_product(&name, &panels, &x, &w, outputs, threads);
        }
    }
}

/// Weights in 8 bits: each is as near as its group's scale allows, and products are those of the rounded weights. Catches a scale of
/// another group or panel, and inputs beyond the last group.
#[test]
fn weights_in_8_bits_are_rounded_once() {
    const GROUP: usize = 32;
    let Ok(kernel) = Kernel::choose(Dtype::Int8, None) else { return check::skipped("this processor has no AVX-512") };
    for (rows, wide, narrow) in SHAPES {
        let (x, w) = (numbers(1, (rows, narrow), kernel), numbers(2, (wide, narrow), kernel));
        let panels = Panels::pack(&w, narrow, kernel);
        let mut rounded = vec![f32::NAN; w.len()];
        rounded.chunks_mut(narrow).enumerate().for_each(|(index, row)| panels.row(index, row));
        for (row, rounded) in w.chunks(narrow).zip(rounded.chunks(narrow)) {
            for (group, rounded) in row.chunks(GROUP).zip(rounded.chunks(GROUP)) {
                let step = group.iter().fold(0.0f32, |largest, x| largest.max(x.abs())) / 127.0 * 1.01;
                let near = group.iter().zip(rounded).all(|(w, rounded)| (w - rounded).abs() <= 0.51 * step);
                assert!(near, "{wide} × {narrow}: {group:?} became {rounded:?}");
            }
        }
        assert_product(&format!("{rows} × {wide} × {narrow}"), &panels, &x, &rounded, 0..wide, Threads::All);
    }
}

/// What gradients are multiplied with: of the whole weight, and of the head's chunks.
#[test]
fn rows_and_transposes_are_those_of_the_weight() {
    for (kernel, (rows, wide, narrow)) in
        check::kernels().into_iter().flat_map(|kernel| SHAPES.map(|shape| (kernel, shape)))
    {
        let w = numbers(2, (wide, narrow), kernel);
        let panels = Panels::pack(&w, narrow, kernel);
        assert_eq!((panels.dims(), panels.kernel()), ((wide, narrow), kernel));
        let mut row = vec![f32::NAN; narrow];
        for (index, want) in w.chunks(narrow).enumerate() {
            panels.row(index, &mut row);
            assert_eq!(row, want, "{kernel:?}, row {index} of {wide} × {narrow}");
        }
        let last = (wide - 1) / PANEL * PANEL;
        for (outputs, threads) in
            [(0..wide, Threads::All), (last..wide, Threads::One), (0..last.max(1).min(wide), Threads::All)]
        {
            let transposed = panels.transposed(outputs.clone(), threads);
            assert_eq!(transposed.dims(), (narrow, outputs.len()));
            let name = format!("{kernel:?}, transposed {outputs:?} of {wide} × {narrow}");
            let column = |input: usize| outputs.clone().map(move |output| (output, input));
            let flipped: Vec<f32> =
                (0..narrow).flat_map(column).map(|(output, input)| w[output * narrow + input]).collect();
            let mut row = vec![f32::NAN; outputs.len()];
            for (index, want) in flipped.chunks(outputs.len()).enumerate() {
                transposed.row(index, &mut row);
                assert_eq!(row, want, "{name}, row {index}");
            }
            let x = numbers(3, (rows, outputs.len()), kernel);
            assert_product(&name, &transposed, &x, &flipped, 0..narrow, threads);
        }
    }
}

/// Rows and inputs are padded to whole tiles with what memory was left; none of it may reach a result.
#[test]
fn a_row_that_is_not_finite_spoils_no_other() {
    for kernel in check::kernels() {
        for (rows, wide, narrow) in [(1, 40, 33), (5, 33, 100), (17, 64, 545), (300, 33, 33)] {
            let w = numbers(2, (wide, narrow), kernel);
            let panels = Panels::pack(&w, narrow, kernel);
            let multiply = |x: &[f32]| {
                let mut y = vec![0.0; x.len() / narrow * wide];
                panels.multiply(&Left::new(x, narrow, kernel), 0..wide, &mut y, wide, false, Threads::One);
                y
            };
            let good = numbers(1, (rows, narrow), kernel);
            let want = multiply(&good);
            assert!(want.iter().all(|y| y.is_finite()));
            for bad in [f32::NAN, f32::INFINITY] {
                // Memory of the same size, bad to its last number; small pieces are not used again.
                let width = narrow.next_multiple_of(PANEL);
                let poison = || drop(Left::new(&vec![bad; rows.next_multiple_of(PANEL / 2) * width], width, kernel));
                poison();
                check::same_bits(&format!("{kernel:?} after {bad}"), &multiply(&good), &want);
                poison();
                for spoiled in [0, rows / 2, rows - 1] {
                    let mut x = good.clone();
                    x[spoiled * narrow + narrow - 1] = bad;
                    for (row, (got, want)) in multiply(&x).chunks(wide).zip(want.chunks(wide)).enumerate() {
                        if row == spoiled {
                            assert!(got.iter().all(|y| !y.is_finite()), "{kernel:?}: {bad} was lost");
                        } else {
                            check::same_bits(&format!("{kernel:?}, row {row} beside {bad}"), got, want);
                        }
                    }
                }
            }
        }
    }
}

/// A kernel that rounds must round to the nearest, ties to even, as candle does, and pass on what is not finite.
#[test]
fn weights_and_rows_are_rounded_as_candle_rounds() {
    let mut values: Vec<f32> = floats(&random(1, (1, 2000)));
    // Halfway between two, from an even and from an odd one; the largest; the smallest.
    values.extend([257.0, 259.0, -257.0, f32::MAX, f32::MIN_POSITIVE, 0.0, -0.0, f32::INFINITY]);
    let rounded = Tensor::new(values.as_slice(), &candle_core::Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    for kernel in check::kernels().into_iter().filter(|kernel| kernel.dtype() == Dtype::Bf16) {
        let mut row = vec![f32::NAN; values.len()];
        Panels::pack(&values, values.len(), kernel).row(0, &mut row);
        check::same_bits("weights", &row, &floats(&rounded));
        // One input times 1: the input itself.
        let panels = Panels::pack(&[1.0], 1, kernel);
        let mut y = vec![f32::NAN; values.len()];
        panels.multiply(&Left::new(&values, 1, kernel), 0..1, &mut y, 1, false, Threads::All);
        check::same_bits("rows", &y, &floats(&rounded));
    }
}

/// One projection with everything that it can have.
struct Projection {
    weight: Panels,
    bias: Vec<f32>,
    adapter: LowRank,
}

impl Projection {
    fn new(wide: usize, narrow: usize, rank: usize, kernel: Kernel) -> Self {
        let adapter =
            LowRank::new(floats(&random(3, (rank, narrow))), floats(&random(4, (wide, rank))), rank, 0.7, kernel);
        let weight = Panels::pack(&floats(&random(2, (wide, narrow))), narrow, kernel);
        Self { weight, bias: floats(&random(5, (1, wide))), adapter }
    }

    fn forward(&self, x: &[f32], threads: Threads) -> Vec<f32> {
        let (wide, narrow) = self.weight.dims();
        let mut y = vec![f32::NAN; x.len() / narrow * wide];
        let linear = Linear {
            weight: &self.weight,
            bias: Some(&self.bias),
            adapter: Some(&self.adapter),
            mask: None,
            backward: false,
        };
        let left = Left::new(x, narrow, self.weight.kernel());
        linear.apply_all(&left, linear.down(&left).as_ref(), &mut y, false, threads);
        y
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// The sampler computes a token's row among other tokens' rows, the learner among others again. Catches a kernel that sums in
    /// another order for another number of rows, or another one chosen for it.
    #[test]
    fn a_row_has_the_same_bits_alone_and_in_every_batch(
        rows in prop_oneof![1usize..70, 200usize..300],
        wide in 1usize..140,
        narrow in prop_oneof![1usize..140, 500usize..1100],
        rank in 1usize..20,
        cut in any::<(prop::sample::Index, prop::sample::Index)>(),
    ) {
        let x = floats(&random(1, (rows, narrow)));
        for kernel in check::row_invariant_kernels() {
            let projection = Projection::new(wide, narrow, rank, kernel);
            let all = projection.forward(&x, Threads::All);
            check::same_bits("threads", &projection.forward(&x, Threads::One), &all);
            let (start, last) = (cut.0.index(rows), cut.1.index(rows));
            for some in [start..start + 1, start.min(last)..start.max(last) + 1] {
                let got = projection.forward(&x[some.start * narrow..some.end * narrow], Threads::One);
                check::same_bits(&format!("{kernel:?}, rows {some:?}"), &got, &all[some.start * wide..some.end * wide]);
            }
        }
    }
}

/// A step of training moves B by less than bf16 can hold, and yet it must do what it says: of B scaled by 1.001 the adapter's part
/// is scaled by 1.001, not by what rounding makes of it.
#[test]
fn what_an_adapter_adds_is_not_rounded() {
    const STEP: f32 = 1e-3;
    let (rows, wide, narrow, rank) = (40, 70, 100, 8);
    let (x, a, b) =
        (floats(&random(1, (rows, narrow))), floats(&random(3, (rank, narrow))), floats(&random(4, (wide, rank))));
    for kernel in check::kernels() {
        let adds = |by: f32| {
            let b = b.iter().map(|b| b * by).collect();
            let adapter = LowRank::new(a.clone(), b, rank, 1.0, kernel);
            Projection { weight: Panels::zeros(wide, narrow, kernel), bias: vec![0.0; wide], adapter }
                .forward(&x, Threads::One)
        };
        let norm = |values: &[f32]| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let (before, after) = (adds(1.0), adds(1.0 + STEP));
        let off: Vec<f32> = before.iter().zip(&after).map(|(before, after)| after - before - STEP * before).collect();
        let relative = norm(&off) / (f64::from(STEP) * norm(&before));
        assert!(relative < 0.05, "{kernel:?}: the difference is off by {relative} of itself");
    }
}

/// What a run says when it asks for a kernel that does not fit.
#[test]
fn a_kernel_is_chosen_by_type_and_never_by_accident() {
    for kernel in Kernel::ALL {
        let other = if kernel.dtype() == Dtype::F32 { Dtype::Bf16 } else { Dtype::F32 };
        let refused = Kernel::choose(other, Some(kernel)).unwrap_err().to_string();
        assert!(refused.contains("computes in"), "{refused}");
        for dtype in [Dtype::Auto, kernel.dtype()] {
            match Kernel::choose(dtype, Some(kernel)) {
                Ok(chosen) => assert!(chosen == kernel && kernel.available()),
                Err(error) => assert!(!kernel.available() && error.to_string().contains("cannot run the kernel")),
            }
        }
    }
    let results = tempfile::tempdir().unwrap();
    let refused = toy::failure(results.path(), "model.dtype = \"f32\"\nmodel.kernel = \"amx\"", false);
    assert!(refused.contains("model.kernel") && refused.contains("computes in"), "{refused}");
    let fastest = check::kernels()[0];
    assert_eq!(Kernel::choose(Dtype::Auto, None).unwrap(), fastest);
    assert_eq!(check::f32_kernel().dtype(), Dtype::F32);
    match Kernel::choose(Dtype::Bf16, None) {
        Ok(kernel) => assert_eq!(kernel.dtype(), Dtype::Bf16),
        Err(error) => assert!(fastest.dtype() == Dtype::F32 && error.to_string().contains("no instructions for")),
    }
}
