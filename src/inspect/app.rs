//! What is on the screen of `candor inspect`, and what keys do to it. It knows no terminal.

use anyhow::Result;
use candor_environments::ParseStatus;
use clap::ValueEnum;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::{Filter, Inspected, SortKey};
use crate::run::RowSplit;

/// What is looked at.
#[derive(Clone, Debug, PartialEq)]
pub enum View {
    /// The table of rollouts.
    Table,
    /// The rollouts of a group, and the text of one.
    Group {
        /// The group, by index.
        members: Vec<usize>,
        /// Which of them is read.
        at: usize,
        /// The first line of its text on the screen.
        scroll: usize,
    },
    /// What keys do.
    Help,
}

/// A line that is being typed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Asked {
    /// A text to search for.
    Search,
    /// A step to go to.
    Step,
}

/// The state of the screen.
pub struct App {
    /// What is looked into.
    pub inspected: Inspected,
    /// Its name.
    pub name: String,
    /// Which rollouts are in the table.
    pub filter: Filter,
    /// Their order.
    pub sort: SortKey,
    /// Whether it is turned around.
    pub reverse: bool,
    /// The rollouts in the table, by index.
    pub listed: Vec<usize>,
    /// Which of them is selected.
    pub selected: usize,
    /// What is looked at.
    pub view: View,
    /// The line that is being typed, if one is.
    pub typed: Option<(Asked, String)>,
    /// Something to be told until the next key.
    pub message: Option<String>,
    /// Lines that a page has; as last drawn.
    pub page: usize,
    /// The last line that the text can be scrolled to; as last drawn.
    pub last_scroll: usize,
    /// Whether it is over.
    pub quit: bool,
}

impl App {
    /// The table of the rollouts that a filter takes.
    ///
    /// # Errors
    /// If the file has changed since it was read.
    pub fn new(inspected: Inspected, name: String, filter: Filter, sort: SortKey, reverse: bool) -> Result<Self> {
        let listed = inspected.select(&filter, sort, reverse)?;
        Ok(Self {
            inspected,
            name,
            filter,
            sort,
            reverse,
            listed,
            selected: 0,
            view: View::Table,
            typed: None,
            message: None,
            page: 1,
            last_scroll: 0,
            quit: false,
        })
    }

    /// Does what a key asks for.
    pub fn key(&mut self, key: KeyEvent) {
        self.message = None;
        let interrupt = key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
        let done = match (&self.view, self.typed.take()) {
            _ if interrupt => {
                self.quit = true;
                Ok(())
            }
            (_, Some((asked, text))) => self.type_key(asked, text, key.code),
            (View::Table, None) => self.table_key(key.code),
            (View::Group { .. }, None) => {
                self.group_key(key.code);
                Ok(())
            }
            (View::Help, None) => {
                self.view = View::Table;
                Ok(())
            }
        };
        if let Err(error) = done {
            self.message = Some(format!("{error:#}"));
        }
    }

    fn table_key(&mut self, code: KeyCode) -> Result<()> {
        let last = self.listed.len().saturating_sub(1);
        match code {
            KeyCode::Char('q') => self.quit = true,
            KeyCode::Esc if self.filter == Filter::default() => self.quit = true,
            KeyCode::Char('?') | KeyCode::F(1) => self.view = View::Help,
            KeyCode::Up | KeyCode::Char('k') => self.selected = self.selected.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.selected = last.min(self.selected + 1),
            KeyCode::PageUp => self.selected = self.selected.saturating_sub(self.page),
            KeyCode::PageDown | KeyCode::Char(' ') => self.selected = last.min(self.selected + self.page),
            KeyCode::Home | KeyCode::Char('g') => self.selected = 0,
            KeyCode::End | KeyCode::Char('G') => self.selected = last,
            KeyCode::Enter | KeyCode::Right => self.open(),
            KeyCode::Char('/') => self.typed = Some((Asked::Search, String::new())),
            KeyCode::Char(':') => self.typed = Some((Asked::Step, String::new())),
            KeyCode::Char('r') => return self.change(|app| app.reverse = !app.reverse),
            KeyCode::Char('o') => {
                return self
                    .change(|app| app.sort = next(SortKey::value_variants(), Some(app.sort)).unwrap_or_default());
            }
            KeyCode::Char('x') | KeyCode::Esc => return self.change(|app| app.filter = Filter::default()),
            KeyCode::Char('s') => {
                return self
                    .change(|app| app.filter.split = next(&[RowSplit::Train, RowSplit::Eval], app.filter.split));
            }
            KeyCode::Char('p') => {
                return self.change(|app| app.filter.parse = next(&ParseStatus::ALL, app.filter.parse));
            }
            KeyCode::Char('c') => {
                return self.change(|app| app.filter.correct = next(&[true, false], app.filter.correct));
            }
            KeyCode::Char('e') => {
                return self.change(|app| {
                    let names = app.inspected.environments();
                    app.filter.environment = next(&names, app.filter.environment.take());
                });
            }
            _ => {}
        }
        Ok(())
    }

    fn group_key(&mut self, code: KeyCode) {
        let (page, last_scroll) = (self.page, self.last_scroll);
        let View::Group { members, at, scroll } = &mut self.view else { return };
        let go = |at: &mut usize, scroll: &mut usize, to: usize| (*at, *scroll) = (to, 0);
        match code {
            KeyCode::Char('q') => self.quit = true,
            KeyCode::Esc | KeyCode::Backspace => self.close(),
            KeyCode::Right | KeyCode::Char('l' | 'n') => go(at, scroll, (*at + 1).min(members.len() - 1)),
            KeyCode::Left | KeyCode::Char('h' | 'b') => go(at, scroll, at.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => *scroll = last_scroll.min(*scroll + 1),
            KeyCode::Up | KeyCode::Char('k') => *scroll = scroll.saturating_sub(1),
            KeyCode::PageDown | KeyCode::Char(' ') => *scroll = last_scroll.min(*scroll + page),
            KeyCode::PageUp => *scroll = scroll.saturating_sub(page),
            KeyCode::Home | KeyCode::Char('g') => *scroll = 0,
            KeyCode::End | KeyCode::Char('G') => *scroll = last_scroll,
            _ => {}
        }
    }

    /// Adds a key to the line that is being typed, or does what the line says.
    fn type_key(&mut self, asked: Asked, mut text: String, code: KeyCode) -> Result<()> {
        match (code, asked) {
            (KeyCode::Esc, _) => return Ok(()),
            (KeyCode::Enter, Asked::Search) => {
                return self.change(|app| app.filter.text = Some(text).filter(|text| !text.is_empty()));
            }
            (KeyCode::Enter, Asked::Step) => return self.go_to(&text),
            (KeyCode::Backspace, _) => drop(text.pop()),
            (KeyCode::Char(one), _) if text.len() < 1000 => text.push(one),
            _ => {}
        }
        self.typed = Some((asked, text));
        Ok(())
    }

    /// Selects the first rollout in the table of a step, or of the next one that is there.
    fn go_to(&mut self, text: &str) -> Result<()> {
        let rollouts = &self.inspected.generations.rollouts;
        let step = |place: &usize| rollouts[self.listed[*place]].step;
        match text.trim().parse::<u64>() {
            Err(_) => self.message = Some(format!("{text:?} is no step")),
            Ok(wanted) => match (0..self.listed.len()).filter(|place| step(place) >= wanted).min_by_key(step) {
                Some(place) => self.selected = place,
                None => self.message = Some(format!("there is no step {wanted} or later in the table")),
            },
        }
        Ok(())
    }

    /// Changes filter or order; what is selected stays, if it is still there.
    fn change(&mut self, change: impl FnOnce(&mut Self)) -> Result<()> {
        let selected = self.listed.get(self.selected).copied();
        change(self);
        self.listed = self.inspected.select(&self.filter, self.sort, self.reverse)?;
        self.selected = self.listed.iter().position(|index| Some(*index) == selected).unwrap_or(0);
        Ok(())
    }

    fn open(&mut self) {
        let Some(&index) = self.listed.get(self.selected) else { return };
        let members = self.inspected.group(index);
        let at = members.iter().position(|member| *member == index).unwrap_or(0);
        self.view = View::Group { members, at, scroll: 0 };
    }

    /// Back to the table, at the rollout that was read if it is there.
    fn close(&mut self) {
        if let View::Group { members, at, .. } = &self.view
            && let Some(place) = self.listed.iter().position(|index| *index == members[*at])
        {
            self.selected = place;
        }
        self.view = View::Table;
    }
}

/// The value after this one; nothing after the last, the first after nothing.
fn next<T: Clone + PartialEq>(all: &[T], value: Option<T>) -> Option<T> {
    match value {
        None => all.first().cloned(),
        Some(value) => all.iter().skip_while(|one| **one != value).nth(1).cloned(),
    }
}
