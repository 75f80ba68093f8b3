//! A model as one GGUF file, its metadata carried over from the GGUF file that it comes from.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::{Dtype, Export, projection, show};
use crate::event::Observer;
use crate::inputs::ModelFiles;
use crate::model::weights::gguf_name;
use crate::model::{Architecture, Projection, Weights};

/// The key that says what most tensors are stored as, and those numbers of llama.cpp's that are ours.
const FILE_TYPE: &str = "general.file_type";

fn kind(dtype: Dtype) -> (GgmlDType, u32) {
    match dtype {
        Dtype::F32 => (GgmlDType::F32, 0),
        Dtype::F16 => (GgmlDType::F16, 1),
        Dtype::Bf16 => (GgmlDType::BF16, 32),
    }
}

/// Refuses what is not a GGUF file already: a folder's tokenizer does not say which of GGUF's kinds of text splitting it is.
pub(super) fn check(model: &ModelFiles) -> Result<()> {
    if model.weights.metadata().is_none() {
        bail!(
            "{}: a GGUF file is made of a GGUF file only; export with --format safetensors, which llama.cpp's \
             convert_hf_to_gguf.py turns into one",
            model.weights.path().display()
        );
    }
    Ok(())
}

/// Writes the file. Matrices are in the chosen number format, vectors in f32, as llama.cpp needs them; what the model does not
/// name stays as it is.
pub(super) fn write(export: &Export, path: &Path, observer: Observer) -> Result<()> {
    let architecture = &export.model.architecture;
    let (matrices, file_type) = kind(export.dtype);
    let all = export.tensors()?;
    let (total, mut tensors) = (all.len(), Vec::new());
    for (done, (name, shape)) in all.into_iter().enumerate() {
        let merged = permute(&name, export.merged(&name, &shape)?, architecture)?;
        let kind = if shape.len() == 1 { GgmlDType::F32 } else { matrices };
        export.check_range(&name, &merged)?;
        tensors.push((gguf_name(&name, architecture), QTensor::quantize(&merged, kind)?));
        show(observer, done + 1, total);
    }
    let Weights::Gguf { content, file, .. } = &export.model.weights else { bail!("not a GGUF file") };
    let mut reader = BufReader::new(file.try_clone()?);
    let named: HashSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    let mut others: Vec<String> =
        content.tensor_infos.keys().filter(|name| !named.contains(name.as_str())).cloned().collect();
    others.sort();
    for name in others {
        let tensor = content.tensor(&mut reader, &name, &Device::Cpu).with_context(|| format!("tensor {name}"))?;
        tensors.push((name, tensor));
    }
    let file_type = Value::U32(file_type);
    // Tensors are aligned as files that do not say otherwise have them.
    let kept = content.metadata.iter().filter(|(key, _)| !["general.alignment", FILE_TYPE].contains(&key.as_str()));
    let mut metadata: Vec<(&str, &Value)> = kept.map(|(key, value)| (key.as_str(), value)).collect();
    metadata.push((FILE_TYPE, &file_type));
    metadata.sort_by_key(|(key, _)| *key);
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let cannot = || format!("{}: cannot write", path.display());
    let mut file = BufWriter::new(File::create(path).with_context(cannot)?);
    gguf_file::write(&mut file, &metadata, &tensors).with_context(cannot)?;
    file.flush().and_then(|()| file.get_ref().sync_all()).with_context(cannot)
}

/// Interleaves the two halves of each head of queries and keys, where files do that.
fn permute(name: &str, tensor: Tensor, architecture: &Architecture) -> Result<Tensor> {
    let permuted = matches!(projection(name), Some((_, Projection::QProj | Projection::KProj)));
    if !architecture.interleaved || !permuted {
        return Ok(tensor);
    }
    let ((out, width), half) = (tensor.dims2()?, architecture.head_dim / 2);
    Ok(tensor.reshape((out / (2 * half), 2, half, width))?.transpose(1, 2)?.reshape((out, width))?)
}
