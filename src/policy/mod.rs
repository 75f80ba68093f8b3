//! The adapter: what is trained, published to the sampler, and saved. The base model never changes.

mod layout;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};

use crate::config::Lora;
use crate::cuda::device::{Gpu, Purpose};
use crate::cuda::factors::{Factors, Version};
use crate::model::{Architecture, Projection};
use crate::ops::kernel::Kernel;
use crate::ops::linear::LowRank;
use crate::random;
pub(crate) use layout::{Layout, Pair};
use layout::{NAMES, tensor_name};

/// A low-rank adapter (LoRA, Hu et al. 2021) over some projections of every layer. Its numbers are never written in place, so a
/// clone stays what it is while another is trained.
#[derive(Clone)]
pub struct Adapter {
    /// Optimizer steps that went into it.
    pub version: u64,
    layout: Arc<Layout>,
    values: Arc<Values>,
}

/// The numbers of one version in the forms that were asked for, for all clones of it.
struct Values {
    /// A and B of every pair: from the beginning, or once a version that was made on a GPU is read.
    tensors: OnceLock<Vec<Tensor>>,
    /// Every pair as the products of each kernel want it.
    ready: Vec<[OnceLock<LowRank>; Kernel::ALL.len()]>,
    /// On a GPU: from the beginning, or once they are used there.
    on_gpu: Mutex<Option<Arc<Version>>>,
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// The numbers of tensors, one after the other.
pub(crate) fn numbers(tensors: &[Tensor]) -> Result<Vec<f32>> {
    Ok(tensors.iter().map(floats).collect::<Result<Vec<_>>>()?.concat())
}

impl Values {
    fn new(layout: &Layout) -> Self {
        let ready = layout.pairs.iter().map(|_| Default::default()).collect();
        Self { tensors: OnceLock::new(), ready, on_gpu: Mutex::default() }
    }
}

impl Adapter {
    /// A fresh adapter as PEFT makes one: A uniform in ±1/√in (kaiming with a = √5), B zero; it changes nothing yet.
    ///
    /// # Errors
    /// If the device fails.
    pub fn initialize(architecture: &Architecture, lora: &Lora, seed: u64, device: &Device) -> Result<Self> {
        Self::build(architecture, lora, |layer, projection, part, shape| {
            if part == "lora_B" {
                return Ok(Tensor::zeros(shape, DType::F32, device)?);
            }
            let bound = 1.0 / (shape.1 as f64).sqrt();
            let value = |index| {
                let key =
                    random::key(seed, random::Purpose::AdapterInit, &[layer as u64, projection as u64, index as u64]);
                ((2.0 * random::uniform(key) - 1.0) * bound) as f32
            };
            Ok(Tensor::from_vec((0..shape.0 * shape.1).map(value).collect(), shape, device)?)
        })
    }

    /// An adapter from named tensors, as PEFT saves them.
    ///
    /// # Errors
    /// If a tensor is missing, left over, or has another shape than the model and the rank ask for.
    pub fn from_tensors(
        architecture: &Architecture,
        lora: &Lora,
        mut tensors: HashMap<String, Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let adapter = Self::build(architecture, lora, |layer, projection, part, shape| {
            let name = tensor_name(layer, projection, part);
            let tensor = tensors.remove(&name).with_context(|| format!("adapter: tensor {name} is missing"))?;
            let found = tensor.dims();
            ensure!(
                found == [shape.0, shape.1],
                "adapter: tensor {name} has shape {found:?}, expected {shape:?}; was it made for another model?"
            );
            Ok(tensor.to_dtype(DType::F32)?.to_device(device)?)
        })?;
        let mut left: Vec<_> = tensors.into_keys().collect();
        left.sort();
        ensure!(left.is_empty(), "adapter: tensors that this model has no place for: {}", left.join(", "));
        Ok(adapter)
    }

    fn build(
        architecture: &Architecture,
        lora: &Lora,
        mut tensor: impl FnMut(usize, Projection, &str, (usize, usize)) -> Result<Tensor>,
    ) -> Result<Self> {
        let layout = Arc::new(Layout::new(architecture, lora));
        let mut tensors = Vec::new();
        for pair in &layout.pairs {
            for (part, shape) in NAMES.into_iter().zip(pair.shapes()) {
                tensors.push(tensor(pair.layer, pair.projection, part, shape)?);
            }
        }
        let mut adapter = Self { version: 0, values: Arc::new(Values::new(&layout)), layout };
        adapter.replace(tensors);
        Ok(adapter)
    }

    /// The pair of one projection, if it carries one. What a GPU made was read before: see [`Adapter::host_tensors`].
    pub(crate) fn low_rank(&self, layer: usize, projection: Projection, kernel: Kernel) -> Option<&LowRank> {
        let (index, kernel) = (self.layout.index(layer, projection)?, kernel.of_adapters());
        Some(self.values.ready[index][kernel as usize].get_or_init(|| {
            let tensors = self.values.tensors.get().expect("a call's adapters are read before it is computed here");
            let [a, b] = [0, 1].map(|part| floats(&tensors[2 * index + part]).expect("adapters are f32"));
            LowRank::new(a, b, self.layout.pairs[index].rank, self.layout.scale, kernel)
        }))
    }

    /// What products on a GPU are made with.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn on_gpu(&self, gpu: &Arc<Gpu>) -> Result<Arc<Factors>> {
        Ok(self.version_on_gpu(gpu)?.factors.clone())
    }

    /// All that a GPU holds of it. It moves there once, whoever asks first.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn version_on_gpu(&self, gpu: &Arc<Gpu>) -> Result<Arc<Version>> {
        let mut held = self.values.on_gpu.lock().expect("nothing panics while it holds the version");
        if let Some(version) = &*held {
            return Ok(version.clone());
        }
        let upload = || gpu.upload(Purpose::Adapter, &numbers(self.host_tensors()?)?);
        let version = Arc::new(Version::new(gpu, &self.layout, upload)?);
        *held = Some(version.clone());
        Ok(version)
    }

    /// A and B of every pair on this processor. What a GPU made moves here once, whoever asks first.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn host_tensors(&self) -> Result<&[Tensor]> {
        if let Some(tensors) = self.values.tensors.get() {
            return Ok(tensors);
        }
        let version = self.values.on_gpu.lock().expect("nothing panics while it holds the version").clone();
        let version = version.expect("an adapter's numbers are here or on a GPU");
        let tensors = self.layout.tensors(&version.values.download()?)?;
        Ok(self.values.tensors.get_or_init(|| tensors))
    }

    pub(crate) fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// What the pair of one projection adds to its weight, s · B A [out, in], if it carries one.
    ///
    /// # Errors
    /// If the device fails.
    pub fn delta(&self, layer: usize, projection: Projection) -> Result<Option<Tensor>> {
        let Some([a, b]) = self.indices(layer, projection) else { return Ok(None) };
        let tensors = self.host_tensors()?;
        Ok(Some((tensors[b].matmul(&tensors[a])? * f64::from(self.layout.scale))?))
    }

    /// How many numbers all tensors have.
    pub fn numbers(&self) -> usize {
        self.layout.numbers()
    }

    /// PEFT's name of every tensor, always in the same order.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.layout.names()
    }

    /// Every tensor with its name, in the order of the names.
    ///
    /// # Errors
    /// If a GPU made them and fails.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.names().zip(self.host_tensors()?.iter().cloned()).collect())
    }

    /// The indices into [`Adapter::tensors`] of A and B of one projection, if it carries them.
    pub fn indices(&self, layer: usize, projection: Projection) -> Option<[usize; 2]> {
        let pair = self.layout.index(layer, projection)?;
        Some([2 * pair, 2 * pair + 1])
    }

    /// The same adapter as another version of itself.
    pub fn publish(&self, version: u64) -> Self {
        Self { version, ..self.clone() }
    }

    /// Replaces every tensor, in the order of [`Adapter::tensors`], by one of its shape.
    ///
    /// # Panics
    /// If there are more or fewer: a mistake of the caller.
    pub fn replace(&mut self, tensors: Vec<Tensor>) {
        assert_eq!(tensors.len(), 2 * self.layout.pairs.len(), "one tensor for each");
        self.values = Arc::new(Values { tensors: tensors.into(), ..Values::new(&self.layout) });
    }

    /// Replaces them by what a GPU made.
    pub(crate) fn replace_on_gpu(&mut self, version: Version) {
        self.values = Arc::new(Values { on_gpu: Mutex::new(Some(Arc::new(version))), ..Values::new(&self.layout) });
    }
}
