//! The key-value store of the sampler: rows of keys and values per layer, handed out in stretches.

use std::ops::Range;

use super::architecture::Architecture;
use crate::cuda::decoder;
use crate::ops::kernel::Kernel;
use crate::ops::keys::{Keys, padded};

/// Keys and values of past tokens, for every layer.
pub struct KeyValueStore {
    layers: Layers,
    /// Free stretches of rows, sorted, never touching each other.
    free: Vec<Range<usize>>,
    rows: usize,
}

/// Where they are.
pub(super) enum Layers {
    Host(Vec<Keys>),
    Gpu(decoder::Keys),
}

impl KeyValueStore {
    /// Room for `rows` tokens.
    pub fn new(architecture: &Architecture, rows: usize, kernel: Kernel) -> Self {
        let rows = padded(rows);
        let layers = architecture.layers.iter().map(|&kind| Keys::new(rows, architecture.heads_of(kind), kernel, true));
        Self { layers: Layers::Host(layers.collect()), free: std::iter::once(0..rows).collect(), rows }
    }

    /// The same on a GPU, which has room for them.
    pub(super) fn on_gpu(keys: decoder::Keys, rows: usize) -> Self {
        let rows = padded(rows);
        Self { layers: Layers::Gpu(keys), free: std::iter::once(0..rows).collect(), rows }
    }

    /// What `rows` rows take, in bytes.
    pub fn bytes(architecture: &Architecture, rows: usize, kernel: Kernel) -> usize {
        if kernel == Kernel::Cuda {
            return padded(rows) * decoder::Keys::row_bytes(architecture);
        }
        architecture
            .layers
            .iter()
            .map(|&kind| padded(rows) * Keys::row_bytes(architecture.heads_of(kind), kernel))
            .sum()
    }

    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The keys and values of every layer.
    pub(super) fn layers(&mut self) -> &mut Layers {
        &mut self.layers
    }

    /// From now on only the first `rows` rows are handed out; all must have been given back. How many sequences run
    /// together must not depend on what an earlier, larger call needed.
    pub fn restrict(&mut self, rows: usize) {
        self.free = std::iter::once(0..padded(rows).min(self.rows)).collect();
    }

    /// Takes `count` consecutive rows or a few more, whole blocks, the first that fit, or `None` if there are none.
    pub fn take(&mut self, count: usize) -> Option<Range<usize>> {
        let count = padded(count);
        let index = self.free.iter().position(|free| free.len() >= count)?;
        let start = self.free[index].start;
        self.free[index].start += count;
        if self.free[index].is_empty() {
            self.free.remove(index);
        }
        Some(start..start + count)
    }

    /// Gives rows back, up to the end of their last block.
    pub fn give(&mut self, rows: Range<usize>) {
        if rows.is_empty() {
            return;
        }
        let rows = rows.start..padded(rows.end);
        let index = self.free.partition_point(|free| free.start < rows.start);
        self.free.insert(index, rows);
        self.free.dedup_by(|next, free| {
            let touching = free.end == next.start;
            if touching {
                free.end = next.end;
            }
            touching
        });
    }
}
