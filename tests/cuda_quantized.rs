//! The kernels that unpack frozen weights against the CPU's, on the processor: the same bits.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candor::ops::nf4::{Blocks, Nf4, tables};

use crate::cuda_on_host::{File, Kernels, TURNS, Turns, blocks, numbers, rounded, run};
use crate::ops::floats;

fn check(check: impl Fn(&Kernels, Turns)) {
    if let Some(kernels) = Kernels::of(File::Quantized) {
        TURNS.into_iter().for_each(|turns| check(kernels, turns));
    }
}

#[test]
fn normal_floats_are_the_same_bits() {
    // More than one group of scales, and a block that is shorter than the others.
    for count in [1, 63, 64, 65, 40_001] {
        let packed = Nf4::new(vec![Blocks::of(&numbers(1, count))]);
        let mut want = vec![0.0; count];
        packed.unpack(&mut want);
        let ((codes, scales, nested, offset), (of_codes, of_scales)) = (packed.parts(), tables());
        check(|kernels, turns| {
            let mut out = vec![0u16; count];
            run!(
                kernels,
                blocks(3, 256, turns),
                unpack_nf4(codes, scales, nested, offset, of_codes, of_scales, &mut out[..], count as i64)
            );
            assert_eq!(out, rounded(&want), "{count} values");
        });
    }
}

/// Blocks as candle packs them. Catches a nibble, a bit or a scale in the wrong place.
#[test]
fn blocks_of_gguf_are_the_same_bits() {
    let mut values = numbers(1, 256 * 5);
    // Scales that half precision can only hold as subnormal numbers, and none.
    values[256..512].iter_mut().for_each(|x| *x *= 1e-5);
    values[512..768].fill(0.0);
    let tensor = Tensor::new(values.as_slice(), &Device::Cpu).unwrap();
    macro_rules! compare {
        ($($format:ident, $name:ident;)*) => {$({
            let packed = QTensor::quantize(&tensor, GgmlDType::$format).unwrap();
            let (bytes, want) = (packed.data().unwrap(), packed.dequantize(&Device::Cpu).unwrap());
            check(|kernels, turns| {
                let mut out = vec![0u16; values.len()];
                run!(kernels, blocks(3, 256, turns), $name(&bytes[..], &mut out[..], values.len() as i64));
                assert_eq!(out, rounded(&floats(&want)), stringify!($format));
            });
        })*};
    }
    compare! {
        Q4_0, unpack_q4_0;
        Q4_1, unpack_q4_1;
        Q5_0, unpack_q5_0;
        Q5_1, unpack_q5_1;
        Q8_0, unpack_q8_0;
        Q2K, unpack_q2_k;
        Q3K, unpack_q3_k;
        Q4K, unpack_q4_k;
        Q5K, unpack_q5_k;
        Q6K, unpack_q6_k;
    }
}
