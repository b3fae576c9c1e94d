//! Gateways that are lost, and what they leave behind: requests that may outlive them go on for as long as they asked,
//! and another gateway may take them over; the others are ended.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_core::limits::WORKER_LEASE_MS;
use baton_core::planted::{self, Bug};
use baton_core::{Epoch, Refused, RequestId};
use baton_proto::convert::{refusal, request_id};
use baton_proto::v1;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::assign::granted;
use super::lead::Leading;
use super::roster::GATEWAYS_MAX;
use super::{Refusal, Shared, unexpected};
use crate::state::{Command, Finished, Ledger, OpenRequest, Outcome};

/// A gateway that has neither sent a heartbeat nor asked for anything in so long is lost.
const GATEWAY_LEASE: Duration = Duration::from_millis(WORKER_LEASE_MS);
/// Requests ended in one round; the next one goes on.
const ENDED_MAX: usize = 2048;

/// Lives of gateways remembered: those that live, and those that left requests behind.
const LIVES_MAX: usize = 4 * GATEWAYS_MAX;

/// When each life of a gateway was last heard of: by a heartbeat, or because it asked for an assignment.
#[derive(Default)]
pub(super) struct Asking(Mutex<BTreeMap<String, Instant>>);

impl Asking {
    /// False: as many are remembered as may be, and none of them can be forgotten. Whoever has open requests is not: since
    /// when it is silent decides how long they go on.
    pub(super) fn heard(&self, gateway: &str, ledger: &Ledger, now: Instant) -> bool {
        let mut asking = self.0.lock().expect("asking lock");
        if let Some(at) = asking.get_mut(gateway) {
            *at = now;
            return true;
        }
        if asking.len() >= LIVES_MAX {
            asking.retain(|life, at| *at + GATEWAY_LEASE > now || ledger.serves(life));
        }
        let room = asking.len() < LIVES_MAX;
        if room {
            asking.insert(gateway.to_string(), now);
        }
        room
    }

    /// Gateways that have asked within their lease.
    pub(super) fn count(&self, now: Instant) -> usize {
        let asking = self.0.lock().expect("asking lock");
        asking.values().filter(|at| **at + GATEWAY_LEASE > now).count()
    }
}

/// Requests of which a later attempt, an adoption or an end is being proposed: one at a time, so that whose request it is
/// does not change between the look that allows a proposal and the ledger's taking it.
#[derive(Default)]
pub(super) struct Moving(Arc<Moves>);

#[derive(Default)]
struct Moves {
    requests: Mutex<BTreeSet<RequestId>>,
    freed: Notify,
}

/// The right to move one request, until dropped.
pub(super) struct Move {
    moves: Arc<Moves>,
    request: RequestId,
}

impl Moving {
    /// None while another move of the request is under way.
    pub(super) fn begin(&self, request: RequestId) -> Option<Move> {
        let begun = self.0.requests.lock().unwrap_or_else(PoisonError::into_inner).insert(request);
        begun.then(|| Move { moves: self.0.clone(), request })
    }

    /// Waits for the request's other moves.
    pub(super) async fn turn(&self, request: RequestId) -> Move {
        loop {
            let freed = self.0.freed.notified();
            match self.begin(request) {
                Some(begun) => return begun,
                None => freed.await,
            }
        }
    }

    /// Waits for the other moves of them all, in one order for everybody, so that nobody waits in a circle.
    pub(super) async fn turns(&self, requests: BTreeSet<RequestId>) -> Vec<Move> {
        let mut begun = Vec::with_capacity(requests.len());
        for request in requests {
            begun.push(self.turn(request).await);
        }
        begun
    }
}

impl Drop for Move {
    fn drop(&mut self) {
        self.moves.requests.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.request);
        self.moves.freed.notify_waiters();
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
        let revoked = || refusal(Refused::Fenced, "the API key has been revoked");
        if !wire.key.is_empty() && self.node.ledger().keys().get(&wire.key).is_none() {
            return Err(revoked());
        }
        // Gateways of earlier releases name neither cluster nor key.
        if wire.key.is_empty() && !wire.cluster.is_empty() && !self.node.ledger().keys().open() {
            return Err(refusal(Refused::Fenced, "the cluster asks for an API key, and none is named"));
        }
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
        if !self.asking.heard(&wire.gateway, &self.node.ledger(), Instant::now()) {
            return Err(full());
        }
        let _moving = self.moving.turn(request).await;
        match self.submit(Command::Adopt { request, gateway: wire.gateway.clone() }).await? {
            Outcome::Assigned(assigned) => Ok(granted(*assigned, self.cluster())),
            Outcome::Ended | Outcome::Refused(_) => Err(unknown()),
            other => Err(unexpected(&other)),
        }
    }
}

/// To a gateway that cannot be remembered.
pub(super) fn full() -> Refusal {
    refusal(Refused::NoCapacity, format!("{LIVES_MAX} gateways live or have left requests behind"))
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

#[cfg(test)]
mod tests {
    use baton_core::{Incarnation, Lane, WorkerId};

    use super::*;
    use crate::state::{Batch, Model, Proposed, Registration};

    /// A ledger with one open request of `gateway`.
    fn ledger(gateway: &str) -> Ledger {
        let worker = WorkerId("d".into());
        let registration = Registration {
            worker: worker.clone(),
            role: baton_core::Role::Decode,
            address: "d:1".into(),
            pid: 1,
            version: String::new(),
            model: Model::default(),
            process_key: "k".into(),
        };
        let mut ledger = Ledger::default();
        let registered = ledger.apply(1, Batch { time_ms: 0, commands: vec![Command::Register(registration)] });
        let [Outcome::Registered { incarnation }] = registered[..] else { panic!("{registered:?}") };
        let proposed = Proposed {
            request: RequestId(1),
            attempt: 1,
            tenant: String::new(),
            lane: Lane::Interactive,
            gateway: gateway.into(),
            prompt_tokens: 10,
            tokens_max: 5,
            choices: 1,
            deadline_ms: 50,
            decode: (worker, Incarnation(incarnation.0)),
            prefill: None,
            key: String::new(),
            resumable_ms: 300_000,
            fingerprint: 0,
            killed: vec![],
        };
        let assign = Command::AssignAfter { proposed: Box::new(proposed), previous: Epoch(0) };
        ledger.apply(2, Batch { time_ms: 0, commands: vec![assign] });
        assert!(ledger.serves(gateway));
        ledger
    }

    /// Goal: how long a lost gateway is silent is known however many others come and go, for what it left behind may go on
    /// for minutes; and what is remembered is bounded. Method: far more lives than may be remembered.
    #[tokio::test]
    async fn a_gateway_with_open_requests_is_not_forgotten() {
        let (ledger, asking, start) = (ledger("lost"), Asking::default(), Instant::now());
        assert!(asking.heard("lost", &ledger, start));
        for life in 1..LIVES_MAX {
            assert!(asking.heard(&format!("g/{life}"), &ledger, start), "{life}");
        }
        assert!(!asking.heard("one more", &ledger, start), "all of them live");
        assert!(asking.heard("g/1", &ledger, start), "who is known is heard on");
        let later = start + 2 * GATEWAY_LEASE;
        assert!(asking.heard("one more", &ledger, later), "there is room for those that live");
        let remembered = asking.0.lock().unwrap();
        assert_eq!(remembered.get("lost"), Some(&start));
        assert_eq!(remembered.len(), 2);
    }
}
