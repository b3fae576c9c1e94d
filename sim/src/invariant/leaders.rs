//! R1: no term has two leaders.

use std::collections::BTreeMap;

use baton_core::NodeId;

use super::{Invariant, Look};

#[derive(Default)]
pub(super) struct Leaders {
    by_term: BTreeMap<u64, NodeId>,
}

impl Invariant for Leaders {
    fn name(&self) -> &'static str {
        "R1 one leader a term"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        for observer in look.world.seen().coordinators.values() {
            let Some((node, term)) = observer.leads() else { continue };
            let first = *self.by_term.entry(term).or_insert_with(|| {
                look.world.record.note(&format!("coordinator-{node}"), format!("leads in term {term}"));
                node
            });
            if first != node {
                return Err(format!("nodes {first} and {node} both lead in term {term}"));
            }
        }
        Ok(())
    }
}
