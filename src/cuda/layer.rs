//! One layer on the device, forward and backward: what model/layer.rs does, with all rows at once.
//!
//! What multiplies with a weight is rounded to bf16 by the kernel that makes it; everything else is f32.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;

use super::attention::{self, Saved, Stores};
use super::call::{Backward, Prepared};
use super::decoder::Decoder;
use super::device::{Array, Gpu, Number, Product, Purpose, View};
use super::factors::{Factors, PARTS};
use super::kernels::{self, GateGradients, Norm};
use super::tensors::{Unpacked, Weight};
use crate::model::Projection;
use crate::model::parts::LayerTensors;
use crate::ops::attention::Heads;
use crate::policy::Pair;

/// Rows of which an adapter's first matrix is multiplied in one launch, as in decoding.
const FEW_ROWS: usize = 64;

/// A layer at work on the rows of a call.
pub struct Work<'a> {
    decoder: &'a Decoder,
    layer: &'a LayerTensors<Array<f32>, Weight>,
    index: usize,
    call: &'a Prepared,
    /// By [`Projection`].
    weights: Vec<Unpacked<'a>>,
}

/// What attention was given and returned, by rows of the call, for a backward pass.
pub struct Attended {
    queries: Array<f32>,
    /// Keys and values by key rows.
    stores: [Array<u16>; 2],
    attended: Array<f32>,
    rounded: Array<u16>,
    log_sums: Array<f32>,
}

/// What comes out of an adapter's first matrix.
struct Down {
    /// [rows, rank].
    values: Array<f32>,
    /// The same for the second matrix, once for each part of it.
    left: Array<u16>,
}

/// Rows between attention and the feed-forward block.
struct Middle {
    /// What attention's output projection returned.
    returned: Array<f32>,
    /// The residual stream after it, and what the feed-forward block is given of that.
    x: Array<f32>,
    normed: Array<u16>,
}

impl<'a> Work<'a> {
    pub fn new(decoder: &'a Decoder, index: usize, call: &'a Prepared) -> Result<Self> {
        let layer = &decoder.tensors.layers[index];
        let weights = layer.projections.iter().map(|(weight, _)| weight.unpacked(&call.gpu, &decoder.codes));
        Ok(Self { decoder, layer, index, call, weights: weights.collect::<Result<_>>()? })
    }

    fn gpu(&self) -> &Arc<Gpu> {
        &self.call.gpu
    }

    fn room<T: Number>(&self, width: usize) -> Result<Array<T>> {
        self.gpu().array(Purpose::Activations, self.call.rows * width)
    }

    fn heads(&self) -> Heads {
        let architecture = &self.decoder.architecture;
        architecture.heads_of(architecture.layers[self.index])
    }

    fn hidden(&self) -> usize {
        self.decoder.architecture.hidden
    }

    /// (out, in) of a projection.
    fn dimensions(&self, projection: Projection) -> (usize, usize) {
        self.decoder.architecture.dimensions(projection)
    }

    fn norm(&self, gain: &Array<f32>) -> Norm {
        self.decoder.norm(gain)
    }

    /// Rows of the residual stream, normalized and rounded.
    fn normed(&self, gain: &Array<f32>, x: View<f32>) -> Result<Array<u16>> {
        let normed = self.room(self.hidden())?;
        let shape = [self.call.rows, self.hidden()];
        kernels::rms_norm(self.gpu(), x, self.norm(gain), None, Some(normed.view()), shape)?;
        Ok(normed)
    }

    /// The same, also as it was before it was rounded.
    fn normed_twice(&self, gain: &Array<f32>, x: View<f32>) -> Result<(Array<f32>, Array<u16>)> {
        let (normed, rounded) = (self.room(self.hidden())?, self.room(self.hidden())?);
        let (to, shape) = ((Some(normed.view()), Some(rounded.view())), [self.call.rows, self.hidden()]);
        kernels::rms_norm(self.gpu(), x, self.norm(gain), to.0, to.1, shape)?;
        Ok((normed, rounded))
    }

    fn rounded(&self, x: View<f32>, width: usize) -> Result<Array<u16>> {
        let rounded = self.room(width)?;
        kernels::round_rows(self.gpu(), x, rounded.view(), self.call.rows * width)?;
        Ok(rounded)
    }

    /// A projection of all rows, each with its adapter: [rows, out].
    fn project(&self, projection: Projection, x: View<u16>) -> Result<Array<f32>> {
        let ((wide, narrow), y) = (self.dimensions(projection), self.room(self.dimensions(projection).0)?);
        let (a, b) = (x.plain(), self.weights[projection as usize].view().t());
        let product = Product { a, b, c: y.view().address(), m: self.call.rows, n: wide, k: narrow, ..Product::NONE };
        self.gpu().multiply(&product)?;
        for (range, factors) in &self.call.adapters {
            let Some((factors, pair)) = self.pair(factors, projection) else { continue };
            let down = self.down((factors, pair), projection, x.from(range.start * narrow), range)?;
            let [_, b] = factors.matrices(pair);
            let (c, k) = (y.from(range.start * wide).address(), PARTS * pair.rank);
            let (a, b) = (down.left.view().plain(), b.plain());
            self.gpu().multiply(&Product { a, b, c, m: range.len(), n: wide, k, add: true, ..Product::NONE })?;
        }
        if let Some(bias) = &self.layer.projections[projection as usize].1 {
            kernels::add_bias(self.gpu(), y.view(), bias.view(), [self.call.rows, wide])?;
        }
        Ok(y)
    }

    fn pair<'f>(&self, factors: &'f Option<Arc<Factors>>, projection: Projection) -> Option<(&'f Factors, &'f Pair)> {
        let factors = factors.as_deref()?;
        Some((factors, factors.layout.pair(self.index, projection)?))
    }

    /// What an adapter makes of some rows' inputs before its second matrix.
    fn down(
        &self,
        (factors, pair): (&Factors, &Pair),
        projection: Projection,
        x: View<u16>,
        rows: &Range<usize>,
    ) -> Result<Down> {
        let [a, _] = factors.matrices(pair);
        let mask = self.call.mask(rows.start, self.index, projection);
        let seen = mask.map(|(mask, _)| {
            let seen = self.gpu().array(Purpose::Activations, rows.len() * pair.narrow)?;
            kernels::mask_rounded(self.gpu(), x, seen.view(), mask, [rows.len(), pair.narrow])?;
            Ok::<_, anyhow::Error>(seen)
        });
        let seen = seen.transpose()?;
        let x = seen.as_ref().map_or(x, Array::view);
        self.first_matrix((x, pair.narrow), a, pair.rank, rows.len(), mask.map_or(1.0, |(_, scale)| scale))
    }

    /// The same in the direction of gradients: of the outputs' gradient.
    fn down_backward(
        &self,
        (factors, pair): (&Factors, &Pair),
        projection: Projection,
        grad: View<u16>,
    ) -> Result<Down> {
        let ([_, b], mask) = (factors.matrices(pair), self.call.mask(0, self.index, projection));
        self.first_matrix((grad, pair.wide), b, pair.rank, self.call.rows, mask.map_or(1.0, |(_, scale)| scale))
    }

    fn first_matrix(
        &self,
        (x, width): (View<u16>, usize),
        matrix: View<u16>,
        rank: usize,
        rows: usize,
        scale: f32,
    ) -> Result<Down> {
        let wide = PARTS * rank;
        let values = self.gpu().array(Purpose::Activations, rows * rank)?;
        let left = self.gpu().array(Purpose::Activations, rows * wide)?;
        if rows <= FEW_ROWS {
            let (shape, to) = ([rows, rank, PARTS, width], (values.view(), left.view()));
            kernels::adapter_down_rows(self.gpu(), x, matrix, shape, scale, to)?;
            return Ok(Down { values, left });
        }
        let parts: Array<f32> = self.gpu().array(Purpose::Activations, rows * wide)?;
        let (a, b, c) = (x.plain(), matrix.t(), parts.view().address());
        self.gpu().multiply(&Product { a, b, c, m: rows, n: wide, k: width, ..Product::NONE })?;
        kernels::adapter_down(self.gpu(), parts.view(), [rows, rank, PARTS], scale, values.view(), left.view())?;
        Ok(Down { values, left })
    }

    /// Computes queries, keys and values, and writes the latter to the stores; queries.
    fn begin_attention(&self, x: View<f32>, stores: Stores) -> Result<Array<f32>> {
        let normed = self.normed(&self.layer.attention_norm, x)?;
        let [queries, keys, values] = [Projection::QProj, Projection::KProj, Projection::VProj]
            .map(|projection| self.project(projection, normed.view()));
        let (queries, keys, values) = (queries?, keys?, values?);
        let gains = [&self.layer.query_norm, &self.layer.key_norm].map(|gain| gain.as_ref().map(Array::view));
        let norms = (gains, self.decoder.epsilon());
        let heads = [queries.view(), keys.view(), values.view()];
        let (tables, to) = (self.call.rotation(self.index), (self.call.to_row, stores));
        attention::store_heads(self.gpu(), heads, norms, tables, to, self.call.rows, &self.heads())?;
        Ok(queries)
    }

    fn run_attention(&self, queries: View<f32>, stores: Stores, to: attention::Attended) -> Result<()> {
        let (gpu, call, heads) = (self.gpu(), self.call, self.heads());
        if let Some(row_span) = call.row_span {
            attention::rows(gpu, queries, stores, [row_span, call.spans], to, call.rows, &heads)?;
        }
        attention::forward(gpu, queries, stores, call.tiles, call.spans, to, &heads)
    }

    /// Attention for a backward pass, over keys of its own.
    fn attend(&self, x: View<f32>, key_rows: usize) -> Result<Attended> {
        let Heads { query, key, dim, .. } = self.heads();
        let store = || self.gpu().array(Purpose::Activations, key_rows * key * dim);
        let stores = [store()?, store()?];
        let queries = self.begin_attention(x, stores.each_ref().map(Array::view))?;
        let (attended, rounded) = (self.room(query * dim)?, self.room(query * dim)?);
        let log_sums = self.room(query)?;
        let to = attention::Attended {
            out: Some(attended.view()),
            rounded: Some(rounded.view()),
            log_sums: Some(log_sums.view()),
        };
        self.run_attention(queries.view(), stores.each_ref().map(Array::view), to)?;
        Ok(Attended { queries, stores, attended, rounded, log_sums })
    }

    /// `y = layer(x)`, both [rows, hidden]; new keys and values are added to the stores.
    pub fn forward(&self, x: View<f32>, stores: Stores) -> Result<Array<f32>> {
        let Heads { query, dim, .. } = self.heads();
        let queries = self.begin_attention(x, stores)?;
        let rounded: Array<u16> = self.room(query * dim)?;
        let to = attention::Attended { out: None, rounded: Some(rounded.view()), log_sums: None };
        self.run_attention(queries.view(), stores, to)?;
        self.feed_forward(&self.middle(x, rounded.view())?)
    }

    /// The same for a backward pass, with what attention did.
    pub fn forward_kept(&self, x: View<f32>, key_rows: usize) -> Result<(Array<f32>, Attended)> {
        let kept = self.attend(x, key_rows)?;
        Ok((self.feed_forward(&self.middle(x, kept.rounded.view())?)?, kept))
    }

    /// From what attention returned to the feed-forward block.
    fn middle(&self, x: View<f32>, attended: View<u16>) -> Result<Middle> {
        let returned = self.project(Projection::OProj, attended)?;
        let (norm, normed) = (&self.layer.attention_output_norm, self.room(self.hidden())?);
        let next = Some((self.layer.feed_forward_norm.view(), normed.view()));
        let sum = self.add_normed(x, &returned, norm.as_ref(), next)?;
        Ok(Middle { returned, x: sum, normed })
    }

    /// `x + returned`, normalized first where the family does so, and the next block's norm of that, rounded.
    fn add_normed(
        &self,
        x: View<f32>,
        returned: &Array<f32>,
        norm: Option<&Array<f32>>,
        next: Option<(View<f32>, View<u16>)>,
    ) -> Result<Array<f32>> {
        let (sum, shape) = (self.room(self.hidden())?, [self.call.rows, self.hidden()]);
        let gains = [norm.map(Array::view), next.map(|(gain, _)| gain)];
        let to = (sum.view(), next.map(|(_, normed)| normed));
        kernels::residual_norm(self.gpu(), [x, returned.view()], (gains, self.decoder.epsilon()), to, shape)?;
        Ok(sum)
    }

    /// The layer's output from what comes before the feed-forward block.
    fn feed_forward(&self, Middle { x, normed, .. }: &Middle) -> Result<Array<f32>> {
        let gated =
            [Projection::GateProj, Projection::UpProj].map(|projection| self.project(projection, normed.view()));
        let [gate, up] = gated;
        let returned = self.project(Projection::DownProj, self.product(&gate?, &up?)?.view())?;
        self.add_normed(x.view(), &returned, self.layer.feed_forward_output_norm.as_ref(), None)
    }

    fn product(&self, gate: &Array<f32>, up: &Array<f32>) -> Result<Array<u16>> {
        let product = self.room(self.decoder.architecture.intermediate)?;
        let activation = self.decoder.architecture.activation;
        kernels::gate(self.gpu(), gate.view(), up.view(), product.view(), activation, product.len())?;
        Ok(product)
    }
}

/// The backward pass. All rows have the same adapter, or none.
pub struct Back<'a> {
    pub work: Work<'a>,
    pub backward: &'a Backward,
    /// Of all tensors of the adapter.
    pub gradient: View<f32>,
    pub key_rows: usize,
}

impl Back<'_> {
    fn adapter(&self, projection: Projection) -> Option<(&Factors, &Pair)> {
        let (_, factors) = self.work.call.adapters.first()?;
        self.work.pair(factors, projection)
    }

    /// Replaces `grad`, the gradient of the layer's output, by that of its input `x`, and adds those of the adapter. What attention
    /// did is computed again unless it was kept.
    pub fn run(&self, x: View<f32>, kept: Option<Attended>, grad: View<f32>) -> Result<()> {
        let kept = kept.map_or_else(|| self.work.attend(x, self.key_rows), Ok)?;
        let d_attended = self.middle(x, &kept, grad)?;
        let d_heads = self.attention(kept, d_attended)?;
        self.heads(x, grad, d_heads)
    }

    /// Writes the gradient of a projection's input, given that of its output, or adds it; and what an adapter makes of the latter
    /// on the way.
    fn through(&self, projection: Projection, grad: View<u16>, dx: View<f32>, add: bool) -> Result<Option<Down>> {
        let (work, gpu, rows) = (&self.work, self.work.gpu(), self.work.call.rows);
        let (wide, narrow) = work.dimensions(projection);
        let (a, b, c) = (grad.plain(), work.weights[projection as usize].view().plain(), dx.address());
        gpu.multiply(&Product { a, b, c, m: rows, n: narrow, k: wide, add, ..Product::NONE })?;
        let Some((factors, pair)) = self.adapter(projection) else { return Ok(None) };
        let d_down = work.down_backward((factors, pair), projection, grad)?;
        let [up, _] = factors.matrices(pair);
        let (a, b, k) = (d_down.left.view().plain(), up.plain(), PARTS * pair.rank);
        match work.call.mask(0, work.index, projection) {
            None => gpu.multiply(&Product { a, b, c, m: rows, n: narrow, k, add: true, ..Product::NONE })?,
            Some((mask, _)) => {
                let share: Array<f32> = work.room(narrow)?;
                gpu.multiply(&Product { a, b, c: share.view().address(), m: rows, n: narrow, k, ..Product::NONE })?;
                kernels::mask_add(gpu, share.view(), dx, mask, [rows, narrow])?;
            }
        }
        Ok(Some(d_down))
    }

    /// Adds the gradients of a projection's adapter, if it carries one, given the projection's input in both forms.
    fn keep(
        &self,
        projection: Projection,
        grad: View<f32>,
        (x, rounded): (View<f32>, View<u16>),
        d_down: Option<&Down>,
    ) -> Result<()> {
        let (work, gpu, rows) = (&self.work, self.work.gpu(), self.work.call.rows);
        let (Some((factors, pair)), Some(d_down)) = (self.adapter(projection), d_down) else { return Ok(()) };
        let &Pair { rank, narrow, wide, .. } = pair;
        let down = work.down((factors, pair), projection, rounded, &(0..rows))?;
        let seen = work.call.mask(0, work.index, projection).map(|(mask, _)| {
            let seen: Array<f32> = work.room(narrow)?;
            kernels::mask_floats(gpu, x, seen.view(), mask, [rows, narrow])?;
            Ok::<_, anyhow::Error>(seen)
        });
        let seen = seen.transpose()?;
        let x = seen.as_ref().map_or(x, Array::view);
        let [of_a, of_b] = pair.places().map(|place| self.gradient.from(place).address());
        let sum = Product { k: rows, add: true, floats: true, ..Product::NONE };
        gpu.multiply(&Product { a: d_down.values.view().t(), b: x.plain(), c: of_a, m: rank, n: narrow, ..sum })?;
        let (a, b, scale) = (grad.t(), down.values.view().plain(), factors.layout.scale);
        gpu.multiply(&Product { a, b, c: of_b, m: wide, n: rank, scale, ..sum })
    }

    /// The gradient of what a block returned, from that of the residual sum; nothing if that is the same.
    fn before_norm(
        &self,
        returned: View<f32>,
        norm: Option<&Array<f32>>,
        grad: View<f32>,
    ) -> Result<Option<Array<f32>>> {
        let (work, shape) = (&self.work, [self.work.call.rows, self.work.hidden()]);
        let Some(gain) = norm else { return Ok(None) };
        let before = work.gpu().zeros(Purpose::Activations, shape[0] * shape[1])?;
        kernels::rms_norm_backward(work.gpu(), returned, work.norm(gain), grad, before.view(), shape)?;
        Ok(Some(before))
    }

    /// From the layer's output to what attention returned. `grad` becomes the gradient of the residual stream before it.
    fn middle(&self, x: View<f32>, kept: &Attended, grad: View<f32>) -> Result<Array<f32>> {
        let (work, shape) = (&self.work, [self.work.call.rows, self.work.hidden()]);
        let Middle { returned, x, .. } = work.middle(x, kept.rounded.view())?;
        let d_normed = self.feed_forward(&x, grad)?;
        let norm = work.norm(&work.layer.feed_forward_norm);
        kernels::rms_norm_backward(work.gpu(), x.view(), norm, d_normed.view(), grad, shape)?;
        let d_returned = self.before_norm(returned.view(), work.layer.attention_output_norm.as_ref(), grad)?;
        let d_returned = d_returned.as_ref().map_or(grad, Array::view);
        let rounded = work.rounded(d_returned, work.hidden())?;
        let d_attended = work.room(work.dimensions(Projection::OProj).1)?;
        let d_down = self.through(Projection::OProj, rounded.view(), d_attended.view(), false)?;
        self.keep(Projection::OProj, d_returned, (kept.attended.view(), kept.rounded.view()), d_down.as_ref())?;
        Ok(d_attended)
    }

    /// The gradient of the feed-forward block's normalized input, given the input and the gradient of the residual sum after the
    /// block.
    fn feed_forward(&self, x: &Array<f32>, grad: View<f32>) -> Result<Array<f32>> {
        let (work, architecture) = (&self.work, &self.work.decoder.architecture);
        let (normed, normed_rounded) = work.normed_twice(&work.layer.feed_forward_norm, x.view())?;
        let gate = work.project(Projection::GateProj, normed_rounded.view())?;
        let up = work.project(Projection::UpProj, normed_rounded.view())?;
        let product_rounded = work.product(&gate, &up)?;
        let d_returned = match work.layer.feed_forward_output_norm.as_ref() {
            None => None,
            norm => {
                let returned = work.project(Projection::DownProj, product_rounded.view())?;
                self.before_norm(returned.view(), norm, grad)?
            }
        };
        let d_returned = d_returned.as_ref().map_or(grad, Array::view);
        let rounded = work.rounded(d_returned, work.hidden())?;
        let d_product: Array<f32> = work.room(architecture.intermediate)?;
        let d_down = self.through(Projection::DownProj, rounded.view(), d_product.view(), false)?;
        let grads: [Array<u16>; 2] = [work.room(architecture.intermediate)?, work.room(architecture.intermediate)?];
        let product = d_down.as_ref().map(|_| work.room::<f32>(architecture.intermediate)).transpose()?;
        let to =
            GateGradients { rounded: grads.each_ref().map(Array::view), product: product.as_ref().map(Array::view) };
        let both = [gate.view(), up.view()];
        kernels::gate_backward(work.gpu(), d_product.view(), both, to, architecture.activation, gate.len())?;
        if let Some(product) = &product {
            let x = (product.view(), product_rounded.view());
            self.keep(Projection::DownProj, d_returned, x, d_down.as_ref())?;
        }
        let d_normed = work.room(work.hidden())?;
        let both = [(Projection::GateProj, &gate, &grads[0]), (Projection::UpProj, &up, &grads[1])];
        for (index, (projection, grad, rounded)) in both.into_iter().enumerate() {
            let d_down = self.through(projection, rounded.view(), d_normed.view(), index > 0)?;
            self.keep(projection, grad.view(), (normed.view(), normed_rounded.view()), d_down.as_ref())?;
        }
        Ok(d_normed)
    }

    /// Gradients of queries, keys and values, by rows of the call.
    fn attention(&self, kept: Attended, d_attended: Array<f32>) -> Result<[Array<f32>; 3]> {
        let (work, heads) = (&self.work, self.work.heads());
        let (gpu, call) = (work.gpu(), work.call);
        let (wide, narrow) = (heads.query * heads.dim, heads.key * heads.dim);
        let rounded: [Array<u16>; 2] = [work.room(wide)?, work.room(wide)?];
        let pulls: Array<f32> = work.room(heads.query)?;
        let [queries, grad] = rounded.each_ref().map(Array::view);
        let both = [kept.attended.view(), d_attended.view()];
        attention::backward_begin(gpu, kept.queries.view(), both, [queries, grad], pulls.view(), call.rows, &heads)?;
        let stores = kept.stores.each_ref().map(Array::view);
        let saved = Saved { queries, stores, grad, log_sums: kept.log_sums.view(), pulls: pulls.view() };
        let [d_queries, d_keys, d_values] = [work.room(wide)?, work.room(narrow)?, work.room(narrow)?];
        attention::backward_queries(gpu, &saved, call.tiles, call.spans, d_queries.view(), &heads)?;
        let Backward { tiles, readers, .. } = *self.backward;
        let to = [d_keys.view(), d_values.view()];
        attention::backward_keys(gpu, &saved, tiles, call.spans, readers, to, &heads)?;
        Ok([d_queries, d_keys, d_values])
    }

    /// From queries, keys and values to the layer's input: `grad` gets what comes through them.
    fn heads(
        &self,
        x: View<f32>,
        grad: View<f32>,
        [mut d_queries, mut d_keys, d_values]: [Array<f32>; 3],
    ) -> Result<()> {
        let (work, Heads { query, key, dim, .. }) = (&self.work, self.work.heads());
        let (gpu, rows) = (work.gpu(), work.call.rows);
        for (heads, count) in [(&d_queries, query), (&d_keys, key)] {
            kernels::rope(gpu, heads.view(), work.call.rotation(work.index), [rows, count, dim], -1.0)?;
        }
        let (normed, rounded) = work.normed_twice(&work.layer.attention_norm, x)?;
        let both = [
            (&mut d_queries, &work.layer.query_norm, query, Projection::QProj),
            (&mut d_keys, &work.layer.key_norm, key, Projection::KProj),
        ];
        for (after, gain, count, projection) in both {
            let Some(gain) = gain else { continue };
            let (before, d_before) =
                (work.project(projection, rounded.view())?, gpu.zeros(Purpose::Activations, after.len())?);
            let (norm, shape) = (work.norm(gain), [rows * count, dim]);
            kernels::rms_norm_backward(gpu, before.view(), norm, after.view(), d_before.view(), shape)?;
            *after = d_before;
        }
        let d_normed: Array<f32> = work.room(work.hidden())?;
        let all = [(Projection::QProj, &d_queries), (Projection::KProj, &d_keys), (Projection::VProj, &d_values)];
        for (index, (projection, d_heads)) in all.into_iter().enumerate() {
            let grad = work.rounded(d_heads.view(), work.dimensions(projection).0)?;
            let d_down = self.through(projection, grad.view(), d_normed.view(), index > 0)?;
            self.keep(projection, d_heads.view(), (normed.view(), rounded.view()), d_down.as_ref())?;
        }
        let norm = work.norm(&work.layer.attention_norm);
        kernels::rms_norm_backward(gpu, x, norm, d_normed.view(), grad, [rows, work.hidden()])
    }
}
