//! AdamW of `candor::cuda` around kernels that run on a processor, beside the optimizer of this processor.

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use candor::checkpoint::{self, State};
use candor::config::{Config, Learner as Settings};
use candor::cuda::device::{Gpu, Purpose};
use candor::learner::optimizer::AdamW;
use candor::learner::portion::Portion;
use candor::learner::{Learner, StepShape, completion_logprobs};
use candor::model::{Gradients, Model, Weights};
use candor::peft;
use candor::policy::Adapter;

use crate::cuda_device::gpu;
use crate::cuda_on_host::numbers;
use crate::learner::{forest, settings, shape};
use crate::ops::floats;
use crate::{check, toy};

/// Both of one kind: on this processor, and on the device.
type Both<T> = [T; 2];

fn models(gpu: &Arc<Gpu>) -> Both<Arc<Model>> {
    let weights = Weights::open(&toy::model()).unwrap();
    let host = Model::load(&weights, None, check::f32_kernel(), &Device::Cpu).unwrap();
    [host, Model::load_on(gpu, &weights, None).unwrap()].map(Arc::new)
}

fn config() -> Config {
    toy::config("lora.rank = 4\nlearner.weight_decay = 0.1")
}

/// A fresh adapter with an update behind it that made all numbers unlike zero.
fn adapter(model: &Model) -> Adapter {
    let mut adapter = Adapter::initialize(&model.architecture, &config().lora, 7, &Device::Cpu).unwrap();
    let gradients = split(&adapter, &numbers(3, adapter.numbers()));
    AdamW::new(&adapter, None).unwrap().step(&mut adapter, Gradients::Host(gradients), 0.1, &settings()).unwrap();
    adapter
}

/// Numbers of all tensors, as those of each.
fn split(adapter: &Adapter, mut numbers: &[f32]) -> Vec<Vec<f32>> {
    let mut next = |count| numbers.split_off(..count).unwrap().to_vec();
    adapter.tensors().unwrap().iter().map(|(_, tensor)| next(tensor.elem_count())).collect()
}

/// All numbers of an adapter, and of its moments.
fn state(adapter: &Adapter, optimizer: &AdamW) -> [Vec<f32>; 3] {
    let tensors = adapter.tensors().unwrap().into_iter().map(|(_, tensor)| tensor).collect();
    let [first, second] = optimizer.moments(adapter).unwrap();
    [tensors, first, second].map(|tensors: Vec<_>| tensors.iter().flat_map(floats).collect())
}

/// Both optimizers, which began with the same adapter.
struct Pair {
    gpu: Arc<Gpu>,
    adapters: Both<Adapter>,
    optimizers: Both<AdamW>,
}

impl Pair {
    fn new() -> Option<Self> {
        let gpu = gpu()?;
        let adapter = adapter(&models(&gpu)[0]);
        let optimizers = [None, Some(&gpu)].map(|gpu| AdamW::new(&adapter, gpu).unwrap());
        Some(Self { adapters: [adapter.clone(), adapter], optimizers, gpu })
    }

    /// One step of both with the same gradient.
    fn step(&mut self, gradient: &[f32], settings: &Settings) -> Both<anyhow::Result<f64>> {
        let there = Gradients::Gpu(self.gpu.upload(Purpose::Adapter, gradient).unwrap());
        let here = Gradients::Host(split(&self.adapters[0], gradient));
        let [host, device] = &mut self.optimizers;
        let [of_host, of_device] = &mut self.adapters;
        [host.step(of_host, here, 0.01, settings), device.step(of_device, there, 0.01, settings)]
    }

    fn states(&self) -> Both<[Vec<f32>; 3]> {
        [0, 1].map(|side| state(&self.adapters[side], &self.optimizers[side]))
    }
}

/// Every number is within a bound that is its own.
#[track_caller]
fn assert_within(what: &str, got: &[f32], want: &[f32], bound: impl Fn(f32) -> f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (index, (&got, &want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= bound(want), "{what}: number {index} is {got}, not {want}");
    }
}

/// Catches constants that were rounded before they were subtracted from 1, a tensor that is not decayed, a gradient that is clipped
/// twice or not at all, and moments that are not kept.
///
/// The bound: an update rounds a number some six times, and a GPU may round products of which it makes sums once less; the norms
/// are summed up in another precision, so that the scale of clipping is another in its last bit. That is ten times 2⁻²⁴ of what the
/// step is made of, in each of four steps: of the learning rate beside a number itself, and of the largest first moment.
#[test]
fn updates_are_the_processors() {
    const CLOSE: f32 = 4.0 * 10.0 / (1 << 24) as f32;
    for (max_grad_norm, weight_decay) in [(1e9, 0.0), (0.5, 0.3), (0.5, 0.0)] {
        let settings = Settings { max_grad_norm, weight_decay, ..settings() };
        let Some(mut both) = Pair::new() else { return };
        let before = both.states()[0][0].clone();
        for step in 0..4 {
            let gradient = numbers(10 + step, before.len());
            let [host, device] = both.step(&gradient, &settings).map(Result::unwrap);
            check::close("norm", device, host, 1e-6);
            let [host, device] = both.states();
            let largest = |values: &[f32]| values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            let name = format!("limit {max_grad_norm}, decay {weight_decay}, step {step}");
            assert_within(&name, &device[0], &host[0], |want| CLOSE * (want.abs() + 0.01));
            let size = largest(&host[1]);
            assert_within(&format!("{name}, first moment"), &device[1], &host[1], |_| CLOSE * size);
            assert_within(&format!("{name}, second moment"), &device[2], &host[2], |want| CLOSE * want);
        }
        let moved = both.states()[1][0].iter().zip(&before).all(|(after, before)| after != before);
        assert!(moved && both.optimizers.iter().all(|optimizer| optimizer.updates() == 4));
    }
}

/// Catches an update with numbers that are none, and another word about it than the processor's; also where only the squares are too
/// large for f32.
#[test]
fn a_gradient_that_is_not_finite_is_named_and_updates_nothing() {
    let Some(mut both) = Pair::new() else { return };
    let before = both.states();
    let name = both.adapters[0].names().nth(5).unwrap();
    let at: usize = split(&both.adapters[0], &before[0][0])[..5].iter().map(Vec::len).sum();
    for value in [f32::NAN, f32::NEG_INFINITY, 1e30] {
        let mut gradient = numbers(1, before[0][0].len());
        gradient[at] = value;
        gradient[at + 7] = f32::NAN;
        let [host, device] = both.step(&gradient, &settings()).map(|result| result.unwrap_err().to_string());
        assert!(device.contains(&name) && device == host, "{device}\n{host}");
    }
    assert!(both.states() == before && both.optimizers.iter().all(|optimizer| optimizer.updates() == 0));
}

fn learner(model: &Arc<Model>, adapter: &Adapter) -> Learner {
    Learner::new(model.clone(), adapter, None, &config().learner).unwrap()
}

fn learn(learner: &mut Learner, trees: &[candor::learner::tree::Tree]) {
    let shape = StepShape { learning_rate: 1e-2, ..shape() };
    learner.step(&[Portion::sampled(trees.to_vec())], &shape, &mut |_, _| Ok(())).unwrap();
}

/// What the device computes with a version that was made there is what it computes with its numbers sent there, to the bit, also when
/// they are read after later steps; and only what is used stays in memory.
#[test]
fn a_version_that_a_step_made_is_that_of_its_numbers() {
    let Some(gpu) = gpu() else { return };
    let [host, device] = models(&gpu);
    let start = adapter(&host);
    let trees = forest(&host, &start);
    let (held, peak) = gpu.used(Purpose::Adapter);
    let mut learner = learner(&device, &start);
    let mut version = |steps| {
        (0..steps).for_each(|_| learn(&mut learner, &trees));
        learner.adapter().publish(0)
    };
    let versions = [version(1), version(2)];
    // In f32: numbers, two moments, a gradient; and two parts in bf16. While the last version is made it is the fourth here.
    let numbers = start.numbers();
    let (now, most) = gpu.used(Purpose::Adapter);
    assert_eq!(now - held, numbers * (3 * 8 + 8), "the first, which `start` holds, and two more");
    assert!(most <= peak.max(held + numbers * (4 * 8 + 12) + 4096), "{most} bytes for {numbers} numbers");
    let logprobs = |adapter: &Adapter| completion_logprobs(&device, Some(adapter), &trees, 4096, 1.0).unwrap();
    let [first, last] = versions.map(|version| {
        let mut sent = start.publish(0);
        sent.replace(version.tensors().unwrap().into_iter().map(|(_, tensor)| tensor).collect());
        assert_eq!(logprobs(&version), logprobs(&sent));
        logprobs(&version)
    });
    assert!(logprobs(&start) != first && first != last, "every step moves the adapter");
    drop(start);
    assert_eq!(gpu.used(Purpose::Adapter).0 - held, numbers * (8 + 8), "what the learner holds");
}

fn saved(run: &Path, learner: &Learner, next_step: u64) -> Vec<Vec<u8>> {
    checkpoint::save(run, &config(), learner, next_step).unwrap();
    let newest = checkpoint::newest(run).unwrap().unwrap();
    let files = ["adapter_model.safetensors", "optimizer.safetensors"];
    files.map(|file| std::fs::read(newest.join(file)).unwrap()).to_vec()
}

/// A checkpoint says the same wherever it was saved and loaded, and a device goes on from its own as if it had not stopped. Catches
/// moments in each other's places, and a format of the device's own.
#[test]
fn checkpoints_go_from_device_to_processor_and_back() {
    let Some(gpu) = gpu() else { return };
    let models = models(&gpu);
    let trees = forest(&models[0], &adapter(&models[0]));
    let mut straight = models.each_ref().map(|model| learner(model, &adapter(model)));
    straight.iter_mut().for_each(|learner| (0..2).for_each(|_| learn(learner, &trees)));
    for (from, saver) in straight.iter_mut().enumerate() {
        let place = tempfile::tempdir().unwrap();
        let want = saved(place.path(), saver, 2);
        let newest = checkpoint::newest(place.path()).unwrap().unwrap();
        let read = checkpoint::state(&newest).unwrap();
        assert_eq!(read, State { next_step: 2, updates: 2 });
        let mut resumed = models.each_ref().map(|model| {
            let restored = peft::load(&newest, &model.architecture, &config().lora, &Device::Cpu).unwrap();
            let mut learner = learner(model, &restored);
            checkpoint::restore_moments(&newest, &mut learner, &read).unwrap();
            learner
        });
        for (to, learner) in resumed.iter().enumerate() {
            assert!(saved(place.path(), learner, 2) == want, "from {from} to {to}");
        }
        for learner in [&mut *saver, &mut resumed[from]] {
            learn(learner, &trees);
        }
        assert!(saved(place.path(), saver, 3) == saved(place.path(), &resumed[from], 3), "from {from} to itself");
    }
}
