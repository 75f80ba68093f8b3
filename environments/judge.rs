//! Who decides whether a free-form answer is right. Implementations that need a network or a model live in the engine,
//! which hands one over in [`Context::judge`](crate::Context::judge).

use serde::{Deserialize, Serialize};

use crate::ScoreError;

/// Decides whether an answer means the same as a gold answer.
pub trait Judge: Send + Sync {
    /// Grades the `answer` extracted from a completion against the `gold` answers, any of which will do. The stated
    /// confidence is never shown to the judge. Without a verdict the error is [`ScoreError::Judge`]: a judge that
    /// failed has not said "incorrect".
    fn judge(&self, question: &str, gold: &[String], answer: &str) -> Result<Verdict, ScoreError>;
}

/// A judge's grade, in SimpleQA's three classes (SCIENCE 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// States everything asked for, and nothing that contradicts the gold answer.
    Correct,
    /// Contradicts the gold answer, hedged or not.
    Incorrect,
    /// Does not state the gold answer, and does not contradict it.
    NotAttempted,
}
