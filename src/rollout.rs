//! Rollouts: chosen tasks are sampled and scored, and become the groups of a batch.
//!
//! The sampler runs on the calling thread; each completion is handed to the scorers as it ends.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candor_environments::{Score, ScoreError, Target, Task};
use tracing::debug;

use crate::event::{Event, Observer};
use crate::learner::tree::{Branch, Signal, Tree};
use crate::run::Row;
use crate::sampler::{Generation, Interrupted, PolicyFeed, Request, Sampler, Settings};
use crate::scorers::{Ended, Scorers, Scoring, no_panic};
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

/// What became of chosen tasks, and how long it took.
#[derive(Debug, Default)]
pub struct Collected {
    /// One per task, in order.
    pub groups: Vec<Group>,
    /// Until the last completion.
    pub sample: Duration,
    /// From there until the last score.
    pub score: Duration,
}

/// What rollouts are made with.
pub struct Collector<'a> {
    /// Where the tasks come from.
    pub sources: &'a [Source],
    /// Turns prompts into tokens and tokens into text.
    pub tokenizer: &'a Tokenizer,
    /// Who hears how far it is.
    pub observer: Observer<'a>,
    /// How long to wait for the next score once everything has been sampled.
    pub patience: Duration,
    /// What the completions are called where progress is shown.
    pub what: &'a str,
}

impl Collector<'_> {
    /// Samples `rollouts` completions of every chosen task and scores them: one group per choice, in order.
    ///
    /// # Errors
    /// [`Interrupted`]; or if a prompt cannot be rendered or sampled, an environment panics, or scores do not come. A score that an environment
    /// could not give is not an error here: it stays with its rollout.
    pub fn collect(
        &self,
        choices: &[Choice],
        rollouts: usize,
        sampler: &mut dyn Sampler,
        policy: &dyn PolicyFeed,
        settings: &Settings,
    ) -> Result<Collected> {
        let started = Instant::now();
        let mut groups = choices.iter().map(|&choice| self.group(choice)).collect::<Result<Vec<_>>>()?;
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
        if let Err(error) = self.sample(&requests, choices, sampler, policy, settings, &mut scorers) {
            return Err(scorers.failure().unwrap_or(error));
        }
        let sample = started.elapsed();
        let mut all = scorers.finish(choices.len() * rollouts, self.patience)?;
        all.sort_by_key(|(ended, _)| (ended.group, ended.of.rollout));
        for (Ended { group, completion, of: generation }, score) in all {
            let group = &mut groups[group];
            let answer = score.as_ref().ok().and_then(|score| score.answer.clone());
            let token_confidence = answer.and_then(|range| generation.answer_confidence(range, self.tokenizer));
            let text = completion.text;
            group.rollouts.push(Rollout { generation, text, score, token_confidence, advantage: None });
        }
        Ok(Collected { groups, sample, score: started.elapsed() - sample })
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

    /// Runs the sampler and hands every completion to the scorers as it ends.
    fn sample(
        &self,
        requests: &[Request],
        choices: &[Choice],
        sampler: &mut dyn Sampler,
        policy: &dyn PolicyFeed,
        settings: &Settings,
        scorers: &mut Scorers<Generation>,
    ) -> Result<()> {
        let total = requests.iter().map(|request| request.rollouts).sum();
        let mut done = 0;
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
            done += 1;
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
        })
    }

    fn ended(&self, generation: Generation, settings: &Settings) -> Ended<Generation> {
        let completion = generation.completion(self.tokenizer, settings);
        Ended { group: generation.group, completion, of: generation }
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
