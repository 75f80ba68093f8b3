//! Keys and values of one layer, laid out for attention: keys in blocks of 32 rows, transposed, so that one query's scores are
//! neighbors; values row by row.

use std::ops::Range;

use super::attention::Heads;
use super::kernel::Kernel;
use super::matmul::{Matrix, Right};
use super::pages::Held;
use super::panels::to_bf16;
use super::shared::SharedRows;
use crate::config::Dtype;
use rayon::prelude::*;

/// Rows of a block of keys. Stretches of rows that belong to one sequence start with a block.
pub const BLOCK: usize = 32;

/// Consecutive rows of a call, and where their keys and values go.
#[derive(Clone, Debug)]
pub struct Store {
    /// Rows of the call.
    pub from: Range<usize>,
    /// First row of the keys.
    pub to: usize,
}

/// In the type of the kernel.
enum Numbers {
    F32(Held<f32>),
    Bf16(Held<u16>),
}

/// Keys and values of one layer.
pub struct Keys {
    /// [rows / 32, key heads, dim, 32].
    blocks: Numbers,
    /// [rows, key heads · dim].
    values: Numbers,
    /// Key heads.
    heads: usize,
    dim: usize,
}

/// Rows up to the end of their last block.
pub fn padded(rows: usize) -> usize {
    rows.next_multiple_of(BLOCK)
}

impl Keys {
    /// Room for `rows` rows, whole blocks, of zeros; for longer than a call if it stays.
    pub fn new(rows: usize, heads: Heads, kernel: Kernel, stays: bool) -> Self {
        let len = padded(rows) * heads.key * heads.dim;
        let zeros = || match kernel.dtype() {
            Dtype::F32 => Numbers::F32(Held::zeros(len, stays)),
            _ => Numbers::Bf16(Held::zeros(len, stays)),
        };
        Self { blocks: zeros(), values: zeros(), heads: heads.key, dim: heads.dim }
    }

    /// What a row takes, in bytes.
    pub fn row_bytes(heads: Heads, kernel: Kernel) -> usize {
        let number = if kernel.dtype() == Dtype::F32 { size_of::<f32>() } else { size_of::<u16>() };
        2 * heads.key * heads.dim * number
    }

    /// Width of a row.
    fn width(&self) -> usize {
        self.heads * self.dim
    }

    /// Writes the keys and values [rows, key heads · dim] of a call. Each block receives rows of one store.
    ///
    /// # Panics
    /// If a store lies outside: a mistake of the caller.
    pub fn write(&mut self, keys: &[f32], values: &[f32], stores: &[Store]) {
        let width = self.width();
        match (&mut self.blocks, &mut self.values) {
            (Numbers::F32(blocks), Numbers::F32(rows)) => write(blocks, rows, width, keys, values, stores, |x| x),
            (Numbers::Bf16(blocks), Numbers::Bf16(rows)) => write(blocks, rows, width, keys, values, stores, to_bf16),
            _ => unreachable!("both are of one type"),
        }
    }

    /// The keys of one head in one block, [dim, 32].
    pub(super) fn block(&self, block: usize, head: usize) -> Right<'_> {
        let (len, rows) = (self.dim * BLOCK, self.dim);
        let start = (block * self.heads + head) * len;
        match &self.blocks {
            Numbers::F32(numbers) => Right::F32(Matrix::dense(&numbers[start..start + len], BLOCK)),
            Numbers::Bf16(numbers) => {
                Right::Bf16 { data: &numbers[start..start + len], rows, columns: BLOCK, stride: BLOCK }
            }
        }
    }

    /// The values of one head in some rows, [rows, dim].
    pub(super) fn values(&self, rows: &Range<usize>, head: usize) -> Right<'_> {
        let (columns, stride) = (self.dim, self.width());
        let start = rows.start * stride + head * columns;
        match &self.values {
            Numbers::F32(numbers) => {
                Right::F32(Matrix::new(&numbers[start.min(numbers.len())..], rows.len(), columns, stride))
            }
            Numbers::Bf16(numbers) => {
                Right::Bf16 { data: &numbers[start.min(numbers.len())..], rows: rows.len(), columns, stride }
            }
        }
    }
}

fn write<T: Copy + Send + Sync>(
    blocks: &mut [T],
    rows: &mut [T],
    width: usize,
    keys: &[f32],
    values: &[f32],
    stores: &[Store],
    number: impl Fn(f32) -> T + Sync,
) {
    let block = BLOCK * width;
    let (blocks, rows) = (SharedRows::new(blocks, block), SharedRows::new(rows, width));
    stores.par_iter().with_min_len(64).for_each(|Store { from, to }| {
        for (row, to) in from.clone().zip(*to..) {
            // SAFETY: stores write to different rows, and no two to the same block.
            let (blocks, rows) = unsafe { (blocks.part(to / BLOCK, 0..block), rows.part(to, 0..width)) };
            rows.iter_mut().zip(&values[row * width..][..width]).for_each(|(to, value)| *to = number(*value));
            let lanes = blocks[to % BLOCK..].iter_mut().step_by(BLOCK);
            lanes.zip(&keys[row * width..][..width]).for_each(|(to, key)| *to = number(*key));
        }
    });
}
