//! What an operator does about the coordinators' group: disks are lost one at a time and only where the group can do
//! without, because more is data loss that no protocol survives; whoever was taken out, or has lost its disk, joins again.

use std::collections::BTreeSet;

use baton_coordinator::Group;
use baton_coordinator::log::Disk;
use turmoil::Sim;

use crate::faults::stop;
use crate::host::World;

/// Voters that a group has before one of them may be lost or go.
const ENOUGH: usize = 3;

/// Why a coordinator's process has ended, where that is an operator's business.
pub(crate) enum Ending {
    /// It was taken out of the group.
    Removed,
    /// Its directory is empty, and it has taken part before.
    Lost,
    /// What is on its disk is not what it wrote.
    Damaged,
}

impl Ending {
    pub(crate) fn of(why: &str) -> Option<Ending> {
        if why.contains("was removed from its group") {
            Some(Ending::Removed)
        } else if why.contains("baton coordinator replace") {
            Some(Ending::Lost)
        } else if why.contains("is damaged at byte") {
            Some(Ending::Damaged)
        } else {
            None
        }
    }
}

/// The group as its leader knows it, and the term it leads in; of several the latest.
pub(crate) fn group(world: &World) -> Option<(u64, Group)> {
    let seen = world.seen();
    let leading = seen.coordinators.values().filter_map(|observer| Some((observer.leads()?.1, observer)));
    let (term, leader) = leading.max_by_key(|(term, _)| *term)?;
    Some((term, leader.group()?))
}

/// Notes whose place has been taken.
pub(crate) fn follow(world: &World) {
    if world.seen().lost.is_empty() {
        return;
    }
    let Some((_, group)) = group(world).filter(|(_, group)| !group.in_change) else { return };
    let mut seen = world.seen();
    let numbers = seen.numbers.clone();
    seen.lost.retain(|host, old| {
        let new = numbers.get(host).is_some_and(|new| new != old && group.voters.contains(new));
        !(new && !group.voters.contains(old) && !group.learners.contains(old))
    });
}

/// Whether the group is whole, at rest, and large enough to do without the coordinator.
pub(crate) fn may_go(world: &World, host: &str) -> bool {
    let Some((_, group)) = group(world).filter(|(_, group)| !group.in_change && group.unsettled.is_empty()) else {
        return false;
    };
    let seen = world.seen();
    let own: BTreeSet<u64> =
        world.topology.coordinator_names().iter().filter_map(|name| seen.numbers.get(name).copied()).collect();
    // Before the group has written down that a node is of it, one that has lost its disk begins anew; nothing
    // is lost with it, because a leader that leads without it has to say so.
    let whole = own.len() >= ENOUGH && own.is_subset(&group.voters) && own.is_subset(&group.known);
    let original_leaves = seen.leaving.iter().any(|leaving| *leaving != world.topology.spare());
    whole && seen.lost.is_empty() && !original_leaves && seen.numbers.contains_key(host)
}

/// An operator has ordered it to leave.
pub(crate) fn ordered(world: &World, host: &str) {
    world.seen().leaving.insert(host.to_string());
}

/// Loses the coordinator's disk; false where the group could not do without.
pub(crate) fn lose(sim: &mut Sim, world: &World, host: &str) -> bool {
    if !may_go(world, host) {
        return false;
    }
    world.record.note(host, "its disk is lost, and an empty one is in its place");
    stop(sim, world, host);
    world.wipe(host);
    let number = world.seen().numbers[host];
    world.seen().lost.insert(host.to_string(), number);
    // One that has joined before does so again; one of the first group finds out that it has to.
    if world.seen().joins.contains_key(host) {
        let join = world.join(host, Some(number));
        world.seen().joins.insert(host.to_string(), join);
    }
    world.record.note(host, "is started again");
    sim.bounce(host);
    true
}

/// A log of fewer bytes has too few frames for damage to lie before others.
const ROTTEN_BYTES_MIN: usize = 1_000;

/// Flips a bit in the first half of the coordinator's largest file, `part` thousandths into it, and starts it again; false
/// where the group could not do without, or there is no such file. What lies in the last frame of a log cannot be told from
/// what a loss of power leaves of it.
pub(crate) fn rot(sim: &mut Sim, world: &World, host: &str, part: u32) -> bool {
    let disk = &world.disks[host];
    let names = disk.list().unwrap_or_default();
    let sizes = names.into_iter().filter_map(|name| Some((disk.read(&name).ok()?.len(), name)));
    let Some((bytes, name)) = sizes.max().filter(|(bytes, _)| *bytes >= ROTTEN_BYTES_MIN) else { return false };
    if !may_go(world, host) {
        return false;
    }
    let at = bytes / 2 * part as usize / 1_000;
    world.record.note(host, format!("a bit in byte {at} of {name} flips"));
    stop(sim, world, host);
    disk.edit(&name, |bytes| bytes[at] ^= 1 << (part % 8));
    {
        let mut seen = world.seen();
        let number = seen.numbers[host];
        seen.lost.insert(host.to_string(), number);
        seen.rotten.insert(host.to_string());
    }
    world.record.note(host, "is started again");
    sim.bounce(host);
    true
}

/// A coordinator that has ended for this reason joins with an empty disk; false: it stays away for good.
pub(crate) fn back(world: &World, host: &str, ending: &Ending) -> bool {
    world.wipe(host);
    let mut seen = world.seen();
    seen.leaving.remove(host);
    if host == world.topology.spare() {
        seen.joins.remove(host);
        seen.numbers.remove(host);
        return false;
    }
    let number = seen.numbers.get(host).copied();
    let replaces = match ending {
        Ending::Removed => {
            seen.numbers.remove(host);
            None
        }
        Ending::Lost | Ending::Damaged => {
            seen.rotten.remove(host);
            number
        }
    };
    let join = world.join(host, replaces);
    seen.joins.insert(host.to_string(), join);
    true
}
