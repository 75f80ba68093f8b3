//! What computes, as the decoder sees it: memory, kernels and products in one order. The driver's is `driver.rs`; where there is no
//! GPU, tests put the same kernels, compiled for a processor, in its place.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};

pub use super::command::{Argument, Command, Launch, Operand, Product};

/// A device. All that is asked of it, by whichever thread, happens in the order in which it is asked: there is one stream.
pub trait Device: Send + Sync {
    /// Its name and number.
    fn name(&self) -> &str;
    /// How its memory is used.
    ///
    /// # Errors
    /// If the device fails.
    fn room(&self) -> Result<Room>;
    /// Memory whose content is anything, or nothing if there is not so much.
    ///
    /// # Errors
    /// If the device fails.
    fn allocate(&self, bytes: usize) -> Result<Option<u64>>;
    /// Gives memory back once what was asked before is done.
    fn release(&self, address: u64);
    /// Copies to the device.
    ///
    /// # Errors
    /// If the device fails.
    fn write(&self, to: u64, bytes: &[u8]) -> Result<()>;
    /// Copies from the device, and waits until that is done.
    ///
    /// # Errors
    /// If the device fails, also at something that was asked before.
    fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()>;
    /// Copies within the device.
    ///
    /// # Errors
    /// If the device fails.
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;
    /// Sets bytes to zero.
    ///
    /// # Errors
    /// If the device fails.
    fn zero(&self, at: u64, bytes: usize) -> Result<()>;
    /// Starts a kernel.
    ///
    /// # Errors
    /// If there is none of this name, or the device fails.
    fn launch(&self, kernel: &str, shape: Launch, arguments: &[Argument]) -> Result<()>;
    /// Multiplies.
    ///
    /// # Errors
    /// If the device fails.
    fn multiply(&self, product: &Product) -> Result<()>;
    /// Makes commands, which are not started, into a graph; its number.
    ///
    /// # Errors
    /// If the device cannot do that, or fails.
    fn record(&self, commands: &[Command]) -> Result<u64>;
    /// Starts a graph: what its commands do, in their order.
    ///
    /// # Errors
    /// If the device fails.
    fn replay(&self, graph: u64) -> Result<()>;
    /// Gives a graph back once what was asked before is done.
    fn forget(&self, graph: u64);
}

/// How a device's memory is used, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// All of it.
    pub total: usize,
    /// What nobody has.
    pub free: usize,
    /// What this process holds ready beyond what it uses.
    pub slack: usize,
}

/// Numbers that a device holds.
pub trait Number: Copy + Default + Send + Sync + 'static {}
impl Number for u8 {}
impl Number for u16 {}
impl Number for u32 {}
impl Number for i32 {}
impl Number for u64 {}
impl Number for f32 {}
impl Number for f64 {}

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Frozen weights.
    Base,
    /// Adapters, and the gradients and moments of one.
    Adapter,
    /// Keys and values of the sampler.
    Keys,
    /// What comes and goes in a pass.
    Activations,
    /// Logits.
    Head,
}

impl Purpose {
    /// All of them, with the names they have in metrics.
    pub const ALL: [(Self, &'static str); 5] = [
        (Self::Base, "base"),
        (Self::Adapter, "adapter"),
        (Self::Keys, "keys"),
        (Self::Activations, "activations"),
        (Self::Head, "head"),
    ];

    /// What to lower where there is no room for it.
    pub(super) fn remedy(self) -> &'static str {
        match self {
            Self::Base => "choose a smaller model, or set model.quantization = \"nf4\"",
            Self::Adapter => "lower lora.rank",
            Self::Keys => "lower batch.group, batch.prompts or the max_tokens",
            Self::Activations | Self::Head => "lower batch.micro_tokens",
        }
    }
}

/// A device and what of its memory is used for what.
pub struct Gpu {
    device: Box<dyn Device>,
    /// By [`Purpose`]: bytes now, and at most so far.
    used: [(AtomicUsize, AtomicUsize); 5],
    /// All together at most so far.
    most: AtomicUsize,
    replays: AtomicUsize,
    /// The plan of the run, for messages.
    plan: Mutex<Option<String>>,
}

impl Gpu {
    /// Around a device.
    pub fn new(device: Box<dyn Device>) -> Arc<Self> {
        let (most, replays) = Default::default();
        Arc::new(Self { device, used: Default::default(), most, replays, plan: Mutex::default() })
    }

    /// What computes.
    pub fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// What will be shown if memory runs out.
    pub fn set_plan(&self, plan: String) {
        *self.plan.lock().expect("nothing panics while it holds the plan") = Some(plan);
    }

    /// Bytes used for a purpose: now, and at most so far.
    pub fn used(&self, purpose: Purpose) -> (usize, usize) {
        let (now, most) = &self.used[purpose as usize];
        (now.load(Ordering::Relaxed), most.load(Ordering::Relaxed))
    }

    /// The most that each purpose took so far, and what is held ready, in bytes.
    ///
    /// # Errors
    /// If the device fails.
    pub fn shares(&self) -> Result<Vec<(&'static str, usize)>> {
        let shares = Purpose::ALL.into_iter().map(|(purpose, name)| (name, self.used(purpose).1));
        Ok(shares.chain([("slack", self.device.room()?.slack)]).collect())
    }

    /// What its memory is used for, in bytes: now and at most so far, and what is free or held ready; and [`Gpu::replays`].
    ///
    /// # Errors
    /// If the device fails.
    pub fn memory(&self) -> Result<serde_json::Value> {
        let Room { total, free, slack } = self.device.room()?;
        let mut all = serde_json::json!({ "name": self.device.name(), "total": total, "free": free, "slack": slack });
        for (purpose, name) in Purpose::ALL {
            let (now, most) = self.used(purpose);
            all[name] = serde_json::json!({ "now": now, "most": most });
        }
        all["most"] = serde_json::json!(self.most.load(Ordering::Relaxed));
        all["replays"] = serde_json::json!(self.replays());
        Ok(all)
    }

    /// Room for `len` numbers, whose values are left over from earlier uses.
    ///
    /// # Errors
    /// If there is not so much memory: the message has the plan, and what to lower.
    pub fn array<T: Number>(self: &Arc<Self>, purpose: Purpose, len: usize) -> Result<Array<T>> {
        let bytes = (len * size_of::<T>()).max(1);
        let Some(address) = self.device.allocate(bytes)? else { return Err(self.out_of_memory(purpose, bytes)?) };
        let (now, most) = &self.used[purpose as usize];
        most.fetch_max(now.fetch_add(bytes, Ordering::Relaxed) + bytes, Ordering::Relaxed);
        let all = self.used.iter().map(|(now, _)| now.load(Ordering::Relaxed)).sum();
        self.most.fetch_max(all, Ordering::Relaxed);
        Ok(Array { gpu: self.clone(), purpose, address, len, numbers: PhantomData })
    }

    fn out_of_memory(&self, purpose: Purpose, bytes: usize) -> Result<anyhow::Error> {
        let Room { total, free, slack } = self.device.room()?;
        let gigabytes = |bytes: usize| bytes as f64 / 1e9;
        let uses: Vec<String> = Purpose::ALL
            .into_iter()
            .map(|(purpose, name)| format!("{name} {:.2}", gigabytes(self.used(purpose).0)))
            .collect();
        let plan = self.plan.lock().expect("nothing panics while it holds the plan");
        let plan = plan.as_ref().map_or(String::new(), |plan| format!("\nthe plan was:\n{plan}"));
        Ok(anyhow::anyhow!(
            "{}: out of memory: {:.2} GB more for {} do not fit into {:.2} GB (free {:.2}, held ready {:.2}; {}); {}{plan}",
            self.device.name(),
            gigabytes(bytes),
            Purpose::ALL[purpose as usize].1,
            gigabytes(total),
            gigabytes(free),
            gigabytes(slack),
            uses.join(", "),
            purpose.remedy(),
        ))
    }

    /// Zeros.
    ///
    /// # Errors
    /// As [`Gpu::array`].
    pub fn zeros<T: Number>(self: &Arc<Self>, purpose: Purpose, len: usize) -> Result<Array<T>> {
        let array = self.array(purpose, len)?;
        self.device.zero(array.address, len * size_of::<T>())?;
        Ok(array)
    }

    /// These values.
    ///
    /// # Errors
    /// As [`Gpu::array`].
    pub fn upload<T: Number>(self: &Arc<Self>, purpose: Purpose, values: &[T]) -> Result<Array<T>> {
        let array = self.array(purpose, values.len())?;
        array.write(values)?;
        Ok(array)
    }

    /// Starts a kernel on a grid.
    ///
    /// # Errors
    /// If the device fails.
    pub fn launch(&self, kernel: &str, grid: [usize; 3], block: usize, arguments: &[Argument]) -> Result<()> {
        self.launch_with(kernel, Launch { grid, block, shared: 0 }, arguments)
    }

    /// The same with shared memory. A grid of nothing does nothing.
    ///
    /// # Errors
    /// If the device fails.
    pub fn launch_with(&self, kernel: &str, shape: Launch, arguments: &[Argument]) -> Result<()> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        if shape.grid[0] > i32::MAX as usize || shape.grid[1..].iter().any(|&blocks| blocks > 65535) {
            bail!("{kernel}: a grid of {:?} blocks is too large", shape.grid);
        }
        self.device.launch(kernel, shape, arguments)
    }

    /// Multiplies; a product of no rows or columns is nothing.
    ///
    /// # Errors
    /// If the device fails.
    pub fn multiply(&self, product: &Product) -> Result<()> {
        if product.m == 0 || product.n == 0 {
            return Ok(());
        }
        self.device.multiply(product)
    }

    /// Starts a graph.
    pub(super) fn replay(&self, graph: u64) -> Result<()> {
        self.replays.fetch_add(1, Ordering::Relaxed);
        self.device.replay(graph)
    }

    /// How many graphs were started so far.
    pub fn replays(&self) -> usize {
        self.replays.load(Ordering::Relaxed)
    }
}

/// Numbers in a device's memory.
pub struct Array<T> {
    gpu: Arc<Gpu>,
    purpose: Purpose,
    address: u64,
    len: usize,
    numbers: PhantomData<fn() -> T>,
}

/// Where numbers lie in a device's memory. They may be given back while a kernel that was started before still uses them.
pub struct View<T> {
    address: u64,
    numbers: PhantomData<fn() -> T>,
}

impl<T> Clone for View<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<T> {}

impl<T> View<T> {
    /// As the row-major operand of a product.
    pub fn plain(self) -> Operand {
        Operand { address: self.address, transposed: false }
    }

    /// As the operand whose rows are these columns.
    pub fn t(self) -> Operand {
        Operand { address: self.address, transposed: true }
    }

    /// The address.
    pub fn address(self) -> u64 {
        self.address
    }

    /// From the number of this index on.
    pub fn from(self, index: usize) -> Self {
        Self { address: self.address + (index * size_of::<T>()) as u64, numbers: PhantomData }
    }

    /// The same bytes as other numbers.
    pub fn cast<U>(self) -> View<U> {
        View { address: self.address, numbers: PhantomData }
    }
}

impl<T: Number> Array<T> {
    /// How many numbers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of them.
    pub fn view(&self) -> View<T> {
        View { address: self.address, numbers: PhantomData }
    }

    /// From the number of this index on.
    pub fn from(&self, index: usize) -> View<T> {
        assert!(index <= self.len, "a view begins inside its array");
        self.view().from(index)
    }

    /// The values, once all that was asked before is done.
    ///
    /// # Errors
    /// If the device fails.
    pub fn download(&self) -> Result<Vec<T>> {
        let mut values = vec![T::default(); self.len];
        self.gpu.device.read(self.address, bytes_of_mut(&mut values))?;
        Ok(values)
    }

    /// Replaces all values.
    ///
    /// # Errors
    /// If the device fails.
    pub fn write(&self, values: &[T]) -> Result<()> {
        assert_eq!(values.len(), self.len, "one value for each");
        self.gpu.device.write(self.address, bytes_of(values))
    }

    /// Replaces all values by others of the same device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn copy_from(&self, other: &Self) -> Result<()> {
        assert_eq!(other.len, self.len, "one value for each");
        self.gpu.device.copy(other.address, self.address, self.len * size_of::<T>())
    }

    /// Sets all to zero.
    ///
    /// # Errors
    /// If the device fails.
    pub fn clear(&self) -> Result<()> {
        self.gpu.device.zero(self.address, self.len * size_of::<T>())
    }
}

impl<T> Drop for Array<T> {
    fn drop(&mut self) {
        let bytes = (self.len * size_of::<T>()).max(1);
        self.gpu.used[self.purpose as usize].0.fetch_sub(bytes, Ordering::Relaxed);
        self.gpu.device.release(self.address);
    }
}

/// Numbers as bytes, in this machine's order.
pub fn bytes_of<T: Number>(values: &[T]) -> &[u8] {
    // SAFETY: a `Number` has no padding, and any byte may be read.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The same, to be written.
pub fn bytes_of_mut<T: Number>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are a `Number`.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}
