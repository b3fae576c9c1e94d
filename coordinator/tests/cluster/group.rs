//! One or three coordinators in this process, and the calls that gateways and workers make.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use baton_coordinator::{Config, Running, placement::Policy};
use baton_core::{Env, Net, NodeId, Process, Rng, SystemClock};
use baton_proto::v1::coordinator_client::CoordinatorClient;
use baton_proto::{TcpNet, WIRE_VERSION, v1};
use tonic::transport::Channel;

use crate::wait_for;

/// A directory that goes when the test ends.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Directory {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("baton-coordinator-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&path).unwrap();
        Directory(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

pub(crate) fn env(seed: u64) -> Env {
    Env { net: Arc::new(TcpNet), clock: Arc::new(SystemClock), rng: Rng::new(seed), process: Process::own() }
}

pub(crate) fn config(node: u64, data: &Path, peers: &[(NodeId, String)]) -> Config {
    let listen = peers.iter().find(|(id, _)| id.0 == node).map_or("127.0.0.1:0", |(_, address)| address);
    Config {
        node: NodeId(node),
        listen: listen.to_string(),
        data: data.join(format!("node-{node}")),
        peers: peers.to_vec(),
        advertise: String::new(),
        cluster: None,
        policy: Policy::default(),
        entries: baton_coordinator::state::VERSION,
    }
}

pub(crate) async fn start(config: Config) -> Running {
    baton_coordinator::start(config.clone(), env(config.node.0)).await.unwrap()
}

pub(crate) async fn try_start(config: Config) -> Result<Running, baton_coordinator::StartError> {
    baton_coordinator::start(config.clone(), env(config.node.0)).await
}

/// Three coordinators, each restartable on its own directory and port.
pub(crate) struct Group {
    pub(crate) directory: Directory,
    pub(crate) peers: Vec<(NodeId, String)>,
    pub(crate) running: Vec<Option<Running>>,
}

impl Group {
    pub(crate) async fn start() -> Group {
        let directory = Directory::new();
        let peers = free_addresses(3).await;
        let mut group = Group { directory, peers, running: vec![None, None, None] };
        for at in 0..3 {
            group.restart(at).await;
        }
        group
    }

    pub(crate) async fn restart(&mut self, at: usize) {
        let config = config(at as u64 + 1, self.directory.path(), &self.peers);
        self.running[at] = Some(start(config).await);
    }

    pub(crate) async fn stop(&mut self, at: usize) {
        self.running[at].take().unwrap().stop().await;
    }

    pub(crate) async fn stop_all(&mut self) {
        for at in 0..3 {
            if self.running[at].is_some() {
                self.stop(at).await;
            }
        }
    }

    pub(crate) fn client(&self, at: usize) -> Client {
        Client::new(&self.peers[at].1)
    }

    /// Waits until the running nodes agree on a leader among them and returns its place.
    pub(crate) async fn leader(&self) -> usize {
        wait_for("one leader that all know", || async {
            let mut leaders = Vec::new();
            for at in (0..3).filter(|at| self.running[*at].is_some()) {
                leaders.push(self.client(at).view().await?.leader);
            }
            let leader = leaders[0];
            let place = leader.checked_sub(1)? as usize;
            (leaders.iter().all(|l| *l == leader) && self.running[place].is_some()).then_some(place)
        })
        .await
    }
}

/// Addresses that are free, and that neither the operating system hands to outgoing connections nor another test takes.
pub(crate) async fn free_addresses(count: u64) -> Vec<(NodeId, String)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mut addresses = Vec::new();
    while (addresses.len() as u64) < count {
        let nth = std::process::id().wrapping_mul(89).wrapping_add(COUNT.fetch_add(1, Ordering::Relaxed));
        let address = format!("127.0.0.1:{}", 12_000 + nth % 4_000);
        if TcpNet.listen(&address).await.is_ok() {
            addresses.push((NodeId(addresses.len() as u64 + 1), address));
        }
    }
    addresses
}

/// One caller of one coordinator.
#[derive(Clone)]
pub(crate) struct Client(CoordinatorClient<Channel>);

impl Client {
    pub(crate) fn new(address: &str) -> Client {
        Client(CoordinatorClient::new(baton_proto::channel(Arc::new(TcpNet), address).unwrap()))
    }

    /// The first view of a watch, if the node answers.
    pub(crate) async fn view(&mut self) -> Option<v1::ClusterView> {
        let mut views = self.0.watch(v1::WatchRequest::default()).await.ok()?.into_inner();
        views.message().await.ok()?
    }

    pub(crate) async fn register(&mut self, id: &str, key: &str) -> Result<u64, v1::Refusal> {
        self.register_as(member(id), key).await
    }

    pub(crate) async fn register_as(&mut self, member: v1::Member, key: &str) -> Result<u64, v1::Refusal> {
        let request = v1::RegisterRequest {
            cluster: String::new(),
            wire_version: WIRE_VERSION,
            member: Some(member),
            process_key: key.into(),
        };
        match self.0.register(request).await.unwrap().into_inner().outcome.unwrap() {
            v1::register_reply::Outcome::Registered(registered) => Ok(registered.incarnation),
            v1::register_reply::Outcome::Refused(refusal) => Err(refusal),
        }
    }

    pub(crate) async fn register_golden(&mut self, id: &str, golden: &[u32]) -> Result<u64, v1::Refusal> {
        let mut member = member(id);
        member.model.as_mut().unwrap().canary_tokens = golden.to_vec();
        self.register_as(member, "k").await
    }

    pub(crate) async fn assignments(
        &mut self,
        said: tokio_stream::wrappers::ReceiverStream<v1::AssignBatch>,
    ) -> tonic::Streaming<v1::AssignedBatch> {
        self.0.assignments(said).await.unwrap().into_inner()
    }

    pub(crate) async fn gateway_beat(&mut self, id: &str) {
        let member = v1::Member {
            id: id.into(),
            role: v1::Role::Gateway.into(),
            address: format!("{id}:1"),
            ..Default::default()
        };
        let request = v1::HeartbeatRequest { id: id.into(), member: Some(member), ..Default::default() };
        let reply = self.0.heartbeat(request).await.unwrap().into_inner();
        assert!(matches!(reply.outcome, Some(v1::heartbeat_reply::Outcome::Accepted(_))), "{reply:?}");
    }

    pub(crate) async fn locate(
        &mut self,
        request: u128,
        gateway: &str,
        tenant: &str,
    ) -> Result<v1::Assignment, String> {
        let (gateway, tenant) = (gateway.into(), tenant.into());
        let request = format!("{request:032x}");
        let request = v1::LocateRequest { request, gateway, tenant, ..Default::default() };
        match self.0.locate(request).await.unwrap().into_inner().outcome.unwrap() {
            v1::locate_reply::Outcome::Assignment(assignment) => Ok(assignment),
            v1::locate_reply::Outcome::Refused(refusal) => Err(refusal.reason),
        }
    }

    /// Access, with a word this often.
    pub(crate) async fn listen(&mut self, word_ms: u64) -> tonic::Streaming<v1::Access> {
        let request = v1::WatchRequest { word_ms, ..v1::WatchRequest::default() };
        self.0.watch_access(request).await.unwrap().into_inner()
    }

    /// Says each command in the name of a cluster; what was refused, and why.
    pub(crate) async fn say_as(&mut self, cluster: &str, incarnation: u64) -> Vec<(&'static str, Option<String>)> {
        let cluster = || cluster.to_string();
        let ended = |status: tonic::Status| status.message().split(':').next().unwrap_or_default().to_string();
        let member = Some(member("decode-0"));
        let beat = v1::HeartbeatRequest {
            id: "decode-0".into(),
            incarnation,
            sequence: 1,
            load: Some(v1::Load { blocks_total: 1000, blocks_free: 1000, ..Default::default() }),
            member,
            cluster: cluster(),
            receivers_seen: 0,
        };
        let beat = match self.0.heartbeat(beat).await.unwrap().into_inner().outcome {
            Some(v1::heartbeat_reply::Outcome::Refused(refused)) => Some(refused.reason),
            _ => None,
        };
        let asked = v1::AssignRequest { cluster: cluster(), ..request(1, 1) };
        let assign = self.assign(asked.clone()).await.err().map(|refused| refused.reason);
        let (say, said) = tokio::sync::mpsc::channel(1);
        let batch = v1::AssignBatch { requests: vec![request(1, 1)], cluster: cluster() };
        say.send(batch).await.unwrap();
        let mut replies = self.assignments(tokio_stream::wrappers::ReceiverStream::new(said)).await;
        let reply = replies.message().await.unwrap().unwrap().replies.remove(0).reply.unwrap();
        let batch = match reply.outcome.unwrap() {
            v1::assign_reply::Outcome::Refused(refused) => Some(refused.reason),
            v1::assign_reply::Outcome::Assignment(_) => None,
        };
        let locate = v1::LocateRequest { request: format!("{:032x}", 1), cluster: cluster(), ..Default::default() };
        let locate = match self.0.locate(locate).await.unwrap().into_inner().outcome.unwrap() {
            v1::locate_reply::Outcome::Refused(refused) => Some(refused.reason),
            v1::locate_reply::Outcome::Assignment(_) => None,
        };
        // Of a request that never was: it ends nothing.
        let never =
            v1::FinishedRequest { request: format!("{:032x}", 99), outcome: "complete".into(), ..Default::default() };
        let finish = v1::FinishRequest { requests: vec![never], cluster: cluster(), ..Default::default() };
        let finish = match self.0.finish(finish).await.unwrap().into_inner().outcome.unwrap() {
            v1::finish_reply::Outcome::Refused(refused) => Some(refused.reason),
            v1::finish_reply::Outcome::Finished(_) => None,
        };
        let leave = v1::LeaveRequest { id: "nobody".into(), incarnation: 1, cluster: cluster() };
        let leave = self.0.leave(leave).await.err().map(ended);
        let watch = || v1::WatchRequest { cluster: cluster(), ..Default::default() };
        let view = self.0.watch(watch()).await.err().map(ended);
        let access = self.0.watch_access(watch()).await.err().map(ended);
        vec![
            ("heartbeat", beat),
            ("assign", assign),
            ("assignments", batch),
            ("locate", locate),
            ("finish", finish),
            ("leave", leave),
            ("watch", view),
            ("watch_access", access),
        ]
    }

    pub(crate) async fn watch_access(&mut self) -> tonic::Streaming<v1::Access> {
        self.0.watch_access(v1::WatchRequest::default()).await.unwrap().into_inner()
    }

    pub(crate) async fn beat(
        &mut self,
        id: &str,
        incarnation: u64,
        sequence: u64,
    ) -> Result<v1::HeartbeatAccepted, v1::Refusal> {
        let load = v1::Load { blocks_total: 1000, blocks_free: 1000, ..Default::default() };
        self.beat_with(id, incarnation, sequence, load).await
    }

    pub(crate) async fn beat_with(
        &mut self,
        id: &str,
        incarnation: u64,
        sequence: u64,
        load: v1::Load,
    ) -> Result<v1::HeartbeatAccepted, v1::Refusal> {
        let request = heartbeat(id, incarnation, sequence, load);
        match self.0.heartbeat(request).await.unwrap().into_inner().outcome.unwrap() {
            v1::heartbeat_reply::Outcome::Accepted(accepted) => Ok(accepted),
            v1::heartbeat_reply::Outcome::Refused(refusal) => Err(refusal),
        }
    }

    /// A heartbeat to a node that may be gone.
    pub(crate) async fn try_beat(
        &mut self,
        id: &str,
        incarnation: u64,
        sequence: u64,
        load: v1::Load,
    ) -> Result<(), tonic::Status> {
        let request = heartbeat(id, incarnation, sequence, load);
        match self.0.heartbeat(request).await?.into_inner().outcome {
            Some(v1::heartbeat_reply::Outcome::Accepted(_)) => Ok(()),
            refused => Err(tonic::Status::failed_precondition(format!("{refused:?}"))),
        }
    }

    /// The incarnation, where the node leads and answers.
    pub(crate) async fn try_register(&mut self, id: &str, key: &str) -> Option<u64> {
        let request = v1::RegisterRequest {
            cluster: String::new(),
            wire_version: WIRE_VERSION,
            member: Some(member(id)),
            process_key: key.into(),
        };
        match self.0.register(request).await.ok()?.into_inner().outcome? {
            v1::register_reply::Outcome::Registered(registered) => Some(registered.incarnation),
            v1::register_reply::Outcome::Refused(_) => None,
        }
    }

    /// The coordinators as the node names them, where it answers.
    pub(crate) async fn coordinators_told(&mut self, id: &str, incarnation: u64, sequence: u64) -> Option<Vec<String>> {
        let load = v1::Load { blocks_total: 1000, blocks_free: 1000, ..Default::default() };
        let request = heartbeat(id, incarnation, sequence, load);
        match self.0.heartbeat(request).await.ok()?.into_inner().outcome? {
            v1::heartbeat_reply::Outcome::Accepted(accepted) => Some(accepted.coordinators),
            v1::heartbeat_reply::Outcome::Refused(_) => None,
        }
    }

    pub(crate) async fn try_beat_gateway(&mut self, id: &str) {
        let member = v1::Member { role: v1::Role::Gateway.into(), model: None, ..member(id) };
        let request = v1::HeartbeatRequest { id: id.into(), member: Some(member), ..Default::default() };
        drop(self.0.heartbeat(request).await);
    }

    /// Whether the end of the request was acknowledged.
    pub(crate) async fn try_finish(&mut self, request: u128) -> bool {
        let request = v1::FinishedRequest {
            request: format!("{request:032x}"),
            outcome: "complete".into(),
            ..Default::default()
        };
        let reply = self.0.finish(v1::FinishRequest { requests: vec![request], ..Default::default() }).await;
        let outcome = reply.ok().and_then(|reply| reply.into_inner().outcome);
        matches!(outcome, Some(v1::finish_reply::Outcome::Finished(_)))
    }

    pub(crate) async fn watch(&mut self) -> tonic::Streaming<v1::ClusterView> {
        self.0.watch(v1::WatchRequest::default()).await.unwrap().into_inner()
    }

    pub(crate) async fn assign_raw(&mut self, request: v1::AssignRequest) -> Result<v1::AssignReply, tonic::Status> {
        self.0.assign(request).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn assign(&mut self, request: v1::AssignRequest) -> Result<v1::Assignment, v1::Refusal> {
        match self.0.assign(request).await.unwrap().into_inner().outcome.unwrap() {
            v1::assign_reply::Outcome::Assignment(assignment) => Ok(assignment),
            v1::assign_reply::Outcome::Refused(refusal) => Err(refusal),
        }
    }

    /// Ends of requests as a gateway tells them; they must be taken.
    pub(crate) async fn tell(&mut self, ends: v1::FinishRequest) {
        let reply = self.0.finish(ends).await.unwrap().into_inner();
        assert!(matches!(reply.outcome, Some(v1::finish_reply::Outcome::Finished(_))), "{reply:?}");
    }

    /// Why a gateway that names this key and cluster may not locate a request; "": it may.
    pub(crate) async fn locate_with(&mut self, request: u128, tenant: &str, key: &str, cluster: &str) -> String {
        let (request, tenant, key) = (format!("{request:032x}"), tenant.into(), key.into());
        let request = v1::LocateRequest { request, tenant, key, cluster: cluster.into(), ..Default::default() };
        match self.0.locate(request).await.unwrap().into_inner().outcome.unwrap() {
            v1::locate_reply::Outcome::Assignment(_) => String::new(),
            v1::locate_reply::Outcome::Refused(refusal) => refusal.reason,
        }
    }

    pub(crate) async fn finish_all(&mut self, requests: Vec<v1::FinishedRequest>) {
        let reply = self.0.finish(v1::FinishRequest { requests, ..Default::default() }).await.unwrap().into_inner();
        assert!(matches!(reply.outcome, Some(v1::finish_reply::Outcome::Finished(_))), "{reply:?}");
    }

    pub(crate) async fn finish(&mut self, request: u128, epoch: u64) -> Result<(), v1::Refusal> {
        let request = v1::FinishedRequest {
            request: format!("{request:032x}"),
            epoch,
            outcome: "complete".into(),
            ..Default::default()
        };
        let reply = self.0.finish(v1::FinishRequest { requests: vec![request], ..Default::default() }).await.unwrap();
        match reply.into_inner().outcome.unwrap() {
            v1::finish_reply::Outcome::Finished(_) => Ok(()),
            v1::finish_reply::Outcome::Refused(refusal) => Err(refusal),
        }
    }
}

/// `prefill-…` and `decode-…` of one model.
pub(crate) fn member(id: &str) -> v1::Member {
    let role = if id.starts_with("prefill") { v1::Role::Prefill } else { v1::Role::Decode };
    let model = v1::ModelSummary {
        name: "m".into(),
        card_hash: "c".into(),
        numerics: "n".into(),
        block_tokens: 16,
        positions_max: 4096,
        layout: "l".into(),
        blocks_total: 1000,
        block_bytes: 1,
        ..v1::ModelSummary::default()
    };
    v1::Member {
        id: id.into(),
        role: role.into(),
        address: format!("{id}:1"),
        pid: 1,
        incarnation: 0,
        version: "1".into(),
        model: Some(model),
        ..v1::Member::default()
    }
}

/// Of a process that names no cluster.
fn heartbeat(id: &str, incarnation: u64, sequence: u64, load: v1::Load) -> v1::HeartbeatRequest {
    let (member, load) = (Some(member(id)), Some(load));
    v1::HeartbeatRequest { id: id.into(), incarnation, sequence, load, member, ..Default::default() }
}

pub(crate) fn request(id: u128, attempt: u32) -> v1::AssignRequest {
    v1::AssignRequest {
        request: format!("{id:032x}"),
        attempt,
        model: "m".into(),
        prompt_tokens: 100,
        tokens_max: 10,
        choices: 1,
        deadline_ms: 60_000,
        gateway: "g".into(),
        ..Default::default()
    }
}
