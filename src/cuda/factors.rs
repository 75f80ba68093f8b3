//! An adapter on the device: its numbers, and what bf16 holds of its matrices and what that leaves, one below the other.
//!
//! With A [rank, in] and s · Bᵀ [rank, out] in this form, no product in either direction needs another copy.

use std::sync::Arc;

use anyhow::Result;

use super::device::{Array, Gpu, Purpose, View};
use super::kernels;
use crate::policy::{Layout, Pair};

/// Parts that a number is held in: what bf16 holds of it, and what that leaves.
pub const PARTS: usize = 2;

/// A version of an adapter.
pub struct Version {
    /// The numbers of all tensors in f32, from which the next version is made.
    pub values: Array<f32>,
    /// What products are made with.
    pub factors: Arc<Factors>,
}

/// All pairs of an adapter.
pub struct Factors {
    /// What they are, and where.
    pub(super) layout: Arc<Layout>,
    /// All matrices.
    parts: Array<u16>,
}

impl Version {
    /// Of numbers that are made once there is room for the matrices.
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        layout: &Arc<Layout>,
        values: impl FnOnce() -> Result<Array<f32>>,
    ) -> Result<Self> {
        let parts = gpu.array(Purpose::Adapter, PARTS * layout.numbers())?;
        let values = values()?;
        for pair in &layout.pairs {
            let ([at, _], &Pair { rank, narrow, wide, .. }) = (pair.places(), pair);
            kernels::adapter_parts(gpu, values.from(at), parts.from(PARTS * at), layout.scale, [rank, narrow, wide])?;
        }
        Ok(Self { values, factors: Arc::new(Factors { layout: layout.clone(), parts }) })
    }
}

impl Factors {
    /// A [2 · rank, in] and s · Bᵀ [2 · rank, out] of a pair.
    pub(super) fn matrices(&self, pair: &Pair) -> [View<u16>; 2] {
        pair.places().map(|at| self.parts.from(PARTS * at))
    }

    /// A copy at a place of its own.
    pub fn copied(&self, gpu: &Arc<Gpu>) -> Result<Self> {
        let parts = gpu.array(Purpose::Adapter, self.parts.len())?;
        parts.copy_from(&self.parts)?;
        Ok(Self { layout: self.layout.clone(), parts })
    }

    /// Replaces the matrices of a copy by those of another version, if it is one of the same adapter; whether it is.
    pub fn replace(&self, other: &Self) -> Result<bool> {
        let same = Arc::ptr_eq(&self.layout, &other.layout);
        if same {
            self.parts.copy_from(&other.parts)?;
        }
        Ok(same)
    }
}
