//! Scenario: one prefill host hands sequences to one decode host while the network between them fails. Checks that
//! every handoff ends, that what completes is exact to the byte, and that every block's guard is given back.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_core::{Aborted, Arena, BlockId, BlockLayout, Epoch, KvDtype, RequestId, Rng};
use baton_kvtransfer::{Grant, Links, Receiver};
use tokio::sync::mpsc;
use xxhash_rust::xxh3::xxh3_64;

use crate::TurmoilNet;

const LAYOUT: BlockLayout = BlockLayout { layers: 4, kv_heads: 2, head_dim: 8, block_tokens: 16, dtype: KvDtype::Bf16 };
const MODEL: &str = "sim";
const PORT: u16 = 7000;
const HANDOFFS: usize = 8;
const BLOCKS_MAX: u64 = 12;
/// Every handoff has ended and every guard is back within so much virtual time.
const BOUND: Duration = Duration::from_secs(30);

/// What one run did. Equal seeds give equal outcomes, in any process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub completed: usize,
    pub failed: usize,
    /// Hash of every event with its virtual time.
    pub digest: u64,
}

/// What the simulated hosts share with the checker: events in order, and guards still held.
#[derive(Clone, Default)]
struct Record {
    events: Arc<Mutex<Vec<String>>>,
    held: Arc<()>,
}

impl Record {
    fn note(&self, event: String) {
        let at = turmoil::elapsed().as_micros();
        self.events.lock().expect("no holder panics").push(format!("{at} {event}"));
    }
}

/// Runs the scenario.
///
/// # Errors
/// A text with the seed and the promise that was broken.
pub fn run(seed: u64) -> Result<Outcome, String> {
    let record = Record::default();
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .simulation_duration(Duration::from_secs(300))
        .min_message_latency(Duration::from_micros(50))
        .max_message_latency(Duration::from_millis(3))
        .tcp_capacity(65536)
        .build();
    let (grants_in, grants_out) = mpsc::channel(HANDOFFS);
    let grants_out = Arc::new(tokio::sync::Mutex::new(grants_out));
    let source = Arc::new(filled(seed));

    let from = source.clone();
    sim.host("prefill", move || prefill(from.clone(), grants_out.clone(), Rng::new(seed ^ 1)));
    let decode = decode(source, grants_in, record.clone(), Rng::new(seed ^ 2));
    sim.client("decode", decode);
    sim.client("faults", faults(Rng::new(seed ^ 3)));
    sim.run().map_err(|error| format!("seed {seed}: {error}"))?;
    drop(sim);

    let events = record.events.lock().expect("no holder panics");
    let count = |word: &str| events.iter().filter(|event| event.contains(word)).count();
    Ok(Outcome { completed: count("complete"), failed: count("failed"), digest: xxh3_64(events.join("\n").as_bytes()) })
}

/// An arena whose every byte depends on the seed and its place.
fn filled(seed: u64) -> Arena {
    let arena = Arena::new(LAYOUT, HANDOFFS * BLOCKS_MAX as usize);
    let mut rng = Rng::new(seed);
    for index in 0..arena.blocks() as u32 {
        for layer in 0..LAYOUT.layers as usize {
            let bytes: Vec<u8> = (0..LAYOUT.layer_bytes()).map(|_| rng.u64() as u8).collect();
            crate::memory::write_layer(&arena, index, layer, &bytes);
        }
    }
    arena
}

type Failure = Box<dyn std::error::Error>;
type Grants = Arc<tokio::sync::Mutex<mpsc::Receiver<(Grant, Vec<BlockId>)>>>;

/// Pushes each granted sequence layer by layer; gives some up in the middle.
async fn prefill(arena: Arc<Arena>, grants: Grants, mut rng: Rng) -> Result<(), Failure> {
    let links = Arc::new(Links::new(Arc::new(TurmoilNet), arena, MODEL));
    let mut grants = grants.lock().await;
    while let Some((grant, blocks)) = grants.recv().await {
        let give_up = (rng.below(5) == 0).then(|| rng.below(LAYOUT.layers as u64) as usize);
        tokio::spawn(push(links.clone(), grant, blocks, give_up));
    }
    std::future::pending().await
}

async fn push(links: Arc<Links>, grant: Grant, blocks: Vec<BlockId>, give_up: Option<usize>) {
    let Ok(mut outgoing) = links.open(grant).await else { return };
    let pairs: Vec<(usize, BlockId)> = blocks.into_iter().enumerate().collect();
    for layer in 0..LAYOUT.layers as usize {
        if give_up == Some(layer) {
            return outgoing.abort(Aborted::Cancelled).await;
        }
        if outgoing.send(layer, &pairs).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let _ = outgoing.commit().await;
}

/// Grants blocks, waits for each handoff, and compares what completed with the source.
async fn decode(
    source: Arc<Arena>,
    grants: mpsc::Sender<(Grant, Vec<BlockId>)>,
    record: Record,
    mut rng: Rng,
) -> Result<(), Failure> {
    let arena = Arc::new(Arena::new(LAYOUT, source.blocks()));
    let receiver = Receiver::listen(Arc::new(TurmoilNet), &format!("0.0.0.0:{PORT}"), arena.clone(), MODEL).await?;
    let mut waiting = tokio::task::JoinSet::new();
    for number in 0..HANDOFFS {
        let first = (number as u64 * BLOCKS_MAX) as u32;
        let blocks: Vec<BlockId> = (0..1 + rng.below(BLOCKS_MAX) as u32)
            .map(|i| BlockId { index: first + i, generation: 1 + number as u32 })
            .collect();
        let guard = record.held.clone();
        let request = RequestId(number as u128);
        let deadline = Duration::from_secs(10);
        let (mut grant, incoming) = receiver.open(request, Epoch(1), blocks.clone(), deadline, guard);
        grant.address = format!("decode:{PORT}");
        grants.send((grant, blocks.clone())).await?;
        let patience = (rng.below(5) == 0).then(|| Duration::from_millis(rng.below(8)));
        let (record, source, arena) = (record.clone(), source.clone(), arena.clone());
        waiting.spawn(async move {
            let outcome = match patience {
                Some(patience) => tokio::time::timeout(patience, incoming.wait()).await,
                None => Ok(incoming.wait().await),
            };
            match outcome {
                Ok(Ok(_guard)) => {
                    record.note(format!("{number} complete"));
                    blocks.iter().all(|block| same_block(&source, &arena, block.index))
                }
                Ok(Err(error)) => {
                    record.note(format!("{number} failed: {}", error.reason()));
                    true
                }
                Err(_) => {
                    record.note(format!("{number} failed: given up"));
                    true
                }
            }
        });
        tokio::time::sleep(Duration::from_millis(rng.below(20))).await;
    }
    while let Some(exact) = waiting.join_next().await {
        assert!(exact?, "a completed handoff differs from its source");
    }
    let started = tokio::time::Instant::now();
    // The record itself, and this host's clone of it.
    while Arc::strong_count(&record.held) > 2 {
        assert!(started.elapsed() < BOUND, "{} guards leaked", Arc::strong_count(&record.held) - 2);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    record.note("quiet".into());
    Ok(())
}

fn same_block(source: &Arena, arena: &Arena, index: u32) -> bool {
    let layer = |arena: &Arena, layer| crate::memory::read_layer(arena, index, layer);
    (0..LAYOUT.layers as usize).all(|l| layer(source, l) == layer(arena, l))
}

/// Partitions, holds and heals the network between the two hosts at random moments; ends healed.
async fn faults(mut rng: Rng) -> turmoil::Result {
    for _ in 0..rng.below(4) {
        tokio::time::sleep(Duration::from_millis(rng.below(60))).await;
        let kind = rng.below(3);
        match kind {
            0 => turmoil::partition("prefill", "decode"),
            1 => turmoil::partition_oneway("prefill", "decode"),
            _ => turmoil::hold("prefill", "decode"),
        }
        tokio::time::sleep(Duration::from_millis(rng.below(3000))).await;
        match kind {
            2 => turmoil::release("prefill", "decode"),
            _ => turmoil::repair("prefill", "decode"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_keeps_the_promises_and_repeats() {
        let outcomes: Vec<Outcome> = (0..100).map(|seed| run(seed).unwrap_or_else(|e| panic!("{e}"))).collect();
        let again: Vec<Outcome> = (0..20).map(|seed| run(seed).unwrap_or_else(|e| panic!("{e}"))).collect();
        assert_eq!(outcomes[..20], again, "equal seeds, different runs");
        assert!(outcomes.iter().any(|o| o.failed > 0) && outcomes.iter().any(|o| o.completed == HANDOFFS));
    }
}
