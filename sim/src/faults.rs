//! The faults of a plan over time: each begins, perhaps strikes later at its moment, and ends.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_coordinator::Observer;
use baton_core::Role;
use baton_engine::Reserved;
use baton_proto::v1;
use tokio::sync::mpsc;
use turmoil::Sim;

use crate::host::World;
use crate::host::operator::Order;
use crate::machine::Machines;
use crate::members;
use crate::net::Damage;
use crate::network::Network;
use crate::plan::{Fault, Plan, What};
use crate::topology::{CLIENTS, Topology, kind};

/// Ends a host's process as `kill -9` does.
pub(crate) fn stop(sim: &mut Sim, world: &World, host: &str) {
    {
        let mut seen = world.seen();
        seen.coordinators.remove(host);
        seen.workers.remove(host);
        seen.paces.remove(host);
        seen.roles.remove(host);
        if let Some(life) = seen.gateways.get(host).copied() {
            seen.crashed.entry(host.to_string()).or_default().insert(life);
        }
    }
    sim.crash(host);
    world.seen().exited.remove(host);
}

/// How long a worker's blocks are held up once clients have left it: less than a receiver waits for its sender.
const LEFT_MS: u64 = 400;

/// The faults of a plan over time.
pub(crate) struct Faults {
    faults: Vec<Fault>,
    machines: Machines,
    begun: Vec<bool>,
    over: Vec<bool>,
    /// Faults that waited for their moment and have had it.
    struck: Vec<bool>,
    /// Faults in force that keep a host down.
    down: BTreeMap<String, usize>,
    /// Blocks that nobody can have, by the fault that took them.
    starved: BTreeMap<usize, Reserved>,
    /// Since when the worker of a fault that waits for it expects blocks, in milliseconds.
    expecting: BTreeMap<usize, u64>,
    /// The leader that a fault has struck.
    leaders: BTreeMap<usize, String>,
    /// What the leader that nobody hears had committed when it was heard last.
    committed: BTreeMap<usize, u64>,
    network: Network,
    coordinators: Vec<String>,
    servers: Vec<String>,
    operator: mpsc::Sender<Order>,
}

impl Faults {
    pub(crate) fn new(plan: &Plan, topology: &Topology, operator: mpsc::Sender<Order>) -> Faults {
        let (mut coordinators, mut servers) = (topology.coordinator_names(), topology.servers());
        if plan.uses(&topology.spare()) {
            coordinators.push(topology.spare());
            servers.push(topology.spare());
        }
        let machines = Machines::of(plan);
        let faults: Vec<Fault> =
            plan.faults.iter().flat_map(|fault| machines.spread(fault.clone(), &servers)).collect();
        let count = faults.len();
        Faults {
            faults,
            machines,
            begun: vec![false; count],
            over: vec![false; count],
            struck: vec![false; count],
            down: BTreeMap::new(),
            starved: BTreeMap::new(),
            expecting: BTreeMap::new(),
            leaders: BTreeMap::new(),
            committed: BTreeMap::new(),
            network: Network::default(),
            coordinators,
            servers,
            operator,
        }
    }

    /// When the last one is over that is not to outlast the last requests.
    pub(crate) fn end(&self) -> Duration {
        let waited_for = self.faults.iter().filter(|fault| !matches!(fault.what, What::Wedge { .. }));
        let end = waited_for.map(|fault| fault.at_ms + fault.for_ms).max();
        Duration::from_millis(end.unwrap_or(0))
    }

    /// Whether a fault keeps the host's process from running.
    pub(crate) fn is_down(&self, host: &str) -> bool {
        self.down.get(host).is_some_and(|faults| *faults > 0)
    }

    /// Whether a coordinator that has left the group stays away until a fault's end lets it join again.
    pub(crate) fn keeps_away(&self, host: &str) -> bool {
        let away = |what: &What| matches!(what, What::Shrink { host: own } if own == host);
        (0..self.faults.len()).any(|n| self.begun[n] && !self.over[n] && away(&self.faults[n].what))
    }

    /// Whether another fault of the kind is in force on the same hosts; the last one to end lifts them.
    fn any_other(&self, ended: &What) -> bool {
        let same = |other: &What| {
            std::mem::discriminant(other) == std::mem::discriminant(ended) && other.hosts() == ended.hosts()
        };
        let in_force = |n: usize| self.begun[n] && !self.over[n];
        self.faults.iter().enumerate().any(|(n, fault)| in_force(n) && same(&fault.what))
    }

    pub(crate) fn follow(&mut self, sim: &mut Sim, world: &World) {
        let now = sim.elapsed().as_millis() as u64;
        let mut changed = false;
        members::follow(world);
        for number in 0..self.faults.len() {
            let Fault { at_ms, for_ms, .. } = self.faults[number];
            if !self.begun[number] && at_ms <= now {
                self.begun[number] = true;
                changed = true;
                world.record.note("", format!("fault {number} for {for_ms} ms: {:?}", self.faults[number].what));
                self.begin(sim, world, number, now);
            }
            if self.begun[number] && !self.over[number] && at_ms + for_ms <= now {
                self.over[number] = true;
                changed = true;
                world.record.note("", format!("fault {number} is over"));
                self.end_one(sim, world, number);
            }
            if self.begun[number] && !self.over[number] && !self.struck[number] {
                let leaders = self.leaders.len();
                self.struck[number] = self.strike(sim, world, number, now);
                changed |= self.struck[number] || self.leaders.len() != leaders;
            }
        }
        if changed {
            let active = (0..self.faults.len()).filter(|n| self.begun[*n] && !self.over[*n]);
            let active: Vec<What> = active.flat_map(|number| self.on_the_network(number)).collect();
            self.network.follow(sim, &self.servers, &active);
        }
    }

    /// The fault, or what a leader being cut off from its peers means for the links.
    fn on_the_network(&self, number: usize) -> Vec<What> {
        let what = self.faults[number].what.clone();
        if let (What::Leave { host, from, .. }, true) = (&what, self.struck[number]) {
            return vec![What::Hold { a: from.clone(), b: host.clone() }];
        }
        let Some(leader) = self.leaders.get(&number) else { return vec![what] };
        if matches!(what, What::Unheard { .. }) {
            let others = self.servers.iter().filter(|other| !self.coordinators.contains(other)).cloned();
            let others = others.chain([CLIENTS.to_string()]);
            return others.map(|to| What::OneWay { from: leader.clone(), to }).collect();
        }
        let others = self.coordinators.iter().filter(|other| *other != leader);
        others.map(|other| What::Partition { a: leader.clone(), b: other.clone() }).collect()
    }

    fn begin(&mut self, sim: &mut Sim, world: &World, number: usize, now_ms: u64) {
        let Fault { what, for_ms, .. } = self.faults[number].clone();
        match &what {
            What::Crash { host, kept } => self.crash(sim, world, host, *kept),
            What::Drain { host } => {
                *self.down.entry(host.clone()).or_default() += 1;
                self.order(world, Order::Worker(host.clone(), v1::Order::Drain));
            }
            What::Limit { requests_open, requests_per_minute } => {
                self.order(
                    world,
                    Order::Limit { requests_open: *requests_open, requests_per_minute: *requests_per_minute },
                );
            }
            What::Save { host } => {
                if let Some(observer) = world.seen().coordinators.get(host) {
                    observer.ask_to_save();
                }
            }
            What::Upgrade { host } => {
                world.seen().upgraded.insert(host.clone());
                self.start_anew(sim, world, host);
            }
            What::Earlier { host } => {
                world.seen().earlier.insert(host.clone());
                self.start_anew(sim, world, host);
            }
            What::Latency { a, b, ms } => {
                sim.set_link_max_message_latency(a.as_str(), b.as_str(), Duration::from_millis(*ms));
            }
            What::DiskFull { host } => world.disks[host].limit(Some(0)),
            What::DiskSlow { host, ms } => world.disks[host].slow(Duration::from_millis(*ms)),
            What::Hang { host } | What::Wedge { host } => {
                world.seen().wedged |= matches!(what, What::Wedge { .. });
                if let Some(pace) = world.seen().paces.get(host) {
                    pace.hang(now_ms, for_ms);
                }
            }
            What::Starve { host, left } => {
                let cache = world.seen().workers.get(host).map(|shell| shell.engine.cache().clone());
                let taken = cache.and_then(|cache| {
                    let count = cache.stats().available().saturating_sub(*left as usize);
                    cache.reserve(count).ok()
                });
                self.starved.extend(taken.map(|taken| (number, taken)));
            }
            What::Stall { from, to, .. } => world.stalls[from].begin(to),
            What::Flip { host } => {
                let other = if kind(host) == "prefill" { v1::Order::BecomeDecode } else { v1::Order::BecomePrefill };
                self.order(world, Order::Worker(host.clone(), other));
            }
            What::HandOver { to } => self.order(world, Order::Lead(to.clone())),
            What::Flips { host, count } => world.flips[host].arm(Damage::Bit, *count),
            What::Doubles { host, count } => world.flips[host].arm(Damage::Twice, *count),
            What::Swaps { host, count } => world.flips[host].arm(Damage::Swapped, *count),
            What::SlowClients { ms } => world.slow_ms.store(*ms, Ordering::Relaxed),
            What::Drift { host, thousandths } => drop(world.drifts[host].send_replace(*thousandths)),
            What::WallClock { host, ahead_ms } => world.ahead_ms[host].store(*ahead_ms, Ordering::Relaxed),
            What::Partition { .. }
            | What::OneWay { .. }
            | What::Hold { .. }
            | What::Isolate { .. }
            | What::CutLeader {}
            | What::Unheard { .. }
            | What::Leave { .. }
            | What::Replace { .. }
            | What::Rot { .. }
            | What::Shrink { .. }
            | What::CrashAmid { .. } => {}
            What::Grow { host } => {
                let there = world.seen().joins.contains_key(host);
                if !there {
                    let join = world.join(host, None);
                    world.seen().joins.insert(host.clone(), join);
                    self.start_anew(sim, world, host);
                }
            }
        }
    }

    fn crash(&mut self, sim: &mut Sim, world: &World, host: &str, kept: usize) {
        *self.down.entry(host.to_string()).or_default() += 1;
        stop(sim, world, host);
        if let Some(disk) = world.disks.get(host) {
            disk.crash(kept);
        }
    }

    /// True when a fault that waits for its moment has had it now.
    fn strike(&mut self, sim: &mut Sim, world: &World, number: usize, now_ms: u64) -> bool {
        let what = &self.faults[number].what;
        let waits = |what: &What| {
            matches!(
                what,
                What::CrashAmid { .. }
                    | What::CutLeader {}
                    | What::Unheard { .. }
                    | What::Leave { .. }
                    | What::Rot { .. }
                    | What::Stall { .. }
                    | What::Replace { .. }
                    | What::Shrink { .. }
            )
        };
        if !waits(what) {
            return false;
        }
        match what.clone() {
            What::CrashAmid { host, kept } if !self.is_down(&host) && self.is_amid(world, &host) => {
                world.record.note(&host, "dies in the middle of something");
                self.machines.all(&host).iter().for_each(|host| self.crash(sim, world, host, kept));
                true
            }
            What::CutLeader {} => {
                let leader = leader(world);
                if let Some(leader) = &leader {
                    world.record.note(leader, "leads, and is cut off from its peers");
                }
                let found = leader.is_some();
                self.leaders.extend(leader.map(|leader| (number, leader)));
                found
            }
            What::Unheard { kept } => self.dies_unheard(sim, world, number, kept),
            What::Leave { host, after_ms, .. } => {
                let since = match self.expects_blocks(world, &host) {
                    true => *self.expecting.entry(number).or_insert(now_ms),
                    false => {
                        self.expecting.remove(&number);
                        return false;
                    }
                };
                if now_ms < since + after_ms {
                    return false;
                }
                world.record.note(&host, "expects blocks, and the clients leave it");
                world.crowd.send_modify(|times| *times += 1);
                let fault = &mut self.faults[number];
                (fault.at_ms, fault.for_ms) = (now_ms, LEFT_MS);
                true
            }
            What::Replace { host } if !self.is_down(&host) => members::lose(sim, world, &host),
            What::Rot { host, part } if !self.is_down(&host) => members::rot(sim, world, &host, part),
            What::Shrink { host } if members::may_go(world, &host) => {
                members::ordered(world, &host);
                self.order(world, Order::Remove(host));
                true
            }
            What::Stall { from, to, new_ms } if now_ms >= self.faults[number].at_ms + new_ms => {
                world.stalls[&from].pass_new(&to);
                true
            }
            _ => false,
        }
    }

    /// Finds who leads, and then ends it as soon as it has committed more than it had.
    fn dies_unheard(&mut self, sim: &mut Sim, world: &World, number: usize, kept: usize) -> bool {
        let committed = |host: &String| world.seen().coordinators.get(host).and_then(Observer::index);
        let Some(host) = self.leaders.get(&number).cloned() else {
            if let Some(host) = leader(world) {
                world.record.note(&host, "leads, and is not heard any more");
                self.committed.extend(committed(&host).map(|index| (number, index)));
                self.leaders.insert(number, host);
            }
            return false;
        };
        if self.is_down(&host) || committed(&host) <= self.committed.get(&number).copied() {
            return false;
        }
        world.record.note(&host, "has committed something, and dies before anybody hears of it");
        self.crash(sim, world, &host, kept);
        true
    }

    /// Whether a coordinator has written what is not synced yet, or a worker waits for blocks or computes.
    fn is_amid(&self, world: &World, host: &str) -> bool {
        if let Some(disk) = world.disks.get(host) {
            return disk.unsynced() > 0;
        }
        let computes = world.seen().workers.get(host).is_some_and(|shell| shell.engine.load().running > 0);
        computes || self.expects_blocks(world, host)
    }

    /// Whether blocks are on their way to a worker.
    fn expects_blocks(&self, world: &World, host: &str) -> bool {
        let seen = world.seen();
        let Some(shell) = seen.workers.get(host) else { return false };
        let own = |number: &usize| matches!(&self.faults[*number].what, What::Starve { host: own, .. } if own == host);
        let taken: usize =
            self.starved.iter().filter(|(number, _)| own(number)).map(|(_, taken)| taken.ids().len()).sum();
        shell.engine.cache().stats().in_flight > taken
    }

    /// A full queue of orders: the operator has enough to do.
    fn order(&self, world: &World, order: Order) {
        if self.operator.try_send(order).is_ok() {
            world.orders.send_modify(|open| *open += 1);
        }
    }

    /// Ends the process and starts it again, unless a fault keeps it down.
    fn start_anew(&self, sim: &mut Sim, world: &World, host: &str) {
        stop(sim, world, host);
        if !self.is_down(host) {
            world.record.note(host, "is started again");
            sim.bounce(host);
        }
    }

    /// One fault less keeps the host down.
    fn up(&mut self, sim: &mut Sim, world: &World, host: &str) {
        if let Some(faults) = self.down.get_mut(host) {
            *faults -= 1;
        }
        if !self.is_down(host) && !sim.is_host_running(host) {
            world.record.note(host, "is started again");
            sim.bounce(host);
        }
    }

    fn end_one(&mut self, sim: &mut Sim, world: &World, number: usize) {
        let what = &self.faults[number].what.clone();
        self.starved.remove(&number);
        let leader = self.leaders.remove(&number);
        match what {
            What::CrashAmid { .. } | What::Unheard { .. } if !self.struck[number] => {}
            What::CrashAmid { host, .. } => {
                self.machines.all(host).iter().for_each(|host| self.up(sim, world, host));
            }
            What::Crash { host, .. } | What::Drain { host } => self.up(sim, world, host),
            What::Unheard { .. } => leader.iter().for_each(|host| self.up(sim, world, host)),
            What::SlowClients { .. } => world.slow_ms.store(0, Ordering::Relaxed),
            What::Drift { host, .. } => drop(world.drifts[host].send_replace(0)),
            What::WallClock { host, .. } => world.ahead_ms[host].store(0, Ordering::Relaxed),
            What::Upgrade { host } if !self.any_other(what) => {
                world.seen().upgraded.remove(host);
                self.start_anew(sim, world, host);
            }
            What::Earlier { host } if !self.any_other(what) => {
                let was_earlier = world.seen().earlier.remove(host);
                if was_earlier {
                    self.start_anew(sim, world, host);
                }
            }
            What::Limit { .. } if !self.any_other(what) => {
                self.order(world, Order::Limit { requests_open: 0, requests_per_minute: 0 });
            }
            What::Latency { a, b, .. } if !self.any_other(what) => {
                sim.set_link_max_message_latency(a.as_str(), b.as_str(), world.topology.latency_max);
            }
            What::DiskFull { host } if !self.any_other(what) => world.disks[host].limit(None),
            What::DiskSlow { host, .. } if !self.any_other(what) => world.disks[host].slow(world.topology.fsync),
            What::Flips { host, .. } => world.flips[host].arm(Damage::Bit, 0),
            What::Doubles { host, .. } => world.flips[host].arm(Damage::Twice, 0),
            What::Swaps { host, .. } => world.flips[host].arm(Damage::Swapped, 0),
            What::Stall { from, to, .. } if !self.any_other(what) => world.stalls[from].end(to),
            What::Grow { host } if !self.any_other(what) && world.seen().joins.contains_key(host) => {
                members::ordered(world, host);
                self.order(world, Order::Remove(host.clone()));
            }
            What::Flip { host } if !self.any_other(what) => {
                let own = if kind(host) == "prefill" { Role::Prefill } else { Role::Decode };
                self.order(world, Order::Role(host.clone(), own));
            }
            _ => {}
        }
    }
}

/// The coordinator that leads in the latest term.
fn leader(world: &World) -> Option<String> {
    let seen = world.seen();
    let led = seen.coordinators.iter().filter_map(|(host, observer)| Some((observer.leads()?.1, host)));
    led.max().map(|(_, host)| host.clone())
}
