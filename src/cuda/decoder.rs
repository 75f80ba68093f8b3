//! The decoder on a device: one copy of the weights, which sampler, learner and reference share.
//!
//! Everything is asked for in one order. The host waits only where it reads: chosen tokens, log-probabilities, the norm of a gradient.

use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};

use super::call::{Applied, Backward, Packed, Place, Prepared, Selected, applied};
use super::device::{Array, Gpu, Product, Purpose, Room, View};
use super::kernels::{self, Block, Norm, STRETCHES, Tallies};
use super::layer::{Attended, Back, Work};
use super::steps::{Shape, Steps, filled, once};
use super::tensors::{Codes, Reading, Weight};
use crate::config::Quantization;
use crate::model::parts::Tensors;
use crate::model::{Architecture, Call, LayerDone, Question, Traced, Weights};
use crate::ops::head::{Choice, Chosen, Logits};
use crate::ops::keys::{BLOCK, padded};

/// Rows whose logits are computed together, and how many tokens of the vocabulary at a time.
pub(super) const ROWS: usize = 4096;
pub(super) const CHUNK: usize = 8192;
/// Logits that exist at once where tokens are chosen.
pub(super) const CHOOSING: usize = 1 << 28;

/// The frozen tensors on a device.
pub struct Decoder {
    pub(super) gpu: Arc<Gpu>,
    pub(super) architecture: Arc<Architecture>,
    pub(super) tensors: Tensors<Array<f32>, Array<u16>, Weight>,
    pub(super) codes: Codes,
    /// Rotary frequencies by kind of attention.
    frequencies: Vec<Array<f32>>,
    /// Whoever decodes holds it for a whole step.
    steps: Mutex<Steps>,
}

/// Keys and values of every layer, [key rows, key heads · dim] each.
pub type KeyStores = Vec<[Array<u16>; 2]>;

/// The same, which graphs may outlive.
pub struct Keys(Arc<KeyStores>);

/// What tokens are chosen from and with: the rows that predict and a random number for each, where a call was sent to.
struct Asked {
    rows: Place<u32>,
    places: Place<f64>,
    count: usize,
    logits: Logits,
}

/// What a forward pass keeps for a backward one.
pub struct Kept {
    prepared: Prepared,
    inputs: Vec<(Array<f32>, Option<Attended>)>,
    /// The output of the last layer, and the rows of it that predict, normed.
    last: Array<f32>,
    hidden: Array<u16>,
    selected: Selected,
    log_sums: Array<f32>,
}

/// How many tokens' keys and values fit into a third of what weights of so many bytes leave: it must not depend on what is free just
/// now.
pub fn stored_tokens(gpu: &Gpu, architecture: &Architecture, base: usize) -> usize {
    let total = gpu.device().room().map_or(0, |room| room.total);
    total.saturating_sub(base) / 3 / Keys::row_bytes(architecture) / BLOCK * BLOCK
}

impl Keys {
    /// What a row takes, in bytes.
    pub fn row_bytes(architecture: &Architecture) -> usize {
        2 * size_of::<u16>() * architecture.layers.len() * architecture.key_value_heads * architecture.head_dim
    }
}

impl Decoder {
    pub(crate) fn load(
        gpu: &Arc<Gpu>,
        architecture: &Arc<Architecture>,
        weights: &Weights,
        quantization: Option<Quantization>,
    ) -> Result<Self> {
        let tensors = Tensors::assemble(architecture, &mut Reading { gpu, weights, architecture, quantization })?;
        let frequencies = architecture.attention.iter().map(|kind| {
            let frequencies: Vec<f32> = kind.frequencies.iter().map(|&frequency| frequency as f32).collect();
            gpu.upload(Purpose::Base, &frequencies)
        });
        let (frequencies, codes) = (frequencies.collect::<Result<_>>()?, Codes::new(gpu)?);
        let (gpu, architecture, steps) = (gpu.clone(), architecture.clone(), Mutex::default());
        Ok(Self { gpu, architecture, tensors, codes, frequencies, steps })
    }

    /// Room for the keys and values of so many rows.
    pub fn keys(&self, rows: usize) -> Result<Keys> {
        let Architecture { key_value_heads, head_dim, ref layers, .. } = *self.architecture;
        let store = || self.gpu.zeros(Purpose::Keys, padded(rows) * key_value_heads * head_dim);
        Ok(Keys(Arc::new(layers.iter().map(|_| Ok([store()?, store()?])).collect::<Result<_>>()?)))
    }

    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// As [`stored_tokens`].
    pub fn stored_tokens(&self) -> usize {
        stored_tokens(&self.gpu, &self.architecture, self.gpu.used(Purpose::Base).0)
    }

    /// ε of every norm.
    pub(super) fn epsilon(&self) -> f32 {
        self.architecture.norm_epsilon as f32
    }

    pub(super) fn norm(&self, gain: &Array<f32>) -> Norm {
        (gain.view(), self.epsilon())
    }

    fn embed(&self, call: &Prepared) -> Result<Array<f32>> {
        let (hidden, scale) = (self.architecture.hidden, self.architecture.embedding_scale as f32);
        let x = call.gpu.array(Purpose::Activations, call.rows * hidden)?;
        kernels::embed(&call.gpu, call.ids, self.tensors.embedding.view(), scale, x.view(), [call.rows, hidden])?;
        Ok(x)
    }

    /// The final norm of some rows of the last layer's output, rounded, and as it is if that is wanted.
    fn normed(
        &self,
        gpu: &Arc<Gpu>,
        x: &Array<f32>,
        rows: View<u32>,
        to: Option<View<f32>>,
        count: usize,
    ) -> Result<Array<u16>> {
        let hidden = self.architecture.hidden;
        let selected: Array<f32> = gpu.array(Purpose::Activations, count * hidden)?;
        kernels::select_rows(gpu, x.view(), rows, selected.view(), [count, hidden])?;
        let rounded = gpu.array(Purpose::Activations, count * hidden)?;
        let (norm, shape) = (self.norm(&self.tensors.norm), [count, hidden]);
        kernels::rms_norm(gpu, selected.view(), norm, to, Some(rounded.view()), shape)?;
        Ok(rounded)
    }

    /// A call that was sent to the device.
    fn prepared(&self, gpu: &Arc<Gpu>, sent: (&Packed, &Arc<Array<u8>>), adapters: Applied) -> Result<Prepared> {
        Prepared::new(gpu, &self.architecture, &self.frequencies, sent, adapters)
    }

    /// All layers, for a sampler.
    fn layers(&self, call: &Prepared, keys: &Keys) -> Result<Array<f32>> {
        let mut x = self.embed(call)?;
        for (index, stores) in keys.0.iter().enumerate() {
            x = Work::new(self, index, call)?.forward(x.view(), stores.each_ref().map(Array::view))?;
        }
        Ok(x)
    }

    /// All layers: the normed last hidden states of selected rows.
    pub fn forward(&self, call: &Call, keys: &Keys, rows: &[u32]) -> Result<Vec<f32>> {
        let mut packed = Packed::new(&self.architecture, (call, None), false, call.ids.len())?;
        let selected = packed.parcel.add(rows);
        let (gpu, sent) = (&self.gpu, packed.parcel.send(&self.gpu)?);
        let x = self.layers(&self.prepared(gpu, (&packed, &sent), applied(gpu, call)?)?, keys)?;
        let normed = gpu.array(Purpose::Activations, rows.len() * self.architecture.hidden)?;
        self.normed(gpu, &x, selected.of(&sent), Some(normed.view()), rows.len())?;
        normed.download()
    }

    /// Chooses the token that follows each of the `predicting` rows. Only what was chosen leaves the device.
    pub fn choose(
        &self,
        call: &Call,
        keys: &Keys,
        predicting: &[u32],
        choices: &[Choice],
        logits: Logits,
    ) -> Result<Vec<Chosen>> {
        ensure!(choices.len() == predicting.len(), "head: {} choices for {} rows", choices.len(), predicting.len());
        let (rows, wanted) = (call.ids.len(), predicting.len());
        // One token of every sequence.
        let decoding = [wanted, call.spans.len()] == [rows; 2] && call.spans.iter().all(|span| span.queries.len() == 1);
        let more = if decoding { filled(rows) - rows } else { 0 };
        let mut packed = Packed::new(&self.architecture, (call, None), false, rows + more)?;
        let place = |choice: &Choice| match choice {
            Choice::Greedy => -1.0,
            Choice::Sample(place) => *place,
        };
        let places: Vec<f64> = choices.iter().map(place).chain(std::iter::repeat_n(-1.0, more)).collect();
        let rows = packed.parcel.add(&[predicting, &vec![0; more]].concat());
        let asked = Asked { rows, places: packed.parcel.add(&places), count: wanted + more, logits };
        let mut adapters = applied(&self.gpu, call)?;
        let mut steps = decoding.then(|| self.steps.lock().expect("nothing panics while it decodes"));
        if let Some(steps) = &mut steps {
            steps.seat(&self.gpu, &mut adapters)?;
        }
        if let Some((last, _)) = adapters.last_mut() {
            last.end = packed.rows;
        }
        let work = |gpu: &Arc<Gpu>, sent: &Arc<Array<u8>>, to: View<u32>| {
            let x = self.layers(&self.prepared(gpu, (&packed, sent), adapters.clone())?, keys)?;
            self.choose_from(gpu, &x, &asked, sent, to)
        };
        let input = (&packed.parcel.bytes[..], 3 * asked.count);
        let numbers = match &mut steps {
            None => once(&self.gpu, input, &work)?,
            Some(steps) => {
                let shape = Shape::new(packed.rows, logits, &keys.0, &adapters);
                steps.run(&self.gpu, shape, input, &work)?
            }
        };
        chosen(&numbers, wanted)
    }

    /// Tokens, and their log-probabilities with and without temperature, one after the other.
    fn choose_from(
        &self,
        gpu: &Arc<Gpu>,
        x: &Array<f32>,
        asked: &Asked,
        sent: &Array<u8>,
        to: View<u32>,
    ) -> Result<()> {
        let &Asked { ref rows, ref places, count, logits } = asked;
        let Architecture { vocabulary, hidden: width, .. } = *self.architecture;
        let (hidden, places) = (self.normed(gpu, x, rows.of(sent), None, count)?, places.of(sent));
        let together = (CHOOSING / vocabulary).max(1);
        for first in (0..count).step_by(together) {
            let rows = together.min(count - first);
            let block = self.logits(gpu, hidden.from(first * width), rows, 0..vocabulary, logits)?;
            let to = kernels::Chosen {
                tokens: to.from(first),
                logprobs: to.from(count + first).cast(),
                untempered: to.from(2 * count + first).cast(),
            };
            let stretches: Array<f32> = gpu.array(Purpose::Head, rows * STRETCHES)?;
            kernels::choose(gpu, block.1, stretches.view(), places.from(first), to)?;
        }
        Ok(())
    }

    /// A block of logits: some rows of hidden states times some of the vocabulary.
    fn logits(
        &self,
        gpu: &Arc<Gpu>,
        hidden: View<u16>,
        rows: usize,
        tokens: std::ops::Range<usize>,
        logits: Logits,
    ) -> Result<(Array<f32>, Block)> {
        let (width, values) = (self.architecture.hidden, gpu.array(Purpose::Head, rows * tokens.len())?);
        let product = Product {
            a: hidden.plain(),
            b: self.tensors.head.from(tokens.start * width).t(),
            c: values.view().address(),
            m: rows,
            n: tokens.len(),
            k: width,
            ..Product::NONE
        };
        gpu.multiply(&product)?;
        let Logits { soft_cap, temperature } = logits;
        let soft_cap = soft_cap.unwrap_or(0.0);
        let block =
            Block { logits: values.view(), rows, first: tokens.start, tokens: tokens.len(), soft_cap, temperature };
        Ok((values, block))
    }

    /// Calls `visit(first row, block)` for every block of logits, for each block of rows the vocabulary from first to last token.
    fn walk(
        &self,
        hidden: &Array<u16>,
        logits: Logits,
        mut visit: impl FnMut(usize, Block) -> Result<()>,
    ) -> Result<()> {
        let Architecture { vocabulary, hidden: width, .. } = *self.architecture;
        let count = hidden.len() / width;
        for first in (0..count).step_by(ROWS) {
            let rows = ROWS.min(count - first);
            for token in (0..vocabulary).step_by(CHUNK) {
                let tokens = token..(token + CHUNK).min(vocabulary);
                let (_values, block) = self.logits(&self.gpu, hidden.from(first * width), rows, tokens, logits)?;
                visit(first, block)?;
            }
        }
        Ok(())
    }

    /// The log-probabilities of targets, and what a backward pass needs beside them if there will be one.
    pub fn trace(&self, call: &Call, question: &Question, keep: bool) -> Result<Traced<Kept>> {
        let (vocabulary, count) = (self.architecture.vocabulary, question.predicting.len());
        let key_rows = call.key_rows();
        ensure!(question.targets.len() == count, "head: {} targets for {count} rows", question.targets.len());
        if let Some(target) = question.targets.iter().find(|&&target| target as usize >= vocabulary) {
            anyhow::bail!("head: token {target} is outside the vocabulary of {vocabulary}");
        }
        let packed = Packed::new(&self.architecture, (call, question.dropout), true, call.ids.len())?;
        let (sent, adapters) = (packed.parcel.send(&self.gpu)?, applied(&self.gpu, call)?);
        let prepared = self.prepared(&self.gpu, (&packed, &sent), adapters)?;
        let kept = if keep { self.kept_layers(call.ids.len(), key_rows)? } else { 0 };
        let (mut x, mut inputs) = (self.embed(&prepared)?, Vec::new());
        for index in 0..self.tensors.layers.len() {
            let (output, attended) = Work::new(self, index, &prepared)?.forward_kept(x.view(), key_rows)?;
            if keep {
                inputs.push((x, (index < kept).then_some(attended)));
            }
            x = output;
        }
        let selected = Selected::new(&self.gpu, question.predicting, question.targets)?;
        let hidden = self.normed(&self.gpu, &x, selected.segments.at, None, count)?;
        let floats = || self.gpu.array::<f32>(Purpose::Head, count);
        let (max, chosen, log_sums) = (floats()?, floats()?, floats()?);
        let sums: Array<f64> = self.gpu.array(Purpose::Head, 2 * count)?;
        let tallies = Tallies { max: max.view(), sum: sums.view(), weighted: sums.from(count), chosen: chosen.view() };
        self.walk(&hidden, question.logits, |first, block| {
            kernels::tally(&self.gpu, block, selected.targets.from(first), tallies.from(first))
        })?;
        let results: Array<f32> = self.gpu.array(Purpose::Head, 2 * count)?;
        let to = [results.view(), results.from(count), log_sums.view()];
        kernels::tally_end(&self.gpu, tallies, to, count)?;
        let mut logprobs = results.download()?;
        let entropies = logprobs.split_off(count);
        let kept = keep.then_some(Kept { prepared, inputs, last: x, hidden, selected, log_sums });
        Ok(Traced { logprobs, entropies, kept })
    }

    /// How many layers' attention is kept instead of being computed again: as many as half of what is free holds.
    fn kept_layers(&self, rows: usize, key_rows: usize) -> Result<usize> {
        let Architecture { heads, key_value_heads, head_dim, hidden, ref layers, .. } = *self.architecture;
        let attention = heads * (head_dim * (2 * size_of::<f32>() + size_of::<u16>()) + size_of::<f32>());
        let keys = 2 * size_of::<u16>() * key_value_heads * head_dim;
        let Room { free, slack, .. } = self.gpu.device().room()?;
        let inputs = layers.len() * rows * hidden * size_of::<f32>();
        Ok(((free + slack).saturating_sub(inputs) / 2 / (rows * attention + key_rows * keys).max(1)).min(layers.len()))
    }

    /// From the log-probabilities to the first layer, each computed again from its input; `gradient` is that of the numbers of all
    /// of the adapter's tensors.
    pub fn backward(
        &self,
        (call, question, kept): (&Call, &Question, Kept),
        coefficients: &[f32],
        gradient: &Array<f32>,
        layer_done: LayerDone,
    ) -> Result<()> {
        let Kept { prepared, inputs, last, hidden, selected, log_sums } = kept;
        let (width, coefficients) = (self.architecture.hidden, self.gpu.upload(Purpose::Head, coefficients)?);
        let d_hidden = self.gpu.zeros(Purpose::Activations, selected.count * width)?;
        self.walk(&hidden, question.logits, |first, block| {
            let rounded: Array<u16> = self.gpu.array(Purpose::Head, block.rows * block.tokens)?;
            let sums = [log_sums.from(first), coefficients.from(first)];
            kernels::logit_gradient(&self.gpu, block, rounded.view(), selected.targets.from(first), sums)?;
            self.gpu.multiply(&Product {
                a: rounded.view().plain(),
                b: self.tensors.head.from(block.first * width).plain(),
                c: d_hidden.from(first * width).address(),
                m: block.rows,
                n: width,
                k: block.tokens,
                add: true,
                ..Product::NONE
            })
        })?;
        let grad = self.gpu.zeros(Purpose::Activations, last.len())?;
        let norm = self.norm(&self.tensors.norm);
        kernels::rms_norm_backward_at(
            &self.gpu,
            last.view(),
            norm,
            d_hidden.view(),
            grad.view(),
            selected.segments,
            width,
        )?;
        drop((d_hidden, last, hidden));
        let (backward, key_rows) = (Backward::new(&self.gpu, call)?, call.key_rows());
        for (index, (x, attended)) in inputs.into_iter().enumerate().rev() {
            let work = Work::new(self, index, &prepared)?;
            let back = Back { work, backward: &backward, gradient: gradient.view(), key_rows };
            back.run(x.view(), attended, grad.view())?;
            layer_done()?;
        }
        Ok(())
    }
}

/// What was chosen for the first `wanted` rows: tokens of all rows, then both log-probabilities.
fn chosen(numbers: &[u32], wanted: usize) -> Result<Vec<Chosen>> {
    let count = numbers.len() / 3;
    let one = |row: usize| {
        let [logprob, untempered] = [1, 2].map(|part| f32::from_bits(numbers[part * count + row]));
        ensure!(
            logprob.is_finite() && untempered.is_finite(),
            "head: row {row} has no finite probabilities; the adapter or the weights hold NaN or infinity"
        );
        Ok(Chosen { token: numbers[row], logprob, untempered })
    };
    (0..wanted).map(one).collect()
}
