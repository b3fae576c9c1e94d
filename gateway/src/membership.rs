//! This gateway's own place in the cluster's view: it registers and is heard of regularly. Soft: nothing depends on it
//! but what people see.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_core::{Refused, limits};
use baton_proto::v1::heartbeat_reply::Outcome;
use baton_proto::v1::{HeartbeatRequest, LeaveRequest, Load, Member, RegisterRequest};
use baton_proto::{Beats, WIRE_VERSION, convert};

use crate::coordinators::{Coordinators, deadline, in_time};

const HEARTBEAT: Duration = Duration::from_millis(limits::HEARTBEAT_MS);
const REGISTER_PAUSE: Duration = Duration::from_millis(500);
/// After a coordinator of another cluster has answered.
const FOREIGN_PAUSE: Duration = Duration::from_secs(2);

/// Registers and sends heartbeats, for ever; registers again when it has been forgotten, in the cluster that it was in
/// before and in no other.
pub(crate) async fn announce(
    coordinators: &Coordinators,
    member: Member,
    process_key: String,
    running: impl Fn() -> usize,
) {
    loop {
        let request = RegisterRequest {
            cluster: coordinators.cluster(),
            wire_version: WIRE_VERSION,
            member: Some(member.clone()),
            process_key: process_key.clone(),
        };
        match coordinators.register(request).await {
            Ok(registered) => {
                coordinators.belong(&registered.cluster);
                beat_all(coordinators, &member, &running).await;
            }
            Err(refusal) if refusal.reason == Refused::Incompatible => {
                tracing::error!(%refusal, "this gateway is not wanted");
            }
            Err(refusal) => tracing::debug!(%refusal, "not registered yet"),
        }
        tokio::time::sleep(REGISTER_PAUSE).await;
    }
}

/// Says goodbye to every coordinator that listens.
pub(crate) async fn leave(coordinators: &Coordinators, id: &str) {
    let addresses = coordinators.addresses();
    let clients = addresses.iter().filter_map(|address| coordinators.client(address));
    let leave = |mut client: crate::coordinators::Client| async move {
        let request = LeaveRequest { id: id.to_string(), incarnation: 0, cluster: coordinators.cluster() };
        deadline(client.leave(request)).await.is_ok()
    };
    futures::future::join_all(clients.map(leave)).await;
}

/// Heartbeats to every coordinator there is, until one of them asks for a new registration.
async fn beat_all(coordinators: &Coordinators, member: &Member, running: &impl Fn() -> usize) {
    let mut members = coordinators.watch_members();
    let sequence = AtomicU64::new(0);
    loop {
        members.mark_unchanged();
        let addresses = coordinators.addresses();
        // One loop per coordinator, so that a dead one does not slow the others.
        let loops = addresses.iter().map(|a| Box::pin(beat(coordinators, a, member, &sequence, running)));
        let loops: Vec<_> = loops.collect();
        tokio::select! {
            _ = futures::future::select_all(loops) => return,
            changed = members.changed() => if changed.is_err() { return },
        }
    }
}

async fn beat(
    coordinators: &Coordinators,
    address: &str,
    member: &Member,
    sequence: &AtomicU64,
    running: &impl Fn() -> usize,
) {
    let Some(client) = coordinators.client(address) else { return std::future::pending().await };
    let mut beats = Beats::new(client);
    loop {
        let request = HeartbeatRequest {
            id: member.id.clone(),
            incarnation: member.incarnation,
            sequence: sequence.fetch_add(1, Ordering::Relaxed) + 1,
            load: Some(Load { sequences_running: running() as u32, ..Default::default() }),
            member: Some(member.clone()),
            cluster: coordinators.cluster(),
            ..HeartbeatRequest::default()
        };
        match in_time(beats.tell(request)).await.ok().and_then(|reply| reply.outcome) {
            Some(Outcome::Refused(refusal)) if convert::refused(&refusal) == Refused::Stale => return,
            Some(Outcome::Refused(refusal)) if convert::refused(&refusal) == Refused::Foreign => {
                tracing::error!(coordinator = address, detail = refusal.detail, "not a coordinator of this cluster");
                tokio::time::sleep(FOREIGN_PAUSE).await;
            }
            Some(Outcome::Accepted(accepted)) if accepted.leader => coordinators.learn(accepted.coordinators),
            _ => {}
        }
        tokio::time::sleep(HEARTBEAT).await;
    }
}
