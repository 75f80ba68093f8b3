//! `candor chat`: answers are those of the sampler though nothing is computed twice, pieces make up the text, and the program
//! talks through pipes.

use std::fs;
use std::sync::Arc;

use candor::chat::{Chat, Reply};
use candor::config::Dtype;
use candor::model::Model;
use candor::sampler::conversation::Conversation;
use candor::sampler::local::LocalSampler;
use candor::sampler::{Generation, Request, Sampler, Settings};
use candor::tokenizer::Tokenizer;

use crate::check;
use crate::model::adapter;
use crate::program::{CANDOR, Ended, Place};
use crate::toy;

fn settings(temperature: f64) -> Settings {
    Settings { max_tokens: 12, temperature, stop: Vec::new(), seed: 3, step: 0 }
}

/// Prompts that go on from each other, or from an earlier point, or not at all; one needs a larger store.
#[test]
fn a_conversation_goes_on_as_if_every_turn_were_the_first() {
    let Some(folder) = check::golden("tiny/llama") else { return };
    let model = Arc::new(Model::open(&folder, check::f32_kernel()).unwrap());
    let tokenizer = Arc::new(Tokenizer::from_folder(&folder).unwrap());
    let adapter = Arc::new(adapter(&model, &folder.join("adapter_lora")).0);
    let mut conversation = Conversation::new(model.clone(), tokenizer.clone());
    let mut sampler = LocalSampler::new(model, tokenizer);
    let mut said: Vec<u32> = (5..15).collect();
    let mut lengths = Vec::new();
    for (turn, keep) in [99, 99, 4, 99, 0, 99, 99, 99].into_iter().enumerate() {
        said.truncate(keep);
        said.extend((0..7 * turn as u32 + 1).map(|i| (i * 37 + turn as u32) % 300 + 4));
        let settings = Settings { step: turn as u64, ..settings(0.9) };
        let mut calls = Vec::new();
        let mut chosen = |ids: &[u32]| {
            calls.push(ids.to_vec());
            Ok(())
        };
        let got = conversation.answer(&said, Some(&adapter), &settings, &mut chosen).unwrap();
        assert!(calls.iter().enumerate().all(|(index, ids)| *ids == got.ids[..=index]) && calls.len() == got.ids.len());
        let request = Request { name: "turn".into(), prompt_ids: said.clone(), rollouts: 1 };
        let mut want: Option<Generation> = None;
        let mut keep = |generation| {
            want = Some(generation);
            Ok(())
        };
        sampler.sample(&[request], &Some(adapter.clone()), &settings, &mut keep).unwrap();
        let want = want.unwrap();
        assert_eq!((&got.ids, got.finish), (&want.ids, want.finish), "turn {turn}");
        let floats = |logprobs_t: &[f32]| logprobs_t.iter().copied().map(f64::from).collect::<Vec<_>>();
        check::all_close("untempered", &floats(&got.untempered_t), &floats(&want.untempered_t), 1e-5);
        said.extend(&got.ids);
        lengths.push(said.len());
    }
    assert!(lengths.iter().max().unwrap() > &128, "{lengths:?}: the store never grew");
}

#[test]
fn the_pieces_of_an_answer_make_up_its_text_whatever_its_bytes() {
    let model = toy::model();
    let mut chat = Chat::prepare(model.to_str().unwrap(), Dtype::Auto, None, None, settings(1.5), &|_| {}).unwrap();
    let (mut unfinished, mut answers) = (0, Vec::new());
    for _ in 0..6 {
        let mut pieces = Vec::new();
        let mut written = |piece: &str| {
            pieces.push(piece.to_string());
            Ok(())
        };
        let reply = chat.say("more", &mut written).unwrap();
        let Reply::Answer { confidence, .. } = reply else { panic!("{reply:?}") };
        assert!((0.0..1.0).contains(&confidence.unwrap()));
        unfinished += pieces.iter().filter(|piece| piece.is_empty()).count();
        answers.push(pieces.concat());
    }
    // The tiny model writes single bytes, most of them parts of no character.
    assert!(unfinished > 3 && answers.iter().any(|answer| answer.contains('\u{fffd}')), "{answers:?}");
    answers.dedup();
    assert_eq!(answers.len(), 6, "{answers:?}");
    // 256 tokens are soon full, and then a message leaves no trace.
    let mut say = || chat.say(&"more ".repeat(10), &mut |_| Ok(())).unwrap();
    let full = (0..10).map(|_| say()).find(|reply| matches!(reply, Reply::Full { .. })).unwrap();
    assert!(matches!(full, Reply::Full { tokens, context: 256 } if tokens >= 256));
    assert_eq!(say(), full);
    chat.reset();
    assert!(matches!(chat.say("more", &mut |_| Ok(())).unwrap(), Reply::Answer { .. }));
}

/// Lines through a pipe.
fn talk(place: &Place, lines: &str, arguments: &str) -> Ended {
    fs::write(place.path("lines"), lines).unwrap();
    let line = format!("{CANDOR} chat model --quiet --max-tokens 8 {arguments} <lines");
    place.wait(place.start(&["sh", "-c", &line]))
}

#[test]
fn through_pipes_it_says_answers_only() {
    let place = Place::new("");
    let ended =
        talk(&place, "hello\n\n  \nhello\n/reset\nhello\n/quit\nhello\n", "--temperature 0 --system 'Be brief.'");
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let answers: Vec<&str> = ended.stdout.split_terminator('\n').collect();
    assert!(matches!(answers[..], [first, second, third] if first == third && first != second), "{answers:?}");
    assert!(!ended.stdout.contains(['>', '\u{1b}']), "{}", ended.stdout);
    let without = talk(&place, "hello", "--temperature 0");
    assert!(without.code == Some(0) && without.stdout.trim_end() != answers[0], "{}", without.stdout);
    let seeds = [1, 1, 2].map(|seed| talk(&place, "hello\n", &format!("--seed {seed}")).stdout);
    assert!(seeds[0] == seeds[1] && seeds[1] != seeds[2], "{seeds:?}");
}

#[test]
fn what_cannot_be_talked_about_is_said() {
    let place = Place::new("");
    let ended = talk(&place, &format!("{}\n", "word ".repeat(600)), "");
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""));
    assert!(
        ended.stderr.contains("the model's context 1024: no room for an answer; /reset begins anew"),
        "{}",
        ended.stderr
    );
    fs::remove_file(place.path("model/chat_template.jinja")).unwrap();
    let ended = talk(&place, "hello\n", "");
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""));
    assert!(ended.stderr.starts_with("error: the model has no chat template"), "{}", ended.stderr);
}
