//! An adapter on the device: what bf16 holds of its matrices and what that leaves, one below the other.
//!
//! With A [rank, in] and s · Bᵀ [rank, out] in this form, no product in either direction needs another copy.

use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::Tensor;
use rayon::prelude::*;

use super::device::{Array, Gpu, Purpose, View};
use super::kernels;
use crate::model::Projection;

/// Parts that a number is held in: what bf16 holds of it, and what that leaves.
pub const PARTS: usize = 2;

/// All pairs of an adapter.
pub struct Factors {
    /// s: alpha / rank.
    pub scale: f32,
    /// By layer · 7 + projection.
    pairs: Vec<Option<Pair>>,
    /// All matrices.
    parts: Array<u16>,
}

/// A pair, with the places of its matrices in numbers from the first of the adapter's.
#[derive(Clone, Copy, PartialEq)]
pub struct Pair {
    /// Its inner dimension.
    pub rank: usize,
    /// Inputs and outputs of its projection.
    pub narrow: usize,
    /// As above.
    pub wide: usize,
    /// Of A; B, or s · Bᵀ, comes after it.
    start: usize,
}

impl Pair {
    /// Where A and B begin among the numbers of all tensors.
    pub fn places(&self) -> [usize; 2] {
        [self.start, self.start + self.rank * self.narrow]
    }
}

impl Factors {
    /// From the pairs of an adapter, in order, for `count` projections.
    pub(crate) fn new<'a>(
        gpu: &Arc<Gpu>,
        scale: f32,
        adapter: impl Iterator<Item = (usize, Projection, &'a Tensor, &'a Tensor)>,
        count: usize,
    ) -> Result<Self> {
        let (mut pairs, mut tensors, mut start) = (vec![None; count], Vec::new(), 0);
        for (layer, projection, a, b) in adapter {
            let ((rank, narrow), (wide, _)) = (a.dims2()?, b.dims2()?);
            ensure!(rank > 0, "an adapter of rank 0");
            let pair = Pair { rank, narrow, wide, start };
            pairs[layer * Projection::ALL.len() + projection as usize] = Some(pair);
            start += rank * (narrow + wide);
            tensors.push((pair, a.flatten_all()?.to_vec1::<f32>()?, b.flatten_all()?.to_vec1::<f32>()?));
        }
        let mut values = vec![0.0; start];
        let mut rest = &mut values[..];
        let mut places = Vec::new();
        for (pair, a, b) in tensors {
            let (own, others) = rest.split_at_mut(pair.rank * (pair.narrow + pair.wide));
            rest = others;
            places.push((pair, own, a, b));
        }
        places.into_par_iter().for_each(|(pair, own, a, b)| {
            let (to_a, to_b) = own.split_at_mut(a.len());
            to_a.copy_from_slice(&a);
            for (row, to) in to_b.chunks_exact_mut(pair.wide).enumerate() {
                to.iter_mut().zip(b[row..].iter().step_by(pair.rank)).for_each(|(to, b)| *to = scale * b);
            }
        });
        let staged = gpu.upload(Purpose::Adapter, &values)?;
        let parts = gpu.array(Purpose::Adapter, PARTS * values.len())?;
        for pair in pairs.iter().flatten() {
            let [a, b] = pair.places();
            for (at, len) in [(a, pair.rank * pair.narrow), (b, pair.rank * pair.wide)] {
                let (high, low) = (parts.from(PARTS * at), parts.from(PARTS * at + len));
                kernels::split_parts(gpu, staged.from(at), high, low, len)?;
            }
        }
        Ok(Self { scale, pairs, parts })
    }

    /// The pair of one projection, if it carries one.
    pub fn pair(&self, layer: usize, projection: Projection) -> Option<&Pair> {
        self.pairs[layer * Projection::ALL.len() + projection as usize].as_ref()
    }

    /// A [2 · rank, in] and s · Bᵀ [2 · rank, out] of a pair.
    pub fn matrices(&self, pair: &Pair) -> [View<u16>; 2] {
        pair.places().map(|at| self.parts.from(PARTS * at))
    }

    /// A copy at a place of its own.
    pub fn copied(&self, gpu: &Arc<Gpu>) -> Result<Self> {
        let parts = gpu.array(Purpose::Adapter, self.parts.len())?;
        parts.copy_from(&self.parts)?;
        Ok(Self { scale: self.scale, pairs: self.pairs.clone(), parts })
    }

    /// Replaces the matrices of a copy by those of another version, if it is one of the same adapter.
    pub fn replace(&self, other: &Self) -> Result<bool> {
        let same = (self.scale, &self.pairs) == (other.scale, &other.pairs);
        if same {
            self.parts.copy_from(&other.parts)?;
        }
        Ok(same)
    }
}
