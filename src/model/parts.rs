//! What a model is put together from: tensors that are read, or what their headers say of them.

use anyhow::{Context, Result};
use candle_core::Device;

use super::{Architecture, Model, Weights};
use crate::config::Quantization;
use crate::ops::kernel::Kernel;
use crate::ops::panels::Panels;
use crate::ops::quantized::Weight;

/// Tensors by their Hugging Face names.
pub(super) trait Parts {
    /// A vector, in f32 in memory.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>>;
    /// An embedding table or head.
    fn table(&mut self, name: &str, shape: &[usize; 2]) -> Result<Panels>;
    /// A projection's weight, which may be packed.
    fn matrix(&mut self, name: &str, shape: &[usize; 2]) -> Result<Weight>;
}

/// Reads them.
pub(super) struct Reading<'a> {
    pub weights: &'a Weights,
    pub architecture: &'a Architecture,
    pub quantization: Option<Quantization>,
    pub kernel: Kernel,
}

impl Parts for Reading<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.weights.tensor(name, shape, self.architecture, &Device::Cpu)?;
        Ok(tensor.to_vec1()?)
    }

    fn table(&mut self, name: &str, shape: &[usize; 2]) -> Result<Panels> {
        self.weights.panels(name, shape, self.architecture, self.kernel)
    }

    fn matrix(&mut self, name: &str, shape: &[usize; 2]) -> Result<Weight> {
        self.weights.matrix(name, shape, self.architecture, self.quantization, self.kernel)
    }
}

/// What a model's weights take, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// All the time.
    pub resident: usize,
    /// The projections of one layer as products want them: the transposed copy in a backward pass.
    pub layer: usize,
    /// Those of them that are packed, while the layer is used.
    pub unpacked: usize,
}

/// Looks at headers only.
struct Headers<'a> {
    weights: &'a Weights,
    architecture: &'a Architecture,
    quantization: Option<Quantization>,
    kernel: Kernel,
    /// Of all layers together, as long as they are counted.
    footprint: Footprint,
}

impl Parts for Headers<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.weights.stored(name, shape, self.architecture)?;
        self.footprint.resident += size_of::<f32>() * shape.iter().product::<usize>();
        Ok(Vec::new())
    }

    fn table(&mut self, name: &str, shape: &[usize; 2]) -> Result<Panels> {
        self.weights.stored(name, shape, self.architecture)?;
        self.footprint.resident += Panels::bytes(shape[0], shape[1], self.kernel);
        Ok(Panels::zeros(0, 0, self.kernel))
    }

    fn matrix(&mut self, name: &str, shape: &[usize; 2]) -> Result<Weight> {
        let stored = self.weights.stored(name, shape, self.architecture)?;
        let bytes = Panels::bytes(shape[0], shape[1], self.kernel);
        self.footprint.layer += bytes;
        match stored.form(self.quantization) {
            None => self.footprint.resident += bytes,
            Some(form) => {
                self.footprint.unpacked += bytes;
                let bytes = stored.packed_bytes(form);
                self.footprint.resident +=
                    bytes.with_context(|| format!("{}: tensor {name}", self.weights.path().display()))?;
            }
        }
        Ok(Weight::Panels(Panels::zeros(0, 0, self.kernel)))
    }
}

/// Notes what is asked for.
#[derive(Default)]
struct Names(Vec<(String, Vec<usize>)>);

impl Parts for Names {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.0.push((name.to_string(), shape.to_vec()));
        Ok(Vec::new())
    }

    fn table(&mut self, name: &str, shape: &[usize; 2]) -> Result<Panels> {
        self.tensor(name, shape).map(|_| Panels::zeros(0, 0, Kernel::Gemm))
    }

    fn matrix(&mut self, name: &str, shape: &[usize; 2]) -> Result<Weight> {
        self.table(name, shape).map(Weight::Panels)
    }
}

impl Model {
    /// Name and shape of every tensor of such a model.
    ///
    /// # Errors
    /// None that a description which was read can bring about.
    pub fn tensors(architecture: &Architecture) -> Result<Vec<(String, Vec<usize>)>> {
        let mut names = Names::default();
        Self::assemble(architecture, Kernel::Gemm, &Device::Cpu, &mut names)?;
        Ok(names.0)
    }

    /// What the weights will take, from the headers alone, which must have every tensor in its shape.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn footprint(
        weights: &Weights,
        architecture: &Architecture,
        quantization: Option<Quantization>,
        kernel: Kernel,
    ) -> Result<Footprint> {
        let footprint = Footprint::default();
        let mut headers = Headers { weights, architecture, quantization, kernel, footprint };
        Self::assemble(architecture, kernel, &Device::Cpu, &mut headers)?;
        let layers = architecture.layers.len().max(1);
        headers.footprint.layer /= layers;
        headers.footprint.unpacked /= layers;
        Ok(headers.footprint)
    }
}
