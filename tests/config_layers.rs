//! The layers of a config: what `extends` and `--set` merge, and which place each error names.

use std::fs;
use std::path::Path;

use candor::config::{Config, LongPrompts, Projection, Schedule};
use candor_environments::KeyError;
use candor_environments::keys;
use candor_environments::length::Length;
use proptest::prelude::*;
use serde::Deserialize;

/// The least that a config must say, on seven lines, and a list of tables in it.
const BASE: &str = "name = \"base\"\n[model]\nsource = \"weights\"\n[learner]\nclip = [0.1, 0.1]\nkl = 0.5\n\
    [[environment]]\nname = \"a\"\nsize = 3\n[[environment]]\nname = \"b\"\n";

/// A folder with these files.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

/// Loads a file of a folder; errors as the program prints them, without the folder's path.
fn load(folder: &Path, file: &str, sets: &[&str]) -> Result<Config, String> {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    let shown = |error: anyhow::Error| format!("{error:#}").replace(&format!("{}/", folder.display()), "");
    Config::load(&folder.join(file), &sets).map_err(shown)
}

/// [`BASE`] under these `--set`s.
fn set(sets: &[&str]) -> Result<Config, String> {
    load(folder(&[("base.toml", BASE)]).path(), "base.toml", sets)
}

fn place(folder: &Path, config: &Config, key: &str) -> String {
    config.place(key).unwrap().replace(&format!("{}/", folder.display()), "")
}

#[test]
fn a_file_is_merged_over_those_that_it_extends() {
    let files = folder(&[
        ("base.toml", BASE),
        ("middle.toml", "extends = \"base.toml\"\nname = \"middle\"\n[learner]\nclip = [0.3, 0.4]\nwarmup_steps = 7\n"),
        ("runs/top.toml", "extends = \"../middle.toml\"\n[learner]\nkl = 0.0\n[[environment]]\nname = \"c\"\n"),
    ]);
    let config = load(files.path(), "runs/top.toml", &[]).unwrap();
    assert_eq!((config.name.as_str(), config.model.source.as_str()), ("middle", "weights"));
    let learner = &config.learner;
    assert_eq!((learner.clip, learner.warmup_steps, learner.kl), ([0.3, 0.4], 7, 0.0), "tables merge, lists do not");
    let names: Vec<_> = config.environments.iter().map(|environment| environment.name.as_str()).collect();
    assert_eq!(names, ["c"], "[[environment]] is replaced as a whole");
    assert!(config.environments[0].options.is_empty(), "{:?}", config.environments);
    assert!(!config.to_toml().unwrap().contains("extends"));

    for (key, wanted) in [
        ("name", "runs/../middle.toml:2"),
        ("model.source", "runs/../base.toml".replace("base", "../base").as_str()),
        ("learner.kl", "runs/top.toml:3"),
        ("learner.clip.1", "runs/../middle.toml:4"),
        ("environment.0.name", "runs/top.toml:5"),
        ("environment.0.size", "runs/top.toml:4"),
        ("environment.1.name", "runs/top.toml:4"),
        ("steps", "runs/top.toml"),
        ("checkpoint.keep", "runs/top.toml"),
    ] {
        let wanted = wanted.replace("../../base.toml", "../base.toml:3");
        assert_eq!(place(files.path(), &config, key), wanted, "{key}");
    }
}

#[test]
fn an_error_names_the_file_and_line_that_its_value_comes_from() {
    for (base, top, wanted) in [
        ("[learner]\n\nkl = -1.0\n", "[learner]\nclip = [0.1, 0.1]\n", "base.toml:3: learner.kl: -1 must be"),
        ("[learner]\nkl = 0.0\n", "[learner]\nkl = -1.0\n", "top.toml:6: learner.kl: -1 must be"),
        ("[learner]\nclip = [1, 2, 3]\n", "", "base.toml:2: learner.clip: 3 items are not a list of length 2"),
        ("[lora]\ntargets = [\n\"q_proj\",\n\"qq\"]\n", "", "base.toml:4: lora.targets.1: \"qq\" is unknown"),
        ("learner = 3\n", "[learner]\nkl = -1.0\n", "top.toml:6: learner.kl: -1"),
        ("[learner]\nkl = 0.1\n", "learner = 3\n", "top.toml:5: learner: 3 is not a table"),
        ("steps = \n", "", "base.toml:1: `steps =`: "),
        ("steps = 99999999999999999999\n", "", "base.toml:1: steps: "),
        ("steps = 1\nsteps = 2\n", "", "base.toml:2: `steps = 2`: duplicate key"),
    ] {
        let needed = "name = \"top\"\nmodel.source = \"weights\"\nenvironment = [{ name = \"a\" }]\n";
        let top = format!("extends = \"base.toml\"\n{needed}{top}");
        let error = load(folder(&[("base.toml", base), ("top.toml", &top)]).path(), "top.toml", &[]).unwrap_err();
        assert!(error.starts_with(wanted), "{base}{top}: {error}");
    }
}

#[test]
fn an_extends_that_leads_nowhere_or_in_a_circle_is_refused() {
    let files = folder(&[
        ("self.toml", "extends = \"./self.toml\"\n"),
        ("a.toml", "name = \"a\"\nextends = \"b.toml\"\n"),
        ("b.toml", "extends = \"a.toml\"\n"),
        ("missing.toml", "\nextends = \"none.toml\"\n"),
        ("folder.toml", "extends = \"inner\"\n"),
        ("inner/x.toml", ""),
        ("number.toml", "extends = [\"a.toml\"]\n"),
        ("deep.toml", "extends = \"self.toml\"\n"),
    ]);
    for (file, wanted) in [
        ("self.toml", "self.toml:1: extends: the files extend each other in a circle: self.toml -> ./self.toml;"),
        ("a.toml", "b.toml:1: extends: the files extend each other in a circle: a.toml -> b.toml -> a.toml;"),
        ("deep.toml", "self.toml:1: extends: the files extend each other in a circle: deep.toml -> self.toml -> "),
        ("missing.toml", "missing.toml:2: extends: cannot read the config none.toml: No such file"),
        ("folder.toml", "folder.toml:1: extends: inner: is a folder; name a config file"),
        ("number.toml", "number.toml:1: extends: name one config file"),
    ] {
        let error = load(files.path(), file, &[]).unwrap_err();
        assert!(error.starts_with(wanted), "{file}: {error}");
    }
    let chain: Vec<_> = (0..40).map(|n| (format!("{n}.toml"), format!("extends = \"{}.toml\"\n", n + 1))).collect();
    let chain: Vec<_> = chain.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let error = load(folder(&chain).path(), "0.toml", &[]).unwrap_err();
    assert!(error.contains("more than 16 files extend each other"), "{error}");
}

#[test]
fn sets_are_merged_last_and_typed_like_toml() {
    let config = set(&[
        "learner.learning_rate=2e-5",
        " steps = 7 ",
        "name=second",
        "model.source=pip:x==1/y",
        "learner.schedule=constant",
        "learner.clip.1=0.3",
        "lora.targets=[\"q_proj\", \"down_proj\"]",
        "lora.start_from=../adapters/a",
        "batch={ group = 4, long_prompts = \"error\" }",
        "environment.1.source=\"x = 1\"",
        "environment.0={ size = 5 }",
        "environment.0.length.mode=soft",
        "environment.0.length.weight=0.5",
        "steps=9",
    ])
    .unwrap();
    assert_eq!((config.learner.learning_rate, config.steps, config.name.as_str()), (2e-5, 9, "second"));
    assert_eq!((config.model.source.as_str(), config.learner.schedule), ("pip:x==1/y", Schedule::Constant));
    assert_eq!((config.learner.clip, config.learner.kl), ([0.1, 0.3], 0.5));
    assert_eq!(config.lora.targets, [Projection::QProj, Projection::DownProj]);
    assert_eq!(config.lora.start_from.as_deref(), Some("../adapters/a"));
    assert_eq!((config.batch.group, config.batch.prompts, config.batch.long_prompts), (4, 8, LongPrompts::Error));
    assert_eq!(config.environments[1].options["source"].as_str(), Some("x = 1"));
    assert_eq!(config.environments[0].name, "a", "a table is merged key by key");
    assert_eq!(config.environments[0].options["size"].as_integer(), Some(5));

    for (key, wanted) in [
        ("steps", "--set steps=9"),
        ("batch.group", "--set batch={ group = 4, long_prompts = \"error\" }"),
        ("environment.0.size", "--set environment.0={ size = 5 }"),
        ("learner.clip.1", "--set learner.clip.1=0.3"),
        ("environment.0.length", "--set environment.0.length.mode=soft"),
        ("environment.0.length.weight", "--set environment.0.length.weight=0.5"),
    ] {
        assert_eq!(config.place(key).unwrap(), wanted);
    }
    assert!(config.place("learner.clip.0").unwrap().ends_with("base.toml:5"));
    assert!(config.place("environment.1.name").unwrap().ends_with("base.toml:11"));
}

#[test]
fn a_word_without_quotes_is_a_text_only_where_it_can_be_nothing_else() {
    for word in ["second", "pip:x==1/y", "/a/b", "./a", "../a", "a~b", "a@b", "über", "_x", "none", "hf:a/b@c"] {
        let config = set(&[&format!("model.source={word}")]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(config.model.source, word);
    }
    for not in [
        "",
        "1x",
        "1e-5x",
        "-a",
        "+",
        ".5",
        ".",
        "2024-13-01x",
        "True",
        "FALSE",
        "NaN",
        "Inf",
        "\"a",
        "'a",
        "[a",
        "a]",
        "{a",
        "a,b",
        "a b",
        "a#b",
        "1\nseed=3",
        "a\nb",
        "=",
        "a\\b",
        "\u{feff}a",
    ] {
        let error = set(&[&format!("model.source={not}")]).expect_err(not);
        assert!(error.starts_with(&format!("--set model.source={not}: model.source: ")), "{error}");
        assert!(error.contains("is no TOML value") && error.contains("'model.source=\"…\"'"), "{error}");
    }
    for typed in ["1", "true", "2024-01-01", "inf", "[1]", "{ a = 1 }"] {
        let error = set(&[&format!("model.source={typed}")]).expect_err(typed);
        assert!(error.contains(": model.source: ") && error.contains("is not a string"), "{error}");
    }
}

#[test]
fn a_set_that_leads_nowhere_is_quoted() {
    for (argument, wanted) in [
        ("steps", "write key.path=value"),
        ("=3", "\"\" is no key"),
        (".steps=3", "\".steps\" is no key"),
        ("learner..kl=3", "\"learner..kl\" is no key"),
        ("\"a.b\"=3", "is no key"),
        ("a b=3", "\"a b\" is no key"),
        ("environment.2.name=x", "environment is a list of 2, counted from 0; \"2\" is none of them"),
        ("environment.-1.name=x", "\"-1\" is none of them"),
        ("environment.name=x", "environment is a list of 2, counted from 0; \"name\" is none of them"),
        ("name.x=3", "name is no table but \"base\"; it has no key \"x\""),
        ("learner.clip.0.x=3", "learner.clip.0 is no table but 0.1"),
        ("extends=a.toml", "extends is read from files only"),
        ("steps=-1", "steps: -1 is not a whole number from 0 up"),
        ("steps=0", "steps: 0 is not between 1"),
        ("steps=99999999999999999999", "steps: 99999999999999999999 is not a whole number from -2^63 to below 2^63"),
        ("lerner.learning_rate=1", "lerner: unknown key; did you mean `learner`?"),
        ("a.b.c.d=3", "a: unknown key; known: "),
        ("lora.targets.0=k_proj", "lora.targets is not written in the config; give the whole list"),
        ("lora.targets=k_proj", "lora.targets: \"k_proj\" is not a list; write [\"k_proj\"]"),
        ("model.source=~/a", "model.source: the shell expands ~ only at the start of an unquoted word"),
        ("stepps=3", "stepps: unknown key; did you mean `steps`?"),
        ("sampling.max_token=3", "sampling.max_token: unknown key; did you mean `max_tokens`?"),
        (
            "learner.schedule=cosin",
            "learner.schedule: \"cosin\" is unknown; did you mean \"cosine\"? known: constant, ",
        ),
        ("learner={ lr = 3 }", "learner.lr: unknown key; here it is `learner.learning_rate`"),
        ("environment.0.weight=0", "environment.0.weight: 0 must be"),
    ] {
        let error = set(&[argument]).expect_err(argument);
        assert!(
            error.starts_with(&format!("--set {argument}: {wanted}")) || error.contains(wanted),
            "{argument}: {error}"
        );
        assert_eq!(error.matches("--set ").count(), 1, "{error}");
    }
    let deep = format!("{}=1", vec!["a"; 60_000].join("."));
    assert!(set(&[&deep]).unwrap_err().contains("more than 80 names in one key"));
    let nested = format!("name={}", "[".repeat(100_000));
    assert!(set(&[&nested]).unwrap_err().contains("is no TOML value"));
}

#[test]
fn an_unknown_key_is_met_with_the_name_that_was_meant() {
    for (section, key, wanted) in [
        ("learner", "learning_rat", "unknown key; did you mean `learning_rate`?"),
        ("learner", "max_tokens", "unknown key; did you mean `sampling.max_tokens` or `evaluation.max_tokens`?"),
        ("learner", "rank", "unknown key; did you mean `lora.rank`?"),
        ("evaluation", "seed", "unknown key; did you mean `seed`?"),
        ("learner", "xyz", "unknown key; known: learning_rate, schedule, "),
        ("batch", "num_generations", "unknown key; here it is `batch.group`"),
        ("learner", "lr", "unknown key; here it is `learner.learning_rate`"),
        ("learner", "beta", "unknown key; here it is `learner.kl`"),
        ("learner", "max_completion_length", "unknown key; here it is `sampling.max_tokens`"),
        ("sampling", "max_new_tokens", "unknown key; here it is `sampling.max_tokens`"),
        ("batch", "per_device_train_batch_size", "unknown key; here it is `batch.prompts`: prompts, not completions"),
        ("sampling", "top_p", "unknown key; behavior log-probabilities come from the full softmax"),
        ("sampling", "top_k", "would bias the policy ratio"),
        ("sampling", "min_p", "would bias the policy ratio"),
        ("sampling", "repetition_penalty", "would bias the policy ratio"),
    ] {
        let error = set(&[&format!("{section}.{key}=1")]).expect_err(key);
        let prefix = format!("--set {section}.{key}=1: {section}.{key}: ");
        assert!(error.starts_with(&prefix) && error.contains(wanted), "{error}");
    }
    let top = Config::parse(&format!("temperature = 1.0\n{BASE}"), "run.toml").unwrap_err().to_string();
    assert!(top.ends_with("did you mean `sampling.temperature` or `evaluation.temperature`?"), "{top}");
}

#[test]
fn every_foreign_name_leads_to_a_key_that_exists() {
    let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/config/names.rs")).unwrap();
    let every = regex::Regex::new(r"here it is `([a-z_.]+)`").unwrap();
    let known = toml::Value::Table(set(&[]).unwrap().to_toml().unwrap().parse().unwrap());
    let mut count = 0;
    for found in every.captures_iter(&source) {
        let leaf = found[1].split('.').try_fold(&known, |here, name| here.get(name));
        assert!(leaf.is_some() || ["epochs", "model.quantization"].contains(&&found[1]), "{}", &found[1]);
        count += 1;
    }
    assert!(count > 20, "{count}");
}

#[test]
fn what_is_no_text_is_refused_by_name() {
    let files = folder(&[("inner/x.toml", ""), ("base.toml", BASE)]);
    let path = files.path();
    fs::write(path.join("latin.toml"), b"name = \"x\"\n# caf\xe9\n").unwrap();
    fs::write(path.join("long.toml"), "#".repeat((1 << 20) + 1)).unwrap();
    fs::write(path.join("bom.toml"), format!("\u{feff}{BASE}steps = 3\nsteps = 3\n")).unwrap();
    for (file, wanted) in [
        ("inner", "inner: is a folder"),
        ("latin.toml", "latin.toml:2: is not UTF-8 text"),
        ("long.toml", "long.toml: is longer than 1048576 bytes"),
        ("bom.toml", "bom.toml:13: `steps = 3`: duplicate key"),
        ("none.toml", "cannot read the config none.toml: "),
    ] {
        let error = load(path, file, &[]).unwrap_err();
        assert!(error.starts_with(wanted), "{file}: {error}");
    }
    for text in [format!("\u{feff}{BASE}"), BASE.replace('\n', "\r\n")] {
        fs::write(path.join("odd.toml"), text).unwrap();
        let config = load(path, "odd.toml", &[]).unwrap();
        assert_eq!(config, set(&[]).unwrap());
        assert_eq!(place(path, &config, "environment.1.name"), "odd.toml:11");
    }
}

#[test]
fn deep_and_long_files_end_with_an_error_soon() {
    let deep = ["[".repeat(50_000), "{ a = ".repeat(50_000), "{".repeat(50_000)].map(|value| format!("a = {value}"));
    let names = vec!["a"; 200_000].join(".");
    let wide = |key: &str| (0..40_000).map(|n| format!("{}{n} = [{n}]\n", key)).collect::<String>();
    let mut texts = vec![format!("{names} = 1"), format!("[{names}]\n"), wide("k"), format!("[model]\n{}", wide("x."))];
    texts.extend(deep);
    for text in texts {
        let error = Config::parse(&text, "deep.toml").unwrap_err().to_string();
        assert!(error.starts_with("deep.toml:") && error.len() < 500 && !error.contains('\n'), "{error}");
    }
    // What nests as deep as the parser allows in a header, a dotted key and a value is an environment's own business.
    let nest = |count: usize| vec!["a"; count].join(".");
    let text = format!("{BASE}[environment.{}]\n{} = {}1{}\n", nest(70), nest(70), "[".repeat(70), "]".repeat(70));
    assert!(Config::parse(&text, "deep.toml").unwrap().environments[1].options["a"].is_table());
}

#[test]
fn the_readmes_config_and_command_line_work() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let text = readme.split("```toml\n").nth(1).and_then(|text| text.split("```").next()).unwrap();
    let command = readme.lines().find(|line| line.contains("--set ") && line.starts_with("candor train")).unwrap();
    let sets: Vec<&str> = command.split(" --set ").skip(1).collect();
    let quickstart = fs::read_to_string(root.join("configs/quickstart.toml")).unwrap();
    let files = folder(&[("quickstart.toml", &quickstart), ("second.toml", text)]);
    let config = load(files.path(), "second.toml", &sets).unwrap();
    assert_eq!((config.name.as_str(), config.batch.group, config.learner.learning_rate), ("third", 16, 2e-4));
    assert_eq!(config.environments[0].options["reward"].as_str(), Some("log"));
    fs::write(files.path().join("second.toml"), text.replace("learning_rate", "lr")).unwrap();
    let error = load(files.path(), "second.toml", &[]).unwrap_err();
    assert!(readme.contains(&error), "{error}");
}

#[test]
fn where_a_config_was_written_is_no_part_of_it() {
    let (from_file, from_text) = (set(&[]).unwrap(), Config::parse(BASE, "other.toml").unwrap());
    assert_eq!(from_file, from_text);
    assert_ne!(from_file.place("name"), from_text.place("name"));
    assert_eq!(from_file.to_toml().unwrap(), from_text.to_toml().unwrap());
    let problem = KeyError::new("size", "3 is too small").within("environment.0");
    assert_eq!(from_text.locate(problem).to_string(), "other.toml:9: environment.0.size: 3 is too small");
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Own {
    day: Option<toml::value::Datetime>,
    any: Option<toml::Value>,
    shape: Option<Shape>,
    length: Option<Length>,
    tagged: Option<Tagged>,
    #[serde(default)]
    pair: (i64, bool),
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Shape {
    Flat,
    Round { radius: f64 },
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(tag = "kind")]
enum Tagged {
    A {},
}

#[test]
fn the_nearest_name_is_one_slip_away_or_looks_alike() {
    for (written, meant) in [("lgo", Some("log")), ("og", None), ("brierr", Some("brier")), ("query", None)] {
        assert_eq!(keys::nearest(written, ["log", "brier", "spherical"]), meant, "{written}");
    }
}

#[test]
fn an_environments_own_options_have_the_same_manners() {
    let own = |text: &str| keys::typed::<Own>(text.parse::<toml::Table>().unwrap()).map_err(|error| error.to_string());
    let day = own("day = 2024-02-29\nany = { when = 2024-01-01T00:00:00Z }\npair = [1, true]\n").unwrap();
    assert_eq!((day.day.unwrap().to_string().as_str(), day.pair), ("2024-02-29", (1, true)));
    assert!(day.any.unwrap()["when"].is_datetime());
    assert_eq!(own("shape = \"flat\"").unwrap().shape, Some(Shape::Flat));
    assert_eq!(own("shape = { round = { radius = 2 } }").unwrap().shape, Some(Shape::Round { radius: 2.0 }));
    for (text, wanted) in [
        ("shape = { round = { radios = 2 } }", "shape.round.radios: unknown key; did you mean `radius`?"),
        ("shape = { round = { radius = \"big\" } }", "shape.round.radius: \"big\" is not a number"),
        ("shape = { round = {} }", "shape.round.radius: is missing"),
        ("shape = \"rund\"", "shape: \"rund\" is unknown; did you mean \"round\"? known: flat, round"),
        ("shape = 3", "shape: 3 is not one of \"flat\", \"round\""),
        ("shape = { flat = 1 }", "shape.flat: takes no value"),
        ("shape = { flat = 1, round = 2 }", "shape: this table is not one of"),
        ("shape = \"falt\"", "shape: \"falt\" is unknown; did you mean \"flat\"?"),
        ("length = \"soft\"", "length: \"soft\" is not a table such as { mode = \"soft\" }"),
        ("length = 2024-01-01", "length: the date 2024-01-01 cannot stand here"),
        ("tagged = \"a\"", "tagged: \"a\" is not a table"),
        ("pair = 3", "pair: 3 is not a list of length 2"),
        ("pair = [1, true, 3]", "pair: 3 items are not a list of length 2"),
        ("pair = [1, 2]", "pair.1: 2 is not true or false"),
        ("\"odd key.\\n\" = 1", "\"odd key.\\n\": unknown key"),
        ("day = 3", "day: 3 is not "),
    ] {
        let error = own(text).unwrap_err();
        assert!(error.starts_with(wanted), "{text}: {error}");
    }
}

proptest! {
    #[test]
    fn no_layer_makes_the_parser_panic(text in "[ -~\\n]{0,60}", set in "[a-z.0-9=\"\\[\\]{} ,-]{0,30}") {
        let files = folder(&[("base.toml", BASE), ("cut.toml", &text), ("top.toml", "extends = \"cut.toml\"\n")]);
        for file in ["base.toml", "cut.toml", "top.toml"] {
            if let Err(error) = load(files.path(), file, &[&set]) {
                prop_assert!(error.contains(".toml") || error.contains(&format!("--set {set}")), "{}", error);
            }
        }
    }

    #[test]
    fn a_value_set_is_the_value_written(number in any::<i64>(), float in any::<f64>(), text in "\\PC{0,20}") {
        for value in [toml::Value::from(number), toml::Value::from(float), toml::Value::from(text)] {
            let config = set(&[&format!("environment.0.size={value}")]).unwrap();
            let (found, wanted) = (&config.environments[0].options["size"], &value);
            prop_assert!(found == wanted || found.as_float().is_some_and(f64::is_nan), "{found} {wanted}");
        }
    }

    #[test]
    fn a_truncated_config_is_a_config_or_an_error_with_a_place(end in 0..BASE.len()) {
        if let Err(error) = Config::parse(&BASE[..end], "cut.toml") {
            prop_assert!(error.to_string().starts_with("cut.toml"), "{}", error);
        }
    }
}
