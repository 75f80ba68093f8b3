//! The head, from hidden state to the log-probability of a token and to the next token, against full logits in f64.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::ops::log_softmax;
use candor::ops::head::{Choice, Chosen, Logits, choose, log_probabilities};

use crate::check;
use crate::model::values;
use crate::ops::{check_op, error, narrowed, random};

/// Log-probabilities [rows, vocabulary] at a temperature, by full logits.
fn slow_logprobs(hidden: &Tensor, weight: &Tensor, logits: Logits) -> Result<Tensor> {
    let mut z = hidden.matmul(&weight.t()?)?;
    if let Some(cap) = logits.soft_cap.map(f64::from) {
        z = ((z / cap)?.tanh()? * cap)?;
    }
    log_softmax(&(z / f64::from(logits.temperature))?, 1)
}

/// f32 settings that are exact in f64 too.
const LOGITS: [Logits; 4] = [
    Logits { soft_cap: None, temperature: 1.0 },
    Logits { soft_cap: None, temperature: 0.75 },
    Logits { soft_cap: Some(3.0), temperature: 1.0 },
    Logits { soft_cap: Some(3.0), temperature: 1.5 },
];

#[test]
fn log_probabilities_and_entropies() {
    // One chunk of the vocabulary and one token more, or two and a part; one block of rows and 44 more.
    for (rows, vocabulary) in [(1, 1), (17, 2), (33, 300), (7, 20_000), (300, 8193)] {
        let (hidden, weight) = (random(1, (rows, 12)), random(2, (vocabulary, 12)));
        let targets: Vec<u32> = (0..rows).map(|row| ((vocabulary - 1) * (row + 1) / rows) as u32).collect();
        let weight32 = narrowed(&weight);
        for logits in LOGITS.into_iter().take(if rows == 300 { 1 } else { 4 }) {
            let name = format!("head, {rows} rows, {vocabulary} tokens, {logits:?}");
            let index = Tensor::new(targets.as_slice(), &Device::Cpu).unwrap().unsqueeze(1).unwrap();
            let chosen = |x: &[Tensor]| slow_logprobs(&x[0], &weight, logits)?.gather(&index, 1)?.flatten_all();
            let fused = |x: &[Tensor]| Ok(log_probabilities(&x[0], &weight32, &targets, logits)?.logprobs);
            check_op(&name, std::slice::from_ref(&hidden), fused, chosen);
            let logprobs = slow_logprobs(&hidden, &weight, logits).unwrap();
            let entropies = (logprobs.exp().unwrap() * &logprobs).unwrap().sum(1).unwrap().neg().unwrap();
            let got = log_probabilities(&narrowed(&hidden), &weight32, &targets, logits).unwrap().entropies;
            let got: Vec<f64> = got.into_iter().map(f64::from).collect();
            check::all_close(&format!("{name}, entropy"), &got, &values(&entropies), 2e-6);
        }
    }
}

/// Logits may be large and all alike: what counts are their differences.
#[test]
fn an_entropy_does_not_depend_on_the_size_of_the_logits() {
    let weight: Vec<f32> = (0..3000).flat_map(|token| [1.0, (token % 7) as f32 * 0.25]).collect();
    let weight = Tensor::from_vec(weight, (3000, 2), &Device::Cpu).unwrap();
    let entropies = |offset: f32, slope: f32| {
        let hidden = Tensor::from_vec(vec![offset, slope], (1, 2), &Device::Cpu).unwrap();
        log_probabilities(&hidden, &weight, &[0], LOGITS[0]).unwrap().entropies[0]
    };
    for slope in [1.0, 8.0] {
        let want = f64::from(entropies(0.0, slope));
        for offset in [64.0, 512.0, -512.0] {
            check::close(&format!("entropy at offset {offset}"), f64::from(entropies(offset, slope)), want, 1e-6);
        }
    }
}

/// Chooses once per choice from one distribution, given by its logits.
fn choose_from(logits_v: &[f32], choices: &[Choice], logits: Logits) -> Result<Vec<Chosen>> {
    let weight = Tensor::from_slice(logits_v, (logits_v.len(), 1), &Device::Cpu)?;
    choose(&Tensor::ones((choices.len(), 1), DType::F32, &Device::Cpu)?, &weight, choices, logits)
}

#[test]
fn chosen_tokens_come_with_their_log_probabilities() {
    let (rows, vocabulary) = (70, 8193);
    let (hidden, weight) = (random(1, (rows, 12)), random(2, (vocabulary, 12)));
    for logits in LOGITS {
        let place = |row: usize| Choice::Sample((row as f64 + 0.5) / rows as f64);
        let choices: Vec<Choice> = (0..rows)
            .map(|row| if row % 5 == 4 && logits.temperature == 1.0 { Choice::Greedy } else { place(row) })
            .collect();
        let chosen = choose(&narrowed(&hidden), &narrowed(&weight), &choices, logits).unwrap();
        let tempered = slow_logprobs(&hidden, &weight, logits).unwrap().to_vec2::<f64>().unwrap();
        let untempered =
            slow_logprobs(&hidden, &weight, Logits { temperature: 1.0, ..logits }).unwrap().to_vec2::<f64>().unwrap();
        for (row, (chosen, choice)) in chosen.iter().zip(&choices).enumerate() {
            let token = chosen.token as usize;
            let name = format!("row {row}, {choice:?}, {logits:?}");
            check::close(&name, f64::from(chosen.logprob), tempered[row][token], 2e-6);
            check::close(&name, f64::from(chosen.untempered), untempered[row][token], 2e-6);
            match choice {
                Choice::Greedy => {
                    assert!(tempered[row].iter().all(|other| *other <= tempered[row][token] + 1e-6), "{name}")
                }
                Choice::Sample(place) => {
                    let below: f64 = tempered[row][..token].iter().map(|logprob| logprob.exp()).sum();
                    let with = below + tempered[row][token].exp();
                    assert!(
                        below - 1e-6 <= *place && *place <= with + 1e-6,
                        "{name}: {place} is not in {below}..{with}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_greedy_choice_is_the_lowest_of_the_most_likely() {
    let mut logits_v = vec![0.5; 8200];
    for ties in [vec![8195], vec![8191, 8192, 8199], vec![7, 30, 8199]] {
        logits_v.fill(0.5);
        ties.iter().for_each(|&token| logits_v[token] = 2.0);
        let chosen = choose_from(&logits_v, &[Choice::Greedy], LOGITS[0]).unwrap();
        assert_eq!(chosen[0].token as usize, ties[0]);
    }
    logits_v.fill(0.5);
    assert_eq!(choose_from(&logits_v, &[Choice::Greedy], LOGITS[0]).unwrap()[0].token, 0);
}

/// With N evenly spaced places, every token is chosen N·p times, give or take the two ends of its interval: sharper than any
/// test on random places, and independent of luck. Random places are those of `random`, tested there.
#[test]
fn sampled_frequencies_are_the_softmax() {
    const N: usize = 20_000;
    let logits_v = [0.3f32, -2.0, 1.7, 1.7, 0.0, -6.0, 0.9];
    let choices: Vec<Choice> = (0..N).map(|i| Choice::Sample((i as f64 + 0.5) / N as f64)).collect();
    for temperature in [1.0, 0.7, 2.0] {
        let mut counts = [0.0; 7];
        for chosen in choose_from(&logits_v, &choices, Logits { soft_cap: None, temperature }).unwrap() {
            counts[chosen.token as usize] += 1.0;
        }
        let weights = logits_v.map(|z| (f64::from(z) / f64::from(temperature)).exp());
        for (token, (count, weight)) in counts.iter().zip(weights).enumerate() {
            let expected = N as f64 * weight / weights.iter().sum::<f64>();
            assert!(
                (count - expected).abs() <= 1.1,
                "token {token} at {temperature}: {count} times, expected {expected}"
            );
        }
    }
}

#[test]
fn the_ends_of_the_cumulative_distribution_are_possible_tokens() {
    let choices = [Choice::Sample(0.0), Choice::Sample(0.999_999_999), Choice::Sample(1.0 - f64::EPSILON / 2.0)];
    let tokens = |logits_v: &[f32]| -> Vec<u32> {
        choose_from(logits_v, &choices, LOGITS[0]).unwrap().iter().map(|chosen| chosen.token).collect()
    };
    assert_eq!(tokens(&[0.2, 0.1, 0.3]), [0, 2, 2]);
    assert_eq!(tokens(&[-200.0, 0.2, 0.1, 0.3, -200.0]), [1, 3, 3]);
    let mut many = vec![-200.0f32; 20_000];
    many[100..19_000].iter_mut().enumerate().for_each(|(i, z)| *z = (i % 17) as f32 * 0.3);
    assert_eq!(tokens(&many), [100, 18_999, 18_999]);
    assert_eq!(tokens(&[3.0]), [0, 0, 0]);
}

#[test]
fn a_distribution_that_is_not_finite_is_an_error_with_its_row() {
    let weight = narrowed(&random(1, (300, 2)));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for choice in [Choice::Greedy, Choice::Sample(0.5)] {
            for temperature in [1.0, 0.7] {
                let hidden = Tensor::new(&[[0.1f32, 0.2], [0.3, bad], [0.5, 0.6]], &Device::Cpu).unwrap();
                let logits = Logits { soft_cap: None, temperature };
                let message = error(choose(&hidden, &weight, &[choice; 3], logits));
                assert!(message.contains("row 1 "), "{bad}, {choice:?}: {message}");
            }
        }
        let mut logits_v = [0.5, 0.25, bad];
        assert_eq!(choose_from(&logits_v, &[Choice::Sample(0.1)], LOGITS[0]).is_err(), bad != f32::NEG_INFINITY);
        logits_v.fill(bad);
        assert!(choose_from(&logits_v, &[Choice::Greedy], LOGITS[0]).is_err(), "{logits_v:?}");
    }
}

#[test]
fn shapes_and_targets_that_do_not_fit_are_errors() {
    let x = |rows, width| narrowed(&random(1, (rows, width)));
    let (w, logits) = (x(7, 5), LOGITS[0]);
    assert!(error(log_probabilities(&x(2, 5), &w, &[0], logits)).contains("1 targets for 2 rows"));
    assert!(error(log_probabilities(&x(2, 5), &w, &[0, 7], logits)).contains("token 7 is outside the vocabulary of 7"));
    error(log_probabilities(&x(2, 7), &w, &[0, 1], logits));
    assert!(error(choose(&x(2, 5), &w, &[Choice::Greedy], logits)).contains("1 choices for 2 rows"));
    error(choose(&x(2, 7), &w, &[Choice::Greedy; 2], logits));
}
