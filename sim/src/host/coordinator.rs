//! A coordinator's host: its disk outlives it.

use std::path::PathBuf;
use std::sync::Arc;

use baton_coordinator::Config;
use baton_coordinator::state::{VERSION, VERSION_MIN};
use baton_core::NodeId;

use super::World;
use crate::topology::COORDINATOR_PORT;

/// One life of the process: of the group from the beginning on, or one that joins it.
pub async fn run(world: World, host: String, node: u64) -> turmoil::Result {
    let join = world.seen().joins.get(&host).cloned();
    if join.is_none() && host == world.topology.spare() {
        // Nobody has started it yet.
        return std::future::pending().await;
    }
    let peers = world.topology.coordinator_names().into_iter().zip(1u64..);
    let peers = peers.map(|(name, node)| (NodeId(node), format!("{name}:{COORDINATOR_PORT}"))).collect();
    // The binary of the release before cannot do more.
    let entries = if world.seen().earlier.contains(&host) { VERSION_MIN } else { VERSION };
    let config = Config {
        node: NodeId(node),
        listen: format!("0.0.0.0:{COORDINATOR_PORT}"),
        data: PathBuf::new(),
        peers,
        advertise: String::new(),
        cluster: None,
        policy: Default::default(),
        entries,
    };
    let (disk, env) = (Arc::new(world.disks[&host].clone()), world.env(&host));
    let started = match join {
        None => baton_coordinator::start_on(config, env, disk).await,
        Some(join) => {
            let config = Config { peers: Vec::new(), advertise: format!("{host}:{COORDINATOR_PORT}"), ..config };
            baton_coordinator::join_on(config, join, env, disk).await
        }
    };
    let mut running = match started {
        Ok(running) => running,
        Err(error) => return world.exit(&host, format!("did not start: {error}")).await,
    };
    let number = running.node().0;
    world.record.note(&host, format!("serves as node {number}"));
    if world.seen().rotten.contains(&host) {
        world.seen().rotten_serves = Some(host.clone());
    }
    world.seen().numbers.insert(host.clone(), number);
    world.seen().coordinators.insert(host.clone(), running.observer());
    let why = match running.stopped().await {
        Ok(()) => "ended".to_string(),
        Err(stopped) => stopped.to_string(),
    };
    world.exit(&host, why).await
}
