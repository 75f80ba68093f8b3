//! Products of rows with packed weights. One of the kernel files.
//!
//! Several products of the same rows are computed together: their panels are laid end to end and threads take turns with them, so
//! that they read memory from one end to the other and wait for each other once.

use std::ops::Range;

use super::amx;
use super::bf16::{self, bf16_panel};
use super::buffer::Buffer;
use super::kernel::Kernel;
use super::left::Left;
use super::matmul::{Matrix, matmul, matmul_at};
use super::panels::{GROUP, PANEL, Panel, Panels, Threads};
use super::rows::in_turns;
use super::shared::{Columns, SharedRows};

/// Inputs of a product in f32 after which another sum begins: one over a head's vocabulary would lose digits.
const CHAIN: usize = 512;

/// Rows, and a weight that they are multiplied with.
pub type Operands<'a> = (&'a Left<'a>, &'a Panels);

/// What becomes of rows and one weight.
pub struct Product<'a> {
    /// The weight.
    pub weight: &'a Panels,
    /// Other rows and another weight, whose product is added.
    pub then: Option<Operands<'a>>,
    /// Which of the outputs; they start with a whole panel.
    pub outputs: Range<usize>,
    /// Where they go, [rows, outputs], and the distance between rows.
    pub to: (&'a mut [f32], usize),
    /// Whether they are added to what is there.
    pub add: bool,
}

/// A product whose columns several threads write.
struct Shared<'a> {
    weight: &'a Panels,
    then: Option<Operands<'a>>,
    outputs: Range<usize>,
    to: SharedRows<'a>,
    add: bool,
}

impl Product<'_> {
    fn check(&self, x: &Left) {
        let (rows, kernel) = (x.rows(), self.weight.kernel());
        for (x, weight) in [(x, self.weight)].into_iter().chain(self.then) {
            let (wide, narrow) = weight.dims();
            assert!(x.width() == narrow && x.rows() == rows, "inner dimensions or rows differ");
            assert!(self.outputs.end <= wide, "there are fewer outputs");
            assert!(weight.kernel().rounds_inputs() == kernel.rounds_inputs(), "rows have one form");
        }
        let (to, stride) = &self.to;
        assert!(self.outputs.start.is_multiple_of(PANEL), "outputs start with a panel");
        let last = rows.saturating_sub(1) * stride;
        assert!(self.outputs.len() <= *stride && last + self.outputs.len() <= to.len(), "product out of bounds");
    }
}

/// Computes products of the same rows.
///
/// # Panics
/// If shapes disagree: a mistake of the calling operation.
pub fn multiply<const N: usize>(x: &Left, products: [Product; N], threads: Threads) {
    products.iter().for_each(|product| product.check(x));
    if x.rows() == 0 {
        return;
    }
    if products.iter().any(|product| product.weight.kernel() == Kernel::Gemm) {
        return products.into_iter().for_each(|product| multiply_rows(product, x, threads));
    }
    let products = products.map(|Product { weight, then, outputs, to: (to, stride), add }| {
        let to = SharedRows::new(to, stride);
        Shared { weight, then, outputs, to, add }
    });
    let panels = products.iter().flat_map(|product| product.panels().map(move |panel| (product, panel)));
    let panels: Vec<(&Shared, usize)> = panels.collect();
    in_turns(panels.len(), threads, |turns| {
        let (tiles, mut room) = (panels[0].0.weight.kernel().tiles(), None);
        for (product, panel) in turns.map(|number| panels[number]) {
            product.panel(x, panel, tiles.as_ref(), &mut room);
        }
    });
}

impl Shared<'_> {
    fn panels(&self) -> Range<usize> {
        self.outputs.start / PANEL..self.outputs.end.div_ceil(PANEL)
    }

    /// The product with a panel. `room` is for what is unpacked of it.
    fn panel(&self, x: &Left, panel: usize, tiles: Option<&amx::Tiles>, room: &mut Option<Buffer<u16>>) {
        let Self { weight, then, outputs, to, add } = self;
        let columns = panel * PANEL - outputs.start..(panel * PANEL + PANEL).min(outputs.end) - outputs.start;
        // SAFETY: each panel's columns are written by the one thread that has the panel.
        let mut c = unsafe { to.columns(0..x.rows(), columns) };
        if weight.kernel().rounds_inputs() {
            let numbers = weight.panel(panel, room, tiles.is_some() && bf16::few(x.rows()));
            let then = then.map(|(x, weight)| (x.tiles(0, 0), weight.bf16(panel).expect("what is added is packed")));
            return bf16_panel(tiles, (&x.tiles(0, 0), numbers), then.as_ref(), &mut c, *add);
        }
        f32_or_int8(weight, x, panel, &mut c, *add);
        if let Some((x, weight)) = then {
            f32_or_int8(weight, x, panel, &mut c, true);
        }
    }
}

/// Adds yᵀ · x to `total` [n, width], for dense `y` [rows, n]: what rows of outputs' gradients and of inputs add to that of a matrix.
pub(super) fn add_outer(total: &mut [f32], y: &[f32], x: &Left, kernel: Kernel) {
    let (rows, width) = (x.rows(), x.width());
    let n = total.len() / width;
    if !kernel.rounds_inputs() {
        return matmul(total, width, true, Matrix::dense(y, n).t(), Matrix::dense(x.f32(), width));
    }
    if rows == 0 {
        return;
    }
    let (tiles, y_t) = (kernel.tiles(), Left::new(y, n, kernel).transposed());
    let mut panel = Buffer::<u16>::new(rows.next_multiple_of(PANEL) * PANEL);
    for column in (0..width).step_by(PANEL) {
        x.pairs(column, &mut panel);
        let mut to = Columns::first(&mut total[column..], n, PANEL.min(width - column), width);
        bf16_panel(tiles.as_ref(), (&y_t.tiles(0, 0), Panel::Bf16(&panel)), None, &mut to, true);
    }
}

/// Some rows times a panel that is not in bf16.
fn f32_or_int8(weight: &Panels, x: &Left, panel: usize, c: &mut Columns, add: bool) {
    let (x, (_, narrow)) = (x.f32(), weight.dims());
    let depth = narrow.next_multiple_of(PANEL);
    match weight.f32() {
        Some(values) => f32_panel(x, &values[panel * PANEL * depth..][..PANEL * narrow], c, add),
        None => int8_panel(x, weight.int8(panel), c, add),
    }
}

/// All rows times one panel of f32, in parts of one length.
fn f32_panel(x: &[f32], panel: &[f32], c: &mut Columns, add: bool) {
    let (narrow, width) = (x.len() / c.rows(), c.width());
    let part = narrow.div_ceil(narrow.div_ceil(CHAIN));
    let mut sums = Buffer::<f32>::new(if part < narrow { c.rows() * width } else { 0 });
    for start in (0..narrow).step_by(part) {
        let depth = (narrow - start).min(part);
        let x = Matrix::new(&x[start..], c.rows(), depth, narrow);
        let panel = Matrix::new(&panel[start * PANEL..], depth, width, PANEL);
        if start == 0 {
            // SAFETY: the columns are this thread's alone, and the product has as many rows and columns.
            unsafe { matmul_at(c.place(), add, x, panel) };
        } else {
            matmul(&mut sums, width, false, x, panel);
            c.add(&sums);
        }
    }
}

/// All rows times one panel of rounded weights and their scales.
fn int8_panel(x: &[f32], panel: (&[i8], &[u16]), c: &mut Columns, add: bool) {
    const ROWS: usize = 4;
    let (rows, narrow) = (c.rows(), x.len() / c.rows());
    let (values, scales) = panel;
    assert!(narrow * PANEL <= values.len() && values.len() <= scales.len() * GROUP, "as many inputs as the panel has");
    for row in (0..rows).step_by(ROWS) {
        let count = (rows - row).min(ROWS);
        let x = &x[row * narrow..(row + count) * narrow];
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the kernel was chosen because AVX-512 is there; the rows are those of `x`, and by the assert above the panel has
        // all inputs; `whole` gives room for as many rows of 32, all of which are written.
        unsafe {
            let panel = (values.as_ptr(), scales.as_ptr());
            c.whole(row..row + count, add, |c| super::avx512::int8_block((x.as_ptr(), narrow), panel, c, count, add));
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("the kernel is for x86-64");
    }
}

/// Through the `gemm` crate.
fn multiply_rows(product: Product, x: &Left, threads: Threads) {
    let Product { weight, then, outputs, to: (c, stride), add } = product;
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    for (number, (x, weight)) in [(x, weight)].into_iter().chain(then).enumerate() {
        let (values, (_, narrow)) = (weight.f32().expect("that kernel has f32"), weight.dims());
        let values = &values[outputs.start * narrow..outputs.end * narrow];
        // SAFETY: it was checked that `c` holds [rows, outputs] at this stride; `x` and `values` are dense.
        unsafe {
            gemm::gemm(
                x.rows(),
                outputs.len(),
                narrow,
                c.as_mut_ptr(),
                1,
                stride as isize,
                add || number > 0,
                x.f32().as_ptr(),
                1,
                narrow as isize,
                values.as_ptr(),
                narrow as isize,
                1,
                1.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}
