//! What a completion states: an answer and the probability that it is right, or why there is none (SCIENCE 2). There is no
//! default probability anywhere: what cannot be read has none.
//!
//! Evaluation reads leniently, the training reward strictly: there a sloppy form earns what no answer earns.

use std::ops::Range;
use std::sync::LazyLock;

use regex::{Captures, Regex};

use crate::ParseStatus;

/// How much sloppiness is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// For evaluation: whatever has one clear meaning.
    Lenient,
    /// For the training reward: only the form that was asked for, once or without contradiction.
    Strict,
}

/// A stated probability, or why there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ParseOutcome {
    /// It was stated; in [0, 1].
    Ok(f64),
    /// Nothing that looks like one.
    Missing,
    /// Something that looks like one and cannot be read.
    Malformed,
    /// A number outside [0, 1].
    OutOfRange,
}

impl ParseOutcome {
    /// The outcome without its value.
    pub fn status(self) -> ParseStatus {
        match self {
            ParseOutcome::Ok(_) => ParseStatus::Ok,
            ParseOutcome::Missing => ParseStatus::Missing,
            ParseOutcome::Malformed => ParseStatus::Malformed,
            ParseOutcome::OutOfRange => ParseStatus::OutOfRange,
        }
    }
}

/// What a completion says about a yes/no question.
#[derive(Clone, Debug, PartialEq)]
pub struct YesNoAnswer {
    /// The stated answer, true for YES; there may be one without a probability.
    pub label: Option<bool>,
    /// The probability of YES.
    pub p_yes: ParseOutcome,
    /// What was odd, in a fixed order.
    pub flags: Vec<&'static str>,
    /// Byte range of the answer's YES or NO in the text as the model wrote it.
    pub range: Option<Range<usize>>,
}

impl YesNoAnswer {
    /// The probability that the stated answer is right; `None` where none could be read.
    pub fn confidence(&self) -> Option<f64> {
        match (self.p_yes, self.label) {
            (ParseOutcome::Ok(p_yes), Some(label)) => Some(if label { p_yes } else { 1.0 - p_yes }),
            _ => None,
        }
    }
}

/// A number as people write one, with or without a leading digit.
pub(crate) const NUMBER: &str = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?";

/// `[answer:] YES with 90% probability` and its looser forms. The word boundaries keep "casino with 5%" from being a NO.
static STATEMENT: LazyLock<Regex> = LazyLock::new(|| {
    let link = r"\s*[,(:\-–—]?\s*(?:with|at)?\s*(?:an?\s+)?(?:(?:probability|confidence|certainty)(?:\s+of)?\s*:?\s*)?";
    constant(&format!(
        r"(?i){LABEL_HEAD}?\b(?P<label>yes|no)\b(?P<link>{link})(?P<number>{NUMBER})(?P<unit>\s*(?:%|percent\b)?)"
    ))
});

/// What may stand before an answer.
const LABEL_HEAD: &str = r"(?:\banswer\s*(?:is)?\s*[:=\-]?\s*)";

/// An answer that states no probability.
static LABEL_ALONE: LazyLock<Regex> = LazyLock::new(|| constant(&format!(r"(?i){LABEL_HEAD}\b(?P<label>yes|no)\b")));

/// What shows that the number before it is not the whole number: more digits, or the other end of a range.
static CONTINUED: LazyLock<Regex> =
    LazyLock::new(|| constant(&format!(r"(?i)^(?:[.,]\d|\s*(?:[-–—]|to\b)\s*{NUMBER}\s*(?:%|percent\b))")));

/// What a number without a unit must be introduced by, to be a probability.
static PROBABILITY_WORD: LazyLock<Regex> = LazyLock::new(|| constant("(?i)with|at|probab|confid|certain"));

/// Flags that strict reading does not accept.
pub(crate) const REFUSED_WHEN_STRICT: [&str; 4] = ["loose_format", "no_percent", "rescaled", "conflict"];

pub(crate) fn constant(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the patterns are constants, and the tests use each")
}

/// Reads the answer line `ANSWER: YES with NN% probability` (SCIENCE 2.3). The probability is that of the stated answer, also
/// where it is below one half. The last statement counts. Takes time linear in the text.
pub fn yes_no_answer(text: &str, mode: Mode) -> YesNoAnswer {
    let Some(text) = Normalized::new(text) else {
        return YesNoAnswer { label: None, p_yes: ParseOutcome::Missing, flags: vec!["unclosed_think"], range: None };
    };
    let statements: Vec<Statement> =
        STATEMENT.captures_iter(&text.text).filter_map(|found| Statement::read(&text.text, &found)).collect();
    let Some(last) = statements.last() else {
        return label_alone(&text);
    };
    let mut flags = last.flags.clone();
    if statements.len() > 1 {
        flags.push("multiple");
    }
    if statements.iter().any(|other| (other.label, other.probability) != (last.label, last.probability)) {
        flags.push("conflict");
    }
    let refused = mode == Mode::Strict && flags.iter().any(|flag| REFUSED_WHEN_STRICT.contains(flag));
    let p_yes = match last.probability {
        ParseOutcome::Ok(_) if refused => ParseOutcome::Malformed,
        ParseOutcome::Ok(probability) if !last.label => ParseOutcome::Ok(1.0 - probability),
        outcome => outcome,
    };
    YesNoAnswer { label: Some(last.label), p_yes, flags, range: Some(text.original(last.range.clone())) }
}

/// An answer without a probability still counts for accuracy.
fn label_alone(text: &Normalized) -> YesNoAnswer {
    let last = LABEL_ALONE.captures_iter(&text.text).last().and_then(|found| found.name("label"));
    YesNoAnswer {
        label: last.map(|label| is_yes(label.as_str())),
        p_yes: ParseOutcome::Missing,
        flags: last.map(|_| "label_without_probability").into_iter().collect(),
        range: last.map(|label| text.original(label.range())),
    }
}

fn is_yes(label: &str) -> bool {
    label.starts_with(['y', 'Y'])
}

/// One answer with the number that was given to it.
struct Statement {
    label: bool,
    /// Of the label, not of YES.
    probability: ParseOutcome,
    flags: Vec<&'static str>,
    /// Of the label, in the normalized text.
    range: Range<usize>,
}

impl Statement {
    /// Judges one match; `None` where the number has nothing to do with a probability ("no 3 of them").
    fn read(text: &str, found: &Captures) -> Option<Statement> {
        let [whole, label, link, number, unit] =
            [found.get(0)?, found.name("label")?, found.name("link")?, found.name("number")?, found.name("unit")?];
        let has_unit = !unit.as_str().trim().is_empty();
        let mut flags = Vec::new();
        // "9O%": the number runs into a letter.
        let cut_short = !has_unit && text[number.end()..].starts_with(char::is_alphabetic);
        // \d also matches the digits of other scripts, which are no Rust number.
        let value = number.as_str().parse::<f64>().ok();
        let probability = match value.filter(|_| !cut_short && !CONTINUED.is_match(&text[whole.end()..])) {
            None => {
                flags.push("bad_number");
                ParseOutcome::Malformed
            }
            Some(_) if !has_unit && !PROBABILITY_WORD.is_match(link.as_str()) => return None,
            Some(value) => {
                if !link.as_str().to_ascii_lowercase().contains("with") {
                    flags.push("loose_format");
                }
                scaled(value, has_unit, &mut flags)
            }
        };
        if matches!(probability, ParseOutcome::Ok(stated) if stated < 0.5) {
            flags.push("label_prob_conflict");
        }
        Some(Statement { label: is_yes(label.as_str()), probability, flags, range: label.range() })
    }
}

/// The probability meant by a number, with or without a percent sign.
fn scaled(value: f64, percent: bool, flags: &mut Vec<&'static str>) -> ParseOutcome {
    if !percent {
        flags.push("no_percent");
    }
    let ambiguous = if percent { 0.0 < value && value < 1.0 } else { 1.0 < value && value <= 10.0 };
    if !(0.0..=100.0).contains(&value) {
        ParseOutcome::OutOfRange
    } else if ambiguous {
        flags.push(if percent { "ambiguous_percent" } else { "ambiguous_scale" });
        ParseOutcome::Malformed
    } else {
        ParseOutcome::Ok(if percent || value > 1.0 { value / 100.0 } else { value })
    }
}

/// A completion made easier to read (SCIENCE 2.2, steps 1 and 2): thinking removed, full-width characters made ASCII,
/// emphasis removed.
pub struct Normalized {
    /// The text to read.
    pub text: String,
    /// For each of its bytes, the byte range of the character in the original that it comes from.
    origins: Vec<Range<usize>>,
}

impl Normalized {
    /// `None` where the model was still thinking when it stopped: nothing that it wrote is its answer.
    pub fn new(original: &str) -> Option<Normalized> {
        let start = original.rfind("</think>").map_or(0, |end| end + "</think>".len());
        if original[start..].contains("<think>") {
            return None;
        }
        let mut normalized = Normalized { text: String::new(), origins: Vec::new() };
        for (offset, character) in original[start..].char_indices() {
            let Some(plain) = plain(character) else { continue };
            normalized.text.push(plain);
            let begin = start + offset;
            normalized.origins.resize(normalized.text.len(), begin..begin + character.len_utf8());
        }
        Some(normalized)
    }

    /// Where a non-empty range of `text` was in the original.
    pub fn original(&self, range: Range<usize>) -> Range<usize> {
        self.origins[range.start].start..self.origins[range.end - 1].end
    }
}

/// What stands for a character in the normalized text; `None`: nothing.
fn plain(character: char) -> Option<char> {
    match character {
        '*' | '`' => None,
        '_' | '\u{a0}' => Some(' '),
        '\u{2212}' => Some('-'),
        // The full-width forms of "%,.:" and of the digits lie at a fixed distance from the ASCII ones.
        '％' | '，' | '．' | '：' | '０'..='９' => char::from_u32(character as u32 - 0xfee0),
        other => Some(other),
    }
}
