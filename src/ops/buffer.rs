//! Memory for activations that is used again: fresh pages cost more than the arithmetic on them.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard};
use std::thread::LocalKey;

/// What a buffer may hold.
pub trait Pooled: Copy + Default + Send + Sync + 'static {
    /// The memory of this type.
    fn pool() -> &'static Mutex<Pool<Self>>;
    /// Small memory that this thread has used, from the longest unused on.
    fn small() -> &'static LocalKey<RefCell<Vec<Vec<Self>>>>;
}

macro_rules! pooled {
    ($($kind:ty)*) => {$(
        impl Pooled for $kind {
            fn pool() -> &'static Mutex<Pool<Self>> {
                static POOL: Mutex<Pool<$kind>> = Mutex::new(Pool::EMPTY);
                &POOL
            }

            fn small() -> &'static LocalKey<RefCell<Vec<Vec<Self>>>> {
                thread_local! {
                    static SMALL: RefCell<Vec<Vec<$kind>>> = const { RefCell::new(Vec::new()) };
                }
                &SMALL
            }
        }
    )*};
}

pooled!(f32 u16 i8);

/// What is held may be more by one part in so many than was ever used at once.
pub const SPARE: usize = 8;

/// Memory of one type that was asked for once.
pub struct Pool<T> {
    /// What nobody uses, from the longest unused on.
    unused: Vec<Vec<T>>,
    /// Numbers in all of it, in what is used, and the most that ever were used at once.
    held: usize,
    used: usize,
    most: usize,
}

impl<T: Pooled> Pool<T> {
    /// Nothing yet.
    pub const EMPTY: Self = Self { unused: Vec::new(), held: 0, used: 0, most: 0 };

    /// Room for so many numbers: what was used last of the smallest that have it and are not much larger, or new memory.
    pub fn take(&mut self, room: usize) -> Vec<T> {
        // From the last one back: mostly it is one of the first that are looked at, and has this very size.
        let mut best: Option<usize> = None;
        for (index, values) in self.unused.iter().enumerate().rev().filter(|(_, values)| fits(values, room)) {
            if best.is_none_or(|best| values.len() < self.unused[best].len()) {
                best = Some(index);
            }
            if values.len() == room {
                break;
            }
        }
        let values = match best {
            Some(index) => self.unused.remove(index),
            None => self.add(room),
        };
        self.used += values.len();
        self.most = self.most.max(self.used);
        values
    }

    /// New memory. What is held may be a little more than was ever used at once: beyond that the longest unused goes, or every change
    /// of sizes would add to it.
    fn add(&mut self, room: usize) -> Vec<T> {
        let most = self.most.max(self.used + room);
        while self.held + room > most + most / SPARE && !self.unused.is_empty() {
            self.held -= self.unused.remove(0).len();
        }
        self.held += room;
        vec![T::default(); room]
    }

    /// Takes back what was taken.
    pub fn give(&mut self, values: Vec<T>) {
        self.used -= values.len();
        self.unused.push(values);
    }

    /// Numbers in all memory, used or not.
    pub fn held(&self) -> usize {
        self.held
    }
}

fn lock<T: Pooled>() -> MutexGuard<'static, Pool<T>> {
    T::pool().lock().expect("nothing panics while it holds the pool")
}

/// Numbers whose memory goes back to the pool when they are dropped.
pub struct Buffer<T: Pooled = f32> {
    /// At least as many as are used: what is written once stays written.
    values: Vec<T>,
    /// The first number that is used.
    start: usize,
    len: usize,
}

/// A line of the cache, in bytes: what buffers and weights start with. A vector or a row of a tile that lies across two lines takes
/// twice as long to read, and allocators promise no more than 16 bytes.
pub(super) const LINE: usize = 64;
/// Memory of fewer numbers stays with the thread that gives it back, so many pieces of it: a block of attention takes some every few
/// microseconds.
const SMALL: usize = 8 * 1024;
const PIECES: usize = 32;

impl<T: Pooled> Buffer<T> {
    /// Room for `len` numbers. What they are is left over from earlier uses: whoever takes a buffer writes all of it.
    pub fn new(len: usize) -> Self {
        let room = len + LINE / size_of::<T>();
        let values: Vec<T> = if room < SMALL { take_small(room) } else { lock().take(room) };
        let start = values.as_ptr().align_offset(LINE);
        Self { values, start, len }
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::new(len);
        buffer.fill(T::default());
        buffer
    }

    /// Leaves the first `len` numbers.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl<T: Pooled> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values[self.start..self.start + self.len]
    }
}

impl<T: Pooled> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[self.start..self.start + self.len]
    }
}

impl<T: Pooled> Drop for Buffer<T> {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        if values.len() >= SMALL {
            lock().give(values);
        } else {
            give_small(values);
        }
    }
}

/// Whether memory may serve for so many numbers.
fn fits<T>(values: &[T], room: usize) -> bool {
    values.len() >= room && values.len() / 2 <= room
}

fn take_small<T: Pooled>(room: usize) -> Vec<T> {
    let used = T::small().with_borrow_mut(|small| {
        let last = small.iter().rposition(|values| fits(values, room))?;
        Some(small.remove(last))
    });
    used.unwrap_or_else(|| vec![T::default(); room.next_power_of_two().min(SMALL - 1)])
}

fn give_small<T: Pooled>(values: Vec<T>) {
    // While the thread ends there may be no place for it any more.
    let _ = T::small().try_with(|small| {
        let mut small = small.borrow_mut();
        if small.len() == PIECES {
            small.remove(0);
        }
        small.push(values);
    });
}

/// The same values again.
pub fn copy<T: Pooled>(values: &[T]) -> Buffer<T> {
    let mut copy = Buffer::new(values.len());
    copy.copy_from_slice(values);
    copy
}
