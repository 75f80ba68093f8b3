//! Whole runs whose completions come from servers.

use std::sync::Arc;

use candor::check::Check;
use candor::config::Dtype;
use candor::inputs::Inputs;
use candor::ops::kernel::Kernel;
use candor::plan::Plan;
use candor_environments::Load;
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::check;
use crate::judge_server::Server;
use crate::sampling_server::{Tiny, changed, endpoints, gone, honest, server};
use crate::toy::{config, failure, generations, load, rows_of, run, step_metrics};

/// Catches an adapter that does not reach the server, or an older one that stays in use: then the learner finds other
/// log-probabilities than the server.
#[test]
fn sampler_and_learner_agree_at_every_version() {
    for kernel in check::row_invariant_kernels() {
        let (results, folder) = (tempdir().unwrap(), tempdir().unwrap());
        let tiny = Tiny::new(kernel);
        let servers = [honest(&tiny), honest(&tiny)];
        let kernel_key = format!("model.kernel = {}\n", json!(kernel));
        let servers: Vec<&Server> = servers.iter().collect();
        run(results.path(), &config(&(kernel_key.clone() + &endpoints(&servers, folder.path(), ", concurrency = 5"))));
        let metrics = step_metrics(&results.path().join("toy"));
        assert_eq!(metrics.len(), 4);
        for row in metrics {
            assert_eq!(row["mismatch/max"], 0.0, "{kernel:?}: {row}");
            assert_ne!(row["grad_norm"], 0.0);
        }
        let rows = generations(results.path());
        assert!(rows.iter().all(|row| row["policy_version"] == row["step"]));
        assert_eq!((rows_of(&rows, "train", 3).len(), rows_of(&rows, "eval", 4).len()), (12, 2));
        // Nothing is drawn before training: the same completions as here.
        let local = tempdir().unwrap();
        run(local.path(), &config(&(kernel_key + "steps = 1")));
        let texts =
            |rows: &[Value]| rows_of(rows, "eval", 0).iter().map(|row| row["completion"].clone()).collect::<Vec<_>>();
        assert_eq!(texts(&rows), texts(&generations(local.path())));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

fn tiny() -> Arc<Tiny> {
    Tiny::new(Kernel::choose(Dtype::Auto, None).unwrap())
}

/// Why a run on a server fails, whose choices are changed like this; nothing is written.
#[track_caller]
fn refused(change: fn(&mut Value)) -> String {
    let (results, folder, tiny) = (tempdir().unwrap(), tempdir().unwrap(), tiny());
    let behind = tiny.clone();
    let server = server(&tiny, move |_, asked| Some(changed(&behind, asked, change)));
    let error = failure(results.path(), &endpoints(&[&server], folder.path(), ""), false);
    assert_eq!(
        std::fs::read_dir(results.path()).unwrap().count(),
        0,
        "nothing is written before all input is found good"
    );
    error.replace(&server.address, "HERE")
}

/// Catches a run that learns from text, or from another model's completions.
#[test]
fn a_server_that_cannot_be_learned_from_is_refused_at_the_start() {
    let error = refused(|choice| drop(choice.as_object_mut().unwrap().remove("token_ids")));
    assert!(error.contains("HERE") && error.contains("no token_ids"), "{error}");
    let error = refused(|choice| {
        for logprob in choice["logprobs"]["token_logprobs"].as_array_mut().unwrap() {
            *logprob = json!(logprob.as_f64().unwrap() - 1.0);
        }
    });
    assert!(error.contains("HERE does not sample from") && error.contains("by 1.00 on average"), "{error}");
}

/// Catches a plan that counts memory which servers take, and servers that are named nowhere before a run asks them.
#[test]
fn a_plan_and_a_check_name_the_servers() {
    let folder = tempdir().unwrap();
    let config = config(&endpoints(&[&gone()], folder.path(), ""));
    let inputs = Inputs::open(&config, &[("toy", load as Load)], &|_| {}).unwrap();
    let plan = Plan::of(&config, &inputs).unwrap();
    assert_eq!(plan.memory.cache, 0);
    let server = "tiny at http://127.0.0.1:9/v1, 64 requests at once, adapters in ";
    assert!(plan.to_string().contains(&format!("sampled by {server}")), "{plan}");
    let check = Check::of(&config, &inputs).unwrap();
    assert!(check.to_string().contains(server), "{check}");
}
