//! GGUF files: the header with its metadata and the tensors' places, believed in nothing that the file's size does not
//! bear out. What is allocated grows with what was read, never with what the file says is coming.
//!
//! The result is candle's, which reads the tensors themselves.

use std::collections::HashMap;
use std::io::Read;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Shape;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, DEFAULT_ALIGNMENT, TensorInfo, Value, VersionedMagic};

/// Longest header in bytes; the vocabulary of a quarter million tokens takes a tenth of it.
const MAX_HEADER: u64 = 100_000_000;
/// Longest key or tensor name in bytes.
const MAX_NAME: usize = 65_535;
/// Deepest nesting of arrays; no known key nests them at all.
const MAX_DEPTH: usize = 4;
/// Largest alignment of tensor data in bytes, a large memory page.
const MAX_ALIGNMENT: u64 = 1 << 21;

/// The value types are numbered from 0 to this.
const LAST_KIND: u32 = 12;

/// The numbers of the tensor types that candle can read.
const TYPES: [(u32, GgmlDType); 13] = [
    (0, GgmlDType::F32),
    (1, GgmlDType::F16),
    (2, GgmlDType::Q4_0),
    (3, GgmlDType::Q4_1),
    (6, GgmlDType::Q5_0),
    (7, GgmlDType::Q5_1),
    (8, GgmlDType::Q8_0),
    (10, GgmlDType::Q2K),
    (11, GgmlDType::Q3K),
    (12, GgmlDType::Q4K),
    (13, GgmlDType::Q5K),
    (14, GgmlDType::Q6K),
    (30, GgmlDType::BF16),
];

/// Reads the header of a file of `size` bytes from its beginning.
///
/// # Errors
/// If the file is not GGUF of version 2 or 3, ends early, or says something impossible about itself; the message names
/// the key or tensor.
pub fn read(reader: impl Read, size: u64) -> Result<Content> {
    ensure!(size > 0, "the file is empty");
    let mut header = Header { reader, position: 0, size };
    let magic = header.version()?;
    let (tensors, entries) = (header.u64().context("number of tensors")?, header.u64().context("number of entries")?);
    header.claim(tensors, 1).context("number of tensors")?;
    header.claim(entries, 1).context("number of metadata entries")?;
    let mut metadata = HashMap::new();
    for entry in 0..entries {
        let key = header.name().with_context(|| format!("key of metadata entry {entry} of {entries}"))?;
        let value = header.u32().and_then(|kind| header.value(kind, 0)).with_context(|| format!("key {key:?}"))?;
        ensure!(metadata.insert(key.clone(), value).is_none(), "key {key:?} stands there twice");
    }
    let alignment = alignment(&metadata).context("key \"general.alignment\"")?;
    let mut places = Vec::new();
    for tensor in 0..tensors {
        let name = header.name().with_context(|| format!("name of tensor {tensor} of {tensors}"))?;
        let (info, bytes) = header.tensor().with_context(|| format!("tensor {name:?}"))?;
        ensure!(
            info.offset.is_multiple_of(alignment),
            "tensor {name:?}: its offset {} is not a multiple of the alignment, {alignment}",
            info.offset
        );
        places.push((name, info, bytes));
    }
    let start = header.position.next_multiple_of(alignment);
    let mut tensor_infos = HashMap::new();
    for (name, info, bytes) in places {
        let end = info.offset.checked_add(bytes).and_then(|end| end.checked_add(start));
        ensure!(
            end.is_some_and(|end| end <= size),
            "tensor {name:?}: {bytes} bytes at offset {} from byte {start} end beyond the file's {size} bytes: it is cut \
             short or damaged",
            info.offset
        );
        ensure!(tensor_infos.insert(name.clone(), info).is_none(), "tensor {name:?} stands there twice");
    }
    Ok(Content { magic, metadata, tensor_infos, tensor_data_offset: start })
}

/// What the offsets of tensors are multiples of, in bytes.
fn alignment(metadata: &HashMap<String, Value>) -> Result<u64> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    let alignment = u64::from(value.to_u32()?);
    ensure!(
        alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT,
        "{alignment} is not a power of two up to {MAX_ALIGNMENT}"
    );
    Ok(alignment)
}

/// A header that is being read.
struct Header<R> {
    reader: R,
    /// Bytes read.
    position: u64,
    /// Bytes of the whole file.
    size: u64,
}

impl<R: Read> Header<R> {
    /// That many things of at least this many bytes can still come.
    fn claim(&self, count: u64, bytes: u64) -> Result<()> {
        let left = self.size.min(MAX_HEADER) - self.position;
        ensure!(
            count.checked_mul(bytes).is_some_and(|bytes| bytes <= left),
            "{}{count} × {bytes} bytes at byte {} are more than the {left} left of {}",
            if self.size > MAX_HEADER { "" } else { "cut short or damaged: " },
            self.position,
            if self.size > MAX_HEADER { "the longest header" } else { "the file" }
        );
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.reader.read_exact(bytes).with_context(|| format!("cannot read at byte {}", self.position))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.claim(1, N as u64)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn string(&mut self) -> Result<String> {
        let length = self.u64()?;
        self.claim(length, 1).context("text")?;
        let mut bytes = vec![0; usize::try_from(length)?];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).with_context(|| format!("the text before byte {} is not UTF-8", self.position))
    }

    fn name(&mut self) -> Result<String> {
        let name = self.string()?;
        ensure!(name.len() <= MAX_NAME, "a name of {} bytes is longer than {MAX_NAME}", name.len());
        Ok(name)
    }

    fn version(&mut self) -> Result<VersionedMagic> {
        let magic = self.bytes::<4>()?;
        ensure!(&magic == b"GGUF", "it begins with \"{}\", a gguf file with \"GGUF\"", magic.escape_ascii());
        match self.u32()? {
            2 => Ok(VersionedMagic::GgufV2),
            3 => Ok(VersionedMagic::GgufV3),
            other if (1..=3).contains(&other.swap_bytes()) => {
                bail!("a big-endian gguf file; only little-endian ones can be read")
            }
            other => bail!("gguf version {other}; only versions 2 and 3 can be read"),
        }
    }

    /// A value of the type with this number, inside `depth` arrays.
    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.bytes()?)),
            1 => Value::I8(i8::from_le_bytes(self.bytes()?)),
            2 => Value::U16(u16::from_le_bytes(self.bytes()?)),
            3 => Value::I16(i16::from_le_bytes(self.bytes()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.bytes()?)),
            6 => Value::F32(f32::from_le_bytes(self.bytes()?)),
            7 => match self.bytes()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => bail!("{other} is not a boolean, 0 or 1"),
            },
            8 => Value::String(self.string()?),
            9 => Value::Array(self.array(depth + 1)?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.bytes()?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes()?)),
            other => bail!("value type {other}; those known are 0 to {LAST_KIND}"),
        })
    }

    fn array(&mut self, depth: usize) -> Result<Vec<Value>> {
        ensure!(depth <= MAX_DEPTH, "arrays inside arrays, more than {MAX_DEPTH} deep");
        let (kind, length) = (self.u32()?, self.u64()?);
        ensure!(kind <= LAST_KIND, "array of value type {kind}; those known are 0 to {LAST_KIND}");
        self.claim(length, 1).context("array")?;
        // Collected without reserving: what each value takes on the disk is known only once it is read.
        (0..length).map(|row| self.value(kind, depth).with_context(|| format!("row {row} of {length}"))).collect()
    }

    /// The place of one tensor, and its size in bytes.
    fn tensor(&mut self) -> Result<(TensorInfo, u64)> {
        let rank = self.u32()?;
        ensure!((1..=4).contains(&rank), "it has {rank} dimensions, not 1 to 4");
        let mut dimensions = (0..rank).map(|_| self.u64()).collect::<Result<Vec<_>>>()?;
        let number = self.u32()?;
        let known = || TYPES.map(|(_, kind)| format!("{kind:?}")).join(", ");
        let (_, kind) = TYPES
            .into_iter()
            .find(|(known, _)| *known == number)
            .with_context(|| format!("ggml type {number} cannot be read; those that can: {}", known()))?;
        let block = kind.block_size() as u64;
        ensure!(
            dimensions[0].is_multiple_of(block),
            "its rows of {} numbers are not whole blocks of {block} as {kind:?} has them",
            dimensions[0]
        );
        let elements = dimensions.iter().try_fold(1, |product: u64, &dimension| product.checked_mul(dimension));
        let bytes = elements.and_then(|elements| (elements / block).checked_mul(kind.type_size() as u64));
        let bytes = bytes.filter(|&bytes| bytes > 0).with_context(|| format!("impossible shape {dimensions:?}"))?;
        // The innermost comes first in the file.
        dimensions.reverse();
        let dimensions = dimensions.into_iter().map(usize::try_from).collect::<Result<Vec<_>, _>>()?;
        Ok((TensorInfo { ggml_dtype: kind, shape: Shape::from(dimensions), offset: self.u64()? }, bytes))
    }
}
