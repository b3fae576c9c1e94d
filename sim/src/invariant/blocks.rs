//! K1: on every worker, blocks free + used + in flight + cached = all blocks.

use super::{Invariant, Look};

pub(super) struct Blocks;

impl Invariant for Blocks {
    fn name(&self) -> &'static str {
        "K1 blocks add up"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        for (host, shell) in &look.world.seen().workers {
            let s = shell.engine.cache().stats();
            if s.free + s.used + s.in_flight + s.cached != s.total {
                return Err(format!(
                    "{host}: {} free + {} used + {} in flight + {} cached, of {}",
                    s.free, s.used, s.in_flight, s.cached, s.total
                ));
            }
        }
        Ok(())
    }
}
