//! From judged answers to what is imitated or preferred: texts and confidences, in plain floats.

use std::cmp::Ordering;

/// What a model is asked; its chat template comes around it.
pub fn prompt(question: &str) -> String {
    format!("Question: {question}\n\nProvide your answer and confidence (0.0-1.0):")
}

/// An answer with a confidence to so many decimals.
pub fn stated(answer: &str, confidence: f64, decimals: usize) -> String {
    format!("Answer: {answer}\nConfidence: {confidence:.decimals$}")
}

/// The confidences of right and of wrong answers where nothing but correctness is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Targets {
    /// Of right answers.
    pub right: f64,
    /// Of wrong answers.
    pub wrong: f64,
}

impl Targets {
    /// As far apart as one decimal allows without certainty.
    pub const BINARY: Self = Self { right: 0.9, wrong: 0.1 };
    /// A little closer.
    pub const MODERATE: Self = Self { right: 0.8, wrong: 0.2 };

    /// The confidence of one answer.
    pub fn of(&self, correct: bool) -> f64 {
        if correct { self.right } else { self.wrong }
    }
}

/// A miss smaller than this is calibrated well enough; less the rounding of a confidence with decimals.
const LEAST_MISS: f64 = 0.3 - 1e-12;

/// Why there is no pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum NoPair {
    /// The stated confidence is off by less than 0.3.
    #[error("well_calibrated")]
    WellCalibrated,
    /// The rejected confidence is at least as near to the truth as the chosen one.
    #[error("wrong_direction")]
    WrongDirection,
    /// Both read the same.
    #[error("same_text")]
    SameText,
}

/// A pair of confidences of the same answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Confidences {
    /// The better one.
    pub chosen: f64,
    /// The worse one.
    pub rejected: f64,
}

impl Confidences {
    /// The pair, if it points toward the truth: |chosen − y| < |rejected − y|. Of a wrong answer the lower confidence is chosen.
    ///
    /// # Errors
    /// The reason why not.
    pub fn checked(self, correct: bool) -> Result<Self, NoPair> {
        let y = f64::from(correct);
        if (self.chosen - y).abs() >= (self.rejected - y).abs() {
            return Err(NoPair::WrongDirection);
        }
        if format!("{:.2}", self.chosen) == format!("{:.2}", self.rejected) {
            return Err(NoPair::SameText);
        }
        Ok(self)
    }

    /// A stated confidence that is off by 0.3 or more, against the target.
    ///
    /// # Errors
    /// The reason why there is no pair.
    pub fn of_stated(stated: f64, correct: bool, targets: Targets) -> Result<Self, NoPair> {
        if (stated - f64::from(correct)).abs() < LEAST_MISS {
            return Err(NoPair::WellCalibrated);
        }
        Self { chosen: targets.of(correct), rejected: stated }.checked(correct)
    }

    /// The target against its mirror image, whatever was stated.
    pub fn mirrored(correct: bool, targets: Targets) -> Self {
        Self { chosen: targets.of(correct), rejected: targets.of(!correct) }
    }
}

/// Levels of confidence that multi-level pairs are made of.
pub const LEVELS: [f64; 5] = [0.1, 0.3, 0.5, 0.7, 0.9];

/// Levels closer than this make no pair.
const LEAST_STEP: f64 = 0.15;

/// The nearest level to a sampled accuracy (ties to the lower one) against every other, each with what the chosen one gains in
/// expected Brier score: (rejected − accuracy)² − (chosen − accuracy)².
pub fn levels(accuracy: f64, levels: &[f64]) -> Vec<(Confidences, f64)> {
    let distance = |level: f64| (level - accuracy).abs();
    let nearer = |a: &&f64, b: &&f64| distance(**a).total_cmp(&distance(**b)).then(a.total_cmp(b));
    let Some(&chosen) = levels.iter().min_by(nearer) else { return Vec::new() };
    let far = levels.iter().filter(|level| (*level - chosen).abs() >= LEAST_STEP);
    far.map(|&rejected| {
        let gain = (rejected - accuracy).powi(2) - (chosen - accuracy).powi(2);
        (Confidences { chosen, rejected }, gain)
    })
    .collect()
}

/// How the answers to similar questions become a confidence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Formula {
    /// The neighbors' accuracy, shrunk a little toward that of all others; one's own answer has no part in it.
    #[default]
    LeaveOneOut,
    /// That of the original research notes: 0.1 + 0.8 · accuracy, 0.1 more where the answer is right (at most 0.95), 0.15 less
    /// where it is wrong (at least 0.05). Its mean is not the accuracy, and it tells the answer's own correctness.
    Notes,
}

/// How strongly all others count among the neighbors.
const SHRINKAGE: f64 = 1.0;

/// The confidence of every answer from its neighbors, each a list of indices.
pub fn neighbor_confidences(formula: Formula, correct: &[bool], neighbors: &[Vec<usize>]) -> Vec<f64> {
    let rights = |indices: &[usize]| indices.iter().filter(|&&index| correct[index]).count() as f64;
    let all = correct.iter().filter(|correct| **correct).count() as f64;
    let confidence = |(own, near): (&bool, &Vec<usize>)| match formula {
        Formula::Notes => notes_confidence(rights(near) / near.len() as f64, *own),
        Formula::LeaveOneOut => {
            let others = (all - f64::from(*own)) / (correct.len() - 1) as f64;
            (rights(near) + SHRINKAGE * others) / (near.len() as f64 + SHRINKAGE)
        }
    };
    correct.iter().zip(neighbors).map(confidence).collect()
}

/// [`Formula::Notes`] of one answer.
pub fn notes_confidence(accuracy: f64, correct: bool) -> f64 {
    let base = 0.1 + 0.8 * accuracy;
    if correct { (base + 0.1).min(0.95) } else { (base - 0.15).max(0.05) }
}

/// The `k` nearest of every unit vector by cosine, itself excluded: by similarity rounded to 12 decimals, descending, then by
/// index. `progress` is told how many are done.
pub fn nearest(unit: &[Vec<f64>], k: usize, progress: &(dyn Fn(usize) + Sync)) -> Vec<Vec<usize>> {
    use rayon::prelude::*;
    // Neighbors are looked at by blocks, so that each vector is read once for many.
    const BLOCK: usize = 32;
    let done = std::sync::atomic::AtomicUsize::new(0);
    let block = |start: usize| -> Vec<Vec<usize>> {
        let own = start..(start + BLOCK).min(unit.len());
        let mut all: Vec<Vec<(f64, usize)>> = own.clone().map(|_| Vec::with_capacity(unit.len())).collect();
        for (other, vector) in unit.iter().enumerate() {
            for (index, near) in own.clone().zip(&mut all).filter(|(index, _)| *index != other) {
                near.push(((dot(&unit[index], vector) * 1e12).round(), other));
            }
        }
        let order = |a: &(f64, usize), b: &(f64, usize)| -> Ordering { b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)) };
        for near in &mut all {
            if k < near.len() {
                near.select_nth_unstable_by(k, order);
                near.truncate(k);
            }
            near.sort_by(order);
        }
        progress(done.fetch_add(own.len(), std::sync::atomic::Ordering::Relaxed) + own.len());
        all.into_iter().map(|near| near.into_iter().map(|(_, index)| index).collect()).collect()
    };
    let starts: Vec<usize> = (0..unit.len()).step_by(BLOCK).collect();
    starts.into_par_iter().flat_map_iter(block).collect()
}

/// Eight sums side by side, which the compiler makes vectors of.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        (0..8).for_each(|lane| sums[lane] += a[lane] * b[lane]);
    }
    sums.iter().sum::<f64>() + rest
}

/// A vector scaled to length 1.
pub fn unit(vector: &[f64]) -> Vec<f64> {
    let norm = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
    vector.iter().map(|x| x / norm).collect()
}
