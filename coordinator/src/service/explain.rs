//! What this node decided about requests while it led, for `baton explain`: a bounded memory, never a proof. Decisions
//! are kept as numbers and become text when somebody asks.

use std::collections::{BTreeMap, VecDeque};

use baton_core::{Refused, RequestId};
use baton_proto::v1;

use super::ask::Ask;
use super::{Refusal, Shared};
use crate::placement::Trace;

/// Requests remembered; the one first decided on is forgotten first.
const REQUESTS_MAX: usize = 4096;
/// Decisions remembered of one request; the latest.
const DECISIONS_MAX: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    Assigned,
    Refused(Refused),
}

#[derive(Clone, Debug)]
pub(super) struct Remembered {
    ledger_ms: u64,
    attempt: u32,
    word: Word,
    trace: Trace,
}

impl Remembered {
    fn told(&self) -> v1::Decision {
        let (outcome, reason) = match self.word {
            Word::Assigned => ("assigned", ""),
            Word::Refused(reason) => ("refused", reason.as_str()),
        };
        v1::Decision {
            ledger_ms: self.ledger_ms,
            attempt: self.attempt,
            outcome: outcome.into(),
            reason: reason.into(),
            lines: self.trace.lines(),
        }
    }
}

pub(super) struct Decisions {
    /// Nearly all have one decision, so room is made for no more.
    by_request: BTreeMap<RequestId, Vec<Remembered>>,
    order: VecDeque<RequestId>,
}

impl Decisions {
    pub(super) fn new() -> Decisions {
        Decisions { by_request: BTreeMap::new(), order: VecDeque::new() }
    }

    fn remember(&mut self, request: RequestId, decision: Remembered) {
        let known = self.by_request.entry(request).or_default();
        if known.is_empty() {
            self.order.push_back(request);
        }
        if known.len() == DECISIONS_MAX {
            known.remove(0);
        }
        known.reserve_exact(1);
        known.push(decision);
        if self.order.len() > REQUESTS_MAX {
            let oldest = self.order.pop_front().expect("longer than its bound");
            self.by_request.remove(&oldest);
        }
    }

    fn of(&self, request: RequestId) -> Vec<Remembered> {
        self.by_request.get(&request).into_iter().flatten().cloned().collect()
    }
}

impl Shared {
    pub(super) fn remember(&self, ask: &Ask, word: Word, trace: Trace) {
        let ledger_ms = self.lead.stamp().unwrap_or(0);
        let decision = Remembered { ledger_ms, attempt: ask.attempt, word, trace };
        self.decisions.lock().expect("decisions lock").remember(ask.request, decision);
    }

    pub(super) async fn explain(&self, request: RequestId) -> Result<v1::ExplainReply, Refusal> {
        self.leading().await?;
        let decisions = self.decisions.lock().expect("decisions lock").of(request);
        let ledger = self.node.ledger();
        let state = match ledger.request(request) {
            Some(_) => "open",
            None if ledger.has_ended(request) => "ended",
            None if self.admission.holds(request) => "queued",
            None => "unknown",
        };
        Ok(v1::ExplainReply {
            decisions: decisions.iter().map(Remembered::told).collect(),
            state: state.into(),
            refused: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_requests_and_decisions_are_remembered() {
        let mut decisions = Decisions::new();
        let decided = |attempt| Remembered { ledger_ms: 1, attempt, word: Word::Assigned, trace: Trace::default() };
        (0..REQUESTS_MAX as u128 + 2).for_each(|request| decisions.remember(RequestId(request), decided(1)));
        (2..20).for_each(|attempt| decisions.remember(RequestId(9), decided(attempt)));
        assert!(decisions.of(RequestId(1)).is_empty());
        assert_eq!(decisions.of(RequestId(2)).len(), 1);
        let attempts: Vec<u32> = decisions.of(RequestId(9)).iter().map(|d| d.attempt).collect();
        assert_eq!(attempts, (4..20).collect::<Vec<_>>());
    }
}
