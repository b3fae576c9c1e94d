//! Whether this node leads, has applied all that earlier leaders committed and heard of the workers, and the ledger's time while
//! it does.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use baton_core::limits::HEARTBEAT_MS;
use baton_core::{NodeId, Rng};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::raft::{Node, ProposeError};
use crate::state::{Batch, Command, Ledger};

/// So long a new leader waits for the heartbeats of workers that it has not heard of: it may have just been started, and would
/// give requests to workers that are full, stuck or dead.
const HEARING: Duration = Duration::from_millis(2 * HEARTBEAT_MS);

/// One term in which this node leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leading {
    pub(crate) term: u64,
    /// When this node began to answer as the leader.
    pub(crate) since: Instant,
    /// The ledger's time then.
    base_ms: u64,
}

/// Clones see the same.
pub(crate) struct Lead {
    leading: watch::Sender<Option<Leading>>,
    /// The last term whose first entry this node has committed, and when.
    begun: Mutex<Option<(u64, Instant)>>,
}

/// Somebody else leads, or nobody that is known.
pub(crate) struct Elsewhere(pub(crate) Option<NodeId>);

impl Lead {
    pub(crate) fn new() -> Lead {
        Lead { leading: watch::Sender::new(None), begun: Mutex::default() }
    }

    pub(crate) fn now(&self) -> Option<Leading> {
        *self.leading.borrow()
    }

    /// The ledger's time, if this node leads: it goes on from where the last leader's stamps ended.
    pub(crate) fn stamp(&self) -> Option<u64> {
        self.now().map(|leading| leading.base_ms + leading.since.elapsed().as_millis() as u64)
    }

    /// Brings this in line with where the node stands; false: it is to be asked again soon. A new leader commits one entry first, by
    /// which it knows that it has applied everything before; that entry names a cluster that has no name yet. Then it waits for
    /// the live workers, unless all of them are `heard`.
    pub(crate) async fn follow(
        &self,
        node: &Node,
        cluster: &str,
        heard: impl Fn(&Ledger) -> bool,
    ) -> Result<bool, ProposeError> {
        let standing = node.standing().borrow().clone();
        if standing.leader != Some(node.id()) {
            self.leading.send_if_modified(|leading| leading.take().is_some());
            return Ok(true);
        }
        if self.now().is_some_and(|leading| leading.term == standing.term) {
            return Ok(true);
        }
        let begun = *self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = match begun.filter(|(term, _)| *term == standing.term) {
            Some((_, begun)) => begun,
            None => {
                let found = Command::Found { cluster: cluster.to_string() };
                let time_ms = node.ledger().time_ms();
                node.propose(&Batch { time_ms, commands: vec![found] }).await?;
                let now = Instant::now();
                *self.begun.lock().unwrap_or_else(PoisonError::into_inner) = Some((standing.term, now));
                now
            }
        };
        if begun.elapsed() < HEARING && !heard(&node.ledger()) {
            return Ok(false);
        }
        let leading = Leading { term: standing.term, since: Instant::now(), base_ms: node.ledger().time_ms() };
        tracing::info!(node = %node.id(), term = leading.term, "leads");
        metrics::counter!("baton_coordinator_leader_changes_total").increment(1);
        self.leading.send_replace(Some(leading));
        Ok(true)
    }

    /// Waits until this node leads, another one does, or `patience` has passed.
    pub(crate) async fn wait(&self, node: &Node, patience: Duration) -> Result<Leading, Elsewhere> {
        let mut leading = self.leading.subscribe();
        let mut standing = node.standing();
        let deadline = Instant::now() + patience;
        loop {
            if let Some(leading) = *leading.borrow_and_update() {
                return Ok(leading);
            }
            let leader = standing.borrow_and_update().leader;
            if leader.is_some_and(|leader| leader != node.id()) {
                return Err(Elsewhere(leader));
            }
            tokio::select! {
                biased;
                Ok(()) = leading.changed() => {}
                Ok(()) = standing.changed() => {}
                () = tokio::time::sleep_until(deadline) => return Err(Elsewhere(None)),
            }
        }
    }
}

/// A name for a cluster that has none.
pub(crate) fn cluster_name(rng: &mut Rng) -> String {
    format!("{:016x}", rng.u64())
}
