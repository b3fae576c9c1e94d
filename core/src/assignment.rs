//! The coordinator's answer: this request, these workers, this lease, this epoch.

use serde::{Deserialize, Serialize};

use crate::{Epoch, Incarnation, RequestId, WorkerId};

/// One life of one worker and where it listens.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place {
    pub worker: WorkerId,
    pub incarnation: Incarnation,
    /// gRPC address.
    pub address: String,
}

/// A worker that has leading blocks of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub place: Place,
    /// How many, at most.
    pub blocks: u64,
    /// The request ran there, and goes on elsewhere because that worker drains.
    pub moves: bool,
}

/// Who serves a request, until when, and under which epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    pub request: RequestId,
    /// Which assignment of this request it is, from 1.
    pub attempt: u32,
    pub epoch: Epoch,
    pub decode: Place,
    /// None: the decode worker prefills itself.
    pub prefill: Option<Place>,
    /// Who has leading blocks of the request that whoever prefills lacks; a hint, which nothing depends on.
    pub holder: Option<Holder>,
    /// Milliseconds from now that the assignment is good for.
    pub lease_ms: u64,
    /// Why these workers, in one line.
    pub explanation: String,
    /// Name of the cluster that assigned it; empty: not said.
    pub cluster: String,
}
