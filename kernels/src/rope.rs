//! The table of rotations (Su et al. 2021, "RoFormer", section 3.2.2).

use crate::math::cos_sin;

/// cos and sin of every (position, frequency), computed in f64 and stored as f32.
pub struct RopeTable {
    /// (position, cos then sin, frequency)
    values: Vec<f32>,
    frequencies: usize,
}

impl RopeTable {
    /// Rotations for `positions` positions. Dimensions i and i + inv_freq.len() of a head turn together by
    /// position · inv_freq[i]; dimensions from 2·inv_freq.len() on do not turn.
    pub fn new(inv_freq: &[f64], positions: usize) -> RopeTable {
        let frequencies = inv_freq.len();
        let mut values = vec![0.0; positions * 2 * frequencies];
        for (position, row) in values.chunks_exact_mut((2 * frequencies).max(1)).enumerate() {
            let (cosines, sines) = row.split_at_mut(frequencies);
            for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(inv_freq) {
                let (cos, sin) = cos_sin(position as f64 * frequency);
                (*cosine, *sine) = (cos as f32, sin as f32);
            }
        }
        RopeTable { values, frequencies }
    }

    /// Positions the table covers.
    pub fn positions(&self) -> usize {
        self.values.len() / (2 * self.frequencies).max(1)
    }

    /// (position, cos then sin, frequency)
    #[cfg(feature = "cuda")]
    pub(crate) fn values(&self) -> &[f32] {
        &self.values
    }

    /// Dimensions of a head that turn.
    pub(crate) fn rotated(&self) -> usize {
        2 * self.frequencies
    }

    /// (cos, sin) of one position, each of as many values as there are frequencies.
    pub(crate) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        self.values[position * 2 * self.frequencies..][..2 * self.frequencies].split_at(self.frequencies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_cos_and_sin_of_position_times_frequency() {
        let table = RopeTable::new(&[1.0, 0.01], 300);
        assert_eq!(table.positions(), 300);
        let (cos, sin) = table.at(257);
        assert_eq!(cos, [257f64.cos() as f32, 2.57f64.cos() as f32]);
        assert_eq!(sin, [257f64.sin() as f32, 2.57f64.sin() as f32]);
    }
}
