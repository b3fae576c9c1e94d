//! Weights in 8 bits as checkpoints have them: e4m3 (a sign, 4 bits of exponent, 3 of fraction; no infinity, one NaN of either
//! sign), with one scale for all, for each output, or for each block of outputs and inputs.

use crate::bf16;

/// The largest number.
pub const LARGEST: f32 = 448.0;
/// 2^-120: what an e4m3's exponent and fraction say when they stand in an f32's place, over what they mean.
pub(crate) const SHIFT: f32 = f32::from_bits((127 - 120) << 23);

/// Scales of weights are below this, so that every step of widening them is finite.
pub const SCALE_BOUND: f32 = 256.0;

/// A row-major matrix in e4m3.
#[derive(Clone, Copy, Debug)]
pub struct F8Matrix<'a> {
    pub bytes: &'a [u8],
    pub rows: usize,
    pub cols: usize,
    /// Row by row, one for each block.
    pub scales: &'a [f32],
    /// Outputs and inputs that share a scale.
    pub block: (usize, usize),
}

impl F8Matrix<'_> {
    fn across(&self) -> usize {
        self.cols.div_ceil(self.block.1)
    }

    /// Whether there are as many bytes and scales as the shape asks for.
    pub fn fits(&self) -> bool {
        let scales = self.rows.div_ceil(self.block.0) * self.across();
        self.bytes.len() == self.rows * self.cols && self.scales.len() == scales
    }

    /// Whether blocks are whole pieces: of `outputs` outputs, and of exactly `inputs` inputs or all of them.
    pub fn whole(&self, outputs: usize, inputs: usize) -> bool {
        self.rows.is_multiple_of(outputs)
            && (self.block.0.is_multiple_of(outputs) || self.block.0 >= self.rows)
            && (self.block.1 == inputs || self.block.1 >= self.cols)
    }

    pub fn scale(&self, row: usize, col: usize) -> f32 {
        self.scales[row / self.block.0 * self.across() + col / self.block.1]
    }

    /// Row by row in bf16, little endian: each value times its scale, rounded once in f32 and once to bf16.
    pub fn widen(&self) -> Vec<u8> {
        let values: [f32; 256] = std::array::from_fn(|byte| value(byte as u8));
        let mut out = Vec::with_capacity(self.bytes.len() * 2);
        for row in 0..self.rows {
            for (block, bytes) in self.bytes[row * self.cols..][..self.cols].chunks(self.block.1).enumerate() {
                let scale = self.scale(row, block * self.block.1);
                let widened = bytes.iter().map(|byte| bf16::round(values[usize::from(*byte)] * scale));
                out.extend(widened.flat_map(u16::to_le_bytes));
            }
        }
        out
    }
}

/// The value of a byte.
pub fn value(byte: u8) -> f32 {
    let sign = if byte >> 7 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (byte >> 3 & 15, f32::from(byte & 7));
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * fraction * f32::from_bits((127 - 9) << 23),
        _ => sign * (8.0 + fraction) * f32::from_bits((127 - 10 + u32::from(exponent)) << 23),
    }
}

/// The nearest value of a number of at most `LARGEST`, ties to even. (Below 2^-12 of a step a tie may be one of f32's
/// rounding.)
pub(crate) fn round(x: f32) -> u8 {
    let bits = (x * SHIFT).to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let rounded = (magnitude + 0x7_ffff + (magnitude >> 20 & 1)) >> 20;
    (rounded | bits >> 24 & 0x80) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte's value is that byte; numbers between two go to the nearer one, those in the middle to the even one.
    #[test]
    fn rounds_to_the_nearest() {
        for byte in (0..=0x7eu8).chain(0x80..=0xfe) {
            assert_eq!(round(value(byte)), byte);
        }
        for byte in 0..0x7eu8 {
            let (low, high) = (value(byte), value(byte + 1));
            let even = if byte % 2 == 0 { byte } else { byte + 1 };
            assert_eq!(round((low + high) / 2.0), even, "{low} {high}");
            assert_eq!(round(low + (high - low) * 0.49), byte);
            assert_eq!(round(low + (high - low) * 0.51), byte + 1);
            assert_eq!(round(-(low + (high - low) * 0.51)), (byte + 1) | 0x80);
        }
        assert_eq!((round(463.0), round(1e-30)), (0x7e, 0));
    }

    #[test]
    fn bytes_mean_what_the_format_says() {
        let expected = [
            (0x00, 0.0),
            (0x01, 0.001953125),
            (0x07, 0.013671875),
            (0x08, 0.015625),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0xc0, -2.0),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ];
        expected.iter().for_each(|(byte, found)| assert_eq!(value(*byte), *found, "{byte:#x}"));
        assert!(value(0x7f).is_nan() && value(0xff).is_nan());
        // Larger bytes of one sign are larger values.
        assert!((0..0x7e).all(|byte| value(byte) < value(byte + 1)));
    }

    #[test]
    fn blocks_have_their_own_scales() {
        let bytes = [0x38; 15];
        let matrix = F8Matrix { bytes: &bytes, rows: 3, cols: 5, scales: &[1.0, 2.0, 3.0, 4.0], block: (2, 3) };
        assert!(matrix.fits());
        let widened: Vec<f32> =
            matrix.widen().as_chunks().0.iter().map(|pair| bf16::widen(u16::from_le_bytes(*pair))).collect();
        assert_eq!(widened, [1.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 4.0, 4.0]);
    }
}
