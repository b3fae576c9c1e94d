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
use crate::bf16;
use crate::packed::{PANEL, Run, STEP};

/// Steps per block at most: 128 KiB of a panel, which stays in L2 while all row tiles pass over it. Blocks that would stay in
/// L1 are no faster, and their sums rest in memory more often.
const BLOCK_STEPS: usize = 512;
/// Steps per block that is widened: 32 KiB of f32, in L1.
const WIDE_STEPS: usize = 64;
/// Rows whose sums are kept at once.
pub(crate) const GROUP: usize = 192;
/// Rows from which it pays to widen a block of bf16 to f32 once, instead of in every tile.
const WIDEN_ROWS: usize = 40;
/// Rows per tile at most: 6 × 4 vectors of sums leave 8 registers of 32.
const TILE_ROWS: usize = 6;
/// Bytes read ahead, into L2, when each weight is used once: nearer, or into L1, the line buffers run out.
const AHEAD: usize = 16384;
/// Sums of a row group: one for the chain at work, three for finished parts of the segment tree.
const LEVELS: usize = 4;

/// How one step's products enter the sums. A step is 256 bytes of a panel: 64 outputs' pairs of bf16, or single f32.
pub(crate) trait Dot: 'static {
    /// Words of x per step.
    const WORDS: usize;
    /// Equals `Full` over widened weights.
    const WIDENS: bool = false;

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
/// Fours of unsigned bytes times fours of signed ones; sums are words, whose bits an f32's place holds.
pub(crate) struct Fours;

// SAFETY (of each block below): the traits' contracts.
impl Dot for Exact {
    const WORDS: usize = 2;
    const WIDENS: bool = true;

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

impl Dot for Fours {
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
                    let words = L::load_words(w.add(n * 64));
                    acc[m][n] = L::from_bits(L::dot_bytes(L::bits(acc[m][n]), words, x));
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
    /// What to read ahead meanwhile.
    pub(crate) ahead: Ahead,
}

/// Memory that will be needed: `lines` lines of 64 bytes per step, from `from` on.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    pub(crate) from: *const u8,
    pub(crate) lines: usize,
}

impl Ahead {
    pub(crate) const NOTHING: Ahead = Ahead { from: std::ptr::null(), lines: 0 };
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
                // Tiles share the reading ahead evenly.
                let (first, end) = (self.ahead.lines * tile / tiles, self.ahead.lines * (tile + 1) / tiles);
                part.ahead.from = self.ahead.from.wrapping_add(first * 64);
                match end - first {
                    0 => part.tile::<L, D, 0>(rows),
                    1 => part.tile::<L, D, 1>(rows),
                    2 => part.tile::<L, D, 2>(rows),
                    _ => part.tile::<L, D, 4>(rows),
                }
                row += rows;
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<L: Lanes, D: Dot, const LINES: usize>(self, rows: usize) {
        unsafe {
            match (rows, L::WIDE) {
                (1, _) => self.columns::<L, D, LINES, 1, 4>(),
                (2, true) => self.columns::<L, D, LINES, 2, 4>(),
                (3, true) => self.columns::<L, D, LINES, 3, 4>(),
                (4, true) => self.columns::<L, D, LINES, 4, 4>(),
                (5, true) => self.columns::<L, D, LINES, 5, 4>(),
                (_, true) => self.columns::<L, D, LINES, 6, 4>(),
                (2, false) => self.columns::<L, D, LINES, 2, 2>(),
                (3, false) => self.columns::<L, D, LINES, 3, 2>(),
                (4, false) => self.columns::<L, D, LINES, 4, 1>(),
                (5, false) => self.columns::<L, D, LINES, 5, 1>(),
                (_, false) => self.columns::<L, D, LINES, 6, 1>(),
            }
        }
    }

    /// The panel's 64 outputs, NR·16 at a time.
    #[inline(always)]
    unsafe fn columns<L: Lanes, D: Dot, const LINES: usize, const MR: usize, const NR: usize>(self) {
        unsafe {
            for column in 0..4 / NR {
                let mut part = self;
                part.w = self.w.add(column * NR * 64);
                part.y = self.y.add(column * NR * 16);
                part.chain::<L, D, LINES, MR, NR>();
            }
        }
    }

    #[inline(always)]
    unsafe fn chain<L: Lanes, D: Dot, const LINES: usize, const MR: usize, const NR: usize>(self) {
        unsafe {
            let mut acc = [[L::splat(0.0); NR]; MR];
            if !self.fresh {
                for m in 0..MR {
                    for n in 0..NR {
                        acc[m][n] = L::load(self.y.add(m * self.y_stride + n * 16));
                    }
                }
            }
            let (mut w, mut x, mut ahead) = (self.w, self.x, self.ahead.from);
            for _ in 0..self.steps {
                for line in 0..LINES {
                    L::prefetch(ahead.wrapping_add(line * 64));
                }
                ahead = ahead.wrapping_add(self.ahead.lines * 64);
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

/// Consecutive steps that every row tile passes over before the next; x lies piece by piece, (piece, row, k), so that
/// a tile reads it in a straight line. Outer: one run of pieces per chain; `pairs` are all chains' together.
pub(crate) fn pieces<D: Dot>(
    pairs: usize,
    rows: usize,
    chains: impl Iterator<Item = Range<usize>>,
) -> Vec<Vec<Range<usize>>> {
    let most = match rows {
        0..=TILE_ROWS => pairs.max(1),
        _ if widens::<D>(rows) => WIDE_STEPS,
        _ => BLOCK_STEPS,
    };
    chains.map(|steps| balanced(steps, most)).collect()
}

/// A range cut into the fewest parts of at most `most`, all about as long: each reads ahead as much as it is long, and what
/// follows a short one would come late.
fn balanced(range: Range<usize>, most: usize) -> Vec<Range<usize>> {
    let count = range.len().div_ceil(most).max(1);
    let end = |part: usize| range.start + range.len() * part / count;
    (0..count).map(|part| end(part)..end(part + 1)).collect()
}

fn widens<D: Dot>(rows: usize) -> bool {
    D::WIDENS && rows >= WIDEN_ROWS
}

/// Some panels of y = x · Wᵀ.
pub(crate) struct Matmul<'a, D> {
    pub(crate) w: &'a Run,
    /// As `Inputs` leaves it.
    pub(crate) x: &'a [u32],
    pub(crate) rows: usize,
    pub(crate) pieces: &'a [Vec<Range<usize>>],
    /// The run's first output of the first row.
    pub(crate) y: Out<f32>,
    pub(crate) y_stride: usize,
    pub(crate) panels: Range<usize>,
    pub(crate) dot: PhantomData<D>,
}

/// What a thread keeps at hand; nothing in it is read before it is written.
#[repr(align(64))]
pub(crate) struct Scratch {
    /// (level, row, output)
    pub(crate) sums: [[f32; GROUP * PANEL]; LEVELS],
    /// A block of weights in f32.
    wide: [f32; 2 * WIDE_STEPS * PANEL],
}

impl<D: Dot> Kernel for Matmul<'_, D> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        unsafe {
            let mut scratch = MaybeUninit::<Scratch>::uninit();
            let scratch = scratch.as_mut_ptr();
            // A group's x stays in L2 while all panels pass by.
            for row in (0..self.rows).step_by(GROUP) {
                let rows = GROUP.min(self.rows - row);
                for panel in self.panels.clone() {
                    self.group::<L>(panel, row, rows, scratch, 0);
                    self.write::<L>(panel, row, rows, (&raw const (*scratch).sums).cast());
                }
            }
        }
    }
}

impl<D: Dot> Matmul<'_, D> {
    /// Sums of one row group against one panel, into level `base`; those behind it hold finished parts meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn group<L: Lanes>(
        &self,
        panel: usize,
        row: usize,
        rows: usize,
        scratch: *mut Scratch,
        base: usize,
    ) {
        unsafe {
            let (sums, wide) = (&raw mut (*scratch).sums, &raw mut (*scratch).wide);
            let sums = sums.cast::<f32>().add(base * GROUP * PANEL);
            for (part, pieces) in self.pieces.iter().enumerate() {
                // Finished parts lie on the levels below as in a binary counter.
                let mut level = part.count_ones() as usize;
                self.chain::<L>(panel, row..row + rows, pieces, sums.add(level * GROUP * PANEL), wide.cast());
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

    /// One chain per output, piece by piece.
    #[inline(always)]
    unsafe fn chain<L: Lanes>(
        &self,
        panel: usize,
        rows: Range<usize>,
        pieces: &[Range<usize>],
        sums: *mut f32,
        wide: *mut f32,
    ) {
        unsafe {
            for (i, piece) in pieces.iter().enumerate() {
                let w = self.w.panel(panel).add(piece.start * STEP);
                let distance = if rows.len() <= TILE_ROWS { AHEAD } else { piece.len() * STEP };
                let x_stride = piece.len() * D::WORDS;
                let mut block = Block {
                    steps: piece.len(),
                    w,
                    x: self.x.as_ptr().add(self.rows * piece.start * D::WORDS + rows.start * x_stride),
                    x_stride,
                    rows: rows.len(),
                    y: sums,
                    y_stride: PANEL,
                    fresh: i == 0,
                    ahead: Ahead { from: w.wrapping_add(distance), lines: 4 },
                };
                if widens::<D>(self.rows) {
                    widen_steps::<L>(w, piece.len(), wide);
                    block.steps *= 2;
                    block.w = wide.cast::<u8>().cast_const();
                    block.ahead.lines = 2;
                    block.run::<L, Full>();
                } else {
                    block.run::<L, D>();
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
                let y = self.y.at((row + r) * self.y_stride + panel * PANEL);
                for i in (0..width).step_by(16) {
                    put::<L>(y, i, width, L::load(sums.add(r * PANEL + i)));
                }
            }
        }
    }
}

/// Steps of pairs of bf16 to twice as many steps of f32.
#[inline(always)]
pub(crate) unsafe fn widen_steps<L: Lanes>(from: *const u8, steps: usize, to: *mut f32) {
    unsafe {
        for step in 0..steps {
            for n in 0..4 {
                let (from, to) = (from.add(step * STEP + n * 64), to.add(step * 2 * PANEL + n * 16));
                L::store(to, L::load_even(from));
                L::store(to.add(PANEL), L::load_odd(from));
            }
        }
    }
}

/// Rounds rows of f32 to bf16 for a matmul, in (piece, row, k): as pairs of bf16, or as f32, padded to whole pairs.
pub(crate) struct Inputs<'a, D> {
    pub(crate) x: &'a [f32],
    pub(crate) cols: usize,
    pub(crate) rows: usize,
    pub(crate) pieces: &'a [Vec<Range<usize>>],
    pub(crate) to: Out<u32>,
    /// The rows to do now.
    pub(crate) shown: Range<usize>,
    pub(crate) dot: PhantomData<D>,
}

impl<D: Dot> Kernel for Inputs<'_, D> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        unsafe {
            for row in self.shown.clone() {
                for piece in self.pieces.iter().flatten() {
                    let to = self.to.at((self.rows * piece.start + row * piece.len()) * D::WORDS);
                    let x = self.x.as_ptr().add(row * self.cols + 2 * piece.start);
                    round::<L, D>(x, (2 * piece.end).min(self.cols) - 2 * piece.start, to);
                }
            }
        }
    }
}

/// `len` values rounded to bf16; an odd end is padded with zero.
#[inline(always)]
unsafe fn round<L: Lanes, D: Dot>(x: *const f32, len: usize, to: *mut u32) {
    unsafe {
        let paired = D::WORDS == 1;
        let whole = len / 16 * 16;
        for i in (0..whole).step_by(16) {
            put_rounded::<L, D>(L::load(x.add(i)), to.add(i / 2 * D::WORDS));
        }
        for i in whole..len.next_multiple_of(2) {
            let value = if i < len { bf16::round(x.add(i).read()) } else { 0 };
            match paired {
                true => to.cast::<u16>().add(i).write(value),
                false => to.cast::<f32>().add(i).write(bf16::widen(value)),
            }
        }
    }
}

/// Sixteen values rounded to bf16, as inputs of eight steps.
#[inline(always)]
pub(crate) unsafe fn put_rounded<L: Lanes, D: Dot>(x: L::F, to: *mut u32) {
    unsafe {
        match D::WORDS {
            1 => L::store_bf16(to.cast(), L::round_bf16(x)),
            _ => L::store(to.cast(), L::round_bf16(x)),
        }
    }
}

/// Sixteen outputs of a row of k, transposed into a panel.
pub(crate) struct Pack<'a> {
    pub(crate) packed: &'a Run,
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
                to.add(word * PANEL + lane).write(row.add(word).read_unaligned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The parts follow one another without a gap, none is longer than asked, and they differ by one at most.
        #[test]
        fn cuts_evenly(start in 0usize..5000, len in 0usize..5000, most in 1usize..600) {
            let parts = balanced(start..start + len, most);
            prop_assert_eq!(parts.first().map(|part| part.start), Some(start));
            prop_assert_eq!(parts.last().map(|part| part.end), Some(start + len));
            prop_assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
            let (shortest, longest) = parts.iter().fold((usize::MAX, 0), |(low, high), part| (low.min(part.len()), high.max(part.len())));
            prop_assert!(longest <= most && longest - shortest <= 1);
        }
    }
}
