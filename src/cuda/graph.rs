//! Work that is written down once and started as one from then on: a graph.
//!
//! The decoder runs as ever, on a [`Device`] that writes down kernels and products instead of starting them. What it allocates on the
//! way are places in one range of memory, which belongs to the graph: kernels find it where they did when they were written down, and
//! as there is one stream, graphs can share it. Graphs that allocate for themselves would map memory at each start and keep as
//! much that no count of ours shows.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Result, bail, ensure};

use super::device::{Argument, Array, Command, Device, Gpu, Launch, Product, Purpose, Room};

/// Kernels and products that a device starts as one.
pub struct Graph {
    gpu: Arc<Gpu>,
    id: u64,
    /// What they use on the way.
    _scratch: Arc<Array<u8>>,
}

impl Graph {
    /// Of what `work` asks of the GPU that it is given. The values that it uploads, reads or keeps must have their places before. `scratch`
    /// is replaced if it is too small.
    ///
    /// # Errors
    /// If `work` asks for anything but memory, kernels and products or keeps memory, or the device fails.
    pub fn record(
        gpu: &Arc<Gpu>,
        scratch: &mut Option<Arc<Array<u8>>>,
        work: impl Fn(&Arc<Gpu>) -> Result<()>,
    ) -> Result<Self> {
        // What it needs is known when it was written down.
        let (needed, _) = written(0, &work)?;
        let scratch = match scratch.take().filter(|scratch| scratch.len() >= needed) {
            Some(large) => scratch.insert(large),
            None => scratch.insert(Arc::new(gpu.array(Purpose::Activations, needed)?)),
        };
        let (_, commands) = written(scratch.view().address(), &work)?;
        Ok(Self { gpu: gpu.clone(), id: gpu.device().record(&commands)?, _scratch: scratch.clone() })
    }

    /// Starts it.
    ///
    /// # Errors
    /// If the device fails.
    pub fn replay(&self) -> Result<()> {
        self.gpu.replay(self.id)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.gpu.device().forget(self.id);
    }
}

/// What `work` asks for, and the bytes from `start` on that it uses.
fn written(start: u64, work: impl Fn(&Arc<Gpu>) -> Result<()>) -> Result<(usize, Vec<Command>)> {
    let notes = Arc::new(Mutex::new(Notes { start, end: start, ..Notes::default() }));
    work(&Gpu::new(Box::new(Recorder(notes.clone()))))?;
    let Notes { live, end, commands, .. } = std::mem::take(&mut *locked(&notes));
    ensure!(live.is_empty(), "{} arrays of a graph are to outlive it", live.len());
    Ok(((end - start) as usize, commands))
}

#[derive(Default)]
struct Notes {
    start: u64,
    /// Where what is allocated begins and ends.
    live: BTreeMap<u64, u64>,
    /// The end of all that was ever allocated.
    end: u64,
    commands: Vec<Command>,
}

/// Bytes that every allocation of a GPU is a multiple of, as cuBLAS would have it.
const ALIGNMENT: u64 = 256;

/// A device that writes down what it is asked.
struct Recorder(Arc<Mutex<Notes>>);

fn locked(notes: &Mutex<Notes>) -> MutexGuard<'_, Notes> {
    notes.lock().expect("nothing panics while it holds the notes")
}

fn refused<T>(what: &str) -> Result<T> {
    bail!("{what} cannot be part of a graph")
}

impl Device for Recorder {
    fn name(&self) -> &str {
        "a graph"
    }

    fn room(&self) -> Result<Room> {
        refused("asking for room")
    }

    /// The first gap that is large enough.
    fn allocate(&self, bytes: usize) -> Result<Option<u64>> {
        let Notes { start, live, end, .. } = &mut *locked(&self.0);
        let (mut at, bytes) = (*start, (bytes as u64).next_multiple_of(ALIGNMENT));
        for (&next, &after) in live.iter() {
            if next - at >= bytes {
                break;
            }
            at = after;
        }
        live.insert(at, at + bytes);
        *end = (*end).max(at + bytes);
        Ok(Some(at))
    }

    fn release(&self, address: u64) {
        locked(&self.0).live.remove(&address);
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<()> {
        refused("an upload")
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<()> {
        refused("a download")
    }

    fn copy(&self, _: u64, _: u64, _: usize) -> Result<()> {
        refused("a copy")
    }

    fn zero(&self, _: u64, _: usize) -> Result<()> {
        refused("setting to zero")
    }

    fn launch(&self, kernel: &str, shape: Launch, arguments: &[Argument]) -> Result<()> {
        locked(&self.0).commands.push(Command::Launch(kernel.to_string(), shape, arguments.to_vec()));
        Ok(())
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        locked(&self.0).commands.push(Command::Multiply(*product));
        Ok(())
    }

    fn record(&self, _: &[Command]) -> Result<u64> {
        refused("a graph")
    }

    fn replay(&self, _: u64) -> Result<()> {
        refused("a graph")
    }

    fn forget(&self, _: u64) {}
}
