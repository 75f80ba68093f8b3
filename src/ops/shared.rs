//! Rows that several threads write at once, each its own columns or rows. One of the kernel files.

use std::marker::PhantomData;
use std::ops::Range;

/// A row-major matrix whose parts are written by different threads.
pub struct SharedRows<'a> {
    start: *mut f32,
    len: usize,
    stride: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a mutable borrow of numbers; whoever takes parts of it promises that no two overlap.
unsafe impl Sync for SharedRows<'_> {}
// SAFETY: as above.
unsafe impl Send for SharedRows<'_> {}

impl<'a> SharedRows<'a> {
    /// Shares a matrix whose rows are `stride` values apart.
    pub fn new(values: &'a mut [f32], stride: usize) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), stride, borrowed: PhantomData }
    }

    /// Some columns of a row.
    ///
    /// # Safety
    /// While the part lives, no other part may overlap it.
    ///
    /// # Panics
    /// If it is outside the matrix.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, row: usize, columns: Range<usize>) -> &mut [f32] {
        let start = row * self.stride + columns.start;
        assert!(columns.start <= columns.end && start + columns.len() <= self.len, "part out of bounds");
        // SAFETY: inside the borrowed slice by the assert; disjoint from every other part by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), columns.len()) }
    }
}
