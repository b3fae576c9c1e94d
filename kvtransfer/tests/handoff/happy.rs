//! Transfers that nothing disturbs arrive identical, and nothing stays behind.

use baton_core::Rng;
use baton_kvtransfer::TransferError;

use crate::world::{World, ids, pairs, until};

async fn arrives(world: &World) -> Result<(), TransferError> {
    let targets = ids([9, 3, 30, 31, 2]);
    let sources = ids([4, 5, 6, 0, 31]);
    let (grant, incoming) = world.grant(&targets);
    let mut outgoing = world.links.open(grant).await?;
    let mut extents: Vec<(usize, usize)> = (0..3).flat_map(|layer| (0..5).map(move |i| (layer, i))).collect();
    shuffle(&mut extents);
    for (layer, position) in extents {
        outgoing.send(layer, &[(position, sources[position])]).await?;
    }
    let committed = outgoing.commit().await?;
    let (guard, received) = incoming.wait().await?;
    assert_eq!(committed, received);
    assert_eq!(received.extents, 15);
    assert_eq!(world.held.count(), 1);
    drop(guard);
    assert!(world.equal(sources.iter().map(|s| s.index).zip(targets.iter().map(|t| t.index))));
    let counters = world.counters();
    assert_eq!((counters.granted, counters.completed, counters.held), (1, 1, 0));
    assert_eq!(counters.dropped_total(), 0);
    let sent = world.links.counters();
    assert_eq!((sent.tcp + sent.local, sent.committed, sent.failed, sent.bytes), (1, 1, 0, received.bytes));
    Ok(())
}

fn shuffle<T>(items: &mut [T]) {
    let mut rng = Rng::new(3);
    for i in (1..items.len()).rev() {
        items.swap(i, rng.below(i as u64 + 1) as usize);
    }
}

/// Random blocks over TCP, layers and blocks in any order.
#[tokio::test]
async fn blocks_arrive_identical_over_tcp() {
    arrives(&World::new(32).await).await.unwrap();
}

/// The same without a connection.
#[tokio::test]
async fn blocks_arrive_identical_in_one_process() {
    let world = World::new(32).await;
    world.links.add_local(&world.receiver);
    arrives(&world).await.unwrap();
    until(|| world.counters().links == 0).await;
}

/// All blocks of a layer in one call, as the engine exports them.
#[tokio::test]
async fn whole_layers_arrive() {
    let world = World::new(32).await;
    let blocks = ids(0..32);
    let (grant, incoming) = world.grant_first(32);
    let mut outgoing = world.links.open(grant).await.unwrap();
    for layer in 0..3 {
        outgoing.send(layer, &pairs(&blocks)).await.unwrap();
    }
    outgoing.commit().await.unwrap();
    incoming.wait().await.unwrap();
    assert!(world.equal((0..32).map(|i| (i, i))));
}
