//! `y = x Wᵀ + c + s (x Aᵀ) Bᵀ`: a frozen weight and bias, and the low-rank adapter beside it (LoRA, Hu et al. 2021, eq. 3).
//!
//! W and c are never differentiated: candle's own backward would compute a gradient as large as the model and throw it away.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor, bail};

use rayon::prelude::*;

use super::matmul::{Matrix, Threads, matmul, product};
use super::quantized::Weight;
use super::{output, values, with_values};

/// The adapter of one projection: `a` is [rank, in], `b` is [out, rank], `scale` is alpha / rank.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// Down projection, [rank, in].
    pub a: &'a Tensor,
    /// Up projection, [out, rank].
    pub b: &'a Tensor,
    /// What the product is multiplied with.
    pub scale: f32,
}

/// A projection that is never trained.
#[derive(Clone)]
pub struct Frozen {
    /// [out, in].
    pub weight: Weight,
    /// [out].
    pub bias: Option<Tensor>,
}

/// `x` [rows, in] times the frozen weight [out, in], plus the frozen bias [out] and the adapter if there are any: [rows, out].
///
/// # Errors
/// If shapes disagree or a tensor is not f32.
pub fn linear(x: &Tensor, frozen: &Frozen, adapter: Option<LowRank>) -> Result<Tensor> {
    let ((_, width), (wide, narrow)) = (x.dims2()?, frozen.weight.dims()?);
    let rank = adapter.map_or(Ok(0), |adapter| adapter.a.dim(0))?;
    let misfit = |LowRank { a, b, .. }: LowRank| a.dims() != [rank, narrow] || b.dims() != [wide, rank];
    if width != narrow || adapter.is_some_and(misfit) {
        bail!("linear: rows of {width} do not fit a weight of [{wide}, {narrow}] and an adapter of rank {rank}");
    }
    if let Some(bias) = frozen.bias.as_ref().filter(|bias| bias.dims() != [wide]) {
        bail!("linear: a bias of {:?} does not fit a weight of [{wide}, {narrow}]", bias.dims());
    }
    let frozen = frozen.clone();
    match adapter {
        None => x.apply_op1(frozen),
        Some(LowRank { a, b, scale }) => x.apply_op3(a, b, Adapted { frozen, scale }),
    }
}

impl Frozen {
    fn apply(&self, x: Matrix) -> Result<Vec<f32>> {
        let (wide, narrow) = self.weight.dims()?;
        let mut y = self.weight.with_values(|w| product(x, Matrix::dense(w, narrow).t()))?;
        if let Some(bias) = &self.bias {
            with_values([bias], |[bias]| {
                y.par_chunks_mut(wide).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias));
            })?;
        }
        Ok(y)
    }

    /// The gradient of the input from that of the output.
    fn apply_transposed(&self, grad: &[f32]) -> Result<Vec<f32>> {
        let (wide, narrow) = self.weight.dims()?;
        self.weight.with_values(|w| product(Matrix::dense(grad, wide), Matrix::dense(w, narrow)))
    }
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, _) = layout.shape().dims2()?;
        let (wide, narrow) = self.weight.dims()?;
        output(self.apply(Matrix::dense(values(x, layout)?, narrow))?, (rows, wide))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_values([&grad.contiguous()?], |[g]| self.apply_transposed(g))??;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

struct Adapted {
    frozen: Frozen,
    scale: f32,
}

impl CustomOp3 for Adapted {
    fn name(&self) -> &'static str {
        "adapted-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, _) = x_layout.shape().dims2()?;
        let (rank, narrow) = a_layout.shape().dims2()?;
        let (wide, _) = self.frozen.weight.dims()?;
        let x = Matrix::dense(values(x, x_layout)?, narrow);
        let (a, b) = (values(a, a_layout)?, values(b, b_layout)?);
        let mut y = self.frozen.apply(x)?;
        let down = product(x, Matrix::dense(a, narrow).t());
        let up = Matrix::dense(b, rank).t();
        matmul(&mut y, wide, 1.0, self.scale, Matrix::dense(&down, rank), up, Threads::All);
        output(y, (rows, wide))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((rank, narrow), (wide, _)) = (a.dims2()?, self.frozen.weight.dims()?);
        let grad = grad.contiguous()?;
        let (dx, da, db) = with_values([x, a, b, &grad], |[xs, a, b, g]| {
            let mut dx = self.frozen.apply_transposed(g)?;
            let (x, g) = (Matrix::dense(xs, narrow), Matrix::dense(g, wide));
            let (a, b) = (Matrix::dense(a, narrow), Matrix::dense(b, rank));
            let down = product(x, a.t());
            let mut d_down = vec![0.0; down.len()];
            matmul(&mut d_down, rank, 0.0, self.scale, g, b, Threads::All);
            let d_down = Matrix::dense(&d_down, rank);
            matmul(&mut dx, narrow, 1.0, 1.0, d_down, a, Threads::All);
            let da = product(d_down.t(), x);
            let mut db = vec![0.0; wide * rank];
            matmul(&mut db, rank, 0.0, self.scale, g.t(), Matrix::dense(&down, rank), Threads::All);
            Result::Ok((dx, da, db))
        })??;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(tensor(dx, x)?), Some(tensor(da, a)?), Some(tensor(db, b)?)))
    }
}
