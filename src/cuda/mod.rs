//! The decoder on an NVIDIA GPU: the arithmetic of [`crate::ops`] in kernels of our own, with cuBLAS for products with weights.
//!
//! All but [`driver`] is compiled in every build: it asks a [`device::Device`] for memory, kernels and products, and tests put one
//! in its place that runs the same kernels on a processor.
//!
//! * [`command`], [`device`]: what is asked of a device, and arrays in its memory
//! * [`kernels`], [`attention`]: the arguments of every kernel; the kernels are the `.cu` files beside it
//! * [`tensors`], [`factors`], [`optimizer`]: the frozen weights, an adapter, and what makes the next version of it
//! * [`call`]: the rows of a forward call
//! * [`layer`], [`decoder`]: forward, backward, log-probabilities and choices
//! * [`graph`], [`steps`]: decoding steps that are started as one
//!
//! A decoding step of a shape that was seen before is one CUDA graph: the decoder runs on a device that writes down its kernels and
//! products and places what it allocates in one range of memory, which all graphs share. Input, adapters and output have places
//! that stay, so that a step is then an upload, a start and a download. A graph ends with the store of keys that it writes to.

mod attention;
mod call;
pub mod command;
pub(crate) mod decoder;
pub mod device;
#[cfg(feature = "cuda")]
pub mod driver;
pub(crate) mod factors;
pub mod graph;
pub(crate) mod kernels;
mod layer;
pub(crate) mod optimizer;
pub mod plan;
mod steps;
pub(crate) mod tensors;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};

use crate::config::{Device, Dtype};
use crate::ops::kernel::Kernel;
use device::Gpu;

/// Where a model is computed, and what multiplies there.
#[derive(Clone)]
pub struct Place {
    /// What multiplies matrices.
    pub kernel: Kernel,
    /// The GPU, if it is one.
    pub gpu: Option<Arc<Gpu>>,
}

impl From<Kernel> for Place {
    /// This processor.
    fn from(kernel: Kernel) -> Self {
        Self { kernel, gpu: None }
    }
}

impl Place {
    /// What a config asks for: `auto` takes the first GPU that this build and this machine offer, unless the processor's
    /// instructions or a type that GPUs do not compute in are asked for.
    ///
    /// # Errors
    /// If it is not there, or cannot compute like this.
    pub fn choose(device: Device, dtype: Dtype, kernel: Option<Kernel>) -> Result<Self> {
        let fits = kernel.is_none() && matches!(dtype, Dtype::Auto | Dtype::Bf16);
        let index = match device {
            Device::Cpu => None,
            Device::Auto => (fits && driver::count().unwrap_or(0) > 0).then_some(0),
            Device::Cuda(index) => {
                ensure!(
                    kernel.is_none(),
                    "it names instructions of the processor; leave it out, or use device = \"cpu\""
                );
                ensure!(fits, "a GPU computes in bf16, not in {dtype:?}; use device = \"cpu\"");
                Some(index)
            }
        };
        match index {
            None => Kernel::choose(dtype, kernel).map(Self::from),
            Some(index) => Ok(Self { kernel: Kernel::Cuda, gpu: Some(open(index)?) }),
        }
    }

    /// What computes best in a type, for commands that have no config.
    ///
    /// # Errors
    /// As [`Place::choose`].
    pub fn automatic(dtype: Dtype) -> Result<Self> {
        Self::choose(Device::Auto, dtype, None)
    }

    /// What computes, in words.
    pub fn name(&self) -> String {
        match &self.gpu {
            Some(gpu) => gpu.device().name().to_string(),
            None => format!("this processor ({:?})", self.kernel),
        }
    }
}

/// The GPU of this index. There is one of each in a process: whoever asks shares its stream and its memory.
fn open(index: usize) -> Result<Arc<Gpu>> {
    static OPEN: Mutex<BTreeMap<usize, Arc<Gpu>>> = Mutex::new(BTreeMap::new());
    let mut all = OPEN.lock().ok().context("another thread failed when it opened a GPU")?;
    if let Some(gpu) = all.get(&index) {
        return Ok(gpu.clone());
    }
    let found = driver::count().with_context(|| format!("cuda:{index}"))?;
    ensure!(
        index < found,
        "cuda:{index}: this machine offers {found} GPUs{}; use device = \"cpu\"",
        if found == 0 { ", or no driver (libcuda.so.1) for them" } else { "" }
    );
    let gpu = Gpu::new(driver::open(index)?);
    all.insert(index, gpu.clone());
    Ok(gpu)
}

/// A build without GPUs.
#[cfg(not(feature = "cuda"))]
mod driver {
    use anyhow::{Result, bail};

    /// As that of a build with them.
    pub fn count() -> Result<usize> {
        bail!(
            "this program was built without GPUs (cargo build --release --features cuda builds one with them); use device = \
             \"cpu\""
        )
    }

    /// As that of a build with them.
    pub fn open(_: usize) -> Result<Box<dyn super::device::Device>> {
        count().and_then(|_| bail!("there is none"))
    }
}
