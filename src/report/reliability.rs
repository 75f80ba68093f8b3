//! Reliability diagrams: binned, of every few steps; and CORP's isotonic fit with its band, of the phases of training.

use std::collections::BTreeMap;

use anyhow::Result;

use super::band::band;
use super::chart::{Axis, Chart, Dot, Figure, Layer, Mark};
use super::figures::thousands;
use super::subject::{Subject, answers};
use crate::evaluation::Predictions;
use crate::evaluation::answers::Answers;
use crate::evaluation::binned::equal_width;
use crate::evaluation::decomposition::{ReliabilityPoint, reliability};

/// Bins of a diagram.
const BINS: usize = 10;
/// A dot's radius if it held all answers; its area is their share.
const LARGEST_DOT: f64 = 16.0;
/// Confidences that are shown one by one; where more are stated there are no dots, and the band is drawn at so many.
const MOST_DOTS: usize = 101;

/// One diagram per group of steps, all subjects in each.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn calibration_curves(subjects: &[Subject], group_size: u64) -> Result<Figure> {
    let mut panels: BTreeMap<u64, Vec<(usize, Option<Predictions>)>> = BTreeMap::new();
    let mut last = 0;
    for (color, subject) in subjects.iter().enumerate() {
        last = last.max(subject.training.last_key_value().map_or(0, |(step, _)| *step));
        for (group, rollouts) in subject.groups(group_size) {
            let stated = answers(&rollouts)?.and_then(|answers| answers.predictions());
            panels.entry(group).or_default().push((color, stated));
        }
    }
    let chart = |(group, stated): (u64, Vec<(usize, Option<Predictions>)>)| {
        let (from, to) = (group * group_size, ((group + 1) * group_size - 1).min(last));
        let steps = if from == to { format!("Step {from}") } else { format!("Steps {from}–{to}") };
        let layers = |(color, stated): &(usize, Option<Predictions>)| {
            stated.as_ref().map(|stated| [binned(stated, *color, name(subjects, *color)), spread(stated, *color)])
        };
        diagram(&steps, &stated, stated.iter().filter_map(layers))
    };
    Ok(Figure {
        name: "calibration_curves",
        title: "Reliability, every few steps".into(),
        caption: "Ten bins of equal width; a dot's area is the share of the answers in its bin. On the diagonal, what is stated with \
                  70% is right 70% of the time. Bars: how the confidences are distributed."
            .into(),
        charts: panels.into_iter().map(chart).collect(),
    })
}

/// Answers of each run that has some, with its color.
type Colored = Vec<(usize, Option<Answers>)>;

/// Isotonic fits (CORP: Dimitriadis, Gneiting and Jordan 2021) with 95% bands, before, during and after training.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn reliability_phases(subjects: &[Subject]) -> Result<Figure> {
    let mut panels: Vec<(String, Colored)> = Vec::new();
    for (color, subject) in subjects.iter().enumerate() {
        for part in subject.phases() {
            let answers = answers(&part.rollouts)?;
            match panels.iter_mut().find(|(title, _)| *title == part.title) {
                Some((_, all)) => all.push((color, answers)),
                None => panels.push((part.title, vec![(color, answers)])),
            }
        }
    }
    let chart = |(title, all): (String, Colored)| {
        let stated: Vec<_> =
            all.iter().map(|(color, answers)| (*color, answers.as_ref().and_then(Answers::predictions))).collect();
        let layers = all.iter().zip(&stated).filter_map(|((color, answers), (_, stated))| {
            let (answers, stated) = (answers.as_ref()?, stated.as_ref()?);
            Some([fitted(answers, stated, *color, name(subjects, *color)), spread(stated, *color)])
        });
        diagram(&title, &stated, layers)
    };
    Ok(Figure {
        name: "reliability_phases",
        title: "Reliability, by phase".into(),
        caption: "The isotonic fit of being right on the stated confidence (CORP), without bins, and its 95% band (bootstrap by \
                  question). Below the diagonal is overconfident. Bars: how the confidences are distributed."
            .into(),
        charts: panels.into_iter().map(chart).collect(),
    })
}

/// A subject's name, where there are several.
fn name(subjects: &[Subject], index: usize) -> Option<String> {
    (subjects.len() > 1).then(|| subjects[index].title.clone())
}

/// A diagram of some subjects' layers, those of the diagram and those of the strip below it.
fn diagram(
    title: &str,
    stated: &[(usize, Option<Predictions>)],
    layers: impl Iterator<Item = [Vec<Layer>; 2]>,
) -> Chart {
    let mut chart = Chart {
        title: String::new(),
        x: Axis::share("stated confidence"),
        y: Axis::share("share correct"),
        layers: vec![Layer::guide(None, &[(0.0, 0.0), (1.0, 1.0)])],
        strip: Vec::new(),
    };
    for [above, below] in layers {
        chart.layers.extend(above);
        chart.strip.extend(below);
    }
    let count: usize = stated.iter().filter_map(|(_, stated)| stated.as_ref()).map(Predictions::len).sum();
    chart.title = match count {
        0 => format!("{title}: no answer could be read"),
        _ => format!("{title} (n = {})", thousands(count)),
    };
    if chart.strip.is_empty() {
        // As high as its neighbors.
        chart.strip.push(Layer::of(0, Mark::Bars(Vec::new())));
    }
    chart
}

/// The share that is right of each bin.
fn binned(stated: &Predictions, color: usize, name: Option<String>) -> Vec<Layer> {
    let bins = equal_width(stated, BINS).into_iter().filter(|bin| bin.count > 0.0);
    let means = bins.map(|bin| (bin.confidence / bin.count, bin.correct / bin.count, bin.count));
    let dot = |&(confidence, correct, count): &(f64, f64, f64)| {
        let radius = (LARGEST_DOT * (count / stated.len() as f64).sqrt()).max(2.0);
        Dot { at: (confidence, correct), radius, interval: None }
    };
    let means: Vec<_> = means.collect();
    let points = means.iter().map(|&(confidence, correct, _)| (confidence, Some(correct))).collect();
    let line = Mark::Line { points, dashed: false };
    vec![Layer { name, color: Some(color), mark: line }, Layer::of(color, Mark::Dots(means.iter().map(dot).collect()))]
}

/// The isotonic fit and its band.
fn fitted(answers: &Answers, stated: &Predictions, color: usize, name: Option<String>) -> Vec<Layer> {
    let curve = reliability(stated);
    // Where the fit does not change, its ends say everything.
    let changes = |index: &usize| {
        let fit = |index: usize| curve.get(index).map(|point| point.fit);
        fit(*index) != index.checked_sub(1).and_then(fit) || fit(*index) != fit(index + 1)
    };
    let points = (0..curve.len()).filter(changes).map(|index| (curve[index].confidence, Some(curve[index].fit)));
    let mark = Mark::Line { points: points.collect(), dashed: false };
    let fit = Layer { name, color: Some(color), mark };
    let dot = |point: &ReliabilityPoint| {
        let radius = (LARGEST_DOT * 0.6 * (point.count / stated.len() as f64).sqrt()).max(1.2);
        Dot { at: (point.confidence, point.fit), radius, interval: None }
    };
    let dots = if curve.len() > MOST_DOTS { Vec::new() } else { curve.iter().map(dot).collect() };
    vec![Layer::of(color, fit_band(answers, stated)), fit, Layer::of(color, Mark::Dots(dots))]
}

/// The 95% band of the isotonic fit at the stated confidences, or at some of them, spread by their rank.
fn fit_band(answers: &Answers, stated: &Predictions) -> Mark {
    let atoms = stated.atoms();
    let count = atoms.len().min(MOST_DOTS);
    let x: Vec<f64> = (0..count).map(|rank| atoms[rank * (atoms.len() - 1) / (count - 1).max(1)].confidence).collect();
    let curve = |counts: &[u32]| {
        let fit = reliability(&stated.resampled(counts)?);
        Some(fit.iter().map(|point| (point.confidence, point.fit)).collect())
    };
    Mark::Band(band(answers.questions().len(), &x, curve))
}

/// How the confidences are distributed, as bars.
fn spread(stated: &Predictions, color: usize) -> Vec<Layer> {
    let width = 1.0 / (2 * BINS) as f64;
    let bar =
        |(index, count): (usize, f64)| (index as f64 * width, (index + 1) as f64 * width, count / stated.len() as f64);
    let bins = equal_width(stated, 2 * BINS).into_iter().map(|bin| bin.count).enumerate();
    vec![Layer::of(color, Mark::Bars(bins.map(bar).filter(|bar| bar.2 > 0.0).collect()))]
}
