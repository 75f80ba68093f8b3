//! `candor prepare answers`: a model answers questions, with the confidence that it states and the one that its tokens have.

use std::path::Path;

use anyhow::{Result, ensure};
use candor_environments::Message;
use candor_environments::confidence::stated_answer;
use candor_environments::parsing::{Mode, ParseOutcome};
use candor_environments::rows::each_row;
use candor_environments::simpleqa::{gold, question};
use serde_json::json;

use super::labels::prompt;
use super::{Object, Writer};
use crate::config::Dtype;
use crate::event::Observer;
use crate::sample::{Prompts, Sample};
use crate::sampler::Settings;

/// How questions are answered.
pub struct Answers<'a> {
    /// The model's source.
    pub model: &'a str,
    /// A PEFT adapter folder.
    pub adapter: Option<&'a Path>,
    /// Answers to every question.
    pub samples: usize,
    /// Whether a confidence is asked for.
    pub confidence: bool,
    /// How they are sampled.
    pub settings: Settings,
}

impl Answers<'_> {
    /// Answers the questions of a file into another, one row per answer: `question`, `answers` (the right ones), `completion`,
    /// `model_answer` (null where none can be read), `confidence` (as stated, null where none can be read), `token_confidence`
    /// (the geometric mean of the answer's token probabilities), `finish` and `from`.
    ///
    /// # Errors
    /// If a question, the model or the adapter is not what it should be, or the output exists.
    pub fn run(self, input: &Path, output: &Path, observer: Observer) -> Result<()> {
        let Self { model, adapter, samples, confidence, settings } = self;
        let drawn = samples == 1 || settings.temperature > 0.0;
        ensure!(drawn, "--samples {samples} at temperature 0 are all the same answer; raise --temperature");
        let mut rows = Vec::new();
        each_row(input, |row, object: Object| {
            let (question, answers) = (question(&object)?, gold(&object)?);
            let asked = if confidence { prompt(&question) } else { question.clone() };
            let fields = [
                ("row", json!(row)),
                ("question", json!(question)),
                ("answers", json!(answers)),
                ("messages", json!([Message::user(asked)])),
                ("from", object.get("from").cloned().unwrap_or_default()),
            ];
            rows.push(fields.into_iter().map(|(name, value)| (name.to_string(), value)).collect::<Object>());
            Ok(())
        })?;
        ensure!(!rows.is_empty(), "{}: there are no rows", input.display());
        let origin = json!({
            "stage": "answers", "file": input.display().to_string(), "model": model,
            "adapter": adapter.map(|adapter| adapter.display().to_string()),
            "temperature": settings.temperature, "seed": settings.seed,
        });
        let sample = Sample::prepare((model, Dtype::Auto), Prompts::Made(&rows), adapter, samples, settings, observer)?;
        let mut writer = Writer::create(output, origin)?;
        let (tokenizer, settings) = sample.reading();
        sample.each(observer, &mut |asked, generation| {
            let completion = generation.completion(tokenizer, settings);
            let stated = stated_answer(&completion.text, Mode::Lenient);
            // Who was not asked for a confidence says nothing but the answer.
            let range = if confidence { stated.answer } else { Some(0..completion.text.len()) };
            let of_tokens = range.clone().and_then(|range| generation.answer_confidence(range, tokenizer));
            let answer = range.map(|range| completion.text[range].trim()).filter(|answer| !answer.is_empty());
            let verbal = match stated.confidence {
                ParseOutcome::Ok(value) if confidence => Some(value),
                _ => None,
            };
            let mut row: Object =
                ["question", "answers"].iter().map(|name| (name.to_string(), asked[*name].clone())).collect();
            for (name, value) in [
                ("completion", json!(completion.text)),
                ("model_answer", json!(answer)),
                ("confidence", json!(verbal)),
                ("token_confidence", json!(of_tokens)),
                ("finish", json!(completion.finish)),
            ] {
                row.insert(name.to_string(), value);
            }
            let before = Some(&asked["from"]).filter(|from| !from.is_null()).cloned();
            let index = asked["row"].as_u64().unwrap_or_default() as usize;
            writer.take(index, before, Ok(row))
        })?;
        writer.finish(observer)
    }
}
