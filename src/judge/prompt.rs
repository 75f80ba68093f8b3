//! What a judge is asked. The instructions come first and never change, so that a server computes them once; the question,
//! the gold answers and the answer come last, as JSON strings, which no text inside them can close.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How a judge is asked, and what it may reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Style {
    /// One letter for one of SimpleQA's three grades.
    #[default]
    Simpleqa,
    /// A JSON object that says whether the answer is correct, as the judge of Humanity's Last Exam; nothing is ever "not
    /// attempted".
    Hle,
}

/// What is added where a reply could not be read.
const REMINDER: &str = "Reply with one letter only.";
const JSON_REMINDER: &str = "Reply with the JSON object only.";

impl Style {
    /// Version of the prompt: verdicts of another one are not reused.
    pub fn version(self) -> u32 {
        match self {
            Style::Simpleqa => 1,
            Style::Hle => 1,
        }
    }

    /// Tokens that a reply may have, where the config does not say.
    pub fn max_tokens(self) -> u32 {
        match self {
            Style::Simpleqa => 16,
            Style::Hle => 1024,
        }
    }

    /// The prompt; with `reminded`, what the reply has to be is said once more.
    pub fn prompt(self, question: &str, gold: &[String], answer: &str, reminded: bool) -> String {
        let (instructions, [gold_name, answer_name], reminder) = match self {
            Style::Simpleqa => (include_str!("simpleqa.txt"), ["Gold answers", "Predicted answer"], REMINDER),
            Style::Hle => (include_str!("hle.txt"), ["Correct answers", "Response"], JSON_REMINDER),
        };
        let reminder = if reminded { format!("\n\n{reminder}") } else { String::new() };
        let (question, gold, answer) = (json!(question), json!(gold), json!(answer));
        format!("{instructions}\nQuestion: {question}\n{gold_name}: {gold}\n{answer_name}: {answer}{reminder}")
    }

    /// What a server is told of the reply's form, where it can be told.
    pub fn response_format(self) -> Option<Value> {
        let text = json!({"type": "string"});
        let schema = json!({
            "type": "object",
            "properties": {
                "extracted_final_answer": text,
                "reasoning": text,
                "correct": {"type": "string", "enum": ["yes", "no"]},
            },
            "required": ["extracted_final_answer", "reasoning", "correct"],
            "additionalProperties": false,
        });
        let format =
            json!({"type": "json_schema", "json_schema": {"name": "verdict", "strict": true, "schema": schema}});
        (self == Style::Hle).then_some(format)
    }
}
