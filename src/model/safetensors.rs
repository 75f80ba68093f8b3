//! The safetensors files of a folder, mapped into memory. The safetensors crate checks each header against its file; here
//! is checked that the files together are the model that their index describes.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

/// The name of the one file of a model that is not split.
const WHOLE: &str = "model.safetensors";
/// The name of the file that says which file of a split model holds which tensor.
const INDEX: &str = "model.safetensors.index.json";

/// Files that together hold tensors by name.
pub struct Safetensors {
    files: Vec<(PathBuf, MmapedSafetensors)>,
    /// Which of the files holds a tensor.
    places: HashMap<String, usize>,
}

/// What we use of the index.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Safetensors {
    /// Maps a model's files: `model.safetensors`, else what the index names, else every safetensors file there is.
    ///
    /// # Errors
    /// If there is no such file, one is damaged, two hold a tensor of the same name, or the index names a file or a tensor
    /// that is not there.
    pub fn in_folder(folder: &Path) -> Result<Self> {
        let index = folder.join(INDEX);
        if folder.join(WHOLE).exists() {
            Self::map(vec![folder.join(WHOLE)])
        } else if index.exists() {
            Self::indexed(folder, &index).with_context(|| index.display().to_string())
        } else {
            let files = every_file(folder).with_context(|| format!("{}: cannot list", folder.display()))?;
            ensure!(!files.is_empty(), "{}: config.json but no .safetensors file beside it", folder.display());
            Self::map(files)
        }
    }

    fn indexed(folder: &Path, index: &Path) -> Result<Self> {
        let text = std::fs::read(index).context("cannot read")?;
        let Index { weight_map } = serde_json::from_slice(&text).context("not an index of safetensors files")?;
        let mut names: Vec<&String> = weight_map.values().collect();
        names.sort();
        names.dedup();
        for name in &names {
            // Else an index could have any file of the machine mapped.
            ensure!(Path::new(name).file_name() == Some(name.as_ref()), "{name:?} is not the name of a file beside it");
            ensure!(folder.join(name).exists(), "it names {name}, which is missing; is the download complete?");
        }
        let this = Self::map(names.into_iter().map(|name| folder.join(name)).collect())?;
        for (tensor, file) in &weight_map {
            let place = this.places.get(tensor).map(|&place| this.files[place].0.as_path());
            ensure!(place == Some(&folder.join(file)), "tensor {tensor} is not in {file}, where the index has it");
        }
        Ok(this)
    }

    /// Maps these files.
    ///
    /// # Errors
    /// If one cannot be read or is damaged, or two hold a tensor of the same name.
    pub fn map(files: Vec<PathBuf>) -> Result<Self> {
        let mut this = Self { files: Vec::new(), places: HashMap::new() };
        for path in files {
            let file = map(&path).with_context(|| format!("{}: not a readable safetensors file", path.display()))?;
            let mut names: Vec<String> = file.tensors().into_iter().map(|(name, _)| name).collect();
            names.sort();
            for name in names {
                if let Some(&other) = this.places.get(&name) {
                    bail!("tensor {name} is in both {} and {}", this.files[other].0.display(), path.display());
                }
                this.places.insert(name, this.files.len());
            }
            this.files.push((path, file));
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
        let tensors = self.files.iter().flat_map(|(_, file)| file.tensors());
        tensors.map(|(_, view)| view.shape().iter().product::<usize>()).sum()
    }

    /// Size of the files in bytes.
    ///
    /// # Errors
    /// If a file is gone.
    pub fn bytes(&self) -> Result<u64> {
        let length = |path: &Path| std::fs::metadata(path).with_context(|| path.display().to_string());
        self.files.iter().map(|(path, _)| Ok(length(path)?.len())).sum()
    }

    /// The shape of a tensor; its data is not read.
    ///
    /// # Errors
    /// If it is missing.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        let (_, file) = self.holding(name)?;
        Ok(file.get(name)?.shape().to_vec())
    }

    /// A tensor in f32.
    ///
    /// # Errors
    /// If it is missing, or does not hold floats of 32 or 16 bits.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let (path, file) = self.holding(name)?;
        let view = file.get(name)?;
        ensure!(
            matches!(DType::try_from(view.dtype()), Ok(DType::F32 | DType::F16 | DType::BF16)),
            "{}: tensor {name} holds {:?}; only F32, F16 and BF16 can be read",
            path.display(),
            view.dtype()
        );
        let tensor = file.load(name, device).and_then(|tensor| tensor.to_dtype(DType::F32));
        tensor.with_context(|| format!("{}: tensor {name}", path.display()))
    }

    fn holding(&self, name: &str) -> Result<&(PathBuf, MmapedSafetensors)> {
        let place = self.places.get(name);
        let paths = || self.files.iter().map(|(path, _)| path.display().to_string()).collect::<Vec<_>>().join(", ");
        Ok(&self.files[*place.with_context(|| format!("tensor {name} is missing in {}", paths()))?])
    }
}

fn map(path: &Path) -> candle_core::Result<MmapedSafetensors> {
    // SAFETY: the file is opened read-only and converted before training starts; that nobody truncates a model file
    // while it is being loaded is the one thing that mapping asks of the user.
    unsafe { MmapedSafetensors::new(path) }
}

/// The safetensors files of a folder, in order of their names.
fn every_file(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let paths = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let mut files = paths.collect::<std::io::Result<Vec<_>>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    Ok(files)
}
