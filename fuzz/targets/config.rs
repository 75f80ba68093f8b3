//! A run's TOML config. What is accepted is written back as it was understood.

#![no_main]

use candor::config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(config) = Config::parse(text, "fuzz.toml") else { return };
    let resolved = config.to_toml().expect("a loaded config can be written");
    assert_eq!(Config::parse(&resolved, "resolved.toml").expect("and read again"), config);
});
