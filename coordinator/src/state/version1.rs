//! Entries and snapshots as version 1 wrote them, and what they are today. Never changed; goes when no version 1 log can
//! be left anywhere.

use std::collections::{BTreeMap, BTreeSet};

use baton_core::{Epoch, Incarnation, Lane, NumericsClass, Place, RequestId, Role, WorkerId};
use serde::{Deserialize, Serialize};

use super::command::{self, Finished};
use super::request::{self, EndedRequests};
use super::worker;

#[derive(Serialize, Deserialize)]
pub(super) struct Batch {
    pub(super) time_ms: u64,
    pub(super) commands: Vec<Command>,
}

#[derive(Serialize, Deserialize)]
pub(super) enum Command {
    Found { cluster: String },
    Register(Registration),
    Fence { worker: WorkerId, incarnation: Incarnation },
    Leave { worker: WorkerId, incarnation: Incarnation },
    Assign(Box<Proposed>),
    Finish(Finished),
    Expire,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Registration {
    pub(super) worker: WorkerId,
    pub(super) role: Role,
    pub(super) address: String,
    pub(super) pid: u32,
    pub(super) version: String,
    pub(super) model: Model,
    pub(super) process_key: String,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Model {
    pub(super) name: String,
    pub(super) card_hash: String,
    pub(super) numerics: NumericsClass,
    pub(super) block_tokens: u32,
    pub(super) positions_max: u64,
    pub(super) layout: String,
    pub(super) blocks_total: u64,
    pub(super) block_bytes: u64,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Proposed {
    pub(super) request: RequestId,
    pub(super) attempt: u32,
    pub(super) tenant: String,
    pub(super) lane: Lane,
    pub(super) gateway: String,
    pub(super) prompt_tokens: u64,
    pub(super) tokens_max: u64,
    pub(super) deadline_ms: u64,
    pub(super) decode: (WorkerId, Incarnation),
    pub(super) prefill: Option<(WorkerId, Incarnation)>,
    pub(super) explanation: String,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Ledger {
    pub(super) cluster: String,
    pub(super) index: u64,
    pub(super) time_ms: u64,
    pub(super) workers: BTreeMap<WorkerId, Worker>,
    pub(super) open: BTreeMap<RequestId, OpenRequest>,
    pub(super) deadlines: BTreeSet<(u64, RequestId)>,
    pub(super) ended: EndedRequests,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Worker {
    pub(super) role: Role,
    pub(super) address: String,
    pub(super) pid: u32,
    pub(super) version: String,
    pub(super) model: Model,
    pub(super) incarnation: Incarnation,
    pub(super) process_key: String,
    pub(super) live: bool,
    pub(super) since_ms: u64,
}

#[derive(Serialize, Deserialize)]
pub(super) struct OpenRequest {
    pub(super) attempt: u32,
    pub(super) epoch: Epoch,
    pub(super) decode: Place,
    pub(super) prefill: Option<Place>,
    pub(super) numerics: NumericsClass,
    pub(super) tenant: String,
    pub(super) lane: Lane,
    pub(super) gateway: String,
    pub(super) prompt_tokens: u64,
    pub(super) tokens_max: u64,
    pub(super) accepted_ms: u64,
    pub(super) deadline_ms: u64,
    pub(super) explanation: String,
}

impl From<Batch> for command::Batch {
    fn from(old: Batch) -> command::Batch {
        command::Batch { time_ms: old.time_ms, commands: old.commands.into_iter().map(Into::into).collect() }
    }
}

impl From<Command> for command::Command {
    fn from(old: Command) -> command::Command {
        match old {
            Command::Found { cluster } => command::Command::Found { cluster },
            Command::Register(registration) => command::Command::Register(registration.into()),
            Command::Fence { worker, incarnation } => command::Command::Fence { worker, incarnation },
            Command::Leave { worker, incarnation } => command::Command::Leave { worker, incarnation },
            Command::Assign(proposed) => command::Command::Assign(Box::new((*proposed).into())),
            Command::Finish(finished) => command::Command::Finish(finished),
            Command::Expire => command::Command::Expire,
        }
    }
}

impl From<Registration> for command::Registration {
    fn from(old: Registration) -> command::Registration {
        command::Registration {
            worker: old.worker,
            role: old.role,
            address: old.address,
            pid: old.pid,
            version: old.version,
            model: old.model.into(),
            process_key: old.process_key,
        }
    }
}

impl From<Model> for command::Model {
    fn from(old: Model) -> command::Model {
        command::Model {
            name: old.name,
            card_hash: old.card_hash,
            numerics: old.numerics,
            block_tokens: old.block_tokens,
            positions_max: old.positions_max,
            layout: old.layout,
            blocks_total: old.blocks_total,
            block_bytes: old.block_bytes,
            canary_tokens: Vec::new(),
            vocab: 0,
        }
    }
}

impl From<Proposed> for command::Proposed {
    fn from(old: Proposed) -> command::Proposed {
        command::Proposed {
            request: old.request,
            attempt: old.attempt,
            tenant: old.tenant,
            lane: old.lane,
            gateway: old.gateway,
            prompt_tokens: old.prompt_tokens,
            tokens_max: old.tokens_max,
            choices: 1,
            deadline_ms: old.deadline_ms,
            decode: old.decode,
            prefill: old.prefill,
            key: String::new(),
            resumable_ms: 0,
            fingerprint: 0,
            killed: Vec::new(),
        }
    }
}

impl From<Ledger> for super::Ledger {
    fn from(old: Ledger) -> super::Ledger {
        let mut gateways = BTreeMap::new();
        old.open.values().for_each(|open| *gateways.entry(open.gateway.clone()).or_default() += 1);
        super::Ledger {
            cluster: old.cluster,
            index: old.index,
            time_ms: old.time_ms,
            workers: old.workers.into_iter().map(|(id, worker)| (id, worker.into())).collect(),
            open: old.open.into_iter().map(|(id, open)| (id, open.into())).collect(),
            deadlines: old.deadlines,
            ended: old.ended,
            gateways,
            ..super::Ledger::default()
        }
    }
}

impl From<Worker> for worker::Worker {
    fn from(old: Worker) -> worker::Worker {
        worker::Worker {
            role: old.role,
            address: old.address,
            pid: old.pid,
            version: old.version,
            model: old.model.into(),
            incarnation: old.incarnation,
            process_key: old.process_key,
            live: old.live,
            since_ms: old.since_ms,
            order: command::Order::Serve,
        }
    }
}

impl From<OpenRequest> for request::OpenRequest {
    fn from(old: OpenRequest) -> request::OpenRequest {
        request::OpenRequest {
            attempt: old.attempt,
            epoch: old.epoch,
            decode: old.decode,
            prefill: old.prefill,
            numerics: old.numerics,
            tenant: old.tenant,
            key: String::new(),
            lane: old.lane,
            gateway: old.gateway,
            resumable_ms: 0,
            prompt_tokens: old.prompt_tokens,
            tokens_max: old.tokens_max,
            accepted_ms: old.accepted_ms,
            assigned_ms: old.accepted_ms,
            deadline_ms: old.deadline_ms,
            charged: 0,
            fingerprint: 0,
            strikes: 0,
            reported: old.attempt,
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_core::Refused;

    use super::super::command::Outcome;
    use super::super::{CodecError, Ledger, decode_batch, decode_ledger};
    use super::*;

    /// Written by the last binary of version 1: a cluster `c` whose workers `p` and `d` register, then an assignment of
    /// request 1, the end of request 2, the end of `p`; and the ledger after both entries.
    const ENTRIES: [&str; 2] = [
        "010005030101700103703a310705302e312e30016d0163016e108020016ce80740016b0101640203643a310705302e312e30016d0163016e108020016ce80740016b000163",
        "0100060504010201740101670a0532016481200101708020037768790502000963616e63656c6c656401020302017080200301780306",
    ];
    const LEDGER: &str = "0100016302060201640203643a310705302e312e30016d0163016e108020016ce807408120016b010501700103703a310705302e312e30016d0163016e108020016ce807408020016b000601010280400164812003643a31010170802003703a31016e01740101670a050638037768790138010102010200";

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn a_log_of_version_1_gives_the_ledger_of_version_1() {
        let mut ledger = Ledger::default();
        for (index, entry) in (1..).zip(ENTRIES) {
            let batch = decode_batch(&bytes(entry)).unwrap();
            let outcomes = ledger.apply(index, batch);
            assert!(!outcomes.iter().any(|o| matches!(o, Outcome::Refused(Refused::Stale))), "{outcomes:?}");
        }
        let restored = decode_ledger(&bytes(LEDGER)).unwrap();
        assert_eq!((restored.cluster(), restored.index(), restored.time_ms()), ("c", 2, 6));
        assert!(restored.has_ended(RequestId(2)) && restored.request(RequestId(1)).is_some());
        // Deaths and charges are of version 2: a snapshot of version 1 has none.
        let ledger = Ledger { poison: Default::default(), ..ledger };
        let mut open = ledger.open.clone();
        open.values_mut().for_each(|open| open.charged = 0);
        assert_eq!(restored, Ledger { open, ..ledger });
    }

    #[test]
    fn a_torn_entry_of_version_1_is_refused() {
        let torn = bytes(ENTRIES[0]);
        assert!(matches!(decode_batch(&torn[..torn.len() - 1]), Err(CodecError::Damaged(1, _))));
    }
}
