//! Where a position's key and value lie in the arena, and reading and writing them one by one.
//!
//! In 8 bits a row is (elements, scale): the scale is the row's largest magnitude over the largest number of the format,
//! rounded to bf16, and an element is its value over the scale, rounded to the nearest number of the format, ties to even.
//! It is fixed when the row is written, from that row alone. A whole number k is the byte k + 128.

use baton_core::arena::{Arena, Half, KvDtype};

use crate::math::MAGIC;
use crate::{Span, bf16, f8};

/// Rows whose largest magnitude is below this are zero: 2^-100.
const LEAST: f32 = f32::from_bits((127 - 100) << 23);
/// The scale of a row with a number that is not finite. Its elements are zero, and so it means NaN.
const BROKEN: u16 = 0x7fc0;

/// First byte of one position's key or value. The span, head and layer have been checked.
pub(crate) fn entry(arena: &Arena, span: &Span, position: usize, kv_head: usize, layer: usize, half: Half) -> *mut u8 {
    let layout = arena.layout();
    let (block, token) = (position / layout.block_tokens as usize, position % layout.block_tokens as usize);
    let offset = layout.offset(kv_head, layer, half) + token * layout.row_bytes();
    // SAFETY: `Span::check` has checked the position and the layer, `Heads::check` the head.
    unsafe { arena.block(span.blocks[block]).add(offset) }
}

/// The scale of a row in 8 bits, and what its values are multiplied with: 0 where all its elements are zero. `largest` is the
/// row's largest magnitude, or no finite number when one of them is none.
pub(crate) fn scale(dtype: KvDtype, largest: f32) -> (u16, f32) {
    if !largest.is_finite() {
        return (BROKEN, 0.0);
    }
    if largest < LEAST {
        return (0, 0.0);
    }
    let scale = bf16::round(largest / most(dtype));
    (scale, 1.0 / bf16::widen(scale))
}

/// The largest number of a format of 8 bits.
pub(crate) fn most(dtype: KvDtype) -> f32 {
    if dtype == KvDtype::Fp8 { f8::LARGEST } else { 127.0 }
}

/// The element that stands for a value over its row's scale.
pub(crate) fn element(dtype: KvDtype, x: f32) -> u8 {
    let x = x.clamp(-most(dtype), most(dtype));
    match dtype {
        KvDtype::Fp8 => f8::round(x),
        // Whole numbers are the low bits of MAGIC plus them.
        _ => (x + (MAGIC + 128.0)).to_bits() as u8,
    }
}

/// Largest of the whole numbers that queries and softmax's weights become over rows of whole numbers: two signed bytes.
const WHOLE: f32 = 127.0 * 256.0 + 127.0;

/// What some numbers are multiplied with to be rounded to whole ones of at most `WHOLE`, and what they mean times that.
/// `largest` is as for `scale`.
pub(crate) fn whole(largest: f32) -> (f32, f32) {
    match largest {
        _ if !largest.is_finite() => (0.0, f32::NAN),
        _ if largest < LEAST => (0.0, 0.0),
        _ => (WHOLE / largest, largest / WHOLE),
    }
}

/// Some numbers as whole ones, and what they mean times that.
pub(crate) fn integers(values: &[f32]) -> (Vec<i32>, f32) {
    let (inverse, factor) = whole(largest(values));
    let integer = |value: &f32| if inverse == 0.0 { 0 } else { ((value * inverse + MAGIC) - MAGIC) as i32 };
    (values.iter().map(integer).collect(), factor)
}

/// The largest magnitude, or NaN when a number is not finite.
fn largest(values: &[f32]) -> f32 {
    match values.iter().all(|value| value.is_finite()) {
        true => values.iter().fold(0.0f32, |largest, value| largest.max(value.abs())),
        false => f32::NAN,
    }
}

/// What an element says, without its scale.
pub(crate) fn number(dtype: KvDtype, element: u8) -> f32 {
    match dtype {
        KvDtype::Fp8 => f8::value(element),
        _ => f32::from(element) - 128.0,
    }
}

pub(crate) fn store(
    arena: &Arena,
    span: &Span,
    position: usize,
    kv_head: usize,
    layer: usize,
    half: Half,
    values: &[f32],
) {
    let (to, dtype) = (entry(arena, span, position, kv_head, layer, half), arena.layout().dtype);
    let (scale, inverse) = scale(dtype, largest(values));
    // SAFETY: a row fits; the caller of the operation holds the block for writing.
    unsafe {
        for (i, &value) in values.iter().enumerate() {
            match dtype {
                KvDtype::Bf16 => to.cast::<u16>().add(i).write(bf16::round(value)),
                KvDtype::F32 => to.cast::<f32>().add(i).write(value),
                _ if inverse == 0.0 => to.add(i).write(element(dtype, 0.0)),
                _ => to.add(i).write(element(dtype, value * inverse)),
            }
        }
        if dtype.is_scaled() {
            to.add(values.len()).cast::<u16>().write(scale);
        }
    }
}

/// A row's numbers, and the scale that they mean what they say with.
pub(crate) fn load(
    arena: &Arena,
    span: &Span,
    position: usize,
    kv_head: usize,
    layer: usize,
    half: Half,
) -> (Vec<f32>, f32) {
    let (from, dtype) = (entry(arena, span, position, kv_head, layer, half), arena.layout().dtype);
    let dim = arena.layout().head_dim as usize;
    // SAFETY (of both): the row lies there; the caller of the operation holds the block.
    let value = |i: usize| unsafe {
        match dtype {
            KvDtype::Bf16 => bf16::widen(from.cast::<u16>().add(i).read()),
            KvDtype::F32 => from.cast::<f32>().add(i).read(),
            _ => number(dtype, from.add(i).read()),
        }
    };
    let scale = if dtype.is_scaled() { bf16::widen(unsafe { from.add(dim).cast::<u16>().read() }) } else { 1.0 };
    ((0..dim).map(value).collect(), scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every value comes back to within half a step of the format at its place, and the largest to within half a step of its own.
    #[test]
    fn eight_bits_are_near_what_they_stand_for() {
        for dtype in [KvDtype::Int8, KvDtype::Fp8] {
            for largest in [1e-20f32, 0.003, 1.0, 127.0, 300.0, 3e30, f32::MAX] {
                let (bits, inverse) = scale(dtype, largest);
                for i in -1000..=1000 {
                    let value = largest * (i as f32 / 1000.0);
                    let back = number(dtype, element(dtype, value * inverse)) * bf16::widen(bits);
                    let step = match dtype {
                        KvDtype::Int8 => largest / 127.0,
                        _ => (value.abs() / 8.0).max(largest / 448.0 / 512.0),
                    };
                    // Scales are rounded, too: to 8 bits, or one part in 256 of the largest.
                    let off = (back - value).abs();
                    assert!(off <= 0.5 * step + largest / 250.0, "{dtype:?}: {value} became {back}");
                    assert!(off <= 0.51 * step || value.abs() > 0.99 * largest, "{dtype:?}: {value} became {back}");
                }
            }
        }
    }

    #[test]
    fn rows_that_have_no_scale() {
        for dtype in [KvDtype::Int8, KvDtype::Fp8] {
            assert_eq!(scale(dtype, 0.0), (0, 0.0));
            assert_eq!(scale(dtype, 1e-38), (0, 0.0));
            for broken in [f32::NAN, f32::INFINITY] {
                let (bits, inverse) = scale(dtype, broken);
                assert!(bf16::widen(bits).is_nan() && inverse == 0.0);
            }
        }
    }
}
