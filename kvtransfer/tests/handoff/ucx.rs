//! The link over UCX: within this process, and from another one that is killed in the middle. Where the library is missing
//! the same transfers go by tcp, with that as the reason.

use std::sync::Arc;

use baton_core::Arena;
use baton_kvtransfer::{Fallback, LinkKind, Preferred, Receiver, TransferError, Ways, describe_ucx};

use crate::net::Loopback;
use crate::shm::{LAYOUTS, Sender};
use crate::tls::Authority;
use crate::world::{MODEL, World, ids, pairs, until};

/// Bytes arrive identical, over UCX where there is such a library, and otherwise over tcp, counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_arrive_over_ucx() {
    for layout in LAYOUTS {
        let world = World::over_ucx(layout, 40).await;
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
        match describe_ucx() {
            Ok(_) => assert_eq!((counters.ucx, counters.tcp, counters.fallbacks(Fallback::NoUcx)), (1, 0, 0)),
            Err(_) => assert_eq!((counters.ucx, counters.tcp, counters.fallbacks(Fallback::NoUcx)), (0, 1, 1)),
        }
        assert_eq!(world.counters().dropped_total(), 0);
    }
}

/// A receiver that offers none is reached by tcp.
#[tokio::test]
async fn a_receiver_without_ucx_is_a_counted_fallback() {
    let preferred = [Preferred::Best, Preferred::Ucx];
    let world = World::with(Arc::new(Loopback), Arena::new(LAYOUTS[0], 4), preferred, [None, None]).await;
    let (grant, _incoming) = world.grant_first(4);
    drop(world.links.open(grant).await.unwrap());
    let counters = world.links.counters();
    assert_eq!((counters.ucx, counters.tcp, counters.fallbacks(Fallback::NoUcx)), (0, 1, 1));
}

/// Another process hands off, over UCX's shared memory and over its tcp; the next one is killed after its first layer, and
/// leaves nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_hands_off_over_ucx() {
    if let Err(why) = describe_ucx() {
        return println!("skipped: {why}");
    }
    for transports in ["tcp,self", "sm,tcp,self"] {
        let world = World::over_ucx(LAYOUTS[1], 64).await;
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

/// Memory of the host is better than UCX unless UCX is asked for, and who asks for the network alone gets nothing else, from
/// either end; what was not wanted is no fallback.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_preferred_link_is_made() {
    use Preferred::{Best, Tcp, Ucx};
    let with_ucx = describe_ucx().is_ok();
    let cases = [
        ([Best, Best], LinkKind::Shm, None),
        ([Tcp, Best], LinkKind::Tcp, Some(Fallback::NotOffered)),
        ([Best, Tcp], LinkKind::Tcp, None),
        ([Tcp, Tcp], LinkKind::Tcp, None),
        ([Best, Ucx], LinkKind::Shm, Some(Fallback::NoUcx)),
        ([Ucx, Best], LinkKind::Shm, None),
        ([Ucx, Ucx], LinkKind::Ucx, None),
    ];
    for (preferred, expected, fallback) in cases.into_iter().filter(|case| with_ucx || case.0[0] != Ucx) {
        let source = Arena::shared(LAYOUTS[0], 4).unwrap();
        let world = World::with(Arc::new(Loopback), source, preferred, [None, None]).await;
        // Before anybody wants to send.
        world.links.connect(&world.receiver.address());
        until(|| world.links.counters().up(expected) == 1).await;
        let counters = world.links.counters();
        assert_eq!(counters.connected, 1, "{preferred:?}");
        for reason in Fallback::ALL {
            assert_eq!(counters.fallbacks(reason), u64::from(Some(reason) == fallback), "{preferred:?}: {reason:?}");
        }
        crate::world::completes(&world, 4).await;
        world.receiver.end();
        until(|| world.links.counters().up(expected) == 0).await;
    }
}

/// Asked for where there is none, UCX is an error that says why; so it is beside TLS, which it has not.
#[tokio::test]
async fn ucx_that_cannot_be_is_an_error() {
    let made = Receiver::with(
        Arc::new(Loopback),
        "127.0.0.1:0",
        Arc::new(Arena::new(LAYOUTS[0], 4)),
        MODEL,
        Ways { preferred: Preferred::Ucx, tls: Some(Authority::new().worker()), ..Ways::default() },
    );
    let error = made.await.err().expect("refused").to_string();
    assert!(error.contains("encrypt"), "{error}");
}
