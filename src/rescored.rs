//! What would have been different: rows before and after they were scored again, as counts and as a few examples.

use std::fmt;
use std::path::PathBuf;

use serde_json::Value;

use crate::metrics::MetricsRow;
use crate::printable::one_line;
use crate::record::{put_rollouts, shown};
use crate::run::{Row, RowSplit};

/// Changed rows that are shown.
const EXAMPLES: usize = 5;

/// Characters of a completion that are shown.
const WIDTH: usize = 96;

/// Rows of a run before and after; without their texts.
pub struct Rescored {
    /// Where the rows with their new scores are.
    pub output: PathBuf,
    before: Vec<Row>,
    after: Vec<Row>,
    /// Rows whose score differs.
    pub changed: usize,
    /// Those whose rewards differ most, with how they begin.
    examples: Vec<(Row, Row, String)>,
}

impl Rescored {
    /// No rows yet.
    pub fn new(output: PathBuf) -> Self {
        Self { output, before: Vec::new(), after: Vec::new(), changed: 0, examples: Vec::new() }
    }

    /// Adds rows with what they are now.
    pub fn add(&mut self, before: Vec<Row>, after: Vec<Row>) {
        for (before, after) in before.into_iter().zip(after) {
            let beginning = one_line(&before.completion, WIDTH);
            let [before, after] =
                [before, after].map(|row| Row { prompt: Vec::new(), completion: String::new(), ..row });
            if differs(&before, &after) {
                self.changed += 1;
                self.examples.push((before.clone(), after.clone(), beginning));
                // The largest changes first; of equal ones, the earlier.
                self.examples.sort_by(|one, other| size(other).total_cmp(&size(one)));
                self.examples.truncate(EXAMPLES);
            }
            self.before.push(before);
            self.after.push(after);
        }
    }

    /// Training rows whose advantage would have had the other sign: from up to down, and from down to up.
    pub fn sign_flips(&self) -> (usize, usize) {
        let pairs =
            || self.before.iter().zip(&self.after).filter_map(|(before, after)| before.advantage.zip(after.advantage));
        let count = |f: fn(f64, f64) -> bool| pairs().filter(|(before, after)| f(*before, *after)).count();
        (count(|before, after| before > 0.0 && after < 0.0), count(|before, after| before < 0.0 && after > 0.0))
    }

    /// The rows of a split, and of one step of it if one is given, as their metrics before and after.
    pub fn metrics(&self, split: RowSplit, step: Option<u64>) -> [MetricsRow; 2] {
        [&self.before, &self.after].map(|rows| {
            let mut metrics = MetricsRow::new(split, step.unwrap_or(0));
            let of_split = rows.iter().filter(|row| row.split == split && step.is_none_or(|step| row.step == step));
            put_rollouts(&mut metrics, &of_split.collect::<Vec<_>>());
            metrics
        })
    }

    /// Rows that were scored again.
    pub fn rows(&self) -> usize {
        self.before.len()
    }

    fn steps(&self, split: RowSplit) -> Option<(u64, u64)> {
        let steps = || self.before.iter().filter(|row| row.split == split).map(|row| row.step);
        steps().min().zip(steps().max())
    }
}

/// Whether a score differs: not in how often a judge was asked, but in what it said.
fn differs(before: &Row, after: &Row) -> bool {
    let verdict = |row: &Row| row.judge.as_ref().map(|judge| judge["verdict"].clone());
    let score = |row: &Row| (row.reward, row.parse, row.error.clone(), row.flags.clone(), verdict(row));
    score(before) != score(after) || before.parts != after.parts || before.metrics != after.metrics
}

/// How much a reward changed; infinitely if there was none, or is none now.
fn size((before, after, _): &(Row, Row, String)) -> f64 {
    match (before.reward, after.reward) {
        (Some(before), Some(after)) => (after - before).abs(),
        (None, None) => 0.0,
        _ => f64::INFINITY,
    }
}

/// The lines of a table: a metric, what it is called here, and its decimals.
const LINES: [(&str, &str, usize); 9] = [
    ("reward/mean", "reward, mean", 3),
    ("reward/std", "reward, std", 3),
    ("advantage/abs_mean", "advantage, absolute mean", 3),
    ("frac_reward_zero_std", "groups that teach nothing", 3),
    ("dropped_groups", "groups dropped", 0),
    ("parse_rate", "parse rate", 3),
    ("metrics/correct", "correct", 3),
    ("metrics/confidence", "confidence", 3),
    ("score_errors", "score errors", 0),
];

fn table(f: &mut fmt::Formatter, [before, after]: &[MetricsRow; 2]) -> fmt::Result {
    writeln!(f, "  {:<26}{:>9} {:>9}", "", "before", "after")?;
    let value = |row: &MetricsRow, name: &str| row.get(name).and_then(Value::as_f64);
    for (metric, name, decimals) in LINES {
        let [before, after] = [before, after].map(|row| value(row, metric));
        if before.is_some() || after.is_some() {
            writeln!(f, "  {name:<26}{:>9} {:>9}", shown(before, decimals), shown(after, decimals))?;
        }
    }
    Ok(())
}

impl fmt::Display for Rescored {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if let Some((first, last)) = self.steps(RowSplit::Train) {
            writeln!(f, "training, {} steps", last - first + 1)?;
            table(f, &self.metrics(RowSplit::Train, None))?;
            let (down, up) = self.sign_flips();
            writeln!(f, "  advantages with the other sign: {down} from up to down, {up} from down to up")?;
            for step in [first, last].into_iter().take(if first == last { 1 } else { 2 }) {
                writeln!(f, "step {step}")?;
                table(f, &self.metrics(RowSplit::Train, Some(step)))?;
            }
        }
        if let Some((first, last)) = self.steps(RowSplit::Eval) {
            for step in [first, last].into_iter().take(if first == last { 1 } else { 2 }) {
                writeln!(f, "evaluation after {step} steps")?;
                table(f, &self.metrics(RowSplit::Eval, Some(step)))?;
            }
        }
        writeln!(f, "{} of {} rows changed", self.changed, self.rows())?;
        for (before, after, text) in &self.examples {
            let Row { split, step, task, rollout, .. } = before;
            let split = if *split == RowSplit::Train { "step" } else { "evaluation after" };
            let parse = |row: &Row| row.parse.map_or("-", |parse| parse.name());
            writeln!(
                f,
                "  {split} {step}, {}, rollout {rollout}: reward {} -> {}, {} -> {}\n    {text}",
                one_line(task, WIDTH),
                shown(before.reward, 3),
                shown(after.reward, 3),
                parse(before),
                parse(after)
            )?;
        }
        write!(f, "{}", self.output.display())
    }
}
