//! Servers as samplers: one request per completion, to whichever server has room, each adapter loaded where it is needed.
//!
//! One thread decides everything: which group is admitted, who is asked for what, who is left alone for a while. A request is
//! a thread that sends back its job with what became of it. So a completion is asked for again only after its request has
//! failed, and there is always exactly one that may answer.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::thread::Builder;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use tracing::warn;

use super::completions::{Asked, Sampled};
use super::endpoint::Endpoint;
use super::publication::Publication;
use super::standing::Standing;
use super::{Generation, Interrupted, PolicyFeed, Request, Sampler, Settings, check};
use crate::client::{CallError, Patience, Variable};
use crate::config::Config;
use crate::event::{Event, Observer};
use crate::tokenizer::Tokenizer;

/// Samples on servers.
pub struct RemoteSampler {
    endpoints: Vec<Arc<Endpoint>>,
    publication: Publication,
    limits: Limits,
    tokenizer: Arc<Tokenizer>,
    patience: Patience,
}

/// What the model has room for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of prompt and completion.
    pub context: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
}

/// How long the thread that decides waits before it looks whether it is to stop.
const TICK: Duration = Duration::from_millis(100);
/// How long the end of a run waits for servers to forget its adapters.
const FAREWELL: Duration = Duration::from_secs(2);

/// What is the same for all requests of a call.
struct Call {
    requests: Vec<Request>,
    settings: Settings,
    tokenizer: Arc<Tokenizer>,
    vocabulary: usize,
}

/// One completion to be sampled.
struct Job {
    group: usize,
    rollout: usize,
    version: u64,
    /// The adapter's name; the base model has none.
    adapter: Option<Arc<str>>,
    /// Requests that have failed.
    failures: u32,
}

/// What became of a request to an endpoint.
struct Outcome {
    endpoint: usize,
    of: Of,
}

enum Of {
    Completion(Job, Result<Sampled, CallError>),
    Check(Result<(), CallError>),
}

impl RemoteSampler {
    /// A sampler over the endpoints of a config. Waits until each of them is there.
    ///
    /// # Errors
    /// If one has no key, or is not there in time.
    pub fn open(
        config: &Config,
        limits: Limits,
        tokenizer: Arc<Tokenizer>,
        patience: Patience,
        variable: Variable,
        observer: Observer,
    ) -> Result<Self> {
        let open = |(index, table)| {
            Endpoint::new(table, variable)
                .map(Arc::new)
                .map_err(|problem| config.locate(problem.within(&format!("sampling.endpoints.{index}"))))
        };
        let endpoints: Vec<_> = config.sampling.endpoints.iter().enumerate().map(open).collect::<Result<_>>()?;
        endpoints.iter().try_for_each(|endpoint| await_endpoint(endpoint, patience, observer))?;
        let folders: BTreeSet<_> = endpoints.iter().map(|endpoint| endpoint.folder.clone()).collect();
        let publication = Publication::new(&config.name, folders, &config.lora, &config.model.source);
        Ok(Self { endpoints, publication, limits, tokenizer, patience })
    }

    /// One completion of every endpoint by its base model, with the endpoint's address.
    ///
    /// # Errors
    /// If an endpoint gives none that can be believed.
    pub fn probe(&self, request: &Request, settings: &Settings) -> Result<Vec<(String, Sampled)>> {
        let Limits { vocabulary, .. } = self.limits;
        let asked = Asked { request, settings, tokenizer: &self.tokenizer, vocabulary };
        let probe = |endpoint: &Arc<Endpoint>| {
            let sampled = endpoint.complete(&asked, (0, 0), None);
            Ok((endpoint.address.clone(), sampled.with_context(|| format!("the server at {}", endpoint.address))?))
        };
        self.endpoints.iter().map(probe).collect()
    }

    /// Publishes what a group is admitted with, and has everything older than `oldest` forgotten.
    fn publish(&mut self, policy: &dyn PolicyFeed, oldest: Option<u64>) -> Result<(u64, Option<Arc<str>>)> {
        let Some(adapter) = policy.newest() else { return Ok((0, None)) };
        let (version, name) = (adapter.version, self.publication.name(adapter.version));
        self.publication.publish(&adapter)?;
        let oldest = oldest.unwrap_or(version).min(version);
        self.publication.retire(oldest);
        let first = self.publication.name(oldest);
        for endpoint in self.endpoints.iter().filter(|endpoint| endpoint.has_before(&first)) {
            let (endpoint, first) = (endpoint.clone(), first.clone());
            spawn(move || endpoint.unload_before(Some(&first)))?;
        }
        Ok((version, Some(name.into())))
    }
}

impl Sampler for RemoteSampler {
    fn sample(
        &mut self,
        requests: &[Request],
        policy: &dyn PolicyFeed,
        settings: &Settings,
        finished: &mut dyn FnMut(Generation) -> Result<()>,
    ) -> Result<()> {
        check(requests, self.limits.context, settings)?;
        let call = Call {
            requests: requests.to_vec(),
            settings: settings.clone(),
            tokenizer: self.tokenizer.clone(),
            vocabulary: self.limits.vocabulary,
        };
        let mut batch = Batch::new(call, self.endpoints.clone(), self.patience);
        let mut left: usize = requests.iter().map(|request| request.rollouts).sum();
        while left > 0 {
            if policy.stopped() {
                bail!(Interrupted);
            }
            batch.ask()?;
            while batch.wants_group() {
                let (version, adapter) = self.publish(policy, batch.oldest())?;
                batch.admit(version, adapter);
                batch.ask()?;
            }
            if let Some(generation) = batch.next()? {
                left -= 1;
                finished(generation)?;
            }
        }
        Ok(())
    }
}

impl Drop for RemoteSampler {
    /// Has the servers forget this run's adapters, as far as they do so at once.
    fn drop(&mut self) {
        let (done, all) = unbounded::<()>();
        for endpoint in &self.endpoints {
            let (endpoint, done) = (endpoint.clone(), done.clone());
            // A thread that cannot be started has dropped its end.
            drop(spawn(move || {
                endpoint.unload_before(None);
                drop(done);
            }));
        }
        drop(done);
        // Nothing is ever sent: this ends when all have dropped their ends.
        let _ = all.recv_timeout(FAREWELL);
    }
}

/// A call's work, and how the endpoints stand.
struct Batch {
    call: Arc<Call>,
    endpoints: Vec<Arc<Endpoint>>,
    standings: Vec<Standing>,
    patience: Patience,
    /// The first group that is not admitted yet.
    next_group: usize,
    /// Completions that nobody is asked for.
    waiting: VecDeque<Job>,
    /// Of every admitted group: its version, and how many of its completions are missing.
    admitted: Vec<(u64, usize)>,
    outcomes: Sender<Outcome>,
    arrived: Receiver<Outcome>,
    /// When something was last heard of an endpoint.
    heard: Instant,
}

impl Batch {
    fn new(call: Call, endpoints: Vec<Arc<Endpoint>>, patience: Patience) -> Self {
        let (outcomes, arrived) = unbounded();
        let standings = endpoints.iter().map(|endpoint| Standing::new(endpoint.concurrency, patience)).collect();
        Self {
            call: Arc::new(call),
            endpoints,
            standings,
            patience,
            next_group: 0,
            waiting: VecDeque::new(),
            admitted: Vec::new(),
            outcomes,
            arrived,
            heard: Instant::now(),
        }
    }

    /// Whether there is room for a group that is not admitted yet.
    fn wants_group(&self) -> bool {
        self.waiting.is_empty() && self.next_group < self.call.requests.len() && self.most_free().is_some()
    }

    /// The oldest version that is in use.
    fn oldest(&self) -> Option<u64> {
        self.admitted.iter().filter(|(_, missing)| *missing > 0).map(|(version, _)| *version).min()
    }

    fn admit(&mut self, version: u64, adapter: Option<Arc<str>>) {
        let group = self.next_group;
        let rollouts = self.call.requests[group].rollouts;
        self.next_group += 1;
        self.admitted.push((version, rollouts));
        let job = |rollout| Job { group, rollout, version, adapter: adapter.clone(), failures: 0 };
        self.waiting.extend((0..rollouts).map(job));
    }

    /// The endpoint with the largest share of room, the first of equals.
    fn most_free(&self) -> Option<usize> {
        let share = |standing: &Standing| standing.room() as f64 / standing.concurrency as f64;
        let free = self.standings.iter().enumerate().filter(|(_, standing)| standing.room() > 0);
        free.reduce(|best, next| if share(next.1) > share(best.1) { next } else { best }).map(|(index, _)| index)
    }

    /// Asks for what is waiting, and whether endpoints that failed are there again.
    fn ask(&mut self) -> Result<()> {
        for index in 0..self.standings.len() {
            if self.standings[index].begin_check() {
                let endpoint = self.endpoints[index].clone();
                self.spawn(index, move || Of::Check(endpoint.check()))?;
            }
        }
        while let (Some(index), false) = (self.most_free(), self.waiting.is_empty()) {
            let Some(job) = self.waiting.pop_front() else { break };
            self.standings[index].in_flight += 1;
            let (endpoint, call) = (self.endpoints[index].clone(), self.call.clone());
            self.spawn(index, move || {
                let Call { requests, settings, tokenizer, vocabulary } = &*call;
                let request = &requests[job.group];
                let asked = Asked { request, settings, tokenizer, vocabulary: *vocabulary };
                let sampled = endpoint.complete(&asked, (job.group, job.rollout), job.adapter.as_deref());
                Of::Completion(job, sampled)
            })?;
        }
        Ok(())
    }

    fn spawn(&self, endpoint: usize, request: impl FnOnce() -> Of + Send + 'static) -> Result<()> {
        let outcomes = self.outcomes.clone();
        // Nobody may be left to hear of it.
        spawn(move || drop(outcomes.send(Outcome { endpoint, of: request() })))
    }

    /// Waits a little for a completion.
    fn next(&mut self) -> Result<Option<Generation>> {
        let Outcome { endpoint, of } = match self.arrived.recv_timeout(TICK) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => return self.check_patience().map(|()| None),
            Err(RecvTimeoutError::Disconnected) => bail!("the samplers' channel is closed"),
        };
        self.heard = Instant::now();
        match of {
            Of::Check(checked) => {
                if let Err(error) = &checked {
                    warn!("the server at {} is not there: {error}", self.endpoints[endpoint].address);
                }
                self.standings[endpoint].checked(checked.map_err(|error| error.to_string()));
                Ok(None)
            }
            Of::Completion(job, sampled) => {
                self.standings[endpoint].in_flight -= 1;
                self.take(endpoint, job, sampled)
            }
        }
    }

    fn take(
        &mut self,
        endpoint: usize,
        mut job: Job,
        sampled: Result<Sampled, CallError>,
    ) -> Result<Option<Generation>> {
        let address = &self.endpoints[endpoint].address;
        let name = &self.call.requests[job.group].name;
        match sampled {
            Ok(Sampled { ids, logprobs_t, finish }) => {
                self.standings[endpoint].succeeded();
                let Job { group, rollout, version, .. } = job;
                self.admitted[group].1 -= 1;
                let (behavior_t, untempered_t) = (logprobs_t.clone(), logprobs_t);
                Ok(Some(Generation { group, rollout, version, ids, behavior_t, untempered_t, finish }))
            }
            Err(CallError::Passing { what, after }) => {
                job.failures += 1;
                let Job { failures, rollout, .. } = job;
                ensure!(
                    failures < self.patience.tries,
                    "{name}, rollout {rollout}: no completion after {failures} requests, the last to the server at {address}: {what}"
                );
                warn!("{name}, rollout {rollout}: the server at {address}: {what}");
                self.standings[endpoint].failed(what, after);
                self.waiting.push_back(job);
                Ok(None)
            }
            Err(error @ CallError::Lasting { .. }) => {
                Err(error).with_context(|| format!("{name}: the server at {address} refuses the request"))
            }
        }
    }

    /// # Errors
    /// If no endpoint has answered for too long, with the last that was heard of each; or requests that have a limit did not
    /// come back.
    fn check_patience(&self) -> Result<()> {
        let longest = self.endpoints.iter().map(|endpoint| endpoint.timeout).max().unwrap_or_default();
        let silence = self.heard.elapsed();
        // A request loads an adapter, looks whether it is there, and completes.
        ensure!(silence < 4 * longest + self.patience.give_up, "requests to servers do not come back");
        let mut causes = Vec::new();
        for (endpoint, standing) in self.endpoints.iter().zip(&self.standings) {
            match standing.given_up() {
                Some(last) => causes.push(format!("{}: {last}", endpoint.address)),
                None => return Ok(()),
            }
        }
        let waited = self.patience.give_up.as_secs_f64();
        bail!("no server has sampled for {waited} s; {}", causes.join("; "))
    }
}

/// Waits until an endpoint is there, as long as patience lasts: servers take a while to start.
fn await_endpoint(endpoint: &Endpoint, patience: Patience, observer: Observer) -> Result<()> {
    let began = Instant::now();
    loop {
        let Err(error) = endpoint.check() else { return Ok(()) };
        let (address, key) = (&endpoint.address, "sampling.endpoints");
        if matches!(error, CallError::Lasting { .. }) || began.elapsed() > patience.give_up {
            return Err(error).with_context(|| format!("{key}: the server at {address} cannot sample"));
        }
        observer(Event::Line(&format!("waiting for the server at {address}: {error}")));
        std::thread::sleep(patience.cool_down);
    }
}

/// A thread for one request, which nobody waits for when it is no longer wanted.
fn spawn(request: impl FnOnce() + Send + 'static) -> Result<()> {
    Builder::new().name("request".into()).spawn(request).map(drop).context("cannot start a thread for a request")
}
