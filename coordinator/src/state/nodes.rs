//! The coordinators themselves, as far as Raft's membership does not say it: numbers given, who is on the way in, who
//! has ever held a part of the log, and who has left for good. A number is given once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use baton_core::Refused;
use baton_core::planted::{self, Bug};
use serde::{Deserialize, Serialize};

use super::Outcome;

/// Nodes on their way in at a time; more are refused.
pub const NODES_JOINING_MAX: usize = 4;
/// Answered joins remembered, so that repeating one gives the same number.
pub const JOINS_REMEMBERED_MAX: usize = 64;
/// Removed nodes remembered, so that one that still runs can be told; the lowest number is forgotten first.
pub const NODES_REMOVED_MAX: usize = 1024;

/// Numbers and comings and goings of coordinators.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nodes {
    /// The largest number ever given or heard of.
    highest: u64,
    joining: BTreeMap<u64, Join>,
    numbers: VecDeque<(String, u64)>,
    seen: BTreeSet<u64>,
    removed: BTreeSet<u64>,
}

/// A node that has a number and does not vote yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    pub address: String,
    /// The node that leaves once this one votes, 0 for none.
    pub replaces: u64,
}

/// What can be said about coordinators. Each may be repeated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeCommand {
    /// Gives a number. The key is `process_key`; a repetition may bring a new address.
    Add { process_key: String, address: String, replaces: u64, above: u64 },
    /// The node votes now; whom it replaces leaves.
    Settle { node: u64 },
    /// The node has held a part of the log: without its data it must not come back.
    See { node: u64 },
    /// The node leaves for ever.
    Remove { node: u64 },
}

impl Nodes {
    pub fn joining(&self) -> impl Iterator<Item = (u64, &Join)> {
        self.joining.iter().map(|(node, join)| (*node, join))
    }

    /// Whether the node has ever held a part of the log.
    pub fn has_seen(&self, node: u64) -> bool {
        self.seen.contains(&node) || self.removed.contains(&node)
    }

    pub fn has_removed(&self, node: u64) -> bool {
        self.removed.contains(&node)
    }

    /// The number a joining process was given.
    pub fn number(&self, process_key: &str) -> Option<u64> {
        self.numbers.iter().find(|(key, _)| key == process_key).map(|(_, node)| *node)
    }

    pub(super) fn apply(&mut self, command: NodeCommand) -> Outcome {
        match command {
            NodeCommand::Add { process_key, address, replaces, above } => {
                return self.add(process_key, Join { address, replaces }, above);
            }
            NodeCommand::Settle { node } => {
                if let Some(join) = self.joining.remove(&node)
                    && join.replaces != 0
                {
                    self.remove(join.replaces);
                }
            }
            NodeCommand::See { node } if !self.removed.contains(&node) => drop(self.seen.insert(node)),
            NodeCommand::See { .. } => {}
            NodeCommand::Remove { node } => self.remove(node),
        }
        Outcome::NodeNoted
    }

    fn add(&mut self, process_key: String, join: Join, above: u64) -> Outcome {
        if let Some(node) = self.number(&process_key) {
            if let Some(known) = self.joining.get_mut(&node) {
                known.address = join.address;
            }
            return Outcome::NodeAdded { node };
        }
        if self.joining.len() >= NODES_JOINING_MAX {
            return Outcome::Refused(Refused::NoCapacity);
        }
        let ever = if planted::is(Bug::NumberTwice) { 0 } else { self.highest };
        self.highest = ever.max(above).saturating_add(1);
        self.joining.insert(self.highest, join);
        self.numbers.push_back((process_key, self.highest));
        if self.numbers.len() > JOINS_REMEMBERED_MAX {
            self.numbers.pop_front();
        }
        Outcome::NodeAdded { node: self.highest }
    }

    fn remove(&mut self, node: u64) {
        self.joining.remove(&node);
        self.seen.remove(&node);
        self.highest = self.highest.max(node);
        self.removed.insert(node);
        if self.removed.len() > NODES_REMOVED_MAX {
            self.removed.pop_first();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(nodes: &mut Nodes, key: &str, replaces: u64, above: u64) -> Outcome {
        let (process_key, address) = (key.to_string(), format!("{key}:1"));
        nodes.apply(NodeCommand::Add { process_key, address, replaces, above })
    }

    #[test]
    fn a_number_is_given_once_and_the_same_for_the_same_key() {
        let mut nodes = Nodes::default();
        assert_eq!(add(&mut nodes, "a", 0, 3), Outcome::NodeAdded { node: 4 });
        assert_eq!(add(&mut nodes, "a", 0, 3), Outcome::NodeAdded { node: 4 });
        nodes.apply(NodeCommand::Remove { node: 4 });
        assert_eq!(add(&mut nodes, "a", 0, 3), Outcome::NodeAdded { node: 4 }, "whoever asks late learns its number");
        assert!(nodes.has_removed(4) && nodes.joining().count() == 0, "and does not come back by it");
        nodes.apply(NodeCommand::Remove { node: 9 });
        assert_eq!(add(&mut nodes, "b", 0, 3), Outcome::NodeAdded { node: 10 }, "not even a number only heard of");
    }

    #[test]
    fn who_is_replaced_leaves_when_the_other_votes() {
        let mut nodes = Nodes::default();
        nodes.apply(NodeCommand::See { node: 2 });
        add(&mut nodes, "a", 2, 3);
        assert!(nodes.has_seen(2) && !nodes.has_removed(2) && nodes.joining().count() == 1);
        nodes.apply(NodeCommand::Settle { node: 4 });
        nodes.apply(NodeCommand::Settle { node: 4 });
        assert!(nodes.has_removed(2) && nodes.joining().count() == 0);
        nodes.apply(NodeCommand::See { node: 2 });
        assert!(nodes.has_seen(2), "what was removed stays known");
    }

    #[test]
    fn joins_and_memories_are_bounded() {
        let mut nodes = Nodes::default();
        for key in 0..NODES_JOINING_MAX {
            add(&mut nodes, &key.to_string(), 0, 1);
        }
        assert_eq!(add(&mut nodes, "more", 0, 1), Outcome::Refused(Refused::NoCapacity));
        for node in 0..2 * NODES_REMOVED_MAX as u64 {
            nodes.apply(NodeCommand::Remove { node: node + 1 });
            add(&mut nodes, &format!("key {node}"), 0, 0);
        }
        assert!(nodes.removed.len() <= NODES_REMOVED_MAX && nodes.numbers.len() <= JOINS_REMEMBERED_MAX);
    }
}
