//! The checksum of an extent: XXH3 with 64 bits, by the widest instructions that this machine has.
//!
//! The crate `xxhash-rust` chooses its instructions when it is compiled, for the oldest machine it may run on: SSE2,
//! half as fast. Here the one loop is compiled three times and chosen at run time; the crate's result is the oracle in
//! tests. Inputs that are short or not made of stripes go to the crate. (XXH3: the xxHash specification 0.2.0,
//! "XXH3 Algorithm for long inputs".)
#![allow(unsafe_code)]

use std::sync::OnceLock;

use xxhash_rust::xxh3::xxh3_64;

/// What the algorithm consumes at a time.
const STRIPE: usize = 64;
/// Stripes between two scrambles: as many as the secret has starting points for.
const STRIPES_PER_BLOCK: usize = (SECRET.len() - STRIPE) / 8;
/// Inputs up to this length have other formulas.
const SHORT_MAX: usize = 240;

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
            let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq");
            all.extend(wide.then_some(Isa::Avx512));
        }
        all
    }
}

/// XXH3 of `bytes`.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    if bytes.len() <= SHORT_MAX || !bytes.len().is_multiple_of(STRIPE) {
        return xxh3_64(bytes);
    }
    let mut long = Long::new(Isa::best(), bytes.len());
    long.add(bytes);
    long.finish()
}

/// The algorithm for inputs over `SHORT_MAX` bytes that are made of whole stripes.
pub(crate) struct Long {
    isa: Isa,
    lanes: Lanes,
    /// Stripes since the last scramble.
    stripes: usize,
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
        Long { isa, lanes, stripes: 0, length, left: length }
    }

    /// # Panics
    /// If the parts do not make up `length` in whole stripes.
    pub(crate) fn add(&mut self, part: &[u8]) {
        let (stripes, rest) = part.as_chunks::<STRIPE>();
        self.left = self
            .left
            .checked_sub(part.len())
            .filter(|_| rest.is_empty())
            .expect("whole stripes, no more than announced");
        // The very last stripe meets another part of the secret.
        let (stripes, last) = match (self.left, stripes) {
            (0, [stripes @ .., last]) => (stripes, Some(last)),
            _ => (stripes, None),
        };
        match self.isa {
            Isa::Baseline => consume(&mut self.lanes, &mut self.stripes, stripes),
            // SAFETY: `Isa::all` found AVX2 on this machine.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { consume_avx2(&mut self.lanes, &mut self.stripes, stripes) },
            // SAFETY: `Isa::all` found AVX-512 F and DQ on this machine.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { consume_avx512(&mut self.lanes, &mut self.stripes, stripes) },
        }
        if let Some(last) = last {
            accumulate(&mut self.lanes.0, last, SECRET.len() - STRIPE - 7);
        }
    }

    /// # Panics
    /// If parts are missing.
    pub(crate) fn finish(self) -> u64 {
        assert_eq!(self.left, 0, "every part is added");
        let mut sum = (self.length as u64).wrapping_mul(P64[0]);
        for (pair, at) in self.lanes.0.as_chunks::<2>().0.iter().zip((11..).step_by(16)) {
            sum = sum.wrapping_add(fold(pair[0] ^ secret(at), pair[1] ^ secret(at + 8)));
        }
        sum = (sum ^ (sum >> 37)).wrapping_mul(0x1656_6791_9E37_79F9);
        sum ^ (sum >> 32)
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn consume_avx2(lanes: &mut Lanes, since: &mut usize, stripes: &[[u8; STRIPE]]) {
    consume(lanes, since, stripes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq")]
fn consume_avx512(lanes: &mut Lanes, since: &mut usize, stripes: &[[u8; STRIPE]]) {
    consume(lanes, since, stripes);
}

#[inline(always)]
fn consume(lanes: &mut Lanes, since: &mut usize, mut stripes: &[[u8; STRIPE]]) {
    let mut now = lanes.0;
    while !stripes.is_empty() {
        let (block, rest) = stripes.split_at(stripes.len().min(STRIPES_PER_BLOCK - *since));
        for (nth, stripe) in block.iter().enumerate() {
            accumulate(&mut now, stripe, (*since + nth) * 8);
        }
        *since += block.len();
        if *since == STRIPES_PER_BLOCK {
            scramble(&mut now);
            *since = 0;
        }
        stripes = rest;
    }
    lanes.0 = now;
}

#[inline(always)]
fn accumulate(lanes: &mut [u64; 8], stripe: &[u8; STRIPE], at: usize) {
    let words: [u64; 8] = std::array::from_fn(|i| u64::from_le_bytes(stripe.as_chunks::<8>().0[i]));
    let keyed: [u64; 8] = std::array::from_fn(|i| words[i] ^ secret(at + i * 8));
    for i in 0..8 {
        let product = (keyed[i] & 0xFFFF_FFFF).wrapping_mul(keyed[i] >> 32);
        lanes[i] = lanes[i].wrapping_add(words[i ^ 1]).wrapping_add(product);
    }
}

#[inline(always)]
fn scramble(lanes: &mut [u64; 8]) {
    for (i, lane) in lanes.iter_mut().enumerate() {
        *lane = (*lane ^ (*lane >> 47) ^ secret(SECRET.len() - STRIPE + i * 8)).wrapping_mul(P32[0]);
    }
}

#[inline(always)]
fn secret(at: usize) -> u64 {
    u64::from_le_bytes(*SECRET[at..].first_chunk().expect("inside the secret"))
}

fn fold(a: u64, b: u64) -> u64 {
    let product = a as u128 * b as u128;
    product as u64 ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut rng = baton_core::Rng::new(length as u64);
        (0..length).map(|_| rng.u64() as u8).collect()
    }

    /// Every instruction set gives the crate's result, for all lengths around the borders of stripes and blocks.
    #[test]
    fn every_instruction_set_gives_the_crates_result() {
        for length in (256..8192).step_by(64).chain([65_536, 1 << 20]) {
            let bytes = noise(length);
            for isa in Isa::all() {
                let mut long = Long::new(isa, length);
                long.add(&bytes);
                assert_eq!(long.finish(), xxh3_64(&bytes), "{isa:?}, {length} bytes");
            }
        }
    }

    proptest! {
        /// Parts that lie apart give the result of the whole, whatever their number and length.
        #[test]
        fn parts_give_the_result_of_the_whole(count in 1usize..12, bytes in 1usize..3000, whole in any::<bool>()) {
            let bytes = if whole { bytes.next_multiple_of(64) } else { bytes };
            let all = noise(count * bytes);
            if all.len() > SHORT_MAX && bytes.is_multiple_of(STRIPE) {
                let mut long = Long::new(Isa::best(), all.len());
                all.chunks(bytes).for_each(|part| long.add(part));
                prop_assert_eq!(long.finish(), xxh3_64(&all));
            }
            prop_assert_eq!(hash(&all), xxh3_64(&all));
        }
    }
}
