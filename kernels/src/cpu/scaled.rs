//! Rows of the cache in 8 bits: writing them, and laying them out as panels of attention, without their scales.
//!
//! Whole numbers stay what they are: the other operand of a dot becomes whole numbers, too, of two signed bytes each, and
//! products are summed exactly, in whatever order. e4m3 becomes f32, or bf16 in pairs, which both have all its numbers.

use baton_core::arena::KvDtype;

use super::get;
use super::lanes::Lanes;
use crate::math::MAGIC;
use crate::packed::PANEL;
use crate::{bf16, f8, kv};

/// How 8 bits stand for a number.
pub(crate) trait Eight {
    const DTYPE: KvDtype;

    /// `kv::element` per lane, in the low bytes of words, of numbers no larger than `kv::most`.
    ///
    /// # Safety
    /// The machine has the instruction set of `L`.
    unsafe fn elements<L: Lanes>(x: L::F) -> L::I;
}

pub(crate) struct Int8;
pub(crate) struct Fp8;

// SAFETY (of each block below): the trait's contract, or that of the function it is in.
impl Eight for Int8 {
    const DTYPE: KvDtype = KvDtype::Int8;

    #[inline(always)]
    unsafe fn elements<L: Lanes>(x: L::F) -> L::I {
        unsafe { L::bits(L::add(x, L::splat(MAGIC + 128.0))) }
    }
}

impl Eight for Fp8 {
    const DTYPE: KvDtype = KvDtype::Fp8;

    #[inline(always)]
    unsafe fn elements<L: Lanes>(x: L::F) -> L::I {
        unsafe {
            let bits = L::bits(L::mul(x, L::splat(f8::SHIFT)));
            let magnitude = L::and(bits, L::words(0x7fff_ffff));
            let odd = L::and(L::shift_right(magnitude, 20), L::words(1));
            let rounded = L::add_words(L::add_words(magnitude, L::words(0x7_ffff)), odd);
            L::or(L::shift_right(rounded, 20), L::and(L::shift_right(bits, 24), L::words(0x80)))
        }
    }
}

/// Writes a row: `len` elements and their scale.
///
/// # Safety
/// As for `Lanes`; values and row are valid.
#[inline(always)]
pub(crate) unsafe fn store<L: Lanes, E: Eight>(to: *mut u8, values: *const f32, len: usize) {
    unsafe {
        let (scale, inverse) = kv::scale(E::DTYPE, largest::<L>(values, len));
        to.add(len).cast::<u16>().write_unaligned(scale);
        if inverse == 0.0 {
            return to.write_bytes(kv::element(E::DTYPE, 0.0), len);
        }
        let (by, most, least) = (L::splat(inverse), L::splat(kv::most(E::DTYPE)), L::splat(-kv::most(E::DTYPE)));
        let whole = len / 16 * 16;
        for i in (0..whole).step_by(16) {
            let x = L::mul(L::load(values.add(i)), by);
            L::store_bytes(to.add(i), E::elements::<L>(L::smaller(most, L::larger(least, x))));
        }
        for i in whole..len {
            to.add(i).write(kv::element(E::DTYPE, values.add(i).read() * inverse));
        }
    }
}

/// The largest magnitude of some values, or NaN when one is not finite.
#[inline(always)]
unsafe fn largest<L: Lanes>(values: *const f32, len: usize) -> f32 {
    unsafe {
        let (mut largest, mut off) = (L::splat(0.0), L::splat(0.0));
        for i in (0..len).step_by(16) {
            let x = get::<L>(values, i, len);
            largest = L::larger(L::larger(x, L::negate(x)), largest);
            // Nothing, or NaN where x is not finite.
            off = L::add(off, L::sub(x, x));
        }
        L::max(largest) + L::sum(off)
    }
}

/// The scale of a row of `len` elements.
///
/// # Safety
/// The row is valid.
#[inline(always)]
pub(crate) unsafe fn scale_of(row: *const u8, len: usize) -> f32 {
    unsafe { bf16::widen(row.add(len).cast::<u16>().read_unaligned()) }
}

/// Values as whole numbers for products with bytes that have 128 added to them: what they mean times (`kv::whole`), and
/// what is to be added to a sum of such products.
pub(crate) struct Whole {
    pub(crate) factor: f32,
    pub(crate) excess: i32,
}

/// Makes `len` values whole numbers, 256·high + low, padded with zeros to whole words.
///
/// # Safety
/// As for `Lanes`; all three are valid for so many.
#[inline(always)]
pub(crate) unsafe fn make_whole<L: Lanes>(values: *const f32, len: usize, high: *mut u8, low: *mut u8) -> Whole {
    unsafe {
        let (inverse, factor) = kv::whole(largest::<L>(values, len));
        if inverse == 0.0 {
            high.write_bytes(0, len.next_multiple_of(4));
            low.write_bytes(0, len.next_multiple_of(4));
            return Whole { factor, excess: 0 };
        }
        let (by, magic, mut sum) = (L::splat(inverse), L::splat(MAGIC), L::splat(0.0));
        let whole = len / 16 * 16;
        for i in (0..whole).step_by(16) {
            let x = L::add(L::mul(L::load(values.add(i)), by), magic);
            // Sums of whole numbers below 2^24 are exact.
            sum = L::add(sum, L::sub(x, magic));
            let bits = L::bits(x);
            L::store_bytes(low.add(i), bits);
            L::store_bytes(high.add(i), L::shift_right(L::add_words(bits, L::words(128)), 8));
        }
        let mut sum = L::sum(sum);
        for i in whole..len.next_multiple_of(4) {
            let x = if i < len { values.add(i).read() * inverse + MAGIC } else { MAGIC };
            sum += x - MAGIC;
            low.add(i).write(x.to_bits() as u8);
            high.add(i).write(((x.to_bits() + 128) >> 8) as u8);
        }
        Whole { factor, excess: -128 * sum as i32 }
    }
}

/// Words of bytes of four rows, `count` of them and 16 at most: to[i] = (rows[0][i], .. rows[3][i]).
///
/// # Safety
/// As for `Lanes`; all are valid for `count`.
#[inline(always)]
pub(crate) unsafe fn zip_four<L: Lanes>(to: *mut u32, rows: [*const u8; 4], count: usize) {
    unsafe {
        if count == 16 {
            let first = L::or(L::load_bytes(rows[0]), L::shift_left(L::load_bytes(rows[1]), 8));
            let third = L::shift_left(L::load_bytes(rows[2]), 16);
            let words = L::or(L::or(first, third), L::shift_left(L::load_bytes(rows[3]), 24));
            return L::store(to.cast(), L::from_bits(words));
        }
        for i in 0..count {
            to.add(i).write(u32::from_le_bytes(rows.map(|row| row.add(i).read())));
        }
    }
}

/// The e4m3 that are the top bytes of words whose other bytes are zero.
#[inline(always)]
unsafe fn numbers<L: Lanes>(top: L::I) -> L::F {
    unsafe {
        let sign = L::and(top, L::words(0x8000_0000));
        let rest = L::shift_right(L::and(top, L::words(0x7f00_0000)), 4);
        L::mul(L::from_bits(L::or(sign, rest)), L::splat(1.0 / f8::SHIFT))
    }
}

/// Two vectors of numbers that are bf16 as pairs of them.
#[inline(always)]
unsafe fn pair<L: Lanes>(even: L::F, odd: L::F) -> L::F {
    unsafe {
        let high = L::and(L::bits(odd), L::words(0xffff_0000));
        L::from_bits(L::or(L::shift_right(L::bits(even), 16), high))
    }
}

/// Steps of 64 words, each four e4m3 of one position, to twice as many steps of pairs, or four times as many of f32.
///
/// # Safety
/// As for `Lanes`; both are valid for so many steps.
#[inline(always)]
pub(crate) unsafe fn widen_words<L: Lanes>(from: *const u32, steps: usize, paired: bool, to: *mut f32) {
    unsafe {
        for step in 0..steps {
            for lane in (0..PANEL).step_by(16) {
                let words = L::load_words(from.add(step * PANEL + lane).cast());
                let high = L::words(0xff00_0000);
                let first = numbers::<L>(L::shift_left(words, 24));
                let second = numbers::<L>(L::and(L::shift_left(words, 16), high));
                let third = numbers::<L>(L::and(L::shift_left(words, 8), high));
                let fourth = numbers::<L>(L::and(words, high));
                if paired {
                    let to = to.add(step * 2 * PANEL + lane);
                    L::store(to, pair::<L>(first, second));
                    L::store(to.add(PANEL), pair::<L>(third, fourth));
                } else {
                    let to = to.add(step * 4 * PANEL + lane);
                    L::store(to, first);
                    L::store(to.add(PANEL), second);
                    L::store(to.add(2 * PANEL), third);
                    L::store(to.add(3 * PANEL), fourth);
                }
            }
        }
    }
}

/// A row's e4m3 as f32, 16 at most.
///
/// # Safety
/// As for `Lanes`; both are valid for `count`.
#[inline(always)]
pub(crate) unsafe fn widen_row<L: Lanes>(to: *mut f32, from: *const u8, count: usize) {
    unsafe {
        if count == 16 {
            return L::store(to, numbers::<L>(L::shift_left(L::load_bytes(from), 24)));
        }
        for i in 0..count {
            to.add(i).write(f8::value(from.add(i).read()));
        }
    }
}

/// Pairs of two rows' e4m3, 16 at most, as bf16.
///
/// # Safety
/// As for `Lanes`; all are valid for `count`.
#[inline(always)]
pub(crate) unsafe fn zip<L: Lanes>(to: *mut u32, a: *const u8, b: *const u8, count: usize) {
    unsafe {
        if count == 16 {
            let even = numbers::<L>(L::shift_left(L::load_bytes(a), 24));
            let odd = numbers::<L>(L::shift_left(L::load_bytes(b), 24));
            return L::store(to.cast(), pair::<L>(even, odd));
        }
        for i in 0..count {
            let [even, odd] = [a, b].map(|row| u32::from(bf16::round(f8::value(row.add(i).read()))));
            to.add(i).write(even | odd << 16);
        }
    }
}
