//! A cluster of fakes in this process, and gateways among them: coordinators that assign by list, decode workers that
//! say what the test wants.

use std::future::pending;
use std::sync::Arc;

use baton_core::{Env, Net, Process, Rng, SystemClock};
use baton_gateway::{Config, Running};
use baton_proto::TcpNet;
use baton_proto::server::Bound;
use baton_proto::v1::coordinator_server::CoordinatorServer;
use baton_proto::v1::decode_server::DecodeServer;
use baton_proto::v1::worker_server::WorkerServer;
use baton_proto::v1::*;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tonic::service::Routes;

use crate::coordinator::{CoordinatorService, FakeLedger};
use crate::worker::{FakeWorker, WorkerService};

pub(crate) use crate::worker::{EOS, MODEL, POSITIONS_MAX, Script};

/// What the fakes have seen.
#[derive(Default)]
pub(crate) struct Seen {
    pub assigns: Vec<AssignRequest>,
    /// Which coordinator got how many questions in one message.
    pub batches: Vec<(usize, usize)>,
    pub locates: Vec<LocateRequest>,
    /// Requests that a gateway other than their first was made responsible for.
    pub adopted: Vec<String>,
    pub finishes: Vec<FinishedRequest>,
    pub starts: Vec<(String, Start)>,
    pub resumes: Vec<Resume>,
    /// Which worker was told to cancel which choices; none: the whole request.
    pub cancels: Vec<(String, Vec<u32>)>,
    pub generated: usize,
    pub streams_ended: usize,
    pub registered: Vec<Member>,
    /// Which coordinators were told.
    pub heartbeats: Vec<usize>,
}

/// A gateway among fakes.
pub(crate) struct World {
    pub gateway: Running,
    pub seen: watch::Receiver<Seen>,
    pub ledger: Arc<FakeLedger>,
    pub workers: Vec<Arc<FakeWorker>>,
    tasks: JoinSet<()>,
}

impl World {
    /// As many decode workers as scripts; ready when the gateway is healthy.
    pub(crate) async fn new(scripts: Vec<Script>) -> World {
        World::with(scripts, |_| {}).await
    }

    pub(crate) async fn with(scripts: Vec<Script>, configure: impl FnOnce(&mut Config)) -> World {
        World::of(1, scripts, configure).await
    }

    /// With several coordinators, of which the gateway is told the first.
    pub(crate) async fn of(coordinators: usize, scripts: Vec<Script>, configure: impl FnOnce(&mut Config)) -> World {
        let (seen_sender, seen) = watch::channel(Seen::default());
        let seen_sender = Arc::new(seen_sender);
        let mut tasks = JoinSet::new();
        let mut workers = Vec::new();
        let mut members = Vec::new();
        for (i, script) in scripts.into_iter().enumerate() {
            let id = format!("decode-{i}");
            let worker = Arc::new(FakeWorker::new(&id, seen_sender.clone(), script));
            let services = Routes::new(DecodeServer::new(WorkerService(worker.clone())))
                .add_service(WorkerServer::new(WorkerService(worker.clone())));
            let address = serve(services, &mut tasks).await;
            members.push(member(&id, mortal(address, worker.died.subscribe(), &mut tasks).await));
            workers.push(worker);
        }
        let view = ClusterView { cluster: "test".into(), node: 1, leader: 1, members, ..Default::default() };
        let ledger = Arc::new(FakeLedger::new(seen_sender, view));
        for node in 0..coordinators {
            let service = CoordinatorService { ledger: ledger.clone(), node, tasks: Arc::default() };
            let services = Routes::new(CoordinatorServer::new(service));
            let address = serve(services, &mut tasks).await;
            ledger.addresses.lock().unwrap().push(address);
        }
        let mut config = Config::new("gateway-0", "127.0.0.1:0", vec![ledger.addresses.lock().unwrap()[0].clone()]);
        configure(&mut config);
        let gateway = start(config).await.unwrap();
        let world = World { gateway, seen, ledger, workers, tasks };
        if !world.workers.is_empty() {
            healthy(&world.address()).await;
        }
        world
    }

    /// One worker that says "Hello world".
    pub(crate) async fn hello() -> World {
        World::new(vec![Script::default()]).await
    }

    /// One worker that generates `text`.
    pub(crate) async fn says(text: &str) -> World {
        World::new(vec![Script { texts: vec![text.as_bytes().to_vec()], ..Script::default() }]).await
    }

    pub(crate) fn address(&self) -> String {
        self.gateway.address()
    }

    pub(crate) fn config(&self, id: &str) -> Config {
        Config::new(id, "127.0.0.1:0", vec![self.ledger.addresses.lock().unwrap()[0].clone()])
    }

    /// A further gateway that dies as a killed process does: nothing it has in hand is sent, nobody is told.
    pub(crate) async fn mortal_gateway(&mut self, id: &str) -> Mortal {
        let config = self.config(id);
        let ((serves, address), (kill, killed)) = (oneshot::channel(), oneshot::channel::<()>());
        self.tasks.spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let running = start(config).await.unwrap();
                serves.send(running.address()).unwrap();
                // Its tasks are not polled again, whatever their ends would say.
                let _ = killed.await;
                std::mem::forget(running);
            });
        });
        let address = address.await.unwrap();
        healthy(&address).await;
        Mortal { address, _kill: kill }
    }

    /// What the next questions for workers are answered, the last one first.
    pub(crate) fn refuse_assigns(&self, reasons: &[&str]) {
        let refusal =
            |reason: &&str| Refusal { reason: reason.to_string(), retry_after_ms: 1500, ..Default::default() };
        self.ledger.refusals.lock().unwrap().extend(reasons.iter().map(refusal));
    }

    pub(crate) fn change_view(&self, change: impl FnOnce(&mut ClusterView)) {
        self.ledger.view.send_modify(change);
    }

    pub(crate) fn set_script(&self, worker: usize, script: Script) {
        self.workers[worker].script.send_replace(script);
    }

    /// Waits until what the fakes have seen satisfies a condition.
    pub(crate) async fn until(&self, condition: impl FnMut(&Seen) -> bool) {
        self.seen.clone().wait_for(condition).await.unwrap();
    }
}

/// A gateway that dies when this is dropped.
pub(crate) struct Mortal {
    pub address: String,
    _kill: oneshot::Sender<()>,
}

pub(crate) async fn start(config: Config) -> Result<Running, baton_gateway::StartError> {
    // Seeds differ, as those of processes do: two gateways never give two requests one name.
    let seed = config.id.bytes().map(u64::from).sum();
    let env = Env { net: Arc::new(TcpNet), clock: Arc::new(SystemClock), rng: Rng::new(seed), process: Process::own() };
    baton_gateway::start(config, env, Arc::new(|| "metrics here\n".to_string())).await
}

async fn healthy(address: &str) {
    while crate::client::get(address, "/health").await.status != 200 {
        tokio::task::yield_now().await;
    }
}

fn member(id: &str, address: String) -> MemberView {
    let model = ModelSummary { name: MODEL.into(), card_hash: "card-1".into(), ..Default::default() };
    let member = Member {
        id: id.into(),
        role: Role::Decode.into(),
        address,
        incarnation: 1,
        model: Some(model),
        ..Default::default()
    };
    MemberView { member: Some(member), live: true, ..Default::default() }
}

async fn serve(services: Routes, tasks: &mut JoinSet<()>) -> String {
    let listener = TcpNet.listen("127.0.0.1:0").await.unwrap();
    let address = listener.address();
    tasks.spawn(baton_proto::server::serve(listener, Bound::uncounted(), services, pending()));
    address
}

/// An address whose connections lead to `to`, until it has died: then they break and no more are taken.
async fn mortal(to: String, mut died: watch::Receiver<bool>, tasks: &mut JoinSet<()>) -> String {
    let mut listener = TcpNet.listen("127.0.0.1:0").await.unwrap();
    let address = listener.address();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (mut near, to) = (accepted.unwrap(), to.clone());
                    connections.spawn(async move {
                        let mut far = TcpNet.connect(&to).await.unwrap();
                        drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
                    });
                }
                _ = died.wait_for(|died| *died) => return,
            }
        }
    });
    address
}
