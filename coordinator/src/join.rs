//! A coordinator that comes to a group that is there: it asks the leader for a number, keeps it in its directory, learns
//! the ledger, and is given a vote. Doing it again on the same directory goes on where it stopped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::RPC_TIMEOUT_MS;
use baton_core::{Env, Net, NodeId, Refused};
use baton_proto::v1;
use baton_proto::v1::add_node_reply::Outcome;
use baton_proto::v1::admin_client::AdminClient;
use tokio::time::Instant;

use crate::config::Config;
use crate::log::{Directory, Disk, Identity, LogError, is_empty};
use crate::running::{Running, StartError, listen, own_address, start_with};

/// How long a leader is looked for.
const JOIN_PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(200);
/// File with the key under which the directory asked for its number.
const KEY: &str = "joining";

/// Where to join, and for whom.
#[derive(Clone, Debug)]
pub struct Join {
    /// Coordinators of the group; one that answers is enough.
    pub via: Vec<String>,
    /// Whom the new node replaces.
    pub replaces: Option<NodeId>,
}

/// Starts a coordinator that joins a group, or goes on joining. `config.node` is not looked at: the group gives the number.
///
/// # Errors
/// If the directory belongs to a node that did not join, or no leader takes the node in within 30 s.
pub async fn join(config: Config, join: Join, env: Env) -> Result<Running, StartError> {
    let disk: Arc<dyn Disk> = Arc::new(Directory::open(&config.data)?);
    join_on(config, join, env, disk).await
}

/// The same on any disk.
pub async fn join_on(config: Config, join: Join, mut env: Env, disk: Arc<dyn Disk>) -> Result<Running, StartError> {
    config.check()?;
    let known = Identity::load(&*disk)?;
    if let Some(other) = known.as_ref().filter(|known| !known.joined) {
        let path = disk.path("");
        return Err(StartError::Join(format!("{path} belongs to node {}: join with an empty directory", other.node)));
    }
    let listener = listen(&env, &config.listen).await?;
    let (node, coordinators) = match known {
        Some(known) if !is_empty(&*disk)? => (known.node, known.taken_by),
        // Without a log it must not have taken part yet, which the leader knows.
        _ => {
            let address = own_address(&config, &BTreeMap::new(), &*listener);
            let added = ask_for_number(&mut env, &*disk, &join, address).await?;
            let taken_by = added.coordinators.into_iter().map(|known| (known.id, known.address)).collect();
            let identity = Identity { node: NodeId(added.node), cluster: added.cluster, joined: true, taken_by };
            identity.save(&*disk)?;
            tracing::info!(node = added.node, cluster = identity.cluster, "joined; the ledger follows");
            (identity.node, identity.taken_by)
        }
    };
    let config = Config { node, peers: Vec::new(), ..config };
    start_with(config, BTreeMap::new(), coordinators, env, disk, listener).await
}

async fn ask_for_number(
    env: &mut Env,
    disk: &dyn Disk,
    join: &Join,
    address: String,
) -> Result<v1::NodeAdded, StartError> {
    let process_key = key(env, disk)?;
    let request = v1::AddNodeRequest { address, process_key, replaces: join.replaces.map_or(0, |node| node.0) };
    let deadline = Instant::now() + JOIN_PATIENCE;
    let mut last = "no coordinator was named".to_string();
    let mut asked = join.via.iter().cycle().cloned();
    let mut redirect: Option<String> = None;
    while Instant::now() < deadline {
        let Some(to) = redirect.take().or_else(|| asked.next()) else { break };
        match add(&env.net, &to, request.clone()).await {
            Ok(Outcome::Added(added)) => return Ok(added),
            Ok(Outcome::Refused(refused)) => match Refused::parse(&refused.reason) {
                Some(Refused::NotLeader) if !refused.leader_address.is_empty() => {
                    redirect = Some(refused.leader_address);
                    last = refused.detail;
                }
                Some(Refused::NotLeader | Refused::Unavailable) => last = refused.detail,
                _ => return Err(StartError::Join(refused.detail)),
            },
            Err(error) => last = format!("{to}: {error}"),
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(StartError::Join(format!("no leader took this node in within {} s: {last}", JOIN_PATIENCE.as_secs())))
}

async fn add(net: &Arc<dyn Net>, to: &str, request: v1::AddNodeRequest) -> Result<Outcome, String> {
    let channel = baton_proto::channel(net.clone(), to).map_err(|error| error.to_string())?;
    let mut client = AdminClient::new(channel);
    let timeout = Duration::from_millis(RPC_TIMEOUT_MS);
    let reply = tokio::time::timeout(timeout, client.add_node(request)).await;
    let reply = reply.map_err(|_| "does not answer".to_string())?.map_err(|status| status.message().to_string())?;
    reply.into_inner().outcome.ok_or_else(|| "answered nothing".to_string())
}

/// The key of this directory: written down before it is used, so that asking again gives the same number.
fn key(env: &mut Env, disk: &dyn Disk) -> Result<String, StartError> {
    let failed = |error| LogError::Io { path: disk.path(KEY), error };
    if disk.list().map_err(failed)?.iter().any(|name| name == KEY) {
        let bytes = disk.read(KEY).map_err(failed)?;
        return Ok(String::from_utf8_lossy(&bytes).trim().to_string());
    }
    let key = format!("{:016x}{:016x}", env.rng.u64(), env.rng.u64());
    disk.replace(KEY, key.as_bytes()).map_err(failed)?;
    Ok(key)
}
