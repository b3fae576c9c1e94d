//! Sixteen f32 lanes in whatever registers a machine has. Kernels are written once over this trait; each operation is
//! one IEEE operation per lane, so that all implementations give the same bits.

use crate::math;

/// # Safety (of every function)
/// The machine has the instruction set, and pointers are valid for the lanes they touch, in any alignment.
pub(crate) trait Lanes: 'static {
    type F: Copy;
    /// 16 words.
    type I: Copy;
    /// 32 registers of 16 lanes: big tiles fit.
    const WIDE: bool;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn store(to: *mut f32, x: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// a·b + c, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// a > b ? a : b
    unsafe fn larger(a: Self::F, b: Self::F) -> Self::F;
    /// a < b ? a : b
    unsafe fn smaller(a: Self::F, b: Self::F) -> Self::F;
    /// a < b ? then : otherwise
    unsafe fn select_less(a: Self::F, b: Self::F, then: Self::F, otherwise: Self::F) -> Self::F;
    /// 2^n where t = n + MAGIC.
    unsafe fn power_of_two(t: Self::F) -> Self::F;
    /// The bits with their sign flipped.
    unsafe fn negate(x: Self::F) -> Self::F;

    /// Rounded to bf16, as f32.
    unsafe fn round_bf16(x: Self::F) -> Self::F;
    /// Stores 16 bf16 of values that `round_bf16` gave.
    unsafe fn store_bf16(to: *mut u16, x: Self::F);
    unsafe fn load_bf16(from: *const u16) -> Self::F;
    /// The first elements of 16 pairs of bf16.
    unsafe fn load_even(from: *const u8) -> Self::F;
    /// The second elements.
    unsafe fn load_odd(from: *const u8) -> Self::F;
    /// `vdpbf16ps`: 16 pairs of bf16 at `w` times one pair.
    unsafe fn dot_bf16(acc: Self::F, w: *const u8, x: u32) -> Self::F;
    /// 16 pairs of bf16 from two rows of 16: to[i] = (a[i], b[i]).
    unsafe fn zip_bf16(to: *mut u32, a: *const u16, b: *const u16);
    /// Sixteen words of each of sixteen rows, transposed; `to` has rows of 64 words.
    unsafe fn transpose(from: [*const u32; 16], to: *mut u32);

    unsafe fn words(x: u32) -> Self::I;
    unsafe fn load_words(from: *const u8) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Each word shifted to the right; `by` is a constant where it matters.
    unsafe fn shift_right(x: Self::I, by: u32) -> Self::I;
    unsafe fn shift_left(x: Self::I, by: u32) -> Self::I;
    /// acc + the product of 16 times four unsigned bytes at `w` with four signed bytes.
    unsafe fn dot_bytes(acc: Self::I, w: Self::I, x: u32) -> Self::I;
    /// Signed words as f32.
    unsafe fn to_f32(x: Self::I) -> Self::F;
    unsafe fn load_f16(from: *const u8) -> Self::F;
    unsafe fn load_u8(from: *const u8) -> Self::F;
    unsafe fn load_i8(from: *const u8) -> Self::F;
    /// 16 bytes, each the low one of a word.
    unsafe fn load_bytes(from: *const u8) -> Self::I;
    /// Stores the low byte of each word.
    unsafe fn store_bytes(to: *mut u8, x: Self::I);
    unsafe fn add_words(a: Self::I, b: Self::I) -> Self::I;
    /// The same bits.
    unsafe fn bits(x: Self::F) -> Self::I;
    unsafe fn from_bits(x: Self::I) -> Self::F;

    /// Asks for a line of memory, any address, to come into L2.
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    /// Lanes summed as `reference::tree`.
    unsafe fn sum(x: Self::F) -> f32;
    /// The largest lane, compared in the same tree.
    unsafe fn max(x: Self::F) -> f32;

    /// The first `count` lanes, the rest zero.
    #[inline(always)]
    unsafe fn load_some(from: *const f32, count: usize) -> Self::F {
        let mut lanes = [0.0f32; 16];
        // SAFETY: the caller's; `count` is at most 16.
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
            Self::load(lanes.as_ptr())
        }
    }

    /// Stores the first `count` lanes.
    #[inline(always)]
    unsafe fn store_some(to: *mut f32, x: Self::F, count: usize) {
        let mut lanes = [0.0f32; 16];
        // SAFETY: the caller's; `count` is at most 16.
        unsafe {
            Self::store(lanes.as_mut_ptr(), x);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count);
        }
    }
}

/// Work written over lanes. `launch` runs it compiled for one instruction set.
pub(crate) trait Kernel {
    type Output;
    /// # Safety
    /// The machine has the instruction set of `L`, and the kernel's pointers are valid.
    unsafe fn run<L: Lanes>(self) -> Self::Output;
}

/// `math::exp` per lane.
///
/// # Safety
/// The machine has the instruction set of `L`.
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L::F) -> L::F {
    // SAFETY: the caller's.
    unsafe {
        let (min, max) = (L::splat(math::EXP_MIN), L::splat(math::EXP_MAX));
        let c = L::smaller(max, L::larger(min, x));
        let t = L::fma(c, L::splat(math::LOG2_E), L::splat(math::MAGIC));
        let n = L::sub(t, L::splat(math::MAGIC));
        let r = L::fma(n, L::splat(-math::LN2_HIGH), c);
        let r = L::fma(n, L::splat(-math::LN2_LOW), r);
        let mut p = L::splat(math::EXP_TERMS[0]);
        let mut i = 1;
        while i < math::EXP_TERMS.len() {
            p = L::fma(p, r, L::splat(math::EXP_TERMS[i]));
            i += 1;
        }
        let y = L::mul(p, L::power_of_two(t));
        let y = L::select_less(x, min, L::splat(0.0), y);
        L::select_less(max, x, L::splat(f32::INFINITY), y)
    }
}

/// Sixteen lanes one by one, for machines without the rest.
pub(crate) struct Scalar;

/// Applies a function to each lane.
fn each(f: impl Fn(usize) -> f32) -> [f32; 16] {
    std::array::from_fn(f)
}

// SAFETY (of each block below): the trait's contract.
impl Lanes for Scalar {
    type F = [f32; 16];
    type I = [u32; 16];
    const WIDE: bool = false;

    unsafe fn splat(x: f32) -> [f32; 16] {
        [x; 16]
    }
    unsafe fn load(from: *const f32) -> [f32; 16] {
        unsafe { from.cast::<[f32; 16]>().read_unaligned() }
    }
    unsafe fn store(to: *mut f32, x: [f32; 16]) {
        unsafe { to.cast::<[f32; 16]>().write_unaligned(x) }
    }
    unsafe fn add(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each(|i| a[i] + b[i])
    }
    unsafe fn sub(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each(|i| a[i] - b[i])
    }
    unsafe fn mul(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each(|i| a[i] * b[i])
    }
    unsafe fn div(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each(|i| a[i] / b[i])
    }
    unsafe fn fma(a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        each(|i| a[i].mul_add(b[i], c[i]))
    }
    unsafe fn larger(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each(|i| math::larger(a[i], b[i]))
    }
    unsafe fn smaller(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        each(|i| math::smaller(a[i], b[i]))
    }
    unsafe fn select_less(a: [f32; 16], b: [f32; 16], then: [f32; 16], otherwise: [f32; 16]) -> [f32; 16] {
        each(|i| if a[i] < b[i] { then[i] } else { otherwise[i] })
    }
    unsafe fn power_of_two(t: [f32; 16]) -> [f32; 16] {
        each(|i| math::power_of_two(t[i]))
    }
    unsafe fn negate(x: [f32; 16]) -> [f32; 16] {
        each(|i| -x[i])
    }
    unsafe fn round_bf16(x: [f32; 16]) -> [f32; 16] {
        each(|i| crate::bf16::rounded(x[i]))
    }
    unsafe fn store_bf16(to: *mut u16, x: [f32; 16]) {
        let narrow = x.map(|x| (x.to_bits() >> 16) as u16);
        unsafe { to.cast::<[u16; 16]>().write_unaligned(narrow) }
    }
    unsafe fn load_bf16(from: *const u16) -> [f32; 16] {
        unsafe { from.cast::<[u16; 16]>().read_unaligned() }.map(crate::bf16::widen)
    }
    unsafe fn load_even(from: *const u8) -> [f32; 16] {
        unsafe { from.cast::<[[u16; 2]; 16]>().read_unaligned() }.map(|pair| crate::bf16::widen(pair[0]))
    }
    unsafe fn load_odd(from: *const u8) -> [f32; 16] {
        unsafe { from.cast::<[[u16; 2]; 16]>().read_unaligned() }.map(|pair| crate::bf16::widen(pair[1]))
    }
    unsafe fn dot_bf16(acc: [f32; 16], w: *const u8, x: u32) -> [f32; 16] {
        let (even, odd) = unsafe { (Self::load_even(w), Self::load_odd(w)) };
        let x = [crate::bf16::widen(x as u16), crate::bf16::widen((x >> 16) as u16)];
        each(|i| crate::reference::dot_bf16(acc[i], [even[i], odd[i]], x))
    }
    unsafe fn zip_bf16(to: *mut u32, a: *const u16, b: *const u16) {
        for i in 0..16 {
            unsafe { to.add(i).write_unaligned(a.add(i).read() as u32 | (b.add(i).read() as u32) << 16) };
        }
    }
    unsafe fn transpose(from: [*const u32; 16], to: *mut u32) {
        for (lane, row) in from.into_iter().enumerate() {
            for i in 0..16 {
                unsafe { to.add(i * 64 + lane).write(row.add(i).read_unaligned()) };
            }
        }
    }
    unsafe fn words(x: u32) -> [u32; 16] {
        [x; 16]
    }
    unsafe fn load_words(from: *const u8) -> [u32; 16] {
        unsafe { from.cast::<[u32; 16]>().read_unaligned() }
    }
    unsafe fn and(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        std::array::from_fn(|i| a[i] & b[i])
    }
    unsafe fn or(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        std::array::from_fn(|i| a[i] | b[i])
    }
    unsafe fn shift_right(x: [u32; 16], by: u32) -> [u32; 16] {
        x.map(|x| x >> by)
    }
    unsafe fn shift_left(x: [u32; 16], by: u32) -> [u32; 16] {
        x.map(|x| x << by)
    }
    unsafe fn dot_bytes(acc: [u32; 16], w: [u32; 16], x: u32) -> [u32; 16] {
        let x = x.to_le_bytes().map(|byte| i32::from(byte as i8));
        std::array::from_fn(|i| {
            let w = w[i].to_le_bytes().map(i32::from);
            acc[i].wrapping_add((w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3]) as u32)
        })
    }
    unsafe fn to_f32(x: [u32; 16]) -> [f32; 16] {
        x.map(|x| x as i32 as f32)
    }
    unsafe fn load_f16(from: *const u8) -> [f32; 16] {
        unsafe { from.cast::<[u16; 16]>().read_unaligned() }.map(crate::bf16::widen_f16)
    }
    unsafe fn load_u8(from: *const u8) -> [f32; 16] {
        unsafe { from.cast::<[u8; 16]>().read() }.map(f32::from)
    }
    unsafe fn load_i8(from: *const u8) -> [f32; 16] {
        unsafe { from.cast::<[i8; 16]>().read() }.map(f32::from)
    }
    unsafe fn load_bytes(from: *const u8) -> [u32; 16] {
        unsafe { from.cast::<[u8; 16]>().read() }.map(u32::from)
    }
    unsafe fn store_bytes(to: *mut u8, x: [u32; 16]) {
        unsafe { to.cast::<[u8; 16]>().write(x.map(|x| x as u8)) }
    }
    unsafe fn add_words(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    unsafe fn bits(x: [f32; 16]) -> [u32; 16] {
        x.map(f32::to_bits)
    }
    unsafe fn from_bits(x: [u32; 16]) -> [f32; 16] {
        x.map(f32::from_bits)
    }
    unsafe fn sum(x: [f32; 16]) -> f32 {
        crate::reference::tree(x)
    }
    unsafe fn max(mut x: [f32; 16]) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                x[i] = math::larger(x[i], x[i + half]);
            }
        }
        x[0]
    }
}
