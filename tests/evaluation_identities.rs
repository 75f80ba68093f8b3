//! What must hold of calibration metrics whatever the answers, and how fast they are.

use std::time::Instant;

use candor::evaluation::answers::Answers;
use candor::evaluation::binned::{
    Norm, calibration_error, calibration_error_by_rows, equal_width_error, expected_calibration_error, null_level,
};
use candor::evaluation::bootstrap::Resampling;
use candor::evaluation::decomposition::{corp, murphy, murphy_binned, reliability};
use candor::evaluation::measures::{METRICS, Measures};
use candor::evaluation::smooth::smooth_ece;
use candor::evaluation::{Predictions, accuracy, brier, mean_confidence};
use candor::random::SplitMix64;
use proptest::prelude::*;

use crate::check::close;

/// Confidences with ties, the ends, and numbers near bin edges.
fn confidence() -> impl Strategy<Value = f64> {
    prop_oneof![Just(0.0), Just(1.0), (0..=10_u32).prop_map(|tenth| f64::from(tenth) / 10.0), 0.0..=1.0]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Catches a sum over the wrong rows, and an error that a permutation changes.
    #[test]
    fn identities_hold_for_any_predictions(rows in prop::collection::vec((confidence(), any::<bool>()), 1..60), shift in 0..60_usize) {
        let predictions = |rows: &[(f64, bool)]| {
            let (confidences, correct): (Vec<f64>, Vec<bool>) = rows.iter().copied().unzip();
            Predictions::new(&confidences, &correct).unwrap()
        };
        let all = predictions(&rows);
        let parts = murphy(&all);
        close("Murphy", parts.reliability - parts.resolution + parts.uncertainty, brier(&all), 1e-12);
        let parts = murphy_binned(&all, 10);
        let sum = parts.reliability - parts.resolution + parts.uncertainty + parts.variance - parts.covariance;
        close("Murphy, binned", sum, brier(&all), 1e-12);
        let parts = corp(&all);
        close("CORP", parts.miscalibration - parts.discrimination + parts.uncertainty, brier(&all), 1e-12);
        prop_assert!(parts.miscalibration >= -1e-12 && parts.discrimination >= -1e-12);
        prop_assert!(reliability(&all).is_sorted_by(|one, next| one.confidence < next.confidence && one.fit <= next.fit));

        let gap = (mean_confidence(&all) - accuracy(&all)).abs();
        for beta in [1, 5, 1000] {
            for error in [calibration_error, calibration_error_by_rows] {
                let [l1, l2, most] = [Norm::L1, Norm::L2, Norm::Max].map(|norm| error(&all, norm, beta));
                prop_assert!(gap <= l1 + 1e-12 && l1 <= l2 + 1e-12 && l2 <= most + 1e-12);
            }
        }
        let [l1, l2, most] = [Norm::L1, Norm::L2, Norm::Max].map(|norm| equal_width_error(&all, 10, norm));
        prop_assert!(gap <= l1 + 1e-12 && l1 <= l2 + 1e-12 && l2 <= most + 1e-12);

        let mut rotated = rows.clone();
        rotated.rotate_left(shift % rows.len());
        let rotated = predictions(&rotated);
        for metric in METRICS.iter().filter(|metric| metric.name != "ace_15") {
            let [one, other] = [&all, &rotated].map(|predictions| (metric.of)(predictions));
            prop_assert_eq!(one.is_some(), other.is_some());
            prop_assert!(one.zip(other).is_none_or(|(one, other)| (one - other).abs() < 1e-12), "{}", metric.name);
        }
    }

    /// Catches a resample that is not one: counting a question twice is the same as writing it down twice.
    #[test]
    fn a_resample_is_the_rows_repeated(rows in prop::collection::vec((confidence(), any::<bool>(), 0..3_u32), 1..40)) {
        let single = rows.iter().zip(0..).map(|(row, question)| (question, row.0, row.1));
        let counts: Vec<u32> = rows.iter().map(|row| row.2).collect();
        let resampled = Predictions::of_questions(single).unwrap().resampled(&counts);
        let repeated = rows.iter().zip(0..).flat_map(|(row, question)| (0..row.2).map(move |_| (question, row.0, row.1)));
        let repeated = Predictions::of_questions(repeated).ok();
        prop_assert_eq!(resampled.is_some(), repeated.is_some());
        if let Some((one, other)) = resampled.zip(repeated) {
            prop_assert_eq!(one.len(), other.len());
            for metric in &METRICS {
                let [one, other] = [&one, &other].map(|predictions| (metric.of)(predictions));
                prop_assert!(one == other || (one.unwrap() - other.unwrap()).abs() < 1e-12, "{}", metric.name);
            }
        }
    }
}

/// Answers to questions, some of them without a confidence; right with the probability that is stated, to the power of `bend`.
fn answers(questions: usize, each: usize, bend: i32) -> Answers {
    let mut random = SplitMix64::new(5);
    let names: Vec<String> = (0..questions).map(|question| format!("q{question}")).collect();
    let rows = (0..questions * each).map(|row| {
        let (stated, luck, read) = (random.next_f64(), random.next_f64(), random.next_f64());
        (names[row / each].as_str(), (read > 0.05).then_some(stated), luck < stated.powi(bend))
    });
    Answers::new(rows).unwrap()
}

/// Catches intervals that depend on the number of threads, or that resample rows where questions are meant.
#[test]
fn intervals_depend_on_the_seed_alone_and_widen_with_answers_to_one_question() {
    let resampling = Resampling { resamples: 200, seed: 9 };
    let all = answers(300, 1, 1);
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let [alone, many] = [one_thread.install(|| Measures::of(&all, resampling)), Measures::of(&all, resampling)];
    assert_eq!(alone, many);
    assert_ne!(alone, Measures::of(&all, Resampling { seed: 10, ..resampling }));
    assert_eq!((many.questions, many.answers, many.parsed), (300, 300, all.predictions().unwrap().len()));

    // Every answer given four times tells nothing new: the intervals stay as wide.
    let names = all.questions();
    let rows = all.rows().iter().flat_map(|row| [row; 4]);
    let four = Answers::new(rows.map(|row| (names[row.question as usize].as_str(), row.confidence, row.correct)));
    let four = Measures::of(&four.unwrap(), resampling);
    for (one, four) in many.estimates.0.iter().zip(&four.estimates.0).take(4) {
        let [one, four] = [one, four].map(|estimate| estimate.interval.unwrap());
        close("low", four.low, one.low, 1e-9);
        close("high", four.high, one.high, 1e-9);
    }
}

/// Catches numbers that appear where there is nothing to measure, and a panic there.
#[test]
fn where_nothing_is_stated_nothing_is_measured() {
    let silent = Answers::new([("a", None, true), ("b", None, false)].into_iter()).unwrap();
    let measures = Measures::of(&silent, Resampling::default());
    assert_eq!((measures.parsed, measures.parse_rate.value, measures.collapse), (0, Some(0.0), None));
    assert!(measures.estimates.0.iter().all(|estimate| estimate.value.is_none() && estimate.interval.is_none()));
    assert!(Answers::new(std::iter::empty()).is_err());
    for bad in [f64::NAN, -0.1, 1.1, f64::INFINITY] {
        let error = Answers::new([("a", Some(bad), true)].into_iter()).unwrap_err().to_string();
        assert!(error.starts_with("row 0: the confidence"), "{error}");
    }
    let single = Answers::new([("a", Some(1.0), true)].into_iter()).unwrap();
    let json = serde_json::to_value(Measures::of(&single, Resampling::default())).unwrap();
    assert_eq!((&json["auroc"]["value"], &json["brier_skill"]["value"]), (&().into(), &().into()));
    assert_eq!((&json["brier"]["value"], &json["collapse"]["flat"]), (&0.0.into(), &true.into()));
}

/// Catches a null level that is not one: of a flat 0.5 it is the mean distance of a coin's frequency from one half, √(2/π)/(2√n); and
/// a calibrated model is near it, an overconfident one far above.
#[test]
fn the_null_level_is_what_calibrated_answers_reach() {
    let flat = Predictions::new(&[0.5; 400], &[true; 400]).unwrap();
    let level = null_level(&flat, 1, |all| expected_calibration_error(all, 10));
    close("flat", level.mean, 0.5 * (2.0 / std::f64::consts::PI).sqrt() / 20.0, 2e-3);
    assert!(level.quantile_95 > 2.0 * level.mean);
    let [calibrated, over] = [1, 3].map(|bend| answers(3000, 1, bend).predictions().unwrap());
    for (all, is_calibrated) in [(calibrated, true), (over, false)] {
        let level = null_level(&all, 1, |all| expected_calibration_error(all, 10));
        assert_eq!(expected_calibration_error(&all, 10) < level.quantile_95, is_calibrated);
    }
}

/// Catches smoothing that is wrong near the ends, where the reflected kernel is: by the definition, summed image by image.
#[test]
fn smooth_ece_is_the_sum_over_reflections() {
    let all = answers(40, 1, 2).predictions().unwrap();
    let error = smooth_ece(&all);
    let images = |x: f64| (-3..=3).flat_map(move |j| [2.0 * f64::from(j) + x, 2.0 * f64::from(j) - x]);
    let normal = |d: f64| (-0.5 * (d / error).powi(2)).exp() / (error * (2.0 * std::f64::consts::PI).sqrt());
    let size = |t: f64| -> f64 {
        let of = |row: &candor::evaluation::Prediction| {
            (row.confidence - f64::from(row.correct))
                * images(row.confidence).map(|image| normal(t - image)).sum::<f64>()
        };
        all.ascending().map(of).sum::<f64>().abs() / all.len() as f64
    };
    let want = (0..4000).map(|cell| size((f64::from(cell) + 0.5) / 4000.0)).sum::<f64>() / 4000.0;
    close("smooth ECE", error, want, 1e-4);
}

/// The promised speed: 50,000 answers, 2,000 resamples of every metric. `cargo test --release --test all -- --ignored 50_000 --nocapture`
#[test]
#[ignore = "a measurement, for a quiet machine and a release build"]
#[expect(clippy::print_stdout, reason = "it is what the measurement is for")]
fn measures_of_50_000_answers_take_less_than_10_seconds() {
    for each in [1, 10] {
        let all = answers(50_000 / each, each, 2);
        let start = Instant::now();
        let measures = Measures::of(&all, Resampling::default());
        let seconds = start.elapsed().as_secs_f64();
        println!("{each} answers to a question: {seconds:.2} s on {} threads", rayon::current_num_threads());
        assert!(measures.get("brier").unwrap().interval.is_some() && seconds < 10.0);
    }
}
