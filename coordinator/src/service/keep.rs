//! What the leader does by itself: fences silent workers and ends overdue requests. On every node: follows who leads,
//! forgets soft state that has gone stale, and writes down the cluster's name.

use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::WORKER_LEASE_MS;
use baton_core::{Incarnation, WorkerId};
use tokio::time::{Instant, MissedTickBehavior};

use super::lead::Leading;
use super::{Shared, stopped};
use crate::log::Identity;
use crate::state::Command;

const ROUND: Duration = Duration::from_millis(100);

/// Runs until this node stops.
pub(super) async fn keep(shared: Arc<Shared>) {
    let mut stopping = shared.stopping.subscribe();
    let mut standing = shared.node.standing();
    let mut changes = shared.node.changes();
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stopped(&mut stopping) => return,
            Ok(()) = standing.changed() => {}
            Ok(()) = changes.changed() => remember_cluster(&shared),
            _ = rounds.tick() => round(&shared).await,
        }
        if let Err(error) = shared.lead.follow(&shared.node, &shared.cluster_proposed).await {
            tracing::debug!(%error, "does not lead yet");
        }
    }
}

async fn round(shared: &Shared) {
    let now = Instant::now();
    let members_changed = {
        let ledger = shared.node.ledger();
        metrics::gauge!("baton_coordinator_requests_open").set(ledger.requests_open() as f64);
        shared.roster().sweep(&ledger, now)
    };
    if members_changed {
        shared.tell_members();
    }
    shared.node.save_when_long().await;
    let Some(leading) = shared.lead.now() else { return };
    for (worker, incarnation) in silent(shared, &leading, now) {
        tracing::warn!(%worker, %incarnation, "silent for a whole lease: fenced");
        metrics::counter!("baton_coordinator_fenced_total").increment(1);
        shared.proposer.submit_unheard(Command::Fence { worker, incarnation });
    }
    shared.end_orphans(&leading, now);
    let due = shared.node.ledger().deadline_next();
    if due.is_some_and(|due| shared.lead.stamp().is_some_and(|now| due <= now)) {
        shared.proposer.submit_unheard(Command::Expire);
    }
}

/// Live workers that have not been heard for a lease; a new leader gives each of them a whole one.
fn silent(shared: &Shared, leading: &Leading, now: Instant) -> Vec<(WorkerId, Incarnation)> {
    let lease = Duration::from_millis(WORKER_LEASE_MS);
    let ledger = shared.node.ledger();
    let roster = shared.roster();
    let live = ledger.workers().filter(|(_, worker)| worker.live);
    let overdue = live.filter(|(id, worker)| {
        let heard = roster.worker(id, worker.incarnation).map_or(leading.since, |heard| heard.at);
        now - heard.max(leading.since) > lease
    });
    overdue.map(|(id, worker)| (id.clone(), worker.incarnation)).collect()
}

fn remember_cluster(shared: &Shared) {
    let cluster = shared.node.ledger().cluster().to_string();
    let mut identity = shared.identity.lock().expect("identity lock");
    if cluster.is_empty() || identity.cluster == cluster {
        return;
    }
    let named = Identity { cluster, ..identity.clone() };
    match named.save(&*shared.disk) {
        Ok(()) => *identity = named,
        Err(error) => tracing::error!(%error, "the cluster's name could not be written down"),
    }
}
