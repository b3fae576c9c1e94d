//! One layer of one block, between an arena and a DATA frame. The only file that touches the arena's bytes.
#![allow(unsafe_code)]

use baton_core::limits::HANDOFF_FRAME_BYTES_MAX;
use baton_core::{Arena, BlockId, BlockLayout};
use xxhash_rust::xxh3::xxh3_64;

use crate::Grant;
use crate::hash::hash;
use crate::wire::{ENTRY_BYTES, Entry, FRAME_BLOCKS_MAX, HEADER_BYTES, Header, Kind};

/// Bytes a frame of several small extents aims at: enough to amortise a write, little enough to stay in L2.
const GROUP_BYTES: usize = 256 << 10;

/// Checksum of an extent bound to its place: the same bytes for another grant, layer or position have another sum.
pub(crate) fn bind(content: u64, grant: u128, layer: u32, position: u32) -> u64 {
    let mut place = [0; 32];
    place[0..8].copy_from_slice(&content.to_le_bytes());
    place[8..24].copy_from_slice(&grant.to_le_bytes());
    place[24..28].copy_from_slice(&layer.to_le_bytes());
    place[28..32].copy_from_slice(&position.to_le_bytes());
    xxh3_64(&place)
}

/// Extents of this size that go into one frame.
pub(crate) fn extents_per_frame(layout: &BlockLayout) -> usize {
    (GROUP_BYTES / layout.layer_bytes()).clamp(1, FRAME_BLOCKS_MAX)
}

/// Whether one layer of one block fits in a frame, and every layer in its header.
pub(crate) fn fits(layout: &BlockLayout) -> bool {
    let layers = (1..=u16::MAX as u32).contains(&layout.layers);
    layers && (1..=HANDOFF_FRAME_BYTES_MAX).contains(&layout.layer_bytes())
}

/// A DATA frame in a reused buffer: its first 64 bytes are free for the header, which is stamped when it is queued.
#[derive(Default)]
pub struct Data {
    pub(crate) bytes: Vec<u8>,
    /// Wrapping sum of the extents' checksums.
    pub(crate) digest: u64,
}

impl Data {
    /// Gathers one layer of `blocks` (position in the grant, source block) out of `arena`, and returns the header.
    pub fn gather(
        &mut self,
        arena: &Arena,
        grant: &Grant,
        digest: u128,
        layer: usize,
        blocks: &[(usize, BlockId)],
    ) -> Header {
        let layer_bytes = arena.layout().layer_bytes();
        let entries_end = HEADER_BYTES + blocks.len() * ENTRY_BYTES;
        self.bytes.resize(entries_end + blocks.len() * layer_bytes, 0);
        self.digest = 0;
        let (head, bytes) = self.bytes.split_at_mut(entries_end);
        let entries = head[HEADER_BYTES..].chunks_exact_mut(ENTRY_BYTES);
        for (((position, source), extent), line) in blocks.iter().zip(bytes.chunks_exact_mut(layer_bytes)).zip(entries)
        {
            // SAFETY: `Outgoing::send` asks its caller to hold the source blocks as filled until it returns.
            unsafe { arena.read_layer(source.index, layer, extent) };
            let sum = bind(hash(extent), digest, layer as u32, *position as u32);
            let entry = Entry { position: *position as u32, block: grant.blocks[*position], sum };
            line.copy_from_slice(&entry.encode());
            self.digest = self.digest.wrapping_add(sum);
        }
        let mut header = Header::new(Kind::Data, grant.tag());
        (header.layer, header.layers, header.blocks) = (layer as u16, 1, blocks.len() as u32);
        header.length = (self.bytes.len() - HEADER_BYTES) as u32;
        header.payload_sum = xxh3_64(&self.bytes[HEADER_BYTES..entries_end]);
        header
    }

    /// The frame's bytes under `header`.
    pub fn stamp(&mut self, header: &Header) -> &[u8] {
        self.bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
        &self.bytes
    }

    pub(crate) fn payload(&self) -> &[u8] {
        &self.bytes[HEADER_BYTES..]
    }
}

/// Whether `bytes` are what the entry says, for this grant and layer.
pub(crate) fn intact(entry: &Entry, grant: u128, layer: u32, bytes: &[u8]) -> bool {
    bind(hash(bytes), grant, layer, entry.position) == entry.sum
}

/// Writes a verified extent into the block it was granted for.
pub(crate) fn store(arena: &Arena, block: BlockId, layer: u32, bytes: &[u8]) {
    // SAFETY: the caller (`receiver::Shared::data`) has found the block in a transfer that is open, under that
    // transfer's lock; the transfer holds the guard of the reserved block, and lets it go only after it has left that
    // state under the same lock.
    unsafe { arena.write_layer(block.index, layer as usize, bytes) };
}

#[cfg(test)]
mod tests;
