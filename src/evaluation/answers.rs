//! The answers to some questions: what confidence each states, if it can be read, and whether it is right.

use std::collections::HashMap;

use anyhow::{Result, ensure};

use super::Predictions;

/// One answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    /// Index of its question.
    pub question: u32,
    /// Its confidence, in [0, 1]; `None` where none could be read.
    pub confidence: Option<f64>,
    /// Whether it is right.
    pub correct: bool,
}

/// Answers, one or more to each question.
#[derive(Clone, Debug, PartialEq)]
pub struct Answers {
    questions: Vec<String>,
    rows: Vec<Answer>,
}

impl Answers {
    /// From each answer's question (by name), confidence and correctness. Questions are numbered as they first appear.
    ///
    /// # Errors
    /// No answer; a confidence that is NaN or outside [0, 1], with its row.
    pub fn new<'a>(answers: impl Iterator<Item = (&'a str, Option<f64>, bool)>) -> Result<Self> {
        let (mut numbers, mut questions, mut rows) = (HashMap::new(), Vec::new(), Vec::new());
        for (row, (name, confidence, correct)) in answers.enumerate() {
            let stated = confidence.unwrap_or(0.0);
            ensure!((0.0..=1.0).contains(&stated), "row {row}: the confidence {stated} is not in [0, 1]");
            let question = *numbers.entry(name).or_insert_with(|| {
                questions.push(name.to_string());
                questions.len() as u32 - 1
            });
            rows.push(Answer { question, confidence, correct });
        }
        ensure!(!rows.is_empty(), "no answer to evaluate");
        Ok(Self { questions, rows })
    }

    /// The questions' names, by number.
    pub fn questions(&self) -> &[String] {
        &self.questions
    }

    /// The answers, in the order they were given; never empty.
    pub fn rows(&self) -> &[Answer] {
        &self.rows
    }

    /// The same answers with other confidences, one for each.
    ///
    /// # Errors
    /// Another number of confidences, or as [`Answers::new`].
    pub fn with_confidences(&self, confidences: &[Option<f64>]) -> Result<Self> {
        let (rows, given) = (self.rows.len(), confidences.len());
        ensure!(rows == given, "{given} confidences for {rows} answers");
        let names = self.rows.iter().map(|answer| self.questions[answer.question as usize].as_str());
        Self::new(names.zip(&self.rows).zip(confidences).map(|((name, row), stated)| (name, *stated, row.correct)))
    }

    /// The answers of the given questions alone: those for which `keep`, by number, is true.
    pub fn predictions_where(&self, keep: impl Fn(u32) -> bool) -> Option<Predictions> {
        let kept = self.rows.iter().filter(|answer| keep(answer.question));
        let stated = kept.filter_map(|answer| Some((answer.question, answer.confidence?, answer.correct)));
        // Confidences were checked, so nothing but having none can be wrong.
        Predictions::of_questions(stated).ok()
    }

    /// Those that state a confidence; `None` where none does.
    pub fn predictions(&self) -> Option<Predictions> {
        self.predictions_where(|_| true)
    }
}
