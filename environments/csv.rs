//! Comma-separated values with a header (RFC 4180): fields may be quoted, and then hold commas, quotes and line ends.

use std::io::{BufRead, Read};

use anyhow::{Context, bail, ensure};
use serde_json::{Map, Value};

/// A longer record is none; it would have to be held in memory whole.
const LONGEST_RECORD: usize = 16 << 20;

/// Calls `visit` with each record as an object of texts by the header's names, and the line (from 1) that it begins at.
///
/// # Errors
/// If a record is not as long as the header, a quote is not closed, or `visit` fails; the message names the line.
pub fn each_record(
    mut reader: impl BufRead,
    mut visit: impl FnMut(Map<String, Value>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut header: Option<Vec<String>> = None;
    let (mut text, mut first, mut line) = (String::new(), 1, 0);
    loop {
        let place = || format!("line {first}");
        let left = (LONGEST_RECORD + 1).saturating_sub(text.len()) as u64;
        let read = reader.by_ref().take(left).read_line(&mut text).with_context(place)?;
        ensure!(text.len() <= LONGEST_RECORD, "{}: a record of more than {LONGEST_RECORD} bytes", place());
        line += 1;
        let is_open = text.matches('"').count() % 2 == 1;
        ensure!(read > 0 || !is_open, "{}: a quote is not closed", place());
        if is_open {
            continue;
        }
        if read == 0 {
            return Ok(());
        }
        if !text.trim().is_empty() {
            let record = fields(text.trim_start_matches('\u{feff}')).with_context(place)?;
            match &header {
                None => header = Some(record),
                Some(header) => visit(named(header, record).with_context(place)?).with_context(place)?,
            }
        }
        text.clear();
        first = line + 1;
    }
}

fn named(header: &[String], record: Vec<String>) -> anyhow::Result<Map<String, Value>> {
    ensure!(record.len() == header.len(), "{} fields, the header has {}", record.len(), header.len());
    Ok(header.iter().cloned().zip(record.into_iter().map(Value::from)).collect())
}

/// The fields of a record whose quotes are all closed.
fn fields(record: &str) -> anyhow::Result<Vec<String>> {
    let record = record.trim_end_matches(['\r', '\n']);
    let (mut fields, mut rest) = (Vec::new(), record);
    loop {
        let (field, after) = match rest.strip_prefix('"') {
            None => {
                let end = rest.find(',').unwrap_or(rest.len());
                ensure!(!rest[..end].contains('"'), "a quote inside a field that does not begin with one");
                (rest[..end].to_string(), &rest[end..])
            }
            Some(quoted) => quoted_field(quoted)?,
        };
        fields.push(field);
        match after.strip_prefix(',') {
            Some(next) => rest = next,
            None if after.is_empty() => return Ok(fields),
            None => bail!("text after the quote that closes a field"),
        }
    }
}

/// A field after its first quote, and what follows its last one. Two quotes stand for one.
fn quoted_field(text: &str) -> anyhow::Result<(String, &str)> {
    let (mut field, mut rest) = (String::new(), text);
    loop {
        let (before, after) = rest.split_once('"').context("a quote is not closed")?;
        field.push_str(before);
        match after.strip_prefix('"') {
            Some(more) => {
                field.push('"');
                rest = more;
            }
            None => return Ok((field, after)),
        }
    }
}
