//! What a run's sampler and learner are doing, for how long, and how long they waited; the spans of `spans.jsonl`.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Who works side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The thread that samples.
    Sampler,
    /// The thread that waits for scores, learns and writes.
    Learner,
}

/// What is done for a step or an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Completions for training.
    Sample,
    /// Completions of held-out tasks.
    Evaluate,
    /// From the first completion to the last score.
    Score,
    /// Forward, backward and update.
    Learn,
    /// A checkpoint.
    Save,
}

/// A line of `spans.jsonl`: when a stage was at work for a step, in seconds since the run began, pauses before a resume left out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// What was done.
    pub stage: Stage,
    /// For which step; an evaluation carries the number of steps before it, a checkpoint those that are in it.
    pub step: u64,
    /// From when.
    pub start: f64,
    /// Until when.
    pub end: f64,
}

/// The clock of a run, and what each side is doing.
pub struct Timeline {
    began: Instant,
    /// Seconds of the run before this process.
    before: f64,
    state: Mutex<State>,
}

struct State {
    sides: [Doing; 2],
    /// When anything was last heard of.
    heard: Instant,
}

struct Doing {
    what: String,
    waits: bool,
    since: Instant,
    /// All waits that have ended.
    waited: Duration,
}

impl Timeline {
    /// A run that goes on now, after so many seconds.
    pub fn new(before: f64) -> Self {
        let began = Instant::now();
        let sides =
            [(); 2].map(|()| Doing { what: "starting".into(), waits: false, since: began, waited: Duration::ZERO });
        Self { began, before, state: Mutex::new(State { sides, heard: began }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the state")
    }

    /// Something has been done.
    pub fn heard(&self) {
        self.state().heard = Instant::now();
    }

    /// A side now works, in words such as "sampling step 3".
    pub fn works(&self, side: Side, what: String) {
        self.set(side, what, false);
    }

    /// A side now waits, in words such as "waiting for version 3".
    pub fn waits(&self, side: Side, what: String) {
        self.set(side, what, true);
    }

    fn set(&self, side: Side, what: String, waits: bool) {
        let (mut state, now) = (self.state(), Instant::now());
        let doing = &mut state.sides[side as usize];
        if doing.what == what {
            return;
        }
        if doing.waits {
            doing.waited += now - doing.since;
        }
        *doing = Doing { what, waits, since: now, waited: doing.waited };
        state.heard = now;
    }

    /// How long sampler and learner have waited so far.
    pub fn waited(&self) -> [Duration; 2] {
        let waits = |doing: &Doing| if doing.waits { doing.since.elapsed() } else { Duration::ZERO };
        self.state().sides.each_ref().map(|doing| doing.waited + waits(doing))
    }

    /// Who waits for what, once nothing has been heard of for so long, and again after as long.
    pub fn silence(&self, limit: Duration) -> Option<String> {
        let mut state = self.state();
        if state.heard.elapsed() < limit {
            return None;
        }
        state.heard = Instant::now();
        let said = |(name, doing): (&str, &Doing)| {
            format!("the {name} has been {} for {} s", doing.what, doing.since.elapsed().as_secs())
        };
        let sides: Vec<String> = ["sampler", "learner"].into_iter().zip(&state.sides).map(said).collect();
        Some(format!("nothing has happened for {} s: {}", limit.as_secs(), sides.join(", ")))
    }

    /// The span between two moments of this process.
    pub fn span(&self, stage: Stage, step: u64, [start, end]: [Instant; 2]) -> Span {
        let seconds = |moment: Instant| self.before + moment.saturating_duration_since(self.began).as_secs_f64();
        Span { stage, step, start: seconds(start), end: seconds(end) }
    }
}
