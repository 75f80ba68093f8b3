//! Fused differentiable operations: each computes its value without building a graph and brings its own exact backward.
//!
//! candle differentiates frozen weights too, keeps every intermediate alive, and several of its fast operations silently
//! have no backward; so the heavy steps of the decoder are `CustomOp`s of our own. In reading order:
//!
//! * [`matmul`]: the one matrix product everything else calls; kernels for particular processors go there
//! * [`quantized`], [`nf4`]: frozen weights that stay packed, unpacked for one product at a time
//! * [`linear`]: a frozen weight plus an optional low-rank adapter
//! * [`norm`], [`rope`], [`gate`]: the point-wise parts of a layer
//! * [`attention`]: queries over a tree of keys, never the full score matrix
//! * [`head`]: hidden state to the log-probability of a given token, never the full logits
//!
//! Values are `[rows, width]` in f32: one row per token, no batch dimension and no padding.

pub mod attention;
pub mod gate;
pub mod head;
pub mod linear;
pub mod matmul;
pub mod nf4;
pub mod norm;
pub mod quantized;
pub mod rope;

use candle_core::{CpuStorage, Layout, Result, Shape, Storage, Tensor, bail};

/// The values of a contiguous f32 tensor in CPU memory.
pub(crate) fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(all) = storage else { bail!("expected f32 values, found {:?}", storage_type(storage)) };
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("expected contiguous rows, found {layout:?}") };
    Ok(&all[start..end])
}

/// Calls `f` with the values of contiguous f32 tensors in CPU memory.
pub(crate) fn with_values<const N: usize, R>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> R) -> Result<R> {
    let guards = tensors.map(|tensor| tensor.storage_and_layout());
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        let Storage::Cpu(storage) = &**storage else { bail!("this operation has no kernel for the device yet") };
        *slice = values(storage, layout)?;
    }
    Ok(f(slices))
}

/// What a forward pass on the CPU returns: the values and their shape.
pub(crate) fn output(values: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(values), shape.into()))
}

/// Runs `f` compiled for the widest vectors this processor has. Only what is inlined into it is compiled that way, so the
/// closure needs `#[inline(always)]`: left to itself the compiler shares one plain copy between the vector widths.
#[inline(always)]
pub(crate) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// eˣ by a polynomial that the compiler can vectorize; relative error below 3e-7 for −87 ≤ x ≤ 88, zero below −87.3.
///
/// Range reduction by ln 2 in two parts, then the degree-6 Taylor polynomial on |r| ≤ ln 2 / 2. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 · 2²³ rounds to an integer that then sits in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let polynomial = 1.0
        + r * (1.0 + r * (0.5 + r * (1.666_666_7e-1 + r * (4.166_666_8e-2 + r * (8.333_334e-3 + r * 1.388_889e-3)))));
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    let value = polynomial * power;
    let value = if x < -87.3 { 0.0 } else { value };
    let value = if x > 88.7 { f32::INFINITY } else { value };
    if x.is_nan() { x } else { value }
}

fn storage_type(storage: &CpuStorage) -> candle_core::DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}
