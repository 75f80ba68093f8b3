//! Given completions at the learner: whole runs of TRL, and the identities that tie SFT, DPO and implicit calibration to GRPO.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use candor::learner::Learner;
use candor::learner::portion::{Loss, Portion};
use candor::learner::tree::{Branch, Signal, Tree};
use candor::model::Model;
use candor::objective::{Implicit, JudgedLoss, LossMean, Preference, PreferenceLoss};
use candor::policy::Adapter;
use serde_json::Value;

use crate::check::{self, floats};
use crate::learner::{on_policy, settings, shape};
use crate::model::{adapter, values};

/// The tiny model that TRL trained, with the adapter that it started from.
fn tiny() -> Option<(Arc<Model>, Adapter)> {
    let folder = check::golden("tiny/llama")?;
    let model = Arc::new(Model::open(&folder, check::f32_kernel()).unwrap());
    let (adapter, _) = adapter(&model, &folder.join("adapter_lora"));
    Some((model, adapter))
}

/// A prompt and one completion, whose tokens are those under the mask; padding is under neither.
fn cut(ids: &Value, attended: &Value, completion: &Value) -> (Vec<u32>, Vec<u32>) {
    let (ids, attended, completion) = (floats(ids), floats(attended), floats(completion));
    let mut row = (Vec::new(), Vec::new());
    for ((id, attended), completion) in ids.into_iter().zip(attended).zip(completion) {
        match (attended > 0.0, completion > 0.0) {
            (true, true) => row.1.push(id as u32),
            (true, false) => row.0.push(id as u32),
            _ => {}
        }
    }
    row
}

fn tree(prompt_ids: Vec<u32>, branches: Vec<Branch>) -> Tree {
    Tree { name: "given".into(), prompt_ids, branches }
}

fn alone(loss: Loss, trees: Vec<Tree>) -> Portion {
    Portion { loss, share: 1.0, trees }
}

/// TRL sums two micro-steps of two rows into one optimizer step, divided by the tokens of all four. Catches a loss on prompt
/// tokens, a missing end-of-turn token, and means of means.
#[test]
fn golden_sft_run_of_trl() {
    let (Some(path), Some((model, adapter))) = (check::golden("trl/sft_trace.json"), tiny()) else { return };
    let trace = check::json(&path);
    let mut learner = Learner::new(model, &adapter, None, &settings()).unwrap();
    let steps = trace["micro_steps"].as_array().unwrap();
    for (step, micro_steps) in steps.chunks(2).enumerate() {
        let mut trees = Vec::new();
        for micro in micro_steps {
            for row in 0..2 {
                let labels = floats(&micro["labels"][row]).into_iter().map(|label| f64::from(label >= 0.0));
                let labels = Value::from_iter(labels);
                let (prompt, completion) = cut(&micro["input_ids"][row], &micro["attention_mask"][row], &labels);
                trees.push(tree(prompt, vec![Branch::demonstration(completion)]));
            }
        }
        let report = learner.step(&[alone(Loss::Demonstration, trees)], &shape(), &mut |_, _| Ok(())).unwrap();
        let log = &trace["logs"][step];
        check::close(&format!("step {step}"), report.loss, log["loss"].as_f64().unwrap(), 1e-5);
        check::close(&format!("step {step}"), report.grad_norm, log["grad_norm"].as_f64().unwrap(), 1e-4);
    }
}

/// The log-probabilities of the reference, put into every branch.
fn compared(learner: &Learner, mut tree: Tree) -> Tree {
    let reference = learner.reference_logprobs(&tree, 4096).unwrap();
    for (rollout, (branch, reference_t)) in tree.branches.iter_mut().zip(reference).enumerate() {
        (branch.rollout, branch.signal) = (rollout, Signal::Preference { reference_t });
    }
    tree
}

/// Rows of TRL are all chosen, then all rejected. Catches a reference that moves, sums that include the prompt, and a mean over
/// completions instead of pairs.
#[test]
fn golden_dpo_run_of_trl() {
    let (Some(path), Some((model, adapter))) = (check::golden("trl/dpo_trace.json"), tiny()) else { return };
    let trace = check::json(&path);
    let reference = Some(adapter.publish(0));
    let mut learner = Learner::new(model, &adapter, reference, &settings()).unwrap();
    for (step, want) in trace["steps"].as_array().unwrap().iter().enumerate() {
        let rows = want["input_ids"].as_array().unwrap().len();
        let row =
            |row: usize| cut(&want["input_ids"][row], &want["attention_mask"][row], &want["completion_mask"][row]);
        let pair = |pair: usize| {
            let ((prompt, chosen), (same, rejected)) = (row(pair), row(pair + rows / 2));
            assert_eq!(prompt, same);
            compared(&learner, tree(prompt, [chosen, rejected].map(Branch::demonstration).into()))
        };
        let trees = (0..rows / 2).map(pair).collect();
        let report = learner
            .step(&[alone(Loss::Preference(Preference::default()), trees)], &shape(), &mut |_, _| Ok(()))
            .unwrap();
        let (log, metrics) = (&trace["logs"][step], report.metrics.values());
        check::close(&format!("step {step}"), report.loss, want["loss"].as_f64().unwrap(), 1e-5);
        check::close(&format!("step {step}"), report.grad_norm, log["grad_norm"].as_f64().unwrap(), 1e-4);
        for name in ["rewards/margins", "rewards/chosen", "rewards/accuracies", "logps/chosen", "logps/rejected"] {
            check::close(&format!("step {step}: {name}"), metrics[name], log[name].as_f64().unwrap(), 1e-4);
        }
    }
}

/// The rows of a few sequences, alike in every kind of portion below.
fn sequences() -> Vec<(Vec<u32>, Vec<u32>)> {
    let token = |seed: usize, i: usize| ((seed * 37 + i * 101 + 11) % 320) as u32;
    let row = |seed: usize, prompt: usize, completion: usize| {
        let all: Vec<u32> = (0..prompt + completion).map(|i| token(seed, i)).collect();
        (all[..prompt].to_vec(), all[prompt..].to_vec())
    };
    vec![row(0, 9, 4), row(1, 3, 11), row(2, 20, 1), row(3, 1, 7)]
}

fn demonstrations() -> Vec<Tree> {
    sequences().into_iter().map(|(prompt, ids)| tree(prompt, vec![Branch::demonstration(ids)])).collect()
}

/// The gradient of a step, all tensors in one list.
fn gradient(learner: &Learner, portions: &[Portion], micro_tokens: usize) -> Vec<f64> {
    let shape = candor::learner::StepShape { micro_tokens, ..shape() };
    learner.gradient(portions, &shape, &mut |_, _| Ok(())).unwrap().gradients.iter().flat_map(values).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Relative to the whole gradient's norm, as a tensor of its own may be all but zero.
#[track_caller]
fn assert_same(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let difference: Vec<f64> = got.iter().zip(want).map(|(got, want)| got - want).collect();
    let (difference, norm) = (norm(&difference), norm(want));
    assert!(norm > 1e-6 && difference <= tolerance * norm, "{what}: differs by {difference:.3e} of {norm:.3e}");
}

/// Catches another denominator, another temperature, or a policy ratio on what was never sampled.
#[test]
fn sft_is_grpo_with_one_rollout_and_advantage_one() {
    let Some((model, adapter)) = tiny() else { return };
    for loss_mean in [LossMean::Token, LossMean::Sequence, LossMean::Constant] {
        let settings = candor::config::Learner { loss_mean, ..settings() };
        let learner = Learner::new(model.clone(), &adapter, None, &settings).unwrap();
        let imitated = gradient(&learner, &[alone(Loss::Demonstration, demonstrations())], 4096);
        let mut sampled = demonstrations();
        for branch in sampled.iter_mut().flat_map(|tree| &mut tree.branches) {
            branch.signal = Signal::Reward { behavior_t: vec![0.0; branch.ids.len()], advantage: 1.0 };
        }
        on_policy(&model, &adapter, &mut sampled);
        let rewarded = gradient(&learner, &[Portion::sampled(sampled)], 4096);
        assert_same(&format!("{loss_mean:?}"), &imitated, &rewarded, 1e-6);
    }
}

/// One step of every kind: rollouts, demonstrations, pairs of two losses, judged rows; with the shares that weights of 1, 2, 3
/// and 2 give.
fn every_kind(learner: &Learner, model: &Model, adapter: &Adapter) -> Vec<Portion> {
    let mut sampled = demonstrations();
    for (index, branch) in sampled.iter_mut().flat_map(|tree| &mut tree.branches).enumerate() {
        branch.signal = Signal::Reward { behavior_t: Vec::new(), advantage: index as f64 - 1.2 };
    }
    on_policy(model, adapter, &mut sampled);
    let pairs = sequences().into_iter().map(|(prompt, ids)| {
        let other: Vec<u32> = ids.iter().rev().chain([&7]).copied().collect();
        compared(learner, tree(prompt, [ids, other].map(Branch::demonstration).into()))
    });
    let mut hinge: Vec<Tree> = pairs.collect();
    let sigmoid = hinge.split_off(1);
    let judged = demonstrations().into_iter().enumerate().map(|(index, mut tree)| {
        tree.branches[0].signal = Signal::Judged { correct: index % 2 == 0 };
        tree
    });
    let preference = |loss| Loss::Preference(Preference { loss, ..Preference::default() });
    let implicit = Loss::Judged(Implicit { loss: JudgedLoss::Log, lambda: 0.5, lm_on_correct_only: true });
    let portions = [
        (Loss::Reward, 0.125, sampled),
        (Loss::Demonstration, 0.25, demonstrations()),
        (preference(PreferenceLoss::Hinge), 0.375, hinge),
        (preference(PreferenceLoss::Sigmoid), 0.375, sigmoid),
        (implicit, 0.25, judged.collect()),
    ];
    portions.map(|(loss, share, trees)| Portion { loss, share, trees }).into()
}

/// The loss is Σ share · kind's loss; pairs of both losses are one kind, divided by all four. Catches shares of the wrong thing
/// and denominators over everything, over a portion, or over a micro-batch.
#[test]
fn kinds_of_tasks_mix_by_share_whatever_the_micro_batches() {
    let Some((model, adapter)) = tiny() else { return };
    let learner = Learner::new(model.clone(), &adapter, None, &settings()).unwrap();
    let portions = every_kind(&learner, &model, &adapter);
    let mixed = gradient(&learner, &portions, 4096);
    let mut want = vec![0.0; mixed.len()];
    for (index, portion) in portions.iter().enumerate() {
        let apart = gradient(&learner, &[alone(portion.loss, portion.trees.clone())], 4096);
        // One of the four pairs has the one loss, three have the other.
        let part = match index {
            2 => 0.25,
            3 => 0.75,
            _ => 1.0,
        };
        want.iter_mut().zip(apart).for_each(|(sum, own)| *sum += portion.share * part * own);
    }
    assert_same("mixed", &mixed, &want, 1e-5);
    for micro_tokens in [26, 30, 64] {
        assert_same("micro-batches", &gradient(&learner, &portions, micro_tokens), &mixed, 1e-5);
    }
    let report = learner.gradient(&portions, &shape(), &mut |_, _| Ok(())).unwrap().report;
    let total: f64 = [("reward", 0.125), ("demonstration", 0.25), ("preference", 0.375), ("judged", 0.25)]
        .into_iter()
        .map(|(kind, share)| share * report.losses[kind])
        .sum();
    check::close("loss", report.loss, total, 1e-12);
}

/// Each kind's gradient against central differences of its own loss. Catches coefficients that belong to another token.
#[test]
fn the_gradients_of_given_completions_equal_finite_differences() {
    let Some((model, adapter)) = tiny() else { return };
    let learner = Learner::new(model.clone(), &adapter, None, &settings()).unwrap();
    for portion in every_kind(&learner, &model, &adapter).split_off(1) {
        let portions = [Portion { share: 1.0, ..portion }];
        let gradients = learner.gradient(&portions, &shape(), &mut |_, _| Ok(())).unwrap().gradients;
        let square: f64 = gradients.iter().map(|gradient| norm(&values(gradient)).powi(2)).sum();
        let loss = |scale: f64| {
            let moved: Vec<(String, Tensor)> = adapter
                .tensors()
                .unwrap()
                .into_iter()
                .zip(&gradients)
                .map(|((name, tensor), gradient)| (name, (tensor + (gradient * scale).unwrap()).unwrap()))
                .collect();
            let lora = candor::config::Lora { rank: 4, alpha: 8.0, ..Default::default() };
            let moved =
                Adapter::from_tensors(&model.architecture, &lora, moved.into_iter().collect(), &Device::Cpu).unwrap();
            let moved = Learner::new(model.clone(), &moved, None, &settings()).unwrap();
            moved.gradient(&portions, &shape(), &mut |_, _| Ok(())).unwrap().report.loss
        };
        let step = 2e-3 / square.sqrt();
        let name = portions[0].loss.name();
        check::close(name, (loss(step) - loss(-step)) / (2.0 * step), square, 5e-3);
    }
}

/// "Answer: X, Confidence: 0." comes before both digits: its tokens get opposite coefficients in equal contexts, so that leaving
/// them out changes no adapter gradient. Catches a prefix that the two branches see differently.
#[test]
fn masking_the_prefix_that_a_pair_shares_changes_no_gradient() {
    let Some((model, adapter)) = tiny() else { return };
    let base = Learner::new(model, &adapter, None, &settings()).unwrap();
    let shared: Vec<u32> = (0..14).map(|i| (i * 53 + 7) % 320).collect();
    let answer = |end: [u32; 3]| shared.iter().copied().chain(end).collect::<Vec<u32>>();
    let pair = tree((40..52).collect(), [answer([24, 30, 2]), answer([32, 24, 2])].map(Branch::demonstration).into());
    let whole = compared(&base, pair);
    let mut masked = whole.clone();
    masked.branches.iter_mut().for_each(|branch| branch.mask_t[..shared.len()].fill(false));
    for loss in [PreferenceLoss::Sigmoid, PreferenceLoss::Ipo, PreferenceLoss::Hinge] {
        let loss = Loss::Preference(Preference { loss, ..Preference::default() });
        let [whole, masked] = [&whole, &masked].map(|tree| gradient(&base, &[alone(loss, vec![tree.clone()])], 4096));
        assert_same(&format!("{loss:?}"), &masked, &whole, 1e-5);
    }
}

/// A pair whose two halves lie in different micro-batches has no Δ.
#[test]
fn a_pair_that_was_split_is_an_error() {
    let Some((model, adapter)) = tiny() else { return };
    let learner = Learner::new(model, &adapter, None, &settings()).unwrap();
    let branches = [vec![5; 6], vec![6; 6]].map(Branch::demonstration).into();
    let pair = compared(&learner, tree(vec![9; 10], branches));
    let portions = [alone(Loss::Preference(Preference::default()), vec![pair])];
    let shape = candor::learner::StepShape { micro_tokens: 16, ..shape() };
    let error = format!("{:#}", learner.gradient(&portions, &shape, &mut |_, _| Ok(())).err().unwrap());
    assert!(error.contains("a pair was split; raise batch.micro_tokens"), "{error}");
}
