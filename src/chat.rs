//! `candor chat`: a conversation with a model, whose answers are handed over as they are written.

use std::path::Path;

use anyhow::Result;
use candle_core::Device;
use candor_environments::{Finish, Message, Role};

use crate::config::Dtype;
use crate::cuda::Place;
use crate::event::Observer;
use crate::model_files::{ModelFiles, Policy};
use crate::sampler::Settings;
use crate::sampler::conversation::Conversation;

/// A chat that goes on.
pub struct Chat {
    policy: Policy,
    conversation: Conversation,
    /// Standing instructions, if there are any.
    system: Option<Message>,
    messages: Vec<Message>,
    /// Its `step` counts the answers.
    settings: Settings,
}

/// What came of a message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reply {
    /// The model answered.
    Answer {
        /// The geometric mean of the probabilities of the answer's tokens; `None` if it has none.
        confidence: Option<f64>,
        /// Why it ended.
        finish: Finish,
    },
    /// The conversation is too long for an answer; the message is forgotten.
    Full {
        /// Tokens of the conversation with the message.
        tokens: usize,
        /// Tokens that the model can see.
        context: usize,
    },
}

impl Chat {
    /// Loads the model.
    ///
    /// # Errors
    /// If the model or the adapter is not what it should be, or the model knows no chats.
    pub fn prepare(
        source: &str,
        dtype: Dtype,
        adapter: Option<&Path>,
        system: Option<&str>,
        settings: Settings,
        observer: Observer,
    ) -> Result<Self> {
        let model = ModelFiles::open(source, observer)?.computed_by(Place::automatic(dtype)?)?;
        let system = system.map(|text| Message { role: Role::System, content: text.into() });
        let first = system.iter().cloned().chain([Message::user("")]);
        model.tokenizer.render(&first.collect::<Vec<_>>(), true)?;
        let policy = model.policy(adapter, &Device::Cpu, observer)?;
        let conversation = Conversation::new(policy.model.clone(), policy.tokenizer.clone());
        Ok(Self { policy, conversation, system, messages: Vec::new(), settings })
    }

    /// Forgets what was said.
    pub fn reset(&mut self) {
        self.messages.clear();
    }

    /// Says something, and hands the answer to `written` piece by piece.
    ///
    /// # Errors
    /// If the chat template refuses the conversation, the device fails, or `written` does.
    pub fn say(&mut self, text: &str, written: &mut dyn FnMut(&str) -> Result<()>) -> Result<Reply> {
        let Self { policy: Policy { model, tokenizer, adapter }, conversation, system, messages, settings } = self;
        let said: Vec<Message> = system.iter().chain(&*messages).cloned().chain([Message::user(text)]).collect();
        let prompt_ids = tokenizer.prompt_ids(&said)?;
        let (tokens, context) = (prompt_ids.len(), model.architecture.context);
        if tokens >= context {
            return Ok(Reply::Full { tokens, context });
        }
        let settings = &Settings { max_tokens: settings.max_tokens.min(context - tokens), ..settings.clone() };
        let mut shown = 0;
        let generation = conversation.answer(&prompt_ids, adapter.as_ref(), settings, &mut |ids| {
            // The last character may still be in the making.
            let text = tokenizer.decode(ids);
            let whole = text.trim_end_matches('\u{fffd}');
            written(whole.get(shown..).unwrap_or_default())?;
            shown = shown.max(whole.len());
            Ok(())
        })?;
        let text_now = generation.completion(tokenizer, settings).text;
        written(text_now.get(shown..).unwrap_or_default())?;
        let confidence = generation.answer_confidence(0..text_now.len(), tokenizer);
        messages.extend([Message::user(text), Message::assistant(text_now)]);
        self.settings.step += 1;
        Ok(Reply::Answer { confidence, finish: generation.finish })
    }
}
