//! 4-bit normal floats with double quantization (QLoRA, Dettmers et al. 2023, section 3), bit for bit as bitsandbytes has
//! them: blocks of 64 values share their largest magnitude, which is itself stored in 8 bits.

use rayon::prelude::*;

use super::vectorized;

/// Values that share one scale; the last block of a tensor may be shorter.
pub const BLOCK: usize = 64;
/// Scales that share one scale of their own.
const NESTED: usize = 256;

/// What the sixteen codes stand for: quantiles of the normal distribution, with an exact zero.
const VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Both values of every byte, the high nibble's first.
const PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [VALUES[byte >> 4], VALUES[byte & 15]];
        byte += 1;
    }
    pairs
};

/// What the 8-bit codes of scales stand for: seven decades, each with twice the steps of the one below (Dettmers et al.
/// 2022, 8-bit optimizers, dynamic tree quantization).
const SCALES: [f32; 256] = {
    const POWERS: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut scales = [0.0; 256];
    scales[255] = 1.0;
    let (mut decade, mut index) = (0, 128);
    while decade < 7 {
        let (steps, mut step) = (1 << decade, 0);
        while step < steps {
            let middle = (boundary(step, steps) + boundary(step + 1, steps)) / 2.0;
            scales[index] = middle * POWERS[decade];
            scales[254 - index] = -scales[index];
            (step, index) = (step + 1, index + 1);
        }
        decade += 1;
    }
    scales
};

/// From 0.1 to 1 in equal steps, from both ends and rounded once, as torch counts them.
const fn boundary(index: usize, steps: usize) -> f32 {
    const ENDS: [f32; 2] = [0.1, 1.0];
    let step = ((ENDS[1] - ENDS[0]) / steps as f32) as f64;
    if index < steps.div_ceil(2) {
        (ENDS[0] as f64 + step * index as f64) as f32
    } else {
        (ENDS[1] as f64 - step * (steps - index) as f64) as f32
    }
}

/// Whole blocks on their way into an [`Nf4`], or the last blocks of a tensor.
pub struct Blocks {
    codes: Vec<u8>,
    largest: Vec<f32>,
}

/// A tensor of packed values, row by row.
pub struct Nf4 {
    /// Two values a byte, the first in the high nibble.
    codes: Vec<u8>,
    /// Each block's largest magnitude, less the offset, as a share of its 256 blocks' largest.
    scales: Vec<u8>,
    nested: Vec<f32>,
    /// The mean of all blocks' largest magnitudes.
    offset: f32,
}

impl Blocks {
    /// Packs values.
    pub fn of(values: &[f32]) -> Self {
        let largest: Vec<f32> = values.chunks(BLOCK).map(largest).collect();
        let mut codes = vec![0; values.len().div_ceil(2)];
        for ((values, codes), &largest) in values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK / 2)).zip(&largest) {
            vectorized(
                #[inline(always)]
                || pack(values, codes, largest),
            );
        }
        Self { codes, largest }
    }
}

impl Nf4 {
    /// Puts the blocks of a tensor together; all but the last hold whole blocks.
    pub fn new(parts: Vec<Blocks>) -> Self {
        let blocks = parts.iter().map(|part| part.largest.len()).sum::<usize>();
        let (mut codes, mut all) = (Vec::with_capacity(blocks * BLOCK / 2), Vec::with_capacity(blocks));
        for part in parts {
            codes.extend(part.codes);
            all.extend(part.largest);
        }
        // In f32 over a few, as torch sums them, and in f64 over many.
        let sum: f64 = all.chunks(NESTED).map(|few| f64::from(few.iter().sum::<f32>())).sum();
        let offset = (sum / blocks as f64) as f32;
        all.iter_mut().for_each(|largest| *largest -= offset);
        let nested: Vec<f32> = all.chunks(NESTED).map(largest).collect();
        let share = |(index, scale): (usize, &f32)| {
            let share = (scale * (1.0 / nested[index / NESTED])).clamp(-1.0, 1.0);
            nearest(&SCALES, if share.is_nan() { 0.0 } else { share })
        };
        let scales = all.iter().enumerate().map(share).collect();
        Self { codes, scales, nested, offset }
    }

    /// What a tensor of so many values takes, in bytes.
    pub fn bytes(values: usize) -> usize {
        let blocks = values.div_ceil(BLOCK);
        values.div_ceil(2) + blocks + size_of::<f32>() * blocks.div_ceil(NESTED)
    }

    /// The values in f32.
    pub fn unpack(&self, values: &mut [f32]) {
        let Self { codes, scales, nested, offset } = self;
        let parts = codes.par_chunks(NESTED * BLOCK / 2).zip(scales.par_chunks(NESTED)).zip(nested);
        values.par_chunks_mut(NESTED * BLOCK).zip(parts).for_each(|(values, ((codes, scales), nested))| {
            vectorized(
                #[inline(always)]
                || {
                    for ((values, codes), &scale) in values.chunks_mut(BLOCK).zip(codes.chunks(BLOCK / 2)).zip(scales) {
                        scaled(values, codes, SCALES[usize::from(scale)] * nested + offset);
                    }
                },
            );
        });
    }

    /// The packed bytes and the codes of the scales, as a checkpoint of bitsandbytes has them, and the offset.
    pub fn parts(&self) -> (&[u8], &[u8], &[f32], f32) {
        (&self.codes, &self.scales, &self.nested, self.offset)
    }
}

/// What the sixteen codes of values stand for, and the 256 codes of scales.
pub fn tables() -> (&'static [f32], &'static [f32]) {
    (&VALUES, &SCALES)
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()))
}

/// The first of the sorted values that are nearest.
fn nearest(sorted: &[f32], value: f32) -> u8 {
    let distance = |index: &usize| (value - sorted[*index]).abs();
    let above = sorted.partition_point(|&other| other < value).min(sorted.len() - 1);
    let below = above.saturating_sub(1);
    (if distance(&below) <= distance(&above) { below } else { above }) as u8
}

/// The codes of one block. A block of zeros has the code of zero.
#[inline(always)]
fn pack(values: &[f32], codes: &mut [u8], largest: f32) {
    let factor = if largest > 0.0 { 1.0 / largest } else { 0.0 };
    let mut block = [0.0; BLOCK];
    block.iter_mut().zip(values).for_each(|(scaled, value)| *scaled = (value * factor).clamp(-1.0, 1.0));
    let mut best = block.map(|scaled| (scaled - VALUES[0]).abs());
    let mut chosen = [0u32; BLOCK];
    for (code, value) in VALUES.iter().enumerate().skip(1) {
        for ((scaled, best), chosen) in block.iter().zip(&mut best).zip(&mut chosen) {
            let distance = (scaled - value).abs();
            *chosen = if distance < *best { code as u32 } else { *chosen };
            *best = best.min(distance);
        }
    }
    codes.iter_mut().zip(chosen.as_chunks().0).for_each(|(byte, [high, low])| *byte = (high << 4 | low) as u8);
}

#[inline(always)]
fn scaled(values: &mut [f32], codes: &[u8], scale: f32) {
    let (pairs, last) = values.as_chunks_mut();
    for ([first, second], code) in pairs.iter_mut().zip(codes) {
        let pair = PAIRS[usize::from(*code)];
        (*first, *second) = (pair[0] * scale, pair[1] * scale);
    }
    if let ([last], Some(code)) = (last, codes.last()) {
        *last = PAIRS[usize::from(*code)][0] * scale;
    }
}
