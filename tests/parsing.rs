//! What completions of a yes/no question state: the vectors, cases of our own, and properties that hold for any text.

use std::time::{Duration, Instant};

use candor_environments::ParseStatus;
use candor_environments::parsing::{Mode, Normalized, ParseOutcome, YesNoAnswer, yes_no_answer};
use proptest::prelude::*;
use regex::RegexBuilder;
use serde_json::Value;

use crate::check;

const MODES: [(&str, Mode); 2] = [("lenient", Mode::Lenient), ("strict", Mode::Strict)];

fn p_yes(answer: &YesNoAnswer) -> Option<f64> {
    match answer.p_yes {
        ParseOutcome::Ok(p_yes) => Some(p_yes),
        _ => None,
    }
}

#[test]
fn vectors_boolq_answer_lines() {
    let Some(path) = check::vectors("parsing_cases.json") else { return };
    let file = check::json(&path);
    let cases = file["boolq_cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for (case, (name, mode)) in cases.iter().flat_map(|case| MODES.map(|mode| (case, mode))) {
        let (text, want) = (case["text"].as_str().unwrap(), &case[name]);
        let place = format!("{} {name} {text:?}", case["id"]);
        let got = yes_no_answer(text, mode);
        let status: ParseStatus = serde_json::from_value(want["status"].clone()).unwrap();
        assert_eq!(got.p_yes.status(), status, "{place}");
        assert_eq!(got.label.map(|yes| if yes { "YES" } else { "NO" }), want["label"].as_str(), "{place}");
        assert_eq!(Value::from(got.flags.clone()), want["flags"], "{place}");
        assert_eq!(p_yes(&got).is_some(), want["p_yes"].is_number(), "{place}");
        if let (Some(got), Some(want)) = (p_yes(&got), want["p_yes"].as_f64()) {
            check::close(&place, got, want, 1e-12);
        }
        let answer = got.range.map(|range| text[range].to_uppercase());
        assert_eq!(answer.as_deref(), want["label"].as_str(), "{place}: the answer's place");
    }
}

/// How the reference run SPAR read a completion: the last match, out-of-range numbers clamped, no word boundary.
pub fn spar_p_yes(text: &str, vectors: &Value) -> Option<f64> {
    let pattern = vectors["regex"]["SPAR"].as_str().unwrap();
    let regex = RegexBuilder::new(pattern).case_insensitive(true).build().unwrap();
    let last = regex.captures_iter(text).last()?;
    let stated = (last[2].parse::<f64>().unwrap() / 100.0).min(1.0);
    Some(if last[1].eq_ignore_ascii_case("yes") { stated } else { 1.0 - stated })
}

#[test]
fn vectors_boolq_as_spar_read_them() {
    let Some(path) = check::vectors("parsing_cases.json") else { return };
    let file = check::json(&path);
    for case in file["boolq_cases"].as_array().unwrap() {
        let got = spar_p_yes(case["text"].as_str().unwrap(), &file);
        assert_eq!(got, case["spar_p_yes"].as_f64(), "{case}");
    }
}

/// Text, probability of YES read leniently and strictly, flags.
type Case = (&'static str, Option<f64>, Option<f64>, &'static [&'static str]);

const CASES: &[Case] = &[
    ("", None, None, &[]),
    ("<think>NO with 10%?</think>ANSWER: YES with 90% probability", Some(0.9), Some(0.9), &[]),
    ("<think>a</think>ANSWER: YES with 90% probability<think>but", None, None, &["unclosed_think"]),
    ("ANSWER： YES with ９０％ probability", Some(0.9), Some(0.9), &[]),
    ("__ANSWER:__ `NO` with\u{a0}**75**% probability", Some(0.25), Some(0.25), &[]),
    ("ANSWER: YES with −5% probability", None, None, &[]),
    ("ANSWER: YES with .5 probability", Some(0.5), None, &["no_percent"]),
    ("ANSWER: YES with 1e400% probability", None, None, &[]),
    ("ANSWER: YES with ٩٠% probability", None, None, &["bad_number"]),
    ("ANSWER: YES with 90,5% probability", None, None, &["bad_number"]),
    ("ANSWER: YES with 1.2.3% probability", None, None, &["bad_number"]),
    ("ANSWER: YES with 80% to 90% probability", None, None, &["bad_number"]),
    ("ANSWER: YES with 5 probability", None, None, &["no_percent", "ambiguous_scale"]),
    ("ANSWER: YES at 90%", Some(0.9), None, &["loose_format"]),
    ("There is no 3 in it. ANSWER: NO with 90% probability", Some(0.1), Some(0.1), &[]),
    ("YES with 90%\nYES with 90.0%", Some(0.9), Some(0.9), &["multiple"]),
    ("YES with 90%\nYES with 80%", Some(0.8), None, &["multiple", "conflict"]),
    ("Answer is no. The answer is yes.", None, None, &["label_without_probability"]),
    ("yes, it is", None, None, &[]),
];

#[test]
fn further_answer_lines() {
    for (text, lenient, strict, flags) in CASES {
        for ((name, mode), want) in MODES.iter().zip([lenient, strict]) {
            let got = yes_no_answer(text, *mode);
            assert_eq!(p_yes(&got).is_some(), want.is_some(), "{name} {text:?}: {got:?}");
            check::close(text, p_yes(&got).unwrap_or(0.0), want.unwrap_or(0.0), 1e-12);
            assert_eq!(got.flags, *flags, "{name} {text:?}");
        }
    }
    assert_eq!(yes_no_answer("Answer is no. The answer is yes.", Mode::Strict).label, Some(true));
}

#[test]
fn ranges_are_those_of_the_original_text() {
    let text = "<think>é</think>**ANSWER：** `Y*E*S` with 90％";
    let answer = yes_no_answer(text, Mode::Strict);
    assert_eq!(&text[answer.range.unwrap()], "Y*E*S");
    let normalized = Normalized::new(text).unwrap();
    assert_eq!(normalized.text, "ANSWER: YES with 90%");
    let whole = normalized.original(0..normalized.text.len());
    assert_eq!(&text[whole], "ANSWER：** `Y*E*S` with 90％");
}

/// Text made of the pieces that the parser looks at, so that random text reaches its branches.
fn answer_like() -> impl Strategy<Value = String> {
    const PIECES: &[&str] = &[
        "answer",
        "ANSWER: ",
        "yes",
        "NO",
        " with ",
        " at ",
        "a probability of ",
        "90",
        "0.5",
        "150",
        "-",
        "–",
        "to",
        "%",
        "％",
        " percent",
        "９",
        "٩",
        ",",
        ".",
        "e",
        "*",
        "_",
        "\u{a0}",
        "\n",
        " ",
        "(",
        "<think>",
        "</think>",
        "ſ",
        "K",
        "é",
    ];
    prop::collection::vec(prop::sample::select(PIECES), 0..24).prop_map(|pieces| pieces.concat())
}

fn holds_for_any_text(text: &str) -> Result<(), TestCaseError> {
    let [lenient, strict] = [Mode::Lenient, Mode::Strict].map(|mode| yes_no_answer(text, mode));
    for answer in [&lenient, &strict] {
        if let Some(p_yes) = p_yes(answer) {
            prop_assert!((0.0..=1.0).contains(&p_yes), "{p_yes}");
            prop_assert!(answer.label.is_some());
        }
        prop_assert_eq!(answer.label.is_some(), answer.range.is_some());
        if let Some(range) = answer.range.clone() {
            let first = text[range].chars().next();
            prop_assert_eq!(first.map(|letter| "yY".contains(letter)), answer.label);
        }
    }
    prop_assert!(
        p_yes(&strict).is_none() || strict == lenient,
        "strict reading accepts only what lenient reading does"
    );
    prop_assert_eq!(strict.flags, lenient.flags);
    Ok(())
}

proptest! {
    #[test]
    fn any_text_is_read_without_panic(text in any::<String>()) {
        holds_for_any_text(&text)?;
    }

    #[test]
    fn any_answer_like_text_is_read_without_panic(text in answer_like()) {
        holds_for_any_text(&text)?;
    }
}

#[test]
fn long_texts_take_linear_time() {
    // Read in quadratic time, the longest of these would take hours.
    for piece in
        ["a", " ", "answer ", "yes ", "yes 1", "yes with 1% - ", "yes 1%      ", "<think>", "</think>", "*", "é", "-"]
    {
        let text = piece.repeat(1_000_000 / piece.len());
        let start = Instant::now();
        yes_no_answer(&text, Mode::Strict);
        yes_no_answer(&(text + "answer: yes with 90%"), Mode::Lenient);
        assert!(start.elapsed() < Duration::from_secs(20), "{piece:?}: {:?}", start.elapsed());
    }
}
