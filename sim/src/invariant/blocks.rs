//! K1, K2: on every worker each block is in exactly one state, and what the lists say adds up to all blocks.

use std::collections::BTreeMap;

use baton_core::Incarnation;

use super::{Invariant, Look};

#[derive(Default)]
pub(super) struct Blocks {
    /// Of each worker's life: how often its blocks had changed when they were last looked at.
    looked: BTreeMap<String, (Incarnation, u64)>,
}

impl Invariant for Blocks {
    fn name(&self) -> &'static str {
        "K1 blocks add up"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        if !look.is_one_of(3) {
            return Ok(());
        }
        for (host, shell) in &look.world.seen().workers {
            let now = (shell.incarnation, shell.engine.cache().moves());
            if self.looked.get(host) != Some(&now) {
                self.looked.insert(host.clone(), now);
                shell.engine.cache().audit().map_err(|what| format!("{host}: {what}"))?;
            }
        }
        Ok(())
    }
}
