//! How good stated confidences are: plain functions of checked predictions. Where a number is not defined it is `None`.
//!
//! * here: [`Predictions`], accuracy and proper scores
//! * [`binned`]: calibration errors over bins, and their level under perfect calibration
//! * [`compatible`]: errors as others compute them, for comparison with their tables alone
//! * [`decomposition`]: what a Brier score is made of; the isotonic fit
//! * [`selective`]: discrimination, and answering only where confident
//! * [`smooth`]: calibration error without bins
//! * [`bootstrap`]: intervals, by question
//! * [`collapse`]: whether confidences still differ
//! * [`answers`]: what the answers to questions state, parsed or not
//! * [`measures`]: everything that is printed of a set of answers
//! * [`comparison`]: two sets of answers to the same questions
//! * [`posthoc`]: maps that make confidences calibrated, with [`logistic`] regression
//! * [`routing`]: which answers to leave to a larger model

pub mod answers;
pub mod binned;
pub mod bootstrap;
pub mod collapse;
pub mod comparison;
pub mod compatible;
pub mod decomposition;
pub mod logistic;
pub mod measures;
pub mod posthoc;
pub mod routing;
pub mod selective;
pub mod smooth;

use anyhow::{Result, ensure};

/// The least that a token's probability counts as in a confidence: one surprise must not decide alone.
const SMALLEST: f64 = 1e-10;

/// A confidence, and whether the answer was correct.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// In [0, 1].
    pub confidence: f64,
    /// Whether the answer was.
    pub correct: bool,
    /// The question that was answered: resamples take questions whole.
    pub question: u32,
    /// How often it counts: once, but in a resample.
    pub count: u32,
}

/// All predictions of one confidence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Atom {
    /// Their confidence.
    pub confidence: f64,
    /// How many there are; a whole number above 0.
    pub count: f64,
    /// How many of them are correct.
    pub correct: f64,
}

/// Confidences and whether each answer was correct: checked once, so that no metric has to clamp or guess, and sorted once.
#[derive(Clone, Debug, PartialEq)]
pub struct Predictions {
    rows: Vec<Prediction>,
    atoms: Vec<Atom>,
    len: usize,
}

impl Predictions {
    /// Parsed answers only, each to a question of its own: a missing confidence is no prediction.
    ///
    /// # Errors
    /// No prediction; lists of different lengths; a confidence that is NaN or outside [0, 1], with its row.
    pub fn new(confidences: &[f64], correct: &[bool]) -> Result<Self> {
        ensure!(confidences.len() == correct.len(), "{} confidences for {} verdicts", confidences.len(), correct.len());
        let rows = confidences.iter().zip(correct).zip(0..);
        Self::of_questions(rows.map(|((&confidence, &correct), question)| (question, confidence, correct)))
    }

    /// The question, confidence and correctness of parsed answers, several of which may be to one question.
    ///
    /// # Errors
    /// As [`Predictions::new`].
    pub fn of_questions(answers: impl Iterator<Item = (u32, f64, bool)>) -> Result<Self> {
        let mut rows = Vec::new();
        for (row, (question, confidence, correct)) in answers.enumerate() {
            ensure!((0.0..=1.0).contains(&confidence), "row {row}: the confidence {confidence} is not in [0, 1]");
            // Adding zero makes 0.0 of −0.0, which is the same confidence.
            rows.push(Prediction { confidence: confidence + 0.0, correct, question, count: 1 });
        }
        // Stable: rows of one confidence keep their order.
        rows.sort_by(|left, right| left.confidence.total_cmp(&right.confidence));
        Self::of_sorted(rows).ok_or_else(|| anyhow::anyhow!("no prediction to evaluate"))
    }

    fn of_sorted(rows: Vec<Prediction>) -> Option<Self> {
        let mut atoms: Vec<Atom> = Vec::new();
        for &Prediction { confidence, correct, count, .. } in &rows {
            let (count, right) = (f64::from(count), if correct { f64::from(count) } else { 0.0 });
            match atoms.last_mut().filter(|atom| atom.confidence == confidence) {
                Some(atom) => (atom.count, atom.correct) = (atom.count + count, atom.correct + right),
                None => atoms.push(Atom { confidence, count, correct: right }),
            }
        }
        let len = rows.iter().map(|row| row.count as usize).sum();
        (len > 0).then_some(Self { rows, atoms, len })
    }

    /// A resample: every question as often as `counts`, by question, says. `None` where that leaves nothing.
    ///
    /// # Panics
    /// If a question has no count.
    pub fn resampled(&self, counts: &[u32]) -> Option<Self> {
        let counted = |row: &Prediction| {
            let count = row.count * counts[row.question as usize];
            (count > 0).then_some(Prediction { count, ..*row })
        };
        Self::of_sorted(self.rows.iter().filter_map(counted).collect())
    }

    /// How many there are; never 0.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The distinct confidences, ascending.
    pub fn atoms(&self) -> &[Atom] {
        &self.atoms
    }

    /// Every prediction, by ascending confidence, as often as it counts; those of one confidence in the order they were given.
    pub fn ascending(&self) -> impl Iterator<Item = &Prediction> {
        self.rows.iter().flat_map(|row| (0..row.count).map(move |_| row))
    }

    /// The mean of what `of` makes of an atom's confidence, given that the answer is correct and that it is not.
    fn mean(&self, of: impl Fn(f64) -> [f64; 2]) -> f64 {
        let total = |atom: &Atom| {
            let [if_correct, if_not] = of(atom.confidence);
            atom.correct * if_correct + (atom.count - atom.correct) * if_not
        };
        self.atoms.iter().map(total).sum::<f64>() / self.len as f64
    }
}

/// The share of correct answers.
pub fn accuracy(predictions: &Predictions) -> f64 {
    predictions.mean(|_| [1.0, 0.0])
}

/// The mean confidence.
pub fn mean_confidence(predictions: &Predictions) -> f64 {
    predictions.mean(|confidence| [confidence; 2])
}

/// The Brier score: the mean of (c − y)².
pub fn brier(predictions: &Predictions) -> f64 {
    predictions.mean(|confidence| [(confidence - 1.0).powi(2), confidence.powi(2)])
}

/// The Brier score of always saying the base rate: ȳ(1 − ȳ).
pub fn base_rate_brier(predictions: &Predictions) -> f64 {
    let rate = accuracy(predictions);
    rate * (1.0 - rate)
}

/// 1 − Brier / base-rate Brier; `None` where all answers are correct or all wrong.
pub fn brier_skill(predictions: &Predictions) -> Option<f64> {
    let constant = base_rate_brier(predictions);
    (constant > 0.0).then(|| 1.0 - brier(predictions) / constant)
}

/// The mean negative logarithm of the probability given to what is true, in nats, with confidences clipped to [ε, 1 − ε]: a
/// stated 0 or 1 would be infinitely wrong.
pub fn negative_log_likelihood(predictions: &Predictions, epsilon: f64) -> f64 {
    predictions.mean(|confidence| {
        let confidence = confidence.clamp(epsilon, 1.0 - epsilon);
        [-confidence.ln(), -(1.0 - confidence).ln()]
    })
}

/// The confidence that a model's own probabilities state: the geometric mean of those of its answer's tokens, given as
/// natural logarithms of the untempered softmax. One below 1e-10 counts as that much. `None` where there is no token.
pub fn token_confidence(logprobs_t: &[f64]) -> Option<f64> {
    let floored = logprobs_t.iter().map(|logprob| logprob.max(SMALLEST.ln()));
    (!logprobs_t.is_empty()).then(|| (floored.sum::<f64>() / logprobs_t.len() as f64).exp())
}
