//! The reference page of every key, written from the doc comments of the structs that read them, and from their
//! defaults.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candor::config::{Config, Endpoint};
use candor::judge::options::JudgeOptions;
use candor_environments::length::Length;
use candor_environments::{boolq, dpo, implicit, keys, sft, simpleqa};
use serde::Serialize;
use serde::de::DeserializeOwned;
use syn::{Attribute, Expr, ExprLit, Field, GenericArgument, Item, Lit, Meta, PathArguments, Type, Variant};
use toml::{Table, Value};

use crate::config::{SMALL, reference};

/// The files whose types are read from a config.
const SOURCES: [&str; 16] = [
    "src/config/mod.rs",
    "src/config/sections.rs",
    "src/advantage.rs",
    "src/objective/mod.rs",
    "src/objective/policy.rs",
    "src/ops/kernel.rs",
    "src/judge/options.rs",
    "src/judge/prompt.rs",
    "environments/boolq.rs",
    "environments/simpleqa.rs",
    "environments/dpo.rs",
    "environments/implicit.rs",
    "environments/length.rs",
    "environments/losses.rs",
    "environments/scoring.rs",
    "environments/sft.rs",
];

const INTRODUCTION: &str = "# Every key of a config\n\n\
Written from the source by `CANDOR_BLESS=1 cargo test --test all config_page`; edit the doc comments there.\n\n\
A config is one TOML file. `extends = \"base.toml\"` puts it over another file, named relative to this one; then each \
`--set key.path=value` of the command line is put over both. Tables are merged key by key; lists, `[[environment]]` \
among them, are replaced as a whole. `--set environment.0.source=…` enters a list by an index, counted from 0. The value \
of a `--set` is TOML; quotes may be left out around a word that starts like a word or a path, holds letters, digits and \
`_-./:=+@~` only, and is not `true`, `false`, `inf` or `nan`. Other paths in a config are relative to the working \
directory.\n\n\
Only the keys marked as required must be given. The resolved config, in the run's folder, shows all of them.\n";

/// The types with serde attributes, by their names.
fn types() -> BTreeMap<String, Item> {
    let mut types = BTreeMap::new();
    for source in SOURCES {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(source)).unwrap();
        for item in syn::parse_file(&text).unwrap().items {
            // Every environment calls its own keys so.
            let module = source.rsplit_once('/').map_or(source, |(_, file)| file.trim_end_matches(".rs"));
            let qualified = |name: String| if name == "Options" { format!("{module}::{name}") } else { name };
            let (name, attributes) = match &item {
                Item::Struct(item) => (qualified(item.ident.to_string()), &item.attrs),
                Item::Enum(item) => (item.ident.to_string(), &item.attrs),
                _ => continue,
            };
            if attributes.iter().any(|attribute| attribute.path().is_ident("serde")) {
                assert!(types.insert(name.clone(), item).is_none(), "{name} is there twice");
            }
        }
    }
    types
}

/// The text of a doc comment, links without their brackets, as one paragraph.
fn docs(attributes: &[Attribute]) -> String {
    let line = |attribute: &Attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("doc") => match &pair.value {
            Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) => Some(text.value().trim().to_string()),
            _ => None,
        },
        _ => None,
    };
    let text = attributes.iter().filter_map(line).collect::<Vec<_>>().join(" ");
    regex::Regex::new(r"\[(`[^`]+`)\]").unwrap().replace_all(&text, "$1").replace("\\[", "[").replace("\\]", "]")
}

/// The value of a serde attribute such as `rename`; empty for one without a value.
fn serde_attribute(attributes: &[Attribute], wanted: &str) -> Option<String> {
    let mut found = None;
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("serde")) {
        let read = attribute.parse_nested_meta(|meta| {
            let value = match meta.value() {
                Ok(value) => value.parse::<syn::LitStr>()?.value(),
                Err(_) => String::new(),
            };
            if meta.path.is_ident(wanted) {
                found = Some(value);
            }
            Ok(())
        });
        read.unwrap();
    }
    found
}

/// The name in a config.
fn written_name(attributes: &[Attribute], ident: &syn::Ident) -> String {
    serde_attribute(attributes, "rename").unwrap_or_else(|| {
        let mut name = String::new();
        for character in ident.to_string().chars() {
            if character.is_uppercase() && !name.is_empty() {
                name.push('_');
            }
            name.extend(character.to_lowercase());
        }
        name
    })
}

/// What a type is called where its own name would not do.
const PLAIN: [(&str, &str); 10] = [
    ("String", "text"),
    ("Device", "text"),
    ("f64", "number"),
    ("u32", "whole number"),
    ("u64", "whole number"),
    ("usize", "whole number"),
    ("bool", "`true` or `false`"),
    ("Environment", "table as `[[environment]]`"),
    ("JudgeOptions", "table"),
    ("Table", "table"),
];

/// A type's container and its name: `Option<f64>` is Option and f64, `[f64; 2]` is 2 and f64, `f64` is f64 twice.
fn parts(kind: &Type) -> (String, String) {
    match kind {
        Type::Path(path) => {
            let last = path.path.segments.last().unwrap();
            let outer = last.ident.to_string();
            match &last.arguments {
                PathArguments::AngleBracketed(arguments) => match arguments.args.first() {
                    Some(GenericArgument::Type(inner)) => (outer, parts(inner).1),
                    _ => panic!("{outer} of no type"),
                },
                _ => (outer.clone(), outer),
            }
        }
        Type::Array(array) => match &array.len {
            Expr::Lit(ExprLit { lit: Lit::Int(length), .. }) => (length.to_string(), parts(&array.elem).1),
            _ => panic!("a length that is no number"),
        },
        _ => panic!("a type that no config holds"),
    }
}

/// What a section's keys hold where only the required ones are given.
struct Defaults {
    required: Table,
    resolved: Table,
}

impl Defaults {
    fn of<T: DeserializeOwned + Serialize>(least: &str) -> Defaults {
        let required: Table = least.parse().unwrap();
        let resolved = Table::try_from(keys::typed::<T>(required.clone()).unwrap()).unwrap();
        Defaults { required, resolved }
    }

    fn within(&self, key: &str) -> Defaults {
        let table = |table: &Table| {
            let value = table.get(key).map(|value| value.get(0).unwrap_or(value).clone());
            value.and_then(|value| value.as_table().cloned()).unwrap_or_default()
        };
        Defaults { required: table(&self.required), resolved: table(&self.resolved) }
    }

    fn said(&self, key: &str, optional: bool) -> String {
        match self.resolved.get(key) {
            _ if self.required.contains_key(key) => "required".into(),
            Some(Value::Float(default)) => format!("default `{default:?}`"),
            Some(default) => format!("default `{default}`"),
            None => {
                assert!(optional, "{key} is neither required nor has a default");
                "optional".into()
            }
        }
    }
}

struct Page<'a> {
    types: &'a BTreeMap<String, Item>,
    text: String,
}

impl<'a> Page<'a> {
    /// A paragraph or list entry, wrapped.
    fn write(&mut self, indent: usize, bullet: &str, text: &str) {
        let mut line = format!("{}{bullet}", " ".repeat(indent));
        let margin = " ".repeat(line.len());
        for word in text.split(' ') {
            if line.chars().count() + word.chars().count() >= 100 {
                self.text += &format!("{}\n", line.trim_end());
                line = margin.clone();
            }
            line += &format!("{word} ");
        }
        self.text += &format!("{}\n", line.trim_end());
    }

    fn heading(&mut self, heading: &str, docs: &str) {
        // The doc comment of a section says its name first, for whoever reads the source.
        let docs = docs.split_once("]`: ").map_or(docs, |(_, docs)| docs);
        let mut letters = docs.chars();
        let docs = letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect());
        self.text += &format!("\n## {heading}\n\n");
        self.write(0, "", &docs);
        self.text.push('\n');
    }

    fn fields(&self, kind: &str) -> Vec<&'a Field> {
        let Some(Item::Struct(item)) = self.types.get(kind) else { panic!("{kind} is in no file of SOURCES") };
        item.fields.iter().filter(|field| matches!(field.vis, syn::Visibility::Public(_))).collect()
    }

    /// Every key of a struct.
    fn keys(&mut self, kind: &str, defaults: &Defaults, indent: usize) {
        self.fields(kind).into_iter().for_each(|field| self.key(field, defaults, indent));
    }

    /// A key, and beneath it what its type is made of.
    fn key(&mut self, field: &'a Field, defaults: &Defaults, indent: usize) {
        let (outer, inner) = parts(&field.ty);
        if outer == "Table" {
            return self.write(indent, "- ", &format!("All other keys: {}", docs(&field.attrs)));
        }
        let name = written_name(&field.attrs, field.ident.as_ref().unwrap());
        let (kind, said) = (self.described(&outer, &inner), defaults.said(&name, outer == "Option"));
        self.write(indent, "- ", &format!("`{name}`: {kind}; {said}. {}", docs(&field.attrs)));
        match self.types.get(&inner) {
            _ if PLAIN.iter().any(|(plain, _)| *plain == inner) => {}
            Some(Item::Struct(_)) if inner == "Endpoint" => {
                self.keys(
                    &inner,
                    &Defaults::of::<Endpoint>("base_url = \"\"\nmodel = \"\"\nadapter_dir = \"\"\n"),
                    indent + 2,
                );
            }
            Some(Item::Struct(_)) => self.keys(&inner, &defaults.within(&name), indent + 2),
            Some(Item::Enum(item)) => {
                let tag = serde_attribute(&item.attrs, "tag");
                let read = |variant: &&syn::Variant| serde_attribute(&variant.attrs, "skip_deserializing").is_none();
                item.variants.iter().filter(read).for_each(|variant| self.variant(variant, tag.as_deref(), indent + 2));
            }
            _ => panic!("{name}: the type {inner} is in no file of SOURCES"),
        }
    }

    /// A type in words.
    fn described(&self, outer: &str, inner: &str) -> String {
        let plain = PLAIN.iter().find(|(plain, _)| *plain == inner).map(|(_, words)| *words);
        let one = plain.unwrap_or(match self.types.get(inner) {
            Some(Item::Enum(item)) if serde_attribute(&item.attrs, "tag").is_none() => "one of",
            _ => "table",
        });
        match outer {
            "Vec" => format!("list, each {one}"),
            "2" => format!("list of two, each {one}"),
            _ => one.to_string(),
        }
    }

    fn variant(&mut self, variant: &'a Variant, tag: Option<&str>, indent: usize) {
        let (name, docs) = (written_name(&variant.attrs, &variant.ident), docs(&variant.attrs));
        let Some(tag) = tag else { return self.write(indent, "- ", &format!("`\"{name}\"`: {docs}")) };
        self.write(indent, "- ", &format!("`{tag} = \"{name}\"`: {docs}"));
        let defaults = Defaults::of::<Length>(&format!("{tag} = \"{name}\""));
        variant.fields.iter().for_each(|field| self.key(field, &defaults, indent + 2));
    }

    /// One table of the config; BoolQ's options come after the engine's keys of an environment.
    fn section(&mut self, field: &'a Field, all: &Defaults) {
        let (outer, kind) = parts(&field.ty);
        let name = written_name(&field.attrs, field.ident.as_ref().unwrap());
        let Some(Item::Struct(item)) = self.types.get(&kind) else { panic!("{kind} is no table") };
        let heading = if outer == "Vec" { format!("`[[{name}]]`") } else { format!("`[{name}]`") };
        self.heading(&heading, &docs(&item.attrs));
        self.keys(&kind, &all.within(&name), 0);
        if kind == "Environment" {
            let least = "source = \"\"";
            for (name, heading, defaults) in [
                ("boolq", "BoolQ", Defaults::of::<boolq::Options>(least)),
                ("simpleqa", "SimpleQA", Defaults::of::<simpleqa::Options>(least)),
                ("sft", "SFT", Defaults::of::<sft::Options>(least)),
                ("dpo", "DPO", Defaults::of::<dpo::Options>(least)),
                ("implicit", "implicit calibration", Defaults::of::<implicit::Options>(least)),
            ] {
                self.heading(&format!("`[[environment]]` of {heading}"), &format!("Beside `name = \"{name}\"`:"));
                self.keys(&format!("{name}::Options"), &defaults, 0);
            }
            let Some(Item::Struct(judge)) = self.types.get("JudgeOptions") else { panic!("judges have no keys") };
            self.heading("`[environment.judge]`", &docs(&judge.attrs));
            self.keys("JudgeOptions", &Defaults::of::<JudgeOptions>(""), 0);
        }
    }

    /// The whole page.
    fn written() -> String {
        let types = types();
        let mut page = Page { types: &types, text: String::new() };
        INTRODUCTION.trim_end().split("\n\n").for_each(|paragraph| {
            page.write(0, "", paragraph);
            page.text.push('\n');
        });
        let resolved = Config::parse(SMALL, "small.toml").unwrap().to_toml().unwrap().parse().unwrap();
        let all = Defaults { required: SMALL.parse().unwrap(), resolved };
        let section = |field: &&Field| matches!(types.get(&parts(&field.ty).1), Some(Item::Struct(_)));
        let (sections, top): (Vec<_>, Vec<_>) = page.fields("Config").into_iter().partition(section);
        page.text += "## Before the first table\n\n";
        top.into_iter().for_each(|field| page.key(field, &all, 0));
        sections.into_iter().for_each(|field| page.section(field, &all));
        page.text
    }
}

/// Every key on the page by its path, and what is said of its default.
fn keys_on(page: &str) -> BTreeMap<String, String> {
    let entry = regex::Regex::new(r"^( *)- `([a-z_0-9]+)`: [^;]*; (required|optional|default `(.*?)`)\. ").unwrap();
    let (mut found, mut section, mut above) = (BTreeMap::new(), String::new(), Vec::new());
    // A wrapped entry is one line again.
    let page = regex::Regex::new(r"\n +([^ -])").unwrap().replace_all(page, " $1").into_owned();
    for line in page.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            section =
                heading.split('`').nth(1).map_or(String::new(), |name| format!("{}.", name.trim_matches(['[', ']'])));
        } else if let Some(entry) = entry.captures(line) {
            above.retain(|(indent, _)| *indent < entry[1].len());
            above.push((entry[1].len(), entry[2].to_string()));
            let path: Vec<&str> = above.iter().map(|(_, name)| name.as_str()).collect();
            let default = entry.get(4).map_or(&entry[3], |default| default.as_str());
            // Of a key that several environments have, the contract shows BoolQ's.
            found.entry(format!("{section}{}", path.join("."))).or_insert(default.to_string());
        }
    }
    found
}

#[test]
fn the_reference_page_is_what_the_source_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/reference.md");
    let page = Page::written();
    if std::env::var_os("CANDOR_BLESS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    let first = kept.lines().zip(page.lines()).find(|(kept, page)| kept != page);
    assert!(
        kept == page,
        "configs/reference.md is not what the source says; run with CANDOR_BLESS=1 to rewrite: {first:?}"
    );
    assert!(page.lines().all(|line| line.chars().count() <= 100));
}

#[test]
fn the_page_holds_the_contracts_keys_and_defaults() {
    let found = keys_on(&Page::written());
    let contract: Table = reference().parse().unwrap();
    let mut wanted = BTreeMap::new();
    for (section, value) in &contract {
        match value.get(0).unwrap_or(value) {
            Value::Table(table) => wanted.extend(table.iter().map(|(key, value)| (format!("{section}.{key}"), value))),
            value => drop(wanted.insert(section.clone(), value)),
        }
    }
    for (key, value) in &wanted {
        let default = found.get(key).unwrap_or_else(|| panic!("{key} is not on the page"));
        let required = ["name", "model.source", "environment.name", "environment.source"].contains(&key.as_str());
        assert_eq!(required, default == "required", "{key}: {default}");
        let same = required || default.parse::<Value>().unwrap() == **value || key == "learner.importance";
        assert!(same, "{key}: {default} on the page, {value} in the contract");
    }
    // The keys that the contract has in comments, and those added after it.
    let more: Vec<&str> = found.keys().map(String::as_str).filter(|key| !wanted.contains_key(*key)).collect();
    let known = [
        "batch.long_prompts",
        "environment.beta",
        "environment.correctness_waiver",
        "environment.correctness_weight",
        "environment.examples",
        "environment.exclude_shared_passages",
        "environment.held_out",
        "environment.judge",
        "environment.judge.base_url",
        "environment.judge.cache",
        "environment.judge.concurrency",
        "environment.judge.dollars_per_million_tokens",
        "environment.judge.key_variable",
        "environment.judge.kind",
        "environment.judge.max_tokens",
        "environment.judge.model",
        "environment.judge.requests_per_minute",
        "environment.judge.second",
        "environment.judge.style",
        "environment.judge.timeout_seconds",
        "environment.judge.tokens_per_minute",
        "environment.lambda",
        "environment.length.weight",
        "environment.lm_on_correct_only",
        "environment.loss",
        "environment.mask",
        "environment.smoothing",
        "epochs",
        "evaluation.environment",
        "learner.delta",
        "learner.importance.level",
        "learner.importance.max",
        "learner.importance.mode",
        "learner.kl_estimator",
        "lora.start_from",
        "model.kernel",
        "model.quantization",
        "sampling.endpoints",
        "sampling.endpoints.adapter_dir",
        "sampling.endpoints.base_url",
        "sampling.endpoints.concurrency",
        "sampling.endpoints.key_variable",
        "sampling.endpoints.model",
        "sampling.endpoints.timeout_seconds",
        "sampling.logprobs",
        "sampling.samplers",
        "silence_seconds",
    ];
    assert_eq!(more, known);
}
