//! Sentence embeddings by all-MiniLM-L6-v2 and encoders like it (BERT, Devlin et al. 2019): the mean of the last hidden states,
//! scaled to length 1.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
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
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let centered = x.broadcast_sub(&x.mean_keepdim(1)?)?;
        let deviation = (centered.sqr()?.mean_keepdim(1)? + self.epsilon)?.sqrt()?;
        Ok(centered.broadcast_div(&deviation)?.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)?)
    }
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
        let x = self.attended_norm.forward(&(self.attended.forward(&attended)? + x)?)?;
        let wide = self.up.forward(&x)?.gelu_erf()?;
        self.norm.forward(&(self.down.forward(&wide)? + &x)?)
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
        let words = self.words.index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?.reshape((texts, tokens, hidden))?;
        let placed = words.broadcast_add(&self.positions.narrow(0, 0, tokens)?)?.reshape((rows, hidden))?;
        let mut x = self.norm.forward(&placed)?;
        for layer in &self.layers {
            x = layer.forward(&x, texts, self.heads)?;
        }
        Ok(x.reshape((texts, tokens, hidden))?.mean(1)?.to_vec2()?)
    }
}
