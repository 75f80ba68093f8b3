//! Samplers side by side: the same completions as one sampler's, and one error for all.

use anyhow::{Result, bail};
use candor::policy::Adapter;
use candor::sampler::local::LocalSampler;
use candor::sampler::parallel::ParallelSampler;
use candor::sampler::{Generation, Request, Sampler};
use serde_json::json;
use std::sync::Arc;
use tempfile::tempdir;

use crate::check;
use crate::sampler::{all, request, settings};
use crate::sampling_server::Tiny;
use crate::toy::{config, generations, run};

/// Catches random numbers or prompts of another group, a group that is sampled twice or by nobody, and rows that depend on
/// which others share their call.
#[test]
fn any_number_of_samplers_gives_the_same_completions() {
    let requests: Vec<Request> = (0..5).map(|number| request(number, 7 + 9 * number, 3)).collect();
    for kernel in check::row_invariant_kernels() {
        let tiny = Tiny::new(kernel);
        let policy: Option<Arc<Adapter>> = None;
        let settings = settings(16, 1.0);
        let mut one = LocalSampler::new(tiny.model.clone(), tiny.tokenizer.clone());
        let want: Vec<Generation> = all(&mut one, &requests, &policy, &settings).unwrap();
        assert_eq!(want.len(), 15);
        for samplers in [1, 2, 3, 8] {
            let mut several = ParallelSampler::new(&tiny.model, &tiny.tokenizer, samplers).unwrap();
            assert_eq!(all(&mut several, &requests, &policy, &settings).unwrap(), want, "{kernel:?}, {samplers}");
            assert_eq!(
                all(&mut several, &requests, &policy, &settings).unwrap(),
                want,
                "{kernel:?}, {samplers}, again"
            );
        }
        let results = [1, 2].map(|samplers| {
            let results = tempdir().unwrap();
            run(results.path(), &config(&format!("model.kernel = {}\nsampling.samplers = {samplers}", json!(kernel))));
            (generations(results.path()), std::fs::read(results.path().join(ADAPTER)).unwrap())
        });
        assert!(results[0] == results[1], "{kernel:?}: a run is the same");
    }
}

const ADAPTER: &str = "toy/checkpoints/step-000004/adapter_model.safetensors";

/// Catches an error that is lost, or hidden behind those of samplers that were stopped because of it.
#[test]
fn the_error_of_one_ends_all() {
    let tiny = Tiny::new(check::f32_kernel());
    let mut samplers = ParallelSampler::new(&tiny.model, &tiny.tokenizer, 2).unwrap();
    let many: Vec<Request> = (0..8).map(|number| request(number, 9, 4)).collect();
    let mut full = |_| -> Result<()> { bail!("the disk is full") };
    let error = samplers.sample(&many, &None, &settings(100, 1.0), &mut full).unwrap_err();
    assert_eq!(error.to_string(), "the disk is full");
    let broken = Request { name: "broken".into(), prompt_ids: vec![100_000], rollouts: 1 };
    let requests: Vec<Request> = std::iter::once(broken).chain(many).collect();
    let error = all(&mut samplers, &requests, &None, &settings(100, 1.0)).unwrap_err();
    assert!(error.to_string().contains("outside the model's vocabulary"), "{error:#}");
}
