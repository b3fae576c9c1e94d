//! What must hold in every run, one file each. An invariant looks at the world after each step, and once more when
//! everything has healed and should be quiet.

mod blocks;
mod contents;
mod drained;
mod durable;
mod ends_once;
mod healed;
mod ledgers;
mod linear;
mod lives;
mod members;
mod own_disk;
mod owners;
mod quiet;
mod quotas;
mod same_bytes;
mod stuck;
mod typed_errors;

use std::time::Duration;

use crate::host::World;
use crate::host::client::Told;

/// What an invariant looks at.
pub struct Look<'a> {
    pub now: Duration,
    /// Looks before this one.
    pub number: u64,
    pub world: &'a World,
    pub told: &'a [Told],
    /// How often clients have been told anything.
    pub tellings: u64,
    /// Since when there are no faults any more.
    pub healed: Option<Duration>,
}

impl Look<'_> {
    /// Whether it is the turn of what looks at one of so many, because it takes long.
    pub fn is_one_of(&self, many: u64) -> bool {
        self.number.is_multiple_of(many)
    }
}

/// One property.
pub trait Invariant {
    /// Its number in the list of `docs/sim.md`, and a few words.
    fn name(&self) -> &'static str;

    /// After each step, with faults or without.
    fn step(&mut self, _look: &Look) -> Result<(), String> {
        Ok(())
    }

    /// When all clients have ended and everything has had its time to come to rest. Called until it holds or time is up.
    fn end(&mut self, _look: &Look) -> Result<(), String> {
        Ok(())
    }
}

/// All of them.
pub fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::new(same_bytes::SameBytes::default()),
        Box::new(ends_once::EndsOnce::default()),
        Box::new(typed_errors::TypedErrors::default()),
        Box::new(owners::Owners::default()),
        Box::new(blocks::Blocks::default()),
        Box::new(contents::Contents::default()),
        Box::new(lives::Lives::default()),
        Box::new(quotas::Quotas::default()),
        Box::new(durable::OnDisks::default()),
        Box::new(ledgers::Ledgers::default()),
        Box::new(members::Members::default()),
        Box::new(own_disk::OwnDisk::default()),
        Box::new(linear::Linear),
        Box::new(drained::Drained),
        Box::new(stuck::Stuck::default()),
        Box::new(healed::Healed),
        Box::new(quiet::Quiet),
    ]
}
