//! What a completion says in answer to a free-form question: a short answer, and in words or figures how sure it is
//! (SCIENCE 2.2). `Answer: Michio Sugeno`, then `Confidence: 0.80`.

use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;

use crate::parsing::{Mode, NUMBER, Normalized, ParseOutcome, REFUSED_WHEN_STRICT, constant};

/// An answer with a stated confidence; either may be missing.
#[derive(Clone, Debug, PartialEq)]
pub struct StatedAnswer {
    /// Byte range of the answer in the text as the model wrote it: what follows the last `Answer:` on its line.
    pub answer: Option<Range<usize>>,
    /// The stated confidence that the answer is right.
    pub confidence: ParseOutcome,
    /// What was odd, in a fixed order.
    pub flags: Vec<&'static str>,
    /// Byte offset in the text where what follows the last `Confidence:` begins.
    pub after_confidence: Option<usize>,
}

/// Longer answers are cut: one that needs more is none.
const LONGEST_ANSWER: usize = 256;

/// The word "confidence" and what may stand between it and its number.
static HEAD: LazyLock<Regex> = LazyLock::new(|| {
    constant(concat!(
        r"(?i)\bconfidence\b(?:\s*(?:level|score|rating|probability))?(?:\s+(?:in|for)\s+[^:=\n]{1,40})?",
        r#"\s*["']?\s*(?:\([^)\n]{0,40}\))?\s*["']?\s*(?::|=|>|\bis\b|\bof\b|\s-\s|\s–\s|\s—\s)\s*"#
    ))
});

/// What may stand directly before the number.
static BEFORE_NUMBER: LazyLock<Regex> =
    LazyLock::new(|| constant(r#"^(?:(?:about|around|approximately|approx\.?|roughly|~|≈)\s*|["'\[(<{]\s*)*"#));

/// A number, where one is expected.
static LEADING_NUMBER: LazyLock<Regex> = LazyLock::new(|| constant(&format!("^{NUMBER}")));

/// The decimals of a number that is written with a comma.
static COMMA_DECIMALS: LazyLock<Regex> = LazyLock::new(|| constant(r"^,\d+"));

/// More digits or a letter: what stands before is not the whole number.
static CONTINUED: LazyLock<Regex> = LazyLock::new(|| constant(r"^(?:[.,]\d|\p{Alphabetic})"));

/// The other end of a range, after a unit or none.
static RANGE: LazyLock<Regex> =
    LazyLock::new(|| constant(&format!(r#"^\s*(?:%|percent\b)?\s*(?:[-–—~]|to\b|\.\.+)\s*{NUMBER}"#)));

static PERCENT: LazyLock<Regex> = LazyLock::new(|| constant(r"(?i)^\s*(?:%|percent\b)"));

static OUT_OF: LazyLock<Regex> = LazyLock::new(|| constant(&format!(r"(?i)^\s*(?:/|out\s+of\b)\s*({NUMBER})")));

/// `85% confident`, where no head is.
static PHRASE: LazyLock<Regex> =
    LazyLock::new(|| constant(&format!(r"(?i)\b({NUMBER})\s*(?:%|percent)\s*(?:confident|sure|certain)\b")));

/// A model that goes on to ask and answer questions of its own.
static NEXT_QUESTION: LazyLock<Regex> = LazyLock::new(|| constant(r"(?im)^\s*question\s*[:0-9]"));

static ANSWER: LazyLock<Regex> = LazyLock::new(|| {
    constant(r#"(?im)^[^\S\n]*[-#>{"']*[^\S\n]*(?:(?:my|the|final)\s+)*answer["']?[^\S\n]*[:=](?P<answer>[^\n]*)"#)
});

/// Reads the last answer and the last stated confidence of a completion. Takes time linear in the text.
pub fn stated_answer(text: &str, mode: Mode) -> StatedAnswer {
    let Some(text) = Normalized::new(text) else {
        let flags = vec!["unclosed_think"];
        return StatedAnswer { answer: None, confidence: ParseOutcome::Missing, flags, after_confidence: None };
    };
    let end = NEXT_QUESTION.find(&text.text).map(|next| next.start());
    let said = &text.text[..end.unwrap_or(text.text.len())];
    let mut flags: Vec<&'static str> = end.map(|_| "truncated_at_question").into_iter().collect();
    let heads: Vec<Range<usize>> = heads(said).collect();
    let confidence = match heads.last() {
        Some(_) => last_of(said, &heads, &mut flags),
        None if mode == Mode::Lenient => phrase(said, &mut flags),
        None => ParseOutcome::Missing,
    };
    let refused = mode == Mode::Strict && flags.iter().any(|flag| REFUSED_WHEN_STRICT.contains(flag));
    let confidence = match confidence {
        ParseOutcome::Ok(_) if refused => ParseOutcome::Malformed,
        outcome => outcome,
    };
    StatedAnswer {
        answer: answer(said).map(|range| text.original(range)),
        confidence,
        flags,
        after_confidence: heads.last().map(|head| text.original(head.clone()).end),
    }
}

/// Where "confidence" is said with something to follow. After a slash it is the end of an XML element.
fn heads(said: &str) -> impl Iterator<Item = Range<usize>> {
    HEAD.find_iter(said).map(|head| head.range()).filter(|head| !said[..head.start].ends_with('/'))
}

/// What the last of several heads states.
fn last_of(said: &str, heads: &[Range<usize>], flags: &mut Vec<&'static str>) -> ParseOutcome {
    let mut stated: Vec<(ParseOutcome, Vec<&'static str>)> =
        heads.iter().map(|head| after_head(&said[head.end..])).collect();
    let (last, odd) = stated.pop().unwrap_or((ParseOutcome::Missing, Vec::new()));
    flags.extend(odd);
    if !stated.is_empty() {
        flags.push("multiple");
    }
    if stated.iter().any(|(other, _)| *other != last) {
        flags.push("conflict");
    }
    last
}

/// Reads what follows a head.
fn after_head(rest: &str) -> (ParseOutcome, Vec<&'static str>) {
    let malformed = |flag| (ParseOutcome::Malformed, vec![flag]);
    let rest = &rest[BEFORE_NUMBER.find(rest).map_or(0, |before| before.end())..];
    let Some(number) = LEADING_NUMBER.find(rest) else { return malformed("no_number") };
    let mut rest = &rest[number.end()..];
    let mut number = number.as_str().to_string();
    if let Some(decimals) = COMMA_DECIMALS.find(rest).filter(|_| number == "0") {
        number = format!("0.{}", &decimals.as_str()[1..]);
        rest = &rest[decimals.end()..];
    }
    // \d also matches the digits of other scripts, which are no Rust number.
    let Some(value) = number.parse::<f64>().ok().filter(|_| !CONTINUED.is_match(rest)) else {
        return malformed("bad_number");
    };
    if RANGE.is_match(rest) {
        return malformed("range");
    }
    if PERCENT.is_match(rest) {
        return percent(value, "percent");
    }
    if let Some(out_of) = OUT_OF.captures(rest) {
        return match out_of[1].parse::<f64>() {
            Ok(whole) if [1.0, 5.0, 10.0, 100.0].contains(&whole) => (within(value / whole), vec!["fraction"]),
            _ => malformed("denominator"),
        };
    }
    match value {
        _ if 1.0 < value && value <= 10.0 => malformed("ambiguous_scale"),
        _ if 10.0 < value && value <= 100.0 => (ParseOutcome::Ok(value / 100.0), vec!["rescaled"]),
        _ => (within(value), Vec::new()),
    }
}

/// A number with a percent sign. Less than one of them is probably a probability with a sign too many.
fn percent(value: f64, flag: &'static str) -> (ParseOutcome, Vec<&'static str>) {
    if 0.0 < value && value < 1.0 {
        return (ParseOutcome::Malformed, vec!["ambiguous_percent"]);
    }
    (within(value / 100.0), vec![flag])
}

fn within(value: f64) -> ParseOutcome {
    if (0.0..=1.0).contains(&value) { ParseOutcome::Ok(value) } else { ParseOutcome::OutOfRange }
}

/// "I am 85% confident that …", the last time it is said.
fn phrase(said: &str, flags: &mut Vec<&'static str>) -> ParseOutcome {
    let number = PHRASE.captures_iter(said).last().and_then(|found| found[1].parse::<f64>().ok());
    let Some(number) = number else { return ParseOutcome::Missing };
    let (outcome, odd) = percent(number, "fallback_phrase");
    flags.extend(odd);
    outcome
}

/// The last answer, without emphasis around it and without a confidence on the same line.
fn answer(said: &str) -> Option<Range<usize>> {
    let line = ANSWER.captures_iter(said).last()?.name("answer")?;
    let text = heads(line.as_str()).next().map_or(line.as_str(), |head| &line.as_str()[..head.start]);
    let text = text.char_indices().nth(LONGEST_ANSWER).map_or(text, |(end, _)| &text[..end]);
    let start = line.start() + (text.len() - text.trim_start().len());
    let text = text.trim();
    (!text.is_empty()).then(|| start..start + text.len())
}
