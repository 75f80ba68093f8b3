//! The commands that say how good confidences are: an evaluation, two of them compared, and what to leave to a larger model.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum, value_parser};
use serde::Serialize;
use serde_json::json;

use super::Failure;
use super::console::Console;
use super::models::word;
use crate::calibration::{Calibration, Measuring, answers, by_environment, read_rows};
use crate::calibration_map::{CalibrationMap, Confidence};
use crate::comparison::comparisons;
use crate::config::Config;
use crate::evaluation::bootstrap::{RESAMPLES, Resampling};
use crate::evaluation::posthoc::{EPSILON, Kind, Map};
use crate::evaluation::routing::{Costs, Rule};
use crate::event::Event;
use crate::heldout::Evaluation;
use crate::routed::{Asked, Large, routed};
use crate::run::{GENERATIONS, Row, write_whole};
use crate::setup::Options;

/// How intervals are made.
#[derive(Args)]
struct Intervals {
    /// Bootstrap resamples of the intervals
    #[arg(long, value_name = "N", default_value_t = RESAMPLES, value_parser = resamples)]
    resamples: usize,
    /// The same seed gives the same intervals
    #[arg(long, value_name = "N", default_value = "0")]
    bootstrap_seed: u64,
}

impl Intervals {
    fn resampling(&self) -> Resampling {
        Resampling { resamples: self.resamples, seed: self.bootstrap_seed }
    }
}

fn resamples(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (100..=1_000_000).contains(number));
    number.ok_or_else(|| "not a number from 100 to 1000000".to_string())
}

/// Numbers of others to be compared with.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Compat {
    /// The calibration error of Humanity's Last Exam, its last bin not scored
    Hle,
}

const EVAL: &str = "\
Three kinds of confidence: what the completions state, what the probabilities of
their answers' tokens say, and a logistic regression of both. Beside each stands
what it is worth through a Platt and an isotonic map; maps and regression are
fitted on other questions than those they are applied to (5 parts).

OUT holds generations.jsonl (a row for every completion), metrics.json, and in
maps/ every map, fitted on all answers: for eval and sample --calibrate.";

/// `candor eval`.
#[derive(Args)]
#[command(after_help = EVAL)]
pub struct Eval {
    /// The config file (TOML); or what was evaluated before, a run or a file of
    /// rows: results/NAME, or results/NAME@20 for the evaluation after 20 steps
    #[arg(value_name = "CONFIG|ROWS")]
    input: PathBuf,
    /// Another value for a key: --set evaluation.tasks=500
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// A PEFT adapter folder, such as results/NAME/checkpoints/step-000020; without it, the model as it is
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Completions of every task; more than one needs evaluation.temperature > 0
    #[arg(long, value_name = "M", default_value = "1", value_parser = value_parser!(u32).range(1..=4096))]
    samples: u32,
    /// The folder to be made; without it, nothing is written
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// A map that an evaluation wrote; what it is worth is shown too
    #[arg(long, value_name = "FILE")]
    calibrate: Option<PathBuf>,
    /// Numbers of others to be compared with
    #[arg(long, value_enum)]
    compat: Option<Compat>,
    #[command(flatten)]
    intervals: Intervals,
    /// Say nothing but warnings, errors and the result
    #[arg(long)]
    pub quiet: bool,
}

/// The maps that an evaluation writes.
const WRITTEN_MAPS: [Kind; 5] = [Kind::Temperature, Kind::Platt, Kind::Isotonic, Kind::Beta, Kind::Histogram];

impl Eval {
    /// Runs it.
    pub fn run(&self, options: &Options, console: &Console) -> Result<u8, Failure> {
        let map = self.calibrate.as_deref().map(CalibrationMap::read).transpose().map_err(Failure::Input)?;
        self.out.as_deref().map_or(Ok(()), absent).map_err(Failure::Input)?;
        let (who, rows) = self.rows(options)?;
        let measuring =
            Measuring { resampling: self.intervals.resampling(), map: map.as_ref(), hle: self.compat.is_some() };
        let measured =
            by_environment(&rows).into_iter().map(|(name, rows)| Ok((name, Calibration::of(&rows, measuring)?)));
        let measured = measured.collect::<Result<BTreeMap<&str, Calibration>>>().map_err(Failure::Input)?;
        for (name, calibration) in &measured {
            let Calibration { tasks, completions, .. } = calibration;
            let several = if completions > tasks { format!(", {completions} completions") } else { String::new() };
            console.print(&format!("{name}: {tasks} held-out tasks{several}, {who}\n{calibration}"));
        }
        let Some(out) = &self.out else { return Ok(0) };
        self.write(out, &who, &rows, &measured).map_err(Failure::Run)?;
        (options.observer)(Event::Line(&format!("wrote {}", out.display())));
        Ok(0)
    }

    /// Who answered, and the rows.
    fn rows(&self, options: &Options) -> Result<(String, Vec<Row>), Failure> {
        if self.input.extension().is_some_and(|extension| extension == "toml") {
            let config = Config::load(&self.input, &self.sets).map_err(Failure::Input)?;
            let prepared = Evaluation::prepare(config, self.adapter.as_deref(), self.samples as usize, options);
            let rows = prepared.map_err(Failure::Input)?.run(options.observer).map_err(Failure::Run)?;
            let adapter = self.adapter.as_ref().map(|adapter| format!("adapter {}", adapter.display()));
            return Ok((adapter.unwrap_or("base model".to_string()), rows));
        }
        let asked = || -> Result<Vec<Row>> {
            let alone = self.adapter.is_none() && self.sets.is_empty() && self.samples == 1;
            let input = self.input.display();
            ensure!(
                alone,
                "--adapter, --samples and --set are for a config, and {input} is not one: it does not end in .toml"
            );
            read_rows(&self.input)
        };
        Ok((self.input.display().to_string(), asked().map_err(Failure::Input)?))
    }

    /// Makes the folder, whole or not at all.
    fn write(&self, out: &Path, who: &str, rows: &[Row], measured: &BTreeMap<&str, Calibration>) -> Result<()> {
        let unfinished = PathBuf::from(format!("{}.new", out.display().to_string().trim_end_matches('/')));
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).with_context(|| format!("{}: cannot remove", unfinished.display()))?;
        }
        let maps = unfinished.join("maps");
        fs::create_dir_all(&maps).with_context(|| format!("{}: cannot create", maps.display()))?;
        let lines = rows.iter().map(|row| Ok(serde_json::to_string(row)? + "\n")).collect::<Result<String>>()?;
        write_whole(&unfinished.join(GENERATIONS), lines.as_bytes())?;
        let metrics = json!({
            "candor": env!("CARGO_PKG_VERSION"),
            "input": self.input.display().to_string(),
            "sets": self.sets,
            "answered_by": who,
            "samples": self.samples,
            "map_epsilon": EPSILON,
            "environments": measured,
        });
        write_whole(&unfinished.join("metrics.json"), &serde_json::to_vec_pretty(&metrics)?)?;
        for (environment, rows) in by_environment(rows) {
            write_maps(&maps, environment, &rows)?;
        }
        fs::rename(&unfinished, out).with_context(|| format!("{}: cannot create", out.display()))
    }
}

/// Fits every map on all answers and writes it as `ENVIRONMENT.CONFIDENCE.KIND.json`.
fn write_maps(folder: &Path, environment: &str, rows: &[&Row]) -> Result<()> {
    for (name, of) in [("stated", Confidence::Stated), ("token", Confidence::Token)] {
        let Some(predictions) = answers(rows, of)?.and_then(|answers| answers.predictions()) else { continue };
        for (kind_name, kind) in Kind::ALL.into_iter().filter(|(_, kind)| WRITTEN_MAPS.contains(kind)) {
            let Some(map) = Map::fit(kind, &predictions) else { continue };
            let (environment, answers) = (environment.to_string(), predictions.len());
            // Names of environments may be `evaluation.environment.1 (boolq)`.
            let file = format!("{}.{name}.{kind_name}.json", environment.replace(['/', ' '], "_"));
            CalibrationMap { environment, of, answers, epsilon: EPSILON, map }.write(&folder.join(file))?;
        }
    }
    Ok(())
}

fn absent(path: &Path) -> Result<()> {
    ensure!(!path.exists(), "--out: {} exists already; nothing is overwritten", path.display());
    Ok(())
}

/// Writes a result to the file that was asked for, if one was.
fn write_result(out: Option<&Path>, result: &impl Serialize) -> Result<()> {
    out.map_or(Ok(()), |path| write_whole(path, &serde_json::to_vec_pretty(result)?))
}

/// `candor compare`.
#[derive(Args)]
pub struct Compare {
    /// The first: a folder that eval made, or a run or file of rows, as results/NAME@0
    before: PathBuf,
    /// The second, of the same tasks
    after: PathBuf,
    /// Which confidence: stated or token
    #[arg(long, value_parser = word::<Confidence>, default_value = "stated")]
    confidence: Confidence,
    /// A file for the result as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    intervals: Intervals,
    /// Say nothing but warnings, errors and the result
    #[arg(long)]
    pub quiet: bool,
}

impl Compare {
    /// Runs it.
    pub fn run(&self, console: &Console) -> Result<u8, Failure> {
        let compared = || -> Result<_> {
            self.out.as_deref().map_or(Ok(()), absent)?;
            let (before, after) = (read_rows(&self.before)?, read_rows(&self.after)?);
            comparisons(&before, &after, self.confidence, self.intervals.resampling())
        };
        let compared = compared().map_err(Failure::Input)?;
        compared.iter().for_each(|comparison| console.print(&comparison.to_string()));
        write_result(self.out.as_deref(), &compared).map_err(Failure::Run)?;
        Ok(0)
    }
}

/// `candor route`.
#[derive(Args)]
pub struct Route {
    /// The small model's evaluation: a folder that eval made, or a run or file of rows
    small: PathBuf,
    /// The large model's, of the same tasks
    #[arg(required_unless_present = "large_accuracy")]
    large: Option<PathBuf>,
    /// The large model's accuracy, where there is no evaluation of it
    #[arg(long, value_name = "A", conflicts_with = "large", value_parser = share)]
    large_accuracy: Option<f64>,
    /// What is routed by: stated or token
    #[arg(long, value_parser = word::<Confidence>, default_value = "stated")]
    confidence: Confidence,
    /// A map that confidences go through first
    #[arg(long, value_name = "FILE")]
    calibrate: Option<PathBuf>,
    /// What an answer of the small model costs; it is always paid
    #[arg(long, value_name = "C", default_value = "1", value_parser = amount)]
    small_cost: f64,
    /// What an answer of the large model costs
    #[arg(long, value_name = "C", default_value = "10", value_parser = amount)]
    large_cost: f64,
    /// The largest share of questions to escalate; may be repeated
    #[arg(long, value_name = "E", value_parser = share)]
    budget: Vec<f64>,
    /// The least accuracy; may be repeated
    #[arg(long, value_name = "A", value_parser = share)]
    target: Vec<f64>,
    /// What a right answer is worth; may be repeated
    #[arg(long, value_name = "V", value_parser = positive)]
    value: Vec<f64>,
    /// A file for the result as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Say nothing but warnings, errors and the result
    #[arg(long)]
    pub quiet: bool,
}

impl Route {
    /// Runs it.
    pub fn run(&self, console: &Console) -> Result<u8, Failure> {
        let routed = || -> Result<_> {
            self.out.as_deref().map_or(Ok(()), absent)?;
            let map = self.calibrate.as_deref().map(CalibrationMap::read).transpose()?;
            if let Some(map) = &map {
                ensure!(
                    map.of == self.confidence,
                    "--calibrate: the map is of another kind of confidence; see --confidence"
                );
            }
            let small = read_rows(&self.small)?;
            let large = self.large.as_deref().map(read_rows).transpose()?;
            let large = match (&large, self.large_accuracy) {
                (Some(rows), _) => Large::Rows(rows),
                (None, accuracy) => Large::Accuracy(accuracy.context("neither LARGE nor --large-accuracy is given")?),
            };
            let budgets = self.budget.iter().map(|&most| Rule::Budget(most));
            let targets = self.target.iter().map(|&least| Rule::Target(least));
            let values = self.value.iter().flat_map(|&value| [Rule::Value(value), Rule::CalibratedValue(value)]);
            let rules: Vec<Rule> = budgets.chain(targets).chain(values).collect();
            let costs = Costs { small: self.small_cost, large: self.large_cost };
            routed(&small, large, &Asked { of: self.confidence, map: map.as_ref(), costs, rules: &rules })
        };
        let routed = routed().map_err(Failure::Input)?;
        routed.iter().for_each(|environment| console.print(&environment.to_string()));
        write_result(self.out.as_deref(), &routed).map_err(Failure::Run)?;
        Ok(0)
    }
}

fn number(text: &str, what: &str, fits: impl Fn(f64) -> bool) -> Result<f64, String> {
    text.parse().ok().filter(|number| fits(*number)).ok_or_else(|| format!("not {what}"))
}

fn share(text: &str) -> Result<f64, String> {
    number(text, "a number from 0 to 1", |number| (0.0..=1.0).contains(&number))
}

fn amount(text: &str) -> Result<f64, String> {
    number(text, "a number from 0 to 1e9", |number| (0.0..=1e9).contains(&number))
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, "a number above 0, at most 1e9", |number| number > 0.0 && number <= 1e9)
}
