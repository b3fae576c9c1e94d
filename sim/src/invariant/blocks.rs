//! K1, K2: on every worker each block is in exactly one state, and what the lists say adds up to all blocks.

use super::{Invariant, Look};

pub(super) struct Blocks;

impl Invariant for Blocks {
    fn name(&self) -> &'static str {
        "K1 blocks add up"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        if !look.is_one_of(3) {
            return Ok(());
        }
        for (host, shell) in &look.world.seen().workers {
            shell.engine.cache().audit().map_err(|what| format!("{host}: {what}"))?;
        }
        Ok(())
    }
}
