//! The rows of data files as JSON, each with its place: JSON lines, plain or compressed, and parquet.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, anyhow, ensure};
use flate2::bufread::MultiGzDecoder;
use parquet::errors::Result as ParquetResult;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::csv;

/// In bytes: a longer line is no row; it would have to be held in memory whole.
pub const LONGEST_LINE: u64 = 64 << 20;

/// All rows of a file; see [`each_row`].
///
/// # Errors
/// As [`each_row`].
pub fn all_rows<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Vec<T>> {
    let mut rows = Vec::new();
    each_row(path, |_, row| {
        rows.push(row);
        Ok(())
    })?;
    Ok(rows)
}

/// Calls `visit` with each row of a file and its index, which counts from 0. The name's end says what the file is:
/// `.parquet`, `.csv` with a header, and JSON lines otherwise, whose blank lines are no rows; the last two may be compressed,
/// as `.gz` or `.zst`. Bytes that a parquet file does not mark as text are text where they are UTF-8, else base64.
///
/// # Errors
/// If the file cannot be read or a row is not a `T`; the message names the file, the line (from 1) or the row (from 0).
pub fn each_row<T: DeserializeOwned>(
    path: &Path,
    visit: impl FnMut(usize, T) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (name, file) = (path.to_string_lossy(), File::open(path).with_context(|| path.display().to_string())?);
    if name.ends_with(".parquet") {
        return each_record(path, file, visit);
    }
    let reader = BufReader::new(unpacked(path, file).with_context(|| path.display().to_string())?);
    let plain = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    if plain.ends_with(".csv") { each_named(path, reader, visit) } else { each_line(path, reader, visit) }
}

/// What is in a file that may be compressed, as the end of its name says: `.gz`, `.zst`.
///
/// # Errors
/// If there is no memory for a decoder.
pub fn unpacked(path: &Path, file: File) -> io::Result<Box<dyn Read>> {
    Ok(match path.extension().and_then(|extension| extension.to_str()) {
        Some("gz") => Box::new(MultiGzDecoder::new(BufReader::new(file))),
        Some("zst") => Box::new(zstd::Decoder::new(file)?),
        _ => Box::new(file),
    })
}

/// The records of a CSV file.
fn each_named<T: DeserializeOwned>(
    path: &Path,
    reader: impl BufRead,
    mut visit: impl FnMut(usize, T) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut index = 0;
    let read = csv::each_record(reader, |record| {
        let row = T::deserialize(Value::Object(record)).context("not the row expected")?;
        index += 1;
        visit(index - 1, row)
    });
    read.with_context(|| path.display().to_string())
}

/// The files of one split of a data set, in order: `NAME.jsonl`, `NAME.jsonl.gz` or `NAME.parquet`, else the shards
/// `NAME-00000-of-00002.parquet` and so on. Empty if a folder has none of them.
///
/// # Errors
/// If the folder cannot be read, or a shard is missing or there twice.
pub fn split_files(folder: &Path, name: &str) -> anyhow::Result<Vec<PathBuf>> {
    let whole = ["jsonl", "jsonl.gz", "parquet"].map(|extension| folder.join(format!("{name}.{extension}")));
    if let Some(file) = whole.into_iter().find(|file| file.is_file()) {
        return Ok(vec![file]);
    }
    let mut shards = Vec::new();
    for entry in folder.read_dir().with_context(|| folder.display().to_string())? {
        let path = entry.with_context(|| folder.display().to_string())?.path();
        let file = path.file_name().and_then(|file| file.to_str());
        shards.extend(file.and_then(|file| shard(file, name)).map(|(index, count)| (index, count, path)));
    }
    shards.sort();
    let count = shards.first().map_or(0, |(_, count, _)| *count);
    let in_order = shards.iter().enumerate().all(|(place, (index, of, _))| (*index, *of) == (place, count));
    ensure!(
        in_order && shards.len() == count,
        "{}: there are {} shards {name}-…-of-….parquet, not each of {count} once",
        folder.display(),
        shards.len()
    );
    Ok(shards.into_iter().map(|(.., path)| path).collect())
}

/// The files of the first of several splits that a folder, or its folder `data`, holds, and that split's name. Empty if there
/// are none; then `wanted_files` says what was looked for.
///
/// # Errors
/// As [`split_files`].
pub fn first_split<'a>(folder: &Path, names: &[&'a str]) -> anyhow::Result<(Vec<PathBuf>, &'a str)> {
    for folder in [folder.to_owned(), folder.join("data")].iter().filter(|folder| folder.is_dir()) {
        for name in names {
            let files = split_files(folder, name)?;
            if !files.is_empty() {
                return Ok((files, name));
            }
        }
    }
    Ok((Vec::new(), ""))
}

/// What files of some splits may be called.
pub fn wanted_files(names: &[&str]) -> String {
    names.iter().map(|name| format!("{name}.jsonl, {name}-….parquet")).collect::<Vec<_>>().join(", ")
}

/// Whether a question of a source that is one file is held out: about one in ten is, by its text alone, so that a
/// question never changes sides when rows are added.
pub fn is_held_out(question: &str) -> bool {
    Sha256::digest(question)[0] < 26
}

/// Which shard, of how many, a file is: `train-00000-of-00002.parquet`, or with a hash before the dot.
fn shard(file: &str, name: &str) -> Option<(usize, usize)> {
    let (index, rest) = file.strip_prefix(name)?.strip_prefix('-')?.strip_suffix(".parquet")?.split_once("-of-")?;
    let count = rest.split('-').next()?;
    Some((index.parse().ok()?, count.parse().ok()?))
}

/// A field of a row.
///
/// # Errors
/// If it is missing or not a `T`; the message names it.
pub fn field<T: DeserializeOwned>(row: &Map<String, Value>, name: &str) -> anyhow::Result<T> {
    let value = row.get(name).with_context(|| format!("field `{name}` is missing"))?;
    T::deserialize(value).map_err(|error| {
        let said = error.to_string();
        match said.split_once(", expected ") {
            // Inside a list or an object, what was expected is not the field.
            Some((_, expected)) if !value.is_array() && !value.is_object() => {
                let text: String = value.to_string().chars().take(40).collect();
                anyhow!("field `{name}` is {text}, not {expected}")
            }
            _ => anyhow!("field `{name}`: {said}"),
        }
    })
}

/// What is wrong with a line, by its column alone: the line that serde counts is always the first.
pub fn in_line(error: &serde_json::Error) -> Error {
    let said = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    anyhow!("not the JSON expected, at column {}: {}", error.column(), said.strip_suffix(&place).unwrap_or(&said))
}

fn each_line<T: DeserializeOwned>(
    path: &Path,
    mut reader: impl BufRead,
    mut visit: impl FnMut(usize, T) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (mut line, mut index) = (String::new(), 0);
    for number in 1.. {
        line.clear();
        let place = || format!("{}, line {number}", path.display());
        let length = reader.by_ref().take(LONGEST_LINE).read_line(&mut line).with_context(place)?;
        if length == 0 {
            break;
        }
        ensure!((length as u64) < LONGEST_LINE, "{}: a line of {LONGEST_LINE} bytes or more", place());
        if !line.trim().is_empty() {
            let row = serde_json::from_str(line.trim_end()).map_err(|error| in_line(&error));
            row.and_then(|row| visit(index, row)).with_context(place)?;
            index += 1;
        }
    }
    Ok(())
}

fn each_record<T: DeserializeOwned>(
    path: &Path,
    file: File,
    mut visit: impl FnMut(usize, T) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let whole = || format!("{}: not a whole parquet file", path.display());
    let reader = guarded(|| SerializedFileReader::new(file)).with_context(whole)?;
    let promised = reader.metadata().file_metadata().num_rows();
    let mut records = guarded(|| reader.get_row_iter(None)).with_context(whole)?;
    let mut index = 0;
    loop {
        let place = || format!("{}, row {index}", path.display());
        let record = guarded(|| records.next().transpose()).context("not readable parquet").with_context(place)?;
        let Some(record) = record else { break };
        let row = T::deserialize(object(&record)).context("not the row expected");
        row.and_then(|row| visit(index, row)).with_context(place)?;
        index += 1;
    }
    ensure!(i64::try_from(index) == Ok(promised), "{}: holds {index} rows of the {promised} it promises", whole());
    Ok(())
}

/// Runs a reader that panics on some files that are damaged in ways it does not expect.
fn guarded<T>(read: impl FnOnce() -> ParquetResult<T>) -> anyhow::Result<T> {
    let outcome = catch_unwind(AssertUnwindSafe(read));
    outcome
        .unwrap_or_else(|_| Err(parquet::errors::ParquetError::General("the file is damaged".into())))
        .map_err(|error| anyhow!(error))
}

fn object(record: &Row) -> Value {
    let column = |(name, field): (&String, &Field)| {
        let text = match field {
            Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).ok().map(Value::from),
            _ => None,
        };
        (name.clone(), text.unwrap_or_else(|| field.to_json_value()))
    };
    Value::Object(record.get_column_iter().map(column).collect())
}
