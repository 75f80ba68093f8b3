//! Products in vectors of sixteen f32. One of the kernel files.
//!
//! Every number of a product is one chain of fused multiply-adds along k, in order, however many rows are computed together:
//! a row's numbers do not depend on its neighbors.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::{
    __m512, __m512bh, __mmask16, _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm256_loadu_epi16, _mm512_add_ps,
    _mm512_castsi512_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_dpbf16_ps,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
};
use std::mem::transmute;

use super::LANES;
use super::left::{TILE, TILE_WIDTH};
use super::panels::GROUP;

/// Sixteen numbers, those outside the mask zero.
///
/// # Safety
/// AVX-512 must be there, and the numbers inside the mask.
#[inline(always)]
unsafe fn load(at: *const f32, mask: __mmask16) -> __m512 {
    // SAFETY: the caller's; what is masked is not read.
    unsafe { if mask == !0 { _mm512_loadu_ps(at) } else { _mm512_maskz_loadu_ps(mask, at) } }
}

/// Sixteen numbers in bf16.
///
/// # Safety
/// As [`load`].
#[inline(always)]
unsafe fn load_bf16(at: *const u16) -> __m512 {
    // SAFETY: the caller's.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_epi16(at.cast())))) }
}

/// Where the operands of a product lie; strides in numbers.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub a: *const f32,
    pub a_row: usize,
    pub a_k: usize,
    pub b: *const f32,
    /// Columns of b are neighbors.
    pub b_k: usize,
    pub c: *mut f32,
    pub c_row: usize,
    pub k: usize,
    /// Whether the product is added to what c holds.
    pub keep: bool,
}

impl Operands {
    fn at(self, row: usize, column: usize) -> Self {
        // SAFETY: only rows and columns of the product are asked for, which lie inside the operands.
        unsafe {
            Self {
                a: self.a.add(row * self.a_row),
                b: self.b.add(column),
                c: self.c.add(row * self.c_row + column),
                ..self
            }
        }
    }
}

/// `c = a · b` (or `+=`), [m, n].
///
/// # Safety
/// AVX-512 (F, BW and VL) must be there, and every element of the operands, at the given strides, must be inside its slice.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn product(operands: Operands, m: usize, n: usize) {
    let mut column = 0;
    while column < n {
        let left = n - column;
        let (vectors, most) = if left > 2 * LANES { (4, 6) } else { (left.div_ceil(LANES), 12) };
        let columns = left.min(vectors * LANES);
        let mut row = 0;
        while row < m {
            let rows = (m - row).min(most);
            // SAFETY: the caller's; these rows and columns are inside the product.
            unsafe { block(operands.at(row, column), rows, vectors, columns) };
            row += rows;
        }
        column += columns;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn block(operands: Operands, rows: usize, vectors: usize, columns: usize) {
    macro_rules! rows {
        ($vectors:literal: $($rows:literal)*) => {
            match rows {
                // SAFETY: the caller's.
                $($rows => unsafe { tile::<$rows, $vectors>(operands, columns) },)*
                _ => unreachable!("blocks have these numbers of rows"),
            }
        };
    }
    match vectors {
        1 => rows!(1: 1 2 3 4 5 6 7 8 9 10 11 12),
        2 => rows!(2: 1 2 3 4 5 6 7 8 9 10 11 12),
        _ => rows!(4: 1 2 3 4 5 6),
    }
}

/// Which lanes of vector number `vector` are among the first `columns`.
#[inline(always)]
fn lanes(columns: usize, vector: usize) -> __mmask16 {
    let count = columns.saturating_sub(vector * LANES).min(LANES);
    (((1u32 << count) - 1) & 0xffff) as __mmask16
}

#[expect(clippy::needless_range_loop, reason = "they are the numbers of rows and vectors in memory too")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn tile<const ROWS: usize, const VECTORS: usize>(operands: Operands, columns: usize) {
    let Operands { a, a_row, a_k, b, b_k, c, c_row, k, keep } = operands;
    let full = columns == VECTORS * LANES;
    // SAFETY: the caller's; lanes outside the columns are masked.
    unsafe {
        let mask = |vector: usize| if full { !0 } else { lanes(columns, vector) };
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        if keep {
            for row in 0..ROWS {
                for vector in 0..VECTORS {
                    sums[row][vector] = load(c.add(row * c_row + vector * LANES), mask(vector));
                }
            }
        }
        for step in 0..k {
            let mut line = [_mm512_setzero_ps(); VECTORS];
            for vector in 0..VECTORS {
                line[vector] = load(b.add(step * b_k + vector * LANES), mask(vector));
            }
            for row in 0..ROWS {
                let x = _mm512_set1_ps(*a.add(row * a_row + step * a_k));
                for vector in 0..VECTORS {
                    sums[row][vector] = _mm512_fmadd_ps(x, line[vector], sums[row][vector]);
                }
            }
        }
        for row in 0..ROWS {
            for vector in 0..VECTORS {
                let at = c.add(row * c_row + vector * LANES);
                if full {
                    _mm512_storeu_ps(at, sums[row][vector]);
                } else {
                    _mm512_mask_storeu_ps(at, lanes(columns, vector), sums[row][vector]);
                }
            }
        }
    }
}

/// Calls a function that is generic in the number of rows.
macro_rules! by_rows {
    ($rows:ident: $($count:literal)* => $function:ident $arguments:tt) => {
        match $rows {
            // SAFETY: the caller's.
            $($count => unsafe { $function::<$count> $arguments },)*
            _ => unreachable!("blocks have these numbers of rows"),
        }
    };
}

/// `c = a · b` (or `+=`) for up to 8 rows of bf16 in tiles, so many along k, and `b` of pairs of k [steps · 16, 32, 2]; `c` has as
/// many rows of 32 in f32, which are so many values apart as stands beside it.
///
/// # Safety
/// AVX-512-BF16 must be there, and the operands must reach as far as these shapes say.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn bf16_block(
    a: *const u16,
    b: *const u16,
    steps: usize,
    c: (*mut f32, usize),
    rows: usize,
    keep: bool,
) {
    by_rows!(rows: 1 2 3 4 5 6 7 8 => bf16_tile(a, b, steps, c, keep))
}

#[expect(clippy::needless_range_loop, reason = "they are the numbers of rows and vectors in memory too")]
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
unsafe fn bf16_tile<const ROWS: usize>(
    a: *const u16,
    b: *const u16,
    steps: usize,
    (c, c_row): (*mut f32, usize),
    keep: bool,
) {
    // SAFETY: the caller's; vectors of 32 bf16 and of 16 pairs have the same size.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        if keep {
            for row in 0..ROWS {
                sums[row] = [_mm512_loadu_ps(c.add(row * c_row)), _mm512_loadu_ps(c.add(row * c_row + LANES))];
            }
        }
        for pair in 0..steps * TILE_WIDTH / 2 {
            let columns = |vector: usize| -> __m512bh {
                transmute(_mm512_loadu_ps(b.add(pair * 64 + vector * 32).cast::<f32>()))
            };
            let (first, second) = (columns(0), columns(1));
            let a = a.add(pair / (TILE_WIDTH / 2) * TILE + 2 * (pair % (TILE_WIDTH / 2)));
            for row in 0..ROWS {
                let x = a.add(row * TILE_WIDTH).cast::<i32>().read_unaligned();
                let x: __m512bh = transmute(_mm512_set1_epi32(x));
                sums[row][0] = _mm512_dpbf16_ps(sums[row][0], x, first);
                sums[row][1] = _mm512_dpbf16_ps(sums[row][1], x, second);
            }
        }
        for row in 0..ROWS {
            _mm512_storeu_ps(c.add(row * c_row), sums[row][0]);
            _mm512_storeu_ps(c.add(row * c_row + LANES), sums[row][1]);
        }
    }
}

/// `c = x · w` (or `+=`) for up to 4 rows of f32, and a panel of weights in 8 bits [narrow, 32] with scales in bf16 [narrow / 32,
/// 32]; `c` has as many rows of 32. Rows of `x` and `c` are so many values apart as stands beside them, those of `x` dense.
///
/// # Safety
/// AVX-512 must be there, and the operands must reach as far as these shapes say.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn int8_block(
    x: (*const f32, usize),
    w: (*const i8, *const u16),
    c: (*mut f32, usize),
    rows: usize,
    keep: bool,
) {
    by_rows!(rows: 1 2 3 4 => int8_tile(x, w, c, keep))
}

/// How far ahead weights are fetched, in bytes.
const AHEAD: usize = 2048;

#[expect(clippy::needless_range_loop, reason = "they are the numbers of rows and vectors in memory too")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn int8_tile<const ROWS: usize>(
    (x, narrow): (*const f32, usize),
    (w, scales): (*const i8, *const u16),
    (c, c_row): (*mut f32, usize),
    keep: bool,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        if keep {
            for row in 0..ROWS {
                sums[row] = [_mm512_loadu_ps(c.add(row * c_row)), _mm512_loadu_ps(c.add(row * c_row + LANES))];
            }
        }
        for start in (0..narrow).step_by(GROUP) {
            // Two strands of each sum, or one addition would wait for the other. They are named by constants, or they would not be
            // kept in registers.
            let (mut strands, end) = ([[[_mm512_setzero_ps(); 2]; 2]; ROWS], narrow.min(start + GROUP));
            for pair in (start..end).step_by(2) {
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(pair * 2 * LANES + AHEAD));
                for strand in 0..2 {
                    let k = pair + strand;
                    for vector in 0..2 {
                        let eight = _mm_loadu_si128(w.add(k * 2 * LANES + vector * LANES).cast());
                        let line = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(eight));
                        for row in 0..ROWS {
                            // After the last input the panel goes on, with zeros.
                            let x = if k < end { *x.add(row * narrow + k) } else { 0.0 };
                            let strand = &mut strands[row][strand][vector];
                            *strand = _mm512_fmadd_ps(_mm512_set1_ps(x), line, *strand);
                        }
                    }
                }
            }
            for vector in 0..2 {
                let scale = load_bf16(scales.add(start / GROUP * 2 * LANES + vector * LANES));
                for row in 0..ROWS {
                    let [even, odd] = [strands[row][0][vector], strands[row][1][vector]];
                    sums[row][vector] = _mm512_fmadd_ps(_mm512_add_ps(even, odd), scale, sums[row][vector]);
                }
            }
        }
        for row in 0..ROWS {
            _mm512_storeu_ps(c.add(row * c_row), sums[row][0]);
            _mm512_storeu_ps(c.add(row * c_row + LANES), sums[row][1]);
        }
    }
}
