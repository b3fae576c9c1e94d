//! Refusals that are still fresh. While the coordinator lets no more of a tenant's lane wait, further requests of it hear so
//! at once, before their prompts are rendered and encoded: under overload most of the work would go into refusing.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use baton_core::{Lane, Refused, Request};
use tokio::time::Instant;

use crate::coordinators::Refusal;
use crate::error::ApiError;
use crate::measure;

/// How long a refusal counts for others at most. What waits with the coordinator meanwhile keeps the workers busy.
const FRESH_MAX: Duration = Duration::from_millis(100);
/// Lines remembered at a time.
const LINES_MAX: usize = 1024;

/// (model, tenant, lane): what waits in one line with the coordinator.
type Line = (String, String, Lane);

/// One refusal and how long it counts.
struct Fresh {
    said: Refusal,
    at: Instant,
    until: Instant,
}

#[derive(Default)]
pub(crate) struct Shed(Mutex<BTreeMap<Line, Fresh>>);

impl Shed {
    /// The coordinator has refused a request because too many wait before it.
    pub(crate) fn refused(&self, request: &Request, said: &Refusal) {
        if said.reason != Refused::Overloaded {
            return;
        }
        let at = Instant::now();
        let until = at + FRESH_MAX.min(Duration::from_millis(said.retry_after_ms));
        let line = (request.model.clone(), request.tenant.clone(), request.lane);
        let mut fresh = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        fresh.retain(|_, fresh| fresh.until > at);
        if fresh.len() < LINES_MAX {
            fresh.insert(line, Fresh { said: said.clone(), at, until });
        }
    }

    /// Refuses a request of a line that was refused just now.
    pub(crate) fn check(&self, model: &str, tenant: &str, lane: Lane) -> Result<(), ApiError> {
        let now = Instant::now();
        let line = (model.to_string(), tenant.to_string(), lane);
        let fresh = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Fresh { said, at, .. }) = fresh.get(&line).filter(|fresh| fresh.until > now) else { return Ok(()) };
        measure::shed();
        let passed_ms = (now - *at).as_millis() as u64;
        Err(ApiError::refused(said.reason, &said.detail, said.retry_after_ms.saturating_sub(passed_ms).max(1)))
    }
}
