//! Kernels that do nothing but what a limit is about.

use super::isa::Isa;
use super::lanes::{Kernel, Lanes};
use crate::Profile;

/// Reads all bytes once.
pub(crate) fn read(bytes: &[u8]) -> f32 {
    // SAFETY: the best set is supported, and the bytes are a slice.
    unsafe { Isa::best().launch(Read(bytes)) }
}

/// Multiply-adds of a profile on registers; returns how many floating-point operations that was.
pub(crate) fn multiply(profile: Profile, passes: usize) -> usize {
    // SAFETY: the best set is supported.
    let (flops, sum) = unsafe { Isa::best().launch(Multiply { paired: profile == Profile::Bf16Dp, passes }) };
    std::hint::black_box(sum);
    flops
}

/// Products of bytes on registers; returns how many integer operations that was.
pub(crate) fn multiply_bytes(passes: usize) -> usize {
    // SAFETY: the best set is supported.
    let (operations, sum) = unsafe { Isa::best().launch(MultiplyBytes { passes }) };
    std::hint::black_box(sum);
    operations
}

struct Read<'a>(&'a [u8]);

// SAFETY (of each block): `Kernel::run`'s contract; reads stay within the chunks.
impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> f32 {
        unsafe {
            let mut sums = [L::splat(0.0); 4];
            for step in self.0.as_chunks::<256>().0 {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = L::add(*sum, L::load(step.as_ptr().add(64 * i).cast()));
                }
            }
            super::rows::sum64::<L>(&sums)
        }
    }
}

struct Multiply {
    paired: bool,
    passes: usize,
}

impl Kernel for Multiply {
    type Output = (usize, f32);

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> (usize, f32) {
        unsafe {
            let (flops, sum) = match (self.paired, L::WIDE) {
                (true, _) => (64 * 24, chains::<L, true, 24>(self.passes)),
                (false, true) => (32 * 24, chains::<L, false, 24>(self.passes)),
                (false, false) => (32 * 6, chains::<L, false, 6>(self.passes)),
            };
            (flops * self.passes, sum)
        }
    }
}

#[inline(always)]
unsafe fn chains<L: Lanes, const PAIRED: bool, const N: usize>(passes: usize) -> f32 {
    unsafe {
        let w = std::hint::black_box([0x3f80_3f80u32; 16]);
        let x = std::hint::black_box(0x3000_3000u32);
        let (w_full, x_full) = (L::load(w.as_ptr().cast()), L::splat(f32::from_bits(x)));
        let mut sums = [L::splat(0.0); N];
        for _ in 0..passes {
            for sum in &mut sums {
                *sum = match PAIRED {
                    true => L::dot_bf16(*sum, w.as_ptr().cast(), x),
                    false => L::fma(w_full, x_full, *sum),
                };
            }
        }
        let mut total = L::splat(0.0);
        for sum in sums {
            total = L::add(total, sum);
        }
        L::sum(total)
    }
}

struct MultiplyBytes {
    passes: usize,
}

impl Kernel for MultiplyBytes {
    type Output = (usize, f32);

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> (usize, f32) {
        unsafe {
            match L::WIDE {
                true => (128 * 24 * self.passes, bytes::<L, 24>(self.passes)),
                false => (128 * 4 * self.passes, bytes::<L, 4>(self.passes)),
            }
        }
    }
}

#[inline(always)]
unsafe fn bytes<L: Lanes, const N: usize>(passes: usize) -> f32 {
    unsafe {
        let w = std::hint::black_box([0x0101_0101u32; 16]);
        let (w, x) = (L::load_words(w.as_ptr().cast()), std::hint::black_box(0x0102_0304u32));
        let mut sums = [L::words(0); N];
        for _ in 0..passes {
            for sum in &mut sums {
                *sum = L::dot_bytes(*sum, w, x);
            }
        }
        let mut total = L::splat(0.0);
        for sum in sums {
            total = L::add(total, L::to_f32(sum));
        }
        L::sum(total)
    }
}
