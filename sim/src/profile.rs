//! Which faults a run draws from, and how many: data. A swarm leaves out some kinds in each run, because faults that never
//! stop hide what a calmer stretch would show.

use baton_core::Rng;

use crate::draw::chance;

/// A kind of fault that can be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    CrashCoordinator,
    CrashWorker,
    CrashGateway,
    CrashAmid,
    Partition,
    Isolate,
    Hold,
    Latency,
    DiskFull,
    DiskSlow,
    Hang,
    /// A worker that hangs until the last requests have ended, where another of its role goes on.
    Wedge,
    Flips,
    Drain,
    Upgrade,
    /// A leader dies between committing and answering.
    Unheard,
    /// Clocks that run fast, and wall clocks that are wrong.
    Clock,
    /// A bit on a coordinator's disk flips.
    Rot,
    SlowClients,
    /// A worker or gateway of the release before.
    Skew,
    Save,
    Limit,
    Starve,
    Flip,
    HandOver,
    /// All workers of a role at once.
    LosePool,
    /// A leader that is cut off and comes back, and then a loss of power.
    Depose,
    Stall,
    Leave,
    /// Every process is started again, one after the other.
    Rolling,
    /// Every process is of the release before, and is updated, one after the other.
    Update,
    /// A worker that is started again while what is sent to it is held.
    Rebirth,
    /// A coordinator's disk is lost.
    Replace,
    /// A coordinator leaves the group and comes back.
    Shrink,
    /// Another coordinator joins the group and leaves it.
    Grow,
}

use Weight::{
    Clock, CrashAmid, CrashCoordinator, CrashGateway, CrashWorker, Depose, DiskFull, DiskSlow, Drain, Flip, Flips,
    Grow, HandOver, Hang, Hold, Isolate, Latency, Leave, Limit, LosePool, Partition, Rebirth, Replace, Rolling, Rot,
    Save, Shrink, Skew, SlowClients, Stall, Starve, Unheard, Update, Upgrade, Wedge,
};

/// How faults are drawn.
#[derive(Clone, Debug)]
pub struct Profile {
    pub name: &'static str,
    pub about: &'static str,
    pub faults_min: u64,
    pub faults_max: u64,
    weights: &'static [(Weight, u64)],
    /// Each kind is left out of a run in so many of 100 cases.
    left_out: u64,
}

/// A profile nobody has written.
#[derive(Debug, thiserror::Error)]
#[error("no profile is named {0:?}; there are: {names}", names = Profile::names())]
pub struct UnknownProfile(pub String);

const PROFILES: &[Profile] = &[
    Profile {
        name: "swarm",
        about: "any faults, some kinds left out of each run",
        faults_min: 1,
        faults_max: 10,
        weights: &[
            (CrashCoordinator, 3),
            (CrashWorker, 4),
            (CrashGateway, 1),
            (CrashAmid, 3),
            (Partition, 4),
            (Isolate, 2),
            (Hold, 2),
            (Latency, 2),
            (DiskFull, 1),
            (DiskSlow, 2),
            (Hang, 2),
            (Flips, 3),
            (Drain, 2),
            (Upgrade, 1),
            (Save, 2),
            (Limit, 2),
            (Starve, 2),
            (Flip, 1),
            (HandOver, 1),
            (LosePool, 1),
            (Depose, 1),
            (Stall, 1),
            (Leave, 1),
            (Rolling, 1),
            (Update, 1),
            (Skew, 1),
            (Replace, 1),
            (Shrink, 1),
            (Grow, 1),
            (Rebirth, 2),
            (Unheard, 1),
            (Clock, 2),
            (Rot, 1),
            (SlowClients, 1),
            (Wedge, 1),
        ],
        left_out: 40,
    },
    Profile { name: "calm", about: "no faults", faults_min: 0, faults_max: 0, weights: &[], left_out: 0 },
    Profile {
        name: "network",
        about: "partitions of all shapes, held messages, latency, slow clients and fast clocks",
        faults_min: 2,
        faults_max: 10,
        weights: &[
            (Partition, 4),
            (Isolate, 2),
            (Hold, 3),
            (Latency, 2),
            (Stall, 4),
            (Depose, 1),
            (Unheard, 1),
            (Clock, 2),
            (SlowClients, 1),
        ],
        left_out: 0,
    },
    Profile {
        name: "crash",
        about: "processes die and come back",
        faults_min: 2,
        faults_max: 10,
        weights: &[
            (CrashCoordinator, 3),
            (CrashWorker, 4),
            (CrashGateway, 1),
            (CrashAmid, 4),
            (Drain, 1),
            (LosePool, 2),
            (Rebirth, 4),
            (Unheard, 2),
        ],
        left_out: 0,
    },
    Profile {
        name: "disk",
        about: "coordinators' disks are slow, full, lose what was not synced, and rot",
        faults_min: 2,
        faults_max: 8,
        weights: &[
            (CrashCoordinator, 3),
            (CrashAmid, 3),
            (DiskFull, 2),
            (DiskSlow, 3),
            (Isolate, 2),
            (Save, 2),
            (Depose, 3),
            (Rot, 2),
            (Unheard, 1),
        ],
        left_out: 0,
    },
    Profile {
        name: "operator",
        about: "drains, roles, versions, rolling restarts, limits of tenants, saved ledgers, leaders by order, while processes die",
        faults_min: 2,
        faults_max: 10,
        weights: &[
            (Drain, 3),
            (Flip, 3),
            (HandOver, 2),
            (Rolling, 1),
            (Update, 2),
            (Skew, 2),
            (Upgrade, 2),
            (Limit, 4),
            (Save, 2),
            (CrashCoordinator, 4),
            (CrashWorker, 2),
            (CrashGateway, 2),
            (Isolate, 2),
        ],
        left_out: 20,
    },
    Profile {
        name: "members",
        about: "coordinators join, leave, lose their disks and are replaced, and hand leadership over, while others die",
        faults_min: 2,
        faults_max: 8,
        weights: &[
            (Replace, 4),
            (Shrink, 3),
            (Grow, 4),
            (HandOver, 3),
            (CrashCoordinator, 3),
            (CrashAmid, 2),
            (Partition, 2),
            (Isolate, 2),
            (DiskSlow, 1),
            (Save, 2),
            (Depose, 1),
            (Rot, 1),
        ],
        left_out: 20,
    },
    Profile {
        name: "handoff",
        about: "workers die, hang and damage blocks in the middle of handoffs",
        faults_min: 2,
        faults_max: 10,
        weights: &[
            (CrashWorker, 2),
            (CrashAmid, 3),
            (Partition, 3),
            (Hold, 2),
            (Latency, 3),
            (Hang, 2),
            (Flips, 5),
            (Drain, 2),
            (Upgrade, 2),
            (Starve, 3),
            (Leave, 4),
            (Stall, 1),
            (Rebirth, 2),
            (Wedge, 2),
        ],
        left_out: 0,
    },
];

impl Profile {
    pub fn named(name: &str) -> Result<Profile, UnknownProfile> {
        PROFILES.iter().find(|profile| profile.name == name).cloned().ok_or_else(|| UnknownProfile(name.to_string()))
    }

    pub fn all() -> &'static [Profile] {
        PROFILES
    }

    fn names() -> String {
        PROFILES.iter().map(|profile| profile.name).collect::<Vec<_>>().join(", ")
    }

    /// The kinds of this run; at least one where there are any.
    pub(crate) fn weights(&self, rng: &mut Rng) -> Vec<(Weight, u64)> {
        let kept: Vec<_> = self.weights.iter().filter(|_| !chance(rng, self.left_out)).copied().collect();
        if kept.is_empty() { self.weights.to_vec() } else { kept }
    }
}
