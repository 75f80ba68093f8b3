//! Frozen weights packed once for the kernel that multiplies with them.
//!
//! A weight [wide, narrow] is cut into panels of 32 outputs. In bf16 a panel is [narrow / 2, 32, 2]: pairs of inputs side by
//! side, as the instructions want them; in f32 it is [narrow, 32]. For the `gemm` crate rows stay as they are.

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use rayon::prelude::*;

use super::amx;
use super::buffer::Buffer;
use super::codes::{Coded, Codes};
use super::kernel::Kernel;
use super::left::{Left, to_bf16, to_f32};
use super::pages::Held;
use super::products::{Product, multiply};

/// Outputs of a panel, and what inputs are padded to.
pub const PANEL: usize = amx::SIDE;
/// Inputs that share a scale where weights are rounded to 8 bits.
pub(super) const GROUP: usize = 32;

/// How many threads share a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Threads {
    /// One: the caller runs several products in parallel.
    One,
    /// All of the pool, each with its own outputs.
    All,
}

/// A frozen weight [wide, narrow], packed.
pub struct Panels {
    kernel: Kernel,
    wide: usize,
    narrow: usize,
    values: Values,
}

enum Values {
    Bf16(Held<u16>),
    F32(Held<f32>),
    /// Unpacked to bf16 when they are used.
    Codes(Arc<Codes>),
    /// The transposed weight of some of the panels, likewise.
    TransposedCodes(Arc<Codes>, Range<usize>),
    /// [narrow, 32] a panel, and what they are to be multiplied with in bf16, [narrow / 32, 32].
    Int8(Held<i8>, Held<u16>),
}

/// A panel that products in bf16 are made with.
pub(super) enum Panel<'a> {
    /// As they want it, in memory.
    Bf16(&'a [u16]),
    /// In codes, and room for it in bf16.
    Codes(Coded<'a>, &'a mut [u16]),
}

fn padded(n: usize) -> usize {
    n.next_multiple_of(PANEL)
}

impl Panels {
    /// A weight of the model, zero until it is written piece by piece.
    pub fn zeros(wide: usize, narrow: usize, kernel: Kernel) -> Self {
        Self::held(wide, narrow, kernel, true)
    }

    fn held(wide: usize, narrow: usize, kernel: Kernel, stays: bool) -> Self {
        let values = match kernel {
            Kernel::Amx | Kernel::Avx512Bf16 => Values::Bf16(Held::zeros(padded(wide) * padded(narrow), stays)),
            Kernel::Avx512 => Values::F32(Held::zeros(padded(wide) * padded(narrow), stays)),
            Kernel::Gemm => Values::F32(Held::zeros(wide * narrow, stays)),
            Kernel::Int8 => {
                let len = padded(wide) * padded(narrow);
                Values::Int8(Held::zeros(len, stays), Held::zeros(len / GROUP, stays))
            }
            Kernel::Cuda => unreachable!("a GPU has weights of its own"),
        };
        Self { kernel, wide, narrow, values }
    }

    /// A weight of the model that stays as a GGUF file has it, for kernels in bf16: see [`Codes::read`].
    ///
    /// # Errors
    /// The first error of `read`.
    pub fn coded<E: Send>(
        kind: GgmlDType,
        (wide, narrow): (usize, usize),
        kernel: Kernel,
        piece: usize,
        read: impl Fn(usize, usize) -> Result<Vec<u8>, E> + Sync,
    ) -> Result<Self, E> {
        let values = Values::Codes(Arc::new(Codes::read(kind, (wide, narrow), piece, read)?));
        Ok(Self { kernel, wide, narrow, values })
    }

    /// Packs dense rows [wide, narrow] for as long as they are needed, in one piece: a thread that packs what others wait for must
    /// not wait for them, nor take over a part of their work.
    pub fn pack(rows: &[f32], narrow: usize, kernel: Kernel) -> Self {
        let wide = rows.len() / narrow;
        let mut panels = Self::held(wide, narrow, kernel, false);
        panels.write(padded(wide), |_, piece| piece.copy_from_slice(rows));
        panels
    }

    /// Fills the weight in parallel: `read(first, rows)` writes `rows`, dense, whose first is number `first`. A piece has
    /// `piece` rows, a multiple of the panel, or is the last.
    pub fn write(&mut self, piece: usize, read: impl Fn(usize, &mut [f32]) + Sync) {
        let Ok(()) = self.try_write(piece, |first, rows| {
            read(first, rows);
            Ok::<(), std::convert::Infallible>(())
        });
    }

    /// As [`Panels::write`], where reading may fail.
    ///
    /// # Errors
    /// The first error of `read`.
    ///
    /// # Panics
    /// If a piece is no multiple of the panel: a mistake of the caller.
    pub fn try_write<E: Send>(
        &mut self,
        piece: usize,
        read: impl Fn(usize, &mut [f32]) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        assert!(piece.is_multiple_of(PANEL), "pieces are whole panels");
        let (wide, narrow, depth) = (self.wide, self.narrow, padded(self.narrow));
        let rows = |index: usize| {
            let first = index * piece;
            let mut rows = Buffer::new(piece.min(wide - first) * narrow);
            read(first, &mut rows).map(|()| rows)
        };
        match &mut self.values {
            Values::F32(values) if self.kernel == Kernel::Gemm => values
                .par_chunks_mut(piece * narrow)
                .enumerate()
                .try_for_each(|(index, values)| read(index * piece, values)),
            Values::F32(values) => values.par_chunks_mut(piece * depth).enumerate().try_for_each(|(index, panels)| {
                let rows = rows(index)?;
                for (number, row) in rows.chunks_exact(narrow).enumerate() {
                    let panel = &mut panels[number / PANEL * PANEL * depth..][..PANEL * depth];
                    panel.iter_mut().skip(number % PANEL).step_by(PANEL).zip(row).for_each(|(to, from)| *to = *from);
                }
                Ok(())
            }),
            Values::Codes(_) | Values::TransposedCodes(..) => unreachable!("codes are read as they are"),
            Values::Int8(values, scales) => {
                let panels = values.par_chunks_mut(piece * depth).zip(scales.par_chunks_mut(piece * depth / GROUP));
                panels.enumerate().try_for_each(|(index, (values, scales))| {
                    let rows = rows(index)?;
                    rows.chunks_exact(narrow)
                        .enumerate()
                        .for_each(|(number, row)| round(row, number, depth, values, scales));
                    Ok(())
                })
            }
            Values::Bf16(values) => values.par_chunks_mut(piece * depth).enumerate().try_for_each(|(index, panels)| {
                let rows = rows(index)?;
                for (number, row) in rows.chunks_exact(narrow).enumerate() {
                    let panel = &mut panels[number / PANEL * PANEL * depth..][..PANEL * depth];
                    let pairs = panel.chunks_exact_mut(2 * PANEL).map(|pair| &mut pair[2 * (number % PANEL)..][..2]);
                    for (to, from) in pairs.zip(row.chunks(2)) {
                        to.iter_mut().zip(from).for_each(|(to, from)| *to = to_bf16(*from));
                    }
                }
                Ok(())
            }),
        }
    }

    /// Outputs and inputs.
    pub fn dims(&self) -> (usize, usize) {
        (self.wide, self.narrow)
    }

    /// The kernel that it was packed for.
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// What a weight takes, in bytes.
    pub fn bytes(wide: usize, narrow: usize, kernel: Kernel) -> usize {
        match kernel {
            Kernel::Amx | Kernel::Avx512Bf16 => 2 * padded(wide) * padded(narrow),
            Kernel::Avx512 => 4 * padded(wide) * padded(narrow),
            Kernel::Gemm => 4 * wide * narrow,
            Kernel::Cuda => 2 * wide * narrow,
            Kernel::Int8 => padded(wide) * padded(narrow) / GROUP * (GROUP + size_of::<u16>()),
        }
    }

    /// Writes row number `index` [narrow].
    pub fn row(&self, index: usize, row: &mut [f32]) {
        let (panel, lane) = (index / PANEL * PANEL * padded(self.narrow), index % PANEL);
        match &self.values {
            Values::F32(values) if self.kernel == Kernel::Gemm => {
                row.copy_from_slice(&values[index * self.narrow..][..self.narrow]);
            }
            Values::F32(values) => {
                let from = values[panel..].iter().skip(lane).step_by(PANEL);
                row.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            }
            Values::Codes(codes) => (0..).zip(row).for_each(|(input, to)| *to = codes.value(index, input)),
            Values::TransposedCodes(codes, panels) => {
                (panels.start * PANEL..).zip(row).for_each(|(output, to)| *to = codes.value(output, index));
            }
            Values::Int8(values, scales) => {
                let scales =
                    scales[panel / GROUP..].iter().skip(lane).step_by(PANEL).flat_map(|scale| [to_f32(*scale); GROUP]);
                let from = values[panel..].iter().skip(lane).step_by(PANEL).zip(scales);
                row.iter_mut().zip(from).for_each(|(to, (from, scale))| *to = f32::from(*from) * scale);
            }
            Values::Bf16(values) => {
                for (to, pair) in row.chunks_mut(2).zip(values[panel..].chunks_exact(2 * PANEL)) {
                    to.iter_mut().zip(&pair[2 * lane..]).for_each(|(to, from)| *to = to_f32(*from));
                }
            }
        }
    }

    /// The transposed weight [narrow, wide] of some of the outputs, which start and end with whole panels (or the last): what
    /// gradients are multiplied with. It is made when it is needed, because keeping it would double the model; codes are read the other
    /// way.
    pub fn transposed(&self, outputs: Range<usize>, threads: Threads) -> Panels {
        let (wide, depth) = (outputs.len(), padded(self.narrow));
        let panels = outputs.start / PANEL..outputs.end.div_ceil(PANEL);
        let (wide_padded, block) = (panels.len() * PANEL, PANEL * PANEL);
        let values = match &self.values {
            Values::F32(values) if self.kernel == Kernel::Gemm => {
                let mut transposed = Buffer::new(wide * self.narrow);
                let rows = values[outputs.start * self.narrow..].chunks_exact(self.narrow).take(wide);
                for (number, row) in rows.enumerate() {
                    transposed.iter_mut().skip(number).step_by(wide).zip(row).for_each(|(to, from)| *to = *from);
                }
                Values::F32(Held::Product(transposed))
            }
            Values::F32(values) => {
                let mut transposed = Buffer::new(wide_padded * depth);
                each(&mut transposed, PANEL * wide_padded, threads, |inputs, panel| {
                    for (to, number) in panel.chunks_exact_mut(block).zip(panels.clone()) {
                        let from = &values[number * PANEL * depth + inputs * block..][..block];
                        for output in 0..PANEL {
                            for input in 0..PANEL {
                                to[output * PANEL + input] = from[input * PANEL + output];
                            }
                        }
                    }
                });
                Values::F32(Held::Product(transposed))
            }
            Values::Bf16(_) => {
                let mut transposed = Buffer::new(wide_padded * depth);
                each(&mut transposed, PANEL * wide_padded, threads, |inputs, panel| {
                    for (to, number) in panel.as_chunks_mut().0.iter_mut().zip(panels.clone()) {
                        let from = self.bf16(number).expect("panels of one weight have one type");
                        transpose_pairs(&from.as_chunks().0[inputs], to);
                    }
                });
                Values::Bf16(Held::Product(transposed))
            }
            Values::Codes(codes) => Values::TransposedCodes(codes.clone(), panels),
            Values::TransposedCodes(..) => unreachable!("nobody transposes twice"),
            Values::Int8(..) => unreachable!("nothing is trained through rounded weights"),
        };
        Panels { kernel: self.kernel, wide: self.narrow, narrow: wide, values }
    }

    /// `c = x · Wᵀ`, or `c += x · Wᵀ` if `add` is set, for some of the outputs, which start with a whole panel: [rows,
    /// outputs], the rows of `c` being `stride` values apart.
    pub fn multiply(&self, x: &Left, outputs: Range<usize>, c: &mut [f32], stride: usize, add: bool, threads: Threads) {
        multiply(x, [Product { weight: self, then: None, outputs, to: (c, stride), add }], threads);
    }

    /// A panel in bf16, if it is there.
    pub(super) fn bf16(&self, panel: usize) -> Option<&[u16]> {
        let len = PANEL * padded(self.narrow);
        match &self.values {
            Values::Bf16(values) => Some(&values[panel * len..][..len]),
            _ => None,
        }
    }

    /// A panel for products in bf16. `room` is for one that is in codes: with `few` rows, for no more of it than they need at once.
    pub(super) fn panel<'a>(&'a self, panel: usize, room: &'a mut Option<Buffer<u16>>, few: bool) -> Panel<'a> {
        let coded = match &self.values {
            Values::Codes(codes) => codes.panel(panel),
            Values::TransposedCodes(codes, panels) => codes.transposed_panel(panels, panel),
            _ => return Panel::Bf16(self.bf16(panel).expect("weights of one kernel have one type")),
        };
        Panel::Codes(coded, room.get_or_insert_with(|| Buffer::new(coded.room(few))))
    }

    /// All panels in f32, or rows for the `gemm` crate.
    pub(super) fn f32(&self) -> Option<&[f32]> {
        match &self.values {
            Values::F32(values) => Some(values),
            _ => None,
        }
    }

    /// A panel in 8 bits, and its scales.
    pub(super) fn int8(&self, panel: usize) -> (&[i8], &[u16]) {
        let Values::Int8(values, scales) = &self.values else { unreachable!("weights of one kernel have one type") };
        let depth = padded(self.narrow);
        (&values[panel * PANEL * depth..][..PANEL * depth], &scales[panel * depth..][..depth])
    }
}

/// Rounds a row into its place in a panel: the largest of a group of inputs becomes 127.
fn round(row: &[f32], number: usize, depth: usize, values: &mut [i8], scales: &mut [u16]) {
    let (panel, lane) = (number / PANEL * PANEL * depth, number % PANEL);
    let mut values = values[panel..].iter_mut().skip(lane).step_by(PANEL);
    for (group, scale) in row.chunks(GROUP).zip(scales[panel / GROUP..].iter_mut().skip(lane).step_by(PANEL)) {
        let largest = group.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        *scale = to_bf16(largest / 127.0);
        // Rounded up, or the largest would not fit.
        *scale += u16::from(to_f32(*scale) * 127.0 < largest);
        let scale = to_f32(*scale);
        // The group first, or a value would be taken for which there is no input.
        for (x, to) in group.iter().zip(values.by_ref()) {
            *to = if scale > 0.0 { (x / scale).round() as i8 } else { 0 };
        }
    }
}

/// Runs `f(number, chunk)` for all chunks.
fn each<T: Send>(values: &mut [T], chunk: usize, threads: Threads, f: impl Fn(usize, &mut [T]) + Sync) {
    match threads {
        Threads::One => values.chunks_exact_mut(chunk).enumerate().for_each(|(number, chunk)| f(number, chunk)),
        Threads::All => values.par_chunks_exact_mut(chunk).enumerate().for_each(|(number, chunk)| f(number, chunk)),
    }
}

/// From [input pairs, outputs, 2] to [output pairs, inputs, 2], 32 of each.
fn transpose_pairs(from: &[u16; PANEL * PANEL], to: &mut [u16; PANEL * PANEL]) {
    #[cfg(target_arch = "x86_64")]
    if super::rearrange::transpose_pairs(from, to) {
        return;
    }
    for (outputs, to) in to.chunks_exact_mut(2 * PANEL).enumerate() {
        for (to, from) in to.chunks_exact_mut(4).zip(from.chunks_exact(2 * PANEL)) {
            let pairs = &from[4 * outputs..][..4];
            to.copy_from_slice(&[pairs[0], pairs[2], pairs[1], pairs[3]]);
        }
    }
}
