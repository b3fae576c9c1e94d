//! The operator of a run: passes orders to whichever coordinator leads, as `baton drain` and `baton tenant` do.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::{self, Done, OrderRequest, Tenant, done};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::World;
use crate::net::TurmoilNet;
use crate::topology::CLIENTS;

const CALL: Duration = Duration::from_millis(1_000);
const PAUSE: Duration = Duration::from_millis(100);
/// Times all coordinators are asked before an operator gives up a drain; it is over when the faults are.
const ROUNDS_DRAIN: usize = 20;
const ROUNDS: usize = 600;
/// Whose requests are those of a cluster without keys.
const TENANT: &str = "default";

/// What an operator wants done.
#[derive(Clone, Debug)]
pub enum Order {
    Drain(String),
    /// Limits of the clients' tenant; 0 is none.
    Limit {
        requests_open: u64,
        requests_per_minute: u64,
    },
}

/// Carries out one order after the other.
pub async fn run(world: World, mut orders: mpsc::Receiver<Order>) {
    while let Some(order) = orders.recv().await {
        let done = carry_out(&world, &order).await;
        let what = if done { "is taken" } else { "is not taken by any coordinator" };
        world.record.note(CLIENTS, format!("the operator's {order:?} {what}"));
    }
}

async fn carry_out(world: &World, order: &Order) -> bool {
    let rounds = if matches!(order, Order::Drain(_)) { ROUNDS_DRAIN } else { ROUNDS };
    for _ in 0..rounds {
        for address in world.topology.coordinator_addresses() {
            if let Ok(true) = timeout(CALL, tell(&address, order)).await {
                return true;
            }
        }
        sleep(PAUSE).await;
    }
    false
}

async fn tell(address: &str, order: &Order) -> bool {
    let Ok(channel) = baton_proto::channel(Arc::new(TurmoilNet), address) else { return false };
    let mut admin = AdminClient::new(channel);
    let answered = match order.clone() {
        Order::Drain(worker) => admin.order_worker(OrderRequest { worker, order: v1::Order::Drain.into() }).await,
        Order::Limit { requests_open, requests_per_minute } => {
            let name = TENANT.to_string();
            let tenant = Tenant { name, requests_open_max: requests_open, requests_per_minute, ..Tenant::default() };
            admin.set_tenant(tenant).await
        }
    };
    answered.is_ok_and(|answer| matches!(answer.into_inner(), Done { outcome: Some(done::Outcome::Done(_)) }))
}
