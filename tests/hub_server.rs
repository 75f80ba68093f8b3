//! A hub of the tests' own, which answers as huggingface.co does, with a CDN on another port.

use std::cell::RefCell;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use candor::source::{Address, Hub, Kind, Source};
use hf_hub::Cache;
use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// A reply: a status, headers and a body, of which `sent` bytes are sent before the connection is closed, or
/// pauses before the rest.
#[derive(Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    pub sent: Option<usize>,
    pub pause: Option<Duration>,
}

impl Reply {
    pub fn new(status: u16, headers: &[(&'static str, String)], body: &[u8]) -> Reply {
        Reply { status, headers: headers.to_vec(), body: body.to_vec(), sent: None, pause: None }
    }

    pub fn send(&self, mut stream: TcpStream) -> std::io::Result<()> {
        write!(stream, "HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {}\r\n", self.status, self.body.len())?;
        for (name, value) in &self.headers {
            write!(stream, "{name}: {value}\r\n")?;
        }
        stream.write_all(b"\r\n")?;
        let (first, rest) = self.body.split_at(self.sent.unwrap_or(self.body.len()));
        stream.write_all(first)?;
        if let Some(pause) = self.pause {
            thread::sleep(pause);
            stream.write_all(rest)?;
        }
        Ok(())
    }
}

/// A server on a port of its own. `asked` has a line per request: its path, and its authorization if it has one.
pub struct Site {
    pub address: String,
    pub asked: Arc<Mutex<Vec<String>>>,
}

impl Site {
    pub fn new(answer: impl Fn(&str) -> Reply + Send + Sync + 'static) -> Site {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (asked, answer) = (Arc::new(Mutex::new(Vec::new())), Arc::new(answer));
        let log = asked.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, answer) = (log.clone(), answer.clone());
                thread::spawn(move || {
                    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
                    let path = lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or_default().to_string();
                    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                    let token = head.iter().filter_map(|line| line.strip_prefix("authorization: ")).next();
                    log.lock().unwrap().push(token.map_or(path.clone(), |token| format!("{path} {token}")));
                    answer(&path).send(stream).ok();
                });
            }
        });
        Site { address, asked }
    }

    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

/// A file of a repository; large ones lie on the CDN.
pub type File = (&'static str, &'static [u8], bool);

pub const SMALL: bool = false;
pub const LARGE: bool = true;
pub const MAIN: &str = "1111111111111111111111111111111111111111";
pub const OLD: &str = "2222222222222222222222222222222222222222";

pub const MODEL: &[File] = &[
    ("README.md", b"# A model", SMALL),
    ("config.json", b"{}", SMALL),
    ("model.safetensors", b"weights", LARGE),
    ("onnx/model.onnx", b"other weights", LARGE),
    ("original/x.safetensors", b"the same again", LARGE),
    ("pytorch_model.bin", b"a pickle", LARGE),
    ("tokenizer.json", b"{\"words\": 3}", SMALL),
];
pub const DATA: &[File] = &[
    (".gitattributes", b"", SMALL),
    ("data/train 1.parquet", b"PAR1", LARGE),
    ("more/a.jsonl.gz", b"gz", LARGE),
    ("more/b.jsonl", b"{}", SMALL),
    ("rows.py", b"import os", SMALL),
];

pub fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn hash(content: &[u8], large: bool) -> String {
    if large {
        return hex(Sha256::digest(content));
    }
    hex(Sha1::new().chain_update(format!("blob {}\0", content.len())).chain_update(content).finalize())
}

/// As huggingface.co answers: a listing per revision; small files after a redirect on the same host, large ones from a CDN.
pub fn honest(path: &str, prefix: &str, files: &[File], cdn: &str) -> Reply {
    let (kind, page) = (if prefix.is_empty() { "models" } else { "datasets" }, format!("/{prefix}org/name/resolve/"));
    let listing = |commit: &str, files: &[File]| {
        let siblings: Vec<_> = files
            .iter()
            .map(|(name, content, _)| json!({"rfilename": name, "size": content.len(), "blobId": "x"}))
            .collect();
        Reply::new(200, &[], json!({"id": "org/name", "sha": commit, "siblings": siblings}).to_string().as_bytes())
    };
    let refused = |code: &str| Reply::new(404, &[("X-Error-Code", code.to_string())], b"no");
    if let Some(revision) = path.strip_prefix(&format!("/api/{kind}/org/name/revision/")) {
        return match revision.strip_suffix("?blobs=true").unwrap() {
            "main" | MAIN => listing(MAIN, files),
            "v1" | "refs%2Fpr%2F7" => listing(OLD, &files[..3]),
            _ => refused("RevisionNotFound"),
        };
    }
    let named = |name: &str| files.iter().find(|(file, ..)| file.replace(' ', "%20") == name);
    if let Some((_, content, _)) = path.strip_prefix("/api/resolve-cache/").and_then(named) {
        return Reply::new(200, &[("ETag", format!("\"{}\"", hash(content, SMALL)))], content);
    }
    let Some((_, file)) = path.strip_prefix(&page).and_then(|path| path.split_once('/')) else {
        return refused("RepoNotFound");
    };
    let Some((name, content, large)) = named(file) else { return refused("EntryNotFound") };
    let etag = hash(content, *large);
    let location = match large {
        true => format!("{cdn}/{etag}?Signature=secret"),
        false => format!("/api/resolve-cache/{}", name.replace(' ', "%20")),
    };
    let announced = [("X-Linked-ETag", format!("\"{etag}\"")), ("X-Linked-Size", content.len().to_string())];
    let mut reply = Reply::new(302, &announced, b"Found. Redirecting");
    reply.headers.extend([("Location", location), ("X-Repo-Commit", MAIN.into())]);
    reply
}

/// A hub, its CDN, and a cache.
pub struct World {
    pub site: Site,
    pub cdn: Site,
    pub folder: TempDir,
    pub hub: Hub,
    pub said: RefCell<Vec<String>>,
}

impl World {
    /// `change` may change every reply of both servers; it is given the path.
    pub fn new(kind: Kind, files: &'static [File], change: impl Fn(&str, &mut Reply) + Send + Sync + 'static) -> World {
        let (change, prefix) = (Arc::new(change), if kind == Kind::Data { "datasets/" } else { "" });
        let also = change.clone();
        let cdn = Site::new(move |path| {
            let asked = path.trim_start_matches('/').split('?').next().unwrap();
            let file = files.iter().find(|(_, content, _)| hash(content, LARGE) == asked);
            let mut reply = file.map_or(Reply::new(403, &[], b""), |(_, content, _)| Reply::new(200, &[], content));
            change(path, &mut reply);
            reply
        });
        let address = cdn.address.clone();
        let site = Site::new(move |path| {
            let mut reply = honest(path, prefix, files, &address);
            also(path, &mut reply);
            reply
        });
        let folder = tempfile::tempdir().unwrap();
        let hub = Hub {
            endpoint: format!("{}/", site.address),
            cache: Cache::new(folder.path().join("hub")),
            token: None,
            offline: false,
            patience: Duration::from_secs(20),
        };
        World { site, cdn, folder, hub, said: RefCell::default() }
    }

    pub fn fetch(&self, kind: Kind, source: &str) -> anyhow::Result<PathBuf> {
        self.hub.fetch(&address(source), kind, &|line| self.said.borrow_mut().push(line.to_string()))
    }

    /// The message of a fetch that fails, which leaves no file and no link behind, and says neither token nor signature.
    pub fn failure(&self, kind: Kind, source: &str, wanted: &[&str]) -> String {
        let message = format!("{:#}", self.fetch(kind, source).expect_err(source));
        let left = self.cached();
        assert!(left.is_empty(), "left behind after {message}: {left:?}");
        for secret in ["hf_secret", "Signature"] {
            assert!(!message.contains(secret) && !self.said.borrow().iter().any(|line| line.contains(secret)));
        }
        for part in wanted.iter().chain(&["cannot fetch hf:org/name", "; what also works: a folder"]) {
            assert!(message.contains(part), "no {part:?} in: {message}");
        }
        message
    }

    /// Every file and link in the cache.
    pub fn cached(&self) -> Vec<String> {
        below(self.hub.cache.path())
    }
}

/// The names of all files and links below a folder, in order.
pub fn below(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        if path.is_dir() && !path.is_symlink() {
            names.extend(below(&path).into_iter().map(|inner| format!("{name}/{inner}")));
        } else {
            names.push(name);
        }
    }
    names.sort();
    names
}

pub fn address(source: &str) -> Address {
    match Source::parse(source).unwrap() {
        Source::Hub(address) => address,
        other => panic!("{source} is {other:?}"),
    }
}

pub fn honestly(_: &str, _: &mut Reply) {}
