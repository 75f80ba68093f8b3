//! Tiles: products of 32 × 32 blocks of bf16 with sums in f32, in registers of 16 rows × 64 bytes. One of the kernel files.
//!
//! The intrinsics are not stable in Rust; the instructions in inline assembly are. The whole walk along k is one assembly
//! block, because the compiler knows nothing of what tile registers hold between two.

/// Rows and columns of a block of the product.
pub(super) const SIDE: usize = 32;

/// Whether the processor has bf16 tiles and the kernel of the operating system lets this process use them. Asked once.
pub(super) fn permitted() -> bool {
    static PERMITTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *PERMITTED.get_or_init(ask)
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn ask() -> bool {
    use std::arch::{asm, x86_64::__cpuid_count};
    const TILES: u32 = 1 << 24;
    const BF16: u32 = 1 << 22;
    const ARCH_PRCTL: i64 = 158;
    const REQUEST_PERMISSION: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let highest = __cpuid_count(0, 0).eax;
    if highest < 7 || __cpuid_count(7, 0).edx & (TILES | BF16) != TILES | BF16 {
        return false;
    }
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that reads no memory of ours; it sets which registers this process may use, or fails.
    unsafe {
        asm!("syscall", inlateout("rax") result, in("rdi") REQUEST_PERMISSION, in("rsi") TILE_DATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn ask() -> bool {
    false
}

/// Begins to bring values into the second-level cache.
pub(super) fn fetch(values: &[u16]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(32) {
        // SAFETY: a hint, for an address inside the slice.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.as_ptr().cast()) };
    }
}

/// The shape of all eight tiles: 16 rows of 64 bytes.
#[cfg(target_arch = "x86_64")]
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// While it lives, the tile registers of this thread are configured.
pub(super) struct Tiles(());

impl Tiles {
    /// Configures the tiles of this thread.
    ///
    /// # Panics
    /// If tiles are not permitted: a mistake of the caller, who chose the kernel.
    #[cfg(target_arch = "x86_64")]
    pub fn configure() -> Self {
        assert!(permitted(), "tiles are not permitted");
        let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        shapes.row_bytes[..8].fill(64);
        shapes.rows[..8].fill(16);
        // SAFETY: tiles are permitted, and the instruction reads the 64 bytes of `shapes`.
        unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly)) };
        Self(())
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub fn configure() -> Self {
        unreachable!("tiles are not permitted")
    }

    /// `c += a · b`, or `c = a · b` if `keep` is false, for `a` of 16 rows of bf16 in tiles, one after the other along k (and, if
    /// `two` is set, 16 more, whose tiles come so many values later as stands beside it), `b` of pairs of k [steps · 16, 32, 2], and `c` of as many rows of 32, `c_stride` values apart, in f32.
    ///
    /// # Safety
    /// `a`, `b` and `c` must reach as far as these shapes say; a step is 32 values of k.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub unsafe fn multiply(
        &self,
        (a, second): (*const u16, usize),
        b: *const u16,
        steps: usize,
        (c, c_stride): (*mut f32, usize),
        keep: bool,
        two: bool,
    ) {
        use std::arch::asm;
        if steps == 0 {
            return;
        }
        // SAFETY: the caller's; tiles are configured as long as `self` lives.
        unsafe {
            if two {
                asm!(
                    "test {keep:e}, {keep:e}",
                    "jnz 3f",
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "jmp 2f",
                    "3:",
                    "tileloadd tmm0, [{c} + {cs}]", "tileloadd tmm1, [{c} + {cs} + 64]",
                    "tileloadd tmm2, [{c2} + {cs}]", "tileloadd tmm3, [{c2} + {cs} + 64]",
                    "2:",
                    "tileloadd tmm4, [{a} + {s}]",
                    "tileloadd tmm6, [{b} + {bs}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b} + {bs} + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{a2} + {s}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a}, 1024", "add {a2}, 1024", "add {b}, 2048",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{c} + {cs}], tmm0", "tilestored [{c} + {cs} + 64], tmm1",
                    "tilestored [{c2} + {cs}], tmm2", "tilestored [{c2} + {cs} + 64], tmm3",
                    a = inout(reg) a => _, a2 = inout(reg) a.add(second) => _, b = inout(reg) b => _,
                    n = inout(reg) steps => _, s = in(reg) 64usize, bs = in(reg) 4 * SIDE, cs = in(reg) 4 * c_stride,
                    c = in(reg) c, c2 = in(reg) c.add(16 * c_stride), keep = in(reg) keep as u32,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack)
                );
            } else {
                asm!(
                    "test {keep:e}, {keep:e}",
                    "jnz 3f",
                    "tilezero tmm0", "tilezero tmm1",
                    "jmp 2f",
                    "3:",
                    "tileloadd tmm0, [{c} + {cs}]", "tileloadd tmm1, [{c} + {cs} + 64]",
                    "2:",
                    "tileloadd tmm4, [{a} + {s}]",
                    "tileloadd tmm6, [{b} + {bs}]",
                    "tileloadd tmm7, [{b} + {bs} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {a}, 1024", "add {b}, 2048",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{c} + {cs}], tmm0", "tilestored [{c} + {cs} + 64], tmm1",
                    a = inout(reg) a => _, b = inout(reg) b => _,
                    n = inout(reg) steps => _, s = in(reg) 64usize, bs = in(reg) 4 * SIDE, cs = in(reg) 4 * c_stride,
                    c = in(reg) c, keep = in(reg) keep as u32,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack)
                );
            }
        }
    }

    /// See the twin for x86-64.
    ///
    /// # Safety
    /// Never called: there are no tiles.
    #[cfg(not(target_arch = "x86_64"))]
    pub unsafe fn multiply(
        &self,
        _: (*const u16, usize),
        _: *const u16,
        _: usize,
        _: (*mut f32, usize),
        _: bool,
        _: bool,
    ) {
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: tiles were configured when `self` was made; nothing of ours is left in them.
        unsafe {
            std::arch::asm!("tilerelease", options(nostack, nomem));
        }
    }
}
