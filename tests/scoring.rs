//! Scoring rules and length penalties against the vectors, and the property that makes a rule a proper one.

use candor_environments::length::Length;
use candor_environments::scoring::{NotAProbability, Rule, log_raw, rewarding_doubt, rlcr, rlcr_code};
use serde_json::{Value, json};

use crate::check;

/// What a probability earns, given the outcome.
type Scoring = Box<dyn Fn(f64, bool) -> f64>;

/// A rule by its name in the vectors; `None`, after saying so, for names that are not offered.
fn scoring(name: &str) -> Option<Scoring> {
    let ruled = |rule: Rule| -> Option<Scoring> { Some(Box::new(move |p, y| rule.score(p, y).unwrap())) };
    match name {
        "brier" => ruled(Rule::Brier),
        "brier_pm1" => ruled(Rule::BrierPm1),
        "log_norm" => ruled(Rule::Log),
        "spherical" => ruled(Rule::Spherical),
        "log_raw" => Some(Box::new(|p, y| log_raw(p, y).unwrap())),
        "rlcr" => Some(Box::new(|p, y| rlcr(p, y).unwrap())),
        "rlcr_code" => Some(Box::new(|p, y| rlcr_code(Some(p), y).unwrap())),
        // Offered nowhere: here to show that the test of propriety can fail.
        "linear_improper" => Some(Box::new(|p, y| 1.0 - (p - f64::from(y)).abs())),
        _ => {
            crate::check::skipped(name);
            None
        }
    }
}

fn entries(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().unwrap().iter().map(|(name, value)| (name.as_str(), value))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

/// The mean score of stating `p` where the outcome has chance `q`.
fn expected(scoring: &Scoring, p: f64, q: f64) -> f64 {
    q * scoring(p, true) + (1.0 - q) * scoring(p, false)
}

/// The probability in steps of 0.01 with the highest mean score, and that score.
fn best(scoring: &Scoring, q: f64) -> (f64, f64) {
    let scores = (0..=100).map(|step| f64::from(step) / 100.0).map(|p| (p, expected(scoring, p, q)));
    scores.reduce(|best, next| if next.1 > best.1 { next } else { best }).unwrap()
}

#[test]
fn vectors_scoring_table() {
    let Some(path) = check::vectors("scoring_rules.json") else { return };
    let file = check::json(&path);
    check::close("eps_log", candor_environments::scoring::LOG_EPSILON, number(&file["eps_log"]), 0.0);
    for (name, rows) in entries(&file["table"]) {
        let Some(scoring) = scoring(name) else { continue };
        for row in rows.as_array().unwrap() {
            let (p, y) = (number(&row["p"]), row["y"] == 1);
            check::close(&format!("{name} {row}"), scoring(p, y), number(&row["s"]), 1e-12);
        }
    }
}

#[test]
fn vectors_honesty_pays_most_under_proper_rules_only() {
    let Some(path) = check::vectors("scoring_rules.json") else { return };
    let mut improper = Vec::new();
    for (name, rows) in entries(&check::json(&path)["propriety_argmax"]) {
        let Some(scoring) = scoring(name) else { continue };
        let mut proper = true;
        for row in rows.as_array().unwrap() {
            let (q, (p, value)) = (number(&row["q"]), best(&scoring, number(&row["q"])));
            check::close(&format!("{name} {row}"), value, number(&row["value"]), 1e-12);
            // Ties are broken by rounding, so the vector's choice needs to be as good, not the same.
            check::close(&format!("{name} {row}"), expected(&scoring, number(&row["argmax_p"]), q), value, 1e-12);
            proper &= (p - q).abs() < 0.0101;
        }
        if !proper {
            improper.push(name.to_owned());
        }
    }
    assert_eq!(improper, ["linear_improper"]);
}

#[test]
fn vectors_joint_incentive_to_be_right() {
    let Some(path) = check::vectors("scoring_rules.json") else { return };
    for (name, case) in entries(&check::json(&path)["joint_incentive"]) {
        let (rule, weight) = name.split_once("|w=").unwrap();
        let Some(scoring) = scoring(rule) else { continue };
        let weight: f64 = weight.parse().unwrap();
        let chances = check::floats(&case["q"]);
        let values: Vec<f64> = chances.iter().map(|q| best(&scoring, *q).1 + weight * q).collect();
        check::all_close(name, &values, &check::floats(&case["V"]), 1e-12);
        let monotone = values.windows(2).all(|pair| pair[0] <= pair[1] + 1e-12);
        assert_eq!(Value::from(monotone), case["monotone"], "{name}");
        let highest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let at_argmax = chances.iter().position(|q| *q == number(&case["argmax_q"])).unwrap();
        check::close(name, values[at_argmax], highest, 1e-12);
    }
}

#[test]
fn vectors_rewarding_doubt() {
    let Some(path) = check::vectors("scoring_rules.json") else { return };
    for row in check::json(&path)["rewarding_doubt_repo"].as_array().unwrap() {
        let level = row["conf"].as_u64().map(|level| u32::try_from(level).unwrap());
        check::close(&row.to_string(), rewarding_doubt(level, row["y"] == 1), number(&row["r"]), 1e-12);
    }
}

#[test]
fn vectors_constant_confidence_earns_its_accuracy() {
    let Some(path) = check::vectors("boolq_env.json") else { return };
    let brier = scoring("brier").unwrap();
    for row in check::json(&path)["constant_conf_reference"].as_array().unwrap() {
        let accuracy = number(&row["acc"]);
        check::close(&row.to_string(), expected(&brier, accuracy, accuracy), number(&row["reward"]), 1e-12);
    }
}

#[test]
fn only_probabilities_are_scored() {
    for rule in ["brier", "brier_pm1", "log", "spherical"] {
        let parsed: Rule = serde_json::from_value(json!(rule)).unwrap();
        assert_eq!(parsed.name(), rule);
        let lowest =
            (0..=100).map(|step| parsed.score(f64::from(step) / 100.0, true).unwrap()).fold(f64::MAX, f64::min);
        check::close(rule, parsed.worst(), lowest, 1e-15);
        for p in [-1e-9, 1.0 + 1e-9, f64::INFINITY] {
            assert_eq!(parsed.score(p, true), Err(NotAProbability(p)), "{rule}");
        }
        assert!(parsed.score(f64::NAN, false).is_err(), "{rule}");
    }
    assert!(rlcr(1.5, true).is_err() && log_raw(1.5, true).is_err() && rlcr_code(Some(1.5), true).is_err());
    check::close("no format", rlcr_code(None, true).unwrap(), 0.0, 0.0);
}

#[test]
fn vectors_length_penalty() {
    let Some(path) = check::vectors("boolq_env.json") else { return };
    let case = &check::json(&path)["length_penalty"];
    let offered = [
        ("spar", Length::Spar {}),
        ("soft_w025", Length::Soft { weight: 0.25 }),
        ("hard_w025", Length::Hard { weight: 0.25 }),
    ];
    for (name, length) in offered {
        let penalty = |tokens| length.penalty(tokens, number(&case["L"])).unwrap();
        let got: Vec<f64> = check::floats(&case["n"]).into_iter().map(penalty).collect();
        check::all_close(name, &got, &check::floats(&case[name]), 1e-12);
    }
    assert_eq!(Length::None {}.penalty(1.0, 512.0), None);
}
