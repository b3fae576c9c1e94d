//! Deadlines, silence and patience, on virtual time over memory.

use std::sync::Arc;
use std::time::Duration;

use baton_core::limits::{HANDOFF_CREDIT_BYTES, HANDOFF_IDLE_MS, HANDOFF_QUIESCE_MS};
use baton_core::{Arena, BlockId, BlockLayout, KvDtype, Listener, Net};
use baton_kvtransfer::wire::{Body, FEATURE_LANES, Kind, Message, Tag};
use baton_kvtransfer::{Grant, Links, TransferError};
use tokio::time::{Instant, sleep};

use crate::memory::Memory;
use crate::raw::{Frame, Raw};
use crate::world::{EPOCH, LAYOUT, MODEL, REQUEST, World, ids, pairs, until};

async fn world(net: &Memory) -> World {
    World::over(Arc::new(net.clone()), LAYOUT, 8).await
}

/// Nothing comes of a grant: it ends at its deadline, not before, and its blocks are free at once.
#[tokio::test(start_paused = true)]
async fn a_grant_ends_at_its_deadline() {
    let world = world(&Memory::default()).await;
    let start = Instant::now();
    let deadline = Duration::from_secs(3);
    let (_, incoming) = world.receiver.open(REQUEST, EPOCH, ids(0..2), deadline, world.held.guard());
    assert_eq!(incoming.wait().await.err(), Some(TransferError::Deadline));
    assert!((3000..3010).contains(&start.elapsed().as_millis()));
    assert_eq!(world.held.count(), 0);
}

/// A sender that has opened and computes for long is not idle: the link is alive. Past the deadline both ends fail.
#[tokio::test(start_paused = true)]
async fn a_slow_prefill_is_bounded_by_the_deadline_only() {
    let world = world(&Memory::default()).await;
    let deadline = Duration::from_secs(30);
    let (grant, incoming) = world.receiver.open(REQUEST, EPOCH, ids(0..2), deadline, world.held.guard());
    let mut outgoing = world.links.open(grant).await.unwrap();
    sleep(Duration::from_secs(20)).await;
    outgoing.send(0, &pairs(&ids(0..2))).await.unwrap();
    assert_eq!(incoming.wait().await.err(), Some(TransferError::Deadline));
    until(|| world.held.count() == 0).await;
    assert!(outgoing.send(1, &pairs(&ids(0..2))).await.is_err());
    assert_eq!((world.counters().links, world.counters().unquiesced), (1, 0));
}

/// A sender that falls silent without closing (partition, stopped process) is lost after the idle time.
#[tokio::test(start_paused = true)]
async fn a_silent_sender_is_lost() {
    let net = Memory::default();
    let world = world(&net).await;
    let (grant, incoming) = world.grant_first(4);
    let mut raw = Raw::opened(&net, &grant).await;
    raw.data(Frame::new(&world.source, &grant, 0, &pairs(&ids(0..2)))).await;
    let start = Instant::now();
    assert!(matches!(incoming.wait().await.err(), Some(TransferError::Lost { .. })));
    assert!((HANDOFF_IDLE_MS..HANDOFF_IDLE_MS + 10).contains(&(start.elapsed().as_millis() as u64)));
    assert_eq!((world.held.count(), world.counters().held), (0, 0));
}

/// A writer that is told to stop and does not say that it has: its link is closed, and only then the guard goes.
#[tokio::test(start_paused = true)]
async fn a_writer_that_does_not_quiesce_loses_its_link() {
    let net = Memory::default();
    let world = world(&net).await;
    let (grant, incoming) = world.grant_first(4);
    let mut raw = Raw::opened(&net, &grant).await;
    drop(incoming);
    let start = Instant::now();
    while world.held.count() > 0 {
        raw.say(Tag::default(), Body::Ping).await;
        sleep(Duration::from_millis(10)).await;
    }
    let waited = start.elapsed().as_millis() as u64;
    assert!((HANDOFF_QUIESCE_MS..HANDOFF_QUIESCE_MS + 20).contains(&waited), "{waited}");
    assert_eq!((world.counters().unquiesced, world.counters().links), (1, 0));
}

/// Blocks whose layers take 64 KiB, so that four make a frame.
const WIDE: BlockLayout = BlockLayout { layers: 2, kv_heads: 8, head_dim: 128, block_tokens: 16, dtype: KvDtype::Bf16 };

/// A receiver by hand, on one connection: greets with the same text and opens whatever it is asked to.
async fn receiver_by_hand(mut listener: Box<dyn Listener>) -> Raw {
    let mut raw = Raw::new(listener.accept().await.unwrap());
    let hello = raw.hear().await.unwrap();
    let Body::Hello { text, features } = hello.body else { panic!("not greeted") };
    raw.say(hello.tag, Body::Hello { text, features: features & !FEATURE_LANES }).await;
    let open = raw.hear().await.unwrap();
    assert!(matches!(open.body, Body::Open { .. }));
    raw.say(open.tag, Body::Opened).await;
    raw
}

async fn grant_by_hand(net: &Memory) -> (Grant, Box<dyn Listener>) {
    let listener = net.listen("by hand").await.unwrap();
    let (transfer, deadline_ms) = (baton_core::TransferId(1), 60_000);
    let (address, blocks) = (listener.address(), ids(0..4));
    let grant = Grant {
        transfer,
        attempt: 1,
        epoch: EPOCH,
        request: REQUEST,
        address,
        layout: WIDE,
        slice: None,
        blocks,
        deadline_ms,
        ticket: 0,
    };
    (grant, listener)
}

/// Sends frames of 256 KiB until it fails; the bytes that were accepted for sending.
async fn flood(links: &Links, grant: Grant) -> (usize, TransferError) {
    let blocks: Vec<(usize, BlockId)> = pairs(&grant.blocks);
    let mut outgoing = links.open(grant).await.unwrap();
    let mut bytes = 0;
    loop {
        match outgoing.send(0, &blocks).await {
            Ok(()) => bytes += 4 * WIDE.layer_bytes(),
            Err(error) => return (bytes, error),
        }
    }
}

/// A receiver that stops reading holds up a handful of frames, whatever the sender has; then the link is lost.
#[tokio::test(start_paused = true)]
async fn a_receiver_that_stops_reading_bounds_the_senders_memory() {
    let net = Memory::default();
    let (grant, listener) = grant_by_hand(&net).await;
    let links = Links::new(Arc::new(net), Arc::new(Arena::new(WIDE, 8)), MODEL);
    let by_hand = tokio::spawn(receiver_by_hand(listener));
    let start = Instant::now();
    let (bytes, error) = flood(&links, grant).await;
    assert!(matches!(error, TransferError::Lost { .. }), "{error}");
    assert!(bytes <= 6 * (256 << 10), "{bytes}");
    assert!(start.elapsed().as_millis() as u64 <= HANDOFF_IDLE_MS + 10);
    drop(by_hand.await);
}

/// A receiver that takes everything and acknowledges nothing gets no more than the credit.
#[tokio::test(start_paused = true)]
async fn unacknowledged_bytes_are_bounded() {
    let net = Memory::default();
    let (grant, listener) = grant_by_hand(&net).await;
    let tag = grant.tag();
    let links = Links::new(Arc::new(net), Arc::new(Arena::new(WIDE, 8)), MODEL);
    let by_hand = tokio::spawn(async move {
        let mut raw = receiver_by_hand(listener).await;
        let mut taken = 0;
        while let Some((header, _)) = raw.frame().await {
            taken += if header.kind == Kind::Data { header.length as usize } else { 0 };
            if header.kind == Kind::Ping {
                let reason = baton_core::Aborted::Draining;
                raw.say(tag, Body::Abort { reason, quiesced: false }).await;
                break;
            }
        }
        let answer = loop {
            let (header, payload) = raw.frame().await.unwrap();
            match Message::decode(&header, &payload).unwrap().body {
                Body::Ping => {}
                body => break body,
            }
        };
        (taken, answer)
    });
    let (bytes, error) = flood(&links, grant).await;
    assert_eq!(error, TransferError::Aborted(baton_core::Aborted::Draining));
    let (taken, answer) = by_hand.await.unwrap();
    assert_eq!(answer, Body::Aborted { quiesced: true });
    assert!(bytes <= taken && taken <= HANDOFF_CREDIT_BYTES, "{bytes} {taken}");
    assert!(taken > HANDOFF_CREDIT_BYTES - (1 << 20), "{taken}");
}

/// Of transfers that wait for a slow receiver the one with the earliest deadline goes on first, whenever it came.
#[tokio::test(start_paused = true)]
async fn the_earliest_deadline_goes_first() {
    let net = Memory::default();
    let (grant, listener) = grant_by_hand(&net).await;
    let links = Links::new(Arc::new(net), Arc::new(Arena::new(WIDE, 8)), MODEL);
    let by_hand = tokio::spawn(receiver_by_hand(listener));
    let _first = links.open(grant.clone()).await.unwrap();
    let mut raw = by_hand.await.unwrap();
    // The first four find places in the link's outbox.
    let seconds = [60, 60, 60, 60, 50, 20, 40, 30];
    let mut opened = Vec::new();
    for (nth, seconds) in seconds.into_iter().enumerate() {
        let (transfer, deadline_ms) = (baton_core::TransferId(100 + nth as u64), seconds * 1000);
        let opening = links.open(Grant { transfer, deadline_ms, ..grant.clone() });
        let opens = async {
            let open = raw.hear().await.unwrap();
            raw.say(open.tag, Body::Opened).await;
        };
        opened.push(tokio::join!(opening, opens).0.unwrap());
    }
    let mut sending = tokio::task::JoinSet::new();
    for mut outgoing in opened {
        let blocks = pairs(&grant.blocks);
        sending.spawn(async move { outgoing.send(0, &blocks).await.map(|()| outgoing) });
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }
    let mut order = Vec::new();
    while order.len() < seconds.len() {
        let (header, _) = raw.frame().await.unwrap();
        order.extend((header.kind == Kind::Data).then_some(header.tag.transfer.0 - 100));
    }
    assert_eq!(order, [0, 1, 2, 3, 5, 7, 6, 4]);
    assert!(sending.join_all().await.iter().all(Result::is_ok));
}

/// An acknowledgement of bytes that were never sent closes the link.
#[tokio::test(start_paused = true)]
async fn a_false_acknowledgement_closes_the_link() {
    let net = Memory::default();
    let (grant, listener) = grant_by_hand(&net).await;
    let links = Links::new(Arc::new(net), Arc::new(Arena::new(WIDE, 8)), MODEL);
    let by_hand = tokio::spawn(receiver_by_hand(listener));
    let outgoing = links.open(grant).await.unwrap();
    let mut raw = by_hand.await.unwrap();
    raw.say(Tag::default(), Body::Ack(u64::MAX)).await;
    assert!(matches!(outgoing.commit().await, Err(TransferError::Lost { .. })));
}
