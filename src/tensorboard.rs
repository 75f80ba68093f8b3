//! TensorBoard's event files: protobuf `Event`s in TensorFlow's record framing, as far as scalars need them.
//!
//! The fields are those of `event.proto` and `summary.proto` of TensorBoard 2.21; a record is its length and its payload,
//! each followed by a masked CRC32C.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

/// What the names of event files begin with; seconds follow, by which TensorBoard orders them.
pub const PREFIX: &str = "events.out.tfevents.";

/// What an event says.
#[derive(Clone, Copy, Debug)]
pub enum What<'a> {
    /// How the file is to be read; every file's first event.
    Version,
    /// From here on the run is told again: readers forget what earlier files say of this step and later ones.
    Start,
    /// Numbers by name.
    Scalars(&'a [(&'a str, f64)]),
}

/// An `Event` in protobuf; `wall_time` in seconds since 1970.
pub fn event(wall_time: f64, step: u64, what: What) -> Vec<u8> {
    let mut event = Vec::new();
    tag(&mut event, 1, FIXED64);
    event.extend(wall_time.to_le_bytes());
    // Protobuf leaves zeros out.
    if step > 0 {
        tag(&mut event, 2, VARINT);
        varint(&mut event, step);
    }
    match what {
        What::Version => bytes(&mut event, 3, b"brain.Event:2"),
        // SessionLog { status: START }.
        What::Start => bytes(&mut event, 7, &[0x08, 0x01]),
        What::Scalars(scalars) => {
            let mut summary = Vec::new();
            for (name, number) in scalars {
                let mut value = Vec::new();
                bytes(&mut value, 1, name.as_bytes());
                tag(&mut value, 2, FIXED32);
                value.extend((*number as f32).to_le_bytes());
                bytes(&mut summary, 1, &value);
            }
            bytes(&mut event, 5, &summary);
        }
    }
    event
}

const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const DELIMITED: u64 = 2;
const FIXED32: u64 = 5;

fn varint(into: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

fn tag(into: &mut Vec<u8>, field: u64, kind: u64) {
    varint(into, field << 3 | kind);
}

fn bytes(into: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    tag(into, field, DELIMITED);
    varint(into, bytes.len() as u64);
    into.extend(bytes);
}

/// A payload as the files hold it.
pub fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    [&length[..], &checksum(&length), payload, &checksum(payload)].concat()
}

/// The masked CRC32C (Castagnoli) of TensorFlow's records.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    let bit = |crc: u32, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
    let crc = !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), bit));
    crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// An event file that is being written.
pub struct EventFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventFile {
    /// Begins a file in a run folder, later in order than those that are there. Where a run goes on, `restart` is the step that
    /// it goes on with.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn create(folder: &Path, restart: Option<u64>) -> Result<Self> {
        let seconds = (now() as u64).max(newest(folder)?.map_or(0, |newest| newest + 1));
        let path = folder.join(format!("{PREFIX}{seconds:010}.candor"));
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let file = BufWriter::new(file.with_context(|| format!("{}: cannot create", path.display()))?);
        let mut events = Self { path, file };
        events.write(0, What::Version)?;
        if let Some(step) = restart {
            events.write(step, What::Start)?;
        }
        events.flush()?;
        Ok(events)
    }

    /// Adds the numbers of a step.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        self.write(step, What::Scalars(scalars))?;
        self.flush()
    }

    /// Makes sure that everything written so far is on the disk.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn sync(&mut self) -> Result<()> {
        self.file.get_ref().sync_data().with_context(|| format!("{}: cannot write", self.path.display()))
    }

    fn write(&mut self, step: u64, what: What) -> Result<()> {
        let written = self.file.write_all(&record(&event(now(), step, what)));
        written.with_context(|| format!("{}: cannot write", self.path.display()))
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush().with_context(|| format!("{}: cannot write", self.path.display()))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |passed| passed.as_secs_f64())
}

/// The seconds in the name of the last event file of a folder.
fn newest(folder: &Path) -> Result<Option<u64>> {
    let files = fs::read_dir(folder).with_context(|| format!("{}: cannot read", folder.display()))?;
    let seconds = |name: String| name.strip_prefix(PREFIX)?.split('.').next()?.parse::<u64>().ok();
    Ok(files.filter_map(|file| seconds(file.ok()?.file_name().into_string().ok()?)).max())
}
