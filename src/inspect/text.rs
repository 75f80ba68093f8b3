//! A rollout for a pipe: text that a terminal can show.

use std::fmt::Write;

use candor_environments::{Finish, Role};
use serde_json::Value;

use crate::printable::{one_line, printable};
use crate::record::shown;
use crate::run::{Row, RowSplit};

/// Where a rollout is from: `step 40, group 3, rollout 1, boolq/train/17`.
pub fn place(row: &Row) -> String {
    let Row { split, step, group, rollout, task, .. } = row;
    let split = if *split == RowSplit::Train { "step" } else { "evaluation after" };
    format!("{split} {step}, group {group}, rollout {rollout}, {}", one_line(task, 200))
}

/// What came of a rollout, in one line.
pub fn outcome(row: &Row) -> String {
    let mut text = format!("reward {}", shown(row.reward, 3));
    if row.parts.len() > 1 {
        let part = |(name, value): (&String, &Value)| format!("{name} {}", shown(value.as_f64(), 3));
        let parts: Vec<String> = row.parts.iter().map(part).collect();
        text += &format!(" ({})", one_line(&parts.join(", "), 200));
    }
    text += &row.advantage.map_or(String::new(), |advantage| format!(", advantage {advantage:+.3}"));
    text += &row.metric("confidence").map_or(String::new(), |confidence| format!(", confidence {confidence:.3}"));
    text += match row.metric("correct") {
        Some(1.0) => ", correct",
        Some(_) => ", not correct",
        None => "",
    };
    text += &format!(", parse {}", row.parse.map_or("-", |parse| parse.name()));
    let finish = if row.finish == Finish::Length { "cut" } else { "ended" };
    text += &format!(", {finish} after {} tokens", row.tokens);
    for flag in &row.flags {
        text += &format!(", {}", one_line(flag, 80));
    }
    text + &row.error.as_ref().map_or(String::new(), |error| format!(", error: {}", one_line(error, 400)))
}

/// Who speaks.
pub fn role(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
    }
}

/// Everything about a rollout, with its prompt and completion.
pub fn rollout(row: &Row) -> String {
    let mut text = format!("{}\n{}\n", place(row), outcome(row));
    let mut part = |name: &str, content: &str| writeln!(text, "--- {name}\n{}", printable(content));
    let prompt = row.prompt.iter().try_for_each(|message| part(role(message.role), &message.content));
    prompt.and_then(|()| part("completion", &row.completion)).expect("a string takes every line");
    text
}
