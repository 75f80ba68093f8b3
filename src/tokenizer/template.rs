//! Chat templates: the Jinja text that comes with a model turns messages into its prompt.
//!
//! Rendering follows transformers' `apply_chat_template`: blocks trimmed on both sides, one final newline of the
//! template dropped, Python's string methods, `raise_exception`, `strftime_now`, `bos_token` and `eos_token`. No tools
//! are passed.

use std::borrow::Cow;

use anyhow::{Context, Result};
use candor_environments::{Message, Role};
use jiff::{Timestamp, fmt::strtime, tz::TimeZone};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;

/// The name under which errors speak of the template, with its line.
const NAME: &str = "chat_template";
/// Instructions after which rendering is given up: about a second. A long conversation takes some ten thousand.
const MOST_INSTRUCTIONS: u64 = 10_000_000;

/// The turns of Gemma, for its tokenizers that come without a template: like Gemma 2's own, it knows no system role.
pub(super) const GEMMA_TURNS: &str = "{{ bos_token }}{% for message in messages %}\
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}\
{{ message.content | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}";

/// A compiled chat template, knowing the tokens that it may write.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    folds_system: bool,
}

impl ChatTemplate {
    /// Compiles `source`; an error names the line that is not Jinja.
    pub(super) fn new(source: String, bos_token: Option<String>, eos_token: Option<String>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_fuel(Some(MOST_INSTRUCTIONS));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        // One instant for the life of the tokenizer: a date in the prompt must not change in the middle of a run.
        let now = Timestamp::now().to_zoned(TimeZone::UTC);
        environment.add_function("strftime_now", move |format: String| -> Result<String, Error> {
            strtime::format(&format, &now).map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
        });
        // A token that the model lacks stays undefined, which templates ask for and which renders as nothing.
        for (name, token) in [("bos_token", bos_token), ("eos_token", eos_token)] {
            if let Some(token) = token {
                environment.add_global(name, token);
            }
        }
        environment.add_template_owned(NAME, source).context("the chat template does not compile")?;
        let mut this = Self { environment, folds_system: false };
        this.folds_system = this.refuses_system();
        Ok(this)
    }

    /// Whether a system message is put before the first user message, because the template knows no system role.
    pub(super) fn folds_system(&self) -> bool {
        self.folds_system
    }

    /// Whether the template writes a question, but not instructions before it: it raises, or leaves them out.
    fn refuses_system(&self) -> bool {
        let question = Message::user("a question that no template contains");
        let system = Message { role: Role::System, content: "instructions that no template contains".into() };
        let writes = |messages: &[Message], part: &Message| {
            self.render(messages, true).is_ok_and(|text| text.contains(&part.content))
        };
        writes(std::slice::from_ref(&question), &question) && !writes(&[system.clone(), question], &system)
    }

    /// The prompt of `messages`; `add_generation_prompt` also opens the assistant's turn.
    ///
    /// # Errors
    /// The template raises (on roles it does not accept, for example) or uses what this Jinja does not have.
    pub(super) fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let messages = if self.folds_system { folded(messages) } else { messages.into() };
        let template = self.environment.get_template(NAME)?;
        template
            .render(context! { messages => Serde(messages.as_ref()), add_generation_prompt })
            .context("the chat template does not render these messages")
    }

    /// What the template writes after an assistant's answer, leading blanks removed; `None` if it does not render a
    /// plain question and answer (the reason then appears when real messages are rendered).
    pub(super) fn after_answer(&self) -> Option<String> {
        const ANSWER: &str = "an answer that no template contains";
        let answer = Message { role: Role::Assistant, content: ANSWER.into() };
        let rendered = self.render(&[Message::user("a question"), answer], false).ok()?;
        let (_, rest) = rendered.rsplit_once(ANSWER)?;
        Some(rest.trim_start().to_owned())
    }
}

/// A system message at the beginning, put before the user message that follows it.
fn folded(messages: &[Message]) -> Cow<'_, [Message]> {
    match messages {
        [system, user, rest @ ..] if system.role == Role::System && user.role == Role::User => {
            let user = Message::user(format!("{}\n\n{}", system.content, user.content));
            std::iter::once(user).chain(rest.iter().cloned()).collect()
        }
        _ => messages.into(),
    }
}
