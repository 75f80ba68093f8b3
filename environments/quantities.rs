//! Numbers and dates in short answers, for the offline judge.

use std::sync::LazyLock;

use regex::{Captures, Regex};

use crate::parsing::constant;

/// A day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    /// The year.
    pub year: u32,
    month: u32,
    day: u32,
}

const MONTHS: &str = r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?";
const DAY: &str = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?";

/// `4 July 1998`, `July 4, 1998`, `1998-07-04`.
static DATES: LazyLock<[Regex; 3]> = LazyLock::new(|| {
    [
        format!(r"(?i)\b{DAY}\s+(?:of\s+)?{MONTHS},?\s+(?P<year>\d{{4}})\b"),
        format!(r"(?i)\b{MONTHS}\s+{DAY},?\s+(?P<year>\d{{4}})\b"),
        r"\b(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})\b".to_string(),
    ]
    .map(|pattern| constant(&pattern))
});

/// A year by itself.
static YEAR: LazyLock<Regex> = LazyLock::new(|| constant(r"\b[12]\d{3}\b"));

impl Date {
    fn of(found: &Captures) -> Option<Date> {
        let text = |name| found.name(name).map(|text| text.as_str());
        let number = |name| text(name)?.parse::<u32>().ok();
        let word = text("month")?.to_ascii_lowercase();
        let names = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
        let named = names.iter().position(|name| word.starts_with(name)).map(|index| index as u32 + 1);
        let date = Date { year: number("year")?, month: named.or_else(|| number("month"))?, day: number("day")? };
        ((1..=12).contains(&date.month) && (1..=31).contains(&date.day)).then_some(date)
    }

    /// The date that a text is, if it is nothing else.
    pub fn only(text: &str) -> Option<Date> {
        let text = text.trim().trim_end_matches('.');
        DATES.iter().find_map(|form| Date::of(&form.captures(text).filter(|found| &found[0] == text)?))
    }
}

/// All dates in a text.
pub fn dates(text: &str) -> Vec<Date> {
    DATES.iter().flat_map(|form| form.captures_iter(text).filter_map(|found| Date::of(&found))).collect()
}

/// The last year in a text.
pub fn mentions_year(text: &str) -> Option<u32> {
    YEAR.find_iter(text).last()?.as_str().parse().ok()
}

/// A number with what it counts.
#[derive(Clone, Debug, PartialEq)]
pub struct Number {
    /// Its value, scale words and suffixes applied.
    pub value: f64,
    /// The word after it, in lower case.
    pub unit: Option<String>,
    /// Half a unit of its last significant digit.
    tolerance: f64,
    /// Where it begins and ends in the text, in bytes.
    start: usize,
    end: usize,
}

/// A gold answer that is a number.
#[derive(Clone, Debug, PartialEq)]
pub struct GoldNumber {
    value: f64,
    tolerance: f64,
    /// What it counts, where that is said.
    pub unit: Option<String>,
}

/// What may stand before a gold answer's number.
const BEFORE: [&str; 10] = ["", "$", "€", "£", "~", "about", "approximately", "around", "roughly", "us$"];

/// Smaller whole numbers are meant exactly: years, counts.
const EXACT_BELOW: f64 = 10_000.0;

impl GoldNumber {
    /// The number that a text is, with at most one word for what it counts.
    pub fn only(text: &str) -> Option<GoldNumber> {
        let text = text.trim().trim_end_matches('.');
        let [Number { value, unit, tolerance, start, end }] = numbers(text).try_into().ok()?;
        let (before, after) = (text[..start].trim().to_lowercase(), text[end..].trim().to_lowercase());
        let lone = after.is_empty() || unit.as_ref().is_some_and(|unit| *unit == after);
        (BEFORE.contains(&before.as_str()) && lone).then_some(GoldNumber { value, tolerance, unit })
    }

    /// Whether a number agrees with this one to its last significant digit.
    pub fn admits(&self, value: f64) -> bool {
        (value - self.value).abs() <= self.tolerance * (1.0 + 1e-9)
    }
}

/// All numbers in a text that stand by themselves: `120k`, `120,000`, `1.73 m`, `3 million`, `-5`; not `B12`, `4th`.
pub fn numbers(text: &str) -> Vec<Number> {
    let (bytes, mut found, mut at) = (text.as_bytes(), Vec::new(), 0);
    while at < bytes.len() {
        if !bytes[at].is_ascii_digit() {
            at += 1;
            continue;
        }
        let end = digits_end(bytes, at);
        found.extend(number_at(text, at, end));
        at = end;
    }
    found
}

/// Where a stretch of digits, with commas between groups of three and points between digits, ends.
fn digits_end(bytes: &[u8], start: usize) -> usize {
    let digits = |from: usize| bytes[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let mut end = start + digits(start);
    let mut leading = end - start;
    while end < bytes.len() {
        let next = digits(end + 1);
        let grouped = bytes[end] == b',' && next == 3 && leading <= 3;
        if next == 0 || !(grouped || bytes[end] == b'.') {
            break;
        }
        // Groups come before the point.
        leading = if grouped { 3 } else { usize::MAX };
        end += 1 + next;
    }
    end
}

/// The number spelled by the digits at `start..end`, unless they are a part of something else.
fn number_at(text: &str, start: usize, end: usize) -> Option<Number> {
    let (before, digits, after) = (&text[..start], &text[start..end], &text[end..]);
    let bounded = |text: Option<char>| text.is_none_or(|next| !next.is_alphanumeric() && next != '_');
    let minus = before.strip_suffix(['-', '−']).filter(|before| bounded(before.chars().next_back()));
    let (word, rest) = after.split_at(after.find(|next: char| !next.is_alphabetic()).unwrap_or(after.len()));
    let (scale, word_end) = match word.to_lowercase().as_str() {
        "" => spaced_scale(after),
        "k" => (1e3, word.len()),
        "m" => (1e6, word.len()),
        "b" => (1e9, word.len()),
        _ => return None,
    };
    if !bounded(before.chars().next_back()) || !(word.is_empty() || bounded(rest.chars().next())) {
        return None;
    }
    let plain = digits.replace(',', "");
    let value: f64 = plain.parse().ok()?;
    let last_digit = match plain.split_once('.') {
        Some((_, decimals)) => 10f64.powi(-i32::try_from(decimals.len()).ok()?),
        None if scale == 1.0 && value < EXACT_BELOW => 0.0,
        None => 10f64.powi(i32::try_from(plain.len() - plain.trim_end_matches('0').len()).ok()?),
    };
    let sign = if minus.is_some() { -1.0 } else { 1.0 };
    let after = &after[word_end..];
    let unit = after.trim_start().split([' ', '.', ',', ';', ')']).next().map(str::to_lowercase);
    let (value, tolerance) = (sign * value * scale, last_digit * scale / 2.0);
    let start = minus.map_or(start, str::len);
    Some(Number { value, unit: unit.filter(|unit| !unit.is_empty()), tolerance, start, end: end + word_end })
}

/// A word for a power of a thousand, at the beginning of what follows a number: its value and length.
fn spaced_scale(after: &str) -> (f64, usize) {
    let word = after.trim_start();
    let space = after.len() - word.len();
    let scales = [("thousand", 1e3), ("million", 1e6), ("billion", 1e9), ("trillion", 1e12)];
    let lower = word.to_lowercase();
    let named = scales.iter().find(|(name, _)| {
        space > 0 && lower.strip_prefix(name).is_some_and(|rest| !rest.starts_with(char::is_alphanumeric))
    });
    named.map_or((1.0, 0), |(name, scale)| (*scale, space + name.len()))
}
