//! Verdicts that somebody has paid for: a file of JSON lines that only grows, shared between runs and processes.
//!
//! A line is appended under a lock on the file. A process that was killed while it wrote leaves a line without an end; the
//! next to write ends it first, and whoever reads passes over it.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use candor_environments::Verdict;
use candor_environments::lexical::normalize;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Question;

/// A cache file.
pub struct Cache {
    /// Where it lies.
    pub path: PathBuf,
    state: Mutex<State>,
}

struct State {
    file: File,
    /// Bytes of the file that have been read: whole lines.
    read: u64,
    verdicts: HashMap<String, Kept>,
    damaged: usize,
}

/// What is kept of a verdict.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kept {
    /// The grade.
    pub verdict: Verdict,
    /// The probability of "correct" among the grades, where it is known.
    pub p_correct: Option<f64>,
}

/// A line of the file: what was asked stands there for people who read it.
#[derive(Serialize, Deserialize)]
struct Line {
    key: String,
    judge: String,
    prompt_version: u32,
    question: String,
    gold: Vec<String>,
    answer: String,
    verdict: Verdict,
    p_correct: Option<f64>,
}

/// How long another process may hold the lock: appending takes microseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// The key of a verdict: SHA-256 of judge, prompt version, question, gold answers and answer, where the answer is compared
/// without case, articles and punctuation if it is words alone. With figures or signs in it, punctuation has a meaning:
/// 1.75 is not 175. The question's text stands for its id, which differs from file to file.
pub fn key(judge: &str, version: u32, Question { text, gold, answer }: &Question) -> String {
    let words = answer.chars().all(|one| one.is_alphabetic() || one.is_whitespace() || ".,;:!?'\"()-".contains(one));
    let form = match normalize(answer) {
        form if words && !form.is_empty() => form,
        _ => answer.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase(),
    };
    let mut hash = Sha256::new();
    let version = version.to_string();
    for part in [judge, &version, text].into_iter().chain(gold.iter().map(String::as_str)).chain([form.as_str()]) {
        // With its length, so that no two lists of parts are the same bytes.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Cache {
    /// Opens or makes a file, and reads what is there.
    ///
    /// # Errors
    /// If it cannot be read and written.
    pub fn open(path: &Path) -> Result<Self> {
        let place = || format!("{}: cannot keep verdicts there", path.display());
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(place)?;
        }
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).with_context(place)?;
        let state = State { file, read: 0, verdicts: HashMap::new(), damaged: 0 };
        let cache = Self { path: path.to_owned(), state: Mutex::new(state) };
        cache.state().catch_up().with_context(place)?;
        Ok(cache)
    }

    /// Lines that nobody could read.
    pub fn damaged(&self) -> usize {
        self.state().damaged
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A verdict, if this or another process has kept one. Where the file has become unreadable there is none.
    pub fn get(&self, key: &str) -> Option<Kept> {
        let mut state = self.state();
        if !state.verdicts.contains_key(key) {
            state.catch_up().ok()?;
        }
        state.verdicts.get(key).copied()
    }

    /// Keeps a verdict.
    ///
    /// # Errors
    /// If the disk fails, or another process does not let go of the file.
    pub fn put(&self, key: &str, judge: &str, version: u32, question: &Question, kept: Kept) -> Result<()> {
        let line = Line {
            key: key.to_string(),
            judge: judge.to_string(),
            prompt_version: version,
            question: question.text.to_string(),
            gold: question.gold.to_vec(),
            answer: question.answer.to_string(),
            verdict: kept.verdict,
            p_correct: kept.p_correct,
        };
        let place = || format!("{}: cannot keep a verdict", self.path.display());
        let mut state = self.state();
        state.verdicts.insert(key.to_string(), kept);
        state.append(&serde_json::to_string(&line)?).with_context(place)
    }
}

impl State {
    /// Reads the whole lines that were appended since. The first verdict of a key stands.
    fn catch_up(&mut self) -> std::io::Result<()> {
        if self.file.metadata()?.len() <= self.read {
            return Ok(());
        }
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(self.read))?;
        self.file.read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
        self.read += whole as u64;
        for line in bytes[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice::<Line>(line) {
                Ok(Line { key, verdict, p_correct, .. }) => {
                    self.verdicts.entry(key).or_insert(Kept { verdict, p_correct });
                }
                Err(_) => self.damaged += 1,
            }
        }
        Ok(())
    }

    fn append(&mut self, line: &str) -> Result<()> {
        let since = Instant::now();
        loop {
            match self.file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if since.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(2)),
                Err(TryLockError::WouldBlock) => {
                    bail!("another process has held its lock for {} s", PATIENCE.as_secs())
                }
                Err(TryLockError::Error(error)) => return Err(error.into()),
            }
        }
        let written = self.append_locked(line);
        self.file.unlock()?;
        Ok(written?)
    }

    fn append_locked(&mut self, line: &str) -> std::io::Result<()> {
        let mut last = [b'\n'];
        if self.file.seek(SeekFrom::End(0))? > 0 {
            self.file.seek(SeekFrom::End(-1))?;
            self.file.read_exact(&mut last)?;
        }
        let torn = if last == [b'\n'] { "" } else { "\n" };
        self.file.write_all(format!("{torn}{line}\n").as_bytes())
    }
}
