//! `candor export`: a model with its adapter merged into the weights, W + s·B·A, in a form that other programs read.
//!
//! * [`folder`]: as a Hugging Face folder
//! * [`gguf`]: as one GGUF file

mod folder;
mod gguf;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use crate::event::{Event, Observer};
use crate::inputs::ModelFiles;
use crate::model::{Model, Projection};
use crate::policy::Adapter;

pub use folder::SHARD;

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// A folder as transformers and vLLM load it.
    Safetensors,
    /// One file as llama.cpp loads it.
    Gguf,
}

/// The number format of the written matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// 32-bit floats: what is merged, exactly.
    F32,
    /// 16-bit floats, largest 65504.
    F16,
    /// 16-bit brain floats.
    Bf16,
}

impl Dtype {
    fn of_tensors(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// What is to be exported, and where to.
pub struct Settings<'a> {
    /// The model's source string.
    pub source: &'a str,
    /// A PEFT adapter folder.
    pub adapter: Option<&'a Path>,
    /// The folder or file to be made; it does not exist yet.
    pub out: &'a Path,
    /// What is made; absent: a GGUF file where `out` is called `.gguf`, else a folder.
    pub format: Option<Format>,
    /// The number format.
    pub dtype: Dtype,
    /// The most bytes of weights in one file of a folder.
    pub shard: u64,
}

/// An export that is ready to be written.
pub struct Export {
    model: ModelFiles,
    adapter: Option<Adapter>,
    out: PathBuf,
    format: Format,
    dtype: Dtype,
    shard: u64,
}

impl Export {
    /// Opens the model and the adapter.
    ///
    /// # Errors
    /// If they are not what they should be, `out` exists, or the model cannot be written in that format.
    pub fn prepare(settings: &Settings, observer: Observer) -> Result<Self> {
        let Settings { source, adapter, out, format, dtype, shard } = *settings;
        ensure!(out.symlink_metadata().is_err(), "{} exists already; it is never overwritten", out.display());
        let model = ModelFiles::open(source, observer)?;
        let adapter = model.adapter(adapter, &Device::Cpu)?;
        let named = out.extension().is_some_and(|extension| extension == "gguf");
        let format = format.unwrap_or(if named { Format::Gguf } else { Format::Safetensors });
        match format {
            Format::Safetensors => folder::check(&model)?,
            Format::Gguf => gguf::check(&model)?,
        }
        Ok(Self { model, adapter, out: out.into(), format, dtype, shard })
    }

    /// Writes everything under another name, and renames it when it is whole.
    ///
    /// # Errors
    /// If a weight cannot be read or does not fit the number format, or the disk fails; nothing is left then.
    pub fn write(self, observer: Observer) -> Result<()> {
        let out = &self.out;
        let name = out.file_name().with_context(|| format!("{} names no file or folder", out.display()))?;
        let unfinished = out.with_file_name(format!(".{}.new", name.to_string_lossy()));
        remove(&unfinished).with_context(|| format!("{}: cannot remove", unfinished.display()))?;
        if let Some(parent) = out.parent() {
            fs::create_dir_all(parent).with_context(|| format!("{}: cannot create", parent.display()))?;
        }
        let written = match self.format {
            Format::Safetensors => folder::write(&self, &unfinished, observer),
            Format::Gguf => gguf::write(&self, &unfinished, observer),
        };
        let renamed = written
            .and_then(|()| fs::rename(&unfinished, out).with_context(|| format!("{}: cannot create", out.display())));
        if renamed.is_err() {
            // What failed before is what matters.
            remove(&unfinished).ok();
        }
        renamed
    }

    /// Name and shape of every tensor of the model.
    fn tensors(&self) -> Result<Vec<(String, Vec<usize>)>> {
        Model::tensors(&self.model.architecture)
    }

    /// A tensor with the adapter's share, in f32.
    fn merged(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let ModelFiles { weights, architecture, .. } = &self.model;
        let weight = weights.tensor(name, shape, architecture, &Device::Cpu)?;
        let Some((adapter, (layer, projection))) = self.adapter.as_ref().zip(projection(name)) else {
            return Ok(weight);
        };
        Ok(match adapter.delta(layer, projection)? {
            Some(delta) => (weight + delta)?,
            None => weight,
        })
    }

    /// Refuses numbers that the chosen format cannot hold.
    fn check_range(&self, name: &str, tensor: &Tensor) -> Result<()> {
        let largest = tensor.abs()?.max_all()?.to_scalar::<f32>()?;
        let limit = if self.dtype == Dtype::F16 { 65504.0 } else { f32::MAX };
        ensure!(largest <= limit, "tensor {name} holds {largest}, more than {:?} can; use f32 or bf16", self.dtype);
        Ok(())
    }
}

/// The layer and projection that a weight belongs to.
fn projection(name: &str) -> Option<(usize, Projection)> {
    let (layer, module) = name.strip_prefix("model.layers.")?.strip_suffix(".weight")?.split_once('.')?;
    let projection = Projection::ALL.into_iter().find(|projection| projection.module() == module)?;
    Some((layer.parse().ok()?, projection))
}

/// Progress by tensors.
fn show(observer: Observer, done: usize, total: usize) {
    observer(Event::Progress { what: "tensors", done, total });
}

/// Removes a file or folder if there is one.
fn remove(path: &Path) -> std::io::Result<()> {
    match path.symlink_metadata() {
        Ok(data) if data.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    }
}
