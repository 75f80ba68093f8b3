//! Implicit calibration: a completion's own likelihood p, the geometric mean of its tokens' probabilities, is moved toward whether it
//! is right. A row of Llama 3.1 8B's answers to SimpleQA (MIT), as `candor prepare judged` writes them:
//!
//! ```json
//! {"question": "What were the day, month, and year of release for Aseprite v1.3?",
//!  "model_answer": "I am unable to verify the release date of Aseprite v1.3.", "is_correct": false}
//! ```
//!
//! The loss of a row is −ln p where the answer is right, plus λ times the calibration term. The likelihood of wrong answers is
//! left out of the first part (`lm_on_correct_only`): otherwise a λ below 1/2 goes on raising it whatever the second part says.
//! There is no variant that pools a batch into one p and compares that with every y: it has no calibrated minimum.

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::conversations::{self, Exchange, Numbered};
use crate::losses::{Implicit, JudgedLoss};
use crate::{Context, Environment, Target, Task};

/// The keys of `implicit` in a config's `[[environment]]`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// A JSONL or parquet file, or a folder with `train.jsonl`: rows with a prompt, a completion, and whether it is right.
    pub source: String,
    /// The form of the calibration term; λ is `lambda`, and y is 1 where the completion is right, else 0.
    #[serde(default)]
    pub loss: JudgedLoss,
    /// The weight of the calibration term.
    #[serde(default = "default_lambda")]
    pub lambda: f64,
    /// Whether the likelihood of wrong completions is left out of the language-modeling term.
    #[serde(default = "default_lm_on_correct_only")]
    pub lm_on_correct_only: bool,
}

fn default_lambda() -> f64 {
    Implicit::default().lambda
}

fn default_lm_on_correct_only() -> bool {
    Implicit::default().lm_on_correct_only
}

/// Loads the rows; they are the same for either split, because given completions are never evaluated on.
pub fn load(context: &Context) -> anyhow::Result<Box<dyn Environment>> {
    let options: Options = context.typed_options().context("environment implicit")?;
    let Options { source, loss, lambda, lm_on_correct_only } = options;
    let implicit = Implicit { loss, lambda, lm_on_correct_only };
    implicit.check()?;
    let rows = conversations::read(context, "implicit", &source, conversations::judged)?;
    Ok(Box::new(Calibration { implicit, rows }))
}

struct Calibration {
    implicit: Implicit,
    rows: Vec<Numbered<(Exchange, bool)>>,
}

impl Environment for Calibration {
    fn num_tasks(&self) -> usize {
        self.rows.len()
    }

    fn task(&self, index: usize) -> Task {
        let Numbered { id, row: (Exchange { prompt, completion }, correct) } = self.rows[index].clone();
        Task { id, prompt, target: Target::Judged { completion, correct } }
    }

    fn implicit(&self) -> Implicit {
        self.implicit
    }
}
