//! A look at a running coordinator from inside its process: what it holds and who it says leads. For checks that compare
//! nodes; it changes nothing in the ledger and asks nobody.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use baton_core::{NodeId, RequestId};

use crate::log::{self, MemoryDisk};
use crate::raft::{Node, read_vote};
use crate::state::{self, Ledger};

/// Looks at one coordinator for as long as it runs. Clones look at the same one.
#[derive(Clone, Default)]
pub struct Observer(Arc<Mutex<Weak<Node>>>);

/// What a node that takes part knew at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    pub node: NodeId,
    /// Whom it holds for the leader.
    pub leader: Option<NodeId>,
    pub term: u64,
    /// Index of the last entry applied to its ledger.
    pub index: u64,
    /// Requests the ledger holds open.
    pub open: Vec<RequestId>,
}

/// The group as one node knew it at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub node: NodeId,
    /// Index of the last entry applied to its ledger.
    pub index: u64,
    pub voters: BTreeSet<u64>,
    /// Members without a vote.
    pub learners: BTreeSet<u64>,
    /// Voters change just now: there are old ones beside the new ones.
    pub in_change: bool,
    /// Members of whom the ledger knows that they hold a part of the log: without it they must not vote again.
    pub known: BTreeSet<u64>,
    /// Members that the ledger wants gone, and numbers that are on their way into the group.
    pub unsettled: BTreeSet<u64>,
}

impl Observer {
    pub(crate) fn follow(&self, node: &Arc<Node>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(node);
    }

    fn node(&self) -> Option<Arc<Node>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    /// None: it has ended, or stands aside.
    pub fn look(&self) -> Option<Observed> {
        let node = self.node()?;
        let standing = node.standing().borrow().clone();
        let ledger = node.ledger();
        let (index, open) = (ledger.index(), ledger.open().map(|(id, _)| *id).collect());
        Some(Observed { node: node.id(), leader: standing.leader, term: standing.term, index, open })
    }

    /// This node and the term it leads in; None where it does not.
    pub fn leads(&self) -> Option<(NodeId, u64)> {
        let node = self.node()?;
        let standing = node.standing();
        let standing = standing.borrow();
        (standing.leader == Some(node.id())).then_some((node.id(), standing.term))
    }

    /// Who belongs to the group.
    pub fn group(&self) -> Option<Group> {
        let node = self.node()?;
        let members = node.members();
        let voters = members.voters();
        let learners = members.iter().map(|(id, _)| id).filter(|id| !voters.contains(id)).collect();
        let ledger = node.ledger();
        let nodes = ledger.nodes();
        let known = members.iter().map(|(id, _)| id).filter(|id| nodes.has_seen(*id)).collect();
        let removed = members.iter().map(|(id, _)| id).filter(|id| nodes.has_removed(*id));
        let unsettled = removed.chain(nodes.joining().map(|(id, _)| id)).collect();
        let (index, in_change) = (ledger.index(), members.in_change);
        Some(Group { node: node.id(), index, voters, learners, in_change, known, unsettled })
    }

    /// Index of the last entry applied.
    pub fn index(&self) -> Option<u64> {
        Some(self.node()?.ledger().index())
    }

    /// Index and hash of the ledger; takes as long as writing the ledger out does.
    pub fn hash(&self) -> Option<(u64, u64)> {
        let node = self.node()?;
        let ledger = node.ledger();
        Some((ledger.index(), state::hash(&ledger)))
    }

    /// Makes the node save its ledger, as it does when its log has become long.
    pub fn ask_to_save(&self) {
        if let Some(node) = self.node() {
            node.ask_to_save();
        }
    }

    /// Reads the ledger; entries wait meanwhile.
    pub fn read<T>(&self, read: impl FnOnce(&Ledger) -> T) -> Option<T> {
        Some(read(&self.node()?.ledger()))
    }
}

/// What a loss of power would leave of a coordinator now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Durable {
    /// Term and candidate it has voted for. Later votes are greater: of two candidates in a term the one with the larger
    /// number may still be voted for.
    pub vote: Option<(u64, NodeId)>,
    /// Of its last entry.
    pub index: u64,
}

impl Durable {
    /// None: there is nothing it could start from.
    pub fn on(disk: &MemoryDisk) -> Option<Durable> {
        let (vote, index) = log::durable(disk).ok()?;
        Some(Durable { vote: vote.and_then(|vote| read_vote(&vote)), index })
    }
}
