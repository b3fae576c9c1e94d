//! How K of a row-parallel matmul is cut: into 8 segments, a constant of the model, of which each rank of a
//! tensor-parallel group holds an equal number of neighbours. Every segment is one chain, and the chains' sums are added
//! as one binary tree, first those of a rank, then those of the ranks: so 1, 2, 4 and 8 ranks give the same bits.
//!
//! A segment is of whole steps, in which K is multiplied: pairs of columns of bf16 weights, blocks of 32 of quantized ones.

use std::ops::Range;

/// Segments of K; a power of two.
pub const SEGMENTS: usize = 8;

/// The segments that one rank holds of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    cols: usize,
    rank: usize,
    world: usize,
}

impl Segments {
    /// All segments of a matrix with `cols` columns.
    pub fn whole(cols: usize) -> Segments {
        Segments { cols, rank: 0, world: 1 }
    }

    /// Those of one of `world` ranks.
    ///
    /// # Panics
    /// If the ranks do not divide the segments, or there is no such rank.
    pub fn of(cols: usize, rank: usize, world: usize) -> Segments {
        assert!(world > 0 && SEGMENTS.is_multiple_of(world) && rank < world, "rank {rank} of {world}");
        Segments { cols, rank, world }
    }

    /// Columns of the whole matrix that the rank holds, when it is multiplied in steps of so many.
    pub fn columns(self, step: usize) -> Range<usize> {
        let (range, steps) = (self.own(), self.steps(step));
        let own = segment(steps, range.start).start..segment(steps, range.end - 1).end;
        (own.start * step).min(self.cols)..(own.end * step).min(self.cols)
    }

    /// The steps of each segment, counted from the rank's first.
    pub(crate) fn chains(self, step: usize) -> impl Iterator<Item = Range<usize>> {
        let steps = self.steps(step);
        let first = segment(steps, self.own().start).start;
        self.own().map(move |index| segment(steps, index)).map(move |part| part.start - first..part.end - first)
    }

    fn own(self) -> Range<usize> {
        let each = SEGMENTS / self.world;
        self.rank * each..(self.rank + 1) * each
    }

    /// Steps of the whole matrix; a last one that is not full counts.
    fn steps(self, step: usize) -> usize {
        self.cols.div_ceil(step)
    }
}

fn segment(steps: usize, index: usize) -> Range<usize> {
    steps * index / SEGMENTS..steps * (index + 1) / SEGMENTS
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ranks' columns tile the matrix, and their chains tile their columns.
    #[test]
    fn segments_cover_every_column_once() {
        for (cols, step) in [1, 2, 15, 16, 17, 31, 96, 101, 896, 4864].into_iter().flat_map(|n| [(n, 2), (n, 32)]) {
            for world in [1, 2, 4, 8] {
                let mut next = 0;
                for rank in 0..world {
                    let segments = Segments::of(cols, rank, world);
                    let columns = segments.columns(step);
                    assert_eq!(columns.start, next, "{cols} {rank}/{world}");
                    next = columns.end;
                    let chains: Vec<_> = segments.chains(step).collect();
                    assert_eq!(chains.len(), SEGMENTS / world);
                    assert_eq!(chains.iter().map(Range::len).sum::<usize>(), columns.len().div_ceil(step));
                    assert!(chains.windows(2).all(|pair| pair[0].end == pair[1].start));
                }
                assert_eq!(next, cols);
            }
        }
    }
}
