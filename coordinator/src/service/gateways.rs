//! Gateways that are lost, and what they leave behind: requests that may outlive them go on for as long as they asked,
//! and another gateway may take them over; the others are ended.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use baton_core::limits::WORKER_LEASE_MS;
use baton_core::planted::{self, Bug};
use baton_core::{Epoch, Refused, RequestId};
use baton_proto::convert::{refusal, request_id};
use baton_proto::v1;
use tokio::time::Instant;

use super::assign::granted;
use super::lead::Leading;
use super::roster::GATEWAYS_MAX;
use super::{Refusal, Shared, unexpected};
use crate::state::{Command, Finished, OpenRequest, Outcome};

/// A gateway that has neither sent a heartbeat nor asked for anything in so long is lost.
const GATEWAY_LEASE: Duration = Duration::from_millis(WORKER_LEASE_MS);
/// Requests ended in one round; the next one goes on.
const ENDED_MAX: usize = 2048;

/// When each life of a gateway was last heard of: by a heartbeat, or because it asked for an assignment.
#[derive(Default)]
pub(super) struct Asking(Mutex<BTreeMap<String, Instant>>);

impl Asking {
    pub(super) fn heard(&self, gateway: &str, now: Instant) {
        let mut asking = self.0.lock().expect("asking lock");
        match asking.get_mut(gateway) {
            Some(at) => *at = now,
            None => {
                if asking.len() >= GATEWAYS_MAX {
                    asking.retain(|_, at| *at + GATEWAY_LEASE > now);
                }
                asking.insert(gateway.to_string(), now);
            }
        }
    }

    /// Gateways that have asked within their lease.
    pub(super) fn count(&self, now: Instant) -> usize {
        let asking = self.0.lock().expect("asking lock");
        asking.values().filter(|at| **at + GATEWAY_LEASE > now).count()
    }
}

impl Shared {
    /// Ends what lost gateways left behind and nobody may resume any more. A new leader gives each a whole lease.
    pub(super) fn end_orphans(&self, leading: &Leading, now: Instant) {
        let silent = self.lost_gateways(leading, now);
        if silent.is_empty() || planted::is(Bug::OrphansKept) {
            return;
        }
        let ledger = self.node.ledger();
        let orphan = |open: &OpenRequest| {
            let outlives = GATEWAY_LEASE + Duration::from_millis(open.resumable_ms);
            silent.get(&open.gateway).is_some_and(|silent| *silent > outlives)
        };
        let orphans = ledger.open().filter(|(_, open)| orphan(open)).map(|(request, _)| *request);
        let orphans: Vec<RequestId> = orphans.take(ENDED_MAX).collect();
        drop(ledger);
        if !orphans.is_empty() {
            tracing::warn!(requests = orphans.len(), "their gateway is lost: ended");
            metrics::counter!("baton_coordinator_orphans_total").increment(orphans.len() as u64);
        }
        orphans.into_iter().for_each(|request| self.proposer.submit_unheard(Command::Finish(cancelled(request))));
    }

    /// Gateways with open requests that are silent for longer than their lease, and for how long.
    fn lost_gateways(&self, leading: &Leading, now: Instant) -> BTreeMap<String, Duration> {
        let ledger = self.node.ledger();
        let asking = self.asking.0.lock().expect("asking lock");
        let silent = |id: &String| {
            let heard = asking.get(id).copied().unwrap_or(leading.since);
            now.saturating_duration_since(heard.max(leading.since))
        };
        let named = ledger.gateways().filter(|id| !id.is_empty());
        named.map(|id| (id.clone(), silent(id))).filter(|(_, silent)| *silent > GATEWAY_LEASE).collect()
    }

    /// Where a request is served now. The gateway that asks, if it says its name, serves it from then on.
    pub(super) async fn locate(&self, wire: v1::LocateRequest) -> Result<v1::Assignment, Refusal> {
        self.of_cluster("locate", &wire.cluster)?;
        self.leading().await?;
        self.confirmed().await?;
        let unknown =
            || refusal(Refused::Unknown, format!("no open request of this tenant is called {}", wire.request));
        let request = request_id(&wire.request).map_err(|_| unknown())?;
        let now_ms = self.lead.stamp().unwrap_or(0);
        let (attempt, own) = match self.node.ledger().request(request) {
            Some(open) => (open.attempt, open.tenant == wire.tenant),
            None => return Err(unknown()),
        };
        if !own {
            return Err(unknown());
        }
        if wire.gateway.is_empty() {
            let assigned = self.node.ledger().assignment(request, attempt, now_ms);
            return assigned.map(|assigned| granted(assigned, self.cluster())).ok_or_else(unknown);
        }
        self.asking.heard(&wire.gateway, Instant::now());
        match self.submit(Command::Adopt { request, gateway: wire.gateway.clone() }).await? {
            Outcome::Assigned(assigned) => Ok(granted(*assigned, self.cluster())),
            Outcome::Ended | Outcome::Refused(_) => Err(unknown()),
            other => Err(unexpected(&other)),
        }
    }
}

/// The end of a request whose usage nobody can tell.
fn cancelled(request: RequestId) -> Finished {
    Finished {
        request,
        epoch: Epoch(0),
        outcome: "cancelled".into(),
        prompt_tokens: 0,
        cached_tokens: 0,
        generated_tokens: 0,
    }
}
