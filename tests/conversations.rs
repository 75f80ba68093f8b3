//! Rows that carry completions: every shape that is read, and what is said of those that are not.

use candor_environments::conversations::{Comparison, Exchange, comparison, exchange, judged};
use candor_environments::{Message, Role};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

fn object(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn asked(question: &str) -> Vec<Message> {
    vec![Message::user(question)]
}

#[test]
fn every_shape_of_an_exchange_is_read_alike() {
    let want = Exchange { prompt: asked("Why?"), completion: "So.".into() };
    let user = json!({"role": "user", "content": "Why?"});
    let assistant = json!({"role": "assistant", "content": "So."});
    for row in [
        json!({"prompt": "Why?", "completion": "So."}),
        json!({"prompt": [user], "completion": [assistant]}),
        json!({"prompt": [user], "completion": "So."}),
        json!({"messages": [user, assistant]}),
        json!({"input": "Why?", "output": "So."}),
        json!({"question": "Why?", "answer": "So.", "other": 1}),
        json!({"question": "Why?", "model_answer": "So.", "confidence": 0.4}),
    ] {
        assert_eq!(exchange(&object(row.clone())).unwrap(), want, "{row}");
    }
    let system = json!({"role": "system", "content": "Be brief."});
    let row = json!({"messages": [system, user, assistant, user, assistant]});
    let Exchange { prompt, completion } = exchange(&object(row)).unwrap();
    assert_eq!((prompt.len(), prompt[0].role, completion.as_str()), (4, Role::System, "So."));
}

#[test]
fn pairs_are_read_with_and_without_their_conversation() {
    let want = Comparison { prompt: asked("Why?"), chosen: "So.".into(), rejected: "No.".into() };
    let user = json!({"role": "user", "content": "Why?"});
    let says = |text: &str| json!({"role": "assistant", "content": text});
    for row in [
        json!({"prompt": "Why?", "chosen": "So.", "rejected": "No."}),
        json!({"prompt": [user], "chosen": [says("So.")], "rejected": [says("No.")]}),
        json!({"chosen": [user, says("So.")], "rejected": [user, says("No.")]}),
        json!({"prompt": "Why?", "chosen": [user, says("So.")], "rejected": [user, says("No.")]}),
        json!({"prompt": [user], "chosen": [user, says("So.")], "rejected": [user, says("No.")]}),
    ] {
        assert_eq!(comparison(&object(row.clone())).unwrap(), want, "{row}");
    }
}

#[test]
fn judged_rows_say_whether_they_are_right() {
    let (right, wrong) = (json!({"question": "Why?", "answer": "So."}), json!({"prompt": "Why?", "completion": "So."}));
    for (row, name, value, want) in [
        (&right, "is_correct", json!(true), true),
        (&right, "is_correct", json!(0), false),
        (&wrong, "is_correct", json!(1.0), true),
        (&wrong, "label", json!(false), false),
    ] {
        let mut row = object(row.clone());
        row.insert(name.into(), value);
        assert_eq!(judged(&row).unwrap(), (Exchange { prompt: asked("Why?"), completion: "So.".into() }, want));
    }
    let row = json!({"input": "Question: Why?\n\nAnswer: No.\nAnswer: So.\nConfidence: 0.9", "is_correct": false});
    let (Exchange { prompt, completion }, correct) = judged(&object(row)).unwrap();
    assert_eq!(prompt, asked("Question: Why?\n\nAnswer: No."));
    assert_eq!((completion.as_str(), correct), ("Answer: So.\nConfidence: 0.9", false));
}

type Reader = fn(&Map<String, Value>) -> anyhow::Result<()>;

/// Each must be an error that says which field it is about, and none may become a task by a guess.
#[test]
fn rows_that_are_not_what_their_shape_says_are_refused_by_field() {
    let exchange: Reader = |row| exchange(row).map(drop);
    let pair: Reader = |row| comparison(row).map(drop);
    let judged: Reader = |row| judged(row).map(drop);
    let user = json!({"role": "user", "content": "Why?"});
    let says = json!({"role": "assistant", "content": "So."});
    let cases: &[(Reader, Value, &str)] = &[
        (exchange, json!({}), "fields (none): not a known shape"),
        (exchange, json!({"text": "Why? So."}), "fields text: not a known shape"),
        (exchange, json!({"prompt": "Why?", "completion": 3}), "field `completion`"),
        (exchange, json!({"prompt": null, "completion": "So."}), "field `prompt`"),
        (exchange, json!({"prompt": "Why?", "completion": ""}), "a completion is empty"),
        (exchange, json!({"prompt": " ", "completion": "So."}), "the prompt is empty"),
        (exchange, json!({"prompt": [], "completion": "So."}), "there is no prompt"),
        (
            exchange,
            json!({"prompt": [user, says], "completion": "So."}),
            "the prompt ends with a message of the Assistant",
        ),
        (exchange, json!({"prompt": "Why?", "completion": [user, says]}), "more than one assistant's message"),
        (exchange, json!({"messages": [user]}), "`messages` does not end with an assistant's message"),
        (exchange, json!({"messages": []}), "`messages` does not end with an assistant's message"),
        (exchange, json!({"messages": [says]}), "there is no prompt"),
        (exchange, json!({"messages": [{"role": "tool", "content": "x"}, says]}), "field `messages`"),
        (exchange, json!({"messages": [{"role": "user", "content": ["x"]}, says]}), "field `messages`"),
        (pair, json!({"prompt": "Why?", "chosen": "So."}), "fields prompt, chosen: not a pair"),
        (pair, json!({"prompt": "Why?", "chosen": "So.", "rejected": "So."}), "are the same"),
        (pair, json!({"chosen": "So.", "rejected": "No."}), "there is no prompt"),
        (pair, json!({"chosen": [user, says], "rejected": [says]}), "answer different conversations"),
        (
            pair,
            json!({"prompt": "Who?", "chosen": [user, says], "rejected": [user, says]}),
            "`prompt` is not the question",
        ),
        (judged, json!({"question": "Why?", "answer": "So."}), "field `is_correct` is missing"),
        (judged, json!({"question": "Why?", "answer": "So.", "is_correct": "yes"}), "neither true nor false"),
        (judged, json!({"question": "Why?", "answer": "So.", "is_correct": 0.5}), "neither true nor false"),
        (judged, json!({"input": "Why? So.", "is_correct": true}), "no line that begins with `Answer:`"),
        (judged, json!({"input": "\nAnswer: So.", "is_correct": true}), "the prompt is empty"),
    ];
    for (read, row, says) in cases {
        let error = format!("{:#}", read(&object(row.clone())).expect_err(&row.to_string()));
        assert!(error.contains(says), "{row}: {error}");
    }
}

proptest! {
    /// Whatever a row holds, reading it ends with a task or an error.
    #[test]
    fn no_row_makes_the_reader_panic(names in prop::collection::vec(0..12usize, 0..6), values in prop::collection::vec(0..9usize, 6)) {
        let all = ["prompt", "completion", "messages", "chosen", "rejected", "input", "output", "question", "answer",
            "model_answer", "is_correct", "label"];
        let user = json!({"role": "user", "content": "\nAnswer: é"});
        let contents = [json!(null), json!(""), json!("é\nAnswer:"), json!([]), json!([user]), json!(true), json!(1e300),
            json!([user, {"role": "assistant", "content": "x"}]), json!({"role": "user"})];
        let fields = names.iter().zip(&values).map(|(&name, &value)| (all[name].to_string(), contents[value].clone()));
        let row: Map<String, Value> = fields.collect();
        for read in [|row: &_| exchange(row).map(drop), |row: &_| comparison(row).map(drop), |row: &_| judged(row).map(drop)] {
            if let Err(error) = read(&row) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}
