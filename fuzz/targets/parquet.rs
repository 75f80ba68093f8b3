//! The rows of a parquet file. What is accepted is rows that count from 0.

#![no_main]

use candor_environments::rows::each_row;
use candor_fuzz::folder_with;
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value};

// The fuzzer's own hook ends the process at a panic, also at those of the parquet crate that become errors. Whatever
// else panics still ends it.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |bytes: &[u8]| {
    let folder = folder_with(&[("rows.parquet", bytes)]);
    let mut rows = 0;
    drop(each_row(&folder.path().join("rows.parquet"), |index, _: Map<String, Value>| {
        assert_eq!(index, rows);
        rows += 1;
        Ok(())
    }));
});
