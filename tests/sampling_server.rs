//! A server that samples, for the tests: vLLM's protocol in front of the tiny model in this process, so that its token ids and
//! log-probabilities are right, until a test has it say something else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use candle_core::Device;
use candor::model::Model;
use candor::model_files::load_model;
use candor::ops::kernel::Kernel;
use candor::peft;
use candor::policy::Adapter;
use candor::sampler::local::LocalSampler;
use candor::sampler::{Generation, Request, Sampler, Settings};
use candor::tokenizer::Tokenizer;
use candor_environments::Finish;
use serde_json::{Value, json};

use crate::judge_server::{Answer, Asked, Server, refuses, says};
use crate::toy;

/// The name of the base model there.
pub const MODEL: &str = "tiny";

/// What samples behind a server.
pub struct Tiny {
    pub model: Arc<Model>,
    pub tokenizer: Arc<Tokenizer>,
    adapters: Mutex<BTreeMap<String, Arc<Adapter>>>,
    /// Names in the order in which they were loaded (+) and unloaded (−).
    pub log: Mutex<Vec<String>>,
    /// Whether it behaves as SGLang.
    pub sglang: AtomicBool,
}

impl Tiny {
    pub fn new(kernel: Kernel) -> Arc<Self> {
        let (model, tokenizer) = load_model(toy::model().to_str().unwrap(), kernel, &|_| {}).unwrap();
        Arc::new(Self {
            model,
            tokenizer,
            adapters: Mutex::default(),
            log: Mutex::default(),
            sglang: AtomicBool::new(false),
        })
    }

    /// As a server that was started anew.
    pub fn forget(&self) {
        self.adapters.lock().unwrap().clear();
    }

    /// What an honest server answers.
    pub fn answer(&self, asked: &Asked) -> Answer {
        let name = || asked.body["lora_name"].as_str().unwrap().to_string();
        let mut adapters = self.adapters.lock().unwrap();
        let sglang = self.sglang.load(Ordering::SeqCst);
        let path = match asked.path.strip_prefix("/v1") {
            // SGLang has them beside the protocol, not in it.
            within if asked.path.contains("lora") && within.is_none() != sglang => return refuses(404, &asked.path),
            Some(path) => path,
            None => asked.path.as_str(),
        };
        match path {
            "/models" => {
                let names = std::iter::once(MODEL.to_string()).chain(adapters.keys().cloned());
                let owner = if sglang { "sglang" } else { "vllm" };
                answers(&json!({"data": names.map(|id| json!({"id": id, "owned_by": owner})).collect::<Vec<_>>()}))
            }
            "/load_lora_adapter" if adapters.contains_key(&name()) => refuses(400, "has already been loaded"),
            "/load_lora_adapter" => {
                let folder = PathBuf::from(asked.body["lora_path"].as_str().unwrap());
                let lora = peft::described(&folder).unwrap();
                let adapter = peft::load(&folder, &self.model.architecture, &lora, &Device::Cpu).unwrap();
                adapters.insert(name(), Arc::new(adapter));
                self.log.lock().unwrap().push(format!("+{}", name()));
                refuses(200, "Success")
            }
            "/unload_lora_adapter" => {
                self.log.lock().unwrap().push(format!("-{}", name()));
                if adapters.remove(&name()).is_some() { refuses(200, "Success") } else { refuses(404, "not loaded") }
            }
            "/completions" => {
                let model = asked.body["model"].as_str().unwrap();
                let model = if sglang { model.strip_prefix("tiny:").unwrap_or(model) } else { model };
                let adapter = adapters.get(model).cloned();
                drop(adapters);
                match adapter.is_some() || model == MODEL {
                    true => answers(&self.complete(&asked.body, adapter)),
                    false => refuses(404, &format!("The model `{model}` does not exist.")),
                }
            }
            other => refuses(404, other),
        }
    }

    fn complete(&self, body: &Value, adapter: Option<Arc<Adapter>>) -> Value {
        // What is not said is the server's to decide, and would bias the ratio.
        for (key, value) in [("top_p", 1.0), ("top_k", -1.0), ("min_p", 0.0), ("repetition_penalty", 1.0)] {
            assert_eq!(body[key].as_f64(), Some(value), "{key}");
        }
        assert_eq!((&body["return_token_ids"], &body["stream"], &body["n"]), (&true.into(), &false.into(), &1.into()));
        assert_eq!(body["stop_token_ids"], json!(self.tokenizer.end_tokens()));
        let ids = |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let stop = body["stop"].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_string()).collect();
        let settings = Settings {
            max_tokens: body["max_tokens"].as_u64().unwrap() as usize,
            temperature: body["temperature"].as_f64().unwrap(),
            stop,
            seed: body["seed"].as_u64().unwrap(),
            step: 0,
        };
        let request = Request { name: "asked".into(), prompt_ids: ids(&body["prompt"]), rollouts: 1 };
        let mut sampler = LocalSampler::new(self.model.clone(), self.tokenizer.clone());
        let mut one = None;
        let mut keep = |generation: Generation| {
            one = Some(generation);
            Ok(())
        };
        sampler.sample(std::slice::from_ref(&request), &adapter, &settings, &mut keep).unwrap();
        let generation = one.unwrap();
        let text = generation.completion(&self.tokenizer, &settings).text;
        let finish = if generation.finish == Finish::Stop { "stop" } else { "length" };
        let choice = json!({
            "index": 0,
            "text": text,
            "finish_reason": finish,
            "token_ids": generation.ids,
            "prompt_token_ids": request.prompt_ids,
            "logprobs": {"token_logprobs": generation.untempered_t},
        });
        json!({"choices": [choice], "usage": {}})
    }
}

/// An answer of JSON.
pub fn answers(body: &Value) -> Answer {
    Answer { body: body.to_string().into_bytes(), ..says("") }
}

/// The honest answer to a request for a completion, with its choice changed.
pub fn changed(tiny: &Tiny, asked: &Asked, change: impl Fn(&mut Value)) -> Answer {
    let honest = tiny.answer(asked);
    let mut body: Value = serde_json::from_slice(&honest.body).unwrap();
    change(&mut body["choices"][0]);
    answers(&body)
}

/// A server that is honest but where `odd` gives another answer; that is asked of completions only, with their number from 0.
pub fn server(tiny: &Arc<Tiny>, odd: impl Fn(usize, &Asked) -> Option<Answer> + Send + Sync + 'static) -> Server {
    let (tiny, count) = (tiny.clone(), Mutex::new(0));
    Server::new(move |_, asked| {
        if asked.path != "/v1/completions" {
            return tiny.answer(asked);
        }
        let number = {
            let mut count = count.lock().unwrap();
            *count += 1;
            *count - 1
        };
        odd(number, asked).unwrap_or_else(|| tiny.answer(asked))
    })
}

pub fn honest(tiny: &Arc<Tiny>) -> Server {
    server(tiny, |_, _| None)
}

/// The keys of a config that has these servers sample.
pub fn endpoints(servers: &[&Server], folder: &Path, more: &str) -> String {
    let endpoint = |server: &&Server| {
        let (address, folder) = (&server.address, folder.display());
        format!("{{base_url = \"{address}\", model = \"{MODEL}\", adapter_dir = \"{folder}\"{more}}}")
    };
    let all: Vec<String> = servers.iter().map(endpoint).collect();
    format!("sampling.kind = \"openai\"\nsampling.endpoints = [{}]\n", all.join(", "))
}

/// One that is never there.
pub fn gone() -> Server {
    let server = Server::new(|_, _| Answer { cut: Some(0), delay: Duration::ZERO, ..says("") });
    Server { address: "http://127.0.0.1:9/v1".into(), ..server }
}
