//! What keeps a server from being asked too much: requests in flight, requests and tokens per minute, pauses that the
//! server asks for, and a circuit breaker while it does not answer.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::client::Patience;

/// Requests at once and per minute.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests in flight.
    pub concurrency: usize,
    /// Requests begun per minute; 0: no limit.
    pub requests_per_minute: u64,
    /// Tokens per minute; 0: no limit.
    pub tokens_per_minute: u64,
}

/// The way to one server.
pub struct Gate {
    /// How many may pass.
    pub limits: Limits,
    patience: Patience,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    in_flight: usize,
    /// When the next request may begin, by either rate.
    next: Instant,
    /// Until when the server wants to be left alone, or is.
    pause: Instant,
    /// Failures since the last success, and when they began.
    failures: u32,
    failing_since: Option<Instant>,
    /// Whether a request is finding out if the server answers again.
    probing: bool,
}

/// The right to make one request.
pub struct Pass<'a> {
    gate: &'a Gate,
    is_probe: bool,
}

impl Gate {
    /// A gate through which nothing has gone.
    pub fn new(limits: Limits, patience: Patience) -> Self {
        let now = Instant::now();
        let state = State { in_flight: 0, next: now, pause: now, failures: 0, failing_since: None, probing: false };
        Self { limits, patience, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a request of about so many tokens may be made.
    ///
    /// # Errors
    /// If the server has failed for too long, and this request is not the one that finds out whether it still does.
    pub fn enter(&self, tokens: u64) -> Result<Pass<'_>, String> {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            let broken = state.failures >= self.patience.broken_after;
            let ready = state.next.max(state.pause);
            if state.in_flight < self.limits.concurrency && now >= ready && !(broken && state.probing) {
                state.in_flight += 1;
                state.probing |= broken;
                state.next = state.next.max(now) + self.interval(tokens);
                return Ok(Pass { gate: self, is_probe: broken });
            }
            if let Some(since) = state.failing_since.filter(|since| broken && since.elapsed() > self.patience.give_up) {
                return Err(format!("the server has not answered for {} s", since.elapsed().as_secs()));
            }
            // Whoever leaves wakes the others; the limit on waiting is for what nobody announces.
            let patience = ready.saturating_duration_since(now).clamp(Duration::from_millis(1), Duration::from_secs(1));
            state = self.changed.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The time that a request takes of the rates.
    fn interval(&self, tokens: u64) -> Duration {
        let minutes = |count: u64, rate: u64| if rate == 0 { 0.0 } else { count as f64 / rate as f64 };
        let by_requests = minutes(1, self.limits.requests_per_minute);
        Duration::from_secs_f64(60.0 * by_requests.max(minutes(tokens, self.limits.tokens_per_minute)))
    }
}

impl Pass<'_> {
    /// The server answered.
    pub fn succeeded(self) {
        let mut state = self.gate.state();
        (state.failures, state.failing_since) = (0, None);
    }

    /// The server did not answer, or asked not to be asked for a while.
    pub fn failed(self, after: Option<Duration>) {
        let (now, patience) = (Instant::now(), self.gate.patience);
        let mut state = self.gate.state();
        state.failures += 1;
        state.failing_since.get_or_insert(now);
        if state.failures >= patience.broken_after {
            state.pause = state.pause.max(now + patience.cool_down);
        }
        if let Some(after) = after {
            state.pause = state.pause.max(now + after.min(patience.give_up));
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.in_flight -= 1;
        state.probing &= !self.is_probe;
        drop(state);
        self.gate.changed.notify_one();
    }
}
