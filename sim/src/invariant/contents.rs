//! K3: blocks of one name hold the same bytes, on every worker and at all times.

use std::collections::BTreeMap;

use baton_core::BlockHash;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Invariant, Look};
use crate::memory::read_layer_into;
use crate::model::spec;

/// Reading all blocks takes a while.
const ONE_OF: u64 = 20;

#[derive(Default)]
pub(super) struct Contents {
    /// Hash of the bytes, and who had them first.
    bytes: BTreeMap<BlockHash, (u64, String)>,
}

impl Contents {
    fn compare(&mut self, look: &Look) -> Result<(), String> {
        for (host, shell) in &look.world.seen().workers {
            // Another class of arithmetic computes other bytes.
            if shell.spec.numerics != spec().numerics {
                continue;
            }
            let (cache, layers) = (shell.engine.cache(), shell.spec.layout.layers as usize);
            let mut bytes = vec![0; shell.spec.layout.layer_bytes()];
            for (name, index) in cache.named() {
                let of_layer = |hash, layer| {
                    read_layer_into(cache.arena(), index, layer, &mut bytes);
                    xxh3_64_with_seed(&bytes, hash)
                };
                let hash = (0..layers).fold(0, of_layer);
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
        if look.is_one_of(ONE_OF) { self.compare(look) } else { Ok(()) }
    }

    fn end(&mut self, look: &Look) -> Result<(), String> {
        self.compare(look)
    }
}
