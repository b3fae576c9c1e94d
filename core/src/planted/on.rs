//! With the feature: at most one bug is in force in the process.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::Bug;

static PLANTED: AtomicUsize = AtomicUsize::new(0);

/// Whether this bug is in force.
pub fn is(bug: Bug) -> bool {
    PLANTED.load(Ordering::Relaxed) == bug as usize
}

/// Puts a bug into the process, or takes it out. False: this build cannot.
pub fn plant(bug: Option<Bug>) -> bool {
    PLANTED.store(bug.map_or(0, |bug| bug as usize), Ordering::Relaxed);
    true
}
