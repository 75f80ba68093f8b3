//! The layers of a config, merged: the file that it extends, the file itself, then each `--set`, later over earlier.
//! Every key keeps the place that it was written in.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use candor_environments::keys::{self, KeyError};
use serde::Deserialize;
use toml::de::{DeTable, DeValue, ValueDeserializer};
use toml::{Spanned, Table, Value};

/// A file of more bytes than this is no config.
const MOST_BYTES: u64 = 1 << 20;
/// More files that extend each other than anybody could follow.
const MOST_FILES: usize = 16;
/// As many names in the key of one `--set` as the TOML parser allows in a file's.
const MOST_NAMES: usize = 80;
/// What a new key holds until its value has been merged over it.
const EMPTY: Value = Value::Boolean(false);

/// A config as one table, and where its keys were written.
pub(super) struct Layers {
    pub root: Value,
    pub places: Places,
}

impl Layers {
    /// A file's text over the file that it extends. `path` is what the file is called, and where `extends` starts from.
    ///
    /// # Errors
    /// Text that is not TOML; a file to extend that cannot be read, or extends this one in turn.
    pub fn of(text: &str, path: &Path) -> Result<Layers> {
        let mut layers = Layers { root: Value::Table(Table::new()), places: Places::default() };
        layers.add(text, path, &mut Vec::new())?;
        Ok(layers)
    }

    /// Merges a file over what is there, after the file that it extends. `above` are the files that led to it.
    fn add(&mut self, text: &str, path: &Path, above: &mut Vec<PathBuf>) -> Result<()> {
        let name = path.display().to_string();
        let newlines = text.match_indices('\n').map(|(offset, _)| offset).collect();
        let source = Source::File { name: &name, newlines };
        let mut table = match DeTable::parse(text) {
            Ok(table) => table.into_inner(),
            Err(error) => {
                let start = error.span().map_or(0, |span| span.start);
                bail!("{}: `{}`: {}", source.at(start), keys::cut(line_at(text, start)), error.message().trim())
            }
        };
        above.push(path.to_path_buf());
        if let Some((key, base)) = table.remove_entry("extends") {
            let base = base.get_ref().as_str();
            let read =
                base.context("name one config file, such as \"base.toml\"").and_then(|base| extended(base, above));
            let (text, base) = read.with_context(|| format!("{}: extends", source.at(key.span().start)))?;
            self.add(&text, &base, above)?;
        }
        self.places.0.insert(String::new(), name.clone());
        let merged = merge_table(&mut self.root, table, "", &source, &mut self.places);
        merged.map_err(|problem| self.places.locate(&problem))
    }

    /// Merges one `--set key.path=value`: a list is entered by an index, and tables on the way are made. The value is
    /// TOML, or a word that can be nothing but a text (see [`is_word`]).
    ///
    /// # Errors
    /// An argument that is no such thing, or whose path leads nowhere.
    pub fn set(&mut self, argument: &str) -> Result<()> {
        let (key, value) = argument.split_once('=').context("write key.path=value")?;
        let (key, value) = (key.trim(), value.trim());
        let names: Vec<&str> = key.split('.').collect();
        let bare = |name: &&str| !name.is_empty() && keys::name(name) == **name;
        ensure!(names.iter().all(bare), "{key:?} is no key; write names and list indices with dots between them");
        ensure!(names.len() <= MOST_NAMES, "more than {MOST_NAMES} names in one key");
        ensure!(key != "extends", "extends is read from files only");
        let value = match DeValue::parse(value) {
            Ok(value) => value,
            Err(_) if value.starts_with('~') => bail!(
                "{key}: the shell expands ~ only at the start of an unquoted word, so {value} would be a folder called ~; \
                 write the path out"
            ),
            Err(_) if is_word(value) => Spanned::new(0..0, DeValue::String(value.into())),
            Err(error) => bail!(
                "{key}: {} is no TOML value ({}); a text needs quotes that the shell leaves alone: --set '{key}=\"…\"'",
                if value.is_empty() { "nothing" } else { value },
                error.message().trim()
            ),
        };
        let slot = entry(&mut self.root, &names)?;
        // Tables that were made on the way come from here too.
        for depth in 1..names.len() {
            let made = self.places.0.entry(names[..depth].join("."));
            made.or_insert_with(|| Source::Set(argument).at(0));
        }
        Ok(merge(slot, value, key, 0, &Source::Set(argument), &mut self.places)?)
    }
}

/// Where each key was written: `run.toml:12`, or the `--set` that it comes from.
#[derive(Clone, Debug, Default)]
pub(super) struct Places(BTreeMap<String, String>);

/// Where a config's keys were written is no part of what it says.
impl PartialEq for Places {
    fn eq(&self, _: &Places) -> bool {
        true
    }
}

impl Places {
    /// The place of a key, or of the nearest table around it that has one; at last the file.
    pub fn nearest(&self, mut key: &str) -> Option<&str> {
        loop {
            match self.0.get(key) {
                Some(place) => return Some(place),
                None if key.is_empty() => return None,
                None => key = key.rsplit_once('.').map_or("", |(outer, _)| outer),
            }
        }
    }

    /// A key's error with its place before it.
    pub fn locate(&self, problem: &KeyError) -> anyhow::Error {
        match self.nearest(&problem.key) {
            Some(place) => anyhow!("{place}: {problem}"),
            None => anyhow!("{problem}"),
        }
    }

    /// Forgets what lies beneath a key, because its value is replaced.
    fn clear(&mut self, key: &str) {
        let beneath = format!("{key}.");
        let later = self.0.range(beneath.clone()..).map(|(key, _)| key);
        let old: Vec<String> = later.take_while(|key| key.starts_with(&beneath)).cloned().collect();
        old.iter().for_each(|key| drop(self.0.remove(key)));
    }
}

/// What a layer's positions are called.
enum Source<'a> {
    File { name: &'a str, newlines: Vec<usize> },
    Set(&'a str),
}

impl Source<'_> {
    /// A byte offset as `file:line`, the line counted from 1.
    fn at(&self, offset: usize) -> String {
        match self {
            Source::File { name, newlines } => {
                format!("{name}:{}", newlines.partition_point(|newline| *newline < offset) + 1)
            }
            Source::Set(argument) => format!("--set {argument}"),
        }
    }
}

/// The text of the file that the last of `above` extends, and its path.
fn extended(base: &str, above: &[PathBuf]) -> Result<(String, PathBuf)> {
    let from = above.last().map_or(Path::new(""), PathBuf::as_path);
    let base = from.parent().unwrap_or(from).join(base);
    let text = read(&base)?;
    let real = base.canonicalize().ok();
    if above.iter().any(|path| path.canonicalize().ok() == real) {
        let chain: Vec<_> = above.iter().chain([&base]).map(|path| path.display().to_string()).collect();
        bail!("the files extend each other in a circle: {}; remove one `extends`", chain.join(" -> "));
    }
    ensure!(above.len() < MOST_FILES, "more than {MOST_FILES} files extend each other; merge some of them");
    Ok((text, base))
}

/// The text of a config file.
///
/// # Errors
/// A file that cannot be read or is no text.
pub(super) fn read(path: &Path) -> Result<String> {
    let name = path.display();
    ensure!(!path.is_dir(), "{name}: is a folder; name a config file in it");
    let mut bytes = Vec::new();
    let file = File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes));
    file.with_context(|| format!("cannot read the config {name}"))?;
    ensure!(bytes.len() as u64 <= MOST_BYTES, "{name}: is longer than {MOST_BYTES} bytes, so it is no config");
    String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        anyhow!("{name}:{line}: is not UTF-8 text; save the file as UTF-8")
    })
}

/// The line around a byte offset.
fn line_at(text: &str, start: usize) -> &str {
    let (before, after) = text.split_at_checked(start).unwrap_or((text, ""));
    let (begin, end) = (before.rfind('\n').map_or(0, |newline| newline + 1), after.find('\n').unwrap_or(after.len()));
    text.get(begin..start + end).unwrap_or_default().trim()
}

/// Merges a value that starts at an offset of its source over an old one: tables key by key, all else as a whole.
fn merge(
    old: &mut Value,
    new: Spanned<DeValue>,
    key: &str,
    start: usize,
    source: &Source,
    places: &mut Places,
) -> Result<(), KeyError> {
    places.0.insert(key.to_string(), source.at(start));
    if !(old.is_table() && new.get_ref().is_table()) {
        places.clear(key);
    }
    let span = new.span();
    match new.into_inner() {
        DeValue::Table(table) => merge_table(old, table, key, source, places),
        DeValue::Array(items) => {
            let items = items.into_iter().enumerate().map(|(index, item)| {
                let (mut slot, start) = (EMPTY, item.span().start);
                merge(&mut slot, item, &keys::join(key, &index.to_string()), start, source, places).map(|()| slot)
            });
            *old = Value::Array(items.collect::<Result<_, KeyError>>()?);
            Ok(())
        }
        leaf => {
            let integer = leaf.as_integer().map(|integer| keys::cut(&integer.to_string()));
            let read = Value::deserialize(ValueDeserializer::from(Spanned::new(span, leaf)));
            *old = read.map_err(|error| match integer {
                Some(integer) => {
                    KeyError::new(key, format!("{integer} is not a whole number from -2^63 to below 2^63"))
                }
                None => KeyError::new(key, error.message().trim()),
            })?;
            Ok(())
        }
    }
}

fn merge_table(old: &mut Value, new: DeTable, key: &str, source: &Source, places: &mut Places) -> Result<(), KeyError> {
    if !old.is_table() {
        *old = Value::Table(Table::new());
    }
    let Value::Table(old) = old else { return Ok(()) };
    new.into_iter().try_for_each(|(name, value)| {
        let (key, start) = (keys::join(key, &keys::name(name.get_ref())), name.span().start);
        let slot = old.entry(name.into_inner().into_owned()).or_insert(EMPTY);
        merge(slot, value, &key, start, source, places)
    })
}

/// What a path of names and indices leads to, made where a table lacks it.
fn entry<'a>(mut here: &'a mut Value, names: &[&str]) -> Result<&'a mut Value> {
    for (depth, name) in names.iter().enumerate() {
        let outer = names[..depth].join(".");
        here = match here {
            Value::Table(table) => {
                let inner = names.get(depth + 1);
                let index = inner.is_some_and(|inner| inner.bytes().all(|digit| digit.is_ascii_digit()));
                let key = keys::join(&outer, name);
                ensure!(table.contains_key(*name) || !index, "{key} is not written in the config; give the whole list");
                table.entry(*name).or_insert(if inner.is_some() { Value::Table(Table::new()) } else { EMPTY })
            }
            Value::Array(items) => {
                let length = items.len();
                let item = name.parse().ok().and_then(|index: usize| items.get_mut(index));
                item.with_context(|| {
                    format!("{outer} is a list of {length}, counted from 0; {name:?} is none of them")
                })?
            }
            other => bail!("{outer} is no table but {other}; it has no key {name:?}"),
        };
    }
    Ok(here)
}

/// Whether a value that is not TOML can be nothing but a text: `cosine`, `results/a`, `pip:x==1`. It starts like a word
/// or a path, holds letters, digits and `_-./:=+@~` only, and is no misspelled `true`, `false`, `inf` or `nan`.
fn is_word(value: &str) -> bool {
    let starts =
        value.starts_with(char::is_alphabetic) || ["_", "/", "./", "../"].iter().any(|start| value.starts_with(start));
    let plain = |character: char| character.is_alphanumeric() || "_-./:=+@~".contains(character);
    let literals = ["true", "false", "inf", "infinity", "nan"];
    starts && value.chars().all(plain) && !literals.iter().any(|literal| value.eq_ignore_ascii_case(literal))
}
