//! Hidden state to the log-probability of a given token, in chunks of rows and vocabulary: full logits never exist.
//!
//! The same walk over the vocabulary serves the learner (log-probability, entropy, exact backward) and the sampler
//! (which also looks at the scores themselves), so both see the same numbers in the same order.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::matmul::{Matrix, Threads, matmul};
use super::{exp, output, values, vectorized, with_values};

/// How logits are made from `weight · hidden`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logits {
    /// c in c · tanh(logit / c) (Gemma 2).
    pub soft_cap: Option<f32>,
    /// Logits are divided by this after the cap; log-probabilities are those of the tempered softmax.
    pub temperature: f32,
}

/// Rows whose logits are computed together, and how many tokens of the vocabulary at a time.
const ROWS: usize = 256;
const CHUNK: usize = 8192;
/// The most logits that exist at once.
pub const BLOCK: usize = ROWS * CHUNK;

/// Calls `visit(rows, tokens, logits)` for every block of `hidden` [rows, width] against `weight` [vocabulary, width], in a
/// fixed order: for each block of rows, the vocabulary from first to last token. `logits` is [rows, tokens].
fn walk(
    hidden: &[f32],
    weight: &[f32],
    width: usize,
    logits: Logits,
    mut visit: impl FnMut(Range<usize>, Range<usize>, &mut [f32]),
) {
    let (all_rows, vocabulary) = (hidden.len() / width, weight.len() / width);
    let mut buffer = vec![0.0; ROWS.min(all_rows) * CHUNK.min(vocabulary)];
    for first_row in (0..all_rows).step_by(ROWS) {
        let rows = first_row..(first_row + ROWS).min(all_rows);
        for first in (0..vocabulary).step_by(CHUNK) {
            let tokens = first..(first + CHUNK).min(vocabulary);
            let block = &mut buffer[..rows.len() * tokens.len()];
            let hidden = Matrix::dense(&hidden[rows.start * width..rows.end * width], width);
            let weight = Matrix::dense(&weight[tokens.start * width..tokens.end * width], width);
            let inverse = 1.0 / logits.temperature;
            let scale = if logits.soft_cap.is_some() { 1.0 } else { inverse };
            matmul(block, tokens.len(), 0.0, scale, hidden, weight.t(), Threads::All);
            if let Some(cap) = logits.soft_cap {
                block.par_chunks_mut(tokens.len()).for_each(|row| {
                    vectorized(
                        #[inline(always)]
                        || row.iter_mut().for_each(|z| *z = inverse * (cap - 2.0 * cap / (1.0 + exp(2.0 / cap * *z)))),
                    );
                });
            }
            visit(rows.clone(), tokens, block);
        }
    }
}

/// Running maximum m of one row, Σ exp(z − m) and Σ exp(z − m) · (z − m).
#[derive(Clone, Copy)]
struct Tally {
    max: f32,
    sum: f64,
    weighted: f64,
}

impl Tally {
    const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0 };

    #[inline(always)]
    fn add(&mut self, logits: &[f32]) {
        let max = logits.iter().copied().fold(self.max, f32::max);
        let (mut sums, mut weighted) = ([0.0f32; 16], [0.0f32; 16]);
        for chunk in logits.chunks(16) {
            for ((z, sum), weighted) in chunk.iter().zip(&mut sums).zip(&mut weighted) {
                let e = exp(z - max);
                *sum += e;
                *weighted += e * (z - max);
            }
        }
        let total = |lanes: [f32; 16]| lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
        if self.sum > 0.0 {
            // What was summed up so far, seen from the new maximum.
            let shift = f64::from(self.max - max);
            self.weighted = (self.weighted + self.sum * shift) * shift.exp();
            self.sum *= shift.exp();
        }
        self.max = max;
        self.sum += total(sums);
        self.weighted += total(weighted);
    }

    fn log_sum(&self) -> f32 {
        (f64::from(self.max) + self.sum.ln()) as f32
    }

    /// −Σ p ln p = ln Σ exp(z − m) − Σ p (z − m).
    fn entropy(&self) -> f32 {
        (self.sum.ln() - self.weighted / self.sum) as f32
    }
}

/// Rows, width and vocabulary of a head's input and weight.
fn dimensions(hidden: &Tensor, weight: &Tensor) -> Result<(usize, usize, usize)> {
    let ((rows, width), (vocabulary, expected)) = (hidden.dims2()?, weight.dims2()?);
    if width != expected {
        bail!("head: rows of {width} values for a weight of {expected}");
    }
    Ok((rows, width, vocabulary))
}

/// Log-probabilities of given tokens, and what the backward and the metrics need beside them.
pub struct LogProbabilities {
    /// log p(target) of every row, [rows]; differentiable with respect to the hidden state.
    pub logprobs: Tensor,
    /// Entropy of every row's distribution in nats; not differentiable.
    pub entropies: Vec<f32>,
}

/// log p(target) for every row of `hidden` [rows, width], the vocabulary's `weight` being [vocabulary, width].
///
/// # Errors
/// If there is not one target per row, a target is outside the vocabulary, or a tensor is not f32.
pub fn log_probabilities(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    logits: Logits,
) -> Result<LogProbabilities> {
    let (rows, _, vocabulary) = dimensions(hidden, weight)?;
    if targets.len() != rows {
        bail!("head: {} targets for {rows} rows", targets.len());
    }
    if let Some(target) = targets.iter().find(|&&target| target as usize >= vocabulary) {
        bail!("head: token {target} is outside the vocabulary of {vocabulary}");
    }
    let tallies = Arc::new(OnceLock::new());
    let head = Head { weight: weight.clone(), targets: targets.into(), logits, tallies: tallies.clone() };
    let logprobs = hidden.apply_op1(head)?;
    let Some(tallies) = tallies.get() else { bail!("head: the forward pass left no sums") };
    Ok(LogProbabilities { logprobs, entropies: tallies.iter().map(Tally::entropy).collect() })
}

struct Head {
    weight: Tensor,
    targets: Arc<[u32]>,
    logits: Logits,
    tallies: Arc<OnceLock<Vec<Tally>>>,
}

impl CustomOp1 for Head {
    fn name(&self) -> &'static str {
        "log-probability-head"
    }

    fn cpu_fwd(&self, hidden: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        let hidden = values(hidden, layout)?;
        let (mut tallies, mut chosen) = (vec![Tally::EMPTY; rows], vec![0.0; rows]);
        with_values([&self.weight], |[weight]| {
            walk(hidden, weight, width, self.logits, |rows, tokens, logits| {
                let own = tallies[rows.clone()].par_iter_mut().zip(chosen[rows.clone()].par_iter_mut());
                own.zip(&self.targets[rows]).zip(logits.par_chunks(tokens.len())).for_each(
                    |(((tally, chosen), &target), logits)| {
                        vectorized(
                            #[inline(always)]
                            || tally.add(logits),
                        );
                        if tokens.contains(&(target as usize)) {
                            *chosen = logits[target as usize - tokens.start];
                        }
                    },
                );
            });
        })?;
        let logprobs = chosen.iter().zip(&tallies).map(|(chosen, tally)| chosen - tally.log_sum()).collect();
        // A second forward through the same operation would write the same numbers.
        let _ = self.tallies.set(tallies);
        output(logprobs, rows)
    }

    /// With z = logits / temperature and grad g: dz = g · (onehot − softmax(z)), then through the cap and the weight.
    fn bwd(&self, hidden: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, width) = hidden.dims2()?;
        let grad = grad.contiguous()?;
        let Some(tallies) = self.tallies.get() else { bail!("head: backward before forward") };
        let Logits { soft_cap, temperature } = self.logits;
        let mut d_hidden = vec![0.0; hidden.elem_count()];
        with_values([hidden, &self.weight, &grad], |[hidden, weight, grad]| {
            walk(hidden, weight, width, self.logits, |rows, tokens, logits| {
                let known = grad[rows.clone()].par_iter().zip(&self.targets[rows.clone()]).zip(&tallies[rows.clone()]);
                logits.par_chunks_mut(tokens.len()).zip(known).for_each(|(logits, ((&grad, &target), tally))| {
                    let target = (target as usize).wrapping_sub(tokens.start);
                    vectorized(
                        #[inline(always)]
                        || logit_gradient(logits, target, grad, tally.log_sum(), soft_cap, temperature),
                    );
                });
                let d_hidden = &mut d_hidden[rows.start * width..rows.end * width];
                let weight = Matrix::dense(&weight[tokens.start * width..tokens.end * width], width);
                matmul(
                    d_hidden,
                    width,
                    1.0,
                    1.0 / temperature,
                    Matrix::dense(logits, tokens.len()),
                    weight,
                    Threads::All,
                );
            });
        })?;
        Ok(Some(Tensor::from_vec(d_hidden, hidden.shape(), hidden.device())?))
    }
}

/// Replaces tempered logits by the gradient of the raw logits times the temperature; `target` may lie outside the chunk.
#[inline(always)]
fn logit_gradient(logits: &mut [f32], target: usize, grad: f32, log_sum: f32, soft_cap: Option<f32>, temperature: f32) {
    let inverse_cap = soft_cap.map_or(0.0, |cap| temperature / cap);
    for (token, logit) in logits.iter_mut().enumerate() {
        let chosen = if token == target { 1.0 } else { 0.0 };
        let capped = *logit * inverse_cap;
        *logit = grad * (chosen - exp(*logit - log_sum)) * (1.0 - capped * capped);
    }
}

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Choice {
    /// The most likely token, the lowest id among equals.
    Greedy,
    /// The token at this place in [0, 1) of the cumulative distribution over token ids.
    Sample(f64),
}

/// A chosen token with its log-probability at the sampling temperature and without one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chosen {
    /// The token's id.
    pub token: u32,
    /// Log-probability under the full tempered softmax: the behavior log-probability.
    pub logprob: f32,
    /// Log-probability at temperature 1, whatever the sampling temperature: what confidences are made of.
    pub untempered: f32,
}

/// Chooses one token per row of `hidden` [rows, width]. Rows are limited by the sampler's slots, so their logits are kept.
///
/// # Errors
/// If there is not one choice per row, a tensor is not f32, or a distribution has no finite sum.
pub fn choose(hidden: &Tensor, weight: &Tensor, choices: &[Choice], logits: Logits) -> Result<Vec<Chosen>> {
    let (rows, width, vocabulary) = dimensions(hidden, weight)?;
    if choices.len() != rows {
        bail!("head: {} choices for {rows} rows", choices.len());
    }
    let untempered = Logits { temperature: 1.0, ..logits };
    let mut all = vec![0.0; rows * vocabulary];
    with_values([hidden, weight], |[hidden, weight]| {
        walk(hidden, weight, width, untempered, |rows, tokens, logits| {
            for (row, logits) in rows.zip(logits.chunks_exact(tokens.len())) {
                all[row * vocabulary + tokens.start..][..tokens.len()].copy_from_slice(logits);
            }
        });
    })?;
    let chosen = all.par_chunks_mut(vocabulary).zip(choices).enumerate().map(|(row, (logits_v, choice))| {
        match choose_one(logits_v, *choice, logits.temperature) {
            Some(chosen) => Ok(chosen),
            None => {
                bail!("head: row {row} has no finite probabilities; the adapter or the weights hold NaN or infinity")
            }
        }
    });
    chosen.collect()
}

/// Chooses from untempered logits [vocabulary], which it overwrites with tempered ones.
fn choose_one(logits_v: &mut [f32], choice: Choice, temperature: f32) -> Option<Chosen> {
    let log_sum = |logits_v: &[f32]| {
        let mut tally = Tally::EMPTY;
        logits_v.chunks(CHUNK).for_each(|chunk| {
            vectorized(
                #[inline(always)]
                || tally.add(chunk),
            )
        });
        tally.log_sum()
    };
    let untempered_sum = log_sum(logits_v);
    let greedy = || {
        let best =
            logits_v.iter().enumerate().fold(0, |best, (token, &z)| if z > logits_v[best] { token } else { best });
        (best, logits_v[best])
    };
    let (token, raw, tempered, tempered_sum) = match choice {
        Choice::Greedy => {
            let (token, logit) = greedy();
            (token, logit, logit, untempered_sum)
        }
        Choice::Sample(place) if temperature == 1.0 => {
            let token = inverse_cumulative(logits_v, untempered_sum, place);
            (token, logits_v[token], logits_v[token], untempered_sum)
        }
        Choice::Sample(place) => {
            let inverse = 1.0 / temperature;
            logits_v.iter_mut().for_each(|z| *z *= inverse);
            let sum = log_sum(logits_v);
            let token = inverse_cumulative(logits_v, sum, place);
            (token, logits_v[token] * temperature, logits_v[token], sum)
        }
    };
    let chosen = Chosen { token: token as u32, logprob: tempered - tempered_sum, untempered: raw - untempered_sum };
    (chosen.logprob.is_finite() && chosen.untempered.is_finite()).then_some(chosen)
}

/// The first token at which the cumulative probability exceeds `place`.
fn inverse_cumulative(logits_v: &[f32], log_sum: f32, place: f64) -> usize {
    let mut cumulative = 0.0;
    let mut last = 0;
    for (token, &z) in logits_v.iter().enumerate() {
        let probability = f64::from(exp(z - log_sum));
        cumulative += probability;
        if probability > 0.0 {
            last = token;
        }
        if cumulative > place {
            return token;
        }
    }
    // Rounding can leave the total a little below 1: then the place belongs to the last possible token.
    last
}
