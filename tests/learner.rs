//! The learner against PEFT and TRL: gradients, whole optimizer trajectories, and the identities of packing.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candor::config::{Dtype, Learner as Settings, Lora, Schedule};
use candor::learner::optimizer::learning_rate;
use candor::learner::portion::Portion;
use candor::learner::tree::{Branch, Signal, Tree};
use candor::learner::{Learner, StepShape, completion_logprobs};
use candor::model::Model;
use candor::objective::{KlEstimator, LossMean};
use candor::ops::kernel::Kernel;
use candor::policy::Adapter;

use crate::check;
use crate::dropout::dropping;
use crate::model::{adapter, ids, tensors, tiny_models, values};

/// PyTorch's optimizer settings in the golden runs.
pub fn settings() -> Settings {
    Settings {
        learning_rate: 1e-2,
        schedule: Schedule::Constant,
        warmup_steps: 0,
        clip: [0.2, 0.2],
        ..Settings::default()
    }
}

pub fn shape() -> StepShape {
    StepShape { micro_tokens: 4096, max_tokens: 64, temperature: 1.0, learning_rate: 1e-2, dropout: None }
}

fn branch(ids: &[u32], advantage: f64) -> Branch {
    let signal = Signal::Reward { behavior_t: vec![0.0; ids.len()], advantage };
    Branch { signal, ..Branch::demonstration(ids.to_vec()) }
}

/// A sequence whose every token but the first is to be imitated: supervised fine-tuning is advantage 1 on policy.
pub fn imitation(ids: &[u32]) -> Tree {
    Tree { name: "imitation".into(), prompt_ids: vec![ids[0]], branches: vec![branch(&ids[1..], 1.0)] }
}

/// Sets the behavior log-probabilities to the adapter's own, so that every ratio is 1.
pub fn on_policy(model: &Model, adapter: &Adapter, trees: &mut [Tree]) {
    let logprobs = completion_logprobs(model, Some(adapter), trees, 4096, 1.0).unwrap();
    let branches = trees.iter_mut().flat_map(|tree| &mut tree.branches);
    branches.zip(logprobs).for_each(|(branch, logprobs)| *behavior_t(branch) = logprobs);
}

/// What the sampler said of a sampled completion.
pub fn behavior_t(branch: &mut Branch) -> &mut Vec<f64> {
    match &mut branch.signal {
        Signal::Reward { behavior_t, .. } => behavior_t,
        other => panic!("{other:?} was not sampled"),
    }
}

fn open(folder: &Path) -> Arc<Model> {
    Arc::new(Model::open(folder, check::f32_kernel()).unwrap())
}

/// Every golden adapter of every tiny model: model folder, adapter name.
pub fn golden_adapters() -> Vec<(std::path::PathBuf, &'static str)> {
    let pairs = tiny_models().into_iter().flat_map(|folder| ["lora", "lora_all_rs"].map(|name| (folder.clone(), name)));
    pairs.filter(|(folder, name)| folder.join(format!("adapter_{name}")).exists()).collect()
}

pub fn gradient(learner: &Learner, trees: &[Tree], shape: &StepShape) -> Vec<Vec<f64>> {
    learner
        .gradient(&[Portion::sampled(trees.to_vec())], shape, &mut |_, _| Ok(()))
        .unwrap()
        .gradients
        .iter()
        .map(values)
        .collect()
}

#[test]
fn golden_gradients_equal_peft() {
    for (folder, name) in golden_adapters() {
        let model = open(&folder);
        let golden = tensors(&folder.join(format!("golden_{name}.safetensors")));
        let a = ids(&tensors(&folder.join("golden_logits.safetensors"))["ids_a"]);
        let (adapter, _) = adapter(&model, &folder.join(format!("adapter_{name}")));
        let mut trees = [imitation(&a)];
        on_policy(&model, &adapter, &mut trees);
        let place = format!("{} {name}", folder.display());
        check::all_close(&place, behavior_t(&mut trees[0].branches[0]), &values(&golden["logps_a"]), 1e-4);
        let learner = Learner::new(model.clone(), &adapter, None, &settings()).unwrap();
        let got = gradient(&learner, &trees, &shape());
        for ((tensor, _), got) in adapter.tensors().unwrap().iter().zip(&got) {
            check::all_close(&format!("{place} {tensor}"), got, &values(&golden[&format!("grad_a.{tensor}")]), 1e-4);
        }
    }
}

#[test]
fn golden_trajectory_of_ten_adamw_steps() {
    for (folder, name) in golden_adapters() {
        let model = open(&folder);
        let logits = tensors(&folder.join("golden_logits.safetensors"));
        let (adapter, _) = adapter(&model, &folder.join(format!("adapter_{name}")));
        let settings = Settings { weight_decay: 0.01, ..settings() };
        let mut learner = Learner::new(model.clone(), &adapter, None, &settings).unwrap();
        let steps = &check::json(&folder.join("golden.json"))[name]["sft_trajectory"]["steps"];
        for (step, want) in steps.as_array().unwrap().iter().enumerate() {
            let mut trees = [imitation(&ids(&logits["ids_a"])), imitation(&ids(&logits["ids_b"]))];
            on_policy(&model, learner.adapter(), &mut trees);
            let all: Vec<f64> = trees.iter_mut().flat_map(|tree| behavior_t(&mut tree.branches[0]).clone()).collect();
            let report = learner.step(&[Portion::sampled(trees.to_vec())], &shape(), &mut |_, _| Ok(())).unwrap();
            let place = format!("{} {name} step {step}", folder.display());
            check::close(&place, -all.iter().sum::<f64>() / all.len() as f64, want["loss"].as_f64().unwrap(), 1e-4);
            check::close(&place, report.grad_norm, want["grad_norm_before_clip"].as_f64().unwrap(), 1e-3);
        }
    }
}

/// A row of token ids under a mask.
fn masked(ids: &serde_json::Value, mask: &serde_json::Value) -> Vec<u32> {
    let pairs = check::floats(ids).into_iter().zip(check::floats(mask));
    pairs.filter(|(_, mask)| *mask > 0.0).map(|(id, _)| id as u32).collect()
}

/// TRL keeps one row per completion; consecutive rows with the same prompt are one tree here.
fn trl_trees(step: &serde_json::Value) -> Vec<Tree> {
    let mut trees: Vec<Tree> = Vec::new();
    let advantages = check::floats(&step["advantages"]);
    for (row, advantage) in advantages.into_iter().enumerate() {
        let prompt_ids = masked(&step["prompt_ids"][row], &step["prompt_mask"][row]);
        let branch = branch(&masked(&step["completion_ids"][row], &step["completion_mask"][row]), advantage);
        match trees.last_mut() {
            Some(tree) if tree.prompt_ids == prompt_ids => tree.branches.push(branch),
            _ => trees.push(Tree { name: "trl".into(), prompt_ids, branches: vec![branch] }),
        }
    }
    trees
}

#[test]
fn golden_grpo_runs_of_trl() {
    let (Some(path), Some(folder)) = (check::golden("trl/grpo_trace.json"), check::golden("tiny/llama")) else {
        return;
    };
    for (name, trace) in check::json(&path)["traces"].as_object().unwrap() {
        let model = open(&folder);
        let (adapter, _) = adapter(&model, &folder.join("adapter_lora"));
        let config = &trace["config"];
        let settings = Settings {
            kl: config["beta"].as_f64().unwrap(),
            kl_estimator: Some(KlEstimator::Unbiased),
            loss_mean: match config["loss_type"].as_str().unwrap() {
                "grpo" => LossMean::Sequence,
                "dapo" => LossMean::Token,
                "dr_grpo" => LossMean::Constant,
                other => panic!("a loss that the trace did not have before: {other}"),
            },
            ..settings()
        };
        let reference = Some(adapter.publish(0));
        let mut learner = Learner::new(model.clone(), &adapter, reference, &settings).unwrap();
        let max_tokens = config["max_completion_length"].as_u64().unwrap() as usize;
        for (step, want) in trace["steps"].as_array().unwrap().iter().enumerate() {
            let mut trees = trl_trees(want);
            on_policy(&model, learner.adapter(), &mut trees);
            let report = learner
                .step(&[Portion::sampled(trees.to_vec())], &StepShape { max_tokens, ..shape() }, &mut |_, _| Ok(()))
                .unwrap();
            let place = format!("{name} step {step}");
            check::close(&place, report.loss, want["loss"].as_f64().unwrap(), 1e-5);
            check::close(&place, report.grad_norm, trace["logs"][step]["grad_norm"].as_f64().unwrap(), 1e-4);
        }
        for (tensor, value) in learner.adapter().tensors().unwrap() {
            let norm = values(&value).iter().map(|x| x * x).sum::<f64>().sqrt();
            check::close(
                &format!("{name} {tensor}"),
                norm,
                trace["lora_param_l2_after"][&tensor].as_f64().unwrap(),
                1e-4,
            );
        }
    }
}

/// A plain family, and one with sliding windows shorter than the sequences, soft-caps and norms of what blocks return.
pub const UNLIKE: [&str; 2] = ["llama", "gemma2"];

/// A tiny model of the golden numbers with an adapter that does something.
pub fn tiny(name: &str) -> Option<(Arc<Model>, Adapter)> {
    let folder = check::golden(&format!("tiny/{name}"))?;
    let model = open(&folder);
    let (adapter, _) = adapter(&model, &folder.join("adapter_lora_all_rs"));
    Some((model, adapter))
}

/// The adapter of [`tiny`] with other values.
pub fn like_tiny(model: &Model, tensors: impl Iterator<Item = (String, Tensor)>) -> Adapter {
    let targets = candor::config::Projection::ALL.to_vec();
    let lora = Lora { rank: 4, alpha: 8.0, rslora: true, targets, ..Lora::default() };
    Adapter::from_tensors(&model.architecture, &lora, tensors.collect(), &Device::Cpu).unwrap()
}

/// Three groups of unequal shape with unequal advantages and ratios near 1.
pub fn forest(model: &Model, adapter: &Adapter) -> Vec<Tree> {
    let token = |seed: usize, i: usize| ((seed * 37 + i * 101 + 11) % 320) as u32;
    let tree = |seed: usize, prompt: usize, branches: &[usize]| Tree {
        name: format!("group {seed}"),
        prompt_ids: (0..prompt).map(|i| token(seed, i)).collect(),
        branches: branches
            .iter()
            .enumerate()
            .map(|(b, &length)| {
                let ids: Vec<u32> = (0..length).map(|i| token(seed * 10 + b + 1, i)).collect();
                Branch { rollout: b, ..branch(&ids, (b as f64 - 0.7) * (seed as f64 + 0.5)) }
            })
            .collect(),
    };
    let mut trees = vec![tree(0, 9, &[4, 1, 7]), tree(1, 33, &[5, 40]), tree(2, 1, &[3, 2, 2, 6])];
    on_policy(model, adapter, &mut trees);
    for (index, branch) in trees.iter_mut().flat_map(|tree| &mut tree.branches).enumerate() {
        behavior_t(branch).iter_mut().for_each(|logprob| *logprob += 0.05 * (index as f64 % 3.0 - 1.0));
    }
    trees
}

pub fn assert_same_gradient(name: &str, learner: &Learner, got: &[Vec<f64>], want: &[Vec<f64>]) {
    for ((tensor, _), (got, want)) in learner.adapter().tensors().unwrap().iter().zip(got.iter().zip(want)) {
        let norm = want.iter().map(|x| x * x).sum::<f64>().sqrt();
        let difference = got.iter().zip(want).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        assert!(difference <= 1e-5 * (norm + 1e-3), "{name}: {tensor} differs by {difference:.3e} of {norm:.3e}");
    }
}

/// Catches denominators taken per micro-batch, a prompt counted once per branch, and branches that see each other.
#[test]
fn the_gradient_does_not_depend_on_trees_or_micro_batches() {
    for (model, adapter) in UNLIKE.into_iter().filter_map(tiny) {
        let trees = forest(&model, &adapter);
        let learner = Learner::new(model, &adapter, None, &settings()).unwrap();
        let want = assert_same_in_micro_batches(&learner, &trees, &shape());
        let alone = |tree: &Tree| {
            let single = |branch: &Branch| Tree { branches: vec![branch.clone()], ..tree.clone() };
            tree.branches.iter().map(single).collect::<Vec<_>>()
        };
        let rows: Vec<Tree> = trees.iter().flat_map(alone).collect();
        assert_same_gradient("one row per branch", &learner, &gradient(&learner, &rows, &shape()), &want);
    }
}

/// The gradient of a forest, after finding that it is the same in small micro-batches.
pub fn assert_same_in_micro_batches(learner: &Learner, trees: &[Tree], shape: &StepShape) -> Vec<Vec<f64>> {
    let want = gradient(learner, trees, shape);
    for micro_tokens in [72, 73, 80, 100] {
        let got = gradient(learner, trees, &StepShape { micro_tokens, ..*shape });
        assert_same_gradient(&format!("micro_tokens {micro_tokens}"), learner, &got, &want);
    }
    want
}

#[test]
fn a_completion_that_does_not_fit_is_named() {
    let Some((model, adapter)) = tiny("llama") else { return };
    let trees = forest(&model, &adapter);
    let learner = Learner::new(model, &adapter, None, &settings()).unwrap();
    let error = learner
        .gradient(&[Portion::sampled(trees.to_vec())], &StepShape { micro_tokens: 71, ..shape() }, &mut |_, _| Ok(()))
        .err()
        .unwrap();
    assert!(error.to_string().contains("group 1, rollout 1"), "{error}");
}

/// The whole model's backward against central differences of its loss, in directions that touch every tensor.
#[test]
fn the_gradient_equals_finite_differences() {
    assert_finite_differences(&shape());
}

pub fn assert_finite_differences(shape: &StepShape) {
    for (model, adapter) in UNLIKE.into_iter().filter_map(tiny) {
        let trees = forest(&model, &adapter);
        let learner = Learner::new(model.clone(), &adapter, None, &settings()).unwrap();
        let gradients =
            learner.gradient(&[Portion::sampled(trees.to_vec())], shape, &mut |_, _| Ok(())).unwrap().gradients;
        let loss = |scale: f64| {
            let moved = adapter
                .tensors()
                .unwrap()
                .into_iter()
                .zip(&gradients)
                .map(|((name, tensor), gradient)| (name, (tensor + (gradient * scale).unwrap()).unwrap()));
            let moved = like_tiny(&model, moved);
            let learner = Learner::new(model.clone(), &moved, None, &settings()).unwrap();
            learner.gradient(&[Portion::sampled(trees.to_vec())], shape, &mut |_, _| Ok(())).unwrap().report.loss
        };
        let square: f64 = gradients.iter().map(|g| values(g).iter().map(|x| x * x).sum::<f64>()).sum();
        let step = 2e-3 / square.sqrt();
        check::close("directional derivative", (loss(step) - loss(-step)) / (2.0 * step), square, 5e-3);
    }
}

/// What is lost where products round their inputs to bf16: the direction of the gradient must stay, and its size. The weights
/// are stored in bf16, as published ones are. Random weights are harsher than trained ones: their tiny models lose one to
/// five hundredths.
#[test]
fn the_gradient_in_bf16_is_near_that_in_f32() {
    for folder in tiny_models() {
        let rounded = tempfile::tempdir().unwrap();
        let mut all = tensors(&folder.join("model.safetensors"));
        all.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(DType::BF16).unwrap());
        candle_core::safetensors::save(&all, rounded.path().join("model.safetensors")).unwrap();
        std::fs::copy(folder.join("config.json"), rounded.path().join("config.json")).unwrap();
        let of = |kernel: Kernel| {
            let model = Arc::new(Model::open(rounded.path(), kernel).unwrap());
            let (adapter, _) = adapter(&model, &folder.join("adapter_lora"));
            let trees = forest(&model, &adapter);
            // With dropout ratios are not near 1, and a token on the edge of clipping would be in or out.
            let unclipped = Settings { clip: [1.0, 1e9], ..settings() };
            let learner = Learner::new(model.clone(), &adapter, None, &unclipped).unwrap();
            let logprobs = completion_logprobs(&model, Some(&adapter), &trees, 4096, 1.0).unwrap().concat();
            let gradients = [shape(), dropping()].map(|shape| gradient(&learner, &trees, &shape).concat());
            gradients.map(|gradient| (gradient, logprobs.clone()))
        };
        let exact = of(check::f32_kernel());
        let pairs = check::kernels()
            .into_iter()
            .flat_map(|kernel| of(kernel).into_iter().zip(exact.clone()).map(move |(got, want)| (kernel, got, want)));
        for (kernel, (got, logprobs), (want, exact)) in pairs {
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let off: Vec<f64> = got.iter().zip(&want).map(|(got, want)| got - want).collect();
            let difference = (dot(&off, &off) / dot(&want, &want)).sqrt();
            let cosine = dot(&got, &want) / (dot(&got, &got) * dot(&want, &want)).sqrt();
            let gaps: f64 = logprobs.iter().zip(&exact).map(|(got, want)| (got - want).abs()).sum::<f64>();
            let name = format!("{} {kernel:?}", folder.file_name().unwrap().display());
            eprintln!(
                "{name}: gradient off by {difference:.2e}, cosine 1 − {:.1e}, log-probabilities off by {:.1e} in the mean",
                1.0 - cosine,
                gaps / exact.len() as f64
            );
            let (most, least) = if kernel.dtype() == Dtype::Bf16 { (5e-2, 0.999) } else { (1e-4, 0.999_999) };
            assert!(difference <= most && cosine >= least, "{name}: off by {difference}, cosine {cosine}");
        }
    }
}

/// A gradient that is not finite must stop the step and leave the adapter as it was.
#[test]
fn a_gradient_that_is_not_finite_is_an_error() {
    let Some((model, adapter)) = tiny("llama") else { return };
    let tensors = adapter.tensors().unwrap().into_iter().map(|(name, tensor)| {
        let broken = name.contains("layers.2.mlp.up_proj.lora_B");
        let tensor = if broken { (tensor * f64::INFINITY).unwrap() } else { tensor };
        (name, tensor)
    });
    let broken = like_tiny(&model, tensors);
    let trees = forest(&model, &adapter);
    let mut learner = Learner::new(model, &broken, None, &settings()).unwrap();
    let before: Vec<Tensor> =
        learner.adapter().tensors().unwrap().into_iter().map(|(_, t)| t.copy().unwrap()).collect();
    assert!(learner.step(&[Portion::sampled(trees.to_vec())], &shape(), &mut |_, _| Ok(())).is_err());
    for ((name, after), before) in learner.adapter().tensors().unwrap().iter().zip(before) {
        assert!(
            values(after).iter().zip(values(&before)).all(|(a, b)| a.to_bits() == b.to_bits()),
            "{name} was updated"
        );
    }
}

#[test]
fn learning_rates_warm_up_and_follow_their_schedule() {
    let rates = |schedule, warmup_steps| {
        let settings = Settings { learning_rate: 8.0, schedule, warmup_steps, ..Settings::default() };
        (0..6).map(|step| learning_rate(&settings, step, 6)).collect::<Vec<_>>()
    };
    assert_eq!(rates(Schedule::Constant, 2), [4.0, 8.0, 8.0, 8.0, 8.0, 8.0]);
    assert_eq!(rates(Schedule::Linear, 2), [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]);
    let cosine = [8.0, 8.0 * 0.5 * (1.0 + 0.5 * 3f64.sqrt()), 6.0, 4.0, 2.0, 8.0 * 0.5 * (1.0 - 0.5 * 3f64.sqrt())];
    check::all_close("cosine", &rates(Schedule::Cosine, 0), &cosine, 1e-12);
    let all_warmup = rates(Schedule::Cosine, 100);
    assert!(all_warmup.windows(2).all(|pair| pair[0] < pair[1]), "{all_warmup:?}");
}
