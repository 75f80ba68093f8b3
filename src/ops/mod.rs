//! The arithmetic of the decoder, forward and backward, on plain rows of f32: one row per token, no batch dimension and no
//! padding.
//!
//! Nothing records a graph. The gradient of frozen weights is never computed, and memory is used again. In reading order:
//!
//! * [`kernel`]: which instructions multiply matrices
//! * [`buffer`], [`shared`], [`rounded`]: memory that is used again, rows that several threads write, and rows that products read
//! * [`matmul`], [`avx512`]: small products in f32
//! * [`left`], [`panels`], [`products`], [`bf16`], [`pages`], [`amx`], [`rearrange`]: products with frozen weights, which are packed once
//! * [`codes`]: frozen weights that stay as a GGUF file has them, until a panel is multiplied with
//! * [`quantized`], [`nf4`]: frozen weights that stay smaller still, unpacked for one layer at a time
//! * [`rows`]: work on rows, spread over threads
//! * [`linear`], [`dropout`]: a frozen weight plus an optional low-rank adapter, and which of its inputs are dropped
//! * [`norm`], [`rope`], [`gate`]: the point-wise parts of a layer
//! * [`feed_forward`]: the gated block, fused
//! * [`keys`], [`attention`], [`attention_backward`]: queries over a tree of keys, never the full score matrix
//! * [`head`]: hidden state to the log-probability of a given token, never the full logits

mod amx;
pub mod attention;
pub mod attention_backward;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bf16;
pub mod buffer;
pub mod codes;
pub mod dropout;
pub mod feed_forward;
pub mod gate;
pub mod head;
pub mod kernel;
pub mod keys;
pub mod left;
pub mod linear;
pub mod matmul;
pub mod nf4;
pub mod norm;
pub mod pages;
pub mod panels;
pub mod products;
pub mod quantized;
#[cfg(target_arch = "x86_64")]
mod rearrange;
pub mod rope;
pub mod rounded;
pub mod rows;
mod shared;

/// Runs `f` compiled for the widest vectors this processor has. Only what is inlined into it is compiled that way, so the
/// closure needs `#[inline(always)]`: left to itself the compiler shares one plain copy between the vector widths.
#[inline(always)]
pub(crate) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Numbers of 32 bits in the widest vector: strands of a sum, or of a maximum, over a row.
pub(crate) const LANES: usize = 16;

/// One number of all strands, by halves.
#[inline(always)]
pub(crate) fn across<T: Copy>(strands: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let eight: [T; 8] = std::array::from_fn(|lane| f(strands[lane], strands[lane + 8]));
    let four: [T; 4] = std::array::from_fn(|lane| f(eight[lane], eight[lane + 4]));
    f(f(four[0], four[2]), f(four[1], four[3]))
}

/// The larger number. In one instruction, which f32's own is not: it looks for NaN. Here a NaN is lost or not.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The largest of a row, or `least` if that is larger.
#[inline(always)]
pub(crate) fn largest(row: &[f32], least: f32) -> f32 {
    // Two strands of vectors: one waits for itself.
    let (whole, rest) = row.as_chunks::<{ 2 * LANES }>();
    let mut most = [least; 2 * LANES];
    for chunk in whole {
        most.iter_mut().zip(chunk).for_each(|(most, x)| *most = larger(*most, *x));
    }
    let mut both = [least; LANES];
    for lane in 0..LANES {
        both[lane] = larger(most[lane], most[LANES + lane]);
    }
    rest.iter().copied().fold(across(both, larger), larger)
}

/// eˣ by a polynomial that the compiler can vectorize; relative error below 2e-7 for −87 ≤ x ≤ 88, zero below −87.7, infinite above 88.4.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    exp_below_89(if x > 89.0 { 89.0 } else { x })
}

/// The same for x that are known not to be larger than 89.
///
/// Range reduction by ln 2 in two parts, then 1 + r + r² · p(r) with the p of degree 3 whose largest relative error on |r| ≤ ln 2 / 2
/// is the smallest (1.1e-7). NaN stays NaN.
#[inline(always)]
pub(crate) fn exp_below_89(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 · 2²³ rounds to an integer that then sits in the low bits of the sum; with 127 more, as an exponent does.
    const ROUND: f32 = 12_583_039.0;
    // The factors of rⁿ, highest first; each step is one fused instruction wherever vectors of sixteen are.
    const FACTORS: [f32; 6] = [8.312_501e-3, 4.189_034_6e-2, 1.666_711_6e-1, 4.999_923e-1, 1.0, 1.0];
    // There the power of two is zero; at 89 it is infinite.
    let x = if x < -88.0 { -88.0 } else { x };
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let polynomial = FACTORS[1..].iter().fold(FACTORS[0], |sum, factor| sum.mul_add(r, *factor));
    let power = f32::from_bits(shifted.to_bits() << 23);
    polynomial * power
}
