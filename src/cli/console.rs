//! What a person sees: lines, and progress bars where standard error is a terminal.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::event::Event;

/// Lines and bars.
pub struct Console {
    bars: MultiProgress,
    /// Bars of what is under way, by name: the run first, its parts below.
    running: Mutex<Vec<(String, ProgressBar)>>,
    quiet: bool,
}

impl Console {
    /// Without bars where nobody would see them; without lines where they are not wanted.
    pub fn new(quiet: bool) -> Self {
        let bars = MultiProgress::new();
        if quiet || !std::io::stderr().is_terminal() {
            bars.set_draw_target(ProgressDrawTarget::hidden());
        }
        Self { bars, running: Mutex::default(), quiet }
    }

    /// Shows what happened.
    pub fn show(&self, event: Event) {
        match event {
            Event::Line(line) if !self.quiet => self.line(line),
            Event::Line(_) => {}
            Event::Warning(warning) => self.line(&format!("warning: {warning}")),
            Event::Progress { what, done, total } => self.progress(what, done, total),
        }
    }

    fn progress(&self, what: &str, done: usize, total: usize) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let place = running.iter().position(|(name, _)| name == what).unwrap_or_else(|| {
            let bar = self.bars.add(ProgressBar::new(total as u64).with_style(style(done as u64)));
            bar.set_message(what.to_string());
            bar.set_position(done as u64);
            bar.enable_steady_tick(Duration::from_secs(1));
            running.push((what.to_string(), bar));
            running.len() - 1
        });
        running[place].1.set_position(done as u64);
        if done == total {
            running.remove(place).1.finish_and_clear();
        }
    }

    /// A line on standard error, wanted or not. When nobody reads it any more there is nobody to tell.
    pub fn line(&self, line: &str) {
        self.bars.suspend(|| drop(writeln!(std::io::stderr(), "{line}")));
    }

    /// A result on standard output.
    pub fn print(&self, text: &str) {
        self.end();
        drop(writeln!(std::io::stdout(), "{}", text.trim_end()));
    }

    /// A part of a result that is still being made, at once and whole.
    ///
    /// # Errors
    /// If it cannot be written: nobody reads on, or the disk is full.
    pub fn write(&self, text: &str) -> Result<()> {
        let mut output = std::io::stdout().lock();
        let written = self.bars.suspend(|| output.write_all(text.as_bytes()).and_then(|()| output.flush()));
        written.context("standard output: cannot write")
    }

    /// An error, and the exit code that goes with it.
    pub fn fail(&self, error: &anyhow::Error, code: u8) -> ExitCode {
        self.end();
        let causes: Vec<String> = error.chain().map(without_backtrace).collect();
        let message = format!("error: {}", causes.join(": "));
        tracing::error!("{message}");
        self.line(&message);
        ExitCode::from(code)
    }

    fn end(&self) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.drain(..).for_each(|(_, bar)| bar.finish_and_clear());
    }
}

/// `rollouts       ██████████░░░░░░░░░░░░░░░   41/64       5.3/s   4s left`: at most 80 columns.
/// Times are means since the bar began at `start`.
fn style(start: u64) -> ProgressStyle {
    let seconds_each = move |state: &ProgressState| {
        let done = state.pos().saturating_sub(start);
        (done > 0).then(|| state.elapsed().as_secs_f64() / done as f64)
    };
    let each = move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        let text = match seconds_each(state) {
            None => String::new(),
            Some(seconds) if seconds > 1.0 => format!("{seconds:.1} s each"),
            Some(seconds) => format!("{:.1}/s", 1.0 / seconds),
        };
        // A bar's text has room for everything.
        out.write_str(&format!("{text:>12}")).ok();
    };
    let left = move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        let remaining = state.len().unwrap_or(0).saturating_sub(state.pos()) as f64;
        let text = match seconds_each(state).map(|seconds| (seconds * remaining).ceil() as u64) {
            None => String::new(),
            Some(seconds @ ..120) => format!("{seconds} s left"),
            Some(seconds) => format!("{} min left", seconds.div_ceil(60)),
        };
        out.write_str(&format!("{text:>12}")).ok();
    };
    let template = "{msg:14} {bar:24} {pos:>5}/{len:<5}{each}{left}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("█▌░").with_key("each", each).with_key("left", left)
}

/// candle prints a backtrace in the middle of its message when RUST_BACKTRACE is set; the message is what helps.
fn without_backtrace(error: &(dyn std::error::Error + 'static)) -> String {
    match error.downcast_ref::<candle_core::Error>() {
        Some(candle_core::Error::WithBacktrace { inner, .. }) => without_backtrace(&**inner),
        _ => error.to_string(),
    }
}
