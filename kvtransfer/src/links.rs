//! The prefill side's links: one connection per receiver, made before it is needed and made again when it breaks, over the best
//! link that both ends have.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_core::limits::{
    HANDOFF_BACKOFF_MS, HANDOFF_BACKOFF_MS_MAX, HANDOFF_CONNECT_MS, HANDOFF_CONNECTS_MAX, HANDOFF_LANES,
    HANDOFF_LANES_MAX, HANDOFF_LINKS_MAX,
};
use baton_core::{Arena, BlockId, BlockLayout, Net};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout, timeout_at};

use crate::connection::{By, Connection, Greeted, Hello, connect, greet, within};
use crate::counters::{Fallback, LinkCounters, LinkCounts};
use crate::receiver::{Receiver, Shared};
use crate::sums::{Audited, Sums};
use crate::tls::Tls;
use crate::wire::LinkKey;
use crate::wire::{
    FEATURE_DEVICE, FEATURE_HEADS, FEATURE_LANES, FEATURE_RESEND, FEATURE_SHARED, FEATURE_TICKETS, FEATURE_UCX,
    FEATURE_UNITS,
};
use crate::{Grant, HeadSlice, Outgoing, TransferError, extent, wire};

/// What a sender can do over any link.
const FEATURES: u16 = FEATURE_RESEND | FEATURE_HEADS | FEATURE_TICKETS | FEATURE_UNITS;

/// Which link is made where two ends share several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preferred {
    /// Memory of the host or its GPUs; UCX where it goes over RDMA; the network otherwise.
    #[default]
    Best,
    /// UCX, whatever it goes over. Its bytes are not encrypted.
    Ucx,
    /// The network alone.
    Tcp,
}

/// How one end's links are made.
#[derive(Clone)]
pub struct Ways {
    pub preferred: Preferred,
    /// For links over the network, which are then made to nobody who has no certificate.
    pub tls: Option<Tls>,
    /// Connections of a link over the network, 1 to `HANDOFF_LANES_MAX`; a sender's.
    pub lanes: usize,
}

impl Default for Ways {
    fn default() -> Ways {
        Ways { preferred: Preferred::default(), tls: None, lanes: HANDOFF_LANES }
    }
}

/// The links of one cache. Clones share them; they end with the last clone and the last transfer.
#[derive(Clone)]
pub struct Links {
    source: Arc<Source>,
}

/// What the links of one cache share.
pub(crate) struct Source {
    net: Arc<dyn Net>,
    pub(crate) arena: Arc<Arena>,
    compatibility: String,
    /// The arena holds some of the model's heads.
    is_part: bool,
    pub(crate) counts: Arc<LinkCounts>,
    /// Of the arena's blocks that do not change.
    pub(crate) sums: Arc<Sums>,
    ways: Ways,
    links: Mutex<BTreeMap<String, Link>>,
    local: Mutex<BTreeMap<String, Arc<Shared>>>,
}

impl Links {
    /// Links that read blocks of `arena`. `model` as for `Receiver::listen`.
    pub fn new(net: Arc<dyn Net>, arena: Arc<Arena>, model: &str) -> Links {
        Links::with(net, arena, model, Ways::default())
    }

    /// The same by these ways.
    pub fn with(net: Arc<dyn Net>, arena: Arc<Arena>, model: &str, ways: Ways) -> Links {
        let kv_heads = arena.layout().kv_heads;
        Links::make(net, arena, kv_heads, model, ways)
    }

    /// Links of a rank, whose arena holds some of the model's `kv_heads`.
    pub fn of_rank(net: Arc<dyn Net>, arena: Arc<Arena>, kv_heads: u32, model: &str) -> Links {
        Links::make(net, arena, kv_heads, model, Ways::default())
    }

    fn make(net: Arc<dyn Net>, arena: Arc<Arena>, kv_heads: u32, model: &str, ways: Ways) -> Links {
        let compatibility = wire::compatibility(&BlockLayout { kv_heads, ..*arena.layout() }, model);
        let is_part = arena.layout().kv_heads != kv_heads;
        let sums = Arc::new(Sums::new(arena.layout(), arena.blocks()));
        Links::over(net, arena, compatibility, is_part, sums, ways)
    }

    pub(crate) fn over(
        net: Arc<dyn Net>,
        arena: Arc<Arena>,
        compatibility: String,
        is_part: bool,
        sums: Arc<Sums>,
        ways: Ways,
    ) -> Links {
        let (counts, links, local) = Default::default();
        let source = Source { net, arena, compatibility, is_part, counts, sums, ways, links, local };
        Links { source: Arc::new(source) }
    }

    /// Whether a full block still holds what was known of it when it came in or was sent; what is not known yet is noted. The caller
    /// holds the block as filled. None: its bytes are on a device.
    pub fn audit(&self, block: BlockId) -> Option<Audited> {
        let arena = &self.source.arena;
        let here = !arena.is_on_device(block);
        here.then(|| self.source.sums.audit(block, |layer| extent::content(arena, block.index, layer, None)))
    }

    /// These blocks are not full: somebody goes on writing them, and what was known of them when they came in does not hold.
    pub fn unsettle(&self, blocks: &[BlockId]) {
        blocks.iter().for_each(|block| self.source.sums.forget(*block));
    }

    /// Makes a receiver of this process known: transfers to its address do without a connection.
    pub fn add_local(&self, receiver: &Receiver) {
        lock(&self.source.local).insert(receiver.address(), receiver.shared());
    }

    /// Connects ahead of the first transfer; to be called when a receiver joins the cluster.
    pub fn connect(&self, address: &str) {
        if !lock(&self.source.local).contains_key(address) {
            self.source.link(address);
        }
    }

    /// Ends the link to a receiver that has left, and its transfers with it.
    pub fn disconnect(&self, address: &str) {
        lock(&self.source.links).remove(address);
        lock(&self.source.local).remove(address);
    }

    pub fn counters(&self) -> LinkCounters {
        self.source.counts.snapshot()
    }

    /// Opens the transfer that `grant` allows. The receiver has accepted it when this returns.
    pub async fn open(&self, grant: Grant) -> Result<Outgoing, TransferError> {
        self.open_from(grant, false).await
    }

    /// The same for blocks that lie on the arena's device, which the receiver's reads there if it can
    /// (`Outgoing::is_from_device`).
    pub async fn open_from_device(&self, grant: Grant) -> Result<Outgoing, TransferError> {
        self.open_from(grant, true).await
    }

    async fn open_from(&self, grant: Grant, device: bool) -> Result<Outgoing, TransferError> {
        let arena = self.source.moved(&grant)?;
        let local = lock(&self.source.local).get(&grant.address).cloned();
        if let Some(receiver) = local {
            self.source.compare(&receiver.compatibility)?;
            return Outgoing::to_local(self.source.clone(), arena, receiver, grant).await;
        }
        let connection = self.source.connection(&grant.address).await?;
        Outgoing::over(self.source.clone(), arena, connection, grant, device).await
    }
}

impl Source {
    /// What a transfer under `grant` is read from: this arena, or some heads of it.
    fn moved(&self, grant: &Grant) -> Result<Arc<Arena>, TransferError> {
        let (ours, theirs) = (self.arena.layout(), &grant.layout);
        let arena = match grant.slice {
            None => Some(self.arena.clone()),
            Some(HeadSlice { of, .. }) if of != ours.kv_heads => None,
            Some(HeadSlice { of, first }) => {
                self.arena.view(of, first..first.saturating_add(theirs.kv_heads)).map(Arc::new)
            }
        };
        let Some(arena) = arena.filter(|arena| arena.layout() == theirs) else {
            return Err(TransferError::Incompatible { ours: ours.describe(), theirs: theirs.describe() });
        };
        if !extent::fits(ours) {
            let theirs = format!("frames of {} bytes", wire::LENGTH_MAX);
            return Err(TransferError::Incompatible { ours: ours.describe(), theirs });
        }
        Ok(arena)
    }

    fn compare(&self, theirs: &str) -> Result<(), TransferError> {
        let ours = &self.compatibility;
        let differ = || TransferError::Incompatible { ours: ours.clone(), theirs: theirs.to_string() };
        if ours == theirs { Ok(()) } else { Err(differ()) }
    }

    /// The connection to `address`, or why the next attempt to make one failed.
    async fn connection(&self, address: &str) -> Result<Arc<Connection>, TransferError> {
        let (mut state, wake) = self.link(address);
        let mut asked = false;
        loop {
            match &*state.borrow_and_update() {
                State::Up(connection) => return Ok(connection.clone()),
                State::Down(error) if asked => return Err(error.clone()),
                State::Down(_) => wake.notify_one(),
                State::Connecting => {}
            }
            asked = true;
            if state.changed().await.is_err() {
                let cause = "disconnected".to_string();
                return Err(TransferError::Lost { peer: address.to_string(), cause });
            }
        }
    }

    /// The link to `address`, made if there is none: how it is, and how to hurry it.
    fn link(&self, address: &str) -> (watch::Receiver<State>, Arc<Notify>) {
        let mut links = lock(&self.links);
        if links.len() >= HANDOFF_LINKS_MAX && !links.contains_key(address) {
            links.retain(|_, link| !matches!(&*link.state.borrow(), State::Down(_)));
        }
        let make = || Link::new(self, address);
        let link = links.entry(address.to_string()).or_insert_with(make);
        (link.state.clone(), link.wake.clone())
    }
}

/// A kept connection. Dropping it ends the connection.
struct Link {
    state: watch::Receiver<State>,
    wake: Arc<Notify>,
    keeping: JoinHandle<()>,
}

enum State {
    Connecting,
    Up(Arc<Connection>),
    Down(TransferError),
}

impl Link {
    fn new(source: &Source, address: &str) -> Link {
        let (told, state) = watch::channel(State::Connecting);
        let wake = Arc::new(Notify::new());
        let keeper = Keeper {
            net: source.net.clone(),
            arena: source.arena.clone(),
            address: address.to_string(),
            compatibility: source.compatibility.clone(),
            is_part: source.is_part,
            counts: source.counts.clone(),
            ways: source.ways.clone(),
            state: told,
            wake: wake.clone(),
        };
        Link { state, wake, keeping: tokio::spawn(keeper.keep()) }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.keeping.abort();
    }
}

/// Keeps a link up.
struct Keeper {
    net: Arc<dyn Net>,
    arena: Arc<Arena>,
    address: String,
    compatibility: String,
    is_part: bool,
    counts: Arc<LinkCounts>,
    ways: Ways,
    state: watch::Sender<State>,
    wake: Arc<Notify>,
}

impl Keeper {
    /// Connects, serves, and connects again after a pause that grows; after too many failures in a row only when
    /// somebody asks for the link.
    async fn keep(self) {
        let mut failures = 0;
        loop {
            let error = match self.connect().await {
                Ok(greeted) => {
                    failures = 0;
                    let others = self.widen(&greeted).await;
                    self.serve(greeted, others).await
                }
                Err(error) => {
                    self.counts.unconnected.add(1);
                    if let TransferError::Untrusted { reason, .. } = &error {
                        self.counts.distrust(*reason);
                    }
                    error
                }
            };
            match &error {
                TransferError::Untrusted { .. } => tracing::warn!(%error, "link down"),
                _ => tracing::debug!(%error, failures, "link down"),
            }
            self.state.send_replace(State::Down(error));
            self.pause(failures).await;
            failures += 1;
            self.state.send_replace(State::Connecting);
        }
    }

    /// Connects over the network, and goes over to the best link that both ends have.
    async fn connect(&self) -> Result<Greeted, TransferError> {
        let beside_tcp = self.ways.preferred != Preferred::Tcp;
        let asks_ucx = self.asks_ucx();
        let can = |able: bool, feature| if able { feature } else { 0 };
        let features = FEATURES
            | can(beside_tcp && is_shared(&self.arena), FEATURE_SHARED)
            | can(beside_tcp && self.arena.device().is_some(), FEATURE_DEVICE)
            | can(asks_ucx, FEATURE_UCX)
            | can(self.ways.lanes > 1, FEATURE_LANES);
        let greeted = self.call(features, None).await?;
        if self.is_part && greeted.features & FEATURE_HEADS == 0 {
            let (ours, theirs) = (format!("{}, some heads", self.compatibility), self.compatibility.clone());
            return Err(TransferError::Incompatible { ours, theirs });
        }
        if !beside_tcp {
            return Ok(greeted);
        }
        let mut reasons = Vec::new();
        if self.ways.preferred == Preferred::Ucx {
            match self.go_over_ucx(&greeted).await {
                Ok(by_ucx) => return Ok(by_ucx),
                Err(reason) => reasons.push(reason),
            }
        }
        match self.go_over(&greeted).await {
            Ok(shared) => {
                self.fell_back(&reasons);
                return Ok(shared);
            }
            Err(reason) => reasons.push(reason),
        }
        if self.ways.preferred == Preferred::Best && asks_ucx {
            match self.go_over_ucx(&greeted).await {
                Ok(by_ucx) => return Ok(by_ucx),
                Err(reason) => reasons.push(reason),
            }
        }
        self.fell_back(&reasons);
        Ok(greeted)
    }

    async fn call(&self, features: u16, joins: Option<(LinkKey, u32)>) -> Result<Greeted, TransferError> {
        let hello = Hello { text: &self.compatibility, features, joins };
        connect(&*self.net, self.ways.tls.as_ref(), &self.address, hello).await
    }

    /// The further connections of a link over the network: as many as come about in time.
    async fn widen(&self, greeted: &Greeted) -> Vec<Greeted> {
        let over_network = matches!(greeted.by, By::Tcp | By::Tls);
        let (Some(key), true) = (greeted.key, over_network) else { return Vec::new() };
        // The first one has nobody who keeps it up meanwhile.
        let until = Instant::now() + Duration::from_millis(HANDOFF_CONNECT_MS / 2);
        let mut others = Vec::new();
        for lane in 1..self.ways.lanes.min(HANDOFF_LANES_MAX) as u32 {
            match timeout_at(until, self.call(FEATURES | FEATURE_LANES, Some((key, lane)))).await {
                Ok(Ok(other)) if other.key == Some(key) => others.push(other),
                failed => {
                    self.counts.fall_back(Fallback::FewerLanes);
                    let cause = failed.map_or("too late".to_string(), |made| match made {
                        Ok(_) => "taken for another link's".to_string(),
                        Err(error) => error.to_string(),
                    });
                    tracing::debug!(address = self.address, lane, cause, "a link with fewer connections");
                    break;
                }
            }
        }
        others
    }

    fn fell_back(&self, reasons: &[(Fallback, String)]) {
        for (reason, detail) in reasons {
            self.counts.fall_back(*reason);
            tracing::debug!(address = self.address, reason = reason.as_str(), detail, "not the best link");
        }
    }

    /// Whether UCX is wanted. Where it can go over tcp only, our own is faster.
    #[cfg(target_os = "linux")]
    fn asks_ucx(&self) -> bool {
        match self.ways.preferred {
            Preferred::Ucx => true,
            Preferred::Best => self.ways.tls.is_none() && self.net.shares_memory() && crate::ucx::is_better(),
            Preferred::Tcp => false,
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn asks_ucx(&self) -> bool {
        self.ways.preferred == Preferred::Ucx
    }

    /// To the receiver's harbour, which is at the host that it was found at.
    #[cfg(target_os = "linux")]
    async fn go_over_ucx(&self, greeted: &Greeted) -> Result<Greeted, (Fallback, String)> {
        if self.ways.tls.is_some() {
            return Err((Fallback::NoUcx, "it does not encrypt".to_string()));
        }
        let Some((port, behind)) = greeted.harbour else { return Err((Fallback::NoUcx, "not offered".to_string())) };
        if self.address.rsplit(':').next() != Some(&*behind.to_string()) {
            return Err((Fallback::Relayed, format!("it listens on port {behind}")));
        }
        let unreachable = |error: std::io::Error| (Fallback::Unreachable, error.to_string());
        let host = self.address.rsplit_once(':').map_or(&*self.address, |(host, _)| host);
        let mut found = tokio::net::lookup_host((host.trim_matches(['[', ']']), port)).await.map_err(unreachable)?;
        let address = found.next().ok_or_else(|| unreachable(std::io::Error::other("no address")))?;
        let connecting = timeout(Duration::from_millis(HANDOFF_CONNECT_MS), crate::ucx::connect(address)).await;
        let late = |_| unreachable(std::io::ErrorKind::TimedOut.into());
        let stream = connecting.map_err(late)?.map_err(unreachable)?;
        let lanes = stream.lanes();
        let hello = Hello { text: &self.compatibility, features: FEATURES, joins: None };
        let greeting = greet(Box::new(stream), &self.address, hello);
        let mut over = within(&self.address, greeting).await.map_err(|error| (Fallback::Refused, error.to_string()))?;
        over.by = By::Ucx;
        // What it goes over is settled once something has gone over it.
        let lanes = lanes.await.map_err(unreachable)?;
        tracing::info!(address = self.address, lanes, "a link over UCX");
        if self.ways.preferred == Preferred::Best && !crate::ucx::is_rdma(&lanes) {
            return Err((Fallback::NoRdma, lanes));
        }
        Ok(over)
    }

    #[cfg(not(target_os = "linux"))]
    async fn go_over_ucx(&self, _: &Greeted) -> Result<Greeted, (Fallback, String)> {
        Err((Fallback::NoUcx, String::new()))
    }

    #[cfg(target_os = "linux")]
    async fn go_over(&self, greeted: &Greeted) -> Result<Greeted, (Fallback, String)> {
        if !is_shared(&self.arena) {
            return Err((Fallback::NotShared, String::new()));
        }
        let Some(offer) = &greeted.offer else { return Err((Fallback::NotOffered, String::new())) };
        if self.arena.units() > 1 && greeted.features & FEATURE_UNITS == 0 {
            return Err((Fallback::NotOffered, "it knows blocks of one size only".to_string()));
        }
        let (name, port) = offer.split_once(' ').unwrap_or((offer, ""));
        if self.address.rsplit(':').next() != Some(port) {
            return Err((Fallback::Relayed, format!("it listens on port {port}")));
        }
        let on_device = self.on_device(greeted);
        let stream = crate::shm::connect(name, &self.arena, on_device.as_ref()).await;
        let stream = stream.map_err(|error| (Fallback::Unreachable, error.to_string()))?;
        let device = if on_device.is_some() { FEATURE_DEVICE } else { 0 };
        let hello = Hello { text: &self.compatibility, features: FEATURES | device, joins: None };
        let greeting = greet(Box::new(stream), &self.address, hello);
        let shared = within(&self.address, greeting).await;
        let mut shared = shared.map_err(|error| (Fallback::Refused, error.to_string()))?;
        shared.by = By::Reference;
        if on_device.is_some() && shared.features & FEATURE_DEVICE == 0 {
            self.counts.fall_back(Fallback::DeviceRefused);
            tracing::info!(
                address = self.address,
                "the receiver's GPU cannot read this one's: blocks pass through the host"
            );
        }
        Ok(shared)
    }

    /// What lets the receiver's device read this end's, if both have one.
    #[cfg(target_os = "linux")]
    fn on_device(&self, greeted: &Greeted) -> Option<std::os::fd::OwnedFd> {
        let device = self.arena.device()?;
        if greeted.features & FEATURE_DEVICE == 0 {
            self.counts.fall_back(Fallback::NotOnDevice);
            return None;
        }
        let summable = self.arena.extents(0).are_summable();
        let descriptor = match summable {
            true => device.descriptor(),
            false => Err(std::io::Error::other("its blocks are too small for the GPU's checksums")),
        };
        let told = |error: &std::io::Error| {
            self.counts.fall_back(Fallback::DeviceNotShared);
            tracing::info!(%error, "GPU memory is not shared: blocks pass through the host");
        };
        descriptor.inspect_err(told).ok()
    }

    #[cfg(not(target_os = "linux"))]
    async fn go_over(&self, _: &Greeted) -> Result<Greeted, (Fallback, String)> {
        Err((Fallback::NotShared, String::new()))
    }

    /// One link until one of its connections fails.
    async fn serve(&self, greeted: Greeted, others: Vec<Greeted>) -> TransferError {
        let lanes = 1 + others.len();
        let connection = Arc::new(Connection::new(&self.address, greeted.by, greeted.features, lanes));
        self.counts.is_up(connection.kind());
        let live = Live { connection, counts: self.counts.clone() };
        self.state.send_replace(State::Up(live.connection.clone()));
        // Tasks of their own, so that several cores write. They end with this function.
        let mut running = JoinSet::new();
        for (lane, other) in (1..).zip(others) {
            let connection = live.connection.clone();
            running.spawn(async move { connection.run(lane, other).await });
        }
        let cause = tokio::select! {
            cause = live.connection.run(0, greeted) => cause,
            Some(cause) = running.join_next() => cause.unwrap_or_else(|error| error.to_string()),
        };
        live.connection.fail(&cause);
        TransferError::Lost { peer: self.address.clone(), cause }
    }

    async fn pause(&self, failures: u32) {
        if failures >= HANDOFF_CONNECTS_MAX {
            return self.wake.notified().await;
        }
        let pause = (HANDOFF_BACKOFF_MS << failures.min(16)).min(HANDOFF_BACKOFF_MS_MAX);
        let _ = timeout(Duration::from_millis(pause), self.wake.notified()).await;
    }
}

/// A connection whose transfers fail when its task ends, however it ends.
struct Live {
    connection: Arc<Connection>,
    counts: Arc<LinkCounts>,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.connection.fail("closed at this end");
        self.counts.is_down(self.connection.kind());
    }
}

#[cfg(target_os = "linux")]
fn is_shared(arena: &Arena) -> bool {
    arena.descriptor().is_some()
}

#[cfg(not(target_os = "linux"))]
fn is_shared(_: &Arena) -> bool {
    false
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
