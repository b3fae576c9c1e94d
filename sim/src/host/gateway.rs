//! A gateway's host.

use std::sync::Arc;

use baton_gateway::Config;

use super::World;
use crate::topology::GATEWAY_PORT;

/// How long a request may take in all.
pub const DEADLINE_MS: u64 = 20_000;

/// One life of the process.
pub async fn run(world: World, host: String) -> turmoil::Result {
    *world.seen().gateways.entry(host.clone()).or_default() += 1;
    let mut config = Config::new(&host, &format!("0.0.0.0:{GATEWAY_PORT}"), world.topology.coordinator_addresses());
    config.open = true;
    config.deadline_ms = DEADLINE_MS;
    let started = baton_gateway::start(config, world.env(&host), Arc::new(String::new)).await;
    let mut running = match started {
        Ok(running) => running,
        Err(error) => return world.exit(&host, format!("did not start: {error}")).await,
    };
    world.record.note(&host, "serves");
    let Err(failed) = running.stopped().await else { return Ok(()) };
    world.exit(&host, failed.to_string()).await
}
