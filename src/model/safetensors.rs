//! The safetensors files of a folder. The safetensors crate checks that each header is sound; here is checked that it fits
//! its file, and that the files together are the model that their index describes.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::GgmlDType;
use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;

use super::stored::Stored;

/// The name of the one file of a model that is not split.
const WHOLE: &str = "model.safetensors";
/// The name of the file that says which file of a split model holds which tensor.
const INDEX: &str = "model.safetensors.index.json";

/// Longest header in bytes, as the format has it.
const MAX_HEADER: u64 = 100_000_000;

/// Files that together hold tensors by name.
pub struct Safetensors {
    files: Vec<Opened>,
    /// Which of the files holds a tensor.
    places: HashMap<String, usize>,
}

/// A file whose header was found to fit it.
struct Opened {
    path: PathBuf,
    file: File,
    header: Metadata,
    /// Where the header ends, in bytes.
    start: u64,
}

/// What we use of the index.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Safetensors {
    /// Opens a model's files: `model.safetensors`, else what the index names, else every safetensors file there is.
    ///
    /// # Errors
    /// If there is no such file, one is damaged, two hold a tensor of the same name, or the index names a file or a tensor
    /// that is not there.
    pub fn in_folder(folder: &Path) -> Result<Self> {
        let index = folder.join(INDEX);
        if folder.join(WHOLE).exists() {
            Self::open(vec![folder.join(WHOLE)])
        } else if index.exists() {
            Self::indexed(folder, &index).with_context(|| index.display().to_string())
        } else {
            let files = every_file(folder).with_context(|| format!("{}: cannot list", folder.display()))?;
            ensure!(!files.is_empty(), "{}: config.json but no .safetensors file beside it", folder.display());
            Self::open(files)
        }
    }

    fn indexed(folder: &Path, index: &Path) -> Result<Self> {
        let text = std::fs::read(index).context("cannot read")?;
        let Index { weight_map } = serde_json::from_slice(&text).context("not an index of safetensors files")?;
        let mut names: Vec<&String> = weight_map.values().collect();
        names.sort();
        names.dedup();
        for name in &names {
            // Else an index could have any file of the machine read.
            ensure!(Path::new(name).file_name() == Some(name.as_ref()), "{name:?} is not the name of a file beside it");
            ensure!(folder.join(name).exists(), "it names {name}, which is missing; is the download complete?");
        }
        let this = Self::open(names.into_iter().map(|name| folder.join(name)).collect())?;
        for (tensor, file) in &weight_map {
            let place = this.places.get(tensor).map(|&place| this.files[place].path.as_path());
            ensure!(place == Some(&folder.join(file)), "tensor {tensor} is not in {file}, where the index has it");
        }
        Ok(this)
    }

    /// Opens these files.
    ///
    /// # Errors
    /// If one cannot be read or is damaged, or two hold a tensor of the same name.
    pub fn open(files: Vec<PathBuf>) -> Result<Self> {
        let mut this = Self { files: Vec::new(), places: HashMap::new() };
        for path in files {
            let opened = Opened::new(&path);
            let opened = opened.with_context(|| format!("{}: not a readable safetensors file", path.display()))?;
            for name in opened.header.offset_keys() {
                if let Some(&other) = this.places.get(&name) {
                    bail!("tensor {name} is in both {} and {}", this.files[other].path.display(), path.display());
                }
                this.places.insert(name, this.files.len());
            }
            this.files.push(opened);
        }
        Ok(this)
    }

    /// The names of all tensors, in order.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.places.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// How many numbers all tensors hold.
    pub fn elements(&self) -> usize {
        let tensors = self.files.iter().flat_map(|opened| opened.header.tensors().into_values());
        tensors.map(|info| info.shape.iter().product::<usize>()).sum()
    }

    /// The shape of a tensor; its data is not read.
    ///
    /// # Errors
    /// If it is missing.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        Ok(self.holding(name)?.1.shape.clone())
    }

    /// Where a tensor lies.
    ///
    /// # Errors
    /// If it is missing, or does not hold floats of 32 or 16 bits.
    pub fn stored(&self, name: &str) -> Result<Stored<'_>> {
        let (Opened { path, file, start, .. }, info) = self.holding(name)?;
        let kind = match info.dtype {
            Dtype::F32 => GgmlDType::F32,
            Dtype::F16 => GgmlDType::F16,
            Dtype::BF16 => GgmlDType::BF16,
            other => {
                bail!("{}: tensor {name} holds {other:?}; only F32, F16 and BF16 can be read", path.display())
            }
        };
        Ok(Stored {
            file,
            offset: start + info.data_offsets.0 as u64,
            kind,
            shape: info.shape.clone(),
            interleaved: None,
        })
    }

    /// A tensor in f32.
    ///
    /// # Errors
    /// As [`Safetensors::stored`], or if the file cannot be read any more.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let (Opened { path, .. }, _) = self.holding(name)?;
        self.stored(name)?.load(device).with_context(|| format!("{}: tensor {name}", path.display()))
    }

    fn holding(&self, name: &str) -> Result<(&Opened, &TensorInfo)> {
        let opened = self.places.get(name).map(|&place| &self.files[place]);
        let found = opened.and_then(|opened| Some((opened, opened.header.info(name)?)));
        let paths = || self.files.iter().map(|opened| opened.path.display().to_string()).collect::<Vec<_>>().join(", ");
        found.with_context(|| format!("tensor {name} is missing in {}", paths()))
    }
}

impl Opened {
    fn new(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).context("too small: it ends before the length of its header")?;
        let (length, left) = (u64::from_le_bytes(length), size.saturating_sub(8));
        ensure!(length <= MAX_HEADER, "header too large: {length} bytes, where the format allows {MAX_HEADER}");
        ensure!(length <= left, "invalid header length: {length} bytes, where the file has {left} more");
        let mut text = vec![0; length as usize];
        file.read_exact(&mut text)?;
        let text = String::from_utf8(text).context("the header is not UTF-8")?;
        let header: Metadata = serde_json::from_str(&text).context("invalid JSON in header")?;
        let (start, data) = (8 + length, header.data_len() as u64);
        ensure!(
            start + data == size,
            "not fully covered: the header tells of {data} bytes of tensors, the file has {}",
            size - start
        );
        Ok(Self { path: path.into(), file, header, start })
    }
}

/// The safetensors files of a folder, in order of their names.
fn every_file(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let paths = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let mut files = paths.collect::<std::io::Result<Vec<_>>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    Ok(files)
}
