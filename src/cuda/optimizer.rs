//! AdamW on the device, over the numbers of all tensors of an adapter at once; the twin of learner/optimizer.rs.

use std::sync::Arc;

use anyhow::Result;

use super::device::{Array, Gpu, Purpose};
use super::factors::Version;
use super::kernels;
use crate::learner::optimizer::Update;
use crate::policy::Adapter;

/// The first and the second moment of every number.
pub struct Moments {
    gpu: Arc<Gpu>,
    values: [Array<f32>; 2],
}

impl Moments {
    /// Zeros for so many numbers.
    pub fn zeros(gpu: &Arc<Gpu>, count: usize) -> Result<Self> {
        let zeros = || gpu.zeros(Purpose::Adapter, count);
        Ok(Self { gpu: gpu.clone(), values: [zeros()?, zeros()?] })
    }

    /// Replaces them.
    pub fn upload(&mut self, values: [&[f32]; 2]) -> Result<()> {
        for (held, values) in self.values.iter_mut().zip(values) {
            *held = self.gpu.upload(Purpose::Adapter, values)?;
        }
        Ok(())
    }

    /// Their values.
    pub fn download(&self) -> Result<[Vec<f32>; 2]> {
        let [first, second] = &self.values;
        Ok([first.download()?, second.download()?])
    }

    /// The sum of a gradient's squares.
    pub fn squares(&self, gradient: &Array<f32>) -> Result<f64> {
        let sums: Array<f64> = self.gpu.array(Purpose::Adapter, kernels::SUMS)?;
        kernels::sum_of_squares(&self.gpu, gradient.view(), sums.view(), gradient.len())?;
        Ok(sums.download()?.iter().sum())
    }

    /// Makes the adapter's next version. Nothing of it leaves the device.
    pub(crate) fn update(&self, adapter: &mut Adapter, gradient: &Array<f32>, update: &Update) -> Result<()> {
        let (gpu, held) = (&self.gpu, adapter.version_on_gpu(&self.gpu)?);
        let next = Version::new(gpu, adapter.layout(), || {
            let values = gpu.array(Purpose::Adapter, gradient.len())?;
            let moments = self.values.each_ref().map(Array::view);
            kernels::adamw(gpu, [held.values.view(), values.view()], moments, gradient.view(), update, values.len())?;
            Ok(values)
        })?;
        adapter.replace_on_gpu(next);
        Ok(())
    }
}
