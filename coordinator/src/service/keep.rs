//! What the leader does by itself: fences silent workers and ends overdue requests. On every node: follows who leads,
//! forgets soft state that has gone stale, and writes down the cluster's name.

use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::WORKER_LEASE_MS;
use baton_core::{Incarnation, Role, WorkerId};
use tokio::time::{Instant, MissedTickBehavior};

use super::lead::Leading;
use super::roster::Heard;
use super::{Shared, stopped};
use crate::log::Identity;
use crate::placement::{headroom, holds};
use crate::raft::ProposeError;
use crate::state::{Command, Ledger};

const ROUND: Duration = Duration::from_millis(100);
/// A new leader takes no command before its vote is written, and waits for workers: it tries again so soon.
const LEAD_AGAIN: Duration = Duration::from_millis(5);

/// Runs until this node stops.
pub(super) async fn keep(shared: Arc<Shared>) {
    let mut stopping = shared.stopping.subscribe();
    let mut standing = shared.node.standing();
    let mut changes = shared.node.changes();
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut too_early = false;
    loop {
        tokio::select! {
            biased;
            () = stopped(&mut stopping) => return,
            Ok(()) = standing.changed() => {}
            Ok(()) = changes.changed() => remember_cluster(&shared),
            _ = rounds.tick() => round(&shared).await,
            () = tokio::time::sleep(LEAD_AGAIN), if too_early => {}
        }
        let followed =
            shared.lead.follow(&shared.node, &shared.cluster_proposed, |ledger| heard(&shared, ledger)).await;
        too_early = matches!(followed, Ok(false) | Err(ProposeError::NotLeader));
        if let Err(error) = followed {
            tracing::debug!(%error, "does not lead yet");
        }
    }
}

/// Whether this node has heard of all live workers.
fn heard(shared: &Shared, ledger: &Ledger) -> bool {
    let roster = shared.roster();
    ledger
        .workers()
        .filter(|(_, worker)| worker.live)
        .all(|(id, worker)| roster.worker(id, worker.incarnation).is_some())
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
    let Some(leading) = shared.lead.now() else { return gauge_headroom(|_| false) };
    for (worker, incarnation) in silent(shared, &leading, now) {
        tracing::warn!(%worker, %incarnation, "silent for a whole lease: fenced");
        metrics::counter!("baton_coordinator_fenced_total", "reason" => "silent").increment(1);
        shared.proposer.submit_unheard(Command::Fence { worker, incarnation });
    }
    shared.end_orphans(&leading, now);
    for (worker, incarnation) in stuck(shared) {
        tracing::warn!(%worker, %incarnation, "has work and made no step for a whole lease: fenced");
        metrics::counter!("baton_coordinator_fenced_total", "reason" => "stuck").increment(1);
        shared.proposer.submit_unheard(Command::Fence { worker, incarnation });
    }
    tell_headroom(shared, now);
    shared.tell_check();
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

/// Live workers that answer and have not made a step for a lease beyond what a step may take.
fn stuck(shared: &Shared) -> Vec<(WorkerId, Incarnation)> {
    let lease = Duration::from_millis(WORKER_LEASE_MS);
    let ledger = shared.node.ledger();
    let roster = shared.roster();
    let live = ledger.workers().filter(|(_, worker)| worker.live);
    let stuck = live.filter(|(id, worker)| {
        let heard = roster.worker(id, worker.incarnation);
        heard.and_then(Heard::stuck).is_some_and(|stuck| stuck >= lease)
    });
    stuck.map(|(id, worker)| (id.clone(), worker.incarnation)).collect()
}

/// 1 at the leader for a role that has a pool, and whose pools could each lose their largest worker.
fn tell_headroom(shared: &Shared, now: Instant) {
    let ledger = shared.node.ledger();
    let roster = shared.roster();
    let pools = headroom(&roster.pools(&ledger, &[], now).candidates, &shared.policies.of(&ledger).fresh);
    gauge_headroom(|role| holds(&pools, role));
}

fn gauge_headroom(holds: impl Fn(Role) -> bool) {
    for role in [Role::Prefill, Role::Decode] {
        let holds = holds(role);
        metrics::gauge!("baton_coordinator_headroom", "role" => role.as_str()).set(if holds { 1.0 } else { 0.0 });
    }
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
