//! Links between two caches: pairing, sharing one connection, and the other end's death.

use std::sync::Arc;

use baton_core::{Arena, BlockLayout, KvDtype};
use baton_kvtransfer::{Links, Receiver, TransferError};

use crate::memory::Memory;
use crate::net::Loopback;
use crate::world::{DEADLINE, EPOCH, LAYOUT, MODEL, REQUEST, World, ids, pairs, until};

fn links_of(layout: BlockLayout, model: &str) -> Links {
    Links::new(Arc::new(Loopback), Arc::new(Arena::new(layout, 4)), model)
}

/// Two transfers whose frames alternate on one connection.
#[tokio::test]
async fn transfers_share_a_connection() {
    let world = World::new(16).await;
    let (low, high) = (ids(0..8), ids(8..16));
    let ((first, first_in), (second, second_in)) = (world.grant(&low), world.grant(&high));
    let mut first = world.links.open(first).await.unwrap();
    let mut second = world.links.open(second).await.unwrap();
    for layer in 0..3 {
        for position in 0..8 {
            first.send(layer, &[(position, low[position])]).await.unwrap();
            second.send(2 - layer, &[(7 - position, high[7 - position])]).await.unwrap();
        }
    }
    assert_eq!(world.counters().links, 1);
    first.commit().await.unwrap();
    first_in.wait().await.unwrap();
    assert_eq!(world.held.count(), 1);
    second.commit().await.unwrap();
    second_in.wait().await.unwrap();
    assert!(world.equal((0..16).map(|i| (i, i))));
}

/// Many transfers at once from several tasks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_transfers_complete() {
    let world = Arc::new(World::new(64).await);
    let transfers: Vec<_> = (0..16u32)
        .map(|i| {
            let world = world.clone();
            tokio::spawn(async move {
                let blocks = ids(4 * i..4 * i + 4);
                let (grant, incoming) = world.grant(&blocks);
                let mut outgoing = world.links.open(grant).await.unwrap();
                for layer in 0..3 {
                    outgoing.send(layer, &pairs(&blocks)).await.unwrap();
                }
                outgoing.commit().await.unwrap();
                drop(incoming.wait().await.unwrap());
            })
        })
        .collect();
    for transfer in transfers {
        transfer.await.unwrap();
    }
    assert!(world.equal((0..64).map(|i| (i, i))));
    assert_eq!((world.held.count(), world.counters().completed), (0, 16));
}

/// Another layout is refused with both descriptions before a connection is used; another model by the greeting.
#[tokio::test]
async fn caches_that_differ_are_not_paired() {
    let world = World::new(4).await;
    let (grant, _incoming) = world.grant_first(4);
    for other in [BlockLayout { head_dim: 16, ..LAYOUT }, BlockLayout { dtype: KvDtype::Int8, ..LAYOUT }] {
        let error = links_of(other, MODEL).open(grant.clone()).await.err();
        let (ours, theirs) = (other.describe(), LAYOUT.describe());
        assert_eq!(error, Some(TransferError::Incompatible { ours, theirs }));
    }

    let error = links_of(LAYOUT, "another").open(grant.clone()).await.err().unwrap();
    let TransferError::Incompatible { ours, theirs } = &error else { panic!("{error}") };
    assert!(ours.contains("model another") && theirs.contains(MODEL), "{error}");
    assert_eq!(world.counters().mismatched, 1);

    let local = links_of(LAYOUT, "another");
    local.add_local(&world.receiver);
    assert!(matches!(local.open(grant).await.err(), Some(TransferError::Incompatible { .. })));
}

/// Nobody listens: an error, at once.
#[tokio::test]
async fn an_address_without_a_receiver_is_lost() {
    let world = World::new(4).await;
    let (grant, incoming) = world.grant_first(4);
    let World { receiver, links, .. } = world;
    receiver.close().await;
    assert!(matches!(links.open(grant).await.err(), Some(TransferError::Lost { .. })));
    assert!(incoming.wait().await.is_err());
}

/// The receiver goes: its transfers fail on both sides, and when it is back the link is too.
#[tokio::test(start_paused = true)]
async fn a_link_comes_back_with_its_receiver() {
    let net = Memory::default();
    let World { source, target, receiver, links, held } = World::over(Arc::new(net.clone()), LAYOUT, 4).await;
    let address = receiver.address();
    links.connect(&address);
    let (grant, incoming) = receiver.open(REQUEST, EPOCH, ids(0..4), DEADLINE, held.guard());
    let outgoing = links.open(grant).await.unwrap();
    receiver.close().await;
    assert!(incoming.wait().await.is_err());
    assert_eq!(held.count(), 0);
    assert!(outgoing.commit().await.is_err());

    let receiver = Receiver::listen(Arc::new(net), &address, target.clone(), MODEL).await.unwrap();
    let world = World { source, target, receiver, links, held };
    let (grant, incoming) = world.grant_first(4);
    let mut outgoing = world.links.open(grant).await.unwrap();
    for layer in 0..3 {
        outgoing.send(layer, &pairs(&ids(0..4))).await.unwrap();
    }
    outgoing.commit().await.unwrap();
    incoming.wait().await.unwrap();
    assert!(world.equal((0..4).map(|i| (i, i))));
}

/// A link that was given up fails its transfer, and the receiver frees the blocks.
#[tokio::test]
async fn a_disconnected_link_fails_its_transfers() {
    let world = World::new(4).await;
    let (grant, incoming) = world.grant_first(4);
    let outgoing = world.links.open(grant.clone()).await.unwrap();
    world.links.disconnect(&grant.address);
    assert!(matches!(incoming.wait().await.err(), Some(TransferError::Lost { .. })));
    assert!(matches!(outgoing.commit().await, Err(TransferError::Lost { .. })));
    until(|| world.held.count() == 0).await;
}
