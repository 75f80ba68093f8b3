//! TensorBoard's event files: our bytes are its own writer's, and of a resumed run every step shows once.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candor::metrics::MEASURED;
use candor::tensorboard::{EventFile, PREFIX, What, event, record};
use serde_json::Value;
use tempfile::tempdir;

use crate::resume::{resume, run_until};
use crate::toy::{config, lines, run};

/// The records are what tensorboard 2.21's `RecordWriter` made of the same `Event`s.
#[test]
fn events_are_the_bytes_that_tensorboard_writes() {
    let kept = include_str!("data/golden/tensorboard.hex");
    let long = format!("metrics/{}", "x".repeat(200));
    let events = [
        event(1.5, 0, What::Version),
        event(1_774_123_456.25, 300, What::Start),
        event(1_774_123_456.25, 0, What::Start),
        event(1_774_123_456.5, 0, What::Scalars(&[("loss", 0.0), ("reward/mean/boolq", -0.25)])),
        event(1_774_123_457.0, 1 << 40, What::Scalars(&[(&long, 0.1)])),
    ];
    let hex = |event: &Vec<u8>| record(event).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(events.iter().map(hex).collect::<Vec<_>>(), kept.lines().collect::<Vec<_>>());
}

/// A field of a protobuf message: its number, and its bytes or its number's.
fn fields(mut message: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let varint = |message: &mut &[u8]| {
        let length = message.iter().position(|byte| *byte < 0x80).unwrap() + 1;
        let (head, rest) = message.split_at(length);
        *message = rest;
        head.iter().rev().fold(0u64, |value, byte| value << 7 | u64::from(byte & 0x7f))
    };
    let mut fields = Vec::new();
    while !message.is_empty() {
        let tag = varint(&mut message);
        let length = match tag & 7 {
            0 => {
                fields.push((tag >> 3, varint(&mut message).to_le_bytes().to_vec()));
                continue;
            }
            1 => 8,
            5 => 4,
            _ => varint(&mut message) as usize,
        };
        let (value, rest) = message.split_at(length);
        fields.push((tag >> 3, value.to_vec()));
        message = rest;
    }
    fields
}

/// What TensorBoard shows of a folder: files in the order of their names; a session's start forgets its step and later ones.
fn shown(folder: &Path) -> BTreeMap<(String, u64), f32> {
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    let mut files: Vec<_> = files.filter(|path| path.display().to_string().contains(PREFIX)).collect();
    files.sort();
    let mut shown = BTreeMap::new();
    for file in files {
        let bytes = fs::read(file).unwrap();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let event = fields(&rest[12..12 + length]);
            rest = &rest[16 + length..];
            let field = |number| event.iter().find(|(found, _)| *found == number).map(|(_, value)| value);
            let step = field(2).map_or(0, |step| u64::from_le_bytes(step[..].try_into().unwrap()));
            if field(7).is_some() {
                shown.retain(|(_, of), _| *of < step);
            }
            for (_, value) in field(5).map(|summary| fields(summary)).unwrap_or_default() {
                let value = fields(&value);
                let name = String::from_utf8(value[0].1.clone()).unwrap();
                let number = f32::from_le_bytes(value[1].1[..].try_into().unwrap());
                assert!(shown.insert((name, step), number).is_none(), "twice");
            }
        }
    }
    shown
}

/// Every number of `metrics.jsonl`.
fn recorded(folder: &Path) -> BTreeMap<(String, u64), f32> {
    let rows = lines(&folder.join("metrics.jsonl"));
    let number =
        |step: u64| move |(name, value): (&String, &Value)| Some(((name.clone(), step), value.as_f64()? as f32));
    rows.iter()
        .flat_map(|row| row.as_object().unwrap().iter().filter_map(number(row["step"].as_u64().unwrap())))
        .filter(|((name, _), _)| name != "step")
        .collect()
}

/// Fails if a resumed run shows a step twice, one that the checkpoint does not hold, or one less.
#[test]
fn a_resumed_run_shows_every_step_once() {
    let config = config("steps = 5\nevaluation.every = 2\ncheckpoint.every = 2");
    let [straight, stopped] = [(); 2].map(|()| tempdir().unwrap());
    run(straight.path(), &config);
    run_until(stopped.path(), &config, false, 1);
    // As if it had gone on and been killed: these numbers are in no checkpoint.
    let mut killed = EventFile::create(&stopped.path().join("toy"), Some(1)).unwrap();
    killed.scalars(1, &[("loss", 17.0)]).unwrap();
    killed.scalars(2, &[("gone", 17.0)]).unwrap();
    run_until(stopped.path(), &config, true, 3);
    resume(stopped.path(), &config);
    let measured = |(name, _): &(String, u64)| MEASURED.iter().any(|prefix| name.starts_with(prefix));
    let [want, got] = [&straight, &stopped].map(|results| shown(&results.path().join("toy")));
    assert_eq!(got, recorded(&stopped.path().join("toy")));
    let same =
        |all: BTreeMap<(String, u64), f32>| all.into_iter().filter(|(key, _)| !measured(key)).collect::<Vec<_>>();
    assert_eq!(same(got), same(want));
}
