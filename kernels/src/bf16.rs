//! bf16 and f16 as integers.

/// Nearest bf16, ties to even; NaN stays a (quiet) NaN.
pub(crate) fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

pub(crate) fn widen(x: u16) -> f32 {
    f32::from_bits((x as u32) << 16)
}

/// Words as twice as many halves.
pub(crate) fn halves(words: &mut [u32]) -> &mut [u16] {
    // SAFETY: u16 has weaker alignment and no invalid bits; the length is twice.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), 2 * words.len()) }
}

/// The f32 that stands for the nearest bf16.
pub(crate) fn rounded(x: f32) -> f32 {
    widen(round(x))
}

/// Exact value of an IEEE half.
pub(crate) fn widen_f16(x: u16) -> f32 {
    let sign = (x as u32 & 0x8000) << 16;
    let (exponent, fraction) = (x as u32 >> 10 & 31, x as u32 & 0x3ff);
    match exponent {
        // 2^-24 is the unit of subnormal halves.
        0 => f32::from_bits(sign | (fraction as f32 * f32::from_bits(103 << 23)).to_bits()),
        31 => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

/// Nearest IEEE half, ties to even, of a number that is not NaN.
pub fn round_f16(x: f32) -> u16 {
    let sign = (x.to_bits() >> 16 & 0x8000) as u16;
    let x = x.abs();
    // Below 2^-14 halves are multiples of 2^-24; f32 rounds to those when 0.5, whose unit that is, is added.
    if x < f32::from_bits(113 << 23) {
        return sign | ((x + 0.5).to_bits() - 0.5f32.to_bits()) as u16;
    }
    let bits = x.to_bits();
    let rounded = (bits + 0xfff + (bits >> 13 & 1)) >> 13;
    sign | (rounded - (112 << 10)).min(0x7c00) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_to_nearest_even() {
        assert_eq!(round(1.0), 0x3f80);
        assert_eq!(round(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(round(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(round(f32::from_bits(0x3f80_8001)), 0x3f81);
        assert_eq!(round(f32::MAX), 0x7f80);
        assert!(widen(round(f32::from_bits(0x7f80_0001))).is_nan());
    }

    #[test]
    fn bf16_round_trips() {
        for bits in (0..=u16::MAX).filter(|&b| !widen(b).is_nan()) {
            assert_eq!(round(widen(bits)), bits);
        }
    }

    #[test]
    fn halves_widen_exactly() {
        for (bits, value) in
            [(0x3c00, 1.0), (0xc000, -2.0), (0x0001, 5.960_464_5e-8), (0x7bff, 65504.0), (0x03ff, 6.097_555e-5)]
        {
            assert_eq!(widen_f16(bits), value);
        }
        for bits in (0..=u16::MAX).filter(|&b| !widen_f16(b).is_nan()) {
            assert_eq!(round_f16(widen_f16(bits)), bits);
        }
        assert_eq!(round_f16(1.0 + f32::EPSILON), 0x3c00);
        assert_eq!((round_f16(1.000_488_3), round_f16(1.001_464_8)), (0x3c00, 0x3c02));
        assert_eq!((round_f16(65520.0), round_f16(65519.0), round_f16(1e-9)), (0x7c00, 0x7bff, 0));
        assert_eq!(widen_f16(0xfc00), f32::NEG_INFINITY);
        assert!(widen_f16(0x7e00).is_nan());
    }
}
