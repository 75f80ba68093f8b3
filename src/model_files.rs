//! A model's files: its header is read and its tokenizer loaded before any weight is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use candle_core::Device;
use tracing::debug;

use crate::config::{Dtype, Quantization};
use crate::cuda::Place;
use crate::cuda::decoder::stored_tokens;
use crate::event::{Event, Observer};
use crate::model::{Architecture, Footprint, Model, Weights};
use crate::ops::kernel::Kernel;
use crate::peft;
use crate::policy::Adapter;
use crate::source::{self, Kind};
use crate::tokenizer::Tokenizer;

/// A model whose header has been read; its weights have not.
pub struct ModelFiles {
    /// The opened file or folder.
    pub weights: Weights,
    /// What it describes.
    pub architecture: Architecture,
    /// Its tokenizer and chat template.
    pub tokenizer: Arc<Tokenizer>,
    /// How the layers' projections are packed, if they are.
    pub quantization: Option<Quantization>,
    /// Where it is computed.
    pub place: Place,
    /// What its weights will take.
    pub footprint: Footprint,
}

impl ModelFiles {
    /// Opens a model from a source string, as `model.source` is.
    ///
    /// # Errors
    /// If the source cannot be had, a tensor is missing, has the wrong shape or no place in the model, or the tokenizer is not
    /// this model's.
    pub fn open(source: &str, observer: Observer) -> Result<Self> {
        let path = resolve(source, Kind::Model, observer)?;
        let weights = Weights::open(&path)?;
        let architecture = weights.architecture()?;
        let place = Place::from(Kernel::choose(Dtype::Auto, None)?);
        let footprint = Model::footprint(&weights, &architecture, None, place.kernel)?;
        weights.check_layers(&architecture)?;
        let tokenizer = match weights.metadata() {
            Some(metadata) => Tokenizer::from_gguf(metadata),
            None => Tokenizer::from_folder(&path),
        };
        let tokenizer = tokenizer.with_context(|| weights.path().display().to_string())?;
        let (tokens, vocabulary) = (tokenizer.vocab_size(), architecture.vocabulary);
        ensure!(
            tokens <= vocabulary,
            "{}: the tokenizer needs {tokens} token ids, the model has only {vocabulary}; are they of one model?",
            weights.path().display()
        );
        Ok(Self { weights, architecture, tokenizer: Arc::new(tokenizer), quantization: None, place, footprint })
    }

    /// The same model, computed there, or by these instructions.
    ///
    /// # Errors
    /// None that opening it would not have had.
    pub fn computed_by(self, place: impl Into<Place>) -> Result<Self> {
        let place = place.into();
        let footprint = Model::footprint(&self.weights, &self.architecture, self.quantization, place.kernel)?;
        Ok(Self { place, footprint, ..self })
    }

    /// As [`Model::stored_tokens`], before it is loaded.
    pub fn stored_tokens(&self) -> Option<usize> {
        self.place.gpu.as_ref().map(|gpu| stored_tokens(gpu, &self.architecture, self.footprint.resident))
    }

    /// The same model, its projections to be packed.
    ///
    /// # Errors
    /// If they cannot be packed like this.
    pub fn packed(self, quantization: Quantization) -> Result<Self> {
        ensure!(
            quantization != Quantization::Keep || self.weights.metadata().is_some(),
            "\"keep\" leaves a GGUF file's weights as they are packed, but {} is a folder of unpacked ones; use \"nf4\" or \"q8_0\"",
            self.weights.path().display()
        );
        let footprint = Model::footprint(&self.weights, &self.architecture, Some(quantization), self.place.kernel)?;
        Ok(Self { quantization: Some(quantization), footprint, ..self })
    }

    /// Reads the PEFT adapter in a folder if one is given.
    ///
    /// # Errors
    /// If it cannot be read or is not this model's.
    pub fn adapter(&self, folder: Option<&Path>, device: &Device) -> Result<Option<Adapter>> {
        let read = |folder: &Path| {
            let lora = peft::described(folder)?;
            peft::load(folder, &self.architecture, &lora, device)
        };
        folder.map(read).transpose().context("--adapter")
    }

    /// Reads the weights, and the PEFT adapter in a folder if one is given. Its rank, scale and targets are its own.
    ///
    /// # Errors
    /// As [`ModelFiles::adapter`] and [`ModelFiles::load`].
    pub fn policy(self, adapter: Option<&Path>, device: &Device, observer: Observer) -> Result<Policy> {
        let (adapter, tokenizer) = (self.adapter(adapter, device)?.map(Arc::new), self.tokenizer.clone());
        Ok(Policy { model: self.load(device, observer)?, tokenizer, adapter })
    }

    /// Reads the weights.
    ///
    /// # Errors
    /// If a tensor is missing or has the wrong shape, or a GPU has no room for them.
    pub fn load(self, device: &Device, observer: Observer) -> Result<Arc<Model>> {
        let path = self.weights.path();
        debug!(path = %path.display(), "weights");
        observer(Event::Line(&format!("loading the model {}", path.file_name().unwrap_or(path.as_os_str()).display())));
        let Self { weights, quantization, place, .. } = &self;
        observer(Event::Line(&format!("computing on {}", place.name())));
        Ok(Arc::new(match &place.gpu {
            Some(gpu) => Model::load_on(gpu, weights, *quantization)?,
            None => Model::load(weights, *quantization, place.kernel, device)?,
        }))
    }
}

/// A model that is ready to be asked: as it is, or with an adapter.
pub struct Policy {
    /// The frozen base.
    pub model: Arc<Model>,
    /// Its tokenizer and chat template.
    pub tokenizer: Arc<Tokenizer>,
    /// What was trained.
    pub adapter: Option<Arc<Adapter>>,
}

/// The model and its tokenizer from a source string.
///
/// # Errors
/// As [`ModelFiles::open`] and [`ModelFiles::load`].
pub fn load_model(source: &str, place: impl Into<Place>, observer: Observer) -> Result<(Arc<Model>, Arc<Tokenizer>)> {
    let files = ModelFiles::open(source, observer)?.computed_by(place)?;
    let Policy { model, tokenizer, .. } = files.policy(None, &Device::Cpu, observer)?;
    Ok((model, tokenizer))
}

/// Where a source's file or folder is, fetched if it has to be.
pub(crate) fn resolve(source: &str, kind: Kind, observer: Observer) -> Result<PathBuf> {
    source::resolve(source, kind, &|line| observer(Event::Line(line)))
}
