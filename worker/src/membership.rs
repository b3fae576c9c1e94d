//! This worker's place in the cluster: registration until a coordinator accepts it, heartbeats to every coordinator
//! node there is, and the farewell. What the rest of the worker sees of it is its `Standing`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_core::limits::{HANDOFF_LINKS_MAX, HEARTBEAT_MS, MESSAGE_BYTES_MAX, RPC_TIMEOUT_MS};
use baton_core::{Net, Refused, Rng, Role};
use baton_kvtransfer::Links;
use baton_proto::convert::{block_hash_bytes, refused};
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::v1::heartbeat_reply::Outcome as Beat;
use baton_proto::v1::register_reply::Outcome as Answer;
use baton_proto::v1::{HeartbeatRequest, LeaveRequest, Load, Member, RegisterRequest, Registered};
use baton_proto::{Beats, WIRE_VERSION, channel};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{MissedTickBehavior, sleep, timeout};
use tonic::transport::Channel;

use crate::engine::EngineHandle;
use crate::error::StartError;
use crate::index::Known;
use crate::metrics;
use crate::standing::Standing;

const RPC_TIMEOUT: Duration = Duration::from_millis(RPC_TIMEOUT_MS);
/// Between two tries to register, in milliseconds: from, and how many more.
const RETRY_MS: (u64, u64) = (20, 30);
/// How long a worker that leaves waits for the coordinators to hear it.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(500);

/// Registers, trying one coordinator after another and following them to their leader, until one accepts. Only a
/// refusal that no retry can change ends it otherwise. `cluster`: the one that this process belongs to, empty if it has
/// been in none; where it has, one coordinator that is no longer of that cluster does not speak for the others.
pub(crate) async fn register(
    net: &Arc<dyn Net>,
    coordinators: &[String],
    member: &Member,
    cluster: &str,
    rng: &mut Rng,
) -> Result<Registered, StartError> {
    let request = RegisterRequest {
        cluster: cluster.to_string(),
        wire_version: WIRE_VERSION,
        member: Some(member.clone()),
        process_key: format!("{:032x}", rng.u128()),
    };
    let mut leader: Option<String> = None;
    let mut sent_on = false;
    let mut foreign: BTreeSet<String> = BTreeSet::new();
    for attempt in 0.. {
        let address = leader.take().unwrap_or_else(|| coordinators[attempt % coordinators.len()].clone());
        match register_at(net, &address, &request).await {
            Ok(Answer::Registered(registered)) => return Ok(registered),
            Ok(Answer::Refused(refusal)) => match refused(&refusal) {
                Refused::Incompatible => {
                    foreign.insert(address);
                    if cluster.is_empty() || coordinators.iter().all(|address| foreign.contains(address)) {
                        return Err(StartError::Incompatible(refusal.detail));
                    }
                    tracing::error!(detail = refusal.detail, "a coordinator refuses this worker for good");
                }
                reason => {
                    tracing::debug!(%address, %reason, "not registered yet");
                    leader = Some(refusal.leader_address).filter(|leader| !leader.is_empty());
                    match leader.as_ref().is_some_and(|leader| foreign.contains(leader)) {
                        true => drop(foreign.insert(address)),
                        false => drop(foreign.remove(&address)),
                    }
                }
            },
            Err(error) => tracing::debug!(%address, %error, "coordinator not reached yet"),
        }
        // Whoever leads is asked at once; when that one points elsewhere, too, nobody knows yet.
        if leader.is_some() && !std::mem::replace(&mut sent_on, true) {
            continue;
        }
        sent_on = false;
        sleep(Duration::from_millis(RETRY_MS.0 + rng.below(RETRY_MS.1))).await;
    }
    unreachable!("the attempts never end")
}

async fn register_at(net: &Arc<dyn Net>, address: &str, request: &RegisterRequest) -> Result<Answer, tonic::Status> {
    let mut client = client(net, address)?;
    let reply = timed(client.register(request.clone())).await?;
    reply.outcome.ok_or_else(|| tonic::Status::internal("an answer without outcome"))
}

fn client(net: &Arc<dyn Net>, address: &str) -> Result<CoordinatorClient<Channel>, tonic::Status> {
    let channel = channel(net.clone(), address).map_err(|bad| tonic::Status::invalid_argument(bad.to_string()))?;
    Ok(CoordinatorClient::new(channel).max_encoding_message_size(MESSAGE_BYTES_MAX))
}

async fn timed<T>(call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>) -> Result<T, tonic::Status> {
    in_time(call).await.map(tonic::Response::into_inner)
}

async fn in_time<T>(call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, tonic::Status> {
    let late = |_| tonic::Status::deadline_exceeded("no answer in time");
    timeout(RPC_TIMEOUT, call).await.map_err(late)?
}

/// A registered worker: it sends heartbeats to every coordinator node until this is dropped.
pub(crate) struct Membership {
    net: Arc<dyn Net>,
    me: Arc<Me>,
    /// The one task that keeps the list of coordinators and owns the others.
    beating: JoinSet<()>,
}

/// Who a worker is in which cluster.
pub(crate) struct Place {
    pub(crate) member: Member,
    pub(crate) role: Role,
    /// Name of the cluster that it registered in.
    pub(crate) cluster: String,
}

/// What the heartbeats speak of.
struct Me {
    place: Place,
    /// Coordinators that said last that they are another cluster's.
    foreign: Mutex<BTreeSet<String>>,
    standing: Arc<Standing>,
    engine: EngineHandle,
    links: Links,
}

impl Membership {
    pub(crate) fn start(
        net: Arc<dyn Net>,
        place: Place,
        heartbeat_ms: u64,
        standing: Arc<Standing>,
        engine: EngineHandle,
        links: Links,
    ) -> Membership {
        let me = Arc::new(Me { place, foreign: Mutex::default(), standing, engine, links });
        let every = match heartbeat_ms {
            0 => HEARTBEAT_MS,
            ms => ms.min(HEARTBEAT_MS),
        };
        let mut beating = JoinSet::new();
        beating.spawn(beat_all(net.clone(), me.clone(), Duration::from_millis(every)));
        Membership { net, me, beating }
    }

    /// The coordinators as last heard.
    pub(crate) fn coordinators(&self) -> Vec<String> {
        self.me.standing.coordinators().borrow().clone()
    }

    /// Stops the heartbeats and tells every coordinator node that this life is over.
    pub(crate) async fn leave(mut self) {
        self.beating.shutdown().await;
        let Place { member, cluster, .. } = &self.me.place;
        let request = LeaveRequest { id: member.id.clone(), incarnation: member.incarnation, cluster: cluster.clone() };
        let mut farewells = JoinSet::new();
        for address in self.coordinators() {
            let Ok(mut client) = client(&self.net, &address) else { continue };
            let request = request.clone();
            farewells.spawn(async move { timeout(LEAVE_TIMEOUT, client.leave(request)).await.is_ok() });
        }
        // Who does not hear it notices the missing heartbeats.
        farewells.join_all().await;
    }
}

/// One task per coordinator node, for as long as it is on the list.
async fn beat_all(net: Arc<dyn Net>, me: Arc<Me>, every: Duration) {
    let (mut tasks, mut beats) = (JoinSet::new(), BTreeMap::<String, AbortHandle>::new());
    let mut list = me.standing.coordinators();
    loop {
        let now = list.borrow_and_update().clone();
        beats.retain(|address, task| {
            let stays = now.contains(address);
            if !stays {
                task.abort();
            }
            stays
        });
        for address in now {
            let task = || tasks.spawn(beat(net.clone(), address.clone(), me.clone(), every));
            beats.entry(address.clone()).or_insert_with(task);
        }
        loop {
            tokio::select! {
                changed = list.changed() => match changed {
                    Ok(()) => break,
                    // The list lives as long as `me`.
                    Err(_) => return,
                },
                Some(_) = tasks.join_next() => {}
            }
        }
    }
}

/// Heartbeats to one coordinator node, for ever.
async fn beat(net: Arc<dyn Net>, address: String, me: Arc<Me>, every: Duration) {
    let Ok(client) = client(&net, &address) else {
        tracing::error!(%address, "not a coordinator's address; it gets no heartbeats");
        return;
    };
    let mut beats = Beats::new(client);
    let (mut sequence, mut known, mut receivers_seen) = (0, Known::default(), 0);
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        sequence += 1;
        let (request, next) = me.heartbeat(sequence, &known, receivers_seen);
        let answer = in_time(beats.tell(request)).await.map(|reply| reply.outcome);
        known = match answer {
            Ok(Some(Beat::Accepted(accepted))) => {
                me.of_cluster(&address, true);
                me.standing.hear(&accepted, me.place.role);
                me.connect(&accepted.receivers);
                receivers_seen = accepted.receivers_version;
                if accepted.index_wanted { Known::Nothing } else { next }
            }
            Ok(Some(Beat::Refused(refusal))) => {
                me.refused(&address, refused(&refusal), &refusal.detail);
                Known::Nothing
            }
            Ok(None) | Err(_) => Known::Unreached,
        };
    }
}

impl Me {
    /// Links to those who take this worker's blocks, before the first request needs them. None is ended here: this node may have
    /// heard less than others, and a link that leads nowhere rests by itself.
    fn connect(&self, receivers: &[String]) {
        if self.place.role == Role::Prefill {
            receivers.iter().take(HANDOFF_LINKS_MAX).for_each(|address| self.links.connect(address));
        }
    }

    fn heartbeat(&self, sequence: u64, known: &Known, receivers_seen: u64) -> (HeartbeatRequest, Known) {
        let (changes, next) = known.next(self.engine.cache());
        let load = Load {
            blocks_added: changes.added.into_iter().map(block_hash_bytes).collect(),
            blocks_removed: changes.removed.into_iter().map(block_hash_bytes).collect(),
            index_reset: changes.reset,
            ..self.load()
        };
        let Place { member, cluster, .. } = &self.place;
        let Member { id, incarnation, .. } = member.clone();
        let (load, member, cluster) = (Some(load), Some(member.clone()), cluster.clone());
        let request = HeartbeatRequest { id, incarnation, sequence, load, member, receivers_seen, cluster };
        (request, next)
    }

    fn load(&self) -> Load {
        let (load, blocks, stuck) = (self.engine.load(), self.engine.cache().stats(), self.engine.stuck());
        let links = self.links.counters();
        metrics::record_links(&links);
        if !stuck.is_zero() {
            metrics::count_stuck();
            tracing::error!(too_long_ms = stuck.as_millis() as u64, "the engine is stuck in a step");
        }
        Load {
            blocks_total: blocks.total as u64,
            blocks_free: blocks.free as u64,
            blocks_cached: blocks.cached as u64,
            blocks_used: blocks.used as u64,
            blocks_in_flight: blocks.in_flight as u64,
            sequences_running: load.running as u32,
            sequences_max: load.sequences_max as u32,
            sequences_waiting: load.waiting as u32,
            tokens_waiting: load.tokens_waiting as u64,
            steps: self.engine.progress(),
            prefill_tokens_per_s: self.engine.prefill_tokens_per_s(),
            draining: self.standing.is_draining(),
            stuck_ms: stuck.as_millis() as u64,
            links: links.describe(),
            ..Load::default()
        }
    }

    fn refused(&self, address: &str, reason: Refused, detail: &str) {
        match reason {
            Refused::Fenced => {
                tracing::error!(%address, %detail, "this life of the worker was ended for its silence");
                self.standing.fence();
            }
            Refused::Stale | Refused::Incompatible => {
                tracing::error!(%address, %reason, %detail, "this worker is not wanted any more");
                self.standing.supersede();
            }
            Refused::Foreign => {
                tracing::error!(%address, %detail, "not a coordinator of this worker's cluster");
                self.of_cluster(address, false);
            }
            _ => tracing::warn!(%address, %reason, %detail, "heartbeat refused"),
        }
    }

    /// Notes whether a coordinator is of this worker's cluster. When none is, this life has no cluster any more: the next
    /// one hears what has become of it.
    fn of_cluster(&self, address: &str, own: bool) {
        let mut foreign = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        match own {
            true => drop(foreign.remove(address)),
            false => drop(foreign.insert(address.to_string())),
        }
        let known = self.standing.coordinators();
        if !own && known.borrow().iter().all(|address| foreign.contains(address)) {
            self.standing.fence();
        }
    }
}
