//! One layer of the decoder, backward. What the forward pass did not keep is computed again from the layer's input, to the same bits.

use std::ops::Range;

use super::Projection;
use super::layer::{Activations, Attended, HEADS, Work, part};
use crate::ops::attention;
use crate::ops::buffer::{Buffer, copy};
use crate::ops::feed_forward::{Inner, Pair};
use crate::ops::keys::Keys;
use crate::ops::left::Left;
use crate::ops::linear::{Down, Linear, LowRankGradient};
use crate::ops::norm::RmsNorm;
use crate::ops::panels::{Panels, Threads};
use crate::ops::rope::Direction;
use crate::ops::rows::in_blocks;

/// Gradients of a layer's adapter, by [`Projection`].
pub type AdapterGradient = [Option<LowRankGradient>; 7];

/// The gradient of what a block returned, from that of the residual sum; `None` if that is the same.
fn before_norm(returned: &[f32], norm: Option<&RmsNorm>, grad: &[f32]) -> Option<Buffer> {
    norm.map(|norm| {
        let mut before = Buffer::zeros(grad.len());
        norm.backward(returned, grad, &mut before);
        before
    })
}

impl Work<'_> {
    /// Replaces `grad`, the gradient of the layer's output, by that of its input `x`, both [rows, hidden]. All rows have the
    /// same adapter, whose gradients are returned. What the forward pass did is computed again unless it was kept. `keys` is room for
    /// the call's keys, and so is `swapped`.
    pub fn backward(
        &self,
        x: &[f32],
        kept: Option<Activations>,
        grad: &mut [f32],
        [keys, swapped]: [&mut Keys; 2],
    ) -> AdapterGradient {
        let outputs = |weight: &Panels| weight.transposed(0..weight.dims().0, Threads::All);
        let transposed = self.weights.each_ref().map(|weight| outputs(weight));
        let done = match kept {
            Some(done) => {
                keys.write(&done.attended.keys, &done.attended.values, self.call.call.stores);
                done
            }
            None => self.forward(x, keys, &mut [], true),
        };
        let (wide, rows) = (self.heads().query * self.heads().dim, self.rows());
        let mut d_attended = Buffer::new(rows * wide);
        let mut gradient = self.middle_backward(&done, grad, &mut d_attended, &transposed);
        let [queries, keys, values] = self.attention_backward(&done.attended, keys, swapped, &d_attended);
        let first = self.heads_backward(x, grad, [queries, keys, values], &transposed);
        for (total, part) in gradient.iter_mut().zip(first) {
            add_gradient(total, part);
        }
        gradient
    }

    /// From the layer's output to what attention returned. `grad` becomes the gradient of the residual stream before it.
    fn middle_backward(
        &self,
        done: &Activations,
        grad: &mut [f32],
        d_attended: &mut [f32],
        transposed: &[Panels; 7],
    ) -> AdapterGradient {
        let (hidden, width) = (self.architecture.hidden, self.heads().query * self.heads().dim);
        let outputs = [(grad, hidden), (d_attended, width)];
        let parts = in_blocks(self.rows(), outputs, Default::default, |gradient, rows, [grad, d_attended], threads| {
            let (x, attended) = (part(&done.middle, &rows, hidden), part(&done.attended.attended, &rows, width));
            let [of_attention, of_feed_forward] =
                done.returned.each_ref().map(|returned| part(returned, &rows, hidden));
            let pair = done.pair.as_ref().expect("it was kept, or computed again");
            let mut back = Back { work: self, transposed, gradient, rows, threads };
            let d_normed = back.through_feed_forward(x, pair, of_feed_forward, grad);
            self.layer.feed_forward_norm.backward(x, &d_normed, grad);
            let d_returned = before_norm(of_attention, self.layer.attention_output_norm.as_ref(), grad);
            let d_returned = d_returned.as_deref().unwrap_or(grad);
            let left = Left::new(attended, width, self.kernel);
            back.through(Projection::OProj, d_returned, (attended, &left), d_attended, false);
        });
        in_order(parts)
    }

    /// Gradients of queries, keys and values, by rows of the call.
    fn attention_backward(&self, kept: &Attended, keys: &Keys, swapped: &mut Keys, d_attended: &[f32]) -> [Buffer; 3] {
        let (heads, call) = (self.heads(), self.call.call);
        let width = heads.key * heads.dim;
        swapped.write(&kept.values, &kept.keys, call.stores);
        let mut d_queries = Buffer::new(kept.queries.len());
        let key_rows = call.spans.iter().map(|span| span.own.end).max().unwrap_or(0);
        let (mut stored_keys, mut stored_values) = (Buffer::new(key_rows * width), Buffer::new(key_rows * width));
        let Attended { queries, attended, log_sums, .. } = kept;
        let saved = attention::Saved { queries, keys, swapped, attended, log_sums, grad: d_attended };
        let gradients =
            attention::Gradients { queries: &mut d_queries, keys: &mut stored_keys, values: &mut stored_values };
        attention::backward(heads, &saved, call.spans, gradients);
        let by_rows = |stored: &[f32]| {
            let mut rows = Buffer::new(kept.keys.len());
            for store in call.stores {
                rows[store.from.start * width..store.from.end * width]
                    .copy_from_slice(&stored[store.to * width..(store.to + store.from.len()) * width]);
            }
            rows
        };
        [d_queries, by_rows(&stored_keys), by_rows(&stored_values)]
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
        let parts = in_blocks(self.rows(), outputs, Default::default, |gradient, rows, [grad, q, k, v], threads| {
            let x = &x[rows.start * hidden..rows.end * hidden];
            for heads in [&mut *q, &mut *k] {
                self.call.rotation(self.index).apply(heads, rows.clone(), Direction::Backward);
            }
            let (mut normed, mut d_normed) = (Buffer::new(x.len()), Buffer::new(x.len()));
            self.layer.attention_norm.forward(x, &mut normed);
            if let (Some(query_norm), Some(key_norm)) = (&self.layer.query_norm, &self.layer.key_norm) {
                let mut before = [q.len(), k.len(), v.len()].map(Buffer::new);
                let left = |part: &Range<usize>| self.dense(&normed, hidden, part);
                self.project(HEADS, left, &rows, before.each_mut().map(|before| &mut **before), threads);
                for (norm, before, grad) in [(query_norm, &before[0], &mut *q), (key_norm, &before[1], &mut *k)] {
                    let after = copy(grad);
                    grad.fill(0.0);
                    norm.backward(before, &after, grad);
                }
            }
            let x_normed = (&*normed, &Left::new(&normed, hidden, self.kernel));
            let mut back = Back { work: self, transposed, gradient, rows, threads };
            back.through(Projection::QProj, q, x_normed, &mut d_normed, false);
            back.through(Projection::KProj, k, x_normed, &mut d_normed, true);
            back.through(Projection::VProj, v, x_normed, &mut d_normed, true);
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
    threads: Threads,
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

    /// Writes the gradient of a projection's input `x`, in both forms, to `dx`, or adds it, and adds the adapter's to its own.
    fn through(
        &mut self,
        projection: Projection,
        grad: &[f32],
        (x, x_left): (&[f32], &Left),
        dx: &mut [f32],
        add: bool,
    ) {
        let linear = self.linear(projection);
        let left = Left::new(grad, linear.weight.dims().1, self.work.kernel);
        let d_down = linear.down(&left);
        linear.apply_all(&left, d_down.as_ref(), dx, add, self.threads);
        if linear.adapter.is_some() {
            let down = Linear { backward: false, ..linear }.down(x_left);
            self.keep(projection, x, down.as_ref(), grad, d_down.as_ref());
        }
    }

    /// Adds the gradients of a projection's adapter, if it carries one.
    fn keep(&mut self, projection: Projection, x: &[f32], down: Option<&Down>, grad: &[f32], d_down: Option<&Down>) {
        let linear = self.linear(projection);
        let (Some(adapter), Some(down), Some(d_down)) = (linear.adapter, down, d_down) else { return };
        let seen = linear.mask.map(|mask| mask.of(x, x.len() / self.rows.len()));
        let own = self.gradient[projection as usize].get_or_insert_with(|| adapter.zeros());
        adapter.add_gradient(seen.as_deref().unwrap_or(x), down, grad, d_down, own);
    }

    /// The gradient of the feed-forward block's normalized input. Given are its input before that, gate and up, what it returned and the
    /// gradient of the residual sum after it.
    fn through_feed_forward(&mut self, x: &[f32], pair: &Pair, returned: &[f32], grad: &[f32]) -> Buffer {
        let (work, rows, threads) = (self.work, self.rows.clone(), self.threads);
        let (hidden, intermediate) = (work.architecture.hidden, work.architecture.intermediate);
        let d_returned = before_norm(returned, work.layer.feed_forward_output_norm.as_ref(), grad);
        let d_returned = d_returned.as_deref().unwrap_or(grad);
        let grad = Left::new(d_returned, hidden, work.kernel);
        let [gate, up, out] =
            [Projection::GateProj, Projection::UpProj, Projection::DownProj].map(|projection| self.linear(projection));
        let room = |wanted: bool| wanted.then(|| Buffer::new(rows.len() * intermediate));
        let trained = gate.adapter.is_some() || up.adapter.is_some();
        let mut inner = Inner { product: room(out.adapter.is_some()), grads: [room(trained), room(trained)] };
        let d_down = out.down(&grad);
        let gated = work.gated(work.call.only_adapter(), rows.clone());
        let grads = gated.backward((pair, rows), &out, (&grad, d_down.as_ref()), &mut inner, threads);
        // Only an adapter asks for the input again.
        let mut normed = Buffer::new(if trained { x.len() } else { 0 });
        work.layer.feed_forward_norm.forward(x, &mut normed);
        let x_normed = Left::new(&normed, hidden, work.kernel);
        let mut d_normed = Buffer::new(x.len());
        let own = [(Projection::GateProj, gate, &gated.gate), (Projection::UpProj, up, &gated.up)];
        for (index, (projection, linear, forward)) in own.into_iter().enumerate() {
            let d_down = linear.down(&grads[index]);
            linear.apply_all(&grads[index], d_down.as_ref(), &mut d_normed, index > 0, threads);
            if let Some(grad) = &inner.grads[index] {
                self.keep(projection, &normed, forward.down(&x_normed).as_ref(), grad, d_down.as_ref());
            }
        }
        if let Some(product) = &inner.product {
            let left = Left::new(product, intermediate, work.kernel);
            let down = Linear { backward: false, ..out }.down(&left);
            self.keep(Projection::DownProj, product, down.as_ref(), d_returned, d_down.as_ref());
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
