//! One server that samples: whether it is there, which adapters it has, and one completion of it.

use std::collections::BTreeSet;
use std::path::{self, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use candor_environments::KeyError;
use serde::Deserialize;
use serde_json::json;
use tracing::debug;

use super::completions::{Asked, Sampled};
use crate::client::{CallError, Client, Variable, key_in};
use crate::config;

/// A server.
pub struct Endpoint {
    /// Its address, which it is called by in messages.
    pub address: String,
    /// Requests in flight at once.
    pub concurrency: usize,
    /// How long a request may take.
    pub timeout: Duration,
    /// Where it finds adapters.
    pub folder: PathBuf,
    /// The base model's name there.
    model: String,
    client: Client,
    /// The adapters that it has loaded, by name; the names of a run's versions sort by version.
    loaded: Mutex<BTreeSet<String>>,
    /// Whether it is SGLang, as it says of itself in its list of models.
    is_sglang: AtomicBool,
}

/// Where servers differ: what is called to load and unload an adapter, and what stands before an adapter's name as a model.
struct Dialect {
    load: &'static str,
    unload: &'static str,
    names_base: bool,
}

const VLLM: Dialect = Dialect { load: "load_lora_adapter", unload: "unload_lora_adapter", names_base: false };
const SGLANG: Dialect = Dialect { load: "/load_lora_adapter", unload: "/unload_lora_adapter", names_base: true };

/// Lists of models and words about adapters are short.
const LONGEST_ANSWER: u64 = 1 << 22;

#[derive(Deserialize)]
struct Models {
    data: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    id: String,
    owned_by: Option<String>,
}

impl Endpoint {
    /// For a checked table; `variable` holds keys.
    ///
    /// # Errors
    /// If the key is not where the table says.
    pub fn new(table: &config::Endpoint, variable: Variable) -> Result<Self, KeyError> {
        let config::Endpoint { base_url, model, concurrency, adapter_dir, key_variable, timeout_seconds } = table;
        let key = key_variable.as_deref().map(|name| key_in(name, variable)).transpose()?;
        let timeout = Duration::from_secs(*timeout_seconds);
        Ok(Self {
            client: Client::new(base_url, key, timeout, *concurrency),
            address: base_url.clone(),
            concurrency: *concurrency,
            timeout,
            // The server's working folder is another one.
            folder: path::absolute(adapter_dir).unwrap_or_else(|_| adapter_dir.into()),
            model: model.clone(),
            loaded: Mutex::default(),
            is_sglang: AtomicBool::new(false),
        })
    }

    fn dialect(&self) -> &'static Dialect {
        if self.is_sglang.load(Ordering::Relaxed) { &SGLANG } else { &VLLM }
    }

    fn loaded(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the server is there and has the base model. What it says it has loaded is what it has: it may have been
    /// started anew.
    ///
    /// # Errors
    /// If it is not, or does not answer.
    pub fn check(&self) -> Result<(), CallError> {
        let models = self.models()?;
        self.loaded().retain(|name| models.contains(name));
        match models.contains(&self.model) {
            true => Ok(()),
            false => {
                let names = models.iter().take(8).cloned().collect::<Vec<_>>().join(", ");
                let what = format!("it has no model {:?}; it has: {names}", self.model);
                Err(CallError::Lasting { status: 404, what })
            }
        }
    }

    fn models(&self) -> Result<BTreeSet<String>, CallError> {
        let bytes = self.client.get("models", LONGEST_ANSWER)?;
        let models: Models = serde_json::from_slice(&bytes).map_err(|error| {
            CallError::passing(format!("/models is no list of models: {error}: {}", self.client.shown(&bytes)))
        })?;
        let sglang = |model: &Named| model.id == self.model && model.owned_by.as_deref() == Some("sglang");
        self.is_sglang.store(models.data.iter().any(sglang), Ordering::Relaxed);
        Ok(models.data.into_iter().map(|model| model.id).collect())
    }

    /// One completion by the base model, or by the adapter of this name, which is loaded first if it is not there.
    ///
    /// # Errors
    /// If there is no reply that can be believed. A server that knows nothing of the model any more is not given up: it may
    /// have been started anew.
    pub fn complete(
        &self,
        asked: &Asked,
        rollout: (usize, usize),
        adapter: Option<&str>,
    ) -> Result<Sampled, CallError> {
        adapter.map_or(Ok(()), |name| self.load(name))?;
        let model = match adapter {
            None => self.model.clone(),
            Some(name) if self.dialect().names_base => format!("{}:{name}", self.model),
            Some(name) => name.to_string(),
        };
        let body = asked.body(&model, rollout);
        let bytes = self.client.post("completions", &body, asked.longest_reply()).map_err(|error| match error {
            CallError::Lasting { status: 404, what } => CallError::passing(what),
            other => other,
        })?;
        asked.read(&bytes).map_err(|error| CallError::passing(format!("{error:#}")))
    }

    /// Has an adapter loaded. Whoever else needs it waits meanwhile.
    fn load(&self, name: &str) -> Result<(), CallError> {
        let mut loaded = self.loaded();
        if loaded.contains(name) {
            return Ok(());
        }
        let body = json!({"lora_name": name, "lora_path": self.folder.join(name)});
        match self.client.post(self.dialect().load, &body, LONGEST_ANSWER) {
            // What was asked before may have been done, though the answer was lost.
            Err(CallError::Lasting { what, status }) if !self.models()?.contains(name) => {
                let what = format!(
                    "{what} (loading the adapter {name}; vLLM needs --enable-lora, --max-lora-rank and \
                     VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and must be able to read {})",
                    self.folder.display()
                );
                return Err(CallError::Lasting { status, what });
            }
            Ok(_) | Err(CallError::Lasting { .. }) => {}
            Err(other) => return Err(other),
        }
        loaded.insert(name.to_string());
        Ok(())
    }

    /// Whether it has an adapter before the one of this name; not known while one is being loaded.
    pub fn has_before(&self, oldest: &str) -> bool {
        self.loaded.try_lock().is_ok_and(|loaded| loaded.first().is_some_and(|name| name.as_str() < oldest))
    }

    /// Has the adapters before the one of this name unloaded, or all. Where that fails the server keeps what nobody asks for.
    pub fn unload_before(&self, oldest: Option<&str>) {
        let mut loaded = self.loaded();
        let kept = oldest.map(|oldest| loaded.split_off(oldest)).unwrap_or_default();
        let old = std::mem::replace(&mut *loaded, kept);
        drop(loaded);
        for name in old {
            let body = json!({"lora_name": name});
            if let Err(error) = self.client.post(self.dialect().unload, &body, LONGEST_ANSWER) {
                debug!("{}: {name} was not unloaded: {error}", self.address);
            }
        }
    }
}
