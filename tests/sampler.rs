//! The local sampler and its store of rows, on the tiny models: transformers' greedy continuations, log-probabilities that
//! are the learner's to the last bit, and completions that do not depend on what else is being sampled.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, bail};
use candor::learner::completion_logprobs;
use candor::learner::tree::{Branch, Tree};
use candor::model::{Architecture, KeyValueStore, Model};
use candor::ops::kernel::Kernel;
use candor::ops::keys::BLOCK;
use candor::policy::Adapter;
use candor::sampler::local::LocalSampler;
use candor::sampler::{Generation, Interrupted, PolicyFeed, Request, Sampler, Settings};
use candor::tokenizer::Tokenizer;
use candor_environments::Finish;
use proptest::prelude::*;

use crate::check;
use crate::model::{adapter, tiny_models, values};

/// A tiny model with its tokenizer, a sampler over both, and an adapter that does something.
struct Tiny {
    model: Arc<Model>,
    tokenizer: Arc<Tokenizer>,
    sampler: LocalSampler,
    adapter: Adapter,
}

fn open(folder: &Path, kernel: Kernel) -> Tiny {
    let model = Arc::new(Model::open(folder, kernel).unwrap());
    let tokenizer = Arc::new(Tokenizer::from_folder(folder).unwrap());
    let sampler = LocalSampler::new(model.clone(), tokenizer.clone());
    let (adapter, _) = adapter(&model, &folder.join("adapter_lora"));
    Tiny { model, tokenizer, sampler, adapter }
}

fn tiny() -> Option<Tiny> {
    Some(open(&check::golden("tiny/llama")?, check::f32_kernel()))
}

pub fn settings(max_tokens: usize, temperature: f64) -> Settings {
    Settings { max_tokens, temperature, stop: Vec::new(), seed: 7, step: 3 }
}

/// A prompt of its own for every `number`.
pub fn request(number: usize, length: usize, rollouts: usize) -> Request {
    Request {
        name: format!("group {number}"),
        prompt_ids: (0..length).map(|i| ((number * 53 + i * 37) % 300 + 4) as u32).collect(),
        rollouts,
    }
}

/// Samples, and sorts what was handed over by group and rollout.
pub fn all(
    sampler: &mut dyn Sampler,
    requests: &[Request],
    policy: &dyn PolicyFeed,
    settings: &Settings,
) -> Result<Vec<Generation>> {
    let mut all = Vec::new();
    let mut keep = |generation| {
        all.push(generation);
        Ok(())
    };
    sampler.sample(requests, policy, settings, &mut keep)?;
    all.sort_by_key(|generation| (generation.group, generation.rollout));
    Ok(all)
}

/// The same with one policy, and nothing that goes wrong.
pub fn sample(
    sampler: &mut LocalSampler,
    requests: &[Request],
    adapter: Option<&Adapter>,
    settings: &Settings,
) -> Vec<Generation> {
    all(sampler, requests, &adapter.cloned().map(Arc::new), settings).unwrap()
}

/// Every rollout of every request was handed over exactly once.
#[track_caller]
fn assert_complete(generations: &[Generation], requests: &[Request]) {
    let got: Vec<(usize, usize)> =
        generations.iter().map(|generation| (generation.group, generation.rollout)).collect();
    let rollouts = |(group, request): (usize, &Request)| (0..request.rollouts).map(move |rollout| (group, rollout));
    assert_eq!(got, requests.iter().enumerate().flat_map(rollouts).collect::<Vec<_>>());
}

/// Equal tokens and ends, and log-probabilities to the last bit, or up to rounding where that changes with the number of rows of
/// a call.
#[track_caller]
fn assert_same(name: &str, kernel: Kernel, got: &Generation, want: &Generation) {
    assert_eq!((&got.ids, got.finish), (&want.ids, want.finish), "{name}");
    let tolerance = if kernel.row_invariant() { 0.0 } else { 1e-5 };
    for (got, want) in [(&got.behavior_t, &want.behavior_t), (&got.untempered_t, &want.untempered_t)] {
        check::all_close(name, &floats(got), &floats(want), tolerance);
    }
}

fn floats(logprobs_t: &[f32]) -> Vec<f64> {
    logprobs_t.iter().copied().map(f64::from).collect()
}

#[test]
fn golden_greedy_continuations() {
    for folder in tiny_models() {
        let Tiny { tokenizer, mut sampler, .. } = open(&folder, check::f32_kernel());
        let golden = &check::json(&folder.join("golden.json"))["greedy"];
        let tokens = |name: &str| check::floats(&golden[name]).into_iter().map(|id| id as u32).collect::<Vec<_>>();
        let (ids, margins, logprobs) =
            (tokens("ids"), check::floats(&golden["margin"]), check::floats(&golden["logprobs"]));
        // The golden run went on after an end token, and a tie may be broken either way: compare up to there.
        let end = ids.iter().position(|id| tokenizer.end_tokens().contains(id)).map_or(ids.len(), |end| end + 1);
        let sure = margins.iter().position(|margin| *margin <= 1e-3).unwrap_or(ids.len()).min(end);
        assert!(sure > 5, "{}: only {sure} golden tokens can be compared", folder.display());
        let request = Request { name: "golden".into(), prompt_ids: tokens("prompt_ids"), rollouts: 2 };
        for generation in sample(&mut sampler, &[request], None, &settings(ids.len(), 0.0)) {
            assert_eq!(generation.ids[..sure], ids[..sure], "{}", folder.display());
            for logprobs_t in [&generation.behavior_t, &generation.untempered_t] {
                check::all_close(&folder.display().to_string(), &floats(&logprobs_t[..sure]), &logprobs[..sure], 1e-4);
            }
        }
    }
}

/// Random numbers are functions of (seed, step, group, rollout, position), and rows of a call do not see each other.
#[test]
fn a_completion_does_not_depend_on_what_else_is_sampled() {
    let Some(folder) = check::golden("tiny/llama") else { return };
    for kernel in check::kernels() {
        let Tiny { mut sampler, adapter, .. } = open(&folder, kernel);
        let requests = [request(0, 9, 5), request(1, 1, 3), request(2, 70, 4)];
        let settings = settings(24, 0.9);
        let together = sample(&mut sampler, &requests, Some(&adapter), &settings);
        assert_complete(&together, &requests);
        let compare = |name: &str, got: &[Generation]| {
            let known = |got: &&Generation| requests[got.group].rollouts > got.rollout;
            for got in got.iter().filter(known) {
                let want = together.iter().find(|want| (want.group, want.rollout) == (got.group, got.rollout)).unwrap();
                assert_same(
                    &format!("{kernel:?}, {name}, group {}, rollout {}", got.group, got.rollout),
                    kernel,
                    got,
                    want,
                );
            }
        };
        compare("again", &sample(&mut sampler, &requests, Some(&adapter), &settings));
        compare("alone", &sample(&mut sampler, &requests[..1], Some(&adapter), &settings));
        let other_counts: Vec<Request> =
            requests.iter().zip([1, 6, 2]).map(|(r, rollouts)| Request { rollouts, ..r.clone() }).collect();
        compare("other rollout counts", &sample(&mut sampler, &other_counts, Some(&adapter), &settings));
        // The last group keeps its place, but the prompts before it are others.
        let other = [request(8, 2, 1), request(9, 33, 2), requests[2].clone()];
        let last: Vec<Generation> = sample(&mut sampler, &other, Some(&adapter), &settings).split_off(3);
        compare("other prompts", &last);
    }
}

#[test]
fn every_counter_of_the_random_numbers_matters() {
    let Some(Tiny { mut sampler, .. }) = tiny() else { return };
    let same_prompt = [request(0, 9, 4), request(0, 9, 4)];
    let base = settings(16, 1.0);
    let mut texts = BTreeSet::new();
    for settings in [base.clone(), Settings { seed: 8, ..base.clone() }, Settings { step: 4, ..base.clone() }] {
        let generations = sample(&mut sampler, &same_prompt, None, &settings);
        texts.extend(generations.into_iter().map(|generation| generation.ids));
    }
    assert_eq!(texts.len(), 3 * 8, "two of the completions are the same");
}

/// Samples, and computes the log-probability of every token again as the learner does: in other batches, over trees. They must
/// be the same to the last bit, unless the kernel promises less.
#[track_caller]
pub fn assert_learner_agrees(
    model: &Model,
    sampler: &mut LocalSampler,
    requests: &[Request],
    adapter: Option<&Adapter>,
    temperature: f64,
) {
    let generations = sample(sampler, requests, adapter, &settings(33, temperature));
    assert_complete(&generations, requests);
    let mut trees: Vec<Tree> = requests
        .iter()
        .map(|request| Tree {
            name: request.name.clone(),
            prompt_ids: request.prompt_ids.clone(),
            branches: Vec::new(),
        })
        .collect();
    for Generation { group, ids, .. } in &generations {
        trees[*group].branches.push(Branch::demonstration(ids.clone()));
    }
    let (exact, name) = (model.kernel.row_invariant(), format!("{:?}, temperature {temperature}", model.kernel));
    let behavior = completion_logprobs(model, adapter, &trees, 128, temperature).unwrap();
    let untempered = completion_logprobs(model, adapter, &trees, 1024, 1.0).unwrap();
    for (generation, (behavior, untempered)) in generations.iter().zip(behavior.iter().zip(&untempered)) {
        check::all_close(&name, &floats(&generation.behavior_t), behavior, if exact { 0.0 } else { 1e-4 });
        check::all_close(&name, &floats(&generation.untempered_t), untempered, if exact { 0.0 } else { 1e-4 });
    }
}

/// What makes the policy gradient right: the learner recomputes the log-probabilities that the tokens were drawn with, and the
/// first step's ratios are 1 and not only near it.
#[test]
fn the_learner_recomputes_the_sampled_log_probabilities() {
    for (folder, kernel) in tiny_models()
        .into_iter()
        .flat_map(|folder| check::kernels().into_iter().map(move |kernel| (folder.clone(), kernel)))
    {
        let Tiny { model, mut sampler, adapter, .. } = open(&folder, kernel);
        // What an adapter adds must be the same bits too, and it must be there to be compared.
        assert!(adapter.tensors().unwrap().iter().all(|(_, tensor)| values(tensor).iter().any(|x| *x != 0.0)));
        // More tokens than one call reads prompts of, and more completions than a call of the learner has room for.
        let requests = [request(0, 9, 4), request(1, 40, 3), request(2, 1, 2), request(3, 70, 5), request(4, 33, 1)];
        for (adapter, temperature) in [(None, 1.0), (Some(&adapter), 1.0), (Some(&adapter), 0.7), (Some(&adapter), 1.3)]
        {
            assert_learner_agrees(&model, &mut sampler, &requests, adapter, temperature);
        }
    }
}

#[test]
fn completions_end_at_end_tokens_or_at_the_limit() {
    let Some(Tiny { tokenizer, mut sampler, .. }) = tiny() else { return };
    let requests = [request(0, 9, 60), request(1, 3, 60)];
    let generations = sample(&mut sampler, &requests, None, &settings(30, 1.5));
    let (mut stopped, mut cut) = (0, 0);
    for Generation { ids, behavior_t, untempered_t, finish, .. } in &generations {
        assert_eq!((behavior_t.len(), untempered_t.len()), (ids.len(), ids.len()));
        let (last, before) = ids.split_last().unwrap();
        assert!(before.iter().all(|id| !tokenizer.end_tokens().contains(id)), "went on after an end token: {ids:?}");
        if tokenizer.end_tokens().contains(last) {
            assert_eq!(*finish, Finish::Stop);
            stopped += 1;
        } else {
            assert_eq!((*finish, ids.len()), (Finish::Length, 30));
            cut += 1;
        }
    }
    // 3600 draws from a vocabulary of 320, almost uniform.
    assert!(stopped >= 3 && cut >= 3, "{stopped} stopped and {cut} cut: this test saw only one kind");
}

#[test]
fn a_stop_string_ends_a_completion_with_the_token_that_completes_it() {
    let Some(Tiny { tokenizer, mut sampler, .. }) = tiny() else { return };
    let requests = [request(0, 9, 8)];
    let free = sample(&mut sampler, &requests, None, &settings(30, 1.0));
    // What the first rollout says around its tenth token, across token boundaries.
    let middle = tokenizer.decode(&free[0].ids[8..12]);
    let settings = Settings { stop: vec!["never said".into(), middle.clone()], ..settings(30, 1.0) };
    let mut ended = 0;
    for (free, got) in free.iter().zip(sample(&mut sampler, &requests, None, &settings)) {
        let contains = |length: &usize| tokenizer.decode(&free.ids[..*length]).contains(&middle);
        match (1..=free.ids.len()).find(contains) {
            Some(length) => {
                assert_eq!((got.ids.as_slice(), got.finish), (&free.ids[..length], Finish::Stop));
                ended += 1;
            }
            None => assert_same("without the stop string", check::f32_kernel(), &got, free),
        }
    }
    assert!(ended >= 1 && middle.chars().count() > 1, "{middle:?} ended {ended} completions");
}

#[test]
fn an_error_of_the_callback_ends_the_sampling_and_nothing_else() {
    let Some(Tiny { mut sampler, .. }) = tiny() else { return };
    let requests = [request(0, 9, 3), request(1, 5, 3)];
    let want = sample(&mut sampler, &requests, None, &settings(8, 1.0));
    let mut calls = 0;
    let mut fail = |_| -> Result<()> {
        calls += 1;
        if calls == 2 { bail!("the disk is full") } else { Ok(()) }
    };
    let error = sampler.sample(&requests, &None, &settings(8, 1.0), &mut fail).unwrap_err();
    assert_eq!((error.to_string().as_str(), calls), ("the disk is full", 2));
    let after = sample(&mut sampler, &requests, None, &settings(8, 1.0));
    assert_complete(&after, &requests);
    after.iter().zip(&want).for_each(|(after, want)| assert_same("after the error", check::f32_kernel(), after, want));
}

/// Publishes another version whenever it is asked for the newest, and wants to stop at the `stops_at`th question whether to.
struct Changing {
    versions: Vec<Arc<Adapter>>,
    admitted: AtomicUsize,
    asked: AtomicUsize,
    stops_at: usize,
}

impl Changing {
    /// The adapter several times as strong, then twice, three times as strong.
    fn new(adapter: &Adapter, versions: u64, stops_at: usize) -> Self {
        let scaled = |version: u64| {
            let mut scaled = adapter.publish(version);
            let tensors =
                adapter.tensors().unwrap().into_iter().map(|(_, tensor)| (tensor * (0.5 * version as f64)).unwrap());
            scaled.replace(tensors.collect());
            Arc::new(scaled)
        };
        let (admitted, asked) = Default::default();
        Self { versions: (1..=versions).map(scaled).collect(), admitted, asked, stops_at }
    }
}

impl PolicyFeed for Changing {
    fn newest(&self) -> Option<Arc<Adapter>> {
        Some(self.versions[self.admitted.fetch_add(1, Ordering::Relaxed) % self.versions.len()].clone())
    }

    fn stopped(&self) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed) >= self.stops_at
    }
}

/// Catches rows of one call that see another group's adapter, a group that changes its policy on the way, and a version that is
/// not the one that sampled.
#[test]
fn a_group_keeps_the_version_that_was_the_newest_when_it_was_admitted() {
    let Some(folder) = check::golden("tiny/llama") else { return };
    for kernel in check::kernels() {
        let Tiny { model, mut sampler, adapter, .. } = open(&folder, kernel);
        let policy = Changing::new(&adapter, 3, usize::MAX);
        // About four of these groups have room at once, so the others come in as completions end.
        let requests: Vec<Request> = (0..9).map(|group| request(group, 5 + group, 40)).collect();
        let generations = all(&mut sampler, &requests, &policy, &settings(90, 1.5)).unwrap();
        assert_complete(&generations, &requests);
        for (group, request) in requests.iter().enumerate() {
            let of_group: Vec<&Generation> = generations.iter().filter(|one| one.group == group).collect();
            let adapter = &policy.versions[group % 3];
            assert!(of_group.iter().all(|one| one.version == adapter.version), "group {group}");
            let branches = of_group.iter().map(|one| Branch::demonstration(one.ids.clone())).collect();
            let tree = Tree { name: request.name.clone(), prompt_ids: request.prompt_ids.clone(), branches };
            let learner = completion_logprobs(&model, Some(adapter), &[tree], 8192, 1.5).unwrap();
            for (one, learner) in of_group.iter().zip(&learner) {
                let tolerance = if kernel.row_invariant() { 0.0 } else { 1e-4 };
                check::all_close(&format!("{kernel:?}"), &floats(&one.behavior_t), learner, tolerance);
            }
        }
    }
}

/// Catches a sampler that goes on to the end of its completions, or that is of no use afterwards.
#[test]
fn a_sampler_stops_at_the_next_token_and_can_be_asked_again() {
    let Some(Tiny { mut sampler, adapter, .. }) = tiny() else { return };
    let requests = [request(0, 9, 3), request(1, 5, 3)];
    for stops_at in [0, 1, 5] {
        let policy = Changing::new(&adapter, 1, stops_at);
        let mut never = |_| -> Result<()> { panic!("no completion is so short") };
        let error = sampler.sample(&requests, &policy, &settings(50, 0.01), &mut never).unwrap_err();
        assert!(error.is::<Interrupted>(), "{error:#}");
        assert_eq!(policy.asked.into_inner(), stops_at + 1);
    }
    assert_complete(&sample(&mut sampler, &requests, None, &settings(8, 1.0)), &requests);
}

#[test]
fn requests_that_cannot_be_sampled_are_named() {
    let Some(Tiny { mut sampler, model, .. }) = tiny() else { return };
    let context = model.architecture.context;
    let mut error = |bad: Request| {
        let mut never = |_| -> Result<()> { panic!("nothing was to be sampled") };
        sampler.sample(&[request(0, 9, 1), bad], &None, &settings(8, 1.0), &mut never).unwrap_err().to_string()
    };
    let message = error(request(1, context - 7, 1));
    assert!(message.contains("group 1") && message.contains(&context.to_string()), "{message}");
    assert!(error(request(1, 0, 1)).contains("group 1"));
    assert!(error(request(1, 9, 0)).contains("group 1"));
    let broken =
        Request { name: "broken".into(), prompt_ids: vec![5, model.architecture.vocabulary as u32], rollouts: 1 };
    assert!(error(broken).contains("outside the model's vocabulary"));
    // The longest that fits is sampled to its last position.
    let longest = sample(&mut sampler, &[request(1, context - 8, 2)], None, &settings(8, 0.0));
    assert_eq!(longest.len(), 2);
}

#[test]
fn nothing_is_asked_and_nothing_is_sampled() {
    let Some(Tiny { mut sampler, .. }) = tiny() else { return };
    assert!(sample(&mut sampler, &[], None, &settings(8, 1.0)).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// A group reserves its rows for the longest completions; 40 groups of up to 12 · 200 rows are several times what the
    /// store holds, and rare groups are larger than it would be. Stop strings end most completions after a few tokens, in an order that no one foresees.
    #[test]
    fn more_groups_than_the_store_holds_all_finish(
        shapes in prop::collection::vec((1usize..50, prop_oneof![19 => 1usize..12, 1 => 90usize..100]), 1..40),
        max_tokens in prop_oneof![1usize..4, 100usize..200],
        seed in any::<u64>(),
    ) {
        let Some(Tiny { mut sampler, .. }) = tiny() else { return Ok(()) };
        let requests: Vec<Request> = shapes.iter().enumerate().map(|(number, &(length, rollouts))| request(number, length, rollouts)).collect();
        let stop = ["a", "e", "i", "o", "s", "t", "r", "n", " ", "\u{fffd}"].map(String::from).to_vec();
        let settings = Settings { stop, seed, ..settings(max_tokens, 1.0) };
        let generations = sample(&mut sampler, &requests, None, &settings);
        assert_complete(&generations, &requests);
        prop_assert!(generations.iter().all(|generation| (1..=max_tokens).contains(&generation.ids.len())));
        // The store was left as it was found: all of it can be used again.
        let again = sample(&mut sampler, &requests, None, &settings);
        prop_assert!(generations.iter().zip(&again).all(|(first, again)| first.ids == again.ids));
    }
}

fn store(rows: usize) -> KeyValueStore {
    let config = check::json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/tiny/llama/config.json"));
    let architecture = Architecture::from_config(&config).unwrap();
    KeyValueStore::new(&architecture, rows, Kernel::Gemm)
}

#[derive(Clone, Debug)]
enum Use {
    Take(usize),
    /// Gives back part of what was taken: which, where it is cut in two (a group's rows come back in pieces), and how many rows
    /// of its last block are not mentioned.
    Give(prop::sample::Index, prop::sample::Index, usize),
}

proptest! {
    /// Against a list of which blocks are free: the first that fit are taken, whole blocks, so that no two sequences share one,
    /// and what is given back becomes one stretch again, though it comes without the end of its last block.
    #[test]
    fn blocks_are_taken_once_and_come_back_whole(
        rows in 1usize..2000,
        uses in prop::collection::vec(
            prop_oneof![(1usize..450).prop_map(Use::Take), any::<(prop::sample::Index, prop::sample::Index, usize)>().prop_map(|(a, b, c)| Use::Give(a, b, c))],
            0..80,
        ),
    ) {
        let mut store = store(rows);
        let blocks = rows.div_ceil(BLOCK);
        prop_assert_eq!(store.rows(), blocks * BLOCK);
        let mut free = vec![true; blocks];
        let mut taken: Vec<Range<usize>> = Vec::new();
        let rows_of = |blocks: Range<usize>| blocks.start * BLOCK..blocks.end * BLOCK;
        for step in uses {
            match step {
                Use::Take(count) => {
                    let needed = count.div_ceil(BLOCK);
                    let first = (0..(blocks + 1).saturating_sub(needed)).find(|&start| free[start..start + needed].iter().all(|free| *free));
                    let want = first.map(|start| start..start + needed);
                    prop_assert_eq!(store.take(count), want.clone().map(rows_of));
                    if let Some(got) = want {
                        free[got.clone()].fill(false);
                        taken.push(got);
                    }
                }
                Use::Give(which, cut, short) if !taken.is_empty() => {
                    let range = taken.swap_remove(which.index(taken.len()));
                    let middle = range.start + cut.index(range.len() + 1);
                    free[range.start..middle].fill(true);
                    let Range { start, end } = rows_of(range.start..middle);
                    store.give(start..if end > start { end - short % BLOCK } else { end });
                    if middle < range.end {
                        taken.push(middle..range.end);
                    }
                }
                Use::Give(..) => {}
            }
        }
        taken.into_iter().for_each(|range| store.give(rows_of(range)));
        prop_assert_eq!(store.take(rows), Some(0..blocks * BLOCK));
        prop_assert_eq!(store.take(1), None);
        store.restrict(1);
        prop_assert_eq!(store.take(BLOCK + 1), None);
        prop_assert_eq!(store.take(1), Some(0..BLOCK));
    }
}
