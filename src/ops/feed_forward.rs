//! The gated feed-forward block, a few panels of its inner width at a time: what is inside never leaves the cache, except as
//! inputs of the products that follow.

use std::ops::Range;

use super::buffer::Buffer;
use super::gate::Activation;
use super::kernel::Kernel;
use super::left::{Left, SharedLeft, TILE_ROWS};
use super::linear::{Down, Linear};
use super::panels::{PANEL, Threads};
use super::rows::in_turns;

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
    fn in_columns(&self, f: impl Fn(Range<usize>) + Sync) {
        let wide = self.wide();
        in_turns(wide.div_ceil(WIDTH), Threads::All, |turns| {
            let _tiles = self.kernel.tiles();
            turns.map(|number| number * WIDTH).for_each(|start| f(start..(start + WIDTH).min(wide)));
        });
    }

    /// Gate and what is gated, for some of the inner values, and room for their product: [rows, 3, WIDTH].
    fn pair(&self, x: &Left, downs: [Option<&Down>; 2], inner: Range<usize>) -> Buffer {
        let mut rows = Buffer::new(x.rows() * ROW);
        for (part, (linear, down)) in [&self.gate, &self.up].into_iter().zip(downs).enumerate() {
            linear.apply(x, down, inner.clone(), (&mut rows[part * WIDTH..], ROW), false, Threads::One);
        }
        rows
    }

    /// Computes the product of some of the inner values, and writes it.
    ///
    /// # Safety
    /// Nobody else may write to tiles with these columns.
    unsafe fn write_product(&self, to: &SharedLeft, inner: Range<usize>, rows: &mut [f32]) {
        for (rows, tile) in tiles_of(rows) {
            self.activation.forward(tile, WIDTH);
            // SAFETY: the caller's.
            unsafe { to.write_rows(rows, inner.clone(), &tile[PRODUCT..], ROW) };
        }
    }

    /// `activation(gate(x)) · up(x)` [rows, inner width], for the projection out of the block.
    pub fn forward(&self, x: &Left) -> Left<'static> {
        let (wide, downs) = (self.wide(), [self.gate.down(x), self.up.down(x)]);
        let mut product = Left::room(x.rows(), wide, self.kernel);
        let shared = product.shared();
        self.in_columns(|inner| {
            let mut rows = self.pair(x, downs.each_ref().map(Option::as_ref), inner.clone());
            // SAFETY: each thread has columns of its own, which begin with a tile.
            unsafe { self.write_product(&shared, inner, &mut rows) };
        });
        product
    }

    /// The gradients of gate and of what is gated [rows, inner width], for their projections back. The gradient of their product
    /// is what `out`, the projection out of the block transposed, makes of that of the output. The product itself is computed again
    /// where an adapter's gradients ask for it.
    pub fn backward(
        &self,
        x: &Left,
        downs: [Option<&Down>; 2],
        out: &Linear,
        (grad, d_down): (&Left, Option<&Down>),
    ) -> ([Left<'static>; 2], Option<Left<'static>>) {
        let room = || Left::room(x.rows(), self.wide(), self.kernel);
        let (mut grads, mut product) = ([room(), room()], out.adapter.is_some().then(room));
        let (shared, shared_product) = (grads.each_mut().map(Left::shared), product.as_mut().map(Left::shared));
        self.in_columns(|part| {
            let mut rows = self.pair(x, downs, part.clone());
            if let Some(product) = &shared_product {
                // SAFETY: each thread has columns of its own, here and below; they begin with a tile.
                unsafe { self.write_product(product, part.clone(), &mut rows) };
            }
            out.apply(grad, d_down, part.clone(), (&mut rows[PRODUCT..], ROW), false, Threads::One);
            for (rows, tile) in tiles_of(&mut rows) {
                self.activation.backward(tile, WIDTH);
                for (index, shared) in shared.iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { shared.write_rows(rows.clone(), part.clone(), &tile[index * WIDTH..], ROW) };
                }
            }
        });
        (grads, product)
    }
}

/// As many rows at once as a tile has: what is made of them is rounded before it leaves the first-level cache.
fn tiles_of(rows: &mut [f32]) -> impl Iterator<Item = (Range<usize>, &mut [f32])> {
    let tiles = rows.chunks_mut(TILE_ROWS * ROW).enumerate();
    tiles.map(|(number, tile)| (number * TILE_ROWS..number * TILE_ROWS + tile.len() / ROW, tile))
}
