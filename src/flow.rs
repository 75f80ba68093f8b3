//! The sampler and the learner side by side: what they hand each other, and how a run ends.
//!
//! One thread samples the batches in order and passes each on, its last scores outstanding; the calling thread learns from them
//! and publishes a version of the adapter after each step. Batch t is sampled from version t − level or newer: at level 0 the two
//! take turns. Ownership is the shutdown protocol: a side that returns drops its ends, and the other one finds that out at
//! its next forward call or wait. Every wait has a name, which is told when nothing is heard for too long.

use std::collections::VecDeque;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{Builder, scope};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, TrySendError, bounded};

use crate::event::{Event, Observer};
use crate::policy::Adapter;
use crate::rollout::Unscored;
use crate::run::RowSplit;
use crate::sampler::{Interrupted, PolicyFeed};
use crate::scorers::TICK;
use crate::timeline::{Side, Timeline};

/// What the sampler hands to the learner: the completions of a step, or of an evaluation after so many.
pub struct Batch {
    /// The step, from 0.
    pub step: u64,
    /// Which of the two it is.
    pub split: RowSplit,
    /// The completions.
    pub unscored: Unscored,
}

/// What both sides know.
pub struct Flow<'a> {
    /// How many optimizer steps the sampler may be ahead.
    pub level: u64,
    /// After how long without any news it is told who waits for whom.
    pub silence: Duration,
    /// Who is told.
    pub observer: Observer<'a>,
    /// Set when the step at hand is to be the last.
    pub interrupted: &'a AtomicBool,
    /// What the sides are doing.
    pub timeline: &'a Timeline,
}

impl Flow<'_> {
    /// Runs `sample` on a thread of its own and `learn` on this one, until both are through.
    ///
    /// # Errors
    /// What `learn` fails with. An error of `sample` is the learner's next batch.
    pub fn run<R>(
        &self,
        first: Adapter,
        sample: impl FnOnce(&SamplerEnd) -> Result<()> + Send,
        learn: impl FnOnce(&mut LearnerEnd) -> Result<R>,
    ) -> Result<R> {
        // An evaluation and the batches that may be sampled ahead: nobody ever waits for room.
        let room = self.level as usize + 2;
        let ((publish, published), (pass_on, passed_on)) = (bounded(room), bounded(room));
        let newest = Mutex::new(Newest { adapter: Arc::new(first), learner_gone: false });
        let sampler = SamplerEnd { flow: self, published, newest, pass_on };
        scope(|scope| {
            let sampling = move || {
                let sampled = sample(&sampler);
                self.timeline.waits(Side::Sampler, "done with all steps".into());
                if let Err(error) = sampled {
                    // A learner that is gone has an error of its own.
                    drop(sampler.pass_on.send(Err(error)));
                }
            };
            let thread = Builder::new().name("sampler".into()).spawn_scoped(scope, sampling);
            let thread = thread.context("cannot start a thread that samples")?;
            let mut learner = LearnerEnd { flow: self, publish, passed_on, ahead: VecDeque::new() };
            let learned = learn(&mut learner);
            drop(learner);
            thread.join().unwrap_or_else(|panic| resume_unwind(panic));
            learned
        })
    }

    /// Looks, during a wait, whether somebody should be told.
    fn look(&self) {
        if let Some(silence) = self.timeline.silence(self.silence) {
            (self.observer)(Event::Warning(&silence));
        }
    }

    /// Whether the step at hand is to be the last.
    pub fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

/// The newest version, as far as the sampler has looked.
struct Newest {
    adapter: Arc<Adapter>,
    learner_gone: bool,
}

/// The sampler's side of a flow.
pub struct SamplerEnd<'a> {
    flow: &'a Flow<'a>,
    published: Receiver<Arc<Adapter>>,
    newest: Mutex<Newest>,
    pass_on: Sender<Result<Batch>>,
}

impl SamplerEnd<'_> {
    fn newest(&self) -> MutexGuard<'_, Newest> {
        let mut newest = self.newest.lock().expect("nothing panics while it holds the newest version");
        loop {
            match self.published.try_recv() {
                Ok(adapter) => newest.adapter = adapter,
                Err(TryRecvError::Empty) => return newest,
                Err(TryRecvError::Disconnected) => {
                    newest.learner_gone = true;
                    return newest;
                }
            }
        }
    }

    /// Waits until a version or a newer one is published.
    ///
    /// # Errors
    /// [`Interrupted`], if the learner is through.
    pub fn wait_for(&self, version: u64) -> Result<()> {
        while self.newest().adapter.version < version {
            self.flow.timeline.waits(Side::Sampler, format!("waiting for version {version} of the adapter"));
            match self.published.recv_timeout(TICK) {
                Ok(adapter) => self.newest().adapter = adapter,
                Err(RecvTimeoutError::Timeout) => self.flow.look(),
                Err(RecvTimeoutError::Disconnected) => bail!(Interrupted),
            }
        }
        Ok(())
    }

    /// Hands a batch to the learner.
    ///
    /// # Errors
    /// [`Interrupted`], if the learner is through.
    pub fn pass_on(&self, batch: Batch) -> Result<()> {
        self.pass_on.send(Ok(batch)).map_err(|_| anyhow!(Interrupted))
    }

    /// The policy for the completions of a step, or of an evaluation after so many.
    pub fn policy(&self, step: u64, split: RowSplit) -> impl PolicyFeed {
        Feed { end: self, step, split }
    }
}

/// What one batch is sampled with.
struct Feed<'a> {
    end: &'a SamplerEnd<'a>,
    step: u64,
    split: RowSplit,
}

impl PolicyFeed for Feed<'_> {
    fn newest(&self) -> Option<Arc<Adapter>> {
        Some(self.end.newest().adapter.clone())
    }

    /// An evaluation is done again on resume, and so is what was sampled ahead. What the learner waits for is the step at hand.
    fn stopped(&self) -> bool {
        let newest = self.end.newest();
        let at_hand = self.split == RowSplit::Train && newest.adapter.version >= self.step;
        newest.learner_gone || (self.end.flow.interrupted() && !at_hand)
    }
}

/// The learner's side of a flow.
pub struct LearnerEnd<'a> {
    flow: &'a Flow<'a>,
    publish: Sender<Arc<Adapter>>,
    passed_on: Receiver<Result<Batch>>,
    /// What came while the learner was at something else.
    ahead: VecDeque<Result<Batch>>,
}

impl LearnerEnd<'_> {
    /// The next batch, once it has been sampled; `None` when that was all.
    ///
    /// # Errors
    /// What the sampler fails with; [`Interrupted`], if it was stopped.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        loop {
            if let Some(batch) = self.ahead.pop_front() {
                return batch.map(Some);
            }
            self.flow.timeline.waits(Side::Learner, "waiting for the next batch".into());
            match self.passed_on.recv_timeout(TICK) {
                Ok(batch) => self.ahead.push_back(batch),
                Err(RecvTimeoutError::Timeout) => self.flow.look(),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
    }

    /// To be asked during work and waits: whether anything has failed meanwhile.
    ///
    /// # Errors
    /// What the sampler, or an environment that scores a later batch, fails with.
    pub fn go_on(&mut self) -> Result<()> {
        self.flow.look();
        self.ahead.extend(self.passed_on.try_iter());
        for batch in &mut self.ahead {
            match batch {
                Ok(batch) => batch.unscored.failure().map_or(Ok(()), Err)?,
                Err(error) if error.is::<Interrupted>() => {}
                Err(error) => return Err(std::mem::replace(error, anyhow!(Interrupted))),
            }
        }
        Ok(())
    }

    /// Publishes the adapter after so many steps.
    ///
    /// # Errors
    /// Never, while the sampler does what it is there for: it takes versions whenever it looks.
    pub fn publish(&self, adapter: Adapter) -> Result<()> {
        // A sampler that is gone has left an error, or is through.
        match self.publish.try_send(Arc::new(adapter)) {
            Err(TrySendError::Full(_)) => bail!("the sampler did not take the last versions of the adapter"),
            Ok(()) | Err(TrySendError::Disconnected(_)) => Ok(()),
        }
    }
}
