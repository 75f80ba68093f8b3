//! Hidden state to the log-probability of a given token, in chunks of rows and vocabulary: full logits never exist.
//!
//! The same walk over the vocabulary serves the learner (log-probability, entropy, exact backward) and the sampler
//! (which also looks at the scores themselves), so both see the same numbers in the same order.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::left::Left;
use super::panels::{Panels, Threads};
use super::{exp, vectorized};

/// How logits are made from `weight · hidden`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logits {
    /// c in c · tanh(logit / c) (Gemma 2).
    pub soft_cap: Option<f32>,
    /// Logits are divided by this after the cap; log-probabilities are those of the tempered softmax.
    pub temperature: f32,
}

/// Rows whose logits are computed together, and how many tokens of the vocabulary at a time.
const ROWS: usize = 1024;
const CHUNK: usize = 2048;
/// What a backward pass over so many rows takes beside the hidden states, in bytes: a block of logits, also in half precision, and
/// a part of the weight as it is there.
pub fn bytes(rows: usize, hidden: usize) -> usize {
    6 * rows.min(ROWS) * CHUNK + 4 * CHUNK * hidden
}

/// Calls `visit(rows, tokens, logits)` for every block of `hidden` [rows, width] against `weight` [vocabulary, width], in a
/// fixed order: for each block of rows, the vocabulary from first to last token. `logits` is [rows, tokens].
fn walk(
    hidden: &[f32],
    weight: &Panels,
    logits: Logits,
    mut visit: impl FnMut(Range<usize>, Range<usize>, &mut [f32]),
) {
    let (vocabulary, width) = weight.dims();
    let all_rows = hidden.len() / width;
    let mut buffer = Buffer::new(ROWS.min(all_rows) * CHUNK.min(vocabulary));
    for first_row in (0..all_rows).step_by(ROWS) {
        let rows = first_row..(first_row + ROWS).min(all_rows);
        let left = Left::new(&hidden[rows.start * width..rows.end * width], width, weight.kernel());
        for first in (0..vocabulary).step_by(CHUNK) {
            let tokens = first..(first + CHUNK).min(vocabulary);
            let block = &mut buffer[..rows.len() * tokens.len()];
            weight.multiply(&left, tokens.clone(), block, tokens.len(), false, Threads::All);
            block.par_chunks_mut(tokens.len()).for_each(|row| logits.scale(row));
            visit(rows.clone(), tokens, block);
        }
    }
}

impl Logits {
    /// Caps and tempers a row of products.
    fn scale(&self, row: &mut [f32]) {
        let inverse = 1.0 / self.temperature;
        vectorized(
            #[inline(always)]
            || match self.soft_cap {
                Some(cap) => {
                    row.iter_mut().for_each(|z| *z = inverse * (cap - 2.0 * cap / (1.0 + exp(2.0 / cap * *z))))
                }
                None if inverse == 1.0 => {}
                None => row.iter_mut().for_each(|z| *z *= inverse),
            },
        );
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

/// Log-probabilities of given tokens, and what the backward and the metrics need beside them.
pub struct LogProbabilities {
    /// log p(target) of every row, [rows].
    pub logprobs: Vec<f32>,
    tallies: Vec<Tally>,
}

impl LogProbabilities {
    /// Entropy of every row's distribution in nats, [rows].
    pub fn entropies(&self) -> impl Iterator<Item = f32> + '_ {
        self.tallies.iter().map(Tally::entropy)
    }
}

/// log p(target) for every row of `hidden` [rows, width], the vocabulary's `weight` being [vocabulary, width].
///
/// # Errors
/// If there is not one target per row, or a target is outside the vocabulary.
pub fn log_probabilities(hidden: &[f32], weight: &Panels, targets: &[u32], logits: Logits) -> Result<LogProbabilities> {
    let (vocabulary, width) = weight.dims();
    let rows = hidden.len() / width;
    ensure!(targets.len() == rows, "head: {} targets for {rows} rows", targets.len());
    if let Some(target) = targets.iter().find(|&&target| target as usize >= vocabulary) {
        anyhow::bail!("head: token {target} is outside the vocabulary of {vocabulary}");
    }
    let (mut tallies, mut chosen) = (vec![Tally::EMPTY; rows], vec![0.0; rows]);
    walk(hidden, weight, logits, |rows, tokens, logits| {
        let own = tallies[rows.clone()].par_iter_mut().zip(chosen[rows.clone()].par_iter_mut());
        own.zip(&targets[rows]).zip(logits.par_chunks(tokens.len())).for_each(
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
    let logprobs = chosen.iter().zip(&tallies).map(|(chosen, tally)| chosen - tally.log_sum()).collect();
    Ok(LogProbabilities { logprobs, tallies })
}

/// The gradient of `hidden`, given that of every log-probability, [rows]: with z = logits / temperature, dz = grad ·
/// (onehot − softmax(z)), then through the cap and the weight.
pub fn log_probabilities_backward(
    hidden: &[f32],
    weight: &Panels,
    targets: &[u32],
    logits: Logits,
    known: &LogProbabilities,
    grad: &[f32],
) -> Buffer {
    let (_, width) = weight.dims();
    let Logits { soft_cap, temperature } = logits;
    let mut d_hidden = Buffer::zeros(hidden.len());
    walk(hidden, weight, logits, |rows, tokens, logits| {
        let tallies = &known.tallies[rows.clone()];
        let own = grad[rows.clone()].par_iter().zip(&targets[rows.clone()]).zip(tallies);
        logits.par_chunks_mut(tokens.len()).zip(own).for_each(|(logits, ((&grad, &target), tally))| {
            let target = (target as usize).wrapping_sub(tokens.start);
            vectorized(
                #[inline(always)]
                || logit_gradient(logits, target, grad / temperature, tally.log_sum(), soft_cap, temperature),
            );
        });
        let transposed = weight.transposed(tokens.clone(), Threads::All);
        let left = Left::new(logits, tokens.len(), weight.kernel());
        let d_hidden = &mut d_hidden[rows.start * width..rows.end * width];
        transposed.multiply(&left, 0..width, d_hidden, width, true, Threads::All);
    });
    d_hidden
}

/// Replaces tempered logits by the gradient of the raw logits, `grad` being that of the log-probability over the temperature;
/// `target` may lie outside the chunk.
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
/// If there is not one choice per row, or a distribution has no finite sum.
pub fn choose(hidden: &[f32], weight: &Panels, choices: &[Choice], logits: Logits) -> Result<Vec<Chosen>> {
    let (vocabulary, width) = weight.dims();
    let rows = hidden.len() / width;
    ensure!(choices.len() == rows, "head: {} choices for {rows} rows", choices.len());
    let untempered = Logits { temperature: 1.0, ..logits };
    let mut all = Buffer::new(rows * vocabulary);
    weight.multiply(
        &Left::new(hidden, width, weight.kernel()),
        0..vocabulary,
        &mut all,
        vocabulary,
        false,
        Threads::All,
    );
    let chosen = all.par_chunks_mut(vocabulary).zip(choices).enumerate().map(|(row, (logits_v, choice))| {
        untempered.scale(logits_v);
        choose_one(logits_v, *choice, logits.temperature).with_context(|| {
            format!("head: row {row} has no finite probabilities; the adapter or the weights hold NaN or infinity")
        })
    });
    chosen.collect()
}

/// Chooses from untempered logits [vocabulary].
fn choose_one(logits_v: &[f32], choice: Choice, temperature: f32) -> Option<Chosen> {
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
            let mut tempered_v = Buffer::new(logits_v.len());
            tempered_v.iter_mut().zip(logits_v).for_each(|(tempered, z)| *tempered = inverse * z);
            let sum = log_sum(&tempered_v);
            let token = inverse_cumulative(&tempered_v, sum, place);
            (token, logits_v[token], tempered_v[token], sum)
        }
    };
    let chosen = Chosen { token: token as u32, logprob: tempered - tempered_sum, untempered: raw - untempered_sum };
    (chosen.logprob.is_finite() && chosen.untempered.is_finite()).then_some(chosen)
}

/// The first token at which the cumulative probability exceeds `place`. Stretches are summed up side by side; only the one
/// that holds the place is walked token by token.
fn inverse_cumulative(logits_v: &[f32], log_sum: f32, place: f64) -> usize {
    const STRETCH: usize = 256;
    let (mut before, mut last, mut found) = (0.0, 0, None);
    for (index, stretch) in logits_v.chunks(STRETCH).enumerate() {
        let total = vectorized(
            #[inline(always)]
            || probability(stretch, log_sum),
        );
        if total > 0.0 {
            last = index;
        }
        if before + total > place {
            found = Some(before);
            break;
        }
        before += total;
    }
    let stretch = &logits_v[last * STRETCH..(last * STRETCH + STRETCH).min(logits_v.len())];
    let within = found.and_then(|mut cumulative| {
        stretch.iter().position(|&z| {
            cumulative += f64::from(exp(z - log_sum));
            cumulative > place
        })
    });
    // Rounding can leave the total a little below the place: then it belongs to the last possible token.
    let possible = || stretch.iter().rposition(|&z| exp(z - log_sum) > 0.0).unwrap_or(0);
    last * STRETCH + within.unwrap_or_else(possible)
}

/// The probability of a stretch of tokens.
#[inline(always)]
fn probability(logits_v: &[f32], log_sum: f32) -> f64 {
    let mut lanes = [0.0f32; 16];
    for chunk in logits_v.chunks(16) {
        chunk.iter().zip(&mut lanes).for_each(|(z, lane)| *lane += exp(z - log_sum));
    }
    lanes.iter().map(|&lane| f64::from(lane)).sum()
}
