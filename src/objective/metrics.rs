//! Metrics that are right whatever the micro-batches: each carries its own denominator until it is read.

use std::collections::BTreeMap;

/// Named means and maxima, still open to more terms.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    means: BTreeMap<&'static str, (f64, f64)>,
    maxima: BTreeMap<&'static str, f64>,
}

impl Metrics {
    /// Adds `sum` over `count` terms to a mean.
    pub fn mean(&mut self, name: &'static str, sum: f64, count: f64) {
        let total = self.means.entry(name).or_default();
        *total = (total.0 + sum, total.1 + count);
    }

    /// Raises a maximum to `value`.
    pub fn max(&mut self, name: &'static str, value: f64) {
        self.maxima.entry(name).and_modify(|most| *most = most.max(value)).or_insert(value);
    }

    /// Adds the terms of another micro-batch.
    pub fn merge(&mut self, other: Self) {
        other.means.into_iter().for_each(|(name, (sum, count))| self.mean(name, sum, count));
        other.maxima.into_iter().for_each(|(name, value)| self.max(name, value));
    }

    /// Every metric by name, sorted; a mean over nothing is left out.
    pub fn values(&self) -> BTreeMap<&'static str, f64> {
        let means =
            self.means.iter().filter(|(_, total)| total.1 > 0.0).map(|(name, total)| (*name, total.0 / total.1));
        means.chain(self.maxima.iter().map(|(name, value)| (*name, *value))).collect()
    }
}
