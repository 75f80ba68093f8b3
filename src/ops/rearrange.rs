//! Numbers on their way into products: rounded to bf16 as tiles or pairs of rows, and rows as columns. In vectors of sixteen numbers. One
//! of the kernel files.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::{
    __m512, __m512i, _mm512_castpd_ps, _mm512_castps_pd, _mm512_castps_si512, _mm512_cvtne2ps_pbh, _mm512_loadu_epi16,
    _mm512_loadu_ps, _mm512_permutex2var_epi16, _mm512_permutexvar_epi16, _mm512_setzero_ps, _mm512_shuffle_f32x4,
    _mm512_storeu_epi16, _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd,
    _mm512_unpacklo_ps,
};
use std::array;
use std::mem::transmute;

use super::LANES;
use super::kernel::{Kernel, has_avx512};
use super::left::{TILE, TILE_ROWS, TILE_WIDTH, to_bf16};
use super::panels::PANEL;

/// Writes up to 16 rows of whole tiles, rounded to bf16, if the processor has an instruction that rounds. Tile by tile, as they lie in
/// memory.
pub(super) fn round_tiles(tiles: &mut [u16], rows: usize, values: &[f32], stride: usize) -> bool {
    if !Kernel::Avx512Bf16.available() {
        return false;
    }
    let width = tiles.len() / TILE_ROWS;
    assert!((1..=TILE_ROWS).contains(&rows) && (rows - 1) * stride + width <= values.len(), "all rows are there");
    for (number, tile) in tiles.chunks_exact_mut(TILE).enumerate() {
        // SAFETY: the instructions are there; by the assert, so are 32 values of each row.
        unsafe { round_tile(tile, rows, values.as_ptr().add(number * TILE_WIDTH), stride) };
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

/// Rounds as many values to bf16, if the processor has an instruction that does.
pub(super) fn round_all(values: &[f32], to: &mut [u16]) -> bool {
    if !Kernel::Avx512Bf16.available() {
        return false;
    }
    // SAFETY: the instructions are there.
    unsafe { each(values, to) };
    true
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn each(values: &[f32], to: &mut [u16]) {
    let ((whole, rest), (to, to_rest)) = (values.as_chunks::<TILE_WIDTH>(), to.as_chunks_mut::<TILE_WIDTH>());
    for (from, to) in whole.iter().zip(to) {
        // SAFETY: 32 numbers are there on both sides.
        unsafe { round(from.as_ptr(), to.as_mut_ptr()) };
    }
    to_rest.iter_mut().zip(rest).for_each(|(to, from)| *to = to_bf16(*from));
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

/// Sixteen rows of sixteen numbers of 32 bits as columns; rows are so many numbers apart as stands beside them.
///
/// # Safety
/// AVX-512 must be there, and sixteen numbers of sixteen rows on both sides.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn transpose(from: (*const f32, usize), (to, to_row): (*mut f32, usize)) {
    // SAFETY: the caller's.
    for (row, column) in unsafe { columns(from) }.iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_ps(to.add(row * to_row), *column) };
    }
}

/// The columns of sixteen rows of sixteen numbers of 32 bits. In loops, for what is passed to a function of the standard library is not always compiled into it, and then not for these vectors.
///
/// # Safety
/// AVX-512 must be there, and sixteen numbers of sixteen rows.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) unsafe fn columns((from, from_row): (*const f32, usize)) -> [__m512; LANES] {
    let [mut rows, mut pairs, mut fours, mut whole] = [[_mm512_setzero_ps(); LANES]; 4];
    for (row, to) in rows.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *to = unsafe { _mm512_loadu_ps(from.add(row * from_row)) };
    }
    // Numbers of neighbors side by side, then pairs of them, then what is left: quarters of vectors.
    for row in (0..LANES).step_by(2) {
        let (a, b) = (rows[row], rows[row + 1]);
        (pairs[row], pairs[row + 1]) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for row in (0..LANES).step_by(4) {
        for half in 0..2 {
            let (a, b) = (_mm512_castps_pd(pairs[row + half]), _mm512_castps_pd(pairs[row + 2 + half]));
            fours[row + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            fours[row + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for column in 0..4 {
        let (a, b, c, d) = (fours[column], fours[4 + column], fours[8 + column], fours[12 + column]);
        let (ab, cd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
        let (ab_odd, cd_odd) = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d));
        whole[column] = _mm512_shuffle_f32x4::<0x88>(ab, cd);
        whole[4 + column] = _mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd);
        whole[8 + column] = _mm512_shuffle_f32x4::<0xdd>(ab, cd);
        whole[12 + column] = _mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd);
    }
    whole
}

/// Writes the pairs of a tile as columns, whose rows are 32 pairs apart, if the processor has such vectors.
pub(super) fn columns_of(tile: &[u16; TILE], to: &mut [u16]) -> bool {
    if !has_avx512() {
        return false;
    }
    assert!(to.len() >= 2 * (PANEL * (LANES - 1) + LANES), "all columns have a place");
    // SAFETY: the instructions are there, and sixteen rows of sixteen pairs on both sides, here by the assert.
    unsafe { transpose((tile.as_ptr().cast(), TILE_WIDTH / 2), (to.as_mut_ptr().cast(), PANEL)) };
    true
}

/// From [input pairs, outputs, 2] to [output pairs, inputs, 2], 32 of each, if the processor has such vectors.
pub(super) fn transpose_pairs(from: &[u16; PANEL * PANEL], to: &mut [u16; PANEL * PANEL]) -> bool {
    if !has_avx512() {
        return false;
    }
    // SAFETY: the instructions are there.
    unsafe { each_transposed_pair(from, to) };
    true
}

#[target_feature(enable = "avx512f,avx512bw")]
fn each_transposed_pair(from: &[u16; PANEL * PANEL], to: &mut [u16; PANEL * PANEL]) {
    for outputs in [0, LANES] {
        // SAFETY: sixteen rows of sixteen pairs are there.
        let rows = unsafe { columns((from[2 * outputs..].as_ptr().cast(), PANEL)) };
        let (rows, to) = (rows.as_chunks::<2>().0, &mut to[outputs * PANEL..]);
        for ([even, odd], to) in rows.iter().zip(to.chunks_exact_mut(2 * PANEL)) {
            store_pair([_mm512_castps_si512(*even), _mm512_castps_si512(*odd)], to);
        }
    }
}

/// Where columns go: the first sixteen, and the others.
type Halves<'a> = [Option<&'a mut [u16; TILE]>; 2];

/// Writes 32 rows of 32 numbers as columns, as far as they are wanted; gives the places back if the processor has no such vectors.
pub(super) fn square_columns<'a>(rows: &[u16; 2 * TILE], to: Halves<'a>) -> Option<Halves<'a>> {
    if !has_avx512() {
        return Some(to);
    }
    // SAFETY: the instructions are there.
    unsafe { each_square_column(rows, to) };
    None
}

#[target_feature(enable = "avx512f,avx512bw")]
fn each_square_column(rows: &[u16; 2 * TILE], mut to: Halves) {
    // The even columns of both halves of the rows, and the odd ones; what comes from the second half is counted on.
    const ORDER: [[u16; PANEL]; 2] = {
        let mut order = [[0; PANEL]; 2];
        let mut index = 0;
        while index < 2 * PANEL {
            order[index / PANEL][index % PANEL] = (2 * (index % PANEL) + index / PANEL) as u16;
            index += 1;
        }
        order
    };
    // SAFETY: sixteen rows of sixteen pairs are there, twice.
    let (above, below) =
        unsafe { (columns((rows.as_ptr().cast(), LANES)), columns((rows[TILE..].as_ptr().cast(), LANES))) };
    for (pair, (above, below)) in above.iter().zip(&below).enumerate() {
        let (above, below) = (_mm512_castps_si512(*above), _mm512_castps_si512(*below));
        for (odd, order) in ORDER.iter().enumerate() {
            let column = 2 * pair + odd;
            let Some(to) = &mut to[column / TILE_ROWS] else { return };
            let to = &mut to[column % TILE_ROWS * TILE_WIDTH..][..TILE_WIDTH];
            // SAFETY: a vector holds 32 numbers, as many as an order and the place.
            unsafe {
                let values = _mm512_permutex2var_epi16(above, _mm512_loadu_epi16(order.as_ptr().cast()), below);
                _mm512_storeu_epi16(to.as_mut_ptr().cast(), values);
            }
        }
    }
}

/// Puts every two rows of 32 numbers side by side, if the processor has such vectors.
pub(super) fn pair_rows(rows: &[u16], to: &mut [u16]) -> bool {
    if !has_avx512() {
        return false;
    }
    // SAFETY: the instructions are there.
    unsafe { each_row_pair(rows, to) };
    true
}

#[target_feature(enable = "avx512f,avx512bw")]
fn each_row_pair(rows: &[u16], to: &mut [u16]) {
    for (pair, to) in rows.chunks_exact(2 * PANEL).zip(to.chunks_exact_mut(2 * PANEL)) {
        let pair = pair.as_ptr().cast::<i16>();
        // SAFETY: a vector holds 32 numbers, as many as there are in a row.
        store_pair(unsafe { [_mm512_loadu_epi16(pair), _mm512_loadu_epi16(pair.add(PANEL))] }, to);
    }
}

/// Writes two rows of 32 numbers side by side.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn store_pair([even, odd]: [__m512i; 2], to: &mut [u16]) {
    // The first and the second half of two rows; what comes from the second row is counted on.
    const ORDER: [[u16; PANEL]; 2] = {
        let mut order = [[0; PANEL]; 2];
        let mut index = 0;
        while index < 2 * PANEL {
            order[index / PANEL][index % PANEL] = (index / 2 + index % 2 * PANEL) as u16;
            index += 1;
        }
        order
    };
    assert!(to.len() == 2 * PANEL, "as many numbers as two rows have");
    for (half, order) in ORDER.iter().enumerate() {
        // SAFETY: a vector holds 32 numbers, as many as an order has, and by the assert each half of the place.
        unsafe {
            let values = _mm512_permutex2var_epi16(even, _mm512_loadu_epi16(order.as_ptr().cast()), odd);
            _mm512_storeu_epi16(to.as_mut_ptr().add(half * PANEL).cast(), values);
        }
    }
}
