//! A call on the device: its integers in one upload, what decides which kernels run, and the adapters of its rows.

use std::collections::BTreeMap;
use std::marker::PhantomData;
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
use crate::policy::Adapter;

/// Spans of fewer queries are computed row by row: a tile would be mostly empty.
const FEW: usize = 8;

/// Arrays of numbers that travel together.
#[derive(Default)]
pub struct Parcel {
    pub bytes: Vec<u8>,
}

/// Where an array lies in a parcel.
pub struct Place<T>(usize, PhantomData<T>);

impl Parcel {
    pub fn add<T: Number>(&mut self, values: &[T]) -> Place<T> {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let place = Place(self.bytes.len(), PhantomData);
        self.bytes.extend_from_slice(bytes_of(values));
        place
    }

    pub fn send(&self, gpu: &Arc<Gpu>) -> Result<Arc<Array<u8>>> {
        gpu.upload(Purpose::Activations, &self.bytes).map(Arc::new)
    }
}

impl<T> Place<T> {
    /// The array, where the parcel was sent to.
    pub fn of(&self, sent: &Array<u8>) -> View<T> {
        sent.from(self.0).cast()
    }
}

/// Which adapter applies to which rows.
pub type Applied = Vec<(Range<usize>, Option<Arc<Factors>>)>;

/// The adapters of a call on the device.
pub fn applied(gpu: &Arc<Gpu>, call: &Call) -> Result<Applied> {
    let on_gpu = |adapter: &Adapter| adapter.on_gpu(gpu);
    call.adapters.iter().map(|(range, adapter)| Ok((range.clone(), adapter.map(on_gpu).transpose()?))).collect()
}

/// A call before it is on the device: its integers in one parcel, and what decides which kernels run.
pub struct Packed {
    /// Rows that are computed.
    pub rows: usize,
    pub parcel: Parcel,
    ids: Place<u32>,
    positions: Place<u32>,
    to_row: Place<i32>,
    spans: Place<i32>,
    tiles: (Place<i32>, usize),
    row_span: Option<Place<i32>>,
    /// What is dropped: the bound, what the rest is multiplied with, and a key for every row.
    dropped: Option<(u64, f32, Place<u64>)>,
}

impl Packed {
    /// `together` computes all queries in tiles, as a backward pass does. Rows beyond those of the call, of which each is then a span,
    /// see nothing and are stored nowhere.
    pub fn new(
        architecture: &Architecture,
        (call, dropout): (&Call, Option<&Dropout>),
        together: bool,
        rows: usize,
    ) -> Result<Self> {
        let (own, dim) = (call.ids.len(), architecture.head_dim);
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
        let mut to_row = vec![-1; own];
        for store in call.stores {
            to_row[store.from.clone()].iter_mut().zip(store.to..).for_each(|(to, row)| *to = row as i32);
        }
        ensure!(to_row.iter().all(|row| *row >= 0), "a row of the call has no place for its keys");
        let mut row_span = vec![-1; rows];
        for (index, span) in call.spans.iter().enumerate().filter(|(_, span)| alone(span)) {
            row_span[span.queries.clone()].fill(index as i32);
        }
        let tiles = tiles(call.spans, |span| if alone(span) { 0 } else { span.queries.len() });
        let (mut ids, mut spans) = (call.ids.to_vec(), flat(call.spans));
        let mut positions: Vec<u32> = call.positions.iter().map(|&position| position as u32).collect();
        ids.resize(rows, 0);
        positions.resize(rows, 0);
        to_row.resize(rows, -1);
        spans.resize(spans.len() + SPAN * (rows - own), 0);
        let mut parcel = Parcel::default();
        Ok(Self {
            rows,
            ids: parcel.add(&ids),
            positions: parcel.add(&positions),
            to_row: parcel.add(&to_row),
            spans: parcel.add(&spans),
            tiles: (parcel.add(&tiles), tiles.len() / 2),
            row_span: row_span.iter().any(|span| *span >= 0).then(|| parcel.add(&row_span)),
            dropped: dropout.map(|dropout| (dropout.bound(), dropout.scale(), parcel.add(&dropout.rows))),
            parcel,
        })
    }
}

/// What every layer of a call needs beside its input.
pub struct Prepared {
    /// What computes it.
    pub gpu: Arc<Gpu>,
    /// Rows of the call.
    pub rows: usize,
    /// Token of every row.
    pub ids: View<u32>,
    /// Where keys and values go, or −1.
    pub to_row: View<i32>,
    /// [spans, 6]: first row and number of the queries, and of the keys that come first and follow.
    pub spans: View<i32>,
    /// The span of every row that is computed by itself, if there are any, else −1.
    pub row_span: Option<View<i32>>,
    /// Queries that are computed together.
    pub tiles: Tiles,
    pub adapters: Applied,
    /// Cosines and sines by kind of attention, [rows, dim / 2] each.
    rotations: Vec<[Array<f32>; 2]>,
    kinds: Vec<usize>,
    dropped: Option<Dropped>,
    /// What the views above look at.
    _parcel: Arc<Array<u8>>,
}

/// What is dropped of the adapters' inputs.
struct Dropped {
    bound: u64,
    scale: f32,
    keys: View<u64>,
}

impl Prepared {
    /// Of a call whose parcel was sent to the device.
    pub fn new(
        gpu: &Arc<Gpu>,
        architecture: &Architecture,
        frequencies: &[Array<f32>],
        (packed, sent): (&Packed, &Arc<Array<u8>>),
        adapters: Applied,
    ) -> Result<Self> {
        let rows = packed.rows;
        let rotations = frequencies.iter().map(|frequencies| {
            let half = frequencies.len();
            let tables = [(); 2].map(|()| gpu.array(Purpose::Activations, rows * half));
            let [cosines, sines] = tables;
            let (cosines, sines) = (cosines?, sines?);
            let to = [cosines.view(), sines.view()];
            kernels::rope_tables(gpu, packed.positions.of(sent), frequencies.view(), to, [rows, half])?;
            Ok([cosines, sines])
        });
        Ok(Self {
            gpu: gpu.clone(),
            rows,
            ids: packed.ids.of(sent),
            to_row: packed.to_row.of(sent),
            spans: packed.spans.of(sent),
            row_span: packed.row_span.as_ref().map(|place| place.of(sent)),
            tiles: (packed.tiles.0.of(sent), packed.tiles.1),
            adapters,
            rotations: rotations.collect::<Result<_>>()?,
            kinds: architecture.layers.clone(),
            dropped: packed.dropped.as_ref().map(|(bound, scale, keys)| Dropped {
                bound: *bound,
                scale: *scale,
                keys: keys.of(sent),
            }),
            _parcel: sent.clone(),
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

/// Numbers of a span as kernels read it.
const SPAN: usize = 6;

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
    _parcel: Arc<Array<u8>>,
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
        let readers = Readers { start: start.of(&sent), spans: readers.of(&sent) };
        Ok(Self { tiles: (tile_list.of(&sent), tiles.len() / 2), readers, _parcel: sent })
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
    _parcel: Arc<Array<u8>>,
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
        let segments = Segments { at: at_rows.of(&sent), order: order.of(&sent), start: start.of(&sent), count };
        Ok(Self { count: rows.len(), segments, targets: targets.of(&sent), _parcel: sent })
    }
}
