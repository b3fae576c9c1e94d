//! What one step computes, complete in itself: a backend needs nothing but the batch, its weights and the arena.

use std::ops::Range;
use std::sync::Arc;

use baton_core::{Arena, BlockId, Request, RequestId, SampledToken, TokenId};

use crate::cache::{Blocks, Cache};
use crate::sampling::Seen;
use crate::sequence::Rank;

/// One step. A row is one token position of one sequence.
pub struct Batch {
    cache: Cache,
    /// One token per row.
    pub tokens: Vec<TokenId>,
    /// Runs of consecutive rows, one per sequence.
    pub spans: Vec<Span>,
    /// Block tables of all spans, one after another.
    pub tables: Vec<u32>,
    /// What to read off the logits, in the order of `Output::drawn`. Rows never decrease.
    pub draws: Vec<Draw>,
    copies: Vec<BlockCopy>,
    exports: Vec<Export>,
}

/// The rows of one sequence.
#[derive(Clone, Debug)]
pub struct Span {
    pub(crate) rank: Rank,
    pub row: usize,
    pub rows: usize,
    /// Position in the sequence of the first row.
    pub position: usize,
    /// The sequence's block table, from position 0 on, in `Batch::tables`.
    pub table: Range<usize>,
    pub(crate) draws: Range<usize>,
    /// Its last rows, whose tokens are a draft.
    pub drafted: usize,
}

/// One thing to read off a row's logits.
#[derive(Clone, Debug)]
pub struct Draw {
    pub row: usize,
    pub kind: DrawKind,
}

#[derive(Clone, Debug)]
pub enum DrawKind {
    /// Sample the token that follows the row.
    Next(Next),
    /// Report how likely `token` was after the row, with `top` alternatives.
    Given { token: TokenId, top: u32 },
}

/// Everything that decides a sampled token besides the logits.
#[derive(Clone, Debug)]
pub struct Next {
    pub request: Arc<Request>,
    pub choice: u32,
    /// Position of the new token in the sequence.
    pub position: u32,
    /// Tokens that must not come yet (`tokens_min`).
    pub banned: Arc<[TokenId]>,
    /// Tokens so far, when a penalty needs them.
    pub seen: Option<Arc<Seen>>,
}

struct BlockCopy {
    from: Blocks,
    to: BlockId,
}

/// Blocks of a Prefill-goal sequence that are complete after this batch, layer by layer as the backend reports them.
#[derive(Clone, Debug)]
pub struct Export {
    pub request: RequestId,
    /// (index in the sequence, block). Never announced twice.
    pub blocks: Vec<(usize, BlockId)>,
    /// Keeps the blocks from being given out anew while they are sent, whatever happens to the sequence.
    pub guard: Blocks,
    /// They are read where they were computed: they need not be in the arena.
    pub on_device: bool,
}

/// What a backend found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Output {
    /// One per `Batch::draws`.
    pub drawn: Vec<SampledToken>,
}

impl Batch {
    pub(crate) fn new(cache: Cache) -> Batch {
        let (tokens, spans, tables, draws) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Batch { cache, tokens, spans, tables, draws, copies: Vec::new(), exports: Vec::new() }
    }

    /// No rows: there is nothing to compute, only events to collect by `commit`.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    pub fn arena(&self) -> &Arc<Arena> {
        self.cache.arena()
    }

    /// Blocks that others than a backend have filled since this was last asked: what a device with memory of its own has
    /// to take in before it computes. The guard keeps them as they are.
    pub fn arrived(&self) -> Blocks {
        self.cache.arrived()
    }

    /// Blocks that sequences are about to write while others still read them, as (from, to).
    pub fn copies(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.copies.iter().map(|copy| (copy.from.ids()[0].index, copy.to.index))
    }

    pub fn exports(&self) -> &[Export] {
        &self.exports
    }

    /// Block table of a span.
    pub fn table(&self, span: &Span) -> &[u32] {
        &self.tables[span.table.clone()]
    }

    pub(crate) fn copy(&mut self, from: Blocks, to: BlockId) {
        self.copies.push(BlockCopy { from, to });
    }

    pub(crate) fn export(&mut self, request: RequestId, first: usize, guard: Blocks, on_device: bool) {
        let blocks = guard.ids().iter().enumerate().map(|(i, id)| (first + i, *id)).collect();
        self.exports.push(Export { request, blocks, guard, on_device });
    }

    /// Copies the blocks that sequences are about to write while others still read them. A backend's first act.
    pub fn copy_shared_blocks(&self) {
        let arena = self.arena();
        let bytes = arena.layout().block_bytes();
        for (from, to) in self.copies() {
            let (from, to) = (arena.block(from), arena.block(to));
            // SAFETY: `from` is held filled by the guard in `copy`; `to` belongs to one sequence of this batch, which
            // the scheduler gave it as a fresh block, so nobody else reads or writes it.
            unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        }
    }
}
