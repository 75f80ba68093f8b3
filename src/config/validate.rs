//! What the values of a config may be. Each problem names the key and says what to do.

use std::collections::BTreeSet;
use std::ops::Bound::{Excluded, Included, Unbounded};
use std::ops::{Bound, RangeBounds};

use candor_environments::KeyError;

use super::{Config, Dtype, Endpoint, Environment, Learner, Reference, SamplerKind, Sampling};
use crate::client::{MOST_IN_FLIGHT, NO_ADDRESS};
use crate::objective::{ImportanceLevel, PolicyLoss, Ratio};
use crate::source::web_address;

fn problem<T>(key: &str, text: impl Into<String>) -> Result<T, KeyError> {
    Err(KeyError::new(key, text))
}

/// More of anything than this is a slip of the keyboard; it also keeps products of two counts inside 64 bits.
const MOST: u64 = 1 << 30;

/// Seconds: nobody waits longer for one completion.
const DAY: u64 = 24 * 3600;

/// More steps ahead than anybody has trained with.
const MOST_AHEAD: usize = 64;

/// More completions of one step than anybody could wait for.
const MOST_ROLLOUTS: usize = 1 << 20;

impl Config {
    /// The first problem of a config whose keys and types are right.
    pub(super) fn validate(&self) -> Result<(), KeyError> {
        check_name(&self.name)?;
        self.check_counts()?;
        self.check_numbers()?;
        self.check_environments()?;
        self.check_lists()?;
        self.check_objective()?;
        self.check_sampler()?;
        self.check_offered()
    }

    fn check_counts(&self) -> Result<(), KeyError> {
        let counts = [
            ("steps", self.steps, 1),
            ("epochs", self.epochs.unwrap_or(1), 1),
            ("lora.rank", self.lora.rank as u64, 1),
            ("batch.prompts", self.batch.prompts as u64, 1),
            ("batch.group", self.batch.group as u64, 1),
            ("batch.micro_tokens", self.batch.micro_tokens as u64, 1),
            ("sampling.max_tokens", self.sampling.max_tokens as u64, 1),
            ("sampling.samplers", self.sampling.samplers as u64, 1),
            ("silence_seconds", self.silence_seconds, 1),
            ("learner.warmup_steps", self.learner.warmup_steps, 0),
            ("evaluation.every", self.evaluation.every, 0),
            ("evaluation.tasks", self.evaluation.tasks as u64, 0),
            ("evaluation.max_tokens", self.evaluation.max_tokens as u64, 1),
            ("checkpoint.every", self.checkpoint.every, 0),
            ("checkpoint.keep", self.checkpoint.keep as u64, 1),
        ];
        if self.sampling.async_level > MOST_AHEAD {
            let level = self.sampling.async_level;
            return problem(
                "sampling.async_level",
                format!(
                    "{level} versions behind is more than any correction makes good; at most {MOST_AHEAD}, better 1 or 2"
                ),
            );
        }
        match counts.into_iter().find(|(_, value, least)| !(*least..=MOST).contains(value)) {
            Some((key, value, least)) => problem(key, format!("{value} is not between {least} and {MOST}")),
            None if self.batch.prompts * self.batch.group > MOST_ROLLOUTS => {
                let (prompts, group) = (self.batch.prompts, self.batch.group);
                problem(
                    "batch.group",
                    format!(
                        "{prompts} prompts of {group} rollouts are more than {MOST_ROLLOUTS} a step; lower one of them"
                    ),
                )
            }
            None if self.batch.micro_tokens <= self.sampling.max_tokens => {
                let (micro, longest) = (self.batch.micro_tokens, self.sampling.max_tokens);
                problem(
                    "batch.micro_tokens",
                    format!("{micro} cannot hold a prompt and sampling.max_tokens = {longest} more; raise it"),
                )
            }
            None => Ok(()),
        }
    }

    fn check_numbers(&self) -> Result<(), KeyError> {
        let learner = &self.learner;
        let positive = (Excluded(0.0), Unbounded);
        let not_negative = (Included(0.0), Unbounded);
        let decay = (Included(0.0), Excluded(1.0));
        let numbers = [
            ("lora.alpha", self.lora.alpha, positive),
            ("lora.dropout", self.lora.dropout, decay),
            ("sampling.temperature", self.sampling.temperature, positive),
            ("evaluation.temperature", self.evaluation.temperature, not_negative),
            ("learner.learning_rate", learner.learning_rate, positive),
            ("learner.weight_decay", learner.weight_decay, not_negative),
            ("learner.betas", learner.betas[0], decay),
            ("learner.betas", learner.betas[1], decay),
            // Elsewhere a key of this name is the range of clipping, 0.2 or so.
            ("learner.epsilon", learner.epsilon, (Excluded(0.0), Included(0.01))),
            ("learner.max_grad_norm", learner.max_grad_norm, positive),
            ("learner.clip", learner.clip[0], (Included(0.0), Included(1.0))),
            ("learner.clip", learner.clip[1], not_negative),
            ("learner.importance.max", learner.importance.max, positive),
            ("learner.kl", learner.kl, not_negative),
        ];
        // Below the clip's own upper bound, delta would cut what clipping keeps.
        let delta = learner.delta.map(|delta| ("learner.delta", delta, (Excluded(1.0 + learner.clip[1]), Unbounded)));
        numbers.into_iter().chain(delta).try_for_each(|(key, value, range)| check_number(key, value, range))
    }

    fn check_environments(&self) -> Result<(), KeyError> {
        if self.environments.is_empty() {
            return problem("environment", "nothing to train on; add an [[environment]] with a name");
        }
        for (index, Environment { name, weight, .. }) in self.environments.iter().enumerate() {
            check_number(&format!("environment.{index}.weight"), *weight, (Excluded(0.0), Unbounded))?;
            if name.is_empty() {
                return problem(&format!("environment.{index}.name"), "is empty; name an environment");
            }
        }
        for (index, Environment { name, weight, .. }) in self.evaluation.environments.iter().enumerate() {
            if name.is_empty() {
                return problem(&format!("evaluation.environment.{index}.name"), "is empty; name an environment");
            }
            if *weight != 1.0 {
                let key = format!("evaluation.environment.{index}.weight");
                return problem(
                    &key,
                    "has no effect: every environment is evaluated on evaluation.tasks tasks; remove it",
                );
            }
        }
        Ok(())
    }

    fn check_lists(&self) -> Result<(), KeyError> {
        if self.model.source.trim().is_empty() {
            return problem("model.source", "is empty; name a folder, a .gguf file, or an hf: or pip: source");
        }
        if self.lora.targets.is_empty() {
            return problem(
                "lora.targets",
                "is empty, so there would be nothing to train; name a projection such as \"q_proj\"",
            );
        }
        if self.lora.targets.iter().collect::<BTreeSet<_>>().len() < self.lora.targets.len() {
            return problem("lora.targets", "names a projection twice; remove one");
        }
        if self.sampling.stop.iter().any(String::is_empty) {
            return problem(
                "sampling.stop",
                "holds an empty string, which would end every completion at once; remove it",
            );
        }
        Ok(())
    }

    /// Keys of the objective that would have no effect, or nothing to work on.
    fn check_objective(&self) -> Result<(), KeyError> {
        let learner = &self.learner;
        if learner.delta.is_some() && learner.policy_loss != PolicyLoss::Clip {
            return problem("learner.delta", "bounds the ratio of policy_loss = \"clip\" only; remove it");
        }
        let weighted = learner.importance.level != ImportanceLevel::None;
        if learner.policy_loss == PolicyLoss::Prime && (weighted || learner.ratio != Ratio::Token) {
            return problem(
                "learner.policy_loss",
                "\"prime\" has a ratio of its own; it goes with learner.ratio = \"token\" and learner.importance.level = \"none\"",
            );
        }
        if weighted && learner.delta.is_some() {
            return problem(
                "learner.delta",
                "has no effect where learner.importance weighs: the ratio is 1; remove one of them",
            );
        }
        if learner.kl_estimator.is_some() && learner.kl == 0.0 {
            return problem("learner.kl_estimator", "has no effect with learner.kl = 0; set that, or remove this");
        }
        // The default is left alone: a run of few steps did not ask for it.
        let (warmup, steps) = (learner.warmup_steps, self.steps);
        if self.epochs.is_none() && warmup >= steps && warmup > Learner::default().warmup_steps {
            return problem(
                "learner.warmup_steps",
                format!("{warmup} steps of warm-up leave none of steps = {steps} for the peak; lower it"),
            );
        }
        if learner.reference == Some(Reference::Start) && self.lora.start_from.is_none() {
            return problem(
                "learner.reference",
                "\"start\" is the adapter of lora.start_from, which is not set; set it, or use \"base\"",
            );
        }
        Ok(())
    }

    /// Who samples, and what servers as samplers ask of the rest.
    fn check_sampler(&self) -> Result<(), KeyError> {
        let Sampling { kind, endpoints, temperature, .. } = &self.sampling;
        match (kind, endpoints.is_empty()) {
            (SamplerKind::Local, true) => return Ok(()),
            (SamplerKind::Local, false) => {
                return problem(
                    "sampling.endpoints",
                    "has no effect with kind = \"local\"; use \"openai\", or remove it",
                );
            }
            (SamplerKind::Openai, true) => {
                return problem("sampling.kind", "\"openai\" needs servers; add a [[sampling.endpoints]]");
            }
            (SamplerKind::Openai, false) if self.sampling.samplers > 1 => {
                return problem("sampling.samplers", "has no effect with kind = \"openai\"; remove it");
            }
            (SamplerKind::Openai, false) => {}
        }
        // Whatever they sample at. Of training, no other temperature would do.
        let at_one = "servers are asked for log-probabilities at temperature 1";
        if *temperature != 1.0 {
            return problem(
                "sampling.temperature",
                format!("{temperature}: {at_one}, so these are not the sampler's; use 1.0"),
            );
        }
        if ![0.0, 1.0].contains(&self.evaluation.temperature) {
            let temperature = self.evaluation.temperature;
            return problem("evaluation.temperature", format!("{temperature}: {at_one}; use 0.0 or 1.0"));
        }
        for (index, endpoint) in endpoints.iter().enumerate() {
            let twice = endpoints[..index].iter().any(|other| other.base_url == endpoint.base_url);
            let checked = match twice {
                true => problem("base_url", "is named twice; raise the concurrency of one instead"),
                false => endpoint.check(),
            };
            checked.map_err(|problem| problem.within(&format!("sampling.endpoints.{index}")))?;
        }
        match endpoints.iter().map(|endpoint| endpoint.concurrency).sum() {
            0..=MOST_IN_FLIGHT => Ok(()),
            many => problem(
                "sampling.endpoints",
                format!("{many} requests at once are more than {MOST_IN_FLIGHT}; lower a concurrency"),
            ),
        }
    }

    /// Keys of the contract whose code comes with a later version: refused, because ignoring them would be worse.
    fn check_offered(&self) -> Result<(), KeyError> {
        if self.model.dtype == Dtype::Int8 {
            return problem(
                "model.dtype",
                "int8 is for `candor chat` and `candor sample`: it rounds the weights; use \"auto\", and model.quantization to \
                 save memory",
            );
        }
        Ok(())
    }
}

impl Endpoint {
    fn check(&self) -> Result<(), KeyError> {
        let Self { base_url, model, concurrency, adapter_dir, timeout_seconds, .. } = self;
        if web_address(base_url).is_none() {
            return problem("base_url", NO_ADDRESS);
        }
        if let Some((key, _)) =
            [("model", model), ("adapter_dir", adapter_dir)].iter().find(|(_, text)| text.trim().is_empty())
        {
            return problem(key, "is empty; name one");
        }
        let counts =
            [("concurrency", *concurrency as u64, MOST_IN_FLIGHT as u64), ("timeout_seconds", *timeout_seconds, DAY)];
        match counts.into_iter().find(|(_, value, most)| !(1..=*most).contains(value)) {
            Some((key, value, most)) => problem(key, format!("{value} is not between 1 and {most}")),
            None => Ok(()),
        }
    }
}

fn check_name(name: &str) -> Result<(), KeyError> {
    let plain = |character: char| character.is_alphanumeric() || "._-".contains(character);
    if name.starts_with(char::is_alphanumeric) && name.chars().all(plain) && name.len() <= 100 {
        return Ok(());
    }
    problem(
        "name",
        format!(
            "{name:?} must be a plain folder name: letters, digits, '.', '_' and '-', at most 100, a letter or digit \
             first"
        ),
    )
}

fn check_number(key: &str, value: f64, range: (Bound<f64>, Bound<f64>)) -> Result<(), KeyError> {
    if value.is_finite() && range.contains(&value) {
        return Ok(());
    }
    let lower = match range.0 {
        Included(bound) => format!("at least {bound}"),
        Excluded(bound) => format!("more than {bound}"),
        Unbounded => "a number".into(),
    };
    let upper = match range.1 {
        Included(bound) => format!(" and at most {bound}"),
        Excluded(bound) => format!(" and less than {bound}"),
        Unbounded => String::new(),
    };
    problem(key, format!("{value} must be finite, {lower}{upper}"))
}
