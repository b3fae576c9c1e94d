//! One layer of one block, between an arena and a DATA frame. The only file that touches an arena's bytes.
#![allow(unsafe_code)]

use std::io::{self, IoSlice};

use baton_core::arena::{Arriving, DeviceSource, Half};
use baton_core::limits::HANDOFF_FRAME_BYTES_MAX;
use baton_core::{Arena, BlockId, BlockLayout};

use crate::Grant;
use crate::hash::{self, Parts};
use crate::wire::{BY_REFERENCE, ENTRY_BYTES, Entry, FRAME_BLOCKS_MAX, HEADER_BYTES, Header, Kind};

/// Bytes a frame of several small extents aims at: enough to amortise a write, little enough to stay in L2.
const GROUP_BYTES: usize = 256 << 10;

/// Checksum of an extent bound to its place: the same bytes for another grant, layer or position have another sum.
pub(crate) fn bind(content: u64, grant: u128, layer: u32, position: u32) -> u64 {
    let place = u64::from(position) << 32 | u64::from(layer);
    hash::of_words([content, grant as u64, (grant >> 64) as u64, place])
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

/// A DATA frame on its way. Its extents stay where they are, in the source arena, until they are written or `own`ed;
/// those of a frame by reference stay there for good.
#[derive(Default)]
pub struct Data {
    /// Header and entries, and the extents once they are owned.
    bytes: Vec<u8>,
    /// What follows `bytes`.
    lent: Vec<Lent>,
    written: usize,
    /// Wrapping sum of the extents' checksums.
    pub(crate) digest: u64,
}

/// Bytes of an arena that somebody else keeps from changing.
#[derive(Clone, Copy)]
struct Lent {
    at: *const u8,
    bytes: usize,
}

// SAFETY: plain memory; `Data::gather` says who keeps it alive and unchanged.
unsafe impl Send for Lent {}
// SAFETY: as above.
unsafe impl Sync for Lent {}

/// What a frame is made of: one layer of `blocks` (position in the grant, source block). `digest` is the grant's.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) arena: &'a Arena,
    pub(crate) grant: &'a Grant,
    pub(crate) digest: u128,
    pub(crate) layer: usize,
    pub(crate) blocks: &'a [(usize, BlockId)],
}

/// An extent in a frame.
pub(crate) struct Sent {
    pub(crate) position: u32,
    pub(crate) source: BlockId,
    pub(crate) sum: u64,
}

impl Data {
    /// One layer of `blocks` (position in the grant, source block) of `arena`, and the header. The caller holds the
    /// blocks as filled until the frame is written, owned or dropped.
    pub fn gather(
        &mut self,
        arena: &Arena,
        grant: &Grant,
        digest: u128,
        layer: usize,
        blocks: &[(usize, BlockId)],
    ) -> Header {
        let contents = |_, block: BlockId| content(arena, block.index, layer, None);
        self.enter(&Layer { arena, grant, digest, layer, blocks }, 0, contents, &mut Vec::new())
    }

    /// The same with `contents`: the unbound checksum of each (position, block), asked for in their order. With the flag
    /// BY_REFERENCE the receiver fetches the extents out of the arena, with ON_DEVICE out of its memory there. What the frame
    /// has is added to `sent`.
    pub(crate) fn enter(
        &mut self,
        from: &Layer<'_>,
        flags: u16,
        mut contents: impl FnMut(usize, BlockId) -> u64,
        sent: &mut Vec<Sent>,
    ) -> Header {
        let Layer { arena, grant, digest, layer, blocks } = *from;
        let by_reference = flags & BY_REFERENCE != 0;
        (self.written, self.digest) = (0, 0);
        self.lent.clear();
        self.bytes.clear();
        self.bytes.reserve(HEADER_BYTES + blocks.len() * ENTRY_BYTES);
        self.bytes.resize(HEADER_BYTES, 0);
        for (position, block) in blocks {
            let at = *position as u32;
            let sum = bind(contents(*position, *block), digest, layer as u32, at);
            let source = if by_reference { block.index } else { 0 };
            let entry = Entry { position: at, block: grant.blocks[*position], source, sum };
            self.bytes.extend_from_slice(&entry.encode());
            self.digest = self.digest.wrapping_add(sum);
            sent.push(Sent { position: at, source: *block, sum });
        }
        let mut header = Header::new(Kind::Data, grant.tag());
        let extents = if by_reference { 0 } else { blocks.len() * arena.layout().layer_bytes() };
        (header.layer, header.layers, header.blocks, header.flags) = (layer as u16, 1, blocks.len() as u32, flags);
        header.length = (self.bytes.len() - HEADER_BYTES + extents) as u32;
        header.payload_sum = hash::of_bytes(&self.bytes[HEADER_BYTES..]);
        if !by_reference {
            let (halved, bytes) = (is_halved(arena), run_bytes(arena.layout(), is_halved(arena)));
            for (_, source) in blocks {
                self.lent.extend(runs(arena, source.index, layer, halved).map(|at| Lent { at, bytes }));
            }
        }
        header
    }

    pub(crate) fn label(&mut self, header: &Header) {
        self.bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
    }

    /// The whole frame under `header`, in one piece.
    pub fn stamp(&mut self, header: &Header) -> &[u8] {
        self.label(header);
        self.own();
        &self.bytes
    }

    /// Copies what is lent, so that nobody has to hold the source blocks any more.
    pub(crate) fn own(&mut self) {
        for lent in std::mem::take(&mut self.lent) {
            // SAFETY: `gather`'s caller still holds the block.
            self.bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(lent.at, lent.bytes) });
        }
    }

    /// Lets go of what is lent: it has been written.
    pub(crate) fn forget(&mut self) {
        self.lent.clear();
    }

    /// The bytes still to be written, as far as they fit in `pieces`; how many pieces.
    pub(crate) fn rest<'a>(&'a self, pieces: &mut [IoSlice<'a>]) -> usize {
        // SAFETY: `gather`'s caller still holds the blocks.
        let lent = self.lent.iter().map(|lent| unsafe { std::slice::from_raw_parts(lent.at, lent.bytes) });
        let (mut skip, mut count) = (self.written, 0);
        for piece in std::iter::once(&self.bytes[..]).chain(lent) {
            if skip >= piece.len() {
                skip -= piece.len();
                continue;
            }
            if count == pieces.len() {
                break;
            }
            pieces[count] = IoSlice::new(&piece[skip..]);
            (skip, count) = (0, count + 1);
        }
        count
    }

    pub(crate) fn wrote(&mut self, bytes: usize) {
        self.written += bytes;
    }
}

/// Whether a head's keys do not lie beside its values.
fn is_halved(arena: &Arena) -> bool {
    arena.units() > 1
}

/// Where one layer of a block lies, by kv head: a run of keys and values, or `halved` a run of each.
fn runs(arena: &Arena, block: u32, layer: usize, halved: bool) -> impl Iterator<Item = *const u8> {
    let block = arena.block(block).cast_const();
    assert!(layer < arena.layout().layers as usize, "layer {layer} of {}", arena.layout().layers);
    let halves = if halved { &[Half::Key, Half::Value][..] } else { &[Half::Key] };
    let heads = 0..arena.layout().kv_heads as usize;
    heads.flat_map(move |head| halves.iter().map(move |half| block.wrapping_add(arena.offset(head, layer, *half))))
}

/// Runs of a block, each with the one that is read after it, in the end that of the `next` block.
fn with_next(
    arena: &Arena,
    block: u32,
    layer: usize,
    halved: bool,
    next: Option<u32>,
) -> impl Iterator<Item = (*const u8, Option<*const u8>)> {
    let of_next = next.and_then(|next| runs(arena, next, layer, halved).next());
    let after = runs(arena, block, layer, halved).skip(1).map(Some).chain([of_next]);
    runs(arena, block, layer, halved).zip(after)
}

fn run_bytes(layout: &BlockLayout, halved: bool) -> usize {
    if halved { layout.half_bytes() } else { layout.slice_bytes() }
}

fn parts(layout: &BlockLayout, halved: bool) -> Parts {
    let bytes = run_bytes(layout, halved);
    Parts::new(layout.layer_bytes() / bytes, bytes)
}

/// Checksum of an extent before it is bound. The caller holds the block as filled. `next` is the block that is read after it.
pub(crate) fn content(arena: &Arena, block: u32, layer: usize, next: Option<u32>) -> u64 {
    let halved = is_halved(arena);
    let (mut parts, bytes) = (parts(arena.layout(), halved), run_bytes(arena.layout(), halved));
    for (from, next) in with_next(arena, block, layer, halved, next) {
        // SAFETY: inside the block; `Outgoing::send` asks its caller to hold it as filled.
        unsafe { parts.add(from, bytes, next) };
    }
    parts.finish()
}

/// An extent on its way into the block it is granted for, slice by slice.
pub(crate) struct Landing {
    parts: Parts,
    halved: bool,
    /// What has landed.
    runs: usize,
}

impl Landing {
    /// Into an arena like `arena`, blocks of `layout`.
    pub(crate) fn new(arena: &Arena, layout: &BlockLayout) -> Landing {
        Landing { parts: parts(layout, is_halved(arena)), halved: is_halved(arena), runs: 0 }
    }

    /// The same out of another arena.
    pub(crate) fn between(source: &Arena, arena: &Arena) -> Landing {
        let halved = is_halved(source) || is_halved(arena);
        Landing { parts: parts(arena.layout(), halved), halved, runs: 0 }
    }

    /// Slices that are missing.
    pub(crate) fn left(&self, layout: &BlockLayout) -> usize {
        layout.kv_heads as usize - self.runs / if self.halved { 2 } else { 1 }
    }

    /// Copies the next slices, (kv_head, K|V, token, head_dim), out of a frame. The caller holds `block` as reserved:
    /// it has found it in a transfer that is open, under that transfer's lock, and the transfer lets the guard go only
    /// after it has left that state under the same lock.
    pub(crate) fn copy(&mut self, arena: &Arena, block: BlockId, layer: u32, bytes: &[u8]) {
        arena.brought_here(block);
        let run = run_bytes(arena.layout(), self.halved);
        let targets = runs(arena, block.index, layer as usize, self.halved).skip(self.runs);
        for (from, to) in bytes.chunks_exact(run).zip(targets) {
            // SAFETY: `to` is inside the block, which the caller holds; `from` is a whole run of the frame.
            unsafe { self.parts.copy(from.as_ptr(), to.cast_mut(), run, None) };
            self.runs += 1;
        }
    }

    /// Copies all slices out of the first of `sources`, blocks of an arena with the same layout, of this process or mapped; the
    /// second is the one that comes after it. `block` is held as for `copy`. It was made by `between`.
    pub(crate) fn fetch(
        &mut self,
        arena: &Arena,
        block: BlockId,
        layer: u32,
        source: &Arena,
        (index, next): (u32, Option<u32>),
    ) {
        assert_eq!(source.layout(), arena.layout());
        arena.brought_here(block);
        let (run, halved) = (run_bytes(arena.layout(), self.halved), self.halved);
        let targets = runs(arena, block.index, layer as usize, halved);
        for ((from, next), to) in with_next(source, index, layer as usize, halved, next).zip(targets) {
            // SAFETY: both are inside their blocks, and the caller holds `to`'s. If the sender does not hold `from`'s as
            // filled, its bytes may change while they are read, and the checksum is then not the announced one.
            unsafe { self.parts.copy(from, to.cast_mut(), run, next) };
            self.runs += 1;
        }
    }

    /// The checksum of what stands in the block now, and the same bound.
    pub(crate) fn finish(self, grant: u128, layer: u32, position: u32) -> (u64, u64) {
        let content = self.parts.finish();
        (content, bind(content, grant, layer, position))
    }
}

/// Begins to copy one layer of blocks out of a sender's device into ours, as entries name them. `source` says where they lie. The
/// caller holds the targets as `Landing::copy` asks, and keeps them from being let go until what is returned has been waited for
/// or dropped.
pub(crate) fn take_off(
    device: &dyn DeviceSource,
    source: &Arena,
    arena: &Arena,
    layer: u32,
    entries: &[Entry],
) -> io::Result<Box<dyn Arriving>> {
    assert_eq!(source.layout(), arena.layout());
    let leave = |entry: &Entry| {
        arena.left_on_device(entry.block);
        (entry.source, entry.block.index)
    };
    let pairs: Vec<(u32, u32)> = entries.iter().map(leave).collect();
    // SAFETY: the caller's. If the sender writes its blocks meanwhile, the checksums are not the announced ones.
    unsafe { device.fetch(&source.extents(layer as usize), &arena.extents(layer as usize), &pairs) }
}

#[cfg(test)]
mod tests;
