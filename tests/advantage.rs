//! Advantages against TRL's own runs, prime-rl's formulas, and the vectors.

use candor::advantage::{AdvantageKind, advantages, is_mixed};
use serde_json::Value;

use crate::check::{all_close, floats, golden, json, vectors};

fn of(rewards: &[f64], kind: AdvantageKind) -> Vec<f64> {
    let rewards_g = rewards.iter().copied().map(Some).collect::<Vec<_>>();
    advantages(&rewards_g, kind).expect("a full group").into_iter().map(|advantage| advantage.unwrap()).collect()
}

/// Checks the entries whose names `kind` knows, and names the others.
fn check_named(entries: &Value, rewards: &[f64], tolerance: f64, kind: impl Fn(&str) -> Option<AdvantageKind>) {
    for (name, want) in entries.as_object().expect("advantages by name").iter().filter(|(name, _)| *name != "rewards") {
        match kind(name) {
            Some(kind) => all_close(&format!("{name} of {rewards:?}"), &of(rewards, kind), &floats(want), tolerance),
            None => crate::check::skipped(name),
        }
    }
}

#[test]
fn golden_trl_advantages() {
    let Some(path) = golden("trl/grpo_advantages.json") else { return };
    let file = json(&path);
    let group = file["num_generations"].as_u64().expect("a number") as usize;
    for case in file["cases"].as_array().expect("cases") {
        let scale = case["scale_rewards"].as_str().expect("a name");
        let kind = match scale {
            "group" => AdvantageKind::Std,
            "none" => AdvantageKind::Centered,
            _ => {
                crate::check::skipped(scale);
                continue;
            }
        };
        let got = floats(&case["rewards"]).chunks(group).flat_map(|rewards| of(rewards, kind)).collect::<Vec<_>>();
        all_close(scale, &got, &floats(&case["advantages"]), 2e-7);
    }
}

#[test]
fn golden_formulas_advantages() {
    let Some(path) = golden("formulas.json") else { return };
    let file = json(&path);
    check_named(&file["advantages"], &floats(&file["inputs"]["rewards"]), 1e-12, |name| match name {
        "group" => Some(AdvantageKind::Std),
        "none" => Some(AdvantageKind::Centered),
        "max_rl" => Some(AdvantageKind::Maxrl),
        "rloo" => Some(AdvantageKind::Rloo),
        _ => None,
    });
}

#[test]
fn vectors_advantages() {
    let Some(path) = vectors("scoring_rules.json") else { return };
    for case in json(&path)["advantage_vectors"].as_array().expect("cases") {
        check_named(case, &floats(&case["rewards"]), 1e-12, |name| match name {
            "mean_only" => Some(AdvantageKind::Centered),
            "std_sample_eps1e4" => Some(AdvantageKind::Std),
            "rloo" => Some(AdvantageKind::Rloo),
            "maxrl" => Some(AdvantageKind::Maxrl),
            _ => None,
        });
    }
}

#[test]
fn equal_rewards_give_exact_zeros() {
    for kind in [AdvantageKind::Centered, AdvantageKind::Rloo, AdvantageKind::Std, AdvantageKind::Maxrl] {
        for reward in [0.1, 0.7, 1.0 / 3.0, -0.25, 0.1f32 as f64] {
            for size in 2..=16 {
                let got = of(&vec![reward; size], kind);
                assert!(got.iter().all(|advantage| *advantage == 0.0), "{kind:?} of {size} times {reward}: {got:?}");
            }
        }
    }
}

#[test]
fn maxrl_needs_a_positive_mean() {
    assert_eq!(of(&[0.0, 1.0], AdvantageKind::Maxrl), [-1.0, 1.0]);
    for rewards in [[-1.0, 1.0], [-1.0, 0.5]] {
        assert!(of(&rewards, AdvantageKind::Maxrl).iter().all(|advantage| *advantage == 0.0), "{rewards:?}");
    }
}

#[test]
fn a_rollout_without_a_reward_leaves_the_mean() {
    let got = advantages(&[Some(1.0), None, Some(0.0), Some(0.5)], AdvantageKind::Centered);
    assert_eq!(got, Some(vec![Some(0.5), None, Some(-0.5), Some(0.0)]));
}

#[test]
fn a_group_with_too_few_rewards_is_dropped() {
    let dropped = |rewards_g: &[Option<f64>]| advantages(rewards_g, AdvantageKind::Centered).is_none();
    assert!(dropped(&[]) && dropped(&[None, None]) && dropped(&[Some(1.0)]) && dropped(&[Some(1.0), None]));
    assert!(dropped(&[Some(1.0), Some(0.0), None, None, None]), "two of five");
    assert!(!dropped(&[Some(1.0), Some(0.0), None, None]), "two of four");
}

#[test]
fn mixed_groups_are_told_from_flat_ones() {
    assert!(is_mixed(&[Some(0.5), None, Some(0.25)]));
    assert!(!is_mixed(&[Some(0.5), None, Some(0.5)]) && !is_mixed(&[None, Some(1.0)]) && !is_mixed(&[]));
}
