//! The gated feed-forward block, a few panels of its inner width at a time: what is inside never leaves the cache, except what
//! an adapter's own gradients ask for.

use std::ops::Range;

use super::buffer::Buffer;
use super::gate::Activation;
use super::kernel::Kernel;
use super::left::Left;
use super::linear::{Down, Linear};
use super::panels::Threads;
use super::rows::{WIDTH, in_columns};
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

impl Gated<'_> {
    fn wide(&self) -> usize {
        self.gate.weight.dims().0
    }

    /// Gate and what is gated, for some of the inner values: [rows, WIDTH] each.
    fn pair(&self, x: &Left, downs: [Option<&Down>; 2], inner: Range<usize>) -> [Buffer; 2] {
        let mut pair = [(); 2].map(|()| Buffer::new(x.rows() * WIDTH));
        for ((linear, down), values) in [&self.gate, &self.up].into_iter().zip(downs).zip(&mut pair) {
            linear.apply(x, down, inner.clone(), (values, WIDTH), false, Threads::One);
        }
        pair
    }

    /// `activation(gate(x)) · up(x)` [rows, inner width], for the projection out of the block.
    pub fn forward(&self, x: &Left, threads: Threads) -> Left<'static> {
        let (wide, downs) = (self.wide(), [self.gate.down(x), self.up.down(x)]);
        let mut product = Left::room(x.rows(), wide, self.kernel);
        let shared = product.shared();
        in_columns(wide, threads, |inner| {
            let [gate, up] = self.pair(x, downs.each_ref().map(Option::as_ref), inner.clone());
            let mut values = Buffer::new(gate.len());
            self.activation.forward(&gate, &up, &mut values);
            // SAFETY: each thread has columns of its own, which begin with a tile.
            unsafe { shared.write(inner, &values, WIDTH) };
        });
        product
    }

    /// The gradients of gate and of what is gated [rows, inner width], for their projections back. The gradient of their product
    /// is what `out`, the projection out of the block transposed, makes of that of the output. `inner` receives what it has
    /// room for.
    pub fn backward(
        &self,
        x: &Left,
        downs: [Option<&Down>; 2],
        out: &Linear,
        (grad, d_down): (&Left, Option<&Down>),
        inner: &mut Inner,
        threads: Threads,
    ) -> [Left<'static>; 2] {
        let wide = self.wide();
        let mut grads = [(); 2].map(|()| Left::room(x.rows(), wide, self.kernel));
        let Inner { product, grads: inner_grads } = inner;
        let (shared, product) = (grads.each_mut().map(Left::shared), dense(product, wide));
        let inner_grads = inner_grads.each_mut().map(|to| dense(to, wide));
        in_columns(wide, threads, |part| {
            let [mut gate, mut up] = self.pair(x, downs, part.clone());
            let mut values = Buffer::new(gate.len());
            if let Some(product) = &product {
                self.activation.forward(&gate, &up, &mut values);
                // SAFETY: each thread has columns of its own, here and below; they begin with a tile.
                unsafe { product.write(part.clone(), &values, WIDTH) };
            }
            out.apply(grad, d_down, part.clone(), (&mut values, WIDTH), false, Threads::One);
            self.activation.backward(&values, &mut gate, &mut up);
            for ((shared, inner), grad) in shared.iter().zip(&inner_grads).zip([gate, up]) {
                // SAFETY: as above.
                unsafe { shared.write(part.clone(), &grad, WIDTH) };
                if let Some(inner) = inner {
                    // SAFETY: as above.
                    unsafe { inner.write(part.clone(), &grad, WIDTH) };
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
