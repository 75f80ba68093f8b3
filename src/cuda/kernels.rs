//! The kernels' arguments in their order: one function for each kernel of the `.cu` files, where their meaning stands.

use anyhow::Result;

use super::device::{Argument, Gpu, View};
use crate::learner::optimizer::Update;
use crate::ops::gate::Activation;

#[cfg(feature = "cuda")]
/// The sources: what all have in common, and the files that are compiled with it.
pub const SOURCES: ([&str; 2], [(&str, &str); 5]) = (
    [include_str!("common.cuh"), include_str!("tiles.cuh")],
    [
        ("elementwise.cu", include_str!("elementwise.cu")),
        ("attention.cu", include_str!("attention.cu")),
        ("attention_backward.cu", include_str!("attention_backward.cu")),
        ("head.cu", include_str!("head.cu")),
        ("quantized.cu", include_str!("quantized.cu")),
    ],
);

/// What a kernel is given, in its order.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => { &[$(Argument::from($value)),*] };
}

pub(super) use arguments;

/// A count as kernels take it. Rows and widths of a call are far below 2³¹.
pub(super) fn int(count: usize) -> i32 {
    i32::try_from(count).expect("counts of a call fit into 31 bits")
}

/// Blocks for elements that any number of blocks may share.
fn spread(n: usize) -> [usize; 3] {
    [n.div_ceil(256).min(65535), 1, 1]
}

pub(super) fn rows_of(rows: usize) -> [usize; 3] {
    [rows, 1, 1]
}

pub fn embed(
    gpu: &Gpu,
    ids: View<u32>,
    table: View<u16>,
    scale: f32,
    out: View<f32>,
    [rows, width]: [usize; 2],
) -> Result<()> {
    gpu.launch("embed", rows_of(rows), 256, arguments![ids, table, scale, out, int(rows), int(width)])
}

pub fn rope_tables(
    gpu: &Gpu,
    positions: View<u32>,
    frequencies: View<f32>,
    [cosines, sines]: [View<f32>; 2],
    [rows, half]: [usize; 2],
) -> Result<()> {
    gpu.launch(
        "rope_tables",
        spread(rows * half),
        256,
        arguments![positions, frequencies, cosines, sines, int(rows), int(half)],
    )
}

pub fn round_rows(gpu: &Gpu, x: View<f32>, out: View<u16>, n: usize) -> Result<()> {
    gpu.launch("round_rows", spread(n), 256, arguments![x, out, n as u64])
}

pub fn unpack_nf4(
    gpu: &Gpu,
    ([codes, scales], nested, offset): ([View<u8>; 2], View<f32>, f32),
    [of_codes, of_scales]: [View<f32>; 2],
    out: View<u16>,
    n: usize,
) -> Result<()> {
    let values = arguments![codes, scales, nested, offset, of_codes, of_scales, out, n as u64];
    gpu.launch("unpack_nf4", spread(n), 256, values)
}

/// With the kernel of a type of GGUF.
pub fn unpack_blocks(gpu: &Gpu, kernel: &str, blocks: View<u8>, out: View<u16>, n: usize) -> Result<()> {
    gpu.launch(kernel, spread(n), 256, arguments![blocks, out, n as u64])
}

pub fn adapter_parts(
    gpu: &Gpu,
    values: View<f32>,
    parts: View<u16>,
    scale: f32,
    [rank, narrow, wide]: [usize; 3],
) -> Result<()> {
    let arguments = arguments![values, parts, scale, int(rank), int(narrow), int(wide)];
    gpu.launch("adapter_parts", spread(rank * (narrow + wide)), 256, arguments)
}

pub fn adamw(
    gpu: &Gpu,
    [from, to]: [View<f32>; 2],
    [first, second]: [View<f32>; 2],
    gradient: View<f32>,
    update: &Update,
    n: usize,
) -> Result<()> {
    let Update { learning_rate, betas: [beta1, beta2], epsilon, decay, corrections, scale } = *update;
    let [correction1, correction2] = corrections;
    let values = arguments![
        from,
        to,
        first,
        second,
        gradient,
        learning_rate,
        beta1,
        beta2,
        epsilon,
        decay,
        correction1,
        correction2,
        scale,
        n as u64
    ];
    gpu.launch("adamw", spread(n), 256, values)
}

/// How many sums [`sum_of_squares`] writes.
pub const SUMS: usize = 256;

pub fn sum_of_squares(gpu: &Gpu, x: View<f32>, sums: View<f64>, n: usize) -> Result<()> {
    gpu.launch("sum_of_squares", rows_of(SUMS), 256, arguments![x, sums, n as u64])
}

/// The gains of two norms that follow each other, if they are there, and ε.
pub type Norms = ([Option<View<f32>>; 2], f32);

pub fn residual_norm(
    gpu: &Gpu,
    [x, returned]: [View<f32>; 2],
    ([output_gain, gain], epsilon): Norms,
    (sum, rounded): (View<f32>, Option<View<u16>>),
    [rows, width]: [usize; 2],
) -> Result<()> {
    let values = arguments![x, returned, output_gain, gain, epsilon, sum, rounded, int(rows), int(width)];
    gpu.launch("residual_norm", rows_of(rows), 256, values)
}

pub fn add_bias(gpu: &Gpu, y: View<f32>, bias: View<f32>, [rows, width]: [usize; 2]) -> Result<()> {
    gpu.launch("add_bias", rows_of(rows), 256, arguments![y, bias, int(rows), int(width)])
}

pub fn select_rows(gpu: &Gpu, x: View<f32>, index: View<u32>, out: View<f32>, [rows, width]: [usize; 2]) -> Result<()> {
    gpu.launch("select_rows", rows_of(rows), 256, arguments![x, index, out, int(rows), int(width)])
}

/// A norm: its gain and ε.
pub type Norm = (View<f32>, f32);

pub fn rms_norm(
    gpu: &Gpu,
    x: View<f32>,
    (gain, epsilon): Norm,
    out: Option<View<f32>>,
    rounded: Option<View<u16>>,
    [rows, width]: [usize; 2],
) -> Result<()> {
    gpu.launch("rms_norm", rows_of(rows), 256, arguments![x, gain, epsilon, out, rounded, int(rows), int(width)])
}

pub fn rms_norm_backward(
    gpu: &Gpu,
    x: View<f32>,
    (gain, epsilon): Norm,
    grad: View<f32>,
    dx: View<f32>,
    [rows, width]: [usize; 2],
) -> Result<()> {
    gpu.launch("rms_norm_backward", rows_of(rows), 256, arguments![x, gain, epsilon, grad, dx, int(rows), int(width)])
}

/// Rows of a gradient, by the rows that they belong to.
#[derive(Clone, Copy)]
pub struct Segments {
    pub at: View<u32>,
    pub order: View<u32>,
    pub start: View<u32>,
    pub count: usize,
}

pub fn rms_norm_backward_at(
    gpu: &Gpu,
    x: View<f32>,
    (gain, epsilon): Norm,
    grad: View<f32>,
    dx: View<f32>,
    segments: Segments,
    width: usize,
) -> Result<()> {
    let Segments { at, order, start, count } = segments;
    gpu.launch(
        "rms_norm_backward_at",
        rows_of(count),
        256,
        arguments![x, gain, epsilon, grad, dx, at, order, start, int(count), int(width)],
    )
}

pub fn rope(
    gpu: &Gpu,
    heads: View<f32>,
    [cosines, sines]: [View<f32>; 2],
    [rows, count, dim]: [usize; 3],
    sign: f32,
) -> Result<()> {
    gpu.launch("rope", rows_of(rows), 128, arguments![heads, cosines, sines, int(rows), int(count), int(dim), sign])
}

fn number(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    }
}

pub fn gate(
    gpu: &Gpu,
    gate: View<f32>,
    up: View<f32>,
    product: View<u16>,
    activation: Activation,
    n: usize,
) -> Result<()> {
    gpu.launch("gate", spread(n), 256, arguments![gate, up, product, number(activation), n as u64])
}

/// What comes out of the gate's backward pass; the gradients' f32 forms replace gate and up.
pub struct GateGradients {
    pub rounded: [View<u16>; 2],
    pub product: Option<View<f32>>,
}

pub fn gate_backward(
    gpu: &Gpu,
    d_product: View<f32>,
    [gate, up]: [View<f32>; 2],
    out: GateGradients,
    activation: Activation,
    n: usize,
) -> Result<()> {
    let ([d_gate, d_up], GateGradients { rounded, product }) = ([gate, up], out);
    let values =
        arguments![d_product, gate, up, d_gate, d_up, rounded[0], rounded[1], product, number(activation), n as u64];
    gpu.launch("gate_backward", spread(n), 256, values)
}

pub fn adapter_down(
    gpu: &Gpu,
    parts: View<f32>,
    [rows, rank, count]: [usize; 3],
    scale: f32,
    values: View<f32>,
    left: View<u16>,
) -> Result<()> {
    gpu.launch(
        "adapter_down",
        rows_of(rows),
        128,
        arguments![parts, int(rows), int(rank), int(count), scale, values, left],
    )
}

pub fn adapter_down_rows(
    gpu: &Gpu,
    x: View<u16>,
    matrix: View<u16>,
    [rows, rank, count, width]: [usize; 4],
    scale: f32,
    (values, left): (View<f32>, View<u16>),
) -> Result<()> {
    let shape = [int(rows), int(rank), int(count), int(width)];
    let arguments = arguments![x, matrix, shape[0], shape[1], shape[2], shape[3], scale, values, left];
    gpu.launch("adapter_down_rows", rows_of(rows), 256, arguments)
}

/// What is dropped of the inputs of a projection, for rows from one on.
#[derive(Clone, Copy)]
pub struct Mask {
    pub keys: View<u64>,
    pub bound: u64,
    pub layer: usize,
    pub projection: usize,
}

fn masked(gpu: &Gpu, kernel: &str, from: Argument, to: Argument, mask: Mask, [rows, width]: [usize; 2]) -> Result<()> {
    let Mask { keys, bound, layer, projection } = mask;
    gpu.launch(
        kernel,
        rows_of(rows),
        256,
        arguments![from, to, keys, bound, int(layer), int(projection), int(rows), int(width)],
    )
}

pub fn mask_rounded(gpu: &Gpu, x: View<u16>, out: View<u16>, mask: Mask, shape: [usize; 2]) -> Result<()> {
    masked(gpu, "mask_rounded", x.into(), out.into(), mask, shape)
}

pub fn mask_floats(gpu: &Gpu, x: View<f32>, out: View<f32>, mask: Mask, shape: [usize; 2]) -> Result<()> {
    masked(gpu, "mask_floats", x.into(), out.into(), mask, shape)
}

pub fn mask_add(gpu: &Gpu, x: View<f32>, y: View<f32>, mask: Mask, shape: [usize; 2]) -> Result<()> {
    masked(gpu, "mask_add", x.into(), y.into(), mask, shape)
}

/// Running sums over chunks of the vocabulary, by row.
#[derive(Clone, Copy)]
pub struct Tallies {
    pub max: View<f32>,
    pub sum: View<f64>,
    pub weighted: View<f64>,
    pub chosen: View<f32>,
}

impl Tallies {
    /// Those of rows from one on.
    pub fn from(self, row: usize) -> Self {
        let Self { max, sum, weighted, chosen } = self;
        Self { max: max.from(row), sum: sum.from(row), weighted: weighted.from(row), chosen: chosen.from(row) }
    }
}

/// A block of logits: rows, the first token and how many, and how they are capped and tempered.
#[derive(Clone, Copy)]
pub struct Block {
    pub logits: View<f32>,
    pub rows: usize,
    pub first: usize,
    pub tokens: usize,
    pub soft_cap: f32,
    pub temperature: f32,
}

pub fn tally(gpu: &Gpu, block: Block, targets: View<u32>, to: Tallies) -> Result<()> {
    let Block { logits, rows, first, tokens, soft_cap, temperature } = block;
    let Tallies { max, sum, weighted, chosen } = to;
    let values = arguments![
        logits,
        int(rows),
        int(first),
        int(tokens),
        soft_cap,
        1.0 / temperature,
        targets,
        max,
        sum,
        weighted,
        chosen
    ];
    gpu.launch("tally", rows_of(rows), 256, values)
}

pub fn tally_end(
    gpu: &Gpu,
    tallies: Tallies,
    [logprobs, entropies, log_sums]: [View<f32>; 3],
    rows: usize,
) -> Result<()> {
    let Tallies { max, sum, weighted, chosen } = tallies;
    let values = arguments![max, sum, weighted, chosen, logprobs, entropies, log_sums, int(rows)];
    gpu.launch("tally_end", rows_of(rows.div_ceil(256)), 256, values)
}

pub fn logit_gradient(
    gpu: &Gpu,
    block: Block,
    rounded: View<u16>,
    targets: View<u32>,
    [log_sums, grad]: [View<f32>; 2],
) -> Result<()> {
    let Block { logits, rows, first, tokens, soft_cap, temperature } = block;
    let values =
        arguments![logits, rounded, int(rows), int(first), int(tokens), soft_cap, temperature, targets, log_sums, grad];
    gpu.launch("logit_gradient", rows_of(rows), 256, values)
}

/// What was chosen, by row.
#[derive(Clone, Copy)]
pub struct Chosen {
    pub tokens: View<u32>,
    pub logprobs: View<f32>,
    pub untempered: View<f32>,
}

/// Numbers per row that choices are made from, beside its logits.
pub const STRETCHES: usize = 3 * 1024;

/// Chooses from all logits of some rows; `stretches` is room for [`STRETCHES`] of each.
pub fn choose(gpu: &Gpu, block: Block, stretches: View<f32>, places: View<f64>, to: Chosen) -> Result<()> {
    let Block { logits, rows, tokens: vocabulary, soft_cap, temperature, .. } = block;
    let Chosen { tokens, logprobs, untempered } = to;
    let (count, width) = (int(rows), int(vocabulary));
    let grid = [rows, vocabulary / 2048 + 1, 1];
    gpu.launch("choose_stretches", grid, 256, arguments![logits, count, width, soft_cap, temperature, stretches])?;
    let values =
        arguments![logits, stretches, count, width, soft_cap, temperature, places, tokens, logprobs, untempered];
    gpu.launch("choose", rows_of(rows), 256, values)
}
