//! Weights in the order the matmul reads them.
//!
//! ```text
//! panel = 64 outputs, one after another; N padded with zeros
//! bf16:      [K/2][64 outputs][2] bf16; K padded with zeros
//! quantized: per 32 k a block: scales, then words of 4 bytes as [words][64 outputs]; K padded with zeros
//!   q8_0   64 f16 scales; 8 words, k in order, each q + 128 in a byte
//!   q4_0   64 f16 scales; 4 words, byte j: k = j in its low half, k = j + 16 in its high half, each q + 8
//!   q4_1   64 f16 scales, 64 f16 minima; 4 words as q4_0, each q
//!   q5_0   64 f16 scales; 4 words as q4_0, the low 4 bits of q + 16; 1 word of the high bits: bit t of byte j is of k = 4·t + j
//!   q5_1   64 f16 scales, 64 f16 minima; words as q5_0, each q
//!   q4_k   64 u8 scales, 64 u8 minima; 4 words as q4_0, each q
//!   q5_k   64 u8 scales, 64 u8 minima; words as q5_0, each q
//!   q6_k   2 × 64 i8 scales, one per 16 k; 4 words as q4_0, the low 4 bits of q + 32; 2 words of the high 2 bits
//! ahead of every 8 blocks: q4_k and q5_k 64 f16 scales and 64 f16 scales of minima, q6_k 64 f16 scales
//! ```

pub(crate) mod file;
pub(crate) mod pieces;

use std::ops::Range;

use crate::bf16;
use crate::memory::Memory;
use crate::quant::{self, BLOCK_LEN, Block, SUPER};

/// Outputs per panel.
pub(crate) const PANEL: usize = 64;
/// Bytes of one pair of k for a whole panel, and of one word of quantized weights.
pub(crate) const STEP: usize = PANEL * 4;
/// Bytes of a half, or of two bytes, of every output.
pub(crate) const HALVES: usize = PANEL * 2;

/// Element type of weights as stored on disk, little endian. The quantized ones are GGUF's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

impl Dtype {
    /// Elements that are stored as one unit; a row holds whole units.
    pub fn unit(self) -> usize {
        match self {
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 => 1,
            Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q5_0 | Dtype::Q5_1 => BLOCK_LEN,
            Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => BLOCK_LEN * SUPER,
        }
    }

    /// Bytes of a unit.
    pub fn unit_bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::Q8_0 => 34,
            Dtype::Q4_0 => 18,
            Dtype::Q4_1 => 20,
            Dtype::Q5_0 => 22,
            Dtype::Q5_1 => 24,
            Dtype::Q4K => 144,
            Dtype::Q5K => 176,
            Dtype::Q6K => 210,
        }
    }

    /// Bytes of a row of `cols` elements; None when they are not whole units or too many to count.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        cols.is_multiple_of(self.unit()).then(|| (cols / self.unit()).checked_mul(self.unit_bytes())).flatten()
    }

    /// Columns of a step in which K is multiplied, once packed: 2 of bf16, 32 of quantized weights.
    pub fn step(self, quantize: Option<Quantize>) -> usize {
        Format::of(self, quantize).step()
    }

    /// Whether each element is a number of its own.
    pub fn is_float(self) -> bool {
        self.unit() == 1
    }
}

/// What floating-point weights are turned into as they are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantize {
    /// Eight bits and a scale per 32 weights, as GGUF's Q8_0.
    Q8_0,
    /// Four bits and a scale per 32 weights, as GGUF's Q4_0.
    Q4_0,
}

impl Quantize {
    pub const ALL: [Quantize; 2] = [Quantize::Q8_0, Quantize::Q4_0];

    pub fn as_str(self) -> &'static str {
        match self {
            Quantize::Q8_0 => "q8_0",
            Quantize::Q4_0 => "q4_0",
        }
    }
}

/// How weights lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

impl Format {
    fn of(dtype: Dtype, quantize: Option<Quantize>) -> Format {
        match (dtype, quantize) {
            (Dtype::Q8_0, _) => Format::Q8_0,
            (Dtype::Q4_0, _) => Format::Q4_0,
            (Dtype::Q4_1, _) => Format::Q4_1,
            (Dtype::Q5_0, _) => Format::Q5_0,
            (Dtype::Q5_1, _) => Format::Q5_1,
            (Dtype::Q4K, _) => Format::Q4K,
            (Dtype::Q5K, _) => Format::Q5K,
            (Dtype::Q6K, _) => Format::Q6K,
            (_, None) => Format::Bf16,
            (_, Some(Quantize::Q8_0)) => Format::Q8_0,
            (_, Some(Quantize::Q4_0)) => Format::Q4_0,
        }
    }

    /// Columns of a step in which K is multiplied.
    pub(crate) const fn step(self) -> usize {
        match self {
            Format::Bf16 => 2,
            _ => BLOCK_LEN,
        }
    }

    /// Words of four bytes that an output has in a block of 32 k.
    pub(crate) const fn words(self) -> usize {
        match self {
            Format::Bf16 => 16,
            Format::Q8_0 => 8,
            Format::Q4_0 | Format::Q4_1 | Format::Q4K => 4,
            Format::Q5_0 | Format::Q5_1 | Format::Q5K => 5,
            Format::Q6K => 6,
        }
    }

    /// Whether something is subtracted from every weight of a block.
    pub(crate) const fn minima(self) -> bool {
        matches!(self, Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K)
    }

    /// Whether a block's scale is a product with one above 8 blocks.
    pub(crate) const fn two_scales(self) -> bool {
        matches!(self, Format::Q4K | Format::Q5K | Format::Q6K)
    }

    /// Bytes of scales at a block's beginning for a whole panel.
    pub(crate) const fn head_bytes(self) -> usize {
        if self.minima() && !self.two_scales() { 2 * HALVES } else { HALVES }
    }

    /// Bytes of a block for a whole panel.
    pub(crate) const fn block_bytes(self) -> usize {
        self.head_bytes() + self.words() * STEP
    }

    /// Bytes ahead of every 8 blocks for a whole panel.
    pub(crate) const fn super_bytes(self) -> usize {
        match self {
            Format::Q4K | Format::Q5K => 2 * HALVES,
            Format::Q6K => HALVES,
            _ => 0,
        }
    }

    /// Halves that an output has there.
    const fn halves_ahead(self) -> usize {
        self.super_bytes() / HALVES
    }

    /// Where a block begins in its panel.
    pub(crate) const fn block_at(self, block: usize) -> usize {
        (block / SUPER + 1) * self.super_bytes() + block * self.block_bytes()
    }

    fn panel_bytes(self, cols: usize) -> usize {
        match self {
            Format::Bf16 => cols.div_ceil(2) * STEP,
            _ => {
                let blocks = cols.div_ceil(BLOCK_LEN);
                blocks.div_ceil(SUPER) * self.super_bytes() + blocks * self.block_bytes()
            }
        }
    }
}

/// A row-major matrix as it lies in a file: rows are outputs, columns inputs.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    pub dtype: Dtype,
    pub bytes: &'a [u8],
    pub rows: usize,
    pub cols: usize,
}

impl<'a> Matrix<'a> {
    /// Some of its rows.
    ///
    /// # Panics
    /// If it has no such rows.
    pub fn some_rows(&self, range: Range<usize>) -> Matrix<'a> {
        let width = self.bytes.len() / self.rows;
        Matrix { bytes: &self.bytes[range.start * width..range.end * width], rows: range.len(), ..*self }
    }

    fn row(&self, row: usize) -> &[u8] {
        let width = self.bytes.len() / self.rows;
        &self.bytes[row * width..][..width]
    }

    /// Row `row` of floating-point numbers rounded to bf16, written over `out`.
    pub(crate) fn read_row(&self, row: usize, out: &mut [u16]) {
        let bytes = self.row(row);
        match self.dtype {
            Dtype::Bf16 => fill(out, bytes, u16::from_le_bytes),
            Dtype::F16 => fill(out, bytes, |b| bf16::round(bf16::widen_f16(u16::from_le_bytes(b)))),
            Dtype::F32 => fill(out, bytes, |b| bf16::round(f32::from_le_bytes(b))),
            _ => unreachable!("quantized rows are read in blocks"),
        }
    }

    /// Row `row` as blocks of a quantized format, written over `out`; `values` holds a row of f32.
    pub(crate) fn read_blocks(&self, row: usize, format: Format, values: &mut [f32], out: &mut [Block]) {
        let bytes = self.row(row);
        match self.dtype {
            Dtype::Bf16 => fill(values, bytes, |b| bf16::widen(u16::from_le_bytes(b))),
            Dtype::F16 => fill(values, bytes, |b| bf16::widen_f16(u16::from_le_bytes(b))),
            Dtype::F32 => fill(values, bytes, f32::from_le_bytes),
            quantized => return quant::read_blocks(quantized, bytes, out),
        }
        for (values, block) in values.chunks(BLOCK_LEN).zip(out) {
            *block = if format == Format::Q4_0 { quant::to_q4_0(values) } else { quant::to_q8_0(values) };
        }
    }
}

fn fill<T, const B: usize>(out: &mut [T], bytes: &[u8], value: impl Fn([u8; B]) -> T) {
    let (elements, _) = bytes.as_chunks::<B>();
    for (out, &element) in out.iter_mut().zip(elements) {
        *out = value(element);
    }
}

/// A weight matrix in panels. Neighbouring rows of one format are a run. The default has no rows.
#[derive(Default)]
pub struct Packed {
    runs: Vec<Run>,
    rows: usize,
    cols: usize,
}

/// Rows of one format in panels of their own.
pub(crate) struct Run {
    memory: Memory,
    pub(crate) format: Format,
    /// Its first row's index in the matrix.
    pub(crate) first: usize,
    rows: usize,
    cols: usize,
}

impl Packed {
    /// Outputs (N).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs (K).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.runs.iter().map(Run::bytes).sum()
    }

    /// Whether products with it are of bytes.
    pub fn is_quantized(&self) -> bool {
        self.runs.iter().any(|run| run.format != Format::Bf16)
    }

    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The run that holds a row, and the row's index in it.
    pub(crate) fn run_of(&self, row: usize) -> (&Run, usize) {
        assert!(row < self.rows, "a row past the last");
        let at = self.runs.partition_point(|run| run.first <= row) - 1;
        (&self.runs[at], row - self.runs[at].first)
    }

    /// The values of one row.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        let (run, row) = self.run_of(row);
        match run.format {
            Format::Bf16 => out.iter_mut().enumerate().for_each(|(col, to)| *to = bf16::widen(run.at(row, col))),
            _ => {
                for (block, to) in out.chunks_mut(BLOCK_LEN).enumerate() {
                    run.block(row, block).read(run.format, to);
                }
            }
        }
    }

    /// The value of one weight.
    #[cfg(test)]
    pub(crate) fn value(&self, row: usize, col: usize) -> f32 {
        let mut values = vec![0.0; self.cols];
        self.read_row(row, &mut values);
        values[col]
    }

    /// Memory for a matrix of this shape; whoever packs writes every panel before anyone reads. With each run come the
    /// parts that fill it.
    pub(crate) fn new<'a, 'b>(parts: &'a [Matrix<'b>], quantize: Option<Quantize>) -> (Packed, Vec<&'a [Matrix<'b>]>) {
        let (cols, groups) = groups(parts, quantize);
        let (mut runs, mut first) = (Vec::new(), 0);
        for (format, group) in &groups {
            let rows = group.iter().map(|part| part.rows).sum::<usize>();
            let memory = Memory::new(rows.div_ceil(PANEL) * format.panel_bytes(cols));
            runs.push(Run { memory, format: *format, first, rows, cols });
            first += rows;
        }
        (Packed { runs, rows: first, cols }, groups.into_iter().map(|(_, group)| group).collect())
    }
}

/// The width of a matrix of these parts, and its runs: the format of each and the parts that fill it.
///
/// # Panics
/// If the parts differ in width or their bytes do not fit their shapes.
fn groups<'a, 'b>(parts: &'a [Matrix<'b>], quantize: Option<Quantize>) -> (usize, Vec<(Format, &'a [Matrix<'b>])>) {
    let cols = parts.first().map_or(0, |part| part.cols);
    for part in parts {
        assert_eq!(part.cols, cols, "parts of one matrix differ in width");
        let bytes = part.dtype.row_bytes(cols).and_then(|bytes| bytes.checked_mul(part.rows));
        assert_eq!(Some(part.bytes.len()), bytes, "bytes do not fit the shape");
    }
    let format = |part: &Matrix| Format::of(part.dtype, quantize);
    let groups = parts.chunk_by(|a, b| format(a) == format(b));
    (cols, groups.map(|group| (format(&group[0]), group)).collect())
}

impl Run {
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Pairs of k, the last one padded when K is odd.
    pub(crate) fn pairs(&self) -> usize {
        self.cols.div_ceil(2)
    }

    /// Blocks of 32 k, the last one padded.
    pub(crate) fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK_LEN)
    }

    pub(crate) fn panel(&self, panel: usize) -> *const u8 {
        assert!(panel < self.panels());
        // SAFETY: inside the allocation by the assertion.
        unsafe { self.memory.base().add(panel * self.format.panel_bytes(self.cols)) }
    }

    /// The bf16 value of one weight.
    pub(crate) fn at(&self, row: usize, col: usize) -> u16 {
        assert!(self.format == Format::Bf16 && row < self.rows && col < 2 * self.pairs());
        let offset = (col / 2 * PANEL + row % PANEL) * 2 + col % 2;
        // SAFETY: inside the panel, all of which was written by `pack`.
        unsafe { self.panel(row / PANEL).cast::<u16>().add(offset).read() }
    }

    /// Where the first pair of one output of a bf16 panel lies; the next pair is `STEP` bytes on.
    pub(crate) fn lane(&self, panel: usize, lane: usize) -> *mut u32 {
        self.panel(panel).wrapping_add(lane * 4).cast_mut().cast()
    }

    /// One output's block of 32 k.
    pub(crate) fn block(&self, row: usize, block: usize) -> Block {
        assert!(row < self.rows && block < self.blocks());
        let (mut found, places) = (Block::default(), self.places(row, block));
        // SAFETY: inside the panel, all of which was written by `pack`.
        unsafe {
            for (to, byte) in found.head.iter_mut().zip(places.head).take(self.format.head_bytes() / PANEL) {
                *to = byte.read();
            }
            for (i, word) in found.words.chunks_exact_mut(4).take(self.format.words()).enumerate() {
                word.copy_from_slice(&places.words.wrapping_add(i * STEP).cast::<[u8; 4]>().read());
            }
            for (i, half) in found.ahead.chunks_exact_mut(2).take(self.format.halves_ahead()).enumerate() {
                half.copy_from_slice(&places.ahead.wrapping_add(i * HALVES).cast::<[u8; 2]>().read());
            }
        }
        found
    }

    /// Writes one output's block; the row may be padding.
    ///
    /// # Safety
    /// Nobody else reads or writes this block of this output meanwhile.
    pub(crate) unsafe fn write_block(&self, row: usize, block: usize, value: &Block) {
        assert!(row < self.panels() * PANEL && block < self.blocks());
        let places = self.places(row, block);
        // SAFETY: inside the panel by the assertion; alone by the caller.
        unsafe {
            for (to, byte) in places.head.iter().zip(value.head).take(self.format.head_bytes() / PANEL) {
                to.write(byte);
            }
            for (i, word) in value.words.as_chunks::<4>().0.iter().take(self.format.words()).enumerate() {
                places.words.wrapping_add(i * STEP).cast::<[u8; 4]>().write(*word);
            }
            for (i, half) in value.ahead.as_chunks::<2>().0.iter().take(self.format.halves_ahead()).enumerate() {
                places.ahead.wrapping_add(i * HALVES).cast::<[u8; 2]>().write(*half);
            }
        }
    }

    fn places(&self, row: usize, block: usize) -> Places {
        let (panel, lane) = (self.panel(row / PANEL).cast_mut(), row % PANEL);
        let start = panel.wrapping_add(self.format.block_at(block));
        let head = match self.format.two_scales() {
            true => [lane, PANEL + lane, 0, 0],
            false => [lane * 2, lane * 2 + 1, HALVES + lane * 2, HALVES + lane * 2 + 1],
        };
        let ahead = panel.wrapping_add(self.format.block_at(block / SUPER * SUPER) - self.format.super_bytes());
        let words = start.wrapping_add(self.format.head_bytes() + lane * 4);
        Places { head: head.map(|at| start.wrapping_add(at)), words, ahead: ahead.wrapping_add(lane * 2) }
    }
}

/// Where the bytes of one output's block lie.
struct Places {
    /// As many as the format has.
    head: [*mut u8; 4],
    /// The first word; the next is `STEP` on.
    words: *mut u8,
    /// The first half; the next is `HALVES` on.
    ahead: *mut u8,
}

/// The part that holds a row of the whole, and the row's index in it.
pub(crate) fn locate<'a, 'b>(parts: &'a [Matrix<'b>], mut row: usize) -> Option<(&'a Matrix<'b>, usize)> {
    for part in parts {
        if row < part.rows {
            return Some((part, row));
        }
        row -= part.rows;
    }
    None
}
