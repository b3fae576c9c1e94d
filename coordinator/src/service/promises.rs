//! Assignments that a worker may not have reported yet, and their sums.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_core::RequestId;
use tokio::time::Instant;

/// An assignment this much older than a heartbeat is part of the load that the heartbeat reports.
pub(super) const PROMISE_SEEN: Duration = Duration::from_millis(100);

#[derive(Default)]
pub(super) struct Promises {
    by_request: BTreeMap<RequestId, Promise>,
    pub(super) blocks: u64,
    pub(super) tokens: u64,
}

pub(super) struct Promise {
    pub(super) at: Instant,
    pub(super) blocks: u64,
    pub(super) tokens: u64,
}

impl Promises {
    pub(super) fn len(&self) -> u64 {
        self.by_request.len() as u64
    }

    pub(super) fn insert(&mut self, request: RequestId, promise: Promise) {
        self.remove(request);
        self.blocks += promise.blocks;
        self.tokens += promise.tokens;
        self.by_request.insert(request, promise);
    }

    pub(super) fn remove(&mut self, request: RequestId) {
        if let Some(promise) = self.by_request.remove(&request) {
            self.blocks -= promise.blocks;
            self.tokens -= promise.tokens;
        }
    }

    /// Drops those that a report of now includes.
    pub(super) fn seen(&mut self, now: Instant) {
        self.by_request.retain(|_, promise| promise.at + PROMISE_SEEN > now);
        self.blocks = self.by_request.values().map(|promise| promise.blocks).sum();
        self.tokens = self.by_request.values().map(|promise| promise.tokens).sum();
    }
}
