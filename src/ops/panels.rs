//! Frozen weights packed once for the kernel that multiplies with them, and those products. One of the kernel files.
//!
//! A weight [wide, narrow] is cut into panels of 32 outputs. In bf16 a panel is [narrow / 2, 32, 2]: pairs of inputs side by
//! side, as the instructions want them; in f32 it is [narrow, 32]. For the `gemm` crate rows stay as they are.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::Buffer;
use super::dropout::Mask;
use super::kernel::Kernel;
use super::matmul::{Matrix, matmul, matmul_at};
use super::pages::Held;
use super::shared::{Columns, SharedRows};
use super::{amx, vectorized};
use crate::config::Dtype;

/// Outputs of a panel, and what inputs are padded to.
pub const PANEL: usize = amx::SIDE;
/// Rows whose products with a panel are computed before the next panel: their inputs stay in the second-level cache.
const ROWS: usize = 256;
/// Inputs of a product in f32 after which another sum begins: one over a head's vocabulary would lose digits.
const CHAIN: usize = 512;
/// How many threads share a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Threads {
    /// One: the caller runs several products in parallel.
    One,
    /// All of the pool, each with its own outputs.
    All,
}

/// A frozen weight [wide, narrow], packed.
pub struct Panels {
    kernel: Kernel,
    wide: usize,
    narrow: usize,
    values: Values,
}

enum Values {
    Bf16(Held<u16>),
    F32(Held<f32>),
}

/// The rows that a weight is multiplied with, in the type of its kernel.
pub struct Left<'a> {
    rows: usize,
    width: usize,
    form: Form<'a>,
}

enum Form<'a> {
    F32(&'a [f32]),
    OwnF32(Buffer<f32>),
    /// Padded to whole tiles; with the distance between two rows.
    Bf16(Buffer<u16>, usize),
}

/// The nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub(super) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() { 0x7fc0 } else { rounded as u16 }
}

/// What a kernel's type holds of each value, and what that leaves, if it leaves anything.
pub fn parts(values: &[f32], kernel: Kernel) -> Vec<Vec<f32>> {
    if kernel.dtype() == Dtype::F32 {
        return vec![values.to_vec()];
    }
    let held: Vec<f32> = values.iter().map(|&x| to_f32(to_bf16(x))).collect();
    let left = values.iter().zip(&held).map(|(x, held)| x - held).collect();
    vec![held, left]
}

#[inline(always)]
fn to_f32(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

fn padded(n: usize) -> usize {
    n.next_multiple_of(PANEL)
}

impl<'a> Left<'a> {
    /// Prepares dense rows of `width` values.
    pub fn new(rows: &'a [f32], width: usize, kernel: Kernel) -> Self {
        if kernel.dtype() == Dtype::F32 {
            return Self { rows: rows.len() / width, width, form: Form::F32(rows) };
        }
        let mut left = Self::room(rows.len() / width, width, kernel);
        left.write(0..width, rows, width);
        left
    }

    /// Room for rows that are written column by column.
    pub fn room(rows: usize, width: usize, kernel: Kernel) -> Left<'static> {
        let form = match kernel.dtype() {
            Dtype::F32 => Form::OwnF32(Buffer::new(rows * width)),
            _ => {
                // Rows a power of two apart would all fall into the same lines of the cache.
                let stride = if padded(width).is_multiple_of(512) { padded(width) + PANEL } else { padded(width) };
                let mut narrowed = Buffer::new(rows.next_multiple_of(16) * stride);
                // What comes after the last column is multiplied with the zeros after the last input.
                narrowed.chunks_exact_mut(stride).for_each(|row| row[width..].fill(0));
                Form::Bf16(narrowed, stride)
            }
        };
        Left { rows, width, form }
    }

    /// Writes some columns of all rows, which lie `stride` values apart in `values`.
    ///
    /// # Panics
    /// If the rows are borrowed: a mistake of the caller.
    pub fn write(&mut self, columns: Range<usize>, values: &[f32], stride: usize) {
        let (rows, width) = (self.rows, self.width);
        let from = values.chunks(stride).take(rows);
        match &mut self.form {
            Form::F32(_) => unreachable!("borrowed rows are there already"),
            Form::OwnF32(own) => {
                for (to, from) in own.chunks_exact_mut(width).zip(from) {
                    to[columns.clone()].copy_from_slice(&from[..columns.len()]);
                }
            }
            Form::Bf16(own, own_stride) => {
                for (to, from) in own.chunks_exact_mut(*own_stride).zip(from) {
                    let to = &mut to[columns.clone()];
                    vectorized(
                        #[inline(always)]
                        || to.iter_mut().zip(from).for_each(|(to, from)| *to = to_bf16(*from)),
                    );
                }
            }
        }
    }

    /// The same rows without what a mask drops.
    pub fn masked(&self, mask: &Mask) -> Left<'static> {
        let form = match &self.form {
            Form::F32(rows) => Form::OwnF32(mask.of(rows, self.width)),
            Form::OwnF32(rows) => Form::OwnF32(mask.of(rows, self.width)),
            Form::Bf16(rows, stride) => Form::Bf16(mask.of(rows, *stride), *stride),
        };
        Left { form, ..*self }
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    fn f32(&self) -> &[f32] {
        match &self.form {
            Form::F32(rows) => rows,
            Form::OwnF32(rows) => rows,
            Form::Bf16(..) => unreachable!("rows were prepared for another kernel"),
        }
    }
}

impl Panels {
    /// A weight of the model, zero until it is written piece by piece.
    pub fn zeros(wide: usize, narrow: usize, kernel: Kernel) -> Self {
        Self::held(wide, narrow, kernel, true)
    }

    fn held(wide: usize, narrow: usize, kernel: Kernel, stays: bool) -> Self {
        let values = match kernel {
            Kernel::Amx | Kernel::Avx512Bf16 => Values::Bf16(Held::zeros(padded(wide) * padded(narrow), stays)),
            Kernel::Avx512 => Values::F32(Held::zeros(padded(wide) * padded(narrow), stays)),
            Kernel::Gemm => Values::F32(Held::zeros(wide * narrow, stays)),
        };
        Self { kernel, wide, narrow, values }
    }

    /// Packs dense rows [wide, narrow] for as long as they are needed.
    pub fn pack(rows: &[f32], narrow: usize, kernel: Kernel) -> Self {
        let mut panels = Self::held(rows.len() / narrow, narrow, kernel, false);
        panels.write(PANEL, |first, piece| piece.copy_from_slice(&rows[first * narrow..][..piece.len()]));
        panels
    }

    /// Fills the weight in parallel: `read(first, rows)` writes `rows`, dense, whose first is number `first`. A piece has
    /// `piece` rows, a multiple of the panel, or is the last.
    pub fn write(&mut self, piece: usize, read: impl Fn(usize, &mut [f32]) + Sync) {
        let result = self.try_write(piece, |first, rows| {
            read(first, rows);
            Ok::<(), std::convert::Infallible>(())
        });
        match result {
            Ok(()) => {}
            Err(impossible) => match impossible {},
        }
    }

    /// As [`Panels::write`], where reading may fail.
    ///
    /// # Errors
    /// The first error of `read`.
    ///
    /// # Panics
    /// If a piece is no multiple of the panel: a mistake of the caller.
    pub fn try_write<E: Send>(
        &mut self,
        piece: usize,
        read: impl Fn(usize, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        assert!(piece.is_multiple_of(PANEL), "pieces are whole panels");
        let (wide, narrow, depth) = (self.wide, self.narrow, padded(self.narrow));
        let rows = |index: usize| {
            let first = index * piece;
            let mut rows = Buffer::new(piece.min(wide - first) * narrow);
            read(first, &mut rows).map(|()| rows)
        };
        match &mut self.values {
            Values::F32(values) if self.kernel == Kernel::Gemm => values
                .par_chunks_mut(piece * narrow)
                .enumerate()
                .try_for_each(|(index, values)| read(index * piece, values)),
            Values::F32(values) => values.par_chunks_mut(piece * depth).enumerate().try_for_each(|(index, panels)| {
                let rows = rows(index)?;
                for (number, row) in rows.chunks_exact(narrow).enumerate() {
                    let panel = &mut panels[number / PANEL * PANEL * depth..][..PANEL * depth];
                    panel.iter_mut().skip(number % PANEL).step_by(PANEL).zip(row).for_each(|(to, from)| *to = *from);
                }
                Ok(())
            }),
            Values::Bf16(values) => values.par_chunks_mut(piece * depth).enumerate().try_for_each(|(index, panels)| {
                let rows = rows(index)?;
                for (number, row) in rows.chunks_exact(narrow).enumerate() {
                    let panel = &mut panels[number / PANEL * PANEL * depth..][..PANEL * depth];
                    let pairs = panel.chunks_exact_mut(2 * PANEL).map(|pair| &mut pair[2 * (number % PANEL)..][..2]);
                    for (to, from) in pairs.zip(row.chunks(2)) {
                        to.iter_mut().zip(from).for_each(|(to, from)| *to = to_bf16(*from));
                    }
                }
                Ok(())
            }),
        }
    }

    /// Outputs and inputs.
    pub fn dims(&self) -> (usize, usize) {
        (self.wide, self.narrow)
    }

    /// The kernel that it was packed for.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// What a weight takes, in bytes.
    pub fn bytes(wide: usize, narrow: usize, kernel: Kernel) -> usize {
        match kernel {
            Kernel::Amx | Kernel::Avx512Bf16 => 2 * padded(wide) * padded(narrow),
            Kernel::Avx512 => 4 * padded(wide) * padded(narrow),
            Kernel::Gemm => 4 * wide * narrow,
        }
    }

    /// Writes row number `index` [narrow].
    pub fn row(&self, index: usize, row: &mut [f32]) {
        let (panel, lane) = (index / PANEL * PANEL * padded(self.narrow), index % PANEL);
        match &self.values {
            Values::F32(values) if self.kernel == Kernel::Gemm => {
                row.copy_from_slice(&values[index * self.narrow..][..self.narrow]);
            }
            Values::F32(values) => {
                let from = values[panel..].iter().skip(lane).step_by(PANEL);
                row.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            }
            Values::Bf16(values) => {
                for (to, pair) in row.chunks_mut(2).zip(values[panel..].chunks_exact(2 * PANEL)) {
                    to.iter_mut().zip(&pair[2 * lane..]).for_each(|(to, from)| *to = to_f32(*from));
                }
            }
        }
    }

    /// The transposed weight [narrow, wide] of some of the outputs, which start and end with whole panels (or the last): what
    /// gradients are multiplied with. It is made when it is needed, because keeping it would double the model.
    pub fn transposed(&self, outputs: Range<usize>, threads: Threads) -> Panels {
        let (wide, depth) = (outputs.len(), padded(self.narrow));
        let panels = outputs.start / PANEL..outputs.end.div_ceil(PANEL);
        let (wide_padded, block) = (panels.len() * PANEL, PANEL * PANEL);
        let values = match &self.values {
            Values::F32(values) if self.kernel == Kernel::Gemm => {
                let mut transposed = Buffer::new(wide * self.narrow);
                for (number, row) in
                    values[outputs.start * self.narrow..].chunks_exact(self.narrow).take(wide).enumerate()
                {
                    transposed.iter_mut().skip(number).step_by(wide).zip(row).for_each(|(to, from)| *to = *from);
                }
                Values::F32(Held::Product(transposed))
            }
            Values::F32(values) => {
                let mut transposed = Buffer::new(wide_padded * depth);
                each(&mut transposed, PANEL * wide_padded, threads, |inputs, panel| {
                    for (to, number) in panel.chunks_exact_mut(block).zip(panels.clone()) {
                        let from = &values[number * PANEL * depth + inputs * block..][..block];
                        for output in 0..PANEL {
                            for input in 0..PANEL {
                                to[output * PANEL + input] = from[input * PANEL + output];
                            }
                        }
                    }
                });
                Values::F32(Held::Product(transposed))
            }
            Values::Bf16(values) => {
                let mut transposed = Buffer::new(wide_padded * depth);
                each(&mut transposed, PANEL * wide_padded, threads, |inputs, panel| {
                    for (to, number) in panel.chunks_exact_mut(block).zip(panels.clone()) {
                        let from = &values[number * PANEL * depth + inputs * block..][..block];
                        transpose_pairs(from, to);
                    }
                });
                Values::Bf16(Held::Product(transposed))
            }
        };
        Panels { kernel: self.kernel, wide: self.narrow, narrow: wide, values }
    }

    /// `c = x · Wᵀ`, or `c += x · Wᵀ` if `add` is set, for some of the outputs, which start with a whole panel: [rows,
    /// outputs], the rows of `c` being `stride` values apart.
    ///
    /// # Panics
    /// If shapes disagree: a mistake of the calling operation.
    pub fn multiply(&self, x: &Left, outputs: Range<usize>, c: &mut [f32], stride: usize, add: bool, threads: Threads) {
        let rows = x.rows;
        assert!(x.width == self.narrow && outputs.end <= self.wide, "inner dimensions or outputs differ");
        assert!(outputs.start.is_multiple_of(PANEL), "outputs start with a panel");
        if rows == 0 || outputs.is_empty() {
            return;
        }
        assert!(outputs.len() <= stride && (rows - 1) * stride + outputs.len() <= c.len(), "product out of bounds");
        if let (Kernel::Gemm, Values::F32(values)) = (self.kernel, &self.values) {
            return multiply_rows(
                &values[outputs.start * self.narrow..outputs.end * self.narrow],
                x,
                c,
                stride,
                add,
                threads,
            );
        }
        let panels = outputs.start / PANEL..outputs.end.div_ceil(PANEL);
        let parts = if threads == Threads::All { rayon::current_num_threads().min(panels.len()) } else { 1 };
        let c = SharedRows::new(c, stride);
        let part = |part: usize| {
            let cut = |part: usize| panels.start + panels.len() * part / parts;
            self.some(x, cut(part)..cut(part + 1), &outputs, &c, add);
        };
        match parts {
            1 => part(0),
            parts => (0..parts).into_par_iter().for_each(part),
        }
    }

    /// The products with some panels, one after the other.
    fn some(&self, x: &Left, panels: Range<usize>, outputs: &Range<usize>, c: &SharedRows, add: bool) {
        let depth = padded(self.narrow);
        let tiles = (self.kernel == Kernel::Amx).then(amx::Tiles::configure);
        for first in (0..x.rows).step_by(ROWS) {
            let rows = first..(first + ROWS).min(x.rows);
            for panel in panels.clone() {
                let columns = panel * PANEL - outputs.start..(panel * PANEL + PANEL).min(outputs.end) - outputs.start;
                // SAFETY: each panel's columns are written by the one thread that has the panel.
                let mut c = unsafe { c.columns(rows.clone(), columns) };
                match (&self.values, &x.form) {
                    (Values::Bf16(values), Form::Bf16(narrowed, stride)) => {
                        let (start, len) = (panel * PANEL * depth, PANEL * depth);
                        let next = values.get(start + len..start + 2 * len).unwrap_or(&[]);
                        let rows = (&narrowed[first * stride..], *stride);
                        bf16_panel(tiles.as_ref(), rows, (&values[start..start + len], next), &mut c, add);
                    }
                    (Values::F32(values), _) => {
                        let panel = &values[panel * PANEL * depth..][..PANEL * self.narrow];
                        f32_panel(&x.f32()[rows.start * self.narrow..rows.end * self.narrow], panel, &mut c, add);
                    }
                    (Values::Bf16(_), _) => unreachable!("rows were prepared for another kernel"),
                }
            }
        }
    }
}

/// Runs `f(number, chunk)` for all chunks.
fn each<T: Send>(values: &mut [T], chunk: usize, threads: Threads, f: impl Fn(usize, &mut [T]) + Sync) {
    match threads {
        Threads::One => values.chunks_exact_mut(chunk).enumerate().for_each(|(number, chunk)| f(number, chunk)),
        Threads::All => values.par_chunks_exact_mut(chunk).enumerate().for_each(|(number, chunk)| f(number, chunk)),
    }
}

/// From [input pairs, outputs, 2] to [output pairs, inputs, 2], 32 of each.
fn transpose_pairs(from: &[u16], to: &mut [u16]) {
    let (from, to) = (&from[..PANEL * PANEL], &mut to[..PANEL * PANEL]);
    for outputs in 0..PANEL / 2 {
        for inputs in 0..PANEL / 2 {
            let at = 2 * (inputs * PANEL + 2 * outputs);
            let [a, b, c, d] = [from[at], from[at + 1], from[at + 2], from[at + 3]];
            let at = 2 * (outputs * PANEL + 2 * inputs);
            (to[at], to[at + 1], to[at + 2], to[at + 3]) = (a, c, b, d);
        }
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

/// All rows times one panel of bf16. `a` has whole tiles of rows. Meanwhile `next`, the panel after it, is fetched.
fn bf16_panel(
    tiles: Option<&amx::Tiles>,
    (a, stride): (&[u16], usize),
    (panel, next): (&[u16], &[u16]),
    c: &mut Columns,
    add: bool,
) {
    let (depth, rows) = (panel.len() / PANEL, c.rows());
    assert!(a.len() >= rows.next_multiple_of(16) * stride && stride >= depth, "rows are padded to tiles");
    let (steps, b) = (depth / PANEL, panel.as_ptr());
    // With one pair of tiles a panel is fetched as fast as it is used, and the processor sees that coming by itself.
    let ahead = if rows > PANEL { next } else { &[] };
    let mut ahead = ahead.chunks(ahead.len().div_ceil(rows.div_ceil(PANEL)).max(1));
    let mut row = 0;
    while row < rows {
        let a = (a[row * stride..].as_ptr(), stride);
        match tiles {
            Some(tiles) => {
                amx::fetch(ahead.next().unwrap_or(&[]));
                let two = rows - row > 16;
                let height = if two { 32 } else { 16 };
                // SAFETY: by the assert above, `height` rows of `a` are there, and all inputs of the panel; `whole` gives room
                // for as many rows of 32.
                c.whole(row..row + height, add, |c| unsafe { tiles.multiply(a, b, steps, c, add, two) });
                row += height;
            }
            #[cfg(target_arch = "x86_64")]
            None => {
                let count = (rows - row).min(12);
                // SAFETY: the kernel was chosen because AVX-512-BF16 is there; `count` rows of `a` are there, and all inputs of
                // the panel; `whole` gives room for as many rows of 32.
                c.whole(row..row + count, add, |c| unsafe {
                    super::avx512::bf16_block(a, b, steps * PANEL / 2, c, count, add);
                });
                row += count;
            }
            #[cfg(not(target_arch = "x86_64"))]
            None => unreachable!("kernels in bf16 are for x86-64"),
        }
    }
}

/// Through the `gemm` crate.
fn multiply_rows(weight: &[f32], x: &Left, c: &mut [f32], stride: usize, add: bool, threads: Threads) {
    let wide = weight.len() / x.width;
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: `multiply` checked that `c` holds [rows, wide] at this stride; `x` and `weight` are dense.
    unsafe {
        gemm::gemm(
            x.rows,
            wide,
            x.width,
            c.as_mut_ptr(),
            1,
            stride as isize,
            add,
            x.f32().as_ptr(),
            1,
            x.width as isize,
            weight.as_ptr(),
            x.width as isize,
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
