//! The decoder of `candor::cuda` around kernels that run on a processor, beside the decoder of this processor: log-probabilities,
//! gradients, samples.

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use candor::config::Quantization;
use candor::learner::portion::Portion;
use candor::learner::tree::{Branch, Tree};
use candor::learner::{Learner, StepDropout, StepShape, completion_logprobs};
use candor::model::{Model, Weights};
use candor::ops::kernel::Kernel;
use candor::policy::Adapter;
use candor::sampler::Generation;
use candor::sampler::local::LocalSampler;
use candor::tokenizer::Tokenizer;

use crate::cuda_device::{gpu, on_host as device_on_host};
use crate::learner::{forest, golden_adapters, gradient, on_policy, settings, shape};
use crate::model::{adapter, tiny_models};
use crate::sampler::{request, sample, settings as sampling};
use crate::{check, toy};

/// How far a device may be from numbers in f32, measured by how far this processor's own bf16 is: tiny models with random weights
/// magnify what bf16 rounds.
const AS_FAR: f64 = 3.0;

fn on_gpu(folder: &Path, quantization: Option<Quantization>) -> Option<Arc<Model>> {
    Some(Arc::new(Model::load_on(&gpu()?, &Weights::open(folder).unwrap(), quantization).unwrap()))
}

/// The same on this processor.
fn on_host(folder: &Path, quantization: Option<Quantization>, kernel: Kernel) -> Arc<Model> {
    Arc::new(Model::load(&Weights::open(folder).unwrap(), quantization, kernel, &Device::Cpu).unwrap())
}

/// On the device, in f32, and in bf16 on this processor where it can do that.
fn all(folder: &Path, quantization: Option<Quantization>) -> Option<[Option<Arc<Model>>; 3]> {
    let rounding = check::kernels().into_iter().find(|kernel| kernel.rounds_inputs());
    let host = |kernel| on_host(folder, quantization, kernel);
    Some([Some(on_gpu(folder, quantization)?), Some(host(check::f32_kernel())), rounding.map(host)])
}

fn distance(got: &[f64], want: &[f64]) -> f64 {
    got.iter().zip(want).map(|(got, want)| (got - want).powi(2)).sum::<f64>().sqrt()
}

/// What a device computes is as near to f32 as what this processor computes in bf16, or to a sixth where it has no bf16.
#[track_caller]
fn assert_near(name: &str, [device, f32, bf16]: [Option<Vec<f64>>; 3]) {
    let (device, f32) = (device.unwrap(), f32.unwrap());
    let norm = distance(&f32, &vec![0.0; f32.len()]);
    let far = bf16.map_or(norm / 6.0 / AS_FAR, |bf16| distance(&bf16, &f32));
    let got = distance(&device, &f32);
    assert!(
        got <= AS_FAR * far + 1e-3 * norm,
        "{name}: {got:.2e} from f32, where {far:.2e} is usual and {norm:.2e} all"
    );
}

/// Log-probabilities and gradients of a forest.
fn assert_all_near(name: &str, models: [Option<Arc<Model>>; 3], adapter: &Adapter, shape: &StepShape) {
    let trees = forest(models[1].as_ref().unwrap(), adapter);
    let logprobs = |model: &Arc<Model>| completion_logprobs(model, Some(adapter), &trees, 4096, 0.7).unwrap().concat();
    assert_near(&format!("{name}, log-probabilities"), models.each_ref().map(|model| model.as_ref().map(logprobs)));
    let gradients = |model: &Arc<Model>| {
        let learner = Learner::new(model.clone(), adapter, None, &settings()).unwrap();
        gradient(&learner, &trees, shape)
    };
    let gradients = models.each_ref().map(|model| model.as_ref().map(gradients));
    for (index, (tensor, _)) in adapter.tensors().unwrap().iter().enumerate() {
        let own = gradients.each_ref().map(|gradients| gradients.as_ref().map(|tensors| tensors[index].clone()));
        assert_near(&format!("{name}, {tensor}"), own);
    }
}

/// Catches arguments in another order than a kernel has them, wrong shapes and places, what is read before it is written, and a
/// backward pass that leaves something out, for every family.
#[test]
fn log_probabilities_and_gradients_are_the_processors() {
    for (folder, name) in golden_adapters() {
        let Some(models) = all(&folder, None) else { return };
        let (adapter, _) = adapter(models[1].as_ref().unwrap(), &folder.join(format!("adapter_{name}")));
        assert_all_near(&format!("{} {name}", folder.display()), models, &adapter, &shape());
    }
}

fn toy_adapter(models: &[Option<Arc<Model>>; 3]) -> Adapter {
    adapter(models[1].as_ref().unwrap(), &toy::model().join("adapter_lora_all_rs")).0
}

/// Catches a mask of another projection, and one that is left out on the way back.
#[test]
fn the_same_inputs_are_dropped() {
    let Some(models) = all(&toy::model(), None) else { return };
    let (dropout, adapter) = (Some(StepDropout { share: 0.3, seed: 5, step: 9 }), toy_adapter(&models));
    assert_all_near("dropout", models, &adapter, &StepShape { dropout, ..shape() });
}

/// Catches a packed weight that is unpacked as another type, or for another layer.
#[test]
fn packed_weights_compute_the_same() {
    for quantization in [Quantization::Nf4, Quantization::Q8] {
        let Some(models) = all(&toy::model(), Some(quantization)) else { return };
        let adapter = toy_adapter(&models);
        assert_all_near(&format!("{quantization:?}"), models, &adapter, &shape());
    }
}

/// The learner's log-probabilities of what the sampler chose are the sampler's own, and most first tokens are the processor's:
/// catches keys in wrong rows, a store that is used twice, and adapters that are mixed up.
#[test]
fn samples_are_those_of_the_model() {
    for folder in tiny_models() {
        let Some(device) = on_gpu(&folder, None) else { return };
        let host = on_host(&folder, None, check::f32_kernel());
        let (adapter, _) = adapter(&host, &folder.join("adapter_lora"));
        let requests = [request(1, 40, 3), request(2, 3, 2), request(3, 9, 1)];
        for temperature in [0.0, 1.3] {
            let of = |model: &Arc<Model>| {
                let tokenizer = Arc::new(Tokenizer::from_folder(&folder).unwrap());
                let mut sampler = LocalSampler::new(model.clone(), tokenizer);
                sample(&mut sampler, &requests, Some(&adapter), &sampling(12, temperature))
            };
            let (got, want) = (of(&device), of(&host));
            let same = got.iter().zip(&want).filter(|(got, want)| got.ids[..2] == want.ids[..2]).count();
            assert!(same >= 4, "{}: {same} of {} begin as on the processor", folder.display(), got.len());
            let tempered = if temperature == 0.0 { 1.0 } else { temperature };
            for Generation { group, ids, behavior_t, .. } in &got {
                let branches = vec![Branch::demonstration(ids.clone())];
                let tree = Tree { name: "sampled".into(), prompt_ids: requests[*group].prompt_ids.clone(), branches };
                let learned = completion_logprobs(&device, Some(&adapter), &[tree], 4096, tempered).unwrap().concat();
                let behavior: Vec<f64> = behavior_t.iter().copied().map(f64::from).collect();
                let mean = distance(&behavior, &learned) / (ids.len() as f64).sqrt();
                assert!(mean < 0.1, "{}: log-probabilities differ by {mean:.1e}", folder.display());
            }
        }
    }
}

/// A step on the device moves the adapter, and the next log-probabilities are the new adapter's.
#[test]
fn a_step_is_seen_by_the_next_forward_pass() {
    let Some(device) = on_gpu(&toy::model(), None) else { return };
    let host = on_host(&toy::model(), None, check::f32_kernel());
    let (adapter, _) = adapter(&host, &toy::model().join("adapter_lora_all_rs"));
    let mut trees = forest(&host, &adapter);
    on_policy(&device, &adapter, &mut trees);
    let mut learner = Learner::new(device.clone(), &adapter, None, &settings()).unwrap();
    let shape = StepShape { learning_rate: 1e-2, ..shape() };
    learner.step(&[Portion::sampled(trees.clone())], &shape, &mut |_, _| Ok(())).unwrap();
    let logprobs = |model: &Arc<Model>, adapter: &Adapter| {
        completion_logprobs(model, Some(adapter), &trees, 4096, 1.0).unwrap().concat()
    };
    let after = logprobs(&device, learner.adapter());
    let moved = distance(&after, &logprobs(&device, &adapter));
    let off = distance(&after, &logprobs(&host, learner.adapter()));
    assert!(moved > 0.1 && off < 0.1 * moved, "moved by {moved:.2e}, {off:.2e} from the processor's");
}

/// Out of memory is an error that says what there is and what to lower, and nothing is left behind.
#[test]
fn out_of_memory_says_what_to_lower() {
    let folder = toy::model();
    let weights = Weights::open(&folder).unwrap();
    let Some(small) = device_on_host(1 << 16) else { return };
    let refused = format!("{:#}", Model::load_on(&small, &weights, None).err().unwrap());
    assert!(refused.contains("out of memory") && refused.contains("choose a smaller model"), "{refused}");
    assert_eq!(small.device().room().unwrap().free, 1 << 16, "what was loaded is given back");
    let gpu = device_on_host(1 << 21).unwrap();
    gpu.set_plan("base 1, keys 2".into());
    let model = Model::load_on(&gpu, &weights, None).unwrap();
    let refused = format!("{:#}", model.store(100_000).err().unwrap());
    assert!(
        refused.contains("keys") && refused.contains("lower batch.group") && refused.contains("base 1, keys 2"),
        "{refused}"
    );
}
