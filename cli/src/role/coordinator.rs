//! `baton coordinator`: one node of the ledger, or a change of the group.

pub(crate) mod group;

use baton_coordinator::{Config, StartError};
use baton_core::Role;
use clap::Args;
use toml::Value;

use super::settings::Settings;
use super::{EXIT_CODES, RoleFlags, metrics};
use crate::exit::Failure;
use crate::surroundings;

/// Where a coordinator listens unless told otherwise.
pub(crate) const LISTEN: &str = "127.0.0.1:7400";

/// Run one coordinator.
///
/// One node is enough to serve; three survive the loss of one. Every node of a new group names all nodes with --peer; all
/// must be up once for the group to form. A group that runs is changed with the commands below.
///
/// Keys of the TOML file, as the flags of these names: node, listen, advertise, data, metrics, entries, peers (a list of
/// [node, address]). Besides: cluster (its name; drawn by the first leader if it is not set), and the table [policy] of placement:
/// prefill_tokens_min (uncached prompt tokens from which a prefill worker is used, 64), queue_max (requests that may wait on a
/// worker before it counts as full, 256), the costs sequence_cost_tokens (32), pressure_cost_tokens (1024) and
/// prefill_rate_assumed (1000 tokens a second), and the others that `baton setting list` shows. What `baton setting set` has
/// set for the cluster counts in their place.
#[derive(Args, Debug)]
#[command(after_help = EXIT_CODES, args_conflicts_with_subcommands = true)]
pub(crate) struct CoordinatorFlags {
    #[command(subcommand)]
    group: Option<group::Group>,
    #[command(flatten)]
    role: RoleFlags,
    /// Number of this node, from 1; never given to another node or an emptied disk [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    node: Option<u32>,
    /// gRPC address [default: 127.0.0.1:7400]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Address under which other processes reach this node [default: --listen]
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Directory of the ledger [default: $HOME/.baton/coordinator-<node>]
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// A node and its address, this one among them; 1, 3 or 5 in total [default: only this node]
    #[arg(long = "peer", value_name = "N=HOST:PORT", value_parser = peer)]
    peers: Vec<(u32, String)>,
    /// Version of the ledger's entries that it writes and at most takes, as a binary of an earlier release does: an upgrade keeps
    /// a way back until every node runs without it [default: this binary's]
    #[arg(long, value_name = "VERSION")]
    entries: Option<u32>,
    /// Address for /metrics and /live; port 0 takes a free one [default: 127.0.0.1:0]
    #[arg(long, value_name = "HOST:PORT")]
    metrics: Option<String>,
}

/// Reads `1=host:port`.
fn peer(text: &str) -> Result<(u32, String), String> {
    let parts = text.split_once('=').and_then(|(node, address)| Some((node.parse().ok()?, address.to_string())));
    parts
        .filter(|(node, address)| *node > 0 && address.contains(':'))
        .ok_or_else(|| "is not of the form N=HOST:PORT".into())
}

impl CoordinatorFlags {
    /// Whether this runs a node.
    pub(crate) fn is_role(&self) -> bool {
        self.group.as_ref().is_none_or(group::Group::is_role)
    }
}

/// A coordinator that could not start; damage has an exit code of its own.
fn not_started(what: &str, error: StartError) -> Failure {
    let code = if error.is_damage() { crate::exit::DAMAGED } else { crate::exit::REFUSED };
    Failure { code, ..super::not_started(what, error) }
}

pub(crate) fn run(flags: CoordinatorFlags) -> Result<(), Failure> {
    if let Some(group) = flags.group {
        return group::run(group);
    }
    crate::allocator::expect_many_small_pieces();
    let common = flags.role.clone();
    super::process(tokio::runtime::Builder::new_current_thread(), &common, serve(flags))
}

async fn serve(flags: CoordinatorFlags) -> Result<(), Failure> {
    let voice = flags.role.voice();
    let env = flags.role.env()?;
    let mut settings = Settings::read(flags.role.config.as_deref())?;
    let metrics_address =
        flags.metrics.clone().or(settings.take("metrics")?).unwrap_or_else(|| "127.0.0.1:0".to_string());
    let config: Config = fill(settings, flags)?;

    let handle = metrics::install()?;
    let metrics = metrics::serve(env.net.clone(), &metrics_address, handle).await.map_err(Failure::refused)?;
    let id = format!("coordinator-{}", config.node);
    let running = baton_coordinator::start(config, env).await.map_err(|error| not_started(&id, error))?;
    super::serve(running, Role::Coordinator, id, Some(metrics), voice).await
}

/// Flags over the file, defaults below it.
fn fill(mut settings: Settings, flags: CoordinatorFlags) -> Result<Config, Failure> {
    let pairs = flags.peers.iter().map(|(node, address)| Value::Array(vec![(*node).into(), address.as_str().into()]));
    let pairs: Vec<Value> = pairs.collect();
    settings.flag("node", flags.node);
    settings.flag("listen", flags.listen);
    settings.flag("advertise", flags.advertise);
    settings.flag("data", flags.data);
    settings.flag("entries", flags.entries);
    settings.flag("peers", (!pairs.is_empty()).then_some(pairs));
    settings.fallback("node", 1);
    settings.fallback("listen", LISTEN);
    let directory = format!("coordinator-{}", settings.get("node"));
    settings.fallback("data", surroundings::default_data().join(directory).display().to_string());
    settings.finish()
}

#[cfg(test)]
mod tests {
    use baton_core::NodeId;
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        flags: CoordinatorFlags,
    }

    #[test]
    fn flags_become_a_configuration() {
        let line = "coordinator --node 2 --data d --peer 1=a:1 --peer 2=b:2 --peer 3=c:3 --listen 0.0.0.0:9";
        let Line { flags } = Line::parse_from(line.split(' '));
        let config = fill(Settings::read(None).unwrap(), flags).unwrap();
        assert_eq!((config.node, config.listen.as_str()), (NodeId(2), "0.0.0.0:9"));
        assert_eq!(config.peers[2], (NodeId(3), "c:3".to_string()));

        let Line { flags } = Line::parse_from(["coordinator"]);
        let config = fill(Settings::read(None).unwrap(), flags).unwrap();
        assert_eq!((config.node, config.listen.as_str(), config.peers.len()), (NodeId(1), LISTEN, 0));
        assert!(config.data.ends_with("coordinator-1"));
    }

    #[test]
    fn peers_are_a_number_and_an_address() {
        assert_eq!(peer("2=host:1"), Ok((2, "host:1".to_string())));
        for bad in ["", "host:1", "0=host:1", "x=host:1", "1=host"] {
            assert!(peer(bad).is_err(), "{bad}");
        }
    }
}
