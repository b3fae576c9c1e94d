//! A structured fuzzer for every message of the wire, bounded: frames that are right in form and wrong in content, with
//! checksums that fit, to a live receiver and to live links. Nothing panics, nothing that was not granted is written,
//! nothing stays held, and an honest transfer completes afterwards.

use std::sync::Arc;

use baton_core::{Aborted, BlockId, Epoch, Net, Refused, RequestId, Rng, TransferId};
use baton_kvtransfer::wire::{Body, FEATURE_LANES, FEATURE_RESEND, Header, Kind, Message, Summary, Tag};
use baton_kvtransfer::{Dropped, Grant};
use tokio::io::AsyncWriteExt;
use xxhash_rust::xxh3::xxh3_64;

use crate::memory::Memory;
use crate::raw::{Frame, Raw};
use crate::world::{MODEL, REQUEST, World, completes, ids, pairs, read, rounds, until};

/// Connections to a receiver, and of links, for each kind of message; many with `BATON_TEST_LONG=1`.
fn rounds_per_kind() -> u64 {
    rounds(60, 5_000)
}

const KINDS: [Kind; 15] = Kind::ALL;

fn pick<T: Copy>(rng: &mut Rng, items: &[T]) -> T {
    items[rng.below(items.len() as u64) as usize]
}

/// A number near the borders that parsers and state machines care about.
fn number(rng: &mut Rng, near: u64) -> u64 {
    let noise = rng.u64();
    pick(rng, &[0, 1, near, near.wrapping_add(1), near.wrapping_sub(1), u32::MAX as u64, u64::MAX, 1 << 31, noise])
}

fn tag(rng: &mut Rng, near: Tag) -> Tag {
    let mut tag = near;
    match rng.below(6) {
        0 => tag.transfer = TransferId(number(rng, near.transfer.0)),
        1 => tag.attempt = number(rng, near.attempt as u64) as u32,
        2 => tag.epoch = Epoch(number(rng, near.epoch.0)),
        _ => {}
    }
    tag
}

fn body(rng: &mut Rng, kind: Kind, grant: &Grant) -> Body {
    let extents = grant.blocks.len() as u64 * grant.layout.layers as u64;
    let summary = |rng: &mut Rng| Summary {
        extents: number(rng, extents),
        bytes: number(rng, extents * grant.layout.layer_bytes() as u64),
        digest: rng.u64(),
    };
    let text = |rng: &mut Rng| "x".repeat(rng.below(1100) as usize);
    let request = pick(rng, &[grant.request.0, 0, u128::MAX]);
    match kind {
        Kind::Hello => Body::Hello { text: text(rng), features: rng.u64() as u16 },
        Kind::Mismatch => Body::Mismatch(text(rng)),
        Kind::Open => Body::Open {
            request: RequestId(request),
            grant: pick(rng, &[grant.digest(), 0, 1]),
            ticket: pick(rng, &[None, Some(0), Some(grant.ticket)]),
        },
        Kind::Opened => Body::Opened,
        Kind::Refused => Body::Refused(pick(rng, Refused::ALL)),
        Kind::Ack => Body::Ack(number(rng, 1000)),
        Kind::Commit => Body::Commit(summary(rng)),
        Kind::Committed => Body::Committed(summary(rng)),
        Kind::Abort => Body::Abort { reason: pick(rng, Aborted::ALL), quiesced: rng.below(2) == 0 },
        Kind::Aborted => Body::Aborted { quiesced: rng.below(2) == 0 },
        Kind::Resend => {
            let count = 1 + rng.below(256);
            Body::Resend((0..count).map(|_| (number(rng, 2) as u32, number(rng, 3) as u32)).collect())
        }
        Kind::Offer => Body::Offer(text(rng)),
        Kind::Barrier => {
            let count = 1 + rng.below(3);
            Body::Barrier((0..count).map(|_| (number(rng, 2) as u32, number(rng, 1000))).collect())
        }
        Kind::Ping | Kind::Data => Body::Ping,
    }
}

/// A frame of `kind` in which something is off, with checksums that fit it more often than not.
fn frame(rng: &mut Rng, kind: Kind, world: &World, grant: &Grant, sequence: u64) -> Vec<u8> {
    let (mut header, mut payload) = match kind {
        Kind::Data => {
            let (layer, count) = (rng.below(3) as usize, 1 + rng.below(4) as usize);
            let honest = Frame::new(&world.source, grant, layer, &pairs(&ids(0..4))[..count]);
            (Header { sequence, ..honest.header }, honest.payload)
        }
        kind => {
            let bytes = Message { tag: tag(rng, grant.tag()), body: body(rng, kind, grant) }.encode();
            let header = Header::decode(bytes.first_chunk().expect("a header")).expect("just encoded");
            (header, bytes[64..].to_vec())
        }
    };
    for _ in 0..rng.below(3) {
        match rng.below(9) {
            0 => header.flags = number(rng, 2) as u16,
            1 => header.layer = number(rng, 3) as u16,
            2 => header.layers = number(rng, 1) as u16,
            3 => header.sequence = number(rng, sequence),
            4 => header.blocks = number(rng, header.blocks as u64) as u32,
            5 => header.tag = tag(rng, header.tag),
            6 => payload.truncate(rng.below(payload.len() as u64 + 1) as usize),
            7 => payload.extend((0..rng.below(64)).map(|i| i as u8)),
            _ if payload.is_empty() => header.kind = pick(rng, &KINDS),
            _ => {
                let at = rng.below(payload.len() as u64) as usize;
                payload[at] ^= 1 << rng.below(8);
            }
        }
    }
    header.length = payload.len() as u32;
    if rng.below(4) > 0 {
        let entries = (header.blocks as usize).saturating_mul(24).min(payload.len());
        header.payload_sum = xxh3_64(if header.kind == Kind::Data { &payload[..entries] } else { &payload });
    }
    let mut bytes = [&header.encode()[..], &payload].concat();
    if rng.below(16) == 0 {
        bytes.truncate(rng.below(bytes.len() as u64) as usize);
    }
    bytes
}

/// Every layer of the target's blocks beyond those that are granted is what it was.
fn others_are_untouched(world: &World) -> bool {
    (4..8).all(|block| (0..3).all(|layer| read(&world.target, block, layer).iter().all(|byte| *byte == 0)))
}

/// Whatever stands in a granted block after a transfer completed is what the source holds.
#[tokio::test(start_paused = true)]
async fn a_receiver_survives_any_message() {
    let net = Memory::default();
    let world = World::over(Arc::new(net.clone()), crate::world::LAYOUT, 8).await;
    world.receiver.issue_tickets([7; 32], false);
    let mut rng = Rng::new(11);
    for round in 0..rounds_per_kind() * KINDS.len() as u64 {
        let kind = KINDS[round as usize % KINDS.len()];
        let (grant, incoming) = world.grant_first(4);
        let features = pick(&mut rng, &[0, FEATURE_RESEND, FEATURE_RESEND | FEATURE_LANES]);
        let mut raw = Raw::greeted_with(&net, &grant.address, features).await;
        if rng.below(4) > 0 {
            assert_eq!(raw.open(&grant).await, Body::Opened);
        }
        for _ in 0..3 {
            let bytes = frame(&mut rng, kind, &world, &grant, raw.sequence);
            if let Some(Ok(Header { kind: Kind::Data, length, .. })) = bytes.first_chunk().map(Header::decode) {
                raw.sequence += length as u64;
            }
            raw.bytes(&bytes).await;
        }
        let _ = raw.stream.shutdown().await;
        drop(raw);
        match rng.below(2) {
            0 => drop(incoming),
            _ => {
                let waiting = tokio::time::timeout(std::time::Duration::from_secs(61), incoming.wait()).await;
                assert!(waiting.expect("ends").is_err(), "round {round}: nothing was committed honestly");
            }
        }
        until(|| world.held.count() == 0).await;
        assert!(others_are_untouched(&world), "round {round} ({kind:?})");
    }
    until(|| world.counters().held == 0 && world.counters().links == 0).await;
    let counters = world.counters();
    assert_eq!(counters.completed, 0);
    let reasons: Vec<_> = Dropped::ALL.iter().filter(|reason| counters.dropped(**reason) > 0).collect();
    assert!(counters.extents > 0 && reasons.len() >= 7, "the frames come far enough: {reasons:?}");
    completes(&world, 4).await;
}

/// The same against links: whatever a receiver says, a transfer that it did not commit to fails or goes on, and the next
/// receiver at the address is served.
#[tokio::test(start_paused = true)]
async fn links_survive_any_message() {
    let net = Memory::default();
    let world = World::over(Arc::new(net.clone()), crate::world::LAYOUT, 8).await;
    let mut rng = Rng::new(12);
    let mut listener = net.listen("by hand").await.unwrap();
    let address = listener.address();
    let blocks: Vec<BlockId> = ids(0..4);
    for round in 0..rounds_per_kind() * KINDS.len() as u64 {
        let kind = KINDS[round as usize % KINDS.len()];
        let (transfer, layout, deadline_ms) = (TransferId(round), crate::world::LAYOUT, 5_000);
        let grant = Grant {
            transfer,
            attempt: 1,
            epoch: crate::world::EPOCH,
            request: REQUEST,
            address: address.clone(),
            layout,
            slice: None,
            blocks: blocks.clone(),
            deadline_ms,
            ticket: 0,
        };
        let (links, pairs) = (world.links.clone(), pairs(&blocks));
        let honest = grant.clone();
        let sending = tokio::spawn(async move {
            let mut outgoing = links.open(honest).await?;
            for layer in 0..3 {
                outgoing.send(layer, &pairs).await?;
            }
            outgoing.commit().await
        });
        let mut raw = Raw::new(listener.accept().await.unwrap());
        let hello = raw.hear().await.unwrap();
        if rng.below(8) > 0 {
            let features = pick(&mut rng, &[0, FEATURE_RESEND]);
            raw.say(hello.tag, Body::Hello { text: baton_kvtransfer::wire::compatibility(&layout, MODEL), features })
                .await;
            if rng.below(4) > 0 {
                raw.say(grant.tag(), Body::Opened).await;
            }
        }
        for _ in 0..3 {
            let bytes = frame(&mut rng, kind, &world, &grant, 0);
            raw.bytes(&bytes).await;
        }
        let _ = raw.stream.shutdown().await;
        drop(raw);
        let ended = sending.await.expect("no panic");
        assert!(ended.is_err() || kind == Kind::Committed, "round {round} ({kind:?}): {ended:?}");
        world.links.disconnect(&address);
    }
    completes(&world, 4).await;
}
