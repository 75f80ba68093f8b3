//! Rotary position embedding, half-rotation form (Su et al. 2021; the layout of Hugging Face checkpoints).

use std::ops::Range;

use super::vectorized;

/// Cosines and sines for the rows of one forward call, each [rows, head_dim / 2].
pub struct Rotation {
    cosines: Vec<f32>,
    sines: Vec<f32>,
    half: usize,
}

/// Which way to rotate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Direction {
    /// By the angles: the forward pass.
    Forward,
    /// Back: a rotation's transpose is its inverse.
    Backward,
}

impl Rotation {
    /// The angles position · frequency of every row; `frequencies` has head_dim / 2 entries.
    pub fn new(positions: &[usize], frequencies: &[f64]) -> Self {
        // In f32 as transformers does: at high positions the rounding of the angle is part of the model.
        let angles = positions.iter().flat_map(|&p| frequencies.iter().map(move |&f| p as f32 * f as f32));
        let (cosines, sines) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        Self { cosines, sines, half: frequencies.len() }
    }

    /// Rotates every head of `x` [rows.len(), heads · head_dim] in place, by the angles of these rows of the call, and multiplies it with
    /// `scale`.
    pub fn apply(&self, x: &mut [f32], rows: Range<usize>, direction: Direction, scale: f32) {
        let half = self.half;
        let width = x.len() / rows.len().max(1);
        let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
        vectorized(
            #[inline(always)]
            || {
                for (x, row) in x.chunks_exact_mut(width.max(1)).zip(rows) {
                    let (cosines, sines) = (&self.cosines[row * half..][..half], &self.sines[row * half..][..half]);
                    for x in x.chunks_exact_mut(2 * half) {
                        let (first, second) = x.split_at_mut(half);
                        for ((a, b), (cosine, sine)) in first.iter_mut().zip(second).zip(cosines.iter().zip(sines)) {
                            let sine = sign * sine;
                            (*a, *b) = (scale * (*a * cosine - *b * sine), scale * (*b * cosine + *a * sine));
                        }
                    }
                }
            },
        );
    }
}
