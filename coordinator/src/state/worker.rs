//! A worker as the ledger knows it: its latest life and whether that is live.

use baton_core::{Incarnation, Place, Role, WorkerId};
use serde::{Deserialize, Serialize};

use super::command::{Model, Registration};

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
}

impl Worker {
    pub(super) fn new(r: Registration, incarnation: Incarnation, since_ms: u64) -> Worker {
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
        }
    }

    /// Whether `incarnation` is this worker's life in force.
    pub fn lives(&self, incarnation: Incarnation) -> bool {
        self.live && self.incarnation == incarnation
    }

    pub fn place(&self, id: &WorkerId) -> Place {
        Place { worker: id.clone(), incarnation: self.incarnation, address: self.address.clone() }
    }
}
