//! `candor route`: which answers of a small model to keep and which to ask a large one for, from an evaluation of each.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::calibration::{answers, by_environment};
use crate::calibration_map::{CalibrationMap, Confidence};
use crate::evaluation::routing::{Choice, Costs, Point, Routed, Routing, Rule, choices, routing};
use crate::record::shown;
use crate::run::Row;

/// Seed of the halves.
const HALVES_SEED: u64 = 0;

/// Whose answers those are that the small model does not keep.
pub enum Large<'a> {
    /// The rows of an evaluation of the same tasks.
    Rows(&'a [Row]),
    /// They were not asked; this share of them is right, whatever the question.
    Accuracy(f64),
}

/// How routing is looked at.
pub struct Asked<'a> {
    /// What the small model is asked by.
    pub of: Confidence,
    /// What its confidences go through first.
    pub map: Option<&'a CalibrationMap>,
    /// What a question costs.
    pub costs: Costs,
    /// How thresholds are chosen.
    pub rules: &'a [Rule],
}

/// Routing in one environment.
#[derive(Clone, Debug, Serialize)]
pub struct RoutedEnvironment {
    /// The environment's name.
    pub environment: String,
    /// What was paid.
    pub costs: Costs,
    /// Of all questions.
    pub routing: Routing,
    /// Thresholds, chosen on one half of the questions and reported on the other.
    pub choices: Vec<Choice>,
}

/// Routes the answers of a small model, environment by environment.
///
/// # Errors
/// If the large model did not answer the same tasks, with counts; if a confidence is not in [0, 1].
pub fn routed(small: &[Row], large: Large, asked: &Asked) -> Result<Vec<RoutedEnvironment>> {
    let others = match large {
        Large::Rows(rows) => by_environment(rows),
        Large::Accuracy(_) => BTreeMap::new(),
    };
    let mut all = Vec::new();
    for (environment, rows) in by_environment(small) {
        let of_environment = || -> Result<RoutedEnvironment> {
            let known = answers(&rows, asked.of)?.context("there is no answer whose correctness is known")?;
            let worth: Vec<f64> = match large {
                Large::Accuracy(accuracy) => vec![accuracy; known.questions().len()],
                Large::Rows(_) => {
                    let rows = others.get(environment).context("the large model has no answers")?;
                    worth(known.questions(), rows)?
                }
            };
            let of = |stated: f64| asked.map.map_or(stated, |map| map.map.apply(stated));
            let each = known.rows().iter().map(|answer| Routed {
                confidence: answer.confidence.map(of),
                small: answer.correct,
                large: worth[answer.question as usize],
            });
            let (each, question): (Vec<Routed>, Vec<u32>) =
                each.zip(known.rows().iter().map(|answer| answer.question)).unzip();
            Ok(RoutedEnvironment {
                environment: environment.to_string(),
                costs: asked.costs,
                routing: routing(&each, asked.costs).context("there is nothing to route")?,
                choices: choices(&each, &question, known.questions().len(), asked.costs, asked.rules, HALVES_SEED),
            })
        };
        all.push(of_environment().with_context(|| environment.to_string())?);
    }
    Ok(all)
}

/// The share of right answers to every question.
fn worth(questions: &[String], rows: &[&Row]) -> Result<Vec<f64>> {
    let known =
        answers(rows, Confidence::Stated)?.context("the large model has no answer whose correctness is known")?;
    let mut sums: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for answer in known.rows() {
        let (right, all) = sums.entry(&known.questions()[answer.question as usize]).or_default();
        (*right, *all) = (*right + f64::from(answer.correct), *all + 1.0);
    }
    let lacking = questions.iter().filter(|question| !sums.contains_key(question.as_str())).count();
    ensure!(
        lacking == 0 && sums.len() == questions.len(),
        "not the same questions: the small model has {}, the large one lacks {lacking} of them and has {} others",
        questions.len(),
        sums.len() + lacking - questions.len()
    );
    Ok(questions.iter().filter_map(|question| sums.get(question.as_str())).map(|(right, all)| right / all).collect())
}

fn words(rule: Rule) -> String {
    match rule {
        Rule::Budget(most) => format!("escalate at most {most}"),
        Rule::Target(least) => format!("accuracy at least {least}"),
        Rule::Value(value) => format!("a right answer is worth {value}"),
        Rule::CalibratedValue(value) => format!("the same, if calibrated: {value}"),
    }
}

impl fmt::Display for RoutedEnvironment {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Routing { questions, small_accuracy: small, large_accuracy: large, area, random_area, oracle_area, .. } =
            self.routing;
        let Routing { normalized_area, mean_gap_recovered, escalation_for_half_the_gap: half, .. } = self.routing;
        let Routing { escalation_for_80_percent_of_the_gap: most, .. } = self.routing;
        writeln!(f, "{}: {questions} answers", self.environment)?;
        writeln!(f, "  accuracy              small model {small:.3}, large model {large:.3}")?;
        writeln!(f, "  area under accuracy   {area:.3}; at random {random_area:.3}, by an oracle {oracle_area:.3}")?;
        writeln!(f, "  normalized area       {}; 0 is useless, 1 perfect", shown(normalized_area, 3))?;
        writeln!(f, "  gap recovered, mean   {}; 0.5 is random", shown(mean_gap_recovered, 3))?;
        writeln!(f, "  escalated for 50% of the gap: {}, for 80%: {}", shown(half, 3), shown(most, 3))?;
        if !self.choices.is_empty() {
            writeln!(f, "  {:<34}{:>10}   chosen on half    on the other half", "", "")?;
            writeln!(
                f,
                "  {:<34}{:>10} {:>8}{:>8} {:>8}{:>8}{:>8}",
                "threshold", "", "escal.", "acc.", "escal.", "acc.", "cost"
            )?;
        }
        for Choice { rule, chosen, held_out } in &self.choices {
            let threshold = match chosen {
                None => "none".to_string(),
                Some(Point { threshold, .. }) => {
                    threshold.map_or("above all".into(), |threshold| format!("{threshold:.4}"))
                }
            };
            let cell = |point: &Option<Point>, of: fn(&Point) -> f64| shown(point.as_ref().map(of), 3);
            let (rate, accuracy): (fn(&Point) -> f64, fn(&Point) -> f64) = (|p| p.escalation_rate, |p| p.accuracy);
            let cells = [
                cell(chosen, rate),
                cell(chosen, accuracy),
                cell(held_out, rate),
                cell(held_out, accuracy),
                cell(held_out, |p| p.cost),
            ];
            let [one, two, three, four, five] = cells;
            writeln!(f, "  {:<34}{threshold:>10} {one:>8}{two:>8} {three:>8}{four:>8}{five:>8}", words(*rule))?;
        }
        Ok(())
    }
}
