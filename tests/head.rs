//! The head, from hidden state to the log-probability of a token and to the next token, against full logits in f64.

use candle_core::{Device, Result, Tensor};
use candle_nn::ops::log_softmax;
use candor::config::Dtype;
use candor::ops::head::{Choice, Chosen, Logits, choose, log_probabilities, log_probabilities_backward};
use candor::ops::kernel::Kernel;
use candor::ops::panels::Panels;

use crate::check;
use crate::model::values;
use crate::ops::{Computed, check_op, floats, random};

/// Log-probabilities [rows, vocabulary] at a temperature, by full logits.
fn slow_logprobs(hidden: &Tensor, weight: &Tensor, logits: Logits) -> Result<Tensor> {
    let mut z = hidden.matmul(&weight.t()?)?;
    if let Some(cap) = logits.soft_cap.map(f64::from) {
        z = ((z / cap)?.tanh()? * cap)?;
    }
    log_softmax(&(z / f64::from(logits.temperature))?, 1)
}

/// The head's weight [vocabulary, width].
fn packed(weight: &[f32], width: usize) -> Panels {
    Panels::pack(weight, width, check::f32_kernel())
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
        for (logits, kernel) in LOGITS
            .into_iter()
            .take(if rows == 300 { 1 } else { 4 })
            .flat_map(|logits| f32_kernels().map(move |kernel| (logits, kernel)))
        {
            let name = format!("head, {rows} rows, {vocabulary} tokens, {logits:?}, {kernel:?}");
            let packed = Panels::pack(&floats(&weight), 12, kernel);
            let index = Tensor::new(targets.as_slice(), &Device::Cpu).unwrap().unsqueeze(1).unwrap();
            let chosen = |x: &[Tensor]| slow_logprobs(&x[0], &weight, logits)?.gather(&index, 1)?.flatten_all();
            let (packed, targets) = (&packed, &targets);
            check_op(&name, std::slice::from_ref(&hidden), |x| head(&x[0], packed, targets, logits), chosen);
            let logprobs = slow_logprobs(&hidden, &weight, logits).unwrap();
            let entropies = (logprobs.exp().unwrap() * &logprobs).unwrap().sum(1).unwrap().neg().unwrap();
            let known = log_probabilities(&floats(&hidden), packed, targets, logits, None).unwrap();
            let got: Vec<f64> = known.entropies().map(f64::from).collect();
            check::all_close(&format!("{name}, entropy"), &got, &values(&entropies), 2e-6);
        }
    }
}

fn f32_kernels() -> impl Iterator<Item = Kernel> {
    check::kernels().into_iter().filter(|kernel| kernel.dtype() == Dtype::F32)
}

/// Log-probabilities, and the gradient of the hidden states.
fn head<'a>(hidden: &[f32], weight: &'a Panels, targets: &'a [u32], logits: Logits) -> Computed<'a> {
    let mut others = vec![0.0; hidden.len()];
    let known = log_probabilities(hidden, weight, targets, logits, Some(&mut others)).unwrap();
    let value = known.logprobs.clone();
    let backward = move |grad: &[f32]| {
        let mut others = others.clone();
        log_probabilities_backward(&mut others, weight, targets, logits, &known, grad);
        vec![others]
    };
    Computed { value, backward: Box::new(backward) }
}

/// What is left of 1 − p for a token that was nearly certain decides its gradient, in bf16 too: would the target's own share of the
/// weights be rounded with the others', the rounding would be several times as large.
#[test]
fn a_nearly_certain_target_keeps_its_gradient() {
    let (vocabulary, width, target) = (3000, 32, 1700);
    // bf16 holds them, so that nothing but the way back is rounded.
    let held =
        |tensor: Tensor| floats(&tensor).into_iter().map(|x| f32::from_bits(x.to_bits() & 0xffff_0000)).collect();
    let hidden: Vec<f32> = held(random(1, (1, width)));
    let mut weight: Vec<f32> = held((random(2, (vocabulary, width)) * 0.2).unwrap());
    let square: f32 = hidden.iter().map(|x| x * x).sum();
    for (weight, x) in weight[target * width..][..width].iter_mut().zip(&hidden) {
        *weight = f32::from_bits((x * 18.0 / square).to_bits() & 0xffff_0000);
    }
    let row = |token: usize| weight[token * width..][..width].iter().map(|&x| f64::from(x));
    let z: Vec<f64> =
        (0..vocabulary).map(|token| row(token).zip(&hidden).map(|(w, &x)| w * f64::from(x)).sum()).collect();
    let total: f64 = z.iter().map(|z| z.exp()).sum();
    let probability = |token: usize| z[token].exp() / total;
    let rest: f64 = (0..vocabulary).filter(|&token| token != target).map(probability).sum();
    assert!((1e-6..1e-3).contains(&rest), "1 - p is {rest:e}");
    let mut want = vec![0.0; width];
    for token in 0..vocabulary {
        let coefficient = if token == target { rest } else { -probability(token) };
        want.iter_mut().zip(row(token)).for_each(|(want, w)| *want += coefficient * w);
    }
    let largest = want.iter().fold(0.0f64, |largest, want| largest.max(want.abs()));
    for kernel in check::kernels() {
        let (packed, mut others) = (Panels::pack(&weight, width, kernel), vec![0.0; width]);
        let known = log_probabilities(&hidden, &packed, &[target as u32], LOGITS[0], Some(&mut others)).unwrap();
        log_probabilities_backward(&mut others, &packed, &[target as u32], LOGITS[0], &known, &[1.0]);
        let got: Vec<f64> = others.iter().map(|&x| f64::from(x) / largest).collect();
        let want: Vec<f64> = want.iter().map(|want| want / largest).collect();
        check::all_close(&format!("{kernel:?}, a nearly certain target"), &got, &want, 1e-2);
    }
}

/// Logits may be large and all alike: what counts are their differences.
#[test]
fn an_entropy_does_not_depend_on_the_size_of_the_logits() {
    let weight: Vec<f32> = (0..3000).flat_map(|token| [1.0, (token % 7) as f32 * 0.25]).collect();
    let weight = packed(&weight, 2);
    let entropies = |offset: f32, slope: f32| {
        log_probabilities(&[offset, slope], &weight, &[0], LOGITS[0], None).unwrap().entropies().next().unwrap()
    };
    for slope in [1.0, 8.0] {
        let want = f64::from(entropies(0.0, slope));
        for offset in [64.0, 512.0, -512.0] {
            check::close(&format!("entropy at offset {offset}"), f64::from(entropies(offset, slope)), want, 1e-6);
        }
    }
}

/// Chooses once per choice from one distribution, given by its logits.
fn choose_from(logits_v: &[f32], choices: &[Choice], logits: Logits) -> anyhow::Result<Vec<Chosen>> {
    choose(&vec![1.0; choices.len()], &packed(logits_v, 1), choices, logits)
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
        let chosen = choose(&floats(&hidden), &packed(&floats(&weight), 12), &choices, logits).unwrap();
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
    let weight = packed(&floats(&random(1, (300, 2))), 2);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for choice in [Choice::Greedy, Choice::Sample(0.5)] {
            for temperature in [1.0, 0.7] {
                let logits = Logits { soft_cap: None, temperature };
                let message = error(choose(&[0.1, 0.2, 0.3, bad, 0.5, 0.6], &weight, &[choice; 3], logits));
                assert!(message.contains("row 1 "), "{bad}, {choice:?}: {message}");
            }
        }
        let mut logits_v = [0.5, 0.25, bad];
        assert_eq!(choose_from(&logits_v, &[Choice::Sample(0.1)], LOGITS[0]).is_err(), bad != f32::NEG_INFINITY);
        logits_v.fill(bad);
        assert!(choose_from(&logits_v, &[Choice::Greedy], LOGITS[0]).is_err(), "{logits_v:?}");
    }
}

#[track_caller]
fn error<T>(result: anyhow::Result<T>) -> String {
    format!("{:#}", result.err().expect("this must be an error"))
}

#[test]
fn targets_and_choices_that_do_not_fit_are_errors() {
    let (x, w, logits) = (floats(&random(1, (2, 5))), packed(&floats(&random(1, (7, 5))), 5), LOGITS[0]);
    assert!(error(log_probabilities(&x, &w, &[0], logits, None)).contains("1 targets for 2 rows"));
    assert!(error(log_probabilities(&x, &w, &[0, 7], logits, None)).contains("token 7 is outside the vocabulary of 7"));
    assert!(error(choose(&x, &w, &[Choice::Greedy], logits)).contains("1 choices for 2 rows"));
}

/// The sampler chooses for a few rows, the learner looks at many: what one says of a row the other must say, to the last bit.
#[test]
fn a_row_has_the_same_bits_alone_and_among_others_and_from_both_walks() {
    for (kernel, (vocabulary, width)) in
        check::row_invariant_kernels().into_iter().flat_map(|kernel| [(kernel, (8200, 40)), (kernel, (320, 576))])
    {
        let rows = 300;
        let (hidden, weight) =
            (floats(&random(1, (rows, width))), floats(&(random(2, (vocabulary, width)) * 0.2).unwrap()));
        let weight = Panels::pack(&weight, width, kernel);
        let choices: Vec<Choice> = (0..rows).map(|row| Choice::Sample((row as f64 + 0.5) / rows as f64)).collect();
        for logits in LOGITS {
            let chosen = choose(&hidden, &weight, &choices, logits).unwrap();
            let targets: Vec<u32> = chosen.iter().map(|chosen| chosen.token).collect();
            let known = log_probabilities(&hidden, &weight, &targets, logits, None).unwrap();
            let name = format!("{kernel:?}, {vocabulary} tokens, {logits:?}");
            check::same_bits(&name, &chosen.iter().map(|chosen| chosen.logprob).collect::<Vec<_>>(), &known.logprobs);
            let plain =
                log_probabilities(&hidden, &weight, &targets, Logits { temperature: 1.0, ..logits }, None).unwrap();
            check::same_bits(
                &name,
                &chosen.iter().map(|chosen| chosen.untempered).collect::<Vec<_>>(),
                &plain.logprobs,
            );
            let entropies: Vec<f32> = known.entropies().collect();
            for (start, end) in [(0, 1), (299, 300), (17, 18), (5, 18), (16, 33), (255, 258)] {
                let hidden = &hidden[start * width..end * width];
                let some = log_probabilities(hidden, &weight, &targets[start..end], logits, None).unwrap();
                check::same_bits(&name, &some.logprobs, &known.logprobs[start..end]);
                check::same_bits(&name, &some.entropies().collect::<Vec<_>>(), &entropies[start..end]);
                assert_eq!(
                    choose(hidden, &weight, &choices[start..end], logits).unwrap(),
                    chosen[start..end],
                    "{name}"
                );
            }
        }
    }
}
