//! Weights that stay in GGUF's codes: the same bits as if they had been unpacked when they were loaded, for whatever a file holds.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device};
use candor::config::Dtype;
use candor::ops::codes::Codes;
use candor::ops::kernel::Kernel;
use candor::ops::left::Left;
use candor::ops::panels::{PANEL, Panels, Threads};
use proptest::prelude::*;

use crate::check;
use crate::ops::{floats, narrowed, random};

const KINDS: [GgmlDType; 4] = [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q4K, GgmlDType::Q8_0];

fn kernels() -> Vec<Kernel> {
    check::kernels().into_iter().filter(|kernel| kernel.dtype() == Dtype::Bf16).collect()
}

/// The weight of a file in codes, read in pieces of two panels.
fn coded(kind: GgmlDType, bytes: &[u8], (wide, narrow): (usize, usize), kernel: Kernel) -> Panels {
    let row = narrow / kind.block_size() * kind.type_size();
    let read = |first: usize, rows: usize| Ok::<_, ()>(bytes[first * row..(first + rows) * row].to_vec());
    assert!(Codes::fit(kind, narrow, kernel));
    let panels = Panels::coded(kind, (wide, narrow), kernel, 2 * PANEL, read).unwrap();
    assert_eq!((panels.dims(), panels.kernel()), ((wide, narrow), kernel));
    panels
}

/// What candle makes of the same bytes, rounded to bf16.
fn unpacked(kind: GgmlDType, bytes: &[u8], dims: (usize, usize)) -> Vec<f32> {
    let storage = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, kind).unwrap();
    let numbers = QTensor::new(storage, dims).unwrap().dequantize(&Device::Cpu).unwrap();
    floats(&numbers.to_dtype(DType::BF16).unwrap())
}

/// Products forward and back of a product with a weight, dense.
fn products(weight: &Panels, rows: usize, threads: Threads) -> [Vec<f32>; 2] {
    let (wide, narrow) = weight.dims();
    let last = (wide - 1) / PANEL * PANEL;
    let transposed = weight.transposed(last..wide, threads);
    [(weight, 1, last.min(PANEL)..wide), (&transposed, 2, 0..narrow)].map(|(weight, seed, outputs)| {
        let inputs = weight.dims().1;
        let x = floats(&random(seed, (rows, inputs)));
        let (x, width) = (Left::new(&x, inputs, weight.kernel()), outputs.len());
        let mut y = vec![f32::NAN; rows * width];
        weight.multiply(&x, outputs, &mut y, width, false, threads);
        y
    })
}

/// Catches a scale or a code of another output, group or half, another rounding, and padding that is not zero.
#[test]
fn products_have_the_bits_of_the_unpacked_weight() {
    for (kind, kernel) in KINDS.into_iter().flat_map(|kind| kernels().into_iter().map(move |kernel| (kind, kernel))) {
        for dims in [(1, 256), (70, 512), (96, 768)] {
            let quantized = QTensor::quantize(&narrowed(&random(5, dims)), kind).unwrap();
            let bytes = quantized.data().unwrap();
            let dense = Panels::pack(&unpacked(kind, &bytes, dims), dims.1, kernel);
            let coded = coded(kind, &bytes, dims, kernel);
            for (rows, threads) in [(1, Threads::One), (17, Threads::All), (300, Threads::All)] {
                let [got, want] = [&coded, &dense].map(|weight| products(weight, rows, threads));
                for (name, got, want) in [("forward", &got[0], &want[0]), ("back", &got[1], &want[1])] {
                    check::same_bits(&format!("{kind:?} {dims:?}, {kernel:?}, {rows} rows {name}"), got, want);
                }
            }
        }
    }
}

/// All numbers of a weight in codes are those of candle, as rows and as products have them.
#[track_caller]
fn assert_unpacked(kind: GgmlDType, bytes: &[u8], dims: (usize, usize)) {
    let wide = dims.0;
    let want = unpacked(kind, bytes, dims);
    for kernel in kernels() {
        let weight = coded(kind, bytes, dims, kernel);
        let mut row = vec![f32::NAN; dims.1];
        for (index, want) in want.chunks(dims.1).enumerate() {
            weight.row(index, &mut row);
            for (got, want) in row.iter().zip(want) {
                assert!(got == want || got.is_nan() && want.is_nan(), "{kind:?} {kernel:?}: {got:e} for {want:e}");
            }
        }
        let (transposed, mut column) = (weight.transposed(0..wide, Threads::One), vec![f32::NAN; wide]);
        for input in 0..dims.1 {
            transposed.row(input, &mut column);
            for (got, want) in column.iter().zip(want[input..].iter().step_by(dims.1)) {
                // Products take numbers for zero that are smaller than f32 holds with all digits.
                let want = if want.abs() < f32::MIN_POSITIVE { 0.0 } else { *want };
                assert!(*got == want || got.is_nan() && want.is_nan(), "{kind:?} {kernel:?}: {got:e} for {want:e}");
            }
        }
    }
}

/// Scales and minimums that are infinite, no number, the largest, the smallest, zero or negative, beside every code. Catches an offset
/// that is scaled apart from its code: two infinities have no sum.
#[test]
fn scales_that_no_model_has_are_unpacked_as_candle_unpacks_them() {
    const HALVES: [u16; 10] = [0x7c00, 0xfc00, 0x7e00, 0x7bff, 0xfbff, 0x0001, 0x8001, 0x0000, 0x8000, 0x3c00];
    for (kind, (scale, minimum)) in
        KINDS.into_iter().flat_map(|kind| HALVES.map(|scale| HALVES.map(|minimum| (kind, (scale, minimum)))).concat())
    {
        let (wide, blocks) = (40, 2);
        let mut bytes: Vec<u8> = (0..wide * blocks * kind.type_size()).map(|index| (index * 37) as u8).collect();
        for block in bytes.chunks_exact_mut(kind.type_size()) {
            block[..2].copy_from_slice(&scale.to_le_bytes());
            if matches!(kind, GgmlDType::Q4_1 | GgmlDType::Q4K) {
                block[2..4].copy_from_slice(&minimum.to_le_bytes());
            }
        }
        assert_unpacked(kind, &bytes, (wide, blocks * kind.block_size()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any bytes are blocks: scales that are zero, negative, tiny, huge or no numbers. Catches a product that is rounded before the
    /// minimum is added.
    #[test]
    fn whatever_a_file_holds_is_unpacked_as_candle_unpacks_it(
        kind in prop::sample::select(KINDS.to_vec()),
        wide in 1usize..80,
        blocks in 1usize..4,
        seed in any::<[u8; 32]>(),
        ordinary in any::<bool>(),
    ) {
        let dims = (wide, blocks * kind.block_size());
        let mut rng = proptest::test_runner::TestRng::from_seed(prop::test_runner::RngAlgorithm::ChaCha, &seed);
        let mut bytes = vec![0; wide * blocks * kind.type_size()];
        rng.fill_bytes(&mut bytes);
        if ordinary {
            // Scales as models have them: between 2⁻¹¹ and 2⁻³.
            let of_file = [1, 3].into_iter().filter(|at| *at == 1 || kind != GgmlDType::Q8_0 && kind != GgmlDType::Q4_0);
            for (block, at) in of_file.flat_map(|at| (0..wide * blocks).map(move |block| (block, at))) {
                let high = &mut bytes[block * kind.type_size() + at];
                *high = *high & 0x83 | (0x10 + (*high >> 4 & 1) * 0x10 + (*high >> 2 & 3) * 4);
            }
        }
        assert_unpacked(kind, &bytes, dims);
    }
}

/// Other types, and kernels that do not multiply in bf16, hold weights as before.
#[test]
fn what_does_not_fit_is_unpacked() {
    for kernel in check::kernels() {
        assert_eq!(Codes::fit(GgmlDType::Q4K, 512, kernel), kernel.dtype() == Dtype::Bf16);
        assert!(!Codes::fit(GgmlDType::Q6K, 512, kernel) && !Codes::fit(GgmlDType::BF16, 512, kernel));
        assert!(!Codes::fit(GgmlDType::Q4K, 96, kernel) && !Codes::fit(GgmlDType::Q8_0, 40, kernel));
    }
    // As the memory plan counts them: a scale and a minimum of 4 bytes beside 32 codes.
    assert_eq!(Codes::bytes(GgmlDType::Q4_1, 33, 64), 2 * 2 * 32 * (8 + 16));
    assert_eq!(Codes::bytes(GgmlDType::Q8_0, 32, 32), 32 * (8 + 32));
}
