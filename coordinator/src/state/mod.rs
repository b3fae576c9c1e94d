//! The ledger: a pure state machine over stamped commands. No IO, no clock, no randomness, ordered maps only, so that
//! every node that applies the same entries holds the same bytes.

mod access;
mod codec;
mod command;
mod nodes;
mod poison;
mod request;
mod settings;
mod tenant;
mod version1;
mod version2;
mod worker;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use baton_core::planted::{self, Bug};
use baton_core::{Epoch, Incarnation, RequestId, WorkerId};
use serde::{Deserialize, Serialize};

pub use access::{KEYS_MAX, Key, Keys, Limits, TENANTS_MAX};
pub use codec::{
    CodecError, VERSION, VERSION_MIN, decode_batch, decode_ledger, encode_batch, encode_batch_as, encode_ledger,
    encode_ledger_as, hash, refuse_newer,
};
use command::Terms;
pub use command::{Assigned, Batch, Check, Command, Finished, Model, Order, Outcome, Proposed, Registration};
pub use nodes::{JOINS_REMEMBERED_MAX, Join, NODES_JOINING_MAX, NODES_REMOVED_MAX, NodeCommand, Nodes};
pub use poison::{Apart, BLAME_MS, Life, POISON_STRIKES, POISON_STRIKES_CROWDED, QUARANTINE_MS, SUSPECT_STRIKES};
pub use request::{EndedRequests, OpenRequest};
pub use settings::{SETTING_BYTES_MAX, SETTINGS_MAX, Settings};
pub use tenant::{Account, Bucket, Charge, Limit, OverLimit, Usage};
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

/// The replicated record of workers, accepted requests and assignments, tenants and keys, and the cluster's settings.
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
    /// Open requests of each gateway that has any.
    gateways: BTreeMap<String, u64>,
    tenants: BTreeMap<String, tenant::Account>,
    keys: access::Keys,
    poison: poison::Poison,
    nodes: Nodes,
    settings: Settings,
}

impl Ledger {
    /// The cluster's name; empty before the first leader founded it.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// The coordinators' numbers, comings and goings.
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
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

    /// Gateways that serve open requests now.
    pub fn gateways(&self) -> impl Iterator<Item = &String> {
        self.gateways.keys()
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
            Command::Assign(proposed) => self.assign(*proposed, Epoch(number), Terms::Version3),
            Command::AssignAfter { proposed, previous } => {
                self.assign(*proposed, Epoch(number), Terms::After(previous))
            }
            Command::Finish(finished) => self.finish(finished),
            Command::Expire => self.expire(),
            Command::Order { worker, order } => self.order(&worker, order),
            Command::SetTenant { name, limits } => self.set_tenant(name, limits),
            Command::RemoveTenant { name } => self.remove_tenant(&name),
            Command::CreateKey { id, key } => self.create_key(id, key),
            Command::RevokeKey { id } => self.revoke_key(&id),
            Command::Adopt { request, gateway } => self.adopt(request, gateway),
            // Whoever applies entries compares; the ledger itself has nothing to compare with.
            Command::Check(_) => Outcome::Checked,
            Command::Node(command) => self.nodes.apply(command),
            Command::Set { name, value } => self.set(name, value),
        }
    }

    fn found(&mut self, cluster: String) -> Outcome {
        if planted::is(Bug::RefillOnLead) {
            self.tenants.values_mut().for_each(tenant::Account::refill);
        }
        if self.cluster.is_empty() {
            self.cluster = cluster;
        }
        Outcome::Founded { cluster: self.cluster.clone() }
    }
}
