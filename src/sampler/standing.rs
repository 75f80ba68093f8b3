//! How one endpoint stands: how many requests it has, and after a failure when it is asked again and how carefully.

use std::time::{Duration, Instant};

use crate::client::Patience;

/// What the thread that decides knows of an endpoint.
pub struct Standing {
    /// Requests that it may have at once.
    pub concurrency: usize,
    /// Requests that it has.
    pub in_flight: usize,
    patience: Patience,
    trouble: Option<Trouble>,
}

/// From a failure until the next success.
struct Trouble {
    since: Instant,
    /// Times that it was found to fail.
    times: u32,
    /// The last that was heard.
    last: String,
    stage: Stage,
}

enum Stage {
    /// It is left alone until then.
    Pause(Instant),
    /// It is being asked whether it is there.
    Check,
    /// It is there: one request finds out if it samples.
    Trial,
}

impl Standing {
    /// One of which nothing bad is known.
    pub fn new(concurrency: usize, patience: Patience) -> Self {
        Self { concurrency, in_flight: 0, patience, trouble: None }
    }

    /// Requests that it may be sent now.
    pub fn room(&self) -> usize {
        let most = match &self.trouble {
            None => self.concurrency,
            Some(Trouble { stage: Stage::Trial, .. }) => 1,
            Some(_) => 0,
        };
        most.saturating_sub(self.in_flight)
    }

    /// Whether it is time to ask whether it is there; then that has begun.
    pub fn begin_check(&mut self) -> bool {
        let Some(Trouble { stage, .. }) = &mut self.trouble else { return false };
        let due = matches!(stage, Stage::Pause(until) if *until <= Instant::now());
        if due {
            *stage = Stage::Check;
        }
        due
    }

    /// It was asked whether it is there.
    pub fn checked(&mut self, answer: Result<(), String>) {
        match (answer, &mut self.trouble) {
            (Ok(()), Some(trouble)) => trouble.stage = Stage::Trial,
            (Ok(()), None) => {}
            (Err(what), _) => self.pause(what, None),
        }
    }

    /// It gave a completion.
    pub fn succeeded(&mut self) {
        self.trouble = None;
    }

    /// It gave none, and perhaps said how long it wants not to be asked. Requests that fail together are one failure.
    pub fn failed(&mut self, what: String, after: Option<Duration>) {
        match &mut self.trouble {
            Some(Trouble { stage: Stage::Pause(_) | Stage::Check, last, .. }) => *last = what,
            _ => self.pause(what, after),
        }
    }

    /// 1, 2, 4, … times the first wait, up to a limit.
    fn pause(&mut self, what: String, after: Option<Duration>) {
        let now = Instant::now();
        let (since, times) = self.trouble.as_ref().map_or((now, 0), |trouble| (trouble.since, trouble.times));
        let backoff = self.patience.backoff.saturating_mul(1 << times.min(16)).min(self.patience.cool_down);
        let wait = after.unwrap_or(backoff).min(self.patience.give_up);
        self.trouble = Some(Trouble { since, times: times + 1, last: what, stage: Stage::Pause(now + wait) });
    }

    /// What was last heard, if nothing good has come for longer than patience lasts and nothing is being tried.
    pub fn given_up(&self) -> Option<&str> {
        let trouble = self.trouble.as_ref()?;
        let trying = matches!(trouble.stage, Stage::Trial) && self.in_flight > 0;
        (!trying && trouble.since.elapsed() > self.patience.give_up).then_some(trouble.last.as_str())
    }
}
