//! `hf:` sources: what is asked of a hub, what is kept, who is told the token, and what becomes of replies that are wrong.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use candor::source::{Hub, Kind, Token};
use proptest::prelude::*;
use serde_json::json;

use crate::hub_server::{DATA, File, LARGE, MAIN, MODEL, OLD, Reply, SMALL, World, address, below, hash, honestly};

#[test]
fn a_model_is_fetched_once_and_only_what_it_is_read_from() {
    let world = World::new(Kind::Model, MODEL, honestly);
    let folder = world.fetch(Kind::Model, "hf:org/name").unwrap();
    assert_eq!(folder, world.hub.cache.path().join("models--org--name/snapshots").join(MAIN));
    assert_eq!(below(&folder), ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), b"weights");
    assert_eq!(fs::read_to_string(folder.join("tokenizer.json")).unwrap(), "{\"words\": 3}");
    let link = fs::read_link(folder.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(hash(b"weights", LARGE)), "as huggingface_hub lays it out");
    assert_eq!(fs::read_to_string(folder.join("../../refs/main")).unwrap(), MAIN);
    assert_eq!(world.cached().len(), 3 + 3 + 1, "blobs, links and a note: {:?}", world.cached());
    let said = ["hf:org/name is commit 1111111111111111111111111111111111111111", "downloading org/name/config.json"];
    assert_eq!(world.said.take()[..2], said);
    let page = format!("/org/name/resolve/{MAIN}");
    let asked = ["/api/models/org/name/revision/main?blobs=true", &format!("{page}/config.json")];
    assert_eq!(world.site.asked()[..2], asked);

    world.cdn.asked();
    assert_eq!(world.fetch(Kind::Model, "hf:org/name").unwrap(), folder);
    assert_eq!(world.site.asked(), ["/api/models/org/name/revision/main?blobs=true"]);
    assert_eq!((world.cdn.asked().len(), world.said.take().len()), (0, 1));

    // Nothing is written where nothing is lacking: the cache may be read-only.
    let repository = world.hub.cache.path().join("models--org--name");
    let changed = |path: &Path| path.metadata().unwrap().modified().unwrap();
    let before = (changed(&repository), changed(&repository.join("refs")));
    world.fetch(Kind::Model, "hf:org/name").unwrap();
    assert_eq!((changed(&repository), changed(&repository.join("refs"))), before);

    // A file of another size than the listing says is fetched again.
    fs::write(folder.join("model.safetensors"), "w").unwrap();
    world.fetch(Kind::Model, "hf:org/name").unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), b"weights");
}

#[test]
fn data_sets_and_models_are_apart() {
    let world = World::new(Kind::Data, DATA, honestly);
    let folder = world.fetch(Kind::Data, "hf:org/name").unwrap();
    assert_eq!(below(&folder), ["data/train 1.parquet", "more/a.jsonl.gz", "more/b.jsonl"]);
    assert_eq!(fs::read(folder.join("data/train 1.parquet")).unwrap(), b"PAR1");
    assert!(folder.starts_with(world.hub.cache.path().join("datasets--org--name")));
    let message = format!("{:#}", world.fetch(Kind::Model, "hf:org/name").unwrap_err());
    assert!(message.contains("sought among the models") && message.contains("404 RepoNotFound"), "{message}");
}

#[test]
fn a_path_inside_is_all_that_is_fetched() {
    let world = World::new(Kind::Data, DATA, honestly);
    let folder = world.fetch(Kind::Data, "hf:org/name/more").unwrap();
    assert!(folder.ends_with(format!("{MAIN}/more")));
    assert_eq!(below(&folder.join("..")), ["more/a.jsonl.gz", "more/b.jsonl"]);
    let file = world.fetch(Kind::Data, "hf:org/name@main/data/train 1.parquet").unwrap();
    assert_eq!(fs::read(file).unwrap(), b"PAR1");
    for nothing in ["hf:org/name/mor", "hf:org/name/rows.py", "hf:org/name/more/c.jsonl"] {
        let message = format!("{:#}", world.fetch(Kind::Data, nothing).unwrap_err());
        assert!(message.contains("holds no .parquet, no .jsonl"), "{message}");
    }
}

#[test]
fn revisions_share_what_they_have_in_common() {
    let world = World::new(Kind::Model, MODEL, honestly);
    world.fetch(Kind::Model, "hf:org/name").unwrap();
    world.cdn.asked();
    let old = world.fetch(Kind::Model, "hf:org/name@v1").unwrap();
    assert_eq!(below(&old), ["config.json", "model.safetensors"]);
    assert!(old.ends_with(OLD) && world.cdn.asked().len() == 1, "asked for its hash, not read");
    assert!(world.said.borrow().contains(&format!("hf:org/name@v1 is commit {OLD}")));
    assert_eq!(world.fetch(Kind::Model, "hf:org/name@refs/pr/7").unwrap(), old);
    assert_eq!(world.fetch(Kind::Model, &format!("hf:org/name@{MAIN}")).unwrap(), old.with_file_name(MAIN));
    let message = format!("{:#}", world.fetch(Kind::Model, "hf:org/name@v2").unwrap_err());
    assert!(message.contains("404 RevisionNotFound: org/name has no revision \"v2\""), "{message}");
}

#[test]
fn the_token_is_told_to_the_hub_alone() {
    let mut world = World::new(Kind::Model, MODEL, honestly);
    world.hub.token = Some(Token::new(" hf_secret\n").unwrap());
    world.fetch(Kind::Model, "hf:org/name").unwrap();
    let (site, cdn) = (world.site.asked(), world.cdn.asked());
    assert!(site.len() == 6 && site.iter().all(|line| line.ends_with(" Bearer hf_secret")), "{site:?}");
    assert!(cdn.len() == 1 && !cdn[0].contains("Bearer"), "{cdn:?}");
    assert!(!format!("{:?} {:?}", world.hub, world.said).contains("secret"));
    for name in world.cached() {
        assert!(!fs::read_to_string(world.hub.cache.path().join(name)).unwrap().contains("secret"));
    }
    assert!(Token::new("two words").is_err() && Token::new("a\nb").is_err() && Token::new(" ").is_err());
}

#[test]
fn refusals_say_what_to_do() {
    for (status, code, token, wanted) in [
        (
            401,
            "",
            false,
            "answered 401: there is no such repository or revision, or it is private or gated: set HF_TOKEN",
        ),
        (401, "RepoNotFound", true, "the token that was sent"),
        (404, "RepoNotFound", false, "404 RepoNotFound: there is no such repository"),
        (403, "GatedRepo", true, "is gated: accept its licence"),
        (403, "", false, "may not be read: accept its licence"),
        (418, "hf_secret<teapot>", true, "418"),
        (503, "", false, "answered 503: try again later"),
    ] {
        let change = move |path: &str, reply: &mut Reply| {
            if path.starts_with("/api/models") || code == "GatedRepo" {
                *reply = Reply::new(status, &[("X-Error-Code", code.replace("hf_secret", ""))], b"hf_secret");
            }
        };
        let mut world = World::new(Kind::Model, MODEL, change);
        world.hub.token = token.then(|| Token::new("hf_secret").unwrap());
        world.failure(Kind::Model, "hf:org/name", &[wanted, "sought among the models"]);
    }
}

#[test]
fn what_arrives_damaged_is_not_kept() {
    type Change = fn(&mut Reply);
    let cases: [(&str, Change, &str); 10] = [
        ("weights", |reply| reply.sent = Some(3), "broke off after 3 of 7 bytes"),
        ("weights", |reply| reply.body[2] ^= 1, "has the hash"),
        ("weights", |reply| reply.body.push(b'!'), "more than the 7 bytes"),
        ("weights", |reply| reply.body.truncate(6), "6 bytes arrived of the 7"),
        ("config", |reply| *reply = Reply::new(200, &reply.headers.clone(), b"[]"), "has the hash"),
        ("page", |reply| set(reply, "X-Linked-Size", "8"), "7 bytes arrived of the 8"),
        ("page", |reply| set(reply, "X-Linked-Size", "6"), "more than the 6 bytes"),
        ("page", |reply| set(reply, "X-Linked-ETag", "\"../../../escaped\""), "neither a SHA-256 nor Git's"),
        ("page", |reply| set(reply, "X-Linked-ETag", &"0".repeat(64)), "the hub announced 0000"),
        ("page", |reply| reply.headers.retain(|(name, _)| *name != "X-Linked-ETag"), "gives no hash"),
    ];
    for (place, change, wanted) in cases {
        let broken = Arc::new(Mutex::new(true));
        let still = broken.clone();
        let world = World::new(Kind::Model, MODEL, move |path, reply| {
            let there = match place {
                "weights" => path.contains(&hash(b"weights", LARGE)),
                "config" => path.ends_with("resolve-cache/config.json"),
                _ => path.ends_with("/model.safetensors"),
            };
            if there && *still.lock().unwrap() {
                change(reply);
            }
        });
        let message = format!("{:#}", world.fetch(Kind::Model, "hf:org/name").expect_err(wanted));
        assert!(
            message.contains(wanted) && message.contains(if place == "config" { place } else { "model" }),
            "{message}"
        );
        let left = world.cached();
        assert!(!left.iter().any(|name| name.contains("snapshots") || name.contains("partial")), "{left:?}");
        let weights = hash(b"weights", LARGE);
        assert!(!left.iter().any(|name| name.contains(&weights)) && below(world.folder.path()).len() == left.len());
        *broken.lock().unwrap() = false;
        let folder = world.fetch(Kind::Model, "hf:org/name").unwrap();
        assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), b"weights");
        assert_eq!(fs::read(folder.join("config.json")).unwrap(), b"{}");
    }
}

fn set(reply: &mut Reply, name: &str, value: &str) {
    for (_, old) in reply.headers.iter_mut().filter(|(found, _)| *found == name) {
        *old = value.into();
    }
}

#[test]
fn a_server_that_stands_still_is_given_up() {
    for place in ["/api/models", "resolve-cache/config.json", &hash(b"weights", LARGE)] {
        let place = place.to_string();
        let mut world = World::new(Kind::Model, MODEL, move |path, reply| {
            if path.contains(&place) {
                (reply.sent, reply.pause) = (Some(reply.body.len().min(1)), Some(Duration::from_secs(60)));
            }
        });
        world.hub.patience = Duration::from_millis(300);
        let start = Instant::now();
        let message = format!("{:#}", world.fetch(Kind::Model, "hf:org/name").unwrap_err());
        assert!(message.contains("nothing arrived for 0.3 seconds"), "{message}");
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    }
    // Not even a status line.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut world = World::new(Kind::Model, MODEL, honestly);
    world.hub.patience = Duration::from_millis(300);
    world.hub.endpoint = format!("http://{}", silent.local_addr().unwrap());
    world.failure(Kind::Model, "hf:org/name", &["was not reached", "nothing arrived for 0.3 seconds"]);
}

#[test]
fn hostile_names_are_refused() {
    for name in ["../x.safetensors", "/etc/x.safetensors", "a\\..\\b.json", "a//b.json", "./config.json", "", "a\nb"] {
        let world = World::new(Kind::Model, MODEL, move |path, reply| {
            if path.starts_with("/api/models") {
                let siblings = json!([{"rfilename": "config.json"}, {"rfilename": name}]);
                *reply = Reply::new(200, &[], json!({"sha": MAIN, "siblings": siblings}).to_string().as_bytes());
            }
        });
        world.failure(Kind::Model, "hf:org/name", &["the repository names a file", "no place in a folder"]);
    }
    for listing in [json!({"sha": "../../x", "siblings": []}), json!({"sha": MAIN}), json!([])] {
        let world = World::new(Kind::Model, MODEL, move |_, reply| {
            *reply = Reply::new(200, &[], listing.to_string().as_bytes());
        });
        world.failure(Kind::Model, "hf:org/name", &["the "]);
    }
}

#[test]
fn redirects_are_followed_only_where_they_lead_somewhere() {
    for (location, wanted) in [
        ("/api/models/org/name/revision/main?blobs=true", "without end"),
        ("file:///etc/passwd", "an address that is not followed"),
        ("//other.example/x", "an address that is not followed"),
        ("elsewhere", "an address that is not followed"),
        ("http://127.0.0.1:1/?Signature=secret", "127.0.0.1:1 was not reached"),
    ] {
        let world = World::new(Kind::Model, MODEL, move |_, reply| {
            *reply = Reply::new(307, &[("Location", location.to_string())], b"");
        });
        world.failure(Kind::Model, "hf:org/name", &[wanted]);
    }
    let mut world = World::new(Kind::Model, MODEL, honestly);
    for endpoint in ["", "huggingface.co", "ftp://x", "https://user:hf_secret@x", "https://x?a=b", "https://"] {
        world.hub.endpoint = endpoint.into();
        world.failure(Kind::Model, "hf:org/name", &["HF_ENDPOINT is not an address"]);
    }
}

#[test]
fn the_cache_serves_when_the_hub_does_not() {
    let mut world = World::new(Kind::Model, MODEL, honestly);
    let there = world.hub.endpoint.clone();
    world.hub.offline = true;
    world.failure(Kind::Model, "hf:org/name", &["HF_HUB_OFFLINE is set", "holds no revision \"main\""]);
    (world.hub.offline, world.hub.endpoint) = (false, "http://127.0.0.1:1".into());
    let tried = "sought among the models: the cache holds no copy, and 127.0.0.1:1 was not reached (";
    world.failure(
        Kind::Model,
        "hf:org/name",
        &[tried, "): check the network, proxies and HF_ENDPOINT; what also works"],
    );
    assert!(world.site.asked().is_empty());

    world.hub.endpoint = there;
    let folder = world.fetch(Kind::Model, "hf:org/name").unwrap();
    world.hub.endpoint = "http://127.0.0.1:1".into();
    world.said.take();
    assert_eq!(world.fetch(Kind::Model, "hf:org/name").unwrap(), folder);
    let said = world.said.take();
    assert!(said.len() == 1 && said[0].contains("was not reached") && said[0].contains(MAIN), "{said:?}");
    world.hub.offline = true;
    assert_eq!(world.fetch(Kind::Model, "hf:org/name").unwrap(), folder);
    assert_eq!(world.fetch(Kind::Model, &format!("hf:org/name@{MAIN}")).unwrap(), folder);
    let missing = format!("{:#}", world.fetch(Kind::Model, "hf:org/name@v1").unwrap_err());
    assert!(missing.contains("holds no revision \"v1\""), "{missing}");
    // A note that points elsewhere is none, and links without their blobs are no files.
    fs::write(folder.join("../../refs/main"), "../..").unwrap();
    assert!(world.fetch(Kind::Model, "hf:org/name").is_err());
    fs::remove_file(folder.join("../../blobs").join(hash(b"weights", LARGE))).unwrap();
    let message = format!("{:#}", world.fetch(Kind::Model, &format!("hf:org/name@{MAIN}")).unwrap_err());
    assert!(message.contains("holds no .safetensors"), "{message}");
}

#[test]
fn a_refusal_is_not_answered_from_the_cache() {
    let refused = Arc::new(Mutex::new(false));
    let now = refused.clone();
    let world = World::new(Kind::Model, MODEL, move |_, reply| {
        if *now.lock().unwrap() {
            *reply = Reply::new(401, &[], b"");
        }
    });
    world.fetch(Kind::Model, "hf:org/name").unwrap();
    *refused.lock().unwrap() = true;
    assert!(world.fetch(Kind::Model, "hf:org/name").is_err());
}

#[test]
fn a_model_may_be_one_gguf_file() {
    const ONE: &[File] = &[("config.json", b"{}", SMALL), ("small/model.gguf", b"GGUF", LARGE)];
    const TWO: &[File] = &[("a-Q4.gguf", b"four", LARGE), ("a-Q8.gguf", b"eight", LARGE), ("x.bin", b"", SMALL)];
    let mut one = World::new(Kind::Model, ONE, honestly);
    let file = one.fetch(Kind::Model, "hf:org/name").unwrap();
    assert!(file.ends_with(format!("{MAIN}/small/model.gguf")) && one.cached().len() == 3, "{:?}", one.cached());
    one.hub.offline = true;
    assert_eq!(one.fetch(Kind::Model, "hf:org/name").unwrap(), file);
    assert_eq!(one.fetch(Kind::Model, "hf:org/name/small").unwrap(), file);

    let two = World::new(Kind::Model, TWO, honestly);
    let wanted = ["holds 2 .gguf files", "hf:org/name/a-Q4.gguf", "a-Q8.gguf"];
    two.failure(Kind::Model, "hf:org/name", &wanted);
    two.failure(Kind::Model, "hf:org/name/x.bin", &["a .gguf file or a folder, not \"x.bin\""]);
    two.failure(Kind::Model, "hf:org/name/x", &["holds no .safetensors and no .gguf file"]);
    assert_eq!(fs::read(two.fetch(Kind::Model, "hf:org/name/a-Q8.gguf").unwrap()).unwrap(), b"eight");
}

#[test]
fn several_at_once_end_with_the_right_files() {
    let world = World::new(Kind::Data, DATA, |_, _| thread::sleep(Duration::from_millis(50)));
    let (hub, address) = (&world.hub, address("hf:org/name"));
    thread::scope(|scope| {
        let fetches: Vec<_> =
            (0..4).map(|_| scope.spawn(|| hub.fetch(&address, Kind::Data, &|_| ()).unwrap())).collect();
        for fetch in fetches {
            assert_eq!(fs::read(fetch.join().unwrap().join("more/a.jsonl.gz")).unwrap(), b"gz");
        }
    });
    assert_eq!(world.cached().len(), 3 + 3 + 1, "{:?}", world.cached());
}

#[test]
fn progress_is_the_bytes_that_arrived() {
    static LONG: [u8; 3_000_000] = [7; 3_000_000];
    const FILES: &[File] = &[("a.jsonl", &LONG, LARGE)];
    let world = World::new(Kind::Data, FILES, |path, reply| {
        if path.contains("Signature") {
            (reply.sent, reply.pause) = (Some(2_000_000), Some(Duration::from_millis(1300)));
        }
    });
    world.fetch(Kind::Data, "hf:org/name").unwrap();
    let said = world.said.take();
    let downloading = "downloading org/name/a.jsonl";
    assert_eq!(said[1..2], [downloading]);
    assert!(said[2].starts_with(&format!("{downloading} (")) && said[2].ends_with(" MB so far)"), "{said:?}");
}

#[test]
fn the_hub_is_where_the_environment_says() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().to_str().unwrap();
    let located = |set: &[(&str, &str)]| {
        Hub::located_by(|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()))
    };
    let cache = |set: &[(&str, &str)]| located(set).unwrap().cache.path().clone();
    let variables = [("HF_HUB_CACHE", "/c"), ("HF_HOME", home), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
    assert_eq!(cache(&variables), Path::new("/c"));
    assert_eq!(cache(&variables[1..]), folder.path().join("hub"));
    assert_eq!(cache(&variables[2..]), Path::new("/x/huggingface/hub"));
    assert_eq!(cache(&variables[3..]), Path::new("/h/.cache/huggingface/hub"));
    assert!(located(&[]).unwrap_err().to_string().contains("set HF_HOME"));

    let hub = located(&variables).unwrap();
    assert_eq!((hub.endpoint.as_str(), hub.token, hub.offline), ("https://huggingface.co", None, false));
    fs::write(folder.path().join("token"), "of-the-file\n").unwrap();
    let token = |set: &[(&str, &str)]| located(&[set, &variables].concat()).unwrap().token;
    assert_eq!(token(&[]), Some(Token::new("of-the-file").unwrap()));
    assert_eq!(token(&[("HUGGING_FACE_HUB_TOKEN", "old")]), Some(Token::new("old").unwrap()));
    assert_eq!(token(&[("HUGGING_FACE_HUB_TOKEN", "old"), ("HF_TOKEN", "new")]), Some(Token::new("new").unwrap()));
    let set = [("HF_ENDPOINT", "http://mirror"), ("HF_HUB_OFFLINE", "1"), ("HF_HUB_CACHE", "/c")];
    let hub = located(&set).unwrap();
    assert_eq!((hub.endpoint.as_str(), hub.offline), ("http://mirror", true));
    assert!(!located(&[("HF_HUB_OFFLINE", "0"), ("HOME", "/h")]).unwrap().offline);
    let error = located(&[("HF_TOKEN", "hf_secret two"), ("HOME", "/h")]).unwrap_err().to_string();
    assert!(error.contains("HF_TOKEN") && !error.contains("secret"), "{error}");
}

proptest! {
    /// Whatever a server says, there is an error or a folder, and nothing outside the repository's place in the cache.
    #[test]
    fn no_listing_makes_the_hub_panic_or_write_elsewhere(
        names in proptest::collection::vec("(\\.\\./|a|/|é|\\\\|\\.){0,6}b\\.json", 0..3),
        text in "\\PC{0,30}",
    ) {
        let siblings: Vec<_> = names.iter().map(|name| json!({"rfilename": name})).collect();
        for body in [json!({"sha": MAIN, "siblings": siblings}).to_string(), text] {
            let world = World::new(Kind::Data, DATA, move |path, reply| {
                *reply = match path.starts_with("/api") {
                    true => Reply::new(200, &[], body.as_bytes()),
                    false => Reply::new(200, &[("ETag", hash(b"x", SMALL))], b"x"),
                };
            });
            drop(world.fetch(Kind::Data, "hf:org/name"));
            let inside = ["blobs/", "refs/", "snapshots/"].map(|folder| format!("hub/datasets--org--name/{folder}"));
            for name in below(world.folder.path()) {
                prop_assert!(inside.iter().any(|place| name.starts_with(place)), "{name}");
            }
        }
    }
}
