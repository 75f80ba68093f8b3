//! Work on rows, spread over the threads: many rows in blocks of which each thread takes the next when it is done with one, few rows
//! all at once with the threads inside the products. A thread for which no block is left helps inside the products of the others.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam::utils::CachePadded;

use super::panels::{PANEL, Threads};
use super::rounded::{Numbers, RoundedRowsMut};

/// Rows of a block: what is computed from them stays in the second-level cache.
const BLOCK: usize = 256;
/// Rows that make it worth to give a thread a part of its own.
const PART: usize = 64;

/// What is written block by block: matrices.
pub trait Output: Send {
    /// The rows of a block.
    type Rows: Send;

    /// Takes the first rows off.
    fn take_rows(&mut self, rows: usize) -> Self::Rows;
}

/// All of a matrix, and its width.
impl<R: Rows> Output for (R, usize) {
    type Rows = R;

    fn take_rows(&mut self, rows: usize) -> R {
        self.0.take_numbers(rows * self.1)
    }
}

/// Nothing.
impl Output for () {
    type Rows = ();

    fn take_rows(&mut self, _: usize) {}
}

impl<O: Output, const N: usize> Output for [O; N] {
    type Rows = [O::Rows; N];

    fn take_rows(&mut self, rows: usize) -> Self::Rows {
        self.each_mut().map(|output| output.take_rows(rows))
    }
}

impl<A: Output, B: Output> Output for (A, B) {
    type Rows = (A::Rows, B::Rows);

    fn take_rows(&mut self, rows: usize) -> Self::Rows {
        (self.0.take_rows(rows), self.1.take_rows(rows))
    }
}

/// Numbers that are to be written.
pub trait Rows: Send {
    /// Takes the first numbers off.
    fn take_numbers(&mut self, numbers: usize) -> Self;
}

impl<T: Send> Rows for &mut [T] {
    fn take_numbers(&mut self, numbers: usize) -> Self {
        let (first, rest) = std::mem::take(self).split_at_mut(numbers);
        *self = rest;
        first
    }
}

impl Rows for RoundedRowsMut<'_> {
    fn take_numbers(&mut self, numbers: usize) -> Self {
        match self {
            Numbers::F32(rows) => Numbers::F32(rows.take_numbers(numbers)),
            Numbers::Bf16(rows) => Numbers::Bf16(rows.take_numbers(numbers)),
        }
    }
}

/// Calls `f(state, rows, outputs)` for all rows in blocks, with the blocks' rows of every output. Each block, or all of them
/// where the threads are inside the products, has a state of its own, made by `start`; they come back in the order of the rows. How
/// rows are cut depends on their number and on that of the threads alone.
pub fn in_blocks<O: Output, S: Send>(
    rows: usize,
    mut outputs: O,
    start: impl Fn() -> S + Sync,
    f: impl Fn(&mut S, Range<usize>, O::Rows) + Sync,
) -> Vec<S> {
    let threads = rayon::current_num_threads();
    if rows < PART * threads || threads == 1 {
        let mut state = start();
        for block in blocks(rows, BLOCK) {
            let outputs = outputs.take_rows(block.len());
            f(&mut state, block, outputs);
        }
        return vec![state];
    }
    // As many for each thread, should they be equally fast; whole tiles.
    let count = rows.div_ceil(BLOCK).next_multiple_of(threads);
    let size = rows.div_ceil(count).next_multiple_of(PANEL);
    let tasks = blocks(rows, size).map(|block| {
        let outputs = outputs.take_rows(block.len());
        Mutex::new((start(), Some((block, outputs))))
    });
    let tasks: Vec<Mutex<(S, Option<_>)>> = tasks.collect();
    in_turns(tasks.len(), Threads::All, |turns| {
        for number in turns {
            let (state, task) = &mut *tasks[number].lock().expect("nobody else has it");
            let (block, outputs) = task.take().expect("each is taken once");
            f(state, block, outputs);
        }
    });
    tasks.into_iter().map(|task| task.into_inner().expect("no thread panicked").0).collect()
}

/// Rows in blocks of so many.
fn blocks(rows: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(size).map(move |first| first..(first + size).min(rows))
}

/// Calls `f` so many times, each on a thread of its own. Where its parts are short, a thread that goes to sleep until
/// the others are done wakes up too late: this one stays awake.
fn in_parts(parts: usize, f: impl Fn() + Sync) {
    if parts <= 1 {
        return (0..parts).for_each(|_| f());
    }
    let unfinished = AtomicUsize::new(parts - 1);
    rayon::scope(|scope| {
        for _ in 1..parts {
            let (f, unfinished) = (&f, &unfinished);
            scope.spawn(move |_| {
                // Finished if `f` panics too; the scope passes it on.
                let _finished = OnReturn(|| {
                    unfinished.fetch_sub(1, Ordering::Release);
                });
                f();
            });
        }
        f();
        let waiting = Instant::now();
        while unfinished.load(Ordering::Acquire) > 0 && waiting.elapsed() < PATIENCE {
            if rayon::yield_now() != Some(rayon::Yield::Executed) {
                std::hint::spin_loop();
            }
        }
    });
}

/// Calls `f` on every thread, each with the numbers of its tasks as they come: first those of its own share, which lie together and are
/// the same each time, so that what they write is in its cache; then what others have left, for no two threads are equally fast
/// where others use the same cores.
pub fn in_turns(tasks: usize, threads: Threads, f: impl Fn(Turns) + Sync) {
    let parts = match threads {
        Threads::One => tasks.min(1),
        Threads::All => rayon::current_num_threads().min(tasks),
    };
    let shares: Vec<Share> =
        (0..parts).map(|part| Share::new(part * tasks / parts..(part + 1) * tasks / parts)).collect();
    in_parts(parts, || f(Turns { shares: &shares, own: rayon::current_thread_index().unwrap_or(0) % parts }));
}

/// Tasks that nobody has taken yet: the first in the upper half, the end in the lower. In a line of the cache of its own.
struct Share(CachePadded<AtomicU64>);

impl Share {
    fn new(tasks: Range<usize>) -> Self {
        Self(CachePadded::new(AtomicU64::new(Self::packed(tasks.start as u64, tasks.end as u64))))
    }

    fn packed(first: u64, end: u64) -> u64 {
        first << 32 | end
    }

    /// Takes the first task, or the last.
    fn take(&self, first: bool) -> Option<usize> {
        let parts = |share: u64| (share >> 32, share & u64::from(u32::MAX));
        let rest = |share: u64| match parts(share) {
            (start, end) if start >= end => None,
            (start, end) if first => Some(Self::packed(start + 1, end)),
            (start, end) => Some(Self::packed(start, end - 1)),
        };
        let (start, end) = parts(self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest).ok()?);
        Some(if first { start } else { end - 1 } as usize)
    }
}

/// The numbers of the tasks of a thread, one by one.
pub struct Turns<'a> {
    shares: &'a [Share],
    own: usize,
}

impl Iterator for Turns<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        // Of others' tasks the last ones: these are far from what they are at.
        let others = || (1..self.shares.len()).map(|number| &self.shares[(self.own + number) % self.shares.len()]);
        self.shares[self.own].take(true).or_else(|| others().find_map(|share| share.take(false)))
    }
}

/// Numbers in blocks of so many per row that are alive at once, for so many rows in all.
pub fn scratch(width: usize, rows: usize) -> usize {
    width * rows.min(BLOCK * rayon::current_num_threads())
}

/// How long a thread of the pool without work stays awake.
const AWAKE: Duration = Duration::from_micros(100);
/// How long a thread stays awake for the other parts of what it has computed a part of.
const PATIENCE: Duration = Duration::from_millis(1);

/// Runs `f` on a thread of the pool and keeps the others awake meanwhile: `f` has parallel parts every few dozen microseconds,
/// and to wake a thread takes as long as one of them.
pub fn on_the_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    let returned = AtomicBool::new(false);
    rayon::scope(|scope| {
        let (own, returned) = (rayon::current_thread_index(), &returned);
        scope.spawn_broadcast(move |_, thread| {
            // It may have been found by a thread that waits for a part of `f`, so it ends by itself.
            let mut worked = Instant::now();
            while Some(thread.index()) != own && !returned.load(Ordering::Acquire) && worked.elapsed() < AWAKE {
                match rayon::yield_now() {
                    Some(rayon::Yield::Executed) => worked = Instant::now(),
                    _ => std::hint::spin_loop(),
                }
            }
        });
        // Set if `f` panics too, or the others would wait for nothing.
        let _returned = OnReturn(|| returned.store(true, Ordering::Release));
        f()
    })
}

/// Calls its function when it is dropped.
struct OnReturn<F: Fn()>(F);

impl<F: Fn()> Drop for OnReturn<F> {
    fn drop(&mut self) {
        self.0();
    }
}
