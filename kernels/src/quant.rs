//! Blocks of quantized weights and activations: how GGUF's formats are read, how numbers are quantized, and what a block
//! of each means. 32 numbers are a block; the K formats have 8 blocks under one scale.

use crate::bf16;
use crate::math::MAGIC;
use crate::packed::{Dtype, Format};

/// Numbers in a block.
pub(crate) const BLOCK_LEN: usize = 32;
/// Blocks under one scale in the K formats.
pub(crate) const SUPER: usize = 8;

/// One output's block of 32 weights, in the bytes that `packed` describes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Block {
    /// Scale and minimum as two halves, or a byte each.
    pub(crate) head: [u8; 4],
    pub(crate) words: [u8; 32],
    pub(crate) ahead: [u8; 4],
}

impl Block {
    /// The block's integers.
    pub(crate) fn integers(&self, format: Format) -> [i32; BLOCK_LEN] {
        let low = |i: usize| i32::from(if i < 16 { self.words[i] & 15 } else { self.words[i - 16] >> 4 });
        std::array::from_fn(|i| match format {
            Format::Bf16 => unreachable!("bf16 has no blocks"),
            Format::Q8_0 => i32::from(self.words[i]) - 128,
            Format::Q4_0 => low(i) - 8,
            Format::Q4_1 | Format::Q4K => low(i),
            Format::Q5_0 => low(i) + self.fifth(i) - 16,
            Format::Q5_1 | Format::Q5K => low(i) + self.fifth(i),
            Format::Q6K => low(i) + self.high(i) - 32,
        })
    }

    /// Bit 4 of one of 32 five-bit numbers.
    fn fifth(&self, i: usize) -> i32 {
        i32::from(self.words[16 + i % 4] >> (i / 4) & 1) << 4
    }

    fn set_fifth(&mut self, i: usize, set: bool) {
        self.words[16 + i % 4] |= u8::from(set) << (i / 4);
    }

    /// Bits 4 and 5 of one of 32 six-bit numbers.
    fn high(&self, i: usize) -> i32 {
        let byte = self.words[16 + i / 16 * 4 + i % 4];
        i32::from((byte >> HIGH_SHIFT[i / 4 % 4] & 3) << 4)
    }

    /// Scale of all integers; of q6_k that above the blocks, of q4_k and q5_k the product of both.
    pub(crate) fn scale(&self, format: Format) -> f32 {
        match format {
            Format::Q4K | Format::Q5K => f16([self.ahead[0], self.ahead[1]]) * f32::from(self.head[0]),
            Format::Q6K => f16([self.ahead[0], self.ahead[1]]),
            _ => f16([self.head[0], self.head[1]]),
        }
    }

    /// What is subtracted from every weight, where the format has that.
    pub(crate) fn minimum(&self, format: Format) -> f32 {
        match format.two_scales() {
            true => f16([self.ahead[2], self.ahead[3]]) * f32::from(self.head[1]),
            // In the file it is added.
            false => -f16([self.head[2], self.head[3]]),
        }
    }

    /// q6_k's factors of the two halves.
    pub(crate) fn halves(&self) -> [f32; 2] {
        [self.head[0], self.head[1]].map(|byte| f32::from(byte as i8))
    }

    /// The values of its first weights.
    pub(crate) fn read(&self, format: Format, out: &mut [f32]) {
        let (integers, scale) = (self.integers(format), self.scale(format));
        for (i, (to, q)) in out.iter_mut().zip(integers).enumerate() {
            *to = match format {
                _ if format.minima() => q as f32 * scale - self.minimum(format),
                Format::Q6K => q as f32 * self.halves()[i / 16] * scale,
                _ => q as f32 * scale,
            };
        }
    }

    /// The value of one weight.
    #[cfg(test)]
    pub(crate) fn value(&self, format: Format, i: usize) -> f32 {
        let mut values = [0.0; BLOCK_LEN];
        self.read(format, &mut values);
        values[i]
    }
}

/// Where the high bits of word t of four lie in their bytes, so that one shift puts them above the low bits.
const HIGH_SHIFT: [u8; 4] = [4, 6, 0, 2];

fn f16(bytes: [u8; 2]) -> f32 {
    bf16::widen_f16(u16::from_le_bytes(bytes))
}

/// A row of GGUF's units as blocks.
pub(crate) fn read_blocks(dtype: Dtype, bytes: &[u8], out: &mut [Block]) {
    let units = bytes.chunks_exact(dtype.unit_bytes());
    for (unit, blocks) in units.zip(out.chunks_mut(dtype.unit() / BLOCK_LEN)) {
        match dtype {
            Dtype::Q8_0 => blocks[0] = q8_0(unit),
            Dtype::Q4_0 => blocks[0] = q4_0(unit),
            Dtype::Q4_1 => blocks[0] = block_of(&unit[..4], [0; 4], &unit[4..]),
            Dtype::Q5_0 => blocks[0] = block_of(&unit[..2], [unit[2], unit[3], unit[4], unit[5]], &unit[6..]),
            Dtype::Q5_1 => blocks[0] = block_of(&unit[..4], [unit[4], unit[5], unit[6], unit[7]], &unit[8..]),
            Dtype::Q4K => blocks.iter_mut().enumerate().for_each(|(i, block)| *block = q4_k(unit, &unit[16..], i)),
            Dtype::Q5K => blocks.iter_mut().enumerate().for_each(|(i, block)| *block = q5_k(unit, i)),
            Dtype::Q6K => blocks.iter_mut().enumerate().for_each(|(i, block)| *block = q6_k(unit, i)),
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 => unreachable!("floats have no blocks"),
        }
    }
}

/// f16 scale, 32 × i8.
fn q8_0(unit: &[u8]) -> Block {
    let mut block = Block { head: [unit[0], unit[1], 0, 0], ..Block::default() };
    for (to, from) in block.words.iter_mut().zip(&unit[2..]) {
        *to = from ^ 0x80;
    }
    block
}

/// f16 scale, 16 bytes of halves.
fn q4_0(unit: &[u8]) -> Block {
    block_of(&unit[..2], [0; 4], &unit[2..])
}

/// q4_1, q5_0, q5_1: f16 scale, of those that end in 1 f16 of what is added; of those that begin with 5 a word of the high
/// bits, number i's at bit i; 16 bytes of halves.
fn block_of(head: &[u8], high: [u8; 4], low: &[u8]) -> Block {
    let mut block = Block::default();
    block.head[..head.len()].copy_from_slice(head);
    block.words[..16].copy_from_slice(&low[..16]);
    let high = u32::from_le_bytes(high);
    (0..BLOCK_LEN).for_each(|i| block.set_fifth(i, high >> i & 1 == 1));
    block
}

/// f16 scale, f16 scale of minima, 8 × 6-bit scale and minimum in 12 bytes, then 4 × 32 bytes: the low halves are one
/// block, the high halves the next.
fn q4_k(unit: &[u8], low: &[u8], index: usize) -> Block {
    let six = &unit[4..16];
    let (scale, minimum) = match index {
        0..4 => (six[index] & 63, six[index + 4] & 63),
        _ => {
            let both = six[index + 4];
            ((both & 15) | (six[index - 4] >> 6) << 4, (both >> 4) | (six[index] >> 6) << 4)
        }
    };
    let shift = index % 2 * 4;
    let bytes = &low[index / 2 * 32..][..32];
    let mut block =
        Block { head: [scale, minimum, 0, 0], ahead: [unit[0], unit[1], unit[2], unit[3]], ..Block::default() };
    for i in 0..16 {
        block.words[i] = (bytes[i] >> shift & 15) | (bytes[i + 16] >> shift & 15) << 4;
    }
    block
}

/// As q4_k, with 32 bytes between scales and low bits: bit j of byte i is the high bit of number i of block j.
fn q5_k(unit: &[u8], index: usize) -> Block {
    let mut block = q4_k(unit, &unit[48..], index);
    unit[16..48].iter().enumerate().for_each(|(i, byte)| block.set_fifth(i, byte >> index & 1 == 1));
    block
}

/// 128 bytes of low bits, 64 of high bits, 16 × i8 scale, f16 scale. 128 numbers use 64 and 32 of the bytes: number
/// 32·j + i has its low bits in byte i + 32·(j % 2), half j / 2, and its high bits in byte i, bits 2·j.
fn q6_k(unit: &[u8], index: usize) -> Block {
    let (part, j) = (index / 4, index % 4);
    let (low, high) = (&unit[part * 64 + j % 2 * 32..][..32], &unit[128 + part * 32..][..32]);
    let number = |i: usize| (low[i] >> (j / 2 * 4) & 15, high[i] >> (j * 2) & 3);
    let scales = &unit[192 + index * 2..][..2];
    let mut block = Block { head: [scales[0], scales[1], 0, 0], ..Block::default() };
    block.ahead[..2].copy_from_slice(&unit[208..210]);
    for i in 0..16 {
        block.words[i] = number(i).0 | number(i + 16).0 << 4;
    }
    for i in 0..BLOCK_LEN {
        block.words[16 + i / 16 * 4 + i % 4] |= number(i).1 << HIGH_SHIFT[i / 4 % 4];
    }
    block
}

fn one_half(scale: f32) -> [u8; 4] {
    let [low, high] = bf16::round_f16(scale).to_le_bytes();
    [low, high, 0, 0]
}

/// Largest finite half.
const F16_MAX: f32 = 65504.0;

/// Up to 32 weights as llama.cpp's quantizer makes them: scale = largest / 127, halves away from zero.
pub(crate) fn to_q8_0(values: &[f32]) -> Block {
    let largest = values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let scale = (largest / 127.0).min(F16_MAX);
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut block = Block { head: one_half(scale), words: [128; 32], ..Block::default() };
    for (to, x) in block.words.iter_mut().zip(values) {
        *to = ((x * inverse).round().clamp(-127.0, 127.0) as i32 + 128) as u8;
    }
    block
}

/// Up to 32 weights as llama.cpp's quantizer makes them: the largest becomes -8.
pub(crate) fn to_q4_0(values: &[f32]) -> Block {
    let largest = values.iter().fold(0.0f32, |max, &x| if x.abs() > max.abs() { x } else { max });
    let scale = (largest / -8.0).clamp(-F16_MAX, F16_MAX);
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let number = |i: usize| values.get(i).map_or(8, |x| (x * inverse + 8.5).clamp(0.0, 15.0) as u8);
    let mut block = Block { head: one_half(scale), ..Block::default() };
    for i in 0..16 {
        block.words[i] = number(i) | number(i + 16) << 4;
    }
    block
}

/// Activations below this count as zero, so that the inverse of a scale is finite.
const SMALLEST: f32 = f32::from_bits(27 << 23);

/// Up to 32 activations as integers and their scale: largest / 127, nearest, ties to even. Where one is not finite the scale is
/// NaN.
#[inline(always)]
pub(crate) fn quantize(values: &[f32], out: &mut [i8; BLOCK_LEN]) -> f32 {
    let largest = f32::from_bits(values.iter().fold(0, |max, x| max.max(x.to_bits() & 0x7fff_ffff)));
    *out = [0; BLOCK_LEN];
    if !largest.is_finite() {
        return f32::NAN;
    }
    if largest < SMALLEST {
        return 0.0;
    }
    let inverse = 127.0 / largest;
    for (to, x) in out.iter_mut().zip(values) {
        // Adding rounds to an integer, which then stands in the low bits.
        *to = (x * inverse + MAGIC).to_bits() as i8;
    }
    largest / 127.0
}

#[cfg(test)]
mod tests {
    use baton_core::Rng;

    use super::*;

    fn unit(dtype: Dtype, rng: &mut Rng) -> Vec<u8> {
        let mut unit: Vec<u8> = (0..dtype.unit_bytes()).map(|_| rng.u64() as u8).collect();
        let scales: &[usize] = match dtype {
            Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K => &[1, 3],
            Dtype::Q6K => &[209],
            _ => &[1],
        };
        // Finite scales.
        scales.iter().for_each(|&high| unit[high] &= 0xbb);
        unit
    }

    /// The formats as the GGUF specification's reference code spells them out, element by element.
    fn expected(dtype: Dtype, unit: &[u8], i: usize) -> f32 {
        let half = |at: usize| bf16::widen_f16(u16::from_le_bytes([unit[at], unit[at + 1]]));
        match dtype {
            Dtype::Q8_0 => half(0) * f32::from(unit[2 + i] as i8),
            Dtype::Q4_0 => {
                let byte = unit[2 + i % 16];
                half(0) * (f32::from(if i < 16 { byte & 15 } else { byte >> 4 }) - 8.0)
            }
            Dtype::Q4_1 | Dtype::Q5_0 | Dtype::Q5_1 => {
                let (with_minimum, five) = (dtype != Dtype::Q5_0, dtype != Dtype::Q4_1);
                let bits = if with_minimum { 4 } else { 2 };
                let low = unit[bits + if five { 4 } else { 0 } + i % 16];
                let mut q = if i < 16 { low & 15 } else { low >> 4 };
                if five && unit[bits + i / 8] >> (i % 8) & 1 == 1 {
                    q |= 16;
                }
                if with_minimum { half(0) * f32::from(q) + half(2) } else { half(0) * (f32::from(q) - 16.0) }
            }
            Dtype::Q4K | Dtype::Q5K => {
                let (chunk, within) = (i / 64, i % 64);
                let five = dtype == Dtype::Q5K;
                let byte = unit[if five { 48 } else { 16 } + chunk * 32 + within % 32];
                let mut q = f32::from(if within < 32 { byte & 15 } else { byte >> 4 });
                let high = if within < 32 { 1 << (2 * chunk) } else { 2 << (2 * chunk) };
                if five && unit[16 + within % 32] & high != 0 {
                    q += 16.0;
                }
                let (six, j) = (&unit[4..16], i / 32);
                let (scale, minimum) = if j < 4 {
                    (six[j] & 63, six[j + 4] & 63)
                } else {
                    ((six[j + 4] & 15) | (six[j - 4] >> 6) << 4, six[j + 4] >> 4 | (six[j] >> 6) << 4)
                };
                q * (half(0) * f32::from(scale)) - half(2) * f32::from(minimum)
            }
            Dtype::Q6K => {
                let (n, within) = (i / 128, i % 128);
                let (l, quarter) = (within % 32, within / 32);
                let (ql, qh, scales) = (&unit[n * 64..], &unit[128 + n * 32..], &unit[192 + n * 8..]);
                let q = match quarter {
                    0 => (ql[l] & 15) | (qh[l] & 3) << 4,
                    1 => (ql[l + 32] & 15) | (qh[l] >> 2 & 3) << 4,
                    2 => (ql[l] >> 4) | (qh[l] >> 4 & 3) << 4,
                    _ => (ql[l + 32] >> 4) | (qh[l] >> 6 & 3) << 4,
                };
                (f32::from(q) - 32.0) * f32::from(scales[l / 16 + 2 * quarter] as i8) * half(208)
            }
            _ => unreachable!(),
        }
    }

    #[test]
    fn units_are_read_as_specified() {
        let mut rng = Rng::new(1);
        let formats = [
            (Dtype::Q8_0, Format::Q8_0),
            (Dtype::Q4_0, Format::Q4_0),
            (Dtype::Q4_1, Format::Q4_1),
            (Dtype::Q5_0, Format::Q5_0),
            (Dtype::Q5_1, Format::Q5_1),
            (Dtype::Q4K, Format::Q4K),
            (Dtype::Q5K, Format::Q5K),
            (Dtype::Q6K, Format::Q6K),
        ];
        for (dtype, format) in formats {
            for _ in 0..50 {
                let unit = unit(dtype, &mut rng);
                let mut blocks = vec![Block::default(); dtype.unit() / BLOCK_LEN];
                read_blocks(dtype, &unit, &mut blocks);
                for i in 0..dtype.unit() {
                    assert_eq!(
                        blocks[i / BLOCK_LEN].value(format, i % BLOCK_LEN),
                        expected(dtype, &unit, i),
                        "{dtype:?} {i}"
                    );
                }
            }
        }
    }

    #[test]
    fn quantized_values_are_near() {
        let mut rng = Rng::new(2);
        for len in [1, 7, 31, 32] {
            let values: Vec<f32> = (0..len).map(|_| (2.0 * rng.f64() - 1.0) as f32 * 3.0).collect();
            let (eight, four) = (to_q8_0(&values), to_q4_0(&values));
            let mut integers = [0; BLOCK_LEN];
            let scale = quantize(&values, &mut integers);
            for (i, x) in values.iter().enumerate() {
                assert!((eight.value(Format::Q8_0, i) - x).abs() < 0.015, "{x}");
                assert!((four.value(Format::Q4_0, i) - x).abs() < 0.4, "{x}");
                assert!((f32::from(integers[i]) * scale - x).abs() < 0.0121, "{x}");
            }
            assert!(eight.integers(Format::Q8_0)[len..].iter().all(|q| *q == 0));
            assert!(four.integers(Format::Q4_0)[len..].iter().all(|q| *q == 0));
        }
    }

    #[test]
    fn extremes_are_quantized() {
        let mut q = [7; BLOCK_LEN];
        assert_eq!((quantize(&[0.0; 32], &mut q), q), (0.0, [0; BLOCK_LEN]));
        assert_eq!(quantize(&[f32::from_bits(1); 32], &mut q), 0.0);
        assert_eq!((quantize(&[-f32::MAX; 32], &mut q), q), (f32::MAX / 127.0, [-127; BLOCK_LEN]));
        assert!(quantize(&[1.0, f32::NAN], &mut q).is_nan());
        assert!(quantize(&[1.0, f32::NEG_INFINITY], &mut q).is_nan());
        assert_eq!(to_q8_0(&[f32::MAX, -1.0]).scale(Format::Q8_0), F16_MAX);
        assert_eq!(to_q8_0(&[f32::MAX, -1.0]).integers(Format::Q8_0)[..2], [127, 0]);
        assert_eq!(to_q4_0(&[f32::MAX, -1.0]).integers(Format::Q4_0)[..2], [-8, 0]);
        assert_eq!(to_q8_0(&[0.0; 32]).value(Format::Q8_0, 3), 0.0);
    }
}
