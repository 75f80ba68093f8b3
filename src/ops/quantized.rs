//! Packed numbers.

use candle_core::quantized::QTensor;
use candle_core::{Device, Result};

use super::with_values;

/// Writes a tensor's numbers as f32.
pub(crate) fn unpack(stored: &QTensor, values: &mut [f32]) -> Result<()> {
    with_values([&stored.dequantize(&Device::Cpu)?.flatten_all()?], |[stored]| values.copy_from_slice(stored))
}
