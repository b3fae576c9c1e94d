//! Who belongs to the group, and the leader's changes of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use baton_core::NodeId;
use openraft::alias::StoredMembershipOf;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::{BasicNode, ChangeMembers, Instant};

use super::ask::Known;
use super::types::{Raft, Types, scoped};
use super::{Node, QUORUM_SILENCE_MAX, Standing};
use crate::state::Ledger;

/// A change of the group takes two entries and, for a new voter, its answer.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);

type Stored = StoredMembershipOf<Types>;

/// One coordinator of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) address: String,
    /// False while it only learns.
    pub(crate) voter: bool,
}

/// The group as this node knows it. Clones are cheap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Members {
    by_node: Arc<BTreeMap<u64, Member>>,
    /// A change of voters is under way.
    pub(crate) in_change: bool,
    /// Index of the entry it comes from.
    since: Option<u64>,
}

impl Members {
    /// The group as configured, before there is any other.
    pub(super) fn configured(addresses: &BTreeMap<u64, String>) -> Members {
        let member = |(node, address): (&u64, &String)| (*node, Member { address: address.clone(), voter: true });
        Members { by_node: Arc::new(addresses.iter().map(member).collect()), in_change: false, since: None }
    }

    pub(super) fn follow(&mut self, stored: &Stored, addresses: &BTreeMap<u64, String>) {
        let Some(since) = stored.log_id().map(|id| id.index) else { return };
        if self.since == Some(since) {
            return;
        }
        let membership = stored.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let member = |(node, known): (&u64, &BasicNode)| {
            let address = addresses.get(node).unwrap_or(&known.addr).clone();
            (*node, Member { address, voter: voters.contains(node) })
        };
        self.by_node = Arc::new(membership.nodes().map(member).collect());
        self.in_change = membership.get_joint_config().len() > 1;
        self.since = Some(since);
    }

    /// A group of these (node, votes), each at its `test_address`.
    #[cfg(test)]
    pub(crate) fn of(members: impl Iterator<Item = (u64, bool)>) -> Members {
        let member = |(node, voter)| (node, Member { address: Members::test_address(node), voter });
        Members { by_node: Arc::new(members.map(member).collect()), in_change: false, since: None }
    }

    #[cfg(test)]
    pub(crate) fn test_address(node: u64) -> String {
        format!("node-{node}:1")
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Member)> {
        self.by_node.iter().map(|(node, member)| (*node, member))
    }

    pub(crate) fn get(&self, node: u64) -> Option<&Member> {
        self.by_node.get(&node)
    }

    pub(crate) fn voters(&self) -> BTreeSet<u64> {
        self.iter().filter(|(_, member)| member.voter).map(|(node, _)| node).collect()
    }

    pub(crate) fn addresses(&self) -> BTreeMap<u64, String> {
        self.iter().map(|(node, member)| (node, member.address.clone())).collect()
    }

    /// Whether this node needs nobody's vote.
    pub(super) fn is_alone(&self, node: NodeId) -> bool {
        self.get(node.0).is_some_and(|member| member.voter) && self.iter().filter(|(_, m)| m.voter).count() == 1
    }
}

/// How far the others are, as the leader sees it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    /// Index of the leader's last entry.
    pub(crate) last: u64,
    /// Index up to which each node holds the same entries.
    pub(crate) matched: BTreeMap<u64, u64>,
    /// Since each node last answered.
    pub(crate) silent: BTreeMap<u64, Duration>,
}

impl Progress {
    /// Whether a node has answered lately.
    pub(crate) fn answers(&self, node: u64) -> bool {
        self.silent.get(&node).is_some_and(|silent| *silent < QUORUM_SILENCE_MAX)
    }
}

/// Why the group was not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChangeError {
    #[error("node does not lead")]
    NotLeader,
    #[error("the group was not changed: {0}")]
    Failed(String),
}

/// What this node can say about another one.
pub(super) fn known(raft: &Raft, id: NodeId, standing: &Standing, ledger: &RwLock<Ledger>, node: u64) -> Known {
    let (applied_term, last, acked, holds) = {
        let metrics = raft.metrics();
        let now = metrics.borrow_watched();
        let matched = now.replication.as_ref().and_then(|matched| matched.get(&node).copied().flatten());
        let applied_term = now.last_applied.map(|applied| applied.leader_id.term);
        (applied_term, now.last_log_index, now.last_quorum_acked, matched.is_some())
    };
    let followed = acked.is_some_and(|acked| acked.elapsed() < QUORUM_SILENCE_MAX) || standing.members.is_alone(id);
    let ledger = ledger.read().expect("ledger lock");
    Known {
        cluster: ledger.cluster().to_string(),
        leads: standing.leader == Some(id) && applied_term == Some(standing.term) && followed,
        // The first entry only names the group.
        fresh: last.unwrap_or(0) == 0,
        seen: holds || ledger.nodes().has_seen(node),
        removed: ledger.nodes().has_removed(node) && standing.members.get(node).is_none(),
    }
}

impl Node {
    pub(crate) fn members(&self) -> Members {
        self.standing.borrow().members.clone()
    }

    /// How far the others are; None where this node does not lead.
    pub(crate) fn progress(&self) -> Option<Progress> {
        let now = self.raft.metrics().borrow_watched().clone();
        let matched = now.replication?.into_iter().filter_map(|(node, matched)| Some((node, matched?.index)));
        let heard = now.heartbeat.unwrap_or_default().into_iter();
        let silent = heard.filter_map(|(node, at)| Some((node, at?.elapsed())));
        let mut silent: BTreeMap<u64, Duration> = silent.collect();
        silent.insert(self.id.0, Duration::ZERO);
        Some(Progress { last: now.last_log_index.unwrap_or(0), matched: matched.collect(), silent })
    }

    /// Takes a node in that only learns, or corrects its address.
    pub(crate) async fn add_learner(&self, node: u64, address: &str) -> Result<(), ChangeError> {
        let node = BTreeMap::from([(node, BasicNode::new(address))]);
        self.change(ChangeMembers::SetNodes(node)).await
    }

    /// Makes these nodes, all of them members, the voters; others that voted go.
    pub(crate) async fn set_voters(&self, voters: BTreeSet<u64>) -> Result<(), ChangeError> {
        self.change(ChangeMembers::ReplaceAllVoters(voters)).await
    }

    /// Drops a node that only learns.
    pub(crate) async fn remove_learner(&self, node: u64) -> Result<(), ChangeError> {
        self.change(ChangeMembers::RemoveNodes(BTreeSet::from([node]))).await
    }

    async fn change(&self, change: ChangeMembers<u64, BasicNode>) -> Result<(), ChangeError> {
        let change = scoped(self.seed ^ 4, self.raft.change_membership(change, false));
        match tokio::time::timeout(CHANGE_TIMEOUT, change).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_)))) => Err(ChangeError::NotLeader),
            Ok(Err(error)) => Err(ChangeError::Failed(error.to_string())),
            Err(_) => Err(ChangeError::Failed(format!("{} s passed", CHANGE_TIMEOUT.as_secs()))),
        }
    }

    /// Asks another voter to lead. It does, or an election follows.
    pub(crate) async fn hand_over(&self, to: u64) -> Result<(), ChangeError> {
        let handed = scoped(self.seed ^ 5, async { self.raft.trigger().transfer_leader(to).await }).await;
        handed.map_err(|error| ChangeError::Failed(error.to_string()))
    }
}
