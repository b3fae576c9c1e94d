//! Extents that arrive damaged are asked for again: the transfer completes with the right bytes, and the damage is
//! counted. What cannot be mended ends in an error.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use baton_core::limits::HANDOFF_RESENDS_MAX;
use baton_core::{Aborted, BlockLayout, KvDtype};
use baton_kvtransfer::wire::{Body, FEATURE_RESEND, Summary};
use baton_kvtransfer::{Dropped, TransferError};

use crate::net::{Flip, Loopback};
use crate::raw::{Frame, Raw};
use crate::world::{Guard, LAYOUT, World, ids, pairs, until};

/// Layers of a block take 64 KiB, so that most bytes of a connection are extents.
const WIDE: BlockLayout = BlockLayout { layers: 2, kv_heads: 8, head_dim: 128, block_tokens: 16, dtype: KvDtype::Bf16 };

/// Bits flip on the wire, a different one in every transfer; all complete, and the bytes are right every time.
#[tokio::test]
async fn flipped_bits_are_mended() {
    let net = Arc::new(Flip::new());
    let world = World::over(net.clone(), WIDE, 8).await;
    let blocks = ids(0..8);
    for flip in 0..40usize {
        let (grant, incoming) = world.grant(&blocks);
        let mut outgoing = world.links.open(grant).await.unwrap();
        net.flip_after(WIDE.layer_bytes() / 2 + flip * 11_003);
        for layer in 0..2 {
            outgoing.send(layer, &pairs(&blocks)).await.unwrap();
        }
        let committed = outgoing.commit().await.unwrap();
        let (_guard, received) = incoming.wait().await.unwrap();
        assert_eq!((committed, received.extents), (received, 16), "flip {flip}");
        assert!(world.equal((0..8).map(|i| (i, i))), "flip {flip}");
    }
    let (counters, flipped) = (world.counters(), net.flipped());
    assert_eq!(flipped, 40);
    assert_eq!(counters.dropped(Dropped::Damaged), flipped as u64);
    assert!(counters.again >= flipped as u64 && world.links.counters().resent == counters.again);
    assert_eq!((counters.completed, counters.failed, counters.held), (40, 0, 0));
}

struct Ends {
    world: World,
    grant: baton_kvtransfer::Grant,
    incoming: baton_kvtransfer::Incoming<Guard>,
    raw: Raw,
    summary: Summary,
}

/// A transfer of four blocks whose sender, by hand, has sent everything, extent (1, 2) spoiled.
async fn spoiled() -> Ends {
    let world = World::new(4).await;
    let (grant, incoming) = world.grant_first(4);
    let mut raw = Raw::greeted_with(&Loopback, &grant.address, FEATURE_RESEND).await;
    assert_eq!(raw.open(&grant).await, Body::Opened);
    let mut summary = Summary::default();
    for layer in 0..3 {
        for pair in pairs(&ids(0..4)) {
            let mut frame = Frame::new(&world.source, &grant, layer, &[pair]);
            summary.extents += 1;
            summary.bytes += LAYOUT.layer_bytes() as u64;
            summary.digest = summary.digest.wrapping_add(sum(&frame));
            if (layer, pair.0) == (1, 2) {
                *frame.payload.last_mut().unwrap() ^= 1;
            }
            raw.data(frame).await;
        }
    }
    raw.say(grant.tag(), Body::Commit(summary)).await;
    assert_eq!(raw.hear().await.unwrap().body, Body::Resend(vec![(1, 2)]));
    Ends { world, grant, incoming, raw, summary }
}

fn sum(frame: &Frame) -> u64 {
    u64::from_le_bytes(frame.payload[16..24].try_into().unwrap())
}

/// Exactly what is missing is asked for, and once it is there the commit stands.
#[tokio::test]
async fn only_the_damaged_extent_is_asked_for() {
    let Ends { world, grant, incoming, mut raw, summary } = spoiled().await;
    raw.data(Frame::new(&world.source, &grant, 1, &pairs(&ids(0..4))[2..3])).await;
    raw.say(grant.tag(), Body::Commit(summary)).await;
    assert_eq!(raw.hear().await.unwrap().body, Body::Committed(summary));
    incoming.wait().await.unwrap();
    assert!(world.equal((0..4).map(|i| (i, i))));
    assert_eq!((world.counters().dropped(Dropped::Damaged), world.counters().again), (1, 1));
}

/// A sender that always sends the same damage is given up, quarantined as ever.
#[tokio::test]
async fn damage_without_end_fails_the_transfer() {
    let Ends { world, grant, incoming, mut raw, summary } = spoiled().await;
    for _ in 1..HANDOFF_RESENDS_MAX {
        let mut frame = Frame::new(&world.source, &grant, 1, &pairs(&ids(0..4))[2..3]);
        frame.payload[30] ^= 4;
        raw.data(frame).await;
        raw.say(grant.tag(), Body::Commit(summary)).await;
        assert_eq!(raw.hear().await.unwrap().body, Body::Resend(vec![(1, 2)]));
    }
    let mut frame = Frame::new(&world.source, &grant, 1, &pairs(&ids(0..4))[2..3]);
    frame.payload[30] ^= 4;
    raw.data(frame).await;
    raw.say(grant.tag(), Body::Commit(summary)).await;
    let told = Body::Abort { reason: Aborted::TransferFailed, quiesced: false };
    assert_eq!(raw.hear().await.unwrap().body, told);
    assert_eq!(incoming.wait().await.err(), Some(TransferError::Corrupt { layer: 1, position: 2 }));
    assert_eq!(world.held.count(), 1);
    raw.say(grant.tag(), Body::Aborted { quiesced: true }).await;
    until(|| world.held.count() == 0).await;
}

/// A sender that is asked and does not send, but commits again, has nothing damaged to plead: it fails.
#[tokio::test]
async fn a_commit_without_the_resent_extent_fails() {
    let Ends { world: _world, grant, incoming, mut raw, summary } = spoiled().await;
    raw.say(grant.tag(), Body::Commit(summary)).await;
    assert_eq!(incoming.wait().await.err(), Some(TransferError::Incomplete { arrived: 11, expected: 12 }));
}

/// A source block that was given to somebody else before the extent could be sent again: its new bytes are not sent as
/// the old ones.
#[tokio::test]
async fn a_block_that_changed_is_not_sent_again() {
    let net = Arc::new(Flip::new());
    let world = World::over(net.clone(), WIDE, 4).await;
    let blocks = ids(0..4);
    let (grant, incoming) = world.grant(&blocks);
    let mut outgoing = world.links.open(grant).await.unwrap();
    net.flip_after(WIDE.layer_bytes() * 3 / 2);
    for layer in 0..2 {
        outgoing.send(layer, &pairs(&blocks)).await.unwrap();
    }
    until(|| world.counters().dropped(Dropped::Damaged) == 1).await;
    let stranger = vec![7; WIDE.layer_bytes()];
    for block in 0..4 {
        // SAFETY: `send` has returned, so nobody reads the source before the resend below.
        unsafe { world.source.write_layer(block, 0, &stranger) };
    }
    assert!(matches!(outgoing.commit().await, Err(TransferError::Corrupt { layer: 0, .. })));
    assert!(incoming.wait().await.is_err());
    until(|| world.held.count() == 0).await;
}

/// What a transfer had when its sender died stays: the next attempt grants the rest only, to another sender, and frames
/// of the first attempt are stale.
#[tokio::test]
async fn a_transfer_goes_on_with_what_is_lacking() {
    let world = World::new(8).await;
    let (grant, mut incoming) = world.grant_first(8);
    let mut raw = Raw::opened(&Loopback, &grant).await;
    for layer in 0..3 {
        let sent = pairs(&ids(0..8));
        raw.data(Frame::new(&world.source, &grant, layer, &sent[..5])).await;
        raw.data(Frame::new(&world.source, &grant, 0, &sent[5 + layer..6 + layer])).await;
    }
    until(|| world.counters().extents == 18).await;
    drop(raw);
    let Err(Ok(partial)) = incoming.wait_or_keep().await else { panic!("nothing kept") };
    assert!(matches!(partial.error, TransferError::Lost { .. }));
    assert_eq!(partial.whole(), [true, true, true, true, true, false, false, false]);
    assert_eq!((world.held.count(), world.counters().held), (1, 0));

    let (again, incoming) = world.receiver.resume(partial, crate::world::EPOCH, crate::world::DEADLINE);
    assert_eq!((again.transfer, again.attempt), (grant.transfer, grant.attempt + 1));
    assert_eq!(again.blocks, ids(5..8));
    let mut late = Raw::greeted(&Loopback, &grant.address).await;
    assert!(matches!(late.open(&grant).await, Body::Refused(_)));
    let mut outgoing = world.links.open(again).await.unwrap();
    for layer in 0..3 {
        outgoing.send(layer, &pairs(&ids(5..8))).await.unwrap();
    }
    outgoing.commit().await.unwrap();
    let (_guard, received) = incoming.wait().await.unwrap();
    assert_eq!(received.extents, 9);
    assert!(world.equal((0..8).map(|i| (i, i))));
}

/// Nobody stays for the remains: the guard goes as it always did.
#[tokio::test]
async fn remains_that_nobody_wants_are_dropped() {
    let world = World::new(4).await;
    let dropped = AtomicUsize::new(0);
    for keep in [false, true] {
        let (grant, mut incoming) = world.grant_first(4);
        let raw = Raw::opened(&Loopback, &grant).await;
        drop(raw);
        match keep {
            true => drop(incoming.wait_or_keep().await),
            false => drop(incoming.wait().await),
        }
        until(|| world.held.count() == 0).await;
        dropped.fetch_add(1, SeqCst);
    }
    assert_eq!((dropped.into_inner(), world.counters().held), (2, 0));
}

/// Full blocks are hashed once: bytes that change after that, under the same generation, never count, whichever way they
/// go. As another generation the block is another block.
#[tokio::test]
async fn a_settled_block_that_changes_never_counts() {
    for world in [World::new(4).await, World::shared(LAYOUT, 4).await] {
        let first = ids(0..4);
        send_settled(&world, &first).await.unwrap();
        // SAFETY: no transfer reads or writes it now.
        unsafe { world.source.write_layer(2, 1, &vec![9; LAYOUT.layer_bytes()]) };
        assert_eq!(send_settled(&world, &first).await, Err(TransferError::Corrupt { layer: 1, position: 2 }));
        assert_eq!(world.counters().dropped(Dropped::Damaged), 1);
        let mut next = first.clone();
        next[2].generation += 1;
        send_settled(&world, &next).await.unwrap();
        assert!(world.equal((0..4).map(|i| (i, i))));
        until(|| world.held.count() == 0).await;
    }
}

/// One transfer of these blocks of the source, all of them full.
async fn send_settled(world: &World, sources: &[baton_core::BlockId]) -> Result<(), TransferError> {
    let (grant, incoming) = world.grant_first(sources.len() as u32);
    let mut outgoing = world.links.open(grant).await?;
    outgoing.settle(sources.len());
    for layer in 0..LAYOUT.layers as usize {
        outgoing.send(layer, &pairs(sources)).await?;
    }
    outgoing.commit().await?;
    incoming.wait().await.map(drop)
}
