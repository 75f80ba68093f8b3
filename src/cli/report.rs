//! `candor report`: its arguments.

use std::path::PathBuf;

use clap::Args;

use super::Failure;
use super::console::Console;
use crate::event::{Event, Observer};
use crate::report;

const REPORT: &str = "\
Open index.html in a browser: it needs no network. Beside it lie the figures as
PNG and SVG, calibration_metrics.csv (a row per rollout), metrics.csv (a row per
step) and cot_samples.txt.";

/// `candor report`.
#[derive(Args)]
#[command(after_help = REPORT)]
pub struct Report {
    /// A run's folder, finished or not, or a generations.jsonl, also .gz or .zst; several are compared
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Where to write it; without it, RUN/report
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Training steps per reliability diagram
    #[arg(long, value_name = "STEPS", default_value_t = 5)]
    group_size: u64,
    /// How often a larger model is right that unsure answers are handed to; 1 shows what routing could gain at most
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    large_accuracy: f64,
    /// Say nothing but warnings, errors and the result
    #[arg(long)]
    pub quiet: bool,
}

impl Report {
    /// Runs it.
    pub fn run(&self, observer: Observer, console: &Console) -> Result<u8, Failure> {
        let Self { runs, output, group_size, large_accuracy, .. } = self;
        let (output, group_size, large_accuracy) = (output.as_deref(), *group_size, *large_accuracy);
        let settings = report::Settings { runs, output, group_size, large_accuracy };
        let report = report::Report::read(&settings).map_err(Failure::Input)?;
        report.notes().for_each(|note| observer(Event::Line(note)));
        let page = report.write().map_err(Failure::Run)?;
        console.print(&page.display().to_string());
        Ok(0)
    }
}
