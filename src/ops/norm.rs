//! RMS normalization with a frozen gain: `y = x / sqrt(mean(x²) + ε) · gain` (Zhang & Sennrich 2019, eq. 4).

use super::vectorized;

/// A normalization: the gain [width] and ε.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// What normalized values are multiplied with.
    pub gain: Vec<f32>,
    /// Added to the mean square.
    pub epsilon: f64,
}

impl RmsNorm {
    /// Normalizes each stretch of `width` values: a row, or one head of a row.
    pub fn forward(&self, x: &[f32], y: &mut [f32]) {
        let width = self.gain.len();
        for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            vectorized(
                #[inline(always)]
                || {
                    let inverse = self.inverse_rms(x);
                    for ((y, x), gain) in y.iter_mut().zip(x).zip(&self.gain) {
                        *y = x * inverse * gain;
                    }
                },
            );
        }
    }

    /// Adds the gradient of `x` to `dx`: with r = 1/rms and g = grad · gain, r · (g − x · r² · mean(g · x)).
    pub fn backward(&self, x: &[f32], grad: &[f32], dx: &mut [f32]) {
        let width = self.gain.len();
        for ((dx, x), grad) in dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(grad.chunks_exact(width)) {
            vectorized(
                #[inline(always)]
                || {
                    let inverse = self.inverse_rms(x);
                    let projection = sum([x, grad, &self.gain], |[x, grad, gain]| x * (grad * gain));
                    let pull = (projection / width as f64) as f32 * inverse * inverse;
                    for (((dx, x), grad), gain) in dx.iter_mut().zip(x).zip(grad).zip(&self.gain) {
                        *dx += inverse * (grad * gain - x * pull);
                    }
                },
            );
        }
    }

    /// 1 / sqrt(mean(x²) + ε).
    #[inline(always)]
    fn inverse_rms(&self, x: &[f32]) -> f32 {
        let squares = sum([x], |[x]| x * x);
        (1.0 / (squares / x.len() as f64 + self.epsilon).sqrt()) as f32
    }
}

/// `y = a + b`.
pub fn sum_of(a: &[f32], b: &[f32], y: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (a, b))| *y = a + b),
    );
}

/// The sum of a term over rows of one length, in strands that the compiler can put side by side. What the strands hold is summed in
/// f64: it decides every value of the row.
#[inline(always)]
fn sum<const N: usize>(rows: [&[f32]; N], term: impl Fn([f32; N]) -> f32) -> f64 {
    const STRANDS: usize = 64;
    const LANES: usize = 8;
    let chunks = rows.map(<[f32]>::as_chunks::<STRANDS>);
    let mut strands = [0.0f32; STRANDS];
    for index in 0..chunks[0].0.len() {
        let chunks = chunks.map(|(whole, _)| &whole[index]);
        for (i, strand) in strands.iter_mut().enumerate() {
            *strand += term(chunks.map(|chunk| chunk[i]));
        }
    }
    // Side by side too: one after the other they would take as long as the row.
    let mut lanes = [0.0f64; LANES];
    for strands in strands.chunks_exact(LANES) {
        lanes.iter_mut().zip(strands).for_each(|(lane, strand)| *lane += f64::from(*strand));
    }
    let rest = (0..chunks[0].1.len()).map(|i| f64::from(term(chunks.map(|(_, rest)| rest[i]))));
    lanes.iter().sum::<f64>() + rest.sum::<f64>()
}
