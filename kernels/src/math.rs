//! Elementary functions as fixed sequences of IEEE operations, so that every machine gives the same bits. The f32
//! ones here define what the vector code computes per lane; the f64 ones serve tables and single values.

use std::f64::consts::{FRAC_2_PI, LN_2};

/// exp is 0 below and infinite above.
pub(crate) const EXP_MIN: f32 = -87.0;
pub(crate) const EXP_MAX: f32 = 88.0;
pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// Adding it rounds to an integer, which then stands in the low bits.
pub(crate) const MAGIC: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has 9 significant bits.
pub(crate) const LN2_HIGH: f32 = 0.693_359_4;
pub(crate) const LN2_LOW: f32 = -2.121_944_4e-4;
/// Taylor coefficients 1/7! .. 1/0!; on |r| <= ln(2)/2 the remainder is under 2^-27.
pub(crate) const EXP_TERMS: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// The larger as x86 orders them: the second when either is NaN.
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

pub(crate) fn smaller(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// e^x to 1 ulp or so; NaN stays NaN.
pub(crate) fn exp(x: f32) -> f32 {
    let c = smaller(EXP_MAX, larger(EXP_MIN, x));
    let t = c.mul_add(LOG2_E, MAGIC);
    let n = t - MAGIC;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, c));
    let p = EXP_TERMS.iter().skip(1).fold(EXP_TERMS[0], |p, &term| p.mul_add(r, term));
    let y = p * power_of_two(t);
    match x {
        _ if x < EXP_MIN => 0.0,
        _ if x > EXP_MAX => f32::INFINITY,
        _ => y,
    }
}

/// 2^n where t = n + MAGIC.
pub(crate) fn power_of_two(t: f32) -> f32 {
    f32::from_bits((t.to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// x·sigmoid(x).
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Natural logarithm of a positive, finite, normal number.
pub(crate) fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut m = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        exponent += 1;
    }
    // ln m = 2 artanh(s), s = (m-1)/(m+1), |s| <= 0.172.
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let series = (0..12).rev().fold(0.0, |sum, i| sum * square + 1.0 / (2 * i + 1) as f64);
    exponent as f64 * LN_2 + 2.0 * s * series
}

/// (cos, sin) of a not negative angle below 2^26 or so, to about 1e-13.
pub(crate) fn cos_sin(angle: f64) -> (f64, f64) {
    // pi/2 in three parts; the first two have 33 bits, so that their products with the quadrant are exact.
    const PARTS: [f64; 3] = [
        f64::from_bits(0x3ff9_21fb_5440_0000),
        f64::from_bits(0x3dd0_b461_1a60_0000),
        f64::from_bits(0x3ba3_198a_2e03_7073),
    ];
    let quadrant = (angle * FRAC_2_PI + 0.5).floor();
    let r = PARTS.iter().fold(angle, |r, part| r - quadrant * part);
    let square = r * r;
    let (mut cos, mut sin) = (0.0, 0.0);
    for i in (1..=9).rev() {
        cos = (1.0 + cos) * (-square / ((2 * i - 1) * (2 * i)) as f64);
        sin = (1.0 + sin) * (-square / ((2 * i) * (2 * i + 1)) as f64);
    }
    let (cos, sin) = (1.0 + cos, r * (1.0 + sin));
    match quadrant as u64 % 4 {
        0 => (cos, sin),
        1 => (-sin, cos),
        2 => (-cos, -sin),
        _ => (sin, -cos),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_and_handles_the_ends() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let exact = (x as f64).exp();
            assert!((exp(x) as f64 / exact - 1.0).abs() < 1.5e-7, "exp({x}) = {} not {exact}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn ln_is_close() {
        for x in [1e-300, 1e-9, 0.5, 0.999_999, 1.0, 1.000_001, 1.4, 1.5, 2.0, 151_936.0, 1e300] {
            assert!((ln(x) - x.ln()).abs() <= 1e-15 * x.ln().abs().max(1.0), "ln({x})");
        }
    }

    #[test]
    fn cos_sin_are_close_at_every_position() {
        for i in 0..200_000u32 {
            let angle = i as f64 * 5.001_237;
            let (cos, sin) = cos_sin(angle);
            assert!((cos - angle.cos()).abs() < 1e-12 && (sin - angle.sin()).abs() < 1e-12, "angle {angle}");
        }
    }
}
