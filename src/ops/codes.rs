//! Frozen weights that stay codes of 4 or 8 bits, as most GGUF files have them, for kernels that multiply in bf16: less than
//! half the memory to walk through for every token (6 or 10 bits a weight). One of the kernel files.
//!
//! Each weight is `value of its code · scale + minimum`, with a scale and a minimum for every 32 inputs of an output. A panel becomes bf16 just
//! before it is multiplied with, and is bit for bit what it would be had all been unpacked when the model was loaded: the product is
//! exact in f32, for a scale has 17 digits at most, and the sum is rounded once.

use std::ops::Range;

use candle_core::quantized::GgmlDType;
use half::f16;
use rayon::prelude::*;

use super::LANES;
use super::kernel::Kernel;
use super::left::{to_bf16, to_f32};
use super::pages::Pages;
use super::panels::PANEL;
use super::shared::fetch_ahead;

/// Inputs that share a scale and a minimum.
const GROUP: usize = 32;
/// Weights of a block: a group of inputs of all outputs of a panel.
pub(super) const BLOCK: usize = GROUP * PANEL;
/// Blocks in bf16 that are kept where a product needs each once, a power of two: they stay in the first-level cache.
pub(super) const RING: usize = 4;
/// Blocks by which codes are fetched before they are unpacked.
const SOON: usize = 6;
/// Vectors of f32 for pairs of inputs of all outputs of a panel.
const VECTORS: usize = 2 * PANEL / LANES;
/// Codes of 4 bits in a word.
const NIBBLES: usize = 8;

/// How a type of GGUF is held.
#[derive(Clone, Copy, PartialEq)]
enum Width {
    Four,
    Eight,
}

/// A frozen weight [wide, narrow] in codes.
pub struct Codes {
    width: Width,
    /// What a code of 4 bits stands for if all of them are zero. Those of 8 bits are integers with a sign.
    lowest: f32,
    narrow: usize,
    /// By panel and group of inputs a block: 32 scales and 32 minimums in f32, then the codes. Those of 8 bits lie as the panel's bf16
    /// will, [16 pairs of inputs, 32 outputs, 2]; those of 4 bits in words that each hold eight pairs' codes of one output and one of
    /// both inputs, the first lowest: [4 vectors, 2, 16].
    words: Pages<u32>,
}

/// The blocks that are a panel of a weight, or of the transposed one, along its inputs.
#[derive(Clone, Copy)]
pub(super) struct Coded<'a> {
    codes: &'a Codes,
    first: usize,
    /// From one block to the next.
    stride: usize,
    count: usize,
    transposed: bool,
}

/// A group of inputs of one output.
struct Group {
    scale: f32,
    minimum: f32,
    codes: [u8; GROUP],
}

impl Width {
    fn of(kind: GgmlDType) -> Option<Self> {
        match kind {
            GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q4K => Some(Self::Four),
            GgmlDType::Q8_0 => Some(Self::Eight),
            _ => None,
        }
    }

    /// Words of a block's codes.
    fn words(self) -> usize {
        match self {
            Self::Four => BLOCK / NIBBLES,
            Self::Eight => BLOCK / size_of::<u32>(),
        }
    }

    /// Words of a block.
    fn block(self) -> usize {
        2 * PANEL + self.words()
    }

    /// Which word of a block's codes has that of an output and an input, and how far it is shifted.
    fn place(self, output: usize, input: usize) -> (usize, usize) {
        let (pair, lane) = (input / 2, 2 * output + input % 2);
        match self {
            Self::Four => {
                let (vector, word) = (lane / LANES, pair / NIBBLES);
                ((vector * 2 + word) * LANES + lane % LANES, pair % NIBBLES * 4)
            }
            Self::Eight => {
                let byte = pair * 2 * PANEL + lane;
                (byte / size_of::<u32>(), byte % size_of::<u32>() * 8)
            }
        }
    }
}

impl Codes {
    /// Whether a weight of such a type, with rows of so many inputs, can be held like this for a kernel.
    pub fn fit(kind: GgmlDType, narrow: usize, kernel: Kernel) -> bool {
        let unpacks = kernel.rounds_inputs() && kernel != Kernel::Cuda && Kernel::Avx512Bf16.available();
        unpacks && Width::of(kind).is_some() && narrow.is_multiple_of(kind.block_size())
    }

    /// What a weight takes, in bytes.
    ///
    /// # Panics
    /// If such a type does not fit: a mistake of the caller.
    pub fn bytes(kind: GgmlDType, wide: usize, narrow: usize) -> usize {
        let width = Width::of(kind).expect("the type fits");
        size_of::<u32>() * wide.div_ceil(PANEL) * (narrow / GROUP) * width.block()
    }

    /// Fills a weight in parallel: `read(first, rows)` returns so many rows as GGUF has them, whose first is number `first`. A piece
    /// has `piece` rows, a multiple of the panel, or is the last.
    ///
    /// # Errors
    /// The first error of `read`.
    ///
    /// # Panics
    /// If such a type does not fit, or `read` returns other than it should: mistakes of the caller.
    pub fn read<E: Send>(
        kind: GgmlDType,
        (wide, narrow): (usize, usize),
        piece: usize,
        read: impl Fn(usize, usize) -> Result<Vec<u8>, E> + Sync,
    ) -> Result<Self, E> {
        assert!(piece.is_multiple_of(PANEL), "pieces are whole panels");
        let width = Width::of(kind).expect("the type fits");
        let groups = narrow / GROUP;
        let mut words = Pages::zeros(Self::bytes(kind, wide, narrow) / size_of::<u32>());
        let of_piece = piece / PANEL * groups * width.block();
        words.par_chunks_mut(of_piece.max(1)).enumerate().try_for_each(|(index, words)| {
            let first = index * piece;
            let rows = piece.min(wide - first);
            let bytes = read(first, rows)?;
            let row_bytes = narrow / kind.block_size() * kind.type_size();
            assert!(bytes.len() == rows * row_bytes, "as many bytes as the rows have");
            for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
                let panel = &mut words[row / PANEL * groups * width.block()..];
                let groups = bytes.chunks_exact(kind.type_size()).flat_map(|block| groups_of(kind, block));
                for (block, group) in panel.chunks_exact_mut(width.block()).zip(groups) {
                    group.write(width, row % PANEL, block);
                }
            }
            Ok(())
        })?;
        // Not a part of the minimum: a scale that is infinite would make both infinite, and their sum no number.
        let lowest = if kind == GgmlDType::Q4_0 { -8.0 } else { 0.0 };
        Ok(Self { width, lowest, narrow, words })
    }

    /// Blocks of a panel, one for each group of inputs; those of the next panel follow.
    fn blocks(&self) -> usize {
        self.narrow / GROUP
    }

    /// A panel.
    pub(super) fn panel(&self, number: usize) -> Coded<'_> {
        let count = self.blocks();
        Coded { codes: self, first: number * count, stride: 1, count, transposed: false }
    }

    /// A panel of the transposed weight of some of the panels.
    pub(super) fn transposed_panel(&self, panels: &Range<usize>, number: usize) -> Coded<'_> {
        let stride = self.blocks();
        Coded { codes: self, first: panels.start * stride + number, stride, count: panels.len(), transposed: true }
    }

    fn block(&self, index: usize) -> &[u32] {
        let len = self.width.block();
        &self.words[index * len..][..len]
    }

    /// The weight of an output and an input.
    pub fn value(&self, output: usize, input: usize) -> f32 {
        let block = self.block(output / PANEL * self.blocks() + input / GROUP);
        let (output, input) = (output % PANEL, input % GROUP);
        let [scale, minimum] = [block[output], block[PANEL + output]].map(f32::from_bits);
        let (word, shift) = self.width.place(output, input);
        let code = block[2 * PANEL + word] >> shift;
        let value = match self.width {
            Width::Four => (code & 15) as f32 + self.lowest,
            Width::Eight => f32::from(code as u8 as i8),
        };
        to_f32(to_bf16(value.mul_add(scale, minimum)))
    }
}

impl Coded<'_> {
    /// How many there are.
    pub fn blocks(&self) -> usize {
        self.count
    }

    /// Room for all of them in bf16, or for [`RING`] where `few` rows are multiplied with them.
    pub fn room(&self, few: bool) -> usize {
        BLOCK * if few { RING } else { self.count }
    }

    /// Writes one of them in bf16, [16, 32, 2]: a part of the panel as products want it. What comes a little later is fetched, of
    /// this panel or of the next.
    ///
    /// # Panics
    /// If there is no such block, or no room for it: a mistake of the caller.
    pub fn unpack(&self, number: usize, to: &mut [u16]) {
        let Self { codes, first, stride, count, transposed } = *self;
        let soon = number + SOON;
        let soon =
            if transposed && soon >= count { first + 1 + (soon - count) * stride } else { first + soon * stride };
        let len = codes.width.block();
        fetch_ahead(codes.words.get(soon * len..(soon + 1) * len).unwrap_or_default());
        let block = codes.block(first + number * stride);
        assert!(number < count && to.len() == BLOCK, "room for a block that is there");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: codes are only held where these instructions are, a block's words are there, and so is room for its numbers.
        unsafe {
            match (codes.width, transposed) {
                (Width::Four, false) => vectors::four(block.as_ptr(), codes.lowest, to.as_mut_ptr()),
                (Width::Four, true) => vectors::four_transposed(block.as_ptr(), codes.lowest, to.as_mut_ptr()),
                (Width::Eight, false) => vectors::eight(block.as_ptr(), to.as_mut_ptr()),
                (Width::Eight, true) => vectors::eight_transposed(block.as_ptr(), to.as_mut_ptr()),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("kernels in bf16 are for x86-64");
    }
}

impl Group {
    fn write(&self, width: Width, output: usize, block: &mut [u32]) {
        block[output] = self.scale.to_bits();
        block[PANEL + output] = self.minimum.to_bits();
        for (input, code) in self.codes.iter().enumerate() {
            let (word, shift) = width.place(output, input);
            block[2 * PANEL + word] |= u32::from(*code) << shift;
        }
    }
}

/// The groups of one of GGUF's blocks. Blocks of 256 have scales and minimums of 6 bits for each group.
fn groups_of(kind: GgmlDType, block: &[u8]) -> impl Iterator<Item = Group> {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let of_six = |index: usize| {
        let scales = &block[4..16];
        match index {
            0..4 => (scales[index] & 63, scales[index + 4] & 63),
            _ => (
                (scales[index + 4] & 15) | ((scales[index - 4] >> 6) << 4),
                (scales[index + 4] >> 4) | ((scales[index] >> 6) << 4),
            ),
        }
    };
    (0..kind.block_size() / GROUP).map(move |index| match kind {
        GgmlDType::Q4_0 => Group { scale: half(0), minimum: 0.0, codes: nibbles(&block[2..]) },
        GgmlDType::Q4_1 => Group { scale: half(0), minimum: half(2), codes: nibbles(&block[4..]) },
        GgmlDType::Q8_0 => Group { scale: half(0), minimum: 0.0, codes: std::array::from_fn(|input| block[2 + input]) },
        _ => {
            let (scale, minimum) = of_six(index);
            let codes = &block[16 + index / 2 * GROUP..][..GROUP];
            let codes = std::array::from_fn(|input| (codes[input] >> (index % 2 * 4)) & 15);
            Group { scale: half(0) * f32::from(scale), minimum: -(half(2) * f32::from(minimum)), codes }
        }
    })
}

/// The low halves of sixteen bytes, then the high ones.
fn nibbles(bytes: &[u8]) -> [u8; GROUP] {
    std::array::from_fn(|input| (bytes[input % (GROUP / 2)] >> (input / (GROUP / 2) * 4)) & 15)
}

/// In vectors of sixteen. Two of them, eight outputs each, become 32 numbers of the panel.
#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::{
        __m512, __m512i, _mm_loadu_si128, _mm512_add_epi32, _mm512_add_ps, _mm512_broadcast_i32x4, _mm512_castps_si512,
        _mm512_castsi512_ps, _mm512_castsi512_si128, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_cvtne2ps_pbh,
        _mm512_extracti32x4_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutexvar_epi16,
        _mm512_permutexvar_ps, _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_epi64, _mm512_set1_ps,
        _mm512_set4_epi32, _mm512_setr_epi32, _mm512_setr_ps, _mm512_shuffle_epi8, _mm512_srli_epi32,
        _mm512_srlv_epi16, _mm512_storeu_si512, _mm512_ternarylogic_epi32,
    };
    use std::mem::transmute;

    use super::super::rearrange::columns;
    use super::{LANES, NIBBLES, PANEL, VECTORS};

    /// Scale and minimum of eight outputs, each twice.
    ///
    /// # Safety
    /// A block must begin there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn affine(block: *const u32, vector: usize) -> [__m512; 2] {
        let first = vector as i32 % 2 * 8;
        let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        let twice = _mm512_add_epi32(twice, _mm512_set1_epi32(first));
        // SAFETY: the caller's; 32 scales and as many minimums come first.
        [0, PANEL].map(|at| unsafe {
            let values = _mm512_loadu_ps(block.add(at + vector / 2 * LANES).cast());
            _mm512_permutexvar_ps(twice, values)
        })
    }

    /// Writes 32 numbers.
    ///
    /// # Safety
    /// There must be room for them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn write(to: *mut u16, codes: [__m512; 2], affine: [[__m512; 2]; 2]) {
        let [first, second] = [0, 1].map(|index| _mm512_fmadd_ps(codes[index], affine[index][0], affine[index][1]));
        // SAFETY: the caller's; a vector of bf16 has the size of one of integers.
        unsafe {
            let rounded: __m512i = transmute(_mm512_cvtne2ps_pbh(second, first));
            _mm512_storeu_si512(to.cast(), rounded);
        }
    }

    /// What codes of 4 bits stand for, zero for `lowest`. A permutation looks at the lowest four bits of each number: it masks the code
    /// and converts it at once.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn table(lowest: f32) -> __m512 {
        let codes =
            _mm512_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0);
        _mm512_add_ps(codes, _mm512_set1_ps(lowest))
    }

    /// What all codes of an output stand for, whose scale is there.
    ///
    /// # Safety
    /// It must be that of a block.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn meanings(scale: *const u32, values: __m512) -> __m512 {
        // SAFETY: the caller's; minimums come after 32 scales.
        unsafe { _mm512_fmadd_ps(values, _mm512_set1_ps(*scale.cast()), _mm512_set1_ps(*scale.add(PANEL).cast())) }
    }

    /// Scale and minimum of a pair of outputs, one after the other again and again.
    ///
    /// # Safety
    /// A block must begin there.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn affine_of_pair(block: *const u32, pair: usize) -> [__m512; 2] {
        // SAFETY: the caller's; 32 scales and as many minimums come first.
        [0, PANEL].map(|at| unsafe {
            _mm512_castsi512_ps(_mm512_set1_epi64(block.add(at + 2 * pair).cast::<i64>().read_unaligned()))
        })
    }

    /// A block of codes of 4 bits, of which zero stands for `lowest`.
    ///
    /// # Safety
    /// These instructions, the block and room for its numbers must be there.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn four(block: *const u32, lowest: f32, to: *mut u16) {
        let values = table(lowest);
        for vector in (0..VECTORS).step_by(2) {
            // SAFETY: the caller's.
            unsafe {
                let affine = [affine(block, vector), affine(block, vector + 1)];
                for word in 0..2 {
                    let mut codes = [0, 1].map(|second| {
                        let at = block.add(2 * PANEL + ((vector + second) * 2 + word) * LANES);
                        _mm512_loadu_si512(at.cast())
                    });
                    for nibble in 0..NIBBLES {
                        let pair = to.add((word * NIBBLES + nibble) * 2 * PANEL + vector * LANES);
                        write(pair, codes.map(|codes| _mm512_permutexvar_ps(codes, values)), affine);
                        codes = codes.map(|codes| _mm512_srli_epi32::<4>(codes));
                    }
                }
            }
        }
    }

    /// Where the code of an input and one of two outputs is, for sixteen inputs of both: which half of their words, as the places of its
    /// two bytes; how far it is from the lowest place there; and where it is looked up, beside what stands for the first output's codes.
    static PLACES: [[u16; 2 * LANES]; 3] = {
        let (mut places, mut lane) = ([[0; 2 * LANES]; 3], 0);
        while lane < 2 * LANES {
            let (output, input) = (lane % 2, lane / 2);
            let half = (2 * output + input % 2) * 2 + input / NIBBLES;
            places[0][lane] = (2 * half + 256 * (2 * half + 1)) as u16;
            places[1][lane] = (input / 2 % 4 * 4) as u16;
            places[2][lane] = (output * LANES) as u16;
            lane += 1;
        }
        places
    };

    /// The same with inputs and outputs exchanged: [16 pairs of outputs, 32 inputs, 2].
    ///
    /// # Safety
    /// As [`four`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn four_transposed(block: *const u32, lowest: f32, to: *mut u16) {
        let values = table(lowest);
        // SAFETY: a vector holds as many.
        let (halves, shifts, second) = unsafe {
            let [halves, shifts, second] = &PLACES;
            let (halves, shifts) =
                (_mm512_loadu_si512(halves.as_ptr().cast()), _mm512_loadu_si512(shifts.as_ptr().cast()));
            (halves, shifts, _mm512_loadu_si512(second.as_ptr().cast()))
        };
        for pair in 0..PANEL / 2 {
            // SAFETY: the caller's; a vector of bf16 has the size of one of integers.
            unsafe {
                let first_of = meanings(block.add(2 * pair), values);
                let second_of = meanings(block.add(2 * pair + 1), values);
                let numbers: __m512i = transmute(_mm512_cvtne2ps_pbh(second_of, first_of));
                for word in 0..2 {
                    let at = block.add(2 * PANEL + (pair / 4 * 2 + word) * LANES + pair % 4 * 4);
                    let words = _mm512_broadcast_i32x4(_mm_loadu_si128(at.cast()));
                    let codes = _mm512_srlv_epi16(_mm512_shuffle_epi8(words, halves), shifts);
                    // The lowest four bits of the codes, or the place of the second output.
                    let codes = _mm512_ternarylogic_epi32::<0xea>(codes, _mm512_set1_epi16(15), second);
                    let numbers = _mm512_permutexvar_epi16(codes, numbers);
                    _mm512_storeu_si512(to.add((2 * pair + word) * PANEL).cast(), numbers);
                }
            }
        }
    }

    /// A block of codes of 8 bits.
    ///
    /// # Safety
    /// As [`four`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn eight(block: *const u32, to: *mut u16) {
        for vector in (0..VECTORS).step_by(2) {
            // SAFETY: the caller's.
            unsafe {
                let affine = [affine(block, vector), affine(block, vector + 1)];
                for pair in 0..LANES {
                    let at = pair * 2 * PANEL + vector * LANES;
                    let bytes = block.add(2 * PANEL).cast::<u8>().add(at);
                    let codes = [0, LANES].map(|second| {
                        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.add(second).cast())))
                    });
                    write(to.add(at), codes, affine);
                }
            }
        }
    }

    /// The same with inputs and outputs exchanged: [16 pairs of outputs, 32 inputs, 2].
    ///
    /// # Safety
    /// As [`four`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn eight_transposed(block: *const u32, to: *mut u16) {
        // SAFETY: the caller's: sixteen pairs of inputs of sixteen pairs of outputs.
        let pairs = unsafe { columns((block.add(2 * PANEL).cast(), LANES)) };
        // Of both inputs the first output, then of both the second: side by side.
        let side_by_side = _mm512_set4_epi32(0x0f0d_0e0c, 0x0b09_0a08, 0x0705_0604, 0x0301_0200);
        for (number, inputs) in pairs.into_iter().enumerate() {
            let inputs = _mm512_shuffle_epi8(_mm512_castps_si512(inputs), side_by_side);
            let quarters = [
                _mm512_castsi512_si128(inputs),
                _mm512_extracti32x4_epi32::<1>(inputs),
                _mm512_extracti32x4_epi32::<2>(inputs),
                _mm512_extracti32x4_epi32::<3>(inputs),
            ];
            let [a, b, c, d] = quarters.map(|codes| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
            // SAFETY: the caller's.
            unsafe {
                let affine = affine_of_pair(block, number);
                write(to.add(2 * number * PANEL), [a, b], [affine, affine]);
                write(to.add((2 * number + 1) * PANEL), [c, d], [affine, affine]);
            }
        }
    }
}
