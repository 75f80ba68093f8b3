//! What of the CUDA driver's side can be tested without a GPU: kernels compile for every GPU, cuBLAS has what is called, and a config
//! that asks for a GPU that is not there is told so.

use candor::config::{Device, Dtype};
use candor::cuda::Place;
use candor::ops::kernel::Kernel;

use crate::toy;

/// The variable that lists architectures to compile kernels for.
#[cfg(feature = "cuda")]
const ARCHITECTURES: &str = "CANDOR_CUDA_KERNELS";

/// Catches a kernel that only a C++ compiler accepts, and a function of cuBLAS that another version does not have.
#[cfg(feature = "cuda")]
#[test]
fn kernels_compile_and_libraries_have_what_is_called() {
    let Ok(architectures) = std::env::var(ARCHITECTURES) else {
        return crate::check::skipped(format!("{ARCHITECTURES} is not set: kernels are not compiled by NVRTC"));
    };
    for architecture in architectures.split(',') {
        candor::cuda::driver::check(architecture).unwrap();
    }
}

fn refused(device: Device, dtype: Dtype, kernel: Option<Kernel>) -> String {
    format!("{:#}", Place::choose(device, dtype, kernel).err().expect("it is refused"))
}

/// No GPU of this number, whatever this build and this machine offer; and what GPUs do not compute in.
#[test]
fn a_gpu_that_is_not_there_is_refused_and_the_processor_offered() {
    let missing = refused(Device::Cuda(99), Dtype::Auto, None);
    assert!(missing.contains("cuda:99") && missing.contains("use device = \"cpu\""), "{missing}");
    assert!(refused(Device::Cuda(0), Dtype::F32, None).contains("computes in bf16, not in F32"));
    assert!(refused(Device::Cuda(0), Dtype::Auto, Some(Kernel::Gemm)).contains("instructions of the processor"));
}

/// The processor's instructions and types are never taken from whoever asks for them.
#[test]
fn auto_leaves_the_processor_what_only_it_can_do() {
    assert!(Place::choose(Device::Auto, Dtype::F32, None).unwrap().gpu.is_none());
    let place = Place::choose(Device::Auto, Dtype::Auto, Some(Kernel::Gemm)).unwrap();
    assert!(place.gpu.is_none() && place.kernel == Kernel::Gemm);
}

/// A run is told before it begins, with the place in its config.
#[test]
fn a_run_on_a_gpu_that_is_not_there_does_not_begin() {
    let results = tempfile::tempdir().unwrap();
    let refused = toy::failure(results.path(), "model.device = \"cuda:99\"", false);
    assert!(refused.contains("model.device") && refused.contains("cuda:99"), "{refused}");
}
