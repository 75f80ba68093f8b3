//! Folders that are filled under another name than the one that they get when they are whole.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

/// A download that was killed leaves its folder behind; one this old is nobody's any more.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// A folder of this process's own, removed when dropped.
pub(super) struct Partial {
    /// Where it lies.
    pub folder: PathBuf,
}

impl Partial {
    const PREFIX: &str = ".partial-";

    /// A new one in the folder `beside`, which `variable` could have named.
    pub fn create(beside: &Path, variable: &str) -> Result<Partial> {
        let cannot =
            || format!("cannot use the cache {}; set {variable} to a folder that can be written", beside.display());
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
        Ok(Partial { folder })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // A failure here leaves an abandoned folder, which a later download removes.
        std::fs::remove_dir_all(&self.folder).ok();
    }
}
