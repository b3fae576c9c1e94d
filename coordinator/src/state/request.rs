//! Requests in the ledger: those open, and a bounded memory of those that ended.

use std::collections::{BTreeMap, VecDeque};

use baton_core::{Epoch, Lane, NumericsClass, Place, RequestId};
use serde::{Deserialize, Serialize};

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
    pub lane: Lane,
    pub gateway: String,
    pub prompt_tokens: u64,
    pub tokens_max: u64,
    pub accepted_ms: u64,
    /// Ledger time.
    pub deadline_ms: u64,
    pub explanation: String,
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

    pub(super) fn insert(&mut self, request: RequestId, epoch: Epoch) {
        if self.contains(request) {
            return;
        }
        self.epochs.insert(request, epoch);
        self.order.push_back(request);
        if self.order.len() > EndedRequests::MAX {
            let oldest = self.order.pop_front().expect("longer than its bound");
            self.epochs.remove(&oldest);
        }
    }
}
