//! The adapter: what is trained, published to the sampler, and saved. The base model never changes.

use std::sync::{Arc, Mutex, OnceLock};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};

use crate::config::Lora;
use crate::cuda::device::Gpu;
use crate::cuda::factors::Factors;
use crate::model::{Architecture, Projection};
use crate::ops::kernel::Kernel;
use crate::ops::linear::LowRank;
use crate::random::{self, Purpose};

/// A low-rank adapter (LoRA, Hu et al. 2021) over some projections of every layer. Its tensors are never written in place, so
/// a clone stays what it is while another is trained.
#[derive(Clone)]
pub struct Adapter {
    /// Optimizer steps that went into it.
    pub version: u64,
    scale: f32,
    /// Sorted by layer and projection.
    pairs: Vec<Pair>,
    /// Index into `pairs` by layer · 7 + projection.
    index: Vec<Option<usize>>,
    /// Its factors on a GPU, from the first use on: one copy for all clones.
    on_gpu: Arc<Mutex<Option<Arc<Factors>>>>,
}

#[derive(Clone)]
struct Pair {
    layer: usize,
    projection: Projection,
    /// [rank, in].
    a: Tensor,
    /// [out, rank].
    b: Tensor,
    /// Both as the products of each kernel want them, from the first use on.
    ready: [OnceLock<Arc<LowRank>>; Kernel::ALL.len()],
}

impl Pair {
    /// PEFT's names of the two tensors.
    fn names(&self) -> [String; 2] {
        ["lora_A", "lora_B"].map(|part| tensor_name(self.layer, self.projection, part))
    }
}

fn tensor_name(layer: usize, projection: Projection, part: &str) -> String {
    format!("base_model.model.model.layers.{layer}.{}.{part}.weight", projection.module())
}

/// alpha / rank, or alpha / √rank when rank-stabilized (Kalajdzievski 2023).
fn scale(lora: &Lora) -> f32 {
    let rank = lora.rank as f64;
    (lora.alpha / if lora.rslora { rank.sqrt() } else { rank }) as f32
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
                let key = random::key(seed, Purpose::AdapterInit, &[layer as u64, projection as u64, index as u64]);
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
        mut tensors: std::collections::HashMap<String, Tensor>,
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
        let layers = architecture.layers.len();
        let (mut pairs, mut index) = (Vec::new(), vec![None; layers * Projection::ALL.len()]);
        for layer in 0..layers {
            for projection in Projection::ALL.into_iter().filter(|projection| lora.targets.contains(projection)) {
                let (wide, narrow) = architecture.dimensions(projection);
                index[layer * Projection::ALL.len() + projection as usize] = Some(pairs.len());
                let a = tensor(layer, projection, "lora_A", (lora.rank, narrow))?;
                let b = tensor(layer, projection, "lora_B", (wide, lora.rank))?;
                pairs.push(Pair { layer, projection, a, b, ready: Default::default() });
            }
        }
        Ok(Self { version: 0, scale: scale(lora), pairs, index, on_gpu: Default::default() })
    }

    /// The pair of one projection, if it carries one.
    pub fn low_rank(&self, layer: usize, projection: Projection, kernel: Kernel) -> Option<&LowRank> {
        let pair = &self.pairs[self.index[layer * Projection::ALL.len() + projection as usize]?];
        let floats = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let kernel = kernel.of_adapters();
        Some(pair.ready[kernel as usize].get_or_init(|| {
            let (a, b) = (floats(&pair.a), floats(&pair.b));
            let (a, b) = (a.expect("adapters are f32"), b.expect("adapters are f32"));
            Arc::new(LowRank::new(a, b, pair.a.dims()[0], self.scale, kernel))
        }))
    }

    /// The factors on a GPU. They move there once, whoever asks first.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn on_gpu(&self, gpu: &Arc<Gpu>) -> Result<Arc<Factors>> {
        let mut held = self.on_gpu.lock().expect("nothing panics while it holds the factors");
        if let Some(factors) = &*held {
            return Ok(factors.clone());
        }
        let pairs = self.pairs.iter().map(|Pair { layer, projection, a, b, .. }| (*layer, *projection, a, b));
        let factors = Arc::new(Factors::new(gpu, self.scale, pairs, self.index.len())?);
        *held = Some(factors.clone());
        Ok(factors)
    }

    /// What the pair of one projection adds to its weight, s · B A [out, in], if it carries one.
    ///
    /// # Errors
    /// If the device fails.
    pub fn delta(&self, layer: usize, projection: Projection) -> Result<Option<Tensor>> {
        let Some(index) = self.index[layer * Projection::ALL.len() + projection as usize] else { return Ok(None) };
        let pair = &self.pairs[index];
        Ok(Some((pair.b.matmul(&pair.a)? * f64::from(self.scale))?))
    }

    /// Every tensor with PEFT's name for it, always in the same order.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let named = |pair: &Pair| pair.names().into_iter().zip([pair.a.clone(), pair.b.clone()]).collect::<Vec<_>>();
        self.pairs.iter().flat_map(named).collect()
    }

    /// The indices into [`Adapter::tensors`] of A and B of one projection, if it carries them.
    pub fn indices(&self, layer: usize, projection: Projection) -> Option<[usize; 2]> {
        let pair = self.index[layer * Projection::ALL.len() + projection as usize]?;
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
        assert_eq!(tensors.len(), 2 * self.pairs.len(), "one tensor for each");
        let mut tensors = tensors.into_iter();
        for pair in &mut self.pairs {
            for tensor in [&mut pair.a, &mut pair.b] {
                *tensor = tensors.next().expect("there are as many");
            }
            pair.ready = Default::default();
        }
        self.on_gpu = Default::default();
    }
}
