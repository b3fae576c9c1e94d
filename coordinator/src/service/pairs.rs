//! What is known of prefill–decode pairs: by the canary, and by gateways whose handoffs failed. The leader learns it;
//! the other nodes hear it from the leader, so that a new one begins with it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use baton_core::Role;
use baton_proto::v1;
use tokio::time::Instant;

use crate::placement::{ALONE, BrokenPairs, Candidate, WorkerIndex, can_pair};

/// Pairs remembered; a pair that is not is `unknown`, which is as good as good.
const PAIRS_MAX: usize = 16_384;
/// Pairs in a view.
const PAIRS_TOLD_MAX: usize = 256;
/// A broken pair that no canary has looked at for so long is tried again.
const BROKEN_FORGET: Duration = Duration::from_secs(10);

/// By the worker's lives: a pair of later lives is another pair. (`ALONE`, decode) is a decode worker by itself.
pub(super) type PairIndex = (WorkerIndex, WorkerIndex);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Health {
    Good,
    /// Why, for a person.
    Broken(String),
}

#[derive(Clone, Debug)]
pub(super) struct Pair {
    pub(super) health: Health,
    /// When its health last changed between good and broken.
    pub(super) since: Instant,
    /// When it was last looked at.
    pub(super) seen: Instant,
}

#[derive(Default)]
pub(super) struct Pairs {
    known: BTreeMap<PairIndex, Pair>,
    broken: BrokenPairs,
    /// Lives between which and some other blocks have passed.
    proven: BTreeSet<WorkerIndex>,
}

impl Pairs {
    pub(super) fn broken(&self) -> &BrokenPairs {
        &self.broken
    }

    pub(super) fn get(&self, pair: PairIndex) -> Option<&Pair> {
        self.known.get(&pair)
    }

    /// When any pair was last looked at.
    pub(super) fn seen(&self) -> Option<Instant> {
        self.known.values().map(|pair| pair.seen).max()
    }

    /// Takes a verdict in. True: the pair was in placement and is not any more, or the other way round.
    pub(super) fn judge(&mut self, pair: PairIndex, health: Health, now: Instant) -> bool {
        let broken = matches!(health, Health::Broken(_));
        let was_broken = self.broken.contains(&pair);
        let before = self.known.get(&pair).filter(|_| was_broken == broken);
        let since = before.map_or(now, |before| before.since);
        if !self.known.contains_key(&pair) && self.known.len() >= PAIRS_MAX {
            self.forget_oldest();
        }
        if health == Health::Good {
            self.proven.extend(both(pair));
        }
        self.known.insert(pair, Pair { health, since, seen: now });
        match broken {
            true => self.broken.insert(pair),
            false => self.broken.remove(&pair),
        }
    }

    fn forget_oldest(&mut self) {
        if let Some(oldest) = self.known.iter().min_by_key(|(_, pair)| pair.seen).map(|(at, _)| *at) {
            self.known.remove(&oldest);
            self.broken.remove(&oldest);
        }
    }

    /// Forgets all pairs of one life.
    pub(super) fn forget(&mut self, index: WorkerIndex) {
        let other = |(prefill, decode): &PairIndex| *prefill != index && *decode != index;
        self.known.retain(|pair, _| other(pair));
        self.broken.retain(other);
        self.proven.remove(&index);
    }

    /// Whether blocks have passed to or from this life.
    pub(super) fn is_proven(&self, index: WorkerIndex) -> bool {
        self.proven.contains(&index)
    }

    /// Gives broken pairs that nobody looks at another chance. True: there was one.
    pub(super) fn sweep(&mut self, now: Instant) -> bool {
        let before = self.broken.len();
        self.known.retain(|at, pair| !self.broken.contains(at) || pair.seen + BROKEN_FORGET > now);
        self.broken.retain(|at| self.known.contains_key(at));
        metrics::gauge!("baton_coordinator_pairs_broken").set(self.broken.len() as f64);
        before != self.broken.len()
    }

    /// Takes over what another node knows: those it calls broken are broken, the others are not.
    pub(super) fn adopt(&mut self, told: Vec<(PairIndex, Pair)>) -> bool {
        let known: BTreeMap<PairIndex, Pair> = told.into_iter().take(PAIRS_MAX).collect();
        let is_broken = |(at, pair): (&PairIndex, &Pair)| matches!(pair.health, Health::Broken(_)).then_some(*at);
        let broken: BrokenPairs = known.iter().filter_map(is_broken).collect();
        let changed = broken != self.broken;
        let good = known.iter().filter(|(_, pair)| pair.health == Health::Good);
        self.proven.extend(good.flat_map(|(pair, _)| both(*pair)));
        (self.known, self.broken) = (known, broken);
        changed
    }

    /// Whether a decode worker fails by itself.
    pub(super) fn is_alone_broken(&self, decode: WorkerIndex) -> bool {
        self.broken.contains(&(ALONE, decode))
    }
}

/// The lives of a pair; none for a decode worker by itself, between which and others nothing has passed.
fn both((prefill, decode): PairIndex) -> impl Iterator<Item = WorkerIndex> {
    [prefill, decode].into_iter().filter(move |_| prefill != ALONE)
}

/// For a view: broken pairs first, then the others of live workers that can pair, and decode workers by themselves
/// where that is known.
pub(super) fn told(candidates: &[Candidate], pairs: &Pairs, now: Instant) -> Vec<v1::PairView> {
    let decodes = || candidates.iter().filter(|c| c.role == Role::Decode);
    let prefills = || candidates.iter().filter(|c| c.role == Role::Prefill);
    let name = |c: Option<&Candidate>| c.map_or(String::new(), |c| c.worker.to_string());
    let tell = |prefill: Option<&Candidate>, decode: &Candidate| {
        let known = pairs.get((prefill.map_or(ALONE, |p| p.index), decode.index));
        let (state, reason) = match known.map(|pair| &pair.health) {
            None => ("unknown", String::new()),
            Some(Health::Good) => ("good", String::new()),
            Some(Health::Broken(why)) => ("broken", why.clone()),
        };
        let ms = |at: fn(&Pair) -> Instant| known.map_or(0, |pair| (now - at(pair)).as_millis() as u64);
        v1::PairView {
            prefill: name(prefill),
            decode: decode.worker.to_string(),
            state: state.into(),
            reason,
            since_ms: ms(|pair| pair.since),
            seen_ms: ms(|pair| pair.seen),
        }
    };
    let of_index = |index| candidates.iter().find(|c| index != ALONE && c.index == index);
    let broken = pairs.broken.iter().filter_map(|(prefill, decode)| Some(tell(of_index(*prefill), of_index(*decode)?)));
    let alone = decodes().filter(|d| pairs.known.contains_key(&(ALONE, d.index))).map(|d| tell(None, d));
    let paired = decodes().flat_map(|d| prefills().filter(|p| can_pair(p.model, d.model)).map(move |p| (p, d)));
    let others = alone.chain(paired.map(|(p, d)| tell(Some(p), d))).filter(|told| told.state != "broken");
    broken.chain(others).take(PAIRS_TOLD_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken() -> Health {
        Health::Broken("transfer_failed".into())
    }

    #[tokio::test]
    async fn a_pair_leaves_at_once_and_returns_with_the_first_good_word() {
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        let second = Duration::from_secs(1);
        assert!(!pairs.judge((1, 2), Health::Good, now));
        assert!(pairs.judge((1, 2), broken(), now + second));
        assert!(!pairs.judge((1, 2), broken(), now + 2 * second));
        assert_eq!(pairs.get((1, 2)).unwrap().since, now + second);
        assert!(pairs.broken().contains(&(1, 2)) && !pairs.is_alone_broken(2));
        assert!(pairs.judge((1, 2), Health::Good, now + 3 * second));
        assert_eq!(pairs.get((1, 2)).unwrap().since, now + 3 * second);
        assert!(pairs.broken().is_empty());
    }

    #[tokio::test]
    async fn a_life_takes_its_pairs_along_and_unseen_ones_are_tried_again() {
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        for pair in [(1, 2), (1, 3), (4, 2), (ALONE, 2)] {
            pairs.judge(pair, broken(), now);
        }
        assert!(pairs.is_alone_broken(2));
        pairs.forget(2);
        assert_eq!(pairs.broken().iter().copied().collect::<Vec<_>>(), [(1, 3)]);
        assert!(!pairs.sweep(now + BROKEN_FORGET / 2));
        assert!(pairs.sweep(now + BROKEN_FORGET));
        assert!(pairs.broken().is_empty() && pairs.get((1, 3)).is_none());
    }

    #[tokio::test]
    async fn memory_is_bounded_and_the_longest_unseen_goes_first() {
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        for at in 0..=PAIRS_MAX as u32 {
            pairs.judge((1, at + 2), broken(), now + Duration::from_millis(at.into()));
        }
        assert_eq!((pairs.known.len(), pairs.broken().len()), (PAIRS_MAX, PAIRS_MAX));
        assert!(pairs.get((1, 2)).is_none() && pairs.get((1, 3)).is_some());
    }

    #[tokio::test]
    async fn a_life_is_proven_by_its_first_good_pair_until_it_ends() {
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        pairs.judge((1, 2), broken(), now);
        pairs.judge((ALONE, 3), Health::Good, now);
        assert_eq!([1, 2, 3, ALONE].map(|index| pairs.is_proven(index)), [false; 4]);
        pairs.judge((1, 3), Health::Good, now);
        let good = Pair { health: Health::Good, since: now, seen: now };
        pairs.adopt(vec![((4, 5), good)]);
        pairs.judge((1, 3), broken(), now);
        assert_eq!([1, 2, 3, 4, 5].map(|index| pairs.is_proven(index)), [true, false, true, true, true]);
        pairs.forget(3);
        assert_eq!([1, 3].map(|index| pairs.is_proven(index)), [true, false]);
    }

    #[tokio::test]
    async fn what_the_leader_says_replaces_what_was_known() {
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        pairs.judge((1, 2), broken(), now);
        let good = Pair { health: Health::Good, since: now, seen: now };
        let bad = Pair { health: broken(), ..good.clone() };
        assert!(pairs.adopt(vec![((1, 2), good.clone()), ((1, 3), bad.clone())]));
        assert_eq!(pairs.broken().iter().copied().collect::<Vec<_>>(), [(1, 3)]);
        assert!(!pairs.adopt(vec![((1, 3), bad)]));
    }
}
