//! The link over UCX: within this process, and from another one that is killed in the middle. Where the library is missing
//! the same transfers go by tcp, with that as the reason.

use baton_kvtransfer::{Fallback, TransferError, describe_ucx};

use crate::shm::{LAYOUTS, Sender};
use crate::world::{World, ids, pairs, until};

/// Bytes arrive identical, over UCX where there is such a library, and otherwise over tcp, counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_arrive_over_ucx() {
    for layout in LAYOUTS {
        let world = World::with_layout(layout, 40).await;
        let offered = world.receiver.offer_ucx().await;
        assert_eq!(offered.is_ok(), describe_ucx().is_ok(), "{offered:?}");
        world.links.prefer_ucx();
        let (targets, sources) = (ids(0..32), ids((0..32).map(|i| 39 - i)));
        let (grant, incoming) = world.grant(&targets);
        let mut outgoing = world.links.open(grant).await.unwrap();
        for layer in 0..layout.layers as usize {
            outgoing.send(layer, &pairs(&sources)).await.unwrap();
        }
        let committed = outgoing.commit().await.unwrap();
        let (_guard, received) = incoming.wait().await.unwrap();
        assert_eq!(committed, received);
        assert!(world.equal((0..32).map(|i| (39 - i, i))));
        let counters = world.links.counters();
        match offered {
            Ok(()) => assert_eq!((counters.ucx, counters.tcp, counters.fallbacks(Fallback::NoUcx)), (1, 0, 0)),
            Err(_) => assert_eq!((counters.ucx, counters.tcp, counters.fallbacks(Fallback::NoUcx)), (0, 1, 1)),
        }
        assert_eq!(world.counters().dropped_total(), 0);
    }
}

/// A receiver that offers none is reached by tcp.
#[tokio::test]
async fn a_receiver_without_ucx_is_a_counted_fallback() {
    let world = World::new(4).await;
    world.links.prefer_ucx();
    let (grant, _incoming) = world.grant_first(4);
    drop(world.links.open(grant).await.unwrap());
    let counters = world.links.counters();
    assert_eq!((counters.ucx, counters.tcp, counters.fallbacks(Fallback::NoUcx)), (0, 1, 1));
}

/// Another process hands off, over UCX's shared memory and over its tcp; the next one is killed after its first layer, and
/// leaves nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_hands_off_over_ucx() {
    if describe_ucx().is_err() {
        return;
    }
    for transports in ["tcp,self", "sm,tcp,self"] {
        let world = World::with_layout(LAYOUTS[1], 64).await;
        world.receiver.offer_ucx().await.unwrap();
        let (grant, incoming) = world.grant_first(48);
        let sender = Sender::over_ucx(&grant, 2, transports);
        incoming.wait().await.unwrap();
        assert!(world.equal((0..48).map(|i| (i, i))));
        drop(sender);
        let (grant, incoming) = world.grant_first(48);
        let sender = Sender::over_ucx(&grant, 1, transports);
        until(|| world.counters().extents >= 48 * 3).await;
        drop(sender);
        assert!(matches!(incoming.wait().await.err(), Some(TransferError::Lost { .. })));
        until(|| world.held.count() == 0 && world.counters().links == 0).await;
        assert_eq!(world.counters().completed, 1);
    }
}
