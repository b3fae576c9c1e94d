//! Starting and stopping one coordinator.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::MESSAGE_BYTES_MAX;
use baton_core::{Env, Listener};
use baton_proto::v1::admin_server::AdminServer;
use baton_proto::v1::coordinator_server::CoordinatorServer;
use baton_proto::v1::raft_server::RaftServer;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::config::{Config, ConfigError};
use crate::log::{Directory, DirectoryError, Disk, Identity, IdentityError};
use crate::raft::{self, Node, NodeError};
use crate::service::{self, Service, cluster_name};

/// How long open calls may take to end when this node stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a coordinator did not start. Nothing is left running.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("listen on {address}: {error}")]
    Listen { address: String, error: std::io::Error },
    #[error(transparent)]
    Node(#[from] NodeError),
}

/// Why a coordinator ended by itself.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Stopped {
    #[error("coordinator: the node failed: {0}")]
    Node(String),
    #[error("coordinator: the server ended: {0}")]
    Server(String),
}

/// A coordinator that serves.
pub struct Running {
    address: String,
    node: Arc<Node>,
    stopping: watch::Sender<bool>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    beside: JoinHandle<()>,
}

/// Starts a coordinator on its data directory.
pub async fn start(config: Config, env: Env) -> Result<Running, StartError> {
    let disk = Directory::open(&config.data)?;
    start_on(config, env, Arc::new(disk)).await
}

/// Starts a coordinator on any disk.
pub async fn start_on(config: Config, mut env: Env, disk: Arc<dyn Disk>) -> Result<Running, StartError> {
    let mut group = config.group()?;
    config.check_cluster()?;
    let wanted = Identity { node: config.node, cluster: config.cluster.clone().unwrap_or_default() };
    let identity = Identity::claim(&*disk, wanted)?;
    let listener = env.net.listen(&config.listen).await;
    let listener = listener.map_err(|error| StartError::Listen { address: config.listen.clone(), error })?;
    let address = own_address(&config, &group, &*listener);
    group.insert(config.node.0, address.clone());
    let node = raft::Parts {
        node: config.node,
        peers: group.clone(),
        net: env.net.clone(),
        disk: disk.clone(),
        seed: env.rng.u64(),
    };
    let node = Arc::new(Node::start(node).await?);
    let cluster_proposed = config.cluster.unwrap_or_else(|| cluster_name(&mut env.rng));
    Ok(serve(listener, node, Served { address, group, disk, identity, cluster_proposed, policy: config.policy }))
}

fn own_address(config: &Config, group: &BTreeMap<u64, String>, listener: &dyn Listener) -> String {
    let configured = group.get(&config.node.0).filter(|_| config.advertise.is_empty());
    match configured {
        Some(address) if !address.ends_with(":0") => address.clone(),
        _ if config.advertise.is_empty() => listener.address(),
        _ => config.advertise.clone(),
    }
}

struct Served {
    address: String,
    group: BTreeMap<u64, String>,
    disk: Arc<dyn Disk>,
    identity: Identity,
    cluster_proposed: String,
    policy: crate::placement::Policy,
}

fn serve(listener: Box<dyn Listener>, node: Arc<Node>, served: Served) -> Running {
    let stopping = watch::Sender::new(false);
    let (service, beside) = Service::new(service::Parts {
        node: node.clone(),
        policy: served.policy,
        disk: served.disk,
        identity: served.identity,
        cluster_proposed: served.cluster_proposed,
        addresses: served.group,
        stopping: stopping.clone(),
    });
    let mut stop = stopping.subscribe();
    let stopped = async move { drop(stop.wait_for(|stopping| *stopping).await) };
    let raft = RaftServer::new(node.service()).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let admin = AdminServer::new(service.clone());
    let coordinator = CoordinatorServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let router = baton_proto::channel::server().add_service(raft).add_service(coordinator).add_service(admin);
    let server = tokio::spawn(router.serve_with_incoming_shutdown(baton_proto::incoming(listener), stopped));
    Running { address: served.address, node, stopping, server, beside: tokio::spawn(beside) }
}

impl Running {
    /// Where others reach it.
    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// Resolves when it has ended by itself: its disk or its server failed.
    pub async fn stopped(&mut self) -> Result<(), Stopped> {
        let mut standing = self.node.standing();
        tokio::select! {
            biased;
            ended = &mut self.server => match ended {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(Stopped::Server(error.to_string())),
                Err(error) => Err(Stopped::Server(error.to_string())),
            },
            failed = standing.wait_for(|standing| standing.failed.is_some()) => {
                let why = failed.ok().and_then(|standing| standing.failed.clone());
                Err(Stopped::Node(why.unwrap_or_else(|| "raft has ended".into())))
            }
        }
    }

    /// Ends open calls, leaves the group to the others and closes the log.
    pub async fn stop(mut self) {
        self.stopping.send_replace(true);
        drop((&mut self.beside).await);
        self.node.stop().await;
        if tokio::time::timeout(STOP_TIMEOUT, &mut self.server).await.is_err() {
            self.server.abort();
        }
        self.node.close().await;
    }
}
