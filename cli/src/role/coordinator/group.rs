//! `baton coordinator join|leave|replace|transfer-leader`: changes of a group that runs.

use baton_coordinator::Join;
use baton_core::{NodeId, Role};
use baton_proto::v1::NodeNumber;
use clap::{Args, Subcommand};

use super::super::settings::Settings;
use super::super::{EXIT_CODES, RoleFlags, metrics};
use super::{LISTEN, not_started};
use crate::admin::{ClusterFlags, ask};
use crate::exit::Failure;
use crate::out::sayln;

/// What can be done to a group of coordinators.
#[derive(Debug, Subcommand)]
pub(crate) enum Group {
    /// Run a new coordinator that joins a group: it gets a number, catches up, then votes
    ///
    /// The number is kept in --data: the same command on the same directory goes on where it stopped.
    #[command(after_help = EXIT_CODES)]
    Join(JoinFlags),
    /// Run a new coordinator that takes the place of one that is lost or shall go
    ///
    /// It joins with an empty directory under a new number; once it votes, the old one leaves for ever.
    #[command(after_help = EXIT_CODES)]
    Replace(ReplaceFlags),
    /// Take a coordinator out of its group for ever; its process ends by itself
    Leave(LeaveFlags),
    /// Make another coordinator the leader
    TransferLeader(TransferFlags),
}

#[derive(Args, Debug)]
pub(crate) struct JoinFlags {
    #[command(flatten)]
    role: RoleFlags,
    /// A coordinator of the group; several may be named, one that answers is enough
    #[arg(long, value_name = "HOST:PORT", required = true)]
    via: Vec<String>,
    /// gRPC address [default: 127.0.0.1:7400]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Address under which other processes reach this node [default: --listen]
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Directory of the ledger: empty, or that of this node
    #[arg(long, value_name = "DIR", required = true)]
    data: String,
    /// Address for /metrics and /live; port 0 takes a free one [default: 127.0.0.1:0]
    #[arg(long, value_name = "HOST:PORT")]
    metrics: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct ReplaceFlags {
    /// Number of the coordinator that goes
    #[arg(value_name = "NODE", value_parser = clap::value_parser!(u64).range(1..))]
    node: u64,
    #[command(flatten)]
    join: JoinFlags,
}

#[derive(Args, Debug)]
pub(crate) struct LeaveFlags {
    /// Number of the coordinator that goes
    #[arg(value_name = "NODE", value_parser = clap::value_parser!(u64).range(1..))]
    node: u64,
    #[command(flatten)]
    cluster: ClusterFlags,
}

#[derive(Args, Debug)]
pub(crate) struct TransferFlags {
    /// Number of the coordinator that shall lead [default: the one that is furthest]
    #[arg(value_name = "NODE", value_parser = clap::value_parser!(u64).range(1..))]
    node: Option<u64>,
    #[command(flatten)]
    cluster: ClusterFlags,
}

impl Group {
    /// Whether it runs a node, rather than asking for something.
    pub(crate) fn is_role(&self) -> bool {
        matches!(self, Group::Join(_) | Group::Replace(_))
    }
}

pub(super) fn run(group: Group) -> Result<(), Failure> {
    let (join, replaces) = match group {
        Group::Join(join) => (join, None),
        Group::Replace(ReplaceFlags { node, join }) => (join, Some(NodeId(node))),
        Group::Leave(LeaveFlags { node, cluster }) => return leave(node, &cluster),
        Group::TransferLeader(TransferFlags { node, cluster }) => return transfer(node, &cluster),
    };
    let common = join.role.clone();
    super::super::process(tokio::runtime::Builder::new_current_thread(), &common, serve(join, replaces))
}

async fn serve(flags: JoinFlags, replaces: Option<NodeId>) -> Result<(), Failure> {
    let voice = flags.role.voice();
    let env = flags.role.env()?;
    let mut settings = Settings::read(flags.role.config.as_deref())?;
    let metrics_address =
        flags.metrics.clone().or(settings.take("metrics")?).unwrap_or_else(|| "127.0.0.1:0".to_string());
    settings.flag("listen", flags.listen);
    settings.flag("advertise", flags.advertise);
    settings.flag("data", Some(flags.data));
    settings.fallback("listen", LISTEN);
    let config = settings.finish()?;

    let handle = metrics::install()?;
    let metrics = metrics::serve(env.net.clone(), &metrics_address, handle).await.map_err(Failure::refused)?;
    let running = baton_coordinator::join(config, Join { via: flags.via, replaces }, env).await;
    let running = running.map_err(|error| not_started("the new coordinator", error))?;
    let id = format!("coordinator-{}", running.node());
    super::super::serve(running, Role::Coordinator, id, Some(metrics), voice).await
}

fn leave(node: u64, cluster: &ClusterFlags) -> Result<(), Failure> {
    let coordinators = cluster.coordinators()?;
    let remove = |mut client: crate::admin::Client| async move { client.remove_node(NodeNumber { node }).await };
    crate::admin::run(ask(&coordinators, remove))?;
    sayln!("coordinator {node} has left for ever; its process ends and its directory can go");
    Ok(())
}

fn transfer(node: Option<u64>, cluster: &ClusterFlags) -> Result<(), Failure> {
    let coordinators = cluster.coordinators()?;
    let number = NodeNumber { node: node.unwrap_or(0) };
    let transfer = |mut client: crate::admin::Client| async move { client.transfer_leader(number).await };
    crate::admin::run(ask(&coordinators, transfer))?;
    match node {
        Some(node) => sayln!("coordinator {node} leads"),
        None => sayln!("another coordinator leads"),
    }
    Ok(())
}
