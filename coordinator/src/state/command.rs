//! What can be written to the ledger and what comes of it. Every command may be repeated without a second effect.

use baton_core::{Epoch, Incarnation, Lane, NumericsClass, Place, Refused, RequestId, Role, WorkerId};
use serde::{Deserialize, Serialize};

use super::access::{Key, Limits};
use super::poison::Life;
use super::tenant::OverLimit;
use super::{NodeCommand, OpenRequest};

/// One Raft entry: commands stamped with the leader's monotonic time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Milliseconds of the ledger's own time; a stamp older than one already applied counts as that one.
    pub time_ms: u64,
    pub commands: Vec<Command>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// The first one names the cluster for ever; later ones learn the name.
    Found {
        cluster: String,
    },
    Register(Registration),
    /// The worker's life has gone silent, or failed: its later words are refused.
    Fence {
        worker: WorkerId,
        incarnation: Incarnation,
    },
    /// The worker ends this life by itself.
    Leave {
        worker: WorkerId,
        incarnation: Incarnation,
    },
    /// Accept + assign, as versions up to 3 did it: by whichever gateway, and blaming no request for late deaths.
    Assign(Box<Proposed>),
    Finish(Finished),
    /// Ends every request whose deadline has passed.
    Expire,
    /// What is wanted of a live worker from now on.
    Order {
        worker: WorkerId,
        order: Order,
    },
    /// Creates a tenant or replaces its limits.
    SetTenant {
        name: String,
        limits: Limits,
    },
    /// Its keys go with it; its open requests go on.
    RemoveTenant {
        name: String,
    },
    CreateKey {
        id: String,
        key: Key,
    },
    RevokeKey {
        id: String,
    },
    /// Another gateway takes over an open request.
    Adopt {
        request: RequestId,
        gateway: String,
    },
    /// What the leader's ledger was at an index; a node whose own was something else stops.
    Check(Check),
    /// Of coordinators, not of workers.
    Node(NodeCommand),
    /// One setting of the cluster; without a value it goes.
    Set {
        name: String,
        value: Option<String>,
    },
    /// Accept + assign, of one gateway. The key is (request, attempt, gateway). A later attempt follows the assignment
    /// under `previous`, and no other; 0: there was none.
    AssignAfter {
        proposed: Box<Proposed>,
        previous: Epoch,
    },
}

/// How an assignment is judged: as the entry's version did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Terms {
    /// `Assign`.
    Version3,
    /// `AssignAfter`.
    After(Epoch),
}

/// The hash of a ledger at an index, as bytes of one version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub version: u16,
    pub index: u64,
    pub hash: u64,
}

/// What the cluster wants of a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    #[default]
    Serve,
    /// Take no more, finish or give back what runs, leave, end.
    Drain,
    /// Drain, then register in the other role.
    BecomePrefill,
    BecomeDecode,
}

/// A worker that announces itself. The key is (worker, process_key).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    pub worker: WorkerId,
    pub role: Role,
    /// gRPC address.
    pub address: String,
    pub pid: u32,
    /// Version of the binary.
    pub version: String,
    pub model: Model,
    /// Random per process.
    pub process_key: String,
}

/// What placement needs to know of the model a worker serves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    pub name: String,
    pub card_hash: String,
    pub numerics: NumericsClass,
    pub block_tokens: u32,
    pub positions_max: u64,
    /// BlockLayout as text; blocks pass only between equal ones.
    pub layout: String,
    pub blocks_total: u64,
    pub block_bytes: u64,
    /// What the worker itself generates for the canary prompt; empty: it did not try.
    pub canary_tokens: Vec<u32>,
    /// Tokens of its vocabulary; 0 unknown.
    pub vocab: u64,
}

/// A placement that the leader proposes; the ledger checks that it still holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposed {
    pub request: RequestId,
    /// From 1.
    pub attempt: u32,
    pub tenant: String,
    pub lane: Lane,
    pub gateway: String,
    /// Prompt plus tokens so far.
    pub prompt_tokens: u64,
    /// Of each choice.
    pub tokens_max: u64,
    pub choices: u32,
    /// From acceptance; of the first attempt that was accepted.
    pub deadline_ms: u64,
    pub decode: Life,
    pub prefill: Option<Life>,
    /// Id of the API key it came with; empty without keys.
    pub key: String,
    /// How long it outlives its gateway, 0 not at all.
    pub resumable_ms: u64,
    /// Names the request's content; 0 none.
    pub fingerprint: u128,
    /// Lives that ended while they ran this request.
    pub killed: Vec<Life>,
}

/// The end of a request. The key is (request, epoch); epoch 0 ends it under whatever epoch it has, and even before
/// its assignment arrives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finished {
    pub request: RequestId,
    pub epoch: Epoch,
    /// `complete`, `cancelled`, or a `core::Aborted` word.
    pub outcome: String,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub generated_tokens: u64,
}

/// What became of one command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Founded {
        cluster: String,
    },
    Registered {
        incarnation: Incarnation,
    },
    /// The life that was named is not live (any more).
    Gone,
    Assigned(Box<Assigned>),
    /// The proposed workers are no longer those lives: place again.
    Misplaced,
    /// Nothing was done.
    Refused(Refused),
    /// Nothing was done: the tenant's account does not take the request.
    OverLimit(OverLimit),
    /// It is as the command says.
    Done,
    /// The node that applied it has found nothing wrong.
    Checked,
    /// The request has ended, now or before.
    Ended,
    Expired {
        requests: Vec<RequestId>,
    },
    NodeAdded {
        node: u64,
    },
    NodeNoted,
}

/// An assignment as the ledger granted it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assigned {
    pub request: RequestId,
    pub attempt: u32,
    pub epoch: Epoch,
    pub decode: Place,
    pub prefill: Option<Place>,
    /// Milliseconds left until the request's deadline.
    pub lease_ms: u64,
}

impl Assigned {
    pub(super) fn new(request: RequestId, open: &OpenRequest, now_ms: u64) -> Assigned {
        Assigned {
            request,
            attempt: open.attempt,
            epoch: open.epoch,
            decode: open.decode.clone(),
            prefill: open.prefill.clone(),
            lease_ms: open.deadline_ms.saturating_sub(now_ms),
        }
    }
}
