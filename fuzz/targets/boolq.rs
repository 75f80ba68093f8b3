//! A BoolQ file of JSON lines.

#![no_main]

use candor_environments::{Context, Split, boolq};
use candor_fuzz::folder_with;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let folder = folder_with(&[("train.jsonl", bytes)]);
    let resolve = |source: &str| Ok(folder.path().join(source));
    let options = toml::toml! { source = "" };
    let context = Context::new(Split::Train, &options, &resolve, None);
    let Ok(environment) = boolq::load(&context) else { return };
    (0..environment.num_tasks()).for_each(|index| drop(environment.task(index)));
});
