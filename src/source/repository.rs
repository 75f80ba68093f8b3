//! A repository of a hub in the cache, which is laid out as huggingface_hub's, so that what Python fetched is found
//! here and the other way round: `blobs/` by hash, `snapshots/COMMIT/` of links to them, `refs/` from revisions to
//! commits. A blob appears whole and checked, links after all of their blobs, and the note of a revision last.
//!
//! hf-hub says what lies where. Notes of revisions are read and written here: its `get` follows one wherever it points,
//! its `create_ref` empties one before it writes it.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use hf_hub::{CacheRepo, Repo, RepoType};
use serde::Deserialize;
use sha1::Sha1;
use sha2::digest::DynDigest;
use sha2::{Digest, Sha256};

use super::address::{Address, Kind};
use super::hub::Hub;
use super::partial::Partial;
use super::transfer::{Client, Failure};
use super::{files_below, hex};

/// What the hub says of a revision.
#[derive(Deserialize)]
pub struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
}

impl Listing {
    /// Reads the hub's reply.
    ///
    /// # Errors
    /// If it is no list, or one that names what is no commit, or files that have no place in a folder.
    pub fn parse(text: &[u8]) -> Result<Listing> {
        let listing: Listing = serde_json::from_slice(text).context("the hub's list of files is not one")?;
        ensure!(is_commit(&listing.sha), "the hub says that the revision is {:?}, which is no commit", listing.sha);
        for Sibling { rfilename: name, .. } in &listing.siblings {
            let part = |part: &str| !matches!(part, "" | "." | "..");
            let safe = name.split('/').all(part) && !name.chars().any(|one| one == '\\' || one.is_control());
            ensure!(safe, "the repository names a file {name:?}, which has no place in a folder");
        }
        Ok(listing)
    }

    /// Paths of all files in the repository.
    pub fn files(&self) -> Vec<String> {
        self.siblings.iter().map(|file| file.rfilename.clone()).collect()
    }
}

/// Larger than the listing of a hundred thousand files.
const LONGEST_LISTING: u64 = 64 << 20;

/// A repository that is being fetched.
pub(super) struct Repository<'a> {
    hub: &'a Hub,
    address: &'a Address,
    kind: Kind,
    /// Its place in the cache.
    folder: PathBuf,
    cache: CacheRepo,
    progress: &'a dyn Fn(&str),
}

impl<'a> Repository<'a> {
    pub fn new(hub: &'a Hub, address: &'a Address, kind: Kind, progress: &'a dyn Fn(&str)) -> Repository<'a> {
        let of = if kind == Kind::Data { RepoType::Dataset } else { RepoType::Model };
        let repo = Repo::with_revision(address.id.clone(), of, address.revision.clone());
        let folder = hub.cache.path().join(repo.folder_name());
        Repository { hub, address, kind, folder, cache: hub.cache.repo(repo), progress }
    }

    /// Asks the hub, downloads what the cache lacks, and returns where the wanted files are.
    pub fn fetch(&self) -> Result<PathBuf> {
        let client = Client::new(&self.hub.endpoint, self.hub.token.as_ref(), self.hub.patience)?;
        let listing = match self.list(&client) {
            Err(error) if matches!(error.downcast_ref(), Some(Failure::Unreachable(_))) => {
                let Ok(path) = self.cached() else { bail!("the cache holds no copy, and {error:#}") };
                (self.progress)(&format!("{error:#}; going on with {}", path.display()));
                return Ok(path);
            }
            listing => listing?,
        };
        let sizes: BTreeMap<_, _> = listing.siblings.iter().map(|file| (file.rfilename.as_str(), file.size)).collect();
        let files = listing.files();
        let wanted = self.address.wanted(self.kind, &files)?;
        (self.progress)(&format!("{} is commit {}", self.address, listing.sha));

        let snapshot = self.cache.pointer_path(&listing.sha);
        let wanted_sizes = wanted.iter().map(|file| (*file, sizes.get(file).copied().flatten()));
        let lacking: Vec<_> = wanted_sizes.filter(|(file, size)| !holds(&snapshot.join(file), *size)).collect();
        // A cache that has everything may be read-only.
        if !lacking.is_empty() || self.commit().as_ref() != Some(&listing.sha) {
            self.fill(&client, &listing.sha, &lacking)?;
        }
        Ok(self.local(&snapshot, &wanted))
    }

    /// Downloads files, with the sizes that they are listed with, into the snapshot of a commit.
    fn fill(&self, client: &Client, commit: &str, files: &[(&str, Option<u64>)]) -> Result<()> {
        let partial = Partial::create(&self.folder, "HF_HUB_CACHE")?;
        let mut links = Vec::new();
        for (file, size) in files {
            let blob = self.download(client, commit, file, *size, &partial.folder);
            links.push((file, blob.with_context(|| file.to_string())?));
        }
        for (file, blob) in links {
            self.link(commit, file, &blob, &partial.folder)
                .with_context(|| format!("cannot put {file} into the cache"))?;
        }
        if self.commit().as_deref() != Some(commit) {
            self.note(commit, &partial.folder).context("cannot note the revision in the cache")?;
        }
        Ok(())
    }

    /// What the hub has at the revision.
    fn list(&self, client: &Client) -> Result<Listing> {
        let (kind, id, revision) = (self.kind.plural(), &self.address.id, self.address.revision.replace('/', "%2F"));
        let reply = client.get(&format!("api/{kind}/{id}/revision/{revision}?blobs=true"));
        let mut text = Vec::new();
        let mut body = reply.map_err(|failure| self.explained(failure))?.body.take(LONGEST_LISTING);
        body.read_to_end(&mut text).map_err(|error| {
            Failure::Unreachable(format!("the hub's list of files broke off: {}", self.in_words(&error)))
        })?;
        Listing::parse(&text)
    }

    /// Puts a file's content into the cache, unless it is there already, and returns its name there, its hash.
    fn download(&self, client: &Client, commit: &str, file: &str, size: Option<u64>, partial: &Path) -> Result<String> {
        let prefix = if self.kind == Kind::Data { "datasets/" } else { "" };
        let reply = client.get(&format!("{prefix}{}/resolve/{commit}/{}", self.address.id, encoded(file)));
        let reply = reply.map_err(|failure| self.explained(failure))?;
        let hash = reply.etag.context("the hub gives no hash of it")?;
        let size = reply.size.or(size).context("the hub does not say how large it is")?;
        let mut hasher = hasher(&hash, size)?;
        let blob = self.folder.join("blobs").join(&hash);
        if holds(&blob, Some(size)) {
            return Ok(hash);
        }
        let whole = partial.join("file");
        self.receive(reply.body, size, &whole, &mut *hasher, file)?;
        let found = hex(&hasher.finalize());
        ensure!(found == hash, "what arrived has the hash {found}, the hub announced {hash}; nothing was kept");
        let kept = std::fs::create_dir_all(self.folder.join("blobs")).and_then(|()| std::fs::rename(&whole, &blob));
        kept.context("cannot put it into the cache")?;
        Ok(hash)
    }

    fn receive(&self, mut body: impl Read, size: u64, to: &Path, hasher: &mut dyn DynDigest, file: &str) -> Result<()> {
        let say = |arrived: &str| (self.progress)(&format!("downloading {}/{file}{arrived}", self.address.id));
        let mut target = std::fs::File::create(to).context("cannot write into the cache")?;
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
    pub fn cached(&self) -> Result<PathBuf> {
        let missing = || format!("{} holds no revision {:?}", self.folder.display(), self.address.revision);
        let snapshot = self.cache.pointer_path(&self.commit().with_context(missing)?);
        let mut held = files_below(&snapshot)?;
        held.retain(|path| path.is_file());
        let name = |path: &PathBuf| Some(path.strip_prefix(&snapshot).ok()?.to_str()?.to_string());
        let held: Vec<_> = held.iter().filter_map(name).collect();
        Ok(self.local(&snapshot, &self.address.wanted(self.kind, &held)?))
    }

    /// Where the wanted files of a snapshot are found: a model that is one file is that file.
    fn local(&self, snapshot: &Path, wanted: &[&str]) -> PathBuf {
        match (wanted, &self.address.inside) {
            ([only], _) if only.ends_with(".gguf") => snapshot.join(only),
            (_, Some(inside)) => snapshot.join(inside),
            (_, None) => snapshot.to_path_buf(),
        }
    }

    /// Lets a file of a snapshot be a blob.
    fn link(&self, commit: &str, file: &str, blob: &str, partial: &Path) -> std::io::Result<()> {
        let (place, link) = (self.cache.pointer_path(commit).join(file), partial.join("link"));
        std::fs::create_dir_all(place.parent().unwrap_or(&place))?;
        #[cfg(unix)]
        std::os::unix::fs::symlink(format!("{}blobs/{blob}", "../".repeat(2 + file.matches('/').count())), &link)?;
        #[cfg(not(unix))]
        std::fs::hard_link(self.folder.join("blobs").join(blob), &link)?;
        std::fs::rename(link, place)
    }

    /// The commit that the revision is, or was when the hub was last asked.
    fn commit(&self) -> Option<String> {
        let revision = &self.address.revision;
        let noted = std::fs::read_to_string(self.folder.join("refs").join(revision));
        let noted = noted.map_or_else(|_| revision.clone(), |commit| commit.trim().to_string());
        is_commit(&noted).then_some(noted)
    }

    /// Notes which commit the revision is.
    fn note(&self, commit: &str, partial: &Path) -> std::io::Result<()> {
        let (whole, note) = (partial.join("ref"), self.folder.join("refs").join(&self.address.revision));
        std::fs::write(&whole, commit)?;
        std::fs::create_dir_all(note.parent().unwrap_or(&note))?;
        std::fs::rename(whole, note)
    }
}

/// Whether a file is there, and of this size if that is known.
fn holds(path: &Path, size: Option<u64>) -> bool {
    path.metadata().is_ok_and(|held| held.is_file() && size.is_none_or(|size| size == held.len()))
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
