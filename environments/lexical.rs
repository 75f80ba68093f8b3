//! The offline judge: grades by words, numbers and dates, without a network or a model (SCIENCE 4.4).
//!
//! It errs toward "incorrect": transliterations, typos, number words and paraphrases are not recognized (Kamalloo et al.
//! 2023 found more than half of such rejections to be right answers). Use it for tests and for data with short answers and
//! aliases, such as TriviaQA's; not for numbers that are to be compared with published SimpleQA ones.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;
use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

use crate::parsing::constant;
use crate::quantities::{Date, GoldNumber, dates, mentions_year, numbers};
use crate::{Judge, Judgment, Verdict};

/// Version of the rules.
const RULES: u32 = 1;

/// The judge that needs nothing.
pub struct Lexical;

impl Judge for Lexical {
    fn judge(&self, _question: &str, gold: &[String], answer: &str) -> Judgment {
        Judgment {
            id: "lexical".into(),
            prompt_version: RULES,
            verdict: Ok(grade(answer, gold).0),
            cached: false,
            attempts: 0,
            p_correct: None,
        }
    }
}

/// Words that say that there is no answer. What is left of a text without them may hold one.
static ABSTAINING: LazyLock<Regex> = LazyLock::new(|| {
    let not = r"(?:do not|don t|dont|did not|didn t|cannot|can not|can t|cant|could not|couldn t|am unable to|m unable to|am not able to)";
    let find = r"(?:know|have|find|verify|confirm|provide|access|determine|recall|remember|answer|say|tell|search)";
    constant(&format!(
        r"\b(?:(?:i )?{not} {find}|(?:i am |i m )?not (?:sure|certain|aware)|(?:i have )?no (?:idea|information)|unable to {find}|is unknown|i am unaware)\b|^(?:n a|unknown|none)$"
    ))
});

/// Words that take back what stands beside them.
const HEDGES: [&str; 4] = ["not", "or", "either", "neither"];

/// Two token lists as similar as this say the same.
const SAME: f64 = 0.8;

/// The grade of an answer against gold answers, any of which will do, and the rule that decided. Of several gold answers
/// the one it fares best with counts: correct, else not attempted, else incorrect.
pub fn grade(answer: &str, gold: &[String]) -> (Verdict, &'static str) {
    let rank = |verdict| match verdict {
        Verdict::Correct => 0,
        Verdict::NotAttempted => 1,
        Verdict::Incorrect => 2,
    };
    let grades = gold.iter().map(|gold| grade_one(answer, gold));
    grades.min_by_key(|(verdict, _)| rank(*verdict)).unwrap_or((Verdict::Incorrect, "none"))
}

fn grade_one(answer: &str, gold: &str) -> (Verdict, &'static str) {
    use Verdict::{Correct, Incorrect, NotAttempted};
    let (said, wanted) = (normalize(answer), normalize(gold));
    if said.is_empty() {
        return (NotAttempted, "empty");
    }
    if said == wanted {
        return (Correct, "em");
    }
    let spaced = spaced(answer);
    if ABSTAINING.is_match(&spaced) {
        let rest = normalize(&ABSTAINING.replace_all(&spaced, " "));
        let answered = contains(&rest, &wanted).is_some_and(|around| !is_hedged(&around));
        return (if answered { Correct } else { NotAttempted }, "abstain");
    }
    if let Some(verdict) = Date::only(gold).and_then(|gold| by_date(answer, gold)) {
        return (verdict, "date");
    }
    if let Some(decided) = GoldNumber::only(gold).and_then(|gold| by_number(answer, &gold)) {
        return decided;
    }
    match contains(&said, &wanted) {
        Some(around) if is_hedged(&around) => (Incorrect, "containment_hedged"),
        Some(_) => (Correct, "containment"),
        None if token_f1(&said, &wanted) >= SAME => (Correct, "f1"),
        None => (Incorrect, "none"),
    }
}

/// A text as it is compared: decomposed, without accents, in lower case; hyphens, slashes and dashes are spaces;
/// without punctuation and articles.
pub fn normalize(text: &str) -> String {
    let kept = |character: char| match character {
        '-' | '/' | '\u{2010}'..='\u{2015}' | '\u{2212}' => Some(' '),
        _ if character.is_alphanumeric() || character.is_whitespace() => Some(character),
        _ => None,
    };
    words(text, kept).filter(|word| !matches!(word.as_str(), "a" | "an" | "the")).collect::<Vec<_>>().join(" ")
}

/// The words of a text, where anything but letters and digits is a space.
fn spaced(text: &str) -> String {
    words(text, |character| Some(if character.is_alphanumeric() { character } else { ' ' }))
        .collect::<Vec<_>>()
        .join(" ")
}

fn words(text: &str, kept: impl Fn(char) -> Option<char>) -> impl Iterator<Item = String> {
    let plain: String = text.nfkd().filter(|character| !is_combining_mark(*character)).collect();
    let plain: String = plain.to_lowercase().chars().filter_map(kept).collect();
    plain.split_whitespace().map(str::to_string).collect::<Vec<_>>().into_iter()
}

/// What is around `wanted` where its words stand in `said`, in one piece.
fn contains(said: &str, wanted: &str) -> Option<String> {
    let (said, wanted) = (format!(" {said} "), format!(" {wanted} "));
    let at = said.find(&wanted).filter(|_| !wanted.trim().is_empty())?;
    Some(format!("{} {}", &said[..at], &said[at + wanted.len()..]))
}

fn is_hedged(around: &str) -> bool {
    around.split_whitespace().any(|word| HEDGES.contains(&word))
}

/// The F1 of two normalized texts as bags of words, as SQuAD's.
pub fn token_f1(said: &str, wanted: &str) -> f64 {
    let mut left: HashMap<&str, usize> = HashMap::new();
    wanted.split_whitespace().for_each(|word| *left.entry(word).or_default() += 1);
    let mut take = |word: &&str| left.get_mut(*word).filter(|count| **count > 0).map(|count| *count -= 1).is_some();
    let common = said.split_whitespace().filter(|word| take(word)).count();
    let all = said.split_whitespace().count() + wanted.split_whitespace().count();
    if common == 0 { 0.0 } else { 2.0 * common as f64 / all as f64 }
}

/// The year alone leaves the question open; another one does not.
fn by_date(answer: &str, gold: Date) -> Option<Verdict> {
    let said = dates(answer);
    if said.is_empty() {
        let same = mentions_year(answer)? == gold.year;
        return Some(if same { Verdict::NotAttempted } else { Verdict::Incorrect });
    }
    Some(if said.iter().all(|date| *date == gold) { Verdict::Correct } else { Verdict::Incorrect })
}

fn by_number(answer: &str, gold: &GoldNumber) -> Option<(Verdict, &'static str)> {
    let said = numbers(answer);
    let first = said.first()?;
    if said.iter().any(|other| other.value != first.value) {
        return Some((Verdict::Incorrect, "number_multiple"));
    }
    let units_differ = match (&gold.unit, &first.unit) {
        (Some(wanted), Some(said)) => wanted != said,
        _ => false,
    };
    if units_differ {
        return None;
    }
    Some((if gold.admits(first.value) { Verdict::Correct } else { Verdict::Incorrect }, "number"))
}
