//! A coordinator's host: its disk outlives it.

use std::path::PathBuf;
use std::sync::Arc;

use baton_coordinator::Config;
use baton_core::NodeId;

use super::World;
use crate::topology::COORDINATOR_PORT;

/// One life of the process.
pub async fn run(world: World, host: String, node: u64) -> turmoil::Result {
    let peers = world.topology.coordinator_names().into_iter().zip(1u64..);
    let peers = peers.map(|(name, node)| (NodeId(node), format!("{name}:{COORDINATOR_PORT}"))).collect();
    let config = Config {
        node: NodeId(node),
        listen: format!("0.0.0.0:{COORDINATOR_PORT}"),
        data: PathBuf::new(),
        peers,
        advertise: String::new(),
        cluster: None,
        policy: Default::default(),
    };
    let disk = Arc::new(world.disks[&host].clone());
    let mut running = match baton_coordinator::start_on(config, world.env(&host), disk).await {
        Ok(running) => running,
        Err(error) => return world.exit(&host, format!("did not start: {error}")).await,
    };
    world.record.note(&host, "serves");
    world.seen().coordinators.insert(host.clone(), running.observer());
    let why = match running.stopped().await {
        Ok(()) => "ended".to_string(),
        Err(stopped) => stopped.to_string(),
    };
    world.exit(&host, why).await
}
