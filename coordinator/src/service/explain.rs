//! What this node decided about requests while it led, for `baton explain`: a bounded memory, never a proof.

use std::collections::{BTreeMap, VecDeque};

use baton_core::RequestId;
use baton_proto::v1;

use super::{Refusal, Shared};

/// Requests remembered; the one first decided on is forgotten first.
const REQUESTS_MAX: usize = 4096;
/// Decisions remembered of one request; the latest.
const DECISIONS_MAX: usize = 16;
/// Lines of one decision.
const LINES_MAX: usize = 256;

pub(super) struct Decisions {
    by_request: BTreeMap<RequestId, VecDeque<v1::Decision>>,
    order: VecDeque<RequestId>,
}

impl Decisions {
    pub(super) fn new() -> Decisions {
        Decisions { by_request: BTreeMap::new(), order: VecDeque::new() }
    }

    pub(super) fn remember(&mut self, request: RequestId, mut decision: v1::Decision) {
        decision.lines.truncate(LINES_MAX);
        let known = self.by_request.entry(request).or_default();
        if known.is_empty() {
            self.order.push_back(request);
        }
        if known.len() == DECISIONS_MAX {
            known.pop_front();
        }
        known.push_back(decision);
        if self.order.len() > REQUESTS_MAX {
            let oldest = self.order.pop_front().expect("longer than its bound");
            self.by_request.remove(&oldest);
        }
    }

    fn of(&self, request: RequestId) -> Vec<v1::Decision> {
        self.by_request.get(&request).into_iter().flatten().cloned().collect()
    }
}

impl Shared {
    pub(super) async fn explain(&self, request: RequestId) -> Result<v1::ExplainReply, Refusal> {
        self.leading().await?;
        let decisions = self.decisions.lock().expect("decisions lock").of(request);
        let ledger = self.node.ledger();
        let state = match ledger.request(request) {
            Some(_) => "open",
            None if ledger.has_ended(request) => "ended",
            None => "unknown",
        };
        Ok(v1::ExplainReply { decisions, state: state.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_requests_and_decisions_are_remembered() {
        let mut decisions = Decisions::new();
        let decided = |attempt| v1::Decision { attempt, ..Default::default() };
        (0..REQUESTS_MAX as u128 + 2).for_each(|request| decisions.remember(RequestId(request), decided(1)));
        (2..20).for_each(|attempt| decisions.remember(RequestId(9), decided(attempt)));
        assert!(decisions.of(RequestId(1)).is_empty());
        assert_eq!(decisions.of(RequestId(2)).len(), 1);
        let attempts: Vec<u32> = decisions.of(RequestId(9)).iter().map(|d| d.attempt).collect();
        assert_eq!(attempts, (4..20).collect::<Vec<_>>());
    }
}
