//! `candor inspect`: rollouts on a terminal, or for a pipe.

use std::io::{IsTerminal, stdin, stdout};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use candor_environments::ParseStatus;
use clap::builder::PossibleValuesParser;
use clap::{ArgAction, Args, ValueEnum};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event as Input, KeyEventKind};

use super::Failure;
use super::console::Console;
use crate::event::{Event, Observer};
use crate::inspect::app::App;
use crate::inspect::screen::draw;
use crate::inspect::{Filter, Inspected, SortKey, sample, text};
use crate::run::RowSplit;

const INSPECT: &str = "\
On a terminal this is a table to move in; ? shows its keys. It prints instead where
the output is a pipe or --format, --limit or --sample is given:

  candor inspect results/quickstart --step 19 --sort reward --limit 10
  candor inspect results/quickstart --sample 10 --first --last
  candor inspect results/quickstart --parse malformed --format json | jq .completion";

/// `candor inspect`.
#[derive(Args)]
#[command(after_help = INSPECT)]
pub struct Inspect {
    /// A run's folder, or a file of rollouts (.jsonl, .gz, .zst)
    run: PathBuf,
    /// Rollouts of this step; evaluations carry the number of steps before them
    #[arg(long, value_name = "N", conflicts_with_all = ["first", "last"])]
    step: Option<u64>,
    /// Rollouts that were trained on, or held-out ones
    #[arg(long, value_name = "SPLIT", value_parser = PossibleValuesParser::new(["train", "eval"]))]
    split: Option<String>,
    /// Rollouts of this environment
    #[arg(long, value_name = "NAME")]
    environment: Option<String>,
    /// Rollouts that were read like this
    #[arg(long, value_name = "STATUS", value_parser = PossibleValuesParser::new(ParseStatus::ALL.map(ParseStatus::name)))]
    parse: Option<String>,
    /// Rollouts whose answer is right, or wrong
    #[arg(long, value_name = "true|false", action = ArgAction::Set)]
    correct: Option<bool>,
    /// Rollouts whose task, prompt or completion contains this, in any case
    #[arg(long, value_name = "TEXT")]
    search: Option<String>,
    /// What comes first
    #[arg(long, value_enum, default_value = "step")]
    sort: SortKey,
    /// The other way around
    #[arg(long)]
    reverse: bool,
    /// No more than so many
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// So many, drawn at random; with --first or --last, of each of these steps
    #[arg(long, value_name = "N")]
    sample: Option<usize>,
    /// Of the first training step
    #[arg(long)]
    first: bool,
    /// Of the last training step
    #[arg(long)]
    last: bool,
    /// The same seed draws the same
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    /// Text to read, or the file's own lines
    #[arg(long, value_enum)]
    format: Option<Format>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

impl Inspect {
    /// Runs it.
    pub fn run(&self, observer: Observer, console: &Console) -> Result<u8, Failure> {
        let inspected = Inspected::read(&self.run).map_err(Failure::Input)?;
        inspected.generations.torn.iter().for_each(|torn| observer(Event::Warning(torn)));
        let prints = self.format.is_some() || self.limit.is_some() || self.sample.is_some();
        if prints || !stdout().is_terminal() || !stdin().is_terminal() {
            return self.print(&inspected, console).map_err(Failure::Run);
        }
        let name = self.run.canonicalize().unwrap_or(self.run.clone());
        let name = name.file_name().unwrap_or(name.as_os_str()).display().to_string();
        let filters = self.filters(&inspected);
        let app = App::new(inspected, name, filters[0].clone(), self.sort, self.reverse).map_err(Failure::Run)?;
        show(app).map_err(Failure::Run)
    }

    /// What is asked for: one filter, or one each for the first and the last step.
    fn filters(&self, inspected: &Inspected) -> Vec<Filter> {
        let filter = Filter {
            split: self.split.as_ref().map(|split| if split == "train" { RowSplit::Train } else { RowSplit::Eval }),
            step: self.step,
            environment: self.environment.clone(),
            parse: ParseStatus::ALL.into_iter().find(|parse| self.parse.as_deref() == Some(parse.name())),
            correct: self.correct,
            text: self.search.clone(),
        };
        let training = inspected.generations.rollouts.iter().filter(|rollout| rollout.split == RowSplit::Train);
        let steps = || training.clone().map(|rollout| rollout.step);
        let asked = [(self.first, steps().min()), (self.last, steps().max())];
        let of_step = |step: u64| Filter { split: Some(RowSplit::Train), step: Some(step), ..filter.clone() };
        let asked: Vec<Filter> =
            asked.into_iter().filter(|(asked, _)| *asked).filter_map(|(_, step)| Some(of_step(step?))).collect();
        if asked.is_empty() { vec![filter] } else { asked }
    }

    fn print(&self, inspected: &Inspected, console: &Console) -> Result<u8> {
        for filter in self.filters(inspected) {
            let mut chosen = inspected.select(&filter, self.sort, self.reverse)?;
            if let Some(count) = self.sample {
                let drawn = sample(chosen.len(), count, self.seed);
                chosen = drawn.into_iter().map(|place| chosen[place]).collect();
            }
            chosen.truncate(self.limit.unwrap_or(usize::MAX));
            for index in chosen {
                let row = inspected.generations.row(index)?;
                let text = match self.format {
                    Some(Format::Json) => serde_json::to_string(&row)?,
                    _ => text::rollout(&row),
                };
                console.write(&(text + "\n"))?;
            }
        }
        Ok(0)
    }
}

/// A terminal that is given back as it was, whatever happens.
struct Screen(DefaultTerminal);

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// How long a signal may go unnoticed.
const TICK: Duration = Duration::from_millis(250);

fn show(mut app: App) -> Result<u8> {
    let stopped = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, stopped.clone()).context("cannot listen for signals")?;
    }
    let mut screen = Screen(ratatui::try_init().context("cannot use the terminal")?);
    let colors = has_colors(&|name| std::env::var(name).ok());
    while !app.quit {
        screen.0.draw(|frame| draw(&mut app, frame, colors)).context("cannot draw on the terminal")?;
        while !event::poll(TICK).context("cannot read the terminal")? {
            if stopped.load(Ordering::Relaxed) {
                return Ok(130);
            }
        }
        match event::read().context("cannot read the terminal")? {
            Input::Key(key) if key.kind != KeyEventKind::Release => app.key(key),
            _ => {}
        }
    }
    Ok(0)
}

/// Whether a terminal has colors and its user wants them (no-color.org).
fn has_colors(variable: &dyn Fn(&str) -> Option<String>) -> bool {
    let unwanted = variable("NO_COLOR").is_some_and(|value| !value.is_empty());
    let terminal = variable("TERM").unwrap_or_default();
    !unwanted && !terminal.is_empty() && terminal != "dumb" && !terminal.starts_with("vt")
}
