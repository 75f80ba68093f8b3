//! Checkpoints: a PEFT adapter, the optimizer's moments, and where the run goes on.
//!
//! `checkpoints/step-000020/` holds `adapter_model.safetensors`, `adapter_config.json`, `optimizer.safetensors` and
//! `state.json`. A folder appears by renaming, so one that is there is whole.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::{Config, Lora};
use crate::learner::Learner;
use crate::model::safetensors::Safetensors;
use crate::model::{Architecture, Projection};
use crate::policy::Adapter;
use crate::run::write_whole;

/// What a checkpoint knows beside tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The step that comes next; everything below it is in the adapter.
    pub next_step: u64,
    /// AdamW updates applied.
    pub updates: u64,
}

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
    save_adapter(&unfinished, &config.lora, &config.model.source, learner.adapter())?;
    let names = learner.adapter().tensors().into_iter().map(|(name, _)| name);
    let moments = names.zip(&learner.optimizer.moments).flat_map(|(name, (first, second))| {
        [(format!("first.{name}"), first.clone()), (format!("second.{name}"), second.clone())]
    });
    save_tensors(&unfinished.join("optimizer.safetensors"), moments.collect())?;
    let state = State { next_step, updates: learner.optimizer.updates };
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
    let mut tensors = load_tensors(&path, &device)?;
    let mut moments = Vec::new();
    for (name, tensor) in learner.adapter().tensors() {
        let mut take = |kind: &str| -> Result<Tensor> {
            let name = format!("{kind}.{name}");
            let moment =
                tensors.remove(&name).with_context(|| format!("{}: tensor {name} is missing", path.display()))?;
            ensure!(moment.dims() == tensor.dims(), "{}: tensor {name} has shape {:?}", path.display(), moment.dims());
            Ok(moment)
        };
        moments.push((take("first")?, take("second")?));
    }
    learner.optimizer.moments = moments;
    learner.optimizer.updates = state.updates;
    Ok(())
}

/// Writes an adapter as PEFT does: `adapter_model.safetensors` and `adapter_config.json`.
///
/// # Errors
/// If the disk fails.
pub fn save_adapter(folder: &Path, lora: &Lora, base: &str, adapter: &Adapter) -> Result<()> {
    save_tensors(&folder.join("adapter_model.safetensors"), adapter.tensors())?;
    let alpha = if lora.alpha.fract() == 0.0 { json!(lora.alpha as i64) } else { json!(lora.alpha) };
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "target_modules": lora.targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
    });
    write_whole(&folder.join("adapter_config.json"), &serde_json::to_vec_pretty(&config)?)
}

/// What an adapter folder's `adapter_config.json` describes.
///
/// # Errors
/// If the file is missing or damaged, or describes something that is not a plain LoRA adapter of known projections: it would
/// compute something else here than where it was trained.
pub fn described(folder: &Path) -> Result<Lora> {
    let path = folder.join("adapter_config.json");
    let text = fs::read(&path).with_context(|| format!("{}: cannot read", path.display()))?;
    let config: Value = serde_json::from_slice(&text).with_context(|| format!("{}: not json", path.display()))?;
    let describe = || -> Result<Lora> {
        let kind = &config["peft_type"];
        ensure!(kind == "LORA", "peft_type is {kind}, not \"LORA\"");
        let no_bias = config["bias"].is_null() || config["bias"] == "none";
        ensure!(no_bias, "bias is {}; only \"none\" is supported", config["bias"]);
        for key in
            ["use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform"]
        {
            let value = &config[key];
            let unset = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(items) => items.is_empty(),
                _ => false,
            };
            ensure!(unset, "{key} is {value}, which is not supported");
        }
        let rank = config["r"].as_u64().filter(|rank| (1..1 << 30).contains(rank)).context("r is not a rank")?;
        let alpha =
            config["lora_alpha"].as_f64().filter(|alpha| *alpha > 0.0).context("lora_alpha is not a number above 0")?;
        let modules = config["target_modules"].as_array().context("target_modules is not a list of modules")?;
        let named = |module: &Value| {
            let known =
                |projection: &Projection| module.as_str().is_some_and(|name| projection.module().ends_with(name));
            let found: Vec<Projection> = Projection::ALL.into_iter().filter(known).collect();
            ensure!(found.len() == 1, "target_modules: {module} is not a projection of a decoder layer");
            Ok(found[0])
        };
        Ok(Lora {
            rank: rank as usize,
            alpha,
            rslora: config["use_rslora"].as_bool().unwrap_or(false),
            targets: modules.iter().map(named).collect::<Result<_>>()?,
            ..Lora::default()
        })
    };
    describe().with_context(|| path.display().to_string())
}

/// Reads an adapter that PEFT or this program wrote, and checks that it is the one that `lora` describes.
///
/// # Errors
/// If a file is missing or damaged, or the adapter's shape is another one than the config's.
pub fn load_adapter(folder: &Path, architecture: &Architecture, lora: &Lora, device: &Device) -> Result<Adapter> {
    let found = described(folder)?;
    let matches = [
        ("lora.rank", found.rank == lora.rank),
        ("lora.alpha", found.alpha == lora.alpha),
        ("lora.rslora", found.rslora == lora.rslora),
        ("lora.targets", Projection::ALL.iter().all(|p| found.targets.contains(p) == lora.targets.contains(p))),
    ];
    for (key, same) in matches {
        ensure!(
            same,
            "{}: the adapter does not match the config's {key}; set it to the adapter's value",
            folder.join("adapter_config.json").display()
        );
    }
    let path = folder.join("adapter_model.safetensors");
    let tensors = load_tensors(&path, device)?;
    Adapter::from_tensors(architecture, lora, tensors, device).with_context(|| path.display().to_string())
}

fn save_tensors(path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
    candle_core::safetensors::save(&tensors, path).with_context(|| format!("{}: cannot write", path.display()))?;
    File::open(path).and_then(|file| file.sync_all()).with_context(|| format!("{}: cannot write", path.display()))
}

/// All tensors of a file, in f32. One that is not finite would end the run later, where nothing says where it came from.
fn load_tensors(path: &Path, device: &Device) -> Result<HashMap<String, Tensor>> {
    let file = Safetensors::open(vec![path.into()])?;
    let load = |name: &str| -> Result<_> {
        let tensor = file.tensor(name, device)?;
        let finite = tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().all(f32::is_finite);
        ensure!(finite, "{}: tensor {name} holds NaN or infinity", path.display());
        Ok((name.to_string(), tensor))
    };
    file.names().into_iter().map(load).collect()
}
