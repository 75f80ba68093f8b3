//! The frozen tensors on the device: bf16, or packed as the host packs them, unpacked for one layer at a time.

use std::ops::Deref;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candle_core::quantized::{GgmlDType, QTensor};

use super::device::{Array, Gpu, Purpose};
use super::kernels;
use crate::config::Quantization;
use crate::model::parts::Parts;
use crate::model::stored::Stored;
use crate::model::{Architecture, Weights};
use crate::ops::nf4;
use crate::ops::quantized::{Packed, Values};

/// A projection's weight [out, in].
pub enum Weight {
    /// As products want it.
    Plain(Array<u16>),
    /// 4-bit normal floats.
    Nf4 {
        /// Two values a byte.
        codes: Array<u8>,
        /// Codes of the scales.
        scales: Array<u8>,
        /// Scales of the scales.
        nested: Array<f32>,
        /// What every scale has beside its code.
        offset: f32,
        /// How many values.
        len: usize,
    },
    /// One of GGUF's types, and the kernel that unpacks it.
    Blocks {
        /// As they lie in a file.
        bytes: Array<u8>,
        /// Unpacks them.
        kernel: &'static str,
        /// How many values.
        len: usize,
    },
}

/// A weight as products want it: there already, or unpacked until it is dropped.
pub enum Unpacked<'a> {
    /// There already.
    Resident(&'a Array<u16>),
    /// Unpacked.
    Temporary(Array<u16>),
}

impl Deref for Unpacked<'_> {
    type Target = Array<u16>;

    fn deref(&self) -> &Array<u16> {
        match self {
            Self::Resident(weight) => weight,
            Self::Temporary(weight) => weight,
        }
    }
}

/// What the codes of 4-bit normal floats and of their scales stand for.
pub struct Codes {
    values: Array<f32>,
    scales: Array<f32>,
}

impl Codes {
    /// On a device.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let (values, scales) = nf4::tables();
        Ok(Self { values: gpu.upload(Purpose::Base, values)?, scales: gpu.upload(Purpose::Base, scales)? })
    }
}

impl Weight {
    /// The weight as products want it.
    pub fn unpacked(&self, gpu: &Arc<Gpu>, tables: &Codes) -> Result<Unpacked<'_>> {
        let room = |len: usize| gpu.array::<u16>(Purpose::Activations, len);
        Ok(Unpacked::Temporary(match self {
            Self::Plain(weight) => return Ok(Unpacked::Resident(weight)),
            Self::Nf4 { codes, scales, nested, offset, len } => {
                let (to, tables) = (room(*len)?, [&tables.values, &tables.scales].map(Array::view));
                let packed = ([codes.view(), scales.view()], nested.view(), *offset);
                kernels::unpack_nf4(gpu, packed, tables, to.view(), *len)?;
                to
            }
            Self::Blocks { bytes, kernel, len } => {
                let to = room(*len)?;
                kernels::unpack_blocks(gpu, kernel, bytes.view(), to.view(), *len)?;
                to
            }
        }))
    }
}

/// The kernel that unpacks a type of GGUF.
pub fn unpacker(kind: GgmlDType) -> Option<&'static str> {
    Some(match kind {
        GgmlDType::Q4_0 => "unpack_q4_0",
        GgmlDType::Q4_1 => "unpack_q4_1",
        GgmlDType::Q5_0 => "unpack_q5_0",
        GgmlDType::Q5_1 => "unpack_q5_1",
        GgmlDType::Q8_0 => "unpack_q8_0",
        GgmlDType::Q2K => "unpack_q2_k",
        GgmlDType::Q3K => "unpack_q3_k",
        GgmlDType::Q4K => "unpack_q4_k",
        GgmlDType::Q5K => "unpack_q5_k",
        GgmlDType::Q6K => "unpack_q6_k",
        _ => return None,
    })
}

/// In which form a tensor is held here: numbers that bf16 holds, or would hold, are not packed to be kept.
pub fn form(stored: &Stored, quantization: Option<Quantization>) -> Option<Quantization> {
    let plain = matches!(stored.kind, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
    stored.form(quantization).filter(|form| *form != Quantization::Keep || !plain)
}

/// Reads them for a device.
pub(crate) struct Reading<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub weights: &'a Weights,
    pub architecture: &'a Architecture,
    pub quantization: Option<Quantization>,
}

impl Reading<'_> {
    fn pack(&self, packed: Packed) -> Result<Weight> {
        let (len, upload) = (packed.dims.0 * packed.dims.1, |bytes: &[u8]| self.gpu.upload(Purpose::Base, bytes));
        match packed.values {
            Values::Nf4(packed) => {
                let (codes, scales, nested, offset) = packed.parts();
                let nested = self.gpu.upload(Purpose::Base, nested)?;
                Ok(Weight::Nf4 { codes: upload(codes)?, scales: upload(scales)?, nested, offset, len })
            }
            Values::Blocks(blocks) => {
                let kind = blocks.first().map_or(GgmlDType::Q8_0, QTensor::dtype);
                let Some(kernel) = unpacker(kind) else {
                    bail!(
                        "weights of type {kind:?} cannot stay packed on a GPU; leave model.quantization out, or use \"q8_0\""
                    )
                };
                let bytes = blocks.iter().map(|block| Ok(block.data()?.into_owned())).collect::<Result<Vec<_>>>()?;
                Ok(Weight::Blocks { bytes: upload(&bytes.concat())?, kernel, len })
            }
        }
    }

    fn named<T>(&self, name: &str, loaded: Result<T>) -> Result<T> {
        loaded.with_context(|| format!("{}: tensor {name}", self.weights.path().display()))
    }
}

impl Parts for Reading<'_> {
    type Vector = Array<f32>;
    type Table = Array<u16>;
    type Matrix = Weight;

    fn vector(&mut self, name: &str, width: usize, offset: f64) -> Result<Array<f32>> {
        self.gpu.upload(Purpose::Base, &self.weights.vector(name, width, offset, self.architecture)?)
    }

    fn table(&mut self, name: &str, shape: &[usize; 2]) -> Result<Array<u16>> {
        let rounded = self.weights.stored(name, shape, self.architecture)?.bf16();
        self.gpu.upload(Purpose::Base, &self.named(name, rounded)?)
    }

    fn matrix(&mut self, name: &str, shape: &[usize; 2]) -> Result<Weight> {
        let stored = self.weights.stored(name, shape, self.architecture)?;
        let Some(form) = form(&stored, self.quantization) else { return self.table(name, shape).map(Weight::Plain) };
        self.named(name, stored.pack(form).and_then(|packed| self.pack(packed)))
    }
}
