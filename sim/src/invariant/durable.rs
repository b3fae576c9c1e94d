//! R1: what coordinators have promised each other is on their disks, and stays there. Who leads a term has the durable votes
//! of a quorum, for itself or for who came after; a vote on a disk only grows; an entry that was applied anywhere is durable
//! on a quorum. That a term has one leader is not promised: of two candidates the one with the larger number takes over.

use std::collections::{BTreeMap, BTreeSet};

use baton_coordinator::Durable;
use baton_core::NodeId;

use super::{Invariant, Look};

/// Reading the logs takes a while; a new leader is looked at in any case.
const ONE_OF: u64 = 40;

type Vote = (u64, NodeId);

#[derive(Default)]
pub(super) struct OnDisks {
    led: BTreeSet<Vote>,
    votes: BTreeMap<String, Option<Vote>>,
}

impl OnDisks {
    fn check(&mut self, new: &[Vote], disks: &BTreeMap<&String, Durable>, applied: u64) -> Result<(), String> {
        let (all, quorum) = (disks.len(), disks.len() / 2 + 1);
        for (term, node) in new {
            let votes = disks.values().filter(|disk| disk.vote >= Some((*term, *node))).count();
            if votes < quorum {
                return Err(format!("node {node} leads in term {term}, for which {votes} of {all} disks have voted"));
            }
        }
        for (host, disk) in disks {
            let before = self.votes.insert(host.to_string(), disk.vote).flatten();
            if before > disk.vote {
                return Err(format!("the disk of {host} has the vote {:?} after {before:?}", disk.vote));
            }
        }
        let have = disks.values().filter(|disk| disk.index >= applied).count();
        match have < quorum {
            true => Err(format!("entry {applied} was applied, and {have} of {all} disks have it")),
            false => Ok(()),
        }
    }
}

impl Invariant for OnDisks {
    fn name(&self) -> &'static str {
        "R1 promises are on disks"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        let seen = look.world.seen();
        let leaders = seen.coordinators.values().filter_map(|observer| observer.leads());
        let new: Vec<Vote> = leaders.map(|(node, term)| (term, node)).filter(|vote| self.led.insert(*vote)).collect();
        for (term, node) in &new {
            look.world.record.note(&format!("coordinator-{node}"), format!("leads in term {term}"));
        }
        if new.is_empty() && !look.is_one_of(ONE_OF) {
            return Ok(());
        }
        let disks: Option<BTreeMap<&String, Durable>> =
            look.world.disks.iter().map(|(host, disk)| Some((host, Durable::on(disk)?))).collect();
        // A disk that nothing can start from is somebody else's finding.
        let Some(disks) = disks else { return Ok(()) };
        let applied = seen.coordinators.values().filter_map(|observer| observer.index()).max().unwrap_or(0);
        self.check(&new, &disks, applied)
    }
}
