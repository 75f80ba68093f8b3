//! Memory for activations that is used again: fresh pages cost more than the arithmetic on them.

use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// What a buffer may hold.
pub trait Pooled: Copy + Default + Send + Sync + 'static {
    /// The buffers of this type that nobody uses.
    fn unused() -> &'static Mutex<Vec<Vec<Self>>>;
}

macro_rules! pooled {
    ($($kind:ty)*) => {$(
        impl Pooled for $kind {
            fn unused() -> &'static Mutex<Vec<Vec<Self>>> {
                static UNUSED: Mutex<Vec<Vec<$kind>>> = Mutex::new(Vec::new());
                &UNUSED
            }
        }
    )*};
}

pooled!(f32 u16 i8);

/// Numbers whose memory goes back to the pool when they are dropped.
pub struct Buffer<T: Pooled = f32> {
    /// At least as many as are used: what is written once stays written.
    values: Vec<T>,
    len: usize,
}

/// Buffers of fewer numbers are left to the allocator, which is quick at that.
const SMALL: usize = 8 * 1024;

impl<T: Pooled> Buffer<T> {
    /// Room for `len` numbers. What they are is left over from earlier uses: whoever takes a buffer writes all of it.
    pub fn new(len: usize) -> Self {
        if len < SMALL {
            return Self { values: vec![T::default(); len], len };
        }
        let mut unused = T::unused().lock().expect("nothing panics while it holds the pool");
        let fits = |values: &&Vec<T>| values.len() >= len && values.len() / 2 <= len;
        let best = unused.iter().filter(fits).map(Vec::len).min();
        let found = best.and_then(|best| unused.iter().position(|values| values.len() == best));
        let found = found.map(|index| unused.swap_remove(index));
        drop(unused);
        Self { values: found.unwrap_or_else(|| vec![T::default(); len]), len }
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::new(len);
        buffer.fill(T::default());
        buffer
    }
}

impl<T: Pooled> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values[..self.len]
    }
}

impl<T: Pooled> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[..self.len]
    }
}

impl<T: Pooled> Drop for Buffer<T> {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        if values.len() >= SMALL {
            T::unused().lock().expect("nothing panics while it holds the pool").push(values);
        }
    }
}

/// The same values again.
pub fn copy<T: Pooled>(values: &[T]) -> Buffer<T> {
    let mut copy = Buffer::new(values.len());
    copy.copy_from_slice(values);
    copy
}

/// Gives the memory of all unused buffers back.
pub fn release() {
    f32::unused().lock().expect("nothing panics while it holds the pool").clear();
    u16::unused().lock().expect("nothing panics while it holds the pool").clear();
}
