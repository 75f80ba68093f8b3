//! Work on rows, spread over the threads: many rows in parts that each thread walks block by block, few rows all at once with
//! the threads inside the products.

use std::ops::Range;

use rayon::prelude::*;

use super::panels::Threads;

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

/// Numbers in blocks of so many per row that are alive at once, for so many rows in all.
pub fn scratch(width: usize, rows: usize) -> usize {
    width * rows.min(BLOCK * rayon::current_num_threads())
}

/// Runs `f` on a thread of the pool, so that parallel parts within it wake no one but the others.
pub fn on_the_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
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
