//! Routing: a small model answers where its confidence reaches a threshold, a large one answers the rest.
//!
//! The small model is always paid. An answer whose confidence could not be read is always escalated.

use serde::Serialize;

use super::posthoc::folds;

/// One question: what the small model says, and what the large one is worth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routed {
    /// The small model's confidence, in [0, 1]; `None` where none could be read.
    pub confidence: Option<f64>,
    /// Whether its answer is right.
    pub small: bool,
    /// Whether the large model's is: 0 or 1, the mean of several, or a constant where it was not asked. In [0, 1].
    pub large: f64,
}

/// What a question costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Costs {
    /// Asking the small model.
    pub small: f64,
    /// Asking the large one.
    pub large: f64,
}

/// What a threshold gives.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Answers with at least this confidence are kept; `None` where none is.
    pub threshold: Option<f64>,
    /// The share of questions that the large model answers.
    pub escalation_rate: f64,
    /// The share of right answers.
    pub accuracy: f64,
    /// The mean cost of a question.
    pub cost: f64,
    /// P(escalated and the small model was right).
    pub false_escalation_rate: f64,
    /// P(kept and the small model was wrong).
    pub missed_error_rate: f64,
    /// P(escalated | the small model was right).
    pub false_escalation_given_correct: Option<f64>,
    /// P(kept | the small model was wrong).
    pub missed_error_given_incorrect: Option<f64>,
    /// The share of right answers among those kept.
    pub kept_accuracy: Option<f64>,
}

/// What the answers on either side of a threshold amount to.
#[derive(Clone, Copy, Default)]
struct Sides {
    kept: f64,
    kept_right: f64,
    escalated: f64,
    escalated_right: f64,
    /// What the large model makes of those escalated.
    large: f64,
}

impl Sides {
    fn add(&mut self, one: &Routed, kept: bool) {
        let right = f64::from(one.small);
        if kept {
            (self.kept, self.kept_right) = (self.kept + 1.0, self.kept_right + right);
        } else {
            (self.escalated, self.escalated_right) = (self.escalated + 1.0, self.escalated_right + right);
            self.large += one.large;
        }
    }

    fn escalate(&mut self, one: &Routed) {
        (self.kept, self.kept_right) = (self.kept - 1.0, self.kept_right - f64::from(one.small));
        self.add(one, false);
    }

    fn point(&self, threshold: Option<f64>, costs: Costs) -> Point {
        let count = self.kept + self.escalated;
        let (right, missed) = (self.kept_right + self.escalated_right, self.kept - self.kept_right);
        let share = |part: f64, of: f64| (of > 0.0).then(|| part / of);
        let escalation_rate = self.escalated / count;
        Point {
            threshold,
            escalation_rate,
            accuracy: (self.kept_right + self.large) / count,
            cost: costs.small + escalation_rate * costs.large,
            false_escalation_rate: self.escalated_right / count,
            missed_error_rate: missed / count,
            false_escalation_given_correct: share(self.escalated_right, right),
            missed_error_given_incorrect: share(missed, count - right),
            kept_accuracy: share(self.kept_right, self.kept),
        }
    }
}

/// What a threshold gives on some questions: what was chosen elsewhere is reported by this.
pub fn at(questions: &[Routed], threshold: Option<f64>, costs: Costs) -> Point {
    let mut sides = Sides::default();
    let kept = |one: &Routed| threshold.zip(one.confidence).is_some_and(|(least, stated)| stated >= least);
    questions.iter().for_each(|one| sides.add(one, kept(one)));
    sides.point(threshold, costs)
}

/// Every threshold that makes a difference, and 0: each stated confidence, and above all of them. Escalation rises.
pub fn points(questions: &[Routed], costs: Costs) -> Vec<Point> {
    let mut sorted: Vec<(f64, &Routed)> = questions.iter().filter_map(|one| Some((one.confidence?, one))).collect();
    sorted.sort_by(|left, right| left.0.total_cmp(&right.0));
    let mut sides = Sides::default();
    questions.iter().for_each(|one| sides.add(one, one.confidence.is_some()));
    let mut points = vec![sides.point(Some(0.0), costs)];
    for atom in sorted.chunk_by(|left, right| left.0 == right.0) {
        points.push(sides.point(Some(atom[0].0), costs));
        atom.iter().for_each(|(_, one)| sides.escalate(one));
    }
    points.push(sides.point(None, costs));
    points
}

/// (escalation rate, accuracy) without repetitions, from what the small model alone is worth.
pub type Curve = Vec<(f64, f64)>;

/// How good the order is in which questions are escalated.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Routing {
    /// Questions.
    pub questions: usize,
    /// The small model's accuracy alone.
    pub small_accuracy: f64,
    /// The large one's.
    pub large_accuracy: f64,
    /// All operating points, escalation rising.
    pub points: Vec<Point>,
    /// The same as (escalation rate, accuracy).
    pub curve: Curve,
    /// Accuracy if the questions that gain most were escalated first.
    pub oracle_curve: Curve,
    /// The area under the curve.
    pub area: f64,
    /// The area of escalating at random.
    pub random_area: f64,
    /// The area of the oracle.
    pub oracle_area: f64,
    /// (area − random) / (oracle − random): 0 is useless, 1 perfect.
    pub normalized_area: Option<f64>,
    /// The mean share of the gap between the models that is recovered, over all escalation rates; as all below (RouteLLM, Ong et al. 2024),
    /// `None` where the large model is not better.
    pub mean_gap_recovered: Option<f64>,
    /// The least escalation rate that recovers half of it.
    pub escalation_for_half_the_gap: Option<f64>,
    /// The least that recovers 80%.
    pub escalation_for_80_percent_of_the_gap: Option<f64>,
}

/// Everything that is known of routing some questions; `None` without any.
pub fn routing(questions: &[Routed], costs: Costs) -> Option<Routing> {
    let points = points(questions, costs);
    let count = questions.len() as f64;
    let mean = |of: fn(&Routed) -> f64| questions.iter().map(of).sum::<f64>() / count;
    let (small, large) = (mean(|one| f64::from(one.small)), mean(|one| one.large));
    // Where some answers cannot be kept the curve begins later; escalating nothing is still worth what the small model is.
    let mut curve: Curve = vec![(0.0, small)];
    for point in &points {
        if curve[curve.len() - 1].0 < point.escalation_rate {
            curve.push((point.escalation_rate, point.accuracy));
        }
    }
    let mut gains: Vec<f64> = questions.iter().map(|one| one.large - f64::from(one.small)).collect();
    gains.sort_by(|left, right| right.total_cmp(left));
    let mut oracle_curve: Curve = vec![(0.0, small)];
    let mut right = small * count;
    for (escalated, gain) in gains.iter().enumerate() {
        right += gain;
        oracle_curve.push(((escalated + 1) as f64 / count, right / count));
    }
    let (area, random_area, oracle_area) = (area(&curve), 0.5 * (small + large), area(&oracle_curve));
    let gap = (large > small).then_some(large - small);
    let recovered = |share: f64| reaches(&curve, small + share * gap?);
    (!questions.is_empty()).then(|| Routing {
        questions: questions.len(),
        small_accuracy: small,
        large_accuracy: large,
        area,
        random_area,
        oracle_area,
        normalized_area: (oracle_area > random_area).then(|| (area - random_area) / (oracle_area - random_area)),
        mean_gap_recovered: gap.map(|gap| (area - small) / gap),
        escalation_for_half_the_gap: recovered(0.5),
        escalation_for_80_percent_of_the_gap: recovered(0.8),
        points,
        curve: curve.clone(),
        oracle_curve,
    })
}

/// By trapezoids.
fn area(curve: &[(f64, f64)]) -> f64 {
    curve.windows(2).map(|ends| (ends[1].0 - ends[0].0) * 0.5 * (ends[0].1 + ends[1].1)).sum()
}

/// The least escalation rate at which the curve, linear between its points, reaches an accuracy.
fn reaches(curve: &[(f64, f64)], accuracy: f64) -> Option<f64> {
    let index = curve.iter().position(|(_, reached)| *reached >= accuracy - ROUNDING)?;
    let Some(before) = index.checked_sub(1) else { return Some(curve[0].0) };
    let ((from, low), (to, high)) = (curve[before], curve[index]);
    Some(from + (to - from) * ((accuracy - low) / (high - low)).min(1.0))
}

/// How far sums may fall short by rounding.
const ROUNDING: f64 = 1e-12;

/// What a threshold is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// The highest accuracy with at most this escalation rate.
    Budget(f64),
    /// The lowest escalation rate with at least this accuracy.
    Target(f64),
    /// The highest worth, where a right answer is worth this much and costs are taken off.
    Value(f64),
    /// The same for calibrated confidences, without looking at correctness: a confidence is kept if it is at least the large model's accuracy
    /// minus its cost by value.
    CalibratedValue(f64),
}

impl Rule {
    /// The operating point that the rule picks of some; the least escalation among equals. `None` where no point fulfills it.
    pub fn choose(self, routing: &Routing, costs: Costs) -> Option<Point> {
        let best = |worth: &dyn Fn(&Point) -> Option<f64>| {
            let mut best: Option<(f64, Point)> = None;
            for point in &routing.points {
                let Some(worth) = worth(point) else { continue };
                if best.is_none_or(|(most, _)| worth > most + ROUNDING) {
                    best = Some((worth, *point));
                }
            }
            best.map(|(_, point)| point)
        };
        match self {
            Self::Budget(most) => best(&|point| (point.escalation_rate <= most + ROUNDING).then_some(point.accuracy)),
            Self::Target(least) => {
                best(&|point| (point.accuracy >= least - ROUNDING).then_some(-point.escalation_rate))
            }
            Self::Value(value) => best(&|point| Some(value * point.accuracy - point.cost)),
            Self::CalibratedValue(value) => {
                let least = calibrated_threshold(routing.large_accuracy, value, costs);
                let keeps = |point: &&Point| point.threshold.is_none_or(|threshold| threshold >= least);
                routing.points.iter().find(keeps).map(|point| Point { threshold: Some(least), ..*point })
            }
        }
    }
}

/// The confidence from which keeping an answer is worth more than asking the large model, if confidences are calibrated.
pub fn calibrated_threshold(large_accuracy: f64, value: f64, costs: Costs) -> f64 {
    (large_accuracy - costs.large / value).max(0.0)
}

/// A threshold that was chosen on one half of the questions, and what it gives on the other.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// What it was chosen by.
    pub rule: Rule,
    /// On the half that it was chosen on; `None` where no threshold fulfills the rule.
    pub chosen: Option<Point>,
    /// The same threshold on the other half: the result.
    pub held_out: Option<Point>,
}

/// Thresholds by several rules: chosen on one half of the questions, which a seed decides, reported on the other. `question` numbers the
/// question that each row belongs to, of `count`; halves take questions whole.
pub fn choices(
    rows: &[Routed],
    question: &[u32],
    count: usize,
    costs: Costs,
    rules: &[Rule],
    seed: u64,
) -> Vec<Choice> {
    let half = folds(count, 2, seed);
    let part = |which: usize| -> Vec<Routed> {
        let of = rows.iter().zip(question).filter(|(_, question)| half[**question as usize] == which);
        of.map(|(row, _)| *row).collect()
    };
    let (calibration, test) = (part(0), part(1));
    let known = routing(&calibration, costs);
    let choice = |&rule: &Rule| {
        let chosen = known.as_ref().and_then(|routing| rule.choose(routing, costs));
        let held_out = chosen.filter(|_| !test.is_empty()).map(|point| at(&test, point.threshold, costs));
        Choice { rule, chosen, held_out }
    };
    rules.iter().map(choice).collect()
}
