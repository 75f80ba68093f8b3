//! `y = x Wᵀ + c + s (x Aᵀ) Bᵀ`: a frozen weight and bias, and the low-rank adapter beside it (LoRA, Hu et al. 2021, eq. 3).
//!
//! W and c are never differentiated: a gradient as large as the model would be thrown away. The gradient of x is a product of
//! the same form, with W transposed and the adapter's two matrices changing places.

use std::ops::Range;
use std::sync::OnceLock;

use super::buffer::Buffer;
use super::dropout::Mask;
use super::kernel::Kernel;
use super::left::{Left, parts, transpose};
use super::panels::{Panels, Threads};
use super::products::{Operands, Product, add_outer, multiply};

/// The adapter of one projection, as its products want it.
pub struct LowRank {
    rank: usize,
    kernel: Kernel,
    /// Down projection A [rank, in].
    a: Vec<f32>,
    /// Up projection times the scale, s · B [out, rank].
    b: Vec<f32>,
    /// s: alpha / rank.
    scale: f32,
    forward: Factors,
    backward: OnceLock<Factors>,
}

/// Two small matrices, one after the other. What bf16 cannot hold of them is computed beside what it can: training moves them by
/// less than would show otherwise.
struct Factors {
    /// [parts · rank, in].
    down: Panels,
    /// [out, parts · rank].
    up: Panels,
}

/// Gradients of an adapter's two matrices.
pub struct LowRankGradient {
    rank: usize,
    /// Of A [rank, in].
    pub a: Vec<f32>,
    /// Of B, transposed: [rank, out].
    b_t: Vec<f32>,
}

/// One projection of a layer: a frozen weight and an adapter, in one of both directions.
#[derive(Clone, Copy)]
pub struct Linear<'a> {
    /// W, or its transpose for a backward pass.
    pub weight: &'a Panels,
    /// c [out].
    pub bias: Option<&'a [f32]>,
    /// The adapter, if the projection carries one.
    pub adapter: Option<&'a LowRank>,
    /// Which of the inputs the adapter does not see, in training with dropout.
    pub mask: Option<Mask<'a>>,
    /// Whether gradients are going through it, from the output to the input.
    pub backward: bool,
}

/// What comes out of an adapter's first matrix.
pub struct Down {
    /// [rows, rank].
    values: Buffer,
    /// The same for the second matrix.
    left: Left<'static>,
}

impl Factors {
    /// From `down` [rank, in] and `up` [out, rank].
    fn new(down: &[f32], up: &[f32], rank: usize, kernel: Kernel) -> Self {
        let rows = parts(down, kernel).concat();
        let up = parts(up, kernel);
        let columns = (0..up[0].len() / rank).flat_map(|row| up.iter().flat_map(move |up| &up[row * rank..][..rank]));
        let columns: Vec<f32> = columns.copied().collect();
        Self {
            down: Panels::pack(&rows, down.len() / rank, kernel),
            up: Panels::pack(&columns, up.len() * rank, kernel),
        }
    }
}

impl LowRank {
    /// From A [rank, in] and B [out, rank].
    pub fn new(a: Vec<f32>, mut b: Vec<f32>, rank: usize, scale: f32, kernel: Kernel) -> Self {
        b.iter_mut().for_each(|b| *b *= scale);
        let forward = Factors::new(&a, &b, rank, kernel);
        Self { rank, kernel, a, b, scale, forward, backward: OnceLock::new() }
    }

    /// Zeros in the shapes of A and B.
    pub fn zeros(&self) -> LowRankGradient {
        LowRankGradient { rank: self.rank, a: vec![0.0; self.a.len()], b_t: vec![0.0; self.b.len()] }
    }

    fn factors(&self, backward: bool) -> &Factors {
        if !backward {
            return &self.forward;
        }
        self.backward.get_or_init(|| {
            let (rank, narrow) = (self.rank, self.a.len() / self.rank);
            Factors::new(&transposed(&self.b, rank), &transposed(&self.a, narrow), rank, self.kernel)
        })
    }

    /// Adds the gradients of A and B for inputs `x` [rows, in] that were not dropped, their `down`, the outputs' gradient `grad` [rows, out] and its
    /// `d_down`.
    pub fn add_gradient(&self, x: &Left, down: &Down, grad: &Left, d_down: &Down, gradient: &mut LowRankGradient) {
        add_outer(&mut gradient.a, &d_down.values, x, self.kernel);
        let mut scaled = Buffer::new(down.values.len());
        scaled.iter_mut().zip(&*down.values).for_each(|(to, down)| *to = self.scale * down);
        add_outer(&mut gradient.b_t, &scaled, grad, self.kernel);
    }
}

impl LowRankGradient {
    /// Of B [out, rank].
    pub fn b(&self) -> Vec<f32> {
        transposed(&self.b_t, self.b_t.len() / self.rank)
    }

    /// Adds another part of the same gradient.
    pub fn add(&mut self, part: &Self) {
        let add = |total: &mut [f32], part: &[f32]| total.iter_mut().zip(part).for_each(|(total, part)| *total += part);
        add(&mut self.a, &part.a);
        add(&mut self.b_t, &part.b_t);
    }
}

/// Rows of `width` values as columns.
fn transposed(values: &[f32], width: usize) -> Vec<f32> {
    let mut columns = vec![0.0; values.len()];
    transpose(values, width, &mut columns);
    columns
}

impl Linear<'_> {
    /// What the adapter sees of its inputs, if that is not all of them.
    pub fn seen(&self, x: &Left) -> Option<Left<'static>> {
        self.adapter?;
        self.mask.filter(|_| !self.backward).map(|mask| x.masked(&mask))
    }

    /// What the adapter makes of its inputs before its second matrix.
    pub fn down(&self, x: &Left) -> Option<Down> {
        self.down_of(self.seen(x).as_ref().unwrap_or(x))
    }

    /// The same of what it sees of them.
    pub fn down_of(&self, x: &Left) -> Option<Down> {
        let LowRank { rank, kernel, .. } = *self.adapter?;
        let panels = &self.adapter?.factors(self.backward).down;
        let (rows, wide) = (x.rows(), panels.dims().0);
        let mut parts = Buffer::new(rows * wide);
        panels.multiply(x, 0..wide, &mut parts, wide, false, Threads::One);
        let mut values = Buffer::new(rows * rank);
        for (to, parts) in values.chunks_exact_mut(rank).zip(parts.chunks_exact(wide)) {
            to.copy_from_slice(&parts[..rank]);
            for part in parts[rank..].chunks_exact(rank) {
                to.iter_mut().zip(part).for_each(|(to, part)| *to += part);
            }
        }
        if let Some(mask) = self.mask {
            values.iter_mut().for_each(|value| *value *= mask.scale());
        }
        let mut left = Left::room(rows, wide, kernel);
        for start in (0..wide).step_by(rank) {
            left.write(start..start + rank, &values, rank);
        }
        Some(Down { values, left })
    }

    /// What the weight, and the adapter if nothing of its outputs is dropped, make of rows whose `down` that is.
    fn product<'b>(
        &'b self,
        down: Option<&'b Down>,
        outputs: Range<usize>,
        to: (&'b mut [f32], usize),
        add: bool,
    ) -> Product<'b> {
        let then = self.adapted(down).filter(|_| self.dropped().is_none());
        Product { weight: self.weight, then, outputs, to, add }
    }

    fn adapted<'b>(&'b self, down: Option<&'b Down>) -> Option<Operands<'b>> {
        self.adapter.zip(down).map(|(adapter, down)| (&down.left, &adapter.factors(self.backward).up))
    }

    /// Which outputs the adapter does not reach: on the way back, its inputs.
    fn dropped(&self) -> Option<Mask<'_>> {
        self.mask.filter(|_| self.backward)
    }

    /// What comes after the products: the bias, and the adapter's share where some of it is dropped.
    fn finish(&self, rows: usize, down: Option<&Down>, outputs: Range<usize>, (y, stride): (&mut [f32], usize)) {
        if let Some(bias) = self.bias {
            for y in y.chunks_mut(stride) {
                y.iter_mut().zip(&bias[outputs.clone()]).for_each(|(y, bias)| *y += bias);
            }
        }
        if let (Some(mask), Some((left, up))) = (self.dropped(), self.adapted(down)) {
            let width = outputs.len();
            let mut share = Buffer::new(rows * width);
            up.multiply(left, outputs.clone(), &mut share, width, false, Threads::One);
            mask.apply(outputs, &mut share, width);
            for (y, share) in y.chunks_mut(stride).zip(share.chunks_exact(width)) {
                y.iter_mut().zip(share).for_each(|(y, share)| *y += share);
            }
        }
    }

    /// `y = x Wᵀ + c + s (x Aᵀ) Bᵀ` for some of the outputs, which start with a panel, or what is there already plus that: [rows,
    /// outputs], rows lying `stride` values apart. `down` is that of the same inputs.
    pub fn apply(
        &self,
        x: &Left,
        down: Option<&Down>,
        outputs: Range<usize>,
        (y, stride): (&mut [f32], usize),
        add: bool,
        threads: Threads,
    ) {
        multiply(x, [self.product(down, outputs.clone(), (&mut *y, stride), add)], threads);
        self.finish(x.rows(), down, outputs, (y, stride));
    }

    /// All outputs, dense.
    pub fn apply_all(&self, x: &Left, down: Option<&Down>, y: &mut [f32], add: bool, threads: Threads) {
        let wide = self.weight.dims().0;
        self.apply(x, down, 0..wide, (y, wide), add, threads);
    }
}

/// Several projections of the same inputs, dense, by all threads, which meet once and not once for each.
pub fn apply_together<const N: usize>(linears: &[Linear; N], x: &Left, outputs: [&mut [f32]; N]) {
    let downs = linears.each_ref().map(|linear| linear.down(x));
    let (mut outputs, mut each) = (outputs, linears.iter().zip(&downs));
    let products = outputs.each_mut().map(|output| {
        let (linear, down) = each.next().expect("one for each output");
        let wide = linear.weight.dims().0;
        linear.product(down.as_ref(), 0..wide, (output, wide), false)
    });
    multiply(x, products, Threads::All);
    for ((linear, down), output) in linears.iter().zip(&downs).zip(outputs) {
        let wide = linear.weight.dims().0;
        linear.finish(x.rows(), down.as_ref(), 0..wide, (output, wide));
    }
}
