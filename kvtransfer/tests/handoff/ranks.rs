//! Handoffs between groups of ranks that cut the kv heads differently: every rank gets its heads of every block.

use std::sync::Arc;
use std::time::Duration;

use baton_core::{Arena, BlockLayout, Rng};
use baton_kvtransfer::ranks::{Departures, Order, RankGrant, Receivers, Senders, routes};
use baton_kvtransfer::wire::{self, Body, Tag};
use baton_kvtransfer::{Links, Receiver, TransferError};

use crate::net::Loopback;
use crate::raw::Raw;
use crate::world::{EPOCH, Held, LAYOUT, MODEL, REQUEST, ids, pairs, until};

const BLOCKS: u32 = 5;
const DEGREES: [u32; 4] = [1, 2, 4, 8];

/// How ranks reach one another.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Tcp,
    Shared,
    Local,
}

/// What stands in a head of a layer of a block, whoever holds it.
fn content(layout: &BlockLayout, head: u32, layer: usize, block: u32) -> Vec<u8> {
    let mut rng = Rng::new((head as u64) << 32 | (layer as u64) << 16 | block as u64);
    (0..layout.slice_bytes()).map(|_| rng.u64() as u8).collect()
}

/// Heads of a rank of `ranks`.
fn heads(kv_heads: u32, ranks: u32, rank: u32) -> std::ops::Range<u32> {
    let first = rank * kv_heads / ranks;
    first..first + (kv_heads / ranks).max(1)
}

struct Group {
    sources: Vec<Arc<Arena>>,
    targets: Vec<Arc<Arena>>,
    receivers: Receivers,
    senders: Senders,
    links: Vec<Links>,
    kv_heads: u32,
    held: Held,
}

impl Group {
    async fn new(kv_heads: u32, from: u32, to: u32, way: Way) -> Group {
        let layout = |ranks: u32| BlockLayout { kv_heads: (kv_heads / ranks).max(1), ..LAYOUT };
        let source = |rank: u32| {
            let arena = match way {
                Way::Shared => Arena::shared(layout(from), 16).unwrap(),
                _ => Arena::new(layout(from), 16),
            };
            for (block, layer) in (0..16).flat_map(|block| (0..3).map(move |layer| (block, layer))) {
                let all = heads(kv_heads, from, rank).map(|head| content(arena.layout(), head, layer, block));
                // SAFETY: the arena is not shared yet.
                unsafe { arena.write_layer(block, layer, &all.collect::<Vec<_>>().concat()) };
            }
            Arc::new(arena)
        };
        let sources: Vec<_> = (0..from).map(source).collect();
        let targets: Vec<_> = (0..to).map(|_| Arc::new(Arena::new(layout(to), 16))).collect();
        let mut receivers = Vec::new();
        for target in &targets {
            let listening = Receiver::of_rank(Arc::new(Loopback), "127.0.0.1:0", target.clone(), kv_heads, MODEL);
            receivers.push(listening.await.unwrap());
        }
        let links = |arena: &Arc<Arena>| Links::of_rank(Arc::new(Loopback), arena.clone(), kv_heads, MODEL);
        let links: Vec<_> = sources.iter().map(links).collect();
        if way == Way::Local {
            links.iter().for_each(|links| receivers.iter().for_each(|receiver| links.add_local(receiver)));
        }
        let (senders, receivers) = (Senders::new(links.clone()), Receivers::new(receivers, kv_heads));
        Group { sources, targets, receivers, senders, links, kv_heads, held: Held::default() }
    }

    fn open(&self) -> (Vec<RankGrant>, baton_kvtransfer::ranks::Arrivals<crate::world::Guard>) {
        let blocks = ids(3..3 + BLOCKS);
        let order = Order { request: REQUEST, epoch: EPOCH, blocks: &blocks, deadline: Duration::from_secs(60) };
        self.receivers.open(self.sources.len() as u32, order, self.held.guard()).unwrap()
    }

    /// Whether each rank's blocks hold its heads of the source's blocks 8, 7, 6 ...
    fn arrived(&self) -> bool {
        let ranks = self.targets.len() as u32;
        self.targets.iter().zip(0..).all(|(target, rank)| {
            let places = (0..BLOCKS).flat_map(|block| (0..3).map(move |layer| (block, layer)));
            places.into_iter().all(|(block, layer)| {
                let expected = heads(self.kv_heads, ranks, rank).map(|h| content(target.layout(), h, layer, 8 - block));
                crate::world::read(target, 3 + block, layer) == expected.collect::<Vec<_>>().concat()
            })
        })
    }
}

fn sent() -> Vec<(usize, baton_core::BlockId)> {
    pairs(&ids((0..BLOCKS).map(|block| 8 - block)))
}

async fn send(mut departures: Departures) -> Result<baton_kvtransfer::Committed, TransferError> {
    for layer in [2, 0, 1] {
        departures.send(layer, &sent()[..3]).await?;
        departures.send(layer, &sent()[3..]).await?;
    }
    departures.commit().await
}

async fn hands_off(kv_heads: u32, from: u32, to: u32, way: Way) {
    let group = Group::new(kv_heads, from, to, way).await;
    let (grants, arrivals) = group.open();
    let departures = group.senders.open(grants).await.unwrap();
    let (sent, arrived) = tokio::join!(send(departures), arrivals.wait());
    let (guard, received) = arrived.unwrap();
    assert_eq!(sent.unwrap(), received);
    assert!(group.arrived(), "{kv_heads} heads, {from} to {to} ranks, {way:?}");
    // What is needed, and nothing twice.
    let bytes: usize = group.targets.iter().map(|target| target.layout().block_bytes() * BLOCKS as usize).sum();
    assert_eq!(received.bytes, bytes as u64);
    drop(guard);
    assert_eq!(group.held.count(), 0);
    let begun = group.links.iter().map(|links| links.counters()).map(|c| match way {
        Way::Tcp => c.tcp,
        Way::Shared => c.shm,
        Way::Local => c.local,
    });
    assert_eq!(begun.sum::<u64>() as usize, routes(kv_heads, from, to, BLOCKS as usize).unwrap().len());
}

async fn every_pair(way: Way) {
    // Eight heads for up to eight ranks; two heads, which more than two ranks hold several times.
    for (from, to) in DEGREES.into_iter().flat_map(|from| DEGREES.map(|to| (from, to))) {
        hands_off(8, from, to, way).await;
        hands_off(2, from, to, way).await;
    }
}

#[tokio::test]
async fn every_pair_of_degrees_over_tcp() {
    every_pair(Way::Tcp).await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn every_pair_of_degrees_over_shared_memory() {
    every_pair(Way::Shared).await;
}

#[tokio::test]
async fn every_pair_of_degrees_in_one_process() {
    every_pair(Way::Local).await;
}

/// Another system crashes when the prefill side has more ranks than the decode side.
#[tokio::test]
async fn more_prefill_ranks_than_decode_ranks_do_not_crash() {
    hands_off(8, 8, 1, Way::Tcp).await;
    hands_off(1, 8, 2, Way::Tcp).await;
}

/// What two ranks give one another is one run of a block, and nobody gives what another gives as well.
#[test]
fn a_pair_of_ranks_has_one_route_and_replicas_share() {
    for (from, to) in DEGREES.into_iter().flat_map(|from| DEGREES.map(|to| (from, to))) {
        let of_eight = routes(8, from, to, 16).unwrap();
        assert_eq!(of_eight.len() as u32, from.max(to), "{from} to {to}");
        assert!(of_eight.iter().all(|route| route.blocks.len() == 16 && route.heads == 8 / from.max(to)));
        for route in routes(2, from, to, 16).unwrap().iter().filter(|_| from > 2) {
            assert_eq!(route.blocks.len() as u32, 16 / (from / 2), "{from} to {to}");
        }
    }
    assert!(routes(6, 4, 2, 16).is_err());
}

/// One rank of the sending group is lost: the whole handoff fails, and its guard goes when the others have stopped.
#[tokio::test]
async fn a_lost_rank_fails_the_handoff() {
    let group = Group::new(8, 4, 2, Way::Tcp).await;
    let (grants, arrivals) = group.open();
    let address = grants[0].grant.address.clone();
    let mut departures = group.senders.open(grants).await.unwrap();
    departures.send(0, &sent()).await.unwrap();
    group.links[0].disconnect(&address);
    assert!(matches!(arrivals.wait().await.err(), Some(TransferError::Lost { .. })));
    until(|| group.held.count() == 0).await;
    assert!(send(departures).await.is_err());
    for receiver in group.receivers.ranks() {
        until(|| receiver.counters().held == 0).await;
    }
    // The next one completes.
    let (grants, arrivals) = group.open();
    let departures = group.senders.open(grants).await.unwrap();
    let (sent, arrived) = tokio::join!(send(departures), arrivals.wait());
    assert!(sent.is_ok() && arrived.is_ok() && group.arrived());
}

/// A sender of the first release has whole blocks only: a rank's receiver says so in the greeting; and what was granted to
/// one slice opens nothing for another.
#[tokio::test]
async fn a_sender_that_knows_no_slices_is_refused() {
    let group = Group::new(8, 1, 2, Way::Tcp).await;
    let text = wire::compatibility(&BlockLayout { kv_heads: 8, ..LAYOUT }, MODEL);
    let (mut grants, _arrivals) = group.open();
    let mut raw = Raw::connect(&Loopback, &grants[0].grant.address).await;
    raw.say(Tag::default(), Body::Hello { text: text.clone(), features: 0 }).await;
    let Body::Mismatch(theirs) = raw.hear().await.unwrap().body else { panic!("greeted") };
    assert!(theirs.starts_with(&text) && theirs.contains("some heads"), "{theirs}");

    let mut other = grants.remove(0);
    other.grant.slice.as_mut().unwrap().first = 4;
    assert!(matches!(group.links[0].open(other.grant).await.err(), Some(TransferError::Refused(_))));
    let mut beyond = grants.remove(0);
    beyond.grant.slice.as_mut().unwrap().first = u32::MAX;
    assert!(matches!(group.links[0].open(beyond.grant).await.err(), Some(TransferError::Incompatible { .. })));
}
