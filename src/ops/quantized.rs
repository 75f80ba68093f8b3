//! Frozen weights that stay packed: GGUF's block types and 4-bit normal floats, unpacked to f32 for one product at a time.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::nf4::Nf4;
use super::with_values;

/// A frozen weight, [out, in].
#[derive(Clone)]
pub enum Weight {
    /// In f32.
    Dense(Tensor),
    /// Packed.
    Packed(Arc<Packed>),
}

/// A packed weight.
pub struct Packed {
    /// Rows and columns, [out, in].
    pub dims: (usize, usize),
    /// Its values.
    pub values: Values,
}

/// Packed values, row by row.
pub enum Values {
    /// One of GGUF's types: several whole rows each, all but the last of the same number.
    Blocks(Vec<QTensor>),
    /// 4-bit normal floats.
    Nf4(Nf4),
}

impl Weight {
    /// Rows and columns, [out, in].
    ///
    /// # Errors
    /// If it is not a matrix.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(tensor) => tensor.dims2(),
            Self::Packed(packed) => Ok(packed.dims),
        }
    }

    /// Calls `f` with the values in f32. Those of a packed weight are gone afterwards.
    ///
    /// # Errors
    /// If the values are not in CPU memory.
    pub fn with_values<R>(&self, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
        match self {
            Self::Dense(tensor) => with_values([tensor], |[values]| f(values)),
            Self::Packed(packed) => Ok(f(&packed.unpack()?)),
        }
    }
}

impl Packed {
    /// The values in f32.
    ///
    /// # Errors
    /// If the values are not in CPU memory.
    pub fn unpack(&self) -> Result<Vec<f32>> {
        let (wide, narrow) = self.dims;
        let mut values = vec![0.0; wide * narrow];
        match &self.values {
            Values::Nf4(packed) => packed.unpack(&mut values),
            Values::Blocks(blocks) => {
                let part = blocks.first().map_or(1, |first| first.shape().elem_count());
                blocks.par_iter().zip(values.par_chunks_mut(part)).try_for_each(|(block, part)| unpack(block, part))?;
            }
        }
        Ok(values)
    }
}

/// Writes a tensor's numbers as f32.
pub(crate) fn unpack(stored: &QTensor, values: &mut [f32]) -> Result<()> {
    with_values([&stored.dequantize(&Device::Cpu)?.flatten_all()?], |[stored]| values.copy_from_slice(stored))
}
