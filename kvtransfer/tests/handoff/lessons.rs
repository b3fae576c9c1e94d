//! What has gone wrong in other systems that move keys and values between workers, one test for each, named after it.
//! (Prefill with more ranks than decode: `ranks`. Decode refusing before admission: the decode worker's tests.)

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::{HANDOFF_BACKOFF_MS_MAX, HANDOFF_CONNECTS_MAX, HANDOFF_QUIESCE_MS, WORKER_LEASE_MS};
use baton_core::{Aborted, Arena, BlockId, BlockLayout, KvDtype, Net, RequestId, TransferId};
use baton_kvtransfer::wire::{Body, Kind, Tag};
use baton_kvtransfer::{Dropped, Grant, Links, Receiver, TransferError};
use tokio::time::{Instant, sleep};

use crate::memory::Memory;
use crate::net::Loopback;
use crate::raw::{Frame, Raw};
use crate::world::{DEADLINE, EPOCH, LAYOUT, MODEL, REQUEST, World, completes, ids, pairs, read, send_all, until};

async fn in_memory() -> (Memory, World) {
    let net = Memory::default();
    let world = World::over(Arc::new(net.clone()), LAYOUT, 8).await;
    (net, world)
}

/// A consumed reference to blocks was answered with what another prompt had put there: here it opens nothing, and what
/// its holder writes goes nowhere, while the blocks' next owner is served.
#[tokio::test]
async fn a_consumed_reference_does_not_lead_to_another_prompts_blocks() {
    let world = World::new(8).await;
    let (consumed, incoming) = world.grant_first(4);
    let mut raw = Raw::greeted(&Loopback, &consumed.address).await;
    let outgoing = world.links.open(consumed.clone()).await.unwrap();
    send_all(outgoing, &pairs(&ids(0..4))).await.unwrap();
    drop(incoming.wait().await.unwrap());

    // The same places, one generation on, for another prompt.
    let places: Vec<BlockId> = ids(0..4).iter().map(|b| BlockId { generation: b.generation + 1, ..*b }).collect();
    let (next, incoming) = world.receiver.open(RequestId(78), EPOCH, places, DEADLINE, world.held.guard());
    let refused = world.links.open(consumed.clone()).await.err();
    assert_eq!(refused, Some(TransferError::Refused(baton_core::Refused::Stale)));
    raw.data(Frame::new(&world.source, &consumed, 0, &pairs(&ids(4..8)))).await;
    until(|| world.counters().dropped(Dropped::Unknown) >= 2).await;
    let outgoing = world.links.open(next).await.unwrap();
    let other = pairs(&ids([5, 7, 4, 6]));
    send_all(outgoing, &other).await.unwrap();
    incoming.wait().await.unwrap();
    assert!(world.equal([(5, 0), (7, 1), (4, 2), (6, 3)]));
}

/// The word that a transfer is complete was lost, and its sender waited for ever.
#[tokio::test(start_paused = true)]
async fn a_lost_completion_does_not_hang_the_sender() {
    let net = Memory::default();
    let mut listener = net.listen("by hand").await.unwrap();
    let links = Links::new(Arc::new(net), Arc::new(Arena::new(LAYOUT, 8)), MODEL);
    let grant = Grant { deadline_ms: 5_000, address: listener.address(), ..grant(TransferId(1)) };
    let sending = tokio::spawn(async move { send_all(links.open(grant).await?, &pairs(&ids(0..4))).await });
    let mut raw = Raw::new(listener.accept().await.unwrap());
    let start = Instant::now();
    while let Some((header, _)) = raw.frame().await {
        match header.kind {
            Kind::Hello => {
                let text = baton_kvtransfer::wire::compatibility(&LAYOUT, MODEL);
                raw.say(Tag::default(), Body::Hello { text, features: 0 }).await;
            }
            Kind::Open => raw.say(header.tag, Body::Opened).await,
            Kind::Abort => break,
            // Alive, but it never says that the commit stands.
            _ => raw.say(Tag::default(), Body::Ping).await,
        }
    }
    assert_eq!(sending.await.unwrap().err(), Some(TransferError::Deadline));
    assert!((5_000..5_500).contains(&start.elapsed().as_millis()));
}

/// The same at the other end: everything has arrived, and the commit never comes.
#[tokio::test(start_paused = true)]
async fn a_lost_commit_does_not_hang_the_receiver() {
    let (net, world) = in_memory().await;
    let deadline = Duration::from_secs(5);
    let (grant, incoming) = world.receiver.open(REQUEST, EPOCH, ids(0..4), deadline, world.held.guard());
    let mut raw = Raw::opened(&net, &grant).await;
    for layer in 0..3 {
        raw.data(Frame::new(&world.source, &grant, layer, &pairs(&ids(0..4)))).await;
    }
    let pinging = tokio::spawn(async move {
        loop {
            raw.say(Tag::default(), Body::Ping).await;
            sleep(Duration::from_millis(100)).await;
        }
    });
    assert_eq!(incoming.wait().await.err(), Some(TransferError::Deadline));
    assert_eq!(world.counters().extents, 12);
    until(|| world.held.count() == 0).await;
    pinging.abort();
}

/// What had expired was only looked for when the next request came: with none coming, it was kept for ever. Here nobody
/// even waits for the transfers.
#[tokio::test(start_paused = true)]
async fn cleanup_does_not_wait_for_the_next_request() {
    let (net, world) = in_memory().await;
    let deadline = Duration::from_secs(3);
    let open = |from| world.receiver.open(REQUEST, EPOCH, ids(from..from + 4), deadline, world.held.guard());
    let ((begun, _unwatched), (_untouched, _unwatched_too)) = (open(0), open(4));
    let mut raw = Raw::opened(&net, &begun).await;
    raw.data(Frame::new(&world.source, &begun, 0, &pairs(&ids(0..4)))).await;
    let talking = tokio::spawn(async move {
        loop {
            raw.say(Tag::default(), Body::Ping).await;
            sleep(Duration::from_millis(100)).await;
        }
    });
    assert_eq!(world.counters().held, 2);
    sleep(deadline + Duration::from_millis(HANDOFF_QUIESCE_MS + 100)).await;
    assert_eq!((world.counters().held, world.counters().failed), (0, 2));
    talking.abort();
}

/// A block was evicted after its send was called and before its bytes were read, and what came next in its place was
/// sent. Here a send that is given up leaves a copy behind, and what arrives is what the block held.
#[tokio::test]
async fn a_block_evicted_before_its_send_is_sent_as_it_was() {
    let world = World::with_layout(WIDE, 16).await;
    let honest: Vec<Vec<u8>> = (0..16).map(|block| read(&world.source, block, 0)).collect();
    let junk = vec![0xEE; WIDE.layer_bytes()];
    for _ in 0..20 {
        let (grant, incoming) = world.grant_first(16);
        let mut outgoing = world.links.open(grant).await.unwrap();
        let blocks = pairs(&ids(0..16));
        tokio::select! {
            biased;
            sent = outgoing.send(0, &blocks) => sent.unwrap(),
            () = tokio::task::yield_now() => {}
        }
        for block in 0..16 {
            // SAFETY: the send has returned or was dropped; nothing reads its blocks any more.
            unsafe { world.source.write_layer(block, 0, &junk) };
        }
        assert!(outgoing.commit().await.is_err(), "one layer of two is not all");
        assert!(incoming.wait().await.is_err());
        for block in 0..16 {
            let there = read(&world.target, block, 0);
            assert!(there == honest[block as usize] || there.iter().all(|byte| *byte == 0), "block {block}");
            // SAFETY: as above.
            unsafe { world.source.write_layer(block, 0, &honest[block as usize]) };
        }
    }
    assert_eq!(world.counters().dropped(Dropped::Damaged), 0);
}

const WIDE: BlockLayout = BlockLayout { layers: 2, kv_heads: 8, head_dim: 128, block_tokens: 16, dtype: KvDtype::Bf16 };

/// Buffers were freed at a timeout while the network card still wrote into them. Here the guard outlives the deadline
/// until the writer has spoken its last word, and what the writer sends meanwhile is not written.
#[tokio::test(start_paused = true)]
async fn a_timeout_does_not_free_blocks_under_their_writer() {
    let (net, world) = in_memory().await;
    let deadline = Duration::from_secs(3);
    let (grant, incoming) = world.receiver.open(REQUEST, EPOCH, ids(0..4), deadline, world.held.guard());
    let mut raw = Raw::opened(&net, &grant).await;
    let waiting = tokio::spawn(incoming.wait());
    while !waiting.is_finished() {
        raw.say(Tag::default(), Body::Ping).await;
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(waiting.await.unwrap().err(), Some(TransferError::Deadline));
    assert_eq!(world.held.count(), 1);
    raw.data(Frame::new(&world.source, &grant, 0, &pairs(&ids(0..4)))).await;
    until(|| world.counters().dropped(Dropped::Late) > 0).await;
    assert_eq!(world.held.count(), 1);
    assert!(read(&world.target, 0, 0).iter().all(|byte| *byte == 0));
    raw.say(grant.tag(), Body::Aborted { quiesced: true }).await;
    until(|| world.held.count() == 0).await;
    assert_eq!(world.counters().unquiesced, 0);
}

/// Many requests cancelled at once wedged the prefill side. Here all are under way on one connection when the decode side
/// gives them up; credit and places come back.
#[tokio::test]
async fn many_cancels_at_once_do_not_wedge_the_sender() {
    let world = Arc::new(World::new(8).await);
    for _ in 0..5 {
        let mut waiting = Vec::new();
        let mut sending = tokio::task::JoinSet::new();
        for _ in 0..200 {
            let (grant, incoming) = world.grant_first(8);
            waiting.push(incoming);
            let world = world.clone();
            sending.spawn(async move {
                let mut outgoing = world.links.open(grant).await?;
                loop {
                    outgoing.send(0, &pairs(&ids(0..8))).await?;
                    tokio::task::yield_now().await;
                }
                #[allow(unreachable_code)]
                Ok::<(), TransferError>(())
            });
        }
        until(|| world.links.counters().tcp > 0 && world.counters().extents > 0).await;
        drop(waiting);
        while let Some(ended) = sending.join_next().await {
            assert!(ended.unwrap().is_err());
        }
        until(|| world.held.count() == 0 && world.counters().held == 0).await;
        completes(&world, 8).await;
    }
    assert_eq!((world.counters().unquiesced, world.counters().links), (0, 1));
}

/// A pair that had failed was not tried again. Here even a receiver that was away for longer than its senders try by
/// themselves is found by the first request after it is back.
#[tokio::test(start_paused = true)]
async fn a_pair_that_failed_works_again() {
    let (net, world) = in_memory().await;
    completes(&world, 8).await;
    let World { source, target, receiver, links, held } = world;
    let address = receiver.address();
    receiver.close().await;
    sleep(Duration::from_millis(2 * HANDOFF_BACKOFF_MS_MAX * HANDOFF_CONNECTS_MAX as u64)).await;
    assert!(links.counters().unconnected >= HANDOFF_CONNECTS_MAX as u64);
    let receiver = Receiver::listen(Arc::new(net), &address, target.clone(), MODEL).await.unwrap();
    let world = World { source, target, receiver, links, held };
    completes(&world, 8).await;
}

/// The first request of a pair paid for its connection. Here it is made when the receiver becomes known.
#[tokio::test]
async fn the_first_request_finds_its_connection_made() {
    let world = World::new(8).await;
    world.links.connect(&world.receiver.address());
    until(|| world.links.counters().connected == 1 && world.counters().links == 1).await;
    completes(&world, 8).await;
    assert_eq!((world.links.counters().connected, world.links.counters().unconnected), (1, 0));
}

/// Names of requests were cut to 12 bits, so that two of 4,096 met. Here five thousand are open at once, each has a name
/// of its own, and two that are 4,096 apart do not touch one another.
#[tokio::test]
async fn five_thousand_transfers_have_names_of_their_own() {
    let world = World::new(8).await;
    let (low, high) = (ids(0..4), ids(4..8));
    let mut open: Vec<_> = (0..5_000).map(|i| world.grant(if i < 4_096 { &low } else { &high })).collect();
    let names: BTreeSet<TransferId> = open.iter().map(|(grant, _)| grant.transfer).collect();
    assert_eq!(names.len(), 5_000);
    let (far, far_in) = open.swap_remove(4_096);
    let (near, near_in) = open.swap_remove(0);
    assert_eq!(near.transfer.0 + 4_096, far.transfer.0);
    let (near, far) = (world.links.open(near).await.unwrap(), world.links.open(far).await.unwrap());
    send_all(far, &pairs(&low)).await.unwrap();
    far_in.wait().await.unwrap();
    assert!(world.equal((0..4).map(|i| (i, i + 4))));
    assert!(read(&world.target, 0, 0).iter().all(|byte| *byte == 0));
    send_all(near, &pairs(&high)).await.unwrap();
    near_in.wait().await.unwrap();
    assert!(world.equal((0..4).map(|i| (i + 4, i))));
    drop(open);
    until(|| world.held.count() == 0).await;
}

/// A batch of 16,384 small blocks was refused because a queue was full. Here it waits its turn.
async fn sixteen_thousand_blocks(world: World) {
    let blocks = ids(0..16_384);
    let (grant, incoming) = world.grant(&blocks);
    let mut outgoing = world.links.open(grant).await.unwrap();
    outgoing.send(0, &pairs(&blocks)).await.unwrap();
    outgoing.commit().await.unwrap();
    let (_guard, received) = incoming.wait().await.unwrap();
    assert_eq!(received.extents, 16_384);
    assert!(world.equal((0..16_384).map(|i| (i, i))));
}

const SMALL: BlockLayout = BlockLayout { layers: 1, kv_heads: 1, ..LAYOUT };

#[tokio::test]
async fn sixteen_thousand_small_blocks_are_not_refused() {
    sixteen_thousand_blocks(World::with_layout(SMALL, 16_384).await).await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn sixteen_thousand_small_blocks_are_not_refused_by_reference() {
    sixteen_thousand_blocks(World::shared(SMALL, 16_384).await).await;
}

/// However a transfer ends early, and whatever its sender does then, its blocks are free within the time after which a
/// worker would be given up.
#[tokio::test(start_paused = true)]
async fn the_pool_is_full_again_within_a_lease() {
    for way in 0..8 {
        let (net, world) = in_memory().await;
        let (grant, incoming) = world.grant_first(8);
        let mut raw = Raw::opened(&net, &grant).await;
        raw.data(Frame::new(&world.source, &grant, 0, &pairs(&ids(0..4)))).await;
        until(|| world.counters().extents == 4).await;
        let start = Instant::now();
        let waiting = tokio::spawn(incoming.wait());
        let mut damaged = Frame::new(&world.source, &grant, 1, &pairs(&ids(0..4)));
        *damaged.payload.last_mut().unwrap() ^= 1;
        match way {
            // Its sender dies, falls silent, gives up with or without its last word, or sends nonsense.
            0 => drop(std::mem::replace(&mut raw, Raw::greeted(&net, &grant.address).await)),
            1 => {}
            2 => raw.say(grant.tag(), Body::Abort { reason: Aborted::Cancelled, quiesced: true }).await,
            3 => raw.say(grant.tag(), Body::Abort { reason: Aborted::Cancelled, quiesced: false }).await,
            4 => raw.data(damaged).await,
            5 => raw.bytes(&[0x55; 64]).await,
            // The decode side gives up; its sender does not hear of it, or goes on writing.
            6 => waiting.abort(),
            _ => {
                waiting.abort();
                raw.data(damaged).await;
            }
        }
        until(|| world.held.count() == 0 && world.counters().held == 0).await;
        let waited = start.elapsed().as_millis() as u64;
        assert!(waited < WORKER_LEASE_MS, "way {way}: {waited} ms");
        completes(&world, 8).await;
    }
}

/// A sender that does not read what the receiver says to it costs the receiver a bounded queue, and then its link.
#[tokio::test(start_paused = true)]
async fn a_sender_that_stops_reading_is_lost() {
    let (net, world) = in_memory().await;
    let (grant, incoming) = world.grant_first(4);
    let mut raw = Raw::opened(&net, &grant).await;
    // Each of these is answered; nobody reads the answers.
    let asking = tokio::spawn(async move {
        loop {
            raw.say(grant.tag(), Body::Open { request: grant.request, grant: grant.digest(), ticket: None }).await;
            tokio::task::yield_now().await;
        }
    });
    let error = tokio::time::timeout(Duration::from_secs(30), incoming.wait()).await.expect("is noticed").err();
    assert!(matches!(error, Some(TransferError::Lost { .. })), "{error:?}");
    assert_eq!((world.held.count(), world.counters().links), (0, 0));
    asking.abort();
}

fn grant(transfer: TransferId) -> Grant {
    let (address, layout, blocks) = (String::new(), LAYOUT, ids(0..4));
    Grant {
        transfer,
        attempt: 1,
        epoch: EPOCH,
        request: REQUEST,
        address,
        layout,
        slice: None,
        blocks,
        deadline_ms: 60_000,
        ticket: 0,
    }
}
