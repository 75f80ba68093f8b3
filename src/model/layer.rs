//! One layer of the decoder, forward and backward.
//!
//! The backward pass computes the layer again from its input, so that nothing but the inputs of layers has to be kept; what attention
//! did, and the residual stream after it, may be. What is computed from a block of rows stays in the cache from the norm to the
//! residual sum.

use std::ops::Range;

use anyhow::Result;

use super::{Architecture, LayerCall, Projection};
use crate::ops::attention::{self, Heads, LogSums};
use crate::ops::attention_backward::{self, Gradients, Saved};
use crate::ops::buffer::{Buffer, copy};
use crate::ops::feed_forward::Gated;
use crate::ops::kernel::Kernel;
use crate::ops::keys::Keys;
use crate::ops::left::Left;
use crate::ops::linear::{Down, Linear, LowRankGradient, apply_together};
use crate::ops::norm::{RmsNorm, sum_of};
use crate::ops::panels::{Panels, Threads};
use crate::ops::quantized::{Unpacked, Weight};
use crate::ops::rope::Direction;
use crate::ops::rounded::{Rounded, RoundedRows, RoundedRowsMut};
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
    layer: &'a Layer,
    /// Its number.
    index: usize,
    architecture: &'a Architecture,
    call: &'a LayerCall<'a>,
    /// Weights as products want them, by [`Projection`].
    weights: [Unpacked<'a>; 7],
    kernel: Kernel,
}

/// The projections to queries, keys and values.
const HEADS: [Projection; 3] = [Projection::QProj, Projection::KProj, Projection::VProj];

/// Gradients of a layer's adapter, by [`Projection`].
pub type AdapterGradient = [Option<LowRankGradient>; 7];

/// What attention was given and returned, and the residual stream after it if that is kept too; rows of the call.
pub struct Attended {
    queries: Rounded,
    keys: Rounded,
    values: Rounded,
    attended: Rounded,
    log_sums: LogSums,
    middle: Option<Buffer>,
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

    fn rows(&self) -> usize {
        self.call.call.ids.len()
    }

    fn heads(&self) -> Heads {
        self.architecture.heads_of(self.architecture.layers[self.index])
    }

    /// A projection of some rows with their adapter.
    fn linear(&self, projection: Projection, adapter: Option<&'a Adapter>, rows: Range<usize>) -> Linear<'_> {
        Linear {
            weight: &self.weights[projection as usize],
            bias: self.layer.projections[projection as usize].bias.as_deref(),
            adapter: adapter.and_then(|adapter| adapter.low_rank(self.index, projection, self.kernel)),
            mask: self.call.mask(rows, self.index, projection),
            backward: false,
        }
    }

    /// `outputs[i] = projections[i](x)` for a block of rows, each with the adapter of its own; `left` prepares some of them.
    fn project<'x, const N: usize>(
        &self,
        projections: [Projection; N],
        left: impl Fn(&Range<usize>) -> Left<'x>,
        rows: &Range<usize>,
        outputs: [&mut [f32]; N],
    ) {
        let mut outputs = outputs;
        for (part, adapter) in self.call.adapters(rows) {
            let left = left(&part);
            let linears = projections.map(|projection| self.linear(projection, adapter, of_call(rows, &part)));
            let outputs = outputs.each_mut().map(|output| {
                let wide = output.len() / rows.len();
                &mut output[part.start * wide..part.end * wide]
            });
            apply_together(&linears, &left, outputs);
        }
    }

    /// Some rows of a block, normalized.
    fn normed(&self, norm: &RmsNorm, x: &[f32], part: &Range<usize>) -> Left<'static> {
        let hidden = self.architecture.hidden;
        let x = &x[part.start * hidden..part.end * hidden];
        Left::of_rows(part.len(), hidden, self.kernel, |rows, to| {
            norm.forward(&x[rows.start * hidden..rows.end * hidden], to);
        })
    }

    fn attend(&self, x: &[f32], keys: &mut Keys) -> Attended {
        let (rows, hidden, heads) = (self.rows(), self.architecture.hidden, self.heads());
        let (wide, narrow) = (heads.query * heads.dim, heads.key * heads.dim);
        let [mut queries, mut new_keys, mut values] =
            [wide, narrow, narrow].map(|width| Rounded::new(rows * width, self.kernel));
        let outputs = [(queries.rows_mut(), wide), (new_keys.rows_mut(), narrow), (values.rows_mut(), narrow)];
        in_blocks(
            rows,
            outputs,
            || (),
            |(), rows, outputs| {
                let x = &x[rows.start * hidden..rows.end * hidden];
                let left = |part: &Range<usize>| self.normed(&self.layer.attention_norm, x, part);
                let mut projected = [wide, narrow, narrow].map(|width| Buffer::new(rows.len() * width));
                self.project(HEADS, left, &rows, projected.each_mut().map(|projected| &mut **projected));
                let [q, k, _] = &mut projected;
                let norms = [&self.layer.query_norm, &self.layer.key_norm];
                for ((heads, norm), scale) in [q, k].into_iter().zip(norms).zip([heads.scale, 1.0]) {
                    if let Some(norm) = norm {
                        let before = copy(heads);
                        norm.forward(&before, heads);
                    }
                    self.call.rotation(self.index).apply(heads, rows.clone(), Direction::Forward, scale);
                }
                outputs.into_iter().zip(&projected).for_each(|(output, projected)| output.write(projected));
            },
        );
        keys.write(new_keys.rows(), values.rows(), self.call.call.stores);
        let (mut attended, mut log_sums) = (Rounded::new(rows * wide, self.kernel), Buffer::new(rows * heads.query));
        let (spans, to) = (self.call.call.spans, attended.rows_mut());
        attention::forward(heads, queries.rows(), keys, spans, to, &mut log_sums);
        Attended { queries, keys: new_keys, values, attended, log_sums, middle: None }
    }

    /// `y = layer(x)`, both [rows, hidden]; new keys and values are added to `keys`. Returns what attention did, for a backward pass
    /// if it is to be kept.
    pub fn forward(&self, x: &[f32], keys: &mut Keys, y: &mut [f32], keep: bool) -> Attended {
        let (hidden, width) = (self.architecture.hidden, self.heads().query * self.heads().dim);
        let mut kept = self.attend(x, keys);
        let attended = kept.attended.rows();
        // What was normalized is computed again anyway.
        let mut middle = (keep && !self.architecture.output_norms).then(|| Buffer::new(x.len()));
        let to_middle = middle.as_deref_mut().map_or((&mut [][..], 0), |middle| (middle, hidden));
        in_blocks(
            self.rows(),
            [(y, hidden), to_middle],
            || (),
            |(), rows, [y, to_middle]| {
                let x = &x[rows.start * hidden..rows.end * hidden];
                let attended = attended.part(rows.start * width..rows.end * width);
                let mut own = Buffer::new(if to_middle.is_empty() { x.len() } else { 0 });
                let middle = if to_middle.is_empty() { &mut *own } else { to_middle };
                self.middle(x, attended, &rows, middle);
                let left = |part: &Range<usize>| self.normed(&self.layer.feed_forward_norm, middle, part);
                let returned = self.feed_forward(left, &rows);
                add_normed(middle, &returned, self.layer.feed_forward_output_norm.as_ref(), y);
            },
        );
        kept.middle = middle;
        kept
    }

    /// From what attention returned to the residual stream between it and the feed-forward block, which is written to `middle`. Returns
    /// what attention's output projection returned.
    fn middle(&self, x: &[f32], attended: RoundedRows, rows: &Range<usize>, middle: &mut [f32]) -> Buffer {
        let mut returned = Buffer::new(x.len());
        let width = attended.numbers() / rows.len();
        let left = |part: &Range<usize>| Left::of(attended.part(part.start * width..part.end * width), width);
        self.project([Projection::OProj], left, rows, [&mut *returned]);
        add_normed(x, &returned, self.layer.attention_output_norm.as_ref(), middle);
        returned
    }

    fn gated(&self, adapter: Option<&'a Adapter>, rows: Range<usize>) -> Gated<'_> {
        Gated {
            gate: self.linear(Projection::GateProj, adapter, rows.clone()),
            up: self.linear(Projection::UpProj, adapter, rows),
            activation: self.architecture.activation,
            kernel: self.kernel,
        }
    }

    /// What the feed-forward block makes of its normalized input, some rows of which `left` prepares, before its output is
    /// normalized.
    fn feed_forward<'x>(&self, left: impl Fn(&Range<usize>) -> Left<'x>, rows: &Range<usize>) -> Buffer {
        let hidden = self.architecture.hidden;
        let mut returned = Buffer::new(rows.len() * hidden);
        for (part, adapter) in self.call.adapters(rows) {
            let to = &mut returned[part.start * hidden..part.end * hidden];
            self.feed_forward_of(&left(&part), adapter, of_call(rows, &part), to);
        }
        returned
    }

    /// The same for rows of the call that have one adapter, and are prepared.
    fn feed_forward_of(&self, x: &Left, adapter: Option<&'a Adapter>, rows: Range<usize>, returned: &mut [f32]) {
        let product = self.gated(adapter, rows.clone()).forward(x);
        let out = self.linear(Projection::DownProj, adapter, rows);
        apply_together(&[out], &product, [returned]);
    }
}

/// `y = x + returned`, normalized first where the family does so.
fn add_normed(x: &[f32], returned: &[f32], norm: Option<&RmsNorm>, y: &mut [f32]) {
    match norm {
        Some(norm) => {
            norm.forward(returned, y);
            y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
        }
        None => sum_of(x, returned, y),
    }
}

/// The gradient of what a block returned, from that of the residual sum; `None` if that is the same.
fn before_norm(returned: Option<&[f32]>, norm: Option<&RmsNorm>, grad: &[f32]) -> Option<Buffer> {
    returned.zip(norm).map(|(returned, norm)| {
        let mut before = Buffer::zeros(grad.len());
        norm.backward(returned, grad, &mut before);
        before
    })
}

/// A part of a block, counted from the block's first row, in rows of the call.
fn of_call(block: &Range<usize>, part: &Range<usize>) -> Range<usize> {
    block.start + part.start..block.start + part.end
}

/// The backward pass.
impl Work<'_> {
    /// Replaces `grad`, the gradient of the layer's output, by that of its input `x`, both [rows, hidden]. All rows have the
    /// same adapter, whose gradients are returned. What attention did is computed again unless it was kept. `keys` is room for
    /// the call's keys, and so is `swapped`.
    pub fn backward(
        &self,
        x: &[f32],
        kept: Option<Attended>,
        grad: &mut [f32],
        [keys, swapped]: [&mut Keys; 2],
    ) -> AdapterGradient {
        let outputs = |weight: &Panels| weight.transposed(0..weight.dims().0, Threads::All);
        let transposed = self.weights.each_ref().map(|weight| outputs(weight));
        let kept = match kept {
            Some(kept) => {
                keys.write(kept.keys.rows(), kept.values.rows(), self.call.call.stores);
                kept
            }
            None => self.attend(x, keys),
        };
        let (heads, rows) = (self.heads(), self.rows());
        let mut d_attended = Rounded::new(rows * heads.query * heads.dim, self.kernel);
        let mut pulls = Buffer::new(rows * heads.query);
        let outputs = (d_attended.rows_mut(), &mut *pulls);
        let mut gradient = self.middle_backward(x, &kept, grad, outputs, &transposed);
        let [queries, keys, values] = self.attention_backward(&kept, keys, swapped, (d_attended.rows(), &pulls));
        let first = self.heads_backward(x, grad, [queries, keys, values], &transposed);
        for (total, part) in gradient.iter_mut().zip(first) {
            add_gradient(total, part);
        }
        gradient
    }

    /// From the layer's output to what attention returned, with what attention's backward pass needs of both. `grad` becomes the gradient
    /// of the residual stream before it.
    fn middle_backward(
        &self,
        x: &[f32],
        kept: &Attended,
        grad: &mut [f32],
        (d_attended, pulls): (RoundedRowsMut, &mut [f32]),
        transposed: &[Panels; 7],
    ) -> AdapterGradient {
        let (hidden, heads) = (self.architecture.hidden, self.heads());
        let width = heads.query * heads.dim;
        let outputs = ((d_attended, width), [(grad, hidden), (pulls, heads.query)]);
        let parts = in_blocks(self.rows(), outputs, Default::default, |gradient, rows, outputs| {
            let (to_attended, [grad, pulls]) = outputs;
            let x = &x[rows.start * hidden..rows.end * hidden];
            let attended = kept.attended.rows().part(rows.start * width..rows.end * width);
            let middle = kept.middle.as_ref().map(|middle| &middle[rows.start * hidden..rows.end * hidden]);
            let mut own = Buffer::new(if middle.is_none() { x.len() } else { 0 });
            let returned = middle.is_none().then(|| self.middle(x, attended, &rows, &mut own));
            let x = middle.unwrap_or(&own);
            let mut back = Back { work: self, transposed, gradient, rows };
            let d_normed = back.through_feed_forward(x, grad);
            self.layer.feed_forward_norm.backward(x, &d_normed, grad);
            let d_returned = before_norm(returned.as_deref(), self.layer.attention_output_norm.as_ref(), grad);
            let d_returned = d_returned.as_deref().unwrap_or(grad);
            let mut d_attended = Buffer::new(attended.numbers());
            back.through(Projection::OProj, d_returned, &Left::of(attended, width), &mut d_attended, false);
            attention_backward::pulls(heads, &d_attended, attended, pulls);
            to_attended.write(&d_attended);
        });
        in_order(parts)
    }

    /// Gradients of queries, keys and values.
    fn attention_backward(
        &self,
        kept: &Attended,
        keys: &Keys,
        swapped: &mut Keys,
        (grad, pulls): (RoundedRows, &[f32]),
    ) -> [Buffer; 3] {
        let (heads, call) = (self.heads(), self.call.call);
        let Attended { queries, log_sums, .. } = kept;
        swapped.write(kept.values.rows(), kept.keys.rows(), call.stores);
        let saved = Saved { queries: queries.rows(), keys, swapped, log_sums, pulls, grad };
        let mut all = [queries, &kept.keys, &kept.values].map(|of| Buffer::new(of.rows().numbers()));
        let [queries, keys, values] = &mut all;
        attention_backward::backward(heads, &saved, call.spans, Gradients { queries, keys, values });
        all
    }

    /// From queries, keys and values to the layer's input: `grad` gets what comes through them.
    fn heads_backward(
        &self,
        x: &[f32],
        grad: &mut [f32],
        d_heads: [Buffer; 3],
        transposed: &[Panels; 7],
    ) -> AdapterGradient {
        let (hidden, heads) = (self.architecture.hidden, self.heads());
        let (wide, narrow) = (heads.query * heads.dim, heads.key * heads.dim);
        let [mut queries, mut keys, mut values] = d_heads;
        let outputs = [(grad, hidden), (&mut *queries, wide), (&mut *keys, narrow), (&mut *values, narrow)];
        let parts = in_blocks(self.rows(), outputs, Default::default, |gradient, rows, [grad, q, k, v]| {
            let x = &x[rows.start * hidden..rows.end * hidden];
            for (grad, scale) in [(&mut *q, heads.scale), (&mut *k, 1.0)] {
                self.call.rotation(self.index).apply(grad, rows.clone(), Direction::Backward, scale);
            }
            let x_left = self.normed(&self.layer.attention_norm, x, &(0..rows.len()));
            if let (Some(query_norm), Some(key_norm)) = (&self.layer.query_norm, &self.layer.key_norm) {
                let mut before = [q.len(), k.len(), v.len()].map(Buffer::new);
                let adapter = self.call.only_adapter();
                let linears = HEADS.map(|projection| self.linear(projection, adapter, rows.clone()));
                apply_together(&linears, &x_left, before.each_mut().map(|before| &mut **before));
                for (norm, before, grad) in [(query_norm, &before[0], &mut *q), (key_norm, &before[1], &mut *k)] {
                    let after = copy(grad);
                    grad.fill(0.0);
                    norm.backward(before, &after, grad);
                }
            }
            let mut d_normed = Buffer::new(x.len());
            let mut back = Back { work: self, transposed, gradient, rows };
            back.through(Projection::QProj, q, &x_left, &mut d_normed, false);
            back.through(Projection::KProj, k, &x_left, &mut d_normed, true);
            back.through(Projection::VProj, v, &x_left, &mut d_normed, true);
            self.layer.attention_norm.backward(x, &d_normed, grad);
        });
        in_order(parts)
    }
}

/// A block of rows on its way back through projections.
struct Back<'a> {
    work: &'a Work<'a>,
    transposed: &'a [Panels; 7],
    gradient: &'a mut AdapterGradient,
    /// Rows of the call.
    rows: Range<usize>,
}

impl<'a> Back<'a> {
    /// A projection in the direction of gradients.
    fn linear(&self, projection: Projection) -> Linear<'a> {
        let (work, weight) = (self.work, &self.transposed[projection as usize]);
        let adapter = work.call.only_adapter();
        let adapter = adapter.and_then(|adapter| adapter.low_rank(work.index, projection, work.kernel));
        let mask = work.call.mask(self.rows.clone(), work.index, projection);
        Linear { weight, bias: None, adapter, mask, backward: true }
    }

    /// Writes the gradient of a projection's input `x` to `dx`, or adds it, and adds the adapter's to its own.
    fn through(&mut self, projection: Projection, grad: &[f32], x: &Left, dx: &mut [f32], add: bool) {
        let linear = self.linear(projection);
        let grad = Left::new(grad, linear.weight.dims().1, self.work.kernel);
        let d_down = linear.down(&grad);
        linear.apply_all(&grad, d_down.as_ref(), dx, add, Threads::All);
        self.keep_unseen(projection, x, &grad, d_down.as_ref());
    }

    /// The same as [`Back::keep`] for inputs of which it is not known yet what the adapter saw and made of them.
    fn keep_unseen(&mut self, projection: Projection, x: &Left, grad: &Left, d_down: Option<&Down>) {
        let forward = Linear { backward: false, ..self.linear(projection) };
        let seen = forward.seen(x);
        let x = seen.as_ref().unwrap_or(x);
        self.keep(projection, x, forward.down_of(x).as_ref(), grad, d_down);
    }

    /// Adds the gradients of a projection's adapter, if it carries one, which saw `x`.
    fn keep(&mut self, projection: Projection, x: &Left, down: Option<&Down>, grad: &Left, d_down: Option<&Down>) {
        let linear = self.linear(projection);
        let (Some(adapter), Some(down), Some(d_down)) = (linear.adapter, down, d_down) else { return };
        let own = self.gradient[projection as usize].get_or_insert_with(|| adapter.zeros());
        adapter.add_gradient(x, down, grad, d_down, own);
    }

    /// The gradient of the feed-forward block's normalized input, given the input and the gradient of the residual sum after the
    /// block.
    fn through_feed_forward(&mut self, x: &[f32], grad: &[f32]) -> Buffer {
        let (work, rows) = (self.work, self.rows.clone());
        let hidden = work.architecture.hidden;
        let norm = work.layer.feed_forward_output_norm.as_ref();
        let mut d_normed = Buffer::new(x.len());
        let x = work.normed(&work.layer.feed_forward_norm, x, &(0..rows.len()));
        let returned = norm.map(|_| {
            let mut returned = Buffer::new(grad.len());
            work.feed_forward_of(&x, work.call.only_adapter(), rows.clone(), &mut returned);
            returned
        });
        let d_returned = before_norm(returned.as_deref(), norm, grad);
        let grad = Left::new(d_returned.as_deref().unwrap_or(grad), hidden, work.kernel);
        let [gate, up, out] =
            [Projection::GateProj, Projection::UpProj, Projection::DownProj].map(|projection| self.linear(projection));
        let gated = work.gated(work.call.only_adapter(), rows);
        let inputs = [&gated.gate, &gated.up];
        let seen = inputs.map(|linear| linear.seen(&x));
        let seen = seen.each_ref().map(|seen| seen.as_ref().unwrap_or(&x));
        let (d_down, downs) = (out.down(&grad), [inputs[0].down_of(seen[0]), inputs[1].down_of(seen[1])]);
        let downs = downs.each_ref().map(Option::as_ref);
        let (grads, product) = gated.backward(&x, downs, &out, (&grad, d_down.as_ref()));
        let own = [(Projection::GateProj, gate), (Projection::UpProj, up)];
        for (index, ((projection, linear), grad)) in own.into_iter().zip(&grads).enumerate() {
            let d_down = linear.down(grad);
            linear.apply_all(grad, d_down.as_ref(), &mut d_normed, index > 0, Threads::All);
            self.keep(projection, seen[index], downs[index], grad, d_down.as_ref());
        }
        if let Some(product) = &product {
            self.keep_unseen(Projection::DownProj, product, &grad, d_down.as_ref());
        }
        d_normed
    }
}

/// The sum of the parts' gradients, in their order.
fn in_order(parts: Vec<AdapterGradient>) -> AdapterGradient {
    let mut total = AdapterGradient::default();
    for part in parts {
        total.iter_mut().zip(part).for_each(|(total, part)| add_gradient(total, part));
    }
    total
}

fn add_gradient(total: &mut Option<LowRankGradient>, part: Option<LowRankGradient>) {
    match (total, part) {
        (_, None) => {}
        (total @ None, part) => *total = part,
        (Some(total), Some(part)) => total.add(&part),
    }
}
