//! Packed matrices as bytes of a file, and out of the mapping of one: processes that map the same file have the weights once.
//!
//! ```text
//! matrix   rows, cols, runs; of each run its format, first row, rows, bytes         u64 each
//!          padding to a page | panels of the first run | padding to a page | ...
//! ```

use std::ops::Range;
use std::sync::Arc;

use super::{Format, Packed, Run};
use crate::memory::Memory;

/// Where panels begin in a file: a multiple of what memory is mapped in.
pub const ALIGNMENT: usize = 4096;
pub(super) const WORD: usize = 8;
const RUN_WORDS: usize = 4;

/// The mapping of a whole file that begins at a page.
pub type Mapped = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Formats by their number in files.
pub(super) const FORMATS: [Format; 9] = [
    Format::Bf16,
    Format::Q8_0,
    Format::Q4_0,
    Format::Q4_1,
    Format::Q5_0,
    Format::Q5_1,
    Format::Q4K,
    Format::Q5K,
    Format::Q6K,
];

impl Packed {
    /// The matrix in these bytes of the file, which begin at a page; `Pieces` makes them. None: they are none.
    pub fn map(file: &Mapped, place: Range<usize>) -> Option<Packed> {
        let bytes = (**file).as_ref().get(place.clone())?;
        if !place.start.is_multiple_of(ALIGNMENT) || !bytes.as_ptr().addr().is_multiple_of(ALIGNMENT) {
            return None;
        }
        let word = |at: usize| {
            let bytes = bytes.get(at * WORD..(at + 1) * WORD)?.first_chunk()?;
            usize::try_from(u64::from_le_bytes(*bytes)).ok()
        };
        let (rows, cols, count) = (word(0)?, word(1)?, word(2)?);
        let mut at = (3 + count.checked_mul(RUN_WORDS)?).checked_mul(WORD).filter(|at| *at <= bytes.len())?;
        let (mut runs, mut next) = (Vec::new(), 0usize);
        for run in 0..count {
            let [format, first, run_rows, size] = std::array::from_fn(|i| word(3 + run * RUN_WORDS + i));
            let (format, first, run_rows, size) = (*FORMATS.get(format?)?, first?, run_rows?, size?);
            at = at.next_multiple_of(ALIGNMENT);
            let end = at.checked_add(size).filter(|end| *end <= bytes.len())?;
            let memory = Memory::of(file.clone(), place.start + at..place.start + end);
            let run = Run { memory, format, first, rows: run_rows, cols };
            if first != next || run_rows == 0 || run.panel_bytes_checked() != Some(size) {
                return None;
            }
            next = first.checked_add(run_rows)?;
            runs.push(run);
            at = end;
        }
        (next == rows && cols > 0 && at == bytes.len()).then_some(Packed { runs, rows, cols })
    }
}

impl Run {
    /// Bytes of all panels, of numbers that a file holds.
    fn panel_bytes_checked(&self) -> Option<usize> {
        // No more columns than bytes that would hold a bit of each.
        let sane = self.cols < usize::MAX / (4 * super::STEP);
        sane.then(|| self.format.panel_bytes(self.cols).checked_mul(self.panels())).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cpu, Dtype, Matrix, Pieces, Profile, Quantize};

    /// Bytes that begin at a page.
    #[repr(C, align(4096))]
    #[derive(Clone, Copy)]
    struct Aligned([u8; ALIGNMENT]);

    struct Copied(Vec<Aligned>, usize);

    impl Copied {
        fn of(bytes: &[u8]) -> Mapped {
            let mut parts = vec![Aligned([0; ALIGNMENT]); bytes.len().div_ceil(ALIGNMENT)];
            parts
                .iter_mut()
                .zip(bytes.chunks(ALIGNMENT))
                .for_each(|(to, part)| to.0[..part.len()].copy_from_slice(part));
            Arc::new(Copied(parts, bytes.len()))
        }
    }

    impl AsRef<[u8]> for Copied {
        fn as_ref(&self) -> &[u8] {
            // SAFETY: pages are plain bytes, one behind the other, and there are at least as many.
            unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.1) }
        }
    }

    fn written(quantize: Option<Quantize>) -> (Packed, Vec<u8>) {
        let numbers: Vec<u8> = (0..(70 + 3) * 64).flat_map(|i| (i as f32 / 97.0 - 20.0).to_le_bytes()).collect();
        let (first, second) = numbers.split_at(70 * 64 * 4);
        let part = |bytes, rows| Matrix { dtype: Dtype::F32, bytes, rows, cols: 64 };
        let cpu = Cpu::new(1, Profile::F32Acc).unwrap();
        let parts = [part(first, 70), part(second, 3)];
        let pieces = Pieces::new(&parts, quantize);
        let mut bytes = pieces.head();
        for run in 0..pieces.runs() {
            let at = bytes.len().next_multiple_of(ALIGNMENT);
            bytes.resize(at, 0);
            // One by one, which is as good as all together.
            for panel in 0..pieces.panels(run) {
                let mut out = vec![0; pieces.panel_bytes(run)];
                cpu.pack_panels(&pieces, run, panel..panel + 1, &mut out);
                bytes.extend(out);
            }
        }
        let packed = cpu.pack_as(&parts, quantize);
        (packed, bytes)
    }

    #[test]
    fn what_is_written_is_mapped() {
        for quantize in [None, Some(Quantize::Q8_0), Some(Quantize::Q4_0)] {
            let (packed, bytes) = written(quantize);
            let file = Copied::of(&[vec![1; ALIGNMENT], bytes.clone()].concat());
            let mapped = Packed::map(&file, ALIGNMENT..ALIGNMENT + bytes.len()).expect("a matrix");
            assert_eq!((mapped.rows(), mapped.cols()), (packed.rows(), packed.cols()));
            let values = |matrix: &Packed| (0..73).map(|row| matrix.value(row, row % 64).to_bits()).collect::<Vec<_>>();
            assert_eq!(values(&mapped), values(&packed));
        }
    }

    /// Bytes that are cut or changed in what describes them are a matrix within them, or none.
    #[test]
    fn anything_else_is_none_or_fits() {
        let (_, bytes) = written(Some(Quantize::Q8_0));
        for len in (0..bytes.len()).step_by(61) {
            assert!(Packed::map(&Copied::of(&bytes[..len]), 0..len).is_none(), "{len} bytes");
        }
        for at in 0..7 * WORD {
            for byte in [0, 1, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] = byte;
                if let Some(found) = Packed::map(&Copied::of(&bytes), 0..bytes.len()) {
                    assert!(found.bytes() <= bytes.len());
                    for row in 0..found.rows() {
                        let _within_the_file = found.value(row, found.cols() - 1);
                    }
                }
            }
        }
        assert!(Packed::map(&Copied::of(&bytes), 8..bytes.len()).is_none());
    }
}
