//! Damaged, misplaced, stale, foreign and repeated frames: every one is refused and counted, none is written.

use baton_core::{BlockId, Epoch, TransferId};
use baton_kvtransfer::wire::{BadFrame, Body, ENTRY_BYTES, Header, Message, Summary, Tag};
use baton_kvtransfer::{Dropped, Grant, Incoming, TransferError};
use tokio::io::AsyncReadExt;

use crate::net::Loopback;
use crate::raw::{Frame, Raw};
use crate::world::{Guard, LAYOUT, World, ids, pairs, until};

const BLOCKS: u32 = 4;

/// A world, and a transfer of its blocks 0..4 that a raw peer has opened.
async fn opened() -> (World, Grant, Incoming<Guard>, Raw) {
    let world = World::new(8).await;
    let (grant, incoming) = world.grant_first(BLOCKS);
    let raw = Raw::opened(&Loopback, &grant).await;
    (world, grant, incoming, raw)
}

/// Sends everything but what is in `sent` already, commits, and demands the right blocks.
async fn completes(world: &World, grant: &Grant, incoming: Incoming<Guard>, raw: &mut Raw, sent: &[(usize, usize)]) {
    let mut summary = Summary::default();
    for layer in 0..3 {
        for pair in pairs(&ids(0..BLOCKS)) {
            let frame = Frame::new(&world.source, grant, layer, &[pair]);
            let sum = u64::from_le_bytes(frame.payload[16..24].try_into().unwrap());
            summary.extents += 1;
            summary.bytes += LAYOUT.layer_bytes() as u64;
            summary.digest = summary.digest.wrapping_add(sum);
            if !sent.contains(&(layer, pair.0)) {
                raw.data(frame).await;
            }
        }
    }
    raw.say(grant.tag(), Body::Commit(summary)).await;
    assert_eq!(raw.hear().await.unwrap().body, Body::Committed(summary));
    incoming.wait().await.unwrap();
    assert!(world.equal((0..BLOCKS).map(|i| (i, i))));
}

/// One frame that is wrong in a way its checksums do not show is dropped for `reason`, and the transfer goes on.
async fn is_dropped(reason: Dropped, tamper: impl FnOnce(&World, &Grant, &mut Raw) -> Frame) {
    let (world, grant, incoming, mut raw) = opened().await;
    let frame = tamper(&world, &grant, &mut raw);
    raw.data(frame).await;
    until(|| world.counters().dropped_total() > 0).await;
    assert_eq!(world.counters().dropped(reason), 1, "{reason:?}: {:?}", world.counters());
    assert_eq!(world.counters().extents, 0);
    completes(&world, &grant, incoming, &mut raw, &[]).await;
}

fn honest(world: &World, grant: &Grant) -> Frame {
    Frame::new(&world.source, grant, 1, &pairs(&ids(0..BLOCKS))[2..3])
}

#[tokio::test]
async fn another_transfer_is_unknown() {
    is_dropped(Dropped::Unknown, |world, grant, _| {
        let mut frame = honest(world, grant);
        frame.header.tag.transfer = TransferId(99);
        frame
    })
    .await;
}

#[tokio::test]
async fn a_stale_epoch_is_dropped() {
    is_dropped(Dropped::StaleEpoch, |world, grant, _| {
        let mut frame = honest(world, grant);
        frame.header.tag.epoch = Epoch(grant.epoch.0 - 1);
        frame
    })
    .await;
}

#[tokio::test]
async fn a_stale_attempt_is_dropped() {
    is_dropped(Dropped::StaleAttempt, |world, grant, _| {
        let mut frame = honest(world, grant);
        frame.header.tag.attempt += 1;
        frame
    })
    .await;
}

#[tokio::test]
async fn a_stale_generation_is_dropped() {
    is_dropped(Dropped::StaleGeneration, |world, grant, _| {
        let mut stale = grant.clone();
        stale.blocks[2].generation -= 1;
        let block = BlockId { index: 2, generation: 0 };
        Frame::labelled(&world.source, &stale, grant.digest(), 1, &[(2, block)])
    })
    .await;
}

#[tokio::test]
async fn a_block_that_was_not_granted_is_dropped() {
    is_dropped(Dropped::WrongBlock, |world, grant, _| {
        let mut wrong = grant.clone();
        wrong.blocks[2].index = 7;
        let block = BlockId { index: 2, generation: 0 };
        Frame::labelled(&world.source, &wrong, grant.digest(), 1, &[(2, block)])
    })
    .await;
}

#[tokio::test]
async fn a_layer_out_of_range_is_dropped() {
    is_dropped(Dropped::OutOfRange, |world, grant, _| {
        let mut frame = honest(world, grant);
        frame.header.layer = 3;
        frame
    })
    .await;
}

#[tokio::test]
async fn a_position_out_of_range_is_dropped() {
    is_dropped(Dropped::OutOfRange, |world, grant, _| {
        let mut longer = grant.clone();
        longer.blocks.push(BlockId { index: 5, generation: 105 });
        let block = BlockId { index: 2, generation: 0 };
        Frame::labelled(&world.source, &longer, grant.digest(), 1, &[(BLOCKS as usize, block)])
    })
    .await;
}

/// A frame the link had already carried, and the same extent in a new frame, count once.
#[tokio::test]
async fn replayed_frames_are_dropped() {
    let (world, grant, incoming, mut raw) = opened().await;
    let frame = honest(&world, &grant);
    let mut first = frame.clone();
    first.header.sequence = 0;
    raw.data(frame.clone()).await;
    raw.bytes(&first.encode()).await;
    raw.data(frame).await;
    until(|| world.counters().dropped_total() == 2).await;
    let counters = world.counters();
    assert_eq!((counters.dropped(Dropped::Replayed), counters.dropped(Dropped::Duplicate)), (1, 1));
    assert_eq!(counters.extents, 1);
    completes(&world, &grant, incoming, &mut raw, &[(1, 2)]).await;
}

/// A frame that an earlier transfer of the same blocks sent, replayed into the next under its name.
#[tokio::test]
async fn another_transfers_bytes_do_not_count() {
    let (world, grant, first, mut raw) = opened().await;
    let old = honest(&world, &grant);
    raw.say(grant.tag(), Body::Abort { reason: baton_core::Aborted::Cancelled, quiesced: true }).await;
    assert!(first.wait().await.is_err());
    let (next, incoming) = world.grant_first(BLOCKS);
    assert_eq!(raw.open(&next).await, Body::Opened);
    let mut frame = old;
    frame.header.tag = next.tag();
    raw.data(frame).await;
    assert!(matches!(incoming.wait().await.err(), Some(TransferError::Corrupt { layer: 1, position: 2 })));
    assert_eq!(world.counters().extents, 0);
}

/// A frame whose checksums show the damage fails the transfer; nothing of the damaged extent is written.
async fn is_damaged(tamper: impl FnOnce(&World, &Grant) -> Frame) {
    let (world, grant, incoming, mut raw) = opened().await;
    let frame = tamper(&world, &grant);
    raw.data(frame).await;
    assert!(matches!(incoming.wait().await.err(), Some(TransferError::Corrupt { .. })));
    assert!(matches!(raw.hear().await.unwrap().body, Body::Abort { quiesced: false, .. }));
    assert_eq!((world.counters().extents, world.held.count()), (0, 1));
    raw.say(grant.tag(), Body::Aborted { quiesced: true }).await;
    until(|| world.held.count() == 0).await;
    assert_eq!(world.counters().held, 0);
}

#[tokio::test]
async fn swapped_blocks_are_found() {
    is_damaged(|world, grant| {
        let mut frame = Frame::new(&world.source, grant, 1, &pairs(&ids(0..BLOCKS))[1..3]);
        let (first, second) = frame.payload[2 * ENTRY_BYTES..].split_at_mut(LAYOUT.layer_bytes());
        first.swap_with_slice(second);
        frame
    })
    .await;
}

#[tokio::test]
async fn the_wrong_layer_is_found() {
    is_damaged(|world, grant| {
        let mut frame = honest(world, grant);
        frame.header.layer = 2;
        frame
    })
    .await;
}

#[tokio::test]
async fn a_frame_of_the_wrong_shape_is_found() {
    is_damaged(|world, grant| {
        let mut frame = honest(world, grant);
        frame.header.blocks = 2;
        frame
    })
    .await;
}

/// Every bit of an entry, and bits throughout an extent.
#[tokio::test]
async fn bit_flips_in_the_payload_are_found() {
    let extent_bits = (ENTRY_BYTES * 8..(ENTRY_BYTES + LAYOUT.layer_bytes()) * 8).step_by(509);
    for bit in (0..ENTRY_BYTES * 8).chain(extent_bits) {
        is_damaged(|world, grant| {
            let mut frame = honest(world, grant);
            frame.payload[bit / 8] ^= 1 << (bit % 8);
            frame
        })
        .await;
    }
}

/// Every bit of a header: the stream cannot be trusted any more, so the link is closed and its transfer fails.
#[tokio::test]
async fn bit_flips_in_a_header_close_the_link() {
    for bit in 0..64 * 8 {
        let (world, grant, incoming, mut raw) = opened().await;
        let mut bytes = honest(&world, &grant).encode();
        bytes[bit / 8] ^= 1 << (bit % 8);
        raw.bytes(&bytes).await;
        assert!(matches!(incoming.wait().await.err(), Some(TransferError::Lost { .. })), "bit {bit}");
        assert!(raw.hear().await.is_none());
        assert_eq!((world.counters().extents, world.held.count(), world.counters().held), (0, 0, 0));
    }
}

/// A frame that is missing shows at the next one.
#[tokio::test]
async fn a_missing_frame_closes_the_link() {
    let (world, grant, incoming, mut raw) = opened().await;
    raw.sequence += 100;
    let frame = honest(&world, &grant);
    raw.data(frame).await;
    assert!(matches!(incoming.wait().await.err(), Some(TransferError::Lost { .. })));
    assert_eq!(world.counters().extents, 0);
}

/// A commit before everything has arrived, and one that names other contents, fail at once.
#[tokio::test]
async fn a_commit_that_differs_fails() {
    let (world, grant, incoming, mut raw) = opened().await;
    raw.data(honest(&world, &grant)).await;
    raw.say(grant.tag(), Body::Commit(Summary { extents: 1, ..Summary::default() })).await;
    assert_eq!(incoming.wait().await.err(), Some(TransferError::Incomplete { arrived: 1, expected: 12 }));
    assert!(matches!(raw.hear().await.unwrap().body, Body::Abort { .. }));
    let (grant, incoming) = world.grant_first(BLOCKS);
    assert_eq!(raw.open(&grant).await, Body::Opened);
    for layer in 0..3 {
        raw.data(Frame::new(&world.source, &grant, layer, &pairs(&ids(0..BLOCKS)))).await;
    }
    let bytes = 12 * LAYOUT.layer_bytes() as u64;
    raw.say(grant.tag(), Body::Commit(Summary { extents: 12, bytes, digest: 1 })).await;
    assert_eq!(incoming.wait().await.err(), Some(TransferError::Digest));
    until(|| world.held.count() == 0).await;
}

/// OPEN with another request, other blocks, another epoch, or for a transfer that is open already.
#[tokio::test]
async fn an_open_that_does_not_fit_is_refused() {
    let world = World::new(8).await;
    let (grant, incoming) = world.grant_first(BLOCKS);
    let mut raw = Raw::greeted(&Loopback, &grant.address).await;
    let mut wrong = vec![grant.clone(); 4];
    wrong[0].request.0 += 1;
    wrong[1].blocks[0].generation += 1;
    wrong[2].epoch.0 -= 1;
    wrong[3].transfer.0 += 1;
    for other in &wrong {
        assert!(matches!(raw.open(other).await, Body::Refused(_)), "{other:?}");
    }
    let counters = world.counters();
    let reasons = [Dropped::Foreign, Dropped::StaleEpoch, Dropped::Unknown];
    assert_eq!(reasons.map(|reason| counters.dropped(reason)), [2, 1, 1]);
    assert_eq!(raw.open(&grant).await, Body::Opened);
    assert!(matches!(raw.open(&grant).await, Body::Refused(_)));
    completes(&world, &grant, incoming, &mut raw, &[]).await;
}

/// Frames of a transfer that another link opened are not taken.
#[tokio::test]
async fn another_link_cannot_write() {
    let (world, grant, incoming, mut raw) = opened().await;
    let mut thief = Raw::greeted(&Loopback, &grant.address).await;
    thief.data(honest(&world, &grant)).await;
    thief.say(grant.tag(), Body::Commit(Summary::default())).await;
    thief.say(grant.tag(), Body::Abort { reason: baton_core::Aborted::Cancelled, quiesced: true }).await;
    until(|| world.counters().dropped(Dropped::Unknown) == 3).await;
    drop(thief);
    until(|| world.counters().links == 1).await;
    completes(&world, &grant, incoming, &mut raw, &[]).await;
}

/// Another layout, another version and noise are refused before anything else is parsed.
#[tokio::test]
async fn a_greeting_that_does_not_fit_is_refused() {
    let world = World::new(8).await;
    let address = world.receiver.address();
    let mut raw = Raw::connect(&Loopback, &address).await;
    raw.say(Tag::default(), Body::Hello { text: "wire 1, something else".into(), features: 0 }).await;
    let Body::Mismatch(ours) = raw.hear().await.unwrap().body else { panic!("not refused") };
    assert!(ours.contains(&LAYOUT.describe()) && ours.contains(crate::world::MODEL), "{ours}");
    assert!(raw.hear().await.is_none());

    let mut next = Message { tag: Tag::default(), body: Body::Hello { text: ours, features: 0 } }.encode();
    next[4] = 2;
    let mut raw = Raw::connect(&Loopback, &address).await;
    raw.bytes(&next[..64]).await;
    assert!(matches!(raw.hear().await.unwrap().body, Body::Mismatch(_)));

    let mut raw = Raw::connect(&Loopback, &address).await;
    raw.bytes(&[0x47; 64]).await;
    assert!(raw.hear().await.is_none());
    assert_eq!((world.counters().mismatched, world.counters().links), (2, 0));
}

/// A header that announces more than the maximum is refused before its payload is awaited or room is made for it.
#[tokio::test]
async fn an_oversized_length_closes_the_link() {
    let (world, grant, incoming, mut raw) = opened().await;
    let mut header = honest(&world, &grant).header;
    header.length = u32::MAX;
    let bytes = header.encode();
    assert_eq!(Header::decode(&bytes), Err(BadFrame::Length { length: u32::MAX }));
    raw.bytes(&bytes).await;
    assert!(matches!(incoming.wait().await.err(), Some(TransferError::Lost { .. })));
    let mut rest = Vec::new();
    let _ = raw.stream.read_to_end(&mut rest).await;
}
