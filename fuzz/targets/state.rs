//! A checkpoint's `state.json`. What is accepted is of the checkpoint's folder.

#![no_main]

use candor::checkpoint;
use candor_fuzz::folder_with;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let folder = folder_with(&[("step-000007/state.json", bytes)]);
    let Ok(state) = checkpoint::state(&folder.path().join("step-000007")) else { return };
    assert!(state.next_step == 7 && state.updates <= 7, "{state:?}");
});
