//! A tensor where it lies in its file: read and converted once, in pieces, so that loading a model takes no more memory than
//! the model.

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::config::Quantization;
use crate::ops::codes::Codes;
use crate::ops::kernel::Kernel;
use crate::ops::left::to_bf16;
use crate::ops::nf4::{Blocks, Nf4};
use crate::ops::panels::Panels;
use crate::ops::quantized::{Packed, Values, unpack};

/// About how many numbers a thread reads at once.
const PIECE: usize = 256 * 1024;
/// Rows of a piece are a multiple of this.
const ROWS: usize = 64;

/// A tensor in a file.
pub struct Stored<'a> {
    /// The opened file.
    pub file: &'a File,
    /// Where its data starts, in bytes.
    pub offset: u64,
    /// How its numbers are stored; safetensors' floats have the same types.
    pub kind: GgmlDType,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Rows of a head whose two halves are interleaved and shall not be.
    pub interleaved: Option<usize>,
}

/// What all threads together hold beside the model while it is read, in bytes: what was read of a piece, candle's copy of it,
/// and its numbers.
pub fn reading_bytes() -> usize {
    rayon::current_num_threads() * PIECE * 3 * size_of::<f32>()
}

impl Stored<'_> {
    /// All rows as one matrix: their number, and the numbers of one.
    fn matrix(&self) -> (usize, usize) {
        let (width, outer) = self.shape.split_last().map_or((1, &[][..]), |(&width, outer)| (width, outer));
        (outer.iter().product(), width)
    }

    /// How many rows are read at once: whole heads.
    fn piece_rows(&self) -> usize {
        let head = self.interleaved.unwrap_or(1);
        let unit = (1..=ROWS).map(|heads| heads * head).find(|rows| rows % ROWS == 0).expect("ROWS heads are one");
        (PIECE / self.matrix().1.max(1) / unit).max(1) * unit
    }

    /// Some rows, as they are stored.
    fn piece(&self, first: usize, rows: usize) -> Result<QTensor> {
        let storage = QStorage::from_data(Cow::Owned(self.bytes(first, rows)?), &Device::Cpu, self.kind)?;
        Ok(QTensor::new(storage, (rows, self.matrix().1))?)
    }

    fn bytes(&self, first: usize, rows: usize) -> Result<Vec<u8>> {
        let width = self.matrix().1;
        let row_bytes = width / self.kind.block_size() * self.kind.type_size();
        let mut bytes = vec![0; rows * row_bytes];
        let start = self.offset + (first * row_bytes) as u64;
        self.file.read_exact_at(&mut bytes, start).with_context(|| format!("cannot read at byte {start}"))?;
        if let Some(head) = self.interleaved {
            ensure!(rows.is_multiple_of(head), "it has {rows} rows, not whole heads of {head}");
            bytes = bytes.chunks(head * row_bytes).flat_map(|rows| apart(rows, row_bytes)).collect();
        }
        Ok(bytes)
    }

    /// In which form the matrix is held; what is in f32 already is not packed to be kept.
    pub fn form(&self, quantization: Option<Quantization>) -> Option<Quantization> {
        quantization.filter(|form| (*form, self.kind) != (Quantization::Keep, GgmlDType::F32))
    }

    /// What the matrix takes when packed, in bytes.
    ///
    /// # Errors
    /// If its rows are not whole blocks.
    pub fn packed_bytes(&self, quantization: Quantization) -> Result<usize> {
        let (rows, width) = self.matrix();
        let kind = match quantization {
            Quantization::Nf4 => return Ok(Nf4::bytes(rows * width)),
            Quantization::Q8 => GgmlDType::Q8_0,
            Quantization::Keep => self.kind,
        };
        let block = kind.block_size();
        ensure!(
            width.is_multiple_of(block),
            "its rows of {width} numbers are not whole blocks of {block}, as {kind:?} has them; use \"nf4\""
        );
        Ok(rows * width / block * kind.type_size())
    }

    /// The matrix, packed.
    ///
    /// # Errors
    /// If the file cannot be read any more, or what is to be packed is not finite.
    pub fn pack(&self, quantization: Quantization) -> Result<Packed> {
        let values = match quantization {
            Quantization::Nf4 => Values::Nf4(Nf4::new(self.pieces(|piece| Ok(Blocks::of(&finite(&piece)?)))?)),
            Quantization::Q8 => Values::Blocks(self.pieces(|piece| {
                let numbers = Tensor::from_vec(finite(&piece)?, piece.shape(), &Device::Cpu)?;
                Ok(QTensor::quantize(&numbers, GgmlDType::Q8_0)?)
            })?),
            Quantization::Keep => Values::Blocks(self.pieces(Ok)?),
        };
        Ok(Packed { dims: self.matrix(), values })
    }

    fn pieces<T: Send>(&self, f: impl Fn(QTensor) -> Result<T> + Sync) -> Result<Vec<T>> {
        let ((rows, _), piece) = (self.matrix(), self.piece_rows());
        let firsts: Vec<usize> = (0..rows).step_by(piece).collect();
        firsts.into_par_iter().map(|first| f(self.piece(first, piece.min(rows - first))?)).collect()
    }

    /// What the matrix takes as products want it, in bytes.
    pub fn panel_bytes(&self, kernel: Kernel) -> usize {
        let (rows, width) = self.matrix();
        match Codes::fit(self.kind, width, kernel) {
            true => Codes::bytes(self.kind, rows, width),
            false => Panels::bytes(rows, width, kernel),
        }
    }

    /// What its transposed copy takes in a backward pass, in bytes: what stays in codes needs none.
    pub fn transposed_bytes(&self, kernel: Kernel) -> usize {
        let (rows, width) = self.matrix();
        if Codes::fit(self.kind, width, kernel) { 0 } else { Panels::bytes(rows, width, kernel) }
    }

    /// The matrix as products want it.
    ///
    /// # Errors
    /// If the file cannot be read any more.
    pub fn panels(&self, kernel: Kernel) -> Result<Panels> {
        let (rows, width) = self.matrix();
        if Codes::fit(self.kind, width, kernel) {
            let read = |first, rows| self.bytes(first, rows);
            return Panels::coded(self.kind, (rows, width), kernel, self.piece_rows(), read);
        }
        let mut panels = Panels::zeros(rows, width, kernel);
        panels.try_write(self.piece_rows(), |first, values| {
            unpack(&self.piece(first, values.len() / width)?, values).map_err(anyhow::Error::from)
        })?;
        Ok(panels)
    }

    /// The numbers rounded to bf16, row by row.
    ///
    /// # Errors
    /// If the file cannot be read any more.
    pub fn bf16(&self) -> Result<Vec<u16>> {
        let ((rows, width), piece) = (self.matrix(), self.piece_rows());
        let mut rounded = vec![0; rows * width];
        rounded.par_chunks_mut((piece * width).max(1)).enumerate().try_for_each(|(index, rounded)| {
            let mut values = vec![0.0; rounded.len()];
            unpack(&self.piece(index * piece, rounded.len() / width)?, &mut values)?;
            rounded.iter_mut().zip(values).for_each(|(rounded, value)| *rounded = to_bf16(value));
            Ok::<_, anyhow::Error>(())
        })?;
        Ok(rounded)
    }

    /// The tensor in f32.
    ///
    /// # Errors
    /// If the file cannot be read any more.
    pub fn load(&self, device: &Device) -> Result<Tensor> {
        let (rows, width) = self.matrix();
        let mut values = vec![0.0; rows * width];
        let piece = self.piece_rows();
        values.par_chunks_mut((piece * width).max(1)).enumerate().try_for_each(|(index, values)| {
            let stored = self.piece(index * piece, values.len() / width)?;
            unpack(&stored, values).map_err(anyhow::Error::from)
        })?;
        Ok(Tensor::from_vec(values, self.shape.as_slice(), &Device::Cpu)?.to_device(device)?)
    }
}

/// The numbers of a piece in f32, which a packed type could not hold if they were not finite.
fn finite(piece: &QTensor) -> Result<Vec<f32>> {
    let numbers = piece.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
    ensure!(numbers.iter().all(|number| number.is_finite()), "it holds NaN or infinity");
    Ok(numbers)
}

/// The rows of a head whose halves are interleaved, one half after the other.
fn apart(rows: &[u8], row_bytes: usize) -> Vec<u8> {
    let half = |which| rows.chunks(row_bytes).skip(which).step_by(2).flatten().copied();
    half(0).chain(half(1)).collect()
}
