//! The example trains on the tiny model of Candor's own tests; what the program says of `sums` is what it says of a built-in.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn sums(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sums"))
        .args(arguments)
        .current_dir(folder)
        .env_remove("RUST_LOG")
        .output()
        .unwrap()
}

#[test]
fn an_environment_of_ones_own_is_like_a_built_in() {
    let folder = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::copy(root.join("sums.toml"), folder.path().join("sums.toml")).unwrap();
    let tiny = format!("model.source={:?}", root.join("../../tests/data/golden/tiny/llama"));
    let run = |command: &str, changes: &[&str]| {
        let sets = [&["--set", &tiny], changes].concat();
        sums(folder.path(), &[&[command, "sums.toml"], &sets[..]].concat())
    };
    let said = |output: &Output| {
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };

    let output = run("train", &["--set", "steps=2", "--set", "evaluation.tasks=4"]);
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("sums: 4 held-out tasks"), "{}", said(&output));
    let rows = fs::read_to_string(folder.path().join("results/sums/generations.jsonl")).unwrap();
    assert_eq!(rows.lines().filter(|row| row.contains("\"environment\":\"sums\"")).count(), 2 * 64 + 2 * 4);

    let output = run("check", &[]);
    assert!(output.status.success() && said(&output).contains("sums        1000 training tasks"), "{}", said(&output));
    let output = run("check", &["--set", "environment.0.name=sum"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        said(&output).contains("no environment \"sum\"; did you mean \"sums\"? known: sums, boolq"),
        "{}",
        said(&output)
    );
}
