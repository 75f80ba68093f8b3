//! The arguments of the kernels of attention in their order, as `kernels.rs` has those of the others.

use anyhow::Result;

use super::device::{Argument, Gpu, Launch, View};
use super::kernels::{Norms, arguments, int, rows_of};
use crate::ops::attention::Heads;

/// The largest width of a head, and what widths are multiples of, in attention on tensor cores.
pub const LARGEST_HEAD: usize = 256;
/// As above.
pub const HEAD_UNIT: usize = 8;
/// Rows of a tile of queries or keys.
pub const TILE: usize = 64;

/// Keys and values of a layer: [key rows, key heads · dim] each.
pub type Stores = [View<u16>; 2];

pub fn store_heads(
    gpu: &Gpu,
    [queries, keys, values]: [View<f32>; 3],
    ([query_gain, key_gain], epsilon): Norms,
    [cosines, sines]: [View<f32>; 2],
    (to_row, stores): (View<i32>, Stores),
    rows: usize,
    heads: &Heads,
) -> Result<()> {
    let shape = [int(rows), int(heads.query), int(heads.key), int(heads.dim)];
    let values = arguments![
        queries, keys, values, query_gain, key_gain, epsilon, cosines, sines, to_row, stores[0], stores[1], shape[0],
        shape[1], shape[2], shape[3],
    ];
    gpu.launch("store_heads", rows_of(rows), 256, values)
}

/// Where attention's results go, by rows of the call.
#[derive(Clone, Copy)]
pub struct Attended {
    pub out: Option<View<f32>>,
    pub rounded: Option<View<u16>>,
    pub log_sums: Option<View<f32>>,
}

/// Which kernel a head's width needs.
fn wide(dim: usize) -> usize {
    [64, 128].into_iter().find(|&wide| dim <= wide).unwrap_or(LARGEST_HEAD)
}

fn cap(heads: &Heads) -> f32 {
    heads.soft_cap.unwrap_or(0.0)
}

fn window(heads: &Heads) -> i32 {
    heads.window.map_or(0, int)
}

pub fn rows(
    gpu: &Gpu,
    queries: View<f32>,
    stores: Stores,
    [row_span, spans]: [View<i32>; 2],
    to: Attended,
    rows: usize,
    heads: &Heads,
) -> Result<()> {
    let grid = [rows, heads.key, (heads.query / heads.key).div_ceil(8)];
    let Attended { out, rounded, log_sums } = to;
    let shape = [int(rows), int(heads.query), int(heads.key), int(heads.dim)];
    let values = arguments![
        queries,
        stores[0],
        stores[1],
        row_span,
        spans,
        out,
        rounded,
        log_sums,
        shape[0],
        shape[1],
        shape[2],
        shape[3],
        heads.scale,
        cap(heads),
        window(heads)
    ];
    gpu.launch("attention_rows", grid, 256, values)
}

/// Tiles of queries or keys, and how many.
pub type Tiles = (View<i32>, usize);

pub fn forward(
    gpu: &Gpu,
    queries: View<f32>,
    stores: Stores,
    (tiles, count): Tiles,
    spans: View<i32>,
    to: Attended,
    heads: &Heads,
) -> Result<()> {
    let (d, Attended { out, rounded, log_sums }) = (wide(heads.dim), to);
    let values = arguments![
        queries,
        stores[0],
        stores[1],
        tiles,
        spans,
        out,
        rounded,
        log_sums,
        int(heads.query),
        int(heads.key),
        int(heads.dim),
        heads.scale,
        cap(heads),
        window(heads)
    ];
    let shape = Launch { grid: [count, heads.query, 1], block: 128, shared: 256 * (d + 8) };
    gpu.launch_with(&format!("attention_forward_{d}"), shape, values)
}

pub fn backward_begin(
    gpu: &Gpu,
    queries: View<f32>,
    [out, grad]: [View<f32>; 2],
    rounded: [View<u16>; 2],
    pulls: View<f32>,
    rows: usize,
    heads: &Heads,
) -> Result<()> {
    let values = arguments![
        queries,
        heads.scale,
        out,
        grad,
        rounded[0],
        rounded[1],
        pulls,
        int(rows),
        int(heads.query),
        int(heads.dim)
    ];
    gpu.launch("attention_backward_begin", [rows, heads.query, 1], 32, values)
}

/// What both gradients of attention read: rounded queries, keys, values, the rounded gradient, log-sums and pulls.
#[derive(Clone, Copy)]
pub struct Saved {
    pub queries: View<u16>,
    pub stores: Stores,
    pub grad: View<u16>,
    pub log_sums: View<f32>,
    pub pulls: View<f32>,
}

pub fn backward_queries(
    gpu: &Gpu,
    saved: &Saved,
    (tiles, count): Tiles,
    spans: View<i32>,
    d_queries: View<f32>,
    heads: &Heads,
) -> Result<()> {
    let (d, Saved { queries, stores, grad, log_sums, pulls }) = (wide(heads.dim), *saved);
    let values = arguments![
        queries,
        stores[0],
        stores[1],
        grad,
        log_sums,
        pulls,
        tiles,
        spans,
        d_queries,
        int(heads.query),
        int(heads.key),
        int(heads.dim),
        heads.scale,
        cap(heads),
        window(heads)
    ];
    let shape = Launch { grid: [count, heads.query, 1], block: 128, shared: 384 * (d + 8) };
    gpu.launch_with(&format!("attention_backward_queries_{d}"), shape, values)
}

/// For every span, the spans that see its own keys.
#[derive(Clone, Copy)]
pub struct Readers {
    pub start: View<i32>,
    pub spans: View<i32>,
}

pub fn backward_keys(
    gpu: &Gpu,
    saved: &Saved,
    (tiles, count): Tiles,
    spans: View<i32>,
    readers: Readers,
    d_keys: [View<f32>; 2],
    heads: &Heads,
) -> Result<()> {
    let (d, Saved { queries, stores, grad, log_sums, pulls }) = (wide(heads.dim), *saved);
    let values = arguments![
        queries,
        stores[0],
        stores[1],
        grad,
        log_sums,
        pulls,
        tiles,
        spans,
        readers.start,
        readers.spans,
        d_keys[0],
        d_keys[1],
        int(heads.query),
        int(heads.key),
        int(heads.dim),
        cap(heads),
        window(heads)
    ];
    let shape = Launch { grid: [count, heads.key, 1], block: 256, shared: 512 * (d + 8) + 10752 };
    gpu.launch_with(&format!("attention_backward_keys_{d}"), shape, values)
}
