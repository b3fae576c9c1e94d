//! The operator of a run: passes orders to whichever coordinator leads, as `baton drain` does.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::{Done, Order, OrderRequest, done};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::World;
use crate::net::TurmoilNet;
use crate::topology::CLIENTS;

const CALL: Duration = Duration::from_millis(1_000);
const PAUSE: Duration = Duration::from_millis(100);
/// Times all coordinators are asked before an operator gives up.
const ROUNDS: usize = 20;

/// Drains the workers that are named.
pub async fn run(world: World, mut drains: mpsc::Receiver<String>) {
    while let Some(worker) = drains.recv().await {
        let told = drain(&world, &worker).await;
        let what = if told { "is ordered to drain" } else { "cannot be ordered to drain: no coordinator takes it" };
        world.record.note(CLIENTS, format!("{worker} {what}"));
    }
}

async fn drain(world: &World, worker: &str) -> bool {
    for _ in 0..ROUNDS {
        for address in world.topology.coordinator_addresses() {
            let Ok(channel) = baton_proto::channel(Arc::new(TurmoilNet), &address) else { continue };
            let request = OrderRequest { worker: worker.to_string(), order: Order::Drain.into() };
            let answered = timeout(CALL, AdminClient::new(channel).order_worker(request)).await;
            if let Ok(Ok(answer)) = answered
                && let Done { outcome: Some(done::Outcome::Done(_)) } = answer.into_inner()
            {
                return true;
            }
        }
        sleep(PAUSE).await;
    }
    false
}
