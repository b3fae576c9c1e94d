//! Whether a worker that has work makes steps, and how long they take. A process that answers is not yet one that works.

use std::time::Duration;

use baton_core::planted::{self, Bug};
use baton_proto::v1;
use tokio::time::Instant;

/// Without a step for so long, a worker with running sequences is stuck; slow steps get more.
const STUCK: Duration = Duration::from_secs(1);
/// Steps of its usual length that a worker may miss before it counts as stuck.
const STUCK_STEPS: u64 = 8;
/// Prompt tokens that one step may be computing.
const STEP_TOKENS_MAX: u64 = 1024;

/// One life's steps.
pub(super) struct Progress {
    steps: u64,
    working: bool,
    /// The last report in which steps had grown, or in which there was nothing to do.
    moved: Instant,
    /// The last report.
    at: Instant,
    /// Smoothed; 0 is unknown.
    step_us: u64,
    prefill_rate: u64,
    /// The life before was stuck, and this one of the same process has made no step yet.
    was_stuck: bool,
    /// What the worker itself says of the step it is in.
    said: Duration,
}

impl Progress {
    pub(super) fn new(now: Instant) -> Progress {
        Progress {
            steps: 0,
            working: false,
            moved: now,
            at: now,
            step_us: 0,
            prefill_rate: 0,
            was_stuck: false,
            said: Duration::ZERO,
        }
    }

    /// The next life of a process that was stuck in the one before.
    pub(super) fn go_on(self, now: Instant) -> Progress {
        Progress { moved: now, at: now, was_stuck: true, said: Duration::ZERO, ..self }
    }

    pub(super) fn step_us(&self) -> u64 {
        self.step_us
    }

    pub(super) fn report(&mut self, load: &v1::Load, now: Instant) {
        let working = load.sequences_running > 0;
        if load.steps > self.steps && self.working && working {
            let each = (now - self.at).as_micros() as u64 / (load.steps - self.steps);
            self.step_us = if self.step_us == 0 { each } else { (3 * self.step_us + each) / 4 };
        }
        if load.steps != self.steps || !self.working || !working {
            self.moved = now;
        }
        self.was_stuck &= load.steps == self.steps;
        self.said = Duration::from_millis(load.stuck_ms);
        (self.steps, self.working, self.at, self.prefill_rate) = (load.steps, working, now, load.prefill_tokens_per_s);
    }

    /// How long it has been stuck in this life, as of its last report. None: it works, or has nothing to do.
    pub(super) fn stuck(&self) -> Option<Duration> {
        if planted::is(Bug::GreenHealth) {
            return None;
        }
        let prefill_us = (STEP_TOKENS_MAX * 1_000_000).checked_div(self.prefill_rate).unwrap_or(0);
        let patience = Duration::from_micros(prefill_us.max(STUCK_STEPS.saturating_mul(self.step_us))).max(STUCK);
        let counted = (self.at - self.moved).checked_sub(patience);
        let said = Some(self.said).filter(|said| !said.is_zero());
        let stuck = counted.max(said);
        if self.was_stuck { Some(stuck.unwrap_or_default()) } else { stuck }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(steps: u64, running: u32, rate: u64) -> v1::Load {
        v1::Load { steps, sequences_running: running, prefill_tokens_per_s: rate, ..Default::default() }
    }

    /// Reports of (milliseconds, steps, running) and how long the worker is stuck after them.
    fn check(rate: u64, reports: &[(u64, u64, u32)], stuck_ms: Option<u64>) {
        let start = Instant::now();
        let mut progress = Progress::new(start);
        for (at, steps, running) in reports {
            progress.report(&load(*steps, *running, rate), start + Duration::from_millis(*at));
        }
        assert_eq!(progress.stuck().map(|stuck| stuck.as_millis() as u64), stuck_ms, "{reports:?}");
    }

    #[tokio::test]
    async fn work_without_steps_is_stuck_after_its_patience() {
        check(0, &[(0, 5, 1), (250, 5, 1), (900, 5, 1)], None);
        check(0, &[(0, 5, 1), (250, 5, 1), (1300, 5, 1)], Some(300));
        check(0, &[(0, 5, 0), (9000, 5, 0)], None);
        check(0, &[(0, 5, 0), (9000, 5, 1)], None);
        check(0, &[(0, 5, 1), (1300, 5, 1), (1400, 6, 1)], None);
        check(0, &[(0, 5, 1), (1300, 5, 0)], None);
    }

    #[tokio::test]
    async fn a_stuck_process_stays_so_in_its_next_life_until_it_steps() {
        let start = Instant::now();
        let mut progress = Progress::new(start);
        for at in [0, 0, 1300] {
            progress.report(&load(5, 1, 0), start + Duration::from_millis(at));
        }
        let mut progress = progress.go_on(start + Duration::from_millis(2_000));
        assert_eq!(progress.stuck(), Some(Duration::ZERO));
        progress.report(&load(5, 0, 0), start + Duration::from_millis(2_100));
        assert_eq!(progress.stuck(), Some(Duration::ZERO));
        progress.report(&load(6, 1, 0), start + Duration::from_millis(2_200));
        assert_eq!(progress.stuck(), None);
    }

    #[tokio::test]
    async fn a_worker_that_says_so_is_stuck() {
        let start = Instant::now();
        let mut progress = Progress::new(start);
        progress.report(&v1::Load { stuck_ms: 40, ..load(5, 1, 0) }, start);
        assert_eq!(progress.stuck(), Some(Duration::from_millis(40)));
        progress.report(&load(6, 1, 0), start);
        assert_eq!(progress.stuck(), None);
    }

    #[tokio::test]
    async fn slow_steps_get_more_patience() {
        check(100, &[(0, 5, 1), (9_000, 5, 1)], None);
        check(100, &[(0, 5, 1), (11_240, 5, 1)], Some(1_000));
        check(0, &[(0, 5, 1), (500, 6, 1), (3_000, 6, 1)], None);
        check(0, &[(0, 5, 1), (500, 6, 1), (4_600, 6, 1)], Some(100));
    }
}
