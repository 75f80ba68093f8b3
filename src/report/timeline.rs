//! Who worked when: the spans of a run's first and last steps as a Gantt chart.

use super::chart::{Axis, Chart, Figure, Layer, Mark};
use super::read::RecordedRun;
use crate::timeline::{Span, Stage};

/// Steps on one chart: more could not be told apart.
const STEPS: u64 = 8;

/// From bottom to top.
const LANES: [&str; 3] = ["learner", "scorers", "sampler"];

/// Every stage with its lane and its name in the legend.
const STAGES: [(Stage, usize, &str); 5] = [
    (Stage::Sample, 2, "rollouts"),
    (Stage::Evaluate, 2, "held-out tasks"),
    (Stage::Score, 1, "scores"),
    (Stage::Learn, 0, "learning"),
    (Stage::Save, 0, "checkpoints"),
];

/// A chart of the first steps and one of the last; of several runs the last steps each.
pub fn timeline(runs: &[RecordedRun]) -> Figure {
    let mut charts = Vec::new();
    for run in runs {
        let trained = run.spans.iter().filter(|span| span.stage == Stage::Learn).map(|span| span.step);
        let Some((first, last)) = trained.clone().min().zip(trained.max()) else { continue };
        let ends = [(first, (first + STEPS - 1).min(last)), ((last + 1).saturating_sub(STEPS).max(first), last)];
        let (several, short) = (runs.len() > 1, ends[0] == ends[1]);
        for (from, to) in ends.into_iter().skip(usize::from(several || short)) {
            let steps = format!("steps {} to {}", from + 1, to + 1);
            let title = if several { format!("{}: {steps}", run.name) } else { steps };
            charts.extend(chart(title, run.spans.iter().filter(|span| (from..=to).contains(&span.step))));
        }
    }
    Figure {
        name: "timeline",
        title: "Who worked when".into(),
        caption: "A bar of the sampler is the completions of a step or an evaluation; the bar of their scores reaches from the first \
                  completion to the last score. At sampling.async_level = 0 sampler and learner take turns; above it the sampler \
                  goes on while the learner learns."
            .into(),
        charts,
    }
}

/// `None` where there is nothing to draw.
fn chart<'a>(title: String, spans: impl Iterator<Item = &'a Span> + Clone) -> Option<Chart> {
    let x = Axis::around("seconds since the run began", spans.clone().flat_map(|span| [span.start, span.end]))?;
    let y = Axis { label: String::new(), range: (-0.6, LANES.len() as f64 - 0.4), whole: true, names: &LANES };
    let layer = |(color, (stage, lane, name)): (usize, (Stage, usize, &str))| {
        let of_stage = spans.clone().filter(|span| span.stage == stage);
        let bars: Vec<(f64, f64, f64)> = of_stage.map(|span| (span.start, span.end, lane as f64)).collect();
        (!bars.is_empty()).then(|| Layer { name: Some(name.into()), ..Layer::of(color, Mark::Spans(bars)) })
    };
    let layers = STAGES.into_iter().enumerate().filter_map(layer).collect();
    Some(Chart { title, x, y, layers, strip: Vec::new() })
}
