//! Supervised fine-tuning: completions to be imitated. A row as `candor prepare sft-binary` makes them, of SimpleQA (MIT):
//!
//! ```json
//! {"input": "Question: What were the day, month, and year of release for Aseprite v1.3?\n\nProvide your answer and confidence (0.0-1.0):",
//!  "output": "Answer: I am unable to verify the release date of Aseprite v1.3.\nConfidence: 0.1"}
//! ```
//!
//! Every shape of [`conversations`](crate::conversations) with one completion is read. The loss is about the completion's tokens and
//! the one that ends the turn, never about the prompt.

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

use crate::conversations::{self, Exchange, Numbered};
use crate::{Context, Environment, Target, Task};

/// The keys of `sft` in a config's `[[environment]]`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// A JSONL or parquet file, or a folder with `train.jsonl`: rows with prompt and completion, messages, or input and output.
    pub source: String,
}

/// Loads the rows; they are the same for either split, because given completions are never evaluated on.
pub fn load(context: &Context) -> anyhow::Result<Box<dyn Environment>> {
    let Options { source } = context.typed_options().context("environment sft")?;
    let rows = conversations::read(context, "sft", &source, |row| {
        let judged = row.contains_key("is_correct") || row.contains_key("label");
        ensure!(
            !judged,
            "it was judged; imitating it whether right or wrong teaches neither: use the environment implicit, or candor prepare"
        );
        conversations::exchange(row)
    })?;
    Ok(Box::new(Sft { rows }))
}

struct Sft {
    rows: Vec<Numbered<Exchange>>,
}

impl Environment for Sft {
    fn num_tasks(&self) -> usize {
        self.rows.len()
    }

    fn task(&self, index: usize) -> Task {
        let Numbered { id, row: Exchange { prompt, completion } } = self.rows[index].clone();
        Task { id, prompt, target: Target::Demonstration { completion } }
    }
}
