//! The prefill side's links: one connection per receiver, made before it is needed and made again when it breaks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_core::limits::{HANDOFF_BACKOFF_MS, HANDOFF_BACKOFF_MS_MAX, HANDOFF_CONNECTS_MAX, HANDOFF_LINKS_MAX};
use baton_core::{Arena, Net};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::connection::{Connection, connect};
use crate::receiver::{Receiver, Shared};
use crate::{Grant, Outgoing, TransferError, extent, wire};

/// The links of one cache. Clones share them; they end with the last clone and the last transfer.
#[derive(Clone)]
pub struct Links {
    pool: Arc<Pool>,
}

pub(crate) struct Pool {
    net: Arc<dyn Net>,
    pub(crate) arena: Arc<Arena>,
    compatibility: String,
    links: Mutex<BTreeMap<String, Link>>,
    local: Mutex<BTreeMap<String, Arc<Shared>>>,
}

impl Links {
    /// Links that read blocks of `arena`. `model` as for `Receiver::listen`.
    pub fn new(net: Arc<dyn Net>, arena: Arc<Arena>, model: &str) -> Links {
        let compatibility = wire::compatibility(arena.layout(), model);
        let (links, local) = Default::default();
        Links { pool: Arc::new(Pool { net, arena, compatibility, links, local }) }
    }

    /// Makes a receiver of this process known: transfers to its address do without a connection.
    pub fn add_local(&self, receiver: &Receiver) {
        lock(&self.pool.local).insert(receiver.address(), receiver.shared());
    }

    /// Connects ahead of the first transfer; to be called when a receiver joins the cluster.
    pub fn connect(&self, address: &str) {
        if !lock(&self.pool.local).contains_key(address) {
            self.pool.link(address);
        }
    }

    /// Ends the link to a receiver that has left, and its transfers with it.
    pub fn disconnect(&self, address: &str) {
        lock(&self.pool.links).remove(address);
        lock(&self.pool.local).remove(address);
    }

    /// Opens the transfer that `grant` allows. The receiver has accepted it when this returns.
    pub async fn open(&self, grant: Grant) -> Result<Outgoing, TransferError> {
        self.pool.check(&grant)?;
        let local = lock(&self.pool.local).get(&grant.address).cloned();
        if let Some(receiver) = local {
            self.pool.compare(&receiver.compatibility)?;
            return Outgoing::to_local(self.pool.clone(), receiver, grant).await;
        }
        let connection = self.pool.connection(&grant.address).await?;
        Outgoing::over_tcp(self.pool.clone(), connection, grant).await
    }
}

impl Pool {
    /// Whether blocks of this arena fit the granted ones.
    fn check(&self, grant: &Grant) -> Result<(), TransferError> {
        let (ours, theirs) = (self.arena.layout(), &grant.layout);
        if ours != theirs {
            return Err(TransferError::Incompatible { ours: ours.describe(), theirs: theirs.describe() });
        }
        if !extent::fits(ours) {
            let theirs = format!("frames of {} bytes", wire::LENGTH_MAX);
            return Err(TransferError::Incompatible { ours: ours.describe(), theirs });
        }
        Ok(())
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
        let make = || Link::new(self.net.clone(), address.to_string(), self.compatibility.clone());
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
    fn new(net: Arc<dyn Net>, address: String, compatibility: String) -> Link {
        let (told, state) = watch::channel(State::Connecting);
        let wake = Arc::new(Notify::new());
        let keeping = tokio::spawn(keep(net, address, compatibility, told, wake.clone()));
        Link { state, wake, keeping }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.keeping.abort();
    }
}

/// Keeps a link up: connects, serves, and connects again after a pause that grows; after too many failures in a row
/// only when somebody asks for the link.
async fn keep(
    net: Arc<dyn Net>,
    address: String,
    compatibility: String,
    state: watch::Sender<State>,
    wake: Arc<Notify>,
) {
    let mut failures = 0;
    loop {
        let error = match connect(&*net, &address, &compatibility).await {
            Ok(greeted) => {
                failures = 0;
                let live = Live(Arc::new(Connection::new(&address)));
                state.send_replace(State::Up(live.0.clone()));
                let cause = live.0.run(greeted).await;
                live.0.fail(&cause);
                TransferError::Lost { peer: address.clone(), cause }
            }
            Err(error) => error,
        };
        tracing::debug!(%error, failures, "link down");
        state.send_replace(State::Down(error));
        pause(failures, &wake).await;
        failures += 1;
        state.send_replace(State::Connecting);
    }
}

async fn pause(failures: u32, wake: &Notify) {
    if failures >= HANDOFF_CONNECTS_MAX {
        return wake.notified().await;
    }
    let pause = (HANDOFF_BACKOFF_MS << failures.min(16)).min(HANDOFF_BACKOFF_MS_MAX);
    let _ = timeout(Duration::from_millis(pause), wake.notified()).await;
}

/// A connection whose transfers fail when its task ends, however it ends.
struct Live(Arc<Connection>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fail("closed at this end");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
