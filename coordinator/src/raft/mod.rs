//! The one place that knows openraft: a node of the group, the ledger it keeps, and who leads.

mod machine;
mod network;
mod store;
#[cfg(test)]
mod tests;
mod types;
mod wire;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard};
use std::time::Duration;

use baton_core::limits::RPC_TIMEOUT_MS;
use baton_core::{Net, NodeId};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, InitializeError, RaftError};
use openraft::{BasicNode, Config, Instant, SnapshotPolicy};
use tokio::sync::watch;

use crate::log::{Disk, Log, LogError, LogOptions};
use crate::state::{Batch, Ledger, Outcome, encode_batch};
use machine::Machine;
use network::Peers;
pub(crate) use network::RaftService;
use store::Store;
use types::{Proposal, Raft, scoped};

const HEARTBEAT_MS: u64 = 50;
const ELECTION_MS_MIN: u64 = 150;
const ELECTION_MS_MAX: u64 = 300;
/// Entries after which the ledger is saved and the log before it dropped.
const SNAPSHOT_EVERY: u64 = 5_000;
/// Bytes of entries after which it is saved as well.
const LOG_BYTES_MAX: u64 = 32 << 20;
/// Entries kept before a snapshot, for nodes that are a little behind.
const ENTRIES_KEPT: u64 = 1_000;
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
    /// Set when this node can take part no more.
    pub(crate) failed: Option<String>,
}

/// What a node is made of.
pub(crate) struct Parts {
    pub(crate) node: NodeId,
    pub(crate) peers: BTreeMap<u64, String>,
    pub(crate) net: Arc<dyn Net>,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) seed: u64,
}

/// One coordinator's part in the group.
pub(crate) struct Node {
    id: NodeId,
    raft: Raft,
    log: Log,
    seed: u64,
    ledger: Arc<RwLock<Ledger>>,
    log_bytes: Arc<AtomicU64>,
    changes: watch::Receiver<u64>,
    standing: watch::Receiver<Standing>,
    alone: bool,
    stopping: watch::Sender<bool>,
    follower: tokio::task::JoinHandle<()>,
}

impl Node {
    /// Recovers from the disk and starts taking part. Peers that find an empty group wait for the lowest id to begin it.
    pub(crate) async fn start(parts: Parts) -> Result<Node, NodeError> {
        let Parts { node, peers, net, disk, seed } = parts;
        let log = Log::open(disk.clone(), LogOptions::default())?;
        let machine = Machine::open(disk)?;
        let (ledger, changes, log_bytes) = (machine.ledger(), machine.changes(), machine.log_bytes());
        let alone = peers.len() == 1;
        let config = Arc::new(config(peers.len()));
        let network = Peers { net, addresses: peers.clone() };
        let raft = Raft::new(node.0, config, network, Store(log.clone()), machine);
        let raft = scoped(seed, raft).await.map_err(|error| NodeError::Raft(error.to_string()))?;
        if peers.keys().next() == Some(&node.0) {
            begin(&raft, peers, seed).await?;
        }
        let (tell, standing) = watch::channel(Standing::default());
        let follower = tokio::spawn(follow(raft.clone(), tell));
        Ok(Node {
            id: node,
            raft,
            log,
            seed,
            ledger,
            log_bytes,
            changes,
            standing,
            alone,
            stopping: watch::Sender::new(false),
            follower,
        })
    }

    pub(crate) fn id(&self) -> NodeId {
        self.id
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
        let acked = self.raft.metrics().borrow_watched().last_quorum_acked;
        self.alone || acked.is_some_and(|acked| acked.elapsed() < Duration::from_millis(2 * ELECTION_MS_MAX))
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
        RaftService::new(self.raft.clone(), self.seed ^ 1, self.stopping.subscribe())
    }

    /// Commits one entry and says what became of its commands.
    pub(crate) async fn propose(&self, batch: &Batch) -> Result<Vec<Outcome>, ProposeError> {
        let write = self.raft.client_write(Proposal(encode_batch(batch).into()));
        let unknown = |error: String| ProposeError::Unknown(error);
        match tokio::time::timeout(COMMIT_TIMEOUT, scoped(self.seed ^ 2, write)).await {
            Ok(Ok(written)) => Ok(written.data.0),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_)))) => Err(ProposeError::NotLeader),
            Ok(Err(error)) => Err(unknown(error.to_string())),
            Err(_) => Err(unknown(format!("{} ms passed", COMMIT_TIMEOUT.as_millis()))),
        }
    }

    /// Stops taking part, and ends the calls that peers have open.
    pub(crate) async fn stop(&self) {
        self.stopping.send_replace(true);
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "raft did not stop cleanly");
        }
        self.follower.abort();
    }

    /// Writes out what the log still holds back.
    pub(crate) async fn close(&self) {
        self.log.close().await;
    }
}

fn config(nodes: usize) -> Config {
    let config = Config {
        cluster_name: "baton".into(),
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: ELECTION_MS_MIN,
        election_timeout_max: ELECTION_MS_MAX,
        install_snapshot_timeout: 20_000,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
        max_in_snapshot_log_to_keep: ENTRIES_KEPT,
        enable_pre_vote: Some(true),
        // A group of one needs nobody's vote; others elect anew, because the durable commit mark may lag.
        enable_leader_restore: Some(nodes == 1),
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
async fn follow(raft: Raft, tell: watch::Sender<Standing>) {
    let mut metrics = raft.metrics();
    loop {
        let now = metrics.borrow_watched().clone();
        let failed = now.running_state.err().map(|error| error.to_string());
        let standing = Standing { leader: now.current_leader.map(NodeId), term: now.current_term, failed };
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
