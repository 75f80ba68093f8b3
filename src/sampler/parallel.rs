//! Several samplers in this process over one copy of the weights, each with threads of its own: group i is sampled by the
//! sampler i modulo their number.
//!
//! Where rows do not depend on their batch, completions are the same bits whatever that number is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Error, Result, anyhow, bail};
use crossbeam::channel::{Sender, unbounded};
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::local::LocalSampler;
use super::{Generation, Interrupted, PolicyFeed, Request, Sampler, Settings};
use crate::model::Model;
use crate::policy::Adapter;
use crate::tokenizer::Tokenizer;

/// Samples side by side.
pub struct ParallelSampler {
    samplers: Vec<(ThreadPool, LocalSampler)>,
}

impl ParallelSampler {
    /// So many samplers over a loaded model, which share the threads of this process.
    ///
    /// # Errors
    /// If the threads cannot be started.
    pub fn new(model: &Arc<Model>, tokenizer: &Arc<Tokenizer>, samplers: usize) -> Result<Self> {
        let threads = (rayon::current_num_threads() / samplers).max(1);
        let sampler = |part| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(move |_| format!("sampler {part}"));
            let pool = pool.build().context("cannot start the threads of a sampler")?;
            Ok((pool, LocalSampler::of_part(model.clone(), tokenizer.clone(), part, samplers)))
        };
        Ok(Self { samplers: (0..samplers).map(sampler).collect::<Result<_>>()? })
    }
}

/// The policy, until a sampler fails: then the others are to stop.
struct Common<'a> {
    policy: &'a dyn PolicyFeed,
    failed: AtomicBool,
}

impl PolicyFeed for Common<'_> {
    fn newest(&self) -> Option<Arc<Adapter>> {
        self.policy.newest()
    }

    fn stopped(&self) -> bool {
        self.failed.load(Ordering::Relaxed) || self.policy.stopped()
    }
}

impl Sampler for ParallelSampler {
    fn sample(
        &mut self,
        requests: &[Request],
        policy: &dyn PolicyFeed,
        settings: &Settings,
        finished: &mut dyn FnMut(Generation) -> Result<()>,
    ) -> Result<()> {
        let common = &Common { policy, failed: AtomicBool::new(false) };
        let fail = |error: Error| {
            common.failed.store(true, Ordering::Relaxed);
            error
        };
        let (sampled, handed_over) = unbounded();
        let results = thread::scope(|scope| {
            let start = |(pool, sampler): &mut (ThreadPool, LocalSampler), sampled: Sender<Generation>| {
                let mut send = |generation| sampled.send(generation).map_err(|_| anyhow!(Interrupted));
                pool.install(|| sampler.sample(requests, common, settings, &mut send)).map_err(fail)
            };
            let spawn = |one| {
                let sampled = sampled.clone();
                scope.spawn(move || start(one, sampled))
            };
            let threads: Vec<_> = self.samplers.iter_mut().map(spawn).collect();
            drop(sampled);
            let handed = handed_over.iter().try_for_each(finished).map_err(fail);
            drop(handed_over);
            let joined =
                threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("a sampler panicked")));
            std::iter::once(handed).chain(joined).collect::<Vec<Result<()>>>()
        });
        let mut errors: Vec<Error> = results.into_iter().filter_map(Result::err).collect();
        // A sampler that was stopped because of another's error is not to blame.
        errors.sort_by_key(|error| error.is::<Interrupted>());
        errors.into_iter().next().map_or(Ok(()), Err)
    }
}
