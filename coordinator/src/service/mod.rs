//! The Coordinator service: registration, heartbeats, assignments, ends of requests, and the view of the cluster.

mod access;
mod admin;
mod admission;
mod ask;
mod assign;
mod canary;
mod explain;
mod follow;
mod gateways;
mod keep;
mod lead;
mod membership;
mod pairs;
mod probes;
mod progress;
mod promises;
mod propose;
mod queue;
mod roster;
mod settings;
mod stream;
mod view;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use baton_core::limits::{HEARTBEAT_MS, WORKER_LEASE_MS};
use baton_core::planted::{self, Bug};
use baton_core::{Epoch, Incarnation, Net, NodeId, Refused, Rng, Role, WorkerId};
use baton_proto::convert::{gateway_life, refusal};
use baton_proto::{WIRE_VERSION, v1};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, Stream, StreamExt};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::log::{Disk, Identity};
use crate::placement::Policy;
use crate::raft::{Node, ProposeError, QUORUM_GRACE};
use crate::state::{Command, Finished, Order, Outcome, Registration, WORKERS_MAX, Worker};
use ask::Ask;
use explain::Decisions;
use lead::{Elsewhere, Lead};
use propose::{Proposer, SubmitError};
use queue::Admission;
use roster::{Old, Roster};

/// How long a call waits for a leader to be known.
const LEADER_PATIENCE: Duration = Duration::from_millis(900);
/// How long it may take to hear that nobody listens at an address.
const CLOSED_PATIENCE: Duration = Duration::from_millis(100);
/// A worker that was heard of within this time is alive.
const DUPLICATE_SILENCE: Duration = Duration::from_millis(2 * HEARTBEAT_MS);
/// When a command's fate is unknown, or nobody leads.
const RETRY_UNKNOWN_MS: u64 = 300;
/// How often a leader that waits for a quorum's word looks for it.
const LEASE_LOOK: Duration = Duration::from_millis(5);
/// Ends of requests in one call.
const FINISHED_MAX: usize = 4096;

/// What every call and the keeper share.
pub(crate) struct Shared {
    node: Arc<Node>,
    lead: Arc<Lead>,
    proposer: Proposer,
    roster: Mutex<Roster>,
    decisions: Mutex<Decisions>,
    admission: Arc<Admission>,
    asking: gateways::Asking,
    moving: gateways::Moving,
    /// Index up to which the others have been told of this node's ledger.
    checked: AtomicU64,
    policies: settings::Kept,
    disk: Arc<dyn Disk>,
    net: Arc<dyn Net>,
    identity: Mutex<Identity>,
    /// Name that this node gives a cluster that has none.
    cluster_proposed: String,
    members_changed: watch::Sender<u64>,
    loads_changed: watch::Sender<u64>,
    stopping: watch::Sender<bool>,
    pid: u32,
}

/// What a service starts from.
pub(crate) struct Parts {
    pub(crate) node: Arc<Node>,
    pub(crate) policy: Policy,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) identity: Identity,
    pub(crate) cluster_proposed: String,
    pub(crate) net: Arc<dyn Net>,
    pub(crate) rng: Rng,
    pub(crate) pid: u32,
    pub(crate) stopping: watch::Sender<bool>,
}

pub(crate) use lead::cluster_name;

/// Clones serve the same.
#[derive(Clone)]
pub(crate) struct Service(Arc<Shared>);

/// A call's answer that is not what was asked for.
type Refusal = v1::Refusal;

impl Service {
    /// The service, and what must run beside it until it stops.
    pub(crate) fn new(parts: Parts) -> (Service, impl Future<Output = ()> + Send) {
        let lead = Arc::new(Lead::new());
        let (proposer, proposing) = Proposer::new(parts.node.clone(), lead.clone());
        let shared = Arc::new(Shared {
            node: parts.node,
            lead,
            proposer,
            roster: Mutex::new(Roster::new()),
            decisions: Mutex::new(Decisions::new()),
            admission: Arc::new(Admission::new()),
            asking: gateways::Asking::default(),
            moving: gateways::Moving::default(),
            checked: AtomicU64::new(0),
            policies: settings::Kept::new(parts.policy),
            disk: parts.disk,
            net: parts.net.clone(),
            identity: Mutex::new(parts.identity),
            cluster_proposed: parts.cluster_proposed,
            members_changed: watch::Sender::new(0),
            loads_changed: watch::Sender::new(0),
            stopping: parts.stopping,
            pid: parts.pid,
        });
        // Each is polled only when it is woken itself: every command wakes the proposer.
        let mut beside: FuturesUnordered<BoxFuture<'static, ()>> = FuturesUnordered::new();
        beside.push(keep::keep(shared.clone()).boxed());
        beside.push(membership::keep(shared.clone()).boxed());
        beside.push(queue::attend(shared.clone()).boxed());
        beside.push(canary::keep(shared.clone(), parts.net.clone(), parts.rng).boxed());
        beside.push(follow::keep(shared.clone(), parts.net).boxed());
        beside.push(proposing.boxed());
        // All of them run until the node stops; the first to end ends the others.
        let ended = async move {
            beside.next().await;
        };
        (Service(shared), ended)
    }
}

impl Shared {
    fn roster(&self) -> MutexGuard<'_, Roster> {
        self.roster.lock().expect("roster lock")
    }

    fn tell_members(&self) {
        self.members_changed.send_modify(|version| *version += 1);
    }

    /// The cluster's name; empty before it has one.
    fn cluster(&self) -> String {
        self.node.ledger().cluster().to_string()
    }

    fn address(&self, node: NodeId) -> String {
        self.node.members().get(node.0).map(|member| member.address.clone()).unwrap_or_default()
    }

    /// Of all coordinators, as of now.
    fn coordinators(&self) -> Vec<String> {
        self.node.members().addresses().into_values().collect()
    }

    /// Whether this node leads, and a quorum has said so a moment ago.
    fn leads(&self) -> bool {
        self.lead.now().is_some() && self.node.has_lease()
    }

    /// Waits until this node leads; else says who does.
    async fn leading(&self) -> Result<(), Refusal> {
        if self.leads() {
            return Ok(());
        }
        let since = Instant::now();
        loop {
            match self.lead.wait(&self.node, LEADER_PATIENCE.saturating_sub(since.elapsed())).await {
                Ok(_) if self.node.has_lease() => return Ok(()),
                Ok(_) => {}
                Err(Elsewhere(Some(leader))) => return Err(self.not_leader(leader)),
                Err(Elsewhere(None)) => return Err(no_quorum()),
            }
            let silent = !self.node.has_quorum() && since.elapsed() >= QUORUM_GRACE;
            if silent || since.elapsed() >= LEADER_PATIENCE {
                return Err(no_quorum());
            }
            tokio::time::sleep(LEASE_LOOK).await;
        }
    }

    /// Makes sure that what this node's ledger says is no older than the question: a leader that was deposed and does not
    /// know it is refused. What goes through an entry needs no such word.
    async fn confirmed(&self) -> Result<(), Refusal> {
        self.node.confirm().await.map_err(|error| self.not_submitted(error.into()))
    }

    fn not_leader(&self, leader: NodeId) -> Refusal {
        let detail = format!("node {leader} leads");
        Refusal { leader_address: self.address(leader), ..refusal(Refused::NotLeader, detail) }
    }

    async fn submit(&self, command: Command) -> Result<Outcome, Refusal> {
        self.proposer.submit(command).await.map_err(|error| self.not_submitted(error))
    }

    async fn submit_many(&self, commands: Vec<Command>) -> Result<Vec<Outcome>, Refusal> {
        self.proposer.submit_many(commands).await.map_err(|error| self.not_submitted(error))
    }

    fn not_submitted(&self, error: SubmitError) -> Refusal {
        match error {
            SubmitError::Full => {
                Refusal { retry_after_ms: RETRY_UNKNOWN_MS, ..refusal(Refused::NoCapacity, error.to_string()) }
            }
            SubmitError::Propose(ProposeError::NotLeader) => match self.node.standing().borrow().leader {
                Some(leader) if leader != self.node.id() => self.not_leader(leader),
                _ => unavailable("leadership is changing hands"),
            },
            SubmitError::Propose(ProposeError::Unknown(why)) => unavailable(&why),
        }
    }

    async fn register(&self, request: v1::RegisterRequest) -> Result<Result<v1::Registered, Refusal>, Status> {
        let member = baton_proto::convert::required("member", request.member)?;
        if request.wire_version != WIRE_VERSION {
            let detail = format!("wire version {}, this cluster speaks {WIRE_VERSION}", request.wire_version);
            return Ok(Err(not_registered("wire_version", Refused::Incompatible, detail)));
        }
        match Role::try_from(member.role())? {
            Role::Gateway => {
                if let Err(detail) = self.same_cluster(&request.cluster) {
                    return Ok(Err(not_registered("cluster", Refused::Foreign, detail)));
                }
                let member = ask::gateway(member)?;
                Ok(self.gateway(member).map(|()| self.registered(Incarnation(0))))
            }
            role if view::is_worker(role) => {
                let registration = ask::registration(member.clone(), request.process_key)?;
                Ok(self.register_worker(registration, member, &request.cluster).await)
            }
            _ => Err(Status::invalid_argument("a coordinator does not register")),
        }
    }

    async fn register_worker(
        &self,
        registration: Registration,
        member: v1::Member,
        cluster: &str,
    ) -> Result<v1::Registered, Refusal> {
        self.leading().await?;
        self.same_cluster(cluster).map_err(|detail| not_registered("cluster", Refused::Incompatible, detail))?;
        if let Some(address) = self.held_elsewhere(&registration)
            && !self.is_closed(&address).await
        {
            let detail = format!("{} is alive at {address}: give this one another id", registration.worker);
            return Err(not_registered("duplicate_id", Refused::Unavailable, detail));
        }
        let worker = registration.worker.clone();
        match self.submit(Command::Register(registration)).await? {
            Outcome::Registered { incarnation } => {
                tracing::info!(%worker, %incarnation, address = member.address, "registered");
                let member = v1::Member { incarnation: incarnation.0, ..member };
                self.roster().registered(member, Instant::now());
                self.tell_members();
                Ok(self.registered(incarnation))
            }
            Outcome::Refused(Refused::Incompatible) => {
                let detail = "its canary tokens are not those of the live workers of its numerics class";
                Err(not_registered("golden_tokens", Refused::Incompatible, detail))
            }
            Outcome::Refused(reason) => Err(not_registered("full", reason, "the ledger takes no further worker")),
            other => Err(unexpected(&other)),
        }
    }

    /// Where another process was heard lately under the name that this one wants. A process that listens where that one
    /// did has followed it, and one that has been silent for two heartbeats may be over.
    fn held_elsewhere(&self, registration: &Registration) -> Option<String> {
        let ledger = self.node.ledger();
        let known = ledger.worker(&registration.worker).filter(|known| known.live)?;
        if known.process_key == registration.process_key || known.address == registration.address {
            return None;
        }
        let heard = self.roster().worker(&registration.worker, known.incarnation).map(|heard| heard.at);
        heard.is_some_and(|at| at.elapsed() <= DUPLICATE_SILENCE).then(|| known.address.clone())
    }

    /// Whether nobody listens there any more. A process that is stopped still does; so may one that cannot be reached.
    async fn is_closed(&self, address: &str) -> bool {
        let tried = tokio::time::timeout(CLOSED_PATIENCE, self.net.connect(address)).await;
        tried.is_ok_and(|tried| tried.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused))
    }

    /// Says what is wrong with whoever belongs to another cluster. Earlier versions do not say where they belong.
    fn same_cluster(&self, cluster: &str) -> Result<(), String> {
        let ledger = self.node.ledger();
        let own = ledger.cluster();
        if cluster.is_empty() || own.is_empty() || cluster == own {
            return Ok(());
        }
        Err(format!("this is cluster {own:?}, not {cluster:?}: was this coordinator's directory emptied?"))
    }

    /// Refuses and counts a command of another cluster.
    fn of_cluster(&self, command: &'static str, cluster: &str) -> Result<(), Refusal> {
        self.same_cluster(cluster).map_err(|detail| {
            let reason = Refused::Foreign.as_str();
            metrics::counter!("baton_coordinator_commands_refused_total", "command" => command, "reason" => reason)
                .increment(1);
            refusal(Refused::Foreign, detail)
        })
    }

    fn registered(&self, incarnation: Incarnation) -> v1::Registered {
        v1::Registered {
            incarnation: incarnation.0,
            cluster: self.cluster(),
            lease_ms: WORKER_LEASE_MS,
            heartbeat_ms: HEARTBEAT_MS,
            coordinators: self.coordinators(),
        }
    }

    fn gateway(&self, member: v1::Member) -> Result<(), Refusal> {
        let now = Instant::now();
        if !self.asking.heard(&gateway_life(&member), &self.node.ledger(), now) {
            return Err(not_registered("full", Refused::NoCapacity, gateways::full().detail));
        }
        match self.roster().gateway(member, now) {
            Some(false) => return Ok(()),
            Some(true) => {}
            None => {
                let detail = format!("{} gateways already", roster::GATEWAYS_MAX);
                return Err(not_registered("full", Refused::NoCapacity, detail));
            }
        }
        self.tell_members();
        Ok(())
    }

    fn heard(&self, request: v1::HeartbeatRequest) -> Result<v1::HeartbeatReply, Status> {
        use v1::heartbeat_reply::Outcome;
        let outcome = match self.heartbeat(request)? {
            Ok(accepted) => Outcome::Accepted(accepted),
            Err(refused) => Outcome::Refused(refused),
        };
        Ok(v1::HeartbeatReply { outcome: Some(outcome) })
    }

    fn heartbeat(&self, request: v1::HeartbeatRequest) -> Result<Result<v1::HeartbeatAccepted, Refusal>, Status> {
        let member = baton_proto::convert::required("member", request.member.clone())?;
        if let Err(detail) = self.same_cluster(&request.cluster) {
            return Ok(Err(not_heard(Refused::Foreign, detail)));
        }
        if Role::try_from(member.role())? == Role::Gateway {
            let member = ask::gateway(member)?;
            return Ok(self.gateway(member).map(|()| self.accepted(false, v1::Order::Serve)));
        }
        let (prefills, seen) = (member.role() == v1::Role::Prefill, request.receivers_seen);
        let beat = ask::beat(request, member)?;
        let model = beat.member.model.clone();
        if let Err((reason, detail)) = self.in_force(&beat.worker, beat.incarnation) {
            return Ok(Err(not_heard(reason, detail)));
        }
        let order = self.node.ledger().worker(&beat.worker).map_or(Order::Serve, Worker::wanted);
        let taken = self.roster().beat(beat, Instant::now());
        self.loads_changed.send_modify(|version| *version += 1);
        self.admission.tell_room();
        Ok(match taken {
            Ok(index_wanted) => {
                let mut accepted = self.accepted(index_wanted, view::order(order));
                if let Some(model) = model.filter(|_| prefills) {
                    (accepted.receivers_version, accepted.receivers) = self.roster().receivers(&model, seen);
                }
                Ok(accepted)
            }
            Err(Old) => Err(not_heard(Refused::Expired, "a later heartbeat has been heard")),
        })
    }

    /// Refuses a life that the ledger knows to be over; the leader refuses one it does not know as well.
    fn in_force(&self, id: &WorkerId, incarnation: Incarnation) -> Result<(), (Refused, String)> {
        let leads = self.leads();
        let ledger = self.node.ledger();
        // A process whose life was ended for its silence may come back; one whose name another process has, may not.
        let reason = match ledger.worker(id) {
            Some(worker) if worker.incarnation == incarnation && worker.live => return Ok(()),
            Some(worker) if worker.incarnation > incarnation => Refused::Stale,
            Some(worker) if worker.incarnation == incarnation => Refused::Fenced,
            _ if leads => Refused::Fenced,
            _ if self.roster().has_room_for(id) => return Ok(()),
            _ => return Err((Refused::NoCapacity, format!("{id} is not known here, nor are {WORKERS_MAX} others"))),
        };
        Err((reason, format!("{id} incarnation {incarnation} is not in force: register again")))
    }

    fn accepted(&self, index_wanted: bool, order: v1::Order) -> v1::HeartbeatAccepted {
        let leader = self.node.standing().borrow().leader;
        v1::HeartbeatAccepted {
            leader: self.leads(),
            lease_ms: WORKER_LEASE_MS,
            index_wanted,
            leader_node: leader.map_or(0, |leader| leader.0),
            leader_address: leader.map(|leader| self.address(leader)).unwrap_or_default(),
            coordinators: self.coordinators(),
            order: order.into(),
            ..v1::HeartbeatAccepted::default()
        }
    }

    async fn finish(&self, request: v1::FinishRequest) -> Result<Result<(), Refusal>, Status> {
        if request.requests.len() > FINISHED_MAX {
            return Err(Status::invalid_argument(format!("more than {FINISHED_MAX} ends in one call")));
        }
        let mut finished = request.requests.into_iter().map(ask::finished).collect::<Result<Vec<_>, _>>()?;
        let gateway = ask::text("gateway", request.gateway)?;
        if let Err(refused) = self.of_cluster("finish", &request.cluster) {
            return Ok(Err(refused));
        }
        if let Err(refused) = self.leading().await {
            return Ok(Err(refused));
        }
        let _moving = self.moving.turns(finished.iter().map(|finished| finished.request).collect()).await;
        finished.retain(|finished| self.may_end(finished, &gateway));
        self.release_ended(&finished);
        let epochs: Vec<Epoch> = finished.iter().map(|finished| finished.epoch).collect();
        finished.iter_mut().for_each(|finished| self.name_epoch(finished));
        let ends = || finished.iter().cloned().zip(&epochs);
        let outcomes = match self.submit_many(ends().map(|(end, _)| Command::Finish(end)).collect()).await {
            Ok(outcomes) => outcomes,
            Err(refused) => return Ok(Err(refused)),
        };
        let (mut again, mut last) = (Vec::new(), Vec::new());
        for ((end, told), outcome) in ends().zip(outcomes) {
            match outcome {
                // The assignment that its gateway was asking for came in between.
                Outcome::Refused(Refused::Stale) if end.epoch != *told => {
                    again.push(Command::Finish(Finished { epoch: *told, ..end }));
                }
                outcome => last.push(outcome),
            }
        }
        if !again.is_empty() {
            match self.submit_many(again).await {
                Ok(outcomes) => last.extend(outcomes),
                Err(refused) => return Ok(Err(refused)),
            }
        }
        last.iter().for_each(count_end);
        Ok(Ok(()))
    }

    /// Whether the request is this gateway's to end. One that slept while another took its streams over tells an end that
    /// is none; what it saw of the request is not the whole.
    fn may_end(&self, finished: &Finished, gateway: &str) -> bool {
        let may = self.node.ledger().request(finished.request).is_none_or(|open| open.is_of(gateway));
        if !may {
            tracing::debug!(request = %finished.request, gateway, "not ended: another gateway serves it");
            count_end(&Outcome::Refused(Refused::Stale));
        }
        may
    }

    /// Whoever ends a request while it asks for its next assignment does not know which one is in force. What has been
    /// generated is billed under the one that is.
    fn name_epoch(&self, finished: &mut Finished) {
        if finished.epoch == Epoch(0) && finished.generated_tokens > 0 {
            let in_force = self.node.ledger().request(finished.request).map(|open| open.epoch);
            finished.epoch = in_force.unwrap_or_default();
        }
    }

    /// Requests that end make room, on their workers and for those that wait.
    fn release_ended(&self, finished: &[Finished]) {
        let ledger = self.node.ledger();
        let mut roster = self.roster();
        let mut models: BTreeMap<&str, u64> = BTreeMap::new();
        for finished in finished {
            let request = finished.request;
            let Some(open) = ledger.request(request) else {
                self.admission.cancel(request);
                continue;
            };
            roster.release(request, &open.decode.worker);
            open.prefill.iter().for_each(|prefill| roster.release(request, &prefill.worker));
            if let Some(worker) = ledger.worker(&open.decode.worker) {
                *models.entry(&worker.model.name).or_default() += 1;
            }
        }
        models.into_iter().for_each(|(model, count)| self.admission.ended(model, count));
        self.admission.tell_room();
    }

    async fn leave(&self, request: v1::LeaveRequest) -> Result<(), Status> {
        self.of_cluster("leave", &request.cluster).map_err(not_done)?;
        if self.roster().gateway_left(&request.id) {
            self.tell_members();
            return Ok(());
        }
        self.leading().await.map_err(not_done)?;
        let (worker, incarnation) = (WorkerId(request.id.into()), Incarnation(request.incarnation));
        tracing::info!(%worker, %incarnation, "leaves");
        self.submit(Command::Leave { worker, incarnation }).await.map_err(not_done)?;
        Ok(())
    }
}

/// A refusal where the answer has no place for one.
fn not_done(refused: Refusal) -> Status {
    Status::failed_precondition(format!("{}: {}", refused.reason, refused.detail))
}

/// Counts what became of an end that somebody told.
fn count_end(outcome: &Outcome) {
    match outcome {
        Outcome::Refused(reason) => {
            metrics::counter!("baton_coordinator_finishes_refused_total", "reason" => reason.as_str()).increment(1);
        }
        _ => metrics::counter!("baton_coordinator_finished_total").increment(1),
    }
}

/// Resolves when this node stops.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    drop(stopping.wait_for(|stopping| *stopping).await);
}

fn not_registered(why: &'static str, reason: Refused, detail: impl Into<String>) -> Refusal {
    metrics::counter!("baton_coordinator_registrations_refused_total", "reason" => why).increment(1);
    refusal(reason, detail)
}

fn not_heard(reason: Refused, detail: impl Into<String>) -> Refusal {
    metrics::counter!("baton_coordinator_heartbeats_refused_total", "reason" => reason.as_str()).increment(1);
    refusal(reason, detail)
}

fn no_quorum() -> Refusal {
    unavailable("no leader: a quorum of coordinators does not answer")
}

fn unavailable(why: &str) -> Refusal {
    Refusal { retry_after_ms: RETRY_UNKNOWN_MS, ..refusal(Refused::Unavailable, why) }
}

fn unexpected(outcome: &Outcome) -> Refusal {
    tracing::error!(?outcome, "the ledger answered another question");
    unavailable("the ledger answered another question")
}

impl Service {
    /// Resolves when this node stops: it has no more answers, and whoever asks goes elsewhere, instead of waiting on an old
    /// connection.
    fn stopped(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let mut stopping = self.0.stopping.subscribe();
        Box::pin(async move {
            match planted::is(Bug::StreamsOutliveNode) {
                true => std::future::pending().await,
                false => stopped(&mut stopping).await,
            }
        })
    }
}

#[tonic::async_trait]
impl v1::coordinator_server::Coordinator for Service {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::ClusterView, Status>> + Send>>;
    type AssignmentsStream = Pin<Box<dyn Stream<Item = Result<v1::AssignedBatch, Status>> + Send>>;
    type WatchAccessStream = Pin<Box<dyn Stream<Item = Result<v1::Access, Status>> + Send>>;
    type HeartbeatsStream = Pin<Box<dyn Stream<Item = Result<v1::HeartbeatReply, Status>> + Send>>;

    async fn register(&self, request: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterReply>, Status> {
        use v1::register_reply::Outcome;
        let outcome = match self.0.register(request.into_inner()).await? {
            Ok(registered) => Outcome::Registered(registered),
            Err(refused) => Outcome::Refused(refused),
        };
        Ok(Response::new(v1::RegisterReply { outcome: Some(outcome) }))
    }

    async fn heartbeat(&self, request: Request<v1::HeartbeatRequest>) -> Result<Response<v1::HeartbeatReply>, Status> {
        self.0.heard(request.into_inner()).map(Response::new)
    }

    async fn heartbeats(
        &self,
        request: Request<tonic::Streaming<v1::HeartbeatRequest>>,
    ) -> Result<Response<Self::HeartbeatsStream>, Status> {
        let shared = self.0.clone();
        let answers = request.into_inner().map(move |beat| shared.heard(beat?));
        Ok(Response::new(Box::pin(answers.take_until(self.stopped()))))
    }

    async fn leave(&self, request: Request<v1::LeaveRequest>) -> Result<Response<v1::LeaveReply>, Status> {
        self.0.leave(request.into_inner()).await?;
        Ok(Response::new(v1::LeaveReply {}))
    }

    async fn assign(&self, request: Request<v1::AssignRequest>) -> Result<Response<v1::AssignReply>, Status> {
        use v1::assign_reply::Outcome;
        let since = Instant::now();
        let request = request.into_inner();
        let answer = match self.0.of_cluster("assign", &request.cluster) {
            Ok(()) => self.0.assign(Ask::new(request)?).await,
            Err(foreign) => Err(foreign),
        };
        assign::count(&answer, since);
        let outcome = match answer {
            Ok(assignment) => Outcome::Assignment(assignment),
            Err(refused) => Outcome::Refused(refused),
        };
        Ok(Response::new(v1::AssignReply { outcome: Some(outcome) }))
    }

    async fn assignments(
        &self,
        request: Request<tonic::Streaming<v1::AssignBatch>>,
    ) -> Result<Response<Self::AssignmentsStream>, Status> {
        let answers = stream::assignments(self.0.clone(), request.into_inner());
        Ok(Response::new(Box::pin(answers.take_until(self.stopped()))))
    }

    async fn locate(&self, request: Request<v1::LocateRequest>) -> Result<Response<v1::LocateReply>, Status> {
        use v1::locate_reply::Outcome;
        let outcome = match self.0.locate(request.into_inner()).await {
            Ok(assignment) => Outcome::Assignment(assignment),
            Err(refused) => Outcome::Refused(refused),
        };
        Ok(Response::new(v1::LocateReply { outcome: Some(outcome) }))
    }

    async fn watch_access(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchAccessStream>, Status> {
        let v1::WatchRequest { cluster, word_ms } = request.into_inner();
        self.0.of_cluster("watch_access", &cluster).map_err(not_done)?;
        Ok(Response::new(Box::pin(access::accesses(self.0.clone(), word_ms))))
    }

    async fn finish(&self, request: Request<v1::FinishRequest>) -> Result<Response<v1::FinishReply>, Status> {
        use v1::finish_reply::Outcome;
        let outcome = match self.0.finish(request.into_inner()).await? {
            Ok(()) => Outcome::Finished(v1::Finished {}),
            Err(refused) => Outcome::Refused(refused),
        };
        Ok(Response::new(v1::FinishReply { outcome: Some(outcome) }))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.0.of_cluster("watch", &request.into_inner().cluster).map_err(not_done)?;
        Ok(Response::new(Box::pin(view::views(self.0.clone()))))
    }
}
