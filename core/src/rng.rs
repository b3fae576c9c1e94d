//! Randomness as a function: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11).
//! Sampling reads it at (position, choice, draw); everything else takes numbers from an `Rng` handed to it.

/// Counter-based generator: equal key and counter give equal numbers on every machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
}

impl Philox {
    pub fn new(seed: u64) -> Philox {
        Philox { key: [seed as u32, (seed >> 32) as u32] }
    }

    /// Four words for one counter.
    pub fn at(self, counter: [u32; 4]) -> [u32; 4] {
        const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
        const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
        let (mut c, mut k) = (counter, self.key);
        for round in 0..10 {
            if round > 0 {
                k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
            }
            let (p0, p1) = (MULTIPLIER[0] as u64 * c[0] as u64, MULTIPLIER[1] as u64 * c[2] as u64);
            c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        }
        c
    }

    /// A number in [0, 1) for drawing the token at `position` of `choice`; `draw` counts the numbers one token takes.
    pub fn uniform(self, position: u32, choice: u32, draw: u32) -> f32 {
        let word = self.at([position, choice, draw, 0])[0];
        (word >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
    }
}

/// A stream of numbers for one purpose, from one seed.
#[derive(Clone, Debug)]
pub struct Rng {
    philox: Philox,
    taken: u64,
}

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng { philox: Philox::new(seed), taken: 0 }
    }

    pub fn u64(&mut self) -> u64 {
        let words = self.philox.at([self.taken as u32, (self.taken >> 32) as u32, 0, 1]);
        self.taken += 1;
        words[0] as u64 | (words[1] as u64) << 32
    }

    pub fn u128(&mut self) -> u128 {
        self.u64() as u128 | (self.u64() as u128) << 64
    }

    /// Bytes that no number taken from here tells anything about, for keys. They are the same whenever they are asked for.
    pub fn secret(&self) -> [u8; 32] {
        let mut secret = [0; 32];
        for (part, word) in
            secret.chunks_exact_mut(4).zip([0, 1].into_iter().flat_map(|n| self.philox.at([n, 0, 0, 2])))
        {
            part.copy_from_slice(&word.to_le_bytes());
        }
        secret
    }

    /// A number in [0, 1).
    pub fn f64(&mut self) -> f64 {
        (self.u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// A number in [0, bound). `bound` is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((self.u64() as u128 * bound as u128) >> 64) as u64
    }

    /// An independent stream for another purpose.
    pub fn fork(&mut self) -> Rng {
        Rng::new(self.u64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known-answer vectors published with Random123.
    #[test]
    fn philox_matches_published_vectors() {
        let ones = Philox { key: [u32::MAX; 2] };
        assert_eq!(Philox::new(0).at([0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(ones.at([u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = Philox { key: [0xa409_3822, 0x299f_31d0] };
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(pi.at(counter), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }
}
