//! Memory for frozen weights in large pages: they are read from end to end for every token, and with small pages the processor
//! spends as long looking up addresses as fetching what is there. One of the kernel files.

use std::alloc::{Layout, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use super::buffer::{Buffer, LINE, Pooled};

/// The size of a large page, in bytes.
const PAGE: usize = 2 << 20;
/// Pages that are asked for at once; what is not written yet takes no memory.
const CHUNK: usize = 32 * PAGE;

/// Pages of zeros from the operating system.
struct Chunk {
    /// What was mapped.
    mapped: NonNull<u8>,
    mapped_bytes: usize,
    /// Where its first large page starts, and how much there is from there on.
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it is memory; who may touch which part of it is decided by `Pages`.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(PAGE);
        let mapped_bytes = bytes + PAGE;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new memory of ours; nothing is replaced.
        let mapped = unsafe { libc::mmap(std::ptr::null_mut(), mapped_bytes, protection, flags, -1, 0) };
        let layout =
            || Layout::from_size_align(mapped_bytes, PAGE).expect("weights are smaller than the address space");
        let mapped = if mapped == libc::MAP_FAILED { None } else { NonNull::new(mapped.cast::<u8>()) };
        let mapped = mapped.unwrap_or_else(|| handle_alloc_error(layout()));
        // SAFETY: a page more was mapped than is needed, so the next large page starts inside.
        let start = unsafe { mapped.add(mapped.align_offset(PAGE)) };
        #[cfg(target_os = "linux")]
        // SAFETY: advice about pages that were just mapped; whether it is taken changes nothing but speed.
        unsafe {
            libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE);
        }
        Self { mapped, mapped_bytes, start, bytes }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: mapped with this size, and nothing refers to it any more.
        unsafe { libc::munmap(self.mapped.as_ptr().cast(), self.mapped_bytes) };
    }
}

/// The chunk that is being handed out, and how much of it has been.
static OPEN: Mutex<Option<(Arc<Chunk>, usize)>> = Mutex::new(None);

/// Pieces of memory of this many bytes go back to the operating system when they are freed.
const RETURNED: libc::c_int = 1 << 20;
/// So much of smaller pieces stays with each thread: what one pass frees the next asks for, and fresh pages cost more than they hold.
const STAYS: libc::c_int = 1 << 23;

/// Has freed memory go back to the operating system. The C library would learn from the first large piece that is freed to keep
/// such pieces, and a run that samples and learns in turn would hold the memory of both.
pub fn return_what_is_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: a setting of the allocator, which may be changed at any time; whether it is taken changes nothing but memory.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, RETURNED);
        libc::mallopt(libc::M_TRIM_THRESHOLD, STAYS);
    }
}

/// Numbers that stay where they are, zero at first.
pub struct Pages<T> {
    start: NonNull<T>,
    len: usize,
    /// Keeps the memory.
    _chunk: Arc<Chunk>,
    owned: PhantomData<T>,
}

/// Numbers for which zero bytes are zero.
pub trait Plain: Copy {}
impl Plain for i8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for f32 {}

// SAFETY: it owns its part of the chunk.
unsafe impl<T: Plain + Send> Send for Pages<T> {}
// SAFETY: as above.
unsafe impl<T: Plain + Sync> Sync for Pages<T> {}

impl<T: Plain> Pages<T> {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let bytes = (len * size_of::<T>()).next_multiple_of(LINE);
        let mut open = OPEN.lock().expect("nothing panics while it holds the chunk");
        let full = |(chunk, used): &(Arc<Chunk>, usize)| used + bytes > chunk.bytes;
        if open.as_ref().is_none_or(full) {
            *open = Some((Arc::new(Chunk::new(bytes.max(CHUNK))), 0));
        }
        let (chunk, used) = open.as_mut().expect("one was opened");
        // SAFETY: there are `bytes` more in the chunk, and `used` is a multiple of a line, which every number is aligned to.
        let start = unsafe { chunk.start.add(*used) }.cast();
        *used += bytes;
        Self { start, len, _chunk: chunk.clone(), owned: PhantomData }
    }
}

impl<T: Plain> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: these are inside the chunk, were zero at first, and belong to this value alone.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// What stays is in large pages; what is made for one call goes back to the pool.
pub enum Held<T: Pooled + Plain> {
    /// As long as a model, or longer than a call.
    Model(Pages<T>),
    /// For one call.
    Product(Buffer<T>),
}

impl<T: Pooled + Plain> Held<T> {
    /// Zeros that stay, or not.
    pub fn zeros(len: usize, stays: bool) -> Self {
        if stays { Self::Model(Pages::zeros(len)) } else { Self::Product(Buffer::zeros(len)) }
    }
}

impl<T: Pooled + Plain> Deref for Held<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Model(values) => values,
            Self::Product(values) => values,
        }
    }
}

impl<T: Pooled + Plain> DerefMut for Held<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::Model(values) => values,
            Self::Product(values) => values,
        }
    }
}
