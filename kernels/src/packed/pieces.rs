//! A matrix that is packed a few panels at a time, into memory of the caller's: on its way to a file it is never whole in memory.

use std::ops::Range;

use super::file::{FORMATS, WORD};
use super::{Format, Matrix, PANEL, Quantize, Run, groups};
use crate::memory::Memory;

/// What a matrix is to be made of. Its bytes in a file: the head, and from the beginning of a page on each the panels of every
/// run (`Packed::map` reads them).
pub struct Pieces<'a> {
    rows: usize,
    cols: usize,
    /// Format, rows, and the parts that fill it.
    runs: Vec<(Format, usize, &'a [Matrix<'a>])>,
}

impl<'a> Pieces<'a> {
    /// As `Cpu::pack_as`.
    ///
    /// # Panics
    /// If the parts differ in width or their bytes do not fit their shapes.
    pub fn new(parts: &'a [Matrix<'a>], quantize: Option<Quantize>) -> Pieces<'a> {
        let (cols, groups) = groups(parts, quantize);
        let rows = |group: &[Matrix]| group.iter().map(|part| part.rows).sum::<usize>();
        let runs: Vec<_> = groups.into_iter().map(|(format, group)| (format, rows(group), group)).collect();
        Pieces { rows: rows(parts), cols, runs }
    }

    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// Of a run.
    pub fn panels(&self, run: usize) -> usize {
        self.runs[run].1.div_ceil(PANEL)
    }

    /// Of one panel of a run.
    pub fn panel_bytes(&self, run: usize) -> usize {
        self.runs[run].0.panel_bytes(self.cols)
    }

    /// What stands before the first run.
    pub fn head(&self) -> Vec<u8> {
        let (mut words, mut first) = (vec![self.rows, self.cols, self.runs.len()], 0);
        for (run, (format, rows, _)) in self.runs.iter().enumerate() {
            let format = FORMATS.iter().position(|known| known == format).expect("every format is known");
            words.extend([format, first, *rows, self.panels(run) * self.panel_bytes(run)]);
            first += rows;
        }
        let mut bytes = Vec::with_capacity(words.len() * WORD);
        words.iter().for_each(|word| bytes.extend((*word as u64).to_le_bytes()));
        bytes
    }

    /// Some panels of a run as a run of their own that lies in `out`, and the parts that fill it.
    pub(crate) fn lay(&self, run: usize, panels: Range<usize>, out: &mut [u8]) -> (Run, Vec<Matrix<'a>>) {
        let (format, rows, parts) = self.runs[run];
        assert_eq!(out.len(), panels.len() * self.panel_bytes(run), "memory of another size");
        assert!(out.as_ptr().cast::<u32>().is_aligned(), "memory that does not begin at a word");
        let rows = panels.start * PANEL..(panels.end * PANEL).min(rows);
        let (mut some, mut first) = (Vec::new(), 0);
        for part in parts {
            let (from, to) = (rows.start.max(first) - first, rows.end.min(first + part.rows).saturating_sub(first));
            if from < to {
                some.push(part.some_rows(from..to));
            }
            first += part.rows;
        }
        let memory = Memory::lent(out);
        (Run { memory, format, first: 0, rows: rows.len(), cols: self.cols }, some)
    }
}
