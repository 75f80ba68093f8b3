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

/// Two operands and how far they go along k: `a` is 16 rows of bf16 in tiles, one after the other along k, and 16 more whose tiles
/// come `second` values later; `b` is pairs of k, [steps · 16, 32, 2]. A step is 32 values of k.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Walk {
    pub a: *const u16,
    pub b: *const u16,
    pub steps: usize,
    pub second: usize,
}

/// Begins to bring what the second operand will be a step and a half later into the second-level cache: 32 lines. The processor does
/// not see loads of tiles coming as well as others; from memory a product takes two thirds of the time with this.
#[cfg(target_arch = "x86_64")]
macro_rules! fetch_ahead {
    () => {
        ".irp line, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
         prefetcht1 [{b} + 64 * \\line + 3072]
         .endr"
    };
}

/// 32 rows: four tiles of sums. `load` brings the first operand.
#[cfg(target_arch = "x86_64")]
macro_rules! two_rows {
    ($first:ident, $then:ident, $c:ident, $c_stride:ident, $keep:ident, $load:literal, $fetch:expr) => {
        std::arch::asm!(
            "test {keep:e}, {keep:e}",
            "jnz 3f",
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "jmp 2f",
            "3:",
            "tileloadd tmm0, [{c} + {cs}]", "tileloadd tmm1, [{c} + {cs} + 64]",
            "tileloadd tmm2, [{c2} + {cs}]", "tileloadd tmm3, [{c2} + {cs} + 64]",
            "2:",
            $fetch,
            concat!($load, " tmm4, [{a} + {s}]"),
            "tileloadd tmm6, [{b} + {s} * 2]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {s} * 2 + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            concat!($load, " tmm5, [{a2} + {s}]"),
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 1024", "add {a2}, 1024", "add {b}, 2048",
            "dec {n}",
            "jnz 2b",
            "test {then}, {then}",
            "jz 4f",
            "mov {a}, [{then}]", "mov {b}, [{then} + 8]", "mov {n}, [{then} + 16]", "mov {a2}, [{then} + 24]",
            "lea {a2}, [{a} + {a2} * 2]",
            "xor {then}, {then}",
            "test {n}, {n}",
            "jnz 2b",
            "4:",
            "tilestored [{c} + {cs}], tmm0", "tilestored [{c} + {cs} + 64], tmm1",
            "tilestored [{c2} + {cs}], tmm2", "tilestored [{c2} + {cs} + 64], tmm3",
            a = inout(reg) $first.a => _, a2 = inout(reg) $first.a.add($first.second) => _, b = inout(reg) $first.b => _,
            n = inout(reg) $first.steps => _, then = inout(reg) $then.map_or(std::ptr::null(), std::ptr::from_ref) => _,
            s = in(reg) 64usize, cs = in(reg) 4 * $c_stride, c = in(reg) $c, c2 = in(reg) $c.add(16 * $c_stride),
            keep = in(reg) $keep as u32,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
}

/// 16 rows: two tiles of sums.
#[cfg(target_arch = "x86_64")]
macro_rules! one_row {
    ($first:ident, $then:ident, $c:ident, $c_stride:ident, $keep:ident, $fetch:expr) => {
        std::arch::asm!(
            "test {keep:e}, {keep:e}",
            "jnz 3f",
            "tilezero tmm0", "tilezero tmm1",
            "jmp 2f",
            "3:",
            "tileloadd tmm0, [{c} + {cs}]", "tileloadd tmm1, [{c} + {cs} + 64]",
            "2:",
            $fetch,
            "tileloadd tmm4, [{a} + {s}]",
            "tileloadd tmm6, [{b} + {s} * 2]",
            "tileloadd tmm7, [{b} + {s} * 2 + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a}, 1024", "add {b}, 2048",
            "dec {n}",
            "jnz 2b",
            "test {then}, {then}",
            "jz 4f",
            "mov {a}, [{then}]", "mov {b}, [{then} + 8]", "mov {n}, [{then} + 16]",
            "xor {then}, {then}",
            "test {n}, {n}",
            "jnz 2b",
            "4:",
            "tilestored [{c} + {cs}], tmm0", "tilestored [{c} + {cs} + 64], tmm1",
            a = inout(reg) $first.a => _, b = inout(reg) $first.b => _,
            n = inout(reg) $first.steps => _, then = inout(reg) $then.map_or(std::ptr::null(), std::ptr::from_ref) => _,
            s = in(reg) 64usize, cs = in(reg) 4 * $c_stride, c = in(reg) $c, keep = in(reg) $keep as u32,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
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

    /// `c = Σ a · b` over one walk along k or two, added to what `c` holds if `keep` is set, for 16 rows (32, if `two` is set) of
    /// 32, which lie `c_stride` values apart. With `cold`, the second operand is fetched ahead from memory.
    ///
    /// # Safety
    /// All that the walks speak of must be there, one step at least, and `c` must have as many rows.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub unsafe fn multiply(
        &self,
        (first, then): (Walk, Option<&Walk>),
        (c, c_stride): (*mut f32, usize),
        keep: bool,
        two: bool,
        cold: bool,
    ) {
        // SAFETY: the caller's; tiles are configured as long as `self` lives.
        unsafe {
            match (two, cold) {
                (true, true) => two_rows!(first, then, c, c_stride, keep, "tileloadd", fetch_ahead!()),
                // The first operand goes by: in the first-level cache stays the second, which the next rows need too.
                (true, false) => two_rows!(first, then, c, c_stride, keep, "tileloaddt1", ""),
                (false, true) => one_row!(first, then, c, c_stride, keep, fetch_ahead!()),
                (false, false) => one_row!(first, then, c, c_stride, keep, ""),
            }
        }
    }

    /// See the twin for x86-64.
    ///
    /// # Safety
    /// Never called: there are no tiles.
    #[cfg(not(target_arch = "x86_64"))]
    pub unsafe fn multiply(&self, _: (Walk, Option<&Walk>), _: (*mut f32, usize), _: bool, _: bool, _: bool) {}
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
