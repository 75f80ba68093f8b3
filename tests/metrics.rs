//! The names of metrics are those of the table, on the page and in every row; batch statistics are TRL's.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Duration;

use candor::advantage::{AdvantageKind, advantages};
use candor::learner::{StepReport, StepShape};
use candor::metrics::{MEASURED, METRICS, Metric};
use candor::objective::Metrics;
use candor::record::{StepRecord, Timing, evaluation_row};
use candor::rollout::{Group, Rollout};
use candor::run::{Row, RowSplit};
use candor::sampler::Generation;
use candor_environments::{Finish, ParseStatus, Score, ScoreError, Target, Task};
use serde_json::Value;
use tempfile::tempdir;

use crate::check::{close, golden, json};
use crate::given_runs::Rows;
use crate::recorded;
use crate::toy::{config, lines, run};

fn page() -> String {
    let mut page = "# Every metric\n\nWritten from `src/metrics.rs` by `CANDOR_BLESS=1 cargo test --test all metrics_page`.\n\n\
        A row of `metrics.jsonl` is a step (`\"split\": \"train\"`, steps count from 0) or an evaluation after so many steps \
        (`\"split\": \"eval\"`). TensorBoard's event files beside it hold the same numbers. A metric that a row has no value for is \
        not in it. `NAME/ENVIRONMENT` says the same of one environment where the second column says so. Names that end in `*` end in \
        a word of the environment's, the judge's or the loss's own.\n\n"
        .to_string();
    let measured = MEASURED.map(|prefix| format!("`{prefix}`")).join(" and ");
    writeln!(page, "Metrics under {measured} differ from run to run, no others do.\n").unwrap();
    page += "| metric | per environment | is |\n|---|---|---|\n";
    for Metric { name, per_environment, meaning } in METRICS {
        let also = if *per_environment { "yes" } else { "" };
        writeln!(page, "| `{name}` | {also} | {} |", meaning.replace('|', "\\|")).unwrap();
    }
    page
}

/// Fails if the page was not written again after the table was changed.
#[test]
fn the_metrics_page_is_what_the_table_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("METRICS.md");
    if std::env::var_os("CANDOR_BLESS").is_some() {
        fs::write(&path, page()).unwrap();
    }
    assert!(fs::read_to_string(path).unwrap_or_default() == page(), "METRICS.md: run with CANDOR_BLESS=1 to rewrite");
}

/// The entry of the table that a name in a row of a run on `environments` is one of.
fn entry(name: &str, environments: &[&str]) -> &'static str {
    let is = |metric: &&Metric| {
        let of_environment = environments.iter().find_map(|environment| name.strip_suffix(&format!("/{environment}")));
        let plain = of_environment.filter(|_| metric.per_environment).unwrap_or(name);
        match metric.name.strip_suffix('*') {
            Some(prefix) => plain.strip_prefix(prefix).is_some_and(|word| !word.is_empty() && !word.contains('/')),
            None => plain == metric.name,
        }
    };
    METRICS.iter().find(is).map(|metric| metric.name).unwrap_or_else(|| panic!("{name} is not in the table"))
}

/// Fails if a row holds a name that the table lacks, or the table one that no row holds.
#[test]
fn rows_hold_the_names_of_the_table_and_no_others() {
    let results = tempdir().unwrap();
    let rows = Rows::new();
    let mut seen = BTreeSet::new();
    let mut look = |config: &candor::config::Config, environments: &[&str]| {
        run(results.path(), config);
        for row in lines(&results.path().join("toy/metrics.jsonl")) {
            let names = row.as_object().unwrap().keys().filter(|name| !["step", "split"].contains(&name.as_str()));
            seen.extend(names.map(|name| entry(name, environments)));
        }
        fs::remove_dir_all(results.path().join("toy")).unwrap();
    };
    look(&config("learner.kl = 0.1"), &["toy"]);
    look(&rows.config(&["toy", "sft", "dpo", "implicit"], "steps = 2"), &["toy"]);
    let stated = recorded::rows(recorded::SMALL).filter(|row| row["split"] == "eval" && row["step"] == 0);
    let stated: Vec<Row> = stated.map(|row| serde_json::from_value(row).unwrap()).collect();
    let row = evaluation_row(0, &stated, Duration::from_secs(1)).unwrap();
    seen.extend(row.scalars().1.iter().map(|(name, _)| entry(name, &["boolq"])));
    // Runs with judges have tests of their own, and GPUs are not everywhere.
    let unseen: Vec<&str> = METRICS.iter().map(|metric| metric.name).filter(|name| !seen.contains(name)).collect();
    assert_eq!(unseen, ["grades/*", "gpu/*"]);
}

fn rollout(reward: Option<f64>, advantage: Option<f64>, tokens: usize) -> Rollout {
    let score = |reward: f64| Score {
        reward,
        parts: vec![("outcome", reward)],
        metrics: vec![],
        parse: ParseStatus::Ok,
        flags: vec![],
        answer: None,
        train_on: None,
        judge: None,
    };
    let generation = Generation {
        group: 0,
        rollout: 0,
        version: 0,
        ids: vec![5; tokens],
        behavior_t: vec![-1.0; tokens],
        untempered_t: vec![-1.0; tokens],
        finish: Finish::Length,
    };
    let score = reward.map(score).ok_or(ScoreError::Environment("odd".into()));
    Rollout { generation, text: String::new(), score, token_confidence: None, advantage }
}

/// What a step says whose groups earned these rewards.
fn said(groups: &[(&str, Vec<Option<f64>>)]) -> Value {
    let group = |(environment, rewards): &(&str, Vec<Option<f64>>)| {
        let given = advantages(rewards, AdvantageKind::Centered).unwrap_or(vec![None; rewards.len()]);
        let task = Task { id: "toy/0".into(), prompt: Vec::new(), target: Target::Reward };
        let rollouts = rewards.iter().zip(given).map(|(reward, advantage)| rollout(*reward, advantage, 12)).collect();
        Group { environment: environment.to_string(), task, labels: vec![], prompt_ids: vec![5], rollouts }
    };
    let groups: Vec<Group> = groups.iter().map(group).collect();
    let rows = Row::all(RowSplit::Train, 0, &groups);
    let metrics = Metrics::default();
    let report =
        StepReport { loss: 0.0, losses: Default::default(), grad_norm: 1.0, tokens: 9, metrics, gpu: Vec::new() };
    let shape = StepShape { micro_tokens: 9, max_tokens: 12, temperature: 1.0, learning_rate: 0.5, dropout: None };
    let second = Duration::from_secs(1);
    let idle = [0.5, 0.5];
    let timing = Timing { sample: second, score: second, score_wait: second, learn: second, step: 3 * second, idle };
    StepRecord { step: 0, rows: &rows, portions: &[], report: &report, shape: &shape, timing }.to_row().to_json()
}

/// The rewards and logs are a run of TRL's: fails if the deviation is within groups, or over n.
#[test]
fn statistics_of_a_batch_are_trls() {
    let Some(path) = golden("trl/grpo_trace.json") else { return };
    let trace = &json(&path)["traces"]["grpo_group"];
    for (rewards, log) in trace["rewards"].as_array().unwrap().iter().zip(trace["logs"].as_array().unwrap()) {
        let rewards: Vec<Option<f64>> = rewards.as_array().unwrap().iter().map(Value::as_f64).collect();
        let row = said(&rewards.chunks(4).map(|group| ("toy", group.to_vec())).collect::<Vec<_>>());
        for (ours, theirs) in [
            ("reward/mean", "rewards/rew/mean"),
            ("reward/std", "rewards/rew/std"),
            ("frac_reward_zero_std", "frac_reward_zero_std"),
            ("length/mean", "completions/mean_length"),
            ("length/clip_ratio", "completions/clipped_ratio"),
        ] {
            close(ours, row[ours].as_f64().unwrap(), log[theirs].as_f64().unwrap(), 1e-7);
            assert_eq!(row[ours], row[format!("{ours}/toy")], "there is one environment");
        }
    }
}

/// Fails if an error or a dropped group counts as a reward, or one environment's groups as another's.
#[test]
fn errors_and_dropped_groups_are_in_no_statistic() {
    let row = said(&[
        ("a", vec![Some(1.0), Some(0.0), None, None]),
        ("a", vec![Some(0.5), Some(0.5), Some(0.5), Some(0.5)]),
        ("b", vec![Some(1.0), None, None, None]),
    ]);
    let want = [
        ("reward/mean", 4.0 / 7.0),
        ("reward/mean/a", 0.5),
        ("reward/mean/b", 1.0),
        ("reward/std/a", (0.5f64 / 5.0).sqrt()),
        ("frac_reward_zero_std", 0.5),
        ("frac_reward_zero_std/a", 0.5),
        ("advantage/abs_mean/a", 1.0 / 6.0),
        ("parts/outcome/a", 0.5),
        ("parse_rate/b", 1.0),
    ];
    want.iter().for_each(|(name, want)| close(name, row[name].as_f64().unwrap(), *want, 1e-12));
    assert_eq!(
        (&row["score_errors"], &row["score_errors/b"], &row["dropped_groups"]),
        (&5.into(), &3.into(), &1.into())
    );
    for missing in ["reward/std/b", "frac_reward_zero_std/b", "advantage/abs_mean/b"] {
        assert!(row.get(missing).is_none(), "{missing}: of one reward, or of no group");
    }
}
