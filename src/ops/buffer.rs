//! Memory for activations that is used again: fresh pages cost more than the arithmetic on them.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// What a buffer may hold.
pub trait Pooled: Copy + Default + Send + Sync + 'static {
    /// The buffers of this type that nobody uses.
    fn unused() -> &'static Mutex<Vec<Vec<Self>>>;

    /// Small ones that were last used by this thread, by the logarithm of their length.
    fn at_hand<R>(f: impl FnOnce(&mut [Vec<Vec<Self>>; CLASSES]) -> R) -> R;
}

macro_rules! pooled {
    ($($kind:ty)*) => {$(
        impl Pooled for $kind {
            fn unused() -> &'static Mutex<Vec<Vec<Self>>> {
                static UNUSED: Mutex<Vec<Vec<$kind>>> = Mutex::new(Vec::new());
                &UNUSED
            }

            fn at_hand<R>(f: impl FnOnce(&mut [Vec<Vec<Self>>; CLASSES]) -> R) -> R {
                thread_local! {
                    static AT_HAND: RefCell<[Vec<Vec<$kind>>; CLASSES]> = const { RefCell::new([const { Vec::new() }; CLASSES]) };
                }
                AT_HAND.with_borrow_mut(f)
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

/// Buffers of so many numbers or fewer stay with the thread that used them last.
const SMALL: usize = 1 << (CLASSES - 1);
/// Powers of two that lengths of small buffers are rounded up to.
const CLASSES: usize = 14;
/// Small buffers of one length that a thread keeps.
const KEPT: usize = 16;

impl<T: Pooled> Buffer<T> {
    /// Room for `len` numbers. What they are is left over from earlier uses: whoever takes a buffer writes all of it.
    pub fn new(len: usize) -> Self {
        if len <= SMALL {
            let class = len.next_power_of_two().ilog2() as usize;
            let found = T::at_hand(|at_hand| at_hand[class].pop());
            return Self { values: found.unwrap_or_else(|| vec![T::default(); 1 << class]), len };
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
        if values.len() > SMALL {
            T::unused().lock().expect("nothing panics while it holds the pool").push(values);
        } else if !values.is_empty() {
            let keep = |at_hand: &mut [Vec<Vec<T>>; CLASSES]| {
                let of_length = &mut at_hand[values.len().ilog2() as usize];
                if of_length.len() < KEPT {
                    of_length.push(values);
                }
            };
            T::at_hand(keep);
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
