//! Keys and values of one layer, laid out for attention: keys in blocks of 32 rows, transposed, so that one query's scores are
//! neighbors; values row by row.

use std::ops::Range;

use super::attention::Heads;
use super::pages::Held;
use super::shared::SharedRows;
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

/// Keys and values of one layer.
pub struct Keys {
    /// [rows / 32, key heads, dim, 32].
    blocks: Held<f32>,
    /// [rows, key heads · dim].
    values: Held<f32>,
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
    pub fn new(rows: usize, heads: Heads, stays: bool) -> Self {
        let len = padded(rows) * heads.key * heads.dim;
        let zeros = || Held::zeros(len, stays);
        Self { blocks: zeros(), values: zeros(), heads: heads.key, dim: heads.dim }
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
        let (width, block) = (self.width(), BLOCK * self.width());
        let (blocks, to_values) = (SharedRows::new(&mut self.blocks, block), SharedRows::new(&mut self.values, width));
        stores.par_iter().with_min_len(64).for_each(|Store { from, to }| {
            for (row, to) in from.clone().zip(*to..) {
                // SAFETY: stores write to different rows, and no two to the same block.
                let (blocks, to_values) = unsafe { (blocks.part(to / BLOCK, 0..block), to_values.part(to, 0..width)) };
                to_values.copy_from_slice(&values[row * width..][..width]);
                let lanes = blocks[to % BLOCK..].iter_mut().step_by(BLOCK);
                lanes.zip(&keys[row * width..][..width]).for_each(|(to, key)| *to = *key);
            }
        });
    }

    /// The keys of one head in one block, [dim, 32].
    pub(super) fn block(&self, block: usize, head: usize) -> &[f32] {
        let len = self.dim * BLOCK;
        &self.blocks[(block * self.heads + head) * len..][..len]
    }

    /// The values of one head from a row on; rows are [`Keys::stride`] apart.
    pub(super) fn values(&self, row: usize, head: usize) -> &[f32] {
        &self.values[(row * self.width() + head * self.dim).min(self.values.len())..]
    }

    /// The distance between two rows of values.
    pub(super) fn stride(&self) -> usize {
        self.width()
    }
}
