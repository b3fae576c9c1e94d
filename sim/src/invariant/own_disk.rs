//! R1: a coordinator that lost power finds on its disk what it needs to go on: it never ends over what is written there.
//! Nor does one end because it was removed or has lost its data, unless it was or has. One on whose disk a bit has flipped
//! says so and ends: it does not go on without what was there.

use super::{Invariant, Look};
use crate::host::Ended;
use crate::topology::kind;

/// Why a coordinator's process may end by itself in a run: its disk is full, also where that keeps it from joining.
const MAY: &[&str] = &["full", "no storage space"];

#[derive(Default)]
pub(super) struct OwnDisk {
    /// Endings looked at so far.
    seen: usize,
}

impl Invariant for OwnDisk {
    fn name(&self) -> &'static str {
        "R1 a disk is enough"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        let seen = look.world.seen();
        for Ended { host, why, wanted } in &seen.endings[self.seen..] {
            if kind(host) == "coordinator" && !wanted && !MAY.iter().any(|word| why.contains(word)) {
                return Err(format!("{host} ended: {why}"));
            }
        }
        self.seen = seen.endings.len();
        match &seen.rotten_serves {
            Some(host) => Err(format!("a bit on {host}'s disk has flipped, and it serves")),
            None => Ok(()),
        }
    }
}
