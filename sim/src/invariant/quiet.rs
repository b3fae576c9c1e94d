//! K1, K4, L1: when all requests have ended, no worker holds a block for anybody and no request is open in the ledger.

use super::{Invariant, Look};

pub(super) struct Quiet;

impl Invariant for Quiet {
    fn name(&self) -> &'static str {
        "K1 nothing is held at rest"
    }

    fn end(&mut self, look: &Look) -> Result<(), String> {
        let seen = look.world.seen();
        let workers = look.world.topology.prefills + look.world.topology.decodes;
        if seen.workers.len() != workers {
            return Err(format!("{} of {workers} workers serve", seen.workers.len()));
        }
        for (host, shell) in &seen.workers {
            let s = shell.engine.cache().stats();
            if s.used + s.in_flight > 0 {
                return Err(format!("{host} holds {} blocks, and {} are in flight", s.used, s.in_flight));
            }
            let load = shell.engine.load();
            if load.running + load.waiting > 0 {
                return Err(format!("{host} still works on {} requests", load.running + load.waiting));
            }
        }
        for (host, observer) in &seen.coordinators {
            let open = observer.look().map(|observed| observed.open).unwrap_or_default();
            if let Some(first) = open.first() {
                return Err(format!("{host}: {} requests are open, {first} among them", open.len()));
            }
        }
        Ok(())
    }
}
