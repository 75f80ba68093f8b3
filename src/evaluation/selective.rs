//! Whether confidences tell right answers from wrong ones, and what answering only the surest questions gives. Among answers of
//! one confidence errors are spread evenly: the expected value under a random order.

use super::{Atom, Predictions};

/// How far below an accuracy target a share may fall by rounding.
const ROUNDING: f64 = 1e-12;

/// The chance that a correct answer has a higher confidence than a wrong one, ties counting half (Mann-Whitney); `None`
/// where all answers are correct or all wrong.
pub fn auroc(predictions: &Predictions) -> Option<f64> {
    let (mut wins, mut rights, mut wrongs) = (0.0, 0.0, 0.0);
    for Atom { count, correct, .. } in predictions.atoms() {
        let wrong = count - correct;
        wins += correct * (wrongs + wrong / 2.0);
        rights += correct;
        wrongs += wrong;
    }
    (rights > 0.0 && wrongs > 0.0).then(|| wins / (rights * wrongs))
}

/// The area under the risk-coverage curve (Geifman and El-Yaniv 2017): the mean over k of the error rate of the k surest answers.
pub fn aurc(predictions: &Predictions) -> f64 {
    let (mut kept, mut errors, mut area) = (0.0, 0.0, 0.0);
    for Atom { count, correct, .. } in predictions.atoms().iter().rev() {
        let share = (count - correct) / count;
        for more in 1..=*count as usize {
            area += (errors + share * more as f64) / (kept + more as f64);
        }
        kept += count;
        errors += count - correct;
    }
    area / kept
}

/// [`aurc`] minus that of a perfect order, which is not 0 where there are errors.
pub fn excess_aurc(predictions: &Predictions) -> f64 {
    let rights = predictions.atoms().iter().map(|atom| atom.correct).sum::<f64>() as usize;
    let count = predictions.len();
    let perfect: f64 = (rights + 1..=count).map(|k| (k - rights) as f64 / k as f64).sum();
    aurc(predictions) - perfect / count as f64
}

/// The accuracy of the surest share of the answers, of at least one. `coverage` is in [0, 1].
pub fn accuracy_at_coverage(predictions: &Predictions, coverage: f64) -> f64 {
    let wanted = (coverage * predictions.len() as f64 - 1e-9).ceil().clamp(1.0, predictions.len() as f64);
    let (mut kept, mut errors) = (0.0, 0.0);
    for Atom { count, correct, .. } in predictions.atoms().iter().rev() {
        let taken = count.min(wanted - kept);
        errors += taken * (count - correct) / count;
        kept += taken;
        if kept >= wanted {
            break;
        }
    }
    1.0 - errors / wanted
}

/// The largest share of answers that a threshold on confidence keeps with at least this accuracy; 0 where none does.
pub fn coverage_at_accuracy(predictions: &Predictions, accuracy: f64) -> f64 {
    let reached = coverage_curve(predictions).into_iter().filter(|(_, kept)| *kept >= accuracy - ROUNDING);
    reached.map(|(coverage, _)| coverage).fold(0.0, f64::max)
}

/// (coverage, accuracy of what is kept) of every threshold on confidence, from the highest to the lowest.
pub fn coverage_curve(predictions: &Predictions) -> Vec<(f64, f64)> {
    let (mut kept, mut correct) = (0.0, 0.0);
    let keep = |atom: &Atom| {
        kept += atom.count;
        correct += atom.correct;
        (kept / predictions.len() as f64, correct / kept)
    };
    predictions.atoms().iter().rev().map(keep).collect()
}
