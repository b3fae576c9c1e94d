//! K3: blocks of one name hold the same bytes, on every worker and at all times.

use std::collections::BTreeMap;

use baton_core::BlockHash;
use xxhash_rust::xxh3::xxh3_64;

use super::{Invariant, Look};
use crate::memory::read_layer;
use crate::model::spec;

/// Every so many steps: reading all blocks takes a while.
const EVERY: u32 = 10;

#[derive(Default)]
pub(super) struct Contents {
    /// Hash of the bytes, and who had them first.
    bytes: BTreeMap<BlockHash, (u64, String)>,
    steps: u32,
}

impl Contents {
    fn compare(&mut self, look: &Look) -> Result<(), String> {
        for (host, shell) in &look.world.seen().workers {
            // Another class of arithmetic computes other bytes.
            if shell.spec.numerics != spec().numerics {
                continue;
            }
            let (cache, layers) = (shell.engine.cache(), shell.spec.layout.layers as usize);
            for (name, index) in cache.named() {
                let bytes: Vec<u8> = (0..layers).flat_map(|layer| read_layer(cache.arena(), index, layer)).collect();
                let hash = xxh3_64(&bytes);
                let (first, whose) = self.bytes.entry(name).or_insert_with(|| (hash, host.clone()));
                if *first != hash {
                    return Err(format!("block {index} of {host} and one of {whose} have one name and other bytes"));
                }
            }
        }
        Ok(())
    }
}

impl Invariant for Contents {
    fn name(&self) -> &'static str {
        "K3 a name is its bytes"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        self.steps += 1;
        if self.steps.is_multiple_of(EVERY) { self.compare(look) } else { Ok(()) }
    }

    fn end(&mut self, look: &Look) -> Result<(), String> {
        self.compare(look)
    }
}
