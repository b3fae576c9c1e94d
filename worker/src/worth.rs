//! Whether blocks are fetched or computed: what was measured lately decides, by a pure function.

use std::time::Duration;

/// What fetching would move, and how fast things of its kind have come lately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) bytes: u64,
    /// 0: not known yet.
    pub(crate) bytes_per_s: u64,
}

/// Whether `offer` takes less time than computing `tokens` at `tokens_per_s` (0: not known yet). What is not known is
/// tried, and known afterwards.
pub(crate) fn is_cheaper(offer: Offer, tokens: u64, tokens_per_s: u64) -> bool {
    if offer.bytes_per_s == 0 || tokens_per_s == 0 {
        return true;
    }
    // bytes / bytes_per_s < tokens / tokens_per_s, without a division.
    u128::from(offer.bytes) * u128::from(tokens_per_s) < u128::from(tokens) * u128::from(offer.bytes_per_s)
}

/// Bytes per second over the last fetches, weighted by bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Meter {
    bytes: f64,
    seconds: f64,
}

impl Meter {
    /// Old fetches lose half their weight every so many bytes.
    const HALF_LIFE_BYTES: f64 = (64 << 20) as f64;

    pub(crate) fn add(&mut self, bytes: u64, took: Duration) {
        if bytes == 0 {
            return;
        }
        let keep = (-(bytes as f64) / Meter::HALF_LIFE_BYTES).exp2();
        self.bytes = self.bytes * keep + bytes as f64;
        self.seconds = self.seconds * keep + took.as_secs_f64();
    }

    /// 0: nothing has been fetched yet.
    pub(crate) fn per_second(&self) -> u64 {
        if self.bytes == 0.0 {
            return 0;
        }
        // A clock too coarse to tell is a fast fetch, and never an unknown one.
        ((self.bytes / self.seconds.max(1e-6)) as u64).max(1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offer(bytes: u64, bytes_per_s: u64) -> Offer {
        Offer { bytes, bytes_per_s }
    }

    #[test]
    fn the_faster_of_the_two_wins_and_what_is_unknown_is_tried() {
        let check = |offer, tokens, rate, expected| assert_eq!(is_cheaper(offer, tokens, rate), expected, "{offer:?}");
        // 1 MB at 1 GB/s is 1 ms; 16 tokens at 1000/s are 16 ms, at 50,000/s 0.3 ms.
        check(offer(1_000_000, 1_000_000_000), 16, 1_000, true);
        check(offer(1_000_000, 1_000_000_000), 16, 50_000, false);
        check(offer(1_000_000, 1_000_000), 16, 1_000, false);
        check(offer(1_000_000, 0), 16, 50_000, true);
        check(offer(1_000_000, 1), 16, 0, true);
        check(offer(u64::MAX, u64::MAX), u64::MAX, u64::MAX, false);
    }

    proptest! {
        /// More bytes or a slower link never make fetching better; more tokens or a slower engine never make it worse.
        #[test]
        fn it_is_monotonic(bytes in 1u64.., speed in 1u64.., tokens in 1u64.., rate in 1u64..) {
            let now = is_cheaper(offer(bytes, speed), tokens, rate);
            if now {
                prop_assert!(is_cheaper(offer(bytes / 2, speed), tokens, rate));
                prop_assert!(is_cheaper(offer(bytes, speed.saturating_mul(2)), tokens, rate));
                prop_assert!(is_cheaper(offer(bytes, speed), tokens.saturating_mul(2), rate));
                prop_assert!(is_cheaper(offer(bytes, speed), tokens, (rate / 2).max(1)));
            }
        }
    }

    #[test]
    fn a_meter_follows_what_was_fetched_last() {
        let mut meter = Meter::default();
        assert_eq!(meter.per_second(), 0);
        meter.add(1 << 20, Duration::from_millis(1));
        let fast = meter.per_second();
        assert!((900 << 20..1100 << 20).contains(&fast), "{fast}");
        (0..10).for_each(|_| meter.add(64 << 20, Duration::from_secs(1)));
        let slow = meter.per_second();
        assert!((63 << 20..66 << 20).contains(&slow), "{slow}");
        meter.add(0, Duration::from_secs(100));
        assert_eq!(meter.per_second(), slow);
    }
}
