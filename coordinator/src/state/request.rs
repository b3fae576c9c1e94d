//! Requests in the ledger: those open, how they are accepted, assigned, moved and ended, and a bounded memory of those
//! that ended.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};

use baton_core::limits::ATTEMPTS_MAX;
use baton_core::planted::{self, Bug};
use baton_core::{Epoch, Lane, NumericsClass, Place, Refused, RequestId, Role};
use serde::{Deserialize, Serialize};

use super::command::{Assigned, Finished, Proposed, Terms};
use super::poison::{Life, Verdict};
use super::tenant::{Charge, Usage};
use super::{EXPIRE_MAX, Ledger, Outcome, REQUESTS_OPEN_MAX, Worker};

/// An accepted request that has not ended. It has exactly one assignment, the one under `epoch`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenRequest {
    pub attempt: u32,
    pub epoch: Epoch,
    pub decode: Place,
    pub prefill: Option<Place>,
    /// Class of the decode worker, so that a later attempt can stay inside it.
    pub numerics: NumericsClass,
    pub tenant: String,
    /// Id of the API key it came with; empty without keys.
    pub key: String,
    pub lane: Lane,
    /// Which gateway serves it now; empty if none said so.
    pub gateway: String,
    /// How long it outlives its gateway, 0 not at all.
    pub resumable_ms: u64,
    /// Prompt plus tokens so far, of the latest attempt.
    pub prompt_tokens: u64,
    pub tokens_max: u64,
    pub accepted_ms: u64,
    /// Ledger time of the latest assignment.
    pub assigned_ms: u64,
    /// Ledger time.
    pub deadline_ms: u64,
    /// Tokens its tenant was charged when it was accepted.
    pub charged: u64,
    pub fingerprint: u128,
    /// Deaths of workers it is blamed for, see `poison`.
    pub strikes: u32,
    /// The latest attempt whose report of deaths has been counted.
    pub reported: u32,
}

impl OpenRequest {
    /// Whether this attempt of this gateway repeats the assignment in force or follows it, so that no two gateways run the
    /// request under one epoch, and none goes on from an assignment that another one has followed.
    pub fn goes_on(&self, attempt: u32, gateway: &str, previous: Epoch) -> bool {
        match attempt == self.attempt {
            true => gateway == self.gateway,
            false => attempt > self.attempt && previous == self.epoch,
        }
    }

    /// Whether no other gateway than this one serves it. Those of an earlier release do not say who they are.
    pub fn is_of(&self, gateway: &str) -> bool {
        gateway.is_empty() || self.gateway.is_empty() || self.gateway == gateway
    }
}

/// The latest ended requests, oldest forgotten first, so that a late repetition is known for what it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedRequests {
    order: VecDeque<RequestId>,
    epochs: BTreeMap<RequestId, Epoch>,
}

impl EndedRequests {
    pub const MAX: usize = 32_768;

    pub fn contains(&self, request: RequestId) -> bool {
        self.epochs.contains_key(&request)
    }

    pub fn len(&self) -> usize {
        self.order.len()
    }

    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    fn insert(&mut self, request: RequestId, epoch: Epoch) {
        let Entry::Vacant(place) = self.epochs.entry(request) else { return };
        place.insert(epoch);
        self.order.push_back(request);
        if self.order.len() > EndedRequests::MAX {
            let oldest = self.order.pop_front().expect("longer than its bound");
            self.epochs.remove(&oldest);
        }
    }
}

/// Where a request goes, and the decode worker's class.
struct Places {
    decode: Place,
    prefill: Option<Place>,
    numerics: NumericsClass,
}

/// What of an open request carries over to its next attempt.
struct Kept {
    accepted_ms: u64,
    deadline_ms: u64,
    charged: u64,
    strikes: u32,
    reported: u32,
}

impl Ledger {
    pub(super) fn assign(&mut self, p: Proposed, epoch: Epoch, terms: Terms) -> Outcome {
        if self.ended.contains(p.request) {
            return Outcome::Ended;
        }
        if let Some(open) = self.open.get(&p.request) {
            if let Terms::After(previous) = terms
                && !open.goes_on(p.attempt, &p.gateway, previous)
            {
                return Outcome::Refused(Refused::Stale);
            }
            if p.attempt == open.attempt && !planted::is(Bug::ApplyTwice) {
                return self.assigned(p.request, open);
            }
            if p.attempt < open.attempt {
                return Outcome::Refused(Refused::Stale);
            }
        }
        if let Verdict::Poisoned = self.blame(&p, terms) {
            self.quarantine(p.fingerprint);
            self.end(p.request, None);
            return Outcome::Refused(Refused::Poisoned);
        }
        if self.quarantined(p.fingerprint, self.time_ms) {
            self.end(p.request, None);
            return Outcome::Refused(Refused::Poisoned);
        }
        if p.attempt > ATTEMPTS_MAX {
            return Outcome::Refused(Refused::Expired);
        }
        let kept = match self.kept(&p) {
            Ok(kept) => kept,
            Err(outcome) => return outcome,
        };
        match self.places(&p) {
            Some(places) => self.grant(p, epoch, kept, places),
            None => Outcome::Misplaced,
        }
    }

    /// What the attempts before leave to this one; a first attempt is checked against every bound instead.
    fn kept(&self, p: &Proposed) -> Result<Kept, Outcome> {
        let now = self.time_ms;
        let kept = match self.open.get(&p.request) {
            Some(open) => Kept {
                accepted_ms: open.accepted_ms,
                deadline_ms: open.deadline_ms,
                charged: open.charged,
                strikes: open.strikes,
                reported: open.reported,
            },
            None => Kept {
                accepted_ms: now,
                deadline_ms: now.saturating_add(p.deadline_ms),
                charged: p.charge().tokens(),
                strikes: 0,
                reported: p.attempt,
            },
        };
        if kept.deadline_ms <= now {
            return Err(Outcome::Refused(Refused::Expired));
        }
        if self.open.contains_key(&p.request) {
            return Ok(kept);
        }
        if self.open.len() >= REQUESTS_OPEN_MAX {
            return Err(Outcome::Refused(Refused::NoCapacity));
        }
        if !p.key.is_empty() && self.keys.get(&p.key).is_none() {
            return Err(Outcome::Refused(Refused::Unknown));
        }
        match self.tenants.get(&p.tenant) {
            Some(_) if planted::is(Bug::QuotaUnchecked) => Ok(kept),
            Some(account) => account.check(&p.charge(), now).map(|()| kept).map_err(Outcome::OverLimit),
            None => Ok(kept),
        }
    }

    /// Where the proposed lives listen, if they are all in force and none has another suspect beside a suspect.
    fn places(&self, p: &Proposed) -> Option<Places> {
        let crowded = |life: &Life| self.is_suspect(p.request) && self.suspected(p.request, life);
        if crowded(&p.decode) || p.prefill.as_ref().is_some_and(crowded) {
            return None;
        }
        let decode = self.lives(&p.decode, Role::Decode)?;
        let prefill = match &p.prefill {
            None => None,
            Some(life) => Some(self.lives(life, Role::Prefill)?.place(&life.0)),
        };
        Some(Places { decode: decode.place(&p.decode.0), prefill, numerics: decode.model.numerics.clone() })
    }

    fn lives(&self, (id, incarnation): &Life, role: Role) -> Option<&Worker> {
        self.workers.get(id).filter(|w| w.lives(*incarnation) && w.role == role)
    }

    fn grant(&mut self, p: Proposed, epoch: Epoch, kept: Kept, places: Places) -> Outcome {
        let Places { decode, prefill, numerics } = places;
        let (request, now, charge) = (p.request, self.time_ms, p.charge());
        let before = self.open.remove(&request);
        match &before {
            None => drop(self.tenants.get_mut(&p.tenant).map(|account| account.accept(&charge, now))),
            Some(open) => self.gateway_leaves(&open.gateway),
        }
        self.gateway_comes(&p.gateway);
        let open = OpenRequest {
            attempt: p.attempt,
            epoch,
            decode,
            prefill,
            numerics,
            tenant: before.map_or(p.tenant, |open| open.tenant),
            key: p.key,
            lane: p.lane,
            gateway: p.gateway,
            resumable_ms: p.resumable_ms,
            prompt_tokens: p.prompt_tokens,
            tokens_max: p.tokens_max,
            accepted_ms: kept.accepted_ms,
            assigned_ms: now,
            deadline_ms: kept.deadline_ms,
            charged: kept.charged,
            fingerprint: p.fingerprint,
            strikes: kept.strikes,
            reported: kept.reported.max(p.attempt),
        };
        let outcome = self.assigned(request, &open);
        self.deadlines.insert((open.deadline_ms, request));
        self.open.insert(request, open);
        outcome
    }

    fn assigned(&self, request: RequestId, open: &OpenRequest) -> Outcome {
        Outcome::Assigned(Box::new(Assigned::new(request, open, self.time_ms)))
    }

    /// Another gateway serves the request from now on.
    pub(super) fn adopt(&mut self, request: RequestId, gateway: String) -> Outcome {
        let Some(open) = self.open.get_mut(&request) else {
            return if self.ended.contains(request) { Outcome::Ended } else { Outcome::Refused(Refused::Unknown) };
        };
        let before = std::mem::replace(&mut open.gateway, gateway.clone());
        self.gateway_leaves(&before);
        self.gateway_comes(&gateway);
        self.assigned(request, &self.open[&request])
    }

    /// Whether a gateway has open requests.
    pub fn serves(&self, gateway: &str) -> bool {
        self.gateways.contains_key(gateway)
    }

    fn gateway_comes(&mut self, gateway: &str) {
        match self.gateways.get_mut(gateway) {
            Some(requests) => *requests += 1,
            None => drop(self.gateways.insert(gateway.to_string(), 1)),
        }
    }

    /// The planted bug: this ledger without what it knows of ended requests.
    pub(crate) fn without_ended(&self) -> Ledger {
        Ledger { ended: EndedRequests::default(), ..self.clone() }
    }

    fn gateway_leaves(&mut self, gateway: &str) {
        if let Some(requests) = self.gateways.get_mut(gateway) {
            *requests -= 1;
            if *requests == 0 {
                self.gateways.remove(gateway);
            }
        }
    }

    pub(super) fn finish(&mut self, finished: Finished) -> Outcome {
        let Finished { request, epoch, .. } = finished;
        let used = Usage {
            requests: 1,
            prompt_tokens: finished.prompt_tokens,
            cached_tokens: finished.cached_tokens,
            generated_tokens: finished.generated_tokens,
        };
        match self.open.get(&request) {
            Some(open) if epoch == open.epoch => self.end(request, Some(used)),
            Some(_) if epoch == Epoch(0) => self.end(request, None),
            Some(_) => return Outcome::Refused(Refused::Stale),
            None if epoch == Epoch(0) => self.ended.insert(request, epoch),
            None => {}
        }
        Outcome::Ended
    }

    pub(super) fn expire(&mut self) -> Outcome {
        let due = self.deadlines.iter().take_while(|(at, _)| *at <= self.time_ms);
        let requests: Vec<RequestId> = due.take(EXPIRE_MAX).map(|(_, request)| *request).collect();
        requests.iter().for_each(|request| self.end(*request, None));
        Outcome::Expired { requests }
    }

    /// Ends an open request once; it is billed here and nowhere else. `used`: None if nobody knows.
    fn end(&mut self, request: RequestId, used: Option<Usage>) {
        let Some(open) = self.open.remove(&request) else { return };
        self.deadlines.remove(&(open.deadline_ms, request));
        self.gateway_leaves(&open.gateway);
        self.unsuspect(request);
        if let Some(account) = self.tenants.get_mut(&open.tenant) {
            account.settle(open.charged, open.prompt_tokens, used, self.time_ms);
        }
        self.ended.insert(request, open.epoch);
    }
}

impl Proposed {
    /// What the tenant's account is asked for.
    pub fn charge(&self) -> Charge {
        Charge { prompt_tokens: self.prompt_tokens, tokens_max: self.tokens_max, choices: u64::from(self.choices) }
    }
}
