//! This worker's place in the cluster: registration until a coordinator accepts it, heartbeats to every coordinator
//! node, and the farewell. What the rest of the worker sees of it is its `Standing`.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_core::limits::{HEARTBEAT_MS, MESSAGE_BYTES_MAX, RPC_TIMEOUT_MS};
use baton_core::{Incarnation, Net, Refused, Rng};
use baton_proto::convert::{block_hash_bytes, refused};
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::v1::heartbeat_reply::Outcome as Beat;
use baton_proto::v1::register_reply::Outcome as Answer;
use baton_proto::v1::{HeartbeatAccepted, HeartbeatRequest, LeaveRequest, Load, Member, RegisterRequest, Registered};
use baton_proto::{WIRE_VERSION, channel};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, sleep, timeout};
use tonic::transport::Channel;

use crate::engine::EngineHandle;
use crate::error::StartError;
use crate::index::{Index, Known};

const RPC_TIMEOUT: Duration = Duration::from_millis(RPC_TIMEOUT_MS);
/// Between two tries to register, in milliseconds: from, and how many more.
const RETRY_MS: (u64, u64) = (20, 30);
/// How long a worker that leaves waits for the coordinators to hear it.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(500);
/// Indexed blocks a coordinator is told of.
const INDEX_MAX: usize = 1 << 20;

/// What the cluster last said about this life of the worker.
pub(crate) struct Standing {
    answered: Mutex<Instant>,
    /// True once a coordinator has said that this life is over.
    superseded: watch::Sender<bool>,
    draining: watch::Sender<bool>,
}

impl Standing {
    pub(crate) fn new() -> Standing {
        let (superseded, draining) = (watch::Sender::new(false), watch::Sender::new(false));
        Standing { answered: Mutex::new(Instant::now()), superseded, draining }
    }

    /// How long no coordinator has answered.
    pub(crate) fn silence(&self) -> Duration {
        self.answered.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).elapsed()
    }

    pub(crate) fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    pub(crate) fn drain(&self) {
        self.draining.send_replace(true);
    }

    /// Resolves when a coordinator has said that this life is over.
    pub(crate) async fn superseded(&self) {
        let mut superseded = self.superseded.subscribe();
        // The sender lives as long as `self`.
        let _ = superseded.wait_for(|superseded| *superseded).await;
    }

    fn answered(&self) {
        *self.answered.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Instant::now();
    }
}

/// Registers, trying one coordinator after another and following them to their leader, until one accepts. Only a
/// refusal that no retry can change ends it otherwise.
pub(crate) async fn register(
    net: &Arc<dyn Net>,
    coordinators: &[String],
    member: &Member,
    rng: &mut Rng,
) -> Result<Registered, StartError> {
    let request = RegisterRequest {
        cluster: String::new(),
        wire_version: WIRE_VERSION,
        member: Some(member.clone()),
        process_key: format!("{:032x}", rng.u128()),
    };
    let mut leader: Option<String> = None;
    for attempt in 0.. {
        let address = leader.take().unwrap_or_else(|| coordinators[attempt % coordinators.len()].clone());
        match register_at(net, &address, &request).await {
            Ok(Answer::Registered(registered)) => return Ok(registered),
            Ok(Answer::Refused(refusal)) => match refused(&refusal) {
                Refused::Incompatible => return Err(StartError::Incompatible(refusal.detail)),
                reason => {
                    tracing::debug!(%address, %reason, "not registered yet");
                    leader = Some(refusal.leader_address).filter(|leader| !leader.is_empty());
                }
            },
            Err(error) => tracing::debug!(%address, %error, "coordinator not reached yet"),
        }
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
    let late = |_| tonic::Status::deadline_exceeded("no answer in time");
    Ok(timeout(RPC_TIMEOUT, call).await.map_err(late)??.into_inner())
}

/// A registered worker: one task per coordinator node sends heartbeats until this is dropped.
pub(crate) struct Membership {
    net: Arc<dyn Net>,
    me: Arc<Me>,
    coordinators: Vec<String>,
    beats: JoinSet<()>,
}

/// What the heartbeats speak of.
struct Me {
    member: Member,
    standing: Arc<Standing>,
    engine: EngineHandle,
}

impl Membership {
    pub(crate) fn start(
        net: Arc<dyn Net>,
        member: Member,
        registered: Registered,
        configured: &[String],
        standing: Arc<Standing>,
        engine: EngineHandle,
    ) -> Membership {
        let member = Member { incarnation: registered.incarnation, ..member };
        let me = Arc::new(Me { member, standing, engine });
        me.standing.answered();
        let coordinators = match registered.coordinators.is_empty() {
            true => configured.to_vec(),
            false => registered.coordinators,
        };
        let every = match registered.heartbeat_ms {
            0 => HEARTBEAT_MS,
            ms => ms.min(HEARTBEAT_MS),
        };
        let mut beats = JoinSet::new();
        for address in &coordinators {
            beats.spawn(beat(net.clone(), address.clone(), me.clone(), Duration::from_millis(every)));
        }
        Membership { net, me, coordinators, beats }
    }

    pub(crate) fn incarnation(&self) -> Incarnation {
        Incarnation(self.me.member.incarnation)
    }

    /// Stops the heartbeats and tells every coordinator node that this life is over.
    pub(crate) async fn leave(mut self) {
        self.beats.shutdown().await;
        let request = LeaveRequest { id: self.me.member.id.clone(), incarnation: self.me.member.incarnation };
        let mut farewells = JoinSet::new();
        for address in &self.coordinators {
            let Ok(mut client) = client(&self.net, address) else { continue };
            let request = request.clone();
            farewells.spawn(async move { timeout(LEAVE_TIMEOUT, client.leave(request)).await.is_ok() });
        }
        // Who does not hear it notices the missing heartbeats.
        farewells.join_all().await;
    }
}

/// Heartbeats to one coordinator node, for ever.
async fn beat(net: Arc<dyn Net>, address: String, me: Arc<Me>, every: Duration) {
    let Ok(mut client) = client(&net, &address) else {
        tracing::error!(%address, "not a coordinator's address; it gets no heartbeats");
        return;
    };
    let (mut sequence, mut known) = (0, Known::default());
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        sequence += 1;
        let index: Index = me.engine.cache().hashes(INDEX_MAX).into();
        let (request, told) = me.heartbeat(sequence, &known, &index);
        let answer = timed(client.heartbeat(request)).await.map(|reply| reply.outcome);
        match answer {
            Ok(Some(Beat::Accepted(accepted))) => me.accepted(&accepted, &mut known, told),
            Ok(Some(Beat::Refused(refusal))) => {
                known.forget();
                me.refused(&address, refused(&refusal), &refusal.detail);
            }
            Ok(None) | Err(_) => known.forget(),
        }
    }
}

impl Me {
    fn heartbeat(&self, sequence: u64, known: &Known, index: &Index) -> (HeartbeatRequest, Index) {
        let (changes, told) = known.changes(index);
        let load = Load {
            blocks_added: changes.added.into_iter().map(block_hash_bytes).collect(),
            blocks_removed: changes.removed.into_iter().map(block_hash_bytes).collect(),
            index_reset: changes.reset,
            ..self.load()
        };
        let Member { id, incarnation, .. } = self.member.clone();
        let request =
            HeartbeatRequest { id, incarnation, sequence, load: Some(load), member: Some(self.member.clone()) };
        (request, told)
    }

    fn load(&self) -> Load {
        let (load, blocks) = (self.engine.load(), self.engine.cache().stats());
        Load {
            blocks_total: blocks.total as u64,
            blocks_free: blocks.free as u64,
            blocks_cached: blocks.cached as u64,
            blocks_used: blocks.used as u64,
            blocks_in_flight: blocks.in_flight as u64,
            sequences_running: load.running as u32,
            sequences_waiting: load.waiting as u32,
            tokens_waiting: load.tokens_waiting as u64,
            steps: load.steps,
            prefill_tokens_per_s: self.engine.prefill_tokens_per_s(),
            draining: self.standing.is_draining(),
            ..Load::default()
        }
    }

    fn accepted(&self, accepted: &HeartbeatAccepted, known: &mut Known, told: Index) {
        self.standing.answered();
        known.acknowledge(told);
        if accepted.index_wanted {
            known.forget();
        }
    }

    fn refused(&self, address: &str, reason: Refused, detail: &str) {
        match reason {
            Refused::Stale | Refused::Incompatible => {
                tracing::error!(%address, %reason, %detail, "this life of the worker is over");
                self.standing.superseded.send_replace(true);
            }
            _ => tracing::warn!(%address, %reason, %detail, "heartbeat refused"),
        }
    }
}
