//! The other ways to start the program: a dry run, a check, an evaluation; what the log holds; what the help looks like.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor, safetensors};
use candor::record::GIB;
use serde_json::{Value, json};

use crate::program::{CANDOR, Place};
use crate::toy::{model, step_metrics};

#[test]
fn help_fits_a_terminal_of_80_columns() {
    let place = Place::new("");
    for arguments in [
        &["--help"][..],
        &["train", "--help"],
        &["eval", "--help"],
        &["compare", "--help"],
        &["route", "--help"],
        &["check", "--help"],
        &["judge", "--help"],
        &["train", "-h"],
        &["logprob", "--help"],
        &["sample", "--help"],
        &["chat", "--help"],
        &["export", "--help"],
        &["inspect", "--help"],
        &["rescore", "--help"],
    ] {
        let ended = place.candor(arguments);
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
        for line in ended.stdout.lines() {
            assert!(line.chars().count() <= 80, "{arguments:?}: {line}");
        }
    }
}

/// A model folder of some size with the tiny model's tokenizer: 4 layers, hidden 256, random weights.
fn write_model(folder: &Path) {
    let (hidden, intermediate, keys) = (256, 768, 128);
    let mut config: Value = serde_json::from_slice(&fs::read(model().join("config.json")).unwrap()).unwrap();
    let vocabulary = config["vocab_size"].as_u64().unwrap() as usize;
    for (key, value) in [
        ("hidden_size", json!(hidden)),
        ("intermediate_size", json!(intermediate)),
        ("num_hidden_layers", json!(4)),
        ("num_attention_heads", json!(4)),
        ("num_key_value_heads", json!(2)),
        ("head_dim", json!(64)),
        ("tie_word_embeddings", json!(true)),
        ("max_position_embeddings", json!(2048)),
    ] {
        config[key] = value;
    }
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let random = |shape: &[usize]| Tensor::randn(0.0_f32, 0.05, shape, &Device::Cpu).unwrap();
    let mut tensors = HashMap::from([
        ("model.embed_tokens.weight".to_string(), random(&[vocabulary, hidden])),
        ("model.norm.weight".to_string(), random(&[hidden])),
    ]);
    for layer in 0..4 {
        for (name, shape) in [
            ("input_layernorm", &[hidden][..]),
            ("post_attention_layernorm", &[hidden]),
            ("self_attn.q_proj", &[hidden, hidden]),
            ("self_attn.k_proj", &[keys, hidden]),
            ("self_attn.v_proj", &[keys, hidden]),
            ("self_attn.o_proj", &[hidden, hidden]),
            ("mlp.gate_proj", &[intermediate, hidden]),
            ("mlp.up_proj", &[intermediate, hidden]),
            ("mlp.down_proj", &[hidden, intermediate]),
        ] {
            tensors.insert(format!("model.layers.{layer}.{name}.weight"), random(shape));
        }
    }
    safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

/// Catches a term that is missing or counted twice: activations, keys and values each take more than a tenth here.
#[test]
fn a_dry_run_foretells_the_memory_and_leaves_nothing() {
    let place = Place::new(
        "steps = 1\nevaluation.tasks = 0\n[lora]\nrank = 16\ntargets = [\"q_proj\", \"down_proj\"]\n[batch]\nprompts = 40\ngroup = 8\n\
         micro_tokens = 6000\n[sampling]\nmax_tokens = 24\nstop = []",
    );
    for entry in fs::read_dir(place.path("model")).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("config.json") || path.extension().is_some_and(|extension| extension == "safetensors") {
            fs::remove_file(path).unwrap();
        }
    }
    write_model(&place.path("model"));
    let ended = place.candor(&["train", "run.toml", "--dry-run"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(!place.path("results").exists());
    let plan = ended.stdout;
    let resolved = candor::config::Config::parse(&plan, "plan.toml").unwrap();
    assert_eq!(resolved, candor::config::Config::load(&place.path("run.toml"), &[]).unwrap(), "{plan}");
    assert!(
        plan.contains("# a step: 40 prompts x 8 rollouts = 320 rollouts, at most 7680 completion tokens"),
        "{plan}"
    );
    let gigabytes = |name: &str| -> f64 {
        let line = plan
            .lines()
            .find_map(|line| line.strip_prefix(&format!("#   {name} ")))
            .unwrap_or_else(|| panic!("{plan}"));
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    // In its first step a run has nothing to spare.
    let foretold = gigabytes("peak") - gigabytes("spare");
    let ended = place.candor(&["train", "run.toml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let metrics = step_metrics(&place.path("results/tiny"));
    let measured = metrics[0]["perf/peak_gib"].as_f64().unwrap() * GIB / 1e9;
    assert!((foretold / measured - 1.0).abs() < 0.1, "foretold {foretold} GB, measured {measured} GB\n{plan}");
}

#[test]
fn a_check_shows_a_prompt_and_what_canned_completions_earn() {
    let place = Place::new("sampling.stop = [\"85\"]");
    let ended = place.candor(&["check", "run.toml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(!place.path("results").exists());
    for words in [
        "boolq       28 training tasks, 12 held out",
        "prompt      boolq/train/",
        "  first     [",
        "  BOS       <|endoftext|> (0), 0 at the start",
        "scores      reward  parsed      confidence  completion",
        "  good       0.728  Ok                0.85  \"ANSWER: ",
        "            (brier 0.978, length -0.250)",
        "  bad        0.028  Ok                0.85",
        "  empty     -0.375  Missing              -  \"\"",
        "  truncated -0.500  Missing              -",
    ] {
        assert!(ended.stdout.contains(words), "{words:?}: {}", ended.stdout);
    }
    // What the config really gets wrong: 10 tokens hold no answer, and the stop string cuts one.
    let odd: Vec<&str> = ended.stdout.lines().filter(|line| line.starts_with("odd: ")).collect();
    assert!(
        matches!(odd[..], [tokens, stop] if tokens.ends_with("sampling.max_tokens is 10") && stop.contains("\"85\" cuts")),
        "{odd:?}"
    );
    let place = Place::new("sampling = { max_tokens = 40, stop = [] }");
    let ended = place.candor(&["check", "run.toml"]);
    assert!(ended.code == Some(0) && ended.stdout.ends_with("nothing odd\n"), "{}{}", ended.stdout, ended.stderr);
    let folds = "no system role: instructions are put before the first question";
    assert!(!ended.stdout.contains(folds), "{}", ended.stdout);
    let template = place.path("model/chat_template.jinja");
    let raises = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}";
    let text = format!("{raises}{}", fs::read_to_string(&template).unwrap());
    fs::remove_file(&template).unwrap();
    fs::write(&template, text).unwrap();
    let ended = place.candor(&["check", "run.toml"]);
    assert!(ended.code == Some(0) && ended.stdout.contains(folds), "{}{}", ended.stdout, ended.stderr);
}

#[test]
fn an_evaluation_prints_a_table_and_leaves_nothing() {
    let place = Place::new("");
    let ended = place.candor(&["eval", "run.toml", "--quiet"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    assert!(ended.stdout.starts_with("boolq: 3 held-out tasks, base model\n"), "{}", ended.stdout);
    assert!(
        ended.stdout.contains("read 0 of 3 answers: missing 3") && ended.stdout.contains("-0.250"),
        "{}",
        ended.stdout
    );
    assert!(!place.path("results").exists());
    place.finish(&[]);
    let ended = place.candor(&["eval", "run.toml", "--adapter", "results/tiny/checkpoints/step-000003"]);
    assert!(ended.code == Some(0) && ended.stdout.contains("adapter"), "{}", ended.stderr);
    // Before anything else that is named is looked for.
    let ended = place.candor(&["eval", "run.toml", "--adapter", "nowhere", "--set", "environment.0.source=gone"]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("error: --adapter: nowhere/adapter_config.json: cannot read"), "{}", ended.stderr);
    let ended = place.candor(&["eval", "run.toml", "--set", "evaluation.tasks=0"]);
    assert!(ended.code == Some(2) && ended.stderr.contains("evaluation.tasks is 0"), "{}", ended.stderr);
}

#[test]
fn the_log_holds_what_was_said_and_more_where_asked() {
    let place = Place::new("");
    let ended = place.finish(&[]);
    let log = fs::read_to_string(place.path("results/tiny/log.txt")).unwrap();
    for line in ended.stderr.lines() {
        assert!(log.contains(line), "{line:?} is not in the log: {log}");
    }
    assert!(log.contains("INFO") && !log.contains("DEBUG"), "{log}");
    fs::remove_dir_all(place.path("results")).unwrap();
    let ended = place.wait(place.start(&["sh", "-c", &format!("RUST_LOG=candor=debug {CANDOR} train run.toml")]));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let log = fs::read_to_string(place.path("results/tiny/log.txt")).unwrap();
    let endings = log.lines().filter(|line| line.contains("DEBUG") && line.contains("completion ended")).count();
    assert_eq!(endings, 3 * 12 + 6, "{log}");
    assert!(!ended.stderr.contains("DEBUG"));
    let ended = place.wait(place.start(&["sh", "-c", &format!("RUST_LOG=a=b=c {CANDOR} train run.toml")]));
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.starts_with("error: RUST_LOG: \"a=b=c\" is not a filter"), "{}", ended.stderr);
}

#[test]
fn the_readme_shows_the_example_as_it_is() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap();
    let (readme, example) = (read("README.md"), read("examples/sums/src/sums.rs") + &read("examples/sums/src/main.rs"));
    let blocks: Vec<&str> = readme.split("```rust\n").skip(1).filter_map(|text| text.split("```").next()).collect();
    assert_eq!(blocks.len(), 2);
    for block in blocks {
        assert!(example.contains(block), "not in the example:\n{block}");
    }
}
