//! R1: what coordinators have promised each other is on their disks. Who leads a term has the durable votes of a quorum, and
//! an entry that was applied anywhere is durable on one.

use std::collections::BTreeSet;

use baton_coordinator::Durable;
use baton_core::NodeId;

use super::{Invariant, Look};

/// Reading the logs takes a while; a new leader is looked at in any case.
const ONE_OF: u64 = 40;

#[derive(Default)]
pub(super) struct OnDisks {
    led: BTreeSet<(u64, NodeId)>,
}

impl Invariant for OnDisks {
    fn name(&self) -> &'static str {
        "R1 promises are on disks"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        let seen = look.world.seen();
        let leaders = seen.coordinators.values().filter_map(|observer| observer.leads());
        let new: Vec<_> = leaders.filter(|(node, term)| self.led.insert((*term, *node))).collect();
        if new.is_empty() && !look.is_one_of(ONE_OF) {
            return Ok(());
        }
        let disks: Option<Vec<Durable>> = look.world.disks.values().map(Durable::on).collect();
        // A disk that nothing can start from is somebody else's finding.
        let Some(disks) = disks else { return Ok(()) };
        let quorum = disks.len() / 2 + 1;
        for (node, term) in new {
            let votes = disks.iter().filter(|disk| disk.term >= term).count();
            if votes < quorum {
                return Err(format!("node {node} leads in term {term}, which {votes} of {} disks know", disks.len()));
            }
        }
        let applied = seen.coordinators.values().filter_map(|observer| observer.index()).max().unwrap_or(0);
        let have = disks.iter().filter(|disk| disk.index >= applied).count();
        match have < quorum {
            true => Err(format!("entry {applied} was applied, and {have} of {} disks have it", disks.len())),
            false => Ok(()),
        }
    }
}
