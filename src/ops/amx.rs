//! Tiles: products of 32 × 32 blocks of bf16 with sums in f32, in registers of 16 rows × 64 bytes. One of the kernel files.
//!
//! The intrinsics are not stable in Rust; the instructions in inline assembly are.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use super::left::{TILE, TILE_ROWS};

/// Rows and columns of a block of the product.
pub(super) const SIDE: usize = 2 * TILE_ROWS;

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
/// come `second` values later; `b` is pairs of k, [steps · 16, 32, 2], or so many steps of them that are used again and again, a power of
/// two. A step is 32 values of k.
#[derive(Clone, Copy)]
pub(super) struct Walk {
    pub a: *const u16,
    pub b: *const u16,
    pub steps: usize,
    pub second: usize,
    pub ring: usize,
}

impl Walk {
    /// The same for rows that begin so many tiles later.
    fn below(self, tiles: usize) -> Self {
        Self { a: self.a.wrapping_add(tiles * self.second), ..self }
    }
}

/// Values of the two tiles that a step along k needs of the second operand.
const PAIR: usize = 2 * TILE;

/// Where the sums of a block are: 16 rows of 32, which are so many values apart, and 16 more unless they are left out.
#[derive(Clone, Copy)]
struct Sums<const TWO: bool> {
    c: *mut f32,
    stride: usize,
}

/// A block whose sums are in tiles 0 to 3 between its beginning and its end. The compiler does not know, and need not: the program is
/// compiled for processors without tiles, so that no instruction but those of this file can touch them.
#[cfg(target_arch = "x86_64")]
impl<const TWO: bool> Sums<TWO> {
    /// # Safety
    /// Tiles must be configured; if the sums are kept, they must be there.
    #[inline(always)]
    unsafe fn begin(self, keep: bool) {
        use std::arch::asm;
        let (c, s) = (self.c, 4 * self.stride);
        // SAFETY: the caller's.
        unsafe {
            match (keep, TWO) {
                (false, false) => asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem)),
                (false, true) => {
                    asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem))
                }
                (true, _) => {
                    asm!("tileloadd tmm0, [{c} + {s}]", "tileloadd tmm1, [{c} + {s} + 64]",
                        c = in(reg) c, s = in(reg) s, options(nostack, readonly));
                    if TWO {
                        asm!("tileloadd tmm2, [{c} + {s}]", "tileloadd tmm3, [{c} + {s} + 64]",
                            c = in(reg) c.add(16 * self.stride), s = in(reg) s, options(nostack, readonly));
                    }
                }
            }
        }
    }

    /// One step along k. A tile is zeroed when it was read for the last time. It costs nothing, and a zero takes none of the registers that
    /// tiles are renamed to. Where another thread computes on the same core, a thread behaves as if it had nine of them: with eight tiles
    /// full one instruction waits for the other, and a step takes four times as long as alone. With zeros it takes two and a half times,
    /// and twice as long with 16 rows.
    ///
    /// # Safety
    /// Tiles must be configured, and the tiles of both operands there.
    #[inline(always)]
    unsafe fn step(a: *const u16, second: usize, b: *const u16) {
        // SAFETY: the caller's. Memory is only read, but what is read must have been written.
        unsafe {
            if TWO {
                std::arch::asm!(
                    // The first operand goes by: in the first-level cache stays the second, which the next rows need too.
                    "tileloaddt1 tmm4, [{a} + {s}]",
                    "tileloadd tmm6, [{b} + {s} * 2]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b} + {s} * 2 + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tilezero tmm4",
                    "tileloaddt1 tmm5, [{a2} + {s}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tilezero tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "tilezero tmm5",
                    "tilezero tmm7",
                    a = in(reg) a, a2 = in(reg) a.add(second), b = in(reg) b, s = in(reg) 64usize,
                    options(nostack, readonly)
                );
            } else {
                std::arch::asm!(
                    "tileloaddt1 tmm4, [{a} + {s}]",
                    "tileloadd tmm6, [{b} + {s} * 2]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tilezero tmm6",
                    "tileloadd tmm7, [{b} + {s} * 2 + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tilezero tmm4",
                    "tilezero tmm7",
                    a = in(reg) a, b = in(reg) b, s = in(reg) 64usize, options(nostack, readonly)
                );
            }
        }
    }

    /// # Safety
    /// Tiles must be configured, and there must be room for the sums.
    #[inline(always)]
    unsafe fn end(self) {
        use std::arch::asm;
        let (c, s) = (self.c, 4 * self.stride);
        // SAFETY: the caller's.
        unsafe {
            asm!("tilestored [{c} + {s}], tmm0", "tilestored [{c} + {s} + 64], tmm1", "tilezero tmm0", "tilezero tmm1",
                c = in(reg) c, s = in(reg) s, options(nostack));
            if TWO {
                asm!("tilestored [{c} + {s}], tmm2", "tilestored [{c} + {s} + 64], tmm3", "tilezero tmm2", "tilezero tmm3",
                    c = in(reg) c.add(16 * self.stride), s = in(reg) s, options(nostack));
            }
        }
    }
}

thread_local! {
    /// How many [`Tiles`] of this thread live.
    static LIVE: Cell<usize> = const { Cell::new(0) };
}

/// While it lives, the tile registers of this thread are configured. To configure them takes as long as a small product: whoever makes
/// several keeps one of these meanwhile, and then others cost nothing.
pub(super) struct Tiles(PhantomData<*const ()>);

impl Tiles {
    /// Configures the tiles of this thread.
    ///
    /// # Panics
    /// If tiles are not permitted: a mistake of the caller, who chose the kernel.
    #[cfg(target_arch = "x86_64")]
    pub fn configure() -> Self {
        assert!(permitted(), "tiles are not permitted");
        if LIVE.replace(LIVE.get() + 1) == 0 {
            let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
            shapes.row_bytes[..8].fill(64);
            shapes.rows[..8].fill(16);
            // SAFETY: tiles are permitted, and the instruction reads the 64 bytes of `shapes`.
            unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly)) };
        }
        Self(PhantomData)
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub fn configure() -> Self {
        unreachable!("tiles are not permitted")
    }

    /// `c = Σ a · b` over one walk along k or two, added to what `c` holds if `keep` is set, for so many rows, whole tiles, of 32,
    /// which lie `stride` values apart; 32 of them at once if `TWO` is set, else 16. `before` is called before every step of the first walk
    /// of each, with its number.
    ///
    /// # Safety
    /// All that the walks speak of must be there for all rows, at the latest after `before` was called for that step, and `c` must
    /// have as many rows.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub unsafe fn multiply<const TWO: bool>(
        &self,
        (mut first, mut then): (Walk, Option<Walk>),
        (mut c, stride): (*mut f32, usize),
        keep: bool,
        rows: usize,
        mut before: impl FnMut(usize),
    ) {
        let tiles = if TWO { 2 } else { 1 };
        // SAFETY: the caller's; tiles are configured as long as `self` lives.
        unsafe {
            for _ in 0..rows / (tiles * TILE_ROWS) {
                self.block(first, then, Sums::<TWO> { c, stride }, keep, &mut before);
                (first, then) = (first.below(tiles), then.map(|then| then.below(tiles)));
                c = c.wrapping_add(tiles * TILE_ROWS * stride);
            }
            if !rows.is_multiple_of(tiles * TILE_ROWS) {
                self.block(first, then, Sums::<false> { c, stride }, keep, &mut before);
            }
        }
    }

    /// See [`Tiles::multiply`].
    ///
    /// # Safety
    /// As there.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn block<const TWO: bool>(
        &self,
        first: Walk,
        then: Option<Walk>,
        sums: Sums<TWO>,
        keep: bool,
        before: &mut impl FnMut(usize),
    ) {
        // SAFETY: the caller's.
        unsafe {
            sums.begin(keep);
            for step in 0..first.steps {
                before(step);
                let b = first.b.add((step & (first.ring - 1)) * PAIR);
                Sums::<TWO>::step(first.a.add(step * TILE), first.second, b);
            }
            if let Some(then) = then {
                for step in 0..then.steps {
                    Sums::<TWO>::step(then.a.add(step * TILE), then.second, then.b.add(step * PAIR));
                }
            }
            sums.end();
        }
    }

    /// See the twin for x86-64.
    ///
    /// # Safety
    /// Never called: there are no tiles.
    #[cfg(not(target_arch = "x86_64"))]
    pub unsafe fn multiply<const TWO: bool>(
        &self,
        _: (Walk, Option<Walk>),
        _: (*mut f32, usize),
        _: bool,
        _: usize,
        _: impl FnMut(usize),
    ) {
    }
}

/// Begins to bring some lines of an operand into the second-level cache.
#[inline(always)]
pub(super) fn fetch(operand: *const u16, lines: Range<usize>) {
    #[cfg(target_arch = "x86_64")]
    for line in lines {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

        use super::buffer::LINE;
        // SAFETY: an address of which nothing is read.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(operand.cast::<i8>().wrapping_add(LINE * line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (operand, lines);
}

impl Drop for Tiles {
    fn drop(&mut self) {
        if LIVE.replace(LIVE.get() - 1) == 1 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: tiles were configured when the first was made; nothing of ours is left in them.
            unsafe {
                std::arch::asm!("tilerelease", options(nostack, nomem));
            }
        }
    }
}
