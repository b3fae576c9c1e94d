//! A batch's rows on the GPU, and the operations that follow block tables: rotation with the cache's write, and attention.

use std::ops::Range;

use super::error::GpuError;
use super::gpu::{Gpu, GpuArena};
use super::launch::{self, ATTENTIONS, BLOCK, DECODE_HEADS, Decode, HEAD_DIMS, PREFILL_ROWS, Tile};
use super::memory::{Floats, Memory, Rows};
use crate::{Heads, Span};

/// Bytes of decode's partials at a time, unless one sequence alone has more.
const PARTIAL_BYTES: usize = 64 << 20;

/// Where each row of a batch belongs. Made once and filled for every step.
///
/// ```text
/// memory = tokens | positions | where each row's block table begins | tiles | decodes | block tables
/// ```
pub struct GpuSpans {
    memory: Memory,
    partials: Memory,
    values: Memory,
    rows: usize,
    token_last: u32,
    position_last: usize,
    tables: Vec<u32>,
    plan: Plan,
}

/// What attention launches: spans of one row are decoded, all others prefilled.
#[derive(Clone, Debug, Default, PartialEq)]
struct Plan {
    tiles: Vec<Tile>,
    decodes: Vec<Decode>,
    /// Of the decodes, those whose partials fit together, with at least the most blocks one of them has and those of all.
    groups: Vec<(Range<usize>, usize, usize)>,
}

impl Plan {
    /// `tables` says where each span's block table begins. Blocks before a window are left out when every layer has it.
    fn new(spans: &[Span], tables: &[u32], heads: &Heads) -> Plan {
        let mut plan = Plan::default();
        let tokens = PREFILL_ROWS / heads.group();
        for (span, table) in spans.iter().zip(tables) {
            if span.rows == 1 {
                let (row, position) = (span.row as u32, span.position as u32);
                plan.decodes.push(Decode { row, position, table: *table, at: 0 });
                continue;
            }
            for first in (0..span.rows).step_by(tokens) {
                let rows = tokens.min(span.rows - first) as u32;
                let (row, position) = ((span.row + first) as u32, (span.position + first) as u32);
                plan.tiles.push(Tile { row, rows, position, table: *table });
            }
        }
        let blocks_max = PARTIAL_BYTES / (heads.heads * (heads.head_dim + 2) * 4);
        plan.group(blocks_max);
        plan
    }

    fn group(&mut self, blocks_max: usize) {
        let (mut first, mut most, mut all) = (0, 0, 0);
        for index in 0..self.decodes.len() {
            let blocks = self.decodes[index].position as usize / BLOCK + 1;
            if all > 0 && all + blocks > blocks_max {
                self.groups.push((first..index, launched_blocks(most), all));
                (first, most, all) = (index, 0, 0);
            }
            self.decodes[index].at = all as u32;
            (most, all) = (most.max(blocks), all + blocks);
        }
        if all > 0 {
            self.groups.push((first..self.decodes.len(), launched_blocks(most), all));
        }
    }
}

/// Blocks that are launched where a sequence has `most`: somewhat more, so that the launches of a sequence that grows stay the
/// same for a while. Thread blocks behind a sequence's end leave at once.
fn launched_blocks(most: usize) -> usize {
    most.next_multiple_of((most / 8).next_power_of_two().max(4))
}

/// Arguments of `Gpu::rope_store`.
pub struct GpuRope<'a> {
    pub heads: Heads,
    pub layer: usize,
    pub eps: f32,
    /// (position, cos then sin, head_dim / 2)
    pub rotations: &'a Floats,
    pub q_norm: Option<&'a Floats>,
    pub k_norm: Option<&'a Floats>,
}

/// Arguments of `Gpu::attention`.
#[derive(Clone, Copy)]
pub struct GpuAttention {
    pub heads: Heads,
    pub layer: usize,
    pub scale: f32,
    pub window: Option<usize>,
}

impl GpuSpans {
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn tokens_below(&self, count: usize) -> bool {
        self.rows == 0 || (self.token_last as usize) < count
    }

    pub(crate) fn tokens_at(&self) -> u64 {
        self.memory.at()
    }

    fn positions_at(&self) -> u64 {
        self.memory.at() + 4 * self.rows as u64
    }

    fn table_starts_at(&self) -> u64 {
        self.memory.at() + 8 * self.rows as u64
    }

    fn tiles_at(&self) -> u64 {
        self.memory.at() + 12 * self.rows as u64
    }

    fn decodes_at(&self) -> u64 {
        self.tiles_at() + (size_of::<Tile>() * self.plan.tiles.len()) as u64
    }

    fn tables_at(&self) -> u64 {
        self.decodes_at() + (size_of::<Decode>() * self.plan.decodes.len()) as u64
    }

    /// All that launches over this batch depend on, if every span is one row: batches with the same shape take the same launches,
    /// and differ only in what lies in memory. None for others.
    pub fn shape(&self) -> Option<Vec<u64>> {
        if !self.plan.tiles.is_empty() {
            return None;
        }
        let mut shape = vec![self.rows as u64, self.memory.at(), self.partials.at(), self.values.at()];
        for (range, blocks, _) in &self.plan.groups {
            shape.extend([range.start, range.end, *blocks].map(|n| n as u64));
        }
        Some(shape)
    }
}

impl Gpu {
    pub fn spans(&self) -> Result<GpuSpans, GpuError> {
        let small = || Memory::new(&self.driver, 1);
        let (memory, partials, values, plan) = (small()?, small()?, small()?, Plan::default());
        let (rows, token_last, position_last, tables) = (0, 0, 0, Vec::new());
        Ok(GpuSpans { memory, partials, values, rows, token_last, position_last, tables, plan })
    }

    /// Describes a batch: one token per row, the rows of the spans one after another.
    ///
    /// # Panics
    /// If the spans do not follow one another or a block table is too short.
    pub fn describe(
        &self,
        to: &mut GpuSpans,
        tokens: &[u32],
        spans: &[Span],
        heads: &Heads,
        arena: &GpuArena,
    ) -> Result<(), GpuError> {
        let block_tokens = arena.layout().block_tokens as usize;
        let (mut positions, mut starts, mut tables, mut span_starts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for span in spans {
            assert_eq!(span.row, positions.len(), "spans follow one another");
            assert!(span.position + span.rows <= span.blocks.len() * block_tokens, "a block table that is too short");
            span_starts.push(tables.len() as u32);
            positions.extend((span.position..span.position + span.rows).map(|position| position as u32));
            starts.resize(positions.len(), tables.len() as u32);
            tables.extend_from_slice(span.blocks);
        }
        assert_eq!(positions.len(), tokens.len(), "one token per row");
        arena.check(&tables);
        let plan = Plan::new(spans, &span_starts, heads);
        to.rows = tokens.len();
        to.token_last = tokens.iter().copied().max().unwrap_or(0);
        to.position_last = positions.iter().copied().max().unwrap_or(0) as usize;
        let mut bytes = launch::bytes_of(&[tokens, &positions, &starts].concat()).to_vec();
        bytes.extend_from_slice(launch::bytes_of(&plan.tiles));
        bytes.extend_from_slice(launch::bytes_of(&plan.decodes));
        bytes.extend_from_slice(launch::bytes_of(&tables));
        to.tables = tables;
        to.plan = plan;
        to.memory.ensure(bytes.len())?;
        to.memory.write(0, &bytes)?;
        let most = to.plan.groups.iter().map(|group| group.2).max().unwrap_or(0);
        to.partials.ensure(most * heads.heads * 8)?;
        to.values.ensure(most * heads.heads * heads.head_dim * 4)
    }

    /// Optional qk-norm and rotation; q goes into `q`, rounded, k and v into the arena.
    pub fn rope_store(
        &self,
        a: &GpuRope,
        spans: &GpuSpans,
        qkv: &Floats,
        q: &mut Rows,
        arena: &mut GpuArena,
    ) -> Result<(), GpuError> {
        a.heads.check(0, arena.layout());
        let (rows, dim) = (spans.rows(), a.heads.head_dim);
        q.check(rows, a.heads.width());
        assert!(qkv.len() >= rows * a.heads.qkv_width(), "qkv does not fit its width");
        assert!(spans.rows == 0 || (spans.position_last + 1) * dim <= a.rotations.len(), "a position past the table");
        assert!(a.layer < arena.layout().layers as usize, "layer {} of {}", a.layer, arena.layout().layers);
        assert!([a.q_norm, a.k_norm].into_iter().flatten().all(|norm| norm.len() == dim), "norm width");
        let arguments = launch::Rope {
            layout: arena.shape(),
            layer: a.layer as u32,
            heads: a.heads.heads as u32,
            eps: a.eps,
            q_stride: q.stride(),
        };
        let norm = |norm: Option<&Floats>| norm.map_or(0, Floats::at);
        let (turns, q_norm, k_norm) = (a.rotations.at(), norm(a.q_norm), norm(a.k_norm));
        let (positions, starts, tables) = (spans.positions_at(), spans.table_starts_at(), spans.tables_at());
        let (qkv, q, memory) = (qkv.at(), q.at(), arena.memory.at());
        let all: [&dyn launch::Argument; 10] =
            [&arguments, &qkv, &positions, &starts, &tables, &turns, &q_norm, &k_norm, &q, &memory];
        let heads = a.heads.heads + 2 * a.heads.kv_heads;
        self.launch(launch::ROPE_STORE, [rows, heads.div_ceil(launch::ROPE_STORE.threads as usize / 32), 1], &all)
    }

    /// Causal attention of the spans' rows over their sequences.
    pub fn attention(
        &self,
        a: &GpuAttention,
        spans: &GpuSpans,
        q: &Rows,
        arena: &GpuArena,
        out: &mut Rows,
    ) -> Result<(), GpuError> {
        a.heads.check(0, arena.layout());
        q.check(spans.rows(), a.heads.width());
        out.check(spans.rows(), a.heads.width());
        assert!(a.window != Some(0) && q.stride() == out.stride(), "an empty window");
        assert!(a.scale > 0.0, "a scale that is not positive");
        let Some(index) = HEAD_DIMS.iter().position(|dim| *dim == a.heads.head_dim) else {
            return Err(GpuError::HeadDim { found: a.heads.head_dim, supported: HEAD_DIMS });
        };
        let [prefill, decode] = ATTENTIONS[index];
        let arguments = launch::Attention {
            layout: arena.shape(),
            layer: a.layer as u32,
            heads: a.heads.heads as u32,
            group: a.heads.group() as u32,
            scale: a.scale,
            // A window longer than any sequence is none.
            window: a.window.and_then(|window| u32::try_from(window).ok()).unwrap_or(0),
            stride: q.stride(),
        };
        let (kv_heads, group) = (a.heads.kv_heads, a.heads.group());
        let (q, memory, tables, to) = (q.at(), arena.memory.at(), spans.tables_at(), out.at());
        let tiles = spans.tiles_at();
        let grid = [spans.plan.tiles.len(), kv_heads, 1];
        self.launch(prefill, grid, &[&arguments, &q, &memory, &tables, &tiles, &to])?;
        let (partials, values) = (spans.partials.at(), spans.values.at());
        let merge = super::driver::Kernel { name: launch::MERGE, threads: a.heads.head_dim as u32, shared: 0 };
        for (range, blocks, _) in &spans.plan.groups {
            let rows = spans.decodes_at() + (range.start * size_of::<Decode>()) as u64;
            let grid = [*blocks, kv_heads * group.div_ceil(DECODE_HEADS), range.len()];
            self.launch(decode, grid, &[&arguments, &q, &memory, &tables, &rows, &partials, &values])?;
            let grid = [a.heads.heads, range.len(), 1];
            self.launch(merge, grid, &[&arguments, &rows, &partials, &values, &to])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row lies in one tile or is one decode, and partials of a group do not overlap.
    #[test]
    fn a_plan_covers_every_row_once() {
        let heads = Heads { heads: 6, kv_heads: 2, head_dim: 64 };
        let table: Vec<u32> = (0..4096).collect();
        let shapes = [(0, 50, 13), (50, 1, 700), (51, 1, 0), (52, 64, 1), (116, 1, 64_000), (117, 21, 0)];
        let spans = shapes.map(|(row, rows, position)| Span { row, rows, position, blocks: &table });
        let plan = Plan::new(&spans, &[0; 6], &heads);
        let mut covered = vec![0; 138];
        for tile in &plan.tiles {
            assert!(tile.rows as usize * heads.group() <= PREFILL_ROWS);
            (tile.row..tile.row + tile.rows).for_each(|row| covered[row as usize] += 1);
        }
        plan.decodes.iter().for_each(|decode| covered[decode.row as usize] += 1);
        assert!(covered.iter().all(|count| *count == 1));
        let mut plan = plan;
        plan.groups.clear();
        plan.group(20);
        let lens: Vec<usize> = plan.groups.iter().map(|group| group.0.len()).collect();
        assert_eq!(lens, [2, 1], "a long sequence is alone");
        assert_eq!(plan.decodes.iter().map(|decode| decode.at).collect::<Vec<_>>(), [0, 11, 0]);
        assert_eq!(plan.groups[1], (2..3, 1024, 1001));
    }
}
