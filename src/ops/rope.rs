//! Rotary position embedding, half-rotation form (Su et al. 2021; the layout of Hugging Face checkpoints).

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{output, values, vectorized, with_values};

/// Cosines and sines for the rows of one forward call, each [rows, head_dim / 2].
#[derive(Clone)]
pub struct Rotation {
    cosines: Arc<[f32]>,
    sines: Arc<[f32]>,
    half: usize,
}

impl Rotation {
    /// The angles position · frequency of every row; `frequencies` has head_dim / 2 entries.
    pub fn new(positions: &[usize], frequencies: &[f64]) -> Self {
        // In f32 as transformers does: at high positions the rounding of the angle is part of the model.
        let angles = positions.iter().flat_map(|&p| frequencies.iter().map(move |&f| p as f32 * f as f32));
        let (cosines, sines): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        Self { cosines: cosines.into(), sines: sines.into(), half: frequencies.len() }
    }
}

/// Rotates every head of `x` [rows, heads · head_dim] by its row's angles.
///
/// # Errors
/// If the rotation was made for another number of rows or another head size.
pub fn rope(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    let ((rows, width), half, angles) = (x.dims2()?, rotation.half, rotation.cosines.len());
    if rows == 0 || rows * half != angles || !width.is_multiple_of(2 * half) {
        bail!("rope: {rows} rows of {width} values, angles for {} rows and heads of {}", angles / half, 2 * half);
    }
    x.apply_op1(Rope(rotation.clone()))
}

struct Rope(Rotation);

impl Rope {
    /// Rotates by the angle times `direction`: 1 forward, −1 backward (a rotation's transpose is its inverse).
    fn rotate(&self, x: &[f32], direction: f32) -> Vec<f32> {
        let Rotation { cosines, sines, half } = &self.0;
        let width = x.len() * half / cosines.len();
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(width).zip(x.par_chunks(width)).enumerate().for_each(|(row, (y, x))| {
            let (cosines, sines) = (&cosines[row * half..][..*half], &sines[row * half..][..*half]);
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                        let ((y1, y2), (x1, x2)) = (y.split_at_mut(*half), x.split_at(*half));
                        for i in 0..*half {
                            let (cosine, sine) = (cosines[i], direction * sines[i]);
                            y1[i] = x1[i] * cosine - x2[i] * sine;
                            y2[i] = x2[i] * cosine + x1[i] * sine;
                        }
                    }
                },
            );
        });
        y
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        output(self.rotate(values(x, layout)?, 1.0), layout.shape())
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let dx = with_values([&grad], |[grad]| self.rotate(grad, -1.0))?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
