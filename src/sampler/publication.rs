//! Adapters for servers: each version in PEFT's form in a folder of its own, under a name that nothing else ever had.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use crate::config::Lora;
use crate::peft;
use crate::policy::Adapter;

/// What servers can load.
pub struct Publication {
    /// Begins every name. A server may keep what it computed with an adapter under the adapter's name, so that not even the
    /// same run, resumed, uses a name twice.
    prefix: String,
    /// The folders that servers look into.
    folders: BTreeSet<PathBuf>,
    lora: Lora,
    /// The source of the base.
    base: String,
    /// What lies in the folders.
    versions: BTreeSet<u64>,
}

impl Publication {
    /// One with nothing published.
    pub fn new(run: &str, folders: BTreeSet<PathBuf>, lora: &Lora, base: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let prefix = format!("{run}-{:x}-{:x}", now.as_millis(), process::id());
        Self { prefix, folders, lora: lora.clone(), base: base.to_string(), versions: BTreeSet::new() }
    }

    /// The name of a version, on servers and in the folders.
    pub fn name(&self, version: u64) -> String {
        format!("{}-v{version:06}", self.prefix)
    }

    /// Puts an adapter into the folders, if it is not there yet. It appears whole, by renaming.
    ///
    /// # Errors
    /// If a folder cannot be written.
    pub fn publish(&mut self, adapter: &Adapter) -> Result<()> {
        if !self.versions.insert(adapter.version) {
            return Ok(());
        }
        let name = self.name(adapter.version);
        for folder in &self.folders {
            let write = || -> Result<()> {
                let unfinished = folder.join(format!(".{name}.new"));
                fs::create_dir_all(&unfinished)?;
                peft::save(&unfinished, &self.lora, &self.base, adapter)?;
                Ok(fs::rename(&unfinished, folder.join(&name))?)
            };
            write().with_context(|| format!("{}: cannot put the adapter there", folder.display()))?;
        }
        Ok(())
    }

    /// Removes the versions before `oldest`.
    pub fn retire(&mut self, oldest: u64) {
        let kept = self.versions.split_off(&oldest);
        for version in std::mem::replace(&mut self.versions, kept) {
            for folder in &self.folders {
                self.remove(&folder.join(self.name(version)));
            }
        }
    }

    /// A folder that stays behind takes room and does no harm.
    fn remove(&self, folder: &Path) {
        if let Err(error) = fs::remove_dir_all(folder) {
            tracing::warn!("{}: cannot remove: {error}", folder.display());
        }
    }
}

impl Drop for Publication {
    fn drop(&mut self) {
        self.retire(u64::MAX);
    }
}
