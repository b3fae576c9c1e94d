//! Waiting for a word of shared memory to change: spinning a little, then asleep in the kernel, never without end.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest spin before a rank sleeps: a few times what ranks in step are apart, about what a wake-up costs.
const SPIN: Duration = Duration::from_micros(20);
/// Longest sleep. A deadline counts sleeps, not the clock: to a process that was stopped meanwhile no time has passed.
#[cfg(target_os = "linux")]
const TICK: Duration = Duration::from_millis(10);
/// Where the kernel cannot wait for a word, it is looked at again and again.
#[cfg(not(target_os = "linux"))]
const TICK: Duration = Duration::from_micros(100);
/// Looks at the word between looks at the clock.
const LOOKS: u32 = 32;

/// The first value of `word` that is `done`, or None when it took longer than `limit`. `sleeping` counts who has to be
/// woken by `wake` after a change.
pub(super) fn wait(word: &AtomicU32, sleeping: &AtomicU32, limit: Duration, done: impl Fn(u32) -> bool) -> Option<u32> {
    if let Some(value) = spin(word, &done) {
        return Some(value);
    }
    sleeping.fetch_add(1, Ordering::SeqCst);
    let mut ticks = limit.as_nanos().div_ceil(TICK.as_nanos());
    let found = loop {
        let value = word.load(Ordering::SeqCst);
        if done(value) {
            break Some(value);
        }
        if ticks == 0 {
            break None;
        }
        if !sleep(word, value) {
            ticks -= 1;
        }
    };
    sleeping.fetch_sub(1, Ordering::SeqCst);
    found
}

#[allow(clippy::disallowed_methods, reason = "bounds a spin; no result depends on it")]
fn spin(word: &AtomicU32, done: &impl Fn(u32) -> bool) -> Option<u32> {
    let start = Instant::now();
    loop {
        for _ in 0..LOOKS {
            let value = word.load(Ordering::Acquire);
            if done(value) {
                return Some(value);
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return None;
        }
    }
}

/// Sleeps while the word is `value`, a tick at most. False: the tick is over.
#[cfg(target_os = "linux")]
fn sleep(word: &AtomicU32, value: u32) -> bool {
    let tick = libc::timespec { tv_sec: 0, tv_nsec: TICK.as_nanos() as libc::c_long };
    // SAFETY: the word outlives the call, which only reads it; processes may share it, so the futex is no private one.
    let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const tick) };
    result == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::ETIMEDOUT)
}

/// Wakes everybody who waits for the word.
#[cfg(target_os = "linux")]
pub(super) fn wake(word: &AtomicU32) {
    // SAFETY: a number of threads and an address, which the kernel does not write.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, libc::c_int::MAX) };
}

#[cfg(not(target_os = "linux"))]
#[allow(clippy::disallowed_methods, reason = "bounds a wait; no result depends on it")]
fn sleep(_: &AtomicU32, _: u32) -> bool {
    std::thread::sleep(TICK);
    false
}

#[cfg(not(target_os = "linux"))]
pub(super) fn wake(_: &AtomicU32) {}
