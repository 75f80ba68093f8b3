//! An `adapter_config.json` beside good tensors.

#![no_main]

use std::sync::LazyLock;

use candle_core::Device;
use candor::config::Lora;
use candor::model::Architecture;
use candor::peft;
use candor::policy::Adapter;
use candor_fuzz::folder_with;
use libfuzzer_sys::fuzz_target;

static GOOD: LazyLock<(Architecture, Vec<u8>)> = LazyLock::new(|| {
    let config = serde_json::from_str(include_str!("../../tests/data/golden/tiny/llama/config.json"));
    let architecture = Architecture::from_config(&config.expect("it is json")).expect("it is a good description");
    let adapter = Adapter::initialize(&architecture, &Lora::default(), 0, &Device::Cpu).expect("the processor works");
    let folder = folder_with(&[]);
    peft::save(folder.path(), &Lora::default(), "base", &adapter).expect("there is room for a small file");
    (architecture, std::fs::read(folder.path().join("adapter_model.safetensors")).expect("it was just written"))
});

fuzz_target!(|bytes: &[u8]| {
    let (architecture, tensors) = &*GOOD;
    let folder = folder_with(&[("adapter_config.json", bytes), ("adapter_model.safetensors", tensors)]);
    drop(peft::load(folder.path(), architecture, &Lora::default(), &Device::Cpu));
});
