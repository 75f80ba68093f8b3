//! `cot_samples.txt`: what the model said in the first step and what in the last, side by side for a reader.

use std::fmt::Write;

use anyhow::Result;

use super::read::RecordedRun;
use crate::printable::printable;
use crate::record::shown;
use crate::run::{Row, RowSplit};

/// Rollouts per step.
const SAMPLES: usize = 10;

/// Ten rollouts of the first step and ten of the last of each run, spread over the step's groups.
pub fn samples(runs: &[RecordedRun]) -> Result<String> {
    let mut text = String::new();
    for run in runs {
        let [first, last] = &run.ends;
        let same = first.first().map(|row| row.step) == last.first().map(|row| row.step);
        for rows in [Some(first), Some(last).filter(|_| !same)].into_iter().flatten() {
            step(&mut text, &run.name, rows)?;
        }
    }
    Ok(text)
}

fn step(text: &mut String, run: &str, rows: &[Row]) -> Result<()> {
    let Some(row) = rows.first() else { return Ok(()) };
    let count = rows.len().min(SAMPLES);
    let when = match row.split {
        RowSplit::Train => format!("step {}", row.step),
        RowSplit::Eval => format!("evaluation after {} steps", row.step),
    };
    writeln!(text, "{}\n{run}, {when}: {count} of {} rollouts\n{0}\n", "=".repeat(80), rows.len())?;
    for index in 0..count {
        let row = &rows[index * rows.len() / count];
        let metric = |name: &str| shown(row.metric(name), 2);
        let (reward, advantage) = (shown(row.reward, 3), shown(row.advantage, 3));
        let Row { task, rollout, tokens, completion, .. } = row;
        writeln!(text, "--- {task}, rollout {rollout}")?;
        writeln!(
            text,
            "reward {reward}  advantage {advantage}  confidence {}  correct {}  tokens {tokens}",
            metric("confidence"),
            metric("correct"),
        )?;
        row.error.iter().try_for_each(|error| writeln!(text, "not scored: {error}"))?;
        row.prompt
            .last()
            .iter()
            .try_for_each(|message| writeln!(text, "\n> {}", message.content.replace('\n', "\n> ")))?;
        writeln!(text, "\n{}\n", printable(completion))?;
    }
    Ok(())
}
