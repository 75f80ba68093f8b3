//! The kernels of src/cuda without a GPU: the same text, compiled by a C++ compiler with tests/data/cuda_on_host.h, and called
//! from here.

use std::ffi::{CString, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

use crate::check;
use crate::ops::{floats, random, same};

/// A file of kernels.
#[derive(Clone, Copy, Debug)]
pub enum File {
    Elementwise,
    Attention,
    AttentionBackward,
    Head,
    Quantized,
}

impl File {
    fn name(self) -> &'static str {
        match self {
            File::Elementwise => "elementwise",
            File::Attention => "attention",
            File::AttentionBackward => "attention_backward",
            File::Head => "head",
            File::Quantized => "quantized",
        }
    }
}

/// The order in which threads of a block take their turns. What a kernel computes must not depend on it.
#[derive(Clone, Copy, Debug)]
pub enum Turns {
    Forward,
    Backward,
}

pub const TURNS: [Turns; 2] = [Turns::Forward, Turns::Backward];

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub grid: [usize; 3],
    pub threads: usize,
    pub shared_bytes: usize,
    pub turns: Turns,
}

/// A grid of one dimension without dynamic shared memory.
pub fn blocks(count: usize, threads: usize, turns: Turns) -> Launch {
    Launch { grid: [count, 1, 1], threads, shared_bytes: 0, turns }
}

type Body = unsafe extern "C" fn(*mut c_void);
type LaunchFunction = unsafe extern "C" fn(*const c_uint, c_uint, usize, c_int, Body, *mut c_void) -> c_int;

/// A compiled file of kernels.
pub struct Kernels(*mut c_void);

// SAFETY: a handle of dlopen may be used by any thread, and what the kernels share within a block is per thread.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// The kernels of a file, compiled when they are first asked for; `None` after saying loudly that there is no compiler.
    pub fn of(file: File) -> Option<&'static Self> {
        static COMPILED: [OnceLock<Option<Kernels>>; 5] = [const { OnceLock::new() }; 5];
        COMPILED[file as usize].get_or_init(|| open(file.name())).as_ref()
    }

    /// The function of this name.
    ///
    /// # Safety
    /// F must be the type of a pointer to such a function.
    pub unsafe fn function<F: Copy>(&self, name: &str) -> F {
        let c_name = CString::new(name).unwrap();
        // SAFETY: the handle is never closed.
        let function = unsafe { libc::dlsym(self.0, c_name.as_ptr()) };
        assert!(!function.is_null(), "there is no kernel {name}");
        assert_eq!(size_of::<F>(), size_of_val(&function));
        // SAFETY: as the caller says.
        unsafe { std::mem::transmute_copy(&function) }
    }

    /// Whether there is a kernel of this name.
    pub fn has(&self, name: &str) -> bool {
        let c_name = CString::new(name).unwrap();
        // SAFETY: the handle is never closed.
        !unsafe { libc::dlsym(self.0, c_name.as_ptr()) }.is_null()
    }

    /// Calls `thread` once for every thread of a grid.
    pub fn launch<F: FnMut()>(&self, launch: Launch, mut thread: F) {
        unsafe extern "C" fn body<F: FnMut()>(thread: *mut c_void) {
            // SAFETY: it is the closure below, which nobody else uses.
            unsafe { (*thread.cast::<F>())() }
        }
        let Launch { grid, threads, shared_bytes, turns } = launch;
        let grid = grid.map(|blocks| blocks as c_uint);
        // SAFETY: this is its type in cuda_on_host.h; kernels are given what they ask for by the tests.
        let failed = unsafe {
            let function: LaunchFunction = self.function("launch");
            function(
                grid.as_ptr(),
                threads as c_uint,
                shared_bytes,
                turns as c_int,
                body::<F>,
                (&raw mut thread).cast(),
            )
        };
        assert_eq!(failed, 0, "{launch:?}: threads wait for each other for ever");
    }
}

fn sources(name: &str) -> [PathBuf; 4] {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cuda = root.join("src/cuda");
    [
        root.join("tests/data/cuda_on_host.h"),
        cuda.join("common.cuh"),
        cuda.join("tiles.cuh"),
        cuda.join(format!("{name}.cu")),
    ]
}

fn open(name: &str) -> Option<Kernels> {
    let sources = sources(name);
    let mut hash = Sha256::new();
    sources.iter().for_each(|path| hash.update(std::fs::read(path).unwrap()));
    let hash: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda-{name}-{hash}.so"));
    if !library.exists() {
        compile(&sources, &library)?;
    }
    let path = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: what the library does when it is loaded is the C++ runtime's.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null(), "{} cannot be loaded", library.display());
    Some(Kernels(handle))
}

/// Products are not fused with sums, as on the CPU. Written beside its place and renamed: other test runs may look for it.
fn compile([on_host, common, tiles, kernels]: &[PathBuf; 4], library: &Path) -> Option<()> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let part = library.with_extension(format!("{}.part", std::process::id()));
    let mut command = Command::new(&compiler);
    command.args([
        "-x",
        "c++",
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        "-U_FORTIFY_SOURCE",
        "-fPIC",
        "-shared",
        "-w",
    ]);
    for header in [on_host, common, tiles] {
        command.arg("-include").arg(header);
    }
    let output = match command.arg(kernels).arg("-o").arg(&part).output() {
        Ok(output) => output,
        Err(error) => {
            check::skipped(format!("the kernels of src/cuda: no C++ compiler ({compiler}: {error}); set CXX"));
            return None;
        }
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(part, library).unwrap();
    Some(())
}

/// What a kernel can be given, as it sees it.
pub trait Argument {
    type Raw;
    fn raw(self) -> Self::Raw;
}

impl<T> Argument for &[T] {
    type Raw = *const T;
    fn raw(self) -> *const T {
        self.as_ptr()
    }
}

impl<T> Argument for &mut [T] {
    type Raw = *mut T;
    fn raw(self) -> *mut T {
        self.as_mut_ptr()
    }
}

/// Nothing, or memory that is both read and written.
impl<T> Argument for *mut T {
    type Raw = *mut T;
    fn raw(self) -> *mut T {
        self
    }
}

macro_rules! plain {
    ($($kind:ty)*) => {$(
        impl Argument for $kind {
            type Raw = $kind;
            fn raw(self) -> $kind {
                self
            }
        }
    )*};
}

plain!(i32 i64 u64 f32 f64);

/// `run!(kernels, launch, name(arguments))` runs a kernel over a grid.
macro_rules! run {
    ($kernels:expr, $launch:expr, $name:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: the arguments are those that the kernel's file lists, which the types of slices and numbers say in part.
        let kernel = unsafe { $kernels.function::<unsafe extern "C" fn($(run!(@inferred $argument)),*)>(stringify!($name)) };
        // SAFETY: as above.
        $kernels.launch($launch, || unsafe { kernel($($crate::cuda_on_host::Argument::raw($argument)),*) });
    }};
    (@inferred $argument:expr) => { _ };
}
pub(crate) use run;

/// Independent values of variance 1.
pub fn numbers(seed: u64, count: usize) -> Vec<f32> {
    floats(&random(seed, (1, count)))
}

/// The bits of values rounded to bf16, as candle rounds them.
pub fn rounded(values: &[f32]) -> Vec<u16> {
    let values = Tensor::new(values, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    floats(&values).into_iter().map(|x| (x.to_bits() >> 16) as u16).collect()
}

/// The values of bits.
pub fn widened(bits: &[u16]) -> Vec<f32> {
    bits.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect()
}

/// What is behind the numbers that a kernel may write.
const UNTOUCHED: f32 = 12345.0;

/// Room for `count` numbers, which say whether they were not written, and some more that must not be.
pub fn room(count: usize) -> Vec<f32> {
    let mut room = vec![f32::NAN; count];
    room.extend([UNTOUCHED; 9]);
    room
}

/// The first numbers of a room, behind which nothing was written.
#[track_caller]
pub fn written(room: &[f32]) -> &[f32] {
    let (written, behind) = room.split_at(room.len() - 9);
    assert!(behind.iter().all(|&x| x == UNTOUCHED), "written behind the end");
    written
}

/// Every difference is small beside the largest wanted value.
#[track_caller]
pub fn alike(name: &str, got: &[f32], want: &[f32], tolerance: f64) {
    let wide = |values: &[f32]| values.iter().copied().map(f64::from).collect::<Vec<f64>>();
    same(name, &wide(got), &wide(want), tolerance);
}
