//! Which hosts a run has and how large they are, from the seed.

use std::time::Duration;

use baton_core::Role;
use baton_engine::EngineConfig;

use crate::draw::{Purpose, between, chance, rng};

pub const COORDINATOR_PORT: u16 = 7400;
pub const WORKER_PORT: u16 = 7500;
pub const KV_PORT: u16 = 7600;
pub const GATEWAY_PORT: u16 = 8000;
/// The host of all clients.
pub const CLIENTS: &str = "clients";

/// Ticks, and how many of 100 runs have them: most are coarse, because a run costs as much as it has ticks.
const TICKS_MS: [(u64, u64); 4] = [(1, 2), (2, 4), (5, 10), (10, 84)];
/// Up to this tick latencies are what was drawn.
const FINE_MS: u64 = 5;

/// The hosts of one run.
#[derive(Clone, Debug)]
pub struct Topology {
    pub coordinators: usize,
    pub prefills: usize,
    pub decodes: usize,
    pub gateways: usize,
    pub engine: EngineConfig,
    /// How long a step takes, and how much longer for each row.
    pub step: Duration,
    pub row: Duration,
    pub latency_min: Duration,
    pub latency_max: Duration,
    /// How long a write of the log takes.
    pub fsync: Duration,
    /// Messages arrive at multiples of it.
    pub tick: Duration,
}

impl Topology {
    pub fn draw(seed: u64) -> Topology {
        Topology::ticking(seed, None)
    }

    /// The same; `tick_ms`: with a tick of its own.
    pub fn ticking(seed: u64, tick_ms: Option<u64>) -> Topology {
        let mut rng = rng(seed, Purpose::Topology, 0);
        let few_blocks = chance(&mut rng, 25);
        let topology = Topology {
            coordinators: if chance(&mut rng, 80) { 3 } else { 1 },
            prefills: between(&mut rng, 1, 2) as usize,
            decodes: between(&mut rng, 1, 2) as usize,
            gateways: if chance(&mut rng, 30) { 2 } else { 1 },
            engine: EngineConfig {
                blocks: if few_blocks { between(&mut rng, 64, 96) } else { 256 } as usize,
                batch_tokens_max: between(&mut rng, 8, 64) as usize,
                sequences_max: between(&mut rng, 4, 32) as usize,
                queue_max: between(&mut rng, 8, 64) as usize,
                prefix_cache: chance(&mut rng, 80),
                draft_tokens_max: 0,
            },
            step: Duration::from_millis(between(&mut rng, 2, 12)),
            row: Duration::from_micros(between(&mut rng, 0, 300)),
            latency_min: Duration::from_micros(between(&mut rng, 100, 1_000)),
            latency_max: Duration::from_micros(between(&mut rng, 1_500, 6_000)),
            fsync: Duration::from_millis(between(&mut rng, 1, 4)),
            tick: Duration::ZERO,
        };
        let drawn_ms = tick_ms_of(rng.below(100));
        let mut topology = topology.with_tick(tick_ms.unwrap_or(drawn_ms));
        if chance(&mut rng, 25) {
            topology.engine.draft_tokens_max = between(&mut rng, 1, 4) as usize;
        }
        topology
    }

    /// A coarse network is a slow one, too: else everything would arrive at the next tick, and nothing out of order.
    fn with_tick(self, tick_ms: u64) -> Topology {
        let slow = tick_ms.div_ceil(FINE_MS) as u32;
        Topology {
            latency_min: self.latency_min * slow,
            latency_max: self.latency_max * slow,
            fsync: self.fsync * slow,
            tick: Duration::from_millis(tick_ms),
            ..self
        }
    }

    pub fn coordinator_names(&self) -> Vec<String> {
        names("coordinator", self.coordinators)
    }

    /// A coordinator that is not of the group at the beginning; it may join.
    pub fn spare(&self) -> String {
        format!("coordinator-{}", self.coordinators + 1)
    }

    pub fn worker_names(&self, role: Role) -> Vec<String> {
        match role {
            Role::Prefill => names("prefill", self.prefills),
            _ => names("decode", self.decodes),
        }
    }

    pub fn workers(&self) -> Vec<String> {
        [Role::Prefill, Role::Decode].into_iter().flat_map(|role| self.worker_names(role)).collect()
    }

    pub fn gateway_names(&self) -> Vec<String> {
        names("gateway", self.gateways)
    }

    /// Every host but that of the clients.
    pub fn servers(&self) -> Vec<String> {
        let mut all = self.coordinator_names();
        all.extend(self.workers());
        all.extend(self.gateway_names());
        all
    }

    pub fn coordinator_addresses(&self) -> Vec<String> {
        self.coordinator_names().iter().map(|name| format!("{name}:{COORDINATOR_PORT}")).collect()
    }
}

/// `part`: below 100.
fn tick_ms_of(mut part: u64) -> u64 {
    for (tick_ms, share) in TICKS_MS {
        match part.checked_sub(share) {
            None => return tick_ms,
            Some(left) => part = left,
        }
    }
    unreachable!("the shares are 100 together")
}

fn names(kind: &str, count: usize) -> Vec<String> {
    (1..=count).map(|number| format!("{kind}-{number}")).collect()
}

/// What a host is, by its name.
pub fn kind(host: &str) -> &str {
    host.split('-').next().unwrap_or(host)
}
