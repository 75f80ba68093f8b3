//! The decoder on this processor: layers on plain rows of f32, and what goes on before and after them.
//!
//! A forward pass for a backward one keeps every layer's input, and what attention did there as far as there is room for it.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use rayon::prelude::*;

use super::layer::{AdapterGradient, Attended, Frozen, Layer, Work};
use super::parts::{LayerTensors, Tensors};
use super::{Architecture, Call, LayerDone, Projection, Question, Traced};
use crate::ops::buffer::Buffer;
use crate::ops::dropout::{Dropout, Mask};
use crate::ops::head::{self, Choice, Chosen, LogProbabilities, Logits};
use crate::ops::kernel::Kernel;
use crate::ops::keys::Keys;
use crate::ops::norm::RmsNorm;
use crate::ops::panels::Panels;
use crate::ops::quantized::Weight;
use crate::ops::rope::Rotation;
use crate::ops::rounded::Rounded;
use crate::ops::rows::on_the_pool;
use crate::policy::Adapter;

/// What attention may keep for the backward pass of a micro-batch instead of computing it again, in bytes.
const KEPT: usize = 3 << 28;

/// Rows that a thread embeds at least: of fewer it is done before another wakes up.
const TOGETHER: usize = 64;

/// The frozen tensors, and what multiplies with them.
pub(super) struct Decoder {
    architecture: Arc<Architecture>,
    kernel: Kernel,
    embedding: Arc<Panels>,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Arc<Panels>,
}

/// What every layer of one call needs beside its input.
pub(super) struct LayerCall<'a> {
    /// By layer, the number of its rotation; by kind of attention.
    kinds: &'a [usize],
    rotations: Vec<Rotation>,
    pub call: &'a Call<'a>,
    dropout: Option<&'a Dropout>,
}

/// What a layer is computed from again, with what attention did there if there is room for it.
type LayerInput = (Buffer, Option<Attended>);

/// What a forward pass keeps for a backward one.
pub(super) struct Kept {
    inputs: Vec<LayerInput>,
    /// The output of the last layer.
    last: Buffer,
    /// What the head found, and what it summed up for the gradient.
    head: LogProbabilities,
    others: Buffer,
}

impl Kept {
    /// Leaves the inputs of layers alone.
    pub fn forget(&mut self) {
        self.inputs.iter_mut().for_each(|(_, attended)| *attended = None);
    }
}

impl<'a> LayerCall<'a> {
    fn new(architecture: &'a Architecture, call: &'a Call<'a>, dropout: Option<&'a Dropout>) -> Self {
        let kinds = architecture.attention.iter();
        let rotations = kinds.map(|kind| Rotation::new(call.positions, &kind.frequencies)).collect();
        Self { kinds: &architecture.layers, rotations, call, dropout }
    }

    pub fn mask(&self, rows: Range<usize>, layer: usize, projection: Projection) -> Option<Mask<'_>> {
        self.dropout.map(|dropout| dropout.mask(rows, layer, projection as usize))
    }

    pub fn rotation(&self, layer: usize) -> &Rotation {
        &self.rotations[self.kinds[layer]]
    }

    /// The parts of a block of rows that have an adapter in common, counted from the block's first row.
    pub fn adapters(&self, rows: &Range<usize>) -> impl Iterator<Item = (Range<usize>, Option<&Adapter>)> {
        let (first, last) = (rows.start, rows.end);
        self.call.adapters.iter().filter_map(move |(range, adapter)| {
            let (start, end) = (range.start.max(first), range.end.min(last));
            (start < end).then(|| (start - first..end - first, *adapter))
        })
    }

    /// The adapter of a call whose rows have all the same.
    pub fn only_adapter(&self) -> Option<&Adapter> {
        self.call.only_adapter()
    }
}

impl Decoder {
    pub fn new(architecture: Arc<Architecture>, kernel: Kernel, tensors: Tensors<Vec<f32>, Panels, Weight>) -> Self {
        let Tensors { embedding, head, norm, layers } = tensors;
        let epsilon = architecture.norm_epsilon;
        let layers = layers.into_iter().map(|layer| Layer::new(layer, epsilon)).collect();
        Self { architecture, kernel, embedding, layers, norm: RmsNorm { gain: norm, epsilon }, head }
    }

    pub fn head(&self) -> &Panels {
        &self.head
    }

    /// Embeds the call's tokens: [rows, hidden].
    fn embed(&self, call: &Call) -> Buffer {
        let (hidden, scale) = (self.architecture.hidden, self.architecture.embedding_scale as f32);
        let mut embedded = Buffer::new(call.ids.len() * hidden);
        let rows = embedded.par_chunks_exact_mut(hidden).with_min_len(TOGETHER);
        rows.zip(call.ids).for_each(|(row, id)| {
            self.embedding.row(*id as usize, row);
            if scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= scale);
            }
        });
        embedded
    }

    /// One layer: `x` [rows, hidden] to the output, of the same shape, and what attention did on the way. The call's keys and
    /// values are added to `keys`.
    fn layer(
        &self,
        index: usize,
        x: &[f32],
        context: &LayerCall,
        keys: &mut Keys,
        keep: bool,
    ) -> Result<(Buffer, Attended)> {
        on_the_pool(|| {
            let mut y = Buffer::new(x.len());
            let attended = self.work(index, context)?.forward(x, keys, &mut y, keep);
            Ok((y, attended))
        })
    }

    /// The same layer backward: replaces `grad`, the gradient of its output, by that of its input `x`, and returns the adapter's
    /// gradients. `room` is for the call's keys and values.
    fn layer_backward(
        &self,
        index: usize,
        (x, kept): LayerInput,
        grad: &mut [f32],
        context: &LayerCall,
        room: [&mut Keys; 2],
    ) -> Result<AdapterGradient> {
        on_the_pool(|| Ok(self.work(index, context)?.backward(&x, kept, grad, room)))
    }

    fn work<'a>(&'a self, index: usize, context: &'a LayerCall) -> Result<Work<'a>> {
        Work::new(&self.layers[index], index, &self.architecture, context, self.kernel)
    }

    /// The final norm of some rows of the last layer's output: ready for the head.
    fn normed(&self, x: &[f32], rows: &[u32]) -> Buffer {
        let hidden = self.norm.gain.len();
        let mut normed = Buffer::new(rows.len() * hidden);
        for (to, row) in normed.chunks_exact_mut(hidden).zip(rows) {
            self.norm.forward(&x[*row as usize * hidden..][..hidden], to);
        }
        normed
    }

    /// The gradient of the last layer's output [rows of `x`, hidden] from that of the normed `selected` rows of it.
    fn normed_backward(&self, x: &[f32], selected: &[u32], grad: &[f32]) -> Buffer {
        let hidden = self.norm.gain.len();
        let mut dx = Buffer::zeros(x.len());
        for (row, grad) in selected.iter().zip(grad.chunks_exact(hidden)) {
            let place = *row as usize * hidden..(*row as usize + 1) * hidden;
            self.norm.backward(&x[place.clone()], grad, &mut dx[place]);
        }
        dx
    }

    /// All layers: the normed last hidden states of selected rows.
    pub fn forward(&self, call: &Call, store: &mut [Keys], selected: &[u32]) -> Result<Buffer> {
        let context = LayerCall::new(&self.architecture, call, None);
        let mut x = self.embed(call);
        for (index, keys) in store.iter_mut().enumerate() {
            x = self.layer(index, &x, &context, keys, false)?.0;
        }
        Ok(self.normed(&x, selected))
    }

    /// Chooses the token that follows each of the `predicting` rows.
    pub fn choose(
        &self,
        call: &Call,
        store: &mut [Keys],
        predicting: &[u32],
        choices: &[Choice],
        logits: Logits,
    ) -> Result<Vec<Chosen>> {
        on_the_pool(|| head::choose(&self.forward(call, store, predicting)?, &self.head, choices, logits))
    }

    /// Log-probabilities, and what a backward pass needs beside them if there will be one.
    pub fn trace(&self, call: &Call, question: &Question, keep: bool) -> Result<Traced<Kept>> {
        let context = LayerCall::new(&self.architecture, call, question.dropout);
        let kept = if keep { kept_layers(&self.architecture, call.ids.len(), self.kernel) } else { 0 };
        let (mut keys, mut inputs) = (self.keys(call), Vec::new());
        let mut x = self.embed(call);
        for index in 0..self.layers.len() {
            let (output, attended) = self.layer(index, &x, &context, &mut keys, index < kept)?;
            if keep {
                inputs.push((x, (index < kept).then_some(attended)));
            }
            x = output;
        }
        let hidden = self.normed(&x, question.predicting);
        let mut others = Buffer::zeros(if keep { hidden.len() } else { 0 });
        let to = keep.then_some(&mut *others);
        let head = head::log_probabilities(&hidden, &self.head, question.targets, question.logits, to)?;
        let (logprobs, entropies) = (head.logprobs.clone(), head.entropies().collect());
        let kept = keep.then_some(Kept { inputs, last: x, head, others });
        Ok(Traced { logprobs, entropies, kept })
    }

    /// From the log-probabilities to the first layer, each computed again from its input.
    pub fn backward(
        &self,
        (call, question, kept): (&Call, &Question, Kept),
        coefficients: &[f32],
        gradients: &mut [Vec<f32>],
        layer_done: LayerDone,
    ) -> Result<()> {
        let Kept { inputs, last, head, mut others } = kept;
        let Question { targets, logits, .. } = *question;
        head::log_probabilities_backward(&mut others, &self.head, targets, logits, &head, coefficients);
        let mut grad = self.normed_backward(&last, question.predicting, &others);
        let context = LayerCall::new(&self.architecture, call, question.dropout);
        let (mut keys, mut swapped) = (self.keys(call), self.keys(call));
        for (index, input) in inputs.into_iter().enumerate().rev() {
            let of_layer = self.layer_backward(index, input, &mut grad, &context, [&mut keys, &mut swapped])?;
            for (projection, gradient) in Projection::ALL.into_iter().zip(of_layer) {
                let indices = call.only_adapter().and_then(|adapter| adapter.indices(index, projection));
                let (Some(gradient), Some([a, b])) = (gradient, indices) else { continue };
                let of_b = gradient.b();
                for (total, part) in [(a, gradient.a), (b, of_b)] {
                    gradients[total].iter_mut().zip(part).for_each(|(total, part)| *total += part);
                }
            }
            layer_done()?;
        }
        Ok(())
    }

    /// Room for the keys and values of one layer.
    fn keys(&self, call: &Call) -> Keys {
        // All layers have keys of one shape.
        Keys::new(call.key_rows(), self.architecture.heads_of(0), self.kernel, false)
    }
}

/// What is kept of a row in a layer, in bytes: what attention was given and returned, and the residual stream after it.
pub fn kept_bytes(architecture: &Architecture, kernel: Kernel) -> usize {
    let middle = if architecture.output_norms { 0 } else { architecture.hidden };
    architecture.attention_bytes(Rounded::bytes(kernel)) + size_of::<f32>() * middle
}

/// How many layers' attention is kept in a micro-batch of so many rows.
pub fn kept_layers(architecture: &Architecture, rows: usize, kernel: Kernel) -> usize {
    (KEPT / (kept_bytes(architecture, kernel) * rows).max(1)).min(architecture.layers.len())
}

impl Layer {
    fn new(tensors: LayerTensors<Vec<f32>, Weight>, epsilon: f64) -> Self {
        let norm = |gain: Vec<f32>| RmsNorm { gain, epsilon };
        Self {
            attention_norm: norm(tensors.attention_norm),
            attention_output_norm: tensors.attention_output_norm.map(norm),
            feed_forward_norm: norm(tensors.feed_forward_norm),
            feed_forward_output_norm: tensors.feed_forward_output_norm.map(norm),
            query_norm: tensors.query_norm.map(norm),
            key_norm: tensors.key_norm.map(norm),
            projections: tensors.projections.map(|(weight, bias)| Frozen { weight, bias }),
        }
    }
}
