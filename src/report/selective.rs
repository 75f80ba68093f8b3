//! The figures of acting on confidence: keeping the surest answers, and handing the others to a larger model.

use anyhow::Result;

use super::band::band;
use super::chart::{Axis, Chart, Figure, Layer, Mark};
use super::figures::titled;
use super::subject::{Subject, answers, predictions};
use crate::evaluation::answers::Answers;
use crate::evaluation::routing::{Costs, Routed, routing};
use crate::evaluation::selective::coverage_curve;

/// Escalation rates at which a band is drawn.
const GRID: usize = 50;
/// What a question costs changes no accuracy.
const COSTS: Costs = Costs { small: 0.0, large: 1.0 };

/// The accuracy of the answers that a threshold on confidence keeps, over their share.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn coverage_accuracy(subjects: &[Subject]) -> Result<Figure> {
    let layers = each_end(subjects, |rollouts, color, name, dashed| {
        let Some(stated) = predictions(rollouts)? else { return Ok(Vec::new()) };
        let points = coverage_curve(&stated).into_iter().map(|(coverage, kept)| (coverage, Some(kept))).collect();
        Ok(vec![Layer { name, color: Some(color), mark: Mark::Line { points, dashed } }])
    })?;
    Ok(figure(
        "coverage_accuracy",
        "Coverage and accuracy",
        "Answers are kept from the surest on. A curve that falls to the right knows its right answers from its wrong ones.".into(),
        [Axis::share("coverage: share of parsed answers kept"), Axis::share("share correct of those kept")],
        layers,
    ))
}

/// The accuracy of a router that hands the least sure answers to a larger model of the given accuracy, over the share that it hands on.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn routing_curve(subjects: &[Subject], large_accuracy: f64) -> Result<Figure> {
    let mut layers = each_end(subjects, |rollouts, color, name, dashed| {
        let Some(answers) = answers(rollouts)?.filter(|answers| answers.predictions().is_some()) else {
            return Ok(Vec::new());
        };
        let Some(routed) = routing(&routed(&answers, large_accuracy, None), COSTS) else { return Ok(Vec::new()) };
        let points = routed.curve.iter().map(|&(rate, accuracy)| (rate, Some(accuracy))).collect();
        let mut layers = vec![Layer { name, color: Some(color), mark: Mark::Line { points, dashed } }];
        if !dashed {
            let grid: Vec<f64> = (0..=GRID).map(|index| index as f64 / GRID as f64).collect();
            let curve =
                |counts: &[u32]| Some(routing(&self::routed(&answers, large_accuracy, Some(counts)), COSTS)?.curve);
            layers.insert(0, Layer::of(color, Mark::Band(band(answers.questions().len(), &grid, curve))));
            if subjects.len() == 1 {
                let ends = [(0.0, routed.small_accuracy), (1.0, routed.large_accuracy)];
                layers.push(Layer::guide(Some("at random"), &ends));
                layers.push(Layer { color: Some(2), ..Layer::guide(Some("best possible"), &routed.oracle_curve) });
            }
        }
        Ok(layers)
    })?;
    // Bands lie behind all lines.
    layers.sort_by_key(|layer| !matches!(layer.mark, Mark::Band(_)));
    let large = match large_accuracy {
        1.0 => "The larger model counts as always right: what a router could gain at most (--large-accuracy says otherwise).".into(),
        accuracy => format!("The larger model counts as right {}% of the time.", (accuracy * 1000.0).round() / 10.0),
    };
    Ok(figure(
        "routing",
        "Routing",
        format!(
            "The least sure answers, unreadable ones first, are handed to a larger model. {large} The band is 95%."
        ),
        [Axis::share("share of questions handed on"), Axis::share("share correct of all")],
        layers,
    ))
}

/// The answers, each as often as its question was drawn.
fn routed(answers: &Answers, large: f64, counts: Option<&[u32]>) -> Vec<Routed> {
    let times = |question: u32| counts.map_or(1, |counts| counts[question as usize] as usize);
    let rows = answers.rows().iter().map(|row| {
        std::iter::repeat_n(Routed { confidence: row.confidence, small: row.correct, large }, times(row.question))
    });
    rows.flatten().collect()
}

/// The layers of every subject's first and last rollouts; `dashed` is what is not the last.
fn each_end(
    subjects: &[Subject],
    layers: impl Fn(&[&crate::generations::Recorded], usize, Option<String>, bool) -> Result<Vec<Layer>>,
) -> Result<Vec<Layer>> {
    let mut all = Vec::new();
    for (color, subject) in subjects.iter().enumerate() {
        let ends = subject.ends();
        for (index, part) in ends.iter().enumerate() {
            let name = Some(titled(subjects, subject, &part.title));
            all.extend(layers(&part.rollouts, color, name, index + 1 < ends.len())?);
        }
    }
    Ok(all)
}

/// A figure of one chart; of none where it has no layers.
fn figure(name: &'static str, title: &str, caption: String, [x, y]: [Axis; 2], layers: Vec<Layer>) -> Figure {
    let chart = Chart { title: title.into(), x, y, layers, strip: Vec::new() };
    let charts = if chart.layers.is_empty() { Vec::new() } else { vec![chart] };
    Figure { name, title: title.into(), caption, charts }
}
