//! Work on rows, spread over the threads: many rows in parts that each thread walks block by block, few rows all at once with
//! the threads inside the products.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::panels::{PANEL, Threads};

/// Rows of a block: what is computed from them stays in the second-level cache.
const BLOCK: usize = 256;
/// Rows that make it worth to give a thread a part of its own.
const PART: usize = 64;

/// A matrix that is written block by block: all of it, and its width.
pub type Output<'a> = (&'a mut [f32], usize);

/// Calls `f(state, rows, outputs, threads)` for all rows in blocks, with the blocks' rows of every output. Each part of the
/// rows has a state of its own, made by `start`; they come back in the order of the rows. How rows are cut depends on their
/// number and on that of the threads alone.
pub fn in_blocks<const N: usize, S: Send>(
    rows: usize,
    outputs: [Output; N],
    start: impl Fn() -> S + Sync,
    f: impl Fn(&mut S, Range<usize>, [&mut [f32]; N], Threads) + Sync,
) -> Vec<S> {
    let threads = rayon::current_num_threads();
    if rows < PART * threads || threads == 1 {
        let (mut state, threads) = (start(), if threads == 1 { Threads::One } else { Threads::All });
        each_block(&mut state, 0..rows, outputs, threads, &f);
        return vec![state];
    }
    let cut = |part: usize| rows * part / threads;
    let mut rest = outputs;
    let parts: Vec<(Range<usize>, [Output; N])> = (0..threads)
        .map(|part| {
            let rows = cut(part)..cut(part + 1);
            (rows.clone(), split(&mut rest, rows.len()))
        })
        .collect();
    let run = |(rows, outputs): (Range<usize>, [Output; N])| {
        let mut state = start();
        each_block(&mut state, rows, outputs, Threads::One, &f);
        state
    };
    parts.into_par_iter().with_max_len(1).map(run).collect()
}

/// Outputs that are computed together where threads share them: whole panels.
pub const WIDTH: usize = 2 * PANEL;

/// Calls `f` for the columns of a matrix so wide, WIDTH at a time or what is left; each of the threads takes a part of them.
pub fn in_columns(wide: usize, threads: Threads, f: impl Fn(Range<usize>) + Sync) {
    let (all, parts) = (wide.div_ceil(WIDTH), threads.count());
    in_parts(parts, |part| {
        let columns = (all * part / parts..all * (part + 1) / parts).map(|number| number * WIDTH);
        columns.for_each(|start| f(start..(start + WIDTH).min(wide)));
    });
}

/// Calls `f` with the numbers of all parts, each on a thread of its own. Where parts are short, a thread that goes to sleep until
/// the others are done wakes up too late: this one stays awake.
pub fn in_parts(parts: usize, f: impl Fn(usize) + Sync) {
    if parts <= 1 {
        return (0..parts).for_each(f);
    }
    let unfinished = AtomicUsize::new(parts - 1);
    rayon::scope(|scope| {
        for part in 1..parts {
            let (f, unfinished) = (&f, &unfinished);
            scope.spawn(move |_| {
                // Finished if `f` panics too; the scope passes it on.
                let _finished = OnReturn(|| {
                    unfinished.fetch_sub(1, Ordering::Release);
                });
                f(part);
            });
        }
        f(0);
        let waiting = Instant::now();
        while unfinished.load(Ordering::Acquire) > 0 && waiting.elapsed() < PATIENCE {
            if rayon::yield_now() != Some(rayon::Yield::Executed) {
                std::hint::spin_loop();
            }
        }
    });
}

/// Calls `f` with the numbers of so many tasks, `at_once` of them in a row, on all threads; each takes the next when it is done.
pub fn in_turns(tasks: usize, at_once: usize, f: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    in_parts(rayon::current_num_threads().min(tasks.div_ceil(at_once)), |_| {
        loop {
            let first = next.fetch_add(at_once, Ordering::Relaxed);
            if first >= tasks {
                return;
            }
            (first..(first + at_once).min(tasks)).for_each(&f);
        }
    });
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

fn each_block<const N: usize, S>(
    state: &mut S,
    rows: Range<usize>,
    mut outputs: [Output; N],
    threads: Threads,
    f: &impl Fn(&mut S, Range<usize>, [&mut [f32]; N], Threads),
) {
    for first in rows.clone().step_by(BLOCK) {
        let block = first..(first + BLOCK).min(rows.end);
        let outputs = split(&mut outputs, block.len()).map(|(values, _)| values);
        f(state, block, outputs, threads);
    }
}

/// Takes the first rows off every output.
fn split<'a, const N: usize>(outputs: &mut [Output<'a>; N], rows: usize) -> [Output<'a>; N] {
    outputs.each_mut().map(|(values, width)| {
        let (first, rest) = std::mem::take(values).split_at_mut(rows * *width);
        *values = rest;
        (first, *width)
    })
}
