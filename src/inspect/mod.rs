//! `candor inspect`: which of a run's rollouts, in which order, and all that is known of one.
//!
//! * [`text`]: a rollout for a pipe
//! * [`app`]: what is on the screen and what keys do
//! * [`screen`]: how it is drawn

pub mod app;
pub mod screen;
pub mod text;

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, ensure};
use candor_environments::ParseStatus;
use candor_environments::rows::in_line;
use clap::ValueEnum;
use rayon::prelude::*;
use serde::Deserialize;

use crate::generations::{Generations, Recorded, each_batch};
use crate::random::SplitMix64;
use crate::run::{LOGPROBS, Row, RowSplit, TokenRow};

/// Which rollouts are shown: those that agree with everything that is set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Filter {
    /// Trained on or held out.
    pub split: Option<RowSplit>,
    /// The step; of an evaluation, the steps before it.
    pub step: Option<u64>,
    /// The environment's name.
    pub environment: Option<String>,
    /// How the completion was read.
    pub parse: Option<ParseStatus>,
    /// Whether the answer is right.
    pub correct: Option<bool>,
    /// What the task's id, the prompt or the completion contains, in any case.
    pub text: Option<String>,
}

impl Filter {
    /// Whether a rollout agrees with all but the text.
    fn takes(&self, rollout: &Recorded) -> bool {
        self.split.is_none_or(|split| split == rollout.split)
            && self.step.is_none_or(|step| step == rollout.step)
            && self.environment.as_ref().is_none_or(|environment| *environment == rollout.environment)
            && self.parse.is_none_or(|parse| Some(parse) == rollout.parse)
            && self.correct.is_none_or(|correct| Some(correct) == rollout.correct)
    }
}

/// What rollouts are ordered by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SortKey {
    /// The order of the file.
    #[default]
    Step,
    /// The highest reward first.
    Reward,
    /// The largest advantage first.
    Advantage,
    /// The longest first.
    Tokens,
    /// The highest confidence first.
    Confidence,
}

impl SortKey {
    /// The number that is compared; `None` stands last.
    fn of(self, rollout: &Recorded) -> Option<f64> {
        match self {
            Self::Step => None,
            Self::Reward => rollout.reward,
            Self::Advantage => rollout.advantage,
            Self::Tokens => Some(rollout.tokens as f64),
            Self::Confidence => rollout.confidence,
        }
    }
}

/// Recorded rollouts to look into.
pub struct Inspected {
    /// The rollouts.
    pub generations: Generations,
    /// Where the tokens of each are, if the run kept them.
    tokens: Option<Tokens>,
}

/// The rows of `logprobs.jsonl`, read when they are asked for.
struct Tokens {
    path: PathBuf,
    file: File,
    /// Where each row begins, and its length.
    places: HashMap<Place, (u64, usize)>,
}

/// Which rollout a row of tokens is of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
struct Place {
    split: RowSplit,
    step: u64,
    group: usize,
    rollout: usize,
}

impl Tokens {
    fn read(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).with_context(|| format!("{}: cannot open", path.display()))?;
        let mut places = HashMap::new();
        each_batch(&path, |_, lines| {
            places.extend(lines.into_iter().map(|line| (line.row, (line.offset, line.length))));
            Ok(())
        })?;
        Ok(Self { path, file, places })
    }

    fn row(&self, row: &Row) -> Result<Option<TokenRow>> {
        let Row { split, step, group, rollout, .. } = *row;
        let Some(&(offset, length)) = self.places.get(&Place { split, step, group, rollout }) else { return Ok(None) };
        let mut line = vec![0; length];
        let read = self.file.read_exact_at(&mut line, offset).map_err(Error::from);
        let tokens = read.and_then(|()| serde_json::from_slice(&line).map_err(|error| in_line(&error)));
        tokens.map(Some).with_context(|| format!("{}: byte {offset}", self.path.display()))
    }
}

impl Inspected {
    /// Reads a run's folder, or a file of rollouts.
    ///
    /// # Errors
    /// If a file cannot be read, or holds no rollout.
    pub fn read(path: &Path) -> Result<Self> {
        let generations = Generations::read(path)?;
        ensure!(!generations.rollouts.is_empty(), "{}: there is no rollout in it yet", path.display());
        let kept = Some(path.join(LOGPROBS)).filter(|kept| kept.is_file());
        Ok(Self { generations, tokens: kept.map(Tokens::read).transpose()? })
    }

    /// The rollouts that a filter takes, by index and in order.
    ///
    /// # Errors
    /// If the file has changed since it was read.
    pub fn select(&self, filter: &Filter, key: SortKey, reverse: bool) -> Result<Vec<usize>> {
        let rollouts = &self.generations.rollouts;
        let taken = (0..rollouts.len()).filter(|&index| filter.takes(&rollouts[index]));
        let mut taken: Vec<usize> = taken.collect();
        if let Some(wanted) = &filter.text {
            let wanted = wanted.to_lowercase();
            let holds = |&index: &usize| Ok((index, holds(&self.generations.row(index)?, &wanted)));
            let found: Vec<(usize, bool)> = taken.par_iter().map(holds).collect::<Result<_>>()?;
            taken = found.into_iter().filter(|(_, holds)| *holds).map(|(index, _)| index).collect();
        }
        match key {
            SortKey::Step if reverse => taken.reverse(),
            SortKey::Step => {}
            _ => taken.sort_by(|&one, &other| {
                let [one, other] = [one, other].map(|index| key.of(&rollouts[index]));
                let order = other.unwrap_or(0.0).total_cmp(&one.unwrap_or(0.0));
                // What has no number stands last, either way.
                one.is_none().cmp(&other.is_none()).then(if reverse { order.reverse() } else { order })
            }),
        }
        Ok(taken)
    }

    /// The rollouts of the same group, in order.
    pub fn group(&self, index: usize) -> Vec<usize> {
        let rollouts = &self.generations.rollouts;
        let place = |index: usize| (rollouts[index].split, rollouts[index].step, rollouts[index].group);
        let mut group: Vec<usize> = (0..rollouts.len()).filter(|&other| place(other) == place(index)).collect();
        group.sort_by_key(|&index| rollouts[index].rollout);
        group
    }

    /// The log-probabilities of a completion's tokens, if the run kept them.
    ///
    /// # Errors
    /// If the row of tokens cannot be read.
    pub fn tokens(&self, row: &Row) -> Result<Option<TokenRow>> {
        self.tokens.as_ref().map_or(Ok(None), |tokens| tokens.row(row))
    }

    /// The names of the environments.
    pub fn environments(&self) -> Vec<String> {
        let names: BTreeSet<&String> = self.generations.rollouts.iter().map(|rollout| &rollout.environment).collect();
        names.into_iter().cloned().collect()
    }
}

/// Whether a row contains a text, which is in lower case.
fn holds(row: &Row, wanted: &str) -> bool {
    let prompt = row.prompt.iter().map(|message| &message.content);
    [&row.task, &row.completion].into_iter().chain(prompt).any(|text| text.to_lowercase().contains(wanted))
}

/// `count` of the first `length` indices, increasing, drawn without replacement: the same for the same seed.
pub fn sample(length: usize, count: usize, seed: u64) -> Vec<usize> {
    let (mut random, mut from) = (SplitMix64::new(seed), (0..length).collect::<Vec<_>>());
    let count = count.min(length);
    for place in 0..count {
        from.swap(place, place + random.below(length - place));
    }
    from.truncate(count);
    from.sort_unstable();
    from
}
