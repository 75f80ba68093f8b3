//! `candor rescore`: what the completions of a run would have earned from another reward, parser or judge. Nothing is
//! sampled: the environments of the changed config score the saved completions as in training.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::mem;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candor_environments::{Completion, Load, Task};

use crate::advantage::advantages;
use crate::config::Config;
use crate::event::{Event, Observer};
use crate::generations::{Line, each_rollout, generations_file};
use crate::inputs;
use crate::rescored::Rescored;
use crate::rollout::{SCORE_TIMEOUT, ScoreErrors};
use crate::run::{Row, RowSplit, differences};
use crate::scorers::{Ended, Scorers, Scoring, no_panic};
use crate::selection::Source;

/// What may be changed: all that a saved completion can still be told.
const CHANGEABLE: [&str; 3] = ["environment", "evaluation.environment", "learner.advantage"];

/// A run whose completions can be scored again.
pub struct Rescore {
    config: Config,
    /// The run's `generations.jsonl`, perhaps compressed.
    file: PathBuf,
    /// Where the rows with their new scores go.
    output: PathBuf,
    training: Vec<Tasks>,
    heldout: Vec<Tasks>,
}

/// An environment's tasks by their ids.
struct Tasks {
    source: Source,
    by_id: HashMap<String, usize>,
}

impl Tasks {
    fn of(source: Source) -> Result<Self> {
        let Source { name, environment, .. } = &source;
        let id = |index| Ok((no_panic(name, index, || environment.task(index))?.id, index));
        let by_id = (0..environment.num_tasks()).map(id).collect::<Result<_>>()?;
        Ok(Self { source, by_id })
    }
}

impl Rescore {
    /// Loads the environments of a run's config with some keys changed, and finds every saved row's task in them: nothing is
    /// scored before all are found. The rows will go to `output`; without one, to the first free `rescored-<n>.jsonl` in the
    /// run's folder.
    ///
    /// # Errors
    /// If the folder holds no run, the output exists, a changed key is not about scoring, an environment is not what the config
    /// says, or a row's task is gone or has another prompt.
    pub fn prepare(
        run: &Path,
        sets: &[String],
        output: Option<&Path>,
        environments: &[(&str, Load)],
        observer: Observer,
    ) -> Result<Self> {
        ensure!(
            run.is_dir(),
            "{}: not a run's folder; what scored its completions is in its config.toml",
            run.display()
        );
        let free = || (1..).map(|n| run.join(format!("rescored-{n}.jsonl"))).find(|path| !path.exists());
        let output = output.map(Path::to_owned).or_else(free).context("no free name for the rescored rows")?;
        ensure!(!output.exists(), "{}: exists already, and is not written over", output.display());
        let (file, config) = (generations_file(run)?, run.join("config.toml"));
        let (before, config) = (Config::load(&config, &[])?, Config::load(&config, sets)?);
        for (key, change) in differences(&before, &config)? {
            ensure!(
                CHANGEABLE.contains(&key.as_str()),
                "--set {key}: {change}: completions are scored again, not sampled again, so only {} may be changed",
                CHANGEABLE.join(", ")
            );
        }
        let (training, heldout) = inputs::environments(&config, environments, observer)?;
        let tasks = |sources: Vec<Source>| sources.into_iter().map(Tasks::of).collect::<Result<Vec<_>>>();
        let rescore = Self { config, file, output, training: tasks(training)?, heldout: tasks(heldout)? };
        rescore.check()?;
        Ok(rescore)
    }

    /// Whether every row's task is there, with the prompt that was answered.
    fn check(&self) -> Result<()> {
        let mut last: Option<(RowSplit, String, Task)> = None;
        each_rollout(&self.file, |_, lines| {
            for Line { row, number, .. } in lines {
                let place = || format!("{}: line {number}: task {}", self.file.display(), row.task);
                let known = last.take().filter(|(split, environment, task)| {
                    *split == row.split && *environment == row.environment && task.id == row.task
                });
                let task = match known {
                    Some((.., task)) => task,
                    None => {
                        let Scoring { name, environment, index } = self.scoring(&row).with_context(place)?;
                        no_panic(&name, index, || environment.task(index))?
                    }
                };
                ensure!(
                    !row.prompt.is_empty(),
                    "{}: the row holds no prompt, so it cannot be told whether this is still the task that was answered",
                    place()
                );
                ensure!(
                    task.prompt == row.prompt,
                    "{}: {} asks something else now: other data, or an option that changes the prompt; it would score an \
                     answer to another question",
                    place(),
                    row.environment
                );
                last = Some((row.split, row.environment, task));
            }
            Ok(())
        })?;
        Ok(())
    }

    /// What scores a row.
    fn scoring(&self, row: &Row) -> Result<Scoring> {
        let sources = match row.split {
            RowSplit::Train => &self.training,
            RowSplit::Eval => &self.heldout,
        };
        let split = if row.split == RowSplit::Train { "train on" } else { "evaluate on" };
        let found = sources.iter().find(|tasks| tasks.source.name == row.environment);
        let Tasks { source: Source { name, environment, .. }, by_id } =
            found.with_context(|| format!("the config has no environment {:?} to {split}", row.environment))?;
        let index = by_id.get(&row.task).with_context(|| {
            format!("{name} has no such task to {split} any more: its data is not what it was when the run was made")
        })?;
        Ok(Scoring { name: name.clone(), environment: environment.clone(), index: *index })
    }

    /// Scores every row again and writes it.
    ///
    /// # Errors
    /// If the output cannot be written, an environment panics or compares a group that is not whole, too many scores cannot
    /// be given, or a file has changed meanwhile.
    pub fn run(&self, observer: Observer) -> Result<Rescored> {
        let output = &self.output;
        let unfinished = output.with_extension("tmp");
        let failed = || format!("{}: cannot write", unfinished.display());
        let mut writer = BufWriter::new(File::create(&unfinished).with_context(failed)?);
        let (mut rescored, mut errors) = (Rescored::new(output.clone()), ScoreErrors::default());
        let written = self.each_block(|before| {
            let (done, total) = (before[0].step as usize, self.config.steps as usize);
            observer(Event::Progress { what: "steps", done, total: total.max(done + 1) });
            let after = self.score(&before)?;
            errors.observe(&after)?;
            for row in &after {
                serde_json::to_writer(&mut writer, row)?;
                writer.write_all(b"\n").with_context(failed)?;
            }
            rescored.add(before, after);
            Ok(())
        });
        let written = written.and_then(|torn| writer.flush().with_context(failed).map(|()| torn));
        let torn = written.inspect_err(|_| {
            // The error is what is told; what is left of the file is in nobody's way.
            drop(fs::remove_file(&unfinished));
        })?;
        fs::rename(&unfinished, output).with_context(|| format!("{}: cannot create", output.display()))?;
        torn.iter().for_each(|torn| observer(Event::Warning(torn)));
        Ok(rescored)
    }

    /// Calls `visit` with the rows of each step and each evaluation, in the file's order. Returns what was left out, in words.
    fn each_block(&self, mut visit: impl FnMut(Vec<Row>) -> Result<()>) -> Result<Option<String>> {
        let mut block: Vec<Row> = Vec::new();
        let torn = each_rollout(&self.file, |_, lines| {
            for Line { row, .. } in lines {
                if block.last().is_some_and(|last| (last.split, last.step) != (row.split, row.step)) {
                    visit(mem::take(&mut block))?;
                }
                block.push(row);
            }
            Ok(())
        })?;
        if !block.is_empty() {
            visit(block)?;
        }
        Ok(torn)
    }

    /// The rows of one step or evaluation with the scores and advantages that they have now.
    fn score(&self, before: &[Row]) -> Result<Vec<Row>> {
        let groups: Vec<&[Row]> = before.chunk_by(of_one_group).collect();
        let tasks = groups.iter().map(|group| self.scoring(&group[0])).collect::<Result<Vec<_>>>()?;
        let mut scorers = Scorers::start(tasks.clone());
        let handed_over = self.hand_over(&groups, &tasks, &mut scorers);
        let outstanding = scorers.close();
        handed_over.map_err(|error| outstanding.failure().unwrap_or(error))?;
        let mut after = before.to_vec();
        for (Ended { of, .. }, score) in outstanding.wait(before.len(), SCORE_TIMEOUT, &mut |_| Ok(()))?.0 {
            after[of].set_score(&score);
        }
        for group in after.chunk_by_mut(of_one_group) {
            let rewards: Vec<Option<f64>> = group.iter().map(|row| row.reward).collect();
            let kind = Some(self.config.learner.advantage).filter(|_| group[0].split == RowSplit::Train);
            let of_group = kind.and_then(|kind| advantages(&rewards, kind)).unwrap_or(vec![None; group.len()]);
            group.iter_mut().zip(of_group).for_each(|(row, advantage)| row.advantage = advantage);
        }
        Ok(after)
    }

    /// Has all rows scored: each by itself, or a group together where they are compared.
    fn hand_over(&self, groups: &[&[Row]], tasks: &[Scoring], scorers: &mut Scorers<usize>) -> Result<()> {
        let mut index = 0;
        for (number, (group, scoring)) in groups.iter().zip(tasks).enumerate() {
            let ended = |row: &Row| {
                index += 1;
                Ended { group: number, completion: self.completion(row), of: index - 1 }
            };
            let ended: Vec<Ended<usize>> = group.iter().map(ended).collect();
            if scoring.environment.compares() {
                self.check_whole(group)?;
                scorers.score(ended)?;
            } else {
                ended.into_iter().try_for_each(|one| scorers.score(vec![one]))?;
            }
        }
        Ok(())
    }

    /// What the environment is told: the row's own counts and reason of its end.
    fn completion(&self, row: &Row) -> Completion {
        let max_tokens = match row.split {
            RowSplit::Train => self.config.sampling.max_tokens,
            RowSplit::Eval => self.config.evaluation.max_tokens,
        };
        Completion { text: row.completion.clone(), finish: row.finish, num_tokens: row.tokens, max_tokens }
    }

    /// Whether all rollouts of a group are there, where they are compared with each other.
    fn check_whole(&self, group: &[Row]) -> Result<()> {
        let wanted = if group[0].split == RowSplit::Train { self.config.batch.group } else { 1 };
        let Row { task, step, environment, .. } = &group[0];
        if group.len() != wanted || group.iter().enumerate().any(|(index, row)| row.rollout != index) {
            bail!(
                "step {step}: task {task}: {environment} compares the {wanted} rollouts of a group, and {} are in the file",
                group.len()
            );
        }
        Ok(())
    }
}

/// Whether two rows of a step are rollouts of one prompt.
fn of_one_group(one: &Row, other: &Row) -> bool {
    (one.group, &one.environment, &one.task) == (other.group, &other.environment, &other.task)
}
