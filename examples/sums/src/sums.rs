//! Is a + b above 100? The model states a probability and earns the Brier score of it. A task: `Is 37 + 61 above 100?`

use anyhow::Result;
use candor_environments::{
    Completion, Context, Environment, Examples, Message, ParseStatus, Score, ScoreError, Split, Target, Task,
};

struct Sums {
    /// The first sum of the split: training and held-out tasks never meet.
    first: usize,
}

impl Sums {
    fn terms(&self, index: usize) -> (usize, usize) {
        ((self.first + index) * 37 % 101, (self.first + index) * 61 % 103)
    }
}

impl Environment for Sums {
    fn num_tasks(&self) -> usize {
        1000
    }

    fn task(&self, index: usize) -> Task {
        let (a, b) = self.terms(index);
        let prompt = format!("Is {a} + {b} above 100? Reply with the probability alone, such as 70%.");
        Task { id: format!("sums/{}", self.first + index), prompt: vec![Message::user(prompt)], target: Target::Reward }
    }

    fn score(&self, index: usize, completion: &Completion) -> Result<Score, ScoreError> {
        let (a, b) = self.terms(index);
        let stated = completion.text.split_once('%').and_then(|(before, _)| before.split_whitespace().last());
        let percent = stated.and_then(|digits| digits.parse::<f64>().ok());
        let (parse, outcome, metrics) = match percent {
            None => (ParseStatus::Missing, ("unparsed", -0.25), vec![]),
            Some(percent) if !(0.0..=100.0).contains(&percent) => {
                (ParseStatus::OutOfRange, ("unparsed", -0.25), vec![])
            }
            Some(percent) => {
                let (p, y) = (percent / 100.0, f64::from(a + b > 100));
                (ParseStatus::Ok, ("brier", 1.0 - (p - y).powi(2)), vec![("confidence", p), ("correct", y)])
            }
        };
        let (reward, parts, flags) = (outcome.1, vec![outcome], vec![]);
        Ok(Score { reward, parts, metrics, parse, flags, answer: None, train_on: None, judge: None })
    }

    fn examples(&self, index: usize) -> Option<Examples> {
        let (a, b) = self.terms(index);
        let [good, bad] = if a + b > 100 { ["90%", "10%"] } else { ["10%", "90%"] };
        Some(Examples { good: good.into(), bad: bad.into() })
    }
}

pub fn load(context: &Context) -> Result<Box<dyn Environment>> {
    Ok(Box::new(Sums { first: if context.split == Split::Train { 0 } else { 5000 } }))
}
