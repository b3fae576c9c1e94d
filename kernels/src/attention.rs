//! What attention works on: heads, spans of rows, and the two operations' arguments.

use baton_core::{Arena, BlockLayout, KvDtype};

use crate::RopeTable;

/// Positions per logical block: the unit of softmax, counted from position 0 whatever the cache's block size.
pub(crate) const BLOCK: usize = 64;
/// Widest head whose keys and values can be whole numbers of 8 bits.
pub const HEAD_DIM_MAX: usize = 256;

/// Shape of one layer's attention. A qkv row is (q heads | k heads | v heads) × head_dim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl Heads {
    /// Width of a qkv row.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Width of attention's output.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Query heads that read one KV head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// `first` is the arena's kv head that is this one's number 0.
    pub(crate) fn check(&self, first: usize, layout: &BlockLayout) {
        assert!(self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), "heads do not divide by kv heads");
        assert!(self.head_dim.is_multiple_of(2), "an odd head_dim");
        let within = first + self.kv_heads <= layout.kv_heads as usize && layout.head_dim as usize == self.head_dim;
        assert!(within, "the arena's blocks have another shape: {}", layout.describe());
    }
}

/// Which of the arena's kv heads an operation works on; a rank of a group has some of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvHeads {
    /// The arena's kv head that is the operation's number 0.
    pub first: usize,
    /// Another rank has these heads too and writes them.
    pub foreign: bool,
}

/// A run of consecutive rows of a batch that belong to one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// First row.
    pub row: usize,
    pub rows: usize,
    /// Position of the first row in its sequence.
    pub position: usize,
    /// The sequence's block table, from position 0.
    pub blocks: &'a [u32],
}

impl Span<'_> {
    pub(crate) fn check(&self, rows: usize, arena: &Arena, layer: usize) {
        let layout = arena.layout();
        assert!(self.row + self.rows <= rows, "span ends at row {} of {rows}", self.row + self.rows);
        assert!(layer < layout.layers as usize, "layer {layer} of {}", layout.layers);
        let held = self.blocks.len() * layout.block_tokens as usize;
        assert!(self.position + self.rows <= held, "span ends at position {} of {held}", self.position + self.rows);
        assert!(self.blocks.iter().all(|&block| (block as usize) < arena.blocks()), "a block outside the arena");
    }
}

/// Arguments of `Cpu::rope_store`. The caller holds the written positions' blocks as reserved.
#[derive(Clone, Copy)]
pub struct RopeStore<'a> {
    pub heads: Heads,
    pub kv: KvHeads,
    pub layer: usize,
    pub spans: &'a [Span<'a>],
    pub rope: &'a RopeTable,
    /// RMS norm of each q head before rotation (Qwen3), head_dim weights.
    pub q_norm: Option<&'a [f32]>,
    pub k_norm: Option<&'a [f32]>,
    pub eps: f32,
}

/// Arguments of `Cpu::attention`. The caller holds the spans' blocks; positions up to each row's own are written.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    pub heads: Heads,
    pub kv: KvHeads,
    pub layer: usize,
    pub spans: &'a [Span<'a>],
    /// Factor of the scores, usually 1/sqrt(head_dim).
    pub scale: f32,
    /// Positions a row sees at most, its own included; None is all.
    pub window: Option<usize>,
}

impl RopeStore<'_> {
    /// Panics unless everything the operation touches exists.
    pub(crate) fn check(&self, qkv: usize, arena: &Arena) {
        self.heads.check(self.kv.first, arena.layout());
        let (dim, rows) = (self.heads.head_dim, qkv / self.heads.qkv_width());
        assert_eq!(qkv, rows * self.heads.qkv_width(), "qkv does not fit its width");
        assert!(self.rope.rotated() <= dim, "rotations wider than a head");
        assert!([self.q_norm, self.k_norm].into_iter().flatten().all(|norm| norm.len() == dim), "norm width");
        for span in self.spans {
            span.check(rows, arena, self.layer);
            assert!(span.position + span.rows <= self.rope.positions(), "a position past the rotation table");
        }
    }
}

impl Attention<'_> {
    /// Panics unless everything the operation touches exists.
    pub(crate) fn check(&self, qkv: usize, out: usize, arena: &Arena) {
        self.heads.check(self.kv.first, arena.layout());
        let rows = qkv / self.heads.qkv_width();
        assert_eq!(qkv, rows * self.heads.qkv_width(), "qkv does not fit its width");
        assert_eq!(out, rows * self.heads.width(), "outputs do not fit (rows, heads·head_dim)");
        assert!(self.window != Some(0), "an empty window");
        // Sums of so many products of 8 and 16 bits fit 32.
        let fits = arena.layout().dtype != KvDtype::Int8 || self.heads.head_dim <= HEAD_DIM_MAX;
        assert!(fits, "heads of {} are too wide for 8 bits", self.heads.head_dim);
        self.spans.iter().for_each(|span| span.check(rows, arena, self.layer));
    }

    /// First position that the row at `position` sees.
    pub(crate) fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}
