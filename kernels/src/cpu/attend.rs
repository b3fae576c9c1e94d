//! Attention over paged KV. Work is cut into tiles: some rows of one span, all query heads of one KV head, so that keys
//! and values are read once for the group. Per logical block of 64 positions a tile lays keys and values out as matmul
//! panels and runs the matmul's own tiles over them; rows then merge the block's partial in block order.
//!
//! ```text
//! tile row = (position, query head of the group);  scores (tile row, 64) = q · keys panel
//! panel of keys: (head_dim step, 64 positions); of values: (position step, 64 dims), one per 64 dims
//! ```
//! Rows in 8 bits are laid out without their scales: a position's score is multiplied with its key's scale, and its
//! exponential with its value's. Over whole numbers queries and those weights become whole numbers, too, so that products
//! are summed exactly.

use std::marker::PhantomData;
use std::ops::Range;

use baton_core::Arena;
use baton_core::arena::{Half, KvDtype};

use super::lanes::{Kernel, Lanes, exp};
use super::matmul::{Ahead, Block, Dot, Fours, Full, Pairs, transpose, widen_steps};
use super::rows::sum64;
use super::scaled::{self, Whole};
use super::{Out, get, put};
use crate::attention::BLOCK;
use crate::packed::PANEL;
use crate::{Attention, Span, bf16, kv};

/// Tile rows aimed at: enough to make laying out a block's panels cheap.
const TILE_ROWS: usize = 96;
/// What laying out one block costs, in tile rows.
const LAYOUT_COST: usize = 12;

/// Some rows of one span for one KV head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile {
    span: usize,
    /// Rows within the span.
    row: usize,
    rows: usize,
    kv_head: usize,
    /// Blocks visited × rows, about.
    cost: usize,
}

/// All tiles of a batch, in order.
pub(crate) fn tiles(a: &Attention) -> Vec<Tile> {
    let group = a.heads.group();
    let step = (TILE_ROWS / group).max(1);
    let mut tiles = Vec::new();
    for (index, span) in a.spans.iter().enumerate() {
        for kv_head in 0..a.heads.kv_heads {
            for row in (0..span.rows).step_by(step) {
                let rows = step.min(span.rows - row);
                let first = a.first(span.position + row) / BLOCK;
                let blocks = (span.position + row + rows - 1) / BLOCK + 1 - first;
                let cost = blocks * (rows * group + LAYOUT_COST);
                tiles.push(Tile { span: index, row, rows, kv_head, cost });
            }
        }
    }
    tiles
}

pub(crate) fn cost(tiles: &[Tile]) -> usize {
    tiles.iter().map(|tile| tile.cost).sum()
}

/// The contiguous range of tiles that part `index` of `of` computes: those whose middle falls into its share of the cost.
pub(crate) fn share(tiles: &[Tile], index: usize, of: usize) -> Range<usize> {
    let total = 2 * cost(tiles).max(1);
    let mut range = tiles.len()..tiles.len();
    let mut before = 0;
    for (i, tile) in tiles.iter().enumerate() {
        let part = (2 * before + tile.cost) * of / total;
        if part >= index {
            range.start = range.start.min(i);
        }
        if part > index {
            range.end = range.end.min(i);
        }
        before += tile.cost;
    }
    range
}

/// Words of scratch that a tile needs, and where its parts begin.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    dtype: KvDtype,
    /// Bytes of one key or value.
    row_bytes: usize,
    /// Words of its elements.
    words: usize,
    /// Panels of values.
    panels: usize,
    /// Rows of a full tile.
    rows: usize,
}

impl Plan {
    pub(crate) fn new(a: &Attention, arena: &Arena) -> Plan {
        let group = a.heads.group();
        let dtype = arena.layout().dtype;
        Plan {
            dtype,
            row_bytes: arena.layout().row_bytes(),
            // Where the last word is not whole, the scale fills it.
            words: (a.heads.head_dim * dtype.bytes()).div_ceil(4),
            panels: a.heads.head_dim.div_ceil(PANEL),
            rows: ((TILE_ROWS / group).max(1) * group).next_multiple_of(16),
        }
    }

    pub(crate) fn scratch_words(&self) -> usize {
        let dims = self.panels * PANEL;
        // q (as f32 at most), scores, exponentials, partial values, values, ten numbers per row; both panels; scales; zeros.
        self.rows * (dims + BLOCK + BLOCK + PANEL + dims + 10) + 2 * dims * BLOCK + 2 * BLOCK + 2 * dims + BLOCK * 4
    }
}

/// The parts of a tile's scratch. Rows of numbers are padded to whole vectors.
struct Scratch {
    q: *mut u32,
    scores: *mut f32,
    weights: *mut u32,
    partial: *mut f32,
    values: *mut f32,
    max: *mut f32,
    sum: *mut f32,
    block_max: *mut f32,
    block_sum: *mut f32,
    old: *mut f32,
    new: *mut f32,
    /// What a row's q, and its weights in the block, mean as whole numbers (`Whole`).
    q_factor: *mut f32,
    q_excess: *mut i32,
    weight_factor: *mut f32,
    weight_excess: *mut i32,
    key_panel: *mut u32,
    value_panels: *mut u32,
    /// Of the block's positions: what scores and exponentials are multiplied with, where rows have scales.
    key_scales: *mut f32,
    value_scales: *mut f32,
    zeros: *mut u32,
}

/// Some tiles of attention.
pub(crate) struct Attend<'a, D> {
    pub(crate) a: &'a Attention<'a>,
    pub(crate) qkv: &'a [f32],
    pub(crate) arena: &'a Arena,
    pub(crate) out: Out<f32>,
    pub(crate) tiles: &'a [Tile],
    pub(crate) plan: Plan,
    /// At least `plan.scratch_words()`, initialised.
    pub(crate) scratch: &'a mut [f32],
    pub(crate) dot: PhantomData<D>,
}

/// How a block's operands are laid out for a dot.
pub(crate) trait Operands: Dot {
    /// Both operands are bf16 pairs.
    const PAIRED: bool = Self::STEP == 2;
    /// Both are whole numbers: bytes, and two planes of bytes, one for each of two dots.
    const WHOLE: bool = Self::STEP == 4;
    /// Positions per step over values, dims per step over keys.
    const STEP: usize;
}

impl Operands for Pairs {
    const STEP: usize = 2;
}

impl Operands for Full {
    const STEP: usize = 1;
}

impl Operands for Fours {
    const STEP: usize = 4;
}

// SAFETY (of each block below): `Kernel::run`'s contract; the scratch has room for a full tile by `Plan`.

impl<D: Operands> Kernel for Attend<'_, D> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        unsafe {
            let scratch = self.split();
            std::slice::from_raw_parts_mut(scratch.zeros, self.plan.words).fill(0);
            for tile in self.tiles {
                self.tile::<L>(tile, &scratch);
            }
        }
    }
}

impl<D: Operands> Attend<'_, D> {
    fn split(&self) -> Scratch {
        assert!(self.scratch.len() >= self.plan.scratch_words());
        let mut rest = self.scratch.as_ptr().cast_mut();
        let mut take = |words: usize| {
            let part = rest;
            rest = rest.wrapping_add(words);
            part
        };
        let (rows, dims) = (self.plan.rows, self.plan.panels * PANEL);
        Scratch {
            key_panel: take(dims * BLOCK).cast(),
            value_panels: take(dims * BLOCK).cast(),
            scores: take(rows * BLOCK),
            weights: take(rows * BLOCK).cast(),
            partial: take(rows * PANEL),
            values: take(rows * dims),
            q: take(rows * dims).cast(),
            max: take(rows),
            sum: take(rows),
            block_max: take(rows),
            block_sum: take(rows),
            old: take(rows),
            new: take(rows),
            q_factor: take(rows),
            q_excess: take(rows).cast(),
            weight_factor: take(rows),
            weight_excess: take(rows).cast(),
            key_scales: take(BLOCK),
            value_scales: take(BLOCK),
            zeros: take(2 * dims).cast(),
        }
    }

    #[inline(always)]
    unsafe fn tile<L: Lanes>(&self, tile: &Tile, s: &Scratch) {
        unsafe {
            let span = &self.a.spans[tile.span];
            let first = span.position + tile.row;
            let rows = tile.rows * self.a.heads.group();
            self.load_q::<L>(span, tile, s);
            for row in 0..self.plan.rows {
                s.max.add(row).write(f32::NEG_INFINITY);
                s.sum.add(row).write(0.0);
            }
            std::slice::from_raw_parts_mut(s.values, rows * self.plan.panels * PANEL).fill(0.0);
            for block in self.a.first(first) / BLOCK..=(first + tile.rows - 1) / BLOCK {
                let end = (first + tile.rows).min((block + 1) * BLOCK);
                self.lay_out::<L>(span, tile.kv_head, block * BLOCK..end, s);
                let next = end..(first + tile.rows).min(end + BLOCK);
                self.prefetch::<L>(span, tile.kv_head, next);
                self.block::<L>(tile, first, block, s);
            }
            self.write::<L>(span, tile, s);
        }
    }

    #[inline(always)]
    unsafe fn load_q<L: Lanes>(&self, span: &Span, tile: &Tile, s: &Scratch) {
        unsafe {
            let (heads, dim) = (self.a.heads, self.a.heads.head_dim);
            let group = heads.group();
            let words = dim.div_ceil(D::STEP) * D::WORDS;
            for r in 0..tile.rows * group {
                let row = span.row + tile.row + r / group;
                let head = tile.kv_head * group + r % group;
                let from = self.qkv.as_ptr().add(row * heads.qkv_width() + head * dim);
                let to = s.q.add(r * words);
                if D::WHOLE {
                    let (high, low) = (to.cast(), to.add(self.plan.rows * words).cast());
                    let Whole { factor, excess } = scaled::make_whole::<L>(from, dim, high, low);
                    s.q_factor.add(r).write(factor * self.a.scale);
                    s.q_excess.add(r).write(excess);
                } else if D::PAIRED {
                    narrow::<L>(from, to.cast(), dim);
                } else {
                    std::ptr::copy_nonoverlapping(from, to.cast(), dim);
                }
            }
        }
    }

    /// Lays out keys and values of some positions, which begin a block; the block's other positions are zero.
    #[inline(always)]
    unsafe fn lay_out<L: Lanes>(&self, span: &Span, kv_head: usize, positions: Range<usize>, s: &Scratch) {
        unsafe {
            let mut keys = [s.zeros.cast_const(); BLOCK];
            let mut values = keys;
            self.locate(span, kv_head, positions.clone(), Half::Key, &mut keys);
            self.locate(span, kv_head, positions, Half::Value, &mut values);
            if self.plan.dtype.is_scaled() {
                return self.lay_out_scaled::<L>(&keys, &values, s);
            }
            let widen = !D::PAIRED && self.plan.dtype == KvDtype::Bf16;
            // Keys that are widened pass through the values' place.
            let panel = if widen { s.value_panels } else { s.key_panel };
            for lane in (0..BLOCK).step_by(16) {
                let rows = std::array::from_fn(|i| keys[lane + i]);
                transpose::<L>(rows, self.plan.words, panel.add(lane));
            }
            if widen {
                widen_steps::<L>(panel.cast(), self.plan.words, s.key_panel.cast());
            }
            for d in (0..self.a.heads.head_dim).step_by(16) {
                let count = 16.min(self.a.heads.head_dim - d);
                let to = s.value_panels.add(d / PANEL * (BLOCK / D::STEP) * PANEL + d % PANEL);
                for step in 0..BLOCK / D::STEP {
                    let to = to.add(step * PANEL);
                    if D::PAIRED {
                        let (a, b) = (values[2 * step].cast::<u16>(), values[2 * step + 1].cast::<u16>());
                        zip::<L>(to, a.add(d), b.add(d), count);
                    } else if widen {
                        widen_row::<L>(to.cast(), values[step].cast::<u16>().add(d), count);
                    } else {
                        std::ptr::copy_nonoverlapping(values[step].add(d), to, count);
                    }
                }
            }
        }
    }

    /// `lay_out` of rows in 8 bits, and their scales.
    #[inline(always)]
    unsafe fn lay_out_scaled<L: Lanes>(&self, keys: &[*const u32; BLOCK], values: &[*const u32; BLOCK], s: &Scratch) {
        unsafe {
            let dim = self.a.heads.head_dim;
            let values = values.map(<*const u32>::cast::<u8>);
            for i in 0..BLOCK {
                s.key_scales.add(i).write(scaled::scale_of(keys[i].cast(), dim));
                s.value_scales.add(i).write(scaled::scale_of(values[i], dim));
            }
            // Keys that are widened pass through the values' place.
            let panel = if D::WHOLE { s.key_panel } else { s.value_panels };
            for lane in (0..BLOCK).step_by(16) {
                let rows = std::array::from_fn(|i| keys[lane + i]);
                transpose::<L>(rows, self.plan.words, panel.add(lane));
            }
            if !D::WHOLE {
                scaled::widen_words::<L>(panel, self.plan.words, D::PAIRED, s.key_panel.cast());
            }
            for d in (0..dim).step_by(16) {
                let count = 16.min(dim - d);
                let to = s.value_panels.add(d / PANEL * (BLOCK / D::STEP) * PANEL + d % PANEL);
                for step in 0..BLOCK / D::STEP {
                    let (to, row) = (to.add(step * PANEL), |i: usize| values[step * D::STEP + i].add(d));
                    match D::STEP {
                        1 => scaled::widen_row::<L>(to.cast(), row(0), count),
                        2 => scaled::zip::<L>(to, row(0), row(1), count),
                        _ => scaled::zip_four::<L>(to, [row(0), row(1), row(2), row(3)], count),
                    }
                }
            }
        }
    }

    /// Asks for the next positions' keys and values, which lie scattered.
    #[inline(always)]
    unsafe fn prefetch<L: Lanes>(&self, span: &Span, kv_head: usize, positions: Range<usize>) {
        unsafe {
            let mut rows = [std::ptr::null(); BLOCK];
            for half in [Half::Key, Half::Value] {
                self.locate(span, kv_head, positions.clone(), half, &mut rows);
                for row in &rows[..positions.len()] {
                    for byte in (0..self.plan.row_bytes).step_by(64) {
                        L::prefetch(row.cast::<u8>().wrapping_add(byte));
                    }
                }
            }
        }
    }

    /// Addresses of the positions' keys or values, by runs that are contiguous in a cache block.
    #[inline(always)]
    unsafe fn locate(
        &self,
        span: &Span,
        kv_head: usize,
        positions: Range<usize>,
        half: Half,
        rows: &mut [*const u32; BLOCK],
    ) {
        let tokens = self.arena.layout().block_tokens as usize;
        let start = positions.start;
        let mut position = start;
        while position < positions.end {
            let base = kv::entry(self.arena, span, position, self.a.kv.first + kv_head, self.a.layer, half);
            let run = (tokens - position % tokens).min(positions.end - position);
            for i in 0..run {
                rows[position - start + i] = base.wrapping_add(i * self.plan.row_bytes).cast::<u32>().cast_const();
            }
            position += run;
        }
    }

    /// One block's partial for every row that sees some of it, merged.
    #[inline(always)]
    unsafe fn block<L: Lanes>(&self, tile: &Tile, first: usize, block: usize, s: &Scratch) {
        unsafe {
            let group = self.a.heads.group();
            let start = block * BLOCK;
            // Rows before the block do not see it, nor do rows whose window has left it.
            let from = start.saturating_sub(first);
            let mut to = tile.rows;
            while to > from && self.a.first(first + to - 1) >= start + BLOCK {
                to -= 1;
            }
            if to <= from {
                return;
            }
            let rows = from * group..to * group;
            self.scores::<L>(rows.clone(), s);
            for row in rows.clone() {
                let position = first + row / group;
                let low = self.a.first(position).saturating_sub(start);
                let high = (position + 1 - start).min(BLOCK);
                self.soften::<L>(row, low..high, s);
            }
            self.weigh::<L>(rows.clone(), s);
            for panel in 0..self.plan.panels {
                self.values::<L>(rows.clone(), panel, s);
            }
        }
    }

    #[inline(always)]
    unsafe fn scores<L: Lanes>(&self, rows: Range<usize>, s: &Scratch) {
        unsafe {
            let steps = self.a.heads.head_dim.div_ceil(D::STEP);
            let x_stride = steps * D::WORDS;
            let block = Block {
                steps,
                w: s.key_panel.cast::<u8>().cast_const(),
                x: s.q.add(rows.start * x_stride),
                x_stride,
                rows: rows.len(),
                y: s.scores.add(rows.start * BLOCK),
                y_stride: BLOCK,
                fresh: true,
                ahead: Ahead::NOTHING,
            };
            self.multiply::<L>(block);
        }
    }

    /// A block's products; of whole numbers those with the high bytes first, then those with the low ones.
    #[inline(always)]
    unsafe fn multiply<L: Lanes>(&self, block: Block) {
        unsafe {
            block.run::<L, D>();
            if D::WHOLE {
                for row in 0..block.rows {
                    for i in (0..PANEL).step_by(16) {
                        let sums = block.y.add(row * block.y_stride + i);
                        L::store(sums, L::from_bits(L::shift_left(L::load_words(sums.cast()), 8)));
                    }
                }
                let low = block.x.add(self.plan.rows * block.x_stride);
                Block { x: low, fresh: false, ..block }.run::<L, D>();
            }
        }
    }

    /// What 16 sums of products mean.
    #[inline(always)]
    unsafe fn sums<L: Lanes>(from: *const f32, excess: *const i32) -> L::F {
        unsafe {
            match D::WHOLE {
                true => L::to_f32(L::add_words(L::load_words(from.cast()), L::words(excess.read() as u32))),
                false => L::load(from),
            }
        }
    }

    /// Scores of one row to exponentials, with their maximum and sum; only positions `seen` of the block count.
    #[inline(always)]
    unsafe fn soften<L: Lanes>(&self, row: usize, seen: Range<usize>, s: &Scratch) {
        unsafe {
            let from = s.scores.add(row * BLOCK);
            let scaled = self.plan.dtype.is_scaled();
            let scale = if D::WHOLE { s.q_factor.add(row).read() } else { self.a.scale };
            let mut x = [L::splat(scale); 4];
            for (i, x) in x.iter_mut().enumerate() {
                *x = L::mul(Self::sums::<L>(from.add(16 * i), s.q_excess.add(row)), *x);
                if scaled {
                    *x = L::mul(*x, L::load(s.key_scales.add(16 * i)));
                }
            }
            if seen.len() < BLOCK {
                let nothing = L::splat(f32::NEG_INFINITY);
                let (low, high) = (L::splat(seen.start as f32), L::splat(seen.end as f32));
                for (i, x) in x.iter_mut().enumerate() {
                    let index = L::load(LANE.as_ptr().add(16 * i));
                    *x = L::select_less(index, high, *x, nothing);
                    *x = L::select_less(index, low, nothing, *x);
                }
            }
            let max = L::max(L::larger(L::larger(x[0], x[1]), L::larger(x[2], x[3])));
            for x in &mut x {
                *x = exp::<L>(L::sub(*x, L::splat(max)));
                if D::PAIRED && !scaled {
                    *x = L::round_bf16(*x);
                }
            }
            s.block_max.add(row).write(max);
            s.block_sum.add(row).write(sum64::<L>(&x));
            if scaled {
                for (i, x) in x.iter_mut().enumerate() {
                    // What is not seen is nothing, whatever its scale.
                    let scaled = L::mul(*x, L::load(s.value_scales.add(16 * i)));
                    *x = L::select_less(L::splat(0.0), *x, scaled, L::splat(0.0));
                    *x = if D::PAIRED { L::round_bf16(*x) } else { *x };
                }
            }
            if D::WHOLE {
                let mut weights = [0.0f32; BLOCK];
                x.into_iter().enumerate().for_each(|(i, x)| L::store(weights.as_mut_ptr().add(16 * i), x));
                let (high, low) = (row * BLOCK / 4, (self.plan.rows + row) * BLOCK / 4);
                let (high, low) = (s.weights.add(high).cast(), s.weights.add(low).cast());
                let Whole { factor, excess } = scaled::make_whole::<L>(weights.as_ptr(), BLOCK, high, low);
                s.weight_factor.add(row).write(factor);
                s.weight_excess.add(row).write(excess);
                return;
            }
            for (i, x) in x.into_iter().enumerate() {
                match D::PAIRED {
                    true => L::store_bf16(s.weights.add(row * BLOCK / 2).cast::<u16>().add(16 * i), x),
                    false => L::store(s.weights.add(row * BLOCK).cast::<f32>().add(16 * i), x),
                }
            }
        }
    }

    /// Factors of what rows have so far and of the block's partial; new maxima and sums.
    #[inline(always)]
    unsafe fn weigh<L: Lanes>(&self, rows: Range<usize>, s: &Scratch) {
        unsafe {
            for i in rows.clone().step_by(16) {
                let end = rows.end;
                let (all, part) = (get::<L>(s.max, i, end), get::<L>(s.block_max, i, end));
                let max = L::larger(all, part);
                let (old, new) = (exp::<L>(L::sub(all, max)), exp::<L>(L::sub(part, max)));
                let sum = L::mul(get::<L>(s.block_sum, i, end), new);
                put::<L>(s.sum, i, end, L::fma(get::<L>(s.sum, i, end), old, sum));
                put::<L>(s.max, i, end, max);
                put::<L>(s.old, i, end, old);
                put::<L>(s.new, i, end, new);
            }
        }
    }

    /// Weighted sums of 64 dims of the block's values, merged into the rows'.
    #[inline(always)]
    unsafe fn values<L: Lanes>(&self, rows: Range<usize>, panel: usize, s: &Scratch) {
        unsafe {
            let steps = BLOCK / D::STEP;
            let x_stride = steps * D::WORDS;
            let block = Block {
                steps,
                w: s.value_panels.add(panel * steps * PANEL).cast::<u8>().cast_const(),
                x: s.weights.add(rows.start * x_stride),
                x_stride,
                rows: rows.len(),
                y: s.partial.add(rows.start * PANEL),
                y_stride: PANEL,
                fresh: true,
                ahead: Ahead::NOTHING,
            };
            self.multiply::<L>(block);
            for row in rows {
                let factor = if D::WHOLE { s.weight_factor.add(row).read() } else { 1.0 };
                let (old, new) = (L::splat(s.old.add(row).read()), L::splat(factor * s.new.add(row).read()));
                let partial = s.partial.add(row * PANEL);
                let values = s.values.add((row * self.plan.panels + panel) * PANEL);
                for i in (0..PANEL).step_by(16) {
                    let part = L::mul(Self::sums::<L>(partial.add(i), s.weight_excess.add(row)), new);
                    L::store(values.add(i), L::fma(L::load(values.add(i)), old, part));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn write<L: Lanes>(&self, span: &Span, tile: &Tile, s: &Scratch) {
        unsafe {
            let (heads, dim) = (self.a.heads, self.a.heads.head_dim);
            let group = heads.group();
            for r in 0..tile.rows * group {
                let row = span.row + tile.row + r / group;
                let head = tile.kv_head * group + r % group;
                let out = self.out.at((row * heads.heads + head) * dim);
                let scale = L::splat(1.0 / s.sum.add(r).read());
                let values = s.values.add(r * self.plan.panels * PANEL);
                for i in (0..dim).step_by(16) {
                    put::<L>(out, i, dim, L::mul(get::<L>(values, i, dim), scale));
                }
            }
        }
    }
}

/// 0.0, 1.0, ... 63.0
static LANE: [f32; BLOCK] = {
    let mut lanes = [0.0; BLOCK];
    let mut i = 0;
    while i < BLOCK {
        lanes[i] = i as f32;
        i += 1;
    }
    lanes
};

/// f32 that are bf16 already, narrowed.
#[inline(always)]
unsafe fn narrow<L: Lanes>(from: *const f32, to: *mut u16, len: usize) {
    unsafe {
        let whole = len / 16 * 16;
        for i in (0..whole).step_by(16) {
            L::store_bf16(to.add(i), L::load(from.add(i)));
        }
        for i in whole..len {
            to.add(i).write(bf16::round(from.add(i).read()));
        }
    }
}

/// Pairs of two rows' elements.
#[inline(always)]
unsafe fn zip<L: Lanes>(to: *mut u32, a: *const u16, b: *const u16, count: usize) {
    unsafe {
        if count == 16 {
            return L::zip_bf16(to, a, b);
        }
        for i in 0..count {
            to.add(i).write(a.add(i).read() as u32 | (b.add(i).read() as u32) << 16);
        }
    }
}

/// A row's elements as f32.
#[inline(always)]
unsafe fn widen_row<L: Lanes>(to: *mut f32, from: *const u16, count: usize) {
    unsafe {
        if count == 16 {
            return L::store(to, L::load_bf16(from));
        }
        for i in 0..count {
            to.add(i).write(bf16::widen(from.add(i).read()));
        }
    }
}
