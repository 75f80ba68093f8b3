//! Which projections an adapter changes, what its tensors are called, and where their numbers lie.

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::config::Lora;
use crate::model::{Architecture, Projection};

/// What all versions of an adapter have in common.
pub(crate) struct Layout {
    /// s: alpha / rank.
    pub scale: f32,
    /// Sorted by layer and projection.
    pub pairs: Vec<Pair>,
    /// Index into `pairs` by layer · 7 + projection.
    index: Vec<Option<usize>>,
}

/// A pair of matrices: A [rank, narrow] and B [wide, rank].
pub(crate) struct Pair {
    /// Whose it is.
    pub layer: usize,
    /// As above.
    pub projection: Projection,
    /// Its inner dimension.
    pub rank: usize,
    /// Inputs and outputs of its projection.
    pub narrow: usize,
    /// As above.
    pub wide: usize,
    /// Of A among the numbers of all tensors; B comes after it.
    start: usize,
}

/// What PEFT calls A and B.
pub(super) const NAMES: [&str; 2] = ["lora_A", "lora_B"];

pub(super) fn tensor_name(layer: usize, projection: Projection, part: &str) -> String {
    format!("base_model.model.model.layers.{layer}.{}.{part}.weight", projection.module())
}

/// alpha / rank, or alpha / √rank when rank-stabilized (Kalajdzievski 2023).
fn scale(lora: &Lora) -> f32 {
    let rank = lora.rank as f64;
    (lora.alpha / if lora.rslora { rank.sqrt() } else { rank }) as f32
}

impl Pair {
    /// Of A and B.
    pub fn shapes(&self) -> [(usize, usize); 2] {
        [(self.rank, self.narrow), (self.wide, self.rank)]
    }

    /// Where A and B begin among the numbers of all tensors.
    pub fn places(&self) -> [usize; 2] {
        [self.start, self.start + self.rank * self.narrow]
    }

    fn end(&self) -> usize {
        self.start + self.rank * (self.narrow + self.wide)
    }
}

impl Layout {
    /// As a config asks for it.
    pub fn new(architecture: &Architecture, lora: &Lora) -> Self {
        let layers = architecture.layers.len();
        let (mut pairs, mut index) = (Vec::<Pair>::new(), vec![None; layers * Projection::ALL.len()]);
        for layer in 0..layers {
            for projection in Projection::ALL.into_iter().filter(|projection| lora.targets.contains(projection)) {
                let (wide, narrow) = architecture.dimensions(projection);
                index[layer * Projection::ALL.len() + projection as usize] = Some(pairs.len());
                let start = pairs.last().map_or(0, Pair::end);
                pairs.push(Pair { layer, projection, rank: lora.rank, narrow, wide, start });
            }
        }
        Self { scale: scale(lora), pairs, index }
    }

    /// Which of the pairs that of one projection is, if it carries one.
    pub fn index(&self, layer: usize, projection: Projection) -> Option<usize> {
        self.index[layer * Projection::ALL.len() + projection as usize]
    }

    /// The pair of one projection, if it carries one.
    pub fn pair(&self, layer: usize, projection: Projection) -> Option<&Pair> {
        self.index(layer, projection).map(|index| &self.pairs[index])
    }

    /// How many numbers all tensors have.
    pub fn numbers(&self) -> usize {
        self.pairs.last().map_or(0, Pair::end)
    }

    /// PEFT's name of every tensor.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let names = |pair: &Pair| NAMES.map(|part| tensor_name(pair.layer, pair.projection, part));
        self.pairs.iter().flat_map(names)
    }

    /// The shape of every tensor.
    pub fn shapes(&self) -> impl Iterator<Item = (usize, usize)> {
        self.pairs.iter().flat_map(Pair::shapes)
    }

    /// Numbers of all tensors, one after the other, as tensors.
    pub fn tensors(&self, numbers: &[f32]) -> Result<Vec<Tensor>> {
        let mut rest = numbers;
        let mut next = |shape: (usize, usize)| {
            let (own, others) = rest.split_at(shape.0 * shape.1);
            rest = others;
            Ok(Tensor::from_slice(own, shape, &Device::Cpu)?)
        };
        self.shapes().map(&mut next).collect()
    }
}
