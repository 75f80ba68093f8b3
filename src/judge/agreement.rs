//! How far a judge agrees with grades by hand: a confusion table, and per label Cohen's kappa (Cohen 1960).

use std::fmt;

use candor_environments::Verdict;

use crate::record::shown;

/// Counts of (grade by hand, the judge's grade).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agreement {
    /// Rows by hand, columns by the judge, both in the order of [`Verdict::ALL`].
    pub table: [[u64; 3]; 3],
    /// Answers that the judge gave no verdict on; they are in no figure.
    pub errors: u64,
}

/// Agreement on one label against the two others together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OneLabel {
    /// The share of answers on which both say the label, or both do not.
    pub agreement: f64,
    /// Cohen's kappa: (agreement − chance) / (1 − chance); `None` where chance alone would agree always.
    pub kappa: Option<f64>,
}

impl Agreement {
    /// Counts one more answer.
    pub fn add(&mut self, hand: Verdict, judge: Option<Verdict>) {
        match judge {
            Some(judge) => self.table[hand as usize][judge as usize] += 1,
            None => self.errors += 1,
        }
    }

    /// Answers that both graded.
    pub fn count(&self) -> u64 {
        self.table.iter().flatten().sum()
    }

    /// The share on which both say the same, over all labels; `None` where there are none.
    pub fn overall(&self) -> Option<f64> {
        let same: u64 = (0..3).map(|label| self.table[label][label]).sum();
        (self.count() > 0).then(|| same as f64 / self.count() as f64)
    }

    /// Agreement on one label; `None` where there are no answers.
    pub fn on(&self, label: Verdict) -> Option<OneLabel> {
        let (label, all) = (label as usize, self.count());
        let hand: u64 = self.table[label].iter().sum();
        let judge: u64 = self.table.iter().map(|row| row[label]).sum();
        let both = self.table[label][label];
        let agreed = all + 2 * both - hand - judge;
        // In whole numbers, so that "always by chance" is exact: chance is this over the square of all.
        let chance = hand * judge + (all - hand) * (all - judge);
        let defined = chance < all * all;
        let share = |count: u64, of: u64| count as f64 / of as f64;
        let kappa = || (share(agreed, all) - share(chance, all * all)) / (1.0 - share(chance, all * all));
        (all > 0).then(|| OneLabel { agreement: share(agreed, all), kappa: defined.then(kappa) })
    }
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let names = Verdict::ALL.map(Verdict::name);
        let [a, b, c] = names;
        writeln!(f, "{:<16}{a:>14}{b:>14}{c:>14}{:>8}", "hand \\ judge", "n")?;
        for (name, row) in names.iter().zip(&self.table) {
            let [a, b, c] = row;
            writeln!(f, "{name:<16}{a:>14}{b:>14}{c:>14}{:>8}", row.iter().sum::<u64>())?;
        }
        writeln!(f, "n = {}, agreement {}, no verdict {}", self.count(), shown(self.overall(), 3), self.errors)?;
        writeln!(f, "{:<16}{:>14}{:>14}", "label", "agreement", "kappa")?;
        for (label, name) in Verdict::ALL.into_iter().zip(names) {
            let on = self.on(label);
            let (agreement, kappa) = (on.map(|on| on.agreement), on.and_then(|on| on.kappa));
            writeln!(f, "{name:<16}{:>14}{:>14}", shown(agreement, 3), shown(kappa, 3))?;
        }
        Ok(())
    }
}
