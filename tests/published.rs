//! Published models through the product's own loader against transformers: logits, greedy continuations, a PEFT adapter.

use std::sync::Arc;

use candor::inputs::load_model;
use candor::learner::completion_logprobs;
use candor::learner::tree::{Branch, Tree};
use candor::model::Model;
use candor::sampler::local::LocalSampler;
use candor::sampler::{Request, Sampler, Settings};
use candor::tokenizer::Tokenizer;
use serde_json::Value;

use crate::check;
use crate::model::{adapter, logits};

fn ids(value: &Value) -> Vec<u32> {
    check::floats(value).into_iter().map(|id| id as u32).collect()
}

fn rows(golden: &Value) -> Vec<Value> {
    golden["rows"].as_array().unwrap().clone()
}

/// The logits after the last token of a prompt.
fn last_logits(model: &Model, prompt: Vec<u32>) -> Vec<f64> {
    let all = logits(model, &[prompt], None);
    all[all.len() - model.architecture.vocabulary..].to_vec()
}

/// Greedy continuations of all prompts at once, compared with the golden ones as far as those were sure.
fn assert_continues(model: &Arc<Model>, tokenizer: &Arc<Tokenizer>, rows: &[Value], margins: &str, tolerance: f64) {
    let request =
        |row: &Value| Request { name: row["prompt"].to_string(), prompt_ids: ids(&row["prompt_ids"]), rollouts: 1 };
    let requests: Vec<Request> = rows.iter().map(request).collect();
    let max_tokens = rows.iter().map(|row| ids(&row["ids"]).len()).max().unwrap();
    let settings = Settings { max_tokens, temperature: 0.0, stop: Vec::new(), seed: 0, step: 0 };
    let mut sampler = LocalSampler::new(model.clone(), tokenizer.clone());
    let mut compared = 0;
    sampler
        .sample(&requests, None, &settings, &mut |generation| {
            let row = &rows[generation.group];
            let (want, margins) = (ids(&row["ids"]), check::floats(&row[margins]));
            let sure = margins.iter().position(|margin| *margin <= tolerance).unwrap_or(want.len());
            assert_eq!(generation.ids[..sure], want[..sure], "{}", row["prompt"]);
            let got = generation.behavior_t.iter().map(|&logprob| f64::from(logprob));
            for (got, want) in got.zip(check::floats(&row["logprobs"])).take(sure) {
                check::close(&row["prompt"].to_string(), got - want, 0.0, tolerance);
            }
            compared += sure;
            Ok(())
        })
        .unwrap();
    assert!(compared > 20 * rows.len() / 2, "only {compared} tokens could be compared");
}

#[test]
fn golden_smollm2_logits_continuations_and_adapter() {
    let (Some(file), Some(folder)) = (check::smollm2(), check::golden("smollm2/greedy.json")) else { return };
    let folder = folder.parent().unwrap();
    let (model, tokenizer) = load_model(file.to_str().unwrap(), check::f32_kernel(), &|_| {}).unwrap();
    for row in rows(&check::json(&folder.join("top20.json"))) {
        let last = last_logits(&model, tokenizer.encode(row["prompt"].as_str().unwrap()).unwrap());
        let got: Vec<f64> = ids(&row["top20_ids"]).into_iter().map(|id| last[id as usize]).collect();
        check::all_close("top 20", &got, &check::floats(&row["top20_logits"]), 1e-4);
        let mean = last.iter().sum::<f64>() / last.len() as f64;
        check::close("mean logit", mean, row["mean_logit"].as_f64().unwrap(), 1e-4);
    }
    let greedy = rows(&check::json(&folder.join("greedy.json")));
    assert_continues(&model, &tokenizer, &greedy, "top1_top2_logit_margin", 1e-3);
    let Some(banana) = check::golden("smollm2/adapter_banana") else { return };
    let (adapter, _) = adapter(&model, &banana);
    let golden = check::json(&banana.join("golden.json"));
    let completion = ids(&golden["completion_ids"]);
    let tree = Tree {
        name: "banana".into(),
        prompt_ids: ids(&golden["prompt_ids"]),
        branches: vec![Branch::demonstration(completion)],
    };
    let got = completion_logprobs(&model, Some(&adapter), &[tree], 4096, 1.0).unwrap();
    check::all_close("banana", &got[0], &check::floats(&golden["completion_logps_with_adapter"]), 1e-4);
}

/// The golden numbers come from weights that were rounded to f16 after dequantization.
#[test]
fn golden_gemma3_270m_logits_and_continuations() {
    const TOLERANCE: f64 = 2e-2;
    let (Some(file), Some(golden)) = (check::gemma3_270m(), check::golden("gemma3_270m/greedy.json")) else { return };
    let (model, tokenizer) = load_model(file.to_str().unwrap(), check::f32_kernel(), &|_| {}).unwrap();
    let rows = rows(&check::json(&golden));
    for row in &rows {
        let prompt = ids(&row["prompt_ids"]);
        assert_eq!(tokenizer.encode(row["prompt"].as_str().unwrap()).unwrap(), prompt[1..], "after the BOS token");
        let last = last_logits(&model, prompt);
        let off = |pair: &Value| last[pair[0].as_u64().unwrap() as usize] - pair[1].as_f64().unwrap();
        let off: Vec<f64> = row["top20"].as_array().unwrap().iter().map(off).collect();
        check::all_close(&format!("top 20 after {}", row["prompt"]), &off, &vec![0.0; off.len()], TOLERANCE);
    }
    assert_continues(&model, &tokenizer, &rows, "margins", TOLERANCE);
}
