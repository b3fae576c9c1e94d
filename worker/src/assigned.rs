//! A request as a worker is handed it, checked once.

use std::sync::Arc;
use std::time::Duration;

use baton_core::{Assignment, BlockHash, Request, TokenId};
use baton_engine::Choice;
use baton_proto::BadMessage;
use baton_proto::convert::required;
use baton_proto::v1;
use tokio::time::Instant;

/// One request with its assignment.
#[derive(Clone, Debug)]
pub struct Assigned {
    pub assignment: Assignment,
    pub request: Arc<Request>,
    /// Those still to generate.
    pub choices: Vec<Choice>,
    /// When it reached this worker.
    pub started: Instant,
    /// When its deadline or its lease runs out, whichever comes first.
    pub deadline: Instant,
}

impl Assigned {
    pub fn parse(
        assignment: Option<v1::Assignment>,
        request: Option<v1::Request>,
        choices: Vec<v1::Choice>,
    ) -> Result<Assigned, BadMessage> {
        let assignment = Assignment::try_from(required("assignment", assignment)?)?;
        let request = Request::try_from(required("request", request)?)?;
        if assignment.request != request.id {
            return Err(BadMessage { field: "assignment.request", problem: "is another request's" });
        }
        let started = Instant::now();
        let left = Duration::from_millis(assignment.lease_ms.min(request.deadline_ms).min(DEADLINE_MS_MAX));
        let choices = choices.into_iter().map(|c| Choice { index: c.index, so_far: c.so_far }).collect();
        Ok(Assigned { assignment, request: Arc::new(request), choices, started, deadline: started + left })
    }

    /// Whether another worker had it before.
    pub fn is_moved(&self) -> bool {
        self.assignment.attempt > 1
    }

    pub fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Names of the full blocks that a cache can have of it: at least its last token is always computed.
    pub fn names(&self, block_tokens: usize) -> Vec<BlockHash> {
        let mut tokens = self.shared_tokens();
        tokens.pop();
        BlockHash::chain(&self.request.cache_salt, &tokens, block_tokens)
    }

    /// The tokens that all choices have in common: what a handoff covers.
    pub fn shared_tokens(&self) -> Vec<TokenId> {
        let mut tokens = self.request.prompt.to_vec();
        if let [only] = &self.choices[..] {
            tokens.extend(&only.so_far);
        }
        tokens
    }
}

/// No wait is longer, whatever a peer says.
const DEADLINE_MS_MAX: u64 = 24 * 3_600_000;
