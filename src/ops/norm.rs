//! RMS normalization with a frozen gain: `y = x / sqrt(mean(x²) + ε) · gain` (Zhang & Sennrich 2019, eq. 4).

use super::shared::fetch_ahead;
use super::{LANES, across, vectorized};

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
        ahead(
            x.len().min(y.len()) / width,
            #[inline(always)]
            |row| {
                fetch_ahead(after(x, row, width));
                let [squares] = sums([&x[row * width..][..width]], |[x]| [x * x]);
                self.inverse_rms(squares)
            },
            #[inline(always)]
            |row, inverse| {
                let (x, y) = (&x[row * width..][..width], &mut y[row * width..][..width]);
                for ((y, x), gain) in y.iter_mut().zip(x).zip(&self.gain) {
                    *y = x * inverse * gain;
                }
            },
        );
    }

    /// Adds the gradient of `x` to `dx`: with r = 1/rms and g = grad · gain, r · (g − x · r² · mean(g · x)).
    pub fn backward(&self, x: &[f32], grad: &[f32], dx: &mut [f32]) {
        let width = self.gain.len();
        ahead(
            x.len() / width,
            #[inline(always)]
            |row| {
                fetch_ahead(after(x, row, width));
                let (x, grad) = (&x[row * width..][..width], &grad[row * width..][..width]);
                let [squares, projection] = sums([x, grad, &self.gain], |[x, grad, gain]| [x * x, x * (grad * gain)]);
                let inverse = self.inverse_rms(squares);
                (inverse, (projection / width as f64) as f32 * inverse * inverse)
            },
            #[inline(always)]
            |row, (inverse, pull)| {
                let (x, grad) = (&x[row * width..][..width], &grad[row * width..][..width]);
                let dx = &mut dx[row * width..][..width];
                for (((dx, x), grad), gain) in dx.iter_mut().zip(x).zip(grad).zip(&self.gain) {
                    *dx += inverse * (grad * gain - x * pull);
                }
            },
        );
    }

    /// 1 / sqrt(mean(x²) + ε), from Σ x².
    #[inline(always)]
    fn inverse_rms(&self, squares: f64) -> f32 {
        let width = self.gain.len() as f64;
        (width / (squares + width * self.epsilon)).sqrt() as f32
    }
}

/// `y = a + b`.
pub fn sum_of(a: &[f32], b: &[f32], y: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (a, b))| *y = a + b),
    );
}

/// The row after this one, if there is one.
#[inline(always)]
fn after(x: &[f32], row: usize, width: usize) -> &[f32] {
    x.get((row + 1) * width..(row + 2) * width).unwrap_or_default()
}

/// Calls `then(row, first(row))` for all rows, and `first` always a row ahead: what it computes takes long to be known, and the processor
/// does both at once.
#[inline(always)]
fn ahead<T: Copy>(rows: usize, first: impl Fn(usize) -> T, mut then: impl FnMut(usize, T)) {
    if rows == 0 {
        return;
    }
    vectorized(
        #[inline(always)]
        || {
            let mut known = first(0);
            for row in 0..rows - 1 {
                let next = first(row + 1);
                then(row, known);
                known = next;
            }
            then(rows - 1, known);
        },
    );
}

/// The sums of some terms over rows of one length, in strands of which there are enough to hide how long an addition takes.
#[inline(always)]
fn sums<const N: usize, const M: usize>(rows: [&[f32]; N], terms: impl Fn([f32; N]) -> [f32; M]) -> [f64; M] {
    let chunks = rows.map(<[f32]>::as_chunks::<{ 4 * LANES }>);
    // By name and not by number: the compiler keeps them in registers.
    let [mut a, mut b, mut c, mut d] = [[[0.0f32; LANES]; M]; 4];
    for index in 0..chunks[0].0.len() {
        let vectors = chunks.map(|(whole, _)| whole[index].as_chunks::<LANES>().0);
        add(&mut a, vectors.map(|vectors| &vectors[0]), &terms);
        add(&mut b, vectors.map(|vectors| &vectors[1]), &terms);
        add(&mut c, vectors.map(|vectors| &vectors[2]), &terms);
        add(&mut d, vectors.map(|vectors| &vectors[3]), &terms);
    }
    let mut totals = [0.0; M];
    for (m, total) in totals.iter_mut().enumerate() {
        *total = total_of(&[a[m], b[m], c[m], d[m]]);
    }
    for i in 0..chunks[0].1.len() {
        let terms = terms(chunks.map(|(_, rest)| rest[i]));
        for (total, term) in totals.iter_mut().zip(terms) {
            *total += f64::from(term);
        }
    }
    totals
}

/// Adds the terms of sixteen columns to their strands.
#[inline(always)]
fn add<const N: usize, const M: usize>(
    strands: &mut [[f32; LANES]; M],
    rows: [&[f32; LANES]; N],
    terms: &impl Fn([f32; N]) -> [f32; M],
) {
    for lane in 0..LANES {
        let terms = terms(rows.map(|row| row[lane]));
        for (strands, term) in strands.iter_mut().zip(terms) {
            strands[lane] += term;
        }
    }
}

/// In f64, for it decides every value of the row. Not inlined: the compiler would have the strands in vectors as short as those of f64.
#[inline(never)]
fn total_of(strands: &[[f32; LANES]; 4]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    for strands in strands {
        lanes.iter_mut().zip(strands).for_each(|(lane, strand)| *lane += f64::from(*strand));
    }
    across(lanes, |a, b| a + b)
}
