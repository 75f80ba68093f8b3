//! Decoding steps in graphs: the same to the bit as without, and graphs that end with what they use.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};
use candor::cuda::device::{Argument, Command, Device, Gpu, Launch, Product, Purpose, Room};
use candor::cuda::graph::Graph;
use candor::model::{Call, KeyValueStore, Model, Weights};
use candor::ops::attention::Span;
use candor::ops::head::Choice;
use candor::ops::keys::Store;
use candor::policy::Adapter;

use crate::cuda_device::gpu;
use crate::model::adapter;
use crate::{check, toy};

/// A device whose graphs are counted, and which can refuse to make them.
struct Watched {
    inner: Arc<Gpu>,
    graphs: Arc<Graphs>,
}

#[derive(Default)]
struct Graphs {
    refused: AtomicBool,
    /// Now, and at most so far.
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Graphs {
    fn now(&self) -> usize {
        self.now.load(Ordering::Relaxed)
    }
}

fn watched() -> Option<(Arc<Gpu>, Arc<Graphs>)> {
    let (inner, graphs) = (gpu()?, Arc::<Graphs>::default());
    Some((Gpu::new(Box::new(Watched { inner, graphs: graphs.clone() })), graphs))
}

impl Device for Watched {
    fn name(&self) -> &str {
        self.inner.device().name()
    }

    fn room(&self) -> Result<Room> {
        self.inner.device().room()
    }

    fn allocate(&self, bytes: usize) -> Result<Option<u64>> {
        self.inner.device().allocate(bytes)
    }

    fn release(&self, address: u64) {
        self.inner.device().release(address);
    }

    fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.inner.device().write(to, bytes)
    }

    fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.inner.device().read(from, bytes)
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.inner.device().copy(from, to, bytes)
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        self.inner.device().zero(at, bytes)
    }

    fn launch(&self, kernel: &str, shape: Launch, arguments: &[Argument]) -> Result<()> {
        self.inner.device().launch(kernel, shape, arguments)
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        self.inner.device().multiply(product)
    }

    fn record(&self, commands: &[Command]) -> Result<u64> {
        if self.graphs.refused.load(Ordering::Relaxed) {
            bail!("no graphs here");
        }
        let graph = self.inner.device().record(commands)?;
        let now = self.graphs.now.fetch_add(1, Ordering::Relaxed) + 1;
        self.graphs.most.fetch_max(now, Ordering::Relaxed);
        Ok(graph)
    }

    fn replay(&self, graph: u64) -> Result<()> {
        self.inner.device().replay(graph)
    }

    fn forget(&self, graph: u64) {
        self.graphs.now.fetch_sub(1, Ordering::Relaxed);
        self.inner.device().forget(graph);
    }
}

fn open(folder: &Path) -> Option<(Model, Arc<Graphs>)> {
    let (gpu, graphs) = watched()?;
    Some((Model::load_on(&gpu, &Weights::open(folder).unwrap(), None).unwrap(), graphs))
}

/// Rows of the store for one sequence.
const ROWS: usize = 32;

/// Which adapter applies to which sequences.
type Adapters<'a> = &'a [(Range<usize>, Option<&'a Adapter>)];

/// What sequences choose after the token at a position, as a sampler would ask: bits of tokens and log-probabilities.
fn step(
    model: &Model,
    store: &mut KeyValueStore,
    position: usize,
    adapters: Adapters,
    temperature: f64,
) -> Vec<[u32; 3]> {
    let count = adapters.last().unwrap().0.end;
    let start = |sequence: usize| sequence * ROWS;
    let span = |row: usize| Span { queries: row..row + 1, prefix: 0..0, own: start(row)..start(row) + position + 1 };
    let store_of = |row: usize| Store { from: row..row + 1, to: start(row) + position };
    let ids: Vec<u32> = (0..count).map(|row| ((row * 53 + position * 37) % 300 + 4) as u32).collect();
    let (spans, stores): (Vec<_>, Vec<_>) = (0..count).map(|row| (span(row), store_of(row))).unzip();
    let positions = vec![position; count];
    let call = Call { ids: &ids, positions: &positions, spans: &spans, stores: &stores, adapters };
    let predicting: Vec<u32> = (0..count as u32).collect();
    let choice = |row: usize| match row % 3 {
        0 => Choice::Greedy,
        _ => Choice::Sample((row * 7 + position * 3) as f64 % 10.0 / 10.0),
    };
    let choices: Vec<Choice> = (0..count).map(choice).collect();
    let chosen = model.choose(&call, store, &predicting, &choices, model.logits(temperature)).unwrap();
    chosen.into_iter().map(|one| [one.token, one.logprob.to_bits(), one.untempered.to_bits()]).collect()
}

/// Steps of fewer and fewer sequences, with one adapter, two at once, another version and none: catches an address, a count or a
/// number that a graph keeps from the step that it was made of, and scratch that is read before it is written.
#[test]
fn steps_in_graphs_choose_what_steps_without_choose() {
    for folder in [Some(toy::model()), check::golden("tiny/gemma2")].into_iter().flatten() {
        let chosen = [false, true].map(|refused| {
            let (model, graphs) = open(&folder)?;
            graphs.refused.store(refused, Ordering::Relaxed);
            let (first, _) = adapter(&model, &folder.join("adapter_lora"));
            let mut second = first.clone();
            second.replace(first.tensors().unwrap().iter().map(|(_, tensor)| (tensor * -1.5).unwrap()).collect());
            let (one, two) = (Some(&first), Some(&second));
            let mut store = model.store(10 * ROWS).unwrap();
            let counts: [(usize, Adapters); 4] = [
                (4, &[(0..5, one), (5..10, two)]),
                (3, &[(0..8, one)]),
                (4, &[(0..3, two)]),
                (3, &[(0..1, None), (1..2, two)]),
            ];
            let shapes = counts.into_iter().flat_map(|(times, adapters)| std::iter::repeat_n(adapters, times));
            let chosen: Vec<_> = shapes
                .enumerate()
                .map(|(position, adapters)| step(&model, &mut store, position, adapters, 1.1))
                .collect();
            // The second version takes the first one's place in the graph of eight rows.
            let (replays, kept) = (model.gpu().unwrap().replays(), graphs.now());
            assert_eq!((replays, kept), if refused { (0, 0) } else { (3 + 2 + 4 + 2, 3) }, "{}", folder.display());
            Some(chosen)
        });
        let [Some(with), Some(without)] = chosen else { return };
        assert_eq!(with, without, "{}", folder.display());
    }
}

/// Graphs of shapes without end: catches a list that only grows, and memory that does not show.
#[test]
fn graphs_never_outnumber_their_bound() {
    let Some((model, graphs)) = open(&toy::model()) else { return };
    let mut store = model.store(1).unwrap();
    for temperature in 1..=40 {
        for _ in 0..2 {
            step(&model, &mut store, 0, &[(0..1, None)], f64::from(temperature));
        }
    }
    let (now, most) = (graphs.now(), graphs.most.load(Ordering::Relaxed));
    assert!((16..=32).contains(&now) && most <= 33, "{now} graphs, at most {most}");
    let gpu = model.gpu().unwrap().clone();
    let used = || Purpose::ALL.map(|(purpose, _)| gpu.used(purpose).0);
    assert!(used()[Purpose::Activations as usize] > 0, "what graphs use on the way is theirs");
    drop((model, store));
    assert_eq!((graphs.now(), used()), (0, [0; 5]), "they end with their model");
}

/// Catches a graph that outlives the keys or the adapter that it reads, and one that is used for others which lie where those lay.
#[test]
fn graphs_end_with_what_they_read() {
    let Some((model, graphs)) = open(&toy::model()) else { return };
    let of = |name: &str| adapter(&model, &toy::model().join(name)).0;
    let (small, large) = (of("adapter_lora"), of("adapter_lora_all_rs"));
    let mut store = model.store(1).unwrap();
    let twice = |store: &mut KeyValueStore, adapter: Option<&Adapter>| {
        let [first, second] = [(); 2].map(|()| step(&model, store, 0, &[(0..1, adapter)], 1.0));
        assert_eq!(first, second);
        (first, graphs.now())
    };
    let (base, kept) = twice(&mut store, None);
    assert_eq!(kept, 1);
    let (adapted, kept) = twice(&mut store, Some(&small));
    assert_eq!(kept, 2);
    assert_ne!(base, adapted);
    assert_eq!(twice(&mut store, Some(&large)).1, 2, "an adapter of another shape takes the place of the last");
    assert_eq!(twice(&mut store, Some(&small)), (adapted, 2));
    drop(store);
    let mut store = model.store(1).unwrap();
    assert_eq!(step(&model, &mut store, 0, &[(0..1, None)], 1.0), base);
    assert_eq!(graphs.now(), 0, "the keys are gone");
}

/// What cannot be part of a graph is refused with its name, and nothing is left behind.
#[test]
fn only_memory_kernels_and_products_are_recorded() {
    let Some((gpu, graphs)) = watched() else { return };
    let array = gpu.upload(Purpose::Head, &[1f32, 2.0]).unwrap();
    let room = || gpu.device().room().map(|room| room.free + room.slack).unwrap();
    let before = room();
    let kept = Mutex::new(None);
    let refused = |work: &dyn Fn(&Arc<Gpu>) -> Result<()>| {
        format!("{:#}", Graph::record(&gpu, &mut None, work).err().expect("it is refused"))
    };
    let upload = refused(&|gpu| gpu.upload(Purpose::Head, &[1f32]).map(drop));
    assert!(upload.contains("an upload cannot be part of a graph"), "{upload}");
    let download = refused(&|gpu| gpu.array::<f32>(Purpose::Head, 1)?.download().map(drop));
    assert!(download.contains("a download cannot be part of a graph"), "{download}");
    let outlives = refused(&|gpu| {
        *kept.lock().unwrap() = Some(gpu.array::<f32>(Purpose::Head, 1)?);
        Ok(())
    });
    assert!(outlives.contains("1 arrays of a graph are to outlive it"), "{outlives}");
    graphs.refused.store(true, Ordering::Relaxed);
    let device = refused(&|gpu| gpu.array::<f32>(Purpose::Head, 1).map(drop));
    assert!(device.contains("no graphs here"), "{device}");
    assert_eq!((array.download().unwrap(), graphs.now()), (vec![1.0, 2.0], 0));
    assert_eq!(room(), before);
}
