//! Reads a judge's reply: strictly, because a guess here is a wrong label there.

use std::sync::LazyLock;

use candor_environments::Verdict;
use regex::Regex;
use serde::Deserialize;

/// A letter, a grade in words, or both if they agree; perhaps after "The grade is" or "Answer:", perhaps in quotes.
static GRADE: LazyLock<Regex> = LazyLock::new(|| {
    let words = r"(?i:(?P<word>not[_ ]attempted|incorrect|correct))";
    let lead = r"(?i:(?:the\s+)?(?:grade|verdict)\s+is\s*:?|grade\s*:|answer\s*:)";
    let pattern = format!(
        r#"^(?:{lead}\s*)?["'`*(\[]*(?:(?P<letter>[ABC])(?:\s*:\s*{words})?|{})["'`*)\]]*\.?$"#,
        words.replace("word", "alone")
    );
    Regex::new(&pattern).expect("the pattern is a constant, and the tests use it")
});

/// The reply of the style of Humanity's Last Exam; its other fields do not matter.
#[derive(Deserialize)]
struct Judged {
    correct: YesNo,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum YesNo {
    Yes,
    No,
}

/// The verdict that a reply states, if it states one and nothing but one. Thinking before it does not count, and thinking
/// that does not end leaves no reply.
pub fn read(reply: &str) -> Option<Verdict> {
    let said = reply.rfind("</think>").map_or(reply, |end| &reply[end + "</think>".len()..]).trim();
    if said.contains("<think>") {
        return None;
    }
    if said.starts_with('{') {
        let judged: Judged = serde_json::from_str(said).ok()?;
        return Some(match judged.correct {
            YesNo::Yes => Verdict::Correct,
            YesNo::No => Verdict::Incorrect,
        });
    }
    let found = GRADE.captures(said)?;
    let of_word = |name| {
        let word = found.name(name)?.as_str().to_lowercase().replace(' ', "_");
        Verdict::ALL.into_iter().find(|verdict| verdict.name() == word)
    };
    let Some(letter) = found.name("letter") else { return of_word("alone") };
    let verdict = LETTERS.iter().zip(Verdict::ALL).find(|(known, _)| **known == letter.as_str())?.1;
    of_word("word").is_none_or(|word| word == verdict).then_some(verdict)
}

/// The letters that stand for the grades, in the order of [`Verdict::ALL`].
pub const LETTERS: [&str; 3] = ["A", "B", "C"];
