//! The table of rotations (Su et al. 2021, "RoFormer", section 3.2.2).

use std::sync::OnceLock;

use crate::math::cos_sin;

/// Positions whose rotations are computed together.
const TOGETHER: usize = 256;

/// cos and sin of every (position, frequency), computed in f64 and stored as f32. Those of a position are computed when they are
/// first asked for: most models have room for many more positions than a worker ever sees, and all of them at once would hold
/// up its start.
pub struct RopeTable {
    /// (position, cos then sin, frequency), `TOGETHER` positions each.
    values: Box<[OnceLock<Box<[f32]>>]>,
    inv_freq: Vec<f64>,
    positions: usize,
}

impl RopeTable {
    /// Rotations for `positions` positions. Dimensions i and i + inv_freq.len() of a head turn together by
    /// position · inv_freq[i]; dimensions from 2·inv_freq.len() on do not turn.
    pub fn new(inv_freq: &[f64], positions: usize) -> RopeTable {
        let values = (0..positions.div_ceil(TOGETHER)).map(|_| OnceLock::new()).collect();
        RopeTable { values, inv_freq: inv_freq.to_vec(), positions }
    }

    /// Positions the table covers.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// (position, cos then sin, frequency)
    #[cfg(feature = "cuda")]
    pub(crate) fn values(&self) -> Vec<f32> {
        (0..self.positions).flat_map(|position| <[_; 2]>::from(self.at(position))).flatten().copied().collect()
    }

    /// Dimensions of a head that turn.
    pub(crate) fn rotated(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// (cos, sin) of one position, each of as many values as there are frequencies.
    #[inline]
    pub(crate) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        assert!(position < self.positions, "a position past the rotation table");
        let (frequencies, together) = (self.inv_freq.len(), position / TOGETHER);
        let values = self.values[together].get_or_init(|| self.compute(together * TOGETHER));
        values[position % TOGETHER * 2 * frequencies..][..2 * frequencies].split_at(frequencies)
    }

    /// Rotations of `TOGETHER` positions from `first` on.
    fn compute(&self, first: usize) -> Box<[f32]> {
        let frequencies = self.inv_freq.len();
        let mut values = vec![0.0; TOGETHER * 2 * frequencies];
        for (position, row) in (first..).zip(values.chunks_exact_mut((2 * frequencies).max(1))) {
            let (cosines, sines) = row.split_at_mut(frequencies);
            for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(&self.inv_freq) {
                let (cos, sin) = cos_sin(position as f64 * frequency);
                (*cosine, *sine) = (cos as f32, sin as f32);
            }
        }
        values.into_boxed_slice()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_cos_and_sin_of_position_times_frequency() {
        let table = RopeTable::new(&[1.0, 0.01], 300);
        assert_eq!(table.positions(), 300);
        for position in [299, 0, 255, 257, 256] {
            let ((cos, sin), angle) = (table.at(position), position as f64);
            assert_eq!(cos, [angle.cos() as f32, (angle * 0.01).cos() as f32]);
            assert_eq!(sin, [angle.sin() as f32, (angle * 0.01).sin() as f32]);
        }
    }

    #[test]
    #[should_panic = "past the rotation table"]
    fn has_no_more_positions_than_it_was_made_for() {
        RopeTable::new(&[1.0, 0.01], 300).at(300);
    }
}
