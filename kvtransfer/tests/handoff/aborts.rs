//! Whatever ends a transfer early, its guard goes exactly when nothing can write its blocks any more.

use std::sync::Arc;

use baton_core::{Aborted, BlockId, Rng};
use baton_kvtransfer::wire::{Body, Message, Summary, Tag};
use baton_kvtransfer::{Committed, Dropped, Links, Outgoing, TransferError};

use crate::net::{Cut, CutAccepted, Dying, Loopback};
use crate::raw::{Frame, Raw};
use crate::world::{LAYOUT, MODEL, World, completes, ids, pairs, read, rounds, until};

/// Bytes that a connection has carried at each frame boundary of a 32-block transfer, one extent a frame.
fn boundaries(world: &World) -> Vec<usize> {
    let (grant, _) = world.grant_first(32);
    let hello = baton_kvtransfer::wire::compatibility(&LAYOUT, MODEL);
    let control = |body| Message { tag: Tag::default(), body }.encode().len();
    let mut frames = vec![
        control(Body::Hello { text: hello, features: 0 }),
        control(Body::Open { request: grant.request, grant: 0, ticket: None }),
    ];
    let data = Frame::new(&world.source, &grant, 0, &pairs(&ids(0..1))).encode().len();
    frames.extend(std::iter::repeat_n(data, 32 * 3));
    frames.push(control(Body::Commit(Summary::default())));
    frames.iter().scan(0, |sum, bytes| Some(std::mem::replace(sum, *sum + bytes))).collect()
}

/// The sender's connection dies at every frame boundary, and in the middle of every frame: both ends fail, the guard
/// is freed, nothing counts as complete. Where the OPEN did not get through, the decode worker learns of the death by
/// its Prefill call, and drops what it waits on.
#[tokio::test]
async fn a_sender_that_dies_at_any_frame_leaves_nothing() {
    let world = World::new(32).await;
    let cuts = boundaries(&world);
    let middles: Vec<usize> = cuts.windows(2).map(|pair| (pair[0] + pair[1]) / 2).collect();
    let mut opened = 0;
    for cut in cuts.into_iter().chain(middles) {
        let links = Links::new(Arc::new(Cut::after(cut)), world.source.clone(), MODEL);
        let (grant, incoming) = world.grant_first(32);
        match links.open(grant).await {
            Ok(outgoing) => {
                opened += 1;
                assert!(matches!(send_one_by_one(outgoing).await, Err(TransferError::Lost { .. })), "cut at {cut}");
                assert!(matches!(incoming.wait().await.err(), Some(TransferError::Lost { .. })), "cut at {cut}");
            }
            Err(TransferError::Lost { .. }) => drop(incoming),
            Err(error) => panic!("cut at {cut}: {error}"),
        }
        until(|| world.held.count() == 0 && world.counters().held == 0).await;
    }
    assert!(opened >= 2 * 96, "{opened}");
    assert_eq!(world.counters().completed, 0);
}

/// The receiver's end dies once it has read, and once it has said, so much as ends at any frame boundary of the transfer
/// or lies in the middle of a frame: the sender fails, nothing stays reserved, and the next transfer over a new
/// connection completes. A receiver that dies while it says COMMITTED has the blocks, and nobody relies on it.
#[tokio::test]
async fn a_receiver_that_dies_at_any_frame_leaves_nothing() {
    let read = boundaries(&World::new(32).await);
    let control = |body| Message { tag: Tag::default(), body }.encode().len();
    let text = baton_kvtransfer::wire::compatibility(&LAYOUT, MODEL);
    let said = [
        control(Body::Hello { text, features: 0 }),
        control(Body::Opened),
        control(Body::Committed(Summary::default())),
    ];
    let said: Vec<usize> = said.iter().scan(0, |sum, bytes| Some(std::mem::replace(sum, *sum + bytes))).collect();
    let middles = |cuts: &[usize]| -> Vec<usize> { cuts.windows(2).map(|pair| (pair[0] + pair[1]) / 2).collect() };
    let reading = read.iter().copied().chain(middles(&read)).map(|bytes| (bytes, usize::MAX));
    let saying = said.iter().copied().chain(middles(&said)).map(|bytes| (usize::MAX, bytes));
    for (read, written) in reading.chain(saying) {
        let net = Dying(CutAccepted::after(read, written));
        let world = World::over(Arc::new(net), LAYOUT, 32).await;
        let (grant, incoming) = world.grant_first(32);
        match world.links.open(grant).await {
            Ok(outgoing) => {
                let sent = send_one_by_one(outgoing).await;
                assert!(matches!(sent, Err(TransferError::Lost { .. })), "{read} {written}: {sent:?}");
                let waited = incoming.wait().await;
                let complete = waited.is_ok();
                assert!(complete || matches!(waited, Err(TransferError::Lost { .. })), "{read} {written}");
                assert!(!complete || written == *said.last().unwrap(), "{read} {written}");
            }
            Err(TransferError::Lost { .. }) => drop(incoming),
            Err(error) => panic!("{read} {written}: {error}"),
        }
        until(|| world.held.count() == 0 && world.counters().held == 0).await;
        completes(&world, 32).await;
    }
}

/// One extent a frame, then the commit.
async fn send_one_by_one(mut outgoing: Outgoing) -> Result<Committed, TransferError> {
    for layer in 0..3 {
        for pair in pairs(&ids(0..32)) {
            outgoing.send(layer, &[pair]).await?;
        }
    }
    outgoing.commit().await
}

/// The decode side gives up; the writer goes on for a while. The guard stays until the writer says that it has
/// stopped; what it wrote before that went nowhere; the blocks' next owner never sees a late frame.
#[tokio::test]
async fn late_frames_cannot_write() {
    let world = World::new(8).await;
    let (grant, incoming) = world.grant_first(4);
    let mut raw = Raw::opened(&Loopback, &grant).await;
    let block = |i: u32| (i as usize, BlockId { index: i, generation: 0 });
    raw.data(Frame::new(&world.source, &grant, 0, &[block(0)])).await;
    until(|| world.counters().extents == 1).await;
    drop(incoming);
    assert!(matches!(raw.hear().await.unwrap().body, Body::Abort { reason: Aborted::Cancelled, .. }));

    raw.data(Frame::new(&world.source, &grant, 1, &[block(1)])).await;
    until(|| world.counters().dropped(Dropped::Late) == 1).await;
    assert_eq!((world.held.count(), world.counters().held), (1, 1));
    assert!(read(&world.target, 1, 1).iter().all(|&byte| byte == 0));

    raw.say(grant.tag(), Body::Aborted { quiesced: true }).await;
    until(|| world.held.count() == 0).await;

    let reused: Vec<BlockId> = grant.blocks.iter().map(|b| BlockId { generation: b.generation + 1, ..*b }).collect();
    let (_next, _incoming) = world.grant(&reused);
    raw.data(Frame::new(&world.source, &grant, 1, &[block(1)])).await;
    until(|| world.counters().dropped(Dropped::Unknown) == 1).await;
    assert!(read(&world.target, 1, 1).iter().all(|&byte| byte == 0));
    assert_eq!(world.counters().extents, 1);
}

/// The same by the real sender: it answers by itself, and the guard goes while the link lives on.
#[tokio::test]
async fn a_dropped_receiver_side_quiesces_the_sender() {
    let world = World::new(8).await;
    let (grant, incoming) = world.grant_first(4);
    let mut outgoing = world.links.open(grant).await.unwrap();
    outgoing.send(0, &pairs(&ids(0..4))).await.unwrap();
    drop(incoming);
    until(|| world.held.count() == 0).await;
    let error = outgoing.send(1, &pairs(&ids(0..4))).await.unwrap_err();
    assert_eq!(error, TransferError::Aborted(Aborted::Cancelled));
    assert_eq!((world.counters().links, world.counters().unquiesced), (1, 0));
}

/// The sender's reason reaches the decode side.
#[tokio::test]
async fn an_aborting_sender_names_its_reason() {
    let world = World::new(8).await;
    let (grant, incoming) = world.grant_first(4);
    let outgoing = world.links.open(grant).await.unwrap();
    outgoing.abort(Aborted::Draining).await;
    assert_eq!(incoming.wait().await.err(), Some(TransferError::Aborted(Aborted::Draining)));
    until(|| world.held.count() == 0).await;
}

/// Transfers that end early in every way either end has, at a random frame, on one link; then one that does not.
async fn many_aborts(world: World) {
    let mut rng = Rng::new(7);
    let blocks = pairs(&ids(0..8));
    let transfers = rounds(500, 10_000);
    for _ in 0..transfers {
        let (grant, incoming) = world.grant_first(8);
        let way = rng.below(5);
        if way == 0 {
            drop(incoming);
            assert!(world.links.open(grant).await.is_err());
            continue;
        }
        let mut outgoing = world.links.open(grant).await.unwrap();
        for frame in 0..rng.below(24) as usize {
            outgoing.send(frame / 8, &blocks[frame % 8..frame % 8 + 1]).await.unwrap();
        }
        match way {
            1 => drop(incoming),
            2 => drop(outgoing),
            3 => outgoing.abort(Aborted::Deadline).await,
            _ => assert!(outgoing.commit().await.is_err()),
        }
    }
    until(|| world.held.count() == 0 && world.counters().held == 0).await;
    let counters = world.counters();
    assert_eq!((counters.granted, counters.failed, counters.completed), (transfers, transfers, 0));
    let sent = world.links.counters();
    assert_eq!((sent.tcp + sent.shm + sent.local, sent.committed), (sent.failed, 0));
    assert_eq!((counters.unquiesced, counters.dropped(Dropped::Damaged)), (0, 0));
    completes(&world, 8).await;
}

#[tokio::test]
async fn many_aborts_over_tcp_leave_nothing() {
    many_aborts(World::new(8).await).await;
}

#[tokio::test]
async fn many_aborts_in_one_process_leave_nothing() {
    let world = World::new(8).await;
    world.links.add_local(&world.receiver);
    many_aborts(world).await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn many_aborts_over_shared_memory_leave_nothing() {
    let world = World::shared(LAYOUT, 8).await;
    many_aborts(world).await;
}

/// A send that its caller gives up half-way costs the link nothing.
#[tokio::test]
async fn a_cancelled_send_harms_no_other() {
    let world = World::new(32).await;
    let blocks = pairs(&ids(0..32));
    for _ in 0..100 {
        let (grant, incoming) = world.grant_first(32);
        let mut outgoing = world.links.open(grant).await.unwrap();
        tokio::select! {
            biased;
            () = async { for i in 0..96 { outgoing.send(i / 32, &blocks[i % 32..i % 32 + 1]).await.unwrap() } } => {}
            () = tokio::task::yield_now() => {}
        }
        drop((outgoing, incoming));
    }
    completes(&world, 32).await;
    until(|| world.held.count() == 0).await;
}

/// A transfer one of whose sends was given up on the way may go on, and is not confirmed.
#[tokio::test]
async fn a_transfer_with_a_cancelled_send_is_not_confirmed() {
    let world = World::new(4).await;
    let blocks = pairs(&ids(0..4));
    let (grant, incoming) = world.grant_first(4);
    let mut outgoing = world.links.open(grant).await.unwrap();
    outgoing.send(0, &blocks[..2]).await.unwrap();
    let was_cancelled = tokio::select! {
        biased;
        _ = outgoing.send(0, &blocks[2..]) => false,
        () = std::future::ready(()) => true,
    };
    assert!(was_cancelled, "it waits until its blocks are written");
    for layer in 1..3 {
        outgoing.send(layer, &blocks).await.unwrap();
    }
    assert!(outgoing.commit().await.is_err());
    assert!(incoming.wait().await.is_err());
    until(|| world.held.count() == 0).await;
}
