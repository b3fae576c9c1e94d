//! The simulator's own test: each bug on purpose has to be found, and how many seeds that takes is published.

use baton_core::planted::{self, Bug};

use crate::plan::Plan;
use crate::profile::Profile;
use crate::run::{Violation, run};

/// What became of one bug.
pub struct Hunt {
    pub bug: Bug,
    /// Seeds run, the one that found it included.
    pub seeds: u64,
    /// Its seed and what it violated; None: not found.
    pub found: Option<(u64, Violation)>,
}

/// This build has no bugs on purpose.
#[derive(Debug, thiserror::Error)]
#[error("this build has no planted bugs: build with --features planted")]
pub struct NotPlanted;

/// Runs seeds from 0 with the bug in force until one fails, at most `seeds_max`. One hunt at a time in a process.
pub fn hunt(bug: Bug, profile: &Profile, seeds_max: u64) -> Result<Hunt, NotPlanted> {
    if !planted::plant(Some(bug)) {
        return Err(NotPlanted);
    }
    let failing = |seed| run(&Plan::draw(seed, profile)).violation.map(|violation| (seed, violation));
    let found = (0..seeds_max).find_map(failing);
    planted::plant(None);
    let seeds = found.as_ref().map_or(seeds_max, |(seed, _)| seed + 1);
    Ok(Hunt { bug, seeds, found })
}
