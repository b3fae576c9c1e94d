//! Products with quantized weights. Activations become 8-bit integers block by block; the integers of a block of 32 k are
//! multiplied and added exactly, in any order, and each output is one chain of f32 multiply-adds over its blocks: so all
//! instruction sets, batches and tiles give the same bits.
//!
//! Best possible: many rows cost K·N/64 `vpdpbusd` each, and three operations more per 8 of them; few rows cost the time to
//! read the weights once.

#![allow(clippy::needless_range_loop, reason = "tiles are indexed by (m, n) in several arrays at once")]

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::lanes::{Kernel, Lanes};
use super::{Out, put};
use crate::packed::{Format, HALVES, PANEL, Run, STEP};
use crate::quant::{BLOCK_LEN, SUPER, quantize};

/// Words of a block of one row of activations: 8 of integers, then scale and sums.
pub(crate) const WORDS: usize = 12;
/// The block's scale, f32.
const SCALE: usize = 8;
/// Minus the sum of the first half's integers, of the second's, of all.
const MINUS_FIRST: usize = 9;
const MINUS_SECOND: usize = 10;
const MINUS_ALL: usize = 11;

/// Blocks that all row tiles pass over before the next: 32 KiB of q8_0.
const PIECE: usize = 16;
/// Rows whose sums are kept at once.
const GROUP: usize = 192;
/// Rows per tile at most: 6 × 4 vectors of sums leave 8 registers of 32.
const TILE_ROWS: usize = 6;
/// Bytes read ahead, into L2, when each weight is used once.
const AHEAD: usize = 16384;
/// Sums of a row group: one for the chain at work, three for finished parts of the segment tree.
const LEVELS: usize = 4;

/// How a block of one format becomes bytes and scales.
///
/// # Safety (of every function)
/// As for `Lanes`; `At` points into the format's panels.
pub(crate) trait Grid: Sized + 'static {
    const FORMAT: Format;
    /// Parts of a block with scales of their own.
    const HALVES: usize = 1;
    /// The byte that stands for zero is 1 << ZERO; of formats whose bytes are unsigned, it is 0.
    const ZERO: Option<u32>;
    /// The order in which steps of 4 k are multiplied: those that share a word together.
    const ORDER: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

    /// 16 outputs' bytes of step t; here of formats with four bits, or five.
    #[inline(always)]
    unsafe fn bytes<L: Lanes>(at: At, t: usize) -> L::I {
        unsafe { if Self::FORMAT.words() == 5 { five_bits::<L, Self>(at, t) } else { four_bits::<L, Self>(at, t) } }
    }
    #[inline(always)]
    unsafe fn scales<L: Lanes>(at: At, _: usize) -> L::F {
        unsafe {
            match Self::FORMAT.two_scales() {
                true => L::mul(L::load_f16(at.half_ahead(0)), L::load_u8(at.byte(0))),
                false => L::load_f16(at.half(0)),
            }
        }
    }
    /// What is subtracted, of formats that have it; where it is a half of its own, the file has what is added.
    #[inline(always)]
    unsafe fn minima<L: Lanes>(at: At) -> L::F {
        unsafe {
            match Self::FORMAT.two_scales() {
                true => L::mul(L::load_f16(at.half_ahead(1)), L::load_u8(at.byte(1))),
                false => L::mul(L::load_f16(at.half(1)), L::splat(-1.0)),
            }
        }
    }
}

const IN_ORDER: [usize; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

/// Sixteen outputs in a block.
#[derive(Clone, Copy)]
pub(crate) struct At {
    block: *const u8,
    /// What stands before its eight blocks.
    ahead: *const u8,
    lane: usize,
}

impl At {
    #[inline(always)]
    fn word<G: Grid>(self, index: usize) -> *const u8 {
        self.block.wrapping_add(G::FORMAT.head_bytes() + index * STEP + self.lane * 4)
    }

    #[inline(always)]
    fn half(self, index: usize) -> *const u8 {
        self.block.wrapping_add(index * HALVES + self.lane * 2)
    }

    #[inline(always)]
    fn byte(self, index: usize) -> *const u8 {
        self.block.wrapping_add(index * PANEL + self.lane)
    }

    #[inline(always)]
    fn half_ahead(self, index: usize) -> *const u8 {
        self.ahead.wrapping_add(index * HALVES + self.lane * 2)
    }
}

pub(crate) struct Q8_0;
pub(crate) struct Q4_0;
pub(crate) struct Q4_1;
pub(crate) struct Q5_0;
pub(crate) struct Q5_1;
pub(crate) struct Q4K;
pub(crate) struct Q5K;
pub(crate) struct Q6K;

// SAFETY (of each block below): the traits' contracts.
impl Grid for Q8_0 {
    const FORMAT: Format = Format::Q8_0;
    const ZERO: Option<u32> = Some(7);
    const ORDER: [usize; 8] = IN_ORDER;

    #[inline(always)]
    unsafe fn bytes<L: Lanes>(at: At, t: usize) -> L::I {
        unsafe { L::load_words(at.word::<Self>(t)) }
    }
}

impl Grid for Q4_0 {
    const FORMAT: Format = Format::Q4_0;
    const ZERO: Option<u32> = Some(3);
}

impl Grid for Q4_1 {
    const FORMAT: Format = Format::Q4_1;
    const ZERO: Option<u32> = None;
}

impl Grid for Q5_0 {
    const FORMAT: Format = Format::Q5_0;
    const ZERO: Option<u32> = Some(4);
}

impl Grid for Q5_1 {
    const FORMAT: Format = Format::Q5_1;
    const ZERO: Option<u32> = None;
}

impl Grid for Q4K {
    const FORMAT: Format = Format::Q4K;
    const ZERO: Option<u32> = None;
}

impl Grid for Q5K {
    const FORMAT: Format = Format::Q5K;
    const ZERO: Option<u32> = None;
}

impl Grid for Q6K {
    const FORMAT: Format = Format::Q6K;
    const HALVES: usize = 2;
    const ZERO: Option<u32> = Some(5);
    const ORDER: [usize; 8] = IN_ORDER;

    #[inline(always)]
    unsafe fn bytes<L: Lanes>(at: At, t: usize) -> L::I {
        unsafe {
            let high = L::load_words(at.word::<Self>(4 + t / 4));
            // As `quant::HIGH_SHIFT` says.
            let high = match t % 4 {
                0 => high,
                1 => L::shift_right(high, 2),
                2 => L::shift_left(high, 4),
                _ => L::shift_left(high, 2),
            };
            L::or(four_bits::<L, Self>(at, t), L::and(high, L::words(0x3030_3030)))
        }
    }
    #[inline(always)]
    unsafe fn scales<L: Lanes>(at: At, half: usize) -> L::F {
        unsafe { L::mul(L::load_f16(at.half_ahead(0)), L::load_i8(at.byte(half))) }
    }
}

/// The four bits of each k of step t: those of steps 0 to 3 are the low halves of words 0 to 3, the others the high ones.
#[inline(always)]
unsafe fn four_bits<L: Lanes, G: Grid>(at: At, t: usize) -> L::I {
    unsafe {
        let word = L::load_words(at.word::<G>(t % 4));
        L::and(if t < 4 { word } else { L::shift_right(word, 4) }, L::words(0x0f0f_0f0f))
    }
}

/// The five bits of each k of step t: the fifth is bit t of each byte of word 4.
#[inline(always)]
unsafe fn five_bits<L: Lanes, G: Grid>(at: At, t: usize) -> L::I {
    unsafe {
        let high = L::load_words(at.word::<G>(4));
        let high = if t < 4 { L::shift_left(high, 4 - t as u32) } else { L::shift_right(high, t as u32 - 4) };
        L::or(four_bits::<L, G>(at, t), L::and(high, L::words(0x1010_1010)))
    }
}

/// Some panels of y = x · Wᵀ.
pub(crate) struct Multiply<'a, G> {
    pub(crate) w: &'a Run,
    /// As `Quantized` leaves it.
    pub(crate) x: &'a [u32],
    pub(crate) rows: usize,
    /// Blocks of each chain; the chains' sums are added as a binary tree.
    pub(crate) chains: &'a [Range<usize>],
    /// The run's first output of the first row.
    pub(crate) y: Out<f32>,
    pub(crate) y_stride: usize,
    pub(crate) panels: Range<usize>,
    pub(crate) grid: PhantomData<G>,
}

/// What a thread keeps at hand; nothing in it is read before it is written.
#[repr(align(64))]
struct Scratch {
    sums: [[f32; GROUP * PANEL]; LEVELS],
}

/// Rows of a tile and the blocks they meet.
#[derive(Clone, Copy)]
struct Tile {
    panel: *const u8,
    x: *const u32,
    x_stride: usize,
    rows: usize,
    /// 64 sums per row.
    y: *mut f32,
    /// How far ahead to read, and which lines of a block.
    distance: usize,
    lines: (usize, usize),
}

impl<G: Grid> Kernel for Multiply<'_, G> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        unsafe {
            let mut scratch = MaybeUninit::<Scratch>::uninit();
            let sums = (&raw mut (*scratch.as_mut_ptr()).sums).cast::<f32>();
            // A group's x stays in L2 while all panels pass by.
            for row in (0..self.rows).step_by(GROUP) {
                let rows = GROUP.min(self.rows - row);
                for panel in self.panels.clone() {
                    self.group::<L>(panel, row, rows, sums);
                    self.write::<L>(panel, row, rows, sums);
                }
            }
        }
    }
}

impl<G: Grid> Multiply<'_, G> {
    /// Sums of one row group against one panel, into the first level.
    #[inline(always)]
    unsafe fn group<L: Lanes>(&self, panel: usize, row: usize, rows: usize, sums: *mut f32) {
        unsafe {
            for (part, blocks) in self.chains.iter().enumerate() {
                // Finished parts lie on the levels below as in a binary counter.
                let mut level = part.count_ones() as usize;
                self.chain::<L>(panel, row..row + rows, blocks.clone(), sums.add(level * GROUP * PANEL));
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
    unsafe fn chain<L: Lanes>(&self, panel: usize, rows: Range<usize>, blocks: Range<usize>, sums: *mut f32) {
        unsafe {
            std::ptr::write_bytes(sums, 0, rows.len() * PANEL);
            let (tiles, lines) = (rows.len().div_ceil(TILE_ROWS), G::FORMAT.block_bytes() / 64);
            let piece = if tiles == 1 { blocks.len().max(1) } else { PIECE };
            let x_stride = self.w.blocks() * WORDS;
            for start in blocks.clone().step_by(piece) {
                let blocks = start..blocks.end.min(start + piece);
                let mut row = 0;
                for tile in 0..tiles {
                    let count = rows.len() / tiles + (tile < rows.len() % tiles) as usize;
                    let part = Tile {
                        panel: self.w.panel(panel),
                        x: self.x.as_ptr().add((rows.start + row) * x_stride),
                        x_stride,
                        rows: count,
                        y: sums.add(row * PANEL),
                        distance: if tiles == 1 { AHEAD } else { blocks.len() * G::FORMAT.block_bytes() },
                        // Tiles share the reading ahead evenly.
                        lines: (lines * tile / tiles, lines * (tile + 1) / tiles),
                    };
                    part.run::<L, G>(blocks.clone());
                    row += count;
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

impl Tile {
    #[inline(always)]
    unsafe fn run<L: Lanes, G: Grid>(self, blocks: Range<usize>) {
        unsafe {
            match (self.rows, L::WIDE) {
                (1, _) => self.columns::<L, G, 1, 4>(blocks),
                (2, true) => self.columns::<L, G, 2, 4>(blocks),
                (3, true) => self.columns::<L, G, 3, 4>(blocks),
                (4, true) => self.columns::<L, G, 4, 4>(blocks),
                (5, true) => self.columns::<L, G, 5, 4>(blocks),
                (_, true) => self.columns::<L, G, 6, 4>(blocks),
                (2, false) => self.columns::<L, G, 2, 2>(blocks),
                (3, false) => self.columns::<L, G, 3, 2>(blocks),
                (4, false) => self.columns::<L, G, 4, 1>(blocks),
                (5, false) => self.columns::<L, G, 5, 1>(blocks),
                (_, false) => self.columns::<L, G, 6, 1>(blocks),
            }
        }
    }

    /// The panel's 64 outputs, NR·16 at a time.
    #[inline(always)]
    unsafe fn columns<L: Lanes, G: Grid, const MR: usize, const NR: usize>(self, blocks: Range<usize>) {
        unsafe {
            for column in 0..4 / NR {
                for block in blocks.clone() {
                    self.block::<L, G, MR, NR>(block, column * NR * 16);
                }
            }
        }
    }

    /// Adds one block's products to the sums of MR rows of NR·16 outputs.
    #[inline(always)]
    unsafe fn block<L: Lanes, G: Grid, const MR: usize, const NR: usize>(self, block: usize, lane: usize) {
        unsafe {
            let start = self.panel.add(G::FORMAT.block_at(block));
            let ahead = self.panel.add(G::FORMAT.block_at(block / SUPER * SUPER) - G::FORMAT.super_bytes());
            let at = |n: usize| At { block: start, ahead, lane: lane + n * 16 };
            let (x, y) = (self.x.add(block * WORDS), self.y.add(lane));
            let soon = start.wrapping_add(self.distance + self.lines.0 * 64);
            let lines = self.lines.1 - self.lines.0;
            for half in 0..G::HALVES {
                let mut sums = [[L::words(0); NR]; MR];
                if let Some(zero) = G::ZERO {
                    let minus = if G::HALVES == 1 { MINUS_ALL } else { MINUS_FIRST + half };
                    for m in 0..MR {
                        sums[m] = [L::words(x.add(m * self.x_stride + minus).read() << zero); NR];
                    }
                }
                for i in half * 8 / G::HALVES..(half + 1) * 8 / G::HALVES {
                    for line in lines * i / 8..lines * (i + 1) / 8 {
                        L::prefetch(soon.wrapping_add(line * 64));
                    }
                    let t = G::ORDER[i];
                    let mut w = [L::words(0); NR];
                    for n in 0..NR {
                        w[n] = G::bytes::<L>(at(n), t);
                    }
                    for m in 0..MR {
                        let word = x.add(m * self.x_stride + t).read();
                        for n in 0..NR {
                            sums[m][n] = L::dot_bytes(sums[m][n], w[n], word);
                        }
                    }
                }
                let mut scales = [L::splat(0.0); NR];
                for n in 0..NR {
                    scales[n] = G::scales::<L>(at(n), half);
                }
                for m in 0..MR {
                    let scale = L::splat(x.add(m * self.x_stride + SCALE).cast::<f32>().read());
                    for n in 0..NR {
                        let y = y.add(m * PANEL + n * 16);
                        L::store(y, L::fma(L::to_f32(sums[m][n]), L::mul(scales[n], scale), L::load(y)));
                    }
                }
            }
            if G::FORMAT.minima() {
                for n in 0..NR {
                    let minima = G::minima::<L>(at(n));
                    for m in 0..MR {
                        let (x, y) = (x.add(m * self.x_stride), y.add(m * PANEL + n * 16));
                        let minus = x.add(MINUS_ALL).cast::<i32>().read() as f32 * x.add(SCALE).cast::<f32>().read();
                        L::store(y, L::fma(minima, L::splat(minus), L::load(y)));
                    }
                }
            }
        }
    }
}

/// Turns rows of f32 into blocks of integers for a matmul, in (row, block, words).
pub(crate) struct Quantized<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) cols: usize,
    pub(crate) to: Out<u32>,
    /// The rows to do now.
    pub(crate) shown: Range<usize>,
}

impl Kernel for Quantized<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let mut integers = [0i8; BLOCK_LEN];
        for row in self.shown.clone() {
            let values = &self.x[row * self.cols..][..self.cols];
            for (block, values) in values.chunks(BLOCK_LEN).enumerate() {
                let scale = quantize(values, &mut integers);
                let (first, second) = integers.split_at(BLOCK_LEN / 2);
                let sum = |part: &[i8]| part.iter().map(|q| i32::from(*q)).sum::<i32>();
                let (first, second) = (sum(first), sum(second));
                let to = self.to.at((row * self.cols.div_ceil(BLOCK_LEN) + block) * WORDS);
                // SAFETY: the block's words, this part's alone.
                unsafe {
                    to.cast::<[i8; BLOCK_LEN]>().write(integers);
                    to.add(SCALE).write(scale.to_bits());
                    to.add(MINUS_FIRST).cast::<i32>().write(-first);
                    to.add(MINUS_SECOND).cast::<i32>().write(-second);
                    to.add(MINUS_ALL).cast::<i32>().write(-first - second);
                }
            }
        }
    }
}
