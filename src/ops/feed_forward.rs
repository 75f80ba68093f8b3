//! The gated feed-forward block, a few panels of its inner width at a time: what is inside never leaves the cache, except gate and up
//! for the backward pass, and what an adapter's own gradients ask for.

use std::ops::Range;

use super::buffer::Buffer;
use super::gate::Activation;
use super::kernel::Kernel;
use super::left::{Left, expand, round};
use super::linear::{Down, Linear};
use super::panels::{PANEL, Threads};
use super::rows::in_turns;
use super::shared::SharedRows;

/// The two projections into the block, and what comes between them and the one out of it.
pub struct Gated<'a> {
    /// To the gate.
    pub gate: Linear<'a>,
    /// To what is gated.
    pub up: Linear<'a>,
    /// Of the gate.
    pub activation: Activation,
    /// What multiplies.
    pub kernel: Kernel,
}

/// Inner values for an adapter's gradients, in f32, [rows, inner width] each.
#[derive(Default)]
pub struct Inner {
    /// What is projected out of the block.
    pub product: Option<Buffer>,
    /// The gradient of the gate before its activation, and that of what is gated.
    pub grads: [Option<Buffer>; 2],
}

/// Gate and what is gated for all rows of a call, in the type of the kernel: what a backward pass reads.
pub struct Pair {
    rows: usize,
    /// [inner width / WIDTH, rows, 2, WIDTH].
    values: Values,
}

enum Values {
    F32(Buffer<f32>),
    Bf16(Buffer<u16>),
}

/// The same, to be written by several threads.
pub struct SharedPair<'a> {
    rows: usize,
    values: SharedValues<'a>,
}

enum SharedValues<'a> {
    F32(SharedRows<'a, f32>),
    Bf16(SharedRows<'a, u16>),
}

impl Pair {
    /// Room for so many rows.
    pub fn room(rows: usize, wide: usize, kernel: Kernel) -> Self {
        let len = rows * wide.next_multiple_of(WIDTH) * 2;
        let values = match kernel.rounds_inputs() {
            true => Values::Bf16(Buffer::new(len)),
            false => Values::F32(Buffer::new(len)),
        };
        Self { rows, values }
    }

    /// What a row takes, in bytes.
    pub fn row_bytes(wide: usize, kernel: Kernel) -> usize {
        let number = if kernel.rounds_inputs() { size_of::<u16>() } else { size_of::<f32>() };
        2 * wide.next_multiple_of(WIDTH) * number
    }

    /// To be written.
    pub fn shared(&mut self) -> SharedPair<'_> {
        let values = match &mut self.values {
            Values::F32(values) => SharedValues::F32(SharedRows::new(values, PRODUCT)),
            Values::Bf16(values) => SharedValues::Bf16(SharedRows::new(values, PRODUCT)),
        };
        SharedPair { rows: self.rows, values }
    }

    /// Some rows, from an inner value on, into [rows, 3, WIDTH].
    fn read(&self, first: usize, inner: usize, to: &mut [f32]) {
        let start = (inner / WIDTH * self.rows + first) * PRODUCT;
        match &self.values {
            Values::F32(values) => {
                let rows = to.chunks_exact_mut(ROW).zip(values[start..].chunks_exact(PRODUCT));
                rows.for_each(|(to, from)| to[..PRODUCT].copy_from_slice(from));
            }
            Values::Bf16(values) => expand(&values[start..], PRODUCT, to, ROW),
        }
    }
}

impl SharedPair<'_> {
    /// Some rows, from an inner value on, from [rows, 3, WIDTH].
    ///
    /// # Safety
    /// Nobody else may have a part of them.
    unsafe fn write(&self, first: usize, inner: usize, from: &[f32]) {
        let first = inner / WIDTH * self.rows + first;
        for (row, from) in (first..).zip(from.chunks_exact(ROW)) {
            let from = &from[..PRODUCT];
            match &self.values {
                // SAFETY: the caller's.
                SharedValues::F32(to) => unsafe { to.part(row, 0..PRODUCT) }.copy_from_slice(from),
                // SAFETY: the caller's.
                SharedValues::Bf16(to) => round(from, unsafe { to.part(row, 0..PRODUCT) }),
            }
        }
    }
}

/// Inner values that are computed together: whole panels.
const WIDTH: usize = 2 * PANEL;
/// Numbers of a row while it is computed, and where the product is among them.
const ROW: usize = 3 * WIDTH;
const PRODUCT: usize = 2 * WIDTH;

impl Gated<'_> {
    fn wide(&self) -> usize {
        self.gate.weight.dims().0
    }

    /// Calls `f` for all inner values, WIDTH at a time or what is left.
    fn in_columns(&self, threads: Threads, f: impl Fn(Range<usize>) + Sync) {
        let wide = self.wide();
        in_turns(wide.div_ceil(WIDTH), threads, |turns| {
            let _tiles = self.kernel.tiles();
            turns.map(|number| number * WIDTH).for_each(|start| f(start..(start + WIDTH).min(wide)));
        });
    }

    /// Gate and what is gated, for `kept` from a row on, and for `f`: some of the inner values with room for their product, [rows, 3,
    /// WIDTH].
    pub fn pair(
        &self,
        x: &Left,
        kept: Option<(&SharedPair, usize)>,
        threads: Threads,
        f: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) {
        let downs = [self.gate.down(x), self.up.down(x)];
        self.in_columns(threads, |inner| {
            let mut rows = Buffer::new(x.rows() * ROW);
            for (part, (linear, down)) in [&self.gate, &self.up].into_iter().zip(&downs).enumerate() {
                let to = (&mut rows[part * WIDTH..], ROW);
                linear.apply(x, down.as_ref(), inner.clone(), to, false, Threads::One);
            }
            if let Some((kept, first)) = kept {
                // SAFETY: each thread has rows or inner values of its own.
                unsafe { kept.write(first, inner.start, &rows) };
            }
            f(inner, &mut rows);
        });
    }

    /// `activation(gate(x)) · up(x)` [rows, inner width], for the projection out of the block.
    pub fn forward(&self, x: &Left, kept: Option<(&SharedPair, usize)>, threads: Threads) -> Left<'static> {
        let mut product = Left::room(x.rows(), self.wide(), self.kernel);
        let shared = product.shared();
        self.pair(x, kept, threads, |inner, rows| {
            self.activation.forward(rows, WIDTH);
            // SAFETY: each thread has columns of its own, which begin with a tile.
            unsafe { shared.write(inner, &rows[PRODUCT..], ROW) };
        });
        product
    }

    /// The gradients of gate and of what is gated [rows, inner width], for their projections back, given both for all rows of the call.
    /// The gradient of their product is what `out`, the projection out of the block transposed, makes of that of the output. `inner`
    /// receives what it has room for.
    pub fn backward(
        &self,
        (pair, call_rows): (&Pair, Range<usize>),
        out: &Linear,
        (grad, d_down): (&Left, Option<&Down>),
        inner: &mut Inner,
        threads: Threads,
    ) -> [Left<'static>; 2] {
        let wide = self.wide();
        let mut grads = [(); 2].map(|()| Left::room(call_rows.len(), wide, self.kernel));
        let Inner { product, grads: inner_grads } = inner;
        let (shared, product) = (grads.each_mut().map(Left::shared), dense(product, wide));
        let inner_grads = inner_grads.each_mut().map(|to| dense(to, wide));
        self.in_columns(threads, |part| {
            let mut rows = Buffer::new(call_rows.len() * ROW);
            pair.read(call_rows.start, part.start, &mut rows);
            if let Some(product) = &product {
                self.activation.forward(&mut rows, WIDTH);
                // SAFETY: each thread has columns of its own, here and below; they begin with a tile.
                unsafe { product.write(part.clone(), &rows[PRODUCT..], ROW) };
            }
            out.apply(grad, d_down, part.clone(), (&mut rows[PRODUCT..], ROW), false, Threads::One);
            self.activation.backward(&mut rows, WIDTH);
            for (index, (shared, inner)) in shared.iter().zip(&inner_grads).enumerate() {
                let grad = &rows[index * WIDTH..];
                // SAFETY: as above.
                unsafe { shared.write(part.clone(), grad, ROW) };
                if let Some(inner) = inner {
                    // SAFETY: as above.
                    unsafe { inner.write(part.clone(), grad, ROW) };
                }
            }
        });
        grads
    }
}

/// Room that several threads write, if there is any.
fn dense(to: &mut Option<Buffer>, wide: usize) -> Option<SharedRows<'_>> {
    to.as_mut().map(|to| SharedRows::new(to, wide))
}
