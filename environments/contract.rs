//! The contract between the engine and an environment. An environment gives tasks and scores completions; it is told
//! counts of tokens and byte ranges, never token ids. Tasks are known by their index, so an environment keeps its typed
//! rows to itself and the trait stays object-safe.

use std::cell::Cell;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::losses::{Implicit, Preference};
use crate::{Judge, Judgment, keys};

/// Builds an environment from its table in the config. Errors name the option, or the file and row, that is wrong.
pub type Load = fn(&Context) -> anyhow::Result<Box<dyn Environment>>;

/// Which tasks are asked for: an environment is loaded once for each split that a run uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Tasks to train on.
    Train,
    /// Tasks to evaluate on; none of them is a training task.
    Heldout,
}

/// What an environment is loaded with.
pub struct Context<'a> {
    /// The tasks asked for.
    pub split: Split,
    options: &'a toml::Table,
    /// Whether the options were asked for.
    read: Cell<bool>,
    /// Turns a source string (`pip:…`, `hf:…`, a path) into a local path, fetching it if need be.
    pub resolve: &'a dyn Fn(&str) -> anyhow::Result<PathBuf>,
    /// The judge that the config asked for, if any.
    pub judge: Option<Arc<dyn Judge>>,
}

impl<'a> Context<'a> {
    /// What the engine gives. `options` are the environment's own keys: the config's table without `name` and `weight`.
    pub fn new(
        split: Split,
        options: &'a toml::Table,
        resolve: &'a dyn Fn(&str) -> anyhow::Result<PathBuf>,
        judge: Option<Arc<dyn Judge>>,
    ) -> Context<'a> {
        Context { split, options, read: Cell::new(false), resolve, judge }
    }

    /// The environment's own keys as they were written. Whoever asks for them sees to it that none is misspelled.
    pub fn options(&self) -> &'a toml::Table {
        self.read.set(true);
        self.options
    }

    /// An option of an environment that did not ask for any.
    pub fn unread_option(&self) -> Option<&'a str> {
        self.options.keys().next().filter(|_| !self.read.get()).map(String::as_str)
    }

    /// The options as an environment's own type. Derive `deny_unknown_fields`, so that a misspelled key is an error
    /// too.
    ///
    /// # Errors
    /// A [`KeyError`](crate::KeyError): the engine adds the file and line of its key.
    pub fn typed_options<T: DeserializeOwned>(&self) -> anyhow::Result<T> {
        Ok(keys::typed(self.options().clone())?)
    }
}

/// A source of tasks, and what scores completions of them. `index` is below [`num_tasks`](Environment::num_tasks).
pub trait Environment: Send + Sync {
    /// How many tasks there are: at least one.
    fn num_tasks(&self) -> usize;

    /// The task at `index`; always the same one.
    fn task(&self, index: usize) -> Task;

    /// Scores one completion of the task at `index`. It may be called from several threads at once. The default is for
    /// tasks that carry their completions: nothing is sampled, so being asked for a score is an error.
    fn score(&self, index: usize, _completion: &Completion) -> Result<Score, ScoreError> {
        Err(ScoreError::Environment(format!(
            "task {} was sampled, but its environment scores nothing: it carries its own completions",
            self.task(index).id
        )))
    }

    /// How this environment's pairs are learned from, where its tasks carry a [`Target::Preference`].
    fn preference(&self) -> Preference {
        Preference::default()
    }

    /// How this environment's judged completions are learned from, where its tasks carry a [`Target::Judged`].
    fn implicit(&self) -> Implicit {
        Implicit::default()
    }

    /// A good and a bad completion of the task at `index`, which `candor check` scores to show that the better one
    /// earns more. The default has none to show.
    fn examples(&self, _index: usize) -> Option<Examples> {
        None
    }

    /// Whether the reward is a proper scoring rule of a probability that the completion states. Advantages divided by
    /// their standard deviation then teach overconfidence (SCIENCE 3.6), and a run that does so is warned.
    fn rewards_probabilities(&self) -> bool {
        false
    }

    /// What kind of task this is, as (`topic`, `History`): evaluations are broken down by it. The default says nothing.
    fn labels(&self, _index: usize) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// Whether completions are compared with each other. If so, the engine waits for a whole group and calls
    /// [`score_group`](Environment::score_group); if not, it calls [`score`](Environment::score) as each one ends.
    fn compares(&self) -> bool {
        false
    }

    /// Scores all completions of one task, in order; for environments that compare them. The default scores each alone.
    fn score_group(&self, index: usize, completions: &[Completion]) -> Vec<Result<Score, ScoreError>> {
        completions.iter().map(|completion| self.score(index, completion)).collect()
    }
}

/// A prompt, and what is to be done with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Stable and unique, as `boolq/train/17`: the row's index in its source, whatever else was dropped.
    pub id: String,
    /// The chat so far; the model's chat template turns it into text.
    pub prompt: Vec<Message>,
    /// What is learned from the task.
    pub target: Target,
}

/// One chat message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message from the user.
    pub fn user(content: impl Into<String>) -> Message {
        Message { role: Role::User, content: content.into() }
    }

    /// A message from the model.
    pub fn assistant(content: impl Into<String>) -> Message {
        Message { role: Role::Assistant, content: content.into() }
    }
}

/// Who speaks in a chat message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Standing instructions; some models (Gemma 2) have no such role.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
}

/// What is learned from a task; it decides the loss.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// Sample a group and reward each completion (GRPO).
    Reward,
    /// Imitate a completion (SFT).
    Demonstration {
        /// The text to imitate.
        completion: String,
    },
    /// Prefer one completion over another (DPO).
    Preference {
        /// The better text.
        chosen: String,
        /// The worse text.
        rejected: String,
    },
    /// Imitate a completion and move its probability toward its correctness (implicit calibration).
    Judged {
        /// The text to imitate.
        completion: String,
        /// Whether it is right.
        correct: bool,
    },
}

/// What the model wrote for a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The decoded completion tokens, without the prompt and without end tokens.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// How many tokens were sampled.
    pub num_tokens: usize,
    /// How many could have been.
    pub max_tokens: usize,
}

/// Completions that show what an environment wants.
#[derive(Clone, Debug, PartialEq)]
pub struct Examples {
    /// In the form that was asked for, and right.
    pub good: String,
    /// In the form that was asked for, and wrong: it earns less.
    pub bad: String,
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it, or a stop string did.
    Stop,
    /// It was cut at `max_tokens`.
    Length,
}

/// What a completion is worth.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The number to maximize: the sum of `parts`.
    pub reward: f64,
    /// The reward's named parts: the outcome first, shaping after it.
    pub parts: Vec<(&'static str, f64)>,
    /// Numbers that are logged and averaged; one that is not known is absent, never a default.
    pub metrics: Vec<(&'static str, f64)>,
    /// Whether the completion stated what was asked for.
    pub parse: ParseStatus,
    /// What was odd about it.
    pub flags: Vec<&'static str>,
    /// Byte range of the answer in the completion's text: token confidence is taken there.
    pub answer: Option<Range<usize>>,
    /// Byte range of the text that may receive gradient; `None`: all of it; an empty one: none, so that the rollout only
    /// counts for its group's mean.
    pub train_on: Option<Range<usize>>,
    /// What the judge said, where one was asked.
    pub judge: Option<Judgment>,
}

/// Whether a completion stated a confidence (SCIENCE 2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParseStatus {
    /// It did.
    Ok,
    /// There is none.
    Missing,
    /// There is something in its place that cannot be read as one.
    Malformed,
    /// It is a number that is not a probability.
    OutOfRange,
}

impl ParseStatus {
    /// Every status.
    pub const ALL: [Self; 4] = [Self::Ok, Self::Missing, Self::Malformed, Self::OutOfRange];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Missing => "missing",
            Self::Malformed => "malformed",
            Self::OutOfRange => "out_of_range",
        }
    }
}

/// Why a completion has no score. The rollout leaves its group's mean and every denominator, and is counted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ScoreError {
    /// The judge gave no verdict: often transient, and never a wrong answer.
    #[error("judge: {judgment}")]
    Judge {
        /// Who was asked, how often, and what it ended with.
        judgment: Judgment,
        /// How the completion was read before the judge was asked.
        parse: ParseStatus,
    },
    /// The environment cannot score this: asking again will not help.
    #[error("environment: {0}")]
    Environment(String),
}
