//! Dropout of an adapter's inputs (Srivastava et al. 2014, as PEFT does it): before A, an input is zero with probability p, and
//! 1 / (1 − p) times itself otherwise. What the frozen weight is multiplied with stays whole.
//!
//! Whether an input is dropped is a function of its row's key, the layer, the projection and the channel: whoever computes a row
//! again, or among other rows, drops the same.

use std::ops::Range;

use super::buffer::{Buffer, Pooled, copy};
use super::vectorized;
use crate::random::{self, Purpose, SplitMix64};

/// What a call drops.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// p, of [0, 1).
    pub share: f64,
    /// A key of each of the call's rows.
    pub rows: Vec<u64>,
}

/// What is dropped of the inputs of one projection, for some rows.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    /// As [`Dropout::bound`] and [`Dropout::scale`].
    bound: u64,
    scale: f32,
    rows: &'a [u64],
    layer: usize,
    projection: usize,
}

impl Dropout {
    /// The mask of some of the call's rows.
    pub fn mask(&self, rows: Range<usize>, layer: usize, projection: usize) -> Mask<'_> {
        Mask { bound: self.bound(), scale: self.scale(), rows: &self.rows[rows], layer, projection }
    }

    /// 64 bits are below it with probability p.
    pub fn bound(&self) -> u64 {
        (self.share * 2f64.powi(64)) as u64
    }

    /// What is kept is multiplied by this.
    pub fn scale(&self) -> f32 {
        (1.0 / (1.0 - self.share)) as f32
    }
}

impl Mask<'_> {
    /// What is kept is multiplied by this.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Sets to zero what is dropped of some channels, which lie in rows `stride` values apart.
    pub fn apply<T: Copy + Default>(&self, channels: Range<usize>, values: &mut [T], stride: usize) {
        for (index, row) in values.chunks_mut(stride).take(self.rows.len()).enumerate() {
            let dropped = self.row(index);
            let row = row.iter_mut().zip(channels.clone());
            vectorized(
                #[inline(always)]
                || row.for_each(|(x, channel)| *x = if dropped(channel) { T::default() } else { *x }),
            );
        }
    }

    /// Whether channels of row number `row` are dropped.
    #[inline(always)]
    pub fn row(&self, row: usize) -> impl Fn(usize) -> bool + use<> {
        let (bound, counters) = (self.bound, [self.layer as u64, self.projection as u64]);
        let stream = SplitMix64::new(random::key(self.rows[row], Purpose::Dropout, &counters));
        #[inline(always)]
        move |channel| stream.nth(channel as u64) < bound
    }

    /// Rows of all channels, without what is dropped.
    pub fn of<T: Pooled>(&self, values: &[T], stride: usize) -> Buffer<T> {
        let mut kept = copy(values);
        self.apply(0..stride, &mut kept, stride);
        kept
    }
}
