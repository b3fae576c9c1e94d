//! The checksum of an extent: XXH3 with 64 bits, by the widest instructions that this machine has, over parts that lie
//! apart, and in one pass with a copy past the caches.
//!
//! The crate `xxhash-rust` chooses its instructions when it is compiled, for the oldest machine it may run on: SSE2,
//! half as fast. Here the loop is there for SSE2, AVX2 and AVX-512 and chosen at run time; the crate's result is the oracle in
//! tests. Inputs that are short or not made of stripes go to the crate. (XXH3: the xxHash specification 0.2.0,
//! "XXH3 Algorithm for long inputs".)
//!
//! The loop waits for memory, not for the processor, and the processor's own foresight ends with a page and with a part. So it asks for
//! bytes some way ahead, in the next part too where the caller says where that begins.
#![allow(unsafe_code)]

use std::sync::OnceLock;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// What the algorithm consumes at a time.
const STRIPE: usize = 64;
/// Stripes between two scrambles: as many as the secret has starting points for.
const STRIPES_PER_BLOCK: usize = (SECRET.len() - STRIPE) / 8;
/// Inputs up to this length have other formulas.
const SHORT_MAX: usize = 240;
/// How far ahead of what is hashed memory is asked for bytes, into the second-level cache, which has room for more questions.
const AHEAD: usize = 4096;

const P32: [u64; 3] = [0x9E37_79B1, 0x85EB_CA77, 0xC2B2_AE3D];
const P64: [u64; 5] =
    [0x9E37_79B1_85EB_CA87, 0xC2B2_AE3D_27D4_EB4F, 0x1656_67B1_9E37_79F9, 0x85EB_CA77_C2B2_AE63, 0x27D4_EB2F_1656_67C5];

/// The specification's default secret.
#[rustfmt::skip]
const SECRET: [u8; 192] = [
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb,
    0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc,
    0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
];

/// Which instructions the loop uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The widest this machine has.
    pub(crate) fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| *Isa::all().last().expect("the baseline is always there"))
    }

    /// All this machine has, the widest last.
    pub(crate) fn all() -> Vec<Isa> {
        let mut all = vec![Isa::Baseline];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(is_x86_feature_detected!("avx2").then_some(Isa::Avx2));
            all.extend(is_x86_feature_detected!("avx512f").then_some(Isa::Avx512));
        }
        all
    }
}

/// XXH3 over the parts of an extent, each added once, in order.
pub(crate) enum Parts {
    Long(Long),
    Any(Box<Xxh3>),
}

impl Parts {
    /// For `count` parts of `bytes` each.
    pub(crate) fn new(count: usize, bytes: usize) -> Parts {
        if count * bytes <= SHORT_MAX || !bytes.is_multiple_of(STRIPE) {
            return Parts::Any(Box::new(Xxh3::new()));
        }
        Parts::Long(Long::new(Isa::best(), count * bytes))
    }

    /// `next` is where the part after this one begins, if it may not be in the cache yet; it is only a hint.
    ///
    /// # Safety
    /// `from` is readable for `bytes`. Somebody else may write there meanwhile: the result is then of no use, and says so
    /// by not being the announced one.
    pub(crate) unsafe fn add(&mut self, from: *const u8, bytes: usize, next: Option<*const u8>) {
        // SAFETY: as promised by the caller.
        unsafe {
            match self {
                Parts::Long(long) => long.add(from, None, bytes, next),
                Parts::Any(any) => any.update(std::slice::from_raw_parts(from, bytes)),
            }
        }
    }

    /// Copies as well; what is hashed is what was stored.
    ///
    /// # Safety
    /// As for `add`; `to` is writable for `bytes`, nobody else reads or writes it, and the two do not overlap.
    pub(crate) unsafe fn copy(&mut self, from: *const u8, to: *mut u8, bytes: usize, next: Option<*const u8>) {
        // SAFETY: as promised by the caller.
        unsafe {
            match self {
                Parts::Long(long) => long.add(from, Some(to), bytes, next),
                Parts::Any(any) => {
                    std::ptr::copy_nonoverlapping(from, to, bytes);
                    any.update(std::slice::from_raw_parts(to, bytes));
                }
            }
        }
    }

    /// The checksum. What was copied is visible to whoever learns of it from here on.
    pub(crate) fn finish(self) -> u64 {
        match self {
            Parts::Long(long) => long.finish(),
            Parts::Any(any) => any.digest(),
        }
    }
}

/// The algorithm for inputs over `SHORT_MAX` bytes that are made of whole stripes.
pub(crate) struct Long {
    isa: Isa,
    lanes: Lanes,
    /// Stripes since the last scramble.
    since: usize,
    length: usize,
    left: usize,
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Lanes([u64; 8]);

impl Long {
    pub(crate) fn new(isa: Isa, length: usize) -> Long {
        debug_assert!(length > SHORT_MAX && length.is_multiple_of(STRIPE));
        let lanes = Lanes([P32[2], P64[0], P64[1], P64[2], P64[3], P32[1], P64[4], P32[0]]);
        Long { isa, lanes, since: 0, length, left: length }
    }

    /// # Safety
    /// As for `Parts::copy`.
    ///
    /// # Panics
    /// If the parts do not make up `length` in whole stripes.
    unsafe fn add(&mut self, from: *const u8, to: Option<*mut u8>, bytes: usize, next: Option<*const u8>) {
        assert!(bytes.is_multiple_of(STRIPE) && bytes <= self.left, "whole stripes, no more than announced");
        self.left -= bytes;
        // The very last stripe meets another part of the secret.
        let last = self.left == 0 && bytes > 0;
        let stripes = bytes / STRIPE - last as usize;
        let mut done = 0;
        while done < stripes {
            let run = (stripes - done).min(STRIPES_PER_BLOCK - self.since);
            let soon = ahead(from, done * STRIPE, bytes, next);
            let (from, at) = (from.wrapping_add(done * STRIPE), self.since * 8);
            let to = to.map(|to| to.wrapping_add(done * STRIPE));
            // SAFETY: inside `bytes`; the instruction set is one that `Isa::all` found.
            unsafe { self.accumulate(from, to, run, at, soon) };
            self.since += run;
            done += run;
            if self.since == STRIPES_PER_BLOCK {
                scramble(&mut self.lanes.0);
                self.since = 0;
            }
        }
        if last {
            let at = stripes * STRIPE;
            // SAFETY: the last stripe of `bytes`.
            unsafe {
                let to = to.map(|to| to.wrapping_add(at));
                let from = from.wrapping_add(at);
                self.accumulate(from, to, 1, SECRET.len() - STRIPE - 7, from);
            }
        }
    }

    /// Takes `stripes` stripes, the first with the secret from `at` on, and asks for as many from `soon` on.
    ///
    /// # Safety
    /// As for `Parts::copy`; this machine has the instruction set. `soon` may be anywhere.
    #[inline(always)]
    unsafe fn accumulate(&mut self, from: *const u8, to: Option<*mut u8>, stripes: usize, at: usize, soon: *const u8) {
        const NOWHERE: *mut u8 = std::ptr::null_mut();
        let lanes = &mut self.lanes.0;
        // SAFETY: as promised by the caller.
        unsafe {
            match (self.isa, to) {
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512, Some(to)) => x86::avx512::<true>(lanes, from, to, stripes, at, soon),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512, None) => x86::avx512::<false>(lanes, from, NOWHERE, stripes, at, soon),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, Some(to)) => x86::avx2::<true>(lanes, from, to, stripes, at, soon),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, None) => x86::avx2::<false>(lanes, from, NOWHERE, stripes, at, soon),
                (Isa::Baseline, to) => baseline(lanes, from, to, stripes, at),
            }
        }
    }

    /// # Panics
    /// If parts are missing.
    fn finish(self) -> u64 {
        assert_eq!(self.left, 0, "every part is added");
        #[cfg(target_arch = "x86_64")]
        if self.isa != Isa::Baseline {
            // Stores past the caches are ordered by nothing else.
            // SAFETY: SSE is part of every x86-64.
            unsafe { std::arch::x86_64::_mm_sfence() };
        }
        let mut sum = (self.length as u64).wrapping_mul(P64[0]);
        for (pair, at) in self.lanes.0.as_chunks::<2>().0.iter().zip((11..).step_by(16)) {
            sum = sum.wrapping_add(fold(pair[0] ^ secret(at), pair[1] ^ secret(at + 8)));
        }
        avalanche(sum)
    }
}

/// What memory is to be asked for when a part of `bytes` at `from` has been hashed up to `done`: what comes some way later, in the next
/// part near the end of this one, but not beyond that. Where nothing is known to come, what is hashed next.
fn ahead(from: *const u8, done: usize, bytes: usize, next: Option<*const u8>) -> *const u8 {
    match (next, done + AHEAD) {
        (_, at) if at < bytes => from.wrapping_add(at),
        (Some(next), at) => next.wrapping_add(done.min(at - bytes)),
        (None, _) => from.wrapping_add(done),
    }
}

/// # Safety
/// As for `Parts::copy`.
unsafe fn baseline(lanes: &mut [u64; 8], from: *const u8, to: Option<*mut u8>, stripes: usize, at: usize) {
    for nth in 0..stripes {
        // SAFETY: inside the promised bytes.
        let words: [u64; 8] = unsafe { from.add(nth * STRIPE).cast::<[u64; 8]>().read_unaligned() };
        if let Some(to) = to {
            // SAFETY: inside the promised bytes.
            unsafe { to.add(nth * STRIPE).cast::<[u64; 8]>().write_unaligned(words) };
        }
        let words = words.map(u64::from_le);
        let keyed: [u64; 8] = std::array::from_fn(|i| words[i] ^ secret(at + nth * 8 + i * 8));
        for i in 0..8 {
            let product = (keyed[i] & 0xFFFF_FFFF).wrapping_mul(keyed[i] >> 32);
            lanes[i] = lanes[i].wrapping_add(words[i ^ 1]).wrapping_add(product);
        }
    }
}

fn scramble(lanes: &mut [u64; 8]) {
    for (i, lane) in lanes.iter_mut().enumerate() {
        *lane = (*lane ^ (*lane >> 47) ^ secret(SECRET.len() - STRIPE + i * 8)).wrapping_mul(P32[0]);
    }
}

/// Of 32 bytes, four words in little endian: "XXH3 Algorithm for medium-size inputs". What binds an extent to its place, of which
/// a transfer does two each, is of this length; the crate's way through its lengths takes three times as long.
#[inline]
pub(crate) fn of_words(words: [u64; 4]) -> u64 {
    let half = |at: usize| fold(words[at] ^ SECRET_WORDS[at], words[at + 1] ^ SECRET_WORDS[at + 1]);
    let sum = 32u64.wrapping_mul(P64[0]).wrapping_add(half(0)).wrapping_add(half(2));
    avalanche(sum)
}

/// Of any bytes: the widest instructions there are, where there are stripes for them.
pub(crate) fn of_bytes(bytes: &[u8]) -> u64 {
    if bytes.len() <= SHORT_MAX || !bytes.len().is_multiple_of(STRIPE) {
        return xxh3_64(bytes);
    }
    let mut long = Long::new(Isa::best(), bytes.len());
    // SAFETY: a slice.
    unsafe { long.add(bytes.as_ptr(), None, bytes.len(), None) };
    long.finish()
}

/// The secret's first words.
const SECRET_WORDS: [u64; 4] = {
    let (words, _) = SECRET.as_chunks::<8>();
    [
        u64::from_le_bytes(words[0]),
        u64::from_le_bytes(words[1]),
        u64::from_le_bytes(words[2]),
        u64::from_le_bytes(words[3]),
    ]
};

#[inline(always)]
fn secret(at: usize) -> u64 {
    u64::from_le_bytes(*SECRET[at..].first_chunk().expect("inside the secret"))
}

fn avalanche(sum: u64) -> u64 {
    let sum = (sum ^ (sum >> 37)).wrapping_mul(0x1656_6791_9E37_79F9);
    sum ^ (sum >> 32)
}

fn fold(a: u64, b: u64) -> u64 {
    let product = a as u128 * b as u128;
    product as u64 ^ (product >> 64) as u64
}

/// `baseline` in wide registers. Stores go past the caches where `to` allows it: the bytes are read again only when the
/// sequence decodes, and a copy that fetches the lines it overwrites moves half as much again.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{SECRET, STRIPE};

    /// # Safety
    /// As for `Parts::copy`; the machine has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512<const COPY: bool>(
        lanes: &mut [u64; 8],
        from: *const u8,
        to: *mut u8,
        stripes: usize,
        at: usize,
        soon: *const u8,
    ) {
        assert!(at + (stripes - 1) * 8 + STRIPE <= SECRET.len());
        let past = to.addr().is_multiple_of(STRIPE);
        // SAFETY: inside the promised bytes, the secret (asserted) and the lanes.
        unsafe {
            let mut sum = _mm512_loadu_si512(lanes.as_ptr().cast());
            for nth in 0..stripes {
                _mm_prefetch::<_MM_HINT_T1>(soon.wrapping_add(nth * STRIPE).cast());
                let words = _mm512_loadu_si512(from.add(nth * STRIPE).cast());
                if COPY {
                    let to = to.add(nth * STRIPE).cast();
                    if past { _mm512_stream_si512(to, words) } else { _mm512_storeu_si512(to, words) }
                }
                let keyed = _mm512_xor_si512(words, _mm512_loadu_si512(SECRET.as_ptr().add(at + nth * 8).cast()));
                let product = _mm512_mul_epu32(keyed, _mm512_srli_epi64::<32>(keyed));
                let swapped = _mm512_shuffle_epi32::<0x4E>(words);
                sum = _mm512_add_epi64(sum, _mm512_add_epi64(swapped, product));
            }
            _mm512_storeu_si512(lanes.as_mut_ptr().cast(), sum);
        }
    }

    /// # Safety
    /// As for `Parts::copy`; the machine has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn avx2<const COPY: bool>(
        lanes: &mut [u64; 8],
        from: *const u8,
        to: *mut u8,
        stripes: usize,
        at: usize,
        soon: *const u8,
    ) {
        assert!(at + (stripes - 1) * 8 + STRIPE <= SECRET.len());
        let past = to.addr().is_multiple_of(STRIPE);
        // SAFETY: inside the promised bytes, the secret (asserted) and the lanes.
        unsafe {
            let half = |i: usize| 32 * i;
            let mut sums = [0, 1].map(|i| _mm256_loadu_si256(lanes.as_ptr().cast::<u8>().add(half(i)).cast()));
            for nth in 0..stripes {
                _mm_prefetch::<_MM_HINT_T1>(soon.wrapping_add(nth * STRIPE).cast());
                for (i, sum) in sums.iter_mut().enumerate() {
                    let words = _mm256_loadu_si256(from.add(nth * STRIPE + half(i)).cast());
                    if COPY {
                        let to = to.add(nth * STRIPE + half(i)).cast();
                        if past { _mm256_stream_si256(to, words) } else { _mm256_storeu_si256(to, words) }
                    }
                    let key = _mm256_loadu_si256(SECRET.as_ptr().add(at + nth * 8 + half(i)).cast());
                    let keyed = _mm256_xor_si256(words, key);
                    let product = _mm256_mul_epu32(keyed, _mm256_srli_epi64::<32>(keyed));
                    let swapped = _mm256_shuffle_epi32::<0x4E>(words);
                    *sum = _mm256_add_epi64(*sum, _mm256_add_epi64(swapped, product));
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                _mm256_storeu_si256(lanes.as_mut_ptr().cast::<u8>().add(half(i)).cast(), sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut rng = baton_core::Rng::new(length as u64);
        (0..length).map(|_| rng.u64() as u8).collect()
    }

    /// Every instruction set gives the crate's result, for all lengths around the borders of stripes and blocks, and
    /// copies exactly what it hashes, to aligned places and to others.
    #[test]
    fn every_instruction_set_gives_the_crates_result() {
        for length in (256..8192).step_by(64).chain([65_536, 1 << 20]) {
            let bytes = noise(length);
            let mut target = vec![0u8; length + 256];
            let aligned = target.as_ptr().align_offset(STRIPE);
            for isa in Isa::all() {
                for at in [aligned, aligned + 8] {
                    target.fill(0xA5);
                    let (mut hashed, mut copied) = (Long::new(isa, length), Long::new(isa, length));
                    // SAFETY: both lie inside their vectors.
                    unsafe {
                        hashed.add(bytes.as_ptr(), None, length, None);
                        copied.add(bytes.as_ptr(), Some(target.as_mut_ptr().add(at)), length, None);
                    }
                    assert_eq!(hashed.finish(), xxh3_64(&bytes), "{isa:?}, {length} bytes");
                    assert_eq!(copied.finish(), xxh3_64(&bytes), "{isa:?}, {length} bytes copied");
                    assert_eq!(target[at..at + length], bytes, "{isa:?}");
                    assert!(target[..at].iter().chain(&target[at + length..]).all(|&byte| byte == 0xA5), "{isa:?}");
                }
            }
        }
    }

    proptest! {
        /// What is hashed without the crate has the crate's result.
        #[test]
        fn short_cuts_give_the_crates_result(words in any::<[u64; 4]>(), length in 0usize..3000, whole in any::<bool>()) {
            prop_assert_eq!(of_words(words), xxh3_64(&words.map(u64::to_le_bytes).concat()));
            let bytes = noise(if whole { length.next_multiple_of(64) } else { length });
            prop_assert_eq!(of_bytes(&bytes), xxh3_64(&bytes));
        }

        /// Parts that lie apart give the result of the whole, whatever their number and length.
        #[test]
        fn parts_give_the_result_of_the_whole(count in 1usize..12, bytes in 1usize..3000, whole in any::<bool>()) {
            let bytes = if whole { bytes.next_multiple_of(64) } else { bytes };
            let all = noise(count * bytes);
            let mut target = vec![0; bytes];
            let (mut hashed, mut copied) = (Parts::new(count, bytes), Parts::new(count, bytes));
            let mut parts = all.chunks(bytes).peekable();
            while let Some(part) = parts.next() {
                // Anything will do: also what nobody may read.
                let next = parts.peek().map(|next| next.as_ptr()).or(Some(std::ptr::null()));
                // SAFETY: both are `bytes` long.
                unsafe {
                    hashed.add(part.as_ptr(), bytes, next);
                    copied.copy(part.as_ptr(), target.as_mut_ptr(), bytes, next);
                }
                prop_assert_eq!(&target[..], part);
            }
            prop_assert_eq!(hashed.finish(), xxh3_64(&all));
            prop_assert_eq!(copied.finish(), xxh3_64(&all));
        }
    }
}
