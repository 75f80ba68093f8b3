//! Keys and values of one layer, laid out for attention in blocks of 32 rows. Both are the second operand of a product: keys with
//! 32 of their rows as its columns, values with 32 of their channels.
//!
//! In bf16 they are panels as the weights' are: pairs along what is summed over lie side by side.

use std::ops::Range;

use super::attention::Heads;
use super::bf16::bf16_panel;
use super::buffer::Buffer;
use super::kernel::Kernel;
use super::left::{Left, TILE, TILE_ROWS, TILE_WIDTH, columns_of, pair_rows, to_bf16};
use super::matmul::{Matrix, matmul};
use super::pages::Held;
use super::panels::{PANEL, Panel, Threads};
use super::rounded::{Numbers, Rounded, RoundedRows};
use super::rows::in_turns;
use super::shared::{Columns, SharedRows};

/// Rows of a block. Stretches of rows that belong to one sequence start with a block.
pub const BLOCK: usize = PANEL;

/// Consecutive rows of a call, and where their keys and values go.
#[derive(Clone, Debug)]
pub struct Store {
    /// Rows of the call.
    pub from: Range<usize>,
    /// First row of the keys.
    pub to: usize,
}

/// In f32, keys [heads, blocks, dim, 32] or values [heads, rows, dim]; in bf16, keys [heads, blocks, dim / 2, 32, 2] or values [heads,
/// dim / 32, rows / 2, 32, 2], `dim` up to whole panels.
type Blocks = Numbers<Held<f32>, Held<u16>>;

/// Keys and values of one layer.
pub struct Keys {
    kernel: Kernel,
    keys: Blocks,
    values: Blocks,
    /// In whole blocks.
    rows: usize,
    /// Key heads.
    heads: usize,
    dim: usize,
}

/// Rows up to the end of their last block.
pub fn padded(rows: usize) -> usize {
    rows.next_multiple_of(BLOCK)
}

impl Keys {
    /// Room for `rows` rows, whole blocks, of zeros; for longer than a call if it stays.
    pub fn new(rows: usize, heads: Heads, kernel: Kernel, stays: bool) -> Self {
        let Heads { key, dim, .. } = heads;
        let zeros = || match kernel.rounds_inputs() {
            false => Numbers::F32(Held::zeros(padded(rows) * key * dim, stays)),
            true => Numbers::Bf16(Held::zeros(padded(rows) * key * padded(dim), stays)),
        };
        Self { kernel, keys: zeros(), values: zeros(), rows: padded(rows), heads: key, dim }
    }

    /// What a row takes, in bytes.
    pub fn row_bytes(heads: Heads, kernel: Kernel) -> usize {
        let width = if kernel.rounds_inputs() { padded(heads.dim) } else { heads.dim };
        2 * heads.key * width * Rounded::bytes(kernel)
    }

    /// What products with them are made with.
    pub(super) fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Writes the keys and values [rows, key heads · dim] of a call. Each block receives rows of one store. Where a block begins,
    /// what was left in it is forgotten.
    ///
    /// # Panics
    /// If a store lies outside, or the rows are of another type: mistakes of the caller.
    pub fn write(&mut self, keys: RoundedRows, values: RoundedRows, stores: &[Store]) {
        let Self { heads, dim, rows, .. } = *self;
        let (width, panels, blocks) = (heads * dim, padded(dim) / PANEL, rows / BLOCK);
        match (&mut self.keys, &mut self.values, keys, values) {
            (Numbers::F32(to_keys), Numbers::F32(to_values), Numbers::F32(keys), Numbers::F32(values)) => {
                let to_keys = SharedRows::new(to_keys, BLOCK * dim);
                let to_values = SharedRows::new(to_values, BLOCK * dim);
                each_run(
                    stores,
                    heads,
                    |_, _| 1,
                    |_, _| {},
                    |row, to, head| {
                        let (block, lane, from) = (to / BLOCK, to % BLOCK, row.start * width + head * dim);
                        let (keys, values) = (&keys[from..from + dim], &values[from..from + dim]);
                        // SAFETY: no two stores write to one block.
                        let (to_keys, to_values) = unsafe {
                            (
                                to_keys.part(head * blocks + block, 0..BLOCK * dim),
                                to_values.part(head * blocks + block, 0..BLOCK * dim),
                            )
                        };
                        if lane == 0 {
                            to_keys.fill(0.0);
                            to_values.fill(0.0);
                        }
                        to_values[lane * dim..][..dim].copy_from_slice(values);
                        to_keys[lane..].iter_mut().step_by(BLOCK).zip(keys).for_each(|(to, key)| *to = *key);
                    },
                );
            }
            (Numbers::Bf16(to_keys), Numbers::Bf16(to_values), Numbers::Bf16(keys), Numbers::Bf16(values)) => {
                let to_keys = SharedRows::new(to_keys, BLOCK * padded(dim));
                let to_values = SharedRows::new(to_values, BLOCK * PANEL);
                let fetch = |to: usize, head: usize| {
                    let (block, lane) = (to / BLOCK, to % BLOCK);
                    for pair in 0..padded(dim) / 2 {
                        to_keys.fetch(head * blocks + block, 2 * (pair * BLOCK + lane));
                    }
                    for panel in 0..panels {
                        let index = (head * panels + panel) * blocks + block;
                        let pair = lane / 2 * 2 * PANEL;
                        [pair, pair + PANEL].iter().for_each(|column| to_values.fetch(index, *column));
                    }
                };
                // Sixteen rows at once where they are whole tiles.
                let run = |rows: &Range<usize>, to: usize| {
                    let tiles = dim.is_multiple_of(PANEL) && to.is_multiple_of(TILE_ROWS) && rows.len() >= TILE_ROWS;
                    if tiles { TILE_ROWS } else { 1 }
                };
                each_run(stores, heads, run, fetch, |rows, to, head| {
                    let (block, lane) = (to / BLOCK, to % BLOCK);
                    // SAFETY: no two stores write to one block.
                    let to_keys = unsafe { to_keys.part(head * blocks + block, 0..BLOCK * padded(dim)) };
                    if lane == 0 {
                        to_keys.fill(0);
                    }
                    for (panel, to_keys) in to_keys.chunks_exact_mut(PANEL * BLOCK).enumerate() {
                        let index = (head * panels + panel) * blocks + block;
                        // SAFETY: as above.
                        let to_values = unsafe { to_values.part(index, 0..BLOCK * PANEL) };
                        if lane == 0 {
                            to_values.fill(0);
                        }
                        let from = rows.start * width + head * dim + panel * PANEL;
                        let (to_keys, to_values) = (&mut to_keys[2 * lane..], &mut to_values[lane / 2 * 2 * PANEL..]);
                        if rows.len() == TILE_ROWS {
                            columns_of(&tile(&keys[from..], width), to_keys);
                            pair_rows(&tile(&values[from..], width), &mut to_values[..TILE]);
                            continue;
                        }
                        let channels = from..from + PANEL.min(dim - panel * PANEL);
                        let [keys, values] = [keys, values].map(|x| {
                            let mut padded = [0; PANEL];
                            padded[..channels.len()].copy_from_slice(&x[channels.clone()]);
                            padded
                        });
                        for (to, pair) in to_keys.chunks_mut(2 * BLOCK).zip(keys.as_chunks::<2>().0) {
                            to[..2].copy_from_slice(pair);
                        }
                        for (to, value) in to_values.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                            to[lane % 2] = value;
                        }
                    }
                });
            }
            _ => unreachable!("all are of one type"),
        }
    }

    /// How many rows products of `m` rows need room for, to be written without a detour.
    pub(super) fn room(&self, m: usize) -> usize {
        if self.kernel == Kernel::Amx { m.next_multiple_of(TILE_ROWS) } else { m }
    }

    /// `rows` [m, dim] times the keys of one head in some blocks: the first columns of `scores`, whose rows are `stride` values
    /// apart, and of which the first `room` may be written.
    pub(super) fn scores(
        &self,
        rows: &Left,
        head: usize,
        blocks: Range<usize>,
        (scores, stride): (&mut [f32], usize),
        room: usize,
    ) {
        let tiles = self.kernel.tiles();
        for (number, block) in blocks.enumerate() {
            let (index, to) = (head * (self.rows / BLOCK) + block, &mut scores[number * BLOCK..]);
            match &self.keys {
                Numbers::F32(keys) => {
                    let len = self.dim * BLOCK;
                    let keys = Matrix::dense(&keys[index * len..][..len], BLOCK);
                    matmul(to, stride, false, Matrix::dense(rows.f32(), self.dim), keys);
                }
                Numbers::Bf16(keys) => {
                    let len = padded(self.dim) * BLOCK;
                    let mut to = Columns::first(to, room, BLOCK, stride);
                    bf16_panel(
                        tiles.as_ref(),
                        (&rows.tiles(0, 0), Panel::Bf16(&keys[index * len..][..len])),
                        None,
                        &mut to,
                        false,
                    );
                }
            }
        }
    }

    /// `weights` times the values of one head in some blocks, from a column of the weights on, and in others: `combined` [m, dim], or
    /// what is added to it if `add` is set. Its first `room` rows may be written.
    pub(super) fn combine(
        &self,
        weights: &Left,
        head: usize,
        context: &[(Range<usize>, usize)],
        combined: &mut [f32],
        room: usize,
        add: bool,
    ) {
        let (m, dim) = (weights.rows(), self.dim);
        let mut context = context.iter().filter(|(blocks, _)| !blocks.is_empty());
        let Some(first) = context.next() else {
            if !add {
                combined.fill(0.0);
            }
            return;
        };
        let then = context.next();
        match &self.values {
            Numbers::F32(values) => {
                for (number, (blocks, from)) in [first].into_iter().chain(then).enumerate() {
                    let weights = Matrix::new(&weights.f32()[*from..], m, blocks.len() * BLOCK, weights.width());
                    let start = (head * self.rows + blocks.start * BLOCK) * dim;
                    let values = Matrix::dense(&values[start..][..blocks.len() * BLOCK * dim], dim);
                    matmul(combined, dim, add || number > 0, weights, values);
                }
            }
            Numbers::Bf16(values) => {
                let (tiles, panels) = (self.kernel.tiles(), padded(dim) / PANEL);
                for panel in 0..panels {
                    let walk = |(blocks, from): &(Range<usize>, usize)| {
                        let start = ((head * panels + panel) * self.rows + blocks.start * BLOCK) * PANEL;
                        (weights.tiles(0, *from), &values[start..][..blocks.len() * BLOCK * PANEL])
                    };
                    let first = walk(first);
                    let columns = PANEL.min(dim - panel * PANEL);
                    let mut to = Columns::first(&mut combined[panel * PANEL..], room, columns, dim);
                    let then = then.map(walk);
                    bf16_panel(tiles.as_ref(), (&first.0, Panel::Bf16(first.1)), then.as_ref(), &mut to, add);
                }
            }
        }
    }

    /// `total` [wide, 32] += x · y for `x` [wide, m] and `y` [m, 32], as the kernel of these keys does it.
    pub(super) fn add_product(&self, x: &Left, y: &[f32], total: &mut [f32]) {
        let (wide, m) = (x.rows(), x.width());
        if !self.kernel.rounds_inputs() {
            return matmul(total, BLOCK, true, Matrix::dense(x.f32(), m), Matrix::dense(&y[..m * BLOCK], BLOCK));
        }
        let (tiles, mut panel) = (self.kernel.tiles(), Buffer::<u16>::new(padded(m) * PANEL));
        round_pairs(&y[..m * BLOCK], &mut panel);
        let mut to = Columns::first(total, wide, BLOCK, BLOCK);
        bf16_panel(tiles.as_ref(), (&x.tiles(0, 0), Panel::Bf16(&panel)), None, &mut to, true);
    }
}

/// Rows of 32 as a panel: pairs of rows side by side, with zeros after the last.
fn round_pairs(rows: &[f32], panel: &mut [u16]) {
    let ((pairs, last), (panel, _)) = (rows.as_chunks::<{ 2 * PANEL }>(), panel.as_chunks_mut::<{ 2 * PANEL }>());
    let (whole, rest) = panel.split_at_mut(pairs.len());
    #[cfg(target_arch = "x86_64")]
    let done = super::rearrange::round_pairs(pairs, whole);
    #[cfg(not(target_arch = "x86_64"))]
    let done = false;
    if !done {
        for (to, pair) in whole.iter_mut().zip(pairs) {
            for column in 0..PANEL {
                to[2 * column..][..2].copy_from_slice(&[column, PANEL + column].map(|at| to_bf16(pair[at])));
            }
        }
    }
    rest.as_flattened_mut().fill(0);
    for (column, value) in last.iter().enumerate() {
        rest[0][2 * column] = to_bf16(*value);
    }
}

/// Sixteen rows of 32 numbers, which lie so many numbers apart.
fn tile(rows: &[u16], stride: usize) -> [u16; TILE] {
    let mut tile = [0; TILE];
    for (to, row) in tile.as_chunks_mut::<TILE_WIDTH>().0.iter_mut().zip(rows.chunks(stride)) {
        *to = *row.first_chunk().expect("a row has 32 numbers");
    }
    tile
}

/// Calls `f(rows of the call, first row of the keys, head)` for all of them, as many at once as `run(rows, first row of the keys)` says, one
/// store after the other, and before that `fetch` for where its first row goes: those of a store that is one row are far from each other.
fn each_run(
    stores: &[Store],
    heads: usize,
    run: impl Fn(&Range<usize>, usize) -> usize + Sync,
    fetch: impl Fn(usize, usize) + Sync,
    f: impl Fn(Range<usize>, usize, usize) + Sync,
) {
    in_turns(stores.len(), Threads::All, |turns| {
        for Store { from, to } in turns.map(|number| &stores[number]) {
            (0..heads).for_each(|head| fetch(*to, head));
            let (mut rest, mut to) = (from.clone(), *to);
            while !rest.is_empty() {
                let rows = rest.start..rest.start + run(&rest, to);
                (0..heads).for_each(|head| f(rows.clone(), to, head));
                (rest.start, to) = (rows.end, to + rows.len());
            }
        }
    });
}
