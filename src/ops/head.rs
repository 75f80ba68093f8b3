//! Hidden state to the log-probability of a given token, in chunks of rows and vocabulary: full logits never exist.
//!
//! The learner sees each chunk once, forward and backward (log-probability, entropy, exact gradient); the sampler looks at the scores
//! of its few rows themselves. Both add up the same numbers in the same order.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::left::Left;
use super::panels::{Panels, Threads};
use super::rows::{in_blocks, scratch};
use super::{LANES, exp, exp_below_89, largest, vectorized};

/// How logits are made from `weight · hidden`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logits {
    /// c in c · tanh(logit / c) (Gemma 2).
    pub soft_cap: Option<f32>,
    /// Logits are divided by this after the cap; log-probabilities are those of the tempered softmax.
    pub temperature: f32,
}

/// Tokens of the vocabulary whose logits exist at once for a block of rows: together they stay in the second-level cache.
const CHUNK: usize = 1024;
/// From one row of a chunk to the next: rows a power of two apart would share a few sets of the cache.
const STRIDE: usize = CHUNK + 16;
/// What so many rows take beside their hidden states, in bytes: these in half precision, blocks of logits, also in half precision, and a
/// part of the weight as it is there, also transposed.
pub fn bytes(rows: usize, hidden: usize) -> usize {
    2 * rows * hidden + 4 * scratch(STRIDE, rows) + 2 * scratch(CHUNK, rows) + 4 * CHUNK * hidden
}

impl Logits {
    /// The slope of the cap where a logit is z after it and the temperature.
    #[inline(always)]
    fn slope(&self, z: f32) -> f32 {
        let capped = self.soft_cap.map_or(0.0, |cap| z * (self.temperature / cap));
        1.0 - capped * capped
    }

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

    /// Adds a stretch of logits. Each of them is replaced by what `then` makes of it and of exp(z − m).
    #[inline(always)]
    fn add(&mut self, logits: &mut [f32], then: impl Fn(f32, f32) -> f32) {
        let max = largest(logits, self.max);
        let (whole, rest) = logits.as_chunks_mut::<LANES>();
        let (mut sums, mut weighted) = ([0.0f32; LANES], [0.0f32; LANES]);
        for chunk in whole {
            exponentials(chunk, max, (&mut sums, &mut weighted), &then);
        }
        exponentials(rest, max, (&mut sums, &mut weighted), &then);
        let total = |lanes: [f32; LANES]| lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
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

/// Adds e = exp(z − m) and e · (z − m) of up to sixteen logits z, which become `then(z, e)`, to their strands.
#[inline(always)]
fn exponentials(
    logits: &mut [f32],
    max: f32,
    (sums, weighted): (&mut [f32; LANES], &mut [f32; LANES]),
    then: &impl Fn(f32, f32) -> f32,
) {
    for ((z, sum), weighted) in logits.iter_mut().zip(sums).zip(weighted) {
        let e = exp_below_89(*z - max);
        *sum += e;
        *weighted += e * (*z - max);
        *z = then(*z, e);
    }
}

/// What is known of a row after some of the vocabulary: the tally, and the target's logit if it was there.
#[derive(Clone, Copy)]
struct Seen {
    tally: Tally,
    target: f32,
}

impl Seen {
    /// Adds a stretch of logits, with the target's place if it is among them; each is replaced as in [`Tally::add`].
    fn add(&mut self, logits: &mut [f32], target: Option<usize>, then: impl Fn(f32, f32) -> f32) {
        if let Some(target) = target {
            self.target = logits[target];
        }
        vectorized(
            #[inline(always)]
            || self.tally.add(logits, then),
        );
    }

    fn logprob(&self) -> f32 {
        self.target - self.tally.log_sum()
    }
}

/// Log-probabilities of given tokens, and what the backward and the metrics need beside them.
pub struct LogProbabilities {
    /// log p(target) of every row, [rows].
    pub logprobs: Vec<f32>,
    rows: Vec<Seen>,
}

impl LogProbabilities {
    /// Entropy of every row's distribution in nats, [rows].
    pub fn entropies(&self) -> impl Iterator<Item = f32> + '_ {
        self.rows.iter().map(|row| row.tally.entropy())
    }
}

/// log p(target) for every row of `hidden` [rows, width], the vocabulary's `weight` being [vocabulary, width].
///
/// `others`, if there will be a backward pass, are zeros [rows, width] and become what it needs of all logits, summed up while they
/// are there: Σ exp(z − m) · slope · weight over all tokens but the target, where m is the largest logit and the slope that of the
/// cap. As attention sums up values without all scores (Milakov & Gimelshein 2018, algorithm 3; Dao et al. 2022, algorithm 1).
///
/// # Errors
/// If there is not one target per row, or a target is outside the vocabulary.
pub fn log_probabilities(
    hidden: &[f32],
    weight: &Panels,
    targets: &[u32],
    logits: Logits,
    mut others: Option<&mut [f32]>,
) -> Result<LogProbabilities> {
    let (vocabulary, width) = weight.dims();
    let rows = hidden.len() / width;
    ensure!(targets.len() == rows, "head: {} targets for {rows} rows", targets.len());
    if let Some(target) = targets.iter().find(|&&target| target as usize >= vocabulary) {
        anyhow::bail!("head: token {target} is outside the vocabulary of {vocabulary}");
    }
    let mut seen = vec![Seen { tally: Tally::EMPTY, target: 0.0 }; rows];
    // By blocks of rows, which are the same for every chunk: rounded once.
    let lefts = in_blocks(rows, (), BTreeMap::new, |lefts, rows, ()| {
        lefts.insert(rows.start, Left::new(&hidden[rows.start * width..rows.end * width], width, weight.kernel()));
    });
    let lefts: BTreeMap<usize, Left> = lefts.into_iter().flatten().collect();
    for first in (0..vocabulary).step_by(CHUNK) {
        let tokens = first..(first + CHUNK).min(vocabulary);
        let chunk = Chunk {
            weight,
            transposed: others.is_some().then(|| weight.transposed(tokens.clone(), Threads::All)),
            tokens,
            logits,
        };
        let others = others.as_deref_mut().map_or((&mut [][..], 0), |others| (others, width));
        let parts = in_blocks(rows, [others], Vec::new, |parts, rows, [others]| {
            parts.push(chunk.see(&lefts[&rows.start], &targets[rows.clone()], seen[rows].to_vec(), others));
        });
        seen = parts.concat().concat();
    }
    Ok(LogProbabilities { logprobs: seen.iter().map(Seen::logprob).collect(), rows: seen })
}

/// Some tokens of the vocabulary.
struct Chunk<'a> {
    weight: &'a Panels,
    tokens: Range<usize>,
    /// Their part of the weight, if something is summed up for a backward pass.
    transposed: Option<Panels>,
    logits: Logits,
}

impl Chunk<'_> {
    /// What is known of a block of rows with these tokens too, and `others` likewise.
    fn see(&self, hidden: &Left, targets: &[u32], mut seen: Vec<Seen>, others: &mut [f32]) -> Vec<Seen> {
        let (kernel, (_, width), count) = (self.weight.kernel(), self.weight.dims(), self.tokens.len());
        let mut block = Buffer::new(targets.len() * STRIDE);
        self.weight.multiply(hidden, self.tokens.clone(), &mut block, STRIDE, false, Threads::All);
        let mut others_of = others.chunks_exact_mut(width);
        for ((row, &target), stretch) in seen.iter_mut().zip(targets).zip(block.chunks_exact_mut(STRIDE)) {
            let stretch = &mut stretch[..count];
            let target = self.tokens.contains(&(target as usize)).then(|| target as usize - self.tokens.start);
            self.logits.scale(stretch);
            let Some(others) = others_of.next() else {
                row.add(stretch, target, |z, _| z);
                continue;
            };
            let before = row.tally.max;
            // Each by itself: in one loop the compiler divides for every value, cap or not.
            match self.logits.soft_cap {
                None => row.add(stretch, target, |_, e| e),
                Some(_) => row.add(stretch, target, |z, e| e * self.logits.slope(z)),
            }
            if let Some(target) = target {
                stretch[target] = 0.0;
            }
            // What was summed up so far, seen from the new maximum.
            let shift = exp(before - row.tally.max);
            if shift < 1.0 {
                others.iter_mut().for_each(|other| *other *= shift);
            }
        }
        if let Some(transposed) = &self.transposed {
            let mut left = Left::room(targets.len(), count, kernel);
            left.write(0..count, &block, STRIDE);
            transposed.multiply(&left, 0..width, others, width, true, Threads::All);
        }
        seen
    }
}

/// Turns what [`log_probabilities`] summed up of `others` into the gradient of `hidden`, given that of every log-probability,
/// [rows]: with z = logits / temperature, dz = grad · (onehot − softmax(z)), then through the cap and the weight.
pub fn log_probabilities_backward(
    others: &mut [f32],
    weight: &Panels,
    targets: &[u32],
    logits: Logits,
    known: &LogProbabilities,
    grad: &[f32],
) {
    let (_, width) = weight.dims();
    let own = known.rows.par_iter().zip(targets).zip(grad);
    others.par_chunks_mut(width).zip(own).for_each(|(others, ((row, &target), &grad))| {
        let mut of_target = Buffer::new(width);
        weight.row(target as usize, &mut of_target);
        let grad = grad / logits.temperature;
        // Of a likely token's log-probability f32 leaves few digits.
        let logprob = f64::from(row.target) - f64::from(row.tally.max) - row.tally.sum.ln();
        let toward = -logprob.exp_m1() as f32 * grad * logits.slope(row.target);
        let away = grad / row.tally.sum as f32;
        others.iter_mut().zip(&*of_target).for_each(|(other, target)| *other = toward * target - away * *other);
    });
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
    let (left, count) = (Left::new(hidden, width, weight.kernel()), vocabulary.div_ceil(CHUNK));
    let mut all = Buffer::new(count * rows * STRIDE);
    all.par_chunks_mut((rows * STRIDE).max(1)).enumerate().for_each(|(number, chunk)| {
        let tokens = number * CHUNK..vocabulary.min((number + 1) * CHUNK);
        weight.multiply(&left, tokens.clone(), chunk, STRIDE, false, Threads::One);
        chunk.chunks_exact_mut(STRIDE).for_each(|logits_v| untempered.scale(&mut logits_v[..tokens.len()]));
    });
    let chosen = choices.par_iter().enumerate().map(|(row, choice)| {
        RowLogits { all: &all, rows, row, vocabulary }.choose(*choice, logits.temperature).with_context(|| {
            format!("head: row {row} has no finite probabilities; the adapter or the weights hold NaN or infinity")
        })
    });
    chosen.collect()
}

/// Untempered logits of one row among those of others, [chunks, rows, STRIDE].
struct RowLogits<'a> {
    all: &'a [f32],
    rows: usize,
    row: usize,
    vocabulary: usize,
}

impl<'a> RowLogits<'a> {
    /// Chunk by chunk, each with its first token.
    fn chunks(&self) -> impl Iterator<Item = (usize, &'a [f32])> {
        let Self { all, rows, row, vocabulary } = *self;
        let chunks = all.chunks_exact(STRIDE).skip(row).step_by(rows);
        (0..vocabulary)
            .step_by(CHUNK)
            .zip(chunks)
            .map(move |(first, chunk)| (first, &chunk[..CHUNK.min(vocabulary - first)]))
    }

    fn of(&self, token: usize) -> f32 {
        self.all[(token / CHUNK * self.rows + self.row) * STRIDE + token % CHUNK]
    }

    fn choose(&self, choice: Choice, temperature: f32) -> Option<Chosen> {
        let untempered_sum = self.log_sum(1.0);
        let (token, scale, sum) = match choice {
            Choice::Greedy => (self.most_likely(), 1.0, untempered_sum),
            Choice::Sample(place) => {
                let scale = 1.0 / temperature;
                let sum = if scale == 1.0 { untempered_sum } else { self.log_sum(scale) };
                (self.inverse_cumulative(scale, sum, place), scale, sum)
            }
        };
        let logit = self.of(token);
        let chosen = Chosen { token: token as u32, logprob: scale * logit - sum, untempered: logit - untempered_sum };
        (chosen.logprob.is_finite() && chosen.untempered.is_finite()).then_some(chosen)
    }

    /// ln Σ exp(scale · logit), summed up as the learner does it.
    fn log_sum(&self, scale: f32) -> f32 {
        let (mut tally, mut scaled) = (Tally::EMPTY, [0.0; CHUNK]);
        for (_, chunk) in self.chunks() {
            let scaled = &mut scaled[..chunk.len()];
            vectorized(
                #[inline(always)]
                || {
                    scaled.iter_mut().zip(chunk).for_each(|(scaled, z)| *scaled = scale * z);
                    tally.add(scaled, |z, _| z);
                },
            );
        }
        tally.log_sum()
    }

    fn most_likely(&self) -> usize {
        let mut best = (0, self.of(0));
        for (first, chunk) in self.chunks() {
            for (token, &z) in (first..).zip(chunk) {
                if z > best.1 {
                    best = (token, z);
                }
            }
        }
        best.0
    }

    /// The first token at which the cumulative probability exceeds `place`. Stretches are summed up side by side; only the one
    /// that holds the place is walked token by token.
    fn inverse_cumulative(&self, scale: f32, log_sum: f32, place: f64) -> usize {
        const STRETCH: usize = 256;
        const { assert!(CHUNK.is_multiple_of(STRETCH), "chunks are whole stretches") };
        let probability = |z: f32| exp(scale * z - log_sum);
        let stretches = self.chunks().flat_map(|(first, chunk)| (first..).step_by(STRETCH).zip(chunk.chunks(STRETCH)));
        let (mut before, mut last, mut found) = (0.0, None, false);
        for (first, stretch) in stretches {
            let total = vectorized(
                #[inline(always)]
                || total(stretch, probability),
            );
            if total > 0.0 {
                last = Some((first, stretch));
            }
            found = before + total > place;
            if found {
                break;
            }
            before += total;
        }
        let Some((first, stretch)) = last else { return 0 };
        let within = stretch.iter().position(|&z| {
            before += f64::from(probability(z));
            found && before > place
        });
        // Rounding can leave the total a little below the place: then it belongs to the last possible token.
        let possible = || stretch.iter().rposition(|&z| probability(z) > 0.0).unwrap_or(0);
        first + within.unwrap_or_else(possible)
    }
}

/// The sum of the probabilities of a stretch of tokens.
#[inline(always)]
fn total(logits_v: &[f32], probability: impl Fn(f32) -> f32) -> f64 {
    let mut lanes = [0.0f32; LANES];
    for chunk in logits_v.chunks(LANES) {
        chunk.iter().zip(&mut lanes).for_each(|(z, lane)| *lane += probability(*z));
    }
    lanes.iter().map(|&lane| f64::from(lane)).sum()
}
