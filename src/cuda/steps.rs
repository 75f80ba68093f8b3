//! Decoding steps: a shape of step that comes again is started as one graph. Hundreds of kernels, each started by itself, take longer
//! to start than to run.

use std::ops::Range;
use std::sync::{Arc, Weak};

use anyhow::Result;

use super::call::Applied;
use super::decoder::KeyStores;
use super::device::{Array, Gpu, Purpose, View};
use super::factors::Factors;
use super::graph::Graph;
use crate::ops::head::Logits;

/// Shapes that are known at once; those not seen for longest are forgotten.
const KNOWN: usize = 32;

/// Rows of a step of so many sequences: few shapes serve all numbers that are left as sequences end. Weights are read once whatever
/// the rows are, so that up to an eighth more costs little.
pub fn filled(rows: usize) -> usize {
    rows.next_multiple_of((rows.next_power_of_two() / 8).max(8))
}

/// What a step's kernels and their arguments follow from. What it does not own may be gone, and nothing that came after is taken for it.
pub struct Shape {
    rows: usize,
    logits: Logits,
    keys: Weak<KeyStores>,
    adapters: Vec<(Range<usize>, Option<Weak<Factors>>)>,
}

impl Shape {
    pub fn new(rows: usize, logits: Logits, keys: &Arc<KeyStores>, adapters: &Applied) -> Self {
        let adapters = adapters.iter().map(|(rows, factors)| (rows.clone(), factors.as_ref().map(Arc::downgrade)));
        Self { rows, logits, keys: Arc::downgrade(keys), adapters: adapters.collect() }
    }

    /// Weak references keep what comes later from lying at the same addresses.
    fn identity(&self) -> impl PartialEq + use<> {
        let adapters = self.adapters.iter().map(|(rows, factors)| (rows.clone(), factors.as_ref().map(Weak::as_ptr)));
        (self.rows, self.logits, self.keys.as_ptr(), adapters.collect::<Vec<_>>())
    }

    fn is_there(&self) -> bool {
        let mut adapters = self.adapters.iter().filter_map(|(_, factors)| factors.as_ref());
        self.keys.strong_count() > 0 && adapters.all(|factors| factors.strong_count() > 0)
    }
}

/// A graph, and where its input and output lie.
struct Step {
    graph: Graph,
    input: Arc<Array<u8>>,
    output: Array<u32>,
}

/// What a step does on a GPU, given where its input and output lie.
pub type Work<'a> = &'a dyn Fn(&Arc<Gpu>, &Arc<Array<u8>>, View<u32>) -> Result<()>;

/// A copy of an adapter at a place that stays when other versions come, so that graphs serve them all.
struct Seat {
    of: Weak<Factors>,
    copy: Arc<Factors>,
}

/// Steps that were seen, the latest last, with their graphs from the second time on: the first has loaded the kernels.
#[derive(Default)]
pub struct Steps {
    seen: Vec<(Shape, Option<Step>)>,
    /// For the first adapter of a step, the second, and so on.
    seats: Vec<Seat>,
    scratch: Option<Arc<Array<u8>>>,
    /// Whether graphs have failed here.
    failed: bool,
}

impl Steps {
    /// Replaces the adapters of a step by their copies in the seats.
    pub fn seat(&mut self, gpu: &Arc<Gpu>, adapters: &mut Applied) -> Result<()> {
        let mut seated: Vec<Weak<Factors>> = Vec::new();
        for factors in adapters.iter_mut().filter_map(|(_, factors)| factors.as_mut()) {
            let of = Arc::downgrade(factors);
            let place = seated.iter().position(|other| other.ptr_eq(&of)).unwrap_or_else(|| {
                seated.push(of.clone());
                seated.len() - 1
            });
            let taken = match self.seats.get_mut(place) {
                None => false,
                Some(seat) => seat.of.ptr_eq(&of) || seat.copy.replace(factors)?,
            };
            if !taken {
                self.seats.truncate(place);
                self.seats.push(Seat { of: of.clone(), copy: Arc::new(factors.copied(gpu)?) });
            }
            let seat = &mut self.seats[place];
            (seat.of, *factors) = (of, seat.copy.clone());
        }
        Ok(())
    }

    /// Runs a step with an input of these bytes; its output of `count` numbers.
    pub fn run(
        &mut self,
        gpu: &Arc<Gpu>,
        shape: Shape,
        (bytes, count): (&[u8], usize),
        work: Work,
    ) -> Result<Vec<u32>> {
        self.seen.retain(|(shape, _)| shape.is_there());
        let place = self.seen.iter().position(|(seen, _)| seen.identity() == shape.identity());
        let step = match place.map(|place| self.seen.remove(place).1) {
            Some(None) => self.record(gpu, (bytes.len(), count), work),
            known => known.flatten(),
        };
        let output = match &step {
            None => once(gpu, (bytes, count), work),
            Some(Step { graph, input, output }) => {
                input.write(bytes)?;
                graph.replay()?;
                output.download()
            }
        };
        self.seen.push((shape, step));
        self.seen.drain(..self.seen.len().saturating_sub(KNOWN));
        output
    }

    /// A graph saves time and nothing else: where there can be none, steps are started as they were.
    fn record(&mut self, gpu: &Arc<Gpu>, lens: (usize, usize), work: Work) -> Option<Step> {
        if self.failed {
            return None;
        }
        let before = self.scratch.as_ref().map(|scratch| scratch.view().address());
        let step = self.try_record(gpu, lens, work);
        if self.scratch.as_ref().map(|scratch| scratch.view().address()) != before {
            // They would keep the smaller one.
            self.seen.iter_mut().for_each(|(_, step)| *step = None);
        }
        step.inspect_err(|error| {
            self.failed = true;
            tracing::warn!("{}: decoding steps are not started as graphs: {error:#}", gpu.device().name());
        })
        .ok()
    }

    fn try_record(&mut self, gpu: &Arc<Gpu>, (bytes, count): (usize, usize), work: Work) -> Result<Step> {
        let input = Arc::new(gpu.array(Purpose::Activations, bytes)?);
        let output: Array<u32> = gpu.array(Purpose::Activations, count)?;
        let graph = Graph::record(gpu, &mut self.scratch, |gpu| work(gpu, &input, output.view()))?;
        Ok(Step { graph, input, output })
    }
}

/// Runs work by itself.
pub fn once(gpu: &Arc<Gpu>, (bytes, count): (&[u8], usize), work: Work) -> Result<Vec<u32>> {
    let input = Arc::new(gpu.upload(Purpose::Activations, bytes)?);
    let output = gpu.array(Purpose::Activations, count)?;
    work(gpu, &input, output.view())?;
    output.download()
}
