//! Recorded rollouts read again: plain, compressed, torn at any byte, and wrong in ways that are said with file and line.

use std::fs;
use std::path::Path;

use candor::generations::Generations;
use candor::run::RowSplit;
use serde_json::{Value, json};

use crate::recorded::{SMALL, Sizes, lines, rows, write};

fn failure(path: &Path) -> String {
    format!("{:#}", Generations::read(path).map(|_| ()).unwrap_err())
}

/// Would catch rows out of order where several threads parse, an offset that counts from a batch or not in bytes, and a reader
/// that looks for texts in compressed bytes.
#[test]
fn every_row_is_found_again_in_plain_and_compressed_files_and_in_a_folder() {
    // More than a batch.
    let sizes = Sizes { steps: 3, groups: 16, rollouts: 64, held_out: 4, words: (400, 200) };
    let mut all: Vec<Value> = rows(sizes).collect();
    all[7]["completion"] = json!("</script> \u{2028} ü \0");
    let mut text = lines(all.clone());
    assert!(text.len() > 9 << 20);
    text.insert_str(text.find('\n').unwrap(), " \r\n\n");
    let folder = tempfile::tempdir().unwrap();
    for name in ["generations.jsonl", "other.jsonl.gz", "other.jsonl.zst"] {
        let path = folder.path().join(name);
        write(&path, text.as_bytes());
        let path = if name == "generations.jsonl" { folder.path() } else { &path };
        let read = Generations::read(path).unwrap();
        assert_eq!((read.rollouts.len(), &read.torn), (all.len(), &None), "{name}");
        for (index, want) in all.iter().enumerate() {
            assert_eq!(serde_json::to_value(read.row(index).unwrap()).unwrap(), *want, "{name}: row {index}");
            let shown = &read.rollouts[index];
            assert_eq!(shown.correct.map(f64::from), want["metrics"]["correct"].as_f64());
            assert_eq!(
                (shown.confidence, shown.reward),
                (want["metrics"]["confidence"].as_f64(), want["reward"].as_f64())
            );
            assert_eq!(
                (shown.split == RowSplit::Eval, shown.step),
                (want["split"] == "eval", want["step"].as_u64().unwrap())
            );
        }
    }
}

/// Would catch a reader that fails on a run that is just writing, or that takes half a row for one.
#[test]
fn a_line_torn_at_any_byte_is_left_out_and_said() {
    let text = lines(rows(SMALL).take(3));
    let last = text[..text.len() - 1].rfind('\n').unwrap() + 1;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("generations.jsonl");
    for cut in last..=text.len() {
        fs::write(&path, &text[..cut]).unwrap();
        let read = Generations::read(&path).unwrap();
        // A row is whole with its last brace.
        let whole = cut >= text.len() - 1;
        assert_eq!(
            (read.rollouts.len(), read.torn.is_some()),
            (if whole { 3 } else { 2 }, !whole && cut > last),
            "{cut}"
        );
    }
    let mut bytes = text.into_bytes();
    bytes.truncate(last);
    bytes.extend("{\"schema\":1,\"completion\":\"ü".as_bytes());
    bytes.pop();
    fs::write(&path, bytes).unwrap();
    let torn = Generations::read(&path).unwrap().torn.unwrap();
    assert!(torn.ends_with("generations.jsonl: left out a torn last line"), "{torn}");
}

#[test]
fn compressed_files_that_end_early_give_what_is_there() {
    let text = lines(rows(SMALL));
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.jsonl.gz", "a.jsonl.zst"] {
        let path = folder.path().join(name);
        write(&path, text.as_bytes());
        let bytes = fs::read(&path).unwrap();
        for cut in [0, 1, 9, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&path, &bytes[..cut]).unwrap();
            let read = Generations::read(&path).unwrap();
            assert!(read.rollouts.len() <= rows(SMALL).count());
            assert!(cut == 0 || read.torn.unwrap().contains("ends early"), "{name}, {cut} bytes");
        }
        fs::write(&path, text.as_bytes()).unwrap();
        assert!(failure(&path).starts_with(&path.display().to_string()), "{}", failure(&path));
    }
}

#[test]
fn what_is_no_row_is_refused_with_file_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("generations.jsonl");
    assert!(failure(&path).contains("No such file"));
    assert!(failure(folder.path()).contains("there is no generations.jsonl in it"));
    let good = lines(rows(SMALL).take(2));
    let refused = |line: &[u8], says: &str| {
        fs::write(&path, [good.as_bytes(), line, b"\n", good.as_bytes()].concat()).unwrap();
        let said = failure(&path);
        assert!(said.starts_with(&format!("{}: line 3: ", path.display())) && said.contains(says), "{said}");
    };
    refused(b"{", "EOF");
    refused(b"[]", "invalid");
    refused(b"{\"schema\":1}", "missing field");
    refused(b"\"\xff\xfe\"", "invalid");
    refused("[".repeat(1 << 20).as_bytes(), "not the JSON expected");
    let newer = rows(SMALL).map(|mut row| {
        row["schema"] = json!(2);
        row
    });
    refused(lines(newer.take(1)).trim().as_bytes(), "schema 2, and this program reads 1");
}

/// Would catch a reader that takes a file of zeros, or what a small archive unpacks to, into memory whole.
#[test]
fn a_line_without_end_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("zeros.jsonl.zst");
    write(&path, &vec![b' '; 200 << 20]);
    assert!(failure(&path).contains("line 1: 67108864 bytes or more"), "{}", failure(&path));
}
