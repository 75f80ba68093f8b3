//! A completion. The stated probability is one, the answer's place is in the text, and strict reading reads no more
//! than lenient reading; so for answers in words. A judge's reply and the offline judge take any text.

#![no_main]

use candor_environments::confidence::stated_answer;
use candor_environments::lexical::grade;
use candor_environments::parsing::{Mode, ParseOutcome, yes_no_answer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let [strict, lenient] = [Mode::Strict, Mode::Lenient].map(|mode| {
        let answer = yes_no_answer(text, mode);
        assert!(answer.range.is_none_or(|range| text.get(range).is_some_and(|answer| !answer.is_empty())));
        answer.p_yes
    });
    for outcome in [strict, lenient] {
        assert!(!matches!(outcome, ParseOutcome::Ok(p) if !(0.0..=1.0).contains(&p)));
    }
    assert!(strict == lenient || strict == ParseOutcome::Malformed);
    let stated = stated_answer(text, Mode::Lenient);
    assert!(stated.answer.is_none_or(|range| text.get(range).is_some_and(|answer| !answer.trim().is_empty())));
    assert!(!matches!(stated.confidence, ParseOutcome::Ok(p) if !(0.0..=1.0).contains(&p)));
    candor::judge::reply::read(text);
    let (answer, gold) = text.split_once('\n').unwrap_or((text, "120k"));
    grade(answer, &[gold.to_string()]);
});
