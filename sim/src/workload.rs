//! What the clients of a run ask, from the seed.

use std::time::Duration;

use baton_core::TokenId;

use crate::draw::{Purpose, between, chance, rng};
use crate::model::BLOCK_TOKENS;
use crate::topology::Topology;

/// When the first request is sent; by then a cluster without faults has begun.
pub const FIRST_MS: u64 = 1_000;
/// When the last one of the safety phase is.
pub const LAST_MS: u64 = 7_000;
/// Requests sent after everything has healed.
pub const AFTER_HEALING: usize = 4;

/// One request of a client.
#[derive(Clone, Debug)]
pub struct Ask {
    pub number: usize,
    /// None: once everything has healed.
    pub at: Option<Duration>,
    pub gateway: usize,
    pub prompt: Vec<TokenId>,
    pub tokens_max: u32,
    /// None: greedy.
    pub seed: Option<u64>,
    pub choices: u32,
    pub stream: bool,
    pub batch: bool,
    /// How long a resumable stream outlives its gateway.
    pub resumable_s: Option<u64>,
    /// The client goes away after so long.
    pub cancel_after: Option<Duration>,
}

/// All requests of a run, in the order of their numbers.
pub fn draw(seed: u64, topology: &Topology) -> Vec<Ask> {
    let mut rng = rng(seed, Purpose::Workload, 0);
    let count = between(&mut rng, 8, 24) as usize;
    let prefixes: Vec<Vec<TokenId>> = (0..3)
        .map(|_| {
            let len = between(&mut rng, 8, 64);
            (0..len).map(|_| rng.below(256) as TokenId).collect()
        })
        .collect();
    let mut asks = Vec::new();
    for number in 0..count + AFTER_HEALING {
        let healed = number >= count;
        let mut prompt = match chance(&mut rng, 60) {
            true => prefixes[rng.below(prefixes.len() as u64) as usize].clone(),
            false => Vec::new(),
        };
        let own = between(&mut rng, 1, 60);
        prompt.extend((0..own).map(|_| rng.below(256) as TokenId));
        let stream = chance(&mut rng, 80);
        let at = Duration::from_millis(between(&mut rng, FIRST_MS, LAST_MS));
        let cancel_after = Duration::from_millis(between(&mut rng, 1, 400));
        let cancels = chance(&mut rng, 12) && !healed;
        let resumes = topology.gateways > 1 && stream && chance(&mut rng, 50);
        let (gateway, tokens_max) = (rng.below(topology.gateways as u64) as usize, between(&mut rng, 1, 48) as u32);
        let seed = chance(&mut rng, 50).then(|| rng.below(1 << 40));
        let choices = if chance(&mut rng, 25) { between(&mut rng, 2, 3) as u32 } else { 1 };
        asks.push(Ask {
            number,
            at: (!healed).then_some(at),
            gateway,
            tokens_max: tokens_max.min(room(topology, prompt.len(), choices)),
            prompt,
            seed,
            choices,
            stream,
            batch: chance(&mut rng, 20),
            resumable_s: resumes.then_some(10),
            cancel_after: cancels.then_some(cancel_after),
        });
    }
    asks
}

/// What each choice may generate so that the smallest worker can hold them all, each with blocks of its own behind the prompt's.
fn room(topology: &Topology, prompt: usize, choices: u32) -> u32 {
    let block = BLOCK_TOKENS as usize;
    let own_blocks = (topology.engine.blocks - prompt.div_ceil(block)) / choices as usize;
    (own_blocks.saturating_sub(1) * block).max(1) as u32
}
