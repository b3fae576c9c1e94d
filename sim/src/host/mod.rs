//! The hosts of a run: each starts the production code of one process on the simulated network, and tells the world where
//! to look at it.

pub mod askers;
pub mod client;
pub mod coordinator;
pub mod gateway;
pub mod operator;
pub mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_coordinator::log::MemoryDisk;
use baton_coordinator::{Join, Observer};
use baton_core::{Clock, Env, NodeId, Process, Rng, Role};
use baton_worker::Shell;
use tokio::sync::watch;
use tokio::time::Duration;

use self::askers::Asked;
use crate::draw::{Purpose, rng};
use crate::members::Ending;
use crate::model::Pace;
use crate::net::{Flips, HostNet};
use crate::record::Record;
use crate::stalls::Stalls;
use crate::topology::{COORDINATOR_PORT, Topology, kind};

/// What the hosts of one run share with the loop that drives it.
#[derive(Clone)]
pub struct World {
    pub seed: u64,
    pub topology: Arc<Topology>,
    pub record: Record,
    /// Of each coordinator, kept over its crashes.
    pub disks: Arc<BTreeMap<String, MemoryDisk>>,
    /// Of each worker.
    pub flips: Arc<BTreeMap<String, Flips>>,
    /// Of each host.
    pub stalls: Arc<BTreeMap<String, Stalls>>,
    /// How often the crowd of clients has been moved: those that wait go away, those that are to come come now.
    pub crowd: watch::Sender<u64>,
    /// Orders that the operator has not carried out yet.
    pub orders: watch::Sender<usize>,
    /// How long clients pause before they read on.
    pub slow_ms: Arc<AtomicU64>,
    /// Of each host: how many thousandths its clock is too fast.
    pub drifts: Arc<BTreeMap<String, watch::Sender<u64>>>,
    /// Of each host: milliseconds that its wall clock is ahead.
    pub ahead_ms: Arc<BTreeMap<String, AtomicI64>>,
    pub seen: Arc<Mutex<Seen>>,
    history: Arc<Mutex<Vec<Asked>>>,
    lives: Arc<AtomicU64>,
}

/// A process that has ended by itself.
pub struct Ended {
    pub host: String,
    pub why: String,
    /// It is what an operator has ordered, or what comes of it.
    pub wanted: bool,
}

/// What runs now, by host.
#[derive(Default)]
pub struct Seen {
    pub coordinators: BTreeMap<String, Observer>,
    pub workers: BTreeMap<String, Arc<Shell>>,
    pub paces: BTreeMap<String, Pace>,
    /// Role in which each worker serves.
    pub roles: BTreeMap<String, Role>,
    /// The number in the group that each coordinator had last.
    pub numbers: BTreeMap<String, u64>,
    /// Coordinators that start by joining a group.
    pub joins: BTreeMap<String, Join>,
    /// Coordinators whose disk was lost and whose place nobody has taken yet, with the number they had.
    pub lost: BTreeMap<String, u64>,
    /// How often each coordinator's disk was emptied.
    pub wipes: BTreeMap<String, u64>,
    /// Coordinators that an operator has ordered to leave.
    pub leaving: BTreeSet<String>,
    /// Lives of each gateway so far.
    pub gateways: BTreeMap<String, u64>,
    /// Hosts whose process has ended by itself, and why; their supervisor has to start it again.
    pub exited: BTreeMap<String, String>,
    /// All of them so far, in order: a look may come after the supervisor.
    pub endings: Vec<Ended>,
    /// Lives of gateways that were ended by a fault.
    pub crashed: BTreeMap<String, BTreeSet<u64>>,
    /// Workers that were drained and are not to come back by themselves.
    pub drained: BTreeSet<String>,
    /// Lives of workers that ended in order while blocks were held, and how many.
    pub held_at_end: Vec<(String, usize)>,
    /// Workers that start as the other version.
    pub upgraded: BTreeSet<String>,
    /// Hosts whose process is one of the release before.
    pub earlier: BTreeSet<String>,
    /// A worker hangs, or has hung, while the last requests are served.
    pub wedged: bool,
    /// Coordinators on whose disk a bit has flipped.
    pub rotten: BTreeSet<String>,
    /// One of them that serves all the same.
    pub rotten_serves: Option<String>,
}

/// Part of what a coordinator of the release before says when the others go on as one of this release does.
const MUST_BE_UPDATED: &str = "is newer than this coordinator takes";

impl Seen {
    /// The process of this host has ended by itself.
    fn end(&mut self, host: &str, why: String) {
        let wanted = match Ending::of(&why) {
            Some(Ending::Removed) => self.leaving.contains(host),
            Some(Ending::Lost) => self.lost.contains_key(host),
            Some(Ending::Damaged) => self.rotten.contains(host),
            // Its operator updates it at once.
            None if why.contains(MUST_BE_UPDATED) => self.earlier.remove(host),
            None => self.joins.contains_key(host) && why.contains("join: no leader"),
        };
        self.endings.push(Ended { host: host.to_string(), why: why.clone(), wanted });
        self.exited.insert(host.to_string(), why);
    }
}

impl World {
    pub fn new(seed: u64, topology: Topology) -> World {
        let disk = |name: String| (name, MemoryDisk::new(topology.fsync));
        let mut servers = topology.servers();
        servers.push(topology.spare());
        let disks = servers.iter().filter(|name| kind(name) == "coordinator").cloned().map(disk).collect();
        let drifts = servers.iter().map(|name| (name.clone(), watch::Sender::new(0))).collect();
        let ahead_ms = servers.iter().map(|name| (name.clone(), AtomicI64::new(0))).collect();
        let stalls = servers.iter().map(|name| (name.clone(), Stalls::default())).collect();
        let flips = servers.into_iter().enumerate();
        let flips = flips.map(|(n, name)| (name, Flips::new(rng(seed, Purpose::Link, n as u64)))).collect();
        World {
            seed,
            topology: Arc::new(topology),
            record: Record::default(),
            disks: Arc::new(disks),
            flips: Arc::new(flips),
            stalls: Arc::new(stalls),
            crowd: watch::Sender::new(0),
            orders: watch::Sender::new(0),
            slow_ms: Arc::default(),
            drifts: Arc::new(drifts),
            ahead_ms: Arc::new(ahead_ms),
            seen: Arc::default(),
            history: Arc::default(),
            lives: Arc::default(),
        }
    }

    /// The surroundings of a process that starts now, in its host.
    pub fn env(&self, host: &str) -> Env {
        tokio::spawn(drift(self.drifts[host].subscribe()));
        let life = self.lives.fetch_add(1, Ordering::Relaxed);
        let earlier = self.seen().earlier.contains(host);
        let net = HostNet::new(host, &self.record, &self.flips[host], &self.stalls[host], earlier);
        Env {
            net: Arc::new(net),
            clock: Arc::new(VirtualClock {
                host: host.to_string(),
                record: self.record.clone(),
                ahead_ms: self.ahead_ms.clone(),
            }),
            rng: Rng::new(rng(self.seed, Purpose::Host, life).u64()),
            process: Process { id: 1000 + life as u32, threads: false },
        }
    }

    /// How the coordinator joins the group of the others. `replaces`: whose place it takes.
    pub fn join(&self, host: &str, replaces: Option<u64>) -> Join {
        let mut others = self.topology.coordinator_names();
        others.retain(|other| other != host);
        let via = others.iter().map(|other| format!("{other}:{COORDINATOR_PORT}")).collect();
        Join { via, replaces: replaces.map(NodeId) }
    }

    /// Where coordinators can be asked: those of the beginning, and the spare one once it serves.
    pub fn coordinator_addresses(&self) -> Vec<String> {
        let mut addresses = self.topology.coordinator_addresses();
        let spare = self.topology.spare();
        if self.seen().numbers.contains_key(&spare) {
            addresses.push(format!("{spare}:{COORDINATOR_PORT}"));
        }
        addresses
    }

    /// An empty disk takes the place of the coordinator's.
    pub fn wipe(&self, host: &str) {
        self.disks[host].wipe();
        *self.seen().wipes.entry(host.to_string()).or_default() += 1;
    }

    /// Whether the worker drains.
    pub fn follows_an_order(&self, worker: &str) -> bool {
        self.seen().workers.get(worker).is_none_or(|shell| shell.is_draining())
    }

    /// What was asked of coordinators about single requests.
    pub fn history(&self) -> MutexGuard<'_, Vec<Asked>> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process has ended: nothing of it runs on until its host is started again.
    pub async fn exit(&self, host: &str, why: String) -> turmoil::Result {
        self.record.note(host, format!("exits: {why}"));
        self.seen().end(host, why);
        std::future::pending().await
    }
}

/// Wall time of a run: a fixed day, the virtual time since the start, and what the host is ahead.
struct VirtualClock {
    host: String,
    record: Record,
    ahead_ms: Arc<BTreeMap<String, AtomicI64>>,
}

impl Clock for VirtualClock {
    fn unix_ms(&self) -> u64 {
        let ahead_ms = self.ahead_ms[&self.host].load(Ordering::Relaxed);
        (1_700_000_000_000 + self.record.now().as_millis() as u64).saturating_add_signed(ahead_ms)
    }
}

/// How often a clock that is too fast jumps ahead.
const JUMP_EVERY: Duration = Duration::from_millis(50);

/// Makes the clock of this host, by which all waits in it go, too fast by as many thousandths as it is told.
async fn drift(mut thousandths: watch::Receiver<u64>) {
    while thousandths.wait_for(|drift| *drift > 0).await.is_ok() {
        tokio::time::sleep(JUMP_EVERY).await;
        let drift = *thousandths.borrow();
        tokio::time::advance(JUMP_EVERY * drift as u32 / 1_000).await;
    }
}
