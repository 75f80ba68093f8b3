//! The cache of verdicts: shared, append-only, and none the worse for a kill.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::thread;

use candor::judge::Question;
use candor::judge::cache::{Cache, Kept, key};
use candor_environments::Verdict;
use tempfile::tempdir;

use crate::toy::lines;

const GOLD: &[String] = &[];

fn question(answer: &str) -> Question<'_> {
    Question { text: "Who?", gold: GOLD, answer }
}

fn kept(verdict: Verdict) -> Kept {
    Kept { verdict, p_correct: Some(0.25) }
}

#[test]
fn keys_differ_where_a_verdict_may() {
    let gold = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect::<Vec<_>>();
    let (one, two) = (gold(&["a", "b"]), gold(&["ab"]));
    let of =
        |judge: &str, version, text, gold: &[String], answer| key(judge, version, &Question { text, gold, answer });
    let base = of("j", 1, "q", &one, "Paris");
    let others = [
        of("k", 1, "q", &one, "Paris"),
        of("j", 2, "q", &one, "Paris"),
        of("j", 1, "r", &one, "Paris"),
        of("j", 1, "q", &two, "Paris"),
        of("j", 1, "q", &one, "Rome"),
        of("j1", 1, "q", &one, "Paris"),
    ];
    assert!(others.iter().all(|other| *other != base));
    assert!(["paris", " the Paris. ", "PARIS!"].iter().all(|answer| of("j", 1, "q", &one, answer) == base));
    for (left, right) in [("1.75", "175"), ("-5", "5"), ("3/4", "34"), ("C", "C++"), ("5%", "5")] {
        assert_ne!(of("j", 1, "q", &one, left), of("j", 1, "q", &one, right), "{left} and {right}");
    }
}

#[test]
fn verdicts_are_there_after_opening_again_and_the_first_one_stands() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("deep/verdicts.jsonl");
    let (one, other) = (Cache::open(&path).unwrap(), Cache::open(&path).unwrap());
    assert_eq!(one.get("k"), None);
    one.put("k", "j", 1, &question("Paris"), kept(Verdict::Correct)).unwrap();
    assert_eq!(other.get("k"), Some(kept(Verdict::Correct)), "what another has kept since is seen");
    other.put("k", "j", 1, &question("Paris"), kept(Verdict::Incorrect)).unwrap();
    assert_eq!(Cache::open(&path).unwrap().get("k"), Some(kept(Verdict::Correct)));
    assert_eq!(lines(&path)[0]["answer"], "Paris");
}

/// Fails if a line that a killed process left torn swallows the next one, or if damage is taken for a verdict.
#[test]
fn a_kill_in_mid_write_costs_one_line() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("verdicts.jsonl");
    Cache::open(&path).unwrap().put("whole", "j", 1, &question("a"), kept(Verdict::Correct)).unwrap();
    let line = fs::read(&path).unwrap();
    for cut in [1, line.len() / 2, line.len() - 1] {
        fs::write(&path, [&line[..], &line[..cut]].concat()).unwrap();
        let cache = Cache::open(&path).unwrap();
        cache.put("next", "j", 1, &question("b"), kept(Verdict::NotAttempted)).unwrap();
        let again = Cache::open(&path).unwrap();
        assert_eq!(again.get("next"), Some(kept(Verdict::NotAttempted)), "cut at {cut}");
        assert_eq!(again.get("whole"), Some(kept(Verdict::Correct)));
        // A line without its line end is whole otherwise.
        assert_eq!(again.damaged(), usize::from(cut < line.len() - 1));
    }
    let hostile = ["null", "[1]", "{\"key\": 5}", "{\"key\": \"x\", \"verdict\": \"perhaps\"}", "\u{0}", "{"];
    fs::write(&path, format!("{}\n\n", hostile.join("\n"))).unwrap();
    assert_eq!((Cache::open(&path).unwrap().damaged(), Cache::open(&path).unwrap().get("x")), (6, None));
    assert!(Cache::open(folder.path()).is_err(), "a folder is no file");
}

/// Writes verdicts into the cache that a variable names, as another process does; run by the test below only.
#[test]
fn child_that_writes() {
    let Some(path) = std::env::var_os("CANDOR_TEST_CACHE") else { return };
    let name = std::env::var("CANDOR_TEST_NAME").unwrap();
    let cache = Cache::open(path.as_ref()).unwrap();
    for number in 0..CHILD_LINES {
        let answer = "long ".repeat(number % 400);
        cache.put(&format!("{name} {number}"), "j", 1, &question(&answer), kept(Verdict::Correct)).unwrap();
    }
}

const CHILD_LINES: usize = 400;

fn child(path: &std::path::Path, name: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["judge_cache::child_that_writes", "--exact"]).stdout(Stdio::null());
    command.env("CANDOR_TEST_CACHE", path).env("CANDOR_TEST_NAME", name).spawn().unwrap()
}

/// Fails if two processes' lines mix, or if a killed one harms the other's.
#[test]
fn two_processes_write_whole_lines_and_one_may_be_killed() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("verdicts.jsonl");
    let mut writers: Vec<Child> = ["a", "b"].into_iter().map(|name| child(&path, name)).collect();
    let mut doomed = child(&path, "doomed");
    while !fs::read_to_string(&path).is_ok_and(|text| text.contains("doomed 3\"")) {
        thread::yield_now();
    }
    doomed.kill().unwrap();
    doomed.wait().unwrap();
    // As if it had been killed within a line, which it writes while it has the lock.
    let mut torn = OpenOptions::new().append(true).open(&path).unwrap();
    torn.lock().unwrap();
    torn.write_all(b"{\"key\": \"doomed").unwrap();
    drop(torn);
    assert!(writers.iter_mut().all(|writer| writer.wait().unwrap().success()));
    let cache = Cache::open(&path).unwrap();
    cache.put("last", "j", 1, &question("c"), kept(Verdict::Correct)).unwrap();
    let cache = Cache::open(&path).unwrap();
    for name in ["a", "b"] {
        assert!((0..CHILD_LINES).all(|number| cache.get(&format!("{name} {number}")).is_some()), "{name}");
    }
    assert!(cache.get("last").is_some() && cache.get("doomed 3").is_some());
    assert!(cache.damaged() <= 2, "{} damaged", cache.damaged());
}
