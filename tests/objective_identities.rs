//! What must hold of every objective: its coefficients are its derivative, micro-batches add up, masked positions and
//! only they may hold anything, and the special cases that one loss is of another.

use candor::objective::{
    Counts, Implicit, Importance, ImportanceLevel, ImportanceMode, Judged, JudgedLoss, KlEstimator, LossMean, Metrics,
    Objective, Pair, PolicyGradient, PolicyLoss, Preference, PreferenceLoss, Ratio, demonstration, judged,
    policy_gradient, preference,
};
use candor::random::SplitMix64;

use crate::check::{all_close, close};
use crate::objective::{PLAIN, Row, counts, prefer, sampled};

const MAX_TOKENS: usize = 8;

/// Seven completions of one to six tokens with some masked, the fourth wholly.
fn rows(seed: u64) -> Vec<Row> {
    let mut random = SplitMix64::new(seed);
    let row = |index: usize| {
        let length = 1 + random.below(6);
        let logprobs = (0..length).map(|_| -3.0 * random.next_f64()).collect::<Vec<_>>();
        let mut near = |spread: f64| logprobs.iter().map(|l| l + spread * (random.next_f64() - 0.5)).collect();
        let (behavior, reference) = (near(1.5), near(1.0));
        let mask = (0..length).map(|t| index != 3 && (t == 0 || random.next_f64() < 0.7)).collect();
        Row { logprobs, behavior, reference, mask, advantage: 2.0 * random.next_f64() - 1.0 }
    };
    (0..7).map(row).collect()
}

/// Every combination of settings that is allowed.
fn all_settings() -> Vec<PolicyGradient> {
    let mut all = Vec::new();
    for policy_loss in [PolicyLoss::Clip, PolicyLoss::Cispo, PolicyLoss::Prime] {
        for ratio in [Ratio::Token, Ratio::Sequence] {
            for loss_mean in [LossMean::Token, LossMean::Sequence, LossMean::Constant] {
                for level in [ImportanceLevel::None, ImportanceLevel::Token, ImportanceLevel::Sequence] {
                    for mode in [ImportanceMode::Truncate, ImportanceMode::Mask] {
                        for kl_estimator in [KlEstimator::K3, KlEstimator::Unbiased] {
                            for delta in [None, Some(1.4)] {
                                let importance = Importance { level, mode, max: 1.2 };
                                let clip = [0.1, 0.15];
                                let kl = 0.3;
                                let settings = PolicyGradient {
                                    policy_loss,
                                    ratio,
                                    clip,
                                    delta,
                                    loss_mean,
                                    importance,
                                    kl,
                                    kl_estimator,
                                };
                                all.extend(settings.check().is_ok().then_some(settings));
                            }
                        }
                    }
                }
            }
        }
    }
    all
}

/// The loss written down once more, with what is detached computed from `fixed` instead of `logprobs`.
fn written_out(rows: &[Row], logprobs: &[Vec<f64>], settings: &PolicyGradient, counts: &Counts) -> f64 {
    let mut loss = 0.0;
    for (row, logprobs) in rows.iter().zip(logprobs) {
        let fixed = &row.logprobs;
        let live = (0..row.mask.len()).filter(|&t| row.mask[t]).collect::<Vec<_>>();
        let old = if settings.importance.level == ImportanceLevel::None { &row.behavior } else { fixed };
        let total = |new: &[f64], old: &[f64]| live.iter().map(|&t| new[t] - old[t]).sum::<f64>();
        for &t in &live {
            let ratio_of = |new: &[f64]| match settings.ratio {
                Ratio::Token => (new[t] - old[t]).exp(),
                Ratio::Sequence => (total(new, old) / live.len() as f64).exp(),
            };
            let (ratio, a, [low, high]) = (ratio_of(logprobs), row.advantage, settings.clip);
            let policy = match settings.policy_loss {
                PolicyLoss::Clip => {
                    let bounded = ratio.min(settings.delta.unwrap_or(f64::INFINITY));
                    -(bounded * a).min(ratio.clamp(1.0 - low, 1.0 + high) * a)
                }
                PolicyLoss::Cispo => -ratio_of(fixed).min(1.0 + high) * a * logprobs[t],
                PolicyLoss::Prime => {
                    let moved = fixed[t].exp() - row.behavior[t].exp();
                    let dropped = if a > 0.0 { moved > high } else { moved < -low };
                    let square = 0.001 * (logprobs[t] - row.behavior[t]).powi(2);
                    if dropped { square } else { square - a * ratio }
                }
            };
            let weight = match settings.importance.level {
                ImportanceLevel::None => 1.0,
                ImportanceLevel::Token => (fixed[t] - row.behavior[t]).exp(),
                ImportanceLevel::Sequence => total(fixed, &row.behavior).exp(),
            };
            let weight = match settings.importance.mode {
                _ if settings.importance.level == ImportanceLevel::None => 1.0,
                ImportanceMode::Truncate => weight.min(settings.importance.max),
                ImportanceMode::Mask => {
                    if weight > settings.importance.max {
                        0.0
                    } else {
                        weight
                    }
                }
            };
            let u = row.reference[t] - logprobs[t];
            let k3 = u.exp() - u - 1.0;
            let kl = if settings.kl_estimator == KlEstimator::Unbiased { k3 * ratio } else { k3 };
            let divisor = match settings.loss_mean {
                LossMean::Token => counts.tokens,
                LossMean::Sequence => counts.sequences * live.len() as f64,
                LossMean::Constant => counts.sequences * counts.max_tokens,
            };
            loss += (weight * policy + settings.kl * kl) / divisor;
        }
    }
    loss
}

/// ∂f/∂ℓ by central differences.
fn differences(rows: &[Row], f: impl Fn(&[Vec<f64>]) -> f64) -> Vec<Vec<f64>> {
    let step = 1e-5;
    let base = rows.iter().map(|row| row.logprobs.clone()).collect::<Vec<_>>();
    let at = |row: usize, t: usize, by: f64| {
        let mut moved = base.clone();
        moved[row][t] += by;
        f(&moved)
    };
    let slope = |row: usize, t: usize| (at(row, t, step) - at(row, t, -step)) / (2.0 * step);
    (0..rows.len()).map(|row| (0..base[row].len()).map(|t| slope(row, t)).collect()).collect()
}

fn same_gradient(name: &str, got: &Objective, want: &[Vec<f64>]) {
    for (index, (got, want)) in got.coefficients.iter().zip(want).enumerate() {
        all_close(&format!("{name}, sequence {index}"), got, want, 1e-8);
    }
}

fn with_logprobs(rows: &[Row], logprobs: &[Vec<f64>]) -> Vec<Row> {
    rows.iter().zip(logprobs).map(|(row, logprobs)| Row { logprobs: logprobs.clone(), ..row.clone() }).collect()
}

#[test]
fn policy_gradient_is_its_derivative() {
    let all = all_settings();
    assert!(all.len() > 150, "{} combinations", all.len());
    for (settings, seed) in all.iter().flat_map(|settings| (1..=4).map(move |seed| (settings, seed))) {
        let rows = rows(seed);
        let counts = counts(&rows, MAX_TOKENS);
        let got = policy_gradient(&sampled(&rows), settings, &counts).unwrap();
        let loss = |logprobs: &[Vec<f64>]| written_out(&rows, logprobs, settings, &counts);
        let name = format!("seed {seed}, {settings:?}");
        let here = rows.iter().map(|row| row.logprobs.clone()).collect::<Vec<_>>();
        close(&name, got.loss, loss(&here), 1e-13);
        same_gradient(&name, &got, &differences(&rows, loss));
    }
}

#[test]
fn demonstration_is_its_derivative() {
    for mean in [LossMean::Token, LossMean::Sequence, LossMean::Constant] {
        let rows = rows(6);
        let counts = counts(&rows, MAX_TOKENS);
        let objective =
            |rows: &[Row]| demonstration(&rows.iter().map(Row::sequence).collect::<Vec<_>>(), mean, &counts).unwrap();
        let want = differences(&rows, |logprobs| objective(&with_logprobs(&rows, logprobs)).loss);
        same_gradient(&format!("{mean:?}"), &objective(&rows), &want);
    }
}

#[test]
fn judged_is_its_derivative() {
    // The last row is likely enough, at λ = 2, to be beyond the steepest slope: p > 5/7.
    let mut rows = rows(7).into_iter().filter(|row| row.mask.contains(&true)).collect::<Vec<_>>();
    rows.last_mut().unwrap().logprobs.iter_mut().for_each(|logprob| *logprob = -0.05);
    let counts = counts(&rows, MAX_TOKENS);
    for loss in [JudgedLoss::Mse, JudgedLoss::Log] {
        for (lambda, lm_on_correct_only) in [(0.1, true), (2.0, true), (2.0, false)] {
            let settings = Implicit { loss, lambda, lm_on_correct_only };
            let objective = |rows: &[Row]| {
                let row = |(index, row): (usize, &'_ Row)| (row.clone(), index % 2 == 1);
                let rows = rows.iter().enumerate().map(row).collect::<Vec<_>>();
                let batch = rows.iter().map(|(row, correct)| Judged { sequence: row.sequence(), correct: *correct });
                judged(&batch.collect::<Vec<_>>(), &settings, &counts).unwrap()
            };
            let want = differences(&rows, |logprobs| objective(&with_logprobs(&rows, logprobs)).loss);
            same_gradient(&format!("{settings:?}"), &objective(&rows), &want);
        }
    }
}

#[test]
fn preference_is_its_derivative() {
    let rows = rows(8).into_iter().filter(|row| row.mask.contains(&true)).take(6).collect::<Vec<_>>();
    let pairs_of = |rows: &[Row]| rows.chunks(2).map(|pair| [pair[0].clone(), pair[1].clone()]).collect::<Vec<_>>();
    let cases = [
        (PreferenceLoss::Sigmoid, 0.0),
        (PreferenceLoss::Smoothed, 0.1),
        (PreferenceLoss::Robust, 0.1),
        (PreferenceLoss::Ipo, 0.0),
        (PreferenceLoss::IpoMean, 0.0),
        (PreferenceLoss::Hinge, 0.0),
    ];
    for (loss, smoothing) in cases {
        let settings = Preference { loss, beta: 0.5, smoothing };
        let want = differences(&rows, |logprobs| prefer(&pairs_of(&with_logprobs(&rows, logprobs)), &settings).loss);
        same_gradient(&format!("{loss:?}"), &prefer(&pairs_of(&rows), &settings), &want);
    }
}

/// Adds up the objectives of micro-batches.
fn joined(parts: Vec<Objective>) -> Objective {
    let mut whole = Objective { loss: 0.0, coefficients: Vec::new(), metrics: Metrics::default() };
    for part in parts {
        whole.loss += part.loss;
        whole.coefficients.extend(part.coefficients);
        whole.metrics.merge(part.metrics);
    }
    whole
}

#[test]
fn micro_batches_add_up() {
    let rows = rows(9);
    let counts = counts(&rows, MAX_TOKENS);
    let same = |name: &str, whole: Objective, parts: Vec<Objective>| {
        let joined = joined(parts);
        close(name, joined.loss, whole.loss, 1e-14);
        assert_eq!(joined.coefficients, whole.coefficients, "{name}");
        for (metric, want) in whole.metrics.values() {
            close(&format!("{name}: {metric}"), joined.metrics.values()[metric], want, 1e-14);
        }
    };
    for size in [1, 3, 5] {
        for settings in all_settings() {
            let batch = sampled(&rows);
            let run = |batch: &[_]| policy_gradient(batch, &settings, &counts).unwrap();
            same(&format!("{settings:?}"), run(&batch), batch.chunks(size).map(run).collect());
        }
        let batch = rows.iter().map(Row::sequence).collect::<Vec<_>>();
        let run = |batch: &[_]| demonstration(batch, LossMean::Token, &counts).unwrap();
        same("demonstration", run(&batch), batch.chunks(size).map(run).collect());

        let live = batch.iter().filter(|sequence| sequence.mask_t.contains(&true));
        let batch = live.map(|&sequence| Judged { sequence, correct: true }).collect::<Vec<_>>();
        let settings = Implicit { loss: JudgedLoss::Mse, lambda: 1.0, lm_on_correct_only: true };
        let run = |batch: &[_]| judged(batch, &settings, &counts).unwrap();
        same("judged", run(&batch), batch.chunks(size).map(run).collect());

        let batch = batch.chunks_exact(2).map(|two| Pair { chosen: two[0].sequence, rejected: two[1].sequence });
        let settings = Preference { loss: PreferenceLoss::Sigmoid, beta: 0.1, smoothing: 0.0 };
        let run = |batch: &[_]| preference(batch, &settings, &counts).unwrap();
        let batch = batch.collect::<Vec<_>>();
        same("preference", run(&batch), batch.chunks(size).map(run).collect());
    }
}

#[test]
fn masked_positions_hold_anything() {
    let clean = rows(10);
    let counts = counts(&clean, MAX_TOKENS);
    for garbage in [f64::NAN, f64::NEG_INFINITY, f64::INFINITY, 1e300] {
        let spoiled = clean.iter().map(|row| {
            let spoil = |values: &[f64]| {
                values.iter().zip(&row.mask).map(|(&value, &live)| if live { value } else { garbage }).collect()
            };
            Row {
                logprobs: spoil(&row.logprobs),
                behavior: spoil(&row.behavior),
                reference: spoil(&row.reference),
                ..row.clone()
            }
        });
        let spoiled = spoiled.collect::<Vec<_>>();
        for settings in all_settings() {
            let want = policy_gradient(&sampled(&clean), &settings, &counts).unwrap();
            assert!(want.loss.is_finite() && want.coefficients.iter().flatten().all(|w| w.is_finite()));
            assert_eq!(policy_gradient(&sampled(&spoiled), &settings, &counts).unwrap(), want, "{settings:?}");
        }
        let sequences = |rows: &[Row]| {
            let sequences = rows.iter().map(Row::sequence).collect::<Vec<_>>();
            demonstration(&sequences, LossMean::Sequence, &counts).unwrap()
        };
        assert_eq!(sequences(&spoiled), sequences(&clean));
    }
}

type Change<'a> = &'a dyn Fn(&mut Row);

#[test]
fn numbers_in_use_must_be_finite() {
    let clean = rows(11);
    let counts = counts(&clean, MAX_TOKENS);
    let index = clean.iter().position(|row| row.mask.len() > 2 && row.mask[2]).expect("a row of three tokens");
    let message = |change: Change| {
        let mut rows = clean.clone();
        change(&mut rows[index]);
        let error = policy_gradient(&sampled(&rows), &PolicyGradient { kl: 0.1, ..PLAIN }, &counts).unwrap_err();
        format!("{error:#}")
    };
    let here = format!("sequence {index}: token 2: ");
    let cases: [(Change, &str); 5] = [
        (&|row| row.logprobs[2] = f64::NAN, "the learner log-probability is NaN"),
        (&|row| row.behavior[2] = f64::NEG_INFINITY, "the behavior log-probability is -inf"),
        (&|row| row.reference[2] = f64::NAN, "the reference log-probability is NaN"),
        (&|row| row.behavior[2] = -1e4, "the loss overflows"),
        (&|row| row.reference[2] = 1e4, "the loss overflows"),
    ];
    for (change, want) in cases {
        let got = message(change);
        assert!(got.starts_with(&format!("{here}{want}")), "{got}");
    }
    let got = message(&|row| row.advantage = f64::NAN);
    assert_eq!(got, format!("sequence {index}: the advantage is NaN"));
    let got = message(&|row| row.behavior.truncate(1));
    assert!(got.contains("behavior log-probabilities for a mask of"), "{got}");
}

#[test]
fn settings_that_mean_nothing_are_errors() {
    let rows = rows(12);
    let counts = counts(&rows, MAX_TOKENS);
    let mut batch = sampled(&rows);
    batch[0].sequence.reference_t = None;
    let error = policy_gradient(&batch, &PolicyGradient { kl: 0.1, ..PLAIN }, &counts).unwrap_err();
    assert_eq!(format!("{error:#}"), "sequence 0: kl is 0.1 but there is no reference");
    assert!(policy_gradient(&batch, &PLAIN, &counts).is_ok());

    let sequence_weights = Importance { level: ImportanceLevel::Sequence, ..PLAIN.importance };
    let bad = [
        PolicyGradient { clip: [1.5, 0.2], ..PLAIN },
        PolicyGradient { clip: [0.2, f64::NAN], ..PLAIN },
        PolicyGradient { kl: -0.1, ..PLAIN },
        PolicyGradient { importance: Importance { max: 0.0, ..PLAIN.importance }, ..PLAIN },
        PolicyGradient { delta: Some(1.1), ..PLAIN },
        PolicyGradient { delta: Some(2.0), policy_loss: PolicyLoss::Cispo, ..PLAIN },
        PolicyGradient { policy_loss: PolicyLoss::Prime, ratio: Ratio::Sequence, ..PLAIN },
        PolicyGradient { policy_loss: PolicyLoss::Prime, importance: sequence_weights, ..PLAIN },
    ];
    for settings in bad {
        assert!(settings.check().is_err(), "{settings:?}");
    }
    let smoothing = |loss, smoothing| Preference { loss, beta: 0.1, smoothing }.check();
    assert!(smoothing(PreferenceLoss::Sigmoid, 0.1).is_err());
    assert!(smoothing(PreferenceLoss::Robust, 0.5).is_err());
    assert!(smoothing(PreferenceLoss::Smoothed, 0.1).is_ok());
    assert!(Implicit { loss: JudgedLoss::Log, lambda: 0.0, lm_on_correct_only: true }.check().is_err());

    let masked = Row { mask: vec![false; rows[0].mask.len()], ..rows[0].clone() };
    let settings = Preference { loss: PreferenceLoss::Ipo, beta: 0.1, smoothing: 0.0 };
    let pair = [Pair { chosen: rows[0].sequence(), rejected: masked.sequence() }];
    let error = preference(&pair, &settings, &counts).unwrap_err();
    assert_eq!(format!("{error:#}"), "pair 0, rejected: no token to compare");
}

#[test]
fn on_policy_loss_is_the_length_weighted_advantage() {
    let mut rows = rows(13);
    rows.iter_mut().for_each(|row| row.behavior = row.logprobs.clone());
    let lengths = rows.iter().map(|row| row.mask.iter().filter(|live| **live).count() as f64).collect::<Vec<_>>();
    let got = policy_gradient(&sampled(&rows), &PLAIN, &counts(&rows, MAX_TOKENS)).unwrap();
    let want = rows.iter().zip(&lengths).map(|(row, length)| row.advantage * length).sum::<f64>();
    close("loss", got.loss, -want / lengths.iter().sum::<f64>(), 1e-14);
    let metrics = got.metrics.values();
    for (name, want) in [("ratio/mean", 1.0), ("ratio/max", 1.0), ("mismatch/k3", 0.0), ("mismatch/max", 0.0)] {
        assert_eq!(metrics[name], want, "{name}");
    }
}

#[test]
fn fine_tuning_is_one_rollout_with_advantage_one() {
    let mut rows = rows(14);
    rows.iter_mut().for_each(|row| (row.behavior, row.advantage) = (row.logprobs.clone(), 1.0));
    let counts = counts(&rows, MAX_TOKENS);
    let sequences = rows.iter().map(Row::sequence).collect::<Vec<_>>();
    for loss_mean in [LossMean::Token, LossMean::Sequence, LossMean::Constant] {
        let want = demonstration(&sequences, loss_mean, &counts).unwrap();
        for policy_loss in [PolicyLoss::Clip, PolicyLoss::Cispo, PolicyLoss::Prime] {
            let settings = PolicyGradient { policy_loss, loss_mean, ..PLAIN };
            let got = policy_gradient(&sampled(&rows), &settings, &counts).unwrap();
            assert_eq!(got.coefficients, want.coefficients, "{settings:?}");
            if policy_loss == PolicyLoss::Cispo {
                close("loss", got.loss, want.loss, 1e-14);
            }
        }
    }
}

/// A completion with no token masked.
fn row(logprobs: &[f64], behavior: &[f64], advantage: f64) -> Row {
    let reference = vec![-1.0; logprobs.len()];
    let mask = vec![true; logprobs.len()];
    Row { logprobs: logprobs.to_vec(), behavior: behavior.to_vec(), reference, mask, advantage }
}

#[test]
fn judged_leaves_out_the_likelihood_of_wrong_completions_only() {
    let row = row(&[-1.0, -0.5], &[], 0.0);
    let one = Counts { tokens: 2.0, sequences: 1.0, max_tokens: 2.0 };
    let p = (-0.75f64).exp();
    for (correct, miss, likelihood) in [(true, p - 1.0, 0.75), (false, p, 0.0)] {
        let settings = Implicit { loss: JudgedLoss::Mse, lambda: 0.1, lm_on_correct_only: true };
        let got = judged(&[Judged { sequence: row.sequence(), correct }], &settings, &one).unwrap();
        close("loss", got.loss, likelihood + 0.1 * miss * miss, 1e-14);
        let name = if correct { "likelihood/correct" } else { "likelihood/wrong" };
        assert_eq!(got.metrics.values().into_iter().collect::<Vec<_>>(), [(name, p)]);
    }
}

#[test]
fn likely_wrong_completions_are_pushed_down_with_a_bounded_slope() {
    let settings = Implicit { loss: JudgedLoss::Log, lambda: 0.1, lm_on_correct_only: true };
    let one = Counts { tokens: 1.0, sequences: 1.0, max_tokens: 1.0 };
    let at = |logprob: f64| {
        let row = row(&[logprob], &[], 0.0);
        let got = judged(&[Judged { sequence: row.sequence(), correct: false }], &settings, &one).unwrap();
        (got.loss, got.coefficients[0][0])
    };
    assert!(at(-0.5).1 > 0.0, "without its likelihood in the loss, a wrong completion only becomes less likely");
    let (loss, slope) = at(0.0);
    assert!(loss.is_finite() && slope == 5.0, "certain and wrong: loss {loss}, slope {slope}");
    let edge = (5.0f64 / 5.1).ln();
    close("continuous", at(edge - 1e-12).0, at(edge + 1e-12).0, 1e-10);
    close("smooth", at(edge - 1e-12).1, at(edge + 1e-12).1, 1e-8);
}

#[test]
fn metrics_say_what_happened() {
    // Probabilities 0.6 and 0.3, sampled at 0.3 and 0.55: the first token doubled, the second lost nearly half.
    let up = [0.6f64.ln(), 0.3f64.ln()];
    let down = [0.3f64.ln(), 0.55f64.ln()];
    let metrics = |settings: PolicyGradient, advantages: &[f64]| {
        let rows = advantages.iter().map(|&advantage| row(&up, &down, advantage)).collect::<Vec<_>>();
        policy_gradient(&sampled(&rows), &settings, &counts(&rows, 2)).unwrap().metrics.values()
    };
    let plain = metrics(PLAIN, &[1.0, -1.0]);
    let k3 = |u: f64| u.exp() - u - 1.0;
    let gaps = [up[0] - down[0], up[1] - down[1]];
    let want = [
        ("clip/high", 0.25),
        ("clip/low", 0.25),
        ("kl", (k3(-1.0 - up[0]) + k3(-1.0 - up[1])) / 2.0),
        ("mismatch/k3", (k3(gaps[0]) + k3(gaps[1])) / 2.0),
        ("mismatch/masked", 0.0),
        ("mismatch/max", gaps[0]),
        ("mismatch/mean", (gaps[0] - gaps[1]) / 2.0),
        ("ratio/max", 2.0),
        ("ratio/mean", (2.0 + 0.3 / 0.55) / 2.0),
    ];
    assert_eq!(plain.keys().copied().collect::<Vec<_>>(), want.map(|(name, _)| name));
    for (name, want) in want {
        close(name, plain[name], want, 1e-14);
    }
    let cispo = metrics(PolicyGradient { policy_loss: PolicyLoss::Cispo, ..PLAIN }, &[1.0, -1.0]);
    assert_eq!((cispo["clip/high"], cispo["clip/low"]), (0.5, 0.0));
    let prime = PolicyGradient { policy_loss: PolicyLoss::Prime, ..PLAIN };
    assert_eq!(metrics(prime, &[1.0, -1.0])["mismatch/masked"], 0.5);
    let importance = Importance { level: ImportanceLevel::Token, mode: ImportanceMode::Mask, max: 1.5 };
    assert_eq!(metrics(PolicyGradient { importance, ..PLAIN }, &[1.0, -1.0])["mismatch/masked"], 0.5);
    let together = metrics(PolicyGradient { ratio: Ratio::Sequence, ..PLAIN }, &[1.0]);
    close("the ratio of a sequence", together["ratio/max"], (0.6f64 / 0.55).sqrt(), 1e-14);
    close("the gap of its tokens", together["mismatch/max"], gaps[0], 1e-14);

    let one = row(&[-1.0, -0.5], &[], 0.0);
    let imitated = demonstration(&[one.sequence()], LossMean::Token, &counts(std::slice::from_ref(&one), 2)).unwrap();
    assert_eq!(imitated.metrics.values()["logps/mean"], -0.75);
    let other = row(&[-2.0, -2.5], &[], 0.0);
    let settings = Preference { loss: PreferenceLoss::Sigmoid, beta: 0.1, smoothing: 0.0 };
    let preferred = prefer(&[[one, other]], &settings).metrics.values();
    assert_eq!((preferred["logps/chosen"], preferred["logps/rejected"]), (-1.5, -4.5));
}

#[test]
fn metrics_merge_by_their_own_denominators() {
    let mut all = Metrics::default();
    all.mean("share", 1.0, 1.0);
    all.max("most", 3.0);
    let mut more = Metrics::default();
    more.mean("share", 0.0, 3.0);
    more.mean("nothing", 0.0, 0.0);
    more.max("most", 2.0);
    all.merge(more);
    assert_eq!(all.values().into_iter().collect::<Vec<_>>(), [("most", 3.0), ("share", 0.25)]);
}
