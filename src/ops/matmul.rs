//! The one matrix product that every operation calls, over plain f32 slices.
//!
//! Today it is the `gemm` crate (AVX-512 where the processor has it). Kernels of our own (AMX, AVX-512 bf16) belong in
//! this file, behind [`matmul`]. One of the kernel files: the unsafe code is the call into the kernel.

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

/// Whether a product may use all threads; work that is already spread over them says no.
#[derive(Clone, Copy, PartialEq)]
pub enum Threads {
    /// One thread: the caller runs many products in parallel.
    One,
    /// Every thread of the pool.
    All,
}

/// `c = keep · c + scale · a · b`, where `c` is row-major with rows `c_stride` values apart. `keep` 0 ignores what `c` holds.
///
/// # Panics
/// If the shapes disagree: a mistake of the calling operation, never of its input.
pub fn matmul(c: &mut [f32], c_stride: usize, keep: f32, scale: f32, a: Matrix, b: Matrix, threads: Threads) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner dimensions differ");
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= c_stride || m == 1, "rows of the product overlap");
    assert!((m - 1) * c_stride + n <= c.len(), "product out of bounds");
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: `Matrix` and the asserts above keep every element that the kernel touches (rows × columns at the given
    // strides) inside the three slices; `c` is borrowed mutably, so it overlaps neither `a` nor `b`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_stride as isize,
            keep != 0.0,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            keep,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `a · b` as a new row-major matrix.
pub fn product(a: Matrix, b: Matrix) -> Vec<f32> {
    let mut c = vec![0.0; a.rows * b.columns];
    matmul(&mut c, b.columns, 0.0, 1.0, a, b, Threads::All);
    c
}
