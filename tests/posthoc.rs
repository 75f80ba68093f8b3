//! Calibration maps against the vectors (scikit-learn, betacal), cross-fitting, and data that determine no map.

use candor::evaluation::answers::Answers;
use candor::evaluation::binned::expected_calibration_error;
use candor::evaluation::posthoc::{FOLD_SEED, FOLDS, Kind, Map, combined, cross_fitted, folds};
use candor::evaluation::selective::auroc;
use candor::evaluation::{Predictions, brier};
use serde_json::Value;

use crate::check::{all_close, close, floats, json, vectors};

fn correct(set: &Value) -> Vec<bool> {
    floats(&set["correct"]).iter().map(|&y| y == 1.0).collect()
}

fn predictions(set: &Value) -> Predictions {
    Predictions::new(&floats(&set["conf"]), &correct(set)).unwrap()
}

/// Answers to as many questions.
fn answers(confidences: &[f64], correct: &[bool]) -> Answers {
    let names: Vec<String> = (0..confidences.len()).map(|index| index.to_string()).collect();
    let rows = names.iter().zip(confidences).zip(correct);
    Answers::new(rows.map(|((name, &stated), &right)| (name.as_str(), Some(stated), right))).unwrap()
}

fn stated(answers: &Answers) -> Vec<f64> {
    answers.rows().iter().map(|answer| answer.confidence.unwrap()).collect()
}

/// Catches a fit that stops early, another clip, and an interpolation that is off by one threshold.
#[test]
fn vectors_maps() {
    let Some(path) = vectors("posthoc.json") else { return };
    let file = json(&path);
    let (all, query) = (predictions(&file), floats(&file["query"]));
    let fit = |kind| Map::fit(kind, &all).unwrap();
    let at_query = |map: &Map| query.iter().map(|&confidence| map.apply(confidence)).collect::<Vec<_>>();
    for (name, kind, key) in [
        ("temperature", Kind::Temperature, "query_pred"),
        ("platt", Kind::Platt, "query_pred"),
        ("platt_smoothed", Kind::PlattSmoothed, "query_pred"),
        ("isotonic", Kind::Isotonic, "query_pred_linear"),
        ("isotonic", Kind::IsotonicStep, "query_pred_step"),
        ("beta", Kind::Beta, "query_pred"),
    ] {
        all_close(name, &at_query(&fit(kind)), &floats(&file[name][key]), 1e-6);
    }
    for (kind, key) in [(Kind::Histogram, "values"), (Kind::HistogramPrior, "values_prior1")] {
        let Map::Histogram { values } = fit(kind) else { panic!("no histogram") };
        all_close(key, &values, &floats(&file["histogram_10"][key]), 1e-12);
    }
    let Map::Isotonic { x, y, .. } = fit(Kind::Isotonic) else { panic!("not isotonic") };
    all_close("x", &x, &floats(&file["isotonic"]["x"]), 1e-12);
    all_close("y", &y, &floats(&file["isotonic"]["y"]), 1e-12);
}

/// Catches a shuffle of another order, and a map that sees the answers it is applied to.
#[test]
fn vectors_cross_fitting() {
    let Some(path) = vectors("posthoc.json") else { return };
    let file = json(&path);
    let cross = &file["crossfit"];
    let fold: Vec<f64> = folds(60, FOLDS, FOLD_SEED).iter().map(|&fold| fold as f64).collect();
    assert_eq!(fold, floats(&cross["fold"]));
    let all = answers(&floats(&file["conf"]), &correct(&file));
    for (name, kind) in &Kind::ALL {
        let want = &cross["oof"][name];
        if want.is_null() {
            continue;
        }
        let got = cross_fitted(&all, *kind).unwrap();
        all_close(name, &stated(&got), &floats(&want["pred"]), 1e-6);
        let got = got.predictions().unwrap();
        close(&format!("{name}: brier"), brier(&got), want["brier"].as_f64().unwrap(), 1e-6);
        close(&format!("{name}: ece"), expected_calibration_error(&got, 10), want["ece10"].as_f64().unwrap(), 1e-6);
        close(&format!("{name}: auroc"), auroc(&got).unwrap(), want["auroc"].as_f64().unwrap(), 1e-6);
    }
}

/// Catches slopes that run away where the data leave them open, and a made-up map where all answers are right.
#[test]
fn data_that_determine_no_slope_leave_it_at_one_or_have_no_map() {
    let Some(path) = vectors("posthoc.json") else { return };
    let file = json(&path);
    let flat = predictions(&file["flat"]);
    let Some(Map::Platt { a, b }) = Map::fit(Kind::Platt, &flat) else { panic!("no map") };
    close("a", a, 1.0, 1e-9);
    close("b", b, file["flat"]["platt_b"].as_f64().unwrap(), 1e-9);
    let at_half = |kind| Map::fit(kind, &flat).unwrap().apply(0.5);
    assert_eq!((at_half(Kind::Temperature), at_half(Kind::Isotonic)), (0.5, 0.2));

    let separable = Predictions::new(&[0.1, 0.2, 0.8, 0.9], &[false, false, true, true]).unwrap();
    let one_class = Predictions::new(&[0.1, 0.9, 0.4], &[true; 3]).unwrap();
    let single = Predictions::new(&[0.7], &[false]).unwrap();
    for (name, kind) in Kind::ALL {
        for (data, all) in [("separable", &separable), ("one class", &one_class), ("single", &single), ("flat", &flat)]
        {
            let Some(map) = Map::fit(kind, all) else {
                assert!(data == "one class" || data == "single", "{name}: no map of {data}");
                continue;
            };
            let values = [0.0, 0.1, 0.5, 0.85, 1.0].map(|stated| map.apply(stated));
            assert!(values.iter().all(|value| (0.0..=1.0).contains(value)), "{name} of {data}: {values:?}");
        }
    }
    assert_eq!(Map::fit(Kind::Platt, &one_class), None);
}

/// Catches a leak between folds: with several answers to a question, none of them may have been fitted on.
#[test]
fn questions_are_left_out_whole() {
    // Two answers to each question; the first question's answers are alone in being right, at a confidence of their own.
    let names: Vec<String> = (0..40).map(|row| format!("q{}", row / 2)).collect();
    let rows = names.iter().enumerate().map(|(row, name)| {
        let odd = row < 2;
        (name.as_str(), Some(if odd { 0.9 } else { 0.1 + 0.01 * row as f64 }), odd || row % 3 == 0)
    });
    let all = Answers::new(rows).unwrap();
    let fitted = cross_fitted(&all, Kind::Histogram).unwrap();
    // Nobody else stated 0.9, so its bin is empty without them and holds its middle.
    close("left out", stated(&fitted)[0], 0.95, 1e-12);
    assert_eq!(fitted.questions(), all.questions());

    let unparsed =
        all.with_confidences(&[vec![None], stated(&all)[1..].iter().copied().map(Some).collect()].concat()).unwrap();
    let fitted = cross_fitted(&unparsed, Kind::Platt).unwrap();
    assert_eq!((fitted.rows()[0].confidence, fitted.rows().len()), (None, 40), "what is missing stays missing");
    let one = answers(&[0.5], &[true]);
    assert_eq!(cross_fitted(&one, Kind::Isotonic), None);
}

/// Catches a combination that ignores one of its two inputs: each holds what the other lacks.
#[test]
fn a_combined_confidence_beats_both() {
    let mut random = candor::random::SplitMix64::new(3);
    let rows: Vec<[f64; 3]> = (0..2000).map(|_| std::array::from_fn(|_| random.next_f64())).collect();
    let odds = |p: f64| (p / (1.0 - p)).ln();
    let right: Vec<bool> =
        rows.iter().map(|[one, other, luck]| *luck < 1.0 / (1.0 + (-odds(*one) - odds(*other)).exp())).collect();
    let [one, other] = [0, 1].map(|which| answers(&rows.iter().map(|row| row[which]).collect::<Vec<_>>(), &right));
    let score = |answers: &Answers| brier(&answers.predictions().unwrap());
    let both = score(&combined(&one, &other).unwrap());
    for alone in [&one, &other] {
        let platt = cross_fitted(alone, Kind::Platt).unwrap();
        assert!(both < 0.8 * score(&platt), "{both} against {}", score(&platt));
    }
}
