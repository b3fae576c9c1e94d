//! Whether the engine thread gets on: how long its present pass (commands and one step) has taken, against how long
//! passes take.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use baton_core::limits::STEP_STUCK_MS;
use tokio::time::Instant;

/// Passes whose lengths are remembered.
const LENGTHS_MAX: usize = 512;
/// With fewer passes than this the longest usual one is not known yet.
const LENGTHS_MIN: usize = 32;
/// What a pass may take until then: the first prompt on a slow machine is no deadlock.
const UNKNOWN: Duration = Duration::from_millis(10 * STEP_STUCK_MS);

/// Shared by the engine thread, which writes, and the heartbeats, which read.
#[derive(Debug, Default)]
pub(crate) struct Pulse(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// When the present pass began; None while the thread rests.
    since: Option<Instant>,
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

    /// Three times what 99 of 100 passes take.
    fn allowed(&self) -> Duration {
        if self.lengths.len() < LENGTHS_MIN {
            return UNKNOWN;
        }
        let mut lengths: Vec<Duration> = self.lengths.iter().copied().collect();
        let at = lengths.len() * 99 / 100;
        let (_, p99, _) = lengths.select_nth_unstable(at);
        (*p99 * 3).max(Duration::from_millis(STEP_STUCK_MS))
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
        check(3, ms(10), ms(9_000), ms(0));
        check(3, ms(10), ms(11_000), ms(1_000));
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
