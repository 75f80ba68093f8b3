//! Whether servers sample from the model that is trained: each continues one prompt, and the model here says how likely that was.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use crate::client::Patience;
use crate::config::Config;
use crate::event::{Event, Observer};
use crate::learner::completion_logprobs;
use crate::learner::tree::{Branch, Tree};
use crate::model::Model;
use crate::sampler::remote::{Limits, RemoteSampler};
use crate::sampler::{Request, Settings};
use crate::selection::Source;
use crate::tokenizer::Tokenizer;

/// Tokens that are compared.
const TOKENS: usize = 16;
/// Two computations of one model differ by a hundredth or so, quantized ones by a tenth; two models by one and more.
const SAME_MODEL: f64 = 0.3;

/// A sampler over the servers of a config, each of which was found to serve the model.
///
/// # Errors
/// If a server is not there, does not return what training needs, or has another model.
pub fn servers(
    config: &Config,
    model: &Model,
    tokenizer: &Arc<Tokenizer>,
    sources: &[&Source],
    observer: Observer,
) -> Result<RemoteSampler> {
    let limits = Limits { context: model.architecture.context, vocabulary: model.architecture.vocabulary };
    let variable = |name: &str| std::env::var_os(name);
    let sampler = RemoteSampler::open(config, limits, tokenizer.clone(), Patience::default(), &variable, observer)?;
    let max_tokens = TOKENS.min(config.sampling.max_tokens);
    let settings = Settings { max_tokens, ..Settings::training(config, 0) };
    for source in sources {
        if !source.samples()? {
            continue;
        }
        let task = source.environment.task(source.tasks[0]);
        let (name, prompt_ids) = (format!("task {}", task.id), tokenizer.prompt_ids(&task.prompt)?);
        let request = Request { name, prompt_ids, rollouts: 1 };
        for (address, sampled) in sampler.probe(&request, &settings)? {
            let Request { name, prompt_ids, .. } = request.clone();
            let rows = prompt_ids.len() + sampled.ids.len();
            let tree = Tree { name, prompt_ids, branches: vec![Branch::demonstration(sampled.ids)] };
            let here =
                completion_logprobs(model, None, &[tree], rows, 1.0)?.pop().context("one completion was given")?;
            let differences =
                sampled.logprobs_t.iter().zip(&here).map(|(there, here)| (f64::from(*there) - here).abs());
            let mean = differences.sum::<f64>() / here.len() as f64;
            ensure!(
                mean <= SAME_MODEL,
                "sampling.endpoints: the server at {address} does not sample from {}: the log-probabilities of what it sampled \
                 differ from this model's by {mean:.2} on average; serve that model, and let it report log-probabilities of the \
                 whole distribution",
                config.model.source
            );
            let tokens = here.len();
            observer(Event::Line(&format!(
                "sampling on {address}: log-probabilities differ by {mean:.1e} on average over {tokens} tokens"
            )));
        }
        break;
    }
    Ok(sampler)
}
