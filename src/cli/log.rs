//! The log: everything that was said and more, filtered by `RUST_LOG`, in `log.txt` of the run folder.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;

use crate::event::Event;

/// What is logged unless `RUST_LOG` says otherwise.
const DEFAULT_FILTER: &str = "info";

/// Where log lines go. The folder of a run is made only when all its input has been found good: until then they wait.
#[derive(Clone)]
pub struct Log(Arc<Mutex<Destination>>);

enum Destination {
    Waiting(Vec<u8>),
    File(File),
    /// Of a command that leaves no folder, and only if `RUST_LOG` asks for it.
    StandardError,
}

impl Log {
    /// Starts to listen to the program's events, for a command that makes a run folder or for one that does not.
    ///
    /// # Errors
    /// If `RUST_LOG` is not a filter.
    pub fn start(makes_folder: bool) -> Result<Self> {
        let asked = std::env::var("RUST_LOG").ok().filter(|text| !text.is_empty());
        let filter = asked.unwrap_or_else(|| if makes_folder { DEFAULT_FILTER } else { "off" }.to_string());
        let filter = EnvFilter::try_new(&filter)
            .with_context(|| format!("RUST_LOG: {filter:?} is not a filter such as \"info\" or \"candor=debug\""))?;
        let destination = if makes_folder { Destination::Waiting(Vec::new()) } else { Destination::StandardError };
        let log = Self(Arc::new(Mutex::new(destination)));
        let writer = log.clone();
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(move || writer.clone()).init();
        Ok(log)
    }

    /// From now on lines go to `log.txt` in a run folder, after those that have waited.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_to(&self, run: &Path) -> Result<()> {
        let path = run.join("log.txt");
        let open = || -> io::Result<File> { OpenOptions::new().create(true).append(true).open(&path) };
        let mut destination = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = open().with_context(|| format!("{}: cannot open", path.display()))?;
        if let Destination::Waiting(lines) = &*destination {
            file.write_all(lines).with_context(|| format!("{}: cannot write", path.display()))?;
        }
        *destination = Destination::File(file);
        Ok(())
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Destination::Waiting(lines) => lines.write(line),
            Destination::File(file) => file.write(line),
            Destination::StandardError => io::stderr().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a person is told is logged too.
pub fn record(event: Event) {
    match event {
        Event::Line(line) => tracing::info!(target: "candor", "{line}"),
        Event::Warning(warning) => tracing::warn!(target: "candor", "{warning}"),
        Event::Progress { .. } => {}
    }
}

/// A panic is somebody's bug. The log gets all of it; the screen one line, and only if nothing catches it: an environment's
/// panic is caught where it is called, and told with the task's name.
pub fn record_panic(panic: &std::panic::PanicHookInfo) {
    let backtrace = std::backtrace::Backtrace::force_capture();
    tracing::error!(target: "candor", "{panic}\n{backtrace}");
}
