//! The host-memory tier: blocks by name, the one unused longest first to go.

use std::collections::BTreeMap;

use baton_core::BlockHash;

use super::Fault;
use super::disk::{Class, digest};

pub(super) struct Host {
    class: Class,
    blocks_max: usize,
    blocks: BTreeMap<BlockHash, Kept>,
    /// By last use, oldest first.
    order: BTreeMap<u64, BlockHash>,
    moment: u64,
}

struct Kept {
    bytes: Box<[u8]>,
    digest: u128,
    used: u64,
}

/// A block that has left the tier.
pub(super) struct Left {
    pub(super) name: BlockHash,
    pub(super) bytes: Box<[u8]>,
    pub(super) digest: u128,
}

impl Host {
    /// None if not one block fits.
    pub(super) fn new(class: Class, block_bytes: usize, bytes_max: u64) -> Option<Host> {
        let blocks_max = usize::try_from(bytes_max / block_bytes as u64).unwrap_or(usize::MAX);
        let (blocks, order, moment) = Default::default();
        (blocks_max > 0).then_some(Host { class, blocks_max, blocks, order, moment })
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn has(&self, name: BlockHash) -> bool {
        self.blocks.contains_key(&name)
    }

    /// The block that makes room, if one must before another comes.
    pub(super) fn make_room(&mut self) -> Option<Left> {
        (self.blocks.len() >= self.blocks_max).then(|| self.pop()).flatten()
    }

    /// The block unused longest.
    pub(super) fn pop(&mut self) -> Option<Left> {
        let (_, name) = self.order.pop_first()?;
        let kept = self.blocks.remove(&name)?;
        Some(Left { name, bytes: kept.bytes, digest: kept.digest })
    }

    /// Keeps a block in `memory`, which has the right size.
    pub(super) fn put(&mut self, name: BlockHash, mut memory: Box<[u8]>, bytes: &[u8]) {
        memory.copy_from_slice(bytes);
        self.moment += 1;
        self.order.insert(self.moment, name);
        let kept = Kept { digest: digest(&self.class, name, &memory), bytes: memory, used: self.moment };
        if let Some(older) = self.blocks.insert(name, kept) {
            self.order.remove(&older.used);
        }
    }

    /// The block's bytes, if it is here; a damaged one is not any more.
    pub(super) fn get(&mut self, name: BlockHash) -> Option<Result<&[u8], Fault>> {
        let kept = self.blocks.get_mut(&name)?;
        self.order.remove(&kept.used);
        if digest(&self.class, name, &kept.bytes) != kept.digest {
            self.blocks.remove(&name);
            return Some(Err(Fault::Damaged));
        }
        self.moment += 1;
        kept.used = self.moment;
        self.order.insert(self.moment, name);
        self.blocks.get(&name).map(|kept| Ok(&*kept.bytes))
    }

    /// Changes one bit of a block, as bad memory would.
    #[cfg(test)]
    pub(super) fn damage(&mut self, name: BlockHash) {
        if let Some(kept) = self.blocks.get_mut(&name) {
            kept.bytes[0] ^= 1;
        }
    }
}
