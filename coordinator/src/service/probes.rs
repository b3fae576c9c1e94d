//! Who gets the next canary: a pure plan over who was looked at when.
//!
//! ```text
//! few pairs     each of them once a period
//! many pairs    each worker once a period, with the partner it was seen with longest ago
//! broken pairs  more often, so that they come back soon
//! no partner    a decode worker without a prefill worker, or with broken pairs only, is looked at by itself
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::pairs::PairIndex;
use crate::placement::{ALONE, BrokenPairs, WorkerIndex};

/// Canaries under way at a time.
pub(super) const FLYING_MAX: usize = 16;
/// Up to so many pairs, each is looked at in every period.
const PAIRS_EACH_MAX: usize = 32;
/// Between two looks at a broken pair, at most.
const BROKEN_EVERY: Duration = Duration::from_secs(1);

/// A live worker that can answer a canary. Blocks pass between workers of one kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probed {
    pub(super) index: WorkerIndex,
    pub(super) kind: usize,
}

/// When each pair and each worker was last looked at.
#[derive(Default)]
pub(super) struct Probes {
    pairs: BTreeMap<PairIndex, Instant>,
    workers: BTreeMap<WorkerIndex, Instant>,
    flying: BTreeSet<PairIndex>,
}

impl Probes {
    /// The pairs to look at now; they count as under way until `landed`.
    pub(super) fn due(
        &mut self,
        decodes: &[Probed],
        prefills: &[Probed],
        broken: &BrokenPairs,
        period: Duration,
        now: Instant,
    ) -> Vec<PairIndex> {
        self.forget_gone(decodes, prefills);
        let mut due = Vec::new();
        let broken_every = BROKEN_EVERY.min(period);
        for pair in live(broken, decodes, prefills) {
            self.start(pair, broken_every, FLYING_MAX / 2, now, &mut due);
        }
        for decode in decodes {
            let mut partners = prefills.iter().filter(|p| p.kind == decode.kind);
            if partners.all(|p| broken.contains(&(p.index, decode.index))) {
                self.start((ALONE, decode.index), period, FLYING_MAX, now, &mut due);
            }
        }
        match decodes.len() * prefills.len() <= PAIRS_EACH_MAX {
            true => self.each_pair(decodes, prefills, period, now, &mut due),
            false => self.each_worker(decodes, prefills, period, now, &mut due),
        }
        due
    }

    pub(super) fn landed(&mut self, pair: PairIndex) {
        self.flying.remove(&pair);
    }

    fn each_pair(&mut self, d: &[Probed], p: &[Probed], period: Duration, now: Instant, due: &mut Vec<PairIndex>) {
        let of_kind = |decode: &Probed| {
            let kind = decode.kind;
            let index = decode.index;
            p.iter().filter(move |p| p.kind == kind).map(move |p| (p.index, index))
        };
        let mut pairs: Vec<PairIndex> = d.iter().flat_map(of_kind).collect();
        pairs.sort_by_key(|pair| self.pairs.get(pair).copied());
        pairs.into_iter().for_each(|pair| self.start(pair, period, FLYING_MAX, now, due));
    }

    fn each_worker(&mut self, d: &[Probed], p: &[Probed], period: Duration, now: Instant, due: &mut Vec<PairIndex>) {
        let workers = d.iter().map(|d| (d, true)).chain(p.iter().map(|p| (p, false)));
        let mut workers: Vec<(&Probed, bool)> = workers.collect();
        workers.sort_by_key(|(worker, _)| self.workers.get(&worker.index).copied());
        for (worker, decodes) in workers {
            if self.flying.len() >= FLYING_MAX {
                return;
            }
            if !old(self.workers.get(&worker.index), period, now) {
                continue;
            }
            let others = if decodes { p } else { d };
            let pair = |other: &Probed| if decodes { (other.index, worker.index) } else { (worker.index, other.index) };
            let partners = others.iter().filter(|other| other.kind == worker.kind);
            let longest_ago = |other: &&Probed| (self.pairs.get(&pair(other)), self.workers.get(&other.index));
            if let Some(other) = partners.min_by_key(longest_ago) {
                self.start(pair(other), Duration::ZERO, FLYING_MAX, now, due);
            }
        }
    }

    fn start(&mut self, pair: PairIndex, every: Duration, room: usize, now: Instant, due: &mut Vec<PairIndex>) {
        let full = self.flying.len() >= room;
        if full || !old(self.pairs.get(&pair), every, now) || !self.flying.insert(pair) {
            return;
        }
        self.pairs.insert(pair, now);
        self.workers.insert(pair.0, now);
        self.workers.insert(pair.1, now);
        due.push(pair);
    }

    fn forget_gone(&mut self, decodes: &[Probed], prefills: &[Probed]) {
        let live: BTreeSet<WorkerIndex> = decodes.iter().chain(prefills).map(|w| w.index).chain([ALONE]).collect();
        self.pairs.retain(|(prefill, decode), _| live.contains(prefill) && live.contains(decode));
        self.workers.retain(|index, _| live.contains(index));
    }
}

fn old(at: Option<&Instant>, every: Duration, now: Instant) -> bool {
    at.is_none_or(|at| now - *at >= every)
}

/// Broken pairs of workers that are there.
fn live(broken: &BrokenPairs, decodes: &[Probed], prefills: &[Probed]) -> Vec<PairIndex> {
    let is = |workers: &[Probed], index: WorkerIndex| workers.iter().any(|w| w.index == index);
    let both = |pair: &&PairIndex| (pair.0 == ALONE || is(prefills, pair.0)) && is(decodes, pair.1);
    broken.iter().filter(both).copied().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PERIOD: Duration = Duration::from_secs(2);
    const ROUND: Duration = Duration::from_millis(100);

    fn workers(first: u32, count: u32) -> Vec<Probed> {
        (first..first + count).map(|index| Probed { index, kind: 0 }).collect()
    }

    /// Runs rounds for `time`, each canary landing in the next round, and says when each pair was looked at.
    fn run(
        decodes: &[Probed],
        prefills: &[Probed],
        broken: &BrokenPairs,
        time: Duration,
    ) -> Vec<(Duration, PairIndex)> {
        let start = Instant::now();
        let (mut probes, mut seen, mut at) = (Probes::default(), Vec::new(), Duration::ZERO);
        while at < time {
            let due = probes.due(decodes, prefills, broken, PERIOD, start + at);
            due.iter().for_each(|pair| probes.landed(*pair));
            seen.extend(due.into_iter().map(|pair| (at, pair)));
            at += ROUND;
        }
        seen
    }

    #[tokio::test]
    async fn few_pairs_are_each_seen_once_a_period() {
        let seen = run(&workers(1, 2), &workers(10, 3), &BrokenPairs::new(), PERIOD);
        let mut pairs: Vec<_> = seen.iter().map(|(_, pair)| *pair).collect();
        pairs.sort_unstable();
        assert_eq!(pairs, [(10, 1), (10, 2), (11, 1), (11, 2), (12, 1), (12, 2)]);
    }

    #[tokio::test]
    async fn a_decode_worker_without_a_working_partner_is_seen_by_itself() {
        let pairs = |seen: Vec<(Duration, PairIndex)>| seen.into_iter().map(|(_, pair)| pair).collect::<BTreeSet<_>>();
        assert_eq!(pairs(run(&workers(1, 1), &[], &BrokenPairs::new(), PERIOD)), BTreeSet::from([(ALONE, 1)]));
        let broken = BrokenPairs::from([(10, 1)]);
        let seen = run(&workers(1, 1), &workers(10, 1), &broken, PERIOD);
        assert_eq!(seen.iter().filter(|(_, pair)| *pair == (10, 1)).count(), 2, "a broken pair is seen more often");
        assert_eq!(pairs(seen), BTreeSet::from([(10, 1), (ALONE, 1)]));
        let other = [Probed { index: 10, kind: 1 }];
        assert_eq!(pairs(run(&workers(1, 1), &other, &BrokenPairs::new(), PERIOD)), BTreeSet::from([(ALONE, 1)]));
    }

    #[tokio::test]
    async fn a_canary_that_has_not_landed_is_not_repeated() {
        let (mut probes, now) = (Probes::default(), Instant::now());
        let mut due = |at| probes.due(&workers(1, 1), &workers(10, 1), &BrokenPairs::new(), PERIOD, now + at);
        assert_eq!(due(Duration::ZERO), [(10, 1)]);
        assert!(due(3 * PERIOD).is_empty());
        probes.landed((10, 1));
        assert_eq!(
            probes.due(&workers(1, 1), &workers(10, 1), &BrokenPairs::new(), PERIOD, now + 3 * PERIOD),
            [(10, 1)]
        );
    }

    proptest! {
        /// Goal: in a cluster of any shape every worker is in some canary within 5 s, and never too many fly at once.
        #[test]
        fn every_worker_is_seen_in_time(decodes in 1u32..48, prefills in 0u32..48) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let seen = runtime.block_on(async {
                run(&workers(1, decodes), &workers(100, prefills), &BrokenPairs::new(), Duration::from_secs(15))
            });
            let all = (1..=decodes).chain(100..100 + prefills);
            for worker in all {
                let mut last = Duration::ZERO;
                let of_worker = seen.iter().filter(|(_, (p, d))| *p == worker || *d == worker).map(|(at, _)| *at);
                for at in of_worker.chain([Duration::from_secs(15)]) {
                    prop_assert!(at - last <= Duration::from_secs(5), "{worker} from {last:?} to {at:?}");
                    last = at;
                }
            }
            for at in seen.iter().map(|(at, _)| *at) {
                prop_assert!(seen.iter().filter(|(other, _)| *other == at).count() <= FLYING_MAX);
            }
        }
    }
}
