//! The cluster as this node sees it, for gateways and `baton status`.

use std::sync::Arc;
use std::time::Duration;

use baton_core::Role;
use baton_core::limits::WORKER_LEASE_MS;
use baton_proto::v1;
use futures::Stream;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Status;

use super::{Shared, pairs, stopped};
use crate::placement::{ALONE, Pools, headroom};
use crate::state::{Model, Order, Worker};

/// Load alone is told this often at most; changes of members, liveness and leader at once.
const LOAD_EVERY: Duration = Duration::from_millis(200);
/// Changes that come together are told together.
const GATHER: Duration = Duration::from_millis(5);

/// A view now, then one after every change, until this node stops.
pub(super) fn views(shared: Arc<Shared>) -> impl Stream<Item = Result<v1::ClusterView, Status>> + Send {
    let watcher = Watcher {
        changes: shared.node.changes(),
        standing: shared.node.standing(),
        members: shared.members_changed.subscribe(),
        loads: shared.loads_changed.subscribe(),
        stopping: shared.stopping.subscribe(),
        told: None,
        shared,
    };
    futures::stream::unfold(watcher, |mut watcher| async move {
        let view = watcher.next().await?;
        Some((Ok(view), watcher))
    })
}

struct Watcher {
    shared: Arc<Shared>,
    changes: watch::Receiver<u64>,
    standing: watch::Receiver<crate::raft::Standing>,
    members: watch::Receiver<u64>,
    loads: watch::Receiver<u64>,
    stopping: watch::Receiver<bool>,
    /// When the last view went out.
    told: Option<Instant>,
}

impl Watcher {
    async fn next(&mut self) -> Option<v1::ClusterView> {
        if let Some(told) = self.told {
            self.change(told).await?;
        }
        self.told = Some(Instant::now());
        Some(view(&self.shared))
    }

    /// Waits for something worth telling. None: this node stops.
    async fn change(&mut self, told: Instant) -> Option<()> {
        let Watcher { changes, standing, members, loads, stopping, .. } = self;
        let load = async {
            tokio::time::sleep_until(told + LOAD_EVERY).await;
            loads.changed().await
        };
        tokio::select! {
            biased;
            () = stopped(stopping) => return None,
            changed = async {
                tokio::select! {
                    biased;
                    changed = changes.changed() => changed,
                    changed = standing.changed() => changed,
                    changed = members.changed() => changed,
                }
            } => {
                changed.ok()?;
                tokio::time::sleep(GATHER).await;
            }
            changed = load => changed.ok()?,
        }
        changes.mark_unchanged();
        standing.mark_unchanged();
        members.mark_unchanged();
        loads.mark_unchanged();
        Some(())
    }
}

pub(super) fn view(shared: &Shared) -> v1::ClusterView {
    let leader = shared.node.standing().borrow().leader;
    let now = Instant::now();
    let ledger = shared.node.ledger();
    let roster = shared.roster();
    let pools = roster.pools(&ledger, &[], now);
    let workers = ledger.workers().map(|(id, worker)| {
        let heard = roster.worker(id, worker.incarnation);
        v1::MemberView {
            member: Some(member(&id.0, worker)),
            live: worker.live,
            silent_ms: heard.map_or(0, |heard| (now - heard.at).as_millis() as u64),
            load: Some(heard.map_or_else(|| unheard(worker), |heard| heard.load.clone())),
            order: order(worker.wanted()).into(),
            trouble: heard.map_or_else(String::new, |heard| heard.trouble(roster.pairs())),
        }
    });
    let lease = Duration::from_millis(WORKER_LEASE_MS);
    let gateways = roster.gateways().map(|(_, gateway)| v1::MemberView {
        member: Some(gateway.member.clone()),
        live: now - gateway.at < lease,
        silent_ms: (now - gateway.at).as_millis() as u64,
        ..v1::MemberView::default()
    });
    v1::ClusterView {
        cluster: ledger.cluster().to_string(),
        node: shared.node.id().0,
        leader: leader.map_or(0, |leader| leader.0),
        coordinators: coordinators(shared),
        members: workers.chain(gateways).collect(),
        requests_open: ledger.requests_open() as u64,
        requests_queued: shared.admission.waiting() as u64,
        ledger_index: ledger.index(),
        storage: "ok".into(),
        pairs: pairs::told(&pools.candidates, roster.pairs(), now),
        headroom: headroom(&pools.candidates, &shared.policies.of(&ledger).fresh)
            .into_iter()
            .map(|pool| pool.line)
            .collect::<Vec<_>>()
            .join("; "),
        canary_age_ms: roster.pairs().seen().map(|seen| (now - seen).as_millis() as u64),
        broken: broken(&pools),
    }
}

/// Whether there are live decode workers of which none works.
fn broken(pools: &Pools) -> bool {
    let mut decodes = pools.candidates.iter().filter(|c| c.role == Role::Decode && !c.load.draining).peekable();
    decodes.peek().is_some() && decodes.all(|c| c.stuck || pools.broken.contains(&(ALONE, c.index)))
}

/// The load of a worker that this node has not heard of yet.
fn unheard(worker: &Worker) -> v1::Load {
    let blocks_total = worker.model.blocks_total;
    v1::Load { blocks_total, blocks_free: blocks_total, ..v1::Load::default() }
}

/// The group as this node knows it.
pub(super) fn coordinators(shared: &Shared) -> Vec<v1::CoordinatorNode> {
    let progress = shared.node.progress().unwrap_or_default();
    let silent_ms = |id| progress.silent.get(&id).map_or(0, |silent| silent.as_millis() as u64);
    let members = shared.node.members();
    members.iter().map(|(id, member)| coordinator(shared, id, member, silent_ms(id))).collect()
}

fn coordinator(shared: &Shared, id: u64, member: &crate::raft::Member, silent_ms: u64) -> v1::CoordinatorNode {
    let own = id == shared.node.id().0;
    let pid = if own { shared.pid } else { 0 };
    let version = if own { env!("CARGO_PKG_VERSION") } else { "" };
    v1::CoordinatorNode {
        id,
        address: member.address.clone(),
        pid,
        version: version.into(),
        voter: member.voter,
        silent_ms,
    }
}

fn member(id: &str, worker: &Worker) -> v1::Member {
    v1::Member {
        id: id.into(),
        role: v1::Role::from(worker.role).into(),
        address: worker.address.clone(),
        pid: worker.pid,
        incarnation: worker.incarnation.0,
        version: worker.version.clone(),
        model: Some(summary(&worker.model)),
        ..v1::Member::default()
    }
}

fn summary(model: &Model) -> v1::ModelSummary {
    v1::ModelSummary {
        name: model.name.clone(),
        card_hash: model.card_hash.clone(),
        numerics: model.numerics.0.clone(),
        block_tokens: model.block_tokens,
        positions_max: model.positions_max,
        layout: model.layout.clone(),
        blocks_total: model.blocks_total,
        block_bytes: model.block_bytes,
        canary_tokens: model.canary_tokens.clone(),
        vocab: model.vocab,
    }
}

pub(super) fn order(order: Order) -> v1::Order {
    match order {
        Order::Serve => v1::Order::Serve,
        Order::Drain => v1::Order::Drain,
        Order::BecomePrefill => v1::Order::BecomePrefill,
        Order::BecomeDecode => v1::Order::BecomeDecode,
    }
}

/// Whether a member of this role is kept in the ledger.
pub(super) fn is_worker(role: Role) -> bool {
    matches!(role, Role::Prefill | Role::Decode)
}
