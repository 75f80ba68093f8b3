//! Who decides whether a free-form answer is right. Implementations that need a network or a model live in the engine,
//! which hands one over in [`Context::judge`](crate::Context::judge); [`lexical`](crate::lexical) needs neither.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Decides whether an answer means the same as a gold answer.
pub trait Judge: Send + Sync {
    /// Grades the `answer` extracted from a completion against the `gold` answers, any of which will do. The judge is
    /// shown neither the stated confidence nor any reasoning. A judge that failed has not said "incorrect": its
    /// judgment has a cause in place of a verdict.
    fn judge(&self, question: &str, gold: &[String], answer: &str) -> Judgment;
}

/// A judge's grade, in SimpleQA's three classes (SCIENCE 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// States everything asked for, and nothing that contradicts the gold answer.
    Correct,
    /// Contradicts the gold answer, hedged or not.
    Incorrect,
    /// Does not state the gold answer, and does not contradict it.
    NotAttempted,
}

impl Verdict {
    /// All grades, in SimpleQA's order A, B, C.
    pub const ALL: [Verdict; 3] = [Verdict::Correct, Verdict::Incorrect, Verdict::NotAttempted];

    /// The grade's name in files.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Correct => "correct",
            Verdict::Incorrect => "incorrect",
            Verdict::NotAttempted => "not_attempted",
        }
    }
}

/// What a judge said, and what it took.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgment {
    /// Who judged, as `openai:some-model`.
    pub id: String,
    /// Version of the prompt, or of the rules, that it judged by.
    pub prompt_version: u32,
    /// The grade, or why there is none.
    pub verdict: Result<Verdict, String>,
    /// Whether somebody had asked the same before.
    pub cached: bool,
    /// Requests that it took; 0 where it was cached or needed none.
    pub attempts: usize,
    /// The probability that the judge gave to "correct" among the three grades, where it tells.
    pub p_correct: Option<f64>,
}

impl fmt::Display for Judgment {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match &self.verdict {
            Ok(verdict) => formatter.write_str(verdict.name()),
            Err(cause) => write!(formatter, "no verdict after {} attempts: {cause}", self.attempts),
        }
    }
}
