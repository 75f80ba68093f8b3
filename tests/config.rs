//! Config files: every key of the contract, resolved configs, and what is refused with which words.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candor::config::{Config, Device, Projection, Reference, SamplerKind, Schedule};
use candor::objective::ImportanceLevel;
use proptest::prelude::*;

/// The least that a config must say.
pub const SMALL: &str = "name = \"small\"\n[model]\nsource = \"weights\"\n[[environment]]\nname = \"toy\"\n";

/// The contract's file of all keys, or the copy of its keys that the project keeps.
pub fn reference() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = std::env::var_os("CANDOR_CONTRACT").map_or(root.join("../shared/contract"), PathBuf::from);
    let candidates = [folder.join("reference.toml"), root.join("tests/data/reference.toml")];
    candidates.iter().find_map(|path| std::fs::read_to_string(path).ok()).expect("tests/data/reference.toml is there")
}

/// Every key of a table by its dotted path; an environment's own keys are left out.
fn keys(table: &toml::Table, prefix: &str, into: &mut BTreeSet<String>) {
    for (key, value) in table {
        let path = format!("{prefix}{key}");
        match value {
            toml::Value::Table(inner) => keys(inner, &format!("{path}."), into),
            toml::Value::Array(items) if key == "environment" => {
                let own = ["name", "weight"].into_iter().filter(|own| items.iter().all(|item| item.get(own).is_some()));
                into.extend(own.map(|own| format!("{path}.{own}")));
            }
            _ => drop(into.insert(path)),
        }
    }
}

fn keys_of(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    keys(&text.parse().expect("valid TOML"), "", &mut found);
    found
}

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, "small.toml").map_err(|error| format!("{error:#}"))
}

#[test]
fn the_contract_loads_and_its_values_are_the_defaults() {
    let text = reference();
    let contract = Config::parse(&text, "reference.toml").expect("the contract loads");
    let first = contract.environments[0].clone();
    assert_eq!((first.name.as_str(), first.weight), ("boolq", 1.0));
    assert!(first.options.contains_key("reasoning") && first.options.contains_key("length"), "{:?}", first.options);

    let mut defaults = parse(SMALL).unwrap();
    defaults.name = contract.name.clone();
    defaults.model.source = contract.model.source.clone();
    defaults.environments = contract.environments.clone();
    assert_eq!(defaults, contract);
}

#[test]
fn resolved_defaults_hold_the_contracts_keys_and_no_others() {
    let text = reference();
    let mut written = keys_of(&parse(SMALL).unwrap().to_toml().unwrap());
    let mut contract = keys_of(&text);
    for added in ["batch.long_prompts", "sampling.logprobs", "sampling.samplers", "silence_seconds"] {
        assert!(written.remove(added), "{added}: added after the contract was written");
    }
    // These the contract gives in a comment: empty lists, and what follows an importance level.
    for (key, comment) in [
        ("sampling.endpoints", "[[sampling.endpoints]]"),
        ("evaluation.environment", "[[evaluation.environment]]"),
        ("learner.importance.mode", "mode = \"truncate\""),
        ("learner.importance.max", "max = 2.0"),
    ] {
        assert!(text.contains(comment), "the contract no longer mentions {comment}");
        written.remove(key);
        written.remove(&format!("{key}.name"));
        written.remove(&format!("{key}.weight"));
        contract.remove(key);
    }
    assert_eq!(written, contract);
}

/// Catches a default that overrules what is written, and one that weighs where the loss has a ratio of its own.
#[test]
fn samples_of_older_policies_are_weighed_unless_it_is_said() {
    for (learner, level, want) in [
        ("", 0, ImportanceLevel::None),
        ("", 1, ImportanceLevel::Token),
        ("learner.importance.level = \"none\"", 1, ImportanceLevel::None),
        ("learner.importance = { level = \"sequence\", mode = \"mask\" }", 2, ImportanceLevel::Sequence),
        ("learner.policy_loss = \"prime\"", 1, ImportanceLevel::None),
        ("learner.policy_loss = \"cispo\"", 1, ImportanceLevel::None),
        ("learner.ratio = \"sequence\"", 1, ImportanceLevel::None),
        ("learner.delta = 3.0", 1, ImportanceLevel::None),
    ] {
        let config = parse(&format!("sampling.async_level = {level}\n{learner}\n{SMALL}")).unwrap();
        assert_eq!(config.learner.importance.level, want, "{learner}, level {level}");
        assert_eq!(parse(&config.to_toml().unwrap()).unwrap(), config);
    }
}

#[test]
fn a_resolved_config_loads_as_itself() {
    let every_kind = "name = \"x-1.b\"\nsteps = 3\n[model]\nsource = \"m\"\ndevice = \"cpu\"\ndtype = \"f32\"\n\
        [lora]\nalpha = 8\ntargets = [\"down_proj\", \"q_proj\"]\nstart_from = \"there\"\n\
        [[environment]]\nname = \"a\"\nweight = 2\nlength = { mode = \"soft\", weight = 0.25 }\n\
        [environment.judge]\nkind = \"lexical\"\n\
        [[environment]]\nname = \"b\"\n[sampling]\nstop = [\"\\n\"]\n\
        [learner]\nlearning_rate = 3e-7\nschedule = \"linear\"\nkl = 0.1\nkl_estimator = \"unbiased\"\n\
        importance = { level = \"token\", max = 5 }\n\
        [[evaluation.environment]]\nname = \"c\"\nsource = \"there\"\n";
    for text in [SMALL, every_kind, &reference()] {
        let config = parse(text).unwrap();
        let written = config.to_toml().unwrap();
        let again = parse(&written).unwrap_or_else(|error| panic!("{error}\n{written}"));
        assert_eq!(again, config, "{written}");
        assert_eq!(again.to_toml().unwrap(), written);
    }
    let config = parse(every_kind).unwrap();
    assert_eq!(config.model.device, Device::Cpu);
    assert_eq!(config.lora.targets, [Projection::DownProj, Projection::QProj]);
    assert_eq!(config.learner.schedule, Schedule::Linear);
    assert_eq!(config.sampling.kind, SamplerKind::Local);
    assert_eq!(config.environments[0].options["judge"]["kind"].as_str(), Some("lexical"));
    assert_eq!(config.learner.reference, Some(Reference::Start), "the default with lora.start_from");
}

/// A change to [`SMALL`] (text to add at the end, or before `[model]`), and what the message must say.
const REFUSED: &[(&str, &str, &[&str])] = &[
    ("steps = 0\n", "", &["small.toml:2: steps: 0 is not between 1 and"]),
    ("steps = -4\n", "", &["small.toml:2: steps: -4 is not a whole number from 0 up"]),
    ("steps = 9_000_000_000_000\n", "", &["small.toml:2: steps:"]),
    ("seed = \"a\"\n", "", &["small.toml:2: seed: \"a\" is not a whole number from 0 up"]),
    ("stpes = 3\n", "", &["small.toml:2: stpes: unknown key; did you mean `steps`?"]),
    ("epochs = 0\n", "", &["small.toml:2: epochs: 0 is not between 1 and"]),
    ("steps = 3\nepochs = 3\n", "", &["small.toml:3: epochs: stands in place of `steps`", "remove one"]),
    ("", "[lora]\nrank = 0\n", &["small.toml:7: lora.rank:"]),
    ("", "[lora]\nalpha = nan\n", &["small.toml:7: lora.alpha: NaN must be finite, more than 0"]),
    ("", "[lora]\ntargets = []\n", &["small.toml:7: lora.targets: is empty"]),
    ("", "[lora]\ntargets = [\"q_proj\", \"q_proj\"]\n", &["lora.targets: names a projection twice"]),
    (
        "",
        "[lora]\ntargets = [\"query\"]\n",
        &["small.toml:7: lora.targets.0: \"query\" is unknown; known: q_proj, k_proj"],
    ),
    ("", "[lora]\ndropout = 1.0\n", &["lora.dropout: 1 must be finite, at least 0 and less than 1"]),
    ("", "weight = 0.0\n", &["small.toml:6: environment.0.weight: 0 must be finite, more than 0"]),
    ("", "weight = \"much\"\n", &["small.toml:6: environment.0.weight: \"much\" is not a number"]),
    ("", "[[environment]]\nweight = 1.0\n", &["small.toml:6: environment.1.name: is missing"]),
    ("", "[[environment]]\nname = \"\"\n", &["small.toml:7: environment.1.name: is empty"]),
    (
        "",
        "[[evaluation.environment]]\nname = \"b\"\nweight = 2.0\n",
        &["small.toml:8: evaluation.environment.0.weight: has no effect"],
    ),
    ("", "[batch]\nprompts = 0\n", &["batch.prompts"]),
    ("", "[batch]\ngroup = 0\n", &["small.toml:7: batch.group: 0"]),
    ("", "[batch]\nmicro_tokens = 32\n", &["batch.micro_tokens: 32 cannot hold", "sampling.max_tokens = 32"]),
    ("", "[sampling]\nmax_tokens = 0\n", &["sampling.max_tokens"]),
    ("", "[sampling]\ntemperature = -1.0\n", &["sampling.temperature: -1 must"]),
    ("", "[sampling]\ntemperature = 0\n", &["sampling.temperature: 0 must be finite, more than 0"]),
    ("", "[sampling]\nstop = [\"\"]\n", &["sampling.stop"]),
    ("", "[sampling]\nkind = \"openai\"\n", &["small.toml:7: sampling.kind", "needs servers"]),
    (
        "",
        "[learner]\npolicy_loss = \"prime\"\nratio = \"sequence\"\n",
        &["learner.policy_loss: \"prime\" has a ratio of its own"],
    ),
    ("", "[learner]\npolicy_loss = \"prime\"\nimportance.level = \"token\"\n", &["learner.policy_loss: \"prime\""]),
    ("", "[learner]\ndelta = 2.0\nimportance.level = \"token\"\n", &["learner.delta: has no effect"]),
    ("", "[learner]\nclip = [1.5, 0.2]\n", &["learner.clip: 1.5", "at most 1"]),
    ("silence_seconds = 0\n", "", &["silence_seconds: 0 is not between 1"]),
    ("", "[sampling]\nasync_level = 65\n", &["sampling.async_level: 65 versions behind"]),
    (
        "",
        "[[sampling.endpoints]]\nbase_url = \"b\"\nmodel = \"m\"\n",
        &["sampling.endpoints.0.adapter_dir: is missing"],
    ),
    ("", "[sampling]\ntop_p = 0.9\n", &["small.toml:7: sampling.top_p: "]),
    ("", "[learner]\nlearning_rate = inf\n", &["learner.learning_rate: inf must be finite"]),
    ("", "[learner]\nclip = [-0.1, 0.2]\n", &["small.toml:7: learner.clip: -0.1"]),
    ("", "[learner]\nclip = [0.1]\n", &["small.toml:7: learner.clip: ", "1 items are not a list of length 2"]),
    ("", "[learner]\nbetas = [0.9, 1.0]\n", &["learner.betas: 1 must", "less than 1"]),
    ("", "[learner]\nepsilon = 0\n", &["learner.epsilon"]),
    ("", "[learner]\nepsilon = 0.2\n", &["learner.epsilon: 0.2 must", "at most 0.01"]),
    ("", "[learner]\nkl = -0.1\n", &["learner.kl"]),
    ("", "[learner]\ndelta = 1.1\n", &["learner.delta: 1.1 must be finite, more than 1.28"]),
    ("", "[learner]\npolicy_loss = \"cispo\"\ndelta = 4.0\n", &["learner.delta: bounds the ratio"]),
    ("", "[learner]\nkl_estimator = \"k3\"\n", &["small.toml:7: learner.kl_estimator: has no effect"]),
    ("steps = 5\n", "[learner]\nwarmup_steps = 5\n", &["small.toml:8: learner.warmup_steps: 5 steps of warm-up leave"]),
    ("", "[learner]\nschedule = 3\n", &["learner.schedule: 3 is not one of \"constant\", \"linear\", \"cosine\""]),
    ("", "[learner]\nschedule = [1]\n", &["learner.schedule: a list is not one of \"constant\""]),
    ("", "[learner]\nschedule = {}\n", &["learner.schedule: this table is not one of \"constant\""]),
    ("", "[learner]\nschedule = { cosine = 1 }\n", &["learner.schedule.cosine: takes no value; write this name in"]),
    ("", "[learner]\nschedule = 2024-01-01\n", &["learner.schedule: 2024-01-01 is not one of"]),
    ("", "[learner]\nbetas = 3\n", &["learner.betas: 3 is not a list of length 2"]),
    ("steps = 2024-01-01\n", "", &["small.toml:2: steps: the date 2024-01-01 is not a whole number from 0 up"]),
    ("learner = 2024-01-01\n", "", &["small.toml:2: learner: the date 2024-01-01 is not a table"]),
    ("steps = 99999999999999999999\n", "", &["steps: 99999999999999999999 is not a whole number from -2^63 to"]),
    ("exntends = \"a\"\n", "", &["small.toml:2: exntends: unknown key; did you mean `extends`?"]),
    ("", "[[environment]]\nnam = \"b\"\n", &["small.toml:7: environment.1.nam: unknown key; did you mean `name`?"]),
    ("", "[lora]\ntargets = \"q_proj\"\n", &["lora.targets: \"q_proj\" is not a list; write [\"q_proj\"]"]),
    ("", "[learner]\nreference = \"start\"\n", &["learner.reference", "lora.start_from"]),
    ("", "[learner]\nimportance = { level = \"token\", max = 0.0 }\n", &["small.toml:7: learner.importance.max"]),
    ("", "[evaluation]\nmax_tokens = 0\n", &["evaluation.max_tokens"]),
    ("", "[evaluation]\ntemperature = -0.5\n", &["evaluation.temperature"]),
    ("", "[checkpoint]\nkeep = 0\n", &["checkpoint.keep"]),
];

#[test]
fn what_cannot_work_is_refused_by_key_and_line() {
    for (top, end, wanted) in REFUSED {
        let text = SMALL.replacen("[model]", &format!("{top}[model]"), 1) + end;
        let message = parse(&text).expect_err(&format!("accepted: {top}{end}"));
        assert!(message.starts_with("small.toml:"), "{message}");
        for part in *wanted {
            assert!(message.contains(part), "{top}{end}: no {part:?} in: {message}");
        }
    }
}

/// A config whose completions come from one server.
const SERVED: &str = "[sampling]\nkind = \"openai\"\n[[sampling.endpoints]]\nbase_url = \"http://h/v1\"\nmodel = \"m\"\nadapter_dir = \"a\"\n";

/// Catches servers whose numbers would not be those of the policy, and what no server could be asked with.
#[test]
fn servers_that_cannot_sample_for_training_are_refused() {
    let text = |more: &str| format!("{SMALL}{SERVED}{more}");
    parse(&text("")).unwrap();
    let second = &SERVED[SERVED.find("[[").unwrap()..];
    for (text, wanted) in [
        (text("").replace("openai", "local"), "sampling.endpoints: has no effect with kind = \"local\""),
        (text("").replace("http://h", "h"), "sampling.endpoints.0.base_url: is not an address"),
        (text("").replace("http://", "http://user:secret@"), "sampling.endpoints.0.base_url: is not an address"),
        (text("").replace("\"m\"", "\" \""), "sampling.endpoints.0.model: is empty"),
        (text("").replace("\"a\"", "\"\""), "sampling.endpoints.0.adapter_dir: is empty"),
        (text("concurrency = 0\n"), "sampling.endpoints.0.concurrency: 0 is not between 1 and 1024"),
        (text("timeout_seconds = 0\n"), "sampling.endpoints.0.timeout_seconds: 0 is not between 1 and 86400"),
        (text(second), "sampling.endpoints.1.base_url: is named twice"),
        (
            text(&format!("concurrency = 1000\n{}", second.replace("//h", "//i"))),
            "1064 requests at once are more than 1024",
        ),
        (text("").replace("[sampling]\n", "[sampling]\ntemperature = 0.9\n"), "sampling.temperature: 0.9: servers"),
        (text("").replace("[sampling]\n", "[sampling]\nsamplers = 2\n"), "sampling.samplers: has no effect"),
        (text("[evaluation]\ntemperature = 0.7\n"), "evaluation.temperature: 0.7: servers"),
    ] {
        let message = parse(&text).expect_err(&format!("accepted: {text}"));
        assert!(message.contains(wanted) && !message.contains("secret"), "no {wanted:?} in: {message}");
    }
}

#[test]
fn model_keys_and_names_are_refused() {
    for (old, new, wanted) in [
        ("\"weights\"", "\" \"", "small.toml:3: model.source: is empty; name a folder, a .gguf file, or an hf: "),
        ("\"weights\"", "\"m\"\ndevice = \"cuda:-1\"", "small.toml:4: model.device: unknown device \"cuda:-1\""),
        ("\"weights\"", "\"m\"\ndevice = \"gpu\"", "expected \"auto\", \"cpu\" or \"cuda:0\""),
        (
            "\"weights\"",
            "\"m\"\ndtype = \"f16\"",
            "small.toml:4: model.dtype: \"f16\" is unknown; did you mean \"bf16\"?",
        ),
        ("\"weights\"", "\"m\"\ndtype = \"int8\"", "small.toml:4: model.dtype: int8 is for `candor chat`"),
        (
            "\"weights\"",
            "\"m\"\nkernel = \"sse\"",
            "small.toml:4: model.kernel: \"sse\" is unknown; known: amx, avx512_bf16, avx512, gemm",
        ),
        (
            "\"weights\"",
            "\"m\"\nquantization = \"q3\"",
            "small.toml:4: model.quantization: \"q3\" is unknown; known: nf4, q8_0, keep",
        ),
        ("source = \"weights\"\n", "", "small.toml:2: model.source: is missing"),
        ("[[environment]]\nname = \"toy\"\n", "", "small.toml: environment: nothing to train on"),
        ("name = \"small\"\n", "", "small.toml: name: is missing"),
        ("\"small\"", "\"../up\"", "small.toml:1: name: \"../up\" must be a plain folder name"),
        ("\"small\"", "\"a/b\"", "plain folder name"),
        ("\"small\"", "\"\"", "plain folder name"),
        ("\"small\"", "\"-rf\"", "plain folder name"),
        ("\"small\"", "\".hidden\"", "plain folder name"),
    ] {
        assert!(SMALL.contains(old), "{old}");
        let message = parse(&SMALL.replacen(old, new, 1)).expect_err(new);
        assert!(message.contains(wanted), "{new}: no {wanted:?} in: {message}");
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = Config::load(Path::new("nowhere/none.toml"), &[]).unwrap_err();
    assert!(error.to_string().contains("nowhere/none.toml"), "{error:#}");
}

#[test]
fn every_config_of_the_project_loads() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut paths: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    assert!(paths.iter().any(|path| path.ends_with("quickstart.toml")), "{paths:?}");
    for path in paths {
        let config = Config::load(&path, &[]).unwrap_or_else(|error| panic!("{error:#}"));
        assert_eq!(
            Some(config.name.as_str()),
            path.file_stem().and_then(|stem| stem.to_str()),
            "the file's name and the run's"
        );
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "[ -~\\n]{0,80}") {
        drop(parse(&text));
        drop(parse(&format!("{SMALL}{text}")));
    }
}
