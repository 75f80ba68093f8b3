//! `candor export`: a model with its adapter merged into the weights, W + s·B·A, in a form that other programs read.
//!
//! * [`folder`]: as a Hugging Face folder
//! * [`gguf`]: as one GGUF file

mod folder;
mod gguf;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::Value as Metadata;
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::Value;

use crate::event::{Event, Observer};
use crate::model::{Architecture, Model, Projection};
use crate::model_files::ModelFiles;
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
    form: Form,
    /// How the written files are read: their weights stand in them accordingly.
    written: Architecture,
    dtype: Dtype,
    shard: u64,
}

/// What is said beside the weights.
enum Form {
    /// In `config.json`.
    Folder(Value),
    /// By the file's metadata and the tensors that only it has.
    Gguf(HashMap<String, Metadata>, Vec<(String, QTensor)>),
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
        let described = match format {
            Format::Safetensors => folder::describe(&model),
            Format::Gguf => gguf::describe(&model),
        };
        let (form, written) = described.with_context(|| model.weights.path().display().to_string())?;
        Ok(Self { model, adapter, out: out.into(), form, written, dtype, shard })
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
        let written = match &self.form {
            Form::Folder(config) => folder::write(&self, config, &unfinished, observer),
            Form::Gguf(metadata, others) => gguf::write(&self, metadata, others, &unfinished, observer),
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

    /// A tensor with the adapter's share, in f32, as the written files have it.
    ///
    /// # Errors
    /// If it cannot be read, or holds numbers that the number format cannot.
    fn merged(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let (Self { model: ModelFiles { weights, architecture, .. }, written, .. }, projection) =
            (self, projection(name));
        let mut tensor = weights.tensor(name, shape, architecture, &Device::Cpu)?;
        let adapter = self.adapter.as_ref().zip(projection);
        let delta = adapter.map(|(adapter, (layer, projection))| adapter.delta(layer, projection)).transpose()?;
        if let Some(delta) = delta.flatten() {
            tensor = (tensor + delta)?;
        }
        if name.ends_with("norm.weight") && architecture.norm_offset != written.norm_offset {
            tensor = (tensor + (architecture.norm_offset - written.norm_offset))?;
        }
        // Where the files have no word for the scale of scores, the queries take it over.
        let queries = if written.head_norms { "q_norm.weight" } else { "q_proj.weight" };
        if name.ends_with(queries) && architecture.score_scale != written.score_scale {
            tensor = (tensor * (architecture.score_scale / written.score_scale))?;
        }
        if written.interleaved && matches!(projection, Some((_, Projection::QProj | Projection::KProj))) {
            let ((out, width), half) = (tensor.dims2()?, written.head_dim / 2);
            tensor = tensor.reshape((out / (2 * half), 2, half, width))?.transpose(1, 2)?.reshape((out, width))?;
        }
        let largest = tensor.abs()?.max_all()?.to_scalar::<f32>()?;
        let limit = if self.dtype == Dtype::F16 { 65504.0 } else { f32::MAX };
        ensure!(largest <= limit, "tensor {name} holds {largest}, more than {:?} can; use f32 or bf16", self.dtype);
        Ok(tensor)
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
