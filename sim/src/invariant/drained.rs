//! C1: a worker that was drained, or that took the other role, held nothing when its life ended, and nobody held anything
//! of it.

use super::{Invariant, Look};

pub(super) struct Drained;

impl Invariant for Drained {
    fn name(&self) -> &'static str {
        "C1 a drained worker holds nothing"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        match look.world.seen().held_at_end.first() {
            None => Ok(()),
            Some((host, blocks)) => Err(format!("{host} has ended a life in order with {blocks} blocks in use")),
        }
    }
}
