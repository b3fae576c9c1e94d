//! Tiles of outputs in registers. Every output is one chain over k, whatever tile, row group or block it falls in:
//! blocking only decides when a chain rests in memory, exactly.
//!
//! Best possible: many rows cost K·N/32 `vdpbf16ps` each; few rows cost the time to read the weights once.

#![allow(clippy::needless_range_loop, reason = "tiles are indexed by (m, n) in several arrays at once")]

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::lanes::{Kernel, Lanes};
use super::{Out, put};
use crate::packed::{PANEL, STEP};
use crate::reference::{SEGMENTS, segment};
use crate::{Packed, bf16};

/// Steps per block: 32 KiB of a panel, which stays in L1 while all row tiles pass over it.
const BLOCK_STEPS: usize = 128;
/// Rows whose sums are kept at once.
const GROUP: usize = 96;
/// Rows per tile at most: 6 × 4 vectors of sums leave 8 registers of 32.
const TILE_ROWS: usize = 6;
/// Bytes read ahead when each weight is used once.
const AHEAD: usize = 4096;
/// Sums of a row group: one for the chain at work, three for finished parts of the segment tree.
const LEVELS: usize = 4;

/// How one step's products enter the sums. A step is 256 bytes of a panel: 64 outputs' pairs of bf16, or single f32.
pub(crate) trait Dot: 'static {
    /// Words of x per step.
    const WORDS: usize;

    /// # Safety
    /// As for `Lanes`; `w` holds NR·16 words, `x` has MR rows `stride` words apart.
    unsafe fn step<L: Lanes, const MR: usize, const NR: usize>(
        acc: &mut [[L::F; NR]; MR],
        w: *const u8,
        x: *const u32,
        stride: usize,
    );
}

/// Pairs of bf16 weights times f32, one fused multiply-add each.
pub(crate) struct Exact;
/// Pairs of bf16 weights times pairs of bf16, `vdpbf16ps`.
pub(crate) struct Pairs;
/// f32 times f32.
pub(crate) struct Full;

// SAFETY (of each block below): the traits' contracts.
impl Dot for Exact {
    const WORDS: usize = 2;

    #[inline(always)]
    unsafe fn step<L: Lanes, const MR: usize, const NR: usize>(
        acc: &mut [[L::F; NR]; MR],
        w: *const u8,
        x: *const u32,
        stride: usize,
    ) {
        unsafe {
            let mut values = [L::splat(0.0); NR];
            for n in 0..NR {
                values[n] = L::load_even(w.add(n * 64));
            }
            multiply::<L, MR, NR>(acc, &values, x, stride);
            for n in 0..NR {
                values[n] = L::load_odd(w.add(n * 64));
            }
            multiply::<L, MR, NR>(acc, &values, x.add(1), stride);
        }
    }
}

impl Dot for Full {
    const WORDS: usize = 1;

    #[inline(always)]
    unsafe fn step<L: Lanes, const MR: usize, const NR: usize>(
        acc: &mut [[L::F; NR]; MR],
        w: *const u8,
        x: *const u32,
        stride: usize,
    ) {
        unsafe {
            let mut values = [L::splat(0.0); NR];
            for n in 0..NR {
                values[n] = L::load(w.add(n * 64).cast());
            }
            multiply::<L, MR, NR>(acc, &values, x, stride);
        }
    }
}

impl Dot for Pairs {
    const WORDS: usize = 1;

    #[inline(always)]
    unsafe fn step<L: Lanes, const MR: usize, const NR: usize>(
        acc: &mut [[L::F; NR]; MR],
        w: *const u8,
        x: *const u32,
        stride: usize,
    ) {
        unsafe {
            for m in 0..MR {
                let x = x.add(m * stride).read();
                for n in 0..NR {
                    acc[m][n] = L::dot_bf16(acc[m][n], w.add(n * 64), x);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn multiply<L: Lanes, const MR: usize, const NR: usize>(
    acc: &mut [[L::F; NR]; MR],
    w: &[L::F; NR],
    x: *const u32,
    stride: usize,
) {
    unsafe {
        for m in 0..MR {
            let x = L::splat(x.add(m * stride).cast::<f32>().read());
            for n in 0..NR {
                acc[m][n] = L::fma(w[n], x, acc[m][n]);
            }
        }
    }
}

/// Some steps of some rows against one panel.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    pub(crate) steps: usize,
    /// The first step's 256 bytes.
    pub(crate) w: *const u8,
    pub(crate) x: *const u32,
    /// Words from one row of x to the next.
    pub(crate) x_stride: usize,
    pub(crate) rows: usize,
    /// 64 sums per row.
    pub(crate) y: *mut f32,
    pub(crate) y_stride: usize,
    /// Sums begin at zero, not at what y holds.
    pub(crate) fresh: bool,
    /// Read memory ahead: weights come from afar.
    pub(crate) prefetch: bool,
}

impl Block {
    /// # Safety
    /// As for `Lanes`; pointers are valid for the shape.
    #[inline(always)]
    pub(crate) unsafe fn run<L: Lanes, D: Dot>(self) {
        unsafe {
            let tiles = self.rows.div_ceil(TILE_ROWS);
            let mut row = 0;
            for tile in 0..tiles {
                let rows = self.rows / tiles + (tile < self.rows % tiles) as usize;
                let mut part = self;
                part.x = self.x.add(row * self.x_stride);
                part.y = self.y.add(row * self.y_stride);
                let lines = 4 * tile / tiles..4 * (tile + 1) / tiles;
                match self.prefetch {
                    false => part.tile::<L, D, 0>(rows, 0),
                    true if tiles == 1 => part.tile::<L, D, 4>(rows, AHEAD),
                    true => {
                        let ahead = BLOCK_STEPS * STEP + lines.start * 64;
                        match lines.len() {
                            0 => part.tile::<L, D, 0>(rows, ahead),
                            1 => part.tile::<L, D, 1>(rows, ahead),
                            _ => part.tile::<L, D, 2>(rows, ahead),
                        }
                    }
                }
                row += rows;
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<L: Lanes, D: Dot, const LINES: usize>(self, rows: usize, ahead: usize) {
        unsafe {
            match (rows, L::WIDE) {
                (1, _) => self.columns::<L, D, LINES, 1, 4>(ahead),
                (2, true) => self.columns::<L, D, LINES, 2, 4>(ahead),
                (3, true) => self.columns::<L, D, LINES, 3, 4>(ahead),
                (4, true) => self.columns::<L, D, LINES, 4, 4>(ahead),
                (5, true) => self.columns::<L, D, LINES, 5, 4>(ahead),
                (_, true) => self.columns::<L, D, LINES, 6, 4>(ahead),
                (2, false) => self.columns::<L, D, LINES, 2, 2>(ahead),
                (3, false) => self.columns::<L, D, LINES, 3, 2>(ahead),
                (4, false) => self.columns::<L, D, LINES, 4, 1>(ahead),
                (5, false) => self.columns::<L, D, LINES, 5, 1>(ahead),
                (_, false) => self.columns::<L, D, LINES, 6, 1>(ahead),
            }
        }
    }

    /// The panel's 64 outputs, NR·16 at a time.
    #[inline(always)]
    unsafe fn columns<L: Lanes, D: Dot, const LINES: usize, const MR: usize, const NR: usize>(self, ahead: usize) {
        unsafe {
            for column in 0..4 / NR {
                let mut part = self;
                part.w = self.w.add(column * NR * 64);
                part.y = self.y.add(column * NR * 16);
                part.chain::<L, D, LINES, MR, NR>(ahead);
            }
        }
    }

    #[inline(always)]
    unsafe fn chain<L: Lanes, D: Dot, const LINES: usize, const MR: usize, const NR: usize>(self, ahead: usize) {
        unsafe {
            let mut acc = [[L::splat(0.0); NR]; MR];
            if !self.fresh {
                for m in 0..MR {
                    for n in 0..NR {
                        acc[m][n] = L::load(self.y.add(m * self.y_stride + n * 16));
                    }
                }
            }
            let (mut w, mut x) = (self.w, self.x);
            for _ in 0..self.steps {
                for line in 0..LINES {
                    // One tile streams into L1; many tiles together fetch the next block into L2.
                    match LINES {
                        4 => L::prefetch::<true>(w.wrapping_add(ahead + line * 64)),
                        _ => L::prefetch::<false>(w.wrapping_add(ahead + line * 64)),
                    }
                }
                D::step::<L, MR, NR>(&mut acc, w, x, self.x_stride);
                w = w.add(STEP);
                x = x.add(D::WORDS);
            }
            for m in 0..MR {
                for n in 0..NR {
                    L::store(self.y.add(m * self.y_stride + n * 16), acc[m][n]);
                }
            }
        }
    }
}

/// Some panels of y = x · Wᵀ.
pub(crate) struct Matmul<'a, D> {
    pub(crate) w: &'a Packed,
    /// (rows, pairs of k, `D::WORDS`)
    pub(crate) x: &'a [u32],
    pub(crate) rows: usize,
    pub(crate) y: Out<f32>,
    pub(crate) segmented: bool,
    pub(crate) panels: Range<usize>,
    pub(crate) dot: PhantomData<D>,
}

type Sums = MaybeUninit<[[f32; GROUP * PANEL]; LEVELS]>;

impl<D: Dot> Kernel for Matmul<'_, D> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        unsafe {
            let mut sums = Sums::uninit();
            let sums = sums.as_mut_ptr().cast::<f32>();
            for panel in self.panels.clone() {
                for row in (0..self.rows).step_by(GROUP) {
                    let rows = GROUP.min(self.rows - row);
                    self.group::<L>(panel, row, rows, sums);
                    self.write::<L>(panel, row, rows, sums);
                }
            }
        }
    }
}

impl<D: Dot> Matmul<'_, D> {
    /// Sums of one row group against one panel, into the first level.
    #[inline(always)]
    unsafe fn group<L: Lanes>(&self, panel: usize, row: usize, rows: usize, sums: *mut f32) {
        unsafe {
            let parts = if self.segmented { SEGMENTS } else { 1 };
            for part in 0..parts {
                let steps = if self.segmented { segment(self.w.pairs(), part) } else { 0..self.w.pairs() };
                // Finished parts lie on the levels below as in a binary counter.
                let mut level = part.count_ones() as usize;
                self.steps::<L>(panel, row, rows, steps, sums.add(level * GROUP * PANEL));
                for _ in 0..part.trailing_ones() {
                    let (to, from) = (sums.add((level - 1) * GROUP * PANEL), sums.add(level * GROUP * PANEL));
                    for i in (0..rows * PANEL).step_by(16) {
                        L::store(to.add(i), L::add(L::load(to.add(i)), L::load(from.add(i))));
                    }
                    level -= 1;
                }
            }
        }
    }

    /// One chain per output over `steps`, block by block when there are several row tiles.
    #[inline(always)]
    unsafe fn steps<L: Lanes>(&self, panel: usize, row: usize, rows: usize, steps: Range<usize>, sums: *mut f32) {
        unsafe {
            let x_stride = self.w.pairs() * D::WORDS;
            let size = if rows <= TILE_ROWS { steps.len().max(1) } else { BLOCK_STEPS };
            let mut from = steps.start;
            loop {
                let block = Block {
                    steps: size.min(steps.end - from),
                    w: self.w.panel(panel).add(from * STEP),
                    x: self.x.as_ptr().add(row * x_stride + from * D::WORDS),
                    x_stride,
                    rows,
                    y: sums,
                    y_stride: PANEL,
                    fresh: from == steps.start,
                    prefetch: row == 0,
                };
                block.run::<L, D>();
                from += size;
                if from >= steps.end {
                    return;
                }
            }
        }
    }

    /// Copies the sums to y; the last panel may be narrower.
    #[inline(always)]
    unsafe fn write<L: Lanes>(&self, panel: usize, row: usize, rows: usize, sums: *const f32) {
        unsafe {
            let width = PANEL.min(self.w.rows() - panel * PANEL);
            for r in 0..rows {
                let y = self.y.at((row + r) * self.w.rows() + panel * PANEL);
                for i in (0..width).step_by(16) {
                    put::<L>(y, i, width, L::load(sums.add(r * PANEL + i)));
                }
            }
        }
    }
}

/// Rounds rows of f32 to bf16 for a matmul: as pairs of bf16, or as f32, padded to whole pairs.
pub(crate) struct Inputs<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) cols: usize,
    pub(crate) to: Out<u32>,
    pub(crate) paired: bool,
    pub(crate) rows: Range<usize>,
}

impl Kernel for Inputs<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        unsafe {
            let words = self.cols.div_ceil(2) * if self.paired { 1 } else { 2 };
            for row in self.rows {
                let x = self.x.as_ptr().add(row * self.cols);
                let to = self.to.at(row * words);
                let whole = self.cols / 16 * 16;
                for i in (0..whole).step_by(16) {
                    let values = L::round_bf16(L::load(x.add(i)));
                    match self.paired {
                        true => L::store_bf16(to.cast::<u16>().add(i), values),
                        false => L::store(to.cast::<f32>().add(i), values),
                    }
                }
                for i in whole..self.cols.next_multiple_of(2) {
                    let value = if i < self.cols { bf16::round(x.add(i).read()) } else { 0 };
                    match self.paired {
                        true => to.cast::<u16>().add(i).write(value),
                        false => to.cast::<f32>().add(i).write(bf16::widen(value)),
                    }
                }
            }
        }
    }
}

/// Sixteen outputs of a row of k, transposed into a panel.
pub(crate) struct Pack<'a> {
    pub(crate) packed: &'a Packed,
    /// (16, pairs of k)
    pub(crate) rows: &'a [u32],
    pub(crate) panel: usize,
    pub(crate) lane: usize,
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        unsafe {
            let pairs = self.packed.pairs();
            let to = self.packed.lane(self.panel, self.lane);
            transpose::<L>(std::array::from_fn(|row| self.rows.as_ptr().add(row * pairs)), pairs, to);
        }
    }
}

/// Sixteen rows of `words` words, transposed; `to` has rows of 64 words.
#[inline(always)]
pub(crate) unsafe fn transpose<L: Lanes>(from: [*const u32; 16], words: usize, to: *mut u32) {
    unsafe {
        let whole = words / 16 * 16;
        for word in (0..whole).step_by(16) {
            L::transpose(from.map(|row| row.add(word)), to.add(word * PANEL));
        }
        for word in whole..words {
            for (lane, row) in from.into_iter().enumerate() {
                to.add(word * PANEL + lane).write(row.add(word).read());
            }
        }
    }
}
