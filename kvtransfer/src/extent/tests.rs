//! DATA frames: what is gathered arrives, and nothing else passes for it.

use baton_core::{Epoch, KvDtype, RequestId, TransferId};

use super::*;
use crate::wire;

const LAYOUT: BlockLayout = BlockLayout { layers: 2, kv_heads: 2, head_dim: 2, block_tokens: 4, dtype: KvDtype::Bf16 };

fn grant() -> Grant {
    let blocks = (0..4).map(|index| BlockId { index, generation: 9 }).collect();
    let (transfer, epoch, request) = (TransferId(3), Epoch(4), RequestId(5));
    Grant {
        transfer,
        attempt: 1,
        epoch,
        request,
        address: String::new(),
        layout: LAYOUT,
        slice: None,
        blocks,
        deadline_ms: 1,
        ticket: 0,
    }
}

fn frame() -> (Header, Vec<u8>) {
    let arena = Arena::new(LAYOUT, 4);
    for block in 0..4 {
        let bytes: Vec<u8> = (0..LAYOUT.layer_bytes()).map(|i| (i * 7) as u8 ^ block as u8).collect();
        // SAFETY: nobody else has the arena.
        unsafe { arena.write_layer(block, 1, &bytes) };
    }
    let sources = [(2, BlockId { index: 1, generation: 0 }), (0, BlockId { index: 3, generation: 0 })];
    let mut data = Data::default();
    let header = data.gather(&arena, &grant(), grant().digest(), 1, &sources);
    (header.clone(), data.stamp(&header).to_vec())
}

/// The extents of a frame that pass every check for `grant`.
fn accepted(bytes: &[u8], grant: &Grant) -> Vec<(u32, Vec<u8>)> {
    let (head, payload) = bytes.split_first_chunk().expect("a header");
    let Ok(header) = Header::decode(head) else { return Vec::new() };
    let layer_bytes = LAYOUT.layer_bytes();
    if payload.len() != header.length as usize || header.layer as u32 >= LAYOUT.layers {
        return Vec::new();
    }
    let Ok(lines) = wire::entries_bytes(&header, layer_bytes) else { return Vec::new() };
    let (lines, extents) = payload.split_at(lines);
    let Ok(entries) = wire::entries(&header, lines) else { return Vec::new() };
    let (target, layer) = (Arena::new(LAYOUT, 1), header.layer as u32);
    let good = entries.zip(extents.chunks_exact(layer_bytes)).filter(|(entry, bytes)| {
        let mut landing = Landing::new(&target, &LAYOUT);
        landing.copy(&target, BlockId { index: 0, generation: 0 }, layer, bytes);
        landing.finish(grant.digest(), layer, entry.position).1 == entry.sum
    });
    good.map(|(entry, bytes)| (entry.position, bytes.to_vec())).collect()
}

#[test]
fn gathered_extents_are_what_the_arena_held() {
    let (header, bytes) = frame();
    let extents = accepted(&bytes, &grant());
    assert_eq!((header.layer, header.blocks), (1, 2));
    assert_eq!(extents.iter().map(|(position, _)| *position).collect::<Vec<_>>(), [2, 0]);
    assert!(extents.iter().zip([1u8, 3]).all(|((_, bytes), block)| bytes[0] == block && bytes[1] == 7 ^ block));
}

/// A flip in header or entries spoils the frame, one in an extent that extent.
#[test]
fn every_bit_of_a_frame_counts() {
    let (_, bytes) = frame();
    let entries_end = HEADER_BYTES + 2 * ENTRY_BYTES;
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let left = accepted(&flipped, &grant()).len();
        assert_eq!(left, if bit / 8 < entries_end { 0 } else { 1 }, "bit {bit}");
    }
}

#[test]
fn every_truncation_is_refused() {
    let (_, bytes) = frame();
    for end in HEADER_BYTES..bytes.len() {
        assert!(accepted(&bytes[..end], &grant()).is_empty(), "{end}");
    }
}

#[test]
fn every_field_of_a_grant_binds_its_bytes() {
    let (_, bytes) = frame();
    let mut others = vec![grant(); 7];
    others[0].transfer.0 += 1;
    others[1].attempt += 1;
    others[2].epoch.0 += 1;
    others[3].request.0 += 1;
    others[4].layout.layers += 1;
    others[5].blocks[1].generation += 1;
    others[6].blocks[1].index += 1;
    assert!(others.iter().all(|other| accepted(&bytes, other).is_empty()));
}
