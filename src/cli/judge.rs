//! `candor judge`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{ArgGroup, Args};

use super::Failure;
use super::console::Console;
use crate::client::Patience;
use crate::config::Config;
use crate::config::Dtype;
use crate::event::Observer;
use crate::judge::Panel;
use crate::judge::answers::Answers;
use crate::judge::options::JudgeOptions;
use crate::model_files::load_model;
use crate::ops::kernel::Kernel;

const JUDGE: &str = "\
Every row holds
  question    or `problem`
  answers     the right ones, any of which will do; or `answer`, one
  prediction  the answer to be graded; or `completion`, of which what follows
              \"Answer:\" is graded
  label       the grade by hand, for --agreement: A or correct, B or incorrect,
              C or not_attempted

FILE.jsonl is graded into FILE.judged.jsonl: {\"index\", \"row\", \"judge\", \"error\"}.
Called again, it goes on where it was stopped, and judges again what got no
verdict. Printed: the totals, and what they cost if the config has prices.

The judge is that of the first environment in --config that has one; without
--config it is the lexical one, offline.";

/// `candor judge`.
#[derive(Args)]
#[command(override_usage = "candor judge [OPTIONS] <FILE|--agreement <FILE>>")]
#[command(after_help = JUDGE, group = ArgGroup::new("rows").required(true).args(["file", "agreement"]))]
pub struct Judge {
    /// Answers as JSON lines, plain or .gz, .csv or .parquet
    file: Option<PathBuf>,
    /// Rows graded by hand: print how far the judge agrees, and Cohen's kappa
    #[arg(long, value_name = "FILE")]
    agreement: Option<PathBuf>,
    /// A config (TOML) with an [environment.judge]
    #[arg(long, value_name = "CONFIG")]
    config: Option<PathBuf>,
    /// Another value for a key: --set environment.0.judge.model=m
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    sets: Vec<String>,
    /// Say nothing but warnings, errors and the result
    #[arg(long)]
    pub quiet: bool,
}

impl Judge {
    /// Runs it.
    pub fn run(&self, observer: Observer, console: &Console) -> Result<u8, Failure> {
        let file = self.file.as_ref().or(self.agreement.as_ref());
        let prepare = || {
            let answers = Answers::read(file.context("no file of answers")?, self.agreement.is_some())?;
            Ok((answers, self.judge(observer)?))
        };
        let (answers, (judge, prices)) = prepare().map_err(Failure::Input)?;
        if self.agreement.is_some() {
            let agreement = answers.agreement(&judge, observer).map_err(Failure::Run)?;
            console.print(&agreement.to_string());
            return Ok(0);
        }
        let output = answers.output();
        let graded = answers.grade(&output, &judge, prices, observer).map_err(Failure::Run)?;
        console.print(&format!("{graded}{}", output.display()));
        Ok(0)
    }

    /// The judge, and its prices.
    fn judge(&self, observer: Observer) -> Result<(Arc<Panel>, [f64; 2])> {
        let open = |options: &JudgeOptions, policy: &str| {
            Panel::of(options, policy, Patience::default(), &|name| std::env::var_os(name), observer)
        };
        let Some(path) = &self.config else {
            let options = JudgeOptions::default();
            return Ok((Arc::new(open(&options, "")?), options.dollars_per_million_tokens));
        };
        let config = Config::load(path, &self.sets)?;
        let lists =
            [("environment", &config.environments), ("evaluation.environment", &config.evaluation.environments)];
        let all = lists.iter().flat_map(|(list, environments)| {
            environments.iter().enumerate().map(move |(index, one)| (format!("{list}.{index}.judge"), &one.options))
        });
        let found = all.into_iter().find_map(|(key, options)| Some((key, options.get("judge")?.as_table()?)));
        let (key, table) = found
            .with_context(|| format!("{}: no environment has a judge; add an [environment.judge]", path.display()))?;
        let source = &config.model.source;
        let opened = || {
            let options = JudgeOptions::of(table)?;
            let panel = open(&options, source)?;
            panel.load(&|| load_model(source, Kernel::choose(Dtype::Auto, None)?, observer), observer)?;
            Ok((Arc::new(panel), options.dollars_per_million_tokens))
        };
        opened().map_err(|error| config.locate_within(&key, error))
    }
}
