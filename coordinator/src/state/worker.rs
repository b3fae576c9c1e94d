//! A worker as the ledger knows it: its latest life, whether that is live, and what is wanted of it.

use baton_core::planted::{self, Bug};
use baton_core::{Incarnation, Place, Refused, Role, WorkerId};
use serde::{Deserialize, Serialize};

use super::command::{Model, Order, Registration};
use super::{FENCED_MAX, Ledger, Outcome, WORKERS_MAX};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    pub role: Role,
    pub address: String,
    pub pid: u32,
    pub version: String,
    pub model: Model,
    pub incarnation: Incarnation,
    pub process_key: String,
    /// False once fenced; only a new registration, with a new incarnation, makes it true again.
    pub live: bool,
    /// Ledger time at which `live` last changed.
    pub since_ms: u64,
    /// Of this life; the next one begins with Serve.
    pub order: Order,
}

impl Worker {
    fn new(r: Registration, incarnation: Incarnation, since_ms: u64) -> Worker {
        Worker {
            role: r.role,
            address: r.address,
            pid: r.pid,
            version: r.version,
            model: r.model,
            incarnation,
            process_key: r.process_key,
            live: true,
            since_ms,
            order: Order::Serve,
        }
    }

    /// Whether `incarnation` is this worker's life in force.
    pub fn lives(&self, incarnation: Incarnation) -> bool {
        self.live && self.incarnation == incarnation
    }

    pub fn place(&self, id: &WorkerId) -> Place {
        Place { worker: id.clone(), incarnation: self.incarnation, address: self.address.clone() }
    }

    /// What is wanted of this life. An order to take the role it has is none: it may have come while the worker was on its
    /// way there, or take back another one that the worker had not heard yet.
    pub fn wanted(&self) -> Order {
        match (self.order, self.role) {
            (Order::BecomePrefill, Role::Prefill) | (Order::BecomeDecode, Role::Decode) => Order::Serve,
            (order, _) => order,
        }
    }

    /// Repeating a registration means the same process in the same role.
    fn is(&self, r: &Registration) -> bool {
        self.live && self.process_key == r.process_key && self.role == r.role
    }
}

impl Ledger {
    pub(super) fn register(&mut self, registration: Registration, incarnation: Incarnation) -> Outcome {
        if !matches!(registration.role, Role::Prefill | Role::Decode) {
            return Outcome::Refused(Refused::Incompatible);
        }
        match self.workers.get(&registration.worker) {
            Some(known) if known.is(&registration) => {
                return Outcome::Registered { incarnation: known.incarnation };
            }
            None if self.workers.values().filter(|w| w.live).count() >= WORKERS_MAX => {
                return Outcome::Refused(Refused::NoCapacity);
            }
            _ => {}
        }
        if self.disagrees(&registration) {
            return Outcome::Refused(Refused::Incompatible);
        }
        let id = registration.worker.clone();
        let incarnation = match self.workers.get(&id) {
            Some(known) if planted::is(Bug::SameLife) => known.incarnation,
            _ => incarnation,
        };
        if let Some(before) = self.workers.get(&id).filter(|w| w.live) {
            self.record_death(&(id.clone(), before.incarnation));
        }
        self.workers.insert(id, Worker::new(registration, incarnation, self.time_ms));
        Outcome::Registered { incarnation }
    }

    /// Whether another live worker that claims the same arithmetic generates something else for the canary prompt.
    fn disagrees(&self, registration: &Registration) -> bool {
        let (own, model) = (&registration.worker, &registration.model);
        let golden = |w: &Worker| {
            w.model.name == model.name && w.model.numerics == model.numerics && !w.model.canary_tokens.is_empty()
        };
        let others = self.workers.iter().filter(|(id, w)| *id != own && w.live && golden(w));
        !model.canary_tokens.is_empty()
            && others.into_iter().any(|(_, other)| other.model.canary_tokens != model.canary_tokens)
    }

    pub(super) fn fence(&mut self, id: &WorkerId, incarnation: Incarnation) -> Outcome {
        let now = self.time_ms;
        if let Some(worker) = self.workers.get_mut(id).filter(|w| w.lives(incarnation)) {
            worker.live = false;
            worker.since_ms = now;
            self.record_death(&(id.clone(), incarnation));
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

    pub(super) fn leave(&mut self, id: &WorkerId, incarnation: Incarnation) -> Outcome {
        if self.workers.get(id).is_some_and(|w| w.incarnation == incarnation) {
            self.workers.remove(id);
        }
        Outcome::Gone
    }

    /// Orders go to the life that is in force when they arrive.
    pub(super) fn order(&mut self, id: &WorkerId, order: Order) -> Outcome {
        match self.workers.get_mut(id).filter(|w| w.live) {
            Some(worker) => {
                worker.order = order;
                Outcome::Done
            }
            None => Outcome::Refused(Refused::Unknown),
        }
    }
}
