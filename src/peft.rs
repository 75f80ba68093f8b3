//! Adapters in PEFT's format, both ways: `adapter_model.safetensors` and `adapter_config.json` in a folder.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use serde_json::{Value, json};

use crate::config::Lora;
use crate::model::{Architecture, Projection};
use crate::policy::Adapter;
use crate::run::write_whole;
use crate::source::hub_repository;
use crate::tensors;

/// Writes an adapter as PEFT does: `adapter_model.safetensors` and `adapter_config.json`. The base is named as transformers
/// finds it where it is a folder or lies on the hub; what a `pip:` source or a GGUF file holds, transformers cannot load, and
/// the source string stands there for whoever reads it.
///
/// # Errors
/// If the disk fails.
pub fn save(folder: &Path, lora: &Lora, base: &str, adapter: &Adapter) -> Result<()> {
    tensors::save(&folder.join("adapter_model.safetensors"), adapter.tensors()?)?;
    let repository = hub_repository(base);
    let alpha = if lora.alpha.fract() == 0.0 { json!(lora.alpha as i64) } else { json!(lora.alpha) };
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": repository.as_ref().map_or(base, |(name, _)| name),
        "revision": repository.as_ref().map(|(_, revision)| revision),
        "r": lora.rank,
        "lora_alpha": alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "target_modules": lora.targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
    });
    write_whole(&folder.join("adapter_config.json"), &serde_json::to_vec_pretty(&config)?)
}

/// Keys of PEFT's config that, once set, make something else of an adapter than a pair of matrices beside each projection of
/// every layer.
const OTHER_ADAPTERS: [&str; 14] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "exclude_modules",
    "trainable_token_indices",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "alora_invocation_tokens",
];

/// What an adapter folder's `adapter_config.json` describes.
///
/// # Errors
/// If the file is missing or damaged, or describes something that is not a plain LoRA adapter of known projections: it would
/// compute something else here than where it was trained.
pub fn described(folder: &Path) -> Result<Lora> {
    let path = folder.join("adapter_config.json");
    let text = fs::read(&path).with_context(|| format!("{}: cannot read", path.display()))?;
    let config: Value = serde_json::from_slice(&text).with_context(|| format!("{}: not json", path.display()))?;
    let describe = || -> Result<Lora> {
        let kind = &config["peft_type"];
        ensure!(kind == "LORA", "peft_type is {kind}, not \"LORA\"");
        let no_bias = config["bias"].is_null() || config["bias"] == "none";
        ensure!(no_bias, "bias is {}; only \"none\" is supported", config["bias"]);
        for key in OTHER_ADAPTERS {
            let value = &config[key];
            let unset = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(items) => items.is_empty(),
                _ => false,
            };
            ensure!(unset, "{key} is {value}, which is not supported");
        }
        let start = config["init_lora_weights"].as_str().unwrap_or_default();
        ensure!(
            !["pissa", "olora", "corda", "loftq", "lora_ga"].iter().any(|kind| start.starts_with(kind)),
            "init_lora_weights is {start:?}: it has changed the base's weights; convert the adapter to plain LoRA with PEFT first"
        );
        let rank = config["r"].as_u64().filter(|rank| (1..1 << 30).contains(rank)).context("r is not a rank")?;
        let alpha =
            config["lora_alpha"].as_f64().filter(|alpha| *alpha > 0.0).context("lora_alpha is not a number above 0")?;
        let modules = config["target_modules"].as_array().context("target_modules is not a list of modules")?;
        let named = |module: &Value| {
            let known =
                |projection: &Projection| module.as_str().is_some_and(|name| projection.module().ends_with(name));
            let found: Vec<Projection> = Projection::ALL.into_iter().filter(known).collect();
            ensure!(found.len() == 1, "target_modules: {module} is not a projection of a decoder layer");
            Ok(found[0])
        };
        Ok(Lora {
            rank: rank as usize,
            alpha,
            rslora: config["use_rslora"].as_bool().unwrap_or(false),
            targets: modules.iter().map(named).collect::<Result<_>>()?,
            ..Lora::default()
        })
    };
    describe().with_context(|| path.display().to_string())
}

/// Reads an adapter that PEFT or this program wrote, and checks that it is the one that `lora` describes.
///
/// # Errors
/// If a file is missing or damaged, or the adapter's shape is another one than the config's.
pub fn load(folder: &Path, architecture: &Architecture, lora: &Lora, device: &Device) -> Result<Adapter> {
    let found = described(folder)?;
    let matches = [
        ("lora.rank", found.rank == lora.rank),
        ("lora.alpha", found.alpha == lora.alpha),
        ("lora.rslora", found.rslora == lora.rslora),
        ("lora.targets", Projection::ALL.iter().all(|p| found.targets.contains(p) == lora.targets.contains(p))),
    ];
    for (key, same) in matches {
        ensure!(
            same,
            "{}: the adapter does not match the config's {key}; set it to the adapter's value",
            folder.join("adapter_config.json").display()
        );
    }
    let path = folder.join("adapter_model.safetensors");
    let tensors = tensors::load(&path, device)?;
    Adapter::from_tensors(architecture, lora, tensors, device).with_context(|| path.display().to_string())
}
