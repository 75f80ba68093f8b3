//! Candor's environments: where tasks come from and how completions are scored. Text in, numbers out: nothing here can
//! name a tensor, a token id, the policy, the step or the clock.
//!
//! Modules in reading order:
//!
//! * [`contract`]: the trait [`Environment`] and every type that it exchanges with the engine;
//! * [`judge`]: the trait of what decides whether a free-form answer is right;
//! * [`keys`]: an environment's table in the config as its own type, with errors that name the key;
//! * [`parsing`], [`confidence`]: what a completion states: an answer and a probability, or why there is none;
//! * [`scoring`]: proper scoring rules;
//! * [`length`](mod@length): shaping of the completion's length;
//! * [`losses`]: how tasks that carry their completions are learned from;
//! * [`rows`], with `csv`: data files, row by row; [`conversations`]: rows that carry completions;
//! * [`boolq`]: yes/no questions with a passage, their rows read by `boolq_data`;
//! * [`simpleqa`]: questions with short answers, their rows read by `simpleqa_data`;
//! * [`sft`], [`dpo`], [`implicit`]: tasks that carry their completions;
//! * [`lexical`], with [`quantities`]: the judge that needs neither a network nor a model.
//!
//! A new built-in environment is one file and one line of [`REGISTRY`].

pub mod boolq;
mod boolq_data;
pub mod confidence;
pub mod contract;
pub mod conversations;
mod csv;
pub mod dpo;
pub mod implicit;
pub mod judge;
pub mod keys;
pub mod length;
pub mod lexical;
pub mod losses;
pub mod parsing;
pub mod quantities;
pub mod rows;
pub mod scoring;
pub mod sft;
pub mod simpleqa;
mod simpleqa_data;

use std::ops::Range;

pub use contract::{
    Completion, Context, Environment, Examples, Finish, Load, Message, ParseStatus, Role, Score, ScoreError, Split,
    Target, Task,
};
pub use judge::{Judge, Judgment, Verdict};
pub use keys::KeyError;

/// The built-in environments: the `name` in a config's `[[environment]]`, and what loads it.
pub const REGISTRY: &[(&str, Load)] = &[
    ("boolq", boolq::load),
    ("simpleqa", simpleqa::load),
    ("sft", sft::load),
    ("dpo", dpo::load),
    ("implicit", implicit::load),
];

/// What a completion states, whatever was asked.
pub struct Reading {
    /// How likely it says that its answer is right; `None` where none could be read.
    pub confidence: Option<f64>,
    /// Byte range of the answer.
    pub answer: Option<Range<usize>>,
}

/// How the completions of built-in environments are read where there is no task to score them on: by name.
pub const READERS: &[(&str, fn(&str) -> Reading)] = &[("boolq", boolq::read), ("simpleqa", simpleqa::read)];
