//! Rows that several threads write at once, each its own columns or rows. One of the kernel files.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::amx::SIDE;
use super::buffer::LINE;
use super::left::TILE_ROWS;
use super::rounded::{Numbers, RoundedRowsMut};

/// A row-major matrix whose parts are written by different threads.
pub struct SharedRows<'a, T = f32> {
    start: *mut T,
    len: usize,
    stride: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a mutable borrow of numbers; whoever takes parts of it promises that no two overlap.
unsafe impl<T: Send> Sync for SharedRows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedRows<'_, T> {}

impl<'a, T> SharedRows<'a, T> {
    /// Shares a matrix whose rows are `stride` values apart.
    pub fn new(values: &'a mut [T], stride: usize) -> Self {
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
    pub unsafe fn part(&self, row: usize, columns: Range<usize>) -> &mut [T] {
        let start = row * self.stride + columns.start;
        assert!(columns.start <= columns.end && start + columns.len() <= self.len, "part out of bounds");
        // SAFETY: inside the borrowed slice by the assert; disjoint from every other part by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), columns.len()) }
    }
}

impl<T> SharedRows<'_, T> {
    /// Asks for memory that will be written at once: where many far places are, one waits for all of them together.
    #[inline]
    pub fn fetch(&self, row: usize, column: usize) {
        fetch(self.start.wrapping_add(row * self.stride + column));
    }
}

/// Rows of either type that several threads write.
pub(super) type SharedRounded<'a> = Numbers<SharedRows<'a>, SharedRows<'a, u16>>;

impl<'a> SharedRounded<'a> {
    /// Shares a matrix of so many columns.
    pub fn new(rows: RoundedRowsMut<'a>, width: usize) -> Self {
        match rows {
            Numbers::F32(rows) => Self::F32(SharedRows::new(rows, width)),
            Numbers::Bf16(rows) => Self::Bf16(SharedRows::new(rows, width)),
        }
    }

    /// Some columns of a row.
    ///
    /// # Safety
    /// As [`SharedRows::part`].
    pub unsafe fn part(&self, row: usize, columns: Range<usize>) -> RoundedRowsMut<'_> {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::F32(rows) => Numbers::F32(rows.part(row, columns)),
                Self::Bf16(rows) => Numbers::Bf16(rows.part(row, columns)),
            }
        }
    }
}

impl SharedRows<'_> {
    /// Some columns of some rows.
    ///
    /// # Safety
    /// As [`SharedRows::part`].
    ///
    /// # Panics
    /// If they are outside the matrix.
    pub unsafe fn columns(&self, rows: Range<usize>, columns: Range<usize>) -> Columns<'_> {
        let start = rows.start * self.stride + columns.start;
        let inside = rows.is_empty() || (rows.end - 1) * self.stride + columns.end <= self.len;
        assert!(columns.end <= self.stride && inside, "columns out of bounds");
        // SAFETY: inside the borrowed slice by the assert.
        let start = unsafe { self.start.add(start) };
        Columns { start, rows: rows.len(), width: columns.len(), stride: self.stride, borrowed: PhantomData }
    }
}

/// Up to 32 columns of some rows of a matrix, which belong to one thread.
pub struct Columns<'a> {
    start: *mut f32,
    rows: usize,
    width: usize,
    stride: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

/// Asks for a line of memory that will be written at once.
#[inline(always)]
fn fetch<T>(line: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        // SAFETY: an address of which nothing is read.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(line.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Asks for some values that will be read soon: the processor looks ahead less far than rows are long.
#[inline(always)]
pub fn fetch_ahead<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(LINE / size_of::<T>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: an address of which nothing is read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}

impl<'a> Columns<'a> {
    /// The first columns of a matrix of `rows` rows, `stride` values apart, all of which are ours.
    ///
    /// # Panics
    /// If they are outside the matrix.
    pub fn first(values: &'a mut [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || (rows - 1) * stride + columns <= values.len() && columns <= stride,
            "columns out of bounds"
        );
        Self { start: values.as_mut_ptr(), rows, width: columns, stride, borrowed: PhantomData }
    }
}

impl Columns<'_> {
    /// How many rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Calls `f` with a place for these rows of 32 columns, and the distance between them: where they lie if they are all
    /// there, else a copy, which is written back as far as they are. What it holds before matters only if `keep` is set.
    ///
    /// # Safety
    /// `f` must write all rows of the place, and read none of it before unless `keep` is set.
    pub unsafe fn whole(&mut self, rows: Range<usize>, keep: bool, f: impl FnOnce((*mut f32, usize))) {
        if rows.end <= self.rows && self.width == SIDE {
            // SAFETY: these rows are inside the columns.
            return f((unsafe { self.start.add(rows.start * self.stride) }, self.stride));
        }
        // Zeros are needed only beside what is kept: otherwise all rows of the copy are written before they are read.
        let mut copy = [const { MaybeUninit::<f32>::uninit() }; SIDE * SIDE];
        let there = rows.start..rows.end.min(self.rows);
        let row = |row: usize| {
            // SAFETY: `row` is one of ours, and its columns are inside the matrix and ours alone.
            unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.width) }
        };
        assert!(rows.len() <= SIDE, "as many rows as the copy has");
        if keep {
            copy.fill(MaybeUninit::new(0.0));
            for (at, to) in there.clone().zip(copy.chunks_exact_mut(SIDE)) {
                to.iter_mut().zip(row(at)).for_each(|(to, from)| *to = MaybeUninit::new(*from));
            }
        }
        f((copy.as_mut_ptr().cast(), SIDE));
        for (at, from) in there.zip(copy.chunks_exact(SIDE)) {
            // SAFETY: `f` was given a place for these rows, and has written them.
            row(at).iter_mut().zip(from).for_each(|(to, from)| *to = unsafe { from.assume_init() });
        }
    }

    /// How many rows from this one on have a place in [`Columns::whole`] at once, in whole tiles.
    pub(super) fn stretch(&self, row: usize) -> usize {
        match (self.rows - row) / TILE_ROWS * TILE_ROWS {
            there if there > 0 && self.width == SIDE => there,
            _ => (self.rows - row).next_multiple_of(TILE_ROWS).min(SIDE),
        }
    }

    /// Asks for the memory of some rows, as far as they are there, that will be written at once: tiles that are stored where nothing
    /// is in the cache wait for it.
    #[inline]
    pub fn fetch(&self, rows: Range<usize>) {
        for row in rows.start..rows.end.min(self.rows) {
            for column in (0..self.width).step_by(LINE / size_of::<f32>()) {
                fetch(self.start.wrapping_add(row * self.stride + column));
            }
        }
    }

    /// Adds dense rows of as many columns.
    pub fn add(&mut self, values: &[f32]) {
        for (row, values) in (0..self.rows).zip(values.chunks_exact(self.width)) {
            // SAFETY: `row` is one of ours, and its columns are inside the matrix and ours alone.
            let row = unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.width) };
            row.iter_mut().zip(values).for_each(|(to, value)| *to += value);
        }
    }

    /// Where the columns lie, for a product in f32: the first number, and the distance between rows.
    pub fn place(&mut self) -> (*mut f32, usize) {
        (self.start, self.stride)
    }

    /// Memory from the first row to the last, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.rows * self.stride * size_of::<f32>()
    }

    /// How many columns.
    pub fn width(&self) -> usize {
        self.width
    }
}
