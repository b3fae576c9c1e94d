//! The one place that knows openraft: a node of the group, the ledger it keeps, and who leads.

mod ask;
mod envelope;
#[cfg(test)]
mod group_tests;
mod inbound;
mod line;
#[cfg(test)]
mod line_tests;
mod machine;
mod members;
mod network;
mod store;
#[cfg(test)]
mod tests;
mod types;
mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock, RwLockReadGuard};
use std::time::Duration;

use baton_core::limits::RPC_TIMEOUT_MS;
use baton_core::{Net, NodeId};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, InitializeError, LinearizableReadError, RaftError};
use openraft::{BasicNode, Config, Instant, ReadPolicy, SnapshotPolicy};
use tokio::sync::watch;

use crate::log::{Disk, Log, LogError, LogOptions};
use crate::state::{Batch, Check, Ledger, Outcome, encode_batch_as};
pub(crate) use ask::{Known, Question, Verdict, ask, judge};
pub(crate) use envelope::Envelope;
use inbound::Heard;
pub(crate) use inbound::RaftService;
use machine::Machine;
pub(crate) use members::{ChangeError, Member, Members, Progress};
use network::Peers;
use store::Store;
use types::{Proposal, Raft, scoped};

const HEARTBEAT_MS: u64 = 50;
/// A follower grants no vote for ELECTION_MS_MAX after it has heard the leader, and stands for election a time between
/// these two later: a leader's death is noticed within 300 to 400 ms.
const ELECTION_MS_MIN: u64 = 100;
const ELECTION_MS_MAX: u64 = 200;
/// Entries after which the ledger is saved and the log before it dropped.
const SNAPSHOT_EVERY: u64 = 5_000;
/// Slow writes in a row after which the disk counts as slow.
const WRITES_SLOW_MAX: u32 = 5;
/// Bytes of entries after which it is saved as well.
const LOG_BYTES_MAX: u64 = 32 << 20;
/// Entries kept before a snapshot, for nodes that are a little behind.
const ENTRIES_KEPT: u64 = 1_000;
/// A leader that has heard no quorum for so long may lead no more and not know it.
const QUORUM_SILENCE_MAX: Duration = Duration::from_millis(3 * ELECTION_MS_MAX);
/// Nobody else can have been elected so soon after a quorum has acknowledged a leader: followers grant no vote before
/// `ELECTION_MS_MAX` has passed. The rest is for clocks that run at different rates.
const LEADER_LEASE: Duration = Duration::from_millis(ELECTION_MS_MAX - 20);
/// A command waits this long for a quorum that is silent.
pub(crate) const QUORUM_GRACE: Duration = Duration::from_millis(ELECTION_MS_MAX);
/// No answer from a quorum for so long, and a command's fate is unknown.
const COMMIT_TIMEOUT: Duration = Duration::from_millis(900);

const _: () = assert!(COMMIT_TIMEOUT.as_millis() < RPC_TIMEOUT_MS as u128);

/// Why a node could not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("raft: {0}")]
    Raft(String),
}

/// Why commands were not applied here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProposeError {
    /// Surely not applied.
    #[error("node does not lead")]
    NotLeader,
    /// May or may not be applied; repeating them changes nothing.
    #[error("no quorum answered: {0}")]
    Unknown(String),
}

/// What this node knows of the group now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) leader: Option<NodeId>,
    pub(crate) term: u64,
    pub(crate) members: Members,
    /// Set when this node can take part no more.
    pub(crate) failed: Option<String>,
}

/// What a node is made of.
pub(crate) struct Parts {
    pub(crate) node: NodeId,
    /// The group as configured, this node included. Empty for a node that joins a group that is there.
    pub(crate) peers: BTreeMap<u64, String>,
    pub(crate) envelope: Envelope,
    pub(crate) net: Arc<dyn Net>,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) seed: u64,
    /// Version of the entries that it writes and at most takes.
    pub(crate) entries: u16,
}

/// One coordinator's part in the group.
pub(crate) struct Node {
    id: NodeId,
    raft: Raft,
    log: Log,
    seed: u64,
    entries: u16,
    envelope: Envelope,
    ledger: Arc<RwLock<Ledger>>,
    log_bytes: Arc<AtomicU64>,
    machine_open: Arc<Mutex<bool>>,
    hashes: Arc<Mutex<VecDeque<(u64, u64)>>>,
    difference: Arc<OnceLock<String>>,
    changes: watch::Receiver<u64>,
    standing: watch::Receiver<Standing>,
    stopping: watch::Sender<bool>,
    /// When a leader last spoke to this node.
    heard: Heard,
    follower: tokio::task::JoinHandle<()>,
    naming: tokio::task::JoinHandle<()>,
}

impl Node {
    /// Recovers from the disk and starts taking part. Peers that find an empty group wait for the lowest id to begin it.
    pub(crate) async fn start(parts: Parts) -> Result<Node, NodeError> {
        let Parts { node, peers, envelope, net, disk, seed, entries } = parts;
        let log = Log::open(disk.clone(), LogOptions::default())?;
        let machine = Machine::open(disk, entries)?;
        let machine_open = machine.open_mark();
        let (ledger, changes, log_bytes) = (machine.ledger(), machine.changes(), machine.log_bytes());
        let (hashes, difference) = (machine.hashes(), machine.difference());
        envelope.name(ledger.read().expect("ledger lock").cluster());
        let addresses = peers.clone();
        let config = Arc::new(config());
        let network = Peers { net, addresses: peers.clone(), envelope: envelope.clone() };
        let raft = Raft::new(node.0, config, network, Store(log.clone()), machine);
        let raft = scoped(seed, raft).await.map_err(|error| NodeError::Raft(error.to_string()))?;
        if peers.keys().next() == Some(&node.0) {
            begin(&raft, peers, seed).await?;
        }
        let members = Members::configured(&addresses);
        let (tell, standing) = watch::channel(Standing { members, ..Standing::default() });
        let follower = tokio::spawn(follow(raft.clone(), tell, addresses.clone()));
        let naming = tokio::spawn(name(envelope.clone(), ledger.clone(), changes.clone()));
        Ok(Node {
            id: node,
            raft,
            log,
            seed,
            entries,
            envelope,
            ledger,
            log_bytes,
            machine_open,
            hashes,
            difference,
            changes,
            standing,
            stopping: watch::Sender::new(false),
            heard: Heard::default(),
            follower,
            naming,
        })
    }

    pub(crate) fn id(&self) -> NodeId {
        self.id
    }

    pub(crate) fn envelope(&self) -> &Envelope {
        &self.envelope
    }

    /// Whether the disk has been slow for a while.
    pub(crate) fn disk_is_slow(&self) -> bool {
        self.log.writes_slow() >= WRITES_SLOW_MAX
    }

    /// What was found damaged while the log was read.
    pub(crate) fn damage(&self) -> Option<String> {
        self.log.damage()
    }

    /// How this node's ledger was found to differ from the leader's, once it was.
    pub(crate) fn difference(&self) -> Option<String> {
        self.difference.get().cloned()
    }

    /// The ledger as applied here. Hold it for a few lines only: entries wait meanwhile.
    pub(crate) fn ledger(&self) -> RwLockReadGuard<'_, Ledger> {
        self.ledger.read().expect("ledger lock")
    }

    /// Tells of changes of the cluster's name, workers, tenants and keys.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    pub(crate) fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// Whether a quorum has answered this leader lately; without one it may lead no more and not know it.
    pub(crate) fn has_quorum(&self) -> bool {
        self.acked_within(QUORUM_SILENCE_MAX)
    }

    /// Whether a quorum has answered this leader so lately that it surely leads: by what followers remember, which one
    /// that has just started again does not. What must not be wrong even then asks `confirm`.
    pub(crate) fn has_lease(&self) -> bool {
        self.acked_within(LEADER_LEASE)
    }

    fn acked_within(&self, age: Duration) -> bool {
        let acked = self.raft.metrics().borrow_watched().last_quorum_acked;
        let alone = self.standing.borrow().members.is_alone(self.id);
        alone || acked.is_some_and(|acked| acked.elapsed() < age)
    }

    /// Has a quorum say, after this was called, that this node leads, and waits until all that was committed by then is
    /// applied: what the ledger says is then no older than the question.
    pub(crate) async fn confirm(&self) -> Result<(), ProposeError> {
        let read = scoped(self.seed ^ 4, self.raft.ensure_linearizable(ReadPolicy::ReadIndex));
        match tokio::time::timeout(COMMIT_TIMEOUT, read).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_)))) => Err(ProposeError::NotLeader),
            Ok(Err(error)) => Err(ProposeError::Unknown(error.to_string())),
            Err(_) => Err(ProposeError::Unknown(format!("{} ms passed", COMMIT_TIMEOUT.as_millis()))),
        }
    }

    /// How long ago a leader last spoke to this node; None: none has.
    pub(crate) fn leader_silence(&self) -> Option<Duration> {
        self.heard.lock().expect("heard lock").map(|heard| heard.elapsed())
    }

    /// The latest hash of this node's ledger, to be compared by the others.
    pub(crate) fn check(&self) -> Option<Check> {
        let (index, hash) = self.hashes.lock().expect("hashes lock").back().copied()?;
        Some(Check { version: self.entries, index, hash })
    }

    /// The ledger is to be saved soon, however long the log is.
    pub(crate) fn ask_to_save(&self) {
        self.log_bytes.store(LOG_BYTES_MAX, Ordering::Relaxed);
    }

    /// Saves the ledger and drops the log before it when the entries since the last time are many bytes.
    pub(crate) async fn save_when_long(&self) {
        if self.log_bytes.load(Ordering::Relaxed) < LOG_BYTES_MAX {
            return;
        }
        self.log_bytes.store(0, Ordering::Relaxed);
        if let Err(error) = self.raft.trigger().snapshot().await {
            tracing::debug!(%error, "raft has ended");
        }
    }

    /// What peers call.
    pub(crate) fn service(&self) -> RaftService {
        let (raft, id, ledger) = (self.raft.clone(), self.id, self.ledger.clone());
        let standing = self.standing.clone();
        let tell = Box::new(move |node| members::known(&raft, id, &standing.borrow(), &ledger, node));
        let (heard, stopping) = (self.heard.clone(), self.stopping.subscribe());
        RaftService::new(self.raft.clone(), self.envelope.clone(), self.seed ^ 1, tell, heard, stopping)
    }

    /// Commits one entry and says what became of its commands.
    pub(crate) async fn propose(&self, batch: &Batch) -> Result<Vec<Outcome>, ProposeError> {
        let write = self.raft.client_write(Proposal(encode_batch_as(self.entries, batch).into()));
        let unknown = |error: String| ProposeError::Unknown(error);
        let committed = async {
            tokio::select! {
                biased;
                written = scoped(self.seed ^ 2, write) => Ok(written),
                silence = self.quorum_lost() => Err(silence),
            }
        };
        match tokio::time::timeout(COMMIT_TIMEOUT, committed).await {
            Ok(Ok(Ok(written))) => Ok(written.data.0),
            Ok(Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))))) => Err(ProposeError::NotLeader),
            Ok(Ok(Err(error))) => Err(unknown(error.to_string())),
            Ok(Err(silence)) => Err(unknown(silence)),
            Err(_) => Err(unknown(format!("{} ms passed", COMMIT_TIMEOUT.as_millis()))),
        }
    }

    /// Resolves when no quorum has answered for so long that none will in time. A leader that is about to hear its
    /// first answers is given the time of an election.
    async fn quorum_lost(&self) -> String {
        let start = tokio::time::Instant::now();
        while self.has_quorum() || start.elapsed() < QUORUM_GRACE {
            tokio::time::sleep(Duration::from_millis(HEARTBEAT_MS)).await;
        }
        format!("none in {} ms", QUORUM_SILENCE_MAX.as_millis())
    }

    /// Stops taking part, and ends the calls that peers have open.
    pub(crate) async fn stop(&self) {
        self.stopping.send_replace(true);
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "raft did not stop cleanly");
        }
        self.follower.abort();
        self.naming.abort();
    }

    /// Writes out what the log still holds back. After it nothing of this node reaches the disk.
    pub(crate) async fn close(&self) {
        *self.machine_open.lock().expect("open lock") = false;
        self.log.close().await;
    }
}

/// Term and candidate of a vote as the log holds it.
pub(crate) fn read_vote(vote: &[u8]) -> Option<(u64, NodeId)> {
    let vote: openraft::alias::VoteOf<types::Types> = wire::decode(vote).ok()?;
    Some((vote.leader_id.term, NodeId(vote.leader_id.node_id)))
}

fn config() -> Config {
    let config = Config {
        cluster_name: "baton".into(),
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: ELECTION_MS_MIN,
        election_timeout_max: ELECTION_MS_MAX,
        install_snapshot_timeout: 30_000,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
        max_in_snapshot_log_to_keep: ENTRIES_KEPT,
        // A node that comes back is found within a quarter of a second.
        backoff: "50ms, 100ms, 200ms ...250ms".into(),
        enable_pre_vote: Some(true),
        // A leader that comes back is elected anew, into another term, alone too: what it wrote last may have been lost with its
        // disk's cache after a follower, or a node that is joining, had it, and nothing else may take its place in the same term.
        enable_leader_restore: Some(false),
        ..Config::default()
    };
    config.validate().expect("constants that openraft accepts")
}

/// Makes the group of its configured nodes, if it is not made yet.
async fn begin(raft: &Raft, peers: BTreeMap<u64, String>, seed: u64) -> Result<(), NodeError> {
    let members: BTreeMap<u64, BasicNode> =
        peers.into_iter().map(|(id, address)| (id, BasicNode::new(address))).collect();
    match scoped(seed ^ 3, raft.initialize(members)).await {
        Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
        Err(error) => Err(NodeError::Raft(error.to_string())),
    }
}

/// Translates openraft's metrics, of which only a copy may be held, into what the rest of the coordinator asks.
async fn follow(raft: Raft, tell: watch::Sender<Standing>, addresses: BTreeMap<u64, String>) {
    let mut metrics = raft.metrics();
    let mut members = Members::configured(&addresses);
    loop {
        let now = metrics.borrow_watched().clone();
        members.follow(&now.membership_config, &addresses);
        let failed = now.running_state.err().map(|error| error.to_string());
        let (leader, term) = (now.current_leader.map(NodeId), now.current_term);
        let standing = Standing { leader, term, members: members.clone(), failed };
        tell.send_if_modified(|old| {
            let changed = *old != standing;
            *old = standing;
            changed
        });
        if metrics.changed().await.is_err() {
            return;
        }
    }
}

/// Puts the cluster's name on every message once the ledger has it.
async fn name(envelope: Envelope, ledger: Arc<RwLock<Ledger>>, mut changes: watch::Receiver<u64>) {
    while envelope.cluster().is_empty() && changes.changed().await.is_ok() {
        let cluster = ledger.read().expect("ledger lock").cluster().to_string();
        envelope.name(&cluster);
    }
}
