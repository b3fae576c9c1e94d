//! Which bytes go where when the two ends cut a model's kv heads, or its blocks, differently. Pure: shapes in, extents
//! out; who carries them is not its business.
//!
//! ```text
//! block of a rank = (kv_head of the rank, layer, K|V, token, head_dim)          head outermost (`core::arena`)
//! rank r of n holds heads r*H/n .. (r+1)*H/n                                    n <= H
//!             holds head  r*H/n, as do the n/H - 1 others beside it             n >  H: replicated
//! ```
//! Because heads are outermost, the heads that one rank gives another are one run of bytes in a block, for every pair of
//! degrees. A range of layers, or blocks of another size, makes that run a regular pattern of shorter ones, still one
//! extent.

use std::ops::Range;

/// What the ranks of both ends hold together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub kv_heads: u32,
    pub layers: u32,
    /// Bytes of one head's key or value of one token.
    pub row_bytes: u32,
}

/// How one end cuts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Tensor-parallel degree.
    pub ranks: u32,
    pub block_tokens: u32,
}

/// Bytes of one block of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    pub rank: u32,
    /// Index in the sequence's blocks.
    pub block: u32,
    /// Bytes from the block's start to the first run.
    pub offset: usize,
}

/// A dimension of a pattern: so many times, so many bytes apart at either end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub count: usize,
    pub from: usize,
    pub to: usize,
}

/// `outer.count * inner.count` runs of `run` bytes, from one block to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub from: At,
    pub to: At,
    pub outer: Step,
    pub inner: Step,
    pub run: usize,
}

/// Why two ends cannot be planned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unplannable {
    #[error("{kv_heads} kv heads are neither a multiple of {ranks} ranks nor divide them; choose a degree that fits")]
    Ranks { kv_heads: u32, ranks: u32 },
    #[error("a shape with a zero in it holds nothing")]
    Empty,
    #[error("layers {0:?} are not of the model")]
    Layers(Range<u32>),
}

/// Everything that the ranks of `to` need of a sequence's first `tokens` positions in `layers`, in the order of
/// destination ranks and blocks. Laws: each needed destination byte is written exactly once, only bytes that a source
/// rank holds are read, and replicas of a head share the reading. Blocks of equal size are taken whole, the last one too.
pub fn plan(heads: &Heads, from: Cut, to: Cut, tokens: u32, layers: Range<u32>) -> Result<Vec<Extent>, Unplannable> {
    check(heads, from, to, &layers)?;
    let tokens = match from.block_tokens == to.block_tokens {
        true => tokens.next_multiple_of(to.block_tokens),
        false => tokens,
    };
    let mut extents = Vec::new();
    for rank in 0..to.ranks {
        let needed = held(heads, to, rank);
        for block in 0..tokens.div_ceil(to.block_tokens) {
            let positions = block * to.block_tokens..tokens.min((block + 1) * to.block_tokens);
            for source in sources(heads, from, &needed, rank + block) {
                for piece in pieces(from, &positions) {
                    extents.push(extent(heads, [from, to], [source.rank, rank], &source.heads, &piece, &layers));
                }
            }
        }
    }
    Ok(extents)
}

fn check(heads: &Heads, from: Cut, to: Cut, layers: &Range<u32>) -> Result<(), Unplannable> {
    let numbers =
        [heads.kv_heads, heads.layers, heads.row_bytes, from.ranks, to.ranks, from.block_tokens, to.block_tokens];
    if numbers.contains(&0) {
        return Err(Unplannable::Empty);
    }
    if layers.is_empty() || layers.end > heads.layers {
        return Err(Unplannable::Layers(layers.clone()));
    }
    let kv_heads = heads.kv_heads;
    let odd = |ranks: &u32| !kv_heads.is_multiple_of(*ranks) && !ranks.is_multiple_of(kv_heads);
    match [from.ranks, to.ranks].into_iter().find(odd) {
        Some(ranks) => Err(Unplannable::Ranks { kv_heads, ranks }),
        None => Ok(()),
    }
}

/// Heads of a rank.
fn held(heads: &Heads, cut: Cut, rank: u32) -> Range<u32> {
    let first = (rank as u64 * heads.kv_heads as u64 / cut.ranks as u64) as u32;
    first..first + (heads.kv_heads / cut.ranks).max(1)
}

struct Source {
    rank: u32,
    heads: Range<u32>,
}

/// The ranks that give `needed`, each head once. `turn` picks among replicas.
fn sources(heads: &Heads, from: Cut, needed: &Range<u32>, turn: u32) -> Vec<Source> {
    if from.ranks > heads.kv_heads {
        let replicas = from.ranks / heads.kv_heads;
        let one = |head: u32| Source { rank: head * replicas + (turn + head) % replicas, heads: head..head + 1 };
        return needed.clone().map(one).collect();
    }
    let each = heads.kv_heads / from.ranks;
    let ranks = needed.start / each..needed.end.div_ceil(each);
    let part = |rank: u32| {
        let theirs = held(heads, from, rank);
        Source { rank, heads: theirs.start.max(needed.start)..theirs.end.min(needed.end) }
    };
    ranks.map(part).collect()
}

/// Positions cut where a source block ends.
fn pieces(from: Cut, positions: &Range<u32>) -> Vec<Range<u32>> {
    let blocks = positions.start / from.block_tokens..positions.end.div_ceil(from.block_tokens);
    let part =
        |block: u32| positions.start.max(block * from.block_tokens)..positions.end.min((block + 1) * from.block_tokens);
    blocks.map(part).collect()
}

/// `heads` of `layers` at `positions`, which lie in one block at either end.
fn extent(
    all: &Heads,
    cuts: [Cut; 2],
    ranks: [u32; 2],
    heads: &Range<u32>,
    positions: &Range<u32>,
    layers: &Range<u32>,
) -> Extent {
    let row = all.row_bytes as usize;
    // Bytes of (token, head_dim), and of all (layer, K|V) of a head.
    let half = cuts.map(|cut| cut.block_tokens as usize * row);
    let head = half.map(|half| all.layers as usize * 2 * half);
    let at = |end: usize| {
        let first = held(all, cuts[end], ranks[end]).start;
        let offset = (heads.start - first) as usize * head[end]
            + layers.start as usize * 2 * half[end]
            + (positions.start % cuts[end].block_tokens) as usize * row;
        At { rank: ranks[end], block: positions.start / cuts[end].block_tokens, offset }
    };
    let extent = Extent {
        from: at(0),
        to: at(1),
        outer: Step { count: heads.len(), from: head[0], to: head[1] },
        inner: Step { count: layers.len() * 2, from: half[0], to: half[1] },
        run: positions.len() * row,
    };
    extent.coalesced()
}

impl Extent {
    /// The same bytes in as few runs as possible.
    fn coalesced(mut self) -> Extent {
        let joins = |step: Step, run: usize| step.count == 1 || (step.from == run && step.to == run);
        let once = Step { count: 1, from: 0, to: 0 };
        if joins(self.inner, self.run) {
            (self.run, self.inner) = (self.run * self.inner.count, self.outer);
            self.outer = once;
            if joins(self.inner, self.run) {
                (self.run, self.inner) = (self.run * self.inner.count, once);
            }
        }
        self
    }

    /// Bytes it moves.
    pub fn bytes(&self) -> usize {
        self.outer.count * self.inner.count * self.run
    }

    /// (offset in the source block, offset in the destination block) of every run.
    pub fn runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        (0..self.outer.count).flat_map(move |outer| {
            (0..self.inner.count).map(move |inner| {
                let from = self.from.offset + outer * self.outer.from + inner * self.inner.from;
                (from, self.to.offset + outer * self.outer.to + inner * self.inner.to)
            })
        })
    }
}

#[cfg(test)]
mod tests;
