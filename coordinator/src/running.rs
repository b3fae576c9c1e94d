//! Starting and stopping one coordinator, and what becomes of it in between: it takes part, or stands aside because
//! its disk is full or its directory empty, and takes part again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_core::net::{BoxFuture, Stream};
use baton_core::planted::{self, Bug};
use baton_core::{Env, Listener, Net, NodeId, Rng};
use baton_proto::v1;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;

use crate::aside::Cause;
use crate::config::{Config, ConfigError};
use crate::log::{self, Directory, DirectoryError, Disk, Identity, IdentityError, LogError, Room};
use crate::observe::Observer;
use crate::raft::{self, Envelope, Node, NodeError, Verdict};
use crate::service::cluster_name;
use crate::stack::{End, Stack};

/// How often a full disk is tried again.
const ROOM_EVERY: Duration = Duration::from_millis(500);
/// How long a stopped node's parts may hold its directory.
const QUIET_MAX: Duration = Duration::from_secs(2);
/// How often the others are asked after a node with an empty directory.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// How long the others may take to answer before this node serves at all: they may wait for its answer.
const ASK_FIRST: Duration = Duration::from_millis(150);
/// And afterwards.
const ASK_LATER: Duration = Duration::from_millis(1_000);

/// Why a coordinator did not start. Nothing is left running.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("listen on {address}: {error}")]
    Listen { address: String, error: std::io::Error },
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(
        "{path} is empty, but node {node} has taken part in its group before: without its data it must not vote again. \
         Put the directory back, or run `baton coordinator replace {node}` with an empty directory"
    )]
    Lost { path: String, node: NodeId },
    #[error("node {0} was removed from its group: join again with an empty directory, under a new number")]
    Removed(NodeId),
    #[error(
        "node {0} has an empty directory and no peers: a new group of one is node 1; `baton coordinator join` brings a \
         node into a group that is there"
    )]
    NoPeers(NodeId),
    #[error("join: {0}")]
    Join(String),
}

impl StartError {
    /// Whether files of the data directory are damaged or missing.
    pub fn is_damage(&self) -> bool {
        let log = |error: &LogError| matches!(error, LogError::Damaged { .. } | LogError::Missing { .. });
        match self {
            StartError::Log(error)
            | StartError::Node(NodeError::Log(error))
            | StartError::Identity(IdentityError::Log(error)) => log(error),
            StartError::Identity(IdentityError::Unreadable { .. }) => true,
            _ => false,
        }
    }
}

/// Why a coordinator ended by itself.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Stopped {
    #[error("coordinator: the node failed: {0}")]
    Node(String),
    #[error("coordinator: the server ended: {0}")]
    Server(String),
    #[error("coordinator: {0}")]
    Damaged(String),
    /// What it applied is not what the leader applied.
    #[error("coordinator: {0}")]
    Differs(String),
    /// As an operator wanted.
    #[error("node {0} was removed from its group; its data directory is of no further use")]
    Removed(NodeId),
    #[error("{0}")]
    Refused(String),
}

/// A coordinator that serves, or stands aside for a while.
pub struct Running {
    address: String,
    node: NodeId,
    observer: Observer,
    stopping: watch::Sender<bool>,
    ended: JoinHandle<Result<(), Stopped>>,
}

/// Starts a coordinator on its data directory.
pub async fn start(config: Config, env: Env) -> Result<Running, StartError> {
    let disk = Directory::open(&config.data)?;
    start_on(config, env, Arc::new(disk)).await
}

/// Starts a coordinator on any disk.
pub async fn start_on(config: Config, env: Env, disk: Arc<dyn Disk>) -> Result<Running, StartError> {
    let group = config.group()?;
    config.check()?;
    let wanted = config.cluster.clone().unwrap_or_default();
    Identity::check(&*disk, config.node, &wanted)?;
    let joined = Identity::load(&*disk)?.filter(|identity| identity.joined);
    if joined.is_some() && log::is_empty(&*disk)? {
        return Err(StartError::Lost { path: disk.path(""), node: config.node });
    }
    let listener = listen(&env, &config.listen).await?;
    let taken_by = joined.map(|identity| identity.taken_by).unwrap_or_default();
    start_with(config, group, taken_by, env, disk, listener).await
}

pub(crate) async fn listen(env: &Env, address: &str) -> Result<Box<dyn Listener>, StartError> {
    let listener = env.net.listen(address).await;
    listener.map_err(|error| StartError::Listen { address: address.to_string(), error })
}

/// `group`: as configured; empty where none is. `taken_by`: the group that has taken this node in.
pub(crate) async fn start_with(
    config: Config,
    group: BTreeMap<u64, String>,
    taken_by: BTreeMap<u64, String>,
    mut env: Env,
    disk: Arc<dyn Disk>,
    listener: Box<dyn Listener>,
) -> Result<Running, StartError> {
    let address = own_address(&config, &group, &*listener);
    let cluster_drawn = cluster_name(&mut env.rng);
    let mut home = Home {
        node: config.node,
        group,
        taken_by,
        address: address.clone(),
        cluster: config.cluster,
        cluster_drawn,
        policy: config.policy,
        entries: config.entries,
        net: env.net,
        rng: env.rng,
        pid: env.process.id,
        observer: Observer::default(),
        room: Arc::new(Room::new(disk)),
        listener: Shared(Arc::new(Mutex::new(listener))),
    };
    let begun = home.begin(false).await?;
    let stopping = watch::Sender::new(false);
    let (node, observer) = (home.node, home.observer.clone());
    let ended = tokio::spawn(home.keep(begun, stopping.subscribe()));
    Ok(Running { address, node, observer, stopping, ended })
}

/// The address under which the others reach this node.
pub(crate) fn own_address(config: &Config, group: &BTreeMap<u64, String>, listener: &dyn Listener) -> String {
    let configured = group.get(&config.node.0).filter(|_| config.advertise.is_empty());
    match configured {
        Some(address) if !address.ends_with(":0") => address.clone(),
        _ if config.advertise.is_empty() => listener.address(),
        _ => config.advertise.clone(),
    }
}

/// What stays while the node comes and goes.
struct Home {
    node: NodeId,
    group: BTreeMap<u64, String>,
    /// The group that has taken this node in, for as long as it has learned of no other.
    taken_by: BTreeMap<u64, String>,
    address: String,
    /// Name of the cluster as configured.
    cluster: Option<String>,
    /// Name for a cluster that has none.
    cluster_drawn: String,
    policy: crate::placement::Policy,
    entries: u16,
    net: Arc<dyn Net>,
    rng: Rng,
    pid: u32,
    observer: Observer,
    room: Arc<Room>,
    listener: Shared,
}

/// What runs at a time.
enum Begun {
    Takes(Stack),
    Aside(Cause, Stack),
}

impl Home {
    /// Runs until it is asked to stop, or ends by itself.
    async fn keep(mut self, mut begun: Begun, mut asked: watch::Receiver<bool>) -> Result<(), Stopped> {
        loop {
            begun = match begun {
                Begun::Takes(mut stack) => {
                    let end = stack.until_end(&self.net, &self.taken_by, &mut asked).await;
                    stack.stop().await;
                    self.quiet().await;
                    match end {
                        End::Asked => return Ok(()),
                        End::Stopped(Stopped::Node(why)) if self.room.is_full() => {
                            tracing::error!(why, "the disk is full: this coordinator stands aside until there is room");
                        }
                        End::Stopped(stopped) => return Err(stopped),
                    }
                    self.again(Cause::Full).await?
                }
                Begun::Aside(cause, stack) => {
                    let better = self.until_better(cause, &mut asked).await;
                    stack.stop().await;
                    match better {
                        Ok(true) => self.again(cause).await?,
                        Ok(false) => return Ok(()),
                        Err(error) => return Err(ended(error)),
                    }
                }
            };
        }
    }

    /// Waits until what the stopped node had running has let go of the disk, so that whoever asked for the end may use
    /// the directory. What hangs longer writes nothing any more.
    async fn quiet(&self) {
        let quiet = async {
            while Arc::strong_count(&self.room) > 1 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(QUIET_MAX, quiet).await.is_err() {
            tracing::warn!("parts of the node that ended still hold its directory");
        }
    }

    /// `before`: why it stood aside, which is over.
    async fn again(&mut self, before: Cause) -> Result<Begun, Stopped> {
        self.begin(before == Cause::Empty).await.map_err(ended)
    }

    /// Takes part, or stands aside where it cannot yet.
    async fn begin(&mut self, may_be_empty: bool) -> Result<Begun, StartError> {
        match self.try_begin(may_be_empty).await {
            Err(error) if self.room.is_full() => {
                tracing::warn!(%error, "no room on the disk");
                Ok(self.stand_aside(Cause::Full))
            }
            result => result,
        }
    }

    /// `may_be_empty`: the others have said so already.
    async fn try_begin(&mut self, may_be_empty: bool) -> Result<Begun, StartError> {
        if self.room.is_full() && !self.room.has_room() {
            return Ok(self.stand_aside(Cause::Full));
        }
        metrics::gauge!("baton_coordinator_storage_full").set(0.0);
        let cluster = self.cluster.clone().unwrap_or_default();
        let identity = Identity::claim(
            &*self.room,
            Identity { node: self.node, cluster, joined: false, taken_by: BTreeMap::new() },
        )?;
        let ask = !may_be_empty && !identity.joined && !planted::is(Bug::EmptyVotes);
        if ask && log::is_empty(&*self.room)? && self.must_wait(ASK_FIRST).await? {
            return Ok(self.stand_aside(Cause::Empty));
        }
        let envelope = Envelope::new(self.node.0, &identity.cluster);
        let mut peers = self.group.clone();
        if !identity.joined {
            peers.insert(self.node.0, self.address.clone());
        }
        let parts = raft::Parts {
            node: self.node,
            peers,
            envelope,
            net: self.net.clone(),
            disk: self.room.clone(),
            seed: self.rng.u64(),
            entries: self.entries,
        };
        let node = Arc::new(Box::pin(Node::start(parts)).await?);
        self.observer.follow(&node);
        let cluster = self.cluster.clone().unwrap_or_else(|| self.cluster_drawn.clone());
        let parts = crate::stack::Parts {
            node,
            identity,
            disk: self.room.clone(),
            cluster,
            policy: self.policy.clone(),
            net: self.net.clone(),
            rng: self.rng.fork(),
            pid: self.pid,
        };
        Ok(Begun::Takes(Stack::serve(Box::new(self.listener.clone()), parts)))
    }

    /// Whether a node without data has to wait before it takes part: the others know whether it ever did.
    async fn must_wait(&self, patience: Duration) -> Result<bool, StartError> {
        let mut others = self.group.clone();
        others.remove(&self.node.0);
        if others.is_empty() {
            return if self.node == NodeId(1) { Ok(false) } else { Err(StartError::NoPeers(self.node)) };
        }
        let envelope = Envelope::new(self.node.0, &self.cluster.clone().unwrap_or_default());
        let answers = raft::ask(&self.net, &envelope, &others, self.node.0, patience).await;
        match raft::judge(&answers) {
            Verdict::Begin => Ok(false),
            Verdict::Wait => Ok(true),
            Verdict::Lost => Err(StartError::Lost { path: self.room.path(""), node: self.node }),
            Verdict::Removed => Err(StartError::Removed(self.node)),
        }
    }

    fn stand_aside(&self, cause: Cause) -> Begun {
        let full = cause == Cause::Full;
        metrics::gauge!("baton_coordinator_storage_full").set(if full { 1.0 } else { 0.0 });
        let identity = Identity::load(&*self.room).ok().flatten();
        let cluster = identity.map(|identity| identity.cluster).unwrap_or_default();
        let mut addresses = self.group.clone();
        addresses.insert(self.node.0, self.address.clone());
        let coordinator = |(id, address): (u64, String)| v1::CoordinatorNode {
            pid: if id == self.node.0 { self.pid } else { 0 },
            id,
            address,
            ..Default::default()
        };
        let view = v1::ClusterView {
            cluster: cluster.clone(),
            node: self.node.0,
            coordinators: addresses.into_iter().map(coordinator).collect(),
            storage: if full { "full" } else { "ok" }.into(),
            ..Default::default()
        };
        let envelope = Envelope::new(self.node.0, &cluster);
        Begun::Aside(cause, Stack::aside(Box::new(self.listener.clone()), cause, envelope, view))
    }

    /// Resolves when it is worth trying to take part again. False: it was asked to stop.
    async fn until_better(&self, cause: Cause, asked: &mut watch::Receiver<bool>) -> Result<bool, StartError> {
        let better = async {
            let every = if cause == Cause::Full { ROOM_EVERY } else { ASK_EVERY };
            loop {
                tokio::time::sleep(every).await;
                let wait = match cause {
                    Cause::Full => !self.room.has_room(),
                    Cause::Empty => self.must_wait(ASK_LATER).await?,
                };
                if !wait {
                    return Ok(true);
                }
            }
        };
        tokio::select! {
            biased;
            _ = asked.wait_for(|asked| *asked) => Ok(false),
            better = better => better,
        }
    }
}

/// How a coordinator that could not begin again ends.
fn ended(error: StartError) -> Stopped {
    match error {
        error if error.is_damage() => Stopped::Damaged(error.to_string()),
        StartError::Removed(node) => Stopped::Removed(node),
        error @ StartError::Lost { .. } => Stopped::Refused(error.to_string()),
        error => Stopped::Node(error.to_string()),
    }
}

/// One bound socket for all servers that come and go.
#[derive(Clone)]
struct Shared(Arc<Mutex<Box<dyn Listener>>>);

impl Listener for Shared {
    fn accept(&mut self) -> BoxFuture<'_, std::io::Result<Stream>> {
        Box::pin(async { self.0.lock().await.accept().await })
    }

    fn address(&self) -> String {
        String::new()
    }
}

impl Running {
    /// Where others reach it.
    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// Its number in the group.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Looks at it from now on, through all its starts.
    pub fn observer(&self) -> Observer {
        self.observer.clone()
    }

    /// Resolves when it has ended by itself: its disk or its server failed, or it was removed.
    pub async fn stopped(&mut self) -> Result<(), Stopped> {
        (&mut self.ended).await.unwrap_or_else(|error| Err(Stopped::Server(error.to_string())))
    }

    /// Ends open calls, leaves the group to the others and closes the log.
    pub async fn stop(mut self) {
        self.stopping.send_replace(true);
        drop((&mut self.ended).await);
    }
}
