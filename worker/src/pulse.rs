//! Whether the engine thread gets on: how long its present pass (commands and one step) has taken, against how long
//! passes take, and what its step was expected to take.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use baton_core::limits::STEP_STUCK_MS;
use tokio::time::Instant;

/// Passes whose lengths are remembered.
const LENGTHS_MAX: usize = 512;
/// What every pass may take.
const AT_LEAST: Duration = Duration::from_millis(STEP_STUCK_MS);
/// What one may take whose step nobody could expect anything of: the first prompt on a slow machine is no deadlock.
const UNKNOWN: Duration = Duration::from_millis(10 * STEP_STUCK_MS);
/// How many times longer than usual, or than expected, is still in time.
const TIMES: u32 = 3;

/// Shared by the engine thread, which writes, and the heartbeats, which read.
#[derive(Debug, Default)]
pub(crate) struct Pulse(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// When the present pass began; None while the thread rests.
    since: Option<Instant>,
    /// What it may take for what it computes.
    due: Duration,
    /// Of the latest passes, oldest first.
    lengths: VecDeque<Duration>,
    /// Times somebody asked and found that there is work and the thread gets on.
    beats: u64,
}

impl Pulse {
    /// A pass begins, and the one before it has ended.
    pub(crate) fn begin(&self, now: Instant) {
        let mut state = self.lock();
        state.end(now);
        state.since = Some(now);
        state.due = AT_LEAST;
    }

    /// What the step of the present pass is expected to take; None: nothing like it has been computed yet.
    pub(crate) fn expect(&self, step: Option<Duration>) {
        self.lock().due = step.map_or(UNKNOWN, |step| (step * TIMES).max(AT_LEAST));
    }

    /// The thread has nothing to do.
    pub(crate) fn rest(&self, now: Instant) {
        let mut state = self.lock();
        state.end(now);
        state.since = None;
    }

    /// How much longer than it should the present pass has taken; zero when the thread rests or is in time.
    pub(crate) fn stuck(&self, now: Instant) -> Duration {
        self.lock().stuck(now)
    }

    /// A count that grows each time it is asked for, as long as the thread gets on.
    pub(crate) fn beats(&self, has_work: bool, now: Instant) -> u64 {
        let mut state = self.lock();
        if has_work && state.stuck(now).is_zero() {
            state.beats += 1;
        }
        state.beats
    }

    /// A poisoned lock means that a thread panicked between two consistent states; going on is safe.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl State {
    fn end(&mut self, now: Instant) {
        let Some(since) = self.since else { return };
        if self.lengths.len() == LENGTHS_MAX {
            self.lengths.pop_front();
        }
        self.lengths.push_back(now.saturating_duration_since(since));
    }

    fn stuck(&self, now: Instant) -> Duration {
        let age = self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        age.saturating_sub(self.allowed())
    }

    /// As long as expected, or as 99 of 100 passes take, several times.
    fn allowed(&self) -> Duration {
        let mut lengths: Vec<Duration> = self.lengths.iter().copied().collect();
        if lengths.is_empty() {
            return self.due;
        }
        let at = lengths.len() * 99 / 100;
        let (_, p99, _) = lengths.select_nth_unstable(at);
        self.due.max(*p99 * TIMES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A thread that made `passes` passes of `length` and then began one more.
    fn after(passes: u32, length: Duration) -> (Pulse, Instant) {
        let (pulse, start) = (Pulse::default(), Instant::now());
        (0..=passes).for_each(|n| pulse.begin(start + length * n));
        (pulse, start + length * passes)
    }

    #[test]
    fn a_pass_is_stuck_when_it_takes_far_longer_than_others() {
        let check = |passes, length, age, stuck| {
            let (pulse, now) = after(passes, length);
            assert_eq!(pulse.stuck(now + age), stuck, "{passes} passes of {length:?}, then {age:?}");
        };
        check(100, ms(10), ms(900), ms(0));
        check(100, ms(10), ms(1_500), ms(500));
        check(100, ms(600), ms(1_700), ms(0));
        check(100, ms(600), ms(2_000), ms(200));
        check(3, ms(10), ms(1_500), ms(500));
        check(0, ms(10), ms(1_500), ms(500));
    }

    #[test]
    fn a_pass_may_take_what_its_step_is_expected_to() {
        let check = |passes, expected, age, stuck| {
            let (pulse, now) = after(passes, ms(10));
            pulse.expect(expected);
            assert_eq!(pulse.stuck(now + age), stuck, "{passes} passes, {expected:?} expected, then {age:?}");
            // The next pass is another one.
            pulse.begin(now + age);
            pulse.expect(Some(ms(1)));
            assert!(pulse.stuck(now + age * 5) > ms(0), "{passes} passes, {expected:?} expected, then {age:?}, and on");
        };
        for passes in [0, 3, 100] {
            check(passes, None, ms(9_000), ms(0));
            check(passes, None, ms(11_000), ms(1_000));
            check(passes, Some(ms(10)), ms(1_500), ms(500));
            check(passes, Some(ms(2_000)), ms(5_900), ms(0));
            check(passes, Some(ms(2_000)), ms(6_500), ms(500));
        }
    }

    #[test]
    fn a_resting_thread_is_never_stuck() {
        let (pulse, now) = after(100, ms(10));
        pulse.rest(now);
        assert_eq!(pulse.stuck(now + ms(100_000)), ms(0));
    }

    #[test]
    fn beats_stop_with_the_thread() {
        let (pulse, now) = after(100, ms(10));
        assert_eq!((pulse.beats(true, now), pulse.beats(true, now + ms(500))), (1, 2));
        assert_eq!((pulse.beats(true, now + ms(1_200)), pulse.beats(true, now + ms(9_000))), (2, 2));
        pulse.rest(now + ms(9_001));
        assert_eq!((pulse.beats(false, now + ms(9_002)), pulse.beats(true, now + ms(9_003))), (2, 3));
    }
}
