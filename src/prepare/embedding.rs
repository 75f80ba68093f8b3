//! Sentence embeddings by all-MiniLM-L6-v2 and encoders like it (BERT, Devlin et al. 2019): the mean of the last hidden states,
//! scaled to length 1.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::Deserialize;

use crate::model::safetensors::Safetensors;

/// Tokens of one forward pass, about.
const TOKENS: usize = 2048;

/// What `config.json` says that is used here.
#[derive(Deserialize)]
struct Description {
    hidden_act: String,
    num_attention_heads: usize,
    num_hidden_layers: usize,
    max_position_embeddings: usize,
    layer_norm_eps: f64,
}

/// y = x · wᵀ + b.
struct Linear {
    weight_t: Tensor,
    bias: Tensor,
}

struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f64,
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attended: Linear,
    attended_norm: LayerNorm,
    up: Linear,
    down: Linear,
    norm: LayerNorm,
}

/// An encoder of sentences.
pub struct Encoder {
    tokenizer: tokenizers::Tokenizer,
    heads: usize,
    words: Tensor,
    positions: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

/// The tensors of a file by name.
struct Tensors(Safetensors);

impl Tensors {
    fn get(&self, name: &str) -> Result<Tensor> {
        Ok(self.0.tensor(name, &Device::Cpu)?.to_dtype(DType::F32)?)
    }

    fn linear(&self, name: &str) -> Result<Linear> {
        let weight_t = self.get(&format!("{name}.weight"))?.t()?.contiguous()?;
        Ok(Linear { weight_t, bias: self.get(&format!("{name}.bias"))? })
    }

    fn norm(&self, name: &str, epsilon: f64) -> Result<LayerNorm> {
        let [weight, bias] = ["weight", "bias"].map(|part| self.get(&format!("{name}.{part}")));
        Ok(LayerNorm { weight: weight?, bias: bias?, epsilon })
    }
}

impl Linear {
    /// `x`: [rows, in].
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.matmul(&self.weight_t)?.broadcast_add(&self.bias)?)
    }
}

impl LayerNorm {
    /// The normalized sum of two [rows, hidden].
    fn of_sum(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let (weight, bias): (Vec<f32>, Vec<f32>) = (self.weight.to_vec1()?, self.bias.to_vec1()?);
        by_rows(&(x + y)?, |row| {
            let count = row.len() as f32;
            let mean = row.iter().sum::<f32>() / count;
            let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / count;
            let scale = 1.0 / (variance + self.epsilon as f32).sqrt();
            let affine = weight.iter().zip(&bias);
            row.iter_mut().zip(affine).for_each(|(x, (weight, bias))| *x = (*x - mean) * scale * weight + bias);
        })
    }
}

/// A [rows, columns] with `change` done to every row, on all threads: candle's point-wise operations use one.
fn by_rows(x: &Tensor, change: impl Fn(&mut [f32]) + Sync + Send) -> Result<Tensor> {
    let (rows, columns) = x.dims2()?;
    let mut values: Vec<f32> = x.flatten_all()?.to_vec1()?;
    values.par_chunks_mut(columns).for_each(change);
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
}

/// x · Φ(x), with the rational approximation of erf that Eigen uses in f32 (largest error 1e-7 of erf).
fn gelu(x: f32) -> f32 {
    const P: [f32; 7] =
        [-2.726_142e-10, 2.770_681_4e-8, -2.101_024e-6, -5.692_506_4e-5, -7.349_906_3e-4, -2.954_6e-3, -1.609_603_3e-2];
    const Q: [f32; 5] = [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2];
    let z = (x * std::f32::consts::FRAC_1_SQRT_2).clamp(-4.0, 4.0);
    let polynomial = |terms: &[f32]| terms.iter().fold(0.0, |sum, term| sum * (z * z) + term);
    0.5 * x * (1.0 + z * polynomial(&P) / polynomial(&Q))
}

impl Layer {
    fn open(tensors: &Tensors, index: usize, epsilon: f64) -> Result<Self> {
        let name = |part: &str| format!("encoder.layer.{index}.{part}");
        Ok(Self {
            query: tensors.linear(&name("attention.self.query"))?,
            key: tensors.linear(&name("attention.self.key"))?,
            value: tensors.linear(&name("attention.self.value"))?,
            attended: tensors.linear(&name("attention.output.dense"))?,
            attended_norm: tensors.norm(&name("attention.output.LayerNorm"), epsilon)?,
            up: tensors.linear(&name("intermediate.dense"))?,
            down: tensors.linear(&name("output.dense"))?,
            norm: tensors.norm(&name("output.LayerNorm"), epsilon)?,
        })
    }

    /// `x`: [texts · tokens, hidden].
    fn forward(&self, x: &Tensor, texts: usize, heads: usize) -> Result<Tensor> {
        let (rows, hidden) = x.dims2()?;
        let (tokens, width) = (rows / texts, hidden / heads);
        // [texts, heads, tokens, width]
        let split = |of: &Linear| -> Result<Tensor> {
            Ok(of.forward(x)?.reshape((texts, tokens, heads, width))?.transpose(1, 2)?.contiguous()?)
        };
        let (query, key, value) = (split(&self.query)?, split(&self.key)?, split(&self.value)?);
        let scores = (query.matmul(&key.t()?.contiguous()?)? / (width as f64).sqrt())?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(3)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(3)?)?;
        let attended = weights.matmul(&value)?.transpose(1, 2)?.contiguous()?.reshape((rows, hidden))?;
        let x = self.attended_norm.of_sum(&self.attended.forward(&attended)?, x)?;
        let wide = by_rows(&self.up.forward(&x)?, |row| row.iter_mut().for_each(|x| *x = gelu(*x)))?;
        self.norm.of_sum(&self.down.forward(&wide)?, &x)
    }
}

impl Encoder {
    /// Reads a folder with `config.json`, `tokenizer.json` and `model.safetensors`.
    ///
    /// # Errors
    /// If a file is missing or not what an encoder's is.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::read(folder).with_context(|| format!("{}: not an encoder of sentences", folder.display()))
    }

    fn read(folder: &Path) -> Result<Self> {
        let text = std::fs::read(folder.join("config.json")).context("config.json: cannot read")?;
        let description: Description = serde_json::from_slice(&text).context("config.json")?;
        let Description { num_attention_heads: heads, layer_norm_eps: epsilon, .. } = description;
        ensure!(description.hidden_act == "gelu", "config.json: hidden_act is {:?}, not gelu", description.hidden_act);
        let read = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).map_err(anyhow::Error::from_boxed);
        let mut tokenizer = read.context("tokenizer.json")?;
        // The file pads every text to the longest; texts of one length share a pass here instead.
        tokenizer.with_padding(None);
        let longest = tokenizer.get_truncation().map_or(usize::MAX, |truncation| truncation.max_length);
        ensure!(
            longest <= description.max_position_embeddings,
            "tokenizer.json: texts are not cut to the model's length"
        );
        let tensors = Tensors(Safetensors::open(vec![folder.join("model.safetensors")])?);
        let kinds = tensors.get("embeddings.token_type_embeddings.weight")?;
        // Every token is of the first of two sentences.
        let positions = tensors.get("embeddings.position_embeddings.weight")?.broadcast_add(&kinds.narrow(0, 0, 1)?)?;
        let words = tensors.get("embeddings.word_embeddings.weight")?;
        let (vocabulary, hidden) = words.dims2()?;
        ensure!(tokenizer.get_vocab_size(true) <= vocabulary, "tokenizer.json: not the tokenizer of these weights");
        ensure!(heads > 0 && hidden % heads == 0, "config.json: {heads} heads do not share {hidden} dimensions");
        let layers = (0..description.num_hidden_layers).map(|index| Layer::open(&tensors, index, epsilon));
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            norm: tensors.norm("embeddings.LayerNorm", epsilon)?,
            tokenizer,
            heads,
            words,
            positions,
        })
    }

    /// The embeddings of texts in order, each of length 1. `progress` is told how many are done.
    ///
    /// # Errors
    /// If a text cannot be tokenized.
    pub fn embed(&self, texts: &[String], progress: &dyn Fn(usize)) -> Result<Vec<Vec<f64>>> {
        let encoded = self.tokenizer.encode_batch_fast(texts.to_vec(), true).map_err(anyhow::Error::from_boxed)?;
        let ids: Vec<&[u32]> = encoded.iter().map(|encoding| encoding.get_ids()).collect();
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|&index| (ids[index].len(), index));
        let mut embeddings = vec![Vec::new(); texts.len()];
        let mut done = 0;
        for of_length in order.chunk_by(|a, b| ids[*a].len() == ids[*b].len()) {
            let tokens = ids[of_length[0]].len();
            for batch in of_length.chunks(TOKENS.div_ceil(tokens.max(1))) {
                let all: Vec<u32> = batch.iter().flat_map(|&index| ids[index].iter().copied()).collect();
                let vectors = self.forward(all, batch.len())?;
                for (&index, vector) in batch.iter().zip(vectors) {
                    embeddings[index] = super::labels::unit(&vector.into_iter().map(f64::from).collect::<Vec<_>>());
                }
                done += batch.len();
                progress(done);
            }
        }
        Ok(embeddings)
    }

    /// The mean hidden state of texts of one length.
    fn forward(&self, ids: Vec<u32>, texts: usize) -> Result<Vec<Vec<f32>>> {
        let rows = ids.len();
        let tokens = rows / texts;
        let hidden = self.words.dim(1)?;
        let words = self.words.index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?;
        let placed = self.positions.narrow(0, 0, tokens)?.broadcast_as((texts, tokens, hidden))?;
        let mut x = self.norm.of_sum(&words, &placed.contiguous()?.reshape((rows, hidden))?)?;
        for layer in &self.layers {
            x = layer.forward(&x, texts, self.heads)?;
        }
        Ok(x.reshape((texts, tokens, hidden))?.mean(1)?.to_vec2()?)
    }
}
