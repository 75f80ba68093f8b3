//! Decoding steps in graphs: the same to the bit as without, and graphs that end with what they use.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};
use candor::cuda::device::{Argument, Device, Gpu, Launch, Product, Purpose, Room};
use candor::cuda::graph::{Command, Graph};
use candor::model::{Call, KeyValueStore, Model, Weights};
use candor::ops::attention::Span;
use candor::ops::head::{Choice, Chosen};
use candor::ops::keys::Store;
use candor::policy::Adapter;
use candor::sampler::local::LocalSampler;
use candor::sampler::{PolicyFeed, Settings};
use candor::tokenizer::Tokenizer;

use crate::cuda_device::gpu;
use crate::learner::golden_adapters;
use crate::model::adapter;
use crate::sampler::{all, request, settings};
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
        let now = self.graphs.now.fetch_add(1, Ordering::Relaxed) + 1;
        self.graphs.most.fetch_max(now, Ordering::Relaxed);
        self.inner.device().record(commands)
    }

    fn replay(&self, graph: u64) -> Result<()> {
        self.inner.device().replay(graph)
    }

    fn forget(&self, graph: u64) {
        self.graphs.now.fetch_sub(1, Ordering::Relaxed);
        self.inner.device().forget(graph);
    }
}

/// A model of the toy's shape on a watched device, and two adapters of it.
fn open(folder: &PathBuf) -> Option<(Model, Arc<Graphs>)> {
    let (gpu, graphs) = watched()?;
    Some((Model::load_on(&gpu, &Weights::open(folder).unwrap(), None).unwrap(), graphs))
}

/// Another adapter for every group that is admitted.
struct Alternating(Mutex<Vec<Arc<Adapter>>>);

impl PolicyFeed for Alternating {
    fn newest(&self) -> Option<Arc<Adapter>> {
        let mut adapters = self.0.lock().unwrap();
        adapters.rotate_left(1);
        adapters.first().cloned()
    }

    fn stopped(&self) -> bool {
        false
    }
}

/// Several batches one after the other, of which sequences end at different times, with one adapter and with two at once: catches an
/// address, a count or a number that a graph keeps from the step that it was made of, and scratch that is read before it is
/// written.
#[test]
fn steps_in_graphs_choose_what_steps_without_choose() {
    for (folder, name) in golden_adapters() {
        let sampled = [false, true].map(|refused| {
            let (model, graphs) = open(&folder)?;
            graphs.refused.store(refused, Ordering::Relaxed);
            let (first, _) = adapter(&model, &folder.join(format!("adapter_{name}")));
            let second = first.publish(1);
            let (model, tokenizer) = (Arc::new(model), Arc::new(Tokenizer::from_folder(&folder).unwrap()));
            let mut sampler = LocalSampler::new(model.clone(), tokenizer);
            let versions = Alternating(Mutex::new([first, second].map(Arc::new).into()));
            let requests = [request(1, 12, 3), request(2, 3, 2), request(3, 5, 5)];
            let of = |step| Settings { step, ..settings(14, 1.1) };
            let batches = (0..3).map(|step| all(&mut sampler, &requests, &versions, &of(step)).unwrap());
            let mut sampled: Vec<_> = batches.collect();
            sampled.push(all(&mut sampler, &requests, &None, &of(3)).unwrap());
            let replays = model.gpu().unwrap().replays();
            assert_eq!(replays == 0, refused, "{name}: {replays} graphs were started");
            let bits = |logprobs: &[f32]| logprobs.iter().map(|logprob| logprob.to_bits()).collect::<Vec<_>>();
            let one = |one: candor::sampler::Generation| (one.ids, bits(&one.behavior_t), bits(&one.untempered_t));
            Some(sampled.into_iter().flatten().map(one).collect::<Vec<_>>())
        });
        let [Some(with), Some(without)] = sampled else { return };
        assert_eq!(with, without, "{} {name}", folder.display());
    }
}

/// What one sequence chooses next, as a sampler would ask.
fn step(model: &Model, store: &mut KeyValueStore, adapter: Option<&Adapter>, temperature: f64) -> Chosen {
    let spans = [Span { queries: 0..1, prefix: 0..0, own: 0..1 }];
    let (stores, adapters) = ([Store { from: 0..1, to: 0 }], [(0..1, adapter)]);
    let call = Call { ids: &[7], positions: &[0], spans: &spans, stores: &stores, adapters: &adapters };
    model.choose(&call, store, &[0], &[Choice::Greedy], model.logits(temperature)).unwrap()[0]
}

/// Graphs of shapes without end: catches a list that only grows.
#[test]
fn graphs_never_outnumber_their_bound() {
    let Some((model, graphs)) = open(&toy::model()) else { return };
    let mut store = model.store(1).unwrap();
    for temperature in 1..=40 {
        for _ in 0..2 {
            step(&model, &mut store, None, f64::from(temperature));
        }
    }
    let (now, most) = (graphs.now(), graphs.most.load(Ordering::Relaxed));
    assert!((16..=32).contains(&now) && most <= 33, "{now} graphs, at most {most}");
    drop((model, store));
    assert_eq!(graphs.now(), 0, "they end with their model");
}

/// Catches a graph that outlives the keys or the adapter that it reads, and one that is used for others which lie where those lay.
#[test]
fn graphs_end_with_what_they_read() {
    let Some((model, graphs)) = open(&toy::model()) else { return };
    let (mut stores, adapter_folder) =
        ([(); 2].map(|()| model.store(1).unwrap()).into_iter(), toy::model().join("adapter_lora"));
    let mut store = stores.next().unwrap();
    let twice = |store: &mut KeyValueStore, adapter: Option<&Adapter>| {
        [(); 2].map(|()| step(&model, store, adapter, 1.0).logprob.to_bits())
    };
    let base = twice(&mut store, None);
    let adapted = {
        let (adapter, _) = adapter(&model, &adapter_folder);
        twice(&mut store, Some(&adapter))
    };
    assert_eq!(graphs.now(), 2);
    assert_ne!(base[0], adapted[0]);
    assert_eq!(twice(&mut store, None), base);
    assert_eq!(graphs.now(), 1, "the adapter is gone");
    drop(store);
    let mut store = stores.next().unwrap();
    assert_eq!(step(&model, &mut store, None, 1.0).logprob.to_bits(), base[0]);
    assert_eq!(graphs.now(), 0, "the keys are gone");
}

/// What cannot be part of a graph is refused with its name, and nothing is left behind.
#[test]
fn only_memory_kernels_and_products_are_recorded() {
    let Some((gpu, graphs)) = watched() else { return };
    let array = gpu.upload(Purpose::Head, &[1f32, 2.0]).unwrap();
    let free = gpu.device().room().unwrap().free;
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
    check::close("free memory", gpu.device().room().unwrap().free as f64, free as f64, 0.0);
}
