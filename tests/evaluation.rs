//! Calibration metrics against the vectors, and what they refuse.

use candor::evaluation::binned::{
    Norm, adaptive_calibration_error, calibration_error, calibration_error_by_rows, calibration_error_hle, equal_width,
    equal_width_error, expected_calibration_error,
};
use candor::evaluation::bootstrap::{Interval, Resampling, paired_bootstrap};
use candor::evaluation::collapse::collapse;
use candor::evaluation::compatible::notes_error;
use candor::evaluation::decomposition::{corp, murphy, murphy_binned, reliability};
use candor::evaluation::selective::{accuracy_at_coverage, aurc, auroc, coverage_at_accuracy, excess_aurc};
use candor::evaluation::smooth::{smooth_ece, smoothed_ece};
use candor::evaluation::{Predictions, accuracy, brier, brier_skill, mean_confidence, negative_log_likelihood};
use serde_json::{Value, json};

use crate::check::{close, floats, json, vectors};

fn predictions(set: &Value) -> Predictions {
    let correct: Vec<bool> = floats(&set["correct"]).iter().map(|&y| y == 1.0).collect();
    Predictions::new(&floats(&set["conf"]), &correct).unwrap()
}

/// Every number of `want` against what `got` makes of its path of keys; a path for which `got` knows nothing fails.
fn check_all(path: &str, want: &Value, got: &impl Fn(&str) -> Option<f64>) {
    match want {
        Value::Object(fields) => fields.iter().for_each(|(key, want)| check_all(&format!("{path}/{key}"), want, got)),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(index, want)| check_all(&format!("{path}/{index}"), want, got));
        }
        Value::Number(number) => {
            let got = got(path).unwrap_or_else(|| panic!("{path}: got none, want {number}"));
            close(path, got, number.as_f64().unwrap(), 1e-12);
        }
        Value::Bool(truth) => assert_eq!(got(path), Some(f64::from(*truth)), "{path}"),
        Value::Null | Value::String(_) => assert_eq!(got(path), None, "{path}: want {want}"),
    }
}

fn norm(name: &str) -> Norm {
    match name {
        "1" => Norm::L1,
        "2" => Norm::L2,
        "max" => Norm::Max,
        _ => panic!("no norm {name:?}"),
    }
}

/// A number of a data set's vectors by its path; `None` where it is not defined.
fn metric(all: &Predictions, path: &[&str]) -> Option<f64> {
    let number = |text: &str| text.parse::<f64>().unwrap();
    let beta = |text: &str| text.parse::<usize>().unwrap();
    let field = |value: Value, name: &str| value[name].as_f64().or(value[name].as_bool().map(f64::from));
    Some(match *path {
        ["accuracy"] => accuracy(all),
        ["n"] => all.len() as f64,
        ["mean_conf"] => mean_confidence(all),
        ["hle_original", size, p] => return calibration_error_hle(all, norm(p), beta(size)).ok(),
        ["hle_fixed", size, p] => calibration_error_by_rows(all, norm(p), beta(size)),
        ["tie_safe", size, p] => calibration_error(all, norm(p), beta(size)),
        ["seed_script_rms_div100"] => notes_error(all).over_all_bins,
        ["seed_script_dropped_samples"] => notes_error(all).dropped as f64,
        ["seed_rms_nonempty_bins"] => notes_error(all).over_nonempty_bins,
        ["ece_10"] => equal_width_error(all, 10, Norm::L1),
        ["ece_15"] => equal_width_error(all, 15, Norm::L1),
        ["rmsce_10"] => equal_width_error(all, 10, Norm::L2),
        ["rmsce_15"] => equal_width_error(all, 15, Norm::L2),
        ["mce_10"] => equal_width_error(all, 10, Norm::Max),
        ["mce_15"] => equal_width_error(all, 15, Norm::Max),
        ["ace_10"] => adaptive_calibration_error(all, 10),
        ["ace_15"] => adaptive_calibration_error(all, 15),
        ["ew_bins_10", place, name] => {
            let bins = equal_width(all, 10).into_iter().enumerate().filter(|(_, bin)| bin.count > 0.0);
            let (index, bin) = bins.collect::<Vec<_>>()[beta(place)];
            match name {
                "bin" => index as f64,
                "n" => bin.count,
                "mean_conf" => bin.confidence / bin.count,
                "acc" => bin.correct / bin.count,
                _ => return None,
            }
        }
        ["brier"] => brier(all),
        ["murphy_atoms", name] | ["murphy_binned_10", name] => {
            let parts = if path[0] == "murphy_atoms" { murphy(all) } else { murphy_binned(all, 10) };
            match name {
                "rel" => parts.reliability,
                "res" => parts.resolution,
                "unc" => parts.uncertainty,
                "wbv" => parts.variance,
                "wbc" => parts.covariance,
                "sum" => parts.reliability - parts.resolution + parts.uncertainty + parts.variance - parts.covariance,
                _ => return None,
            }
        }
        ["corp", "mcb"] => corp(all).miscalibration,
        ["corp", "dsc"] => corp(all).discrimination,
        ["corp", "unc"] => corp(all).uncertainty,
        ["corp", "isotonic_fit", row] => {
            let points = reliability(all);
            let fits = points.iter().flat_map(|point| std::iter::repeat_n(point.fit, point.count as usize));
            return fits.collect::<Vec<_>>().get(beta(row)).copied();
        }
        ["nll", epsilon] => negative_log_likelihood(all, number(epsilon)),
        ["auroc"] => return auroc(all),
        ["aurc"] => aurc(all),
        ["e_aurc"] => excess_aurc(all),
        ["acc_at_cov", share] => accuracy_at_coverage(all, number(share)),
        ["cov_at_acc", share] => coverage_at_accuracy(all, number(share)),
        ["collapse", "brier_skill"] => return brier_skill(all),
        ["collapse", name] => {
            let spread = json!(collapse(all));
            match name {
                "n_distinct" => return field(spread, "distinct"),
                "mode_value" => return field(spread, "mode"),
                "iqr90" => collapse(all).q95 - collapse(all).q05,
                "entropy_nats" => return field(spread, "entropy"),
                "span_ok" => return field(spread, "spans"),
                _ => return field(spread, name),
            }
        }
        _ => panic!("no metric {path:?}"),
    })
}

/// Catches any metric that is not the published formula. Ties, one class, a flat confidence and confidences at bin edges are
/// among the data sets.
#[test]
fn vectors_calibration_metrics() {
    let Some(path) = vectors("calibration_metrics.json") else { return };
    let file = json(&path);
    let sets = file["datasets"].as_object().expect("data sets");
    assert_eq!(sets.len(), 4);
    for (set, values) in sets {
        let all = predictions(values);
        for (key, want) in values.as_object().expect("metrics") {
            let name = format!("{set}: {key}");
            match key.as_str() {
                // What the metrics are computed of, and numbers of other programs that differ on purpose.
                "conf" | "correct" | "ece_10_linspace_compat" | "smece_relplot_reflected" | "smece_relplot_logit" => {}
                "smece_exact_reflected" => {
                    let (want, tolerance) = (want["value"].as_f64().unwrap(), want["tol"].as_f64().unwrap());
                    close(&name, smooth_ece(&all), want, tolerance);
                }
                // An integral, by trapezoids of another number.
                "smece_sigma_0.05_exact" => close(&name, smoothed_ece(&all, 0.05), want.as_f64().unwrap(), 1e-6),
                "bootstrap_brier" => check_interval(&name, &all, want, |sample| Some(brier(sample))),
                "bootstrap_ece10" => {
                    check_interval(&name, &all, want, |sample| Some(expected_calibration_error(sample, 10)));
                }
                "bootstrap_auroc" => check_interval(&name, &all, want, auroc),
                key => check_all(key, want, &|path| metric(&all, &path.split('/').collect::<Vec<_>>())),
            }
        }
    }
}

fn check_interval(name: &str, all: &Predictions, want: &Value, of: impl Fn(&Predictions) -> Option<f64> + Sync) {
    let [resamples, seed] = ["B", "seed"].map(|key| want[key].as_u64());
    // A block without an interval does not say how it was drawn: any seed must fail to define it.
    let resampling = Resampling { resamples: resamples.unwrap_or(200) as usize, seed: seed.unwrap_or(1) };
    let [got] = resampling.intervals(all.len(), |counts| [all.resampled(counts).as_ref().and_then(&of)]);
    let Some(got) = got else { return assert!(want.is_null(), "{name}: got none, want {want}") };
    let Interval { low, high, used } = got;
    close(&format!("{name}: low"), low, want["lo"].as_f64().unwrap(), 1e-12);
    close(&format!("{name}: high"), high, want["hi"].as_f64().unwrap(), 1e-12);
    assert_eq!(used as u64, want["used"].as_u64().unwrap(), "{name}: used");
}

/// Catches a confidence of 1 that is dropped, or an error that depends on what it should not: the audit of the first notes.
#[test]
fn vectors_seed_consistency() {
    let Some(path) = vectors("seed_consistency.json") else { return };
    let file = json(&path);
    let of =
        |confidence: f64, correct: Vec<bool>| Predictions::new(&vec![confidence; correct.len()], &correct).unwrap();
    let (right, wrong) = (vec![true; 194], vec![false; 806]);
    for (order, labels) in [("first", [right.clone(), wrong.clone()].concat()), ("last", [wrong, right].concat())] {
        let (want, all) = (&file["flat05_acc0194"][order], of(0.5, labels));
        check_all("", want, &|path| {
            Some(match path {
                "/seed_script_div100" => notes_error(&all).over_all_bins,
                "/seed_nonempty" => notes_error(&all).over_nonempty_bins,
                "/hle_original" => calibration_error_hle(&all, Norm::L2, 100).unwrap(),
                "/hle_fixed" => calibration_error_by_rows(&all, Norm::L2, 100),
                "/tie_safe" => calibration_error(&all, Norm::L2, 100),
                "/ece10" => expected_calibration_error(&all, 10),
                "/brier" => brier(&all),
                "/auroc" => return auroc(&all),
                _ => return None,
            })
        });
        close("the skill of flat 0.5", brier_skill(&all).unwrap(), file["brier_skill_flat05"].as_f64().unwrap(), 1e-12);
        let base_rate = of(0.194, all.ascending().map(|row| row.correct).collect());
        let constant = &file["constant_base_rate"];
        close("brier of the base rate", brier(&base_rate), constant["brier"].as_f64().unwrap(), 1e-12);
        close("error of the base rate", calibration_error(&base_rate, Norm::L2, 100), 0.0, 1e-12);
    }
    let all = of(1.0, vec![false; 10]);
    assert_eq!(
        json!([notes_error(&all).over_all_bins, notes_error(&all).dropped]),
        file["conf1_dropped_by_seed_script"]["value"]
    );
    assert_eq!(expected_calibration_error(&all, 10), 1.0, "a stated 1 is in the last bin");
    assert!(Predictions::new(&floats(&file["conf85_dropped"]["conf"]), &[true; 10]).is_err(), "85 is no probability");
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
    assert_eq!(auroc(&Predictions::new(&confidences, &correct).unwrap()), Some(wins / pairs));
}

#[test]
fn bad_predictions_are_refused_never_clamped() {
    for bad in [1.0 + 1e-9, -1e-9, f64::NAN, 85.0] {
        let error = Predictions::new(&[0.5, bad], &[true, false]).unwrap_err().to_string();
        assert!(error.starts_with("row 1: the confidence"), "{error}");
    }
    assert!(Predictions::new(&[0.5], &[]).is_err());
    assert!(Predictions::new(&[], &[]).is_err());
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
