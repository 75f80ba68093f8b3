//! One layer of the decoder, forward. What is computed from a block of rows stays in the cache from attention to the residual sum.

use std::ops::Range;

use anyhow::Result;

use super::{Architecture, LayerCall, Projection};
use crate::ops::attention::{self, Heads, LogSums};
use crate::ops::buffer::{Buffer, copy};
use crate::ops::feed_forward::{Gated, Pair, SharedPair};
use crate::ops::kernel::Kernel;
use crate::ops::keys::Keys;
use crate::ops::left::Left;
use crate::ops::linear::{Linear, apply_together};
use crate::ops::norm::{RmsNorm, add_to};
use crate::ops::panels::Threads;
use crate::ops::quantized::{Unpacked, Weight};
use crate::ops::rope::Direction;
use crate::ops::rows::in_blocks;
use crate::policy::Adapter;

/// A projection that is never trained.
pub(super) struct Frozen {
    /// [out, in].
    pub weight: Weight,
    /// [out].
    pub bias: Option<Vec<f32>>,
}

/// The frozen tensors of a layer.
pub(super) struct Layer {
    pub attention_norm: RmsNorm,
    /// Of what attention returns.
    pub attention_output_norm: Option<RmsNorm>,
    pub feed_forward_norm: RmsNorm,
    /// Of what the feed-forward block returns.
    pub feed_forward_output_norm: Option<RmsNorm>,
    /// Of every head, [head_dim].
    pub query_norm: Option<RmsNorm>,
    pub key_norm: Option<RmsNorm>,
    /// By [`Projection`].
    pub projections: [Frozen; 7],
}

/// A layer at work on the rows of a call.
pub(super) struct Work<'a> {
    pub layer: &'a Layer,
    /// Its number.
    pub index: usize,
    pub architecture: &'a Architecture,
    pub call: &'a LayerCall<'a>,
    /// Weights as products want them, by [`Projection`].
    pub weights: [Unpacked<'a>; 7],
    pub kernel: Kernel,
}

/// The projections to queries, keys and values.
pub(super) const HEADS: [Projection; 3] = [Projection::QProj, Projection::KProj, Projection::VProj];

/// What attention was given and returned; rows of the call.
pub struct Attended {
    pub queries: Buffer,
    pub keys: Buffer,
    pub values: Buffer,
    pub attended: Buffer,
    pub log_sums: LogSums,
}

/// What a backward pass needs beside the layer's input; rows of the call.
pub struct Activations {
    pub attended: Attended,
    /// The residual stream between attention and the feed-forward block.
    pub middle: Buffer,
    /// Gate and up, if they were to be kept.
    pub pair: Option<Pair>,
    /// What attention's output projection and the feed-forward block returned, if that is normalized; else no rows.
    pub returned: [Buffer; 2],
}

impl Activations {
    /// What a row takes, in bytes.
    pub fn row_bytes(architecture: &Architecture, kernel: Kernel) -> usize {
        let returned = if architecture.output_norms { 2 } else { 0 };
        let floats = architecture.attention_width() + (1 + returned) * architecture.hidden;
        size_of::<f32>() * floats + Pair::row_bytes(architecture.intermediate, kernel)
    }
}

impl<'a> Work<'a> {
    pub fn new(
        layer: &'a Layer,
        index: usize,
        architecture: &'a Architecture,
        call: &'a LayerCall,
        kernel: Kernel,
    ) -> Result<Self> {
        let weights = layer.projections.iter().map(|frozen| Ok(frozen.weight.unpacked(kernel)?));
        let weights = weights.collect::<Result<Vec<_>>>()?;
        let weights = weights.try_into().ok().expect("one per projection");
        Ok(Self { layer, index, architecture, call, weights, kernel })
    }

    pub fn rows(&self) -> usize {
        self.call.call.ids.len()
    }

    pub fn heads(&self) -> Heads {
        self.architecture.heads_of(self.architecture.layers[self.index])
    }

    /// A projection of some rows with their adapter.
    pub fn linear(&self, projection: Projection, adapter: Option<&'a Adapter>, rows: Range<usize>) -> Linear<'_> {
        Linear {
            weight: &self.weights[projection as usize],
            bias: self.layer.projections[projection as usize].bias.as_deref(),
            adapter: adapter.and_then(|adapter| adapter.low_rank(self.index, projection, self.kernel)),
            mask: self.call.mask(rows, self.index, projection),
            backward: false,
        }
    }

    /// `outputs[i] = projections[i](x)` for a block of rows, each with the adapter of its own; `left` prepares some of them.
    pub fn project<'x, const N: usize>(
        &self,
        projections: [Projection; N],
        left: impl Fn(&Range<usize>) -> Left<'x>,
        rows: &Range<usize>,
        outputs: [&mut [f32]; N],
        threads: Threads,
    ) {
        let mut outputs = outputs;
        for (part, adapter) in self.call.adapters(rows) {
            let left = left(&part);
            let linears = projections.map(|projection| self.linear(projection, adapter, of_call(rows, &part)));
            let outputs = outputs.each_mut().map(|output| {
                let wide = output.len() / rows.len();
                &mut output[part.start * wide..part.end * wide]
            });
            apply_together(&linears, &left, outputs, threads);
        }
    }

    /// Some rows of a block, normalized.
    fn normed(&self, norm: &RmsNorm, x: &[f32], part: &Range<usize>) -> Left<'static> {
        let hidden = self.architecture.hidden;
        let row = |row: usize| &x[(part.start + row) * hidden..][..hidden];
        Left::of_rows(part.len(), hidden, self.kernel, |index, to| norm.forward(row(index), to))
    }

    /// Some rows of a block as they are, of `width` values each.
    pub fn dense<'x>(&self, x: &'x [f32], width: usize, part: &Range<usize>) -> Left<'x> {
        Left::new(&x[part.start * width..part.end * width], width, self.kernel)
    }

    fn attend(&self, x: &[f32], keys: &mut Keys) -> Attended {
        let (rows, hidden, heads) = (self.rows(), self.architecture.hidden, self.heads());
        let (wide, narrow) = (heads.query * heads.dim, heads.key * heads.dim);
        let buffers = [wide, narrow, narrow].map(|width| Buffer::new(rows * width));
        let [mut queries, mut new_keys, mut values] = buffers;
        let outputs = [(&mut *queries, wide), (&mut *new_keys, narrow), (&mut *values, narrow)];
        in_blocks(
            rows,
            outputs,
            || (),
            |(), rows, [q, k, v], threads| {
                let x = &x[rows.start * hidden..rows.end * hidden];
                let left = |part: &Range<usize>| self.normed(&self.layer.attention_norm, x, part);
                self.project(HEADS, left, &rows, [&mut *q, &mut *k, v], threads);
                for (heads, norm) in [(q, &self.layer.query_norm), (k, &self.layer.key_norm)] {
                    if let Some(norm) = norm {
                        let before = copy(heads);
                        norm.forward(&before, heads);
                    }
                    self.call.rotation(self.index).apply(heads, rows.clone(), Direction::Forward);
                }
            },
        );
        keys.write(&new_keys, &values, self.call.call.stores);
        let (mut attended, mut log_sums) = (Buffer::new(rows * wide), Buffer::new(rows * heads.query));
        attention::forward(heads, &queries, keys, self.call.call.spans, &mut attended, &mut log_sums);
        Attended { queries, keys: new_keys, values, attended, log_sums }
    }

    /// `y = layer(x)`, both [rows, hidden]; new keys and values are added to `keys`. Returns what a backward pass needs, gate and up
    /// if they are to be kept. Where only that is wanted, `y` has no rows.
    pub fn forward(&self, x: &[f32], keys: &mut Keys, y: &mut [f32], keep_pair: bool) -> Activations {
        let Architecture { hidden, intermediate, output_norms, .. } = *self.architecture;
        let (rows, width) = (self.rows(), self.heads().query * self.heads().dim);
        let attended = self.attend(x, keys);
        let returned = || Buffer::new(if output_norms { rows * hidden } else { 0 });
        let mut pair = keep_pair.then(|| Pair::room(rows, intermediate, self.kernel));
        let (mut middle, mut returned) = (Buffer::new(rows * hidden), [returned(), returned()]);
        let (values, kept) = (&attended.attended, pair.as_mut().map(Pair::shared));
        let [of_attention, of_feed_forward] = &mut returned;
        let outputs = [y, &mut middle, of_attention, of_feed_forward];
        let outputs = outputs.map(|output| {
            let width = if output.is_empty() { 0 } else { hidden };
            (output, width)
        });
        in_blocks(
            rows,
            outputs,
            || (),
            |(), rows, [y, middle, of_attention, of_feed_forward], threads| {
                // What is not normalized is added where it is.
                let returned = if output_norms { &mut *of_attention } else { &mut *middle };
                let attended = part(values, &rows, width);
                let left = |part: &Range<usize>| self.dense(attended, width, part);
                self.project([Projection::OProj], left, &rows, [returned], threads);
                let norm = self.layer.attention_output_norm.as_ref();
                residual_sum(part(x, &rows, hidden), (of_attention, norm), middle);
                let returned = if output_norms { &mut *of_feed_forward } else { &mut *y };
                self.feed_forward(middle, &rows, kept.as_ref(), returned, threads);
                if !y.is_empty() {
                    let norm = self.layer.feed_forward_output_norm.as_ref();
                    residual_sum(middle, (of_feed_forward, norm), y);
                }
            },
        );
        Activations { attended, middle, pair, returned }
    }

    pub fn gated(&self, adapter: Option<&'a Adapter>, rows: Range<usize>) -> Gated<'_> {
        Gated {
            gate: self.linear(Projection::GateProj, adapter, rows.clone()),
            up: self.linear(Projection::UpProj, adapter, rows),
            activation: self.architecture.activation,
            kernel: self.kernel,
        }
    }

    /// What the feed-forward block makes of a block of rows before that is normalized, and gate and up for `kept`, for which all rows
    /// have the same adapter. Where only these are wanted, there is no room for what is returned.
    fn feed_forward(
        &self,
        x: &[f32],
        rows: &Range<usize>,
        kept: Option<&SharedPair>,
        returned: &mut [f32],
        threads: Threads,
    ) {
        let hidden = self.architecture.hidden;
        for (part, adapter) in self.call.adapters(rows) {
            let x = self.normed(&self.layer.feed_forward_norm, x, &part);
            let (rows, part) = (of_call(rows, &part), part.start * hidden..part.end * hidden);
            let kept = kept.map(|kept| (kept, rows.start));
            let gated = self.gated(adapter, rows.clone());
            if returned.is_empty() {
                gated.pair(&x, kept, threads, |_, _| {});
                continue;
            }
            let product = gated.forward(&x, kept, threads);
            let out = self.linear(Projection::DownProj, adapter, rows);
            apply_together(&[out], &product, [&mut returned[part]], threads);
        }
    }
}

/// Adds a residual stream to what a block returned, which `sum` holds unless it is normalized first.
fn residual_sum(x: &[f32], (returned, norm): (&[f32], Option<&RmsNorm>), sum: &mut [f32]) {
    if let Some(norm) = norm {
        norm.forward(returned, sum);
    }
    add_to(x, sum);
}

/// Some rows of `width` values each, if there are any.
pub(super) fn part<'x>(values: &'x [f32], rows: &Range<usize>, width: usize) -> &'x [f32] {
    if values.is_empty() { values } else { &values[rows.start * width..rows.end * width] }
}

/// A part of a block, counted from the block's first row, in rows of the call.
fn of_call(block: &Range<usize>, part: &Range<usize>) -> Range<usize> {
    block.start + part.start..block.start + part.end
}
