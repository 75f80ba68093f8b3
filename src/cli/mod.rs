//! The command line: arguments in, results on standard output, messages on standard error, exit codes.
//!
//! * [`console`]: lines and progress bars
//! * [`log`]: the log in the run folder
//! * [`eval`]: evaluations, and two of them compared
//! * [`inspect`]: a run's rollouts on a terminal
//! * [`judge`]: files of answers
//! * [`models`]: the commands on a model rather than on a config; [`chat`] is the one that talks, [`bench`] the one that
//!   measures
//! * [`prepare`]: training data of questions
//! * [`report`]: files and a page about runs

mod bench;
mod chat;
mod console;
mod eval;
mod inspect;
mod judge;
mod log;
mod models;
mod prepare;
mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Error, Result, anyhow};
use candor_environments::Load;
use clap::{Args, Parser, Subcommand};

use crate::check::Check;
use crate::config::Config;
use crate::event::Event;
use crate::inputs::Inputs;
use crate::ops::pages::return_what_is_freed;
use crate::plan::Plan;
use crate::rescore::Rescore;
use crate::run::{SUMMARY, write_whole};
use crate::scorers::caught;
use crate::setup::{Options, Run};
use crate::summary::Summary;
use crate::train::{Outcome, train};
use console::Console;
use log::Log;

/// Teach small language models to know what they know.
#[derive(Parser)]
#[command(version, max_term_width = 80)]
#[command(after_help = "\
First run:   candor train configs/quickstart.toml
Exit codes:  0 done, 1 the run failed, 2 the input was wrong, 130 interrupted")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train an adapter; the run lands in results/NAME/
    Train {
        #[command(flatten)]
        input: Input,
        /// Continue a run that was stopped
        #[arg(long, conflicts_with = "dry_run")]
        resume: bool,
        /// Print the resolved config, the derived numbers and a memory plan, and stop
        #[arg(long)]
        dry_run: bool,
    },
    /// Answer the held-out tasks and say how good the answers and their confidences are
    Eval(eval::Eval),
    /// Compare two evaluations of the same tasks
    Compare(eval::Compare),
    /// Say which answers to leave to a larger model
    Route(eval::Route),
    /// Show a prompt and how answers are scored, and say what is odd
    Check {
        #[command(flatten)]
        input: Input,
    },
    /// Look into a run's rollouts
    Inspect(inspect::Inspect),
    /// Score a run's completions again, with another reward, parser or judge
    Rescore {
        /// The run's folder
        run: PathBuf,
        /// Another value for a key, such as environment.0.reward=log
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
        /// Where the rows with their new scores go; rescored-1.jsonl in the run's folder unless given, or -2 and so on
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Say nothing but warnings, errors and the result
        #[arg(long)]
        quiet: bool,
    },
    /// Grade a file of answers, or compare a judge with grades by hand
    Judge(judge::Judge),
    /// Print the log-probability of every token of given completions, as JSON lines
    Logprob(models::Logprob),
    /// Answer prompts or the rows of a file, as JSON lines
    Sample(models::Sample),
    /// Talk with a model, line by line
    Chat(chat::Chat),
    /// Make training data of questions: answers, verdicts, confidences, pairs
    Prepare(prepare::Prepare),
    /// Show what became of a run, or of several: figures, tables, and a page to browse the rollouts
    Report(report::Report),
    /// Merge an adapter into its model and write both as one
    Export(models::Export),
    /// Measure how fast this machine samples and learns, as JSON lines
    Bench(bench::Arguments),
}

impl Command {
    /// Whether lines and progress are unwanted.
    fn quiet(&self) -> bool {
        match self {
            Self::Train { input, .. } | Self::Check { input } => input.quiet,
            Self::Eval(eval::Eval { quiet, .. })
            | Self::Compare(eval::Compare { quiet, .. })
            | Self::Route(eval::Route { quiet, .. }) => *quiet,
            Self::Judge(judge::Judge { quiet, .. }) | Self::Rescore { quiet, .. } => *quiet,
            Self::Inspect(_) => false,
            Self::Prepare(command) => command.quiet(),
            Self::Logprob(models::Logprob { base, .. })
            | Self::Sample(models::Sample { base, .. })
            | Self::Chat(chat::Chat { base, .. })
            | Self::Export(models::Export { base, .. }) => base.quiet,
            Self::Bench(bench::Arguments { quiet, .. }) | Self::Report(report::Report { quiet, .. }) => *quiet,
        }
    }
}

/// What every command on a config takes.
#[derive(Args)]
struct Input {
    /// The config file (TOML)
    config: PathBuf,
    /// Another value for a key: --set steps=40 --set environment.0.reward=log
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Say nothing but warnings, errors and the result
    #[arg(long)]
    quiet: bool,
}

/// Where run folders are made.
const RESULTS: &str = "results";
/// Set by ctrl-C: the running step is finished and saved.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Why a command ended: the input was wrong, or the run failed.
enum Failure {
    Input(Error),
    Run(Error),
}

/// Runs the program with the built-in environments and those given here; a binary of one's own calls this from its `main`.
///
/// Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 130 interrupted after saving.
pub fn run(environments: &[(&str, Load)]) -> ExitCode {
    let Arguments { command } = Arguments::parse();
    let console = Arc::new(Console::new(command.quiet()));
    std::panic::set_hook(Box::new(log::record_panic));
    return_what_is_freed();
    let ended = caught(|| execute(&command, environments, &console));
    match ended.unwrap_or_else(|said| Err(Failure::Run(anyhow!("this program has a bug, please report it: {said}")))) {
        Ok(code) => ExitCode::from(code),
        Err(Failure::Input(error)) => console.fail(&error, 2),
        Err(Failure::Run(error)) => console.fail(&error, 1),
    }
}

/// Runs a command; gives the exit code where nothing failed.
fn execute(command: &Command, environments: &[(&str, Load)], console: &Arc<Console>) -> Result<u8, Failure> {
    let makes_folder = matches!(command, Command::Train { dry_run: false, .. });
    let log = Log::start(makes_folder).map_err(Failure::Input)?;
    let observer = |event: Event| {
        log::record(event);
        console.show(event);
    };
    let options = Options { results: Path::new(RESULTS), resume: false, environments, observer: &observer };
    let load = |input: &Input| Config::load(&input.config, &input.sets).map_err(Failure::Input);
    match command {
        Command::Train { dry_run: true, input, .. } => plan(&load(input)?, &options, console),
        Command::Train { input, resume, .. } => {
            run_training(load(input)?, &Options { resume: *resume, ..options }, input, console, &log)
        }
        Command::Eval(command) => command.run(&options, console),
        Command::Compare(command) => command.run(console),
        Command::Route(command) => command.run(console),
        Command::Check { input } => check(&load(input)?, &options, console),
        Command::Inspect(command) => command.run(&observer, console),
        Command::Rescore { run, sets, output, .. } => {
            let rescore = Rescore::prepare(run, sets, output.as_deref(), environments, &observer);
            let rescored = rescore.map_err(Failure::Input)?.run(&observer).map_err(Failure::Run)?;
            console.print(&rescored.to_string());
            Ok(0)
        }
        Command::Judge(command) => command.run(&observer, console),
        Command::Logprob(command) => command.run(&observer, console),
        Command::Sample(command) => command.run(&observer, console),
        Command::Chat(command) => command.run(&observer, console),
        Command::Prepare(command) => command.run(&observer),
        Command::Report(command) => command.run(&observer, console),
        Command::Export(command) => command.run(&observer),
        Command::Bench(command) => command.run(&observer, console),
    }
}

fn run_training(
    config: Config,
    options: &Options,
    input: &Input,
    console: &Arc<Console>,
    log: &Log,
) -> Result<u8, Failure> {
    let mut run = Run::prepare(config, options).map_err(Failure::Input)?;
    log.write_to(&run.folder.path).map_err(Failure::Run)?;
    match train_and_sum_up(&mut run, options, console).map_err(Failure::Run)? {
        Some(summary) => {
            console.print(&summary.to_string());
            Ok(0)
        }
        None => {
            let again = format!("{} train {}{} --resume", program(), quoted(&input.config.display()), sets(input));
            let line = format!("interrupted and saved; go on with: {again}");
            log::record(Event::Line(&line));
            console.line(&line);
            Ok(130)
        }
    }
}

/// What this program was called by: an environment of one's own comes with a binary of its own.
fn program() -> String {
    let called = std::env::args_os().next().map(PathBuf::from);
    called.and_then(|path| Some(path.file_name()?.display().to_string())).unwrap_or("candor".into())
}

fn sets(input: &Input) -> String {
    input.sets.iter().map(|set| format!(" --set {}", quoted(set))).collect()
}

/// An argument as a shell takes it.
fn quoted(argument: &impl ToString) -> String {
    let text = argument.to_string();
    let plain = |character: char| character.is_alphanumeric() || "_-./=:+@,".contains(character);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// The run, and its summary unless it was interrupted.
fn train_and_sum_up(run: &mut Run, options: &Options, console: &Arc<Console>) -> Result<Option<Summary>> {
    let listening = console.clone();
    let handler = move || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        listening.line("finishing the step, or dropping the evaluation, and saving; ctrl-C again stops at once");
    };
    ctrlc::set_handler(handler).context("cannot listen for ctrl-C")?;
    if train(run, options.observer, &INTERRUPTED)? == Outcome::Interrupted {
        return Ok(None);
    }
    let summary = Summary::of(&run.folder.path, run.learner.place().name())?;
    write_whole(&run.folder.path.join(SUMMARY), &serde_json::to_vec_pretty(&summary)?)?;
    Ok(Some(summary))
}

fn plan(config: &Config, options: &Options, console: &Console) -> Result<u8, Failure> {
    let planned = Inputs::open(config, options.environments, options.observer)
        .and_then(|inputs| Ok((config.to_toml()?, Plan::of(config, &inputs)?)));
    let (resolved, plan) = planned.map_err(Failure::Input)?;
    console.print(&format!("{resolved}\n{plan}"));
    Ok(0)
}

fn check(config: &Config, options: &Options, console: &Console) -> Result<u8, Failure> {
    let checked = Inputs::open(config, options.environments, options.observer)
        .and_then(|inputs| Check::of(config, &inputs))
        .map_err(Failure::Input)?;
    console.print(&checked.to_string());
    Ok(0)
}
