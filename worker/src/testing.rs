//! What tests and benchmarks of workers stand on: a coordinator that says yes, and a model without weights. Nothing in a running
//! worker uses it.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};

use baton_core::{BlockHash, Net, Refused};
use baton_engine::HashBackend;
use baton_engine::testing::hash_spec;
use baton_proto::convert::{block_hash, refusal};
use baton_proto::server::Bound;
use baton_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use baton_proto::v1::{
    AssignReply, AssignRequest, ClusterView, FinishReply, FinishRequest, HeartbeatAccepted, HeartbeatReply,
    HeartbeatRequest, LeaveReply, LeaveRequest, Load, Member, ModelCard, Order, RegisterReply, RegisterRequest,
    Registered, WatchRequest, heartbeat_reply, register_reply,
};
use futures::StreamExt;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::{Request, Response, Status, Streaming};

use crate::card::LoadedModel;

/// `HashBackend` as a model to serve.
pub fn hash_model() -> LoadedModel {
    let spec = hash_spec();
    let card = ModelCard { name: spec.name.clone(), hash: "card".into(), ..ModelCard::default() };
    LoadedModel { backend: Box::new(HashBackend::new(spec.vocab)), spec, card }
}

/// A coordinator of one node that accepts every worker and remembers what it said. It assigns nothing.
pub struct FakeCoordinator {
    address: String,
    state: Arc<Mutex<State>>,
    _server: JoinSet<()>,
}

#[derive(Default)]
struct State {
    /// What registrations are answered with instead of yes.
    refusal: Option<(Refused, String)>,
    lives: BTreeMap<String, u64>,
    members: BTreeMap<String, Member>,
    loads: BTreeMap<String, Load>,
    indices: BTreeMap<String, BTreeSet<BlockHash>>,
    index_wanted: bool,
    fenced: BTreeSet<String>,
    orders: BTreeMap<String, Order>,
    /// What heartbeats are told of the coordinators.
    coordinators: Vec<String>,
    beats: usize,
    /// Calls for many heartbeats that were begun.
    calls: usize,
    /// Whether such calls are unknown here.
    earlier: bool,
    /// Whether the next heartbeat finds nobody.
    away: bool,
    /// Grows when those that are open are to end.
    ends: watch::Sender<u64>,
    registrations: usize,
    left: BTreeSet<String>,
}

impl FakeCoordinator {
    pub async fn start(net: &Arc<dyn Net>) -> std::io::Result<FakeCoordinator> {
        let listener = net.listen("127.0.0.1:0").await?;
        let (address, state) = (listener.address(), Arc::<Mutex<State>>::default());
        let service = CoordinatorServer::new(Service(state.clone()));
        let mut server = JoinSet::new();
        server.spawn(baton_proto::server::serve(listener, Bound::uncounted(), service, pending()));
        Ok(FakeCoordinator { address, state, _server: server })
    }

    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// Answers registrations with a refusal from now on; `leader` is where it sends them.
    pub fn refuse(&self, refusal: Option<(Refused, &str)>) {
        lock(&self.state).refusal = refusal.map(|(reason, leader)| (reason, leader.to_string()));
    }

    /// Pretends that another process has registered under the worker's name.
    pub fn supersede(&self, id: &str) {
        *lock(&self.state).lives.entry(id.into()).or_default() += 1;
    }

    /// Ends the life of a worker, as if it had been silent.
    pub fn fence(&self, id: &str) {
        lock(&self.state).fenced.insert(id.into());
    }

    /// Orders a worker, until it registers again.
    pub fn order(&self, id: &str, order: Order) {
        lock(&self.state).orders.insert(id.into(), order);
    }

    /// Names these coordinators with every answer.
    pub fn list(&self, coordinators: &[&FakeCoordinator]) {
        lock(&self.state).coordinators = coordinators.iter().map(|one| one.address()).collect();
    }

    /// Heartbeats heard.
    pub fn beats(&self) -> usize {
        lock(&self.state).beats
    }

    /// Calls that heartbeats came by; one of an earlier release knows no such calls.
    pub fn beat_calls(&self) -> usize {
        lock(&self.state).calls
    }

    /// Is of an earlier release from now on.
    pub fn be_earlier(&self) {
        lock(&self.state).earlier = true;
    }

    /// Is replaced by one of this release: the next heartbeat finds nobody.
    pub fn be_replaced(&self) {
        let mut state = lock(&self.state);
        (state.earlier, state.away) = (false, true);
    }

    /// Ends the calls that heartbeats come by.
    pub fn end_beat_calls(&self) {
        lock(&self.state).ends.send_modify(|ends| *ends += 1);
    }

    /// A worker as it registered last.
    pub fn member(&self, id: &str) -> Option<Member> {
        lock(&self.state).members.get(id).cloned()
    }

    /// Asks for the whole index with every answer.
    pub fn want_index(&self, wanted: bool) {
        lock(&self.state).index_wanted = wanted;
    }

    pub fn registrations(&self) -> usize {
        lock(&self.state).registrations
    }

    pub fn load(&self, id: &str) -> Option<Load> {
        lock(&self.state).loads.get(id).cloned()
    }

    /// The prefix index as the worker's heartbeats tell it.
    pub fn index(&self, id: &str) -> BTreeSet<BlockHash> {
        lock(&self.state).indices.get(id).cloned().unwrap_or_default()
    }

    pub fn has_left(&self, id: &str) -> bool {
        lock(&self.state).left.contains(id)
    }
}

#[derive(Clone)]
struct Service(Arc<Mutex<State>>);

#[tonic::async_trait]
impl Coordinator for Service {
    type WatchStream = Pin<Box<dyn futures::Stream<Item = Result<ClusterView, Status>> + Send>>;
    type AssignmentsStream =
        Pin<Box<dyn futures::Stream<Item = Result<baton_proto::v1::AssignedBatch, Status>> + Send>>;
    type WatchAccessStream = Pin<Box<dyn futures::Stream<Item = Result<baton_proto::v1::Access, Status>> + Send>>;

    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<RegisterReply>, Status> {
        let member = request.into_inner().member.unwrap_or_default();
        let mut state = lock(&self.0);
        state.registrations += 1;
        if let Some((reason, leader)) = &state.refusal {
            let refused = baton_proto::v1::Refusal { leader_address: leader.clone(), ..refusal(*reason, "as told") };
            return Ok(Response::new(RegisterReply { outcome: Some(register_reply::Outcome::Refused(refused)) }));
        }
        let life = state.lives.entry(member.id.clone()).or_default();
        *life += 1;
        let registered = Registered { incarnation: *life, ..Registered::default() };
        state.fenced.remove(&member.id);
        state.orders.remove(&member.id);
        state.left.remove(&member.id);
        state.members.insert(member.id.clone(), member);
        Ok(Response::new(RegisterReply { outcome: Some(register_reply::Outcome::Registered(registered)) }))
    }

    async fn heartbeat(&self, request: Request<HeartbeatRequest>) -> Result<Response<HeartbeatReply>, Status> {
        let beat = request.into_inner();
        let mut state = lock(&self.0);
        if std::mem::take(&mut state.away) {
            return Err(Status::unavailable("it is being replaced"));
        }
        state.beats += 1;
        let reason = match state.lives.get(&beat.id) {
            Some(life) if *life > beat.incarnation => Some(Refused::Stale),
            _ => state.fenced.contains(&beat.id).then_some(Refused::Fenced),
        };
        let outcome = match reason {
            None => heartbeat_reply::Outcome::Accepted(state.hear(beat)),
            Some(reason) => heartbeat_reply::Outcome::Refused(refusal(reason, "as told")),
        };
        Ok(Response::new(HeartbeatReply { outcome: Some(outcome) }))
    }

    type HeartbeatsStream = Pin<Box<dyn futures::Stream<Item = Result<HeartbeatReply, Status>> + Send>>;

    async fn heartbeats(
        &self,
        beats: Request<Streaming<HeartbeatRequest>>,
    ) -> Result<Response<Self::HeartbeatsStream>, Status> {
        let mut ends = {
            let mut state = lock(&self.0);
            if state.earlier {
                return Err(Status::unimplemented("not known yet"));
            }
            state.calls += 1;
            state.ends.subscribe()
        };
        let service = self.clone();
        let answers = beats.into_inner().then(move |beat| {
            let service = service.clone();
            async move { service.heartbeat(Request::new(beat?)).await.map(Response::into_inner) }
        });
        let ended = async move { drop(ends.changed().await) };
        Ok(Response::new(Box::pin(answers.take_until(Box::pin(ended)))))
    }

    async fn leave(&self, request: Request<LeaveRequest>) -> Result<Response<LeaveReply>, Status> {
        lock(&self.0).left.insert(request.into_inner().id);
        Ok(Response::new(LeaveReply {}))
    }

    async fn assign(&self, _: Request<AssignRequest>) -> Result<Response<AssignReply>, Status> {
        Err(Status::unimplemented("tests assign by themselves"))
    }

    async fn assignments(
        &self,
        _: Request<tonic::Streaming<baton_proto::v1::AssignBatch>>,
    ) -> Result<Response<Self::AssignmentsStream>, Status> {
        Err(Status::unimplemented("workers ask for no assignments"))
    }

    async fn locate(
        &self,
        _: Request<baton_proto::v1::LocateRequest>,
    ) -> Result<Response<baton_proto::v1::LocateReply>, Status> {
        Err(Status::unimplemented("workers ask for no assignments"))
    }

    async fn watch_access(
        &self,
        _: Request<baton_proto::v1::WatchRequest>,
    ) -> Result<Response<Self::WatchAccessStream>, Status> {
        Err(Status::unimplemented("workers ask for no assignments"))
    }

    async fn finish(&self, _: Request<FinishRequest>) -> Result<Response<FinishReply>, Status> {
        Err(Status::unimplemented("tests keep no ledger"))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("workers do not watch"))
    }
}

impl State {
    fn hear(&mut self, beat: HeartbeatRequest) -> HeartbeatAccepted {
        let load = beat.load.unwrap_or_default();
        let index = self.indices.entry(beat.id.clone()).or_default();
        let hashes = |list: &[bytes::Bytes]| list.iter().filter_map(|b| block_hash(b).ok()).collect::<Vec<_>>();
        if load.index_reset {
            index.clear();
        }
        for hash in hashes(&load.blocks_removed) {
            index.remove(&hash);
        }
        index.extend(hashes(&load.blocks_added));
        let order = self.orders.get(&beat.id).copied().unwrap_or(Order::Serve).into();
        self.loads.insert(beat.id, load);
        let (index_wanted, coordinators) = (self.index_wanted, self.coordinators.clone());
        let decodes = self.members.values().filter(|member| member.role() == baton_proto::v1::Role::Decode);
        let receivers = decodes.map(|member| member.kv_address.clone()).collect();
        HeartbeatAccepted { leader: true, index_wanted, order, coordinators, receivers, ..HeartbeatAccepted::default() }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
