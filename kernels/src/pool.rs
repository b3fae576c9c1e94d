//! Threads that run one job together: the calling thread takes part, the others wait briefly spinning, then parked.
//! Work is split statically by part number; nothing is stolen, so that results cannot depend on timing.
//!
//! Threads are not pinned: two workers on one machine share its cores, and a pinned pair would fight for one.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread spins before it parks, at least: about what a wake-up costs.
const SPIN_MIN: Duration = Duration::from_micros(10);
/// The same at most: what parts of one operation differ by.
const SPIN_MAX: Duration = Duration::from_micros(50);

/// One thread's share of a job.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) index: usize,
    pub(crate) of: usize,
}

impl Part {
    /// This part's contiguous share of `count` equal pieces.
    pub(crate) fn share(self, count: usize) -> std::ops::Range<usize> {
        count * self.index / self.of..count * (self.index + 1) / self.of
    }
}

type Work = &'static (dyn Fn(Part) + Sync);

pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    patience: Patience,
}

struct Shared {
    /// What to run now and whom to wake when the last part is done.
    job: Mutex<Option<(Work, Thread)>>,
    /// Counts jobs; a change starts one.
    generation: AtomicU32,
    /// Parts other than the caller's that still run.
    pending: AtomicU32,
    panicked: AtomicBool,
    stop: AtomicBool,
}

impl Pool {
    #[allow(clippy::disallowed_methods, reason = "the kernels' threads live here, named and joined on drop")]
    pub(crate) fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            job: Mutex::new(None),
            generation: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let start = |index| {
            let (shared, part) = (shared.clone(), Part { index, of: threads });
            let thread = thread::Builder::new().name(format!("kernels-{index}"));
            thread.spawn(move || shared.serve(part)).expect("the system starts a thread")
        };
        Pool { threads: (1..threads).map(start).collect(), shared, patience: Patience::default() }
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs every part of the job and returns when all are done. `&mut`: one job at a time.
    ///
    /// # Panics
    /// If a part does, after all parts have ended.
    pub(crate) fn run(&mut self, job: &(dyn Fn(Part) + Sync)) {
        let part = Part { index: 0, of: self.threads() };
        if self.threads.is_empty() {
            return job(part);
        }
        // SAFETY: `finish` below returns only after every part has ended, also when one panics, so that the job
        // outlives all its uses.
        let job: Work = unsafe { std::mem::transmute::<&(dyn Fn(Part) + Sync), Work>(job) };
        *self.shared.job() = Some((job, thread::current()));
        self.shared.pending.store(self.threads.len() as u32, Ordering::Relaxed);
        self.shared.generation.fetch_add(1, Ordering::Release);
        self.threads.iter().for_each(|thread| thread.thread().unpark());
        let own = catch_unwind(AssertUnwindSafe(|| job(part)));
        self.finish();
        own.unwrap_or_else(|panic| resume_unwind(panic));
        assert!(!self.shared.panicked.swap(false, Ordering::Relaxed), "a kernel thread panicked");
    }

    fn finish(&mut self) {
        self.patience.wait_until(|| self.shared.pending.load(Ordering::Acquire) == 0);
        *self.shared.job() = None;
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.generation.fetch_add(1, Ordering::Release);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            thread.join().expect("kernel threads catch panics");
        }
    }
}

impl Shared {
    fn job(&self) -> MutexGuard<'_, Option<(Work, Thread)>> {
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, part: Part) {
        let (mut seen, mut patience) = (0, Patience::default());
        loop {
            patience.wait_until(|| self.generation.load(Ordering::Acquire) != seen);
            seen = seen.wrapping_add(1);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let Some((job, caller)) = self.job().clone() else { continue };
            if catch_unwind(AssertUnwindSafe(|| job(part))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            if self.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
                caller.unpark();
            }
        }
    }
}

/// How long one thread spins for what it waits for. Where that came in time it waits longer the next time; where it did not, the
/// other threads may be waiting for a core, which a thread that parks leaves to them, and gets back at once when it is woken.
struct Patience(Duration);

impl Default for Patience {
    fn default() -> Patience {
        Patience(SPIN_MAX)
    }
}

impl Patience {
    /// Spins a little, then parks until the condition holds. Whoever makes it true unparks this thread.
    #[allow(clippy::disallowed_methods, reason = "bounds a spin; no result depends on it")]
    fn wait_until(&mut self, condition: impl Fn() -> bool) {
        let (start, mut in_time) = (Instant::now(), true);
        while !condition() {
            if start.elapsed() > self.0 {
                in_time = false;
                thread::park();
            }
            std::hint::spin_loop();
        }
        self.0 = if in_time { (self.0 * 2).min(SPIN_MAX) } else { (self.0 / 2).max(SPIN_MIN) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Every part of every job runs exactly once, at any thread count.
    #[test]
    fn runs_each_part_once() {
        for threads in 1..=4 {
            let mut pool = Pool::new(threads);
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..1000 {
                pool.run(&|part| {
                    counts[part.index].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1000));
        }
    }

    #[test]
    fn shares_cover_everything_once() {
        for (of, count) in [(1, 7), (3, 7), (4, 2), (5, 100)] {
            let all: Vec<usize> = (0..of).flat_map(|index| Part { index, of }.share(count)).collect();
            assert_eq!(all, (0..count).collect::<Vec<_>>());
        }
    }

    /// A panic in any part reaches the caller, and the pool works afterwards.
    #[test]
    fn survives_a_panic() {
        let mut pool = Pool::new(3);
        for broken in 0..3 {
            let job = |part: Part| assert!(part.index != broken, "planted");
            assert!(catch_unwind(AssertUnwindSafe(|| pool.run(&job))).is_err());
            pool.run(&|_| {});
        }
    }
}
