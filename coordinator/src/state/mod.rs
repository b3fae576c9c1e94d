//! The ledger: a pure state machine over stamped commands. No IO, no clock, no randomness, ordered maps only, so that
//! every node that applies the same entries holds the same bytes.

mod codec;
mod command;
mod request;
mod worker;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use baton_core::limits::ATTEMPTS_MAX;
use baton_core::{Epoch, Incarnation, NumericsClass, Place, Refused, RequestId, Role, WorkerId};
use serde::{Deserialize, Serialize};

pub use codec::{CodecError, VERSION, decode_batch, decode_ledger, encode_batch, encode_ledger, hash};
pub use command::{Assigned, Batch, Command, Finished, Model, Outcome, Proposed, Registration};
pub use request::{EndedRequests, OpenRequest};
pub use worker::Worker;

/// Commands in one entry at most. Numbers granted from the log are `index * COMMANDS_MAX + position`.
pub const COMMANDS_MAX: usize = 1 << 12;
/// Requests open at a time in the whole cluster; more are refused.
pub const REQUESTS_OPEN_MAX: usize = 1 << 16;
/// Fenced workers remembered, for `status`; the longest fenced is forgotten first.
pub const FENCED_MAX: usize = 256;
/// Live workers at a time; more are refused.
pub const WORKERS_MAX: usize = 4096;
/// Requests one Expire ends at most.
pub const EXPIRE_MAX: usize = 4096;

/// The replicated record of workers, accepted requests and assignments.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    cluster: String,
    /// Index of the last entry applied.
    index: u64,
    /// The largest stamp applied; never falls, whoever leads.
    time_ms: u64,
    workers: BTreeMap<WorkerId, Worker>,
    open: BTreeMap<RequestId, OpenRequest>,
    deadlines: BTreeSet<(u64, RequestId)>,
    ended: EndedRequests,
}

impl Ledger {
    /// The cluster's name; empty before the first leader founded it.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    pub fn index(&self) -> u64 {
        self.index
    }

    pub fn time_ms(&self) -> u64 {
        self.time_ms
    }

    pub fn workers(&self) -> impl Iterator<Item = (&WorkerId, &Worker)> {
        self.workers.iter()
    }

    pub fn worker(&self, id: &WorkerId) -> Option<&Worker> {
        self.workers.get(id)
    }

    pub fn open(&self) -> impl Iterator<Item = (&RequestId, &OpenRequest)> {
        self.open.iter()
    }

    pub fn requests_open(&self) -> usize {
        self.open.len()
    }

    pub fn request(&self, id: RequestId) -> Option<&OpenRequest> {
        self.open.get(&id)
    }

    /// The assignment in force, if it is that of this attempt.
    pub fn assignment(&self, request: RequestId, attempt: u32, now_ms: u64) -> Option<Assigned> {
        let open = self.open.get(&request).filter(|open| open.attempt == attempt)?;
        Some(Assigned::new(request, open, now_ms))
    }

    pub fn has_ended(&self, id: RequestId) -> bool {
        self.ended.contains(id)
    }

    /// Ledger time of the earliest deadline of an open request.
    pub fn deadline_next(&self) -> Option<u64> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Applies one entry and says what became of each command, in order.
    ///
    /// # Panics
    /// If the batch is longer than COMMANDS_MAX, which no proposer makes.
    pub fn apply(&mut self, index: u64, batch: Batch) -> Vec<Outcome> {
        assert!(batch.commands.len() <= COMMANDS_MAX, "an entry of {} commands", batch.commands.len());
        self.index = index;
        self.time_ms = self.time_ms.max(batch.time_ms);
        let first = index * COMMANDS_MAX as u64;
        let numbered = batch.commands.into_iter().zip(first..);
        numbered.map(|(command, number)| self.apply_one(command, number)).collect()
    }

    /// `number` is unique to this command and larger than that of every command before it.
    fn apply_one(&mut self, command: Command, number: u64) -> Outcome {
        match command {
            Command::Found { cluster } => self.found(cluster),
            Command::Register(registration) => self.register(registration, Incarnation(number)),
            Command::Fence { worker, incarnation } => self.fence(&worker, incarnation),
            Command::Leave { worker, incarnation } => self.leave(&worker, incarnation),
            Command::Assign(proposed) => self.assign(*proposed, Epoch(number)),
            Command::Finish(finished) => self.finish(finished),
            Command::Expire => self.expire(),
        }
    }

    fn found(&mut self, cluster: String) -> Outcome {
        if self.cluster.is_empty() {
            self.cluster = cluster;
        }
        Outcome::Founded { cluster: self.cluster.clone() }
    }

    fn register(&mut self, registration: Registration, incarnation: Incarnation) -> Outcome {
        if !matches!(registration.role, Role::Prefill | Role::Decode) {
            return Outcome::Refused(Refused::Incompatible);
        }
        match self.workers.get(&registration.worker) {
            Some(known) if known.live && known.process_key == registration.process_key => {
                return Outcome::Registered { incarnation: known.incarnation };
            }
            None if self.workers.values().filter(|w| w.live).count() >= WORKERS_MAX => {
                return Outcome::Refused(Refused::NoCapacity);
            }
            _ => {}
        }
        let id = registration.worker.clone();
        self.workers.insert(id, Worker::new(registration, incarnation, self.time_ms));
        Outcome::Registered { incarnation }
    }

    fn fence(&mut self, id: &WorkerId, incarnation: Incarnation) -> Outcome {
        let now = self.time_ms;
        if let Some(worker) = self.workers.get_mut(id).filter(|w| w.lives(incarnation)) {
            worker.live = false;
            worker.since_ms = now;
            self.forget_fenced();
        }
        Outcome::Gone
    }

    fn forget_fenced(&mut self) {
        let fenced = self.workers.iter().filter(|(_, w)| !w.live);
        if fenced.clone().count() <= FENCED_MAX {
            return;
        }
        let oldest = fenced.min_by_key(|(id, w)| (w.since_ms, *id)).map(|(id, _)| id.clone());
        oldest.map(|id| self.workers.remove(&id));
    }

    fn leave(&mut self, id: &WorkerId, incarnation: Incarnation) -> Outcome {
        if self.workers.get(id).is_some_and(|w| w.incarnation == incarnation) {
            self.workers.remove(id);
        }
        Outcome::Gone
    }

    fn assign(&mut self, p: Proposed, epoch: Epoch) -> Outcome {
        if self.ended.contains(p.request) {
            return Outcome::Ended;
        }
        let before = self.open.get(&p.request);
        if let Some(open) = before {
            if p.attempt == open.attempt {
                return self.assigned(p.request, open);
            }
            if p.attempt < open.attempt {
                return Outcome::Refused(Refused::Stale);
            }
        }
        if p.attempt > ATTEMPTS_MAX {
            return Outcome::Refused(Refused::Expired);
        }
        if before.is_none() && self.open.len() >= REQUESTS_OPEN_MAX {
            return Outcome::Refused(Refused::NoCapacity);
        }
        let accepted_ms = before.map_or(self.time_ms, |open| open.accepted_ms);
        let deadline_ms = before.map_or(self.time_ms.saturating_add(p.deadline_ms), |open| open.deadline_ms);
        if deadline_ms <= self.time_ms {
            return Outcome::Refused(Refused::Expired);
        }
        let Some((decode, numerics)) = self.lives(&p.decode, Role::Decode) else {
            return Outcome::Misplaced;
        };
        let prefill = match &p.prefill {
            None => None,
            Some(life) => match self.lives(life, Role::Prefill) {
                Some((place, _)) => Some(place),
                None => return Outcome::Misplaced,
            },
        };
        let request = p.request;
        let open = OpenRequest {
            attempt: p.attempt,
            epoch,
            decode,
            prefill,
            numerics,
            tenant: p.tenant,
            lane: p.lane,
            gateway: p.gateway,
            prompt_tokens: p.prompt_tokens,
            tokens_max: p.tokens_max,
            accepted_ms,
            deadline_ms,
            explanation: p.explanation,
        };
        let outcome = self.assigned(request, &open);
        self.deadlines.insert((deadline_ms, request));
        self.open.insert(request, open);
        outcome
    }

    fn lives(&self, (id, incarnation): &(WorkerId, Incarnation), role: Role) -> Option<(Place, NumericsClass)> {
        let worker = self.workers.get(id).filter(|w| w.lives(*incarnation) && w.role == role)?;
        Some((worker.place(id), worker.model.numerics.clone()))
    }

    fn assigned(&self, request: RequestId, open: &OpenRequest) -> Outcome {
        Outcome::Assigned(Box::new(Assigned::new(request, open, self.time_ms)))
    }

    fn finish(&mut self, finished: Finished) -> Outcome {
        let Finished { request, epoch, .. } = finished;
        match self.open.get(&request) {
            Some(open) if epoch == open.epoch || epoch == Epoch(0) => self.end(request),
            Some(_) => return Outcome::Refused(Refused::Stale),
            None if epoch == Epoch(0) => self.ended.insert(request, epoch),
            None => {}
        }
        Outcome::Ended
    }

    fn expire(&mut self) -> Outcome {
        let due = self.deadlines.iter().take_while(|(at, _)| *at <= self.time_ms);
        let requests: Vec<RequestId> = due.take(EXPIRE_MAX).map(|(_, request)| *request).collect();
        requests.iter().for_each(|request| self.end(*request));
        Outcome::Expired { requests }
    }

    fn end(&mut self, request: RequestId) {
        if let Some(open) = self.open.remove(&request) {
            self.deadlines.remove(&(open.deadline_ms, request));
            self.ended.insert(request, open.epoch);
        }
    }
}
