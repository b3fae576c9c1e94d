//! R3: ledgers that have applied the same entries are equal, whoever holds them and however they came by them.

use std::collections::BTreeMap;

use super::{Invariant, Look};

#[derive(Default)]
pub(super) struct Ledgers {
    /// Hash by index, and who had it first.
    hashes: BTreeMap<u64, (u64, String)>,
    last: BTreeMap<String, u64>,
}

impl Invariant for Ledgers {
    fn name(&self) -> &'static str {
        "R3 equal ledgers"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        if !look.is_one_of(3) {
            return Ok(());
        }
        for (host, observer) in &look.world.seen().coordinators {
            let Some(index) = observer.index() else { continue };
            if self.last.insert(host.clone(), index) == Some(index) {
                continue;
            }
            let Some((index, hash)) = observer.hash() else { continue };
            let (first, whose) = self.hashes.entry(index).or_insert_with(|| (hash, host.clone()));
            if *first != hash {
                return Err(format!("at index {index}, {whose} has {first:016x} and {host} has {hash:016x}"));
            }
        }
        Ok(())
    }
}
