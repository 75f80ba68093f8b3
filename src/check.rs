//! `candor check`: what a config's model and environments look like from outside, and what is odd about them. No weight is
//! read and nothing is sampled: completions are canned.

use std::collections::{HashMap, HashSet};
use std::fmt;

use anyhow::{Context, Result};
use candor_environments::{Completion, Examples, Finish, Message, ParseStatus, Score, ScoreError, Task};

use crate::config::Config;
use crate::given;
use crate::inputs::Inputs;
use crate::model_files::ModelFiles;
use crate::record::shown;
use crate::scorers::{Scoring, no_panic};
use crate::selection::{Source, choose_tasks};
use crate::tokenizer::Tokenizer;

/// Ids shown of either end of a prompt.
const SHOWN: usize = 8;

/// What was found.
#[derive(Default)]
pub struct Check {
    lines: Vec<String>,
    /// What is probably not as it should be.
    pub odd: Vec<String>,
}

impl Check {
    /// Looks at everything a config names.
    ///
    /// # Errors
    /// If a prompt cannot be rendered or an environment panics.
    pub fn of(config: &Config, inputs: &Inputs) -> Result<Self> {
        let mut check = Self::default();
        check.model(&inputs.model);
        config.sampling.endpoints.iter().for_each(|endpoint| check.line("sampler", endpoint));
        let twin = |source: &Source, of: &[Source]| of.iter().position(|other| other.name == source.name);
        for source in &inputs.training {
            let sampled = source.samples()?;
            check.tasks(source, twin(source, &inputs.heldout).map(|index| &inputs.heldout[index]), sampled);
            let chosen = choose_tasks(std::slice::from_ref(source), 1, config.seed, 0);
            let index = chosen.first().context("there are no tasks")?.1;
            let task = source.environment.task(index);
            check.prompt(&task, &inputs.model.tokenizer)?;
            match sampled {
                true => check.scores(config, source, index, &inputs.model.tokenizer)?,
                false => check.given(&task, &inputs.model.tokenizer)?,
            }
        }
        for source in inputs.heldout.iter().filter(|source| twin(source, &inputs.training).is_none()) {
            check.line(&source.name, format!("{} held-out tasks, none to train on", source.tasks.len()));
        }
        Ok(check)
    }

    fn line(&mut self, name: &str, text: impl fmt::Display) {
        self.lines.push(format!("{name:<12}{text}"));
    }

    fn odd(&mut self, text: impl Into<String>) {
        self.odd.push(text.into());
    }

    fn model(&mut self, ModelFiles { weights, architecture, tokenizer, .. }: &ModelFiles) {
        self.line("model", weights.path().display());
        let millions = weights.elements() as f64 / 1e6;
        let (layers, hidden) = (architecture.layers.len(), architecture.hidden);
        self.line("", format!("{millions:.1} M parameters, {layers} layers, hidden {hidden}"));
        self.line("", format!("vocabulary {}, context {}", architecture.vocabulary, architecture.context));
        let name = |&id: &u32| format!("{} ({id})", tokenizer.decode_with_special(&[id]));
        let ends: Vec<String> = tokenizer.end_tokens().iter().map(name).collect();
        self.line(
            "tokenizer",
            format!("{} tokens; a completion ends with {}", tokenizer.vocab_size(), ends.join(" or ")),
        );
        if tokenizer.borrows_template() {
            self.odd("the model's files hold no chat template; it is given Gemma's turns, which a base model may never have seen");
        }
        if tokenizer.folds_system() {
            self.line("", "no system role: instructions are put before the first question");
        }
        if ends.is_empty() {
            self.odd("the tokenizer names no end token, so every completion runs to sampling.max_tokens");
        }
    }

    /// Counts, and whether held-out tasks are really held out.
    fn tasks(&mut self, source: &Source, twin: Option<&Source>, sampled: bool) {
        let all =
            |source: &Source| -> Vec<Task> { source.tasks.iter().map(|&task| source.environment.task(task)).collect() };
        let (training, heldout) = (all(source), twin.map(all).unwrap_or_default());
        let name = &source.name;
        let heldout_count = match twin {
            Some(_) => format!("{} held out", heldout.len()),
            None if !sampled => "with their completions; nothing of it is evaluated".to_string(),
            None => "held-out ones not loaded (evaluation.tasks = 0)".to_string(),
        };
        self.line(name, format!("{} training tasks, {heldout_count}", training.len()));
        let ids: HashSet<&str> = training.iter().map(|task| task.id.as_str()).collect();
        if ids.len() < training.len() {
            self.odd(format!("{name}: {} training tasks share an id with another", training.len() - ids.len()));
        }
        let shared = heldout.iter().filter(|task| ids.contains(task.id.as_str())).count();
        if shared > 0 {
            self.odd(format!("{name}: {shared} held-out tasks have the id of a training task"));
        }
        let spoken = |task: &Task| task.prompt.iter().map(|message| message.content.clone()).collect::<Vec<_>>();
        let prompts: HashSet<Vec<String>> = training.iter().map(spoken).collect();
        let shared = heldout.iter().filter(|task| prompts.contains(&spoken(task))).count();
        if shared > 0 {
            self.odd(format!("{name}: {shared} held-out prompts are also trained on, so their scores show memory"));
        }
    }

    fn prompt(&mut self, task: &Task, tokenizer: &Tokenizer) -> Result<()> {
        let ids = tokenizer.prompt_ids(&task.prompt).with_context(|| format!("task {}", task.id))?;
        self.line("prompt", format!("{}: {} messages, {} tokens", task.id, task.prompt.len(), ids.len()));
        for (end, ids) in
            [("  first", &ids[..SHOWN.min(ids.len())]), ("  last", &ids[ids.len().saturating_sub(SHOWN)..])]
        {
            self.line(end, format!("{ids:?}"));
            self.line("", format!("{:?}", tokenizer.decode_with_special(ids)));
        }
        match tokenizer.bos() {
            None => self.line("  BOS", "this model has none"),
            Some(bos) => {
                let leading = ids.iter().take_while(|&&id| id == bos).count();
                let unused = if leading == 0 { ": neither the chat template nor the tokenizer writes it" } else { "" };
                let name = tokenizer.decode_with_special(&[bos]);
                self.line("  BOS", format!("{name} ({bos}), {leading} at the start{unused}"));
                if leading > 1 {
                    self.odd(format!("the prompt begins with {leading} BOS tokens; models are trained with one"));
                }
            }
        }
        let special = |ids: &[u32]| ids.iter().filter(|&&id| tokenizer.is_special(id)).count();
        let bare: Vec<Message> =
            task.prompt.iter().map(|message| Message { content: "x".into(), ..message.clone() }).collect();
        let (own, found) = (special(&tokenizer.prompt_ids(&bare)?), special(&ids));
        if found != own {
            self.odd(format!(
                "the text of {} itself holds {} special tokens, which the model takes for the end of a turn or the like",
                task.id,
                found.saturating_sub(own)
            ));
        }
        Ok(())
    }

    /// Shows the completions that a task carries, and how their tokens end.
    fn given(&mut self, task: &Task, tokenizer: &Tokenizer) -> Result<()> {
        let tree = given::tree(task, tokenizer)?;
        for (text, branch) in given::completions(&task.target).iter().zip(&tree.branches) {
            let ids = &branch.ids;
            self.line("completion", format!("{} tokens: {text:?}", ids.len()));
            let last = &ids[ids.len().saturating_sub(SHOWN)..];
            self.line("  last", format!("{last:?}"));
            self.line("", format!("{:?}", tokenizer.decode_with_special(last)));
        }
        if tokenizer.end_of_turn().is_none() {
            self.odd(
                "the chat template ends no turn with a token of its own, so these completions never teach to stop",
            );
        }
        Ok(())
    }

    /// Scores a good, a bad, an empty and a truncated completion.
    fn scores(&mut self, config: &Config, source: &Source, index: usize, tokenizer: &Tokenizer) -> Result<()> {
        let Source { name, environment, .. } = source;
        let Some(Examples { good, bad }) = no_panic(name, index, || environment.examples(index))? else {
            self.line("scores", "the environment shows no examples, so only an empty completion is scored");
            let completion = canned("", Finish::Stop, config, tokenizer)?;
            return self.scored(source, index, vec![("empty", completion)]).map(drop);
        };
        let half = good.char_indices().nth(good.chars().count() / 2).map_or(0, |(at, _)| at);
        let completion = |text: &str, finish| canned(text, finish, config, tokenizer);
        let completions = vec![
            ("good", completion(&good, Finish::Stop)?),
            ("bad", completion(&bad, Finish::Stop)?),
            ("empty", completion("", Finish::Stop)?),
            ("truncated", completion(&good[..half], Finish::Length)?),
        ];
        let (tokens, max_tokens) = (completions[0].1.num_tokens, config.sampling.max_tokens);
        if tokens > max_tokens {
            self.odd(format!("{good:?} has {tokens} tokens with its end, sampling.max_tokens is {max_tokens}"));
        }
        if let Some(stop) = config.sampling.stop.iter().find(|stop| good.contains(stop.as_str())) {
            self.odd(format!("the stop string {stop:?} cuts {good:?}"));
        }
        let scores = self.scored(source, index, completions)?;
        let reward = |kind: &str| scores.get(kind).map(|score| score.reward);
        let (Some(good), Some(bad)) = (reward("good"), reward("bad")) else { return Ok(()) };
        if good <= bad {
            self.odd(format!("{name}: the bad completion earns {bad}, as much as the good one or more"));
        }
        for kind in ["empty", "truncated"] {
            if reward(kind).is_some_and(|reward| reward >= bad) {
                self.odd(format!(
                    "{name}: {kind} earns no less than answering wrongly, so saying nothing is never punished"
                ));
            }
        }
        if scores["good"].parse != ParseStatus::Ok {
            self.odd(format!("{name}: its own good example is read as {:?}", scores["good"].parse));
        }
        Ok(())
    }

    /// Scores completions and shows what they earn; those that have a score are returned by kind.
    fn scored(
        &mut self,
        Source { name, environment, .. }: &Source,
        index: usize,
        canned: Vec<(&'static str, Completion)>,
    ) -> Result<HashMap<&'static str, Score>> {
        let scoring = Scoring { name: name.clone(), environment: environment.clone(), index };
        let (kinds, completions): (Vec<_>, Vec<_>) = canned.into_iter().unzip();
        let scores = scoring.score(&completions)?;
        self.line("scores", "reward  parsed      confidence  completion");
        let mut by_kind = HashMap::new();
        for ((kind, completion), score) in kinds.into_iter().zip(&completions).zip(scores) {
            self.show_score(kind, &completion.text, &score);
            match score {
                Ok(score) => drop(by_kind.insert(kind, score)),
                Err(error) => self.odd(format!("{name}: the {kind} completion has no score: {error}")),
            }
        }
        Ok(by_kind)
    }

    fn show_score(&mut self, kind: &str, text: &str, score: &Result<Score, ScoreError>) {
        let Ok(score) = score else { return };
        let confidence = score.metrics.iter().find(|(metric, _)| *metric == "confidence").map(|(_, value)| *value);
        let (parse, reward) = (format!("{:?}", score.parse), score.reward);
        self.line(&format!("  {kind}"), format!("{reward:>6.3}  {parse:<10}  {:>10}  {text:?}", shown(confidence, 2)));
        if score.parts.len() > 1 {
            let parts: Vec<String> = score.parts.iter().map(|(part, value)| format!("{part} {value:.3}")).collect();
            self.line("", format!("({})", parts.join(", ")));
        }
        if (score.parts.iter().map(|(_, value)| value).sum::<f64>() - score.reward).abs() > 1e-9 {
            self.odd(format!("the reward of the {kind} completion is not the sum of its parts"));
        }
        if kind == "empty" && confidence.is_some() {
            self.odd("an empty completion has a confidence, which somebody must have made up");
        }
    }
}

/// A completion as the sampler would hand it over; the end token counts too.
fn canned(text: &str, finish: Finish, config: &Config, tokenizer: &Tokenizer) -> Result<Completion> {
    let max_tokens = config.sampling.max_tokens;
    let num_tokens = match finish {
        Finish::Length => max_tokens,
        Finish::Stop => tokenizer.encode(text)?.len() + 1,
    };
    Ok(Completion { text: text.to_string(), finish, num_tokens, max_tokens })
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.lines.iter().try_for_each(|line| writeln!(f, "{line}"))?;
        if self.odd.is_empty() {
            return write!(f, "nothing odd");
        }
        self.odd.iter().try_for_each(|odd| writeln!(f, "odd: {odd}"))
    }
}
