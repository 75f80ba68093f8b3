//! What is found out before a run starts: prompts that do not fit, and settings that could teach nothing.

use std::sync::Mutex;

use anyhow::Result;
use candor::config::Config;
use candor::event::Event;
use candor::inputs::Inputs;
use candor::selection::Source;
use candor_environments::{Context, Environment, Load};
use tempfile::tempdir;

use crate::toy::{config, failure, load, model};

/// Opens the toy's inputs with these changes; also what was said, warnings marked by `!`.
fn open(changes: &str) -> (Result<Inputs>, Vec<String>) {
    let said = Mutex::new(Vec::new());
    let inputs = Inputs::open(&config(changes), &[("toy", load as Load)], &|event| match event {
        Event::Line(line) => said.lock().unwrap().push(line.to_string()),
        Event::Warning(warning) => said.lock().unwrap().push(format!("!{warning}")),
        Event::Progress { .. } => {}
    });
    (inputs, said.into_inner().unwrap())
}

const GROWING: &str = "[[environment]]\nname = \"toy\"\ntasks = 9\ngrowth = 42\n";

/// Tests the short cut by bytes too: the lengths here are counted in tokens.
#[test]
fn prompts_that_leave_no_room_are_left_out_and_counted() {
    let (inputs, said) = open(GROWING);
    let inputs = inputs.unwrap();
    let fits = |source: &Source, task: usize, room: usize| {
        let prompt = source.environment.task(task).prompt;
        inputs.model.tokenizer.prompt_ids(&prompt).unwrap().len() + 12 <= room
    };
    let (training, heldout) = (&inputs.training[0], &inputs.heldout[0]);
    let wanted: Vec<usize> = (0..9).filter(|&task| fits(training, task, 256)).collect();
    assert!((2..9).contains(&wanted.len()), "some fit and some do not: {wanted:?}");
    assert_eq!((&training.tasks, &heldout.tasks), (&wanted, &wanted));
    let line = |key: &str| {
        let left_out = 9 - wanted.len();
        format!(
            "toy: left out {left_out} of 9 tasks: the prompt leaves no room for {key} = 12 within the model's context = 256"
        )
    };
    assert_eq!(said, [line("sampling.max_tokens"), line("evaluation.max_tokens")]);
    // The learner's passes bound training only.
    let (inputs, _) = open(&format!("batch.micro_tokens = 150\n{GROWING}"));
    let inputs = inputs.unwrap();
    let wanted: Vec<usize> = (0..9).filter(|&task| fits(training, task, 150)).collect();
    assert_eq!(inputs.training[0].tasks, wanted);
    assert!(wanted.len() < inputs.heldout[0].tasks.len());
}

#[test]
fn prompts_that_leave_no_room_are_an_error_where_the_config_says_so() {
    let (inputs, _) = open(GROWING);
    let first = inputs.unwrap().training[0].tasks.len();
    let error = failure(tempdir().unwrap().path(), &format!("batch.long_prompts = \"error\"\n{GROWING}"), false);
    assert!(
        error.contains(&format!("task toy/train/{first}: its prompt leaves no room for sampling.max_tokens")),
        "{error}"
    );
}

#[test]
fn a_group_of_one_has_nothing_to_be_compared_with() {
    let error = format!("{:#}", open("batch.group = 1").0.err().unwrap());
    assert!(error.starts_with("toy.toml:") && error.contains("batch.group: 1 rollout"), "{error}");
    assert!(error.contains("use at least 2"), "{error}");
}

#[test]
fn dividing_a_scoring_rule_by_the_deviation_is_warned_about() {
    let states = "[[environment]]\nname = \"toy\"\nbehavior = \"states_probabilities\"";
    let std = "learner.advantage = \"std\"";
    let warnings = |changes: &str| {
        let (inputs, said) = open(changes);
        inputs.unwrap();
        said
    };
    assert_eq!(warnings(states), [""; 0]);
    assert_eq!(warnings(std), [""; 0]);
    let said = warnings(&format!("{std}\n{states}"));
    assert!(
        matches!(&said[..], [warning] if warning.starts_with("!toy.toml:") && warning.contains("learner.advantage")),
        "{said:?}"
    );
}

/// The toy as it is without options, whatever its table says.
fn heedless(context: &Context) -> Result<Box<dyn Environment>> {
    load(&Context::new(context.split, &toml::Table::new(), context.resolve, None))
}

#[test]
fn an_option_that_nobody_reads_is_an_error_with_its_line() {
    let open = |options: &str| {
        let text = format!("name = \"a\"\n[model]\nsource = {:?}\n[[environment]]\nname = \"heedless\"\n", model());
        let config = Config::parse(&format!("{text}{options}"), "a.toml").unwrap();
        let inputs = Inputs::open(&config, &[("heedless", heedless as Load), ("toy", load)], &|_| {});
        inputs.err().map(|error| format!("{error:#}")).unwrap_or_default()
    };
    for (options, wanted) in [
        ("lo = 1\n", "a.toml:6: environment.0.lo: unknown key; heedless takes no options"),
        ("wieght = 1\n", "a.toml:6: environment.0.wieght: unknown key; did you mean `weight`?"),
        (
            "[[environment]]\nname = \"toy\"\nwieght = 1\n",
            "a.toml:8: environment.1.wieght: unknown key; did you mean `weight`?",
        ),
        (
            "[[evaluation.environment]]\nname = \"toy\"\nnames = 1\n",
            "a.toml:8: evaluation.environment.0.names: unknown key; did you mean `name`?",
        ),
        ("weight = 2\n[[environment]]\nname = \"toy\"\ntasks = 1\n", ""),
    ] {
        assert_eq!(open(options), wanted, "{options}");
    }
}
