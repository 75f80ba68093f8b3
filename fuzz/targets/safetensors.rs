//! A model folder whose one safetensors file is the input.

#![no_main]

use candle_core::Device;
use candor::model::safetensors::Safetensors;
use candor_fuzz::folder_with;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let folder = folder_with(&[("model.safetensors", bytes)]);
    let Ok(tensors) = Safetensors::in_folder(folder.path()) else { return };
    for name in tensors.names() {
        let shape = tensors.shape(name).expect("the tensor is there");
        if let Ok(tensor) = tensors.tensor(name, &Device::Cpu) {
            assert_eq!(tensor.dims(), shape);
        }
    }
});
