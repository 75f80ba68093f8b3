//! A call on the device: its integers in one upload, what decides which kernels run, and the adapters of its rows.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, ensure};

use super::attention::{HEAD_UNIT, LARGEST_HEAD, Readers, TILE, Tiles};
use super::device::{Array, Gpu, Number, Purpose, View, bytes_of};
use super::factors::Factors;
use super::kernels::{self, Mask, Segments};
use crate::model::{Architecture, Call, Projection};
use crate::ops::attention::Span;
use crate::ops::dropout::Dropout;

/// Spans of fewer queries are computed row by row: a tile would be mostly empty.
const FEW: usize = 8;

/// Arrays of numbers that travel together.
#[derive(Default)]
struct Parcel {
    bytes: Vec<u8>,
}

/// Where an array lies in a parcel.
struct Place(usize);

impl Parcel {
    fn add<T: Number>(&mut self, values: &[T]) -> Place {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let place = Place(self.bytes.len());
        self.bytes.extend_from_slice(bytes_of(values));
        place
    }

    fn send(&self, gpu: &Arc<Gpu>) -> Result<Array<u8>> {
        gpu.upload(Purpose::Activations, &self.bytes)
    }
}

fn at<T>(parcel: &Array<u8>, place: &Place) -> View<T> {
    parcel.from(place.0).cast()
}

/// What every layer of a call needs beside its input.
pub struct Prepared {
    /// Rows of the call.
    pub rows: usize,
    /// Token of every row.
    pub ids: View<u32>,
    /// Where keys and values go.
    pub to_row: View<i32>,
    /// [spans, 6]: first row and number of the queries, and of the keys that come first and follow.
    pub spans: View<i32>,
    /// The span of every row that is computed by itself, if there are any, else −1.
    pub row_span: Option<View<i32>>,
    /// Queries that are computed together.
    pub tiles: Tiles,
    /// Which adapter applies to which rows.
    pub adapters: Vec<(Range<usize>, Option<Arc<Factors>>)>,
    /// Cosines and sines by kind of attention, [rows, dim / 2] each.
    rotations: Vec<[Array<f32>; 2]>,
    kinds: Vec<usize>,
    dropped: Option<Dropped>,
    /// What the views above look at.
    _parcel: Array<u8>,
}

/// What is dropped of the adapters' inputs.
struct Dropped {
    bound: u64,
    scale: f32,
    keys: View<u64>,
}

impl Prepared {
    /// Brings a call to the device. `together` computes all queries in tiles, as a backward pass does.
    pub fn new(
        gpu: &Arc<Gpu>,
        architecture: &Architecture,
        frequencies: &[Array<f32>],
        (call, dropout): (&Call, Option<&Dropout>),
        together: bool,
    ) -> Result<Self> {
        let (rows, dim) = (call.ids.len(), architecture.head_dim);
        ensure!(
            dim <= LARGEST_HEAD,
            "heads of {dim} are not on the GPU yet, only up to {LARGEST_HEAD}; use device = \"cpu\""
        );
        let tiled = dim.is_multiple_of(HEAD_UNIT);
        ensure!(
            tiled || !together,
            "heads of {dim} cannot be trained on the GPU yet, only multiples of {HEAD_UNIT}; use device = \"cpu\""
        );
        let alone = |span: &Span| !tiled || (!together && span.queries.len() < FEW);
        let mut to_row = vec![-1; rows];
        for store in call.stores {
            to_row[store.from.clone()].iter_mut().zip(store.to..).for_each(|(to, row)| *to = row as i32);
        }
        ensure!(to_row.iter().all(|row| *row >= 0), "a row of the call has no place for its keys");
        let mut row_span = vec![-1; rows];
        for (index, span) in call.spans.iter().enumerate().filter(|(_, span)| alone(span)) {
            row_span[span.queries.clone()].fill(index as i32);
        }
        let tiles = tiles(call.spans, |span| if alone(span) { 0 } else { span.queries.len() });
        let mut parcel = Parcel::default();
        let positions: Vec<u32> = call.positions.iter().map(|&position| position as u32).collect();
        let (ids, positions) = (parcel.add(call.ids), parcel.add(&positions));
        let (to_row, spans, tile_list) = (parcel.add(&to_row), parcel.add(&flat(call.spans)), parcel.add(&tiles));
        let any_alone = row_span.iter().any(|span| *span >= 0);
        let (row_span, keys) = (parcel.add(&row_span), parcel.add(dropout.map_or(&[][..], |dropout| &dropout.rows)));
        let sent = parcel.send(gpu)?;
        let rotations = frequencies.iter().map(|frequencies| {
            let half = frequencies.len();
            let tables = [(); 2].map(|()| gpu.array(Purpose::Activations, rows * half));
            let [cosines, sines] = tables;
            let (cosines, sines) = (cosines?, sines?);
            let to = [cosines.view(), sines.view()];
            kernels::rope_tables(gpu, at(&sent, &positions), frequencies.view(), to, [rows, half])?;
            Ok([cosines, sines])
        });
        let rotations = rotations.collect::<Result<_>>()?;
        let adapters = call
            .adapters
            .iter()
            .map(|(range, adapter)| Ok((range.clone(), adapter.map(|adapter| adapter.on_gpu(gpu)).transpose()?)));
        Ok(Self {
            rows,
            ids: at(&sent, &ids),
            to_row: at(&sent, &to_row),
            spans: at(&sent, &spans),
            row_span: any_alone.then(|| at(&sent, &row_span)),
            tiles: (at(&sent, &tile_list), tiles.len() / 2),
            adapters: adapters.collect::<Result<_>>()?,
            rotations,
            kinds: architecture.layers.clone(),
            dropped: dropout.map(|dropout| Dropped {
                bound: dropout.bound(),
                scale: dropout.scale(),
                keys: at(&sent, &keys),
            }),
            _parcel: sent,
        })
    }

    /// Cosines and sines of a layer.
    pub fn rotation(&self, layer: usize) -> [View<f32>; 2] {
        self.rotations[self.kinds[layer]].each_ref().map(Array::view)
    }

    /// What is dropped of the inputs of a projection for rows from `first` on, and what the rest is multiplied with.
    pub fn mask(&self, first: usize, layer: usize, projection: Projection) -> Option<(Mask, f32)> {
        self.dropped.as_ref().map(|&Dropped { bound, scale, keys }| {
            (Mask { keys: keys.from(first), bound, layer, projection: projection as usize }, scale)
        })
    }
}

/// Spans as kernels read them.
fn flat(spans: &[Span]) -> Vec<i32> {
    let numbers = |range: &Range<usize>| [range.start as i32, range.len() as i32];
    spans.iter().flat_map(|Span { queries, prefix, own }| [queries, prefix, own].map(numbers).concat()).collect()
}

/// Span and first row of every tile of so many rows of each span, the longest contexts first: they end last.
fn tiles(spans: &[Span], rows: impl Fn(&Span) -> usize) -> Vec<i32> {
    let mut all: Vec<(usize, usize)> = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        all.extend((0..rows(span)).step_by(TILE).map(|first| (index, first)));
    }
    let context = |&(index, first): &(usize, usize)| spans[index].prefix.len() + first;
    all.sort_by_key(|tile| std::cmp::Reverse(context(tile)));
    all.into_iter().flat_map(|(index, first)| [index as i32, first as i32]).collect()
}

/// What the backward pass of attention needs beside the call.
pub struct Backward {
    /// Tiles of keys.
    pub tiles: Tiles,
    /// Who sees them.
    pub readers: Readers,
    _parcel: Array<u8>,
}

impl Backward {
    /// Of a call over whole trees.
    pub fn new(gpu: &Arc<Gpu>, call: &Call) -> Result<Self> {
        let whole = |span: &Span| span.own.len() == span.queries.len();
        ensure!(call.spans.iter().all(whole), "a backward pass goes over whole trees");
        let mut branches: BTreeMap<usize, Vec<i32>> = BTreeMap::new();
        for (index, span) in call.spans.iter().enumerate().filter(|(_, span)| !span.prefix.is_empty()) {
            branches.entry(span.prefix.start).or_default().push(index as i32);
        }
        let (mut start, mut readers) = (vec![0], Vec::new());
        for (index, span) in call.spans.iter().enumerate() {
            readers.push(index as i32);
            readers.extend(branches.get(&span.own.start).into_iter().flatten());
            start.push(readers.len() as i32);
        }
        let (tiles, mut parcel) = (tiles(call.spans, |span| span.own.len()), Parcel::default());
        let (tile_list, start, readers) = (parcel.add(&tiles), parcel.add(&start), parcel.add(&readers));
        let sent = parcel.send(gpu)?;
        let readers = Readers { start: at(&sent, &start), spans: at(&sent, &readers) };
        Ok(Self { tiles: (at(&sent, &tile_list), tiles.len() / 2), readers, _parcel: sent })
    }
}

/// Selected rows of a call, sorted so that those which are selected several times come together.
pub struct Selected {
    /// How many.
    pub count: usize,
    /// Their numbers, and how they are sorted.
    pub segments: Segments,
    /// What each of them predicts.
    pub targets: View<u32>,
    _parcel: Array<u8>,
}

impl Selected {
    /// Brings them to the device.
    pub fn new(gpu: &Arc<Gpu>, rows: &[u32], targets: &[u32]) -> Result<Self> {
        let mut order: Vec<u32> = (0..rows.len() as u32).collect();
        order.sort_by_key(|&index| rows[index as usize]);
        let first = |place: &usize| *place == 0 || rows[order[*place] as usize] != rows[order[*place - 1] as usize];
        let mut start: Vec<u32> = (0..order.len()).filter(first).map(|place| place as u32).collect();
        let count = start.len();
        start.push(order.len() as u32);
        let mut parcel = Parcel::default();
        let (at_rows, order, start) = (parcel.add(rows), parcel.add(&order), parcel.add(&start));
        let targets = parcel.add(targets);
        let sent = parcel.send(gpu)?;
        let segments = Segments { at: at(&sent, &at_rows), order: at(&sent, &order), start: at(&sent, &start), count };
        Ok(Self { count: rows.len(), segments, targets: at(&sent, &targets), _parcel: sent })
    }
}
