//! Checksums of blocks that will not change any more, kept from the first time they are sent. A prefix that goes to a second
//! decode worker is then not read twice, and what has happened to its bytes in between shows at the other end.

use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_core::{BlockId, BlockLayout};

/// By block of one arena; what it knows of a block ends with the block's generation.
pub(crate) struct Sums {
    layers: usize,
    blocks: Mutex<Vec<Known>>,
}

#[derive(Clone, Default)]
struct Known {
    generation: u32,
    /// By layer; empty before the first is known.
    contents: Vec<Option<u64>>,
}

impl Sums {
    pub(crate) fn new(layout: &BlockLayout, blocks: usize) -> Sums {
        Sums { layers: layout.layers as usize, blocks: Mutex::new(vec![Known::default(); blocks]) }
    }

    /// The checksum of one layer of `block` before it is bound, computed once for each generation.
    pub(crate) fn of(&self, layer: usize, block: BlockId, compute: impl FnOnce() -> u64) -> u64 {
        if let Some(sum) = self.known(layer, block) {
            return sum;
        }
        let sum = compute();
        self.keep(layer, block, sum);
        sum
    }

    pub(crate) fn keep(&self, layer: usize, block: BlockId, sum: u64) {
        if let Some(known) = self.lock().get_mut(block.index as usize) {
            if known.generation != block.generation || known.contents.is_empty() {
                *known = Known { generation: block.generation, contents: vec![None; self.layers] };
            }
            known.contents[layer] = Some(sum);
        }
    }

    pub(crate) fn known(&self, layer: usize, block: BlockId) -> Option<u64> {
        let blocks = self.lock();
        let known = blocks.get(block.index as usize).filter(|known| known.generation == block.generation)?;
        known.contents.get(layer).copied().flatten()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Known>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
}
