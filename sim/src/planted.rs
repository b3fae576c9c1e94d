//! The simulator's own test: each bug on purpose has to be found, and how many seeds that takes is published.

use baton_core::planted::{self, Bug};

use crate::plan::Plan;
use crate::profile::Profile;
use crate::run::{Report, Violation};

/// What became of one bug.
pub struct Hunt {
    /// Seeds run, the one that found it included.
    pub seeds: u64,
    /// Its seed and what it violated; None: not found.
    pub found: Option<(u64, Violation)>,
}

/// The profile whose faults are most likely to bring the bug out.
pub fn profile_of(bug: Bug) -> &'static str {
    match bug {
        Bug::VoteNotDurable | Bug::EntryNotDurable | Bug::TornTailRefused | Bug::TruncateForgotten => "disk",
        Bug::StreamsOutliveNode => "disk",
        Bug::SnapshotForgets
        | Bug::RefillOnLead
        | Bug::QuotaUnchecked
        | Bug::IgnoreNumerics
        | Bug::ResumeLosesToken => "operator",
        Bug::SkipChecksum | Bug::CommitEarly | Bug::FreeEarly => "handoff",
        Bug::OrphansKept | Bug::SameLife | Bug::SkipLifeCheck | Bug::SilentEnd => "crash",
        Bug::ApplyTwice | Bug::SkipEpochCheck => "network",
        Bug::SameHandle | Bug::GreenHealth => "handoff",
        Bug::EmptyVotes | Bug::NumberTwice => "members",
        _ => "swarm",
    }
}

/// A bug that cannot be put in.
#[derive(Debug, thiserror::Error)]
pub enum NotPlanted {
    #[error("this build has no planted bugs: build with --features planted")]
    Build,
    #[error("no planted bug is named {0:?}; there are: {names}", names = names())]
    Unknown(String),
}

fn names() -> String {
    Bug::ALL.iter().map(|bug| format!("{bug:?}")).collect::<Vec<_>>().join(", ")
}

/// Puts the bug of that name into this process, for all that it runs.
pub fn plant(name: &str) -> Result<(), NotPlanted> {
    let bug = Bug::named(name).ok_or_else(|| NotPlanted::Unknown(name.to_string()))?;
    if planted::plant(Some(bug)) { Ok(()) } else { Err(NotPlanted::Build) }
}

/// Whether this build has any.
pub fn possible() -> Result<(), NotPlanted> {
    if planted::plant(Some(Bug::ALL[0])) && planted::plant(None) { Ok(()) } else { Err(NotPlanted::Build) }
}

/// Runs seeds from 0 until one fails, at most `seeds_max`. `run` runs a plan with the bug in force, each time as if nothing
/// had run before.
pub fn hunt<E>(profile: &Profile, seeds_max: u64, mut run: impl FnMut(&Plan) -> Result<Report, E>) -> Result<Hunt, E> {
    for seed in 0..seeds_max {
        if let Some(violation) = run(&Plan::draw(seed, profile))?.violation {
            return Ok(Hunt { seeds: seed + 1, found: Some((seed, violation)) });
        }
    }
    Ok(Hunt { seeds: seeds_max, found: None })
}
