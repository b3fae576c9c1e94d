//! C2: a change of the coordinators' group loses no majority: voters come one at a time, and of those that vote from then
//! on a majority is there. No number is given to two nodes, and no node leads under a number that has left.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{Invariant, Look};
use crate::members::group;

/// A change takes longer than so many looks.
const ONE_OF: u64 = 3;
/// How long a leader may take a node that is gone for one that is there.
const GONE_MAX: Duration = Duration::from_millis(2_000);

#[derive(Default)]
pub(super) struct Members {
    /// Voters when they were looked at last, and the term of the leader that knew them.
    voters: BTreeSet<u64>,
    term: u64,
    /// When each number took part last.
    there: BTreeMap<u64, Duration>,
    /// Which host a number belongs to, and which of its disks.
    disks: BTreeMap<u64, (String, u64)>,
}

impl Invariant for Members {
    fn name(&self) -> &'static str {
        "C2 a group keeps its majority"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        if !look.is_one_of(ONE_OF) {
            return Ok(());
        }
        {
            let seen = look.world.seen();
            for (host, observer) in &seen.coordinators {
                let Some(node) = observer.group().map(|group| group.node.0) else { continue };
                self.there.insert(node, look.now);
                let disk = (host.clone(), seen.wipes.get(host).copied().unwrap_or(0));
                let first = self.disks.entry(node).or_insert_with(|| disk.clone());
                if *first != disk {
                    return Err(format!("two disks have been node {node}'s: {first:?} and {disk:?}"));
                }
            }
        }
        // Who was deposed and does not know it yet knows an older group.
        let Some((term, group)) = group(look.world).filter(|(term, _)| *term >= self.term) else { return Ok(()) };
        self.term = term;
        if group.in_change || group.voters == self.voters {
            return Ok(());
        }
        let came: Vec<&u64> = group.voters.difference(&self.voters).collect();
        if came.len() > 1 && !self.voters.is_empty() {
            return Err(format!("{came:?} vote at once: {:?} became {group:?} in term {term}", self.voters));
        }
        let is_there = |node: &&u64| self.there.get(node).is_some_and(|at| look.now <= *at + GONE_MAX);
        let there = group.voters.iter().filter(is_there).count();
        if there <= group.voters.len() / 2 && !self.voters.is_empty() {
            return Err(format!("{:?} became {:?}, of whom {there} are there", self.voters, group.voters));
        }
        self.voters = group.voters;
        Ok(())
    }
}
