//! A device that is no GPU: kernels run as [`crate::cuda_on_host`] runs them, products are plain loops, memory is this process's.
//! Everything around the kernels is what runs on a GPU.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use candor::config::{Device as Where, Dtype};
use candor::cuda::Place;
use candor::cuda::device::{Argument, Command, Device, Gpu, Launch, Operand, Product, Room};

use crate::check;
use crate::cuda_on_host::{self, File, Kernels, TURNS};

/// Kernels whose elements any number of blocks may share; names that others begin with end in `_`.
const SHARED: [&str; 7] = ["round_rows", "adapter_parts", "adamw", "gate", "gate_backward", "rope_tables", "unpack_"];

pub struct OnHost {
    files: Vec<&'static Kernels>,
    /// By address; what is not written yet is no number.
    memory: Mutex<BTreeMap<u64, Vec<u128>>>,
    total: usize,
    graphs: Mutex<Vec<Option<Vec<Command>>>>,
}

/// The first GPU where `CANDOR_TEST_GPU` is set, else this processor in place of one.
pub fn gpu() -> Option<Arc<Gpu>> {
    if std::env::var_os("CANDOR_TEST_GPU").is_none() {
        return on_host(1 << 28);
    }
    Place::choose(Where::Cuda(0), Dtype::Auto, None).unwrap().gpu
}

/// A GPU of so much memory, or `None` after saying loudly that there is no compiler for it.
pub fn on_host(total: usize) -> Option<Arc<Gpu>> {
    if !cfg!(all(target_arch = "x86_64", unix)) {
        check::skipped("the decoder on a device: only x86-64's calls are known here");
        return None;
    }
    let all = [File::Elementwise, File::Attention, File::AttentionBackward, File::Head, File::Quantized];
    let files = all.map(Kernels::of).into_iter().collect::<Option<Vec<_>>>()?;
    Some(Gpu::new(Box::new(OnHost { files, memory: Mutex::default(), total, graphs: Mutex::default() })))
}

impl OnHost {
    /// The address, if so many bytes from there on belong to one array.
    fn inside(&self, address: u64, bytes: usize) -> Result<()> {
        let memory = self.memory.lock().unwrap();
        let (start, array) = memory.range(..=address).next_back().context("there is no memory at this address")?;
        let end = start + size_of_val(&array[..]) as u64;
        ensure!(address + bytes as u64 <= end, "{bytes} bytes at {address:x} are outside of their array");
        Ok(())
    }
}

impl Device for OnHost {
    fn name(&self) -> &str {
        "a processor in place of a GPU"
    }

    fn room(&self) -> Result<Room> {
        let used: usize = self.memory.lock().unwrap().values().map(|array| size_of_val(&array[..])).sum();
        Ok(Room { total: self.total, free: self.total - used, slack: 0 })
    }

    fn allocate(&self, bytes: usize) -> Result<Option<u64>> {
        if bytes > self.room()?.free {
            return Ok(None);
        }
        let array = vec![u128::MAX; bytes.div_ceil(16)];
        let address = array.as_ptr() as u64;
        self.memory.lock().unwrap().insert(address, array);
        Ok(Some(address))
    }

    fn release(&self, address: u64) {
        self.memory.lock().unwrap().remove(&address).expect("it was allocated");
    }

    fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.inside(to, bytes.len())?;
        // SAFETY: inside an array by the check.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.inside(from, bytes.len())?;
        // SAFETY: inside an array by the check.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.inside(from, bytes)?;
        self.inside(to, bytes)?;
        // SAFETY: inside arrays by the checks.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        self.inside(at, bytes)?;
        // SAFETY: inside an array by the check.
        unsafe { std::ptr::write_bytes(at as *mut u8, 0, bytes) };
        Ok(())
    }

    fn launch(&self, kernel: &str, shape: Launch, arguments: &[Argument]) -> Result<()> {
        let file = self.files.iter().find(|file| file.has(kernel)).with_context(|| format!("no kernel {kernel}"))?;
        for argument in arguments {
            if let Argument::Pointer(address @ 1..) = argument {
                self.inside(*address, 0).with_context(|| kernel.to_string())?;
            }
        }
        // Every thread of it takes time: where blocks share elements, one block has them all.
        let shared = |name: &str| kernel == name || name.ends_with('_') && kernel.starts_with(name);
        let grid = if SHARED.into_iter().any(shared) { [1; 3] } else { shape.grid };
        let shape = cuda_on_host::Launch { grid, threads: shape.block, shared_bytes: shape.shared, turns: TURNS[0] };
        let (whole, floats) = registers(arguments);
        // SAFETY: see `Any`.
        let function: Any = unsafe { file.function(kernel) };
        // SAFETY: as above; addresses are those of arrays, which the decoder keeps while kernels use them.
        file.launch(shape, || unsafe {
            let ([a, b, c, d, e, f, s @ ..], [p, q, r, t, u, v, w, x]) = (whole, floats);
            let [s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11] = s;
            function(a, b, c, d, e, f, p, q, r, t, u, v, w, x, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11);
        });
        Ok(())
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        let Product { a, b, c, m, n, k, add, scale, floats } = *product;
        let bytes = if floats { 4 } else { 2 };
        self.inside(a.address, m * k * bytes)?;
        self.inside(b.address, k * n * bytes)?;
        self.inside(c, m * n * 4)?;
        let (a, b) = (numbers(a, [m, k], floats), numbers(b, [k, n], floats));
        for row in 0..m {
            for column in 0..n {
                let sum: f32 = (0..k).map(|i| a[row * k + i] * b[i * n + column]).sum();
                let to = (c as *mut f32).wrapping_add(row * n + column);
                // SAFETY: inside an array by the check above.
                unsafe { *to = scale * sum + if add { *to } else { 0.0 } };
            }
        }
        Ok(())
    }

    fn record(&self, commands: &[Command]) -> Result<u64> {
        let mut graphs = self.graphs.lock().unwrap();
        graphs.push(Some(commands.to_vec()));
        Ok(graphs.len() as u64 - 1)
    }

    fn replay(&self, graph: u64) -> Result<()> {
        let commands = self.graphs.lock().unwrap()[graph as usize].clone().context("the graph was forgotten")?;
        commands.iter().try_for_each(|command| match command {
            Command::Launch(kernel, shape, arguments) => self.launch(kernel, *shape, arguments),
            Command::Multiply(product) => self.multiply(product),
        })
    }

    fn forget(&self, graph: u64) {
        self.graphs.lock().unwrap()[graph as usize].take().expect("a graph is forgotten once");
    }
}

/// The numbers of an operand, row by row.
fn numbers(Operand { address, transposed }: Operand, [rows, columns]: [usize; 2], floats: bool) -> Vec<f32> {
    let at = |index: usize| {
        // SAFETY: the caller has found out that they are inside an array.
        unsafe {
            if floats {
                *(address as *const f32).add(index)
            } else {
                f32::from_bits(u32::from(*(address as *const u16).add(index)) << 16)
            }
        }
    };
    let of = |row: usize, column: usize| if transposed { at(column * rows + row) } else { at(row * columns + column) };
    (0..rows)
        .flat_map(|row| (0..columns).map(move |column| (row, column)))
        .map(|(row, column)| of(row, column))
        .collect()
}

/// Any kernel: System V's calls for x86-64 put the first six whole numbers and pointers into registers, up to eight floats into
/// others whatever lies between them, and what is left of the former on the stack in order, eight bytes each.
#[rustfmt::skip]
type Any = unsafe extern "C" fn(
    u64, u64, u64, u64, u64, u64, f64, f64, f64, f64, f64, f64, f64, f64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64, u64,
);

fn registers(arguments: &[Argument]) -> ([u64; 18], [f64; 8]) {
    let ((mut whole, mut wholes), (mut floats, mut counted)) = (([0; 18], 0), ([0.0; 8], 0));
    for argument in arguments {
        let bits = match *argument {
            Argument::Pointer(value) | Argument::Long(value) => (Some(value), 0.0),
            Argument::Int(value) => (Some(value as u32 as u64), 0.0),
            Argument::Float(value) => (None, f64::from_bits(u64::from(value.to_bits()))),
            Argument::Double(value) => (None, value),
        };
        match bits {
            (Some(value), _) => (whole[wholes], wholes) = (value, wholes + 1),
            (None, value) => (floats[counted], counted) = (value, counted + 1),
        }
    }
    (whole, floats)
}
