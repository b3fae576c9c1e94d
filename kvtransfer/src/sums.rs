//! Checksums of blocks that will not change any more, kept from when they came in or were first sent. A prefix that goes to a second
//! decode worker is then not read twice, and what has happened to its bytes in between shows at the other end, or in an audit.

use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_core::{BlockId, BlockLayout};

/// By layer and block of one arena; what it knows of a block ends with the block's generation.
pub(crate) struct Sums {
    layers: usize,
    blocks: usize,
    /// Of one layer after the other, for a transfer asks for many blocks of one layer at a time: whose checksum it is
    /// (`owner`), and the checksum.
    known: Mutex<Vec<(u64, u64)>>,
}

/// What an audit of a block has found.
/// The worse is the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Audited {
    /// It holds what it held when it was written or sent.
    Right,
    /// Nothing was known of some of it, which is known now.
    Noted,
    /// It does not hold what it did.
    Damaged,
}

impl Sums {
    pub(crate) fn new(layout: &BlockLayout, blocks: usize) -> Sums {
        let layers = layout.layers as usize;
        Sums { layers, blocks, known: Mutex::new(vec![(0, 0); layers * blocks]) }
    }

    /// The checksum of one layer of `block` before it is bound, computed once for each generation.
    pub(crate) fn of(&self, layer: usize, block: BlockId, compute: impl FnOnce() -> u64) -> u64 {
        let known = self.find(&self.lock(), layer, block);
        if let Some(sum) = known {
            return sum;
        }
        let sum = compute();
        self.keep(layer, block, sum);
        sum
    }

    /// What is known of each of some blocks, (position, block), of which those before the position `settled` do not change.
    pub(crate) fn known_of(&self, layer: usize, blocks: &[(usize, BlockId)], settled: usize) -> Vec<Option<u64>> {
        let all = self.lock();
        let known =
            |(position, block): &(usize, BlockId)| self.find(&all, layer, *block).filter(|_| *position < settled);
        blocks.iter().map(known).collect()
    }

    /// The checksums of blocks in their order, of what `known_of` said and what was then computed of the others, which is kept of
    /// the settled ones. None: too few were computed.
    pub(crate) fn complete(
        &self,
        layer: usize,
        blocks: &[(usize, BlockId)],
        settled: usize,
        known: &[Option<u64>],
        computed: &[u64],
    ) -> Option<Vec<u64>> {
        let mut all = (!computed.is_empty()).then(|| self.lock());
        let mut computed = computed.iter();
        let mut sums = Vec::with_capacity(blocks.len());
        for ((position, block), known) in blocks.iter().zip(known) {
            let sum = known.or_else(|| computed.next().copied())?;
            if let Some(all) = all.as_mut().filter(|_| known.is_none() && *position < settled) {
                self.enter(all, layer, *block, sum);
            }
            sums.push(sum);
        }
        Some(sums)
    }

    /// Keeps the checksum of one layer of a block that has just been written.
    pub(crate) fn keep(&self, layer: usize, block: BlockId, sum: u64) {
        self.enter(&mut self.lock(), layer, block, sum);
    }

    /// Knows nothing of a block any more: it is not full, and somebody goes on writing it.
    pub(crate) fn forget(&self, block: BlockId) {
        let mut all = self.lock();
        for at in (0..self.layers).filter_map(|layer| self.at(layer, block)) {
            all[at] = (0, 0);
        }
    }

    /// Whether a block holds what is known of it, by what `compute` finds in a layer of it now; what is not known yet is known from
    /// here on.
    pub(crate) fn audit(&self, block: BlockId, compute: impl Fn(usize) -> u64) -> Audited {
        let mut audited = Audited::Right;
        for layer in 0..self.layers {
            let (now, known) = (compute(layer), self.find(&self.lock(), layer, block));
            match known {
                Some(known) if known != now => return Audited::Damaged,
                Some(_) => {}
                None => {
                    audited = Audited::Noted;
                    self.keep(layer, block, now);
                }
            }
        }
        audited
    }

    #[inline]
    fn find(&self, all: &[(u64, u64)], layer: usize, block: BlockId) -> Option<u64> {
        let (of, sum) = all[self.at(layer, block)?];
        (of == owner(block)).then_some(sum)
    }

    fn enter(&self, all: &mut [(u64, u64)], layer: usize, block: BlockId, sum: u64) {
        if let Some(at) = self.at(layer, block) {
            all[at] = (owner(block), sum);
        }
    }

    /// Where one layer of a block stands; None: the arena has no such.
    fn at(&self, layer: usize, block: BlockId) -> Option<usize> {
        let index = block.index as usize;
        (layer < self.layers && index < self.blocks).then_some(layer * self.blocks + index)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A block's generation as that of a checksum; 0 is nobody's.
fn owner(block: BlockId) -> u64 {
    1 << 32 | u64::from(block.generation)
}

#[cfg(test)]
mod tests {
    use baton_core::KvDtype;

    use super::*;

    const LAYOUT: BlockLayout =
        BlockLayout { layers: 2, kv_heads: 1, head_dim: 4, block_tokens: 4, dtype: KvDtype::Bf16 };

    /// Known by (block, generation, layer); a new generation knows nothing of the one before, in any layer.
    #[test]
    fn a_checksum_is_known_until_its_block_is_another() {
        let sums = Sums::new(&LAYOUT, 2);
        let [first, second] = [7, 8].map(|generation| BlockId { index: 1, generation });
        let unexpected = || -> u64 { panic!("computed again") };
        assert_eq!(sums.of(0, first, || 10), 10);
        assert_eq!(sums.of(1, first, || 11), 11);
        assert_eq!((sums.of(0, first, unexpected), sums.of(1, first, unexpected)), (10, 11));
        assert_eq!(sums.of(0, second, || 20), 20);
        assert_eq!(sums.of(1, second, || 21), 21);
        assert_eq!(sums.of(0, BlockId { index: 9, generation: 1 }, || 30), 30, "a block of no arena is not kept");
    }

    /// An audit compares what is known and keeps what is not; of another generation it knows nothing.
    #[test]
    fn an_audit_finds_what_has_changed() {
        let sums = Sums::new(&LAYOUT, 2);
        let [block, later] = [7, 8].map(|generation| BlockId { index: 1, generation });
        sums.keep(0, block, 10);
        let now = |bytes: [u64; 2]| move |layer: usize| bytes[layer];
        assert_eq!(sums.audit(block, now([10, 11])), Audited::Noted);
        assert_eq!(sums.audit(block, now([10, 11])), Audited::Right);
        assert_eq!(
            (sums.audit(block, now([10, 12])), sums.audit(block, now([9, 11]))),
            (Audited::Damaged, Audited::Damaged)
        );
        assert_eq!(sums.audit(later, now([1, 2])), Audited::Noted);
        sums.forget(later);
        assert_eq!(sums.audit(later, now([3, 4])), Audited::Noted);
    }

    /// Many at once are known and kept as one is; those that may change are neither.
    #[test]
    fn checksums_of_many_blocks_are_completed() {
        let sums = Sums::new(&LAYOUT, 4);
        let blocks: Vec<_> = (0..4).map(|index| (index as usize, BlockId { index, generation: 1 })).collect();
        sums.of(1, blocks[1].1, || 11);
        sums.of(1, blocks[3].1, || 13);
        let known = sums.known_of(1, &blocks, 3);
        assert_eq!(known, [None, Some(11), None, None], "the last one may have changed");
        assert_eq!(sums.complete(1, &blocks, 3, &known, &[20, 22]), None, "one is missing");
        assert_eq!(sums.complete(1, &blocks, 3, &known, &[20, 22, 23]), Some(vec![20, 11, 22, 23]));
        assert_eq!(sums.known_of(1, &blocks, 4), [Some(20), Some(11), Some(22), Some(13)]);
    }
}
