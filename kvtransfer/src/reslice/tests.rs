//! The laws, by carrying plans out on ranks whose bytes say what they are.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// What a byte is: (head, layer, half, position, byte in the row), folded. Zero is kept for bytes that nobody wrote.
fn label(head: u32, layer: u32, half: u32, position: u32, byte: u32) -> u64 {
    [head, layer, half, position, byte].into_iter().fold(1, |sum, part| sum * 1009 + part as u64)
}

/// All blocks of all ranks of an end: by (rank, block), a label for every byte.
type Memory = BTreeMap<(u32, u32), Vec<u64>>;

fn memory(heads: &Heads, cut: Cut, tokens: u32, label: impl Fn(u32, u32, u32, u32, u32) -> u64) -> Memory {
    let mut memory = Memory::new();
    for rank in 0..cut.ranks {
        for block in 0..tokens.div_ceil(cut.block_tokens) {
            let mut bytes = Vec::new();
            for head in held(heads, cut, rank) {
                for layer in 0..heads.layers {
                    for half in 0..2 {
                        for position in block * cut.block_tokens..(block + 1) * cut.block_tokens {
                            bytes.extend((0..heads.row_bytes).map(|byte| label(head, layer, half, position, byte)));
                        }
                    }
                }
            }
            memory.insert((rank, block), bytes);
        }
    }
    memory
}

/// Carries a plan out. Fails on a read or write outside a block, and on a byte that is written twice.
fn carry_out(extents: &[Extent], from: &Memory, to: &mut Memory) {
    for extent in extents {
        let source = &from[&(extent.from.rank, extent.from.block)];
        let target = to.get_mut(&(extent.to.rank, extent.to.block)).expect("a block of the destination");
        for (read, write) in extent.runs() {
            for i in 0..extent.run {
                assert_eq!(target[write + i], 0, "written twice: {extent:?}");
                target[write + i] = source[read + i];
            }
        }
    }
}

fn holds(heads: &Heads, from: Cut, to: Cut, tokens: u32, layers: Range<u32>) {
    let extents = plan(heads, from, to, tokens, layers.clone()).expect("plannable");
    let source = memory(heads, from, tokens, label);
    let mut target = memory(heads, to, tokens, |_, _, _, _, _| 0);
    carry_out(&extents, &source, &mut target);
    let whole = from.block_tokens == to.block_tokens;
    let needed = |layer: u32, position: u32| layers.contains(&layer) && (whole || position < tokens);
    let expected = memory(heads, to, tokens, |head, layer, half, position, byte| match needed(layer, position) {
        true => label(head, layer, half, position, byte),
        false => 0,
    });
    assert_eq!(target, expected, "{heads:?} {from:?} {to:?} {tokens} {layers:?}");
    let written = expected.values().flatten().filter(|label| **label != 0).count();
    assert_eq!(extents.iter().map(Extent::bytes).sum::<usize>(), written);
}

const DEGREES: [u32; 4] = [1, 2, 4, 8];

/// Every pair of degrees, fewer heads than ranks included, whole and by layers, in both directions.
#[test]
fn every_pair_of_degrees_keeps_the_laws() {
    for kv_heads in [1, 2, 4, 8, 16] {
        let heads = Heads { kv_heads, layers: 3, row_bytes: 2 };
        for from in DEGREES {
            for to in DEGREES {
                let cut = |ranks| Cut { ranks, block_tokens: 4 };
                holds(&heads, cut(from), cut(to), 13, 0..3);
                holds(&heads, cut(from), cut(to), 13, 1..2);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Blocks of any two sizes, sequences of any length, any range of layers.
    #[test]
    fn different_blocks_keep_the_laws(
        kv_heads in prop::sample::select(vec![1u32, 2, 4, 8]),
        degrees in prop::sample::select(DEGREES.iter().flat_map(|a| DEGREES.map(|b| (*a, b))).collect::<Vec<_>>()),
        blocks in (1u32..9, 1u32..9),
        tokens in 0u32..30,
        layers in (0u32..3, 1u32..4),
        row_bytes in 1u32..4,
    ) {
        let heads = Heads { kv_heads, layers: 3, row_bytes };
        let layers = layers.0..(layers.0 + layers.1).min(3);
        let from = Cut { ranks: degrees.0, block_tokens: blocks.0 };
        let to = Cut { ranks: degrees.1, block_tokens: blocks.1 };
        holds(&heads, from, to, tokens, layers);
    }
}

/// With blocks of one size, what a rank gives another of a block is a single run. A block of the destination is made of
/// as many as it has givers: two from 4 to 2, one from 2 to 4.
#[test]
fn heads_go_as_one_run() {
    let heads = Heads { kv_heads: 8, layers: 24, row_bytes: 256 };
    for from in DEGREES {
        for to in DEGREES {
            let cut = |ranks| Cut { ranks, block_tokens: 16 };
            let extents = plan(&heads, cut(from), cut(to), 64, 0..24).expect("plannable");
            assert!(extents.iter().all(|extent| (extent.outer.count, extent.inner.count) == (1, 1)));
            assert_eq!(extents.len() as u32, 4 * to * (from / to).max(1), "{from} to {to}");
        }
    }
}

/// When either end's block holds a whole number of the other's, a block of the smaller size is one extent for each pair
/// of ranks; otherwise at most two.
#[test]
fn a_block_is_at_most_two_extents_for_a_pair_of_ranks() {
    let heads = Heads { kv_heads: 4, layers: 2, row_bytes: 2 };
    for (small, large) in [(16, 16), (16, 32), (16, 64), (16, 24), (16, 40)] {
        for (from_tokens, to_tokens) in [(small, large), (large, small)] {
            let (from, to) = (Cut { ranks: 4, block_tokens: from_tokens }, Cut { ranks: 2, block_tokens: to_tokens });
            let mut counts: BTreeMap<(u32, u32, u32), usize> = BTreeMap::new();
            for extent in plan(&heads, from, to, 480, 0..2).expect("plannable") {
                let block = if from_tokens == small { extent.from.block } else { extent.to.block };
                *counts.entry((extent.from.rank, extent.to.rank, block)).or_default() += 1;
            }
            let most = if large % small == 0 { 1 } else { 2 };
            assert!(counts.values().all(|count| *count <= most), "{from_tokens} to {to_tokens}");
        }
    }
}

/// Eight ranks hold two heads, four replicas of each: all eight give the same.
#[test]
fn replicas_share_the_reading() {
    let heads = Heads { kv_heads: 2, layers: 2, row_bytes: 4 };
    for to in DEGREES {
        let mut bytes = [0usize; 8];
        let (from, to) = (Cut { ranks: 8, block_tokens: 4 }, Cut { ranks: to, block_tokens: 4 });
        for extent in plan(&heads, from, to, 64, 0..2).expect("plannable") {
            bytes[extent.from.rank as usize] += extent.bytes();
        }
        assert!(bytes.iter().all(|each| *each == bytes[0] && *each > 0), "{to:?}: {bytes:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let heads = Heads { kv_heads: 6, layers: 2, row_bytes: 4 };
    let cut = |ranks| Cut { ranks, block_tokens: 4 };
    let refused = |from, to, layers| plan(&heads, cut(from), cut(to), 8, layers).err();
    assert_eq!(refused(2, 4, 0..2), Some(Unplannable::Ranks { kv_heads: 6, ranks: 4 }));
    assert_eq!(refused(8, 2, 0..2), Some(Unplannable::Ranks { kv_heads: 6, ranks: 8 }));
    assert_eq!(refused(0, 2, 0..2), Some(Unplannable::Empty));
    assert_eq!(refused(2, 2, 1..3), Some(Unplannable::Layers(1..3)));
    assert_eq!(refused(2, 12, 0..2), None);
}
