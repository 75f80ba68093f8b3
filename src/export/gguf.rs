//! A model as one GGUF file. Its metadata is carried over from the GGUF file that it comes from, or put together from a folder's
//! description and tokenizer.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::{Dtype, Export, Form, show};
use crate::event::Observer;
use crate::model::metadata::InGguf;
use crate::model::weights::{config, gguf_name};
use crate::model::{Architecture, Model, Weights};
use crate::model_files::ModelFiles;

/// The key that says what most tensors are stored as, and those numbers of llama.cpp's that are ours.
const FILE_TYPE: &str = "general.file_type";

fn kind(dtype: Dtype) -> (GgmlDType, u32) {
    match dtype {
        Dtype::F32 => (GgmlDType::F32, 0),
        Dtype::F16 => (GgmlDType::F16, 1),
        Dtype::Bf16 => (GgmlDType::BF16, 32),
    }
}

/// Metadata and further tensors, and how such a file stores weights.
pub(super) fn describe(model: &ModelFiles) -> Result<(Form, Architecture)> {
    let ModelFiles { weights, architecture, tokenizer, .. } = model;
    let (content, file) = match weights {
        Weights::Gguf { content, file, .. } => (content, file),
        Weights::Folder { path, .. } => {
            let config = config(path)?;
            let described = architecture.in_gguf(config["model_type"].as_str().unwrap_or_default());
            let InGguf { mut metadata, divisors, architecture } = described.context("it cannot be a GGUF file")?;
            metadata.extend(tokenizer.in_gguf(path, architecture.vocabulary)?);
            let divisors = divisors.map(|divisors| -> Result<_> {
                let tensor = QTensor::quantize(&Tensor::new(divisors, &Device::Cpu)?, GgmlDType::F32)?;
                Ok(("rope_freqs.weight".to_string(), tensor))
            });
            return Ok((Form::Gguf(metadata, divisors.transpose()?.into_iter().collect()), architecture));
        }
    };
    // What the model does not name stays as it is.
    let named: Vec<String> =
        Model::tensors(architecture)?.iter().map(|(name, _)| gguf_name(name, architecture)).collect();
    let mut others: Vec<&String> = content.tensor_infos.keys().filter(|name| !named.contains(name)).collect();
    others.sort();
    let mut reader = BufReader::new(file.try_clone()?);
    let others = others.into_iter().map(|name| {
        let tensor = content.tensor(&mut reader, name, &Device::Cpu);
        tensor.map(|tensor| (name.clone(), tensor)).with_context(|| format!("tensor {name}"))
    });
    Ok((Form::Gguf(content.metadata.clone(), others.collect::<Result<_>>()?), architecture.clone()))
}

/// Writes the file. Matrices are in the chosen number format, vectors in f32, as llama.cpp needs them.
pub(super) fn write(
    export: &Export,
    metadata: &HashMap<String, Value>,
    others: &[(String, QTensor)],
    path: &Path,
    observer: Observer,
) -> Result<()> {
    let (matrices, file_type) = kind(export.dtype);
    let all = export.tensors()?;
    let (total, mut tensors) = (all.len(), Vec::new());
    for (done, (name, shape)) in all.into_iter().enumerate() {
        let kind = if shape.len() == 1 { GgmlDType::F32 } else { matrices };
        let merged = QTensor::quantize(&export.merged(&name, &shape)?, kind)?;
        tensors.push((gguf_name(&name, &export.written), merged));
        show(observer, done + 1, total);
    }
    let file_type = Value::U32(file_type);
    // Tensors are aligned as files that do not say otherwise have them.
    let kept = metadata.iter().filter(|(key, _)| !["general.alignment", FILE_TYPE].contains(&key.as_str()));
    let mut metadata: Vec<(&str, &Value)> = kept.map(|(key, value)| (key.as_str(), value)).collect();
    metadata.push((FILE_TYPE, &file_type));
    metadata.sort_by_key(|(key, _)| *key);
    let tensors: Vec<(&str, &QTensor)> =
        tensors.iter().chain(others).map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let cannot = || format!("{}: cannot write", path.display());
    let mut file = BufWriter::new(File::create(path).with_context(cannot)?);
    gguf_file::write(&mut file, &metadata, &tensors).with_context(cannot)?;
    file.flush().and_then(|()| file.get_ref().sync_all()).with_context(cannot)
}
