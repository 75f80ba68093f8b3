//! One forward call of a sampler: the last tokens of sequences whose keys and values are stored, and what comes next.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;

use super::Settings;
use crate::model::{Call, KeyValueStore, Model};
use crate::ops::attention::Span;
use crate::ops::head::{Choice, Chosen};
use crate::ops::keys::Store;
use crate::policy::Adapter;

/// The rows of the next forward call, and the row that predicts the next token of every sequence.
#[derive(Default)]
pub(super) struct Rows {
    pub ids: Vec<u32>,
    positions: Vec<usize>,
    pub spans: Vec<Span>,
    stores: Vec<Store>,
    /// Which adapter applies to which rows; neighbors with the same version are one range.
    adapters: Vec<(Range<usize>, Option<Arc<Adapter>>)>,
    pub predicting: Vec<u32>,
}

impl Rows {
    /// Adds consecutive tokens of one sequence: its context is `prefix`, then `own`, whose last rows are these tokens.
    pub fn push(&mut self, ids: &[u32], prefix: Range<usize>, own: Range<usize>, adapter: Option<&Arc<Adapter>>) {
        let rows = self.ids.len()..self.ids.len() + ids.len();
        let end = prefix.len() + own.len();
        let version = |adapter: &Arc<Adapter>| adapter.version;
        match self.adapters.last_mut().filter(|(_, last)| last.as_ref().map(version) == adapter.map(version)) {
            Some((range, _)) => range.end = rows.end,
            None => self.adapters.push((rows.clone(), adapter.cloned())),
        }
        self.positions.extend(end - ids.len()..end);
        self.stores.push(Store { from: rows.clone(), to: own.end - ids.len() });
        self.spans.push(Span { queries: rows, prefix, own });
        self.ids.extend(ids);
    }

    /// Runs the call: the next token of every sequence that has one to predict.
    pub fn next_tokens(
        &self,
        model: &Model,
        store: &mut KeyValueStore,
        choices: &[Choice],
        settings: &Settings,
    ) -> Result<Vec<Chosen>> {
        let adapters = self.adapters.iter().map(|(range, adapter)| (range.clone(), adapter.as_deref()));
        let adapters: Vec<(Range<usize>, Option<&Adapter>)> = adapters.collect();
        let call = Call {
            ids: &self.ids,
            positions: &self.positions,
            spans: &self.spans,
            stores: &self.stores,
            adapters: &adapters,
        };
        let temperature = if settings.temperature == 0.0 { 1.0 } else { settings.temperature };
        model.choose(&call, store, &self.predicting, choices, model.logits(temperature))
    }
}
