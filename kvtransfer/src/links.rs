//! The prefill side's links: one connection per receiver, made before it is needed and made again when it breaks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_core::limits::{HANDOFF_BACKOFF_MS, HANDOFF_BACKOFF_MS_MAX, HANDOFF_CONNECTS_MAX, HANDOFF_LINKS_MAX};
use baton_core::{Arena, BlockLayout, Net};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::connection::{By, Connection, Greeted, connect, greet, within};
use crate::counters::{Fallback, LinkCounters, LinkCounts};
use crate::receiver::{Receiver, Shared};
use crate::sums::Sums;
use crate::wire::{FEATURE_DEVICE, FEATURE_HEADS, FEATURE_RESEND, FEATURE_SHARED, FEATURE_TICKETS, FEATURE_UCX};
use crate::{Grant, HeadSlice, Outgoing, TransferError, extent, wire};

/// What a sender can do over any link.
const FEATURES: u16 = FEATURE_RESEND | FEATURE_HEADS | FEATURE_TICKETS;

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
    pub(crate) sums: Sums,
    ucx: Arc<AtomicBool>,
    links: Mutex<BTreeMap<String, Link>>,
    local: Mutex<BTreeMap<String, Arc<Shared>>>,
}

impl Links {
    /// Links that read blocks of `arena`. `model` as for `Receiver::listen`.
    pub fn new(net: Arc<dyn Net>, arena: Arc<Arena>, model: &str) -> Links {
        let kv_heads = arena.layout().kv_heads;
        Links::of_rank(net, arena, kv_heads, model)
    }

    /// Links of a rank, whose arena holds some of the model's `kv_heads`.
    pub fn of_rank(net: Arc<dyn Net>, arena: Arc<Arena>, kv_heads: u32, model: &str) -> Links {
        let compatibility = wire::compatibility(&BlockLayout { kv_heads, ..*arena.layout() }, model);
        let is_part = arena.layout().kv_heads != kv_heads;
        let sums = Sums::new(arena.layout(), arena.blocks());
        let (counts, ucx, links, local) = Default::default();
        Links { source: Arc::new(Source { net, arena, compatibility, is_part, counts, sums, ucx, links, local }) }
    }

    /// Links made from here on go over UCX where the other end has it, too (`Receiver::offer_ucx`). Its bytes are not
    /// encrypted.
    pub fn prefer_ucx(&self) {
        self.source.ucx.store(true, Relaxed);
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
            ucx: source.ucx.clone(),
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
    ucx: Arc<AtomicBool>,
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
                    self.serve(greeted).await
                }
                Err(error) => {
                    self.counts.unconnected.add(1);
                    error
                }
            };
            tracing::debug!(%error, failures, "link down");
            self.state.send_replace(State::Down(error));
            self.pause(failures).await;
            failures += 1;
            self.state.send_replace(State::Connecting);
        }
    }

    /// Connects over the network, and goes over to shared memory if both ends can.
    async fn connect(&self) -> Result<Greeted, TransferError> {
        let wants_ucx = self.ucx.load(Relaxed);
        let can = |able: bool, feature| if able { feature } else { 0 };
        let features = FEATURES
            | can(is_shared(&self.arena), FEATURE_SHARED)
            | can(self.arena.device().is_some(), FEATURE_DEVICE)
            | can(wants_ucx, FEATURE_UCX);
        let greeted = connect(&*self.net, &self.address, &self.compatibility, features).await?;
        if self.is_part && greeted.features & FEATURE_HEADS == 0 {
            let (ours, theirs) = (format!("{}, some heads", self.compatibility), self.compatibility.clone());
            return Err(TransferError::Incompatible { ours, theirs });
        }
        if wants_ucx {
            match self.go_over_ucx(&greeted).await {
                Ok(by_ucx) => return Ok(by_ucx),
                Err((reason, detail)) => {
                    self.counts.fall_back(reason);
                    tracing::debug!(address = self.address, reason = reason.as_str(), detail, "no link over UCX");
                }
            }
        }
        match self.go_over(&greeted).await {
            Ok(shared) => Ok(shared),
            Err((reason, detail)) => {
                self.counts.fall_back(reason);
                tracing::debug!(address = self.address, reason = reason.as_str(), detail, "tcp link");
                Ok(greeted)
            }
        }
    }

    /// To the receiver's harbour, which is at the host that it was found at.
    #[cfg(target_os = "linux")]
    async fn go_over_ucx(&self, greeted: &Greeted) -> Result<Greeted, (Fallback, String)> {
        let Some(port) = greeted.harbour else { return Err((Fallback::NoUcx, "not offered".to_string())) };
        let unreachable = |error: std::io::Error| (Fallback::Unreachable, error.to_string());
        let host = self.address.rsplit_once(':').map_or(&*self.address, |(host, _)| host);
        let mut found = tokio::net::lookup_host((host.trim_matches(['[', ']']), port)).await.map_err(unreachable)?;
        let address = found.next().ok_or_else(|| unreachable(std::io::Error::other("no address")))?;
        let stream = crate::ucx::connect(address).await.map_err(unreachable)?;
        let greeting = greet(Box::new(stream), &self.address, &self.compatibility, FEATURES);
        let mut over = within(&self.address, greeting).await.map_err(|error| (Fallback::Refused, error.to_string()))?;
        over.by = By::Ucx;
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
        let (name, port) = offer.split_once(' ').unwrap_or((offer, ""));
        if self.address.rsplit(':').next() != Some(port) {
            return Err((Fallback::Relayed, format!("it listens on port {port}")));
        }
        let on_device = self.on_device(greeted);
        let stream = crate::shm::connect(name, &self.arena, on_device.as_ref()).await;
        let stream = stream.map_err(|error| (Fallback::Unreachable, error.to_string()))?;
        let device = if on_device.is_some() { FEATURE_DEVICE } else { 0 };
        let greeting = greet(Box::new(stream), &self.address, &self.compatibility, FEATURES | device);
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

    /// One connection until it fails.
    async fn serve(&self, greeted: Greeted) -> TransferError {
        self.counts.connected.add(1);
        let live = Live(Arc::new(Connection::new(&self.address, greeted.by, greeted.features)));
        self.state.send_replace(State::Up(live.0.clone()));
        let cause = live.0.run(greeted).await;
        live.0.fail(&cause);
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
struct Live(Arc<Connection>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fail("closed at this end");
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
