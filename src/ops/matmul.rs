//! Products of plain f32 matrices: attention, adapters, gradients of adapters. The frozen weights have [`super::panels`].
//!
//! One of the kernel files: the unsafe code is the call into the kernel, in vectors of 16 where the processor has them, else
//! the `gemm` crate.

#[cfg(target_arch = "x86_64")]
use super::kernel::has_avx512;

/// A matrix of `rows` × `columns` seen in a slice: element (i, j) is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix whose rows are `row_stride` values apart (at least `columns`).
    ///
    /// # Panics
    /// If the slice is too short for the last element: a mistake of the calling operation, never of its input.
    pub fn new(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(columns <= row_stride || rows <= 1, "rows overlap");
        assert!(rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= data.len(), "matrix out of bounds");
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// A row-major matrix that fills its slice.
    pub fn dense(data: &'a [f32], columns: usize) -> Self {
        Self::new(data, data.len() / columns, columns, columns)
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// `c = a · b`, or `c += a · b` if `keep` is set, where `c` is row-major with rows `c_stride` values apart. On one thread:
/// callers run many products in parallel. Each number is summed up in the order of k, starting from what `c` holds.
///
/// # Panics
/// If the shapes disagree: a mistake of the calling operation, never of its input.
pub fn matmul(c: &mut [f32], c_stride: usize, keep: bool, a: Matrix, b: Matrix) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner dimensions differ");
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= c_stride || m == 1, "rows of the product overlap");
    assert!((m - 1) * c_stride + n <= c.len(), "product out of bounds");
    // SAFETY: by the asserts, the product's rows and columns are inside `c`, which is borrowed mutably.
    unsafe { matmul_at((c.as_mut_ptr(), c_stride), keep, a, b) };
}

/// As [`matmul`], into rows that lie `c_stride` values apart from `c` on.
///
/// # Safety
/// The rows and columns of the product must be there, belong to the caller, and overlap neither `a` nor `b`.
pub(super) unsafe fn matmul_at((c, c_stride): (*mut f32, usize), keep: bool, a: Matrix, b: Matrix) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    if k == 0 {
        // A product of nothing is zero; kernels need not know.
        for row in (0..m).filter(|_| !keep) {
            // SAFETY: the caller's.
            unsafe { std::slice::from_raw_parts_mut(c.add(row * c_stride), n) }.fill(0.0);
        }
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if b.column_stride == 1 && has_avx512() {
        let operands = super::avx512::Operands {
            a: a.data.as_ptr(),
            a_row: a.row_stride,
            a_k: a.column_stride,
            b: b.data.as_ptr(),
            b_k: b.row_stride,
            c,
            c_row: c_stride,
            k,
            keep,
        };
        // SAFETY: AVX-512 is there; `Matrix` keeps every element of `a` and `b` inside their slices, the caller those of `c`.
        unsafe { super::avx512::product(operands, m, n) };
        return;
    }
    // SAFETY: as above.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            c_stride as isize,
            keep,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
