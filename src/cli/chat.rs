//! `candor chat`: lines in, answers out, on a terminal or through pipes.

use std::io::{BufRead, IsTerminal, Read, stdin, stdout};

use anyhow::{Context, Error, Result, anyhow, ensure};
use candor_environments::Finish;
use clap::Args;

use super::Failure;
use super::console::Console;
use super::models::{Base, Format, Sampling, temperature};
use crate::chat::{self, Reply};
use crate::event::Observer;

/// No message is longer, in bytes.
const LONGEST: u64 = 1 << 20;

/// `candor chat`.
#[derive(Args)]
#[command(after_help = "Every line is a message. /reset begins anew, /quit or the end of input ends.")]
pub struct Chat {
    #[command(flatten)]
    pub base: Base,
    /// Standing instructions
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    #[command(flatten)]
    sampling: Sampling,
    /// The softmax temperature; 0 takes the most likely token
    #[arg(long, value_name = "T", default_value = "0.7", value_parser = temperature)]
    temperature: f64,
    #[command(flatten)]
    format: Format,
}

impl Chat {
    /// Runs it.
    pub fn run(&self, observer: Observer, console: &Console) -> Result<u8, Failure> {
        let Self { base, system, sampling, temperature, format } = self;
        let (settings, adapter) = (sampling.settings(*temperature, &[]), base.adapter.as_deref());
        let chat = chat::Chat::prepare(&base.model, format.dtype, adapter, system.as_deref(), settings, observer);
        talk(&mut chat.map_err(Failure::Input)?, console).map_err(Failure::Run)?;
        Ok(0)
    }
}

/// Answers line by line until there are no more.
fn talk(chat: &mut chat::Chat, console: &Console) -> Result<()> {
    let seen = stdout().is_terminal();
    let prompted = seen && stdin().is_terminal();
    let mut input = stdin().lock();
    loop {
        if prompted {
            console.write("> ")?;
        }
        let mut line = String::new();
        let length = input.by_ref().take(LONGEST).read_line(&mut line).context("standard input: cannot read")?;
        ensure!((length as u64) < LONGEST, "standard input: a line of {LONGEST} bytes or more");
        match line.trim() {
            "" if length == 0 => break,
            "/quit" => return Ok(()),
            "" => {}
            "/reset" => chat.reset(),
            text => match (chat.say(text, &mut |piece| console.write(piece))?, prompted) {
                (Reply::Answer { confidence, finish }, _) => console.write(&ending(confidence, finish, seen))?,
                (Reply::Full { tokens, context }, true) => console.line(&full(tokens, context).to_string()),
                (Reply::Full { tokens, context }, false) => return Err(full(tokens, context)),
            },
        }
    }
    // The cursor still stands behind the prompt.
    if prompted { console.write("\n") } else { Ok(()) }
}

fn full(tokens: usize, context: usize) -> Error {
    anyhow!(
        "the conversation has {tokens} tokens, the model's context {context}: no room for an answer; /reset begins anew"
    )
}

/// What follows an answer: the end of its line, and on a terminal, dimmed, how sure the model was of its words.
fn ending(confidence: Option<f64>, finish: Finish, seen: bool) -> String {
    let confidence = confidence.map(|confidence| format!("confidence {confidence:.2}"));
    let cut = (finish == Finish::Length).then(|| "cut at its longest".to_string());
    let notes: Vec<String> = confidence.into_iter().chain(cut).collect();
    if seen { format!("\n\x1b[2m{}\x1b[0m\n", notes.join(", ")) } else { "\n".into() }
}
