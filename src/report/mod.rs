//! `candor report`: what became of a run, as files for people and for other programs.
//!
//! Reading order: [`read`] a run once, cut it into [`subject`]s, draw [`figures`], [`reliability`] diagrams and [`selective`] answering as [`chart`]s
//! ([`draw`], [`band`]), and who worked when as a [`timeline`], fill a [`table`] and [`csv`] files, put it all on one [`page`].

pub mod band;
pub mod chart;
pub mod csv;
pub mod draw;
pub mod figures;
pub mod page;
pub mod read;
pub mod reliability;
pub mod samples;
pub mod selective;
pub mod subject;
pub mod table;
pub mod timeline;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;

use self::chart::Figure;
use self::read::RecordedRun;
use self::subject::Subject;
use crate::run::write_whole;

/// What to report, and how.
pub struct Settings<'a> {
    /// Folders of runs, or files of rollouts.
    pub runs: &'a [PathBuf],
    /// Where the report is written; without it, into the run's folder.
    pub output: Option<&'a Path>,
    /// Training steps per reliability diagram.
    pub group_size: u64,
    /// The accuracy, in [0, 1], of the model that unsure answers would be handed to.
    pub large_accuracy: f64,
}

/// Runs that have been read.
pub struct Report {
    runs: Vec<RecordedRun>,
    output: PathBuf,
    group_size: u64,
    large_accuracy: f64,
}

impl Report {
    /// Reads the runs.
    ///
    /// # Errors
    /// If there is no place for the report, or as [`RecordedRun::read`].
    pub fn read(settings: &Settings) -> Result<Self> {
        let output = match (settings.output, settings.runs) {
            (Some(output), _) => output.to_owned(),
            (None, [run]) if run.is_dir() => run.join("report"),
            _ => anyhow::bail!("a report on several runs or on a file needs a place: give it with --output"),
        };
        ensure!(settings.group_size > 0, "a diagram is of at least one step: --group-size 1");
        let large_accuracy = settings.large_accuracy;
        ensure!((0.0..=1.0).contains(&large_accuracy), "the larger model's accuracy {large_accuracy} is not in [0, 1]");
        let mut runs = settings.runs.iter().map(|run| RecordedRun::read(run)).collect::<Result<Vec<_>>>()?;
        let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
        for run in &mut runs {
            // Folders of one name are told apart by where they are.
            if names.iter().filter(|name| **name == run.name).count() > 1 {
                run.name = run.path.display().to_string();
            }
        }
        Ok(Self { runs, output, group_size: settings.group_size, large_accuracy })
    }

    /// What there is to say about the files that were read.
    pub fn notes(&self) -> impl Iterator<Item = &str> {
        self.runs.iter().flat_map(|run| &run.notes).map(String::as_str)
    }

    /// Writes all files; returns the page's path.
    ///
    /// # Errors
    /// If a confidence is not in [0, 1], or the disk fails.
    pub fn write(&self) -> Result<PathBuf> {
        fs::create_dir_all(&self.output).with_context(|| format!("{}: cannot create", self.output.display()))?;
        let subjects = Subject::of(&self.runs);
        let figures = self.figures(&subjects)?;
        // On the page it is one of the charts over the steps already.
        let brier = figures::brier_over_time(&subjects)?;
        let files = figures.iter().chain(Some(&brier).filter(|brier| !brier.charts.is_empty()));
        let place = |name: &str| self.output.join(name);
        files.par_bridge().try_for_each(|figure| {
            write_whole(&place(&format!("{}.png", figure.name)), &draw::png(figure)?)?;
            write_whole(&place(&format!("{}.svg", figure.name)), draw::svg(figure)?.as_bytes())
        })?;
        write_whole(&place("calibration_metrics.csv"), csv::rollouts(&self.runs)?.as_bytes())?;
        write_whole(&place("metrics.csv"), csv::steps(&self.runs, &subjects)?.as_bytes())?;
        write_whole(&place("cot_samples.txt"), samples::samples(&self.runs)?.as_bytes())?;
        let table = table::first_and_last(&subjects)?;
        let (page, unfinished) = (place("index.html"), place("index.html.tmp"));
        let mut file =
            File::create(&unfinished).map(BufWriter::new).with_context(|| unfinished.display().to_string())?;
        page::write(&mut file, &self.runs, table.as_ref(), &figures)
            .and_then(|()| Ok(file.flush()?))
            .and_then(|()| Ok(fs::rename(&unfinished, &page)?))
            .with_context(|| format!("{}: cannot write", page.display()))?;
        Ok(page)
    }

    /// The figures that have something to show.
    fn figures(&self, subjects: &[Subject]) -> Result<Vec<Figure>> {
        let figures = [
            figures::over_steps(subjects)?,
            reliability::reliability_phases(subjects)?,
            figures::confidence_histogram(subjects)?,
            selective::coverage_accuracy(subjects)?,
            selective::routing_curve(subjects, self.large_accuracy)?,
            reliability::calibration_curves(subjects, self.group_size)?,
            figures::learner(&self.runs),
            timeline::timeline(&self.runs),
        ];
        Ok(figures.into_iter().filter(|figure| !figure.charts.is_empty()).collect())
    }
}
