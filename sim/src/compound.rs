//! Blows of several faults that belong together: what only happens when one thing follows another.

use baton_core::{Rng, Role};

use crate::draw::{between, chance};
use crate::plan::{FAULTS_FROM_MS, FAULTS_UNTIL_MS, Fault, What};
use crate::profile::Weight;
use crate::topology::Topology;

/// Longer than a request waits for a worker to come back.
const POOL_LOST_MS: (u64, u64) = (5_300, 6_200);
/// Longer than a gateway leaves out a worker that it has lost; what it then sends is held back, too, and it loses it again.
const STALLED_NEW_MS: (u64, u64) = (3_800, 4_600);
const STALLED_MS: (u64, u64) = (8_300, 9_500);
/// How long the moment for clients to leave is waited for.
const LEAVE_MS: u64 = 4_000;
/// The longest that the spare coordinator is meant to be of the group.
const GROWN_MS: u64 = 4_000;
/// When a worker begins to hang for good, and until when: the last requests have long been sent by then.
const WEDGED_FROM_MS: (u64, u64) = (3_500, 6_500);
const WEDGED_UNTIL_MS: u64 = 14_000;
/// Between one process of a rolling restart and the next.
const ROLLING_MS: u64 = 500;

/// The faults of a blow that begins about then; None: it is a single fault.
pub(crate) fn draw(rng: &mut Rng, topology: &Topology, chosen: Weight, at_ms: u64) -> Option<Vec<Fault>> {
    let early = |rng: &mut Rng, for_ms: u64| between(rng, FAULTS_FROM_MS, FAULTS_UNTIL_MS - for_ms);
    Some(match chosen {
        Weight::LosePool => {
            let role = if chance(rng, 70) { Role::Decode } else { Role::Prefill };
            let for_ms = between(rng, POOL_LOST_MS.0, POOL_LOST_MS.1);
            let at_ms = early(rng, for_ms);
            let lost = |host| Fault { at_ms, for_ms, what: What::Crash { host, kept: 0 } };
            topology.worker_names(role).into_iter().map(lost).collect()
        }
        Weight::Depose => depose(rng, topology, at_ms),
        Weight::Stall => {
            let long = chance(rng, 50);
            let (new_ms, for_ms) = match long {
                true => (between(rng, STALLED_NEW_MS.0, STALLED_NEW_MS.1), between(rng, STALLED_MS.0, STALLED_MS.1)),
                false => (0, between(rng, 500, 5_000)),
            };
            let at_ms = if long { between(rng, FAULTS_FROM_MS, 3_000) } else { early(rng, for_ms) };
            let (from, to) = match chance(rng, 70) {
                true => (topology.gateway_names(), topology.worker_names(Role::Decode)),
                false => (topology.worker_names(Role::Decode), topology.worker_names(Role::Prefill)),
            };
            let (from, to) = (any(rng, from), any(rng, to));
            vec![Fault { at_ms, for_ms, what: What::Stall { from, to, new_ms } }]
        }
        Weight::Leave => {
            let host = any(rng, topology.worker_names(Role::Decode));
            let from = any(rng, topology.worker_names(Role::Prefill));
            let what = What::Leave { host, from, after_ms: between(rng, 0, 40) };
            vec![Fault { at_ms: early(rng, LEAVE_MS), for_ms: LEAVE_MS, what }]
        }
        Weight::Wedge => wedge(rng, topology),
        Weight::Rolling => rolling(rng, topology),
        Weight::Update => update(rng, topology),
        Weight::Grow => grow(rng, topology, at_ms),
        Weight::Rebirth => rebirth(rng, topology, at_ms),
        _ => return None,
    })
}

/// A leader goes on without its peers, comes back to a group that has gone on without it, and then all lose power.
fn depose(rng: &mut Rng, topology: &Topology, at_ms: u64) -> Vec<Fault> {
    let (for_ms, later_ms) = (between(rng, 400, 2_000), between(rng, 200, 1_200));
    let at_ms = at_ms.min(FAULTS_UNTIL_MS - for_ms - later_ms - 1_000);
    let mut faults = vec![Fault { at_ms, for_ms, what: What::CutLeader {} }];
    for host in topology.coordinator_names() {
        let kept = rng.below(200) as usize;
        let lost_ms = between(rng, 50, 600);
        faults.push(Fault { at_ms: at_ms + for_ms + later_ms, for_ms: lost_ms, what: What::Crash { host, kept } });
    }
    faults
}

/// A worker is started again while what is sent to it is held, and so comes to another life than it was meant for.
fn rebirth(rng: &mut Rng, topology: &Topology, at_ms: u64) -> Vec<Fault> {
    let (decodes, prefills) = (topology.worker_names(Role::Decode), topology.worker_names(Role::Prefill));
    let (from, to) = match chance(rng, 50) {
        true => (topology.gateway_names(), decodes),
        false => (decodes, prefills),
    };
    let (a, b) = (any(rng, from), any(rng, to));
    let (after_ms, lost_ms, held_ms) = (between(rng, 20, 200), between(rng, 5, 100), between(rng, 100, 500));
    let crash = What::Crash { host: b.clone(), kept: 0 };
    vec![
        Fault { at_ms, for_ms: after_ms + held_ms, what: What::Hold { a, b } },
        Fault { at_ms: at_ms + after_ms, for_ms: lost_ms, what: crash },
    ]
}

/// A worker hangs and answers, until the last requests have ended; another of its role goes on, or there is none that may.
fn wedge(rng: &mut Rng, topology: &Topology) -> Vec<Fault> {
    let pools = [Role::Decode, Role::Prefill].map(|role| topology.worker_names(role));
    let mut pools: Vec<Vec<String>> = pools.into_iter().filter(|pool| pool.len() > 1).collect();
    if pools.is_empty() {
        return Vec::new();
    }
    let pool = pools.swap_remove(rng.below(pools.len() as u64) as usize);
    let (host, at_ms) = (any(rng, pool), between(rng, WEDGED_FROM_MS.0, WEDGED_FROM_MS.1));
    vec![Fault { at_ms, for_ms: WEDGED_UNTIL_MS - at_ms, what: What::Wedge { host } }]
}

/// The spare coordinator joins for a while, and in half of the cases dies meanwhile.
fn grow(rng: &mut Rng, topology: &Topology, at_ms: u64) -> Vec<Fault> {
    let for_ms = between(rng, 500, (FAULTS_UNTIL_MS - at_ms).min(GROWN_MS));
    let host = topology.spare();
    let mut faults = vec![Fault { at_ms, for_ms, what: What::Grow { host: host.clone() } }];
    if chance(rng, 50) {
        let (after_ms, kept) = (between(rng, 0, for_ms), rng.below(200) as usize);
        let lost_ms = between(rng, 50, 1_000).min(FAULTS_UNTIL_MS - at_ms - after_ms);
        let what = match chance(rng, 50) {
            true => What::Crash { host, kept },
            false => What::CrashAmid { host, kept },
        };
        faults.push(Fault { at_ms: at_ms + after_ms, for_ms: lost_ms, what });
    }
    faults
}

/// Every process is started again, one after the other; prefill workers as the other version first, and back at the end.
fn rolling(rng: &mut Rng, topology: &Topology) -> Vec<Fault> {
    let mut at_ms = between(rng, FAULTS_FROM_MS, FAULTS_FROM_MS + 1_000);
    let mut faults = Vec::new();
    for host in topology.servers() {
        let upgrades = topology.worker_names(Role::Prefill).contains(&host);
        let (for_ms, what) = match upgrades {
            true => (FAULTS_UNTIL_MS - at_ms, What::Upgrade { host }),
            false => (between(rng, 50, 300), What::Crash { host, kept: rng.below(200) as usize }),
        };
        faults.push(Fault { at_ms, for_ms, what });
        at_ms += ROLLING_MS;
    }
    faults
}

/// Every process begins as one of the release before, and is updated as an operator does it: coordinators first, then workers,
/// then gateways. In half of the cases somebody hands leadership over before the last coordinator's turn.
fn update(rng: &mut Rng, topology: &Topology) -> Vec<Fault> {
    let mut until_ms = between(rng, FAULTS_FROM_MS, FAULTS_FROM_MS + 1_000);
    let every_ms = between(rng, 300, ROLLING_MS);
    let mut faults = Vec::new();
    let last = topology.coordinators;
    for (number, host) in topology.servers().into_iter().enumerate() {
        if number + 1 == last && last > 1 && chance(rng, 50) {
            let to = topology.coordinator_names().swap_remove(0);
            faults.push(Fault { at_ms: until_ms - every_ms / 2, for_ms: 1, what: What::HandOver { to } });
        }
        faults.push(Fault { at_ms: 0, for_ms: until_ms, what: What::Earlier { host } });
        until_ms += every_ms;
    }
    faults
}

fn any(rng: &mut Rng, mut hosts: Vec<String>) -> String {
    hosts.swap_remove(rng.below(hosts.len() as u64) as usize)
}
