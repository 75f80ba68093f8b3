//! Checkpoints: a PEFT adapter, the optimizer's moments, and where the run goes on.
//!
//! `checkpoints/step-000020/` holds `adapter_model.safetensors`, `adapter_config.json`, `optimizer.safetensors` and
//! `state.json`. A folder appears by renaming, so one that is there is whole.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::learner::Learner;
use crate::peft;
use crate::run::write_whole;
use crate::tensors;

/// What a checkpoint knows beside tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The step that comes next; everything below it is in the adapter.
    pub next_step: u64,
    /// AdamW updates applied.
    pub updates: u64,
}

/// What the moments of a tensor have before its name.
const MOMENTS: [&str; 2] = ["first", "second"];

/// Saves a checkpoint and removes all but the newest `checkpoint.keep`.
///
/// # Errors
/// If the disk fails; the checkpoints that were there stay.
pub fn save(run: &Path, config: &Config, learner: &Learner, next_step: u64) -> Result<()> {
    let folder = run.join("checkpoints");
    let path = folder.join(folder_name(next_step));
    let unfinished = folder.join(format!(".{}.new", folder_name(next_step)));
    for old in [&unfinished, &path] {
        if old.exists() {
            fs::remove_dir_all(old).with_context(|| format!("{}: cannot remove", old.display()))?;
        }
    }
    fs::create_dir_all(&unfinished).with_context(|| format!("{}: cannot create", unfinished.display()))?;
    peft::save(&unfinished, &config.lora, &config.model.source, learner.adapter())?;
    let (adapter, optimizer) = (learner.adapter(), &learner.optimizer);
    let moments = MOMENTS.into_iter().zip(optimizer.moments(adapter)?).flat_map(|(kind, moments)| {
        let names = adapter.names().map(move |name| format!("{kind}.{name}"));
        names.zip(moments)
    });
    tensors::save(&unfinished.join("optimizer.safetensors"), moments.collect())?;
    let state = State { next_step, updates: optimizer.updates() };
    write_whole(&unfinished.join("state.json"), &serde_json::to_vec_pretty(&state)?)?;
    fs::rename(&unfinished, &path).with_context(|| format!("{}: cannot create", path.display()))?;
    let all = list(run)?;
    for old in &all[..all.len().saturating_sub(config.checkpoint.keep)] {
        fs::remove_dir_all(old).with_context(|| format!("{}: cannot remove", old.display()))?;
    }
    Ok(())
}

fn folder_name(next_step: u64) -> String {
    format!("step-{next_step:06}")
}

/// The newest checkpoint of a run, if there is one.
///
/// # Errors
/// If the folder cannot be listed.
pub fn newest(run: &Path) -> Result<Option<PathBuf>> {
    Ok(list(run)?.pop())
}

/// Complete checkpoints, oldest first; none where there is no run.
fn list(run: &Path) -> Result<Vec<PathBuf>> {
    let folder = run.join("checkpoints");
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(&folder).with_context(|| format!("{}: cannot list", folder.display()))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    let is_checkpoint =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-"));
    let mut paths: Vec<PathBuf> = paths.into_iter().filter(is_checkpoint).collect();
    // By number: beyond a million steps the names are no longer of one length.
    paths.sort_by_key(|path| (path.as_os_str().len(), path.clone()));
    Ok(paths)
}

/// Reads `state.json`.
///
/// # Errors
/// If it is missing, damaged, or of another checkpoint.
pub fn state(checkpoint: &Path) -> Result<State> {
    let path = checkpoint.join("state.json");
    let text = fs::read(&path).with_context(|| format!("{}: cannot read", path.display()))?;
    let state: State = serde_json::from_slice(&text).with_context(|| format!("{}: damaged", path.display()))?;
    let State { next_step, updates } = state;
    ensure!(
        checkpoint.ends_with(folder_name(next_step)) && updates <= next_step,
        "{}: damaged: next_step {next_step} and {updates} updates are not what this folder was saved with",
        path.display()
    );
    Ok(state)
}

/// Puts a checkpoint's moments into a learner that was made from the same checkpoint's adapter.
///
/// # Errors
/// If a moment is missing or of another shape.
pub fn restore_moments(checkpoint: &Path, learner: &mut Learner, state: &State) -> Result<()> {
    let path = checkpoint.join("optimizer.safetensors");
    let device = learner.device().clone();
    let mut saved = tensors::load(&path, &device)?;
    let mut moments = [(); 2].map(|()| Vec::new());
    for (kind, moments) in MOMENTS.into_iter().zip(&mut moments) {
        for (name, tensor) in learner.adapter().tensors()? {
            let name = format!("{kind}.{name}");
            let moment =
                saved.remove(&name).with_context(|| format!("{}: tensor {name} is missing", path.display()))?;
            ensure!(moment.dims() == tensor.dims(), "{}: tensor {name} has shape {:?}", path.display(), moment.dims());
            moments.push(moment);
        }
    }
    learner.optimizer.restore(moments, state.updates)
}
