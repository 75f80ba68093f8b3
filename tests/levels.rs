//! Sampler and learner side by side, at level 0 and ahead: how old what is learned from may be, that every way of failing ends the
//! run with its reason at every level, who is said to wait for whom, and what a slow judge delays.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::bail;
use candor::config::Config;
use candor::run::each_span;
use candor::sampler::{Interrupted, PolicyFeed};
use candor::setup::Run;
use candor::timeline::{Span, Stage};
use candor::train::Outcome;
use proptest::prelude::*;
use serde_json::Value;
use tempfile::tempdir;

use crate::altered::{
    Change, Ended, Said, altered, at_level, before, gated, go_on, never, no_pause, run_with, unchanged,
};
use crate::check::close;
use crate::resume;
use crate::toy::{config, generations, rows_of, step_metrics};

const LEVELS: [u64; 4] = [0, 1, 2, 4];

fn number(row: &Value, name: &str) -> u64 {
    row[name].as_u64().unwrap()
}

/// Every rollout is from a version that its level allows, every group from one, and an evaluation from exactly its own.
#[track_caller]
fn assert_ages(ended: &Ended, level: u64, steps: u64) {
    let rows = generations(ended.results.path());
    for row in rows.iter().filter(|row| row["split"] == "eval") {
        assert_eq!(row["policy_version"], row["step"]);
    }
    for step in 0..steps {
        let of_step = rows_of(&rows, "train", step);
        assert_eq!(of_step.len(), 12, "level {level}, step {step}");
        let ages: Vec<u64> = of_step.iter().map(|row| step - number(row, "policy_version")).collect();
        assert!(ages.iter().all(|age| *age <= level), "level {level}, step {step}: {ages:?}");
        let versions = of_step.iter().map(|row| (number(row, "group"), number(row, "policy_version")));
        assert_eq!(versions.collect::<BTreeSet<_>>().len(), 3, "one version a group");
        let metrics = &step_metrics(&ended.folder())[step as usize];
        close("mean", metrics["age/mean"].as_f64().unwrap(), ages.iter().sum::<u64>() as f64 / 12.0, 1e-12);
        assert_eq!(number(metrics, "age/max"), *ages.iter().max().unwrap());
        let shares = (0..=level).filter_map(|age| metrics.get(format!("age/{age}"))?.as_f64());
        close("shares", shares.sum(), 1.0, 1e-12);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Catches a batch that is sampled before the version is there that its level asks for, or a task that is lost or done twice.
    #[test]
    fn no_rollout_is_older_than_its_level_allows(
        level in prop::sample::select(&LEVELS[..]), pauses in prop::collection::vec(0_u64..12, 1..9),
    ) {
        let (sampling, learning) = (pauses.clone(), pauses.clone());
        let config = at_level(level, "steps = 7\nevaluation.every = 3");
        let pause = before(move |step, _| {
            sleep(Duration::from_millis(sampling[step as usize % sampling.len()]));
            Ok(())
        });
        let slow = move |done: usize, _: usize| sleep(Duration::from_millis(learning[(done + 3) % learning.len()] / 4));
        let ended = run_with(config, pause, slow, never);
        prop_assert_eq!(ended.outcome.as_ref().unwrap(), &Outcome::Finished);
        assert_ages(&ended, level, 7);
        let tasks = |ended: &Ended| generations(ended.results.path()).iter().map(|row| row["task"].to_string()).collect::<Vec<_>>();
        let on_policy = run_with(at_level(0, "steps = 7\nevaluation.every = 3"), unchanged(), no_pause, never);
        prop_assert_eq!(tasks(&ended), tasks(&on_policy));
    }
}

/// Catches a level that has no effect: where the learner is the slower one, the sampler is as far ahead as it may be.
#[test]
fn a_sampler_that_is_faster_runs_ahead_by_its_level() {
    for level in LEVELS {
        let slow = |done, total| {
            if done == total {
                sleep(Duration::from_millis(60))
            }
        };
        let ended = run_with(at_level(level, "steps = 8\nevaluation.tasks = 0"), unchanged(), slow, never);
        assert_ages(&ended, level, 8);
        let ages = step_metrics(&ended.folder()).iter().map(|row| number(row, "age/max")).collect::<Vec<_>>();
        let want: Vec<u64> = (0..8).map(|step| level.min(step)).collect();
        assert_eq!(ages, want, "level {level}");
        let spans = ended.spans();
        let of = |stage, step| *spans.iter().find(|span| (span.stage, span.step) == (stage, step)).unwrap();
        for step in 0..7 {
            let (learned, sampled) = (of(Stage::Learn, step), of(Stage::Sample, step + 1));
            assert_eq!(sampled.start >= learned.end, level == 0, "level {level}: {learned:?}, {sampled:?}");
            assert!(of(Stage::Score, step).end <= learned.start && learned.start < learned.end);
        }
        let idle =
            step_metrics(&ended.folder()).iter().map(|row| row["perf/learner_idle"].as_f64().unwrap()).sum::<f64>();
        assert!(level == 0 || idle < 8.0 * 0.5, "the learner has no reason to wait: {idle}");
    }
}

/// Catches rows that are written before their step is learned from, and steps that are left out or done twice.
#[test]
fn a_run_ahead_is_stopped_and_resumed_with_every_step_once() {
    for level in [1, 2] {
        let config = at_level(level, "steps = 8\nevaluation.every = 4");
        let mut ended = run_with(config.clone(), unchanged(), no_pause, |line| line.starts_with("step 3/"));
        assert_eq!((ended.outcome.as_ref().unwrap(), ended.saved()), (&Outcome::Interrupted, Some(3)));
        assert!(generations(ended.results.path()).iter().all(|row| number(row, "step") < 3));
        let first = ended.spans();
        let said = Said::default();
        let outcome = go_on(ended.results.path(), &config, true, unchanged(), (&no_pause, never), &said);
        ended.outcome = outcome;
        assert_eq!(ended.outcome.as_ref().unwrap(), &Outcome::Finished);
        assert_ages(&ended, level, 8);
        assert!(!ended.folder().join("interrupted-1.jsonl").exists(), "nothing was written that was not learned from");
        let (all, last) = (ended.spans(), first.iter().map(|span| span.end).fold(0.0, f64::max));
        assert_eq!(all[..first.len()], first);
        assert!(all[first.len()..].iter().all(|span| span.start >= last), "the clock goes on where it stopped");
    }
}

/// A run that fails must fail for this reason, soon, and leave the checkpoint of the steps before, from which it can go on.
#[track_caller]
fn assert_fails(level: u64, changes: &str, change: Change, saved: std::ops::RangeInclusive<u64>, says: &str) {
    let started = Instant::now();
    let ended = run_with(at_level(level, changes), change, no_pause, never);
    assert!(ended.error().contains(says), "level {level}: {}", ended.error());
    assert!(started.elapsed() < Duration::from_secs(20), "level {level}: {says}: after {:?}", started.elapsed());
    let steps = ended.saved().unwrap_or(0);
    assert!(saved.contains(&steps), "level {level}: {says}: {steps} steps are saved");
    if steps > 0 && changes.is_empty() {
        let outcome = go_on(
            ended.results.path(),
            &at_level(level, changes),
            true,
            unchanged(),
            (&no_pause, never),
            &Said::default(),
        );
        assert_eq!(outcome.unwrap(), Outcome::Finished, "level {level}: {says}");
    }
}

#[test]
fn every_failure_ends_the_run_with_its_reason_at_every_level() {
    for level in [0, 1, 2] {
        let fails_at_2 = |step, _: &dyn PolicyFeed| if step == 2 { bail!("the server is gone") } else { Ok(()) };
        // The learner finishes what it has at hand, or not: both is right.
        assert_fails(level, "", before(fails_at_2), 0..=2, "step 2: sampling: the server is gone");
        let odd = |behavior: &str| {
            format!("evaluation.tasks = 0\n[[environment]]\nname = \"toy\"\nbehavior = \"{behavior}\"")
        };
        assert_fails(level, &odd("panics"), unchanged(), 0..=0, "environment \"toy\" panicked on task");
        assert_fails(level, &odd("huge"), unchanged(), 0..=0, "step 0: the gradient of");
        let tires = gated(|number| assert!(number < 30, "tired"));
        assert_fails(level, "", tires, 1..=2, "environment \"toy\" panicked on task");
        let no_checkpoints = |run: &mut Run| {
            let checkpoints = run.folder.path.join("checkpoints");
            fs::remove_dir(&checkpoints).unwrap();
            fs::write(&checkpoints, "in the way").unwrap();
        };
        let ended = run_with(at_level(level, ""), Box::new(no_checkpoints), no_pause, never);
        assert!(ended.error().contains("checkpoints/.step-000001.new: cannot create"), "{}", ended.error());
    }
}

/// Catches an error that is only found when the learner is through with a long step, or with a wait for a judge.
#[test]
fn a_failure_ahead_interrupts_the_learner() {
    let fails_ahead = |step, _: &dyn PolicyFeed| if step == 1 { bail!("the server is gone") } else { Ok(()) };
    let slow = |_, _| sleep(Duration::from_secs(2));
    let ended = run_with(at_level(1, "evaluation.tasks = 0"), before(fails_ahead), slow, never);
    assert!(ended.error().contains("step 1: sampling: the server is gone"), "{}", ended.error());
    assert!(!ended.said.iter().any(|line| line.starts_with("step 1/")), "it was told after the step: {:?}", ended.said);

    let stuck = Box::new(move |run: &mut Run| {
        before(fails_ahead)(run);
        gated(|_| {
            loop {
                std::thread::park();
            }
        })(run);
    });
    let ended = run_with(at_level(1, "evaluation.tasks = 0"), stuck, no_pause, never);
    assert!(ended.error().contains("the server is gone"), "{}", ended.error());
}

/// Catches an interruption that waits for a long generation ahead, or that throws the step at hand away.
#[test]
fn an_interruption_finishes_the_step_at_hand_and_drops_what_is_sampled_ahead() {
    for level in [0, 1, 2] {
        // From step 2 on nothing is sampled until somebody wants to stop.
        let endless = |step, policy: &dyn PolicyFeed| {
            while step >= 2 && !policy.stopped() {
                sleep(Duration::from_millis(5));
            }
            if step >= 2 { bail!(Interrupted) } else { Ok(()) }
        };
        let changes = "evaluation.tasks = 0\ncheckpoint.every = 0";
        let ended = run_with(at_level(level, changes), before(endless), no_pause, |line| line.starts_with("step 2/"));
        assert_eq!((ended.outcome.as_ref().unwrap(), ended.saved()), (&Outcome::Interrupted, Some(2)), "level {level}");
        assert_eq!(step_metrics(&ended.folder()).len(), 2);
    }
}

/// Catches a run that hangs in silence, and a report that names the wrong side.
#[test]
fn it_is_told_who_waits_for_whom() {
    let told = |config: Config, change: Change, learning: fn(usize, usize), words: &[&str]| {
        let ended = run_with(config, change, learning, never);
        assert_eq!(ended.outcome.as_ref().unwrap(), &Outcome::Finished);
        let warned = ended.said.iter().filter(|line| line.starts_with("warning: nothing has happened for 1 s"));
        let warned: Vec<&String> = warned.collect();
        assert!(
            warned.iter().any(|line| words.iter().all(|words| line.contains(words))),
            "{words:?} in {:?}",
            ended.said
        );
        assert!(warned.len() <= 3, "once a second, by one of the two: {warned:?}");
    };
    let changes = "steps = 2\nevaluation.tasks = 0\nsilence_seconds = 1";
    let pause = Duration::from_millis(2500);
    for level in [0, 1] {
        let slow_sampler = before(move |step, _| {
            if step == 1 {
                sleep(pause);
            }
            Ok(())
        });
        let words = ["the sampler has been sampling for step 1", "the learner has been waiting for the next batch"];
        told(at_level(level, changes), slow_sampler, no_pause, &words);
        let slow_judge = gated(move |number| {
            if number == 3 {
                sleep(pause);
            }
        });
        told(at_level(level, changes), slow_judge, no_pause, &["the learner has been waiting for 1 scores of step 0"]);
    }
    let slow_learner = |done, total| {
        if done == total {
            sleep(Duration::from_millis(2500))
        }
    };
    let words =
        ["the sampler has been waiting for version 1 of the adapter", "the learner has been learning from step 0"];
    told(at_level(0, "steps = 1\nevaluation.every = 1\nsilence_seconds = 1"), unchanged(), slow_learner, &words);
}

/// Catches a sampler that waits for scores: here they only come once it has been asked for the next batch.
#[test]
fn a_slow_judge_delays_the_step_that_needs_it_and_not_the_sampler() {
    let batches = Arc::new(AtomicU64::new(0));
    let (counted, seen) = (batches.clone(), batches.clone());
    let change = Box::new(move |run: &mut Run| {
        before(move |_, _| {
            counted.fetch_add(1, Ordering::SeqCst);
            Ok(())
        })(run);
        gated(move |number| {
            let started = Instant::now();
            // The last batch has none after it.
            while number < 36 && seen.load(Ordering::SeqCst) < number / 12 + 2 {
                assert!(started.elapsed() < Duration::from_secs(20), "the sampler waits for the scores");
                sleep(Duration::from_millis(1));
            }
        })(run);
    });
    let ended = run_with(at_level(1, "evaluation.tasks = 0"), change, no_pause, never);
    assert_eq!(ended.outcome.as_ref().unwrap(), &Outcome::Finished);
    assert!(step_metrics(&ended.folder()).iter().all(|row| row["time/score_wait"].as_f64().unwrap() >= 0.0));
}

/// Catches a run that trains on what its sampler only claims, and one that ends at the first odd step.
#[test]
fn log_probabilities_that_are_not_the_learners_warn_and_then_end_a_run_on_policy() {
    let lies = || {
        altered(|_, _| Ok(()), |_, generation| generation.behavior_t.iter_mut().for_each(|logprob| *logprob += 0.125))
    };
    let ended = run_with(at_level(0, "evaluation.tasks = 0"), lies(), no_pause, never);
    let error = ended.error();
    assert!(
        error.contains("step 2:") && error.contains("1.250e-1 on average") && error.contains("3 steps in a row"),
        "{error}"
    );
    let warned = ended.said.iter().filter(|line| line.starts_with("warning: step")).count();
    assert_eq!((warned, step_metrics(&ended.folder()).len(), ended.saved()), (2, 3, Some(2)));

    let once = altered(
        |_, _| Ok(()),
        |settings, generation| {
            if settings.step % 3 < 2 {
                generation.behavior_t[0] += 0.5;
            }
        },
    );
    let ended = run_with(at_level(0, "steps = 7\nevaluation.tasks = 0"), once, no_pause, never);
    assert_eq!(ended.outcome.as_ref().unwrap(), &Outcome::Finished);
    assert_eq!(ended.said.iter().filter(|line| line.starts_with("warning: step")).count(), 5);

    // A sampler that is ahead has other log-probabilities by its nature.
    let ended = run_with(at_level(1, "evaluation.tasks = 0"), lies(), no_pause, never);
    assert_eq!(ended.outcome.as_ref().unwrap(), &Outcome::Finished);
}

/// Catches a learner that believes whatever version it is told.
#[test]
fn a_completion_of_a_version_that_may_not_be_sampled_ends_the_run() {
    for level in [0, 2] {
        let stale = altered(
            |_, _| Ok(()),
            |settings, generation| {
                if settings.step == 3 {
                    generation.version = 0
                }
            },
        );
        let ended = run_with(at_level(level, "evaluation.tasks = 0"), stale, no_pause, never);
        let says =
            format!("a completion is from version 0 of the adapter, where only {} to 3 may be sampled", 3 - level);
        assert!(ended.error().contains(&says), "{}", ended.error());
    }
}

/// Catches a clock in the spans' file that starts anew, or a damaged file that passes for whole.
#[test]
fn spans_are_read_again_to_the_last_whole_line() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("spans.jsonl");
    assert_eq!(each_span(&path).unwrap(), []);
    let line = "{\"stage\":\"learn\",\"step\":3,\"start\":1.5,\"end\":2.25}\n";
    fs::write(&path, format!("{line}{line}{{\"stage\":\"le")).unwrap();
    let span = Span { stage: Stage::Learn, step: 3, start: 1.5, end: 2.25 };
    assert_eq!(each_span(&path).unwrap(), [span, span]);
    for odd in ["{\"stage\":\"rest\",\"step\":3,\"start\":1.5,\"end\":2.25}", "not a span", ""] {
        fs::write(&path, format!("{line}{odd}\n")).unwrap();
        let error = format!("{:#}", each_span(&path).unwrap_err());
        assert!(error.contains("spans.jsonl: line 2: not a span"), "{error}");
    }
    // A resumed run at level 0 is the same run, whatever the level's machinery does.
    let config = config("steps = 3");
    let want = resume::straight(&config);
    resume::assert_same(&resume::straight(&at_level(0, "steps = 3")), &want, "level 0 is the default");
}
