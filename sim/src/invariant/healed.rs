//! L1: without faults, requests succeed again, and there is one leader whom all follow, with equal ledgers. Q2: they have to
//! wait for nobody: all that was asked before has ended, or has had its time.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Invariant, Look};
use crate::host::client::End;
use crate::run::HEALING;

/// A few hundred steps of an engine, which no request of a run takes.
const WAIT_MAX: Duration = Duration::from_secs(6);

/// So much more where a worker hangs meanwhile: until that is known, and what it was given goes to another.
const WEDGED_MAX: Duration = Duration::from_millis(3_500);

pub(super) struct Healed;

impl Invariant for Healed {
    fn name(&self) -> &'static str {
        "L1 heals"
    }

    fn step(&mut self, look: &Look) -> Result<(), String> {
        let wait_max = if look.world.seen().wedged { WAIT_MAX + WEDGED_MAX } else { WAIT_MAX };
        for told in look.told.iter().filter(|told| told.ask.at.is_none()) {
            match &told.ended {
                None => {}
                Some((at, End::Complete)) => {
                    let waited = look.healed.map_or(Duration::ZERO, |healed| at.saturating_sub(healed + HEALING));
                    if waited > wait_max {
                        return Err(format!("request {} took {waited:?} in a cluster at rest", told.ask.number));
                    }
                }
                Some((_, end)) => {
                    return Err(format!("request {}, sent after all had healed: {end:?}", told.ask.number));
                }
            }
        }
        Ok(())
    }

    fn end(&mut self, look: &Look) -> Result<(), String> {
        let seen = look.world.seen();
        let all = look.world.topology.coordinator_names();
        let observed: Vec<_> = seen.coordinators.values().filter_map(|observer| observer.look()).collect();
        let there: BTreeSet<&String> = seen.coordinators.keys().collect();
        if observed.len() != all.len() || !all.iter().all(|host| there.contains(host)) {
            return Err(format!("{} of {} coordinators take part, {there:?} are there", observed.len(), all.len()));
        }
        let own: BTreeSet<u64> = observed.iter().map(|o| o.node.0).collect();
        for (host, observer) in &seen.coordinators {
            let group = observer.group().filter(|group| group.voters != own || group.in_change);
            if let Some(group) = group.or(observer.group().filter(|group| !group.unsettled.is_empty())) {
                return Err(format!("{own:?} take part, and {host} knows the group as {group:?}"));
            }
        }
        let led: BTreeSet<_> = observed.iter().map(|o| (o.leader, o.term)).collect();
        if led.len() != 1 || observed[0].leader.is_none() {
            return Err(format!("coordinators do not agree who leads: {led:?}"));
        }
        let indices: BTreeSet<u64> = observed.iter().map(|o| o.index).collect();
        if indices.len() != 1 {
            return Err(format!("ledgers end at different entries: {indices:?}"));
        }
        Ok(())
    }
}
