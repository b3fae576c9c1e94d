//! Weights in the order the matmul reads them.
//!
//! ```text
//! panel = 64 outputs; panels of [K/2][64 outputs][2] bf16, one after another; N and K padded with zeros
//! ```

use crate::bf16;
use crate::memory::Memory;

/// Outputs per panel.
pub(crate) const PANEL: usize = 64;
/// Bytes of one pair of k for a whole panel.
pub(crate) const STEP: usize = PANEL * 4;

/// Element type of weights as stored on disk, little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
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

impl Matrix<'_> {
    /// Row `row` rounded to bf16, written over `out`.
    pub(crate) fn read_row(&self, row: usize, out: &mut [u16]) {
        let width = self.cols * self.dtype.bytes();
        let bytes = &self.bytes[row * width..][..width];
        match self.dtype {
            Dtype::Bf16 => fill(out, bytes, u16::from_le_bytes),
            Dtype::F16 => fill(out, bytes, |b| bf16::round(bf16::widen_f16(u16::from_le_bytes(b)))),
            Dtype::F32 => fill(out, bytes, |b| bf16::round(f32::from_le_bytes(b))),
        }
    }
}

fn fill<const B: usize>(out: &mut [u16], bytes: &[u8], value: impl Fn([u8; B]) -> u16) {
    let (elements, _) = bytes.as_chunks::<B>();
    for (out, &element) in out.iter_mut().zip(elements) {
        *out = value(element);
    }
}

/// A weight matrix in panels, rounded to bf16.
pub struct Packed {
    memory: Memory,
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
        self.memory.bytes()
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Pairs of k, the last one padded when K is odd.
    pub(crate) fn pairs(&self) -> usize {
        self.cols.div_ceil(2)
    }

    pub(crate) fn panel(&self, panel: usize) -> *const u8 {
        assert!(panel < self.panels());
        // SAFETY: inside the allocation by the assertion.
        unsafe { self.memory.base().add(panel * self.pairs() * STEP) }
    }

    /// The bf16 value of one weight.
    pub(crate) fn at(&self, row: usize, col: usize) -> u16 {
        assert!(row < self.rows && col < 2 * self.pairs());
        let offset = (col / 2 * PANEL + row % PANEL) * 2 + col % 2;
        // SAFETY: inside the panel, all of which was written by `pack`.
        unsafe { self.panel(row / PANEL).cast::<u16>().add(offset).read() }
    }

    /// Memory for a matrix of this shape; whoever packs writes every panel before anyone reads.
    pub(crate) fn new(parts: &[Matrix]) -> Packed {
        let cols = parts.first().map_or(0, |part| part.cols);
        for part in parts {
            assert_eq!(part.cols, cols, "parts of one matrix differ in width");
            assert_eq!(part.bytes.len(), part.rows * cols * part.dtype.bytes(), "bytes do not fit the shape");
        }
        let rows = parts.iter().map(|part| part.rows).sum::<usize>();
        let bytes = rows.div_ceil(PANEL) * cols.div_ceil(2) * STEP;
        Packed { memory: Memory::new(bytes), rows, cols }
    }

    /// Where the first pair of one output of a panel lies; the next pair is `STEP` bytes on.
    pub(crate) fn lane(&self, panel: usize, lane: usize) -> *mut u32 {
        self.panel(panel).wrapping_add(lane * 4).cast_mut().cast()
    }
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
