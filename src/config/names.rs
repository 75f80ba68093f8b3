//! What to say of a key that is not known: most likely it is another trainer's name, or stands in the wrong section.

use candor_environments::keys::{KeyError, join, nearest};
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::forward_to_deserialize_any;

use super::{Batch, Checkpoint, Config, Environment, Evaluation, Learner, Lora, Model, Sampling};
use crate::objective::Importance;

/// Names of TRL, PEFT, transformers, verl, OpenRLHF and prime-rl: what they are here, and how they differ where they
/// do.
const ELSEWHERE: &[(&[&str], &str)] = &[
    (&["run_name", "experiment_name", "output_dir"], "here it is `name`; the run's folder is results/<name>/"),
    (&["max_steps", "total_training_steps", "num_steps"], "here it is `steps`"),
    (&["num_train_epochs", "total_epochs", "num_epochs"], "here it is `epochs`, or `steps`: optimizer steps"),
    (&["random_seed", "data_seed"], "here it is `seed`"),
    (
        &["model_name", "model_name_or_path", "pretrained_model_name_or_path", "base_model", "pretrain", "tokenizer"],
        "here it is `model.source`, which holds the tokenizer too",
    ),
    (&["torch_dtype", "bf16", "fp16", "precision"], "here it is `model.dtype`"),
    (&["load_in_4bit", "load_in_8bit"], "here it is `model.quantization`"),
    (&["r", "lora_r", "lora_rank"], "here it is `lora.rank`"),
    (&["lora_alpha"], "here it is `lora.alpha`"),
    (&["lora_dropout"], "here it is `lora.dropout`"),
    (&["target_modules", "lora_target_modules"], "here it is `lora.targets`"),
    (&["use_rslora"], "here it is `lora.rslora`"),
    (&["num_generations", "num_return_sequences", "rollouts_per_example", "group_size"], "here it is `batch.group`"),
    (
        &["per_device_train_batch_size", "train_batch_size", "batch_size", "prompts_per_step"],
        "here it is `batch.prompts`: prompts, not completions, of one optimizer step",
    ),
    (
        &["gradient_accumulation_steps", "micro_batch_size", "micro_train_batch_size", "ppo_micro_batch_size_per_gpu"],
        "here it is `batch.micro_tokens`: tokens of one forward and backward pass; the gradient does not depend on it",
    ),
    (
        &["max_completion_length", "max_new_tokens", "max_response_length", "response_length", "generate_max_len"],
        "here it is `sampling.max_tokens`",
    ),
    (&["stop_sequences", "stop_strings"], "here it is `sampling.stop`"),
    (&["max_prompt_length", "prompt_max_len"], "prompts are never cut; see `batch.long_prompts`"),
    (
        &["top_p", "top_k", "min_p", "repetition_penalty"],
        "behavior log-probabilities come from the full softmax, so training on truncated or reweighted samples would \
         bias the policy ratio; remove it",
    ),
    (&["lr", "actor_learning_rate"], "here it is `learner.learning_rate`"),
    (&["lr_scheduler_type", "lr_scheduler"], "here it is `learner.schedule`"),
    (&["warmup_ratio", "lr_warmup_ratio"], "here it is `learner.warmup_steps`: steps, not a share of them"),
    (&["adam_beta1", "adam_beta2"], "here it is `learner.betas`: both in one list"),
    (&["adam_epsilon"], "here it is `learner.epsilon`"),
    (&["grad_clip", "clip_grad", "max_norm"], "here it is `learner.max_grad_norm`"),
    (
        &["beta", "kl_coef", "kl_loss_coef", "init_kl_coef", "kl_beta"],
        "here it is `learner.kl`: the weight of the divergence from the reference",
    ),
    (
        &["epsilon_low", "epsilon_high", "clip_range", "cliprange", "clip_ratio", "clip_ratio_low", "clip_ratio_high"],
        "here it is `learner.clip`: both bounds in one list",
    ),
    (&["scale_rewards", "adv_estimator", "advantage_estimator"], "here it is `learner.advantage`"),
    (&["loss_type"], "here it is `learner.policy_loss`, and what it is divided by is `learner.loss_mean`"),
    (&["loss_agg_mode"], "here it is `learner.loss_mean`"),
    (&["importance_sampling_level"], "here it is `learner.ratio`"),
    (&["eval_steps", "test_freq"], "here it is `evaluation.every`"),
    (&["save_steps", "save_freq"], "here it is `checkpoint.every`"),
    (&["save_total_limit"], "here it is `checkpoint.keep`"),
];

/// An unknown key's error with a better text, where there is one: whoever wrote another trainer's name, or a key of
/// another section, meant that.
pub(super) fn explained(problem: KeyError) -> KeyError {
    let (outer, name) = problem.key.rsplit_once('.').unwrap_or(("", &problem.key));
    let foreign =
        || ELSEWHERE.iter().find(|(names, _)| names.contains(&name)).map(|(_, text)| format!("unknown key; {text}"));
    // Keys that the struct of this table does not have, because they are read elsewhere.
    let read: &[&str] = match outer.trim_end_matches(|digit: char| digit.is_ascii_digit()) {
        "" => &["extends"],
        "environment." | "evaluation.environment." => Environment::KEYS,
        _ => &[],
    };
    let misspelled =
        || nearest(name, read.iter().copied()).map(|meant| format!("unknown key; did you mean `{meant}`?"));
    let sections = sections();
    let moved = || {
        let homes = sections.iter().filter(|(_, keys)| keys.contains(&name));
        let homes: Vec<String> = homes.map(|(home, _)| format!("`{}`", join(home, name))).collect();
        (!homes.is_empty()).then(|| format!("unknown key; did you mean {}?", homes.join(" or ")))
    };
    match problem.unknown.then(|| foreign().or_else(moved).or_else(misspelled)).flatten() {
        Some(text) => KeyError { text, ..problem },
        None => problem,
    }
}

/// Every section and its keys.
fn sections() -> [(&'static str, &'static [&'static str]); 9] {
    [
        ("", keys_of::<Config>()),
        ("model", keys_of::<Model>()),
        ("lora", keys_of::<Lora>()),
        ("batch", keys_of::<Batch>()),
        ("sampling", keys_of::<Sampling>()),
        ("learner", keys_of::<Learner>()),
        ("learner.importance", keys_of::<Importance>()),
        ("evaluation", keys_of::<Evaluation>()),
        ("checkpoint", keys_of::<Checkpoint>()),
    ]
}

/// The keys that a section's derived `Deserialize` asks for.
fn keys_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut keys: &[&str] = &[];
    drop(T::deserialize(Asked(&mut keys)));
    keys
}

/// Holds nothing, and notes which keys it is asked for.
struct Asked<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Asked<'_> {
    type Error = KeyError;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, KeyError> {
        Err(KeyError::custom("there is no value"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        keys: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, KeyError> {
        *self.0 = keys;
        self.deserialize_any(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
