//! Dropout of the adapter's inputs: what is dropped, that backward and packing see the same, and PEFT's numbers under the same
//! masks.

use std::collections::HashMap;
use std::sync::Arc;

use candor::config::{Dtype, Learner as Settings};
use candor::learner::portion::{Loss, Portion};
use candor::learner::tree::{Branch, Signal, Tree, pack};
use candor::learner::{Learner, StepDropout, StepShape};
use candor::objective::{LossMean, Preference};
use candor::ops::dropout::Dropout;
use candor::ops::left::Left;
use candor::ops::linear::{Linear, LowRank};
use candor::ops::panels::{Panels, Threads};
use candor::random::SplitMix64;
use serde_json::Value;

use crate::check::{self, floats};
use crate::learner::{
    UNLIKE, assert_finite_differences, assert_same_in_micro_batches, forest, gradient, settings, shape, tiny,
};
use crate::model::values;

/// A step that drops a quarter.
pub fn dropping() -> StepShape {
    StepShape { dropout: Some(StepDropout { share: 0.25, seed: 7, step: 3 }), ..shape() }
}

/// Catches a backward pass whose masks are not the forward pass's, at any of the seven projections.
#[test]
fn the_gradient_with_dropout_equals_finite_differences() {
    assert_finite_differences(&dropping());
}

/// A tree of 104 rows is split by branches at 72: the pieces must drop the same of their prompt as the whole does. Catches masks
/// that depend on a row's place in the micro-batch; and those that do not depend on seed and step.
#[test]
fn masks_do_not_depend_on_micro_batches() {
    for (model, adapter) in UNLIKE.into_iter().filter_map(tiny) {
        let trees = forest(&model, &adapter);
        let learner = Learner::new(model, &adapter, None, &settings()).unwrap();
        let dropped = assert_same_in_micro_batches(&learner, &trees, &dropping());
        for dropout in [
            None,
            Some(StepDropout { share: 0.25, seed: 7, step: 4 }),
            Some(StepDropout { share: 0.25, seed: 8, step: 3 }),
        ] {
            let other = gradient(&learner, &trees, &StepShape { dropout, ..shape() });
            assert_ne!(other, dropped, "{dropout:?} drops something else");
        }
    }
}

fn ids(value: &Value) -> Vec<u32> {
    floats(value).into_iter().map(|id| id as u32).collect()
}

/// PEFT's dropout was given masks computed in Python, one row of the batch per branch. Catches a scale that is missing or applied
/// twice, a mask on the frozen weight's inputs, projections that share a mask, a reference with dropout, and another layout of
/// the key than the one written down there.
#[test]
fn golden_gradient_of_peft_under_the_same_masks() {
    let Some((model, adapter)) = tiny("llama") else { return };
    let golden = check::json(&check::golden("dropout.json").unwrap());
    let number = |key: &str| golden[key].as_f64().unwrap();
    let tree = |index: usize| Tree {
        name: "golden".into(),
        prompt_ids: ids(&golden["prompts"][index]),
        branches: golden["branches"][index].as_array().unwrap().iter().map(ids).map(Branch::demonstration).collect(),
    };
    let settings = Settings { loss_mean: LossMean::Token, ..settings() };
    let learner = Learner::new(Arc::clone(&model), &adapter, Some(adapter.publish(0)), &settings).unwrap();
    let mut pair = tree(1);
    let reference = learner.reference_logprobs(&pair, 4096).unwrap();
    for (rollout, (branch, reference_t)) in pair.branches.iter_mut().zip(reference).enumerate() {
        (branch.rollout, branch.signal) = (rollout, Signal::Preference { reference_t });
    }
    let preference = Loss::Preference(Preference { beta: number("beta"), ..Preference::default() });
    let portions = [(Loss::Demonstration, tree(0)), (preference, pair)].map(|(loss, tree)| Portion {
        loss,
        share: 0.5,
        trees: vec![tree],
    });
    let (seed, step) = (golden["seed"].as_u64().unwrap(), golden["step"].as_u64().unwrap());
    let shape = StepShape { dropout: Some(StepDropout { share: number("share"), seed, step }), ..shape() };
    let got = learner.gradient(&portions, &shape, &mut |_, _| Ok(())).unwrap();
    check::close("loss", got.report.loss, number("loss"), 1e-5);
    check::close("margin", got.report.metrics.values()["rewards/margins"], number("margin"), 1e-5);
    for ((name, _), gradient) in adapter.tensors().unwrap().iter().zip(&got.gradients) {
        let gradient = values(gradient);
        let norm = gradient.iter().map(|x| x * x).sum::<f64>().sqrt();
        let want = floats(&golden["norm_then_first_four_of_every_gradient"][name]);
        check::all_close(name, &[&[norm], &gradient[..4]].concat(), &want, 1e-4);
    }
}

/// What is kept, 1 or 0, of `channels` inputs of one projection for all rows of trees, by (tree, branch, position).
fn kept(dropout: StepDropout, place: [usize; 2], channels: usize) -> HashMap<[usize; 3], Vec<f32>> {
    let branches = || vec![Branch::demonstration(vec![1; 41]); 2];
    let tree = |_| Tree { name: "tree".into(), prompt_ids: vec![1; 30], branches: branches() };
    let trees: Vec<Tree> = (0..4).map(tree).collect();
    let micro = &pack(&trees, 4096).unwrap()[0];
    let StepDropout { share, seed, step } = dropout;
    let dropout = micro.dropout(share, seed, step, 0);
    let [layer, projection] = place;
    let mask = dropout.mask(0..micro.ids.len(), layer, projection);
    let all = mask.of(&vec![1.0f32; micro.ids.len() * channels], channels);
    let rows = micro
        .stores
        .iter()
        .zip(&micro.origins)
        .flat_map(|(store, [tree, branch])| store.from.clone().map(move |row| (row, [*tree, *branch])));
    rows.map(|(row, [tree, branch])| {
        ([tree, branch, micro.positions[row]], all[row * channels..(row + 1) * channels].to_vec())
    })
    .collect()
}

/// A share p is dropped, and any two different inputs are dropped independently: both in p² of the cases. Catches a counter that
/// is missing from the key (both in p), and a share that is that of the kept.
#[test]
fn a_share_is_dropped_independently_everywhere() {
    const CHANNELS: usize = 200;
    let share = 0.3;
    let base = StepDropout { share, seed: 1, step: 5 };
    let want = kept(base, [2, 0], CHANNELS);
    assert_eq!(want.len(), 4 * (30 + 2 * 40));
    let dropped = |x: f32| f64::from(u8::from(x == 0.0));
    // Five standard deviations of a mean of as many draws.
    let near = |name: &str, total: f64, draws: usize, p: f64| {
        let (mean, allowed) = (total / draws as f64, 5.0 * (p * (1.0 - p) / draws as f64).sqrt());
        assert!((mean - p).abs() <= allowed, "{name}: {mean} of {draws}, not {p} within {allowed}");
    };
    let all = want.values().flatten();
    near("share", all.map(|x| dropped(*x)).sum(), want.len() * CHANNELS, share);
    let both =
        |name: &str, other: &HashMap<[usize; 3], Vec<f32>>, move_to: &dyn Fn([usize; 3]) -> [usize; 3], by: usize| {
            let (mut total, mut draws) = (0.0, 0);
            for (place, row) in &want {
                let Some(other) = other.get(&move_to(*place)) else { continue };
                total += row.iter().zip(&other[by..]).map(|(a, b)| dropped(*a) * dropped(*b)).sum::<f64>();
                draws += CHANNELS - by;
            }
            assert!(draws > 10_000, "{name}: {draws} draws");
            near(name, total, draws, share * share);
        };
    let (same, none) = (|place: [usize; 3]| place, 0);
    both("projections", &kept(base, [2, 1], CHANNELS), &same, none);
    both("layers", &kept(base, [3, 0], CHANNELS), &same, none);
    both("steps", &kept(StepDropout { step: 6, ..base }, [2, 0], CHANNELS), &same, none);
    both("seeds", &kept(StepDropout { seed: 2, ..base }, [2, 0], CHANNELS), &same, none);
    both("trees", &want, &|[tree, branch, position]| [tree + 1, branch, position], none);
    both("branches", &want, &|[tree, branch, position]| [tree, branch + 1, position], none);
    both("positions", &want, &|[tree, branch, position]| [tree, branch, position + 1], none);
    both("channels", &want, &same, 1);
}

/// The mean over masks of what a projection returns, and of the gradient of its input, is what it returns without: both are linear
/// in the mask. Catches a missing 1 / (1 − p), in any kernel.
#[test]
fn the_expectation_over_masks_is_no_dropout() {
    const MASKS: usize = 3000;
    let (wide, narrow, rank) = (40, 70, 4);
    let mut stream = SplitMix64::new(3);
    let mut random = |count: usize| (0..count).map(|_| stream.next_f64() as f32 - 0.5).collect::<Vec<f32>>();
    let (weight, a, b) = (random(wide * narrow), random(rank * narrow), random(wide * rank));
    let inputs = [random(narrow), random(wide)];
    for kernel in check::kernels() {
        let weight = Panels::pack(&weight, narrow, kernel);
        let transposed = weight.transposed(0..wide, Threads::One);
        let adapter = LowRank::new(a.clone(), b.clone(), rank, 2.0, kernel);
        for (backward, x) in inputs.iter().enumerate() {
            let (backward, weight) = (backward == 1, if backward == 1 { &transposed } else { &weight });
            let outputs = weight.dims().0;
            let product = |dropout: Option<&Dropout>| {
                let mask = dropout.map(|dropout| dropout.mask(0..1, 0, 0));
                let linear = Linear { weight, bias: None, adapter: Some(&adapter), mask, backward };
                let (left, mut y) = (Left::new(x, x.len(), kernel), vec![f32::NAN; outputs]);
                linear.apply_all(&left, linear.down(&left).as_ref(), &mut y, false, Threads::One);
                y
            };
            let whole = product(None);
            let (mut sum, mut squares) = (vec![0.0; outputs], vec![0.0; outputs]);
            for mask in 0..MASKS {
                let y = product(Some(&Dropout { share: 0.4, rows: vec![mask as u64] }));
                for (index, (y, whole)) in y.iter().zip(&whole).enumerate() {
                    let gap = f64::from(y - whole);
                    (sum[index], squares[index]) = (sum[index] + gap, squares[index] + gap * gap);
                }
            }
            for (sum, squares) in sum.into_iter().zip(squares) {
                let (mean, deviation) = (sum / MASKS as f64, (squares / MASKS as f64).sqrt());
                let rounding = if kernel.dtype() == Dtype::Bf16 { 4e-3 } else { 1e-6 };
                let allowed = 5.0 * deviation / (MASKS as f64).sqrt() + rounding;
                assert!(deviation > 0.01, "{kernel:?}, backward {backward}: masks change nothing");
                assert!(mean.abs() <= allowed, "{kernel:?}, backward {backward}: off by {mean}, allowed {allowed}");
            }
        }
    }
}
