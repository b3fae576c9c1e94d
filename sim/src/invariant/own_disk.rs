//! R1: a coordinator that lost power finds on its disk what it needs to go on: it never ends over what is written there.

use super::{Invariant, Look};
use crate::topology::kind;

/// Why a coordinator's process may end by itself in a run.
const MAY: &[&str] = &["full"];

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
        for (host, why) in &seen.endings[self.seen..] {
            if kind(host) == "coordinator" && !MAY.iter().any(|word| why.contains(word)) {
                return Err(format!("{host} ended: {why}"));
            }
        }
        self.seen = seen.endings.len();
        Ok(())
    }
}
