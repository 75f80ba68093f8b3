//! The rows that weights are multiplied with, in the form that their kernel reads: f32 row by row, or bf16 in tiles.
//!
//! A tile is 16 rows of 32 values and lies together in memory, one after the other along k: a product walks through them from
//! end to end, which the processor sees coming. One of the kernel files.

use std::ops::Range;

use super::buffer::{Buffer, copy};
use super::dropout::Mask;
use super::kernel::{Kernel, has_avx512};
use super::panels::PANEL;
use super::rounded::{Numbers, RoundedRows, round};
use super::shared::SharedRows;
use super::{LANES, vectorized};

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Inputs of a tile.
pub(super) const TILE_WIDTH: usize = 32;
/// Numbers in a tile.
pub(super) const TILE: usize = TILE_ROWS * TILE_WIDTH;

/// Rows for products, of some width.
pub struct Left<'a> {
    rows: usize,
    width: usize,
    form: Form<'a>,
}

enum Form<'a> {
    F32(&'a [f32]),
    OwnF32(Buffer<f32>),
    /// [tiles of rows, tiles along k, 16, 32], padded to whole tiles: with zeros along k, with anything in rows.
    Bf16(Buffer<u16>),
}

/// The nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() { 0x7fc0 } else { rounded as u16 }
}

/// What a kernel's type holds of each value, and what that leaves, if it leaves anything.
pub fn parts(values: &[f32], kernel: Kernel) -> Vec<Vec<f32>> {
    if !kernel.rounds_inputs() {
        return vec![values.to_vec()];
    }
    let held: Vec<f32> = values.iter().map(|&x| to_f32(to_bf16(x))).collect();
    let left = values.iter().zip(&held).map(|(x, held)| x - held).collect();
    vec![held, left]
}

#[inline(always)]
pub(super) fn to_f32(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

impl<'a> Left<'a> {
    /// Prepares dense rows of `width` values.
    pub fn new(rows: &'a [f32], width: usize, kernel: Kernel) -> Self {
        if !kernel.rounds_inputs() {
            return Self { rows: rows.len() / width, width, form: Form::F32(rows) };
        }
        let mut left = Self::room(rows.len() / width, width, kernel);
        left.write(0..width, rows, width);
        left
    }

    /// Prepares rows of `width` values that are made some at a time: `make(rows, values)`.
    pub fn of_rows(
        rows: usize,
        width: usize,
        kernel: Kernel,
        make: impl Fn(Range<usize>, &mut [f32]),
    ) -> Left<'static> {
        let mut left = Self::room(rows, width, kernel);
        match &mut left.form {
            Form::OwnF32(own) => make(0..rows, own),
            _ => {
                let mut made = Buffer::new(TILE_ROWS * width);
                for first in (0..rows).step_by(TILE_ROWS) {
                    let some = first..rows.min(first + TILE_ROWS);
                    make(some.clone(), &mut made[..some.len() * width]);
                    // SAFETY: nobody else has these rows.
                    unsafe { left.shared().write_rows(some, 0..width, &made, width) };
                }
            }
        }
        left
    }

    /// Prepares dense rows of `width` values that have to be finished before: `finish(first, rows)`, where there are some of them from
    /// this one on.
    pub(super) fn finished(
        rows: &'a mut [f32],
        width: usize,
        kernel: Kernel,
        mut finish: impl FnMut(usize, &mut [f32]),
    ) -> Self {
        let count = rows.len() / width;
        if !kernel.rounds_inputs() {
            finish(0, rows);
            return Self { rows: count, width, form: Form::F32(rows) };
        }
        let mut left = Self::room(count, width, kernel);
        for (first, rows) in (0..count).step_by(TILE_ROWS).zip(rows.chunks_mut(TILE_ROWS * width)) {
            finish(first, rows);
            // SAFETY: nobody else has these rows.
            unsafe { left.shared().write_rows(first..first + rows.len() / width, 0..width, rows, width) };
        }
        left
    }

    /// Prepares dense rows of `width` values that are in the kernel's type already.
    pub fn of(rows: RoundedRows<'a>, width: usize) -> Self {
        let rows = match rows {
            Numbers::F32(rows) => return Self { rows: rows.len() / width, width, form: Form::F32(rows) },
            Numbers::Bf16(rows) => rows,
        };
        let depth = width.next_multiple_of(TILE_WIDTH);
        let (count, mut tiles) = (rows.len() / width, Self::padded_tiles(rows.len() / width, width));
        for (tiles, rows) in tiles.chunks_exact_mut(TILE_ROWS * depth).zip(rows.chunks(TILE_ROWS * width)) {
            vectorized(
                #[inline(always)]
                || {
                    for (row, numbers) in rows.chunks_exact(width).enumerate() {
                        let (whole, rest) = numbers.as_chunks::<TILE_WIDTH>();
                        for (tile, numbers) in tiles.as_chunks_mut::<TILE>().0.iter_mut().zip(whole) {
                            tile.as_chunks_mut().0[row] = *numbers;
                        }
                        if !rest.is_empty() {
                            tiles[place(row, width - rest.len())..][..rest.len()].copy_from_slice(rest);
                        }
                    }
                },
            );
        }
        Self { rows: count, width, form: Form::Bf16(tiles) }
    }

    /// Rows and columns exchanged.
    pub(super) fn transposed(&self) -> Left<'static> {
        let (rows, width) = (self.width, self.rows);
        let Form::Bf16(tiles) = &self.form else {
            let mut dense = Buffer::new(rows * width);
            transpose(self.f32(), self.width, &mut dense);
            return Left { rows, width, form: Form::OwnF32(dense) };
        };
        let mut columns = Self::padded_tiles(rows, width);
        let [from_row, to_row] = [rows, width].map(|width| TILE_ROWS * width.next_multiple_of(TILE_WIDTH));
        for (number, first) in (0..width).step_by(TILE_WIDTH).enumerate() {
            for channels in 0..rows.div_ceil(TILE_WIDTH) {
                // Zeros where there are no more rows.
                let mut square = [0; 2 * TILE];
                for (row, to) in (first..width).step_by(TILE_ROWS).zip(square.as_chunks_mut::<TILE>().0) {
                    let there = TILE_WIDTH * TILE_ROWS.min(width - row);
                    let from = row / TILE_ROWS * from_row + channels * TILE;
                    to[..there].copy_from_slice(&tiles[from..from + there]);
                }
                let halves = columns[2 * channels * to_row..].chunks_mut(to_row);
                let mut halves = halves.map(|to| to[number * TILE..].first_chunk_mut().expect("a tile"));
                square_columns(&square, [halves.next(), halves.next()]);
            }
        }
        Left { rows, width, form: Form::Bf16(columns) }
    }

    /// Room for tiles, with zeros after the last input: what comes after the last column is multiplied with them.
    fn padded_tiles(rows: usize, width: usize) -> Buffer<u16> {
        let depth = width.next_multiple_of(TILE_WIDTH);
        let mut tiles = Buffer::new(rows.next_multiple_of(TILE_ROWS) * depth);
        if width < depth {
            let last = tiles
                .chunks_exact_mut(TILE_ROWS * depth)
                .flat_map(|tiles| tiles[depth / TILE_WIDTH * TILE - TILE..].chunks_exact_mut(TILE_WIDTH));
            last.for_each(|row| row[width % TILE_WIDTH..].fill(0));
        }
        tiles
    }

    /// Room for rows that are written column by column.
    pub fn room(rows: usize, width: usize, kernel: Kernel) -> Left<'static> {
        if !kernel.rounds_inputs() {
            return Left { rows, width, form: Form::OwnF32(Buffer::new(rows * width)) };
        }
        Left { rows, width, form: Form::Bf16(Self::padded_tiles(rows, width)) }
    }

    /// Writes some columns of all rows, which lie `stride` values apart in `values`.
    ///
    /// # Panics
    /// If the rows are borrowed: a mistake of the caller.
    pub fn write(&mut self, columns: Range<usize>, values: &[f32], stride: usize) {
        // SAFETY: nobody else has these rows.
        unsafe { self.shared().write(columns, values, stride) };
    }

    /// The same rows, to be written by several threads.
    pub(super) fn shared(&mut self) -> SharedLeft<'_> {
        let Self { rows, width, form } = self;
        match form {
            Form::F32(_) => unreachable!("borrowed rows are there already"),
            Form::OwnF32(own) => SharedLeft::F32(SharedRows::new(own, *width), *rows),
            Form::Bf16(own) => {
                SharedLeft::Bf16(SharedRows::new(own, TILE_ROWS * width.next_multiple_of(TILE_WIDTH)), *rows)
            }
        }
    }

    /// The same rows without what a mask drops.
    pub fn masked(&self, mask: &Mask) -> Left<'static> {
        let form = match &self.form {
            Form::F32(rows) => Form::OwnF32(mask.of(rows, self.width)),
            Form::OwnF32(rows) => Form::OwnF32(mask.of(rows, self.width)),
            Form::Bf16(tiles) => {
                let (mut kept, row_tiles) = (copy(tiles), tiles.len() / self.rows.div_ceil(TILE_ROWS).max(1));
                for row in 0..self.rows {
                    let dropped = mask.row(row);
                    for channel in (0..self.width).filter(|&channel| dropped(channel)) {
                        kept[row / TILE_ROWS * row_tiles + place(row % TILE_ROWS, channel)] = 0;
                    }
                }
                Form::Bf16(kept)
            }
        };
        Left { form, ..*self }
    }

    /// 32 columns, which begin with a tile, as a panel whose inputs are the rows: pairs of rows side by side, with zeros after the last.
    pub(super) fn pairs(&self, column: usize, panel: &mut [u16]) {
        for (number, to) in panel.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
            let first = number * TILE_ROWS;
            match self.rows.saturating_sub(first) * TILE_WIDTH {
                0 => to.fill(0),
                TILE.. => pair_rows(&self.tiles(first, column).numbers[..TILE], to),
                there => {
                    let mut tile = [0; TILE];
                    tile[..there].copy_from_slice(&self.tiles(first, column).numbers[..there]);
                    pair_rows(&tile, to);
                }
            }
        }
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many values a row has.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Dense rows.
    pub(super) fn f32(&self) -> &[f32] {
        match &self.form {
            Form::F32(rows) => rows,
            Form::OwnF32(rows) => rows,
            Form::Bf16(_) => unreachable!("rows were prepared for another kernel"),
        }
    }

    /// Tiles, from the one that has this row as its first, and some of the inputs.
    pub(super) fn tiles(&self, row: usize, from: usize) -> Tiles<'_> {
        let Form::Bf16(tiles) = &self.form else { unreachable!("rows were prepared for another kernel") };
        let row_tiles = TILE_ROWS * self.width.next_multiple_of(TILE_WIDTH);
        assert!(row.is_multiple_of(TILE_ROWS) && from.is_multiple_of(TILE_WIDTH), "products start with a tile");
        Tiles { numbers: &tiles[row / TILE_ROWS * row_tiles + from / TILE_WIDTH * TILE..], row_tiles }
    }
}

/// Rows whose columns several threads write, and how many rows there are.
pub(super) enum SharedLeft<'a> {
    F32(SharedRows<'a>, usize),
    /// All tiles of the same rows are a row.
    Bf16(SharedRows<'a, u16>, usize),
}

impl SharedLeft<'_> {
    /// Writes some columns of all rows, which lie `stride` values apart in `values`.
    ///
    /// # Safety
    /// Nobody else may write to tiles with these columns.
    pub unsafe fn write(&self, columns: Range<usize>, values: &[f32], stride: usize) {
        let (Self::F32(_, rows) | Self::Bf16(_, rows)) = self;
        // SAFETY: the caller's.
        unsafe { self.write_rows(0..*rows, columns, values, stride) };
    }

    /// The same for some of the rows, the first of which begins a tile.
    ///
    /// # Safety
    /// As for [`SharedLeft::write`].
    pub unsafe fn write_rows(&self, rows: Range<usize>, columns: Range<usize>, values: &[f32], stride: usize) {
        match self {
            Self::F32(own, _) => {
                for (row, values) in rows.zip(values.chunks(stride)) {
                    // SAFETY: the caller's.
                    unsafe { own.part(row, columns.clone()) }.copy_from_slice(&values[..columns.len()]);
                }
            }
            Self::Bf16(own, _) => {
                let tiles = columns.start / TILE_WIDTH..columns.end.div_ceil(TILE_WIDTH);
                for (block, values) in rows.clone().step_by(TILE_ROWS).zip(values.chunks(TILE_ROWS * stride)) {
                    // SAFETY: as above.
                    let tiles = unsafe { own.part(block / TILE_ROWS, tiles.start * TILE..tiles.end * TILE) };
                    let count = TILE_ROWS.min(rows.end - block);
                    write_tiles(tiles, count, (columns.start % TILE_WIDTH, columns.len()), values, stride);
                }
            }
        }
    }
}

/// Writes dense rows of `width` values as columns.
pub(super) fn transpose(values: &[f32], width: usize, to: &mut [f32]) {
    let rows = values.len() / width;
    assert!(values.len() == rows * width && to.len() == values.len(), "as many columns as rows had values");
    let squares = |count: usize| if has_avx512() { count / LANES * LANES } else { 0 };
    let (done_rows, done_columns) = (squares(rows), squares(width));
    #[cfg(target_arch = "x86_64")]
    for row in (0..done_rows).step_by(LANES) {
        for column in (0..done_columns).step_by(LANES) {
            let (from, to) = (&values[row * width + column..], &mut to[column * rows + row..]);
            // SAFETY: the instructions are there, and by the assert a whole square on both sides.
            unsafe { super::rearrange::transpose((from.as_ptr(), width), (to.as_mut_ptr(), rows)) };
        }
    }
    for (column, to) in to.chunks_exact_mut(rows).enumerate() {
        let done = if column < done_columns { done_rows } else { 0 };
        let rest = to[done..].iter_mut().enumerate();
        rest.for_each(|(row, to)| *to = values[(done + row) * width + column]);
    }
}

/// Writes the pairs of a tile as columns, whose rows are 32 pairs apart.
pub(super) fn columns_of(tile: &[u16; TILE], to: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if super::rearrange::columns_of(tile, to) {
        return;
    }
    for (row, pairs) in tile.chunks_exact(TILE_WIDTH).enumerate() {
        for (to, pair) in to.chunks_mut(2 * PANEL).zip(pairs.as_chunks::<2>().0) {
            to[2 * row..][..2].copy_from_slice(pair);
        }
    }
}

/// Writes 32 rows of 32 numbers as columns, the first sixteen of them and the others, as far as they are wanted.
fn square_columns(rows: &[u16; 2 * TILE], to: [Option<&mut [u16; TILE]>; 2]) {
    #[cfg(target_arch = "x86_64")]
    let Some(to) = super::rearrange::square_columns(rows, to) else { return };
    for (half, to) in to.into_iter().enumerate() {
        let columns = to.map_or(&mut [][..], |to| to).chunks_exact_mut(TILE_WIDTH);
        for (column, to) in (half * TILE_ROWS..).zip(columns) {
            to.iter_mut().zip(rows.iter().skip(column).step_by(TILE_WIDTH)).for_each(|(to, from)| *to = *from);
        }
    }
}

/// Puts every two rows of 32 numbers side by side.
pub(super) fn pair_rows(rows: &[u16], to: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if super::rearrange::pair_rows(rows, to) {
        return;
    }
    for (to, rows) in to.chunks_exact_mut(2 * TILE_WIDTH).zip(rows.chunks_exact(2 * TILE_WIDTH)) {
        let (even, odd) = rows.split_at(TILE_WIDTH);
        to.as_chunks_mut::<2>()
            .0
            .iter_mut()
            .zip(even.iter().zip(odd))
            .for_each(|(to, (even, odd))| *to = [*even, *odd]);
    }
}

/// Rows in tiles.
#[derive(Clone, Copy)]
pub(super) struct Tiles<'a> {
    /// From the first tile on.
    pub numbers: &'a [u16],
    /// Numbers from one tile to the one with the next rows.
    pub row_tiles: usize,
}

/// Where a channel of a row is in the tiles of its rows.
#[inline(always)]
fn place(row: usize, channel: usize) -> usize {
    channel / TILE_WIDTH * TILE + row * TILE_WIDTH + channel % TILE_WIDTH
}

/// Writes up to 16 rows of so many values, from a column of the first tile on.
fn write_tiles(tiles: &mut [u16], rows: usize, (column, width): (usize, usize), values: &[f32], stride: usize) {
    #[cfg(target_arch = "x86_64")]
    if column == 0 && tiles.len() == width * TILE_ROWS && super::rearrange::round_tiles(tiles, rows, values, stride) {
        return;
    }
    for (row, values) in values.chunks(stride).take(rows).enumerate() {
        in_tiles(tiles, row, column, &values[..width]);
    }
}

/// Rounds a stretch of a row, cut at the ends of tiles.
fn in_tiles(tiles: &mut [u16], row: usize, column: usize, values: &[f32]) {
    let first = (TILE_WIDTH - column % TILE_WIDTH).min(values.len());
    let (first, rest) = values.split_at(first);
    round(first, &mut tiles[place(row, column)..][..first.len()]);
    for (index, piece) in rest.chunks(TILE_WIDTH).enumerate() {
        let column = column + first.len() + index * TILE_WIDTH;
        round(piece, &mut tiles[place(row, column)..][..piece.len()]);
    }
}
