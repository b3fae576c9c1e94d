//! Refusals under overload: those that are still fresh, and when whoever is refused shall come again.
//!
//! While the coordinator lets no more of a tenant's lane wait, further requests of it hear so at once, before their prompts
//! are rendered and encoded: otherwise most of the work would go into refusing. And a crowd that is told to come again at
//! once is refused again at once: each who is refused is told a later moment than the one before, by as much as a turn
//! takes, so that turns and those who come for them go together.

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
/// Nobody is sent away for longer; a crowd that is larger comes spread over the second half of it.
const AWAY_MAX: Duration = Duration::from_secs(30);
/// Lines remembered at a time.
const LINES_MAX: usize = 1024;

/// (model, tenant, lane): what waits in one line with the coordinator.
type Line = (String, String, Lane);

/// The last refusal of a line, and who has been sent away since.
struct Crowd {
    said: Refusal,
    at: Instant,
    /// Until when it counts for others.
    until: Instant,
    /// When the next who is refused shall come.
    next: Instant,
    /// Sent away for as long as anybody is.
    spread: u64,
}

#[derive(Default)]
pub(crate) struct Shed(Mutex<BTreeMap<Line, Crowd>>);

impl Shed {
    /// A request is refused; says when it shall come again, if that is because too many wait before it.
    pub(crate) fn refused(&self, request: &Request, said: Refusal) -> Refusal {
        if said.reason != Refused::Overloaded {
            return said;
        }
        let at = Instant::now();
        let until = at + FRESH_MAX.min(Duration::from_millis(said.retry_after_ms));
        let line = (request.model.clone(), request.tenant.clone(), request.lane);
        let mut crowds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        crowds.retain(|_, crowd| crowd.until.max(crowd.next) > at);
        if crowds.len() >= LINES_MAX && !crowds.contains_key(&line) {
            return said;
        }
        let crowd = crowds.entry(line).or_insert_with(|| Crowd { said: said.clone(), at, until, next: at, spread: 0 });
        *crowd = Crowd { said: said.clone(), at, until, ..*crowd };
        Refusal { retry_after_ms: crowd.away(at).as_millis() as u64, ..said }
    }

    /// Refuses a request of a line that was refused just now.
    pub(crate) fn check(&self, model: &str, tenant: &str, lane: Lane) -> Result<(), ApiError> {
        let now = Instant::now();
        let line = (model.to_string(), tenant.to_string(), lane);
        let mut crowds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(crowd) = crowds.get_mut(&line).filter(|crowd| crowd.until > now) else { return Ok(()) };
        measure::shed();
        let away_ms = crowd.away(now).as_millis() as u64;
        Err(ApiError::refused(crowd.said.reason, &crowd.said.detail, away_ms.max(1)))
    }
}

impl Crowd {
    /// How long the next who is refused stays away.
    fn away(&mut self, now: Instant) -> Duration {
        let soonest = self.at + Duration::from_millis(self.said.retry_after_ms);
        let turn = soonest.max(self.next).max(now);
        let away = turn - now;
        if away <= AWAY_MAX {
            self.next = turn + Duration::from_micros(self.said.retry_step_us);
            return away;
        }
        self.next = now + AWAY_MAX;
        // Multiples of the golden ratio lie evenly, however many there are.
        self.spread = self.spread.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let half = AWAY_MAX / 2;
        half + half.mul_f64(self.spread as f64 / u64::MAX as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(retry_after_ms: u64, retry_step_us: u64) -> Refusal {
        Refusal { reason: Refused::Overloaded, detail: String::new(), retry_after_ms, retry_step_us, unsettled: false }
    }

    /// Goal: those who are refused come again one turn after another, however often the line is refused meanwhile.
    #[test]
    fn a_crowd_comes_again_turn_by_turn() {
        let now = Instant::now();
        let mut crowd = Crowd { said: said(200, 10_000), at: now, until: now, next: now, spread: 0 };
        let away: Vec<u128> = (0..4).map(|_| crowd.away(now).as_millis()).collect();
        assert_eq!(away, [200, 210, 220, 230]);
        let later = now + Duration::from_millis(100);
        crowd = Crowd { said: said(50, 20_000), at: later, ..crowd };
        assert_eq!([0; 2].map(|_| crowd.away(later).as_millis()), [140, 160], "after those before");
        let long_after = now + Duration::from_secs(10);
        crowd.at = long_after;
        assert_eq!(crowd.away(long_after).as_millis(), 50, "all have come");
    }

    /// Goal: nobody is sent away for longer than the bound, and a crowd beyond it is not told one moment.
    #[test]
    fn a_crowd_that_is_too_large_is_spread() {
        let now = Instant::now();
        let mut crowd = Crowd { said: said(100, 1_000_000), at: now, until: now, next: now, spread: 0 };
        let mut away: Vec<Duration> = (0..130).map(|_| crowd.away(now)).collect();
        assert!(away.iter().all(|away| *away <= AWAY_MAX), "{away:?}");
        let mut beyond = away.split_off(30);
        beyond.sort();
        assert!(beyond[0] >= AWAY_MAX / 2, "{beyond:?}");
        let widest = beyond.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default();
        assert!(widest < Duration::from_millis(600), "{widest:?}: 100 over 15 s");
    }
}
