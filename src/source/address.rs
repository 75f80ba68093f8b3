//! `hf:org/name@revision/path`: what is asked of a hub, and which of a repository's files that is.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};

use super::check_inside;

/// What a repository holds; a hub keeps the two apart, and different files of them are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Weights and a tokenizer.
    Model,
    /// Rows.
    Data,
}

impl Kind {
    /// What a hub's addresses and the cache's folders call it.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Kind::Model => "models",
            Kind::Data => "datasets",
        }
    }
}

/// A repository, a revision of it, and a path inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// `org/name`.
    pub(super) id: String,
    /// A branch, a tag or a commit.
    pub(super) revision: String,
    /// A file, or the folder that the files lie in.
    pub(super) inside: Option<String>,
}

/// What a model is read from, beside its weights.
pub const MODEL_FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
];
/// How the names of data files end.
pub(super) const DATA_ENDS: &[&str] = &[".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv"];

impl Address {
    pub(super) fn parse(text: &str) -> Result<Address> {
        let missing = "write hf:org/name, hf:org/name@revision or hf:org/name@revision/path";
        let (org, rest) = text.split_once('/').context(missing)?;
        let (name, rest) = rest.split_at(rest.find(['@', '/']).unwrap_or(rest.len()));
        let (revision, inside) = match rest.strip_prefix('@') {
            Some(rest) => split_revision(rest),
            None => ("main", rest.strip_prefix('/')),
        };
        for part in [org, name] {
            ensure!(is_name(part) && !part.contains("--"), "{part:?} is not a name on the hub; {missing}");
        }
        let named = revision.split('/').all(is_name);
        ensure!(named, "{revision:?} is not a revision: a branch, a tag, a commit or refs/convert/parquet");
        inside.map_or(Ok(()), check_inside)?;
        Ok(Address { id: format!("{org}/{name}"), revision: revision.into(), inside: inside.map(String::from) })
    }

    /// Those of a repository's files that are wanted, at least one, in order.
    ///
    /// # Errors
    /// If there is none, or a model could be several of them.
    pub fn wanted<'a>(&self, kind: Kind, files: &'a [String]) -> Result<Vec<&'a str>> {
        let below = |file: &'a String| match &self.inside {
            Some(inside) => Some((file.as_str(), file.strip_prefix(inside.as_str())?.strip_prefix('/')?)),
            None => Some((file.as_str(), file.as_str())),
        };
        let exact = files.iter().find(|file| Some(*file) == self.inside.as_ref());
        let mut wanted = match (kind, exact) {
            (Kind::Model, Some(file)) => {
                ensure!(file.ends_with(".gguf"), "a path inside a model is a .gguf file or a folder, not {file:?}");
                vec![file.as_str()]
            }
            (Kind::Model, None) => self.of_a_model(files.iter().filter_map(below).collect())?,
            (Kind::Data, exact) => {
                let named = exact.map(|file| (file.as_str(), file.as_str()));
                let all = files.iter().filter_map(below).chain(named).map(|(file, _)| file);
                all.filter(|file| DATA_ENDS.iter().any(|end| file.ends_with(end))).collect()
            }
        };
        ensure!(!wanted.is_empty(), "{self} holds no {} file", DATA_ENDS.join(", no "));
        wanted.sort_unstable();
        Ok(wanted)
    }

    /// Of files, each with its path below the folder of the model.
    fn of_a_model<'a>(&self, files: Vec<(&'a str, &'a str)>) -> Result<Vec<&'a str>> {
        let weights = |(_, path): &&(&str, &str)| path.ends_with(".safetensors") && !path.contains('/');
        if files.iter().any(|file| weights(&file)) {
            let index = |path: &str| path.ends_with(".safetensors.index.json") && !path.contains('/');
            let read = files.iter().filter(|file| MODEL_FILES.contains(&file.1) || index(file.1) || weights(file));
            return Ok(read.map(|(file, _)| *file).collect());
        }
        let ggufs: Vec<_> = files.iter().map(|(file, _)| *file).filter(|file| file.ends_with(".gguf")).collect();
        match ggufs.as_slice() {
            [only] => Ok(vec![*only]),
            [] => bail!("{self} holds no .safetensors and no .gguf file"),
            [first, ..] => bail!(
                "{self} holds {} .gguf files: name one, as in hf:{}/{first}; there are {}",
                ggufs.len(),
                self.id,
                ggufs.join(", ")
            ),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "hf:{}", self.id)?;
        if self.revision != "main" {
            write!(formatter, "@{}", self.revision)?;
        }
        self.inside.iter().try_for_each(|inside| write!(formatter, "/{inside}"))
    }
}

/// A revision ends at the first slash, except those that start with `refs/`, which have two.
fn split_revision(text: &str) -> (&str, Option<&str>) {
    let nth = if text.starts_with("refs/") { 2 } else { 0 };
    match text.match_indices('/').nth(nth) {
        Some((at, _)) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    }
}

/// Names of organizations, repositories and revisions: they become parts of addresses and of paths.
fn is_name(text: &str) -> bool {
    let plain = |one: char| one.is_ascii_alphanumeric() || "._-".contains(one);
    let ends = text.starts_with(['.', '-']) || text.ends_with(['.', '-']);
    !text.is_empty() && text.chars().all(plain) && !ends && !text.contains("..") && text.len() <= 96
}
