//! R1: what coordinators have promised each other is on their disks, and stays there. Who leads a term has the durable votes
//! of a quorum, for itself or for who came after; a vote on a disk only grows; an entry that was applied anywhere is durable
//! on a quorum. That a term has one leader is not promised: of two candidates the one with the larger number takes over.
//!
//! A quorum is one of the group as who has applied most knows it. While voters change it would have to be one of two
//! groups, and nothing is asked; a voter whose disk was lost counts as if it had kept everything.

use std::collections::{BTreeMap, BTreeSet};

use baton_coordinator::{Durable, Group};
use baton_core::NodeId;

use super::{Invariant, Look};

/// Reading the logs takes a while; a new leader is looked at in any case.
const ONE_OF: u64 = 40;

type Vote = (u64, NodeId);

#[derive(Default)]
pub(super) struct OnDisks {
    led: BTreeSet<Vote>,
    /// By number.
    votes: BTreeMap<u64, Option<Vote>>,
}

impl OnDisks {
    /// `disks`: by the number of whom they belong to.
    fn check(
        &mut self,
        new: &[(Vote, Group)],
        most: Option<Group>,
        disks: &BTreeMap<u64, Durable>,
    ) -> Result<(), String> {
        let of = |group: &Group, has: &dyn Fn(&Durable) -> bool| {
            group.voters.iter().filter(|voter| disks.get(voter).is_none_or(has)).count()
        };
        for ((term, node), group) in new.iter().filter(|(_, group)| !group.in_change) {
            let votes = of(group, &|disk| disk.vote >= Some((*term, *node)));
            if votes <= group.voters.len() / 2 {
                let all = group.voters.len();
                return Err(format!("node {node} leads in term {term}, for which {votes} of {all} disks have voted"));
            }
        }
        for (number, disk) in disks {
            let before = self.votes.insert(*number, disk.vote).flatten();
            if before > disk.vote {
                return Err(format!("the disk of node {number} has the vote {:?} after {before:?}", disk.vote));
            }
        }
        // One that has just been taken in has learned of no group yet.
        let Some(group) = most.filter(|group| !group.in_change && !group.voters.is_empty()) else { return Ok(()) };
        let have = of(&group, &|disk| disk.index >= group.index);
        match have <= group.voters.len() / 2 {
            true => {
                let (all, index) = (group.voters.len(), group.index);
                Err(format!("entry {index} was applied, and {have} of {all} disks have it"))
            }
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
        let mut new = Vec::new();
        for (host, observer) in &seen.coordinators {
            let Some((node, term)) = observer.leads().filter(|(node, term)| self.led.insert((*term, *node))) else {
                continue;
            };
            look.world.record.note(host, format!("leads in term {term}"));
            new.extend(observer.group().map(|group| ((term, node), group)));
        }
        if new.is_empty() && !look.is_one_of(ONE_OF) {
            return Ok(());
        }
        let mut disks = BTreeMap::new();
        // One that is joining has no number yet, and one whose disk was lost is nobody any more.
        for (host, number) in seen.numbers.iter().filter(|(host, number)| seen.lost.get(*host) != Some(number)) {
            // A disk that nothing can start from is somebody else's finding.
            let Some(durable) = Durable::on(&look.world.disks[host]) else { return Ok(()) };
            disks.insert(*number, durable);
        }
        let most = seen.coordinators.values().filter_map(|observer| observer.group()).max_by_key(|group| group.index);
        self.check(&new, most, &disks)
    }
}
