//! Files of named tensors, safetensors, as they are written and read again whole.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use safetensors::tensor::serialize_to_file;

use crate::model::safetensors::Safetensors;

/// Writes a file, over one that is there.
///
/// # Errors
/// If the disk fails.
pub fn save(path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let cannot = || format!("{}: cannot write", path.display());
    // The crate leaves a file that only its owner can read; this one has the permissions of any new file.
    let permissions = File::create(path).and_then(|file| file.metadata()).with_context(cannot)?.permissions();
    // transformers asks which library's tensors they are.
    let format = HashMap::from([("format".to_string(), "pt".to_string())]);
    serialize_to_file(tensors, Some(format), path).with_context(cannot)?;
    fs::set_permissions(path, permissions).and_then(|()| File::open(path)?.sync_all()).with_context(cannot)
}

/// All tensors of a file, in f32.
///
/// # Errors
/// If the file is damaged, or a number is not finite: it would end a run later, where nothing says where it came from.
pub fn load(path: &Path, device: &Device) -> Result<HashMap<String, Tensor>> {
    let file = Safetensors::open(vec![path.into()])?;
    let load = |name: &str| -> Result<_> {
        let tensor = file.tensor(name, device)?;
        let finite = tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().all(f32::is_finite);
        ensure!(finite, "{}: tensor {name} holds NaN or infinity", path.display());
        Ok((name.to_string(), tensor))
    };
    file.names().into_iter().map(load).collect()
}
