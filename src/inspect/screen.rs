//! How the screen of `candor inspect` is drawn: any size, with colors or without.

use anyhow::Result;
use clap::ValueEnum;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;
use unicode_width::UnicodeWidthChar;

use super::app::{App, Asked, View};
use super::text::{outcome, place, role};
use super::{Filter, SortKey};
use crate::generations::Recorded;
use crate::printable::{one_line, printable};
use crate::record::shown;
use crate::run::{Row, RowSplit, TokenRow};

/// Bytes of a text that are shown; nobody scrolls through more.
const MOST_BYTES: usize = 1 << 16;

/// Lines of a group's table.
const MOST_MEMBERS: usize = 8;

const HELP: &str = "\
up down PgUp PgDn Home End   move               Enter   the group of a rollout
/   search prompts and completions              :       go to a step
s   training or evaluation                      e       environment
p   how it was read                             c       right or wrong
o   order: file, reward, advantage, tokens,     r       the other way around
    confidence                                  x       no filter
In a group: left and right choose a rollout, up and down scroll, Esc goes back.
Tokens, where the run kept them (sampling.logprobs = true), are underlined below
a probability of 0.5, bold below 0.1, and reversed below 0.01.
q   quit";

/// Draws everything.
pub fn draw(app: &mut App, frame: &mut Frame, colors: bool) {
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(0), Constraint::Length(1)]).areas(frame.area());
    let reversed = Style::new().add_modifier(Modifier::REVERSED);
    frame.render_widget(Paragraph::new(format!("{:<400}", heading(app))).style(reversed), head);
    let drawn = match app.view.clone() {
        View::Table => table(app, frame, body),
        View::Group { members, at, scroll } => group(app, frame, body, (&members, at, scroll), colors),
        View::Help => {
            frame.render_widget(Paragraph::new(HELP), body);
            Ok(())
        }
    };
    if let Err(error) = drawn {
        frame.render_widget(Paragraph::new(format!("{error:#}")), body);
    }
    let keys = match (&app.typed, &app.message, &app.view) {
        (Some((Asked::Search, text)), ..) => format!("search: {}_", one_line(text, 300)),
        (Some((Asked::Step, text)), ..) => format!("step: {}_", one_line(text, 300)),
        (None, Some(message), _) => one_line(message, 400),
        (.., View::Table) => "Enter open  / search  : step  s e p c filter  x clear  o order  ? help  q quit".into(),
        (.., View::Group { .. }) => "left right rollout  up down PgUp PgDn scroll  Esc back  q quit".into(),
        (.., View::Help) => "any key goes back".into(),
    };
    frame.render_widget(Paragraph::new(keys), foot);
}

/// The run, how much of it is listed, and why.
fn heading(app: &App) -> String {
    let Filter { split, step, environment, parse, correct, text } = &app.filter;
    let mut heading = format!(
        "{}  {} of {} rollouts",
        one_line(&app.name, 40),
        app.listed.len(),
        app.inspected.generations.rollouts.len()
    );
    let said = [
        split.map(|split| if split == RowSplit::Train { "training".into() } else { "evaluation".into() }),
        step.map(|step| format!("step {step}")),
        environment.as_ref().map(|name| one_line(name, 40)),
        parse.map(|parse| parse.name().to_string()),
        correct.map(|correct| if correct { "right".into() } else { "wrong".into() }),
        text.as_ref().map(|text| format!("\"{}\"", one_line(text, 40))),
        (app.sort != SortKey::Step || app.reverse).then(|| {
            let key = app.sort.to_possible_value().map_or(String::new(), |value| value.get_name().to_string());
            format!("by {key}{}", if app.reverse { ", reversed" } else { "" })
        }),
    ];
    said.into_iter().flatten().for_each(|said: String| heading += &format!("  {said}"));
    heading
}

/// A rollout's numbers, in 55 columns.
fn numbers(rollout: &Recorded) -> String {
    let split = if rollout.split == RowSplit::Train { ' ' } else { 'e' };
    let right = rollout.correct.map_or("-", |correct| if correct { "yes" } else { "no" });
    let place = format!("{}.{}", rollout.group, rollout.rollout);
    let parse = rollout.parse.map_or("error", |parse| parse.name());
    format!(
        "{split}{:<5} {place:<7} {:>7} {:>7} {:>5} {right:<3} {:>5} {parse:<9}",
        rollout.step,
        shown(rollout.reward, 3),
        shown(rollout.advantage, 3),
        shown(rollout.confidence, 2),
        rollout.tokens,
    )
}

const COLUMNS: &str = " step  group    reward  advant  conf yes   len parse     completion";

fn table(app: &mut App, frame: &mut Frame, area: Rect) -> Result<()> {
    let lines = usize::from(area.height).saturating_sub(1).max(1);
    app.page = lines;
    // The page that the selected line is on.
    let first = app.selected / lines * lines;
    let mut text = vec![Line::styled(COLUMNS, Style::new().add_modifier(Modifier::BOLD))];
    for (place, &index) in app.listed.iter().enumerate().skip(first).take(lines) {
        let style = match place == app.selected {
            true => Style::new().add_modifier(Modifier::REVERSED),
            false => Style::new(),
        };
        let completion = one_line(&app.inspected.generations.row(index)?.completion, usize::from(area.width));
        let line = format!("{} {completion}", numbers(&app.inspected.generations.rollouts[index]));
        text.push(Line::styled(format!("{line:<width$}", width = usize::from(area.width)), style));
    }
    if app.listed.is_empty() {
        text.push(Line::raw(" no rollout is like this; x clears the filter"));
    }
    frame.render_widget(Paragraph::new(text), area);
    Ok(())
}

/// The group's rollouts above, the text of one of them below.
fn group(
    app: &mut App,
    frame: &mut Frame,
    area: Rect,
    (members, at, scroll): (&[usize], usize, usize),
    colors: bool,
) -> Result<()> {
    let shown = members.len().min(MOST_MEMBERS).min(usize::from(area.height) / 3);
    let heights = [Constraint::Length(shown as u16 + 1), Constraint::Min(0)];
    let [above, below] = Layout::vertical(heights).areas(area);
    let first = if shown > 0 { at / shown * shown } else { 0 };
    let mut lines = vec![Line::styled(COLUMNS, Style::new().add_modifier(Modifier::BOLD))];
    for (place, &member) in members.iter().enumerate().skip(first).take(shown) {
        let completion = one_line(&app.inspected.generations.row(member)?.completion, usize::from(area.width));
        let mark = if place == at { Modifier::REVERSED } else { Modifier::empty() };
        let line = format!("{} {completion:<400}", numbers(&app.inspected.generations.rollouts[member]));
        lines.push(Line::styled(line, Style::new().add_modifier(mark)));
    }
    frame.render_widget(Paragraph::new(lines), above);

    let row = app.inspected.generations.row(members[at])?;
    let tokens = app.inspected.tokens(&row)?;
    let lines = wrapped(&reading(&row, tokens.as_ref(), colors), usize::from(below.width));
    app.page = usize::from(below.height).max(1);
    app.last_scroll = lines.len().saturating_sub(app.page);
    let visible: Vec<Line> = lines.into_iter().skip(scroll.min(app.last_scroll)).take(app.page).collect();
    frame.render_widget(Paragraph::new(visible), below);
    Ok(())
}

/// A rollout to read: pieces of text with their styles.
fn reading(row: &Row, tokens: Option<&TokenRow>, colors: bool) -> Vec<(String, Style)> {
    let plain = Style::new();
    let bold = plain.add_modifier(Modifier::BOLD);
    let mut pieces = vec![(format!("{}\n{}\n", place(row), outcome(row)), plain)];
    for message in &row.prompt {
        pieces.push((format!("--- {}\n", role(message.role)), bold));
        pieces.push((format!("{}\n", printable(beginning(&message.content))), plain));
    }
    pieces.push(("--- completion\n".into(), bold));
    let text = beginning(&row.completion);
    let mut read = 0;
    for (&(start, end), &logprob) in tokens.iter().flat_map(|tokens| tokens.ranges.iter().zip(&tokens.logprobs)) {
        // Parts of one character share its bytes; what ended the completion is beyond its text.
        let (start, end) = (start.max(read), end.min(text.len()));
        let (Some(before), Some(token)) = (text.get(read..start), text.get(start..end)) else { continue };
        pieces.push((printable(before), plain));
        pieces.push((printable(token), shade(logprob.exp(), colors)));
        read = end;
    }
    pieces.push((printable(&text[read..]), plain));
    let left = row.completion.len() - text.len();
    if left > 0 {
        pieces.push((format!("\n… {left} more bytes; --format json has them all"), bold));
    }
    pieces
}

/// As much of a text as is shown.
fn beginning(text: &str) -> &str {
    &text[..text.floor_char_boundary(MOST_BYTES)]
}

/// How a token of this probability looks.
fn shade(probability: f32, colors: bool) -> Style {
    let (modifier, color) = match probability {
        0.5.. => return Style::new(),
        0.1.. => (Modifier::UNDERLINED, Color::Yellow),
        0.01.. => (Modifier::UNDERLINED | Modifier::BOLD, Color::Red),
        _ => (Modifier::REVERSED, Color::Red),
    };
    let style = Style::new().add_modifier(modifier);
    if colors { style.fg(color) } else { style }
}

/// Lines of at most `width` columns, cut where they are full.
fn wrapped(pieces: &[(String, Style)], width: usize) -> Vec<Line<'static>> {
    let (mut lines, mut line, mut used): (Vec<Line>, Vec<Span>, usize) = (Vec::new(), Vec::new(), 0);
    for (text, style) in pieces {
        let mut span = String::new();
        for one in text.chars() {
            let wide = one.width().unwrap_or(0);
            if one == '\n' || used + wide > width.max(2) {
                line.push(Span::styled(std::mem::take(&mut span), *style));
                lines.push(Line::from(std::mem::take(&mut line)));
                used = 0;
            }
            if one != '\n' {
                span.push(one);
                used += wide;
            }
        }
        line.push(Span::styled(span, *style));
    }
    lines.push(Line::from(line));
    lines
}
