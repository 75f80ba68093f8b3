//! Rows that carry completions, in the shapes that people have them in: those of TRL and Hugging Face, with strings or message
//! lists, and `input` with `output`.
//!
//! | fields | prompt | completion |
//! |---|---|---|
//! | `prompt`, `completion` | a question, or messages | a text, or one assistant's message |
//! | `messages` | all messages but the last | the last, an assistant's; answers before it are context |
//! | `prompt`, `chosen`, `rejected` | a question, or messages | a text, one assistant's message, or the whole conversation, which may stand without `prompt` |
//! | `input`, `output` | a question | a text |
//! | `question`, `answer` or `model_answer` | a question | a text |
//!
//! A question is what the user says: every prompt goes through the model's chat template, because that is how the model will be
//! asked. What else a row holds is not read.

use anyhow::{Context as _, bail, ensure};
use serde_json::{Map, Value};

use crate::rows::{each_row, field, split_files};
use crate::{Context, Message, Role};

/// A row of a file, as it was read.
pub(crate) type Object = Map<String, Value>;

/// A parsed row and the id of its task.
#[derive(Clone)]
pub(crate) struct Numbered<T> {
    pub id: String,
    pub row: T,
}

/// The prompt of a task and the completion that answers it.
#[derive(Clone, Debug, PartialEq)]
pub struct Exchange {
    /// The chat so far.
    pub prompt: Vec<Message>,
    /// What the assistant says.
    pub completion: String,
}

/// A prompt with two answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The chat so far.
    pub prompt: Vec<Message>,
    /// The better answer.
    pub chosen: String,
    /// The worse answer.
    pub rejected: String,
}

/// The rows of a source, which is a file or a folder with files of `train`, in order. Their ids are `NAME/FILE/ROW`.
///
/// # Errors
/// If a file cannot be read or a row is none of those that `parse` knows, with its file and line; if there are none.
pub(crate) fn read<T>(
    context: &Context,
    name: &str,
    source: &str,
    parse: impl Fn(&Object) -> anyhow::Result<T>,
) -> anyhow::Result<Vec<Numbered<T>>> {
    let path = (context.resolve)(source)?;
    let files = if path.is_file() { vec![path.clone()] } else { split_files(&path, "train")? };
    let mut rows = Vec::new();
    for file in &files {
        let stem = file.file_name().unwrap_or_default().to_string_lossy();
        let stem = stem.split('.').next().unwrap_or_default().to_string();
        each_row(file, |index, object: Object| {
            rows.push(Numbered { id: format!("{name}/{stem}/{index}"), row: parse(&object)? });
            Ok(())
        })?;
    }
    let nothing = "there are no rows; give a JSONL or parquet file, or a folder with train.jsonl";
    ensure!(!rows.is_empty(), "{}: {nothing}", path.display());
    Ok(rows)
}

/// A prompt and its completion, from any shape that has one completion.
///
/// # Errors
/// If the row has another shape, or a field is not what its shape says; the message names it.
pub fn exchange(row: &Object) -> anyhow::Result<Exchange> {
    let has = |names: &[&str]| names.iter().all(|name| row.contains_key(*name));
    let (prompt, completion) = if has(&["messages"]) {
        let Answer { before, text } = answer(row, "messages")?;
        (before, text)
    } else if has(&["prompt", "completion"]) {
        let Answer { before, text } = answer(row, "completion")?;
        ensure!(before.is_empty(), "field `completion` holds more than one assistant's message");
        (asked(row, "prompt")?, text)
    } else if has(&["input", "output"]) {
        (asked(row, "input")?, field(row, "output")?)
    } else if has(&["question", "answer"]) {
        (asked(row, "question")?, field(row, "answer")?)
    } else if has(&["question", "model_answer"]) {
        (asked(row, "question")?, field(row, "model_answer")?)
    } else {
        bail!(
            "fields {}: not a known shape; known are prompt + completion, messages, input + output, question + answer",
            names(row)
        );
    };
    check(&prompt, [&completion])?;
    Ok(Exchange { prompt, completion })
}

/// A prompt and two completions.
///
/// # Errors
/// As [`exchange`], or if both completions are the same or answer different prompts.
pub fn comparison(row: &Object) -> anyhow::Result<Comparison> {
    let known = row.contains_key("chosen") && row.contains_key("rejected");
    ensure!(known, "fields {}: not a pair, which has prompt, chosen and rejected", names(row));
    let (chosen, rejected) = (answer(row, "chosen")?, answer(row, "rejected")?);
    ensure!(chosen.before == rejected.before, "`chosen` and `rejected` answer different conversations");
    let prompt = match row.get("prompt") {
        Some(_) if chosen.before.is_empty() => asked(row, "prompt")?,
        Some(Value::String(question)) => {
            let same = chosen.before.last().is_some_and(|last| last.content == *question);
            ensure!(same, "field `prompt` is not the question that `chosen` answers");
            chosen.before
        }
        Some(_) => {
            ensure!(
                asked(row, "prompt")? == chosen.before,
                "field `prompt` is not the conversation before the answers"
            );
            chosen.before
        }
        None => chosen.before,
    };
    check(&prompt, [&chosen.text, &rejected.text])?;
    ensure!(chosen.text != rejected.text, "`chosen` and `rejected` are the same, so there is nothing to prefer");
    Ok(Comparison { prompt, chosen: chosen.text, rejected: rejected.text })
}

/// A prompt, its completion, and whether that is right: `is_correct`, or `label` as in TRL's unpaired preferences. One text
/// that holds both, as `input`, is cut before its last line that begins with `Answer:`.
///
/// # Errors
/// As [`exchange`], or if it is not said whether the completion is right.
pub fn judged(row: &Object) -> anyhow::Result<(Exchange, bool)> {
    let name = if row.contains_key("is_correct") || !row.contains_key("label") { "is_correct" } else { "label" };
    let correct = match row.get(name) {
        Some(Value::Bool(correct)) => *correct,
        Some(Value::Number(number)) if number.as_f64() == Some(0.0) => false,
        Some(Value::Number(number)) if number.as_f64() == Some(1.0) => true,
        Some(other) => bail!("field `{name}` is {other}, neither true nor false"),
        None => bail!("field `{name}` is missing, so nobody said whether the answer is right"),
    };
    let only_input = row.contains_key("input") && !row.contains_key("output");
    Ok((if only_input { cut_before_answer(&field::<String>(row, "input")?)? } else { exchange(row)? }, correct))
}

/// Cuts a text into the question and the line that answers it with what follows.
fn cut_before_answer(text: &str) -> anyhow::Result<Exchange> {
    let cut =
        text.rfind("\nAnswer:").context("field `input` has no line that begins with `Answer:`; give `output` too")?;
    let (prompt, completion) = (vec![Message::user(text[..cut].trim_end())], text[cut + 1..].to_string());
    check(&prompt, [&completion])?;
    Ok(Exchange { prompt, completion })
}

/// What an assistant says, and the conversation before it where the field holds that too.
struct Answer {
    before: Vec<Message>,
    text: String,
}

fn answer(row: &Object, name: &str) -> anyhow::Result<Answer> {
    if row.get(name).is_some_and(Value::is_string) {
        return Ok(Answer { before: Vec::new(), text: field(row, name)? });
    }
    let mut before: Vec<Message> = field(row, name)?;
    let last = before.pop().filter(|last| last.role == Role::Assistant);
    let last = last.with_context(|| format!("field `{name}` does not end with an assistant's message"))?;
    Ok(Answer { before, text: last.content })
}

/// The prompt in a field: messages, or what the user says.
fn asked(row: &Object, name: &str) -> anyhow::Result<Vec<Message>> {
    match row.get(name) {
        Some(Value::String(question)) => Ok(vec![Message::user(question)]),
        _ => field(row, name),
    }
}

fn check<'a>(prompt: &[Message], completions: impl IntoIterator<Item = &'a String>) -> anyhow::Result<()> {
    let last = prompt.last().context("there is no prompt")?;
    ensure!(last.role == Role::User, "the prompt ends with a message of the {:?}, not the user's", last.role);
    ensure!(!last.content.trim().is_empty(), "the prompt is empty");
    for completion in completions {
        ensure!(!completion.trim().is_empty(), "a completion is empty, so there is nothing to learn");
    }
    Ok(())
}

fn names(row: &Object) -> String {
    let names: Vec<String> = row.keys().take(8).map(|name| crate::keys::name(name)).collect();
    if names.is_empty() { "(none)".to_string() } else { names.join(", ") }
}
