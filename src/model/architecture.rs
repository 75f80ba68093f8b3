//! What a decoder looks like, as data. `family` reads it from `config.json` or GGUF metadata; `model` runs whatever it says.

use anyhow::{Result, ensure};

pub use crate::config::Projection;
use crate::ops::attention::Heads;
use crate::ops::gate::Activation;

impl Projection {
    /// Every projection of a layer, in the order of the computation.
    pub const ALL: [Projection; 7] = [
        Projection::QProj,
        Projection::KProj,
        Projection::VProj,
        Projection::OProj,
        Projection::GateProj,
        Projection::UpProj,
        Projection::DownProj,
    ];

    /// The module's path within a layer, as checkpoints and PEFT adapters name it.
    pub fn module(self) -> &'static str {
        match self {
            Projection::QProj => "self_attn.q_proj",
            Projection::KProj => "self_attn.k_proj",
            Projection::VProj => "self_attn.v_proj",
            Projection::OProj => "self_attn.o_proj",
            Projection::GateProj => "mlp.gate_proj",
            Projection::UpProj => "mlp.up_proj",
            Projection::DownProj => "mlp.down_proj",
        }
    }
}

/// The shape of a decoder-only transformer, and how files store it.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// Tokens in the embedding table.
    pub vocabulary: usize,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Width inside the feed-forward block.
    pub intermediate: usize,
    /// For every layer, which of the kinds in `attention` it is.
    pub layers: Vec<usize>,
    /// The kinds of attention that the layers have: one, or one with a sliding window and one without.
    pub attention: Vec<AttentionKind>,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// What attention scores are multiplied with.
    pub score_scale: f64,
    /// c in c · tanh(score / c), before the softmax of attention.
    pub score_cap: Option<f64>,
    /// c in c · tanh(logit / c).
    pub logit_cap: Option<f64>,
    /// What embedded tokens are multiplied with.
    pub embedding_scale: f64,
    /// ε of every RMS normalization.
    pub norm_epsilon: f64,
    /// Whether what attention and the feed-forward block return is normalized too, before it is added.
    pub output_norms: bool,
    /// Whether queries and keys are normalized head by head, before they are rotated.
    pub head_norms: bool,
    /// Whether the projections to queries, keys and values add a bias.
    pub biases: bool,
    /// Activation of the feed-forward gate.
    pub activation: Activation,
    /// Whether the output head is the embedding table.
    pub tied: bool,
    /// Longest sequence the model was made for, in tokens.
    pub context: usize,
    /// What is added to the gains of normalizations as files store them.
    pub norm_offset: f64,
    /// Whether files store queries and keys with the two halves of each head interleaved.
    pub interleaved: bool,
}

/// How the layers of one kind attend.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionKind {
    /// A token sees itself and this many tokens minus one before it; without a window, all before it.
    pub window: Option<usize>,
    /// What the rotary frequencies were before scaling: base^(−2i / head_dim).
    pub base: f64,
    /// Rotary frequencies, [head_dim / 2], scaling applied.
    pub frequencies: Vec<f64>,
}

impl Architecture {
    /// (out, in) of a projection.
    pub fn dimensions(&self, projection: Projection) -> (usize, usize) {
        let (attention, keys) = (self.heads * self.head_dim, self.key_value_heads * self.head_dim);
        match projection {
            Projection::QProj => (attention, self.hidden),
            Projection::KProj | Projection::VProj => (keys, self.hidden),
            Projection::OProj => (self.hidden, attention),
            Projection::GateProj | Projection::UpProj => (self.intermediate, self.hidden),
            Projection::DownProj => (self.hidden, self.intermediate),
        }
    }

    /// What attention is given and returns per row, in bytes: queries, keys, values and what it attended to, of so many bytes a number,
    /// and log-sums.
    pub fn attention_bytes(&self, number: usize) -> usize {
        2 * number * (self.heads + self.key_value_heads) * self.head_dim + size_of::<f32>() * self.heads
    }

    /// The shape of attention in layers of one kind.
    pub fn heads_of(&self, kind: usize) -> Heads {
        Heads {
            query: self.heads,
            key: self.key_value_heads,
            dim: self.head_dim,
            scale: self.score_scale as f32,
            soft_cap: self.score_cap.map(|cap| cap as f32),
            window: self.attention[kind].window,
        }
    }

    /// Whether a projection adds a bias.
    pub fn has_bias(&self, projection: Projection) -> bool {
        self.biases && matches!(projection, Projection::QProj | Projection::KProj | Projection::VProj)
    }

    /// Refuses what no model can be.
    pub(super) fn checked(self) -> Result<Self> {
        ensure!(
            self.heads.is_multiple_of(self.key_value_heads),
            "model description: {} heads are not a multiple of {} key-value heads",
            self.heads,
            self.key_value_heads
        );
        let factors = [("norm epsilon", Some(self.norm_epsilon)), ("score scale", Some(self.score_scale))];
        let caps = [("attention's soft cap", self.score_cap), ("the logits' soft cap", self.logit_cap)];
        for (name, value) in factors.into_iter().chain(caps) {
            let possible = value.is_none_or(|value| value.is_finite() && value > 0.0);
            ensure!(possible, "model description: {name} is {value:?}, not a positive number");
        }
        for AttentionKind { window, frequencies, .. } in &self.attention {
            ensure!(*window != Some(0), "model description: a sliding window of no tokens");
            let rotates = frequencies.iter().all(|frequency| frequency.is_finite() && *frequency > 0.0);
            ensure!(rotates, "model description: rotary frequencies {frequencies:?} are not positive numbers");
        }
        Ok(self)
    }
}
