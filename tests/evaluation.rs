//! Calibration metrics against the vectors, and what they refuse.

use candor::evaluation::{
    Interval, Predictions, accuracy, auroc, base_rate_brier, bootstrap, brier, brier_skill, paired_bootstrap,
};
use serde_json::Value;

use crate::check::{close, floats, json, vectors};

fn predictions(set: &Value) -> Predictions {
    let correct = floats(&set["correct"]).iter().map(|&y| y == 1.0).collect();
    Predictions::new(floats(&set["conf"]), correct).unwrap()
}

fn check_optional(name: &str, got: Option<f64>, want: &Value) {
    match (got, want.as_f64()) {
        (Some(got), Some(want)) => close(name, got, want, 1e-12),
        (got, want) => assert_eq!(got, want, "{name}"),
    }
}

fn check_interval(name: &str, got: Option<Interval>, want: &Value) {
    let Some(got) = got else { return assert!(want.is_null(), "{name}: got none, want {want}") };
    close(&format!("{name}: low"), got.low, want["lo"].as_f64().unwrap(), 1e-12);
    close(&format!("{name}: high"), got.high, want["hi"].as_f64().unwrap(), 1e-12);
    assert_eq!(got.used as u64, want["used"].as_u64().unwrap(), "{name}: used");
}

#[test]
fn vectors_calibration_metrics() {
    let Some(path) = vectors("calibration_metrics.json") else { return };
    let file = json(&path);
    let sets = file["datasets"].as_object().expect("data sets");
    assert!(!sets.is_empty(), "no data set");
    for (set, values) in sets {
        let all = predictions(values);
        let resampled = |block: &Value, metric: &dyn Fn(&Predictions) -> Option<f64>| {
            let [resamples, seed] = ["B", "seed"].map(|key| block[key].as_u64());
            // A block without an interval does not say how it was drawn: any seed must fail to define it.
            bootstrap(all.len(), resamples.unwrap_or(200) as usize, seed.unwrap_or(1), |rows| metric(&all.at(rows)))
        };
        for (key, want) in values.as_object().expect("metrics") {
            let name = format!("{set}: {key}");
            match key.as_str() {
                "conf" | "correct" | "n" | "mean_conf" => {}
                "accuracy" => close(&name, accuracy(&all), want.as_f64().unwrap(), 1e-12),
                "brier" => close(&name, brier(&all), want.as_f64().unwrap(), 1e-12),
                "murphy_atoms" => close(&name, base_rate_brier(&all), want["unc"].as_f64().unwrap(), 1e-12),
                "collapse" => check_optional(&name, brier_skill(&all), &want["brier_skill"]),
                "auroc" => check_optional(&name, auroc(&all), want),
                "bootstrap_brier" => check_interval(&name, resampled(want, &|sample| Some(brier(sample))), want),
                "bootstrap_auroc" => check_interval(&name, resampled(want, &auroc), want),
                _ => crate::check::skipped(name),
            }
        }
    }
}

#[test]
fn auroc_counts_pairs() {
    let confidences = vec![0.3, 0.3, 0.9, 0.1, 0.3, -0.0, 0.0, 1.0];
    let correct = vec![true, false, true, false, true, true, false, false];
    let (mut wins, mut pairs) = (0.0, 0.0);
    for right in (0..8).filter(|&row| correct[row]) {
        for wrong in (0..8).filter(|&row| !correct[row]) {
            let (high, low) = (confidences[right], confidences[wrong]);
            wins += if high > low {
                1.0
            } else if high == low {
                0.5
            } else {
                0.0
            };
            pairs += 1.0;
        }
    }
    assert_eq!(auroc(&Predictions::new(confidences, correct).unwrap()), Some(wins / pairs));
}

#[test]
fn bad_predictions_are_refused_never_clamped() {
    for bad in [1.0 + 1e-9, -1e-9, f64::NAN, 85.0] {
        let error = Predictions::new(vec![0.5, bad], vec![true, false]).unwrap_err().to_string();
        assert!(error.starts_with("row 1: the confidence"), "{error}");
    }
    assert!(Predictions::new(vec![0.5], vec![]).is_err());
    assert!(Predictions::new(vec![], vec![]).is_err());
}

#[test]
fn paired_bootstrap_sees_a_difference_that_rows_share() {
    // Rows differ widely, but every one improves a little.
    let before = (0..128).map(|row| f64::from(row % 7)).collect::<Vec<_>>();
    let after = before.iter().enumerate().map(|(row, value)| value + 0.1 + 0.02 * (row % 3) as f64).collect::<Vec<_>>();
    let interval = paired_bootstrap(&before, &after, 17).unwrap();
    assert!(0.115 < interval.low && interval.low < interval.high && interval.high < 0.125, "{interval:?}");
    assert_eq!(interval, paired_bootstrap(&before, &after, 17).unwrap());
    assert_ne!(interval, paired_bootstrap(&before, &after, 18).unwrap());
    let reversed = paired_bootstrap(&after, &before, 17).unwrap();
    close("reversed", reversed.low, -interval.high, 1e-12);

    assert!(paired_bootstrap(&before, &after[1..], 17).is_err());
    assert!(paired_bootstrap(&[], &[], 17).is_err());
    assert!(paired_bootstrap(&[0.0, 1.0], &[1.0, f64::NAN], 17).unwrap_err().to_string().starts_with("row 1:"));
}
