//! Numbers on their way into products: rounded to bf16 as tiles or pairs of rows, and rows as columns. In vectors of sixteen numbers. One
//! of the kernel files.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::{
    __m512, __m512i, _mm512_castpd_ps, _mm512_castps_pd, _mm512_cvtne2ps_pbh, _mm512_loadu_epi16, _mm512_loadu_ps,
    _mm512_permutex2var_epi16, _mm512_permutexvar_epi16, _mm512_shuffle_f32x4, _mm512_storeu_epi16, _mm512_storeu_ps,
    _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
};
use std::array;
use std::mem::transmute;

use super::LANES;
use super::kernel::{Kernel, has_avx512};
use super::left::{TILE, TILE_ROWS, TILE_WIDTH, in_tiles, to_bf16};
use super::panels::PANEL;

/// Writes up to 16 rows of so many values into tiles, from a column of the first on, rounded to bf16, if the processor has an
/// instruction that rounds. Tile by tile, as they lie in memory.
pub(super) fn round_tiles(
    tiles: &mut [u16],
    rows: usize,
    (column, width): (usize, usize),
    values: &[f32],
    stride: usize,
) -> bool {
    if !Kernel::Avx512Bf16.available() {
        return false;
    }
    assert!((1..=TILE_ROWS).contains(&rows) && (rows - 1) * stride + width <= values.len(), "all rows are there");
    if column == 0 && tiles.len() == width * TILE_ROWS {
        for (number, tile) in tiles.chunks_exact_mut(TILE).enumerate() {
            // SAFETY: the instructions are there; by the assert, so are 32 values of each row.
            unsafe { round_tile(tile, rows, values.as_ptr().add(number * TILE_WIDTH), stride) };
        }
    } else {
        for row in 0..rows {
            // SAFETY: the instructions are there.
            unsafe { round_row(tiles, row, column, &values[row * stride..][..width]) };
        }
    }
    true
}

/// # Safety
/// The instructions must be there, and 32 values of each row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn round_tile(tile: &mut [u16], rows: usize, values: *const f32, stride: usize) {
    for (row, to) in tile.chunks_exact_mut(TILE_WIDTH).take(rows).enumerate() {
        // SAFETY: the caller's.
        unsafe { round(values.add(row * stride), to.as_mut_ptr()) };
    }
}

/// # Safety
/// 32 numbers must be there on both sides.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn round(from: *const f32, to: *mut u16) {
    // SAFETY: the caller's.
    unsafe {
        let [first, second] = [0, LANES].map(|at| _mm512_loadu_ps(from.add(at)));
        let rounded: __m512i = transmute(_mm512_cvtne2ps_pbh(second, first));
        _mm512_storeu_epi16(to.cast(), rounded);
    }
}

/// Writes pairs of rows of 32 values side by side, rounded to bf16, if the processor has an instruction that rounds.
pub(super) fn round_pairs(pairs: &[[f32; 4 * LANES]], to: &mut [[u16; 4 * LANES]]) -> bool {
    if !Kernel::Avx512Bf16.available() {
        return false;
    }
    // SAFETY: the instructions are there.
    unsafe { each_pair(pairs, to) };
    true
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn each_pair(pairs: &[[f32; 4 * LANES]], to: &mut [[u16; 4 * LANES]]) {
    let side_by_side: [u16; 2 * LANES] = array::from_fn(|index| (index / 2 + index % 2 * LANES) as u16);
    // SAFETY: as many numbers as a vector holds are on both sides.
    unsafe {
        let order = _mm512_loadu_epi16(side_by_side.as_ptr().cast());
        for (pair, to) in pairs.iter().zip(to) {
            for half in [0, LANES] {
                let [even, odd] = [half, 2 * LANES + half].map(|at| _mm512_loadu_ps(pair.as_ptr().add(at)));
                let rounded: __m512i = transmute(_mm512_cvtne2ps_pbh(odd, even));
                let rounded = _mm512_permutexvar_epi16(order, rounded);
                _mm512_storeu_epi16(to.as_mut_ptr().add(2 * half).cast(), rounded);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn round_row(tiles: &mut [u16], row: usize, column: usize, values: &[f32]) {
    in_tiles(tiles, row, column, values, |from, to| {
        if from.len() < TILE_WIDTH {
            return to.iter_mut().zip(from).for_each(|(to, from)| *to = to_bf16(*from));
        }
        assert!(to.len() == TILE_WIDTH && from.len() == TILE_WIDTH, "pieces fit into a tile");
        // SAFETY: by the assert, 32 numbers are there on both sides.
        unsafe { round(from.as_ptr(), to.as_mut_ptr()) };
    });
}

/// Sixteen rows of sixteen numbers of 32 bits as columns; rows are so many numbers apart as stands beside them.
///
/// # Safety
/// AVX-512 must be there, and sixteen numbers of sixteen rows on both sides.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn transpose((from, from_row): (*const f32, usize), (to, to_row): (*mut f32, usize)) {
    // SAFETY: the caller's.
    let rows: [__m512; LANES] = array::from_fn(|row| unsafe { _mm512_loadu_ps(from.add(row * from_row)) });
    // Numbers of neighbors side by side, then pairs of them, then what is left: quarters of vectors.
    let pairs: [__m512; LANES] = array::from_fn(|index| {
        let (a, b) = (rows[index & !1], rows[index | 1]);
        if index & 1 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) }
    });
    let fours: [__m512; LANES] = array::from_fn(|index| {
        let (row, column) = (index & !3, index & 3);
        let [a, b] = [pairs[row + column / 2], pairs[row + 2 + column / 2]].map(|pair| _mm512_castps_pd(pair));
        _mm512_castpd_ps(if column & 1 == 0 { _mm512_unpacklo_pd(a, b) } else { _mm512_unpackhi_pd(a, b) })
    });
    for column in 0..4 {
        let [a, b, c, d] = [0, 4, 8, 12].map(|row| fours[row + column]);
        let (ab, cd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
        let (ab_odd, cd_odd) = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d));
        let whole = [
            _mm512_shuffle_f32x4::<0x88>(ab, cd),
            _mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd),
            _mm512_shuffle_f32x4::<0xdd>(ab, cd),
            _mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd),
        ];
        for (quarter, whole) in whole.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { _mm512_storeu_ps(to.add((quarter * 4 + column) * to_row), whole) };
        }
    }
}

/// From [input pairs, outputs, 2] to [output pairs, inputs, 2], 32 of each, if the processor has such vectors.
pub(super) fn transpose_pairs(from: &[u16; PANEL * PANEL], to: &mut [u16; PANEL * PANEL]) -> bool {
    if !has_avx512() {
        return false;
    }
    let mut rows = [0u16; PANEL * PANEL];
    for outputs in [0, LANES] {
        let (from, to) = (from[2 * outputs..].as_ptr(), rows[outputs * PANEL..].as_mut_ptr());
        // SAFETY: the instructions are there, and sixteen rows of sixteen pairs on both sides.
        unsafe { transpose((from.cast(), PANEL), (to.cast(), PANEL / 2)) };
    }
    pair_rows(&rows, to)
}

/// Puts every two rows of 32 numbers side by side, if the processor has such vectors.
pub(super) fn pair_rows(rows: &[u16], to: &mut [u16]) -> bool {
    if !has_avx512() {
        return false;
    }
    // SAFETY: the instructions are there.
    unsafe { side_by_side(rows, to) };
    true
}

#[target_feature(enable = "avx512f,avx512bw")]
fn side_by_side(rows: &[u16], to: &mut [u16]) {
    // The first and the second half of two rows; what comes from the second row is counted on.
    let order: [[u16; PANEL]; 2] =
        array::from_fn(|half| array::from_fn(|index| (half * LANES + index / 2 + index % 2 * PANEL) as u16));
    // SAFETY: a vector holds 32 numbers, as many as there are in a row and in half of two.
    unsafe {
        let order = order.map(|order| _mm512_loadu_epi16(order.as_ptr().cast()));
        for (pair, to) in rows.chunks_exact(2 * PANEL).zip(to.chunks_exact_mut(2 * PANEL)) {
            let [even, odd] = [0, PANEL].map(|at| _mm512_loadu_epi16(pair.as_ptr().add(at).cast()));
            for (half, order) in order.into_iter().enumerate() {
                let values = _mm512_permutex2var_epi16(even, order, odd);
                _mm512_storeu_epi16(to.as_mut_ptr().add(half * PANEL).cast(), values);
            }
        }
    }
}
