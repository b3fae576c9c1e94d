//! What serves at a time: a node with its services, or the few words of one that stands aside.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_core::planted::{self, Bug};
use baton_core::{Listener, Net, Rng};
use baton_proto::server::Bound;
use baton_proto::v1;
use baton_proto::v1::coordinator_server::CoordinatorServer;
use baton_proto::v1::raft_server::RaftServer;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::service::Routes;

use crate::aside::{Aside, Cause};
use crate::log::{Disk, Identity};
use crate::raft::{self, Envelope, Node};
use crate::running::Stopped;
use crate::service::{self, Service};
use crate::services::Services;

/// How long open calls may take to end when this node stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// Far more than a cluster has processes.
const BOUND: Bound = Bound { connections_max: 16_384, full };
/// How often a node that does not lead asks whether it was removed.
const REMOVED_EVERY: Duration = Duration::from_secs(1);

/// What a node serves with.
pub(crate) struct Parts {
    pub(crate) node: Arc<Node>,
    pub(crate) identity: Identity,
    pub(crate) disk: Arc<dyn Disk>,
    /// Name for a cluster that has none.
    pub(crate) cluster: String,
    pub(crate) policy: crate::placement::Policy,
    pub(crate) net: Arc<dyn Net>,
    pub(crate) rng: Rng,
    pub(crate) pid: u32,
}

/// A server and what runs beside it.
pub(crate) struct Stack {
    /// None: stands aside.
    node: Option<Arc<Node>>,
    stopping: watch::Sender<bool>,
    server: JoinHandle<()>,
    beside: JoinHandle<()>,
}

/// How a stack ended.
pub(crate) enum End {
    Asked,
    Stopped(Stopped),
}

impl Stack {
    pub(crate) fn serve(listener: Box<dyn Listener>, parts: Parts) -> Stack {
        let stopping = watch::Sender::new(false);
        let node = parts.node.clone();
        let (service, beside) = Service::new(service::Parts {
            node: parts.node,
            policy: parts.policy,
            disk: parts.disk,
            identity: parts.identity,
            cluster_proposed: parts.cluster,
            net: parts.net,
            rng: parts.rng,
            pid: parts.pid,
            stopping: stopping.clone(),
        });
        let services = Services::new(node.service(), service);
        let stopped = stopped(stopping.subscribe());
        let server = tokio::spawn(baton_proto::server::serve(listener, BOUND, services, stopped));
        Stack { node: Some(node), stopping, server, beside: tokio::spawn(beside) }
    }

    pub(crate) fn aside(listener: Box<dyn Listener>, cause: Cause, envelope: Envelope, view: v1::ClusterView) -> Stack {
        let stopping = watch::Sender::new(false);
        let aside = Aside { cause, envelope, view, stopping: stopping.subscribe() };
        let services = Routes::new(RaftServer::new(aside.clone())).add_service(CoordinatorServer::new(aside));
        let stopped = stopped(stopping.subscribe());
        let server = tokio::spawn(baton_proto::server::serve(listener, BOUND, services, stopped));
        Stack { node: None, stopping, server, beside: tokio::spawn(std::future::ready(())) }
    }

    /// Resolves when it is to stop or has ended by itself. `taken_by`: the group, while the node has learned of none.
    pub(crate) async fn until_end(
        &mut self,
        net: &Arc<dyn Net>,
        taken_by: &BTreeMap<u64, String>,
        asked: &mut watch::Receiver<bool>,
    ) -> End {
        let node = self.node.clone().expect("only a node ends by itself");
        let mut standing = node.standing();
        tokio::select! {
            biased;
            _ = asked.wait_for(|asked| *asked) => End::Asked,
            ended = &mut self.server => End::Stopped(Stopped::Server(match ended {
                Ok(()) => "it was told to".into(),
                Err(error) => error.to_string(),
            })),
            failed = standing.wait_for(|standing| standing.failed.is_some()) => {
                let why = failed.ok().and_then(|standing| standing.failed.clone());
                let why = why.unwrap_or_else(|| "raft has ended".into());
                let damaged = node.damage().map(Stopped::Damaged);
                let differs = || node.difference().map(Stopped::Differs);
                End::Stopped(damaged.or_else(differs).unwrap_or(Stopped::Node(why)))
            }
            () = removed(&node, net, taken_by) => End::Stopped(Stopped::Removed(node.id())),
        }
    }

    /// Ends open calls, leaves the group to the others and closes the log.
    pub(crate) async fn stop(mut self) {
        self.stopping.send_replace(true);
        drop((&mut self.beside).await);
        if let Some(node) = &self.node {
            node.stop().await;
        }
        if planted::is(Bug::StreamsOutliveNode) {
            // What was connected stays so.
        } else if !self.server.is_finished() && tokio::time::timeout(STOP_TIMEOUT, &mut self.server).await.is_err() {
            self.server.abort();
        }
        if let Some(node) = &self.node {
            node.close().await;
        }
    }
}

fn full() {
    tracing::warn!("as many connections as there may be: further ones wait");
    metrics::counter!("baton_coordinator_connections_full_total").increment(1);
}

async fn stopped(mut stopping: watch::Receiver<bool>) {
    drop(stopping.wait_for(|stopping| *stopping).await);
}

/// Resolves when this node is known to have been removed: by its own ledger, or by a peer's, because nothing more is
/// sent to a node that is out, even before it has learned of its group.
async fn removed(node: &Node, net: &Arc<dyn Net>, taken_by: &BTreeMap<u64, String>) {
    loop {
        tokio::time::sleep(REMOVED_EVERY).await;
        let id = node.id();
        if node.standing().borrow().leader == Some(id) && node.has_quorum() {
            continue;
        }
        let mut others = node.members().addresses();
        let own = others.remove(&id.0).is_some();
        if !own && others.is_empty() {
            others.clone_from(taken_by);
            others.remove(&id.0);
        }
        if !own && node.ledger().nodes().has_removed(id.0) {
            return;
        }
        let answers = raft::ask(net, node.envelope(), &others, id.0, REMOVED_EVERY).await;
        if answers.into_iter().flatten().any(|known| known.removed) {
            return;
        }
    }
}
