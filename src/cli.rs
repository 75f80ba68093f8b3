//! The command line: arguments, messages on standard error, results on standard output, exit codes.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use candor_environments::Load;
use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use crate::config::Config;
use crate::event::Event;
use crate::run::write_whole;
use crate::setup::{Options, Run};
use crate::summary::Summary;
use crate::train::{Outcome, train};

/// Teach small language models to know what they know.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train an adapter as a config file says; the run lands in results/<name>/
    Train {
        /// The config file
        config: PathBuf,
        /// Continue a run that was stopped
        #[arg(long)]
        resume: bool,
        /// Say nothing but errors and the summary
        #[arg(long)]
        quiet: bool,
    },
}

/// Where run folders are made.
const RESULTS: &str = "results";
/// Set by ctrl-C: the running step is finished and saved.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Runs the program with the built-in environments and those given here; a binary of one's own calls this from its `main`.
///
/// Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 130 interrupted after saving.
pub fn run(environments: &[(&str, Load)]) -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let Command::Train { config, resume, quiet } = Arguments::parse().command;
    let console = Console::new(quiet);
    let observer = |event: Event| console.show(event);
    let options = Options { results: Path::new(RESULTS), resume, environments, observer: &observer };
    let mut run = match Config::load(&config, &[]).and_then(|config| Run::prepare(config, &options)) {
        Ok(run) => run,
        Err(error) => return console.fail(&error, 2),
    };
    match train_and_sum_up(&mut run, &options) {
        Ok(Some(summary)) => {
            console.print(&summary.to_string());
            ExitCode::SUCCESS
        }
        Ok(None) => {
            console.line(&format!("interrupted and saved; go on with: candor train {} --resume", config.display()));
            ExitCode::from(130)
        }
        Err(error) => console.fail(&error, 1),
    }
}

/// The run, and its summary unless it was interrupted.
fn train_and_sum_up(run: &mut Run, options: &Options) -> Result<Option<Summary>> {
    ctrlc::set_handler(|| {
        // A second ctrl-C does not wait for the step.
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })
    .context("cannot listen for ctrl-C")?;
    if train(run, options.observer, &INTERRUPTED)? == Outcome::Interrupted {
        return Ok(None);
    }
    let summary = Summary::of(&run.folder.path)?;
    write_whole(&run.folder.path.join("summary.json"), &serde_json::to_vec_pretty(&summary)?)?;
    Ok(Some(summary))
}

/// Lines, and a progress bar where standard error is a terminal.
struct Console {
    bar: ProgressBar,
    quiet: bool,
}

impl Console {
    fn new(quiet: bool) -> Self {
        let bar = if quiet || !std::io::stderr().is_terminal() { ProgressBar::hidden() } else { ProgressBar::new(0) };
        let style = ProgressStyle::with_template("{msg} {bar:40} {pos}/{len} ({elapsed})");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        // Nothing to show until something is counted.
        bar.finish_and_clear();
        Self { bar, quiet }
    }

    fn show(&self, event: Event) {
        match event {
            Event::Line(line) if !self.quiet => self.line(line),
            Event::Line(_) => {}
            Event::Progress { what, done, total } => {
                if done == 1 {
                    self.bar.reset();
                    self.bar.set_message(what.to_string());
                    self.bar.set_length(total as u64);
                }
                self.bar.set_position(done as u64);
                if done == total {
                    self.bar.finish_and_clear();
                }
            }
        }
    }

    /// A line on standard error. When nobody reads it any more there is nobody to tell.
    fn line(&self, line: &str) {
        self.bar.suspend(|| drop(writeln!(std::io::stderr(), "{line}")));
    }

    /// A result on standard output.
    fn print(&self, text: &str) {
        self.bar.finish_and_clear();
        drop(writeln!(std::io::stdout(), "{text}"));
    }

    fn fail(&self, error: &anyhow::Error, code: u8) -> ExitCode {
        let causes: Vec<String> = error.chain().map(without_backtrace).collect();
        self.line(&format!("error: {}", causes.join(": ")));
        ExitCode::from(code)
    }
}

/// candle prints a backtrace in the middle of its message when RUST_BACKTRACE is set; the message is what helps.
fn without_backtrace(error: &(dyn std::error::Error + 'static)) -> String {
    match error.downcast_ref::<candle_core::Error>() {
        Some(candle_core::Error::WithBacktrace { inner, .. }) => without_backtrace(&**inner),
        _ => error.to_string(),
    }
}
