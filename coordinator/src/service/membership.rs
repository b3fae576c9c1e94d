//! Coordinators that join, leave, replace one another and hand leadership over. What is wanted stands in the ledger;
//! the leader's keeper moves Raft's membership towards it, one step at a time, so that any leader can go on with it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use baton_core::{NodeId, Refused};
use baton_proto::convert::refusal;
use baton_proto::v1;
use tokio::time::{Instant, MissedTickBehavior};

use super::{Refusal, Shared, stopped, unavailable, unexpected};
use crate::raft::{ChangeError, Members, Progress};
use crate::state::{Command, Join, NodeCommand, Outcome};

/// Coordinators that vote, at most.
pub(crate) const VOTERS_MAX: usize = 5;
/// Entries that a node may be behind and still be given a vote.
const BEHIND_MAX: u64 = 256;
const ROUND: Duration = Duration::from_millis(50);
/// A leader whose disk is slow leads this long before it hands over, so that leadership does not go in circles where
/// every disk is slow.
const LEAD_MIN: Duration = Duration::from_secs(10);
/// How long a call waits for what it asked for; the keeper goes on with it afterwards too.
const CALL_PATIENCE: Duration = Duration::from_millis(1_500);
const ADDRESS_BYTES_MAX: usize = 256;
const PROCESS_KEY_BYTES_MAX: usize = 64;

/// What the keeper does next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// Takes a node in that only learns, or corrects its address.
    Learn { node: u64, address: String },
    /// Makes these the voters.
    Voters(BTreeSet<u64>),
    /// The node votes: whom it replaces leaves.
    Settle(u64),
    /// Drops a node that only learns.
    Drop(u64),
}

/// What the ledger wants of the group.
struct Wanted {
    joining: BTreeMap<u64, Join>,
    removed: BTreeSet<u64>,
}

impl Wanted {
    fn of(shared: &Shared, members: &Members) -> Wanted {
        let ledger = shared.node.ledger();
        let nodes = ledger.nodes();
        let removed = members.iter().map(|(node, _)| node).filter(|node| nodes.has_removed(*node));
        Wanted {
            joining: nodes.joining().map(|(node, join)| (node, join.clone())).collect(),
            removed: removed.collect(),
        }
    }
}

/// The next step from the group as it is to the group as it is wanted. Voters change only to a group of which a majority
/// answers, and a node gets its vote when it has caught up.
fn next(own: u64, members: &Members, progress: &Progress, wanted: &Wanted) -> Option<Step> {
    let voters = members.voters();
    let arrived = || wanted.joining.iter().filter(|(node, _)| voters.contains(node));
    if let Some((node, _)) = arrived().next().filter(|_| !members.in_change) {
        return Some(Step::Settle(*node));
    }
    let strange = |(node, join): &(&u64, &Join)| {
        !voters.contains(node) && members.get(**node).is_none_or(|member| member.address != join.address)
    };
    if let Some((node, join)) = wanted.joining.iter().find(strange) {
        return Some(Step::Learn { node: *node, address: join.address.clone() });
    }
    let ready = |node: u64| {
        let matched = progress.matched.get(&node).is_some_and(|matched| matched + BEHIND_MAX >= progress.last);
        members.get(node).is_some_and(|member| !member.voter) && matched && progress.answers(node)
    };
    let promoted = wanted.joining.iter().find(|(node, _)| ready(**node));
    let mut desired = voters.clone();
    desired.extend(promoted.map(|(node, _)| *node));
    // A leader that is replaced leads until the new one votes.
    let replaced = arrived().chain(promoted).map(|(_, join)| join.replaces).filter(|node| *node != own);
    for node in replaced.chain(wanted.removed.iter().copied()) {
        desired.remove(&node);
    }
    if (desired != voters || members.in_change) && has_majority(&desired, progress) {
        return Some(Step::Voters(desired));
    }
    let leaving = wanted.removed.iter().find(|node| members.get(**node).is_some_and(|member| !member.voter));
    leaving.map(|node| Step::Drop(*node))
}

fn has_majority(voters: &BTreeSet<u64>, progress: &Progress) -> bool {
    let answering = voters.iter().filter(|node| progress.answers(**node)).count();
    answering > voters.len() / 2
}

/// The leader's work on the group, until this node stops.
pub(super) async fn keep(shared: Arc<Shared>) {
    let mut stopping = shared.stopping.subscribe();
    let mut handed: Option<Instant> = None;
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stopped(&mut stopping) => return,
            () = async { rounds.tick().await; tend(&shared, &mut handed).await } => {}
        }
    }
}

async fn tend(shared: &Shared, handed: &mut Option<Instant>) {
    let (Some(leading), Some(progress)) = (shared.lead.now(), shared.node.progress()) else { return };
    let members = shared.node.members();
    let since = handed.map_or(leading.since, |handed| handed.max(leading.since));
    if shared.node.disk_is_slow() && since.elapsed() >= LEAD_MIN {
        *handed = Some(Instant::now());
        return hand_over(shared, &members, &progress).await;
    }
    remember(shared, &progress);
    let own = shared.node.id().0;
    let Some(step) = next(own, &members, &progress, &Wanted::of(shared, &members)) else { return };
    tracing::info!(?step, "the group changes");
    let done = match &step {
        Step::Learn { node, address } => shared.node.add_learner(*node, address).await,
        Step::Voters(voters) => shared.node.set_voters(voters.clone()).await,
        Step::Drop(node) => shared.node.remove_learner(*node).await,
        Step::Settle(node) => {
            let settle = shared.submit(Command::Node(NodeCommand::Settle { node: *node })).await;
            settle.map(drop).map_err(|refused| ChangeError::Failed(refused.detail))
        }
    };
    if let Err(error) = done {
        tracing::warn!(?step, %error, "the group did not change; the next round tries again");
    }
}

/// Makes another node the leader because this one's disk is slow.
async fn hand_over(shared: &Shared, members: &Members, progress: &Progress) {
    let Some(to) = successor(shared.node.id(), members, progress) else { return };
    tracing::warn!(to, "this leader's disk is slow: another one shall lead");
    metrics::counter!("baton_coordinator_handed_over_total", "reason" => "slow_disk").increment(1);
    if let Err(error) = shared.node.hand_over(to).await {
        tracing::warn!(%error, "leadership stays");
    }
}

/// Writes down who holds a part of the log, so that a node that has lost it is told from a new one.
fn remember(shared: &Shared, progress: &Progress) {
    let own = shared.node.id().0;
    let holders = progress.matched.keys().copied().chain([own]);
    let unseen: Vec<u64> = {
        let ledger = shared.node.ledger();
        holders.filter(|node| !ledger.nodes().has_seen(*node)).collect()
    };
    for node in unseen {
        shared.proposer.submit_unheard(Command::Node(NodeCommand::See { node }));
    }
}

impl Shared {
    /// Gives a number to a coordinator that joins.
    pub(super) async fn add_node(&self, request: v1::AddNodeRequest) -> Result<v1::NodeAdded, Refusal> {
        self.leading().await?;
        let members = self.node.members();
        self.check_join(&request, &members)?;
        let above = members.iter().map(|(node, _)| node).max().unwrap_or(0);
        let v1::AddNodeRequest { address, process_key, replaces } = request;
        let add = NodeCommand::Add { process_key, address: address.clone(), replaces, above };
        match self.submit(Command::Node(add)).await? {
            Outcome::NodeAdded { node } if self.node.ledger().nodes().has_seen(node) => {
                let detail = format!(
                    "node {node} has taken part before and its data is gone, or it was removed: it does not come back. \
                     Empty its directory and join as a new node, replacing {node} where it is still a member"
                );
                Err(refusal(Refused::Stale, detail))
            }
            Outcome::NodeAdded { node } => {
                tracing::info!(node, address, replaces, "a coordinator joins");
                let cluster = self.node.ledger().cluster().to_string();
                Ok(v1::NodeAdded { node, cluster, coordinators: super::view::coordinators(self) })
            }
            Outcome::Refused(reason) => Err(refusal(reason, "too many coordinators join at a time")),
            other => Err(unexpected(&other)),
        }
    }

    fn check_join(&self, request: &v1::AddNodeRequest, members: &Members) -> Result<(), Refusal> {
        let bad = |detail: String| Err(refusal(Refused::Incompatible, detail));
        let v1::AddNodeRequest { address, process_key, replaces } = request;
        if address.len() > ADDRESS_BYTES_MAX || !address.contains(':') {
            return bad(format!("{address:?} is not an address (host:port)"));
        }
        if !(1..=PROCESS_KEY_BYTES_MAX).contains(&process_key.len()) {
            return bad(format!("a process key has 1 to {PROCESS_KEY_BYTES_MAX} bytes"));
        }
        let ledger = self.node.ledger();
        let known = ledger.nodes().number(process_key);
        if known.is_some() {
            return Ok(());
        }
        if let Some((other, _)) = members.iter().find(|(node, m)| m.address == *address && node != replaces) {
            return bad(format!("{address} is the address of node {other}: replace that one, or choose another"));
        }
        if *replaces != 0 && members.get(*replaces).is_none() {
            return Err(refusal(Refused::Unknown, format!("node {replaces} is no member: nothing to replace")));
        }
        let voters = members.voters();
        let staying = voters.iter().filter(|node| !ledger.nodes().has_removed(**node)).count();
        let coming = ledger.nodes().joining();
        let coming = coming.filter(|(node, join)| join.replaces == 0 && !voters.contains(node)).count();
        if *replaces == 0 && staying + coming >= VOTERS_MAX {
            let detail = format!("{VOTERS_MAX} coordinators vote already or will: let one leave first, or replace one");
            return Err(refusal(Refused::NoCapacity, detail));
        }
        Ok(())
    }

    /// Takes a coordinator out of the group for good, and waits until it is out.
    pub(super) async fn remove_node(&self, node: u64) -> Result<(), Refusal> {
        self.leading().await?;
        self.check_leave(node)?;
        self.submit(Command::Node(NodeCommand::Remove { node })).await?;
        tracing::info!(node, "a coordinator leaves");
        let gone = |members: &Members| members.get(node).is_none() && !members.in_change;
        match self.wait(|standing| gone(&standing.members)).await {
            true => Ok(()),
            false => Err(unavailable("it is noted and goes on: look at `baton status`, or ask again")),
        }
    }

    fn check_leave(&self, node: u64) -> Result<(), Refusal> {
        let members = self.node.members();
        let ledger = self.node.ledger();
        let nodes = ledger.nodes();
        if nodes.has_removed(node) {
            return Ok(());
        }
        if members.get(node).is_none() && !nodes.joining().any(|(joining, _)| joining == node) {
            return Err(refusal(Refused::Unknown, format!("there is no coordinator {node}")));
        }
        let rest = |other: &u64| *other != node && !nodes.has_removed(*other);
        let rest: BTreeSet<u64> = members.voters().into_iter().filter(rest).collect();
        if rest.is_empty() {
            let detail = format!("node {node} is the last one: to replace it, let another join first");
            return Err(refusal(Refused::Incompatible, detail));
        }
        let progress = self.node.progress().unwrap_or_default();
        if members.voters().contains(&node) && !has_majority(&rest, &progress) {
            let answering = rest.iter().filter(|node| progress.answers(**node)).count();
            let detail = format!(
                "of the {} that stay {answering} answer, which is no majority: start the others first",
                rest.len()
            );
            return Err(refusal(Refused::Unavailable, detail));
        }
        Ok(())
    }

    /// Makes another node the leader; 0 leaves the choice to this one.
    pub(super) async fn transfer_leader(&self, node: u64) -> Result<(), Refusal> {
        self.leading().await?;
        let own = self.node.id();
        let members = self.node.members();
        let progress = self.node.progress().unwrap_or_default();
        let to = match node {
            0 => successor(own, &members, &progress),
            node if members.get(node).is_some_and(|member| member.voter) => Some(node),
            node => return Err(refusal(Refused::Unknown, format!("node {node} does not vote here"))),
        };
        let Some(to) = to.filter(|to| progress.answers(*to)) else {
            return Err(unavailable("no other coordinator answers"));
        };
        if to == own.0 {
            return Ok(());
        }
        self.node.hand_over(to).await.map_err(|error| unavailable(&error.to_string()))?;
        match self.wait(|standing| standing.leader == Some(NodeId(to))).await {
            true => Ok(()),
            false => Err(unavailable("the node did not take over in time; whoever leads now goes on")),
        }
    }

    async fn wait(&self, mut reached: impl FnMut(&crate::raft::Standing) -> bool) -> bool {
        let mut standing = self.node.standing();
        let reached = standing.wait_for(|standing| reached(standing));
        matches!(tokio::time::timeout(CALL_PATIENCE, reached).await, Ok(Ok(_)))
    }
}

/// The voter to lead next: one that answers, with the longest log.
pub(super) fn successor(own: NodeId, members: &Members, progress: &Progress) -> Option<u64> {
    let voters = members.voters().into_iter().filter(|node| *node != own.0 && progress.answers(*node));
    voters.max_by_key(|node| (progress.matched.get(node).copied(), u64::MAX - node))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn members(voters: &[u64], learners: &[u64]) -> Members {
        let voters = voters.iter().map(|node| (*node, true));
        Members::of(voters.chain(learners.iter().map(|node| (*node, false))))
    }

    fn progress(up: &[u64]) -> Progress {
        Progress {
            last: 1000,
            matched: up.iter().map(|node| (*node, 1000)).collect(),
            silent: up.iter().map(|node| (*node, Duration::ZERO)).collect(),
        }
    }

    fn wanted(joining: &[(u64, u64)], removed: &[u64]) -> Wanted {
        let join = |(node, replaces): &(u64, u64)| {
            (*node, Join { address: crate::raft::Members::test_address(*node), replaces: *replaces })
        };
        Wanted { joining: joining.iter().map(join).collect(), removed: removed.iter().copied().collect() }
    }

    fn voters(nodes: &[u64]) -> Option<Step> {
        Some(Step::Voters(nodes.iter().copied().collect()))
    }

    #[test]
    fn a_group_moves_step_by_step_to_what_is_wanted() {
        let learn = |node| Some(Step::Learn { node, address: crate::raft::Members::test_address(node) });
        let cases = [
            ("nothing to do", members(&[1, 2, 3], &[]), progress(&[1, 2, 3]), wanted(&[], &[]), None),
            ("it learns first", members(&[1], &[]), progress(&[1]), wanted(&[(2, 0)], &[]), learn(2)),
            ("not there yet", members(&[1], &[2]), progress(&[1]), wanted(&[(2, 0)], &[]), None),
            ("it votes", members(&[1], &[2]), progress(&[1, 2]), wanted(&[(2, 0)], &[]), voters(&[1, 2])),
            ("arrived", members(&[1, 2], &[]), progress(&[1, 2]), wanted(&[(2, 0)], &[]), Some(Step::Settle(2))),
            (
                "one for another",
                members(&[1, 2, 3], &[4]),
                progress(&[1, 3, 4]),
                wanted(&[(4, 2)], &[]),
                voters(&[1, 3, 4]),
            ),
            (
                "the leader stays until the new one votes",
                members(&[1, 2, 3], &[4]),
                progress(&[1, 2, 3, 4]),
                wanted(&[(4, 1)], &[]),
                voters(&[1, 2, 3, 4]),
            ),
            (
                "then it goes",
                members(&[1, 2, 3, 4], &[]),
                progress(&[1, 2, 3, 4]),
                wanted(&[], &[1]),
                voters(&[2, 3, 4]),
            ),
            ("a majority would be missing", members(&[1, 2, 3], &[]), progress(&[1, 3]), wanted(&[], &[3]), None),
            (
                "who only learns is dropped",
                members(&[1, 2, 3], &[4]),
                progress(&[1, 2, 3]),
                wanted(&[], &[4]),
                Some(Step::Drop(4)),
            ),
        ];
        for (what, members, progress, wanted, step) in cases {
            assert_eq!(next(1, &members, &progress, &wanted), step, "{what}");
        }
        let late = Progress { last: 2000, ..progress(&[1, 2]) };
        assert_eq!(next(1, &members(&[1], &[2]), &late, &wanted(&[(2, 0)], &[])), None, "far behind");
    }

    proptest! {
        /// Whatever is wanted and whoever is down: a majority of the next voters answers, a new voter has caught up, and
        /// the leader makes itself no stranger to a group in which nobody else answers.
        #[test]
        fn no_step_loses_the_majority(
            voting in proptest::collection::btree_set(1u64..8, 1..6),
            learning in proptest::collection::btree_set(8u64..12, 0..3),
            down in proptest::collection::btree_set(1u64..12, 0..6),
            joining in proptest::collection::btree_map(6u64..13, 0u64..8, 0..4),
            removed in proptest::collection::btree_set(1u64..12, 0..4),
        ) {
            let own = *voting.first().unwrap();
            let all: Vec<u64> = (1..13).filter(|node| *node == own || !down.contains(node)).collect();
            let (voting, learning): (Vec<u64>, Vec<u64>) = (voting.into_iter().collect(), learning.into_iter().collect());
            let (members, progress) = (members(&voting, &learning), progress(&all));
            let joining: Vec<(u64, u64)> = joining.into_iter().collect();
            let wanted = wanted(&joining, &removed.into_iter().collect::<Vec<_>>());
            if let Some(Step::Voters(next)) = next(own, &members, &progress, &wanted) {
                prop_assert!(has_majority(&next, &progress));
                prop_assert!(next.iter().all(|node| members.get(*node).is_some()));
                prop_assert!(next.iter().filter(|node| !voting.contains(node)).count() <= 1);
                prop_assert!(next.iter().all(|node| !wanted.removed.contains(node)));
            }
        }
    }
}
