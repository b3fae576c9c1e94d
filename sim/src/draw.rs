//! One generator per purpose, all from one seed: what is drawn for one purpose does not shift what is drawn for another.

use baton_core::Rng;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// What numbers are drawn for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Topology = 1,
    Workload = 2,
    Faults = 3,
    /// Latencies and the order of turmoil's runtimes.
    Network = 4,
    /// Where a bit flips.
    Link = 5,
    /// Each life of each host.
    Host = 6,
    /// What is asked of coordinators without a gateway.
    Asks = 7,
    /// Which workers are of one machine.
    Machines = 8,
}

/// The generator for a purpose; `number` tells several of one purpose apart.
pub fn rng(seed: u64, purpose: Purpose, number: u64) -> Rng {
    Rng::new(seed_of(seed, purpose, number))
}

/// A seed for whoever makes its own generator.
pub fn seed_of(seed: u64, purpose: Purpose, number: u64) -> u64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(purpose as u64).to_le_bytes());
    bytes[8..].copy_from_slice(&number.to_le_bytes());
    xxh3_64_with_seed(&bytes, seed)
}

/// A number in [low, high].
pub fn between(rng: &mut Rng, low: u64, high: u64) -> u64 {
    low + rng.below(high - low + 1)
}

/// True in `percent` of 100 cases.
pub fn chance(rng: &mut Rng, percent: u64) -> bool {
    rng.below(100) < percent
}
