//! A wheel. Nothing is written outside the folder that it is unpacked into, nor more there than its size allows.

#![no_main]

use std::path::Path;

use candor::source::unpack;
use candor_fuzz::folder_with;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let folder = folder_with(&[("wheel.whl", bytes)]);
    let inside = folder.path().join("inside");
    let unpacked = unpack(&folder.path().join("wheel.whl"), &inside).is_ok();
    let beside = std::fs::read_dir(folder.path()).expect("it is there").flatten().map(|entry| entry.file_name());
    assert!(beside.into_iter().all(|name| name == "inside" || !unpacked && name == "wheel.whl"));
    assert!(!inside.is_dir() || size_of(&inside) <= 100 * bytes.len() as u64 + 1);
});

/// The bytes of all files in a folder, none of which is a link.
fn size_of(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).expect("it is there").flatten();
    let sizes = entries.map(|entry| match entry.file_type().expect("it is there") {
        kind if kind.is_dir() => size_of(&entry.path()),
        kind => {
            assert!(kind.is_file());
            entry.metadata().expect("it is there").len()
        }
    });
    sizes.sum()
}
