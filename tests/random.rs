//! Random numbers: the vectors' stream, and keys that are pinned and well mixed.

use std::collections::BTreeSet;

use candor::random::{Purpose, SplitMix64, key, uniform};

use crate::check::{close, floats, json, vectors};

#[test]
fn vectors_splitmix64() {
    let Some(path) = vectors("calibration_metrics.json") else { return };
    let block = &json(&path)["splitmix64"];
    let mut random = SplitMix64::new(0);
    for want in block["seed0_first4_u64"].as_array().expect("a list") {
        assert_eq!(random.next_u64().to_string(), want.as_str().map_or(want.to_string(), String::from));
    }
    let mut random = SplitMix64::new(12345);
    for want in floats(&block["seed12345_first4_f64"]) {
        close("f64", random.next_f64(), want, 1e-16);
    }
    let mut random = SplitMix64::new(12345);
    for want in floats(&block["seed12345_below12_first12"]) {
        assert_eq!(random.below(12), want as usize);
    }
}

/// These numbers decide which tasks and tokens a seed means: a change here breaks every resumed run.
#[test]
fn keys_are_pinned() {
    assert_eq!(key(17, Purpose::Selection, &[0]), 4284487658769858863);
    assert_eq!(key(17, Purpose::Sampling, &[3, 1, 7, 20]), 5073006919746181306);
    assert_eq!(key(0, Purpose::AdapterInit, &[]), 3299563543941326993);
    assert_eq!(key(u64::MAX, Purpose::Sampling, &[0, 0]), 18375844910194516147);
}

#[test]
fn keys_of_small_counters_differ_and_are_uniform() {
    let mut keys = Vec::new();
    for seed in 0..3 {
        for purpose in [Purpose::Selection, Purpose::Sampling, Purpose::AdapterInit] {
            keys.push(key(seed, purpose, &[]));
            for step in 0..8 {
                keys.push(key(seed, purpose, &[step]));
                for group in 0..8 {
                    keys.push(key(seed, purpose, &[step, group]));
                    for rollout in 0..8 {
                        keys.push(key(seed, purpose, &[step, group, rollout]));
                        keys.extend((0..32).map(|position| key(seed, purpose, &[step, group, rollout, position])));
                    }
                }
            }
        }
    }
    assert_eq!(keys.iter().collect::<BTreeSet<_>>().len(), keys.len(), "two keys are equal");

    let numbers = keys.iter().map(|&key| uniform(key)).collect::<Vec<_>>();
    assert!(numbers.iter().all(|number| (0.0..1.0).contains(number)));
    assert!(uniform(u64::MAX) < 1.0 && uniform(0) == 0.0);
    // Neighbors in the list differ in one counter: pairs of them must fill the square evenly too.
    let cells = 16;
    let chi_square = |counts: &[f64]| {
        let expected = counts.iter().sum::<f64>() / counts.len() as f64;
        let excess = counts.iter().map(|count| (count - expected).powi(2) / expected).sum::<f64>();
        (excess - counts.len() as f64) / (2.0 * counts.len() as f64).sqrt()
    };
    let cell = |number: f64| (number * cells as f64) as usize;
    let (mut line, mut square) = (vec![0.0; cells], vec![0.0; cells * cells]);
    for pair in numbers.windows(2) {
        line[cell(pair[0])] += 1.0;
        square[cells * cell(pair[0]) + cell(pair[1])] += 1.0;
    }
    for (name, deviations) in [("line", chi_square(&line)), ("square", chi_square(&square))] {
        assert!(deviations.abs() < 4.0, "{name}: {deviations} standard deviations from uniform");
    }
}
