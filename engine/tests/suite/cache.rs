//! The cache against a plain model of it: lists searched from the front, nothing shared, nothing clever.

use std::collections::BTreeMap;

use baton_core::{BlockHash, BlockId, BlockLayout, KvDtype, Refused};
use baton_engine::{Blocks, Cache, Reserved};
use proptest::prelude::*;

const TOTAL: usize = 12;
const LAYOUT: BlockLayout = BlockLayout { layers: 1, kv_heads: 1, head_dim: 2, block_tokens: 2, dtype: KvDtype::Bf16 };

#[derive(Clone, Debug)]
enum Step {
    Reserve(usize),
    /// Fill the oldest reservation; its first blocks get names from here on.
    Fill(u8, usize),
    Abandon(usize),
    Lookup(u8, usize),
    Clone(usize),
    Truncate(usize, usize),
    Append(usize, usize),
    Drop(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..6usize).prop_map(Step::Reserve),
        (0..8u8, 0..6usize).prop_map(|(first, count)| Step::Fill(first, count)),
        (0..4usize).prop_map(Step::Abandon),
        (0..8u8, 1..6usize).prop_map(|(first, count)| Step::Lookup(first, count)),
        (0..4usize).prop_map(Step::Clone),
        (0..4usize, 0..4usize).prop_map(|(at, len)| Step::Truncate(at, len)),
        (0..4usize, 0..4usize).prop_map(|(to, from)| Step::Append(to, from)),
        (0..6usize).prop_map(Step::Drop),
    ];
    proptest::collection::vec(step, 1..80)
}

fn names(first: u8, count: usize) -> Vec<BlockHash> {
    (0..count).map(|i| BlockHash(u128::from(first) + i as u128)).collect()
}

/// What should be true, by the guards held.
#[derive(Default)]
struct Model {
    reserved: Vec<(Reserved, Vec<BlockId>)>,
    held: Vec<(Blocks, Vec<BlockId>)>,
    /// Name of each indexed block.
    index: Vec<(BlockHash, BlockId)>,
    /// Indexed blocks without a holder, longest unused first.
    cached: Vec<BlockId>,
    generations: BTreeMap<u32, u32>,
}

impl Model {
    fn holders(&self, id: BlockId) -> usize {
        self.held.iter().flat_map(|(_, ids)| ids).filter(|held| **held == id).count()
    }

    fn named(&self, hash: BlockHash) -> Option<BlockId> {
        self.index.iter().find(|entry| entry.0 == hash).map(|entry| entry.1)
    }

    /// Blocks that a guard gives back, in its order.
    fn gave_back(&mut self, ids: &[BlockId]) {
        for (at, id) in ids.iter().enumerate().rev() {
            let indexed = self.index.iter().any(|entry| entry.1 == *id);
            // A guard may hold a block twice.
            let last = !ids[..at].contains(id) && self.holders(*id) == 0;
            if indexed && last && !self.cached.contains(id) {
                self.cached.push(*id);
            }
        }
    }

    fn used(&self) -> usize {
        let mut ids: Vec<BlockId> = self.held.iter().flat_map(|(_, ids)| ids.clone()).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.len()
    }

    fn in_flight(&self) -> usize {
        self.reserved.iter().map(|(_, ids)| ids.len()).sum()
    }

    fn free(&self) -> usize {
        TOTAL - self.used() - self.in_flight() - self.cached.len()
    }

    fn reserve(&mut self, cache: &Cache, count: usize) {
        let free = self.free();
        match cache.reserve(count) {
            Err(refused) => {
                assert_eq!(refused, Refused::NoCapacity);
                assert!(count > free + self.cached.len(), "refused though there was room");
            }
            Ok(reserved) => {
                let ids = reserved.ids();
                assert_eq!(ids.len(), count);
                for evicted in self.cached.drain(..count.saturating_sub(free)) {
                    self.index.retain(|entry| entry.1 != evicted);
                }
                for id in &ids {
                    let before = self.generations.insert(id.index, id.generation);
                    assert!(before.is_none_or(|before| before < id.generation), "the generation grows");
                    let others = self.reserved.iter().flat_map(|(_, ids)| ids).chain(&self.cached);
                    let taken =
                        others.chain(self.held.iter().flat_map(|(_, ids)| ids)).any(|held| held.index == id.index);
                    assert!(!taken, "a block given twice");
                }
                self.reserved.push((reserved, ids));
            }
        }
    }

    fn fill(&mut self, first: u8, count: usize) {
        if self.reserved.is_empty() {
            return;
        }
        let (reserved, ids) = self.reserved.remove(0);
        let names = names(first, count.min(ids.len()));
        let blocks = reserved.fill(&names);
        assert_eq!(blocks.ids(), ids);
        for (name, id) in names.into_iter().zip(&ids) {
            if self.named(name).is_none() {
                self.index.push((name, *id));
            }
        }
        self.held.push((blocks, ids));
    }

    fn lookup(&mut self, cache: &Cache, first: u8, count: usize) {
        let expected: Vec<BlockId> = names(first, count).into_iter().map_while(|name| self.named(name)).collect();
        assert_eq!(cache.hits(&names(first, count)).count, expected.len());
        let blocks = cache.lookup(&names(first, count));
        assert_eq!(blocks.ids(), expected);
        self.cached.retain(|id| !expected.contains(id));
        self.held.push((blocks, expected));
    }

    fn truncate(&mut self, at: usize, len: usize) {
        let Some((blocks, ids)) = self.held.get_mut(at) else { return };
        blocks.truncate(len);
        let gone = ids.split_off(len.min(ids.len()));
        self.gave_back(&gone);
    }

    fn append(&mut self, to: usize, from: usize) {
        if to == from || to >= self.held.len() || from >= self.held.len() {
            return;
        }
        let (more, ids) = self.held[from].clone();
        self.held[to].0.append(more);
        self.held[to].1.extend(ids);
    }

    fn apply(&mut self, cache: &Cache, step: Step) {
        match step {
            Step::Reserve(count) => self.reserve(cache, count),
            Step::Fill(first, count) => self.fill(first, count),
            Step::Abandon(at) if at < self.reserved.len() => drop(self.reserved.remove(at)),
            Step::Lookup(first, count) => self.lookup(cache, first, count),
            Step::Clone(at) if at < self.held.len() => self.held.push(self.held[at].clone()),
            Step::Truncate(at, len) => self.truncate(at, len),
            Step::Append(to, from) => self.append(to, from),
            Step::Drop(at) if at < self.held.len() => {
                let (blocks, ids) = self.held.remove(at);
                drop(blocks);
                self.gave_back(&ids);
            }
            _ => {}
        }
    }

    fn check(&self, cache: &Cache) {
        let stats = cache.stats();
        let found = (stats.free, stats.used, stats.in_flight, stats.cached, stats.total);
        assert_eq!(found, (self.free(), self.used(), self.in_flight(), self.cached.len(), TOTAL));
        assert_eq!(stats.free + stats.used + stats.in_flight + stats.cached, stats.total);
        assert_eq!(cache.hashes(usize::MAX).len(), self.index.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(600) })]

    /// Any steps: the same blocks, the same counts, no block given twice, and all of them back at the end.
    #[test]
    fn agrees_with_a_plain_model(steps in steps()) {
        let cache = Cache::new(LAYOUT, TOTAL);
        let mut model = Model::default();
        for step in steps {
            model.apply(&cache, step);
            model.check(&cache);
        }
        drop(model);
        let stats = cache.stats();
        prop_assert_eq!((stats.used, stats.in_flight), (0, 0));
    }
}

/// A cache of 4 blocks with something below that wants 2 of them ready, and names 0..4 cached in it, oldest first.
fn pressed() -> Cache {
    let cache = Cache::new(LAYOUT, 4);
    cache.on_pressure(2, || ());
    (0..4).for_each(|name| drop(cache.reserve(1).expect("free").fill(&names(name, 1))));
    cache
}

/// Saves what is offered, as a lower tier does.
fn save_all(cache: &Cache) -> Vec<BlockHash> {
    let next = || cache.save_next().map(|saving| (saving.name, saving.saved()).0);
    std::iter::from_fn(next).collect()
}

#[test]
fn what_is_evicted_next_is_saved_first_and_stays_known() {
    let cache = pressed();
    assert_eq!(save_all(&cache), names(0, 2));
    let (_, mark) = cache.snapshot(usize::MAX);
    let reserved = cache.reserve(3).expect("three are cached");
    // Two had been saved and are still known; the third had not.
    assert_eq!((cache.lost(), cache.below(&names(0, 3))), (1, 2));
    let changes = cache.changes(mark, usize::MAX).expect("remembered");
    assert_eq!((changes.added, changes.removed), (vec![], names(2, 1)));
    assert_eq!(cache.hashes(usize::MAX), [names(0, 2), names(3, 1)].concat());
    // Brought back it is offered no more; forgotten below, it is here alone.
    drop(reserved.fill(&names(0, 1)));
    assert_eq!(cache.below(&names(0, 2)), 0);
    cache.forget(BlockHash(0));
    let _pressing = cache.reserve(2).expect("free");
    assert!(save_all(&cache).contains(&BlockHash(0)));
    // Forgotten below and not here, a name is not known at all.
    let (_, mark) = cache.snapshot(usize::MAX);
    cache.forget(BlockHash(1));
    assert_eq!(cache.changes(mark, usize::MAX).expect("remembered").removed, names(1, 1));
    assert_eq!(cache.audit(), Ok(()));
}

#[test]
fn a_block_is_not_evicted_while_it_is_saved() {
    let cache = pressed();
    let saving = cache.save_next().expect("the oldest");
    assert!(cache.save_next().is_none(), "one at a time");
    let reserved = cache.reserve(3).expect("the others");
    assert!(cache.lookup(&[saving.name]).len() == 1 && reserved.ids().len() == 3);
    // The last block is waited for, and not refused.
    let cache = &cache;
    std::thread::scope(|scope| {
        let waiting = scope.spawn(move || cache.reserve(1).map(|reserved| reserved.ids()));
        saving.saved();
        assert!(waiting.join().expect("no panic").is_ok());
    });
    assert_eq!(cache.below(&names(0, 1)), 1);
}

/// A device's own blocks are not saved out of an arena that has them only where they were exported or came from.
#[test]
fn what_is_not_in_the_arena_is_not_saved() {
    let cache = Cache::new(LAYOUT, 4);
    cache.computes_elsewhere();
    cache.on_pressure(4, || ());
    drop(cache.reserve(2).expect("free").fill(&names(5, 2)));
    assert_eq!(save_all(&cache), names(6, 1).into_iter().chain(names(5, 1)).collect::<Vec<_>>());
}

/// Another thread gives blocks back while this one takes them: nothing is lost, and the waker is called.
#[test]
fn guards_may_be_dropped_anywhere() {
    let cache = Cache::new(LAYOUT, TOTAL);
    let (sender, receiver) = std::sync::mpsc::sync_channel::<Blocks>(4);
    let calls = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = calls.clone();
    cache.on_freed(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    });
    std::thread::scope(|scope| {
        scope.spawn(|| receiver.into_iter().for_each(drop));
        let sender = sender;
        let mut given = 0;
        while given < 1000 {
            if let Ok(reserved) = cache.reserve(3) {
                given += 1;
                sender.send(reserved.fill(&names(given as u8 % 5, 2))).expect("the other thread lives");
            }
        }
    });
    let stats = cache.stats();
    assert_eq!(stats.free + stats.cached, TOTAL);
    assert_eq!(calls.load(std::sync::atomic::Ordering::Relaxed), 1000);
}
