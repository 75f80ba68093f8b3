//! Repositories of the Hugging Face hub, or of a server that speaks its language, in a cache laid out as huggingface_hub's,
//! so that what Python fetched is found here and the other way round: `blobs/` by hash, `snapshots/COMMIT/` of links to
//! them, `refs/` from revisions to commits. A blob appears whole and checked, and links only after all of their blobs.

use std::ffi::OsString;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use sha1::Sha1;
use sha2::digest::DynDigest;
use sha2::{Digest, Sha256};

use super::address::{Address, Kind};
use super::partial::Partial;
use super::transfer::{Client, Failure, Token};
use super::{WHAT_WORKS, files_below};

/// A hub, and the cache of what came from it.
#[derive(Clone, Debug)]
pub struct Hub {
    /// The hub's address.
    pub endpoint: String,
    /// Where repositories are kept.
    pub cache: PathBuf,
    /// Who asks; only the endpoint is told.
    pub token: Option<Token>,
    /// Whether nothing may be asked.
    pub offline: bool,
    /// How long a request may stand still before it is given up.
    pub patience: Duration,
}

/// What the hub says of a revision.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
}

/// Larger than the listing of a hundred thousand files.
const LONGEST_LISTING: u64 = 64 << 20;

impl Hub {
    /// The hub and the cache that environment variables name: `HF_ENDPOINT`; `HF_HUB_CACHE`, else `hub` in `HF_HOME`, which
    /// is `huggingface` in `XDG_CACHE_HOME` or `HOME/.cache`; `HF_TOKEN`, else `HUGGING_FACE_HUB_TOKEN`, else the file
    /// `token` in `HF_HOME`; `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// If there is no place for the cache, or the token cannot be read.
    pub fn located_by(variable: impl Fn(&str) -> Option<OsString>) -> Result<Hub> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| match set(name).map(OsString::into_string) {
            Some(Err(_)) => Err(anyhow!("{name} is not text")),
            value => Ok(value.and_then(Result::ok)),
        };
        let caches = set("XDG_CACHE_HOME").map(PathBuf::from);
        let caches = caches.or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".cache")));
        let home = set("HF_HOME").map(PathBuf::from).or_else(|| caches.map(|caches| caches.join("huggingface")));
        let cache = set("HF_HUB_CACHE").map(PathBuf::from).or_else(|| home.as_ref().map(|home| home.join("hub")));
        let mut token = text("HF_TOKEN")?.or(text("HUGGING_FACE_HUB_TOKEN")?);
        if let (None, Some(home)) = (&token, &home) {
            let file = home.join("token");
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
            token: token.map(|token| Token::new(&token)).transpose()?,
            offline: offline.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.as_str())),
            patience: Duration::from_secs(120),
        })
    }

    /// The local path of a repository's files: a folder, or the one file that was named or that the model is.
    ///
    /// # Errors
    /// As [`resolve`](super::resolve); a failure leaves nothing in the cache that is not whole.
    pub fn fetch(&self, address: &Address, kind: Kind, progress: &dyn Fn(&str)) -> Result<PathBuf> {
        let repository =
            Repository { hub: self, address, kind, folder: self.cache.join(folder_name(address, kind)), progress };
        let fetched =
            if self.offline { repository.cached().context("HF_HUB_OFFLINE is set") } else { repository.fetch() };
        fetched.with_context(|| format!("cannot fetch {address}, sought among the {}; {WHAT_WORKS}", kind.plural()))
    }
}

fn folder_name(address: &Address, kind: Kind) -> String {
    format!("{}--{}", kind.plural(), address.id.replace('/', "--"))
}

/// A repository that is being fetched.
struct Repository<'a> {
    hub: &'a Hub,
    address: &'a Address,
    kind: Kind,
    /// Its place in the cache.
    folder: PathBuf,
    progress: &'a dyn Fn(&str),
}

impl Repository<'_> {
    fn fetch(&self) -> Result<PathBuf> {
        let client = Client::new(&self.hub.endpoint, self.hub.token.as_ref(), self.hub.patience)?;
        let listing = match self.list(&client) {
            Err(error) if matches!(error.downcast_ref(), Some(Failure::Unreachable(_))) => {
                let Ok(path) = self.cached() else { return Err(error.context("the cache holds no copy, and")) };
                (self.progress)(&format!("{error:#}; going on with {}", path.display()));
                return Ok(path);
            }
            listing => listing?,
        };
        let files: Vec<_> = listing.siblings.iter().map(|sibling| sibling.rfilename.clone()).collect();
        let wanted = self.address.wanted(self.kind, &files)?;
        (self.progress)(&format!("{} is commit {}", self.address, listing.sha));

        let snapshot = self.folder.join("snapshots").join(&listing.sha);
        let partial = Partial::create(&self.folder, "HF_HUB_CACHE")?;
        let mut links = Vec::new();
        for file in &wanted {
            let listed = listing.siblings.iter().find(|sibling| sibling.rfilename == *file).and_then(|file| file.size);
            let held = snapshot.join(file).metadata();
            if !held.is_ok_and(|held| held.is_file() && listed.is_none_or(|size| size == held.len())) {
                let blob = self.download(&client, &listing.sha, file, listed, &partial);
                links.push((file, blob.with_context(|| file.to_string())?));
            }
        }
        for (file, blob) in links {
            link(&blob, &snapshot, file, &partial).with_context(|| format!("cannot put {file} into the cache"))?;
        }
        self.remember(&listing.sha, &partial).context("cannot note the revision in the cache")?;
        Ok(self.local(&snapshot, &wanted))
    }

    /// What the hub has at the revision.
    fn list(&self, client: &Client) -> Result<Listing> {
        let (kind, id, revision) = (self.kind.plural(), &self.address.id, self.address.revision.replace('/', "%2F"));
        let endpoint = self.hub.endpoint.trim_end_matches('/');
        let reply = client.get(&format!("{endpoint}/api/{kind}/{id}/revision/{revision}?blobs=true"));
        let mut text = Vec::new();
        let mut body = reply.map_err(|failure| self.explained(failure))?.body.take(LONGEST_LISTING);
        body.read_to_end(&mut text).map_err(|error| {
            Failure::Unreachable(format!("the hub's list of files broke off: {}", self.in_words(&error)))
        })?;
        let listing: Listing = serde_json::from_slice(&text).context("the hub's list of files is not one")?;
        ensure!(is_commit(&listing.sha), "the hub says that the revision is {:?}, which is no commit", listing.sha);
        for Sibling { rfilename: name, .. } in &listing.siblings {
            let part = |part: &str| !matches!(part, "" | "." | "..");
            let safe = name.split('/').all(part) && !name.chars().any(|one| one == '\\' || one.is_control());
            ensure!(safe, "the repository names a file {name:?}, which has no place in a folder");
        }
        Ok(listing)
    }

    /// Puts a file's content into the cache, unless it is there already, and returns its name there, its hash.
    fn download(
        &self,
        client: &Client,
        commit: &str,
        file: &str,
        listed: Option<u64>,
        partial: &Partial,
    ) -> Result<String> {
        let prefix = if self.kind == Kind::Data { "datasets/" } else { "" };
        let (endpoint, id) = (self.hub.endpoint.trim_end_matches('/'), &self.address.id);
        let reply = client.get(&format!("{endpoint}/{prefix}{id}/resolve/{commit}/{}", encoded(file)));
        let mut reply = reply.map_err(|failure| self.explained(failure))?;
        let hash = reply.etag.context("the hub gives no hash of it")?;
        let size = reply.size.or(listed).context("the hub does not say how large it is")?;
        let mut hasher = hasher(&hash, size)?;
        let blob = self.folder.join("blobs").join(&hash);
        if blob.metadata().is_ok_and(|held| held.is_file() && held.len() == size) {
            return Ok(hash);
        }
        let whole = partial.folder.join("file");
        self.receive(&mut reply.body, size, &whole, &mut *hasher, file)?;
        let found = hex(&hasher.finalize());
        ensure!(found == hash, "what arrived has the hash {found}, the hub announced {hash}; nothing was kept");
        std::fs::create_dir_all(self.folder.join("blobs")).and_then(|()| std::fs::rename(&whole, &blob))?;
        Ok(hash)
    }

    fn receive(
        &self,
        body: &mut impl Read,
        size: u64,
        path: &Path,
        hasher: &mut dyn DynDigest,
        file: &str,
    ) -> Result<()> {
        let say = |arrived: &str| (self.progress)(&format!("downloading {}/{file}{arrived}", self.address.id));
        let mut target = std::fs::File::create(path)?;
        let (mut arrived, mut buffer, mut said) = (0, vec![0; 1 << 18], Instant::now());
        say("");
        loop {
            let count = body.read(&mut buffer).map_err(|error| {
                anyhow!("the download broke off after {arrived} of {size} bytes: {}", self.in_words(&error))
            })?;
            if count == 0 {
                break;
            }
            arrived += count as u64;
            ensure!(arrived <= size, "more than the {size} bytes that the hub announced arrived; nothing was kept");
            hasher.update(&buffer[..count]);
            target.write_all(&buffer[..count]).context("cannot write into the cache")?;
            if said.elapsed() >= Duration::from_secs(1) {
                said = Instant::now();
                say(&format!(" ({} MB so far)", arrived / 1_000_000));
            }
        }
        ensure!(arrived == size, "{arrived} bytes arrived of the {size} that the hub announced; nothing was kept");
        Ok(())
    }

    /// Why a body ended early.
    fn in_words(&self, error: &std::io::Error) -> String {
        let timed_out = matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock);
        match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(ureq::Error::Timeout(_)) => format!("nothing arrived for {} seconds", self.hub.patience.as_secs_f64()),
            _ if timed_out => format!("nothing arrived for {} seconds", self.hub.patience.as_secs_f64()),
            _ => error.to_string(),
        }
    }

    /// What to do about a refusal.
    fn explained(&self, failure: Failure) -> anyhow::Error {
        let Failure::Refused { status, code } = &failure else { return failure.into() };
        let token = match self.hub.token {
            Some(_) => "the token that was sent (HF_TOKEN or the token file) is not enough",
            None => "set HF_TOKEN to a token that may read it",
        };
        let (id, revision) = (&self.address.id, &self.address.revision);
        let what = match (status, code.as_str()) {
            (_, "GatedRepo") => format!("{id} is gated: accept its licence on its page on the hub; {token}"),
            (_, "RevisionNotFound") => format!("{id} has no revision {revision:?}"),
            (_, "EntryNotFound") => "there is no such file".into(),
            (401 | 404, _) => format!("there is no such repository or revision, or it is private or gated: {token}"),
            (403, _) => format!("it may not be read: accept its licence on its page on the hub; {token}"),
            _ => "that is not understood".into(),
        };
        anyhow!("{failure}: {what}")
    }

    /// What the cache holds of the revision.
    fn cached(&self) -> Result<PathBuf> {
        let (address, snapshots) = (self.address, self.folder.join("snapshots"));
        let note = self.folder.join("refs").join(&address.revision);
        let commit = match std::fs::read_to_string(&note) {
            Ok(commit) if is_commit(commit.trim()) => commit.trim().to_string(),
            _ if is_commit(&address.revision) => address.revision.clone(),
            _ => bail!("{} holds no revision {:?}", self.folder.display(), address.revision),
        };
        let snapshot = snapshots.join(commit);
        let mut held = files_below(&snapshot)?;
        held.retain(|path| path.is_file());
        let name = |path: &PathBuf| Some(path.strip_prefix(&snapshot).ok()?.to_str()?.to_string());
        let held: Vec<_> = held.iter().filter_map(name).collect();
        Ok(self.local(&snapshot, &address.wanted(self.kind, &held)?))
    }

    /// Where the wanted files of a snapshot are found: a model that is one file is that file.
    fn local(&self, snapshot: &Path, wanted: &[&str]) -> PathBuf {
        match (wanted, &self.address.inside) {
            ([only], _) if only.ends_with(".gguf") => snapshot.join(only),
            (_, Some(inside)) => snapshot.join(inside),
            (_, None) => snapshot.to_path_buf(),
        }
    }

    /// Notes which commit a branch or a tag is.
    fn remember(&self, commit: &str, partial: &Partial) -> std::io::Result<()> {
        if self.address.revision == commit {
            return Ok(());
        }
        let (whole, note) = (partial.folder.join("ref"), self.folder.join("refs").join(&self.address.revision));
        std::fs::write(&whole, commit)?;
        std::fs::create_dir_all(note.parent().unwrap_or(&note))?;
        std::fs::rename(whole, note)
    }
}

/// Lets a file of a snapshot be a blob.
fn link(blob: &str, snapshot: &Path, file: &str, partial: &Partial) -> std::io::Result<()> {
    let place = snapshot.join(file);
    std::fs::create_dir_all(place.parent().unwrap_or(snapshot))?;
    let up = "../".repeat(2 + file.matches('/').count());
    let link = partial.folder.join("link");
    #[cfg(unix)]
    std::os::unix::fs::symlink(format!("{up}blobs/{blob}"), &link)?;
    #[cfg(not(unix))]
    std::fs::hard_link(snapshot.join(up.trim_end_matches('/')).join("blobs").join(blob), &link)?;
    std::fs::rename(link, place)
}

/// What a hub names a file by: the SHA-256 of large ones, Git's SHA-1 of small ones.
fn hasher(hash: &str, size: u64) -> Result<Box<dyn DynDigest>> {
    let plain = hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    match hash.len() {
        64 if plain => Ok(Box::new(Sha256::new())),
        40 if plain => Ok(Box::new(Sha1::new_with_prefix(format!("blob {size}\0")))),
        _ => bail!("the hub gives {hash:?} as its hash, which is neither a SHA-256 nor Git's"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A file's name as a part of an address.
fn encoded(name: &str) -> String {
    let one = |byte: u8| match byte {
        b'/' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ if byte.is_ascii_alphanumeric() => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    name.bytes().map(one).collect()
}
