//! Which instructions multiply matrices: chosen once per run, never by the shape of a product, because a row must come out
//! the same whatever shares its batch.

use std::sync::OnceLock;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::amx;
use crate::config::Dtype;

/// A set of instructions, and with it the type that frozen weights are held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {
    /// Tiles of bf16, sums in f32 (Intel, Sapphire Rapids and later).
    Amx,
    /// Pairs of bf16, sums in f32 (AMD Zen 4 and later, Intel Cooper Lake and later).
    Avx512Bf16,
    /// f32 in vectors of 16.
    Avx512,
    /// f32 through the `gemm` crate, on any processor; rows depend on the shape of their batch in the last bits.
    Gemm,
    /// Weights rounded to 8 bits with a scale for every 32 inputs, the rest in f32 in vectors of 16: half the memory to walk
    /// through for every token. Only to talk and to sample with: asked for by its type.
    #[serde(skip_deserializing)]
    Int8,
    /// Products on a GPU in bf16, sums in f32. Where a model is computed decides on it, never `model.kernel`.
    #[serde(skip_deserializing)]
    Cuda,
}

impl Kernel {
    /// Those that train, from the fastest on.
    pub const ALL: [Kernel; 4] = [Kernel::Amx, Kernel::Avx512Bf16, Kernel::Avx512, Kernel::Gemm];

    /// What weights are held in.
    pub fn dtype(self) -> Dtype {
        match self {
            Kernel::Amx | Kernel::Avx512Bf16 | Kernel::Cuda => Dtype::Bf16,
            Kernel::Avx512 | Kernel::Gemm => Dtype::F32,
            Kernel::Int8 => Dtype::Int8,
        }
    }

    /// Whether what is multiplied with weights is rounded to bf16 first.
    pub fn rounds_inputs(self) -> bool {
        self.dtype() == Dtype::Bf16
    }

    /// What multiplies with the small matrices of adapters: they are not rounded to 8 bits.
    pub fn of_adapters(self) -> Self {
        if self == Kernel::Int8 { Kernel::Avx512 } else { self }
    }

    /// The tiles of this thread, if products are made with them: to be kept while several are.
    pub(super) fn tiles(self) -> Option<amx::Tiles> {
        (self == Kernel::Amx).then(amx::Tiles::configure)
    }

    /// Whether a row's numbers are the same bits in every batch.
    pub fn row_invariant(self) -> bool {
        !matches!(self, Kernel::Gemm | Kernel::Cuda)
    }

    /// Whether this processor, and its operating system, can run it.
    pub fn available(self) -> bool {
        match self {
            Kernel::Amx => has_avx512() && amx::permitted(),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Bf16 => has_avx512() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(not(target_arch = "x86_64"))]
            Kernel::Avx512Bf16 => false,
            Kernel::Avx512 | Kernel::Int8 => has_avx512(),
            Kernel::Gemm => true,
            Kernel::Cuda => false,
        }
    }

    /// The fastest that computes in this type, or the one that is asked for.
    ///
    /// # Errors
    /// If it is not available here, or computes in another type.
    pub fn choose(dtype: Dtype, asked: Option<Kernel>) -> Result<Self> {
        let fits = |kernel: &Kernel| dtype == Dtype::Auto || kernel.dtype() == dtype;
        if let Some(kernel) = asked {
            ensure!(fits(&kernel), "the kernel {kernel:?} computes in {:?}, not in {dtype:?}", kernel.dtype());
            ensure!(kernel.available(), "this processor cannot run the kernel {kernel:?}; leave model.kernel out");
            return Ok(kernel);
        }
        match Self::ALL.into_iter().chain([Self::Int8]).find(|kernel| fits(kernel) && kernel.available()) {
            Some(kernel) => Ok(kernel),
            None => bail!("this processor has no instructions for {dtype:?}; use \"f32\" or \"auto\""),
        }
    }
}

/// Whether f32 products use vectors of 16.
pub(super) fn has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static FOUND: OnceLock<bool> = OnceLock::new();
        let all = || {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
        };
        *FOUND.get_or_init(all)
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}
