//! Frozen weights that stay packed: GGUF's block types and 4-bit normal floats, unpacked for the products of one layer at a
//! time.

use std::ops::Deref;

use candle_core::quantized::QTensor;
use candle_core::{Device, Result, Storage, bail};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::kernel::Kernel;
use super::nf4::Nf4;
use super::panels::Panels;

/// A frozen weight, [out, in].
pub enum Weight {
    /// As products want it.
    Panels(Panels),
    /// Packed.
    Packed(Packed),
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

/// A weight as products want it: there already, or unpacked until it is dropped.
pub enum Unpacked<'a> {
    /// There already.
    Resident(&'a Panels),
    /// Unpacked.
    Temporary(Panels),
}

impl Deref for Unpacked<'_> {
    type Target = Panels;

    fn deref(&self) -> &Panels {
        match self {
            Self::Resident(panels) => panels,
            Self::Temporary(panels) => panels,
        }
    }
}

impl Weight {
    /// The weight as products want it.
    ///
    /// # Errors
    /// If candle cannot unpack it.
    pub fn unpacked(&self, kernel: Kernel) -> Result<Unpacked<'_>> {
        match self {
            Self::Panels(panels) => Ok(Unpacked::Resident(panels)),
            Self::Packed(packed) => Ok(Unpacked::Temporary(Panels::pack(&packed.unpack()?, packed.dims.1, kernel))),
        }
    }
}

impl Packed {
    /// The values in f32.
    ///
    /// # Errors
    /// If candle cannot unpack them.
    pub fn unpack(&self) -> Result<Buffer> {
        let (wide, narrow) = self.dims;
        let mut values = Buffer::new(wide * narrow);
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
    let numbers = stored.dequantize(&Device::Cpu)?.flatten_all()?;
    let (storage, layout) = numbers.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("expected numbers in CPU memory") };
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("expected contiguous numbers") };
    values.copy_from_slice(&storage.as_slice::<f32>()?[start..end]);
    Ok(())
}
