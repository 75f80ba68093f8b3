//! A model's `config.json`.

#![no_main]

use candor::model::Architecture;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(config) = serde_json::from_slice(bytes) else { return };
    drop(Architecture::from_config(&config));
});
