//! Rollouts: chosen tasks are sampled and scored, and become the groups of a batch.
//!
//! Each completion is handed to the scorers as it ends; whoever needs the scores waits for them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail, ensure};
use candor_environments::{Score, ScoreError, Target, Task};
use tracing::debug;

use crate::event::{Event, Observer};
use crate::learner::tree::{Branch, Signal, Tree};
use crate::policy::Adapter;
use crate::run::Row;
use crate::sampler::{Generation, Interrupted, PolicyFeed, Request, Sampler, Settings};
use crate::scorers::{Ended, Outstanding, Scorers, Scoring, no_panic};
use crate::selection::{Choice, Source};
use crate::tokenizer::Tokenizer;

/// How long a run waits for a score: longer than two judges with their retries.
pub const SCORE_TIMEOUT: Duration = Duration::from_secs(900);

/// One completion with what became of it.
#[derive(Clone, Debug)]
pub struct Rollout {
    /// What the sampler recorded.
    pub generation: Generation,
    /// Its text, without end token and stop string.
    pub text: String,
    /// Its score, or why there is none.
    pub score: Result<Score, ScoreError>,
    /// What the model's own probabilities say of its answer; `None` where the environment finds none.
    pub token_confidence: Option<f64>,
    /// Its advantage; `None` where there is no score or the group was dropped.
    pub advantage: Option<f64>,
}

impl Rollout {
    /// How many tokens were sampled.
    pub fn tokens(&self) -> usize {
        self.generation.ids.len()
    }

    /// The reward, if there is a score.
    pub fn reward(&self) -> Option<f64> {
        self.score.as_ref().ok().map(|score| score.reward)
    }
}

/// One prompt and its rollouts.
#[derive(Clone, Debug)]
pub struct Group {
    /// Name of the environment.
    pub environment: String,
    /// The task.
    pub task: Task,
    /// What kind of task it is, such as its topic.
    pub labels: Vec<(&'static str, String)>,
    /// Tokens of the rendered prompt.
    pub prompt_ids: Vec<u32>,
    /// The rollouts in order.
    pub rollouts: Vec<Rollout>,
}

impl Group {
    /// The rewards in order.
    pub fn rewards(&self) -> Vec<Option<f64>> {
        self.rollouts.iter().map(Rollout::reward).collect()
    }
}

/// Sampled completions of chosen tasks, some of whose scores are still to come.
pub struct Unscored {
    /// One per task, in order, without its rollouts.
    groups: Vec<Group>,
    outstanding: Outstanding<Generation>,
    completions: usize,
    /// When the first completion was asked for, when the first was handed to the scorers, and when the last ended.
    times: [Instant; 3],
}

/// What became of chosen tasks, and when.
pub struct Collected {
    /// One per task, in order.
    pub groups: Vec<Group>,
    /// When sampling began and ended.
    pub sampled: [Instant; 2],
    /// When the first completion was handed to the scorers, and when the last score was there.
    pub scored: [Instant; 2],
}

/// What rollouts are made with.
pub struct Collector<'a> {
    /// Where the tasks come from.
    pub sources: &'a [Source],
    /// Turns prompts into tokens and tokens into text.
    pub tokenizer: &'a Tokenizer,
    /// Who hears how far it is.
    pub observer: Observer<'a>,
    /// What the completions are called where progress is shown.
    pub what: &'a str,
}

impl Collector<'_> {
    /// Samples `rollouts` completions of every chosen task, and has each scored as it ends.
    ///
    /// # Errors
    /// [`Interrupted`]; or if a prompt cannot be rendered or sampled, or an environment panics.
    pub fn sample(
        &self,
        choices: &[Choice],
        rollouts: usize,
        sampler: &mut dyn Sampler,
        policy: &dyn PolicyFeed,
        settings: &Settings,
    ) -> Result<Unscored> {
        let started = Instant::now();
        let groups = choices.iter().map(|&choice| self.group(choice)).collect::<Result<Vec<_>>>()?;
        let request = |group: &Group| Request {
            name: format!("task {}", group.task.id),
            prompt_ids: group.prompt_ids.clone(),
            rollouts,
        };
        let requests: Vec<Request> = groups.iter().map(request).collect();
        let scoring = choices.iter().map(|&(source, index)| {
            let Source { name, environment, .. } = &self.sources[source];
            Scoring { name: name.clone(), environment: environment.clone(), index }
        });
        let mut scorers = Scorers::start(scoring.collect());
        let policy = WhileScored { policy, failed: scorers.failed() };
        let sampled = self.score_each(&requests, choices, sampler, &policy, settings, &mut scorers);
        let outstanding = scorers.close();
        let first = sampled.map_err(|error| outstanding.failure().unwrap_or(error))?;
        let times = [started, first, Instant::now()];
        Ok(Unscored { groups, outstanding, completions: choices.len() * rollouts, times })
    }

    fn group(&self, (source, index): Choice) -> Result<Group> {
        let Source { name, environment, .. } = &self.sources[source];
        let task = no_panic(name, index, || environment.task(index))?;
        ensure!(
            task.target == Target::Reward,
            "task {} of {name} carries its completion, so there is nothing to sample",
            task.id
        );
        let labels = no_panic(name, index, || environment.labels(index))?;
        let prompt_ids = self.tokenizer.prompt_ids(&task.prompt).with_context(|| format!("task {}", task.id))?;
        Ok(Group { environment: name.clone(), task, labels, prompt_ids, rollouts: Vec::new() })
    }

    /// Runs the sampler and hands every completion to the scorers as it ends. Tells when the first did.
    fn score_each(
        &self,
        requests: &[Request],
        choices: &[Choice],
        sampler: &mut dyn Sampler,
        policy: &dyn PolicyFeed,
        settings: &Settings,
        scorers: &mut Scorers<Generation>,
    ) -> Result<Instant> {
        if requests.is_empty() {
            return Ok(Instant::now());
        }
        let total = requests.iter().map(|request| request.rollouts).sum();
        let (mut done, mut first) = (0, None);
        let mut waiting: Vec<Vec<Ended<Generation>>> = requests.iter().map(|_| Vec::new()).collect();
        sampler.sample(requests, policy, settings, &mut |generation| {
            let group = generation.group;
            debug!(
                request = requests[group].name,
                rollout = generation.rollout,
                tokens = generation.ids.len(),
                finish = ?generation.finish,
                "completion ended"
            );
            if policy.stopped() {
                bail!(Interrupted);
            }
            let one = self.ended(generation, settings);
            (done, first) = (done + 1, first.or(Some(Instant::now())));
            (self.observer)(Event::Progress { what: self.what, done, total });
            if !self.sources[choices[group].0].environment.compares() {
                return scorers.score(vec![one]);
            }
            waiting[group].push(one);
            if waiting[group].len() < requests[group].rollouts {
                return Ok(());
            }
            let mut group = std::mem::take(&mut waiting[group]);
            group.sort_by_key(|ended| ended.of.rollout);
            scorers.score(group)
        })?;
        ensure!(done == total, "the sampler gave {done} completions where {total} were asked for");
        Ok(first.unwrap_or_else(Instant::now))
    }

    fn ended(&self, generation: Generation, settings: &Settings) -> Ended<Generation> {
        let completion = generation.completion(self.tokenizer, settings);
        Ended { group: generation.group, completion, of: generation }
    }
}

impl Unscored {
    /// Waits for the scores that are still to come, at most `patience` for each, and asks every moment whether to `go_on`, with the
    /// number of those that are missing.
    ///
    /// # Errors
    /// If an environment panicked, scores do not come, or `go_on` fails. A score that an environment could not give is not an error
    /// here: it stays with its rollout.
    pub fn scored(
        self,
        tokenizer: &Tokenizer,
        patience: Duration,
        go_on: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Collected> {
        let Self { mut groups, outstanding, completions, times: [started, first, ended] } = self;
        let (mut all, last) = outstanding.wait(completions, patience, go_on)?;
        all.sort_by_key(|(ended, _)| (ended.group, ended.of.rollout));
        for (Ended { group, completion, of: generation }, score) in all {
            let answer = score.as_ref().ok().and_then(|score| score.answer.clone());
            let token_confidence = answer.and_then(|range| generation.answer_confidence(range, tokenizer));
            let text = completion.text;
            groups[group].rollouts.push(Rollout { generation, text, score, token_confidence, advantage: None });
        }
        Ok(Collected { groups, sampled: [started, ended], scored: [first, last.unwrap_or(ended)] })
    }

    /// Why a scorer stopped, if one did.
    pub fn failure(&self) -> Option<Error> {
        self.outstanding.failure()
    }
}

/// A policy whose completions nobody wants any more once one of them could not be handed to an environment.
struct WhileScored<'a> {
    policy: &'a dyn PolicyFeed,
    failed: Arc<AtomicBool>,
}

impl PolicyFeed for WhileScored<'_> {
    fn newest(&self) -> Option<Arc<Adapter>> {
        self.policy.newest()
    }

    fn stopped(&self) -> bool {
        self.failed.load(Ordering::Acquire) || self.policy.stopped()
    }
}

/// The trees of a batch: every rollout that has an advantage and may be trained on. Groups without one are left out.
///
/// # Errors
/// If a score restricts training to a range that no token overlaps.
pub fn trees(groups: &[Group], tokenizer: &Tokenizer) -> Result<Vec<Tree>> {
    let mut trees = Vec::new();
    for group in groups {
        let mut branches = Vec::new();
        for rollout in &group.rollouts {
            let (Some(advantage), Ok(score)) = (rollout.advantage, &rollout.score) else { continue };
            let ids = rollout.generation.ids.clone();
            let mask_t = match &score.train_on {
                Some(range) if range.is_empty() => continue,
                None => vec![true; ids.len()],
                Some(range) => {
                    let (_, ranges) = tokenizer.token_ranges(&ids);
                    ranges.iter().map(|token| token.start < range.end && range.start < token.end).collect()
                }
            };
            ensure!(mask_t.contains(&true), "task {}: the score trains on bytes that no token covers", group.task.id);
            let behavior_t = rollout.generation.behavior_t.iter().map(|&logprob| f64::from(logprob)).collect();
            let signal = Signal::Reward { behavior_t, advantage };
            branches.push(Branch { rollout: rollout.generation.rollout, ids, mask_t, signal });
        }
        if !branches.is_empty() {
            let name = format!("task {}", group.task.id);
            trees.push(Tree { name, prompt_ids: group.prompt_ids.clone(), branches });
        }
    }
    Ok(trees)
}

/// Watches for sustained scoring errors: a few are counted and left out, many mean that something is broken.
#[derive(Default)]
pub struct ScoreErrors {
    /// Whether each of the last rollouts had an error, the newest last.
    recent: VecDeque<bool>,
}

impl ScoreErrors {
    /// Rollouts looked back on, and the share of them that may fail.
    const WINDOW: usize = 500;
    const SHARE: f64 = 0.02;

    /// Counts the errors of a batch.
    ///
    /// # Errors
    /// If more than 2% of the last 500 rollouts could not be scored (of 500 even when there were fewer so far): the reasons of
    /// this batch are in the message, the most frequent first.
    pub fn observe(&mut self, rows: &[Row]) -> Result<()> {
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for row in rows {
            self.recent.push_back(row.error.is_some());
            if self.recent.len() > Self::WINDOW {
                self.recent.pop_front();
            }
            if let Some(error) = &row.error {
                *reasons.entry(error).or_default() += 1;
            }
        }
        let failed = self.recent.iter().filter(|&&failed| failed).count();
        if reasons.is_empty() || failed as f64 <= Self::SHARE * Self::WINDOW as f64 {
            return Ok(());
        }
        let mut reasons: Vec<(&str, usize)> = reasons.into_iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let shown: Vec<String> = reasons.iter().take(3).map(|(reason, count)| format!("{count} × {reason}")).collect();
        let more = reasons.len().saturating_sub(shown.len());
        let more = if more > 0 { format!("; and {more} other reasons") } else { String::new() };
        bail!("{failed} of the last {} rollouts could not be scored: {}{more}", self.recent.len(), shown.join("; "))
    }
}
