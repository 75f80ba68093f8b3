//! Rows that products read, in the type of their kernel: one that rounds them anyway leaves half as much to be written and read if that
//! is done when they are made.

use std::ops::Range;

use super::buffer::{Buffer, Pooled};
use super::kernel::Kernel;
use super::left::{to_bf16, to_f32};
use super::vectorized;

/// Numbers in one of the two types that products read.
#[derive(Clone, Copy)]
pub enum Numbers<F, B> {
    /// As they were computed.
    F32(F),
    /// Rounded.
    Bf16(B),
}

/// Numbers in memory of their own.
pub type Rounded = Numbers<Buffer, Buffer<u16>>;
/// Rows among others' memory.
pub type RoundedRows<'a> = Numbers<&'a [f32], &'a [u16]>;
/// Rows that are to be written.
pub type RoundedRowsMut<'a> = Numbers<&'a mut [f32], &'a mut [u16]>;

impl Rounded {
    /// Room for so many numbers, which hold anything.
    pub fn new(len: usize, kernel: Kernel) -> Self {
        match kernel.rounds_inputs() {
            false => Self::F32(Buffer::new(len)),
            true => Self::Bf16(Buffer::new(len)),
        }
    }

    /// These numbers.
    pub fn of(values: &[f32], kernel: Kernel) -> Self {
        let mut rounded = Self::new(values.len(), kernel);
        rounded.rows_mut().write(values);
        rounded
    }

    /// All of them, to read.
    pub fn rows(&self) -> RoundedRows<'_> {
        match self {
            Self::F32(own) => Numbers::F32(own),
            Self::Bf16(own) => Numbers::Bf16(own),
        }
    }

    /// All of them, to write.
    pub fn rows_mut(&mut self) -> RoundedRowsMut<'_> {
        match self {
            Self::F32(own) => Numbers::F32(own),
            Self::Bf16(own) => Numbers::Bf16(own),
        }
    }

    /// What a number of a kernel takes, in bytes.
    pub fn bytes(kernel: Kernel) -> usize {
        if kernel.rounds_inputs() { size_of::<u16>() } else { size_of::<f32>() }
    }
}

impl<'a> RoundedRows<'a> {
    /// How many numbers.
    pub fn numbers(&self) -> usize {
        match self {
            Self::F32(rows) => rows.len(),
            Self::Bf16(rows) => rows.len(),
        }
    }

    /// Some of them.
    pub fn part(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(rows) => Self::F32(&rows[range]),
            Self::Bf16(rows) => Self::Bf16(&rows[range]),
        }
    }

    /// So many pieces of so many numbers, put together from others: those that begin at these places.
    pub(super) fn gather(self, (count, len): (usize, usize), starts: impl Iterator<Item = usize>) -> Rounded {
        fn gather<T: Pooled>(
            from: &[T],
            (count, len): (usize, usize),
            starts: impl Iterator<Item = usize>,
        ) -> Buffer<T> {
            let mut gathered = Buffer::new(count * len);
            for (to, start) in gathered.chunks_exact_mut(len).zip(starts) {
                to.copy_from_slice(&from[start..start + len]);
            }
            gathered
        }
        match self {
            Self::F32(rows) => Numbers::F32(gather(rows, (count, len), starts)),
            Self::Bf16(rows) => Numbers::Bf16(gather(rows, (count, len), starts)),
        }
    }

    /// In f32: as they are, or in `room` for as many.
    #[inline(always)]
    pub fn in_f32<'b>(self, room: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        match self {
            Self::F32(rows) => rows,
            Self::Bf16(rows) => {
                room.iter_mut().zip(rows).for_each(|(to, x)| *to = to_f32(*x));
                room
            }
        }
    }
}

impl RoundedRowsMut<'_> {
    /// Writes as many numbers.
    pub fn write(self, values: &[f32]) {
        match self {
            Self::F32(to) => to.copy_from_slice(values),
            Self::Bf16(to) => round(values, to),
        }
    }
}

/// The nearest numbers in bf16 to as many values.
pub(super) fn round(values: &[f32], to: &mut [u16]) {
    assert!(values.len() == to.len(), "as many numbers as values");
    #[cfg(target_arch = "x86_64")]
    if super::rearrange::round_all(values, to) {
        return;
    }
    vectorized(
        #[inline(always)]
        || to.iter_mut().zip(values).for_each(|(to, value)| *to = to_bf16(*value)),
    );
}
