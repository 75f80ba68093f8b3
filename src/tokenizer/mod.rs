//! Text to token ids and back, chat messages to prompt ids, and the tokens that end a generation.
//!
//! Read from a Hugging Face folder or from a GGUF file's metadata, and written as the other of the two. A token stands for
//! bytes, not characters, so text and the byte range of each token come from one place ([`Tokenizer::token_ranges`]) and cannot
//! disagree.

mod as_folder;
mod as_gguf;
mod folder;
mod gguf;
mod sentencepiece;
mod spelling;
mod template;

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file::Value as GgufValue;
use candor_environments::Message;

use spelling::Spelling;
use template::ChatTemplate;

/// A model's tokenizer and chat template.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    spelling: Spelling,
    template: Option<ChatTemplate>,
    borrows_template: bool,
    bos: Option<u32>,
    adds_bos: bool,
    end_tokens: Vec<u32>,
    end_of_turn: Option<u32>,
}

/// What both sources of a tokenizer say; tokens are given as their text.
struct Parts {
    tokenizer: tokenizers::Tokenizer,
    bos_token: Option<String>,
    eos_token: Option<String>,
    /// The tokenizer puts the BOS token before every text.
    adds_bos: bool,
    /// Ends of generation beside `eos_token`.
    end_tokens: Vec<String>,
    chat_template: Option<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and `tokenizer_config.json`, and where present `chat_template.jinja` (which wins over the
    /// template in the configuration), `generation_config.json` and `config.json` (for their end tokens).
    ///
    /// # Errors
    /// A required file is missing, a file is not what it should be (the message names it), the vocabulary is empty, or
    /// its tokens do not spell bytes in a way we know. The message does not name the folder.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        folder::read(folder).and_then(Self::assemble).context("the tokenizer cannot be used")
    }

    /// Builds the tokenizer that a GGUF file's metadata describes.
    ///
    /// # Errors
    /// A key is missing or has another type, the lists do not fit each other, or the kind of text splitting is unknown.
    pub fn from_gguf(metadata: &HashMap<String, GgufValue>) -> Result<Self> {
        gguf::read(metadata).and_then(Self::assemble).context("the tokenizer in the GGUF metadata cannot be used")
    }

    fn assemble(parts: Parts) -> Result<Self> {
        let Parts { tokenizer, bos_token, eos_token, adds_bos, end_tokens, chat_template } = parts;
        ensure!(tokenizer.get_vocab_size(true) > 0, "the vocabulary is empty");
        let spelling = Spelling::of(&tokenizer)?;
        let id = |token: &String| {
            tokenizer.token_to_id(token).with_context(|| format!("{token:?} is not in the vocabulary"))
        };
        let bos = bos_token.as_ref().map(id).transpose().context("the BOS token")?;
        ensure!(!adds_bos || bos.is_some(), "a BOS token is to be added to every text, but none is named");
        let mut ends: BTreeSet<u32> =
            end_tokens.iter().chain(&eos_token).map(id).collect::<Result<_>>().context("an end token")?;
        let gemma = ["<start_of_turn>", "<end_of_turn>"].iter().all(|turn| tokenizer.token_to_id(turn).is_some());
        let borrows_template = chat_template.is_none() && gemma;
        let source = chat_template.or(gemma.then(|| template::GEMMA_TURNS.to_owned()));
        let template = source.map(|source| ChatTemplate::new(source, bos_token, eos_token)).transpose()?;
        let (end_tokens, end_of_turn) = (Vec::new(), None);
        let mut this =
            Self { inner: tokenizer, spelling, template, borrows_template, bos, adds_bos, end_tokens, end_of_turn };
        this.end_of_turn = this.after_answer()?;
        ends.extend(this.end_of_turn);
        this.end_tokens = ends.into_iter().collect();
        Ok(this)
    }

    fn after_answer(&self) -> Result<Option<u32>> {
        let Some(rest) = self.template.as_ref().and_then(ChatTemplate::after_answer) else { return Ok(None) };
        Ok(self.encode(&rest)?.first().copied().filter(|id| self.is_special(*id)))
    }

    /// Token ids of `text`. Nothing is added; special tokens written in the text become those tokens.
    ///
    /// As in transformers, bytes that a byte-level vocabulary lacks are left out (SmolLM2 lacks six control
    /// characters).
    ///
    /// # Errors
    /// The tokenizer's own, such as an unknown token that it names but does not have.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(anyhow::Error::from_boxed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids` without special tokens. Bytes that are not UTF-8 become U+FFFD; an id without a token (a
    /// padding row of the embedding) has no text.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.spell(ids, false).0
    }

    /// The text of `ids`, special tokens written out.
    pub fn decode_with_special(&self, ids: &[u32]) -> String {
        self.spell(ids, true).0
    }

    /// The text of [`decode`](Self::decode), and for each id the byte range of that text that it covers.
    ///
    /// Range starts never decrease, and together the ranges cover the text. An id that spells part of a character
    /// covers the whole character, as do the ids of its other parts; an id without text has an empty range.
    pub fn token_ranges(&self, ids: &[u32]) -> (String, Vec<Range<usize>>) {
        self.spell(ids, false)
    }

    fn spell(&self, ids: &[u32], with_special: bool) -> (String, Vec<Range<usize>>) {
        let mut bytes = Vec::new();
        let mut spans = Vec::with_capacity(ids.len());
        for &id in ids {
            let start = bytes.len();
            if let Some(token) = self.inner.id_to_token(id)
                && (with_special || !self.is_special(id))
            {
                self.spelling.append(&token, &mut bytes);
            }
            spans.push(start..bytes.len());
        }
        let (text, characters) = spelling::characters(&bytes);
        let range = |span: Range<usize>| {
            let start = characters.get(span.start).map_or(text.len(), |character| character.start);
            let end = if span.is_empty() { start } else { characters[span.end - 1].end };
            start..end
        };
        let ranges = spans.into_iter().map(range).collect();
        (text, ranges)
    }

    /// Whether instructions that open a conversation are put before its first question, because the template knows no system
    /// role, with an empty line between them.
    pub fn folds_system(&self) -> bool {
        self.template.as_ref().is_some_and(ChatTemplate::folds_system)
    }

    /// Whether the model's files hold no chat template and it is given Gemma's, because its vocabulary has Gemma's
    /// turns. A base model may never have seen them.
    pub fn borrows_template(&self) -> bool {
        self.borrows_template
    }

    /// `messages` as the chat template writes them; `add_generation_prompt` also opens the assistant's turn.
    /// Instructions that open the conversation are folded if [`folds_system`](Self::folds_system).
    ///
    /// # Errors
    /// The model has no chat template, or the template refuses the messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template = self.template.as_ref().context(
            "the model has no chat template: use an instruction-tuned model, or put a chat_template.jinja into its folder",
        )?;
        template.render(messages, add_generation_prompt)
    }

    /// Token ids of the prompt that asks the model to answer `messages`.
    ///
    /// # Errors
    /// As [`render`](Self::render) and [`encode`](Self::encode).
    pub fn prompt_ids(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.rendered_ids(&self.render(messages, true)?)
    }

    /// Token ids of a rendered chat. BOS alone is no prompt.
    fn rendered_ids(&self, rendered: &str) -> Result<Vec<u32>> {
        let ids = self.text_prompt_ids(rendered)?;
        let empty = ids.iter().all(|id| Some(*id) == self.bos);
        ensure!(!empty, "the chat template makes an empty prompt of these messages");
        Ok(ids)
    }

    /// Token ids of a prompt that is plain text, to be continued as it is.
    ///
    /// A BOS token stands first exactly once if the text begins with it or the tokenizer adds it to every text.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn text_prompt_ids(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text)?;
        if let Some(bos) = self.bos {
            let written = ids.iter().take_while(|id| **id == bos).count();
            let wanted = usize::from(written > 0 || self.adds_bos);
            ids.splice(..written, std::iter::repeat_n(bos, wanted));
        }
        Ok(ids)
    }

    /// Whether the prompt of `messages` has at most `limit` tokens. Most are told by their length in bytes: no token
    /// stands for less than one.
    ///
    /// # Errors
    /// As [`prompt_ids`](Self::prompt_ids).
    pub fn prompt_fits(&self, messages: &[Message], limit: usize) -> Result<bool> {
        let rendered = self.render(messages, true)?;
        Ok((1..limit).contains(&rendered.len()) || self.rendered_ids(&rendered)?.len() <= limit)
    }

    /// The same tokenizer without tokens that end a completion: for completions of a given length.
    pub fn without_end_tokens(self) -> Self {
        Self { end_tokens: Vec::new(), ..self }
    }

    /// Every token that ends a generation, in increasing order: those that the model's files name and the one that the
    /// chat template writes after an assistant's answer. Empty if there are none.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// The special token that the chat template writes after an assistant's answer, if it writes one.
    pub fn end_of_turn(&self) -> Option<u32> {
        self.end_of_turn
    }

    /// Whether there is a chat template: without one, the model only continues text.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// One more than the largest token id that text can become. The model's embedding may have more rows; a token added
    /// beyond them, such as Gemma 3's for images, may have none.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab(false).into_values().max().map_or(0, |largest| largest as usize + 1)
    }

    /// The token that begins a text, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether a token is one that no text spells, such as the end of a turn.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// The id of a token given as the vocabulary spells it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }
}
