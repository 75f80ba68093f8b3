//! The scorers: threads that score completions as they end, beside the sampler. There are as many as there are scores
//! under way: a score may be a judge's, who is waited for.
//!
//! Ownership is the shutdown protocol. When the sender is dropped the scorers finish what is left and stop; when one fails
//! its error takes the place of a score; a scorer that never returns is left behind after a limit, not waited for.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Builder;
use std::time::{Duration, Instant};

use anyhow::{Error, Result, anyhow, bail, ensure};
use candor_environments::{Completion, Environment, Score, ScoreError};
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use crate::client::MOST_IN_FLIGHT;

/// The most threads that score: as many as a judge may be asked at once.
const MOST_THREADS: usize = MOST_IN_FLIGHT;

/// What the completions of one group are scored by.
#[derive(Clone)]
pub struct Scoring {
    /// The environment's name.
    pub name: String,
    /// The environment.
    pub environment: Arc<dyn Environment>,
    /// The task's index in it.
    pub index: usize,
}

impl Scoring {
    /// The scores of completions of one task in order: each alone, or together where they are compared.
    ///
    /// # Errors
    /// If the environment panicked or gave the wrong number of scores. A score that it could not give is not an error here.
    pub fn score(&self, completions: &[Completion]) -> Result<Vec<Result<Score, ScoreError>>> {
        let Self { name, environment, index } = self;
        let scores = no_panic(name, *index, || match environment.compares() {
            true => environment.score_group(*index, completions),
            false => completions.iter().map(|one| environment.score(*index, one)).collect(),
        })?;
        let (found, wanted) = (scores.len(), completions.len());
        ensure!(
            found == wanted,
            "environment {name:?} gave {found} scores for the {wanted} completions of task {index}"
        );
        Ok(scores.into_iter().map(|score| score.and_then(checked)).collect())
    }
}

/// A completion that has ended.
pub struct Ended<T> {
    /// Index of its group.
    pub group: usize,
    /// What the environment is told.
    pub completion: Completion,
    /// Whose it is.
    pub of: T,
}

/// A completion with its score, or why there is none.
pub type Scored<T> = (Ended<T>, Result<Score, ScoreError>);

/// Running scorers.
pub struct Scorers<T> {
    work: Sender<Vec<Ended<T>>>,
    scorer: Scorer<T>,
    /// How many there are.
    threads: usize,
    outstanding: Outstanding<T>,
}

/// Scores that are still to come, of completions that have all been handed over.
pub struct Outstanding<T> {
    scored: Receiver<Result<(Scored<T>, Instant)>>,
    failed: Arc<AtomicBool>,
}

/// What a thread needs.
#[derive(Clone)]
struct Scorer<T> {
    tasks: Arc<[Scoring]>,
    to_score: Receiver<Vec<Ended<T>>>,
    results: Sender<Result<(Scored<T>, Instant)>>,
    failed: Arc<AtomicBool>,
    /// What has been handed over and is not scored yet.
    under_way: Arc<AtomicUsize>,
}

impl<T: Clone + Send + Sync + 'static> Scorers<T> {
    /// Makes ready; `tasks` are by group.
    pub fn start(tasks: Vec<Scoring>) -> Self {
        let (work, to_score) = unbounded::<Vec<Ended<T>>>();
        let (results, scored) = unbounded();
        let failed = Arc::new(AtomicBool::new(false));
        let outstanding = Outstanding { scored, failed: failed.clone() };
        let scorer = Scorer { tasks: tasks.into(), to_score, results, failed, under_way: Arc::default() };
        Self { work, scorer, threads: 0, outstanding }
    }

    /// Has completions of one group scored: one, or all of them in order where they are compared.
    ///
    /// # Errors
    /// If a scorer has stopped; [`Scorers::failure`] says why.
    pub fn score(&mut self, completions: Vec<Ended<T>>) -> Result<()> {
        ensure!(!self.outstanding.failed.load(Ordering::Acquire), "scoring stopped");
        let wanted = self.scorer.under_way.fetch_add(1, Ordering::Relaxed) + 1;
        if wanted > self.threads && self.threads < MOST_THREADS {
            let scorer = self.scorer.clone();
            match Builder::new().name("scorer".into()).spawn(move || scorer.score_all()) {
                Ok(_) => self.threads += 1,
                // The others will come to it.
                Err(_) if self.threads > 0 => {}
                Err(error) => bail!("cannot start a thread that scores: {error}"),
            }
        }
        Ok(self.work.send(completions)?)
    }

    /// Set as soon as a scorer fails.
    pub fn failed(&self) -> Arc<AtomicBool> {
        self.outstanding.failed.clone()
    }

    /// Nothing more is handed over; the scorers stop when they are through.
    pub fn close(self) -> Outstanding<T> {
        self.outstanding
    }
}

/// How often somebody who waits looks whether the wait has become pointless.
pub const TICK: Duration = Duration::from_millis(200);

impl<T> Outstanding<T> {
    /// Why a scorer stopped, if one did.
    pub fn failure(&self) -> Option<Error> {
        self.failed.load(Ordering::Acquire).then(|| self.scored.try_iter().find_map(Result::err)).flatten()
    }

    /// Waits for `count` scores, at most `patience` for each next one, and asks every moment whether to `go_on`, with the number of
    /// those that are missing. Tells when the last came, too.
    ///
    /// # Errors
    /// If an environment panicked or gave the wrong number of scores, no score came in time, or `go_on` fails.
    pub fn wait(
        self,
        count: usize,
        patience: Duration,
        go_on: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<(Vec<Scored<T>>, Option<Instant>)> {
        let (mut all, mut last, mut since) = (Vec::with_capacity(count), None, Instant::now());
        while all.len() < count {
            match self.scored.recv_timeout(patience.min(TICK)) {
                Ok(scored) => {
                    let (one, at) = scored?;
                    all.push(one);
                    (last, since) = (last.max(Some(at)), Instant::now());
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("scoring stopped after {} of {count} completions", all.len())
                }
                Err(RecvTimeoutError::Timeout) if since.elapsed() < patience => go_on(count - all.len())?,
                Err(RecvTimeoutError::Timeout) => {
                    bail!("waited {} s for the score of {} completions", patience.as_secs(), count - all.len())
                }
            }
        }
        Ok((all, last))
    }
}

impl<T> Scorer<T> {
    /// Until there is nothing more to score, or nobody wants to know.
    fn score_all(&self) {
        for all in &self.to_score {
            let Some(first) = all.first() else { continue };
            let completions: Vec<Completion> = all.iter().map(|ended| ended.completion.clone()).collect();
            let scores = self.tasks[first.group].score(&completions);
            self.under_way.fetch_sub(1, Ordering::Relaxed);
            let scored = match scores {
                Ok(scores) => scores,
                Err(error) => {
                    // Where nobody wants to know any more, the run has ended with another error.
                    drop(self.results.send(Err(error)));
                    return self.failed.store(true, Ordering::Release);
                }
            };
            for one in all.into_iter().zip(scored) {
                if self.results.send(Ok((one, Instant::now()))).is_err() {
                    return;
                }
            }
        }
    }
}

/// Calls an environment about one of its tasks. A panic is its author's bug: it ends the run with the task's name.
///
/// # Errors
/// If it panicked.
pub fn no_panic<R>(name: &str, index: usize, f: impl FnOnce() -> R) -> Result<R> {
    caught(f).map_err(|said| anyhow!("environment {name:?} panicked on task {index}: {said}"))
}

/// What a function gives, or what it said when it panicked.
///
/// # Errors
/// If it panicked.
pub fn caught<R>(f: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|payload| {
        let text = payload.downcast_ref::<&str>().map(|text| text.to_string());
        text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or("no reason".into())
    })
}

/// A reward that is not a number would poison its whole group.
fn checked(score: Score) -> Result<Score, ScoreError> {
    let bad = score.metrics.iter().chain(&score.parts).find(|(_, value)| !value.is_finite());
    match bad {
        _ if !score.reward.is_finite() => Err(ScoreError::Environment(format!("the reward is {}", score.reward))),
        Some((name, value)) => Err(ScoreError::Environment(format!("{name} is {value}"))),
        None => Ok(score),
    }
}
