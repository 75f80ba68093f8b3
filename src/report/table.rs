//! The report's table: every calibration metric with its interval, first and last.

use anyhow::Result;
use serde::Serialize;

use super::figures::{thousands, titled};
use super::subject::{Subject, answers};
use crate::evaluation::answers::Answers;
use crate::evaluation::bootstrap::Resampling;
use crate::evaluation::measures::{Estimate, METRICS, Measures};
use crate::evaluation::posthoc::{Kind, cross_fitted};

/// A table of the page.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Table {
    /// What its columns are of.
    pub columns: Vec<String>,
    /// Its rows, a metric each.
    pub rows: Vec<TableRow>,
}

/// A metric.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TableRow {
    /// Its name.
    pub title: String,
    /// How to read it.
    pub note: String,
    /// Whether it is among the first things to look at.
    pub headline: bool,
    /// One per column.
    pub cells: Vec<Cell>,
}

/// A number as it is shown.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// It, or a dash where it is not defined.
    pub value: String,
    /// Its 95% interval, empty where there is none.
    pub interval: String,
}

impl Cell {
    fn plain(value: impl Into<String>) -> Self {
        Self { value: value.into(), interval: String::new() }
    }

    fn of(estimate: Estimate) -> Self {
        // What rounds to zero has no sign.
        let number = |value: f64| format!("{value:.3}").replace("-0.000", "0.000").replace('-', "−");
        let value = estimate.value.map_or("–".into(), number);
        let interval = estimate.interval.filter(|_| estimate.value.is_some());
        let interval = interval.map_or(String::new(), |both| format!("{} to {}", number(both.low), number(both.high)));
        Self { value, interval }
    }
}

/// Maps that are fitted after the fact, across folds of questions.
const POST_HOC: [(Kind, &str); 2] = [(Kind::Platt, "Platt"), (Kind::Isotonic, "isotonic")];

/// The first and last answers of every subject, beside each other; `None` where no rollout is known to be right or wrong.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn first_and_last(subjects: &[Subject]) -> Result<Option<Table>> {
    let mut measured = Vec::new();
    let mut measure =
        |title: String, answers: &Answers| measured.push((title, Measures::of(answers, Resampling::default())));
    for subject in subjects {
        for (index, part) in subject.ends().iter().enumerate() {
            let Some(answers) = answers(&part.rollouts)? else { continue };
            let title = titled(subjects, subject, &part.title);
            measure(title.clone(), &answers);
            // What training has to beat costs nothing: the first answers with their confidences mapped.
            for (kind, name) in POST_HOC.into_iter().filter(|_| index == 0) {
                if let Some(calibrated) = cross_fitted(&answers, kind) {
                    measure(format!("{title} + {name}"), &calibrated);
                }
            }
        }
    }
    if measured.is_empty() {
        return Ok(None);
    }
    let row = |title: &str, note: &str, headline: bool, cell: &dyn Fn(&Measures) -> Cell| {
        let cells = measured.iter().map(|(_, measures)| cell(measures)).collect();
        TableRow { title: title.into(), note: note.into(), headline, cells }
    };
    let mut rows = vec![
        row("questions", "", false, &|measures| Cell::plain(thousands(measures.questions))),
        row("answers", "", false, &|measures| Cell::plain(thousands(measures.answers))),
        row("parse rate", "share that states a confidence", true, &|measures| Cell::of(measures.parse_rate)),
    ];
    for (index, metric) in METRICS.iter().enumerate() {
        rows.push(row(metric.title, metric.note, metric.headline, &|measures| Cell::of(measures.estimates.0[index])));
        if metric.name == "ece_10" {
            rows.push(row("ECE if all were honest", "what so few answers give by chance", false, &|measures| {
                Cell::plain(measures.ece_10_null.map_or("–".into(), |null| format!("{:.3}", null.mean)))
            }));
        }
    }
    rows.push(row("spread of confidences", "", false, &|measures| Cell::plain(spread(measures))));
    Ok(Some(Table { columns: measured.iter().map(|(title, _)| title.clone()).collect(), rows }))
}

/// Whether confidences have collapsed, in words.
fn spread(measures: &Measures) -> String {
    let Some(collapse) = &measures.collapse else { return "–".into() };
    let said = [
        (collapse.flat, "flat"),
        (collapse.collapsed && !collapse.flat, "collapsed"),
        (collapse.two_atom, "two values"),
        (measures.uninformative == Some(true), "may tell nothing"),
    ];
    let said: Vec<&str> = said.into_iter().filter_map(|(is, word)| is.then_some(word)).collect();
    if said.is_empty() { "varied".into() } else { said.join(", ") }
}
