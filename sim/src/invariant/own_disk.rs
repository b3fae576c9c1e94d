//! R1: a coordinator that lost power finds on its disk what it needs to go on: it never ends over what is written there.

use std::collections::BTreeSet;

use super::{Invariant, Look};
use crate::topology::kind;

/// Why a coordinator's process may end by itself in a run.
const MAY: &[&str] = &["full"];

#[derive(Default)]
pub(super) struct OwnDisk {
    seen: BTreeSet<String>,
}

impl Invariant for OwnDisk {
    fn name(&self) -> &'static str {
        "R1 a disk is enough"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        for (host, why) in &look.world.seen().exited {
            let new = self.seen.insert(format!("{host} {why}"));
            if new && kind(host) == "coordinator" && !MAY.iter().any(|word| why.contains(word)) {
                return Err(format!("{host} ended: {why}"));
            }
        }
        Ok(())
    }
}
