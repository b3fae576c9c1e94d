//! One run: the hosts of a seed, the faults of a plan, the invariants after every step.
//!
//! ```text
//! 0 ── start ── 1 s ── requests and faults ── 8 s ── healing ── 11 s ── the last requests ── all ended ── rest
//! ```

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::time::Duration;

use baton_core::Role;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use turmoil::Sim;

use crate::draw::{Purpose, seed_of};
use crate::faults::{Faults, stop};
use crate::host::client::{End, Notes, Told};
use crate::host::{World, client, coordinator, gateway, worker};
use crate::invariant::{self, Invariant, Look};
use crate::members::{self, Ending};
use crate::plan::Plan;
use crate::record::{Detail, Line};
use crate::story::Story;
use crate::topology::{CLIENTS, Topology, kind};
use crate::workload;

/// Time between the last fault and the requests that must succeed: leases run out, leaders are elected, workers register.
pub(crate) const HEALING: Duration = Duration::from_millis(3_000);
/// All clients have ended so long after the last fault.
const ENDING: Duration = Duration::from_secs(60);
/// And so long after them everything is at rest.
const REST: Duration = Duration::from_secs(12);
/// How long a supervisor waits before it starts an ended process again.
const RESTART: Duration = Duration::from_millis(500);
/// How often the invariants look, and how often a run that is to come to rest is asked whether it has.
const LOOK_EVERY: Duration = Duration::from_millis(10);
const REST_EVERY: Duration = Duration::from_millis(100);

/// A property that did not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    pub invariant: String,
    pub at_ms: u64,
    pub what: String,
}

/// What one run did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub seed: u64,
    pub profile: String,
    pub hosts: usize,
    pub faults: usize,
    pub virtual_ms: u64,
    /// Hash of all that hosts did and sent, with its virtual times.
    pub digest: String,
    pub network_events: u64,
    pub requests: Requests,
    pub violation: Option<Violation>,
    #[serde(skip)]
    pub lines: Vec<Line>,
}

impl Report {
    /// Of a run that had to be ended from outside, because it went on without virtual time passing.
    pub fn stuck(plan: &Plan, after: Duration) -> Report {
        let what = format!("after {} s of real time something still goes on in no virtual time", after.as_secs());
        Report {
            seed: plan.seed,
            profile: plan.profile.clone(),
            hosts: Topology::draw(plan.seed).servers().len() + 1,
            faults: plan.faults.len(),
            virtual_ms: 0,
            digest: String::new(),
            network_events: 0,
            requests: Requests::default(),
            violation: Some(Violation { invariant: "L1 time passes".to_string(), at_ms: 0, what }),
            lines: Vec::new(),
        }
    }
}

/// How the requests of a run ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requests {
    pub complete: usize,
    pub refused: usize,
    pub failed: usize,
    pub broken: usize,
    pub cancelled: usize,
}

/// Runs a plan to its end or to the first violation.
pub fn run(plan: &Plan) -> Report {
    run_with(plan, Detail::Outline)
}

/// The same, told in detail.
pub fn run_with(plan: &Plan, detail: Detail) -> Report {
    let topology = Topology::ticking(plan.seed, plan.tick_ms);
    let hosts = topology.servers().len() + 1;
    let asks = workload::draw(plan.seed, &topology);
    let (world, notes) = (World::new(plan.seed, topology), Notes::new(&asks));
    world.record.tell(detail);
    let violation = caught(|| drive(plan, &world, &notes)).unwrap_or_else(|what| {
        let at_ms = world.record.now().as_millis() as u64;
        Some(Violation { invariant: "P1 no panic".to_string(), at_ms, what })
    });
    let requests = count(&notes.lock());
    Report {
        seed: plan.seed,
        profile: plan.profile.clone(),
        hosts,
        faults: plan.faults.len(),
        virtual_ms: world.record.now().as_millis() as u64,
        digest: format!("{:016x}", world.record.digest()),
        network_events: world.record.network_events(),
        requests,
        violation,
        lines: world.record.lines(),
    }
}

fn count(told: &[Told]) -> Requests {
    let mut requests = Requests::default();
    for told in told {
        let kind = match (&told.ended, told.accepted) {
            (Some((_, End::Complete)), _) => &mut requests.complete,
            (Some((_, End::Cancelled)), _) => &mut requests.cancelled,
            (Some((_, End::Broken(_))), _) | (None, _) => &mut requests.broken,
            (Some(_), None) => &mut requests.refused,
            (Some(_), Some(_)) => &mut requests.failed,
        };
        *kind += 1;
    }
    requests
}

fn drive(plan: &Plan, world: &World, notes: &Notes) -> Option<Violation> {
    let topology = &world.topology;
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed_of(plan.seed, Purpose::Network, 0))
        .simulation_duration(Duration::from_secs(3_600))
        .tick_duration(topology.tick)
        .min_message_latency(topology.latency_min)
        .max_message_latency(topology.latency_max)
        .tcp_capacity(1 << 16)
        .build();
    let (heal, healed) = watch::channel(false);
    let (operator, orders) = mpsc::channel(64);
    add_hosts(&mut sim, world, plan);
    sim.client(CLIENTS, client::run(world.clone(), notes.clone(), healed, orders));
    let mut drive = Drive {
        sim,
        world,
        notes,
        invariants: invariant::all(),
        faults: Faults::new(plan, topology, operator),
        restarts: Vec::new(),
        away: Vec::new(),
        healed_at: None,
        looked: Duration::ZERO,
        looks: 0,
        story: world.record.tells(Detail::Story).then(Story::default),
    };
    let result = drive.until_rest(heal);
    world.record.set_now(drive.sim.elapsed());
    result.err()
}

fn add_hosts(sim: &mut Sim, world: &World, plan: &Plan) {
    let spare = Some(world.topology.spare()).filter(|spare| plan.uses(spare));
    for (host, node) in world.topology.coordinator_names().into_iter().chain(spare).zip(1u64..) {
        let world = world.clone();
        sim.host(host.clone(), move || coordinator::run(world.clone(), host.clone(), node));
    }
    for role in [Role::Prefill, Role::Decode] {
        for host in world.topology.worker_names(role) {
            let world = world.clone();
            sim.host(host.clone(), move || worker::run(world.clone(), host.clone(), role));
        }
    }
    for host in world.topology.gateway_names() {
        let world = world.clone();
        sim.host(host.clone(), move || gateway::run(world.clone(), host.clone()));
    }
}

/// The loop of a run.
struct Drive<'a> {
    sim: Sim<'a>,
    world: &'a World,
    notes: &'a Notes,
    invariants: Vec<Box<dyn Invariant>>,
    faults: Faults,
    /// (when, which host).
    restarts: Vec<(Duration, String)>,
    /// Coordinators that have left the group, and are to come back.
    away: Vec<(String, Ending)>,
    healed_at: Option<Duration>,
    /// When the invariants looked last.
    looked: Duration,
    looks: u64,
    /// For whoever reads the run.
    story: Option<Story>,
}

impl Drive<'_> {
    fn until_rest(&mut self, heal: watch::Sender<bool>) -> Result<(), Violation> {
        let last = self.faults.end().max(Duration::from_millis(workload::LAST_MS));
        while !self.step()? {
            if self.healed_at.is_none() && self.sim.elapsed() >= last {
                self.healed_at = Some(self.sim.elapsed());
                self.world.record.note("", "no faults any more");
            }
            if self.sim.elapsed() >= last + HEALING {
                heal.send_replace(true);
            }
            if self.sim.elapsed() > last + ENDING {
                let notes = self.notes.lock();
                let waiting: Vec<usize> = notes.iter().filter(|t| t.ended.is_none()).map(|t| t.ask.number).collect();
                let orders = *self.world.orders.borrow();
                let what = format!("requests {waiting:?} and {orders} orders of the operator have not ended");
                return Err(self.violation("L1 heals", what));
            }
        }
        let ended = self.sim.elapsed();
        self.world.record.note("", "all clients have ended");
        loop {
            let rest = self.at_rest();
            let Err(violation) = rest else { return Ok(()) };
            if self.sim.elapsed() > ended + REST {
                return Err(violation);
            }
            let asked = self.sim.elapsed();
            while self.sim.elapsed() < asked + REST_EVERY {
                self.step()?;
            }
        }
    }

    /// One tick; true when all clients have ended.
    fn step(&mut self) -> Result<bool, Violation> {
        self.world.record.set_now(self.sim.elapsed());
        self.faults.follow(&mut self.sim, self.world);
        self.supervise();
        let ended = self.sim.step().map_err(|error| self.violation("P1 no panic", error.to_string()))?;
        self.world.record.set_now(self.sim.elapsed());
        if ended || self.sim.elapsed() >= self.looked + LOOK_EVERY {
            self.looked = self.sim.elapsed();
            if let Some(story) = &mut self.story {
                story.go_on(self.world);
            }
            self.look(|invariant, look| invariant.step(look))?;
        }
        Ok(ended)
    }

    fn at_rest(&mut self) -> Result<(), Violation> {
        self.look(|invariant, look| invariant.end(look))
    }

    fn look(
        &mut self,
        mut check: impl FnMut(&mut dyn Invariant, &Look) -> Result<(), String>,
    ) -> Result<(), Violation> {
        let told = self.notes.lock();
        let now = self.sim.elapsed();
        let tellings = self.notes.changes();
        let look = Look { now, number: self.looks, world: self.world, told: &told, tellings, healed: self.healed_at };
        self.looks += 1;
        for invariant in &mut self.invariants {
            check(&mut **invariant, &look).map_err(|what| Violation {
                invariant: invariant.name().to_string(),
                at_ms: now.as_millis() as u64,
                what,
            })?;
        }
        Ok(())
    }

    /// Starts processes again that have ended by themselves.
    fn supervise(&mut self) {
        let now = self.sim.elapsed();
        let exited = std::mem::take(&mut self.world.seen().exited);
        if exited.is_empty() && self.restarts.is_empty() && self.away.is_empty() {
            return;
        }
        for (host, why) in exited {
            stop(&mut self.sim, self.world, &host);
            match Ending::of(&why).filter(|_| kind(&host) == "coordinator") {
                Some(ending) if self.away.iter().all(|(other, _)| *other != host) => self.away.push((host, ending)),
                Some(_) => {}
                None if !self.faults.is_down(&host) => self.restarts.push((now + RESTART, host)),
                None => {}
            }
        }
        let (away, due): (Vec<_>, _) =
            std::mem::take(&mut self.away).into_iter().partition(|(host, _)| self.faults.keeps_away(host));
        self.away = away;
        for (host, ending) in due {
            // A fault's end may have started it again meanwhile.
            stop(&mut self.sim, self.world, &host);
            if members::back(self.world, &host, &ending) {
                self.restarts.push((now + RESTART, host));
            }
        }
        let (due, later) = std::mem::take(&mut self.restarts).into_iter().partition(|(at, _)| *at <= now);
        self.restarts = later;
        let due: Vec<(Duration, String)> = due;
        for (_, host) in due {
            if !self.faults.is_down(&host) && !self.sim.is_host_running(host.as_str()) {
                self.world.record.note(&host, "is started again");
                self.sim.bounce(host.as_str());
            }
        }
    }

    fn violation(&self, invariant: &str, what: String) -> Violation {
        Violation { invariant: invariant.to_string(), at_ms: self.sim.elapsed().as_millis() as u64, what }
    }
}

thread_local! {
    /// The text of the panic that this thread's run is in; None outside of runs.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `body`; a panic in it becomes its text, and nothing is printed.
fn caught<T>(body: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let kept = PANIC.with_borrow_mut(|kept| match kept {
                // The first says what went wrong; what follows is its wake.
                Some(text) if text.is_empty() => {
                    *text = panic.to_string();
                    true
                }
                Some(_) => true,
                None => false,
            });
            if !kept {
                usual(panic);
            }
        }));
    });
    PANIC.set(Some(String::new()));
    let result = catch_unwind(AssertUnwindSafe(body));
    let text = PANIC.take().unwrap_or_default();
    result.map_err(|payload: Box<dyn Any + Send>| if text.is_empty() { message(&*payload) } else { text })
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| text.to_string());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without words".to_string())
}
