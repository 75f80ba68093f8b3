//! The sampler on servers: every completion exactly once, from the adapter that its group was admitted with, whatever servers
//! do; and nothing is believed that is not as asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::{Device, Tensor};
use candor::client::Patience;
use candor::config::Config;
use candor::policy::Adapter;
use candor::sampler::completions::Asked as Completion;
use candor::sampler::local::LocalSampler;
use candor::sampler::remote::{Limits, RemoteSampler};
use candor::sampler::{Generation, Interrupted, PolicyFeed, Request, Settings};
use candor_environments::Finish;
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::check;
use crate::judge_server::{Answer, Asked, Server, refuses, says, variable};
use crate::sampler::{all, request, settings};
use crate::sampling_server::{Tiny, answers, changed, endpoints, gone, honest, server};
use crate::toy::{self, within};

/// Waits that no test has to wait for.
fn short() -> Patience {
    let (backoff, cool_down) = (Duration::from_millis(2), Duration::from_millis(20));
    Patience { backoff, tries: 5, broken_after: 1, cool_down, give_up: Duration::from_millis(400) }
}

fn open(tiny: &Tiny, servers: &[&Server], folder: &Path, more: &str) -> Result<RemoteSampler> {
    let config: Config = toy::config(&endpoints(servers, folder, more));
    let architecture = &tiny.model.architecture;
    let limits = Limits { context: architecture.context, vocabulary: architecture.vocabulary };
    RemoteSampler::open(&config, limits, tiny.tokenizer.clone(), short(), &variable, &|_| {})
}

/// An adapter that does something else in every version.
fn adapter(tiny: &Tiny, version: u64) -> Arc<Adapter> {
    let lora = toy::config("").lora;
    let mut adapter = Adapter::initialize(&tiny.model.architecture, &lora, version, &Device::Cpu).unwrap();
    let moved = |(_, tensor): (String, Tensor)| (tensor + 0.01 * (version + 1) as f64).unwrap();
    let tensors = adapter.tensors().unwrap().into_iter().map(moved).collect();
    adapter.replace(tensors);
    Arc::new(adapter.publish(version))
}

fn requests() -> Vec<Request> {
    vec![request(0, 9, 4), request(1, 20, 3), request(2, 5, 5)]
}

fn tiny() -> Arc<Tiny> {
    Tiny::new(check::f32_kernel())
}

/// What a single honest server makes of the requests.
fn expected(tiny: &Arc<Tiny>, policy: &dyn PolicyFeed) -> Vec<Generation> {
    let folder = tempdir().unwrap();
    let mut sampler = open(tiny, &[&honest(tiny)], folder.path(), "").unwrap();
    all(&mut sampler, &requests(), policy, &settings(12, 1.0)).unwrap()
}

/// Catches ids, log-probabilities or ends that are not those of the model, an adapter that was not loaded, and random numbers
/// that two completions share.
#[test]
fn a_server_samples_what_the_model_here_would() {
    let (tiny, folder) = (tiny(), tempdir().unwrap());
    let server = honest(&tiny);
    let mut sampler = open(&tiny, &[&server], folder.path(), "").unwrap();
    let mut local = LocalSampler::new(tiny.model.clone(), tiny.tokenizer.clone());
    let mut seen = BTreeSet::new();
    for policy in [None, Some(adapter(&tiny, 3))] {
        let settings = Settings { stop: vec!["t".into(), "7".into()], ..settings(12, 0.0) };
        let greedy = all(&mut sampler, &requests(), &policy, &settings).unwrap();
        assert_eq!(greedy, all(&mut local, &requests(), &policy, &settings).unwrap());
        seen.insert(greedy[0].ids.clone());
    }
    assert_eq!(seen.len(), 2, "the adapter changes what is sampled");
    let drawn = expected(&tiny, &None);
    let seeds: BTreeSet<u64> = server.asked().iter().filter_map(|asked| asked.body["seed"].as_u64()).collect();
    assert_eq!(seeds.len(), 12, "a seed for each completion, the same for both adapters");
    assert_eq!(drawn, expected(&tiny, &None));
    assert_ne!(drawn[0].ids, drawn[1].ids);
    assert!(drawn.iter().any(|one| one.finish == Finish::Length) && drawn.iter().all(|one| one.version == 0));
}

/// Catches what SGLang would not understand, as far as its source says: other calls for adapters, and their names as models.
#[test]
fn adapters_reach_a_server_that_is_sglang() {
    let (tiny, folder) = (tiny(), tempdir().unwrap());
    let policy = Some(adapter(&tiny, 2));
    let want = expected(&tiny, &policy);
    tiny.sglang.store(true, Ordering::SeqCst);
    let server = honest(&tiny);
    let mut sampler = open(&tiny, &[&server], folder.path(), "").unwrap();
    assert!(all(&mut sampler, &requests(), &policy, &settings(12, 1.0)).unwrap() == want);
    drop(sampler);
    assert_eq!(tiny.log.lock().unwrap().len(), 4, "loaded and unloaded, here and for what was expected");
}

/// A policy that is another version each time it is asked for.
struct Moving<'a> {
    tiny: &'a Tiny,
    version: AtomicU64,
}

impl PolicyFeed for Moving<'_> {
    fn newest(&self) -> Option<Arc<Adapter>> {
        Some(adapter(self.tiny, self.version.fetch_add(1, Ordering::SeqCst)))
    }

    fn stopped(&self) -> bool {
        false
    }
}

/// Catches a group whose completions come from two adapters, an adapter that is unloaded or removed while it is in use, and
/// one that never is.
#[test]
fn a_group_keeps_its_adapter_and_old_ones_are_forgotten() {
    let (tiny, folder) = (tiny(), tempdir().unwrap());
    let server = honest(&tiny);
    let mut sampler = open(&tiny, &[&server], folder.path(), ", concurrency = 3").unwrap();
    let policy = Moving { tiny: &tiny, version: AtomicU64::new(5) };
    let requests: Vec<Request> = (0..6).map(|number| request(number, 9, 4)).collect();
    let generations = all(&mut sampler, &requests, &policy, &settings(12, 0.0)).unwrap();
    let versions: Vec<u64> = generations.iter().map(|generation| generation.version).collect();
    assert_eq!(versions, (0..24).map(|index| 5 + index / 4).collect::<Vec<u64>>());
    let mut local = LocalSampler::new(tiny.model.clone(), tiny.tokenizer.clone());
    for (group, request) in requests.iter().enumerate() {
        let policy = Some(adapter(&tiny, 5 + group as u64));
        let want = all(&mut local, std::slice::from_ref(request), &policy, &settings(12, 0.0)).unwrap();
        let got = generations.iter().filter(|one| one.group == group);
        assert!(got.zip(&want).all(|(got, want)| got.ids == want.ids && got.behavior_t == want.behavior_t));
    }
    let mut models: BTreeMap<String, usize> = BTreeMap::new();
    for asked in server.asked().iter().filter(|asked| asked.path == "/v1/completions") {
        *models.entry(asked.body["model"].as_str().unwrap().to_string()).or_default() += 1;
    }
    assert_eq!(models.values().copied().collect::<Vec<_>>(), [4; 6]);
    assert!(server.seen.most_in_flight.load(Ordering::SeqCst) <= 4, "three completions and one word about adapters");
    drop(sampler);
    let log = tiny.log.lock().unwrap().clone();
    let names = |sign: char| log.iter().filter_map(move |line| line.strip_prefix(sign)).map(String::from).collect();
    let (loaded, unloaded): (BTreeSet<String>, BTreeSet<String>) = (names('+'), names('-'));
    assert_eq!((loaded.len(), &loaded), (6, &unloaded), "{log:?}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "no adapter is left behind");
}

/// What a server may do to one request.
type Fault = (&'static str, fn(&Tiny, &Asked) -> Answer);

fn completion(asked: &Asked, tiny: &Tiny, change: impl Fn(&mut Value)) -> Answer {
    changed(tiny, asked, change)
}

const FAULTS: [Fault; 17] = [
    ("truncated", |_, _| Answer { body: b"{\"choices\": [{\"text\"".to_vec(), ..says("") }),
    ("cut", |tiny, asked| Answer { cut: Some(40), ..tiny.answer(asked) }),
    ("closed", |tiny, asked| Answer { cut: Some(0), ..tiny.answer(asked) }),
    ("no token_ids", |tiny, asked| completion(asked, tiny, |choice| choice["token_ids"] = Value::Null)),
    ("log-probabilities for", |tiny, asked| {
        completion(asked, tiny, |choice| drop(choice["logprobs"]["token_logprobs"].as_array_mut().unwrap().pop()))
    }),
    ("no logprobs", |tiny, asked| completion(asked, tiny, |choice| choice["logprobs"] = Value::Null)),
    ("is missing", |tiny, asked| {
        completion(asked, tiny, |choice| choice["logprobs"]["token_logprobs"][0] = Value::Null)
    }),
    ("not a completion", |tiny, asked| {
        let text = String::from_utf8(tiny.answer(asked).body).unwrap();
        Answer { body: text.replace("token_logprobs\":[", "token_logprobs\":[NaN,").into_bytes(), ..says("") }
    }),
    ("of token 0 is 0.5", |tiny, asked| {
        completion(asked, tiny, |choice| choice["logprobs"]["token_logprobs"][0] = json!(0.5))
    }),
    ("of token 0 is -9999", |tiny, asked| {
        completion(asked, tiny, |choice| choice["logprobs"]["token_logprobs"][0] = json!(-9999.0))
    }),
    ("outside the vocabulary", |tiny, asked| completion(asked, tiny, |choice| choice["token_ids"][0] = json!(320))),
    ("another prompt", |tiny, asked| {
        completion(asked, tiny, |choice| choice["prompt_token_ids"].as_array_mut().unwrap().insert(0, json!(1)))
    }),
    ("the server answered 500", |_, _| refuses(500, "out of memory")),
    ("the server answered 429", |_, _| Answer {
        headers: vec![("Retry-After", "0.01".into())],
        ..refuses(429, "busy")
    }),
    ("a reply of more than", |_, _| Answer { body: vec![b' '; 1 << 20], ..says("") }),
    ("by its tokens it", |tiny, asked| {
        completion(asked, tiny, |choice| {
            choice["finish_reason"] = json!(if choice["finish_reason"] == "stop" { "length" } else { "stop" });
        })
    }),
    ("the finish reason is \"abort\"", |tiny, asked| {
        completion(asked, tiny, |choice| choice["finish_reason"] = json!("abort"))
    }),
];

/// Catches a completion that is lost, doubled or believed though something was wrong with it, and a request for it that is
/// another one than the first.
#[test]
fn whatever_a_server_does_once_is_asked_again() {
    let tiny = tiny();
    let policy = Some(adapter(&tiny, 2));
    let want = expected(&tiny, &policy);
    for (name, fault) in FAULTS {
        let (behind, folder) = (tiny.clone(), tempdir().unwrap());
        let server = server(&tiny, move |number, asked| (number % 5 == 2).then(|| fault(&behind, asked)));
        let mut sampler = open(&tiny, &[&server], folder.path(), ", concurrency = 4").unwrap();
        let got = all(&mut sampler, &requests(), &policy, &settings(12, 1.0))
            .unwrap_or_else(|error| panic!("{name}: {error:#}"));
        assert!(got == want, "{name}");
    }
}

/// Catches a request without end, and an error that does not say which server did what.
#[test]
fn whatever_a_server_does_always_ends_the_sampling_with_its_words() {
    for (name, fault) in FAULTS {
        let error = within(300, move || {
            let (tiny, folder) = (tiny(), tempdir().unwrap());
            let behind = tiny.clone();
            let server = server(&tiny, move |_, asked| Some(fault(&behind, asked)));
            let mut sampler = open(&tiny, &[&server], folder.path(), "").unwrap();
            let error = all(&mut sampler, &requests(), &None, &settings(12, 1.0)).unwrap_err();
            format!("{error:#}").replace(&server.address, "HERE")
        });
        // How a connection ends is told in the words of the system.
        let said = match name {
            "truncated" => "EOF",
            "closed" => "cut",
            name => name,
        };
        assert!(error.contains(said) && error.contains("HERE"), "{name}: {error}");
    }
}

/// What will not be other the next time is not asked again.
#[test]
fn a_refusal_ends_the_sampling_at_once() {
    let (tiny, folder) = (tiny(), tempdir().unwrap());
    let server = server(&tiny, |_, _| Some(refuses(400, "max_tokens is too large")));
    let mut sampler = open(&tiny, &[&server], folder.path(), ", concurrency = 1").unwrap();
    let error = all(&mut sampler, &requests(), &None, &settings(12, 1.0)).unwrap_err();
    assert!(format!("{error:#}").contains("400: max_tokens is too large"), "{error:#}");
    assert_eq!(server.asked().iter().filter(|asked| asked.path == "/v1/completions").count(), 1);
}

/// Two servers, of which one dies, hangs or loses its adapters in the middle of a batch.
#[test]
fn what_one_server_does_not_give_another_does_and_nothing_comes_twice() {
    let tiny = tiny();
    let policy = Some(adapter(&tiny, 2));
    let want = expected(&tiny, &policy);
    let dies = |number: usize, _: &Asked| (number >= 2).then(|| Answer { cut: Some(0), ..says("") });
    let hangs = |number: usize, _: &Asked| (number == 1).then(|| Answer { delay: Duration::from_secs(30), ..says("") });
    for (name, odd) in [("dies", dies as fn(usize, &Asked) -> Option<Answer>), ("hangs", hangs)] {
        let folder = tempdir().unwrap();
        let (bad, good) = (server(&tiny, odd), honest(&tiny));
        let more = ", concurrency = 2, timeout_seconds = 1";
        let mut sampler = open(&tiny, &[&bad, &good], folder.path(), more).unwrap();
        let got = all(&mut sampler, &requests(), &policy, &settings(12, 1.0)).unwrap();
        assert!(got == want, "{name}");
    }
}

/// Catches requests for an adapter that a server forgot when it was started anew.
#[test]
fn a_server_that_was_started_anew_is_given_its_adapter_again() {
    let (tiny, folder) = (tiny(), tempdir().unwrap());
    let policy = Some(adapter(&tiny, 2));
    let want = expected(&tiny, &policy);
    let behind = tiny.clone();
    let server = server(&tiny, move |number, _| {
        if number == 5 {
            behind.forget();
        }
        None
    });
    let mut sampler = open(&tiny, &[&server], folder.path(), ", concurrency = 2").unwrap();
    assert!(all(&mut sampler, &requests(), &policy, &settings(12, 1.0)).unwrap() == want);
}

/// Catches a wait without end where nobody is left to ask.
#[test]
fn when_no_server_is_left_each_is_named_with_its_last_words() {
    let error = within(30, || {
        let (tiny, folder) = (tiny(), tempdir().unwrap());
        let down = Arc::new(AtomicBool::new(false));
        let servers = [500, 503].map(|status| {
            let (tiny, down) = (tiny.clone(), down.clone());
            Server::new(move |_, asked| match down.load(Ordering::SeqCst) {
                true => refuses(status, "gone"),
                false => tiny.answer(asked),
            })
        });
        let mut sampler = open(&tiny, &[&servers[0], &servers[1]], folder.path(), "").unwrap();
        down.store(true, Ordering::SeqCst);
        let error = all(&mut sampler, &requests(), &None, &settings(12, 1.0)).unwrap_err();
        format!("{error:#}").replace(&servers[0].address, "FIRST").replace(&servers[1].address, "SECOND")
    });
    for part in
        ["no server has sampled for 0.4 s", "FIRST: the server answered 500: gone", "SECOND: the server answered 503"]
    {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn servers_that_are_not_there_or_have_another_model_are_refused_at_the_start() {
    let (tiny, folder) = (tiny(), tempdir().unwrap());
    let error = |server: &Server| match open(&tiny, &[server], folder.path(), "") {
        Ok(_) => panic!("it starts"),
        Err(error) => format!("{error:#}"),
    };
    assert!(error(&gone()).contains("http://127.0.0.1:9/v1 cannot sample"));
    let other = Server::new(|_, _| answers(&json!({"data": [{"id": "gpt-5"}]})));
    let said = error(&other);
    assert!(said.contains("no model \"tiny\"") && said.contains("gpt-5"), "{said}");
    let none = Server::new(|_, _| answers(&json!({"error": "what?"})));
    assert!(error(&none).contains("no list of models"));
    let locked = Server::new(|_, _| refuses(401, "who are you?"));
    assert!(error(&locked).contains("401: who are you?"));
}

/// Asks to stop after a while.
struct Impatient(Instant);

impl PolicyFeed for Impatient {
    fn newest(&self) -> Option<Arc<Adapter>> {
        None
    }

    fn stopped(&self) -> bool {
        self.0.elapsed() > Duration::from_millis(300)
    }
}

/// Catches a stop that waits for what hangs.
#[test]
fn a_stop_is_heard_while_servers_are_silent() {
    let (tiny, folder) = (tiny(), tempdir().unwrap());
    let server = server(&tiny, |_, _| Some(Answer { delay: Duration::from_secs(60), ..says("") }));
    let mut sampler = open(&tiny, &[&server], folder.path(), "").unwrap();
    let began = Instant::now();
    let error = all(&mut sampler, &requests(), &Impatient(began), &settings(12, 1.0)).unwrap_err();
    assert!(error.is::<Interrupted>() && began.elapsed() < Duration::from_secs(20), "{error:#}");
}

/// Catches groups that are admitted one by one though servers have room for all.
#[test]
fn all_groups_are_asked_for_while_there_is_room() {
    let (tiny, folder) = (tiny(), tempdir().unwrap());
    let slow = tiny.clone();
    let server =
        server(&tiny, move |_, asked| Some(Answer { delay: Duration::from_millis(500), ..slow.answer(asked) }));
    let mut sampler = open(&tiny, &[&server], folder.path(), ", concurrency = 100").unwrap();
    let requests: Vec<Request> = (0..20).map(|number| request(number, 9, 2)).collect();
    all(&mut sampler, &requests, &None, &settings(2, 1.0)).unwrap();
    assert_eq!(server.seen.most_in_flight.load(Ordering::SeqCst), 40);
}

/// The key is shown to its server and to nobody else.
#[test]
fn a_key_is_sent_and_in_no_message() {
    let (tiny, folder) = (tiny(), tempdir().unwrap());
    let server = server(&tiny, |_, _| Some(refuses(400, "bad key sk-of-the-test")));
    let key = ", key_variable = \"CANDOR_TEST_JUDGE_KEY\"";
    let mut sampler = open(&tiny, &[&server], folder.path(), key).unwrap();
    let error = format!("{:#}", all(&mut sampler, &requests(), &None, &settings(12, 1.0)).unwrap_err());
    assert!(error.contains("bad key …") && !error.contains("sk-of"), "{error}");
    assert!(server.asked().iter().all(|asked| asked.authorization.as_deref() == Some("Bearer sk-of-the-test")));
}

/// Catches a server whose ids mean something else than here, and one that is refused for its spaces alone.
#[test]
fn a_server_with_another_tokenizer_is_found_out() {
    let tiny = tiny_for_replies();
    let Tiny { model, tokenizer, .. } = &**tiny;
    let ids = tokenizer.encode("say it").unwrap();
    let (request, settings) = (request(0, 9, 1), settings(ids.len(), 1.0));
    let vocabulary = model.architecture.vocabulary;
    let asked = Completion { request: &request, settings: &settings, tokenizer, vocabulary };
    let read = |text: &str| {
        let logprobs = json!({"token_logprobs": vec![-0.5; ids.len()]});
        let choice = json!({"text": text, "finish_reason": "length", "token_ids": ids, "logprobs": logprobs});
        asked.read(json!({"choices": [choice]}).to_string().as_bytes())
    };
    assert_eq!(read(" say it").unwrap().ids, ids);
    assert!(read("says it").unwrap_err().to_string().contains("the two are not the same"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Of a reply that is changed anywhere either nothing is believed, or nothing that matters was changed: no panic, and no token
    /// without its log-probability.
    #[test]
    fn no_reply_is_believed_by_half(place in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
        let tiny = tiny_for_replies();
        let (request, settings) = (request(0, 9, 1), settings(12, 1.0));
        let Tiny { model, tokenizer, .. } = &**tiny;
        let asked = Completion { request: &request, settings: &settings, tokenizer, vocabulary: model.architecture.vocabulary };
        let body = asked.body("tiny", (0, 0));
        let sent = Asked { path: "/v1/completions".into(), authorization: None, body, at: Instant::now() };
        let honest = tiny.answer(&sent).body;
        let want = asked.read(&honest).unwrap();
        let mut bytes = honest;
        let place = place.index(bytes.len());
        if cut { bytes.truncate(place) } else { bytes[place] = byte }
        if let Ok(got) = asked.read(&bytes) {
            prop_assert_eq!(got.ids.len(), got.logprobs_t.len());
            prop_assert!(got.logprobs_t.iter().all(|logprob| logprob.is_finite() && *logprob <= 1e-5));
            prop_assert_eq!(got.finish, want.finish);
        }
    }
}

/// One model for all cases.
fn tiny_for_replies() -> &'static Arc<Tiny> {
    static TINY: std::sync::OnceLock<Arc<Tiny>> = std::sync::OnceLock::new();
    TINY.get_or_init(tiny)
}
