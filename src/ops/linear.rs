//! `y = x Wᵀ + c + s (x Aᵀ) Bᵀ`: a frozen weight and bias, and the low-rank adapter beside it (LoRA, Hu et al. 2021, eq. 3).
//!
//! W and c are never differentiated: a gradient as large as the model would be thrown away.

use super::buffer::Buffer;
use super::matmul::{Matrix, matmul};
use super::panels::{Left, Panels, Threads};

/// The adapter of one projection, as its products want it.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// Rows of the down projection.
    pub rank: usize,
    /// Down projection A [rank, in].
    pub a: Vec<f32>,
    /// Its transpose [in, rank].
    pub a_t: Vec<f32>,
    /// Up projection times the scale, s · B [out, rank].
    pub b: Vec<f32>,
    /// Its transpose [rank, out].
    pub b_t: Vec<f32>,
    /// What the product is multiplied with, s: alpha / rank.
    pub scale: f32,
}

/// Gradients of an adapter's two matrices, in their shapes.
#[derive(Clone, Debug)]
pub struct LowRankGradient {
    /// Of A [rank, in].
    pub a: Vec<f32>,
    /// Of B [out, rank].
    pub b: Vec<f32>,
}

/// One projection of a layer: the frozen weight in both directions, as far as it is needed, and its adapter.
#[derive(Clone, Copy)]
pub struct Linear<'a> {
    /// W, or its transpose for a backward pass.
    pub weight: &'a Panels,
    /// c [out].
    pub bias: Option<&'a [f32]>,
    /// The adapter, if the projection carries one.
    pub adapter: Option<&'a LowRank>,
}

impl LowRank {
    /// From A [rank, in] and B [out, rank].
    pub fn new(a: Vec<f32>, mut b: Vec<f32>, rank: usize, scale: f32) -> Self {
        b.iter_mut().for_each(|b| *b *= scale);
        let (a_t, b_t) = (transposed(&a, a.len() / rank), transposed(&b, rank));
        Self { rank, a, a_t, b, b_t, scale }
    }

    /// Zeros in the shapes of A and B.
    pub fn zeros(&self) -> LowRankGradient {
        LowRankGradient { a: vec![0.0; self.a.len()], b: vec![0.0; self.b.len()] }
    }

    /// `x Aᵀ` [rows, rank].
    fn down(&self, x: &[f32]) -> Buffer {
        let narrow = self.a.len() / self.rank;
        let mut down = Buffer::new(x.len() / narrow * self.rank);
        matmul(&mut down, self.rank, false, Matrix::dense(x, narrow), Matrix::dense(&self.a_t, self.rank));
        down
    }
}

/// Rows of `width` values as columns.
fn transposed(values: &[f32], width: usize) -> Vec<f32> {
    let rows = values.len() / width;
    (0..width).flat_map(|column| (0..rows).map(move |row| values[row * width + column])).collect()
}

impl Linear<'_> {
    /// `y = x Wᵀ + c + s (x Aᵀ) Bᵀ` [rows, out].
    pub fn forward(&self, x: &Left, y: &mut [f32], threads: Threads) {
        let wide = self.weight.dims().0;
        self.weight.multiply(x, 0..wide, y, wide, false, threads);
        if let Some(bias) = self.bias {
            y.chunks_exact_mut(wide).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias));
        }
        if let Some(adapter) = self.adapter {
            let down = adapter.down(x.rows);
            matmul(y, wide, true, Matrix::dense(&down, adapter.rank), Matrix::dense(&adapter.b_t, wide));
        }
    }

    /// The gradient of the input from that of the output, [rows, in]; `weight` is the transpose. It is added to `dx` if `add`
    /// is set. The adapter's own gradients, for the inputs `x`, are added to `gradient`.
    pub fn backward(
        &self,
        grad: &Left,
        dx: &mut [f32],
        add: bool,
        x: &[f32],
        gradient: Option<&mut LowRankGradient>,
        threads: Threads,
    ) {
        let (narrow, wide) = self.weight.dims();
        self.weight.multiply(grad, 0..narrow, dx, narrow, add, threads);
        let Some(adapter) = self.adapter else { return };
        let (rank, rows) = (adapter.rank, grad.len());
        let mut d_down = Buffer::new(rows * rank);
        let g = Matrix::dense(grad.rows, wide);
        matmul(&mut d_down, rank, false, g, Matrix::dense(&adapter.b, rank));
        matmul(dx, narrow, true, Matrix::dense(&d_down, rank), Matrix::dense(&adapter.a, narrow));
        if let Some(gradient) = gradient {
            matmul(&mut gradient.a, narrow, true, Matrix::dense(&d_down, rank).t(), Matrix::dense(x, narrow));
            let mut down = adapter.down(x);
            down.iter_mut().for_each(|down| *down *= adapter.scale);
            matmul(&mut gradient.b, rank, true, g.t(), Matrix::dense(&down, rank));
        }
    }
}
