//! Tasks that carry their completions: nothing is sampled, the step's trees are made of what they say.
//!
//! A completion is encoded apart from its prompt and followed by the token that ends a turn; the loss is about these alone.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use anyhow::{Context, Result, ensure};
use candor_environments::{Target, Task};

use crate::learner::Learner;
use crate::learner::portion::{Loss, Portion};
use crate::learner::tree::{Branch, Signal, Tree};
use crate::scorers::no_panic;
use crate::selection::{Choice, Source};
use crate::tokenizer::Tokenizer;

/// The texts that a target carries, the chosen one of a pair first; none where completions are sampled.
pub fn completions(target: &Target) -> Vec<&str> {
    match target {
        Target::Reward => Vec::new(),
        Target::Demonstration { completion } | Target::Judged { completion, .. } => vec![completion],
        Target::Preference { chosen, rejected } => vec![chosen, rejected],
    }
}

/// A task's prompt with the completions that it carries as branches: what is known of them is not there yet.
///
/// # Errors
/// If the prompt cannot be rendered, or a completion has no tokens.
pub fn tree(task: &Task, tokenizer: &Tokenizer) -> Result<Tree> {
    let name = format!("task {}", task.id);
    let branch = |(rollout, text): (usize, &str)| {
        let mut ids = tokenizer.encode(text)?;
        ensure!(!ids.is_empty(), "the completion {text:?} has no tokens");
        ids.extend(tokenizer.end_of_turn());
        Ok(Branch { rollout, ..Branch::demonstration(ids) })
    };
    let branches = completions(&task.target).into_iter().enumerate().map(branch).collect::<Result<Vec<_>>>();
    let branches = branches.with_context(|| name.clone())?;
    let prompt_ids = tokenizer.prompt_ids(&task.prompt).with_context(|| name.clone())?;
    Ok(Tree { name, prompt_ids, branches })
}

/// Whether a task with its completions fits: all of them with their prompt into one micro-batch, because a pair is never split,
/// and each into the model's context.
///
/// # Errors
/// As [`tree`].
pub fn fits(task: &Task, tokenizer: &Tokenizer, micro_tokens: usize, context: usize) -> Result<bool> {
    let tree = tree(task, tokenizer)?;
    let prompt = tree.prompt_ids.len();
    let longest = tree.branches.iter().map(|branch| branch.ids.len()).max().unwrap_or(0);
    Ok(tree.rows() <= micro_tokens && prompt + longest <= context)
}

/// Whether there is a pair among the tasks, which a reference is needed for.
///
/// # Errors
/// If an environment panics.
pub fn has_pairs(sources: &[Source]) -> Result<bool> {
    for (index, source) in sources.iter().enumerate() {
        for &of_source in &source.tasks {
            if matches!(task(sources, (index, of_source))?.target, Target::Preference { .. }) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Chosen tasks whose completions are to be sampled.
///
/// # Errors
/// If an environment panics.
pub fn to_sample(sources: &[Source], chosen: &[Choice]) -> Result<Vec<Choice>> {
    let mut sampled = Vec::new();
    for &choice in chosen {
        if task(sources, choice)?.target == Target::Reward {
            sampled.push(choice);
        }
    }
    Ok(sampled)
}

fn task(sources: &[Source], (source, index): Choice) -> Result<Task> {
    let Source { name, environment, .. } = &sources[source];
    no_panic(name, index, || environment.task(index))
}

/// Makes a step's trees of completions that are given; keeps what the reference said of pairs, for the next pass.
#[derive(Default)]
pub struct Given {
    references: HashMap<Choice, Vec<Vec<f64>>>,
}

impl Given {
    /// What a step learns from, by kind: `sampled` are the trees of its rollouts, the others are made here.
    ///
    /// # Errors
    /// As [`tree`], or if a pair does not fit into `micro_tokens` or the device fails.
    pub fn portions(
        &mut self,
        (sources, chosen): (&[Source], &[Choice]),
        sampled: Vec<Tree>,
        learner: &Learner,
        tokenizer: &Tokenizer,
        micro_tokens: usize,
    ) -> Result<Vec<Portion>> {
        let tasks = chosen.iter().map(|&choice| task(sources, choice)).collect::<Result<Vec<_>>>()?;
        let loss = |(&(source, _), task): (&Choice, &Task)| Loss::of(&task.target, &*sources[source].environment);
        let losses: Vec<Loss> = chosen.iter().zip(&tasks).map(loss).collect();
        let mut portions: Vec<Portion> = Vec::new();
        if !sampled.is_empty() {
            let share = share(sources, chosen, &losses, &Loss::Reward);
            portions.push(Portion { loss: Loss::Reward, share, trees: sampled });
        }
        for ((&choice, task), loss) in chosen.iter().zip(&tasks).zip(&losses) {
            if *loss == Loss::Reward {
                continue;
            }
            let mut tree = tree(task, tokenizer)?;
            let signals: Vec<Signal> = match &task.target {
                Target::Reward => Vec::new(),
                Target::Demonstration { .. } => vec![Signal::Demonstration],
                Target::Judged { correct, .. } => vec![Signal::Judged { correct: *correct }],
                Target::Preference { .. } => {
                    let said = match self.references.entry(choice) {
                        Entry::Occupied(said) => said.into_mut(),
                        Entry::Vacant(unknown) => unknown.insert(learner.reference_logprobs(&tree, micro_tokens)?),
                    };
                    said.iter().map(|reference_t| Signal::Preference { reference_t: reference_t.clone() }).collect()
                }
            };
            tree.branches.iter_mut().zip(signals).for_each(|(branch, signal)| branch.signal = signal);
            match portions.iter_mut().find(|portion| portion.loss == *loss) {
                Some(portion) => portion.trees.push(tree),
                None => {
                    let share = share(sources, chosen, &losses, loss);
                    portions.push(Portion { loss: *loss, share, trees: vec![tree] });
                }
            }
        }
        Ok(portions)
    }
}

/// The weight of a kind of tasks in a step's loss: that of its environments, as far as their tasks are of this kind.
fn share(sources: &[Source], chosen: &[Choice], losses: &[Loss], kind: &Loss) -> f64 {
    let total: f64 = sources.iter().map(|source| source.weight).sum();
    let of_source = |(index, source): (usize, &Source)| {
        let own = || chosen.iter().zip(losses).filter(|((of, _), _)| *of == index);
        let of_kind = own().filter(|(_, loss)| loss.is_like(kind)).count();
        // A source without a task of the kind has no share, even where it has none at all.
        if of_kind == 0 { 0.0 } else { source.weight / total * (of_kind as f64 / own().count() as f64) }
    };
    sources.iter().enumerate().map(of_source).sum()
}
