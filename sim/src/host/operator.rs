//! The operator of a run: passes orders to whichever coordinator leads, as `baton drain`, `baton tenant` and
//! `baton coordinator` do.

use std::sync::Arc;
use std::time::Duration;

use baton_core::{Refused, Role};
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::{self, Done, OrderRequest, Tenant, done};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::World;
use crate::net::TurmoilNet;
use crate::topology::CLIENTS;

const CALL: Duration = Duration::from_millis(1_500);
/// Longer than between a worker's heartbeats.
const HEARD: Duration = Duration::from_millis(600);
const PAUSE: Duration = Duration::from_millis(100);
/// Times all coordinators are asked before an operator gives up a drain or a leader.
const ROUNDS_DRAIN: usize = 20;
const ROUNDS: usize = 600;
/// Whose requests are those of a cluster without keys.
const TENANT: &str = "default";

/// What an operator wants done.
#[derive(Clone, Debug)]
pub enum Order {
    Worker(String, v1::Order),
    /// The worker shall have the role, however long that takes.
    Role(String, Role),
    /// Which coordinator shall lead.
    Lead(String),
    /// Which coordinator shall leave the group.
    Remove(String),
    /// Limits of the clients' tenant; 0 is none.
    Limit {
        requests_open: u64,
        requests_per_minute: u64,
    },
}

/// Carries out one order after the other; a coordinator that shall leave is another operator's work, because it can take
/// as long as there are faults.
pub async fn run(world: World, mut orders: mpsc::Receiver<Order>) {
    let mut others = JoinSet::new();
    while let Some(order) = orders.recv().await {
        match order {
            Order::Remove(_) => drop(others.spawn(see_to(world.clone(), order))),
            _ => see_to(world.clone(), order).await,
        }
    }
}

async fn see_to(world: World, order: Order) {
    let done = carry_out(&world, &order).await;
    let what = if done { "is taken" } else { "is not taken by any coordinator" };
    world.record.note(CLIENTS, format!("the operator's {order:?} {what}"));
    world.orders.send_modify(|open| *open -= 1);
}

async fn carry_out(world: &World, order: &Order) -> bool {
    let rounds =
        if matches!(order, Order::Worker(_, v1::Order::Drain) | Order::Lead(_)) { ROUNDS_DRAIN } else { ROUNDS };
    for _ in 0..rounds {
        for address in world.coordinator_addresses() {
            if let Ok(true) = timeout(CALL, tell(world, &address, order)).await {
                return true;
            }
        }
        sleep(PAUSE).await;
    }
    false
}

async fn tell(world: &World, address: &str, order: &Order) -> bool {
    let Ok(channel) = baton_proto::channel(Arc::new(TurmoilNet), address) else { return false };
    let mut admin = AdminClient::new(channel);
    let answered = match order.clone() {
        Order::Worker(worker, order) => admin.order_worker(OrderRequest { worker, order: order.into() }).await,
        Order::Role(worker, role) => {
            let order = if role == Role::Prefill { v1::Order::BecomePrefill } else { v1::Order::BecomeDecode };
            let ordered = OrderRequest { worker: worker.clone(), order: order.into() };
            let Ok(answer) = admin.order_worker(ordered).await else { return false };
            // A worker that follows another order hears this one only afterwards.
            sleep(HEARD).await;
            let has_it = world.seen().roles.get(&worker) == Some(&role) && !world.follows_an_order(&worker);
            return has_it && matches!(answer.into_inner().outcome, Some(done::Outcome::Done(_)));
        }
        Order::Lead(host) => {
            let node = world.seen().numbers.get(&host).copied().unwrap_or(0);
            admin.transfer_leader(v1::NodeNumber { node }).await
        }
        Order::Remove(host) => {
            if !world.seen().leaving.contains(&host) {
                return true;
            }
            // Whoever is about to join has no number yet.
            let Some(node) = world.seen().numbers.get(&host).copied() else { return false };
            let Ok(answer) = admin.remove_node(v1::NodeNumber { node }).await else { return false };
            return match answer.into_inner().outcome {
                Some(done::Outcome::Done(_)) => true,
                // It has left meanwhile.
                Some(done::Outcome::Refused(refusal)) => baton_proto::convert::refused(&refusal) == Refused::Unknown,
                None => false,
            };
        }
        Order::Limit { requests_open, requests_per_minute } => {
            let name = TENANT.to_string();
            let tenant = Tenant { name, requests_open_max: requests_open, requests_per_minute, ..Tenant::default() };
            admin.set_tenant(tenant).await
        }
    };
    answered.is_ok_and(|answer| matches!(answer.into_inner(), Done { outcome: Some(done::Outcome::Done(_)) }))
}
