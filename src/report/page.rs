//! `index.html`: figures, tables, config and a browser of the rollouts in one file that needs no network.
//!
//! The template escapes whatever it is given, and texts of the model are packed and only ever become text nodes; the page's
//! content security policy runs our script alone, by its hash.

use std::io::Write;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use candor_environments::{Finish, ParseStatus};
use minijinja::Environment;
use minijinja::value::Serde;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::chart::Figure;
use super::draw::chart_svg;
use super::figures::thousands;
use super::read::{RecordedRun, zlib};
use super::table::Table;
use crate::evaluation::bootstrap::RESAMPLES;
use crate::run::RowSplit;

const TEMPLATE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// Where the template leaves room for the data.
const DATA: &str = "<!--data-->";
/// How a completion may have been read, in the order that the page's index counts in.
const PARSES: [ParseStatus; 4] =
    [ParseStatus::Ok, ParseStatus::Missing, ParseStatus::Malformed, ParseStatus::OutOfRange];

/// Writes the page.
///
/// # Errors
/// If it cannot be written.
pub fn write(out: &mut impl Write, runs: &[RecordedRun], table: Option<&Table>, figures: &[Figure]) -> Result<()> {
    let figure = |figure: &Figure| {
        let charts = figure.charts.iter().map(|chart| Ok(json!({ "title": chart.title, "svg": chart_svg(chart)? })));
        let charts = charts.collect::<Result<Vec<_>>>()?;
        Ok(json!({ "name": figure.name, "title": figure.title, "caption": figure.caption, "charts": charts }))
    };
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let run =
        |run: &RecordedRun| json!({ "name": run.name, "facts": facts(run), "notes": run.notes, "config": run.config });
    let page = json!({
        "title": format!("{} – report", names.join(", ")),
        "script_hash": STANDARD.encode(Sha256::digest(SCRIPT)),
        "style": STYLE,
        "script": SCRIPT,
        "resamples": RESAMPLES,
        "runs": runs.iter().map(run).collect::<Value>(),
        "table": table,
        "figures": figures.iter().map(figure).collect::<Result<Value>>()?,
    });
    let mut templates = Environment::new();
    templates.add_template("page.html", TEMPLATE)?;
    let page = templates.get_template("page.html")?.render(Serde(page))?;
    // Nothing else can be this comment: where a text has a bracket, the template has written its name.
    let (before, after) = page.split_once(DATA).context("the template has no place for data")?;
    out.write_all(before.as_bytes())?;
    writeln!(out, r#"<script type="text/plain" id="index">{}</script>"#, STANDARD.encode(zlib(&index(runs)?)?))?;
    let mut base = 0;
    for run in runs {
        for texts in &run.texts {
            let (first, packed) = (base + texts.first, STANDARD.encode(&texts.packed));
            writeln!(out, r#"<script type="text/plain" class="texts" data-first="{first}">{packed}</script>"#)?;
        }
        base += run.rollouts.len();
    }
    Ok(out.write_all(after.as_bytes())?)
}

/// What the page says of a run at its top.
fn facts(run: &RecordedRun) -> Vec<(&'static str, String)> {
    let config: Option<toml::Table> = run.config.as_ref().and_then(|config| config.parse().ok());
    let key = |section: &str, key: &str| Some(config.as_ref()?.get(section)?.get(key)?.as_str()?.to_string());
    let planned = config.as_ref().and_then(|config| config.get("steps")?.as_integer());
    let trained = run.rollouts.iter().filter(|rollout| rollout.split == RowSplit::Train);
    let steps = trained.map(|rollout| rollout.step + 1).max().unwrap_or(0);
    let mut environments: Vec<&str> = run.rollouts.iter().map(|rollout| rollout.environment.as_str()).collect();
    environments.sort_unstable();
    environments.dedup();
    let failed = run.rollouts.iter().filter(|rollout| rollout.failed).count();
    let facts = [
        ("model", key("model", "source")),
        ("environments", Some(environments.join(", "))),
        ("training steps", Some(planned.map_or(steps.to_string(), |planned| format!("{steps} of {planned}")))),
        ("rollouts", Some(thousands(run.rollouts.len()))),
        ("not scored", (failed > 0).then(|| thousands(failed))),
        ("read from", Some(run.path.display().to_string())),
    ];
    facts.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

/// What the page filters and sorts by: columns over the rollouts of all runs.
fn index(runs: &[RecordedRun]) -> Result<Vec<u8>> {
    let all =
        || runs.iter().enumerate().flat_map(|(run, recorded)| recorded.rollouts.iter().map(move |row| (run, row)));
    let (mut environments, mut tasks) = (Numbered::default(), Numbered::default());
    let column = |of: &dyn Fn(usize, &crate::generations::Recorded) -> Value| -> Value {
        all().map(|(run, row)| of(run, row)).collect()
    };
    let environment: Value = all().map(|(_, row)| environments.number(&row.environment)).collect();
    let task: Value = all().map(|(_, row)| tasks.number(&row.task)).collect();
    let index = json!({
        "runs": runs.iter().map(|run| &run.name).collect::<Vec<_>>(),
        "environments": environments.names,
        "tasks": tasks.names,
        "parses": PARSES,
        "columns": {
            "run": column(&|run, _| run.into()),
            "split": column(&|_, row| u8::from(row.split == RowSplit::Eval).into()),
            "step": column(&|_, row| row.step.into()),
            "environment": environment,
            "task": task,
            "group": column(&|_, row| row.group.into()),
            "rollout": column(&|_, row| row.rollout.into()),
            "parse": column(&|_, row| PARSES.iter().position(|parse| Some(*parse) == row.parse).into()),
            "correct": column(&|_, row| row.correct.map(u8::from).into()),
            "confidence": column(&|_, row| row.confidence.into()),
            "reward": column(&|_, row| row.reward.into()),
            "advantage": column(&|_, row| row.advantage.into()),
            "tokens": column(&|_, row| row.tokens.into()),
            "finish": column(&|_, row| u8::from(row.finish == Finish::Length).into()),
        },
    });
    Ok(serde_json::to_vec(&index)?)
}

/// Names, numbered as they first appear.
#[derive(Default)]
struct Numbered<'a> {
    numbers: std::collections::HashMap<&'a str, usize>,
    names: Vec<&'a str>,
}

impl<'a> Numbered<'a> {
    fn number(&mut self, name: &'a str) -> usize {
        *self.numbers.entry(name).or_insert_with(|| {
            self.names.push(name);
            self.names.len() - 1
        })
    }
}
