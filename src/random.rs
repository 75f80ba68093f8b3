//! Random numbers that depend on nothing but what they are for. A run draws each of its numbers from a key (seed,
//! purpose, counters), so that it can be resumed anywhere; statistics use a plain stream.

/// The odd constant of SplitMix64, 2⁶⁴ divided by the golden ratio.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The stream SplitMix64 (Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The same stream after `draws` more draws.
    pub fn ahead(self, draws: u64) -> Self {
        Self(self.0.wrapping_add(GAMMA.wrapping_mul(draws)))
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GAMMA);
        mix(self.0)
    }

    /// What the stream's call number n from here gives, counted from 0; the stream stays where it is.
    #[inline(always)]
    pub fn nth(&self, n: u64) -> u64 {
        mix(self.0.wrapping_add(GAMMA.wrapping_mul(n + 1)))
    }

    /// The next number of [0, 1), a multiple of 2⁻⁵³.
    pub fn next_f64(&mut self) -> f64 {
        uniform(self.next_u64())
    }

    /// The next index below `count`: ⌊u · count⌋.
    pub fn below(&mut self, count: usize) -> usize {
        (self.next_f64() * count as f64) as usize
    }
}

/// What a number is for. The values enter every key: changing one changes every run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Purpose {
    /// Which task a step takes.
    Selection = 1,
    /// Which token the sampler draws.
    Sampling = 2,
    /// The first values of an adapter.
    AdapterInit = 3,
    /// Which inputs of an adapter are dropped.
    Dropout = 4,
}

/// 64 well-mixed bits for a seed, a purpose and counters (say step, group, rollout, position): the same on every machine.
///
/// Starting from the seed's hash, each further value v turns the hash h into mix((h + γ) ⊕ mix(v)), where mix is
/// SplitMix64's finalizer and γ its constant.
pub fn key(seed: u64, purpose: Purpose, counters: &[u64]) -> u64 {
    let absorb = |hash: u64, value: u64| mix(hash.wrapping_add(GAMMA) ^ mix(value));
    counters.iter().fold(absorb(mix(seed), purpose as u64), |hash, &counter| absorb(hash, counter))
}

/// The number of [0, 1) that 64 bits stand for: the upper 53, times 2⁻⁵³.
pub fn uniform(key: u64) -> f64 {
    (key >> 11) as f64 / (1u64 << 53) as f64
}

#[inline(always)]
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
