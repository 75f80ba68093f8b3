//! Products in vectors of sixteen f32. One of the kernel files.
//!
//! Every number of a product is one chain of fused multiply-adds along k, in order, however many rows are computed together:
//! a row's numbers do not depend on its neighbors.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::{
    __m512, __m512bh, __mmask16, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps,
    _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::mem::transmute;

/// Numbers in a vector.
const LANES: usize = 16;

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
/// AVX-512F must be there, and every element of the operands, at the given strides, must be inside its slice.
#[target_feature(enable = "avx512f")]
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

#[target_feature(enable = "avx512f")]
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

#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn tile<const ROWS: usize, const VECTORS: usize>(operands: Operands, columns: usize) {
    let Operands { a, a_row, a_k, b, b_k, c, c_row, k, keep } = operands;
    let full = columns == VECTORS * LANES;
    // SAFETY: the caller's; lanes outside the columns are masked.
    unsafe {
        let load = |at: *const f32, vector: usize| -> __m512 {
            let at = at.add(vector * LANES);
            if full { _mm512_loadu_ps(at) } else { _mm512_maskz_loadu_ps(lanes(columns, vector), at) }
        };
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        if keep {
            for row in 0..ROWS {
                for vector in 0..VECTORS {
                    sums[row][vector] = load(c.add(row * c_row), vector);
                }
            }
        }
        for step in 0..k {
            let mut columns = [_mm512_setzero_ps(); VECTORS];
            for vector in 0..VECTORS {
                columns[vector] = load(b.add(step * b_k), vector);
            }
            for row in 0..ROWS {
                let x = _mm512_set1_ps(*a.add(row * a_row + step * a_k));
                for vector in 0..VECTORS {
                    sums[row][vector] = _mm512_fmadd_ps(x, columns[vector], sums[row][vector]);
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

/// `c = a · b` (or `+=`) for up to 12 rows of bf16, and `b` of pairs of k [pairs, 32, 2]; `c` has as many rows of 32 in f32.
/// Rows of `a` and `c` are so many values apart as stands beside them.
///
/// # Safety
/// AVX-512-BF16 must be there, and the operands must reach as far as these shapes say.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn bf16_block(
    a: (*const u16, usize),
    b: *const u16,
    pairs: usize,
    c: (*mut f32, usize),
    rows: usize,
    keep: bool,
) {
    macro_rules! rows {
        ($($rows:literal)*) => {
            match rows {
                // SAFETY: the caller's.
                $($rows => unsafe { bf16_tile::<$rows>(a, b, pairs, c, keep) },)*
                _ => unreachable!("blocks have up to 12 rows"),
            }
        };
    }
    rows!(1 2 3 4 5 6 7 8 9 10 11 12)
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
unsafe fn bf16_tile<const ROWS: usize>(
    (a, a_row): (*const u16, usize),
    b: *const u16,
    pairs: usize,
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
        for pair in 0..pairs {
            let columns = |vector: usize| -> __m512bh {
                transmute(_mm512_loadu_ps(b.add(pair * 64 + vector * 32).cast::<f32>()))
            };
            let (first, second) = (columns(0), columns(1));
            for row in 0..ROWS {
                let x = a.add(row * a_row + 2 * pair).cast::<i32>().read_unaligned();
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
