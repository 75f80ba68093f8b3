//! What a level gains in seconds and what it costs in reward. By hand, because neither is a test:
//! `cargo test --release --test all levels_by_hand -- --ignored --nocapture --test-threads 1`

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::thread::sleep;
use std::time::Duration;

use candor::config::Config;
use candor::event::Event;
use candor::run::each_span;
use candor::setup::{Options, Run};
use candor::timeline::Stage;
use candor::train::{Outcome, train};
use tempfile::tempdir;

use crate::altered::{Change, at_level, before, gated, never, run_with, unchanged};
use crate::check;
use crate::toy::step_metrics;

/// What the judge takes for each completion; any number of them at once.
const JUDGE: Duration = Duration::from_secs(2);

/// Seconds from the end of the first step to that of the last, over the steps between.
fn per_step(run: &Path) -> f64 {
    let spans = each_span(&run.join("spans.jsonl")).unwrap();
    let ends: Vec<f64> = spans.iter().filter(|span| span.stage == Stage::Learn).map(|span| span.end).collect();
    (ends[ends.len() - 1] - ends[0]) / (ends.len() - 1) as f64
}

/// The flow as it is, on the tiny model, with a sampler and a learner that wait eight seconds for each batch: stand-ins for two
/// machines that do not share their cores. At level 1 the learner's step t and the sampler's batch t + 1 are under way at once; two
/// steps take one sampling, one judge and one learning, so a step takes s + judge / 2.
#[test]
#[ignore = "three minutes of waiting; prints figures"]
fn stand_ins_that_wait() {
    const WAIT: Duration = Duration::from_secs(8);
    for level in [0, 1, 2] {
        let change: Change = Box::new(|run: &mut Run| {
            before(|_, _| {
                sleep(WAIT);
                Ok(())
            })(run);
            gated(|_| sleep(JUDGE))(run);
        });
        let learning = |done, total| {
            if done == total {
                sleep(WAIT);
            }
        };
        let ended = run_with(at_level(level, "steps = 5\nevaluation.tasks = 0"), change, learning, never);
        assert_eq!(ended.outcome.as_ref().unwrap(), &Outcome::Finished);
        let (seconds, s) = (per_step(&ended.folder()), WAIT.as_secs_f64());
        eprintln!("stand-ins of {s} s, a judge of 2 s, level {level}: {seconds:.2} s a step, {:.3} s", seconds / s);
    }
}

/// SmolLM2 and BoolQ with the same judge: sampler and learner have the same cores, so that only the judge's time can be hidden.
#[test]
#[ignore = "needs SmolLM2 and idle cores; prints figures"]
fn smollm2_on_the_same_cores() {
    if check::smollm2().is_none() {
        return;
    }
    for level in [0, 1] {
        let level = format!("sampling.async_level={level}");
        let sets = ["steps=6", "batch.prompts=4", "evaluation.tasks=0", &level].map(String::from);
        let config = Config::load(Path::new("configs/quickstart.toml"), &sets).unwrap();
        let results = tempdir().unwrap();
        let observer = |event: Event| {
            if let Event::Line(line) = event {
                eprintln!("{line}");
            }
        };
        let options = Options { results: results.path(), resume: false, environments: &[], observer: &observer };
        let mut run = Run::prepare(config, &options).unwrap();
        gated(|_| sleep(JUDGE))(&mut run);
        let outcome = train(&mut run, &observer, &AtomicBool::new(false)).unwrap();
        assert_eq!(outcome, Outcome::Finished);
        eprintln!("SmolLM2, a judge of 2 s, {level}: {:.2} s a step", per_step(&results.path().join("quickstart")));
    }
}

/// The toy at every level with every correction, eight seeds each: every step as a line of CSV. The learner
/// waits after each step, so that the sampler is as far ahead as it may be.
#[test]
#[ignore = "some minutes; prints figures"]
fn corrections_on_the_toy() {
    const SEEDS: u64 = 8;
    const STEPS: u64 = 24;
    let corrections = [
        ("none", "learner.importance.level = \"none\"\nlearner.clip = [1.0, 1e9]"),
        ("clip", "learner.importance.level = \"none\""),
        ("token", "learner.importance.level = \"token\""),
        ("sequence-mask", "learner.importance = { level = \"sequence\", mode = \"mask\" }"),
        ("prime", "learner.policy_loss = \"prime\""),
    ];
    eprintln!("level,correction,seed,step,reward,age,k3");
    for level in [0, 1, 2, 4] {
        for (correction, keys) in corrections.iter().filter(|(name, _)| level > 0 || *name == "clip") {
            for seed in 0..SEEDS {
                let changes = format!(
                    "steps = {STEPS}\nseed = {seed}\nevaluation.tasks = 0\nbatch.prompts = 4\nbatch.group = 8\n\
                         sampling.stop = []\ncheckpoint.every = 0\n{keys}"
                );
                let pause = |done, total| {
                    if done == total {
                        sleep(Duration::from_millis(40))
                    }
                };
                let ended = run_with(at_level(level, &changes), unchanged(), pause, never);
                for row in step_metrics(&ended.folder()) {
                    let [step, reward, age, k3] =
                        ["step", "reward/mean", "age/mean", "mismatch/k3"].map(|name| &row[name]);
                    eprintln!("{level},{correction},{seed},{step},{reward},{age},{k3}");
                }
            }
        }
    }
}
