//! The offline judge: the vectors, and cases of our own for what the vectors leave out.

use candor_environments::Verdict::{self, Correct, Incorrect, NotAttempted};
use candor_environments::lexical::{grade, normalize, token_f1};
use candor_environments::quantities::numbers;
use proptest::prelude::*;

use crate::check;

fn graded(answer: &str, gold: &[&str]) -> (Verdict, &'static str) {
    grade(answer, &gold.iter().map(|gold| gold.to_string()).collect::<Vec<_>>())
}

/// Fails if any rule, their order, the normal form or the token F1 differs from the specification's.
#[test]
fn vectors_offline_judge() {
    let Some(path) = check::vectors("simpleqa.json") else { return };
    let file = check::json(&path);
    let cases = file["offline_judge_cases"].as_array().unwrap();
    assert!(cases.len() > 30);
    for case in cases {
        let answer = case["pred"].as_str().unwrap();
        let gold: Vec<String> = serde_json::from_value(case["gold"].clone()).unwrap();
        let (verdict, rule) = grade(answer, &gold);
        assert_eq!(verdict.name().to_uppercase(), case["grade"].as_str().unwrap(), "{case}: by {rule}");
        assert_eq!(rule, case["rule"].as_str().unwrap(), "{case}");
        assert_eq!(normalize(answer), case["norm"].as_str().unwrap(), "{case}");
        let best = gold.iter().map(|gold| token_f1(&normalize(answer), &normalize(gold))).fold(0.0, f64::max);
        check::close(answer, best, case["f1"].as_f64().unwrap(), 1e-12);
    }
}

#[test]
fn further_answers() {
    let cases: &[(&str, &[&str], Verdict)] = &[
        ("I'm not sure, but I think it is Paris", &["Paris"], Correct),
        ("I don't have access to that information.", &["Paris"], NotAttempted),
        ("I cannot verify the year 1992.", &["1992"], Correct),
        ("Gödel", &["Godel"], Correct),
        ("Kurt Goedel", &["Kurt Gödel"], Incorrect),
        ("1998", &["July 4, 1998"], NotAttempted),
        ("1999", &["July 4, 1998"], Incorrect),
        ("The 4th of July, 1998", &["1998-07-04"], Correct),
        ("27 Nov. 2023", &["November 27, 2023"], Correct),
        ("May 4, 1998 or July 4, 1998", &["July 4, 1998"], Incorrect),
        ("99 May 1998", &["July 4, 1998"], NotAttempted),
        ("5 km", &["5 miles"], Incorrect),
        ("-5", &["5"], Incorrect),
        ("about -5 °C", &["-5 °C"], Correct),
        ("92.71 percent", &["92.71%"], Correct),
        ("Apollo 12", &["Apollo 11"], Incorrect),
        ("B12", &["12"], Incorrect),
        ("1.73.1", &["1.73"], Incorrect),
        ("Romeo or Juliet", &["Romeo or Juliet"], Correct),
        ("the play Romeo or Juliet", &["Romeo or Juliet"], Correct),
        ("neither Paris", &["Paris"], Incorrect),
        ("???", &["Paris"], NotAttempted),
        ("Paris", &["!!!", "Paris"], Correct),
        ("anything", &[], Incorrect),
    ];
    for (answer, gold, verdict) in cases {
        assert_eq!(graded(answer, gold).0, *verdict, "{answer:?} against {gold:?}: by {}", graded(answer, gold).1);
    }
}

#[test]
fn numbers_are_those_that_stand_by_themselves() {
    let values = |text: &str| numbers(text).into_iter().map(|number| number.value).collect::<Vec<_>>();
    assert_eq!(values("1998-07-04"), [1998.0, 7.0, 4.0]);
    assert_eq!(values("120k, 3 million and 2.5b"), [120e3, 3e6, 2.5e9]);
    assert_eq!(values("1,234,567.8 but 12,34"), [1_234_567.8, 12.0, 34.0]);
    assert!(values("B12 4th 12abc x_3 1.2.3 ٣").is_empty());
    assert!(values(&"9".repeat(400)).iter().all(|value| value.is_infinite()));
}

proptest! {
    /// No text makes the judge panic, and the gold answer itself is always right.
    #[test]
    fn any_text_is_graded(answer in ".{0,80}", gold in ".{0,40}") {
        graded(&answer, &[&gold]);
        let empty = normalize(&gold).is_empty();
        prop_assert_eq!(graded(&gold, &[&gold]).0, if empty { NotAttempted } else { Correct });
    }

    #[test]
    fn numbers_and_dates_in_any_order_are_graded(pieces in prop::collection::vec(
        prop::sample::select(vec!["1", "998", ",", ".", "-", "k", " ", "May", "4", "07", "million", "−", "１", "e9", "%"]), 0..14,
    )) {
        let text = pieces.concat();
        graded(&text, &["July 4, 1998"]);
        graded(&text, &["120k"]);
        graded("120,000", &[&text]);
    }
}
