//! RMS normalization with a frozen gain: `y = x / sqrt(mean(x²) + ε) · gain` (Zhang & Sennrich 2019, eq. 4).

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{output, values, vectorized, with_values};

/// Normalizes each row of `x` [rows, width] and multiplies it with `gain` [width]. Rows may hold several such stretches, the
/// heads of queries or keys: each is normalized by itself.
///
/// # Errors
/// If rows are not whole stretches, or a tensor is not f32.
pub fn rms_norm(x: &Tensor, gain: &Tensor, epsilon: f64) -> Result<Tensor> {
    if gain.elem_count() == 0 || !x.dim(D::Minus1)?.is_multiple_of(gain.elem_count()) {
        bail!("rms norm: rows of {:?} do not fit a gain of {:?}", x.dims(), gain.dims());
    }
    x.apply_op1(RmsNorm { gain: gain.clone(), epsilon })
}

struct RmsNorm {
    gain: Tensor,
    epsilon: f64,
}

impl RmsNorm {
    /// 1 / sqrt(mean(x²) + ε), summed in f64: the widths are small and the sum decides every value of the row.
    fn inverse_rms(&self, row: &[f32]) -> f32 {
        let sum: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        (1.0 / (sum / row.len() as f64 + self.epsilon).sqrt()) as f32
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(x, layout)?;
        let width = self.gain.elem_count();
        let mut y = vec![0.0; x.len()];
        with_values([&self.gain], |[gain]| {
            y.par_chunks_mut(width).zip(x.par_chunks(width)).for_each(|(y, x)| {
                vectorized(
                    #[inline(always)]
                    || {
                        let inverse = self.inverse_rms(x);
                        for ((y, x), gain) in y.iter_mut().zip(x).zip(gain) {
                            *y = x * inverse * gain;
                        }
                    },
                );
            });
        })?;
        output(y, layout.shape())
    }

    /// With r = 1/rms and g = grad · gain: dx = r · (g − x · r² · mean(g · x)).
    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let width = self.gain.elem_count();
        let grad = grad.contiguous()?;
        let mut dx = vec![0.0; x.elem_count()];
        with_values([x, &self.gain, &grad], |[x, gain, grad]| {
            let rows = x.par_chunks(width).zip(grad.par_chunks(width));
            dx.par_chunks_mut(width).zip(rows).for_each(|(dx, (x, grad))| {
                vectorized(
                    #[inline(always)]
                    || {
                        let inverse = self.inverse_rms(x);
                        let mut projection = 0.0;
                        for ((x, grad), gain) in x.iter().zip(grad).zip(gain) {
                            projection += f64::from(*x) * f64::from(grad * gain);
                        }
                        let pull = (projection / width as f64) as f32 * inverse * inverse;
                        for (((dx, x), grad), gain) in dx.iter_mut().zip(x).zip(grad).zip(gain) {
                            *dx = inverse * (grad * gain - x * pull);
                        }
                    },
                );
            });
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
