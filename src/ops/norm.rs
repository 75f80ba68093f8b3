//! RMS normalization with a frozen gain: `y = x / sqrt(mean(x²) + ε) · gain` (Zhang & Sennrich 2019, eq. 4).

use super::shared::fetch_ahead;
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
                    let [squares] = sums([x], |[x]| [x * x]);
                    let inverse = self.inverse_rms(squares);
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
        let next = x[width.min(x.len())..].chunks(width).chain(std::iter::repeat(&[][..]));
        let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(grad.chunks_exact(width));
        for (((dx, x), grad), next) in rows.zip(next) {
            fetch_ahead(next);
            vectorized(
                #[inline(always)]
                || {
                    let [squares, projection] =
                        sums([x, grad, &self.gain], |[x, grad, gain]| [x * x, x * (grad * gain)]);
                    let inverse = self.inverse_rms(squares);
                    let pull = (projection / width as f64) as f32 * inverse * inverse;
                    for (((dx, x), grad), gain) in dx.iter_mut().zip(x).zip(grad).zip(&self.gain) {
                        *dx += inverse * (grad * gain - x * pull);
                    }
                },
            );
        }
    }

    /// 1 / sqrt(mean(x²) + ε), from Σ x².
    #[inline(always)]
    fn inverse_rms(&self, squares: f64) -> f32 {
        (1.0 / (squares / self.gain.len() as f64 + self.epsilon).sqrt()) as f32
    }
}

/// `y = a + b`.
pub fn sum_of(a: &[f32], b: &[f32], y: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (a, b))| *y = a + b),
    );
}

/// The sums of some terms over rows of one length, in strands that the compiler can put side by side. What the strands hold is summed in
/// f64: it decides every value of the row.
#[inline(always)]
fn sums<const N: usize, const M: usize>(rows: [&[f32]; N], terms: impl Fn([f32; N]) -> [f32; M]) -> [f64; M] {
    const STRANDS: usize = 64;
    const LANES: usize = 8;
    let chunks = rows.map(<[f32]>::as_chunks::<STRANDS>);
    let mut strands = [[0.0f32; STRANDS]; M];
    for index in 0..chunks[0].0.len() {
        let chunks = chunks.map(|(whole, _)| &whole[index]);
        for i in 0..STRANDS {
            let terms = terms(chunks.map(|chunk| chunk[i]));
            for (strands, term) in strands.iter_mut().zip(terms) {
                strands[i] += term;
            }
        }
    }
    // Side by side too: one after the other they would take as long as the row.
    let mut totals = [0.0; M];
    for (total, strands) in totals.iter_mut().zip(&strands) {
        let mut lanes = [0.0f64; LANES];
        for strands in strands.chunks_exact(LANES) {
            lanes.iter_mut().zip(strands).for_each(|(lane, strand)| *lane += f64::from(*strand));
        }
        *total = lanes.iter().sum::<f64>();
    }
    let mut rest = [0.0; M];
    for i in 0..chunks[0].1.len() {
        let terms = terms(chunks.map(|(_, rest)| rest[i]));
        rest.iter_mut().zip(terms).for_each(|(rest, term)| *rest += f64::from(term));
    }
    totals.iter_mut().zip(rest).for_each(|(total, rest)| *total += rest);
    totals
}
