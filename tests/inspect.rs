//! `candor inspect`: what is listed and in which order, what is drawn at any size, and that no completion acts on a terminal.

use std::fs;
use std::path::Path;

use candor::inspect::app::{App, View};
use candor::inspect::screen::draw;
use candor::inspect::{Filter, Inspected, SortKey, sample};
use candor::printable::{one_line, printable};
use candor::run::{Row, RowSplit};
use candor_environments::ParseStatus;
use proptest::prelude::*;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent};
use ratatui::style::{Color, Modifier};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::program::Place;
use crate::recorded::{SMALL, lines, rows};
use crate::toy::{config, run};

/// What a completion must not do to a terminal.
const HOSTILE: &str = "\x1b[2J\x1b]0;owned\x07\r\u{9b}31m\u{202e}gnp.exe\u{200b}\x7f\ttab\nANSWER";

/// A run's folder with these rollouts.
fn folder(rows: impl IntoIterator<Item = Value>) -> TempDir {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("generations.jsonl"), lines(rows)).unwrap();
    folder
}

fn app(folder: &Path) -> App {
    let inspected = Inspected::read(folder).unwrap();
    App::new(inspected, "small".into(), Filter::default(), SortKey::Step, false).unwrap()
}

fn press(app: &mut App, keys: &str) {
    for key in keys.chars() {
        let code = match key {
            '\n' => KeyCode::Enter,
            '>' => KeyCode::Right,
            '^' => KeyCode::Esc,
            'v' => KeyCode::PageDown,
            other => KeyCode::Char(other),
        };
        app.key(KeyEvent::from(code));
    }
}

/// The screen's lines.
fn drawn(app: &mut App, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(app, frame, true)).unwrap();
    let buffer = terminal.backend().buffer().clone();
    let line = |y: u16| (0..width).map(|x| buffer[(x, y)].symbol().to_string()).collect::<String>();
    (0..height).map(line).collect()
}

#[test]
fn the_table_says_what_is_there_in_80_columns() {
    let folder = folder(rows(SMALL));
    let screen = drawn(&mut app(folder.path()), 80, 24);
    assert!(screen[0].starts_with("small  160 of 160 rollouts"), "{}", screen[0]);
    assert!(
        screen[1].starts_with(" step  group    reward  advant  conf yes   len parse     completion"),
        "{}",
        screen[1]
    );
    let first: Row = serde_json::from_value(rows(SMALL).next().unwrap()).unwrap();
    assert!(screen[2].starts_with(&format!("e0     0.0     {:>7.3}       -", first.reward.unwrap())), "{}", screen[2]);
    assert!(screen[2].contains(&first.completion[..10]), "{}", screen[2]);
    assert!(
        screen[23].starts_with("Enter open  / search") && screen[23].trim_end().ends_with("q quit"),
        "{}",
        screen[23]
    );
}

/// Fails if a filter lets something else through, or what has no number does not stand last.
#[test]
fn filters_take_what_agrees_and_orders_put_missing_numbers_last() {
    let folder = folder(rows(SMALL));
    let inspected = Inspected::read(folder.path()).unwrap();
    let all: Vec<Row> = rows(SMALL).map(|row| serde_json::from_value(row).unwrap()).collect();
    let correct = |row: &Row| row.metrics["correct"] == 1.0;
    let holds = |row: &Row, text: &str| {
        row.task.contains(text) || row.completion.contains(text) || row.prompt[0].content.contains(text)
    };
    type Takes<'a> = &'a dyn Fn(&Row) -> bool;
    let none = Filter::default;
    let cases: [(Filter, Takes); 6] = [
        (Filter { split: Some(RowSplit::Eval), step: Some(0), ..none() }, &|row| {
            row.split == RowSplit::Eval && row.step == 0
        }),
        (Filter { parse: Some(ParseStatus::Missing), ..none() }, &|row| row.parse == Some(ParseStatus::Missing)),
        (Filter { correct: Some(true), step: Some(3), ..none() }, &|row| correct(row) && row.step == 3),
        (Filter { text: Some("answer: yes".into()), ..none() }, &|row| holds(row, "ANSWER: YES")),
        (Filter { text: Some("BOOLQ/train/3".into()), ..none() }, &|row| row.task.contains("boolq/train/3")),
        (Filter { environment: Some("other".into()), ..none() }, &|_| false),
    ];
    for (filter, takes) in cases {
        for key in [SortKey::Step, SortKey::Reward, SortKey::Advantage, SortKey::Tokens, SortKey::Confidence] {
            for reverse in [false, true] {
                let got = inspected.select(&filter, key, reverse).unwrap();
                let mut sorted = got.clone();
                sorted.sort_unstable();
                let want: Vec<usize> = (0..all.len()).filter(|&index| takes(&all[index])).collect();
                assert_eq!(sorted, want, "{filter:?}");
                let number = |index: &usize| match key {
                    SortKey::Step => Some(-(*index as f64)),
                    SortKey::Reward => all[*index].reward,
                    SortKey::Advantage => all[*index].advantage,
                    SortKey::Tokens => Some(all[*index].tokens as f64),
                    SortKey::Confidence => all[*index].metrics.get("confidence").and_then(Value::as_f64),
                };
                let turned = |number: f64| if reverse { -number } else { number };
                let falls = |pair: &[usize]| match (number(&pair[0]), number(&pair[1])) {
                    (Some(one), Some(other)) => turned(one) >= turned(other),
                    (one, other) => one.is_some() || other.is_none(),
                };
                assert!(got.windows(2).all(falls), "{filter:?} {key:?} {reverse}");
            }
        }
    }
}

#[test]
fn keys_move_filter_search_and_open() {
    let folder = folder(rows(SMALL));
    let mut app = app(folder.path());
    drawn(&mut app, 80, 24);
    press(&mut app, "jjk");
    assert_eq!(app.selected, 1);
    press(&mut app, "v");
    assert_eq!(app.selected, 22, "a page is what was drawn");
    press(&mut app, ":7\n");
    assert_eq!(app.inspected.generations.rollouts[app.listed[app.selected]].step, 7);
    press(&mut app, ":99\n");
    assert!(app.message.as_ref().unwrap().contains("no step 99"));
    press(&mut app, "s");
    assert_eq!((app.filter.split, app.listed.len()), (Some(RowSplit::Train), 144));
    press(&mut app, "/BOOLQ/TRAIN/21\n");
    assert_eq!(app.listed.len(), 4, "the group of one task");
    assert!(drawn(&mut app, 80, 24)[0].contains("4 of 160 rollouts  training  \"BOOLQ/TRAIN/21\""));
    press(&mut app, "j\n>");
    let View::Group { members, at, .. } = &app.view else { panic!("{:?}", app.view) };
    assert_eq!((members.len(), *at), (4, 2));
    let screen = drawn(&mut app, 80, 24);
    assert!(screen[6].starts_with("step 7, group 0, rollout 2, boolq/train/21"), "{screen:?}");
    press(&mut app, "^");
    assert_eq!((&app.view, app.selected), (&View::Table, 2));
    press(&mut app, "/nowhere to be found\n");
    assert!(drawn(&mut app, 80, 24)[2].contains("no rollout is like this"));
    press(&mut app, "\nx?");
    assert_eq!((app.listed.len(), &app.view), (160, &View::Help));
    assert!(drawn(&mut app, 80, 24).iter().any(|line| line.contains("sampling.logprobs")));
    press(&mut app, "qq");
    assert!(app.quit);
}

/// Fails by a panic: nothing but sizes is at stake here.
#[test]
fn every_size_is_drawn() {
    let folder = folder(rows(SMALL).take(20).map(|mut row| {
        row["completion"] = json!("wide 漢字 and combined e\u{301} ".repeat(40));
        row
    }));
    for keys in ["", "\n", "\nvvvv", "?", "/abc"] {
        let mut app = app(folder.path());
        press(&mut app, keys);
        for (width, height) in [(0, 0), (1, 1), (2, 40), (3, 3), (10, 2), (80, 24), (300, 100), (80, 1), (1, 24)] {
            drawn(&mut app, width, height);
        }
    }
}

/// A long text is cut, and its end can be reached by scrolling.
#[test]
fn a_long_completion_is_scrolled_and_cut() {
    let folder = folder(rows(SMALL).take(1).map(|mut row| {
        row["completion"] = json!("x".repeat(70_000));
        row
    }));
    let mut app = app(folder.path());
    press(&mut app, "\n");
    drawn(&mut app, 80, 24);
    press(&mut app, "G");
    let screen = drawn(&mut app, 80, 24);
    assert!(screen[22].starts_with("… 4464 more bytes"), "{screen:?}");
}

#[test]
fn no_completion_acts_on_the_terminal() {
    let folder = folder(rows(SMALL).take(3).map(|mut row| {
        for field in ["completion", "task", "environment"] {
            row[field] = json!(HOSTILE);
        }
        row["prompt"][0]["content"] = json!(HOSTILE);
        row["flags"] = json!([HOSTILE]);
        row["error"] = json!(HOSTILE);
        row
    }));
    let mut app = app(folder.path());
    for keys in ["", "e", "\n"] {
        press(&mut app, keys);
        let screen = drawn(&mut app, 80, 24).join("\n");
        assert!(screen.contains("␛[2J␛]0;owned␇␍") || keys == "e", "{screen}");
        let acts = |one: &char| (one.is_control() && *one != '\n') || "\u{202e}\u{200b}".contains(*one);
        assert_eq!(screen.chars().find(acts), None);
    }
    let place = Place::new("");
    let file = folder.path().join("generations.jsonl").display().to_string();
    let text = place.candor(&["inspect", &file, "--format", "text"]).stdout;
    assert!(text.contains("␛[2J") && !text.chars().any(|one| one.is_control() && one != '\n'), "{text}");
    let exact: Value =
        serde_json::from_str(place.candor(&["inspect", &file, "--limit", "1", "--format", "json"]).stdout.trim())
            .unwrap();
    assert_eq!(exact["completion"], HOSTILE);
}

proptest! {
    /// Fails if a character gets through that moves the cursor, or something is lost.
    #[test]
    fn printable_text_has_no_control_characters(text in any::<String>(), most in 0usize..40) {
        let shown = printable(&text);
        prop_assert!(!shown.chars().any(|one| one.is_control() && one != '\n'));
        prop_assert!(shown.chars().count() >= text.chars().count());
        let line = one_line(&text, most);
        prop_assert!(line.chars().count() <= most && !line.contains('\n'));
    }
}

/// The run keeps its tokens, and they are where the text says they are.
#[test]
fn tokens_are_kept_where_the_config_asks_for_them() {
    let results = tempdir().unwrap();
    run(results.path(), &config("sampling.logprobs = true\nsteps = 2"));
    let inspected = Inspected::read(&results.path().join("toy")).unwrap();
    for index in 0..inspected.generations.rollouts.len() {
        let row = inspected.generations.row(index).unwrap();
        let tokens = inspected.tokens(&row).unwrap().expect("every rollout has its tokens");
        assert_eq!(
            (tokens.ids.len(), tokens.ranges.len(), tokens.logprobs.len()),
            (row.tokens, row.tokens, row.tokens)
        );
        let mean = tokens.logprobs.iter().map(|logprob| f64::from(*logprob)).sum::<f64>() / row.tokens as f64;
        assert!((mean - row.mean_logprob).abs() < 1e-6, "{mean} and {}", row.mean_logprob);
        let covered = tokens.ranges.last().unwrap().1;
        assert!(covered >= row.completion.len(), "{covered} of {}", row.completion.len());
    }
}

/// Fails if unlikely tokens look like likely ones, or need a color to be told.
#[test]
fn unlikely_tokens_are_seen_with_colors_and_without() {
    let folder = folder(rows(SMALL).take(1).map(|mut row| {
        (row["prompt"], row["completion"]) = (json!([]), json!("abcé"));
        row
    }));
    let tokens = |ranges: Value, logprobs: Value| {
        let row = json!({"split": "eval", "step": 0, "group": 0, "rollout": 0, "ids": [1, 2, 3, 4], "ranges": ranges,
            "logprobs": logprobs});
        fs::write(folder.path().join("logprobs.jsonl"), format!("{row}\n")).unwrap();
    };
    let probabilities = [0.9f64, 0.3, 0.05, 0.001].map(f64::ln);
    tokens(json!([[0, 1], [1, 2], [2, 3], [3, 5]]), json!(probabilities));
    for colors in [true, false] {
        let mut app = app(folder.path());
        press(&mut app, "\n");
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        terminal.draw(|frame| draw(&mut app, frame, colors)).unwrap();
        let buffer = terminal.backend().buffer();
        let y = (0..24).find(|y| buffer[(0, *y)].symbol() == "a" && buffer[(1, *y)].symbol() == "b").unwrap();
        let looks: Vec<Modifier> = (0..4).map(|x| buffer[(x, y)].modifier).collect();
        let bold = Modifier::UNDERLINED | Modifier::BOLD;
        assert_eq!(looks, [Modifier::empty(), Modifier::UNDERLINED, bold, Modifier::REVERSED]);
        assert_eq!(buffer[(2, y)].fg == Color::Red, colors);
    }
    // Whatever the file says of places, the text is shown once and whole.
    for ranges in [json!([[0, 99], [3, 4], [4, 5], [9, 2]]), json!([[2, 1], [0, 4], [0, 2], [1, 3]]), json!([])] {
        tokens(ranges, json!(probabilities));
        let mut app = app(folder.path());
        press(&mut app, "\n");
        assert!(drawn(&mut app, 80, 24).iter().any(|line| line.starts_with("abcé ")));
    }
    fs::write(folder.path().join("logprobs.jsonl"), "{\"split\":3}\n").unwrap();
    let error = Inspected::read(folder.path()).err().expect("it is damaged");
    assert!(format!("{error:#}").contains("logprobs.jsonl: line 1"), "{error:#}");
}

#[test]
fn a_sample_is_drawn_by_its_seed_alone() {
    for (length, count) in [(0, 5), (5, 0), (5, 9), (100, 10)] {
        let drawn = sample(length, count, 3);
        assert_eq!(drawn.len(), count.min(length));
        assert!(drawn.windows(2).all(|pair| pair[0] < pair[1]) && drawn.iter().all(|index| *index < length));
        assert_eq!(drawn, sample(length, count, 3));
    }
    assert_ne!(sample(100, 10, 3), sample(100, 10, 4));
}

/// The forms for pipes, through the program.
#[test]
fn a_pipe_gets_rows_or_text() {
    let (place, folder) = (Place::new(""), folder(rows(SMALL)));
    let run = folder.path().display().to_string();
    let inspect = |arguments: &[&str]| {
        let ended = place.candor(&[&["inspect", run.as_str()], arguments].concat());
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{arguments:?}");
        ended.stdout
    };
    let json = |arguments: &[&str]| -> Vec<Value> {
        let text = inspect(&[arguments, &["--format", "json"]].concat());
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    assert_eq!(json(&[]), rows(SMALL).collect::<Vec<_>>(), "the rows are the file's");
    let best = json(&["--step", "4", "--split", "train", "--sort", "reward", "--limit", "5"]);
    let rewards: Vec<f64> = best.iter().map(|row| row["reward"].as_f64().unwrap()).collect();
    assert!(best.len() == 5 && best.iter().all(|row| row["step"] == 4) && rewards.windows(2).all(|w| w[0] >= w[1]));
    let steps = |rows: &[Value]| rows.iter().map(|row| row["step"].as_u64().unwrap()).collect::<Vec<_>>();
    let drawn = json(&["--sample", "3", "--first", "--last"]);
    assert_eq!(steps(&drawn), [0, 0, 0, 11, 11, 11]);
    assert!(drawn.iter().all(|row| row["split"] == "train"));
    assert_eq!(drawn, json(&["--sample", "3", "--first", "--last"]));
    assert_ne!(drawn, json(&["--sample", "3", "--first", "--last", "--seed", "1"]));
    let text = inspect(&["--step", "4", "--sort", "reward", "--limit", "1"]);
    assert!(
        text.contains("step 4, group ") && text.contains("--- user\n") && text.contains("--- completion\n"),
        "{text}"
    );
}

#[test]
fn what_cannot_be_inspected_is_said() {
    let place = Place::new("");
    fs::create_dir(place.path("empty")).unwrap();
    fs::write(place.path("none.jsonl"), "").unwrap();
    fs::write(place.path("damaged.jsonl"), "{\"schema\":1}\n").unwrap();
    for (path, said) in [
        ("empty", "there is no generations.jsonl in it"),
        ("none.jsonl", "there is no rollout in it yet"),
        ("damaged.jsonl", "damaged.jsonl: line 1"),
        ("nowhere.jsonl", "nowhere.jsonl"),
    ] {
        let ended = place.candor(&["inspect", path]);
        assert_eq!(ended.code, Some(2), "{path}");
        assert!(ended.stderr.contains(said), "{path}: {}", ended.stderr);
    }
}
