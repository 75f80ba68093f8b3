//! The key-value store of the sampler: rows of keys and values per layer, handed out in stretches.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use super::architecture::Architecture;

/// Keys and values of past tokens: for each layer two tensors [rows, key-value heads · head_dim].
pub struct KeyValueStore {
    layers: Vec<(Tensor, Tensor)>,
    /// Free stretches of rows, sorted, never touching each other.
    free: Vec<Range<usize>>,
    rows: usize,
}

/// A stretch of rows of one forward call and where its keys and values go.
#[derive(Clone, Debug)]
pub struct Store {
    /// Rows of the call.
    pub from: Range<usize>,
    /// First row of the store.
    pub to: usize,
}

impl KeyValueStore {
    /// Room for `rows` tokens.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(architecture: &Architecture, rows: usize, device: &Device) -> Result<Self> {
        let shape = (rows, architecture.key_value_heads * architecture.head_dim);
        let zeros = || Tensor::zeros(shape, DType::F32, device);
        let layers = architecture.layers.iter().map(|_| Ok((zeros()?, zeros()?))).collect::<Result<_>>()?;
        Ok(Self { layers, free: std::iter::once(0..rows).collect(), rows })
    }

    /// What `rows` rows take, in bytes.
    pub fn bytes(architecture: &Architecture, rows: usize) -> usize {
        2 * architecture.layers.len() * rows * architecture.key_value_heads * architecture.head_dim * size_of::<f32>()
    }

    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// From now on only the first `rows` rows are handed out; all must have been given back. How many sequences run
    /// together must not depend on what an earlier, larger call needed.
    pub fn restrict(&mut self, rows: usize) {
        self.free = std::iter::once(0..rows.min(self.rows)).collect();
    }

    /// Takes `count` consecutive rows, the first that fit, or `None` if there are none.
    pub fn take(&mut self, count: usize) -> Option<Range<usize>> {
        let index = self.free.iter().position(|free| free.len() >= count)?;
        let start = self.free[index].start;
        self.free[index].start += count;
        if self.free[index].is_empty() {
            self.free.remove(index);
        }
        Some(start..start + count)
    }

    /// Gives rows back.
    pub fn give(&mut self, rows: Range<usize>) {
        if rows.is_empty() {
            return;
        }
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

    /// Writes the new keys and values of a call, and returns all those of the layer.
    ///
    /// # Errors
    /// If a stretch lies outside the call or the store.
    pub(super) fn write(
        &self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
        stores: &[Store],
    ) -> Result<(Tensor, Tensor)> {
        let (all_keys, all_values) = &self.layers[layer];
        for Store { from, to } in stores {
            all_keys.slice_set(&keys.narrow(0, from.start, from.len())?, 0, *to)?;
            all_values.slice_set(&values.narrow(0, from.start, from.len())?, 0, *to)?;
        }
        Ok((all_keys.clone(), all_values.clone()))
    }
}
