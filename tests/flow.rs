//! The loop on the tiny model: the reward rises, every row of the record is as the contract says, and tasks are chosen as a
//! function of seed and step.

use std::collections::BTreeSet;
use std::sync::Arc;

use candor::checkpoint;
use candor::config::Lora;
use candor::heldout::Evaluation;
use candor::selection::{Choice, Source, choose_heldout, choose_tasks, shares};
use candor::setup::Options;
use candor::summary::{Evaluated, Summary};
use candor_environments::{Environment, Load, Message, Target, Task};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::check::{self, close};
use crate::toy::{config, generations, load, mean_reward, rows_of, run, step_metrics};

/// Mean training reward of every step, and the mean held-out reward before and after.
fn rewards(learning_rate: f64) -> (Vec<f64>, [f64; 2]) {
    const STEPS: u64 = 16;
    let results = tempdir().unwrap();
    let changes = format!(
        "steps = {STEPS}\nbatch.prompts = 4\nbatch.group = 8\nsampling.stop = []\nevaluation.tasks = 5\n\
         checkpoint.every = 0\nlearner.learning_rate = {learning_rate:e}"
    );
    run(results.path(), &config(&changes));
    let rows = generations(results.path());
    let training = (0..STEPS).map(|step| mean_reward(&rows_of(&rows, "train", step)));
    (training.collect(), [0, STEPS].map(|step| mean_reward(&rows_of(&rows, "eval", step))))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn the_reward_rises_above_that_of_the_untrained_policy_on_the_same_seeds() {
    let (trained, [before, after]) = rewards(2e-2);
    let (untrained, [same, still]) = rewards(1e-30);
    eprintln!("trained {trained:.3?}, held out {before:.3} to {after:.3}\nuntrained {untrained:.3?}");
    assert_eq!((trained[0], before), (untrained[0], same), "both start from the same policy");
    assert_eq!(same, still);
    let (first, last, control) = (mean(&trained[..3]), mean(&trained[12..]), mean(&untrained[12..]));
    // The untrained policy earns between 0.04 and 0.16 in every step.
    assert!(last > first + 0.3 && last > control + 0.3, "first {first:.3}, last {last:.3}, untrained {control:.3}");
    assert!(after > before + 0.3, "held out: {before:.3} before, {after:.3} after");
}

/// At level 0 a step learns from what its own policy said. Where rows do not depend on their batch, sampler and learner compute the
/// same bits, and every ratio is exactly 1.
#[test]
fn every_step_is_exactly_on_policy() {
    for kernel in check::row_invariant_kernels() {
        let results = tempdir().unwrap();
        run(results.path(), &config(&format!("model.kernel = {}\nsampling.temperature = 0.8", json!(kernel))));
        let rows = step_metrics(&results.path().join("toy"));
        assert_eq!(rows.len(), 4);
        for row in rows {
            assert_eq!(row["mismatch/max"], 0.0, "{kernel:?}: {row}");
            assert_ne!(row["grad_norm"], 0.0);
        }
    }
}

/// Catches an evaluation of other tasks, of the base where an adapter was given, or of an adapter with another scale.
#[test]
fn an_evaluation_finds_what_the_run_found() {
    let results = tempdir().unwrap();
    let config = config("steps = 6\nevaluation.tasks = 5\nlora.alpha = 12.0");
    run(results.path(), &config);
    let summary = Summary::of(&results.path().join("toy"), "a processor".into()).unwrap();
    let (before, after) = (&summary.comparisons[0].before, &summary.comparisons[0].after);
    assert_ne!(before.reward, after.reward);
    let newest = checkpoint::newest(&results.path().join("toy")).unwrap().unwrap();
    // The adapter says itself what it is.
    let mut other = config;
    other.lora = Lora::default();
    for (adapter, found) in [(None, before), (Some(newest.as_path()), after)] {
        let options = Options {
            results: results.path(),
            resume: false,
            environments: &[("toy", load as Load)],
            observer: &|_| {},
        };
        let rows = Evaluation::prepare(other.clone(), adapter, 1, &options).unwrap().run(&|_| {}).unwrap();
        let evaluated = Evaluated::by_environment(&rows.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!(evaluated["toy"].reward, found.reward);
        assert_eq!((evaluated["toy"].tasks, evaluated["toy"].scored), (5, 5));
    }
}

/// The contract's keys in the contract's order.
const KEYS: [&str; 21] = [
    "schema",
    "split",
    "step",
    "policy_version",
    "environment",
    "task",
    "group",
    "rollout",
    "prompt",
    "completion",
    "finish",
    "tokens",
    "reward",
    "parts",
    "advantage",
    "metrics",
    "parse",
    "flags",
    "judge",
    "mean_logprob",
    "error",
];

#[test]
fn every_rollout_is_a_row_of_the_contract_in_the_order_of_the_run() {
    let results = tempdir().unwrap();
    run(results.path(), &config("evaluation.every = 2\nevaluation.tasks = 3\nsampling.max_tokens = 9"));
    let rows = generations(results.path());
    rows.iter().for_each(assert_contract);

    // An evaluation comes before the step of the same number; at level 0 nothing is sampled from an older adapter.
    let place = |row: &Value| ["step", "policy_version", "group", "rollout"].map(|key| row[key].as_u64().unwrap());
    let places: Vec<_> = rows.iter().map(|row| (row["split"].as_str().unwrap(), place(row))).collect();
    let mut expected = Vec::new();
    for step in 0..=4 {
        if step % 2 == 0 {
            expected.extend((0..3).map(|group| ("eval", [step, step, group, 0])));
        }
        if step < 4 {
            expected.extend((0..12).map(|index| ("train", [step, step, index / 4, index % 4])));
        }
    }
    assert_eq!(places, expected);

    let heldout = |step| rows_of(&rows, "eval", step).iter().map(|row| row["task"].clone()).collect::<Vec<_>>();
    assert_eq!(heldout(0), heldout(4));
    assert!(rows.iter().any(|row| row["finish"] == "stop") && rows.iter().any(|row| row["finish"] == "length"));
    let metrics = step_metrics(&results.path().join("toy"));
    assert_eq!(metrics.iter().map(|row| row["step"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for (step, row) in metrics.iter().enumerate() {
        let training = rows_of(&rows, "train", step as u64);
        close("reward", row["reward/mean"].as_f64().unwrap(), mean_reward(&training), 1e-12);
        assert_eq!(row["tokens/completion"], training.iter().map(|row| row["tokens"].as_u64().unwrap()).sum::<u64>());
        assert_eq!((&row["score_errors"], &row["dropped_groups"]), (&0.into(), &0.into()));
        assert!(row["grad_norm"].as_f64().unwrap() > 0.0);
    }
}

/// One row of a run without errors.
fn assert_contract(row: &Value) {
    assert_eq!(row.as_object().unwrap().keys().collect::<Vec<_>>(), KEYS);
    let train = row["split"] == "train";
    let text = row["completion"].as_str().unwrap();
    assert_eq!(
        (&row["schema"], &row["environment"], &row["judge"], &row["error"]),
        (&1.into(), &"toy".into(), &Value::Null, &Value::Null)
    );
    assert!(row["task"].as_str().unwrap().starts_with(if train { "toy/train/" } else { "toy/heldout/" }));
    assert_eq!(row["prompt"].as_array().unwrap().len(), 1);
    assert_eq!(row["prompt"][0].as_object().unwrap().keys().collect::<Vec<_>>(), ["role", "content"]);
    assert_eq!(row["prompt"][0]["role"], "user");
    assert!(
        !text.contains("<|") && !text.contains('t') && !text.contains('7'),
        "end tokens and stop strings are cut: {text}"
    );
    let (tokens, limit) = (row["tokens"].as_u64().unwrap(), if train { 9 } else { 12 });
    assert!((1..=limit).contains(&tokens));
    assert!(row["finish"] == "stop" || (row["finish"] == "length" && tokens == limit));
    assert_eq!(row["metrics"]["tokens"], tokens as f64, "the environment is told the same count");
    let parts = row["parts"].as_object().unwrap();
    assert_eq!(parts.keys().collect::<Vec<_>>(), ["letters", "length"], "the outcome is first");
    let sum: f64 = parts.values().map(|part| part.as_f64().unwrap()).sum();
    close("reward", row["reward"].as_f64().unwrap(), sum, 1e-12);
    assert_eq!(row["advantage"].is_f64(), train);
    assert_eq!(row["parse"], if row["finish"] == "stop" { "ok" } else { "missing" });
    assert_eq!(row["flags"], serde_json::json!(["toy"]));
    assert!(row["mean_logprob"].as_f64().unwrap() < 0.0);
}

/// An environment of which only the number of tasks matters.
struct Counted(usize);

impl Environment for Counted {
    fn num_tasks(&self) -> usize {
        self.0
    }

    fn task(&self, index: usize) -> Task {
        Task { id: index.to_string(), prompt: vec![Message::user("")], target: Target::Reward }
    }
}

fn sources(tasks_and_weights: &[(usize, f64)]) -> Vec<Source> {
    let source = |&(tasks, weight): &(usize, f64)| Source::new("counted", weight, Arc::new(Counted(tasks)));
    tasks_and_weights.iter().map(source).collect()
}

fn some_sources() -> impl Strategy<Value = Vec<(usize, f64)>> {
    prop::collection::vec((1_usize..40, 0.05_f64..5.0), 1..5)
}

fn of(chosen: &[Choice], source: usize) -> Vec<usize> {
    chosen.iter().filter(|choice| choice.0 == source).map(|choice| choice.1).collect()
}

#[test]
fn equal_remainders_go_to_the_first() {
    assert_eq!(shares(&[1.0, 1.0, 1.0], 8), [3, 3, 2]);
    assert_eq!(shares(&[3.0, 1.0], 8), [6, 2]);
    assert_eq!(shares(&[0.7, 0.2, 0.1], 4), [3, 1, 0]);
    assert_eq!(shares(&[1.0, 1.0], 1), [1, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn shares_are_the_weights_rounded_up_or_down(weights in prop::collection::vec(1e-3_f64..1e3, 1..8), total in 0_usize..300) {
        let shares = shares(&weights, total);
        prop_assert_eq!(shares.iter().sum::<usize>(), total);
        let sum: f64 = weights.iter().sum();
        for (share, weight) in shares.iter().zip(&weights) {
            prop_assert!((*share as f64 - weight / sum * total as f64).abs() < 1.0 + 1e-9);
        }
    }

    #[test]
    fn a_pass_takes_every_task_once_and_each_pass_is_shuffled_anew(
        known in some_sources(), prompts in 1_usize..20, seed in any::<u64>(),
    ) {
        let sources = sources(&known);
        let weights: Vec<f64> = known.iter().map(|(_, weight)| *weight).collect();
        let steps: Vec<Vec<Choice>> = (0..60).map(|step| choose_tasks(&sources, prompts, seed, step)).collect();
        for (source, (&(tasks, _), share)) in known.iter().zip(shares(&weights, prompts)).enumerate() {
            let taken: Vec<Vec<usize>> = steps.iter().map(|chosen| of(chosen, source)).collect();
            prop_assert!(taken.iter().all(|taken| taken.len() == share));
            let taken = taken.concat();
            for pass in taken.chunks_exact(tasks) {
                prop_assert_eq!(pass.iter().collect::<BTreeSet<_>>().len(), tasks);
            }
            let passes: Vec<&[usize]> = taken.chunks_exact(tasks).collect();
            // Two equal orders of 12 tasks have a chance of 1 in 479 million.
            prop_assert!(tasks < 12 || passes.windows(2).all(|pair| pair[0] != pair[1]));
        }
        // Nothing is remembered: any step can be asked for first, and another seed chooses otherwise.
        prop_assert_eq!(&choose_tasks(&sources, prompts, seed, 41), &steps[41]);
        let other: Vec<Vec<Choice>> = (0..60).map(|step| choose_tasks(&sources, prompts, seed ^ 1, step)).collect();
        let many = known.iter().zip(shares(&weights, prompts)).any(|((tasks, _), share)| *tasks >= 12 && share > 0);
        prop_assert!(!many || other != steps);
    }

    #[test]
    fn an_evaluation_takes_the_same_tasks_always_and_more_only_add_to_them(
        known in some_sources(), tasks in 1_usize..30, seed in any::<u64>(),
    ) {
        let sources = sources(&known);
        let (chosen, more) = (choose_heldout(&sources, tasks, seed), choose_heldout(&sources, tasks + 1, seed));
        for (source, (all, _)) in known.iter().enumerate() {
            let (chosen, more) = (of(&chosen, source), of(&more, source));
            prop_assert_eq!(chosen.len(), tasks.min(*all));
            prop_assert!(chosen.iter().all(|task| task < all));
            prop_assert_eq!(chosen.iter().collect::<BTreeSet<_>>().len(), chosen.len());
            prop_assert_eq!(&more[..chosen.len()], &chosen);
        }
        prop_assert_eq!(chosen, choose_heldout(&sources, tasks, seed));
    }
}
