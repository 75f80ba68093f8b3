//! What a judge's verdicts amount to: SimpleQA's metrics (Wei et al. 2024, arXiv 2411.04368), and how often there was none.

use std::collections::BTreeMap;

use candor_environments::Verdict;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::record::shown;
use crate::run::Row;

/// Counts of verdicts, and of answers that got none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grades {
    /// By verdict, in the order of [`Verdict::ALL`].
    pub counts: [u64; 3],
    /// Answers without a verdict. They are in no denominator but that of the error rate.
    pub errors: u64,
}

impl Grades {
    /// The grades of recorded rollouts: all, and by label such as `topic: History`. `None` where no judge was asked.
    pub fn of(rows: &[&Row]) -> Option<(Self, BTreeMap<String, Self>)> {
        let (mut all, mut by_label) = (Self::default(), BTreeMap::<String, Self>::new());
        for row in rows {
            let is = |verdict: &Verdict| row.metric(verdict.name()) == Some(1.0);
            let verdict = Verdict::ALL.into_iter().find(is).filter(|_| row.metrics.contains_key("not_attempted"));
            // Without a verdict and without a judge it was something else that failed.
            if verdict.is_none() && row.judge.is_none() {
                continue;
            }
            all.add(verdict);
            for (name, label) in &row.labels {
                let label = format!("{name}: {}", label.as_str().unwrap_or_default());
                by_label.entry(label).or_default().add(verdict);
            }
        }
        (all != Self::default()).then_some((all, by_label))
    }

    /// Counts one more answer; `None` is one without a verdict.
    pub fn add(&mut self, verdict: Option<Verdict>) {
        match verdict {
            Some(verdict) => self.counts[verdict as usize] += 1,
            None => self.errors += 1,
        }
    }

    /// Answers with a verdict.
    pub fn graded(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The share of a verdict among them; `None` where there are none.
    pub fn share(&self, verdict: Verdict) -> Option<f64> {
        (self.graded() > 0).then(|| self.counts[verdict as usize] as f64 / self.graded() as f64)
    }

    /// The share of answers that attempted one.
    pub fn attempted(&self) -> Option<f64> {
        let [correct, incorrect, _] = self.counts;
        (self.graded() > 0).then(|| (correct + incorrect) as f64 / self.graded() as f64)
    }

    /// The share of the correct among those attempted; 0 where none were, as SimpleQA has it.
    pub fn accuracy_given_attempted(&self) -> Option<f64> {
        let [correct, incorrect, _] = self.counts;
        self.share(Verdict::Correct)?;
        Some(if correct + incorrect == 0 { 0.0 } else { correct as f64 / (correct + incorrect) as f64 })
    }

    /// SimpleQA's F: the harmonic mean of the share correct and of the accuracy given attempted; 0 where none is correct.
    pub fn f(&self) -> Option<f64> {
        let (correct, accuracy) = (self.share(Verdict::Correct)?, self.accuracy_given_attempted()?);
        Some(if correct + accuracy > 0.0 { 2.0 * correct * accuracy / (correct + accuracy) } else { 0.0 })
    }

    /// The share correct minus `penalty` times the share incorrect: what guessing is worth where an error costs so much.
    pub fn penalized(&self, penalty: f64) -> Option<f64> {
        Some(self.share(Verdict::Correct)? - penalty * self.share(Verdict::Incorrect)?)
    }

    /// The share of all answers that got no verdict.
    pub fn judge_error_rate(&self) -> Option<f64> {
        let all = self.graded() + self.errors;
        (all > 0).then(|| self.errors as f64 / all as f64)
    }

    /// Every number by its name, for files.
    pub fn to_json(&self) -> Map<String, Value> {
        let [correct, incorrect, not_attempted] = Verdict::ALL.map(|verdict| self.share(verdict));
        let numbers = [
            ("graded", json!(self.graded())),
            ("errors", json!(self.errors)),
            ("correct", json!(correct)),
            ("incorrect", json!(incorrect)),
            ("not_attempted", json!(not_attempted)),
            ("accuracy_given_attempted", json!(self.accuracy_given_attempted())),
            ("f", json!(self.f())),
            ("penalized_1", json!(self.penalized(1.0))),
            ("penalized_9", json!(self.penalized(9.0))),
            ("judge_error_rate", json!(self.judge_error_rate())),
        ];
        numbers.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
    }

    /// The lines of a table for people: name, value and note. Of the same grades, always the same lines.
    pub fn lines(&self) -> [(&'static str, Option<f64>, &'static str); 8] {
        [
            ("correct", self.share(Verdict::Correct), "of all graded answers"),
            ("incorrect", self.share(Verdict::Incorrect), ""),
            ("not attempted", self.share(Verdict::NotAttempted), ""),
            ("correct of attempted", self.accuracy_given_attempted(), ""),
            ("F", self.f(), "harmonic mean of correct and correct of attempted"),
            ("penalized, p = 1", self.penalized(1.0), "correct - p * incorrect"),
            ("penalized, p = 9", self.penalized(9.0), ""),
            ("judge error rate", self.judge_error_rate(), "answers without a verdict, in no line above"),
        ]
    }
}

/// A table of grades by label; empty where there are none.
pub fn breakdown(by_label: &BTreeMap<String, Grades>) -> String {
    let row = |(label, grades): (&String, &Grades)| {
        let [correct, incorrect, not_attempted, accuracy, f, ..] = grades.lines().map(|(_, value, _)| shown(value, 3));
        let graded = grades.graded();
        format!("  {label:<36} {graded:>6} {correct:>9} {incorrect:>9} {not_attempted:>9} {accuracy:>9} {f:>9}\n")
    };
    let rows: String = by_label.iter().map(row).collect();
    let head = ["graded", "correct", "incorrect", "not att.", "of att.", "F"];
    let [n, correct, incorrect, not_attempted, accuracy, f] = head;
    match rows.is_empty() {
        true => rows,
        false => {
            format!("  {:<36} {n:>6} {correct:>9} {incorrect:>9} {not_attempted:>9} {accuracy:>9} {f:>9}\n{rows}", "")
        }
    }
}

impl Serialize for Grades {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_json().serialize(serializer)
    }
}
