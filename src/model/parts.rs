//! What a model is put together from: tensors that are read, or what their headers say of them.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};

use super::{Architecture, Model, Weights};
use crate::config::Quantization;
use crate::ops::quantized::Weight;

/// Tensors by their Hugging Face names.
pub(super) trait Parts {
    /// A tensor that is in f32 in memory.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor>;
    /// A projection's weight, which may be packed.
    fn matrix(&mut self, name: &str, shape: &[usize]) -> Result<Weight>;
}

/// Reads them.
pub(super) struct Reading<'a> {
    pub weights: &'a Weights,
    pub architecture: &'a Architecture,
    pub quantization: Option<Quantization>,
    pub device: &'a Device,
}

impl Parts for Reading<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.tensor(name, shape, self.architecture, self.device)
    }

    fn matrix(&mut self, name: &str, shape: &[usize]) -> Result<Weight> {
        self.weights.matrix(name, shape, self.architecture, self.quantization, self.device)
    }
}

/// What a model's weights take, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// All the time.
    pub resident: usize,
    /// While the largest packed projection is used.
    pub unpacked: usize,
}

/// Looks at headers only.
struct Headers<'a> {
    weights: &'a Weights,
    architecture: &'a Architecture,
    quantization: Option<Quantization>,
    nothing: Tensor,
    footprint: Footprint,
}

impl Parts for Headers<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.stored(name, shape, self.architecture)?;
        self.footprint.resident += in_f32(shape);
        Ok(self.nothing.clone())
    }

    fn matrix(&mut self, name: &str, shape: &[usize]) -> Result<Weight> {
        let stored = self.weights.stored(name, shape, self.architecture)?;
        if let Some(form) = stored.form(self.quantization) {
            let bytes = stored.packed_bytes(form);
            self.footprint.resident +=
                bytes.with_context(|| format!("{}: tensor {name}", self.weights.path().display()))?;
            self.footprint.unpacked = self.footprint.unpacked.max(in_f32(shape));
            return Ok(Weight::Dense(self.nothing.clone()));
        }
        self.tensor(name, shape).map(Weight::Dense)
    }
}

/// Notes what is asked for.
struct Names {
    tensors: Vec<(String, Vec<usize>)>,
    nothing: Tensor,
}

impl Parts for Names {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.tensors.push((name.to_string(), shape.to_vec()));
        Ok(self.nothing.clone())
    }

    fn matrix(&mut self, name: &str, shape: &[usize]) -> Result<Weight> {
        self.tensor(name, shape).map(Weight::Dense)
    }
}

fn in_f32(shape: &[usize]) -> usize {
    size_of::<f32>() * shape.iter().product::<usize>()
}

impl Model {
    /// Name and shape of every tensor of such a model.
    ///
    /// # Errors
    /// None that a description which was read can bring about.
    pub fn tensors(architecture: &Architecture) -> Result<Vec<(String, Vec<usize>)>> {
        let mut names = Names { tensors: Vec::new(), nothing: Tensor::zeros((), DType::F32, &Device::Cpu)? };
        Self::assemble(architecture, &Device::Cpu, &mut names)?;
        Ok(names.tensors)
    }

    /// What the weights will take, from the headers alone, which must have every tensor in its shape.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn footprint(
        weights: &Weights,
        architecture: &Architecture,
        quantization: Option<Quantization>,
    ) -> Result<Footprint> {
        let nothing = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        let mut headers = Headers { weights, architecture, quantization, nothing, footprint: Footprint::default() };
        Self::assemble(architecture, &Device::Cpu, &mut headers)?;
        Ok(headers.footprint)
    }
}
