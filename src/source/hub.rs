//! A hub, or a server that speaks its language: where it and its cache are, and who asks.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use hf_hub::Cache;

use super::address::{Address, Kind};
use super::repository::Repository;
use super::transfer::Token;

/// A hub, and the cache of what came from it.
#[derive(Clone, Debug)]
pub struct Hub {
    /// The hub's address.
    pub endpoint: String,
    /// Where repositories are kept.
    pub cache: Cache,
    /// Who asks; only the endpoint is told.
    pub token: Option<Token>,
    /// Whether nothing may be asked.
    pub offline: bool,
    /// How long a request may stand still before it is given up.
    pub patience: Duration,
}

impl Hub {
    /// The hub and the cache that environment variables name: `HF_ENDPOINT`; `HF_HUB_CACHE`, else `hub` in `HF_HOME`,
    /// which is `huggingface` in `XDG_CACHE_HOME` or `HOME/.cache`; `HF_TOKEN`, else `HUGGING_FACE_HUB_TOKEN`, else the
    /// file `token` in `HF_HOME`; `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// If there is no place for the cache, or the token cannot be read.
    pub fn located_by(variable: impl Fn(&str) -> Option<OsString>) -> Result<Hub> {
        // hf-hub's own reading of them knows only `HF_HOME`, panics without a home, and takes an unreadable token for
        // none.
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| match set(name).map(OsString::into_string) {
            Some(Err(_)) => Err(anyhow!("{name} is not text")),
            value => Ok(value.and_then(Result::ok)),
        };
        let caches = set("XDG_CACHE_HOME").map(PathBuf::from);
        let caches = caches.or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".cache")));
        let home = set("HF_HOME").map(PathBuf::from).or_else(|| caches.map(|caches| caches.join("huggingface")));
        let home = home.map(|home| Cache::new(home.join("hub")));
        let cache = set("HF_HUB_CACHE").map(|folder| Cache::new(folder.into())).or_else(|| home.clone());
        let mut token = text("HF_TOKEN")?.or(text("HUGGING_FACE_HUB_TOKEN")?);
        if let (None, Some(home)) = (&token, &home) {
            let file = home.token_path();
            token = match std::fs::read_to_string(&file) {
                Err(error) if error.kind() == ErrorKind::NotFound => None,
                read => Some(read.with_context(|| format!("cannot read the hub's token in {}", file.display()))?),
            };
        }
        let token = token.filter(|token| !token.trim().is_empty());
        let offline = text("HF_HUB_OFFLINE")?.map(|value| value.to_uppercase());
        Ok(Hub {
            endpoint: text("HF_ENDPOINT")?.unwrap_or_else(|| "https://huggingface.co".into()),
            cache: cache.context("no place for downloads: set HF_HOME to a folder")?,
            token: token
                .map(|token| Token::new(&token))
                .transpose()
                .context("the hub's token (HF_TOKEN or the token file)")?,
            offline: offline.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.as_str())),
            patience: Duration::from_secs(120),
        })
    }

    /// The local path of a repository's files: a folder, or the one file that was named or that the model is.
    ///
    /// # Errors
    /// As [`resolve`](super::resolve); a failure leaves nothing in the cache that is not whole.
    pub fn fetch(&self, address: &Address, kind: Kind, progress: &dyn Fn(&str)) -> Result<PathBuf> {
        let repository = Repository::new(self, address, kind, progress);
        let fetched =
            if self.offline { repository.cached().context("HF_HUB_OFFLINE is set") } else { repository.fetch() };
        fetched.map_err(|error| {
            // In one message, so that what to do instead comes last.
            let (kind, also) = (kind.plural(), "a folder or file that holds the same, or pip:name==version");
            anyhow!("cannot fetch {address}, sought among the {kind}: {error:#}; what also works: {also}")
        })
    }
}
