//! The faults of one run as data: what happens, to whom, when, for how long. A plan can be saved, edited, made smaller and
//! run again without the generator that drew it.

use serde::{Deserialize, Serialize};

use crate::compound;
use crate::draw::{Purpose, between, chance, rng};
use crate::profile::{Profile, UnknownProfile, Weight};
use crate::topology::{Topology, kind};

/// Grows when an older plan would mean something else.
pub const VERSION: u32 = 1;
/// Faults begin and end in this span of virtual time; after it everything must heal.
pub const FAULTS_FROM_MS: u64 = 1_200;
pub const FAULTS_UNTIL_MS: u64 = 8_000;

const TICK_MS_MAX: u64 = 20;
/// Most faults are over within so long; the others may last as long as there are faults.
const SHORT_MS: u64 = 3_000;
const LONG_PERCENT: u64 = 20;

/// How many of 100 runs have workers of one machine, and how many workers a machine has.
const MACHINE_PERCENT: u64 = 25;
const MACHINE_WORKERS: (u64, u64) = (2, 3);

/// Everything that decides a run: hosts and requests follow from the seed, machines and faults stand here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub version: u32,
    pub seed: u64,
    pub profile: String,
    /// The run's tick, so that a plan which is kept stays what it was; None: as the seed draws it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tick_ms: Option<u64>,
    /// Workers that are processes of one machine: what strikes the machine, its network or its clock strikes them all. Whoever
    /// stands in none has one of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub machines: Vec<Vec<String>>,
    pub faults: Vec<Fault>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    pub at_ms: u64,
    /// It is over after so long.
    pub for_ms: u64,
    pub what: What,
}

/// One kind of fault with whom it strikes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum What {
    /// The process dies; of what a disk was not told to sync the first `kept` bytes survive. It is started again at the end.
    Crash { host: String, kept: usize },
    /// The process dies likewise once it is in the middle of something: a coordinator between writing and syncing, a worker
    /// while blocks are on their way or its engine works.
    CrashAmid { host: String, kept: usize },
    /// Nothing passes between the two.
    Partition { a: String, b: String },
    /// Nothing passes from the one to the other.
    OneWay { from: String, to: String },
    /// What is sent between the two arrives at the end.
    Hold { a: String, b: String },
    /// The host is cut off from all others.
    Isolate { host: String },
    /// Messages between the two take so long.
    Latency { a: String, b: String, ms: u64 },
    /// The coordinator's disk takes no more bytes.
    DiskFull { host: String },
    /// Writes to it take so long.
    DiskSlow { host: String, ms: u64 },
    /// The worker's step does not end; its other tasks go on.
    Hang { host: String },
    /// The same, and the run does not wait for its end: what is sent after all other faults has to do without the worker.
    Wedge { host: String },
    /// A bit flips in each of the next so many pieces of KV that the host sends.
    Flips { host: String, count: u64 },
    /// An operator drains the worker; it is started again at the end.
    Drain { host: String },
    /// The worker is another version, whose arithmetic differs and says so; at the beginning and the end it starts anew.
    Upgrade { host: String },
    /// The process is one of the release before, which knows neither words nor ledger entries of this one; at the beginning
    /// and the end it starts anew.
    Earlier { host: String },
    /// Whoever leads is not heard by workers, gateways and clients any more, and dies as soon as it has committed something that
    /// it has told nobody; of what its disk was not told to sync the first `kept` bytes survive.
    Unheard { kept: usize },
    /// The host's clock is too fast by so many thousandths.
    Drift { host: String, thousandths: u64 },
    /// The host's wall clock is wrong by so much.
    WallClock { host: String, ahead_ms: i64 },
    /// A bit in the first half of the coordinator's largest file flips, `part` thousandths into it, once the group can do
    /// without it; it is started again, has to find out, and takes its own place as a new node with an empty disk.
    Rot { host: String, part: u32 },
    /// Each of the next so many pieces of KV that the host sends is sent twice.
    Doubles { host: String, count: u64 },
    /// Of each of the next so many pieces of KV that the host sends the second half comes first.
    Swaps { host: String, count: u64 },
    /// Clients pause so long before they read on.
    SlowClients { ms: u64 },
    /// The coordinator saves its ledger, as it does when its log has become long.
    Save { host: String },
    /// Whoever leads now cannot reach the other coordinators; workers and gateways reach all of them.
    CutLeader {},
    /// What the one writes to the other arrives at the end, even on connections that have been given up meanwhile;
    /// connections made later than `new_ms` after the beginning pass.
    Stall { from: String, to: String, new_ms: u64 },
    /// Nobody can have the worker's free blocks, but so many.
    Starve { host: String, left: u64 },
    /// Once blocks have been on their way to the worker for so long, what passes between it and `from` is held, all clients
    /// that wait for their first token go away, and those that would ask later ask now.
    Leave { host: String, from: String, after_ms: u64 },
    /// An operator gives the worker the other role, and its own one back at the end.
    Flip { host: String },
    /// An operator wants the coordinator to lead.
    HandOver { to: String },
    /// The coordinator's disk is lost, once the group can do without; it comes back empty and takes its own place as a new
    /// node.
    Replace { host: String },
    /// An operator takes the coordinator out of the group; afterwards it joins again, with an empty disk.
    Shrink { host: String },
    /// The spare coordinator joins the group; afterwards an operator takes it out again.
    Grow { host: String },
    /// The clients' tenant has limits; 0 is none.
    Limit { requests_open: u64, requests_per_minute: u64 },
}

/// A plan that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("the plan is not readable: {0}")]
    Unreadable(String),
    #[error("the plan has version {found}, this binary runs version {VERSION}: draw it anew from its seed")]
    Version { found: u64 },
    #[error("the plan's tick of {0} ms is not 1 to {TICK_MS_MAX}")]
    Tick(u64),
    #[error("the plan's fault {number} names {host:?}, and seed {seed} has no such host")]
    Host { number: usize, host: String, seed: u64 },
    #[error(
        "the plan's fault {number} changes the coordinators' group: only {spare} can grow it, and only others leave it"
    )]
    Member { number: usize, spare: String },
    #[error("the plan's machines name {0:?}, which is no worker of this seed or stands in two of them")]
    Machine(String),
    #[error(transparent)]
    Profile(#[from] UnknownProfile),
}

impl Plan {
    /// The plan that a seed has under a profile.
    pub fn draw(seed: u64, profile: &Profile) -> Plan {
        let topology = Topology::draw(seed);
        let mut rng = rng(seed, Purpose::Faults, 0);
        let weights = profile.weights(&mut rng);
        let count = between(&mut rng, profile.faults_min, profile.faults_max);
        let mut faults: Vec<Fault> = (0..count).flat_map(|_| draw(&mut rng, &topology, &weights)).collect();
        faults.sort_by_key(|fault| fault.at_ms);
        let tick_ms = Some(topology.tick.as_millis() as u64);
        let machines = machines(seed, &topology);
        Plan { version: VERSION, seed, profile: profile.name.to_string(), tick_ms, machines, faults }
    }

    /// Reads a saved plan.
    pub fn read(text: &str) -> Result<Plan, PlanError> {
        let unreadable = |error: serde_json::Error| PlanError::Unreadable(error.to_string());
        let value: serde_json::Value = serde_json::from_str(text).map_err(unreadable)?;
        let found = value["version"].as_u64().unwrap_or(0);
        if found != u64::from(VERSION) {
            return Err(PlanError::Version { found });
        }
        let plan: Plan = serde_json::from_value(value).map_err(unreadable)?;
        Profile::named(&plan.profile)?;
        if let Some(tick_ms) = plan.tick_ms.filter(|tick_ms| !(1..=TICK_MS_MAX).contains(tick_ms)) {
            return Err(PlanError::Tick(tick_ms));
        }
        let topology = Topology::draw(plan.seed);
        let mut workers = topology.workers();
        for worker in plan.machines.iter().flatten() {
            match workers.iter().position(|other| other == worker) {
                Some(at) => drop(workers.swap_remove(at)),
                None => return Err(PlanError::Machine(worker.clone())),
            }
        }
        let mut hosts = topology.servers();
        hosts.push(topology.spare());
        for (number, fault) in plan.faults.iter().enumerate() {
            if let Some(host) = fault.what.hosts().into_iter().find(|host| !hosts.contains(host)) {
                return Err(PlanError::Host { number, host: host.clone(), seed: plan.seed });
            }
            let spare = |host: &String| *host == topology.spare();
            let wrong = match &fault.what {
                What::Grow { host } => !spare(host),
                What::Replace { host } | What::Shrink { host } | What::Rot { host, .. } => {
                    spare(host) || kind(host) != "coordinator"
                }
                _ => false,
            };
            if wrong {
                return Err(PlanError::Member { number, spare: topology.spare() });
            }
        }
        Ok(plan)
    }

    /// Whether a fault concerns the spare coordinator.
    pub(crate) fn uses(&self, host: &String) -> bool {
        self.faults.iter().any(|fault| fault.what.hosts().contains(&host))
    }

    pub fn text(&self) -> String {
        serde_json::to_string_pretty(self).expect("a plan is plain data")
    }
}

impl What {
    pub fn hosts(&self) -> Vec<&String> {
        match self {
            What::Crash { host, .. }
            | What::CrashAmid { host, .. }
            | What::Isolate { host }
            | What::DiskFull { host }
            | What::DiskSlow { host, .. }
            | What::Hang { host }
            | What::Wedge { host }
            | What::Flips { host, .. }
            | What::Drain { host }
            | What::Upgrade { host }
            | What::Drift { host, .. }
            | What::WallClock { host, .. }
            | What::Rot { host, .. }
            | What::Doubles { host, .. }
            | What::Swaps { host, .. }
            | What::Earlier { host }
            | What::Starve { host, .. }
            | What::Flip { host }
            | What::HandOver { to: host }
            | What::Replace { host }
            | What::Shrink { host }
            | What::Grow { host }
            | What::Save { host } => vec![host],
            What::Partition { a, b } | What::Hold { a, b } | What::Latency { a, b, .. } => vec![a, b],
            What::OneWay { from, to } | What::Stall { from, to, .. } => vec![from, to],
            What::Leave { host, from, .. } => vec![host, from],
            What::Limit { .. } | What::CutLeader {} | What::Unheard { .. } | What::SlowClients { .. } => vec![],
        }
    }
}

/// Which workers of a seed are of one machine.
fn machines(seed: u64, topology: &Topology) -> Vec<Vec<String>> {
    let mut rng = rng(seed, Purpose::Machines, 0);
    let mut workers = topology.workers();
    if !chance(&mut rng, MACHINE_PERCENT) {
        return Vec::new();
    }
    let count = between(&mut rng, MACHINE_WORKERS.0, MACHINE_WORKERS.1).min(workers.len() as u64);
    vec![(0..count).map(|_| workers.swap_remove(rng.below(workers.len() as u64) as usize)).collect()]
}

/// One blow: a fault, or several that belong together. None: this cluster has nobody whom it could strike.
fn draw(rng: &mut baton_core::Rng, topology: &Topology, weights: &[(Weight, u64)]) -> Vec<Fault> {
    let total: u64 = weights.iter().map(|(_, weight)| weight).sum();
    let mut left = rng.below(total.max(1));
    let chosen = weights.iter().find(|(_, weight)| {
        let here = left < *weight;
        left = left.saturating_sub(*weight);
        here
    });
    let Some((chosen, _)) = chosen else { return Vec::new() };
    let at_ms = between(rng, FAULTS_FROM_MS, FAULTS_UNTIL_MS - 1_000);
    let longest = if chance(rng, LONG_PERCENT) { FAULTS_UNTIL_MS } else { SHORT_MS };
    let longest = (FAULTS_UNTIL_MS - at_ms).min(longest);
    let for_ms = between(rng, 20, longest);
    if let Some(faults) = compound::draw(rng, topology, *chosen, at_ms) {
        return faults;
    }
    let Some(what) = single(rng, topology, *chosen) else { return Vec::new() };
    // A limit that is soon lifted limits nobody.
    let for_ms = if matches!(what, What::Limit { .. }) { FAULTS_UNTIL_MS - at_ms } else { for_ms };
    vec![Fault { at_ms, for_ms, what }]
}

const ANY: &[&str] = &["coordinator", "prefill", "decode", "gateway"];
const WORKERS: &[&str] = &["prefill", "decode"];

fn one(rng: &mut baton_core::Rng, topology: &Topology, kinds: &[&str]) -> Option<String> {
    let mut of_kind = topology.servers();
    of_kind.retain(|host| kinds.contains(&kind(host)));
    (!of_kind.is_empty()).then(|| of_kind.swap_remove(rng.below(of_kind.len() as u64) as usize))
}

fn two(rng: &mut baton_core::Rng, topology: &Topology) -> Option<(String, String)> {
    let a = one(rng, topology, ANY)?;
    let b = one(rng, topology, ANY)?;
    (a != b).then_some((a, b))
}

fn single(rng: &mut baton_core::Rng, topology: &Topology, chosen: Weight) -> Option<What> {
    let one = |rng: &mut baton_core::Rng, kinds: &[&str]| one(rng, topology, kinds);
    Some(match chosen {
        Weight::CrashCoordinator => What::Crash { host: one(rng, &["coordinator"])?, kept: rng.below(200) as usize },
        Weight::CrashWorker => What::Crash { host: one(rng, WORKERS)?, kept: 0 },
        Weight::CrashGateway => What::Crash { host: one(rng, &["gateway"])?, kept: 0 },
        Weight::CrashAmid => {
            let host = one(rng, &["coordinator", "prefill", "decode"])?;
            What::CrashAmid { host, kept: rng.below(200) as usize }
        }
        Weight::Partition => {
            let (a, b) = two(rng, topology)?;
            if chance(rng, 30) { What::OneWay { from: a, to: b } } else { What::Partition { a, b } }
        }
        Weight::Isolate => What::Isolate { host: one(rng, &["coordinator", "prefill", "decode"])? },
        Weight::Hold => {
            let (a, b) = two(rng, topology)?;
            What::Hold { a, b }
        }
        Weight::Latency => {
            let (a, b) = two(rng, topology)?;
            What::Latency { a, b, ms: between(rng, 10, 120) }
        }
        Weight::DiskFull => What::DiskFull { host: one(rng, &["coordinator"])? },
        Weight::DiskSlow => What::DiskSlow { host: one(rng, &["coordinator"])?, ms: between(rng, 20, 300) },
        Weight::Hang => What::Hang { host: one(rng, WORKERS)? },
        Weight::Flips => {
            let (host, count) = (one(rng, WORKERS)?, between(rng, 1, 6));
            match rng.below(10) {
                0..2 => What::Doubles { host, count },
                2..4 => What::Swaps { host, count },
                _ => What::Flips { host, count },
            }
        }
        Weight::Unheard => What::Unheard { kept: rng.below(200) as usize },
        Weight::Clock => {
            let host = one(rng, ANY)?;
            match chance(rng, 60) {
                true => What::Drift { host, thousandths: between(rng, 5, 50) },
                false => What::WallClock { host, ahead_ms: between(rng, 0, 7_200_000) as i64 - 3_600_000 },
            }
        }
        Weight::SlowClients => What::SlowClients { ms: between(rng, 20, 400) },
        Weight::Rot if topology.coordinators > 1 => {
            What::Rot { host: one(rng, &["coordinator"])?, part: between(rng, 0, 999) as u32 }
        }
        Weight::Drain => What::Drain { host: one(rng, WORKERS)? },
        Weight::Upgrade => What::Upgrade { host: one(rng, &["prefill"])? },
        // A coordinator has no way back once an entry of this release is in the log.
        Weight::Skew => What::Earlier { host: one(rng, &["prefill", "decode", "gateway"])? },
        Weight::Save => What::Save { host: one(rng, &["coordinator"])? },
        Weight::Starve => What::Starve { host: one(rng, WORKERS)?, left: between(rng, 0, 24) },
        Weight::Flip => What::Flip { host: one(rng, WORKERS)? },
        Weight::HandOver => What::HandOver { to: one(rng, &["coordinator"])? },
        Weight::Limit => What::Limit { requests_open: between(rng, 0, 4), requests_per_minute: between(rng, 1, 12) },
        Weight::Replace if topology.coordinators > 1 => What::Replace { host: one(rng, &["coordinator"])? },
        Weight::Shrink if topology.coordinators > 1 => What::Shrink { host: one(rng, &["coordinator"])? },
        Weight::Replace | Weight::Shrink | Weight::Rot => return None,
        Weight::LosePool
        | Weight::Wedge
        | Weight::Depose
        | Weight::Stall
        | Weight::Leave
        | Weight::Rolling
        | Weight::Update
        | Weight::Grow
        | Weight::Rebirth => {
            return None;
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_reads_back_and_a_bad_one_says_what_is_wrong() {
        let plan = Plan::draw(3, &Profile::named("swarm").unwrap());
        assert_eq!(Plan::read(&plan.text()).unwrap(), plan);
        let check = |text: &str, expected: &str| {
            let error = Plan::read(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("{", "not readable");
        check(&Plan { version: 9, ..plan.clone() }.text(), "version 9");
        check(&Plan { profile: "wild".into(), ..plan.clone() }.text(), "wild");
        check(&Plan { tick_ms: Some(0), ..plan.clone() }.text(), "tick of 0 ms");
        let grows = Fault { at_ms: 1, for_ms: 1, what: What::Grow { host: "coordinator-1".into() } };
        check(&Plan { faults: vec![grows], ..plan.clone() }.text(), "changes the coordinators' group");
        check(&Plan { machines: vec![vec!["gateway-1".into()]], ..plan.clone() }.text(), "machines name");
        let twice = vec![vec!["decode-1".into(), "decode-1".into()]];
        check(&Plan { machines: twice, ..plan.clone() }.text(), "in two of them");
        let elsewhere = Fault { at_ms: 1, for_ms: 1, what: What::Hang { host: "decode-9".into() } };
        check(&Plan { faults: vec![elsewhere], ..plan }.text(), "decode-9");
    }
}
