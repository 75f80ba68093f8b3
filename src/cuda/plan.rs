//! What a run takes of a GPU's memory: the terms that the decoder allocates, by the functions that size them there.

use std::fmt;
use std::sync::Arc;

use super::decoder::{CHOOSING, CHUNK, Keys, ROWS};
use super::device::{Gpu, Purpose};
use super::factors::PARTS;
use super::kernels::STRETCHES;
use super::steps::filled;
use crate::model::Architecture;
use crate::ops::keys::padded;
use crate::plan::Work;

/// The memory of a run on a GPU, in bytes.
#[derive(Clone, Debug)]
pub struct Memory {
    name: String,
    free: usize,
    /// By [`Purpose`].
    terms: [usize; 5],
}

/// Bytes of a number in bf16 and in f32.
const HALF: usize = 2;
const FLOAT: usize = 4;

impl Memory {
    /// Of a model whose weights take `base` bytes, and `unpacked` more while a packed layer is used, with `versions` adapters of so
    /// many `numbers`.
    pub(crate) fn of(
        gpu: &Arc<Gpu>,
        architecture: &Architecture,
        [base, unpacked]: [usize; 2],
        [numbers, versions]: [usize; 2],
        work: &Work,
        together: bool,
    ) -> Self {
        // The gradient and two moments, and one version more while it is made of another; what is sampled from lies in seats too.
        let adapter = numbers * ((PARTS * HALF + FLOAT) * (versions + 1) + PARTS * HALF * versions + 3 * FLOAT);
        let rollouts = filled(work.rollouts);
        let choosing = rollouts.min((CHOOSING / architecture.vocabulary).max(1));
        let logits = choosing * (architecture.vocabulary + STRETCHES) * FLOAT;
        // What graphs of decoding steps use is never given back.
        let graphs = unpacked + sampling(rollouts, architecture) + logits;
        let (sampling, learning) = (sampling(work.forward_rows, architecture), learning(work, architecture));
        let activations = graphs + if together { sampling + learning } else { sampling.max(learning) };
        let blocks = work.targets.min(ROWS) * CHUNK.min(architecture.vocabulary) * (FLOAT + HALF);
        let keys = padded(work.stored_rows) * Keys::row_bytes(architecture);
        let free = gpu.device().room().map_or(0, |room| room.free + room.slack);
        let terms = [base, adapter, keys, unpacked + activations, logits.max(blocks)];
        Self { name: gpu.device().name().to_string(), free, terms }
    }

    /// The most that is used at once.
    pub fn peak(&self) -> usize {
        self.terms.iter().sum()
    }
}

/// A layer's forward pass of the sampler: residual stream, what attention is given and returns, and the feed-forward block.
fn sampling(rows: usize, architecture: &Architecture) -> usize {
    let Architecture { hidden, intermediate, .. } = *architecture;
    let width = FLOAT * 4 * hidden + architecture.attention_bytes(FLOAT) + (2 * FLOAT + HALF) * intermediate;
    rows * width
}

/// The backward pass of the last layer: every layer's input, the gradient, and one layer's work; hidden states of targets.
fn learning(work: &Work, architecture: &Architecture) -> usize {
    let Architecture { hidden, intermediate, key_value_heads, head_dim, ref layers, .. } = *architecture;
    let inner = (3 * FLOAT + FLOAT + 3 * HALF) * intermediate;
    let outer = FLOAT * 9 * hidden + 3 * architecture.attention_bytes(FLOAT);
    let rows = work.micro_rows * (FLOAT * layers.len() * hidden + inner.max(outer) + outer);
    let keys = work.key_rows * 2 * HALF * key_value_heads * head_dim;
    rows + keys + work.targets * hidden * (2 * FLOAT + HALF)
}

impl fmt::Display for Memory {
    /// As TOML comments.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let gigabytes = |bytes: usize| bytes as f64 / 1e9;
        writeln!(f, "# memory of {} at its fullest (GB)", self.name)?;
        for ((_, name), bytes) in Purpose::ALL.into_iter().zip(self.terms) {
            writeln!(f, "#   {name:<26}{:>7.2}", gigabytes(bytes))?;
        }
        writeln!(f, "#   {:<26}{:>7.2}  free {:.2}", "peak", gigabytes(self.peak()), gigabytes(self.free))?;
        let largest = Purpose::ALL.into_iter().zip(self.terms).max_by_key(|(_, bytes)| *bytes);
        match largest {
            Some(((purpose, name), _)) if self.free < self.peak() => {
                writeln!(f, "# that is more than is free, and most goes to {name}: {}", purpose.remedy())
            }
            _ => Ok(()),
        }
    }
}
