//! An NVIDIA GPU through CUDA's driver, NVRTC and cuBLAS, which are looked for when a GPU is asked for: the program starts without
//! them.
//!
//! One stream of our own, which threads share: what they ask for happens in the order of their calls. Memory comes from the device's
//! pool in the same order. Kernels are compiled for this very GPU, once: what NVRTC makes of them is kept on disk. Graphs are
//! captured on another stream, on which nothing ever runs, so that other threads go on meanwhile.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use cudarc::driver::{result, sys};
use cudarc::{cublas, nvrtc};
use sha2::{Digest, Sha256};

use super::device::{Argument, Command, Device, Launch, Operand, Product, Room};
use super::kernels::SOURCES;
use crate::source::Cache;

/// Shared memory that a kernel may have without being allowed more.
const SHARED: usize = 48 * 1024;
/// The compute capability that kernels need at least: bf16 on tensor cores.
const CAPABILITY: (i32, i32) = (8, 0);

/// What cuBLAS may use on the way, in bytes: as much as its documentation recommends for Hopper. It is ours, because cuBLAS would
/// allocate another one for every graph, and because the kernels that it chooses depend on the size.
const WORKSPACE: usize = 32 << 20;

const HELD: &str = "nothing panics while it holds cuBLAS";

/// A GPU.
struct Cuda {
    name: String,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Where graphs are captured.
    captured: sys::CUstream,
    pool: sys::CUmemoryPool,
    /// Not for several threads at once, and on the other stream while a graph is captured.
    cublas: Mutex<cublas::sys::cublasHandle_t>,
    workspace: u64,
    modules: Vec<sys::CUmodule>,
    kernels: Mutex<HashMap<String, sys::CUfunction>>,
}

// SAFETY: the driver's handles may be used by any thread that has made the context current, which every function does first.
unsafe impl Send for Cuda {}
// SAFETY: as above; the one handle that threads may not use at once is behind a mutex.
unsafe impl Sync for Cuda {}

/// How many GPUs there are; none without a driver.
///
/// # Errors
/// If the driver cannot be started, as where it does not match the kernel module.
pub fn count() -> Result<usize> {
    // SAFETY: it looks for a library; those of the driver have no effects when they are loaded.
    if !unsafe { sys::is_culib_present() } {
        return Ok(0);
    }
    match result::init() {
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        started => {
            started.context("cuda: the driver cannot be started")?;
            Ok(result::device::get_count()? as usize)
        }
    }
}

/// The GPU of this index.
///
/// # Errors
/// If it is not there, is too old, or a library that it needs is missing.
pub fn open(index: usize) -> Result<Box<dyn Device>> {
    // SAFETY: as above.
    let (blas, compiler) = unsafe { (cublas::sys::is_culib_present(), nvrtc::sys::is_culib_present()) };
    for (there, library) in [(blas, "libcublas"), (compiler, "libnvrtc")] {
        ensure!(
            there,
            "cuda:{index}: {library} is not found; put the folder that holds it into LD_LIBRARY_PATH (it is part of the CUDA \
             toolkit, and of the Python packages nvidia-cublas and nvidia-cuda-nvrtc), or use device = \"cpu\""
        );
    }
    Ok(Box::new(Cuda::open(index).with_context(|| format!("cuda:{index}"))?))
}

impl Cuda {
    fn open(index: usize) -> Result<Self> {
        let device = result::device::get(index as c_int)?;
        let attribute = |attribute| {
            // SAFETY: the device is one that the driver has returned.
            unsafe { result::device::get_attribute(device, attribute) }
        };
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        };
        let capability = (
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let name = format!("cuda:{index} ({})", result::device::get_name(device)?);
        ensure!(capability >= CAPABILITY, "{name} has compute capability {capability:?}, less than {CAPABILITY:?}");
        // SAFETY: the context is never released, so that all handles stay valid as long as the program runs.
        let (context, pool, [stream, captured], cublas, workspace) = unsafe {
            let context = result::primary_ctx::retain(device)?;
            result::ctx::set_current(context)?;
            let pool = result::device::get_default_mem_pool(device)?;
            // What was given back is kept for the next pass.
            let mut keep = u64::MAX;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut keep).cast())?;
            let stream = || result::stream::create(result::stream::StreamKind::NonBlocking);
            let streams = [stream()?, stream()?];
            let workspace = result::malloc_async(streams[0], WORKSPACE)?;
            (context, pool, streams, cublas::result::create_handle()?, workspace)
        };
        direct(cublas, stream, workspace)?;
        let architecture = format!("sm_{}{}", capability.0, capability.1);
        let load = |(file, text): &(&str, &str)| {
            let binary = compiled(file, text, &architecture)?;
            // SAFETY: the driver copies the image, which NVRTC has made.
            unsafe { result::module::load_data(binary.as_ptr().cast()) }.with_context(|| file.to_string())
        };
        let modules = SOURCES.1.iter().map(load).collect::<Result<_>>()?;
        let (cublas, kernels) = (Mutex::new(cublas), Mutex::default());
        Ok(Self { name, context, stream, captured, pool, cublas, workspace, modules, kernels })
    }

    /// Makes this thread's calls go to this GPU.
    fn bind(&self) -> Result<()> {
        // SAFETY: the context is never released.
        Ok(unsafe { result::ctx::set_current(self.context) }?)
    }

    fn kernel(&self, name: &str, shared: usize) -> Result<sys::CUfunction> {
        let mut kernels = self.kernels.lock().expect("nothing panics while it holds the kernels");
        if let Some(function) = kernels.get(name) {
            return Ok(*function);
        }
        let c_name = CString::new(name)?;
        // SAFETY: modules are never unloaded.
        let find = |module: &sys::CUmodule| unsafe { result::module::get_function(*module, c_name.clone()) };
        let elsewhere = |error: &result::DriverError| error.0 == sys::CUresult::CUDA_ERROR_NOT_FOUND;
        let found = self.modules.iter().map(find).find(|found| !found.as_ref().is_err_and(elsewhere));
        let function = found.with_context(|| format!("{}: there is no kernel {name}", self.name))?;
        let function = function.with_context(|| format!("{}: {name}", self.name))?;
        if shared > SHARED {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is one that the driver has returned.
            unsafe { result::function::set_function_attribute(function, attribute, shared as c_int) }
                .with_context(|| format!("{name}: {shared} bytes of shared memory; this GPU is not supported"))?;
        }
        kernels.insert(name.to_string(), function);
        Ok(function)
    }

    /// On a stream, whose context is current.
    fn launch_on(&self, stream: sys::CUstream, kernel: &str, shape: Launch, arguments: &[Argument]) -> Result<()> {
        let Launch { grid: [x, y, z], block, shared } = shape;
        let function = self.kernel(kernel, shared)?;
        // Each in eight bytes, of which the driver reads as many as the kernel declares.
        let mut values: Vec<u64> = arguments.iter().copied().map(bits).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        let grid = (x as u32, y as u32, z as u32);
        // SAFETY: `kernels.rs` gives each kernel the arguments that it declares; the driver copies them before it returns.
        let launched = unsafe {
            result::launch_kernel(function, grid, (block as u32, 1, 1), shared as u32, stream, &mut pointers)
        };
        launched.with_context(|| format!("{}: {kernel}", self.name))
    }

    /// By a handle that is nobody else's now.
    fn multiply_by(&self, cublas: cublas::sys::cublasHandle_t, product: &Product) -> Result<()> {
        use cublas::sys::cublasComputeType_t::{CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32};
        use cublas::sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let Product { a, b, c, m, n, k, add, scale, floats } = *product;
        let (kind, compute) =
            if floats { (CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32) } else { (CUDA_R_16BF, CUBLAS_COMPUTE_32F) };
        // cuBLAS counts columns first: it is given the transposed product, c' = b' a'.
        let (op_b, stride_b) = operation(b, [k, n]);
        let (op_a, stride_a) = operation(a, [m, k]);
        let (alpha, beta) = (scale, if add { 1.0f32 } else { 0.0 });
        // SAFETY: the caller's arrays have these shapes; the handle is never destroyed.
        let multiplied = unsafe {
            cublas::result::gemm_ex(
                cublas,
                op_b,
                op_a,
                n as c_int,
                m as c_int,
                k as c_int,
                (&raw const alpha).cast(),
                b.address as *const c_void,
                kind,
                stride_b,
                a.address as *const c_void,
                kind,
                stride_a,
                (&raw const beta).cast(),
                c as *mut c_void,
                CUDA_R_32F,
                n as c_int,
                compute,
                cublas::sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        multiplied.with_context(|| format!("{}: {product:?}", self.name))
    }

    /// The graph of commands. All of it happens here, so that nothing but them can come between.
    fn capture(&self, cublas: cublas::sys::cublasHandle_t, commands: &[Command]) -> Result<sys::CUgraph> {
        // Other modes refuse what a kernel may need that is loaded when it is first used.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is never destroyed.
        unsafe { result::stream::begin_capture(self.captured, mode) }?;
        let captured = commands.iter().try_for_each(|command| match command {
            Command::Launch(kernel, shape, arguments) => self.launch_on(self.captured, kernel, *shape, arguments),
            Command::Multiply(product) => self.multiply_by(cublas, product),
        });
        // SAFETY: as above. A capture ends also if something has failed: the stream is of no use before.
        let graph = unsafe { result::stream::end_capture(self.captured) };
        if let (Err(_), Ok(part)) = (&captured, &graph)
            && !part.is_null()
        {
            // SAFETY: nobody else has it.
            unsafe { result::graph::destroy(*part) }?;
        }
        captured?;
        Ok(graph?)
    }

    fn try_allocate(&self, bytes: usize) -> Result<Option<u64>> {
        // SAFETY: the stream is never destroyed.
        match unsafe { result::malloc_async(self.stream, bytes) } {
            Ok(address) => Ok(Some(address)),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
            Err(error) => Err(error).with_context(|| self.name.clone()),
        }
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: the stream is never destroyed.
        let done = unsafe { result::stream::synchronize(self.stream) };
        done.with_context(|| format!("{}: something that was started before has failed", self.name))
    }

    fn attribute(&self, attribute: sys::CUmemPool_attribute) -> Result<usize> {
        let mut value = 0u64;
        // SAFETY: these attributes are 64 bits.
        unsafe { result::mem_pool::get_attribute(self.pool, attribute, (&raw mut value).cast()) }?;
        Ok(value as usize)
    }
}

impl Device for Cuda {
    fn name(&self) -> &str {
        &self.name
    }

    fn room(&self) -> Result<Room> {
        use sys::CUmemPool_attribute::{CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_CURRENT};
        self.bind()?;
        let (free, total) = result::mem_get_info()?;
        let reserved = self.attribute(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let slack = reserved.saturating_sub(self.attribute(CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?);
        Ok(Room { total, free, slack })
    }

    fn allocate(&self, bytes: usize) -> Result<Option<u64>> {
        self.bind()?;
        if let Some(address) = self.try_allocate(bytes)? {
            return Ok(Some(address));
        }
        // What is held ready may lie in pieces that are too small.
        self.wait()?;
        // SAFETY: the pool is the device's own.
        unsafe { result::mem_pool::trim_to(self.pool, 0) }?;
        self.try_allocate(bytes)
    }

    fn release(&self, address: u64) {
        // An error here is one of something that was started before, and is told to whoever waits for that.
        drop(self.bind());
        // SAFETY: the address is one that `allocate` returned, and is given back once.
        let _ = unsafe { result::free_async(address, self.stream) };
    }

    fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the driver has copied pageable memory when it returns; the caller's array is as long.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream) }.with_context(|| self.name.clone())
    }

    fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the bytes are borrowed until the stream is done.
        let asked = unsafe { result::memcpy_dtoh_async(bytes, from, self.stream) };
        let done = self.wait();
        asked.with_context(|| self.name.clone())?;
        done
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's arrays are as long.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }.with_context(|| self.name.clone())
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's array is as long.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }.with_context(|| self.name.clone())
    }

    fn launch(&self, kernel: &str, shape: Launch, arguments: &[Argument]) -> Result<()> {
        self.bind()?;
        self.launch_on(self.stream, kernel, shape, arguments)
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        self.bind()?;
        self.multiply_by(*self.cublas.lock().expect(HELD), product)
    }

    fn record(&self, commands: &[Command]) -> Result<u64> {
        self.bind()?;
        let cublas = self.cublas.lock().expect(HELD);
        let directed = direct(*cublas, self.captured, self.workspace);
        let graph = directed.and_then(|()| self.capture(*cublas, commands));
        direct(*cublas, self.stream, self.workspace)?;
        let graph = graph.with_context(|| format!("{}: a graph of {} commands", self.name, commands.len()))?;
        // SAFETY: the graph is whole, nobody else has it, and what is instantiated does not need it any more.
        unsafe {
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            result::graph::destroy(graph)?;
            Ok(executable? as u64)
        }
    }

    fn replay(&self, graph: u64) -> Result<()> {
        self.bind()?;
        // SAFETY: the graph is one that `record` returned, and was not forgotten.
        let launched = unsafe { result::graph::launch(graph as sys::CUgraphExec, self.stream) };
        launched.with_context(|| format!("{}: a graph", self.name))
    }

    fn forget(&self, graph: u64) {
        drop(self.bind());
        // SAFETY: as above, and it is forgotten once. A graph that is running is destroyed when it is done.
        let _ = unsafe { result::graph::exec_destroy(graph as sys::CUgraphExec) };
    }
}

/// Makes cuBLAS compute on a stream, which it then has to be given its workspace for again.
fn direct(cublas: cublas::sys::cublasHandle_t, stream: sys::CUstream, workspace: u64) -> Result<()> {
    // SAFETY: the handle, the stream and the workspace are never given back; nobody else uses the handle now.
    unsafe {
        cublas::result::set_stream(cublas, stream.cast())?;
        Ok(cublas::sys::cublasSetWorkspace_v2(cublas, workspace as *mut c_void, WORKSPACE).result()?)
    }
}

/// How cuBLAS reads a [rows, columns] operand of ours, and how far its rows are apart.
fn operation(operand: Operand, [rows, columns]: [usize; 2]) -> (cublas::sys::cublasOperation_t, c_int) {
    match operand.transposed {
        false => (cublas::sys::cublasOperation_t::CUBLAS_OP_N, columns as c_int),
        true => (cublas::sys::cublasOperation_t::CUBLAS_OP_T, rows as c_int),
    }
}

/// An argument in the first of eight bytes.
fn bits(argument: Argument) -> u64 {
    match argument {
        Argument::Pointer(value) | Argument::Long(value) => value,
        Argument::Int(value) => u64::from(value as u32),
        Argument::Float(value) => u64::from(value.to_bits()),
        Argument::Double(value) => value.to_bits(),
    }
}

/// What NVRTC makes of a file of kernels, from the cache if it is there.
fn compiled(file: &str, text: &str, architecture: &str) -> Result<Vec<u8>> {
    let source = [SOURCES.0[0], SOURCES.0[1], text].concat();
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both are written.
    unsafe { nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result()?;
    let hash = Sha256::digest(format!("{major}.{minor} {architecture}\n{source}"));
    let hash: String = hash.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    let cached: Option<PathBuf> =
        Cache::default_folder().ok().map(|folder| folder.join("kernels").join(format!("{file}-{hash}.cubin")));
    if let Some(binary) = cached.as_ref().and_then(|path| std::fs::read(path).ok()) {
        return Ok(binary);
    }
    let binary = compile(file, &source, architecture)?;
    // Without a cache they are compiled again the next time.
    if let Some(path) = cached {
        drop(keep(&path, &binary));
    }
    Ok(binary)
}

/// Written beside its place and renamed, as others may be looking for it.
fn keep(path: &std::path::Path, binary: &[u8]) -> Result<()> {
    let folder = path.parent().context("a file has a folder")?;
    std::fs::create_dir_all(folder)?;
    let file = tempfile::NamedTempFile::new_in(folder)?;
    std::fs::write(file.path(), binary)?;
    // A file of this name is believed to be whole.
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

/// Compiles kernels for an architecture, such as `sm_90`; no GPU is needed.
///
/// # Errors
/// If NVRTC finds something wrong; the message is its own.
pub fn compile(file: &str, source: &str, architecture: &str) -> Result<Vec<u8>> {
    let (text, name) = (CString::new(source)?, CString::new(file)?);
    let program = nvrtc::result::create_program(&text, Some(&name))?;
    let option = format!("--gpu-architecture={architecture}");
    // SAFETY: the program was created above, and is destroyed at the end.
    unsafe {
        let compiled = nvrtc::result::compile_program(program, &[option]);
        let log = nvrtc::result::get_program_log(program)?;
        let log: Vec<u8> = log.into_iter().map(|byte| byte as u8).take_while(|byte| *byte != 0).collect();
        if let Err(error) = compiled {
            bail!("{file} for {architecture}: {error}\n{}", String::from_utf8_lossy(&log));
        }
        let mut bytes = 0;
        nvrtc::sys::nvrtcGetCUBINSize(program, &raw mut bytes).result()?;
        let mut binary = vec![0u8; bytes];
        nvrtc::sys::nvrtcGetCUBIN(program, binary.as_mut_ptr().cast()).result()?;
        nvrtc::result::destroy_program(program)?;
        Ok(binary)
    }
}

/// Compiles all kernels for an architecture, and finds the functions of cuBLAS that are called; no GPU is needed.
///
/// # Errors
/// If a library is missing, or NVRTC finds something wrong.
pub fn check(architecture: &str) -> Result<()> {
    // SAFETY: it looks for a library.
    ensure!(unsafe { nvrtc::sys::is_culib_present() }, "libnvrtc is not found");
    for (file, text) in SOURCES.1 {
        let binary = compile(file, &[SOURCES.0[0], SOURCES.0[1], text].concat(), architecture)?;
        ensure!(!binary.is_empty(), "{file} for {architecture}: nothing was compiled");
    }
    // SAFETY: it looks for a library, and for names in it.
    unsafe {
        ensure!(cublas::sys::is_culib_present(), "libcublas is not found");
        for name in ["cublasCreate_v2", "cublasSetStream_v2", "cublasSetWorkspace_v2", "cublasGemmEx"] {
            let found = cublas::sys::culib().get::<*const c_void>(name.as_bytes());
            ensure!(found.is_ok(), "libcublas has no {name}");
        }
    }
    Ok(())
}
