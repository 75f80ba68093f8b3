//! The report's tables for other programs: a row per rollout, a row per step. What is missing is an empty cell.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};

use anyhow::Result;
use serde_json::{Map, Value};

use super::read::RecordedRun;
use super::subject::{Subject, predictions};
use crate::evaluation::measures::METRICS;
use crate::generations::Recorded;
use crate::run::RowSplit;

const COLUMNS: &str = "run,split,step,environment,task,group,rollout,parse,confidence,correct,brier,reward,advantage,tokens,\
                       finish,failed\n";

/// `calibration_metrics.csv`: a row per rollout.
pub fn rollouts(runs: &[RecordedRun]) -> Result<String> {
    let mut text = COLUMNS.to_string();
    for run in runs {
        let name = quoted(&run.name);
        for rollout in &run.rollouts {
            let Recorded { step, environment, task, group, rollout: index, tokens, failed, .. } = rollout;
            let split = if rollout.split == RowSplit::Train { "train" } else { "eval" };
            let (environment, task) = (quoted(environment), quoted(task));
            let parse = rollout.parse.map_or("", |parse| parse.name());
            let brier = rollout.prediction().map(|(confidence, correct)| (confidence - f64::from(correct)).powi(2));
            let correct = cell(rollout.correct.map(u8::from));
            let [confidence, brier, reward, advantage] =
                [rollout.confidence, brier, rollout.reward, rollout.advantage].map(cell);
            let (finish, failed) = (word(rollout.finish)?, u8::from(*failed));
            writeln!(
                text,
                "{name},{split},{step},{environment},{task},{group},{index},{parse},{confidence},{correct},{brier},\
                 {reward},{advantage},{tokens},{finish},{failed}"
            )?;
        }
    }
    Ok(text)
}

/// `metrics.csv`: a row per step, with what `metrics.jsonl` says of it and every calibration metric of its parsed answers,
/// those of training under `calibration/`, those of an evaluation under `eval/calibration/`.
///
/// # Errors
/// If a confidence is not in [0, 1].
pub fn steps(runs: &[RecordedRun], subjects: &[Subject]) -> Result<String> {
    let mut columns: Vec<String> = Vec::new();
    let mut rows: BTreeMap<(usize, u64), BTreeMap<String, String>> = BTreeMap::new();
    let mut put = |place: (usize, u64), column: String, value: String| {
        let row = rows.entry(place).or_default();
        if row.insert(column.clone(), value).is_none() && !columns.contains(&column) {
            columns.push(column);
        }
    };
    for (index, run) in runs.iter().enumerate() {
        for row in &run.metrics {
            let Some(step) = row.get("step").and_then(Value::as_u64) else { continue };
            flat(row, "", &mut |name, value| put((index, step), name, value));
        }
    }
    for subject in subjects {
        let alone = subjects.iter().filter(|other| other.run == subject.run).count() == 1;
        let suffix = if alone { String::new() } else { format!("/{}", subject.environment) };
        for (prefix, steps) in [("calibration/", &subject.training), ("eval/calibration/", &subject.evaluations)] {
            for (&step, rollouts) in steps {
                let stated = predictions(rollouts)?;
                put(
                    (subject.run, step),
                    format!("{prefix}parsed{suffix}"),
                    stated.as_ref().map_or(0, |p| p.len()).to_string(),
                );
                for metric in &METRICS {
                    let value = stated.as_ref().and_then(metric.of);
                    put((subject.run, step), format!("{prefix}{}{suffix}", metric.name), cell(value));
                }
            }
        }
    }
    let mut text =
        format!("run,step{}\n", columns.iter().map(|column| format!(",{}", quoted(column))).collect::<String>());
    for ((run, step), row) in &rows {
        let cells = columns.iter().map(|column| format!(",{}", row.get(column).map_or("", String::as_str)));
        writeln!(text, "{},{step}{}", quoted(&runs[*run].name), cells.collect::<String>())?;
    }
    Ok(text)
}

/// The numbers and words of a row of metrics, names of nested ones joined by `/`. The step has a column of its own.
fn flat(row: &Map<String, Value>, prefix: &str, put: &mut impl FnMut(String, String)) {
    for (name, value) in
        row.iter().filter(|(name, _)| !prefix.is_empty() || !["step", "split"].contains(&name.as_str()))
    {
        let name = format!("{prefix}{name}");
        match value {
            Value::Object(inner) => flat(inner, &format!("{name}/"), put),
            Value::Null => put(name, String::new()),
            Value::String(text) => put(name, quoted(text)),
            other => put(name, quoted(&other.to_string())),
        }
    }
}

/// A value's name in files.
fn word(value: impl serde::Serialize) -> Result<String> {
    Ok(serde_json::to_value(value)?.as_str().unwrap_or_default().to_string())
}

fn cell(value: Option<impl Display>) -> String {
    value.map_or(String::new(), |value| value.to_string())
}

/// A text as a cell (RFC 4180): in quotes, with its own ones doubled, where it could end the cell.
pub fn quoted(text: &str) -> String {
    let plain = !text.contains([',', '"', '\n', '\r']);
    if plain { text.to_string() } else { format!("\"{}\"", text.replace('"', "\"\"")) }
}
