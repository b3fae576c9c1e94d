//! Without the feature: there are no bugs on purpose.

use super::Bug;

/// Whether this bug is in force.
#[inline(always)]
pub const fn is(_: Bug) -> bool {
    false
}

/// Puts a bug into the process, or takes it out. False: this build cannot.
pub const fn plant(bug: Option<Bug>) -> bool {
    bug.is_none()
}
