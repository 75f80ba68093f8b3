//! Direct preference optimization (Rafailov et al. 2023) and its relatives: of two completions of a prompt, one is better. A row as
//! `candor prepare dpo` makes them, of SimpleQA (MIT); only the number differs, and the right direction is down:
//!
//! ```json
//! {"prompt": "Question: What were the day, month, and year of release for Aseprite v1.3?\n\nProvide your answer and confidence (0.0-1.0):",
//!  "chosen": "Answer: I am unable to verify the release date of Aseprite v1.3.\nConfidence: 0.10",
//!  "rejected": "Answer: I am unable to verify the release date of Aseprite v1.3.\nConfidence: 0.80"}
//! ```
//!
//! Δ is the log-ratio of policy and reference summed over the chosen completion, minus the same of the rejected one. Both begin
//! alike, and there the gradient cancels: all that is learned is about the digits. Every pair counts the same: a `weight` in a row is
//! for whoever selects among them.

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::conversations::{self, Comparison, Numbered};
use crate::losses::{Preference, PreferenceLoss};
use crate::{Context, Environment, Target, Task};

/// The keys of `dpo` in a config's `[[environment]]`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// A JSONL or parquet file, or a folder with `train.jsonl`: rows with prompt, chosen and rejected.
    pub source: String,
    /// The loss of a pair; β is `beta`, ε is `smoothing`.
    #[serde(default)]
    pub loss: PreferenceLoss,
    /// How strongly the reference holds; the larger, the less the policy may leave it.
    #[serde(default = "default_beta")]
    pub beta: f64,
    /// The chance that a pair is the wrong way round; for `smoothed` and `robust`.
    #[serde(default)]
    pub smoothing: f64,
}

fn default_beta() -> f64 {
    Preference::default().beta
}

/// Loads the rows; they are the same for either split, because given completions are never evaluated on.
pub fn load(context: &Context) -> anyhow::Result<Box<dyn Environment>> {
    let Options { source, loss, beta, smoothing } = context.typed_options().context("environment dpo")?;
    let preference = Preference { loss, beta, smoothing };
    preference.check()?;
    let rows = conversations::read(context, "dpo", &source, conversations::comparison)?;
    Ok(Box::new(Dpo { preference, rows }))
}

struct Dpo {
    preference: Preference,
    rows: Vec<Numbered<Comparison>>,
}

impl Environment for Dpo {
    fn num_tasks(&self) -> usize {
        self.rows.len()
    }

    fn task(&self, index: usize) -> Task {
        let Numbered { id, row: Comparison { prompt, chosen, rejected } } = self.rows[index].clone();
        Task { id, prompt, target: Target::Preference { chosen, rejected } }
    }

    fn preference(&self) -> Preference {
        self.preference
    }
}
