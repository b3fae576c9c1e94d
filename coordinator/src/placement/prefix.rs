//! Which workers hold which blocks, by content, as their heartbeats tell it. A hint for placement: a wrong entry
//! costs a recomputation, never a wrong token.

use std::collections::{BTreeMap, BTreeSet};

use baton_core::BlockHash;

/// Short name of one life of a worker in the index.
pub type WorkerIndex = u32;

/// Bounded set of (block, holder).
#[derive(Debug)]
pub struct PrefixIndex {
    held: BTreeSet<(BlockHash, WorkerIndex)>,
    capacity: usize,
    /// Additions that found the index full.
    dropped: u64,
}

impl PrefixIndex {
    pub fn new(capacity: usize) -> PrefixIndex {
        PrefixIndex { held: BTreeSet::new(), capacity, dropped: 0 }
    }

    pub fn len(&self) -> usize {
        self.held.len()
    }

    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    pub fn add(&mut self, index: WorkerIndex, blocks: impl IntoIterator<Item = BlockHash>) {
        for block in blocks {
            if self.held.len() >= self.capacity {
                self.dropped += 1;
            } else {
                self.held.insert((block, index));
            }
        }
    }

    pub fn remove(&mut self, index: WorkerIndex, blocks: impl IntoIterator<Item = BlockHash>) {
        for block in blocks {
            self.held.remove(&(block, index));
        }
    }

    /// Forgets all that a holder had.
    pub fn clear(&mut self, index: WorkerIndex) {
        self.held.retain(|(_, holder)| *holder != index);
    }

    /// Leading blocks of `chain` that each holder has; holders of none are absent.
    pub fn hits(&self, chain: &[BlockHash]) -> BTreeMap<WorkerIndex, u64> {
        let mut hits = BTreeMap::new();
        for (before, block) in (0u64..).zip(chain) {
            let mut any = false;
            for (_, index) in self.held.range((*block, WorkerIndex::MIN)..=(*block, WorkerIndex::MAX)) {
                let run: &mut u64 = hits.entry(*index).or_insert(0);
                if *run == before {
                    *run += 1;
                    any = true;
                }
            }
            if !any {
                break;
            }
        }
        hits.retain(|_, run| *run > 0);
        hits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(n: u32) -> Vec<BlockHash> {
        BlockHash::chain("", &(0..n * 4).collect::<Vec<_>>(), 4)
    }

    #[test]
    fn hits_are_the_leading_run_of_each_holder() {
        let mut index = PrefixIndex::new(100);
        let blocks = chain(5);
        index.add(1, blocks[..3].to_vec());
        index.add(2, blocks.clone());
        index.add(3, blocks[1..].to_vec());
        index.remove(2, [blocks[4]]);
        assert_eq!(index.hits(&blocks), BTreeMap::from([(1, 3), (2, 4)]));
        index.clear(2);
        assert_eq!(index.hits(&blocks), BTreeMap::from([(1, 3)]));
        assert_eq!(index.hits(&[]), BTreeMap::new());
    }

    #[test]
    fn a_full_index_drops_and_counts() {
        let mut index = PrefixIndex::new(2);
        index.add(1, chain(5));
        assert_eq!((index.len(), index.dropped()), (2, 3));
    }
}
