//! What both kinds of worker share: an engine thread, a listener, a place in the cluster, and the check at the door.
//! A role opens the shell, joins the cluster, and serves its own service on it.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_core::net::Listener;
use baton_core::planted::{self, Bug};
use baton_core::{
    Arena, BlockHash, BlockLayout, Env, Epoch, Incarnation, Net, Place, Refused, RequestId, Role, TokenId, WorkerId,
};
use baton_engine::{Backend, Blocks, Cache, Engine, EngineConfig, ModelSpec};
use baton_kvtransfer::Receiver;
use baton_proto::convert::refusal;
use baton_proto::v1::worker_server::{Worker, WorkerServer};
use baton_proto::v1::{CardRequest, LendReply, LendRequest, Member, ModelCard, ModelSummary, Refusal};
use tokio::sync::{oneshot, watch};
use tonic::service::Routes;

use crate::assigned::Assigned;
use crate::audit::Audit;
use crate::canary::{self, Golden};
use crate::card::LoadedModel;
use crate::channels::Channels;
use crate::config::Config;
use crate::engine::{EngineHandle, EngineThread};
use crate::error::StartError;
use crate::lease::Epochs;
use crate::membership::{self, Membership, register};
use crate::metrics;
use crate::peers::Peers;
use crate::running::{Parts, Running};
use crate::standing::Standing;
use crate::tiers::{TierSizes, Tiers};
use crate::units::Units;
use crate::worth;

/// A worker that listens and has its memory, and that nobody knows yet.
pub struct Opened {
    pub config: Config,
    pub net: Arc<dyn Net>,
    pub spec: ModelSpec,
    units: Units,
    engine: EngineThread,
    tiers: Option<Arc<Tiers>>,
    receiver: Receiver,
    listener: Box<dyn Listener>,
    card: ModelCard,
    role: Role,
    rng: baton_core::Rng,
    pid: u32,
    golden: Vec<TokenId>,
}

/// A worker that the cluster knows and that is about to serve.
pub struct Joined {
    shell: Arc<Shell>,
    parts: Parts,
}

/// What a role's service sees of its worker.
pub struct Shell {
    pub id: WorkerId,
    /// Name of the cluster that it registered in.
    cluster: String,
    pub incarnation: Incarnation,
    pub spec: ModelSpec,
    /// How its blocks are cut for links.
    pub units: Units,
    pub engine: EngineHandle,
    pub config: EngineConfig,
    tiers: Option<Arc<Tiers>>,
    audit: Audit,
    pub(crate) peers: Peers,
    pub(crate) standing: Arc<Standing>,
    epochs: Mutex<Epochs>,
    /// How long it goes on while no coordinator answers.
    pub(crate) autonomy: Duration,
    active: watch::Sender<usize>,
    evicting: watch::Sender<bool>,
    closing: watch::Sender<bool>,
}

/// Checks the config, binds the listener, lets the model answer its canary, makes the cache and starts the engine
/// thread.
pub async fn open(role: Role, config: Config, model: LoadedModel, env: Env) -> Result<Opened, StartError> {
    check(role, &config)?;
    let Env { net, rng, process, .. } = env;
    let LoadedModel { mut spec, backend, card } = model;
    let units = units(&config, &spec, &*backend)?;
    spec.layout.block_tokens = (units.tokens() * units.each()) as u32;
    let listen = net.listen(&config.listen).await;
    let listener = listen.map_err(|source| StartError::Listen { address: config.listen.clone(), source })?;
    let (Golden { tokens: golden, pace }, mut backend) = golden(&spec, backend).await?;
    metrics::describe(role, &spec, &config.engine);
    let cache = cache(role, &*net, &spec, &*backend, &config.engine)?;
    if !backend.fills_arena() {
        cache.computes_elsewhere();
    }
    let tiers = tiers(&cache, &spec, &config)?;
    let whole = cache.arena().clone();
    let arena = match units.each() {
        1 => whole,
        _ => Arc::new(whole.in_units(units.tokens() as u32).expect("blocks are made of units")),
    };
    let ways = config.ways()?;
    let receiver = Receiver::with(net.clone(), &config.kv_listen, arena, &spec.numerics.0, ways).await;
    let receiver = receiver.map_err(|source| StartError::Listen { address: config.kv_listen.clone(), source })?;
    receiver.issue_tickets(rng.secret(), config.kv_tickets_required);
    backend.prepare(cache.arena());
    // Lower tiers save blocks out of the arena, so with tiers they pass through it.
    if let Some(device) = backend.device().filter(|_| tiers.is_none()) {
        cache.arena().attach(device);
    }
    let engine = Engine::over(cache, spec.clone(), config.engine);
    let engine = EngineThread::start(engine, backend, pace).map_err(StartError::Thread)?;
    let pid = process.id;
    Ok(Opened { config, net, spec, units, engine, tiers, receiver, listener, card, role, rng, pid, golden })
}

fn units(config: &Config, spec: &ModelSpec, backend: &dyn Backend) -> Result<Units, StartError> {
    let (key, tokens) = ("kv_block_tokens", spec.layout.block_tokens);
    let units = Units::new(tokens, config.kv_block_tokens.unwrap_or(tokens));
    let units =
        units.ok_or(StartError::Config { key, problem: "is not 1, 2, 4 or 8 times what the model's blocks have" })?;
    match units.each() == 1 || backend.fills_arena() {
        true => Ok(units),
        false => Err(StartError::Config { key, problem: "is for workers that compute on the CPU" }),
    }
}

fn tiers(cache: &Cache, spec: &ModelSpec, config: &Config) -> Result<Option<Arc<Tiers>>, StartError> {
    if !config.engine.prefix_cache {
        return Ok(None);
    }
    let (host_bytes, disk, disk_bytes) = (config.kv_host_bytes, config.kv_disk.clone(), config.kv_disk_bytes);
    let path = disk.as_deref().unwrap_or(Path::new("")).display().to_string();
    let opened = Tiers::open(cache, spec, &TierSizes { host_bytes, disk, disk_bytes });
    opened.map(|tiers| tiers.map(Arc::new)).map_err(|source| StartError::Disk { path, source })
}

/// The cache. A prefill worker's is in memory that decode workers of its host can read, where there is such memory;
/// without it they take the blocks over the network, which the links count.
fn cache(
    role: Role,
    net: &dyn Net,
    spec: &ModelSpec,
    backend: &dyn Backend,
    config: &EngineConfig,
) -> Result<Cache, StartError> {
    if role == Role::Prefill && net.shares_memory() && !backend.shares_arena() {
        match Arena::shared(spec.layout, config.blocks) {
            Ok(arena) => return Ok(Cache::of(arena)),
            Err(error) => tracing::warn!(%error, "no shared memory for the cache: handoffs on this host go by tcp"),
        }
    }
    backend.arena(spec.layout, config.blocks).map(Cache::of).map_err(StartError::Memory)
}

/// The golden tokens, computed beside the runtime where that takes long.
async fn golden(spec: &ModelSpec, mut backend: Box<dyn Backend>) -> Result<(Golden, Box<dyn Backend>), StartError> {
    if backend.inline_delay(0).is_some() {
        return Ok((canary::golden(spec, &mut *backend)?, backend));
    }
    let spec = spec.clone();
    let answering = tokio::task::spawn_blocking(move || (canary::golden(&spec, &mut *backend), backend));
    let (golden, backend) = answering.await.map_err(|_| StartError::CanaryPanicked)?;
    Ok((golden?, backend))
}

fn check(role: Role, config: &Config) -> Result<(), StartError> {
    let bad = |key, problem| Err(StartError::Config { key, problem });
    let sizes = config.engine;
    if config.role != role {
        return bad("role", "is not this worker's");
    }
    if config.id.0.is_empty() {
        return bad("id", "is empty");
    }
    if config.coordinators.is_empty() {
        return bad("coordinators", "is empty; a worker needs at least one address");
    }
    if sizes.blocks.min(sizes.batch_tokens_max).min(sizes.sequences_max).min(sizes.queue_max) == 0 {
        return bad("engine", "has a size of zero");
    }
    Ok(())
}

impl Opened {
    pub fn engine(&self) -> &EngineHandle {
        self.engine.handle()
    }

    /// Where others reach the gRPC service.
    pub fn address(&self) -> String {
        self.config.advertised(&self.listener.address())
    }

    /// Registers with the coordinators, however long that takes, and starts the heartbeats.
    pub async fn join(mut self) -> Result<Joined, StartError> {
        let member = self.member();
        let registered =
            register(&self.net, &self.config.coordinators, &member, &self.config.cluster, &mut self.rng).await?;
        let member = Member { incarnation: registered.incarnation, ..member };
        let coordinators = match registered.coordinators.is_empty() {
            true => self.config.coordinators.clone(),
            false => registered.coordinators,
        };
        // Whose cluster has no name yet learns it with a later life.
        let cluster = Some(registered.cluster).filter(|name| !name.is_empty()).unwrap_or(self.config.cluster.clone());
        let (engine, standing) = (self.engine.handle().clone(), Arc::new(Standing::new(coordinators)));
        let (net, told) = (self.net.clone(), standing.clone());
        let links = self.receiver.links(net.clone());
        let (every, handle) = (registered.heartbeat_ms, engine.clone());
        let place = membership::Place { member, role: self.role, cluster: cluster.clone() };
        let membership = Membership::start(net, place, every, told, handle, links.clone());
        let address = self.address();
        let drain = Duration::from_millis(self.config.drain_ms);
        let kv_address = self.kv_address();
        let channels = Channels::new(self.net.clone());
        let peers = Peers::new(self.receiver, links, kv_address, channels, self.config.kv_pull);
        let shell = Arc::new(Shell {
            id: self.config.id,
            cluster: cluster.clone(),
            incarnation: Incarnation(registered.incarnation),
            spec: self.spec,
            units: self.units,
            engine,
            config: self.config.engine,
            tiers: self.tiers.clone(),
            audit: Audit::new(self.config.kv_audit),
            peers,
            standing,
            epochs: Mutex::default(),
            autonomy: Duration::from_millis(self.config.autonomy_ms),
            active: watch::Sender::new(0),
            evicting: watch::Sender::new(false),
            closing: watch::Sender::new(false),
        });
        let Opened { engine, tiers, listener, card, role, .. } = self;
        Ok(Joined { shell, parts: Parts { address, role, cluster, engine, tiers, membership, listener, card, drain } })
    }

    /// Where others reach its receiver.
    fn kv_address(&self) -> String {
        let behind = || self.config.advertised(&self.receiver.address());
        self.config.kv_advertise.clone().unwrap_or_else(behind)
    }

    fn member(&self) -> Member {
        let (spec, card) = (&self.spec, &self.card);
        Member {
            id: self.config.id.to_string(),
            role: baton_proto::v1::Role::from(self.role).into(),
            address: self.address(),
            pid: self.pid,
            incarnation: 0,
            version: env!("CARGO_PKG_VERSION").into(),
            kv_address: self.kv_address(),
            model: Some(ModelSummary {
                name: spec.name.clone(),
                card_hash: card.hash.clone(),
                numerics: spec.numerics.0.clone(),
                block_tokens: spec.layout.block_tokens,
                positions_max: spec.positions_max as u64,
                // Blocks pass between workers as these.
                layout: BlockLayout { block_tokens: self.units.tokens() as u32, ..spec.layout }.describe(),
                blocks_total: self.config.engine.blocks as u64,
                block_bytes: spec.layout.block_bytes() as u64,
                canary_tokens: self.golden.clone(),
                vocab: spec.vocab as u64,
            }),
        }
    }
}

impl Joined {
    pub fn shell(&self) -> &Arc<Shell> {
        &self.shell
    }

    /// Serves the role's service beside the model card.
    pub fn serve(self, role: Routes) -> Running {
        let card = Own { card: self.parts.card.clone(), shell: self.shell.clone() };
        let (shut, shutdown) = oneshot::channel::<()>();
        let services = role.add_service(WorkerServer::new(card));
        Running::serve(self.shell, self.parts, services, shut, shutdown)
    }
}

impl Shell {
    /// The longest leading run of `names` that this worker has in its cache or can bring there out of lower tiers in less
    /// time than it takes to compute.
    pub async fn recall(&self, names: &[BlockHash]) -> Blocks {
        let cache = self.engine.cache();
        let mut held = self.look_up(names);
        metrics::count_tier_hits("cache", held.len());
        while let Some(tiers) = &self.tiers {
            let rest = &names[held.len()..];
            let (below, rate) = (cache.below(rest), self.engine.prefill_tokens_per_s());
            let tokens = below as u64 * u64::from(self.spec.layout.block_tokens);
            if below == 0 || !worth::is_cheaper(tiers.offer(below), tokens, rate) {
                break;
            }
            let Some(recalled) = tiers.recall(rest).await else { break };
            let all = recalled.len() == below;
            held.append(recalled);
            if !all {
                break;
            }
            held.append(self.look_up(&names[held.len()..]));
        }
        held
    }

    /// What the cache has of these names, as far as an audit finds nothing wrong with it.
    fn look_up(&self, names: &[BlockHash]) -> Blocks {
        let cache = self.engine.cache();
        self.audit.pass(cache, &self.peers.links, self.units, cache.lookup(names))
    }

    /// The check at the door, before anything is held: is the request meant for this life of this worker, under the
    /// newest epoch, and may it begin now?
    pub fn enter(self: &Arc<Shell>, named: &Place, assigned: &Assigned) -> Result<Lease, Refusal> {
        self.allow(named, assigned).map_err(|(reason, detail)| {
            metrics::count_refused(reason);
            refusal(reason, detail)
        })?;
        Ok(self.hold())
    }

    /// Keeps a drain waiting, within its bounds, for what is no request any more: somebody may still come for it.
    pub fn hold(self: &Arc<Shell>) -> Lease {
        self.active.send_modify(|active| *active += 1);
        Lease { shell: self.clone() }
    }

    fn allow(&self, named: &Place, assigned: &Assigned) -> Result<(), (Refused, String)> {
        let assignment = &assigned.assignment;
        let theirs = &assignment.cluster;
        if ![&self.cluster, theirs].iter().any(|name| name.is_empty()) && *theirs != self.cluster {
            return Err((Refused::Foreign, format!("assigned by cluster {theirs:?}, this is {:?}", self.cluster)));
        }
        let other_life = named.worker != self.id || named.incarnation != self.incarnation;
        if (other_life && !planted::is(Bug::SkipLifeCheck)) || *self.closing.borrow() {
            let (theirs, life) = (&named.worker, named.incarnation);
            return Err((
                Refused::Stale,
                format!("meant for {theirs}/{life}, this is {}/{}", self.id, self.incarnation),
            ));
        }
        if self.standing.is_draining() {
            return Err((Refused::Draining, "the worker is stopping".into()));
        }
        if self.standing.silence() > self.autonomy {
            return Err((Refused::Unavailable, "no coordinator has answered for too long".into()));
        }
        if assigned.left().is_zero() {
            return Err((Refused::Expired, "the lease or the deadline has run out".into()));
        }
        let mut epochs = self.epochs.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let entered = epochs.enter(assignment.request, assignment.epoch);
        entered.map_err(|reason| (reason, format!("epoch {} has been superseded", assignment.epoch)))
    }

    /// Whether it takes no more requests, because it was ordered to end.
    pub fn is_draining(&self) -> bool {
        self.standing.is_draining()
    }

    /// The requests that were let in, each with its newest epoch. For checks that compare them with the ledger.
    pub fn let_in(&self) -> Vec<(RequestId, Epoch)> {
        self.epochs.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).newest()
    }

    /// Resolves when the worker stops serving: what is still running ends now.
    pub async fn closed(&self) {
        let mut closing = self.closing.subscribe();
        tokio::select! {
            // The sender lives as long as `self`.
            _ = closing.wait_for(|closing| *closing) => {}
            () = self.standing.over() => {}
        }
    }

    /// Resolves when what is still running is to end, so that it goes on elsewhere.
    pub async fn evicted(&self) {
        let mut evicting = self.evicting.subscribe();
        tokio::select! {
            // The sender lives as long as `self`.
            _ = evicting.wait_for(|evicting| *evicting) => {}
            () = self.closed() => {}
        }
    }

    pub(crate) fn evict(&self) {
        self.evicting.send_replace(true);
    }

    pub(crate) fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Requests being served, or kept for somebody who may come for them.
    pub(crate) fn requests(&self) -> usize {
        *self.active.borrow()
    }

    /// Resolves when no request is left.
    pub(crate) async fn idle(&self) {
        let mut active = self.active.subscribe();
        let _ = active.wait_for(|active| *active == 0).await;
    }
}

/// What a drain waits for: the right of one request to be served here, or what is left of one.
pub struct Lease {
    shell: Arc<Shell>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.shell.active.send_modify(|active| *active -= 1);
    }
}

/// Serves what every worker does: the model card, and blocks that others pull.
struct Own {
    card: ModelCard,
    shell: Arc<Shell>,
}

#[tonic::async_trait]
impl Worker for Own {
    async fn card(&self, _: tonic::Request<CardRequest>) -> Result<tonic::Response<ModelCard>, tonic::Status> {
        Ok(tonic::Response::new(self.card.clone()))
    }

    async fn lend(&self, ask: tonic::Request<LendRequest>) -> Result<tonic::Response<LendReply>, tonic::Status> {
        let outcome = Some(self.shell.lend(ask.into_inner()).await);
        Ok(tonic::Response::new(LendReply { outcome }))
    }
}
