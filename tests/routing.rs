//! Routing against the vectors, and what thresholds are worth on questions that they were not chosen on.

use candor::evaluation::routing::{Costs, Point, Routed, Rule, at, calibrated_threshold, choices, routing};
use candor::random::SplitMix64;
use serde_json::Value;

use crate::check::{all_close, close, floats, json, vectors};

fn questions(file: &Value) -> Vec<Routed> {
    let [confidences, small, large] = ["conf", "slm_correct", "llm_correct"].map(|key| floats(&file[key]));
    let rows = confidences.iter().zip(&small).zip(&large);
    rows.map(|((&stated, &small), &large)| Routed { confidence: Some(stated), small: small == 1.0, large }).collect()
}

fn check_point(got: &Point, want: &Value) {
    assert_eq!(got.threshold, want["threshold"].as_f64());
    let optional = |name: &str, got: Option<f64>| match (got, want[name].as_f64()) {
        (Some(got), Some(want)) => close(name, got, want, 1e-12),
        (got, want) => assert_eq!(got, want, "{name}"),
    };
    optional("esc_rate", Some(got.escalation_rate));
    optional("accuracy", Some(got.accuracy));
    optional("cost", Some(got.cost));
    optional("false_escalation_rate", Some(got.false_escalation_rate));
    optional("missed_error_rate", Some(got.missed_error_rate));
    optional("false_escalation_given_correct", got.false_escalation_given_correct);
    optional("missed_error_given_incorrect", got.missed_error_given_incorrect);
    optional("kept_accuracy", got.kept_accuracy);
}

/// Catches a comparison that is strict where it should not be, an area over the wrong curve, and rates of the wrong side.
#[test]
fn vectors_routing() {
    let Some(path) = vectors("routing.json") else { return };
    let file = json(&path);
    let number = |key: &str| file[key].as_f64().unwrap();
    let costs = Costs { small: number("cost_slm"), large: number("cost_llm") };
    let all = questions(&file);
    let got = routing(&all, costs).unwrap();
    let want = file["points"].as_array().unwrap();
    assert_eq!(got.points.len(), want.len());
    for (got, want) in got.points.iter().zip(want) {
        check_point(got, want);
        check_point(&at(&all, got.threshold, costs), want);
    }
    let flat = |curve: &[(f64, f64)]| curve.iter().flat_map(|&(rate, accuracy)| [rate, accuracy]).collect::<Vec<_>>();
    let wanted = |key: &str| file[key].as_array().unwrap().iter().flat_map(floats).collect::<Vec<_>>();
    all_close("curve", &flat(&got.curve), &wanted("curve"), 1e-12);
    all_close("oracle", &flat(&got.oracle_curve), &wanted("oracle_curve"), 1e-12);
    for (key, value) in [
        ("area", Some(got.area)),
        ("random_area", Some(got.random_area)),
        ("oracle_area", Some(got.oracle_area)),
        ("normalised_area", got.normalized_area),
        ("apgr", got.mean_gap_recovered),
        ("cpt50", got.escalation_for_half_the_gap),
        ("cpt80", got.escalation_for_80_percent_of_the_gap),
    ] {
        close(key, value.unwrap(), number(key), 1e-12);
    }
    for want in file["utility"].as_array().unwrap() {
        let value = want["value"].as_f64().unwrap();
        let best = Rule::Value(value).choose(&got, costs).unwrap();
        close("utility", value * best.accuracy - best.cost, want["best_utility"].as_f64().unwrap(), 1e-12);
        assert_eq!(best.threshold, want["best_threshold"].as_f64());
        let threshold = calibrated_threshold(got.large_accuracy, value, costs);
        close("calibrated", threshold, want["bayes_threshold_if_calibrated"].as_f64().unwrap(), 1e-12);
    }
}

const COSTS: Costs = Costs { small: 1.0, large: 10.0 };

/// Calibrated confidences of a small model; the large one is right nine times of ten.
fn calibrated(count: usize) -> Vec<Routed> {
    let mut random = SplitMix64::new(11);
    let mut one = || {
        let confidence = random.next_f64();
        Routed { confidence: Some(confidence), small: random.next_f64() < confidence, large: 0.9 }
    };
    (0..count).map(|_| one()).collect()
}

/// Catches thresholds that break their own rule, and a calibrated rule that is not near the best one where confidences are calibrated.
#[test]
fn rules_keep_what_they_promise() {
    let all = calibrated(4000);
    let got = routing(&all, COSTS).unwrap();
    let budget = Rule::Budget(0.3).choose(&got, COSTS).unwrap();
    assert!(budget.escalation_rate <= 0.3 && budget.escalation_rate > 0.29, "{budget:?}");
    let target = Rule::Target(0.85).choose(&got, COSTS).unwrap();
    assert!(target.accuracy >= 0.85);
    assert!(
        got.points
            .iter()
            .filter(|point| point.escalation_rate < target.escalation_rate)
            .all(|point| point.accuracy < 0.85)
    );
    assert_eq!(Rule::Target(0.99).choose(&got, COSTS), None, "out of reach");
    let worth = |rule: Rule| rule.choose(&got, COSTS).map(|point| 50.0 * point.accuracy - point.cost).unwrap();
    let (best, rule) = (worth(Rule::Value(50.0)), worth(Rule::CalibratedValue(50.0)));
    assert!(rule <= best && rule > best - 0.2, "{rule} against {best}");
    // Escalating what is least sure recovers more than half of the gap with half of the questions.
    assert!(got.normalized_area.unwrap() > 0.5 && got.mean_gap_recovered.unwrap() > 0.6);
}

/// Catches a threshold that is reported where it was chosen, and halves that share a question.
#[test]
fn thresholds_are_reported_on_the_other_half() {
    let all = calibrated(1000);
    // Two answers to each question.
    let question: Vec<u32> = (0..1000).map(|row| row / 2).collect();
    let rules = [Rule::Budget(0.3), Rule::Target(0.85), Rule::Target(0.999)];
    let chosen = choices(&all, &question, 500, COSTS, &rules, 7);
    assert_eq!(chosen, choices(&all, &question, 500, COSTS, &rules, 7));
    let (one, other) = (chosen[0].chosen.unwrap(), chosen[0].held_out.unwrap());
    assert_eq!(one.threshold, other.threshold);
    assert!(one.accuracy != other.accuracy && (one.accuracy - other.accuracy).abs() < 0.1, "{one:?} {other:?}");
    assert_eq!((chosen[2].chosen, chosen[2].held_out), (None, None));
    assert_eq!(choices(&[], &[], 0, COSTS, &rules, 7)[0].chosen, None);
}

/// Catches an unread confidence that is kept, and a gap that is divided by where there is none.
#[test]
fn what_cannot_be_read_is_escalated_and_no_gap_is_not_recovered() {
    let all = [
        Routed { confidence: None, small: true, large: 0.0 },
        Routed { confidence: Some(0.0), small: true, large: 0.0 },
        Routed { confidence: Some(1.0), small: false, large: 1.0 },
        Routed { confidence: Some(1.0), small: true, large: 1.0 },
    ];
    let got = routing(&all, COSTS).unwrap();
    assert_eq!(got.points[0].escalation_rate, 0.25);
    assert_eq!(got.curve[0], (0.0, 0.75));
    assert_eq!((got.mean_gap_recovered, got.escalation_for_half_the_gap), (None, None));
    assert_eq!(routing(&[], COSTS), None);
}
