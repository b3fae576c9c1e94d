//! This gateway's own place in the cluster's view: it registers and is heard of regularly. Soft: nothing depends on it
//! but what people see.

use std::time::Duration;

use baton_core::{Refused, limits};
use baton_proto::v1::{HeartbeatRequest, LeaveRequest, Load, Member, RegisterRequest, heartbeat_reply};
use baton_proto::{WIRE_VERSION, convert};

use crate::coordinators::{Coordinators, deadline};

const HEARTBEAT: Duration = Duration::from_millis(limits::HEARTBEAT_MS);
const REGISTER_PAUSE: Duration = Duration::from_millis(500);

/// Registers and sends heartbeats, for ever; registers again when it has been forgotten.
pub(crate) async fn announce(
    coordinators: &Coordinators,
    member: Member,
    process_key: String,
    running: impl Fn() -> usize,
) {
    loop {
        let request = RegisterRequest {
            cluster: String::new(),
            wire_version: WIRE_VERSION,
            member: Some(member.clone()),
            process_key: process_key.clone(),
        };
        match coordinators.register(request).await {
            Ok(registered) => {
                let member = Member { incarnation: registered.incarnation, ..member.clone() };
                beat_all(coordinators, &member, &running).await;
            }
            Err(refusal) => tracing::debug!(%refusal, "not registered yet"),
        }
        tokio::time::sleep(REGISTER_PAUSE).await;
    }
}

/// Says goodbye to every coordinator that listens.
pub(crate) async fn leave(coordinators: &Coordinators, id: &str) {
    let clients = coordinators.addresses().iter().filter_map(|address| coordinators.client(address));
    let leave = |mut client: crate::coordinators::Client| async move {
        let request = LeaveRequest { id: id.to_string(), incarnation: 0 };
        deadline(client.leave(request)).await.is_ok()
    };
    futures::future::join_all(clients.map(leave)).await;
}

/// One loop per coordinator, so that a dead one does not slow the others. Returns when any of them asks for a new
/// registration.
async fn beat_all(coordinators: &Coordinators, member: &Member, running: &impl Fn() -> usize) {
    let loops = coordinators.addresses().iter().map(|address| Box::pin(beat(coordinators, address, member, running)));
    let loops: Vec<_> = loops.collect();
    if !loops.is_empty() {
        futures::future::select_all(loops).await;
    }
}

async fn beat(coordinators: &Coordinators, address: &str, member: &Member, running: &impl Fn() -> usize) {
    let Some(mut client) = coordinators.client(address) else { return std::future::pending().await };
    for sequence in 1.. {
        let request = HeartbeatRequest {
            id: member.id.clone(),
            incarnation: member.incarnation,
            sequence,
            load: Some(Load { sequences_running: running() as u32, ..Default::default() }),
            member: Some(member.clone()),
        };
        if let Ok(reply) = deadline(client.heartbeat(request)).await
            && let Some(heartbeat_reply::Outcome::Refused(refusal)) = reply.outcome
            && convert::refused(&refusal) == Refused::Stale
        {
            return;
        }
        tokio::time::sleep(HEARTBEAT).await;
    }
}
