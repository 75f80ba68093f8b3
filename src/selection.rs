//! Which tasks a step takes: a function of the config, the seed and the step, and of nothing that happened before.

use std::sync::Arc;

use anyhow::Result;
use candor_environments::{Environment, Target};

use crate::random::{self, Purpose, SplitMix64};
use crate::scorers::no_panic;

/// A loaded environment and its share of every batch.
pub struct Source {
    /// The environment's name in the registry.
    pub name: String,
    /// Its share of the prompts, relative to the others'.
    pub weight: f64,
    /// The environment itself.
    pub environment: Arc<dyn Environment>,
    /// The tasks that are chosen from, by index and increasing: all, but for those that do not fit.
    pub tasks: Vec<usize>,
}

impl Source {
    /// All tasks of an environment.
    pub fn new(name: &str, weight: f64, environment: Arc<dyn Environment>) -> Self {
        let tasks = (0..environment.num_tasks()).collect();
        Self { name: name.to_string(), weight, environment, tasks }
    }

    /// Whether completions of its tasks are sampled, as far as its first task tells.
    ///
    /// # Errors
    /// If the environment panics.
    pub fn samples(&self) -> Result<bool> {
        let Self { name, environment, tasks, .. } = self;
        Ok(no_panic(name, tasks[0], || environment.task(tasks[0]))?.target == Target::Reward)
    }
}

/// Which task of which source: (source, task).
pub type Choice = (usize, usize);

/// The tasks of a training step: every source's share of the prompts by largest remainder, each in an order of its own that
/// is shuffled again after every pass. A function of (seed, step) alone.
pub fn choose_tasks(sources: &[Source], prompts: usize, seed: u64, step: u64) -> Vec<Choice> {
    let weights: Vec<f64> = sources.iter().map(|source| source.weight).collect();
    let mut chosen = Vec::with_capacity(prompts);
    for (index, share) in shares(&weights, prompts).into_iter().enumerate() {
        let tasks = &sources[index].tasks;
        let first = step as usize * share;
        let mut order = Vec::new();
        for place in first..first + share {
            if place == first || place % tasks.len() == 0 {
                let pass = place / tasks.len();
                order = shuffled(tasks, random::key(seed, Purpose::Selection, &[index as u64, pass as u64]));
            }
            chosen.push((index, order[place % tasks.len()]));
        }
    }
    chosen
}

/// The held-out tasks of an evaluation: at most `tasks` of every source, always the same ones for a seed.
pub fn choose_heldout(sources: &[Source], tasks: usize, seed: u64) -> Vec<Choice> {
    let of = |(index, source): (usize, &Source)| {
        let order = shuffled(&source.tasks, random::key(seed, Purpose::Selection, &[index as u64]));
        order.into_iter().take(tasks).map(move |task| (index, task)).collect::<Vec<_>>()
    };
    sources.iter().enumerate().flat_map(of).collect()
}

/// Whole shares of `total` in proportion to the weights; what is left goes to the largest remainders, the first among equals.
pub fn shares(weights: &[f64], total: usize) -> Vec<usize> {
    // Divided by the largest first: huge weights must not overflow their sum.
    let largest = weights.iter().copied().fold(0.0, f64::max);
    let sum: f64 = weights.iter().map(|weight| weight / largest).sum();
    let exact: Vec<f64> = weights.iter().map(|weight| weight / largest / sum * total as f64).collect();
    let mut shares: Vec<usize> = exact.iter().map(|share| share.floor() as usize).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
    let left = total - shares.iter().sum::<usize>();
    order.into_iter().take(left).for_each(|index| shares[index] += 1);
    shares
}

/// The tasks in the order of a key (Fisher-Yates).
fn shuffled(tasks: &[usize], key: u64) -> Vec<usize> {
    let mut order = tasks.to_vec();
    let mut random = SplitMix64::new(key);
    for last in (1..order.len()).rev() {
        order.swap(last, random.below(last + 1));
    }
    order
}
