//! Products of rows with one panel of bf16. One of the kernel files.
//!
//! A product of tiles needs registers for its sums and for both operands. 32 rows at once read each tile of the panel once, which is
//! best where it comes from memory and no other rows need it. Of many rows 16 at once are computed: they have less to hold, and find
//! the panel in the first-level cache, part by part along k.

use std::ops::Range;

use super::amx;
use super::buffer::LINE;
use super::codes::{self, Coded};
use super::left::{self, TILE, TILE_ROWS, TILE_WIDTH};
use super::panels::Panel;
use super::shared::Columns;

/// Steps along k by which a panel of codes is unpacked ahead of the product: the processor does both at once.
const AHEAD: usize = 2;
/// Lines of the cache that a step's part of a panel takes.
const STEP: usize = codes::BLOCK * size_of::<u16>() / LINE;
/// Lines that are fetched in a step of many rows.
const LINES: usize = 4;
/// Memory from the first to the last row of a product that is too much to be in the second-level cache already, in bytes.
const FAR: usize = 1 << 18;
/// No ring: every step has a place of its own.
const WHOLE: usize = 1 << (usize::BITS - 1);

/// A panel in codes on its way to bf16.
struct Unpacking<'a> {
    codes: Coded<'a>,
    room: &'a mut [u16],
    /// How many steps along k are kept; later ones come in their places.
    ring: usize,
}

impl Unpacking<'_> {
    /// One step along k, if there is such a one.
    fn unpack(&mut self, step: usize) {
        let Self { codes, room, ring } = self;
        if step < codes.blocks() {
            let at = (step & (*ring - 1)) * codes::BLOCK;
            codes.unpack(step, &mut room[at..at + codes::BLOCK]);
        }
    }
}

/// Whether so many rows are computed at once, so that no more of a panel in codes is kept than a ring.
pub(super) fn few(rows: usize) -> bool {
    rows <= 2 * TILE_ROWS
}

/// Rows and a panel, and other rows and another panel whose product is added, as far as there are such.
struct Operands<'a> {
    rows: usize,
    a: &'a left::Tiles<'a>,
    panel: *const u16,
    /// Of the panel, along k.
    steps: usize,
    ring: usize,
    then: Option<&'a (left::Tiles<'a>, &'a [u16])>,
}

impl Operands<'_> {
    /// The walks of the rows from this one on over some steps of the panel; what is added comes with the last of them.
    fn walks(&self, row: usize, part: Range<usize>) -> (amx::Walk, Option<amx::Walk>) {
        let walk = |a: &left::Tiles, panel: *const u16, part: Range<usize>, ring: usize| {
            let last = (self.rows.div_ceil(TILE_ROWS) - 1) * a.row_tiles;
            assert!(!part.is_empty() && last + part.end * TILE <= a.numbers.len(), "rows are padded to tiles");
            let of_row = row / TILE_ROWS * a.row_tiles + row % TILE_ROWS * TILE_WIDTH + part.start * TILE;
            let b = panel.wrapping_add(part.start * codes::BLOCK);
            amx::Walk { a: a.numbers[of_row..].as_ptr(), b, steps: part.len(), second: a.row_tiles, ring }
        };
        let then = self.then.filter(|_| part.end == self.steps);
        let then = then.map(|(a, panel)| walk(a, panel.as_ptr(), 0..panel.len() / codes::BLOCK, WHOLE));
        (walk(self.a, self.panel, part, self.ring), then)
    }

    /// The steps along k in parts of one length, each of which stays in the first-level cache.
    fn parts(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        const MOST: usize = 18;
        let (steps, part) = (self.steps, self.steps.div_ceil(self.steps.div_ceil(MOST)));
        (0..steps).step_by(part).map(move |start| start..steps.min(start + part))
    }
}

/// All rows times one panel of bf16, and `then` others times another, as far as there are such.
pub(super) fn bf16_panel(
    tiles: Option<&amx::Tiles>,
    (a, panel): (&left::Tiles, Panel),
    then: Option<&(left::Tiles, &[u16])>,
    c: &mut Columns,
    add: bool,
) {
    let rows = c.rows();
    let (panel, steps, ring, mut codes) = match panel {
        Panel::Bf16(numbers) => (numbers.as_ptr(), numbers.len() / codes::BLOCK, WHOLE, None),
        Panel::Codes(codes, room) => {
            let ring = if room.len() < codes.room(false) { codes::RING } else { WHOLE };
            assert!(room.len() >= codes.room(ring == codes::RING), "room for what is kept of a panel");
            assert!(ring == WHOLE || tiles.is_some() && few(rows), "other rows need all of a panel");
            (room.as_ptr(), codes.blocks(), ring, Some(Unpacking { codes, room, ring }))
        }
    };
    let operands = Operands { rows, a, panel, steps, ring, then };
    let Some(tiles) = tiles else {
        codes.iter_mut().for_each(|codes| (0..steps).for_each(|step| codes.unpack(step)));
        let walks = |row| operands.walks(row, 0..steps);
        return (0..rows).step_by(TILE_ROWS / 2).for_each(|row| avx512_rows(walks(row), row, c, add));
    };
    c.fetch(0..2 * TILE_ROWS);
    codes.iter_mut().for_each(|codes| (0..AHEAD).for_each(|step| codes.unpack(step)));
    if !few(rows) {
        return operands.parts().for_each(|part| many_rows(tiles, &operands, part, codes.as_mut(), c, add));
    }
    let (walks, rows) = (operands.walks(0, 0..steps), 0..rows.next_multiple_of(TILE_ROWS));
    match codes {
        // The processor does not see loads of tiles coming as well as others: from memory a product takes two thirds of the time if they
        // are fetched a step and a half before.
        None => tile_rows::<true>(tiles, walks, rows, c, add, |step| {
            let first = step * STEP + STEP * 3 / 2;
            amx::fetch(panel, first..first + STEP);
        }),
        Some(mut codes) => tile_rows::<true>(tiles, walks, rows, c, add, |step| codes.unpack(step + AHEAD)),
    }
}

/// All rows times a part of a panel, added to what the parts before it have left.
fn many_rows(
    tiles: &amx::Tiles,
    operands: &Operands,
    part: Range<usize>,
    codes: Option<&mut Unpacking>,
    c: &mut Columns,
    add: bool,
) {
    let (add, mut row) = (add || part.start > 0, 0);
    // Meanwhile what comes next is fetched, of this panel or of the one that lies after it. Codes are fetched as they are unpacked.
    let next = if codes.is_none() { part.end * STEP..(part.end + part.len()) * STEP } else { 0..0 };
    let mut next = next.step_by(LINES);
    if let Some(codes) = codes {
        let walks = operands.walks(0, part.clone());
        tile_rows::<false>(tiles, walks, 0..TILE_ROWS, c, add, |step| codes.unpack(part.start + step + AHEAD));
        row = TILE_ROWS;
    }
    // Sums that are not in the cache would be waited for, so they are asked for while the rows before them are computed.
    let far = !add && c.bytes() >= FAR;
    while row < operands.rows {
        let height = if far { TILE_ROWS } else { c.stretch(row) };
        if far {
            c.fetch(row + TILE_ROWS..row + 2 * TILE_ROWS);
        }
        let walks = operands.walks(row, part.clone());
        tile_rows::<false>(tiles, walks, row..row + height, c, add, |_| {
            if let Some(line) = next.next() {
                amx::fetch(operands.panel, line..line + LINES);
            }
        });
        row += height;
    }
}

/// Some rows, whole tiles, 32 at once if `TWO` is set, else 16. `before` is called before every step along k of the first walk.
#[inline(always)]
fn tile_rows<const TWO: bool>(
    tiles: &amx::Tiles,
    (first, then): (amx::Walk, Option<amx::Walk>),
    rows: Range<usize>,
    c: &mut Columns,
    add: bool,
    before: impl FnMut(usize),
) {
    let height = rows.len();
    // SAFETY: by the assert where walks are made, all tiles of these rows are there, and all inputs of the panels, at the latest after
    // `before`; `whole` gives room for as many rows of 32, all of which are written.
    unsafe { c.whole(rows, add, |c| tiles.multiply::<TWO>((first, then), c, add, height, before)) };
}

/// Up to half a tile of rows, beginning with this one, in vectors.
fn avx512_rows((first, then): (amx::Walk, Option<amx::Walk>), row: usize, c: &mut Columns, add: bool) {
    let count = (c.rows() - row).min(TILE_ROWS / 2);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the kernel was chosen because AVX-512-BF16 is there; walks were made with `count` rows of all tiles and all inputs of
    // the panels; `whole` gives room for as many rows of 32, all of which are written.
    unsafe {
        c.whole(row..row + count, add, |c| {
            super::avx512::bf16_block(first.a, first.b, first.steps, c, count, add);
            if let Some(then) = then {
                super::avx512::bf16_block(then.a, then.b, then.steps, c, count, true);
            }
        });
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("kernels in bf16 are for x86-64");
}
