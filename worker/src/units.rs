//! Blocks as links move them. Workers of one model may have blocks of different sizes; what passes between them is the model's own,
//! of which a worker's blocks are one or several: its units.

use baton_core::BlockId;

/// How a worker's blocks are cut for links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Units {
    tokens: u32,
    each: u32,
}

impl Units {
    /// Units of `tokens` in blocks of `block_tokens`. None: not 1, 2, 4 or 8 of them.
    pub(crate) fn new(tokens: u32, block_tokens: u32) -> Option<Units> {
        let each = block_tokens.checked_div(tokens).filter(|each| each * tokens == block_tokens)?;
        matches!(each, 1 | 2 | 4 | 8).then_some(Units { tokens, each })
    }

    /// Tokens in a unit.
    pub fn tokens(&self) -> usize {
        self.tokens as usize
    }

    /// Units in a block.
    pub fn each(&self) -> usize {
        self.each as usize
    }

    /// Those of blocks, in order.
    pub fn of(&self, blocks: &[BlockId]) -> Vec<BlockId> {
        let unit = |block: &BlockId, at: u32| BlockId { index: block.index * self.each + at, ..*block };
        blocks.iter().flat_map(|block| (0..self.each).map(move |at| unit(block, at))).collect()
    }

    /// Those of blocks of a sequence, each with its index there, from the unit `from` on and below `end`; the first is 0.
    pub fn placed(&self, blocks: &[(usize, BlockId)], from: usize, end: usize) -> Vec<(usize, BlockId)> {
        let all = blocks.iter().flat_map(|(index, block)| {
            self.of(&[*block]).into_iter().enumerate().map(move |(at, unit)| (index * self.each() + at, unit))
        });
        all.filter(|(at, _)| (from..end).contains(at)).map(|(at, unit)| (at - from, unit)).collect()
    }

    /// How many leading blocks are whole, of whose units these are.
    pub fn whole_blocks(&self, whole: &[bool]) -> usize {
        whole.chunks_exact(self.each()).take_while(|units| units.iter().all(|whole| *whole)).count()
    }
}

#[cfg(test)]
mod tests {
    use baton_kvtransfer::reslice::{Cut, Heads, plan};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blocks_are_cut_in_order() {
        let units = Units::new(16, 32).unwrap();
        let blocks = [BlockId { index: 3, generation: 9 }, BlockId { index: 1, generation: 4 }];
        let ids: Vec<(u32, u32)> = units.of(&blocks).iter().map(|unit| (unit.index, unit.generation)).collect();
        assert_eq!(ids, [(6, 9), (7, 9), (2, 4), (3, 4)]);
        let placed = units.placed(&[(2, blocks[0]), (3, blocks[1])], 5, 7);
        assert_eq!(placed.iter().map(|(at, unit)| (*at, unit.index)).collect::<Vec<_>>(), [(0, 7), (1, 2)]);
        assert_eq!(units.whole_blocks(&[true, true, true, false, true, true]), 1);
        assert_eq!(Units::new(16, 16).unwrap().of(&blocks), blocks);
        assert!(Units::new(16, 24).is_none() && Units::new(16, 256).is_none() && Units::new(0, 16).is_none());
        assert!(Units::new(16, 8).is_none());
    }

    proptest! {
        /// What workers send is what the planner says, for every pair of block sizes and every prefix that the receiver has
        /// already: the same source and destination of every token, each destination token once, and one extent of the plan
        /// for each pair of blocks that have units in common, so at most two a block where sizes differ by two.
        #[test]
        fn units_are_the_plan(from in 0u32..4, to in 0u32..4, tokens in 1u32..400, held in 0u32..10) {
            let (from, to) = (Units::new(16, 16 << from).unwrap(), Units::new(16, 16 << to).unwrap());
            let (cut, heads) = (
                |units: Units| Cut { ranks: 1, block_tokens: units.tokens * units.each },
                Heads { kv_heads: 1, layers: 1, row_bytes: 1 },
            );
            // As a decode worker with `held` whole blocks grants, and a prefill worker announces.
            let wanted = tokens.div_ceil(16);
            let skip = (held * to.each).min(wanted - 1) / to.each * to.each;
            let ids = |units: Units| -> Vec<BlockId> {
                (0..tokens.div_ceil(16 * units.each)).map(|index| BlockId { index, generation: 1 }).collect()
            };
            let granted: Vec<BlockId> = to.of(&ids(to)).into_iter().skip(skip as usize).take((wanted - skip) as usize).collect();
            let announced: Vec<(usize, BlockId)> =
                ids(from).into_iter().enumerate().skip((skip / from.each) as usize).collect();
            let sent = from.placed(&announced, skip as usize, wanted as usize);
            prop_assert_eq!(sent.iter().map(|(at, _)| *at).collect::<Vec<_>>(), (0..granted.len()).collect::<Vec<_>>());
            let token = |units: Units, unit: BlockId, at: u32| (unit.index / units.each, unit.index % units.each * 16 + at);
            let mut moved: Vec<_> = sent.iter().flat_map(|(at, source)| {
                let target = granted[*at];
                (0..16).map(move |t| (token(to, target, t), token(from, *source, t)))
            }).filter(|((block, at), _)| block * 16 * to.each + at < tokens).collect();
            let planned = plan(&heads, cut(from), cut(to), tokens, 0..1).unwrap();
            let mut expected: Vec<_> = planned.iter().flat_map(|extent| {
                // Keys alone: values lie behind them in the same order.
                let keys = |block: u32, offset: usize, at: usize| (block, (offset + at) as u32);
                let tokens = extent.bytes() / 2;
                (0..tokens).map(move |at| (keys(extent.to.block, extent.to.offset, at), keys(extent.from.block, extent.from.offset, at)))
            }).filter(|((block, at), _)| block * to.each + at / 16 >= skip && block * 16 * to.each + at < tokens).collect();
            moved.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(moved, expected);
            let most = planned.chunk_by(|a, b| a.to.block == b.to.block).map(<[_]>::len).max().unwrap_or(0);
            prop_assert!(most <= to.each.div_ceil(from.each).max(1) as usize);
        }
    }
}
