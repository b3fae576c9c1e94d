//! S3: a request that a gateway has accepted ends with its last token or with one error, unless its client went away or
//! that gateway died. Nothing hangs beyond its deadline.

use std::time::Duration;

use super::{Invariant, Look};
use crate::host::client::{End, Told};
use crate::host::gateway::DEADLINE_MS;

/// What a request may take beyond its deadline: tries that were refused come before it.
const SLACK: Duration = Duration::from_secs(20);

/// How often what has not ended is looked at while nobody is told anything.
const ONE_OF: u64 = 10;

#[derive(Default)]
pub(super) struct EndsOnce {
    /// Tellings before the last look.
    looked: Option<u64>,
}

impl Invariant for EndsOnce {
    fn name(&self) -> &'static str {
        "S3 ends once"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        if self.looked.replace(look.tellings) == Some(look.tellings) && !look.is_one_of(ONE_OF) {
            return Ok(());
        }
        look.told.iter().try_for_each(|told| check(told, look))
    }
}

fn check(told: &Told, look: &Look) -> Result<(), String> {
    let number = told.ask.number;
    match (&told.ended, told.accepted) {
        (None, Some(at)) if look.now > at + Duration::from_millis(DEADLINE_MS) + SLACK => {
            Err(format!("request {number}: accepted at {at:?} and not ended"))
        }
        (Some((_, End::Broken(why))), _) if !its_gateway_died(told, look) => {
            Err(format!("request {number}: its stream broke off, and its gateway did not die: {why}"))
        }
        _ => Ok(()),
    }
}

/// Whether the life of the gateway that accepted it is over.
fn its_gateway_died(told: &Told, look: &Look) -> bool {
    let Some((host, life)) = &told.gateway else { return false };
    look.world.seen().crashed.get(host).is_some_and(|lives| lives.contains(life))
}
