//! The blocks of one worker and their prefix index. Every block is in exactly one state, and only guards move it on:
//!
//! ```text
//! free ──reserve──► reserved ──fill──► held (1 or more guards) ──last guard dropped──► free, or cached when indexed
//!                                        ▲                                               │
//!                                        └──────────────── lookup ───────────────────────┘  (eviction: cached → free)
//! ```
//!
//! Where there are lower tiers (`lower.rs`) a cached block is saved there before it is evicted, and its name stays known.
//!
//! A guard is the only way to name a block, so none can be freed twice, and free + used + in flight + cached = total.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use baton_core::planted::{self, Bug};
use baton_core::{Arena, BlockHash, BlockId, BlockLayout, Refused};

use crate::journal::{Changes, Journal, Mark};

mod lower;

pub use lower::Saving;
use lower::{Lower, Pressure};

/// The cache of one worker. Clones are the same cache.
#[derive(Clone)]
pub struct Cache {
    inner: Arc<Inner>,
}

struct Inner {
    arena: Arc<Arena>,
    places: Mutex<Places>,
    freed: Mutex<Option<Waker>>,
    pressure: Pressure,
}

type Waker = Box<dyn Fn() + Send>;

/// How many blocks are in each state; the four counts add up to `total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    pub total: usize,
    pub free: usize,
    /// Held by at least one sequence or handoff that reads them.
    pub used: usize,
    /// Reserved and not filled yet.
    pub in_flight: usize,
    /// Held by nobody, kept for the next equal prefix, evicted when room is needed.
    pub cached: usize,
    /// Cached blocks given up for room, since the start.
    pub evictions: u64,
}

impl CacheStats {
    /// Blocks that `reserve` could give now.
    pub fn available(&self) -> usize {
        self.free + self.cached
    }
}

/// Blocks that a lookup would find.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    pub count: usize,
    /// Of them, those that nobody holds: once they are taken, `reserve` cannot give them any more.
    pub unheld: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Reserved,
    Held { guards: u32, hash: Option<BlockHash> },
    Cached { hash: BlockHash, since: u64 },
}

struct Place {
    generation: u32,
    state: State,
    /// The arena has its bytes.
    present: bool,
    /// A lower tier has it, or does not want it.
    saved: bool,
}

struct Places {
    all: Vec<Place>,
    free: Vec<u32>,
    index: BTreeMap<BlockHash, u32>,
    /// Cached blocks by the moment their last guard went, oldest first.
    lru: BTreeMap<u64, u32>,
    moment: u64,
    /// Filled by others than the backend, which has not asked for them yet.
    arrived: BTreeSet<u32>,
    in_flight: usize,
    evictions: u64,
    /// Changes of any block's state so far.
    moves: u64,
    journal: Journal,
    lower: Lower,
    /// What the backend computes is not in the arena by itself.
    elsewhere: bool,
}

impl Cache {
    /// A cache of `blocks` zeroed blocks.
    pub fn new(layout: BlockLayout, blocks: usize) -> Cache {
        Cache::of(Arena::new(layout, blocks))
    }

    /// A cache of an arena's blocks.
    pub fn of(arena: Arena) -> Cache {
        let blocks = arena.blocks();
        let all =
            (0..blocks).map(|_| Place { generation: 0, state: State::Free, present: true, saved: false }).collect();
        let free = (0..blocks as u32).rev().collect();
        let (index, lru) = (BTreeMap::new(), BTreeMap::new());
        let (moment, arrived, in_flight, evictions, moves, journal, lower, elsewhere) = Default::default();
        let places =
            Places { all, free, index, lru, moment, arrived, in_flight, evictions, moves, journal, lower, elsewhere };
        let (arena, places, freed, pressure) =
            (Arc::new(arena), Mutex::new(places), Mutex::new(None), Pressure::default());
        Cache { inner: Arc::new(Inner { arena, places, freed, pressure }) }
    }

    pub fn arena(&self) -> &Arc<Arena> {
        &self.inner.arena
    }

    /// Calls `waker` each time a guard gives blocks back, from the thread that dropped it.
    pub fn on_freed(&self, waker: impl Fn() + Send + 'static) {
        *lock(&self.inner.freed) = Some(Box::new(waker));
    }

    /// The longest leading run of `hashes` that is held here.
    pub fn lookup(&self, hashes: &[BlockHash]) -> Blocks {
        let mut places = lock(&self.inner.places);
        let found = hashes.iter().map_while(|hash| places.index.get(hash).copied());
        let ids: Vec<BlockId> = found.map(|index| places.id(index)).collect();
        ids.iter().for_each(|id| places.take(id.index));
        drop(places);
        Blocks { cache: self.clone(), ids }
    }

    /// Takes its name away from a held block whose bytes are not what they were: nobody finds it any more, and it is freed with
    /// its last guard.
    pub fn disown(&self, block: BlockId) {
        lock(&self.inner.places).disown(block);
    }

    /// How many of `hashes`, from the first on, are here. Takes nothing and touches no age.
    pub fn hits(&self, hashes: &[BlockHash]) -> Hits {
        let places = lock(&self.inner.places);
        let mut hits = Hits::default();
        for index in hashes.iter().map_while(|hash| places.index.get(hash)) {
            hits.count += 1;
            hits.unheld += usize::from(matches!(places.all[*index as usize].state, State::Cached { .. }));
        }
        hits
    }

    /// Content names of all blocks that are here or below, at most `max`, in order of the name.
    pub fn hashes(&self, max: usize) -> Vec<BlockHash> {
        lock(&self.inner.places).names(max)
    }

    /// The same, and the mark behind which the index's later changes follow.
    pub fn snapshot(&self, max: usize) -> (Vec<BlockHash>, Mark) {
        let places = lock(&self.inner.places);
        (places.names(max), places.journal.mark())
    }

    /// What has changed since a mark, at most `max` changes of it; None when too much has.
    pub fn changes(&self, since: Mark, max: usize) -> Option<Changes> {
        lock(&self.inner.places).journal.since(since, max)
    }

    /// `count` blocks now, evicting the longest unused cached ones, or none at all.
    pub fn reserve(&self, count: usize) -> Result<Reserved, Refused> {
        let mut places = lock(&self.inner.places);
        if places.needs_saving_block(count) {
            places = self.inner.pressure.until_saved(places);
        }
        if places.free.len() + places.lru.len() < count {
            return Err(Refused::NoCapacity);
        }
        let ids = (0..count).map(|_| places.give()).collect();
        let pressed = places.is_pressed();
        drop(places);
        if pressed {
            self.inner.pressure.tell();
        }
        Ok(Reserved { cache: self.clone(), ids })
    }

    /// Blocks that were filled from outside (`Reserved::fill`) since the last call and still hold what was filled in.
    pub(crate) fn arrived(&self) -> Blocks {
        let mut places = lock(&self.inner.places);
        let arrived = std::mem::take(&mut places.arrived);
        let filled =
            |index: &u32| matches!(places.all[*index as usize].state, State::Held { .. } | State::Cached { .. });
        let ids: Vec<BlockId> = arrived.into_iter().filter(filled).map(|index| places.id(index)).collect();
        ids.iter().for_each(|id| places.take(id.index));
        drop(places);
        Blocks { cache: self.clone(), ids }
    }

    pub fn stats(&self) -> CacheStats {
        let places = lock(&self.inner.places);
        let (total, free, cached) = (places.all.len(), places.free.len(), places.lru.len());
        let used = total - free - cached - places.in_flight;
        CacheStats { total, free, used, in_flight: places.in_flight, cached, evictions: places.evictions }
    }

    /// Counts every block anew and compares with what the lists say. For checks: it takes as long as there are blocks.
    ///
    /// # Errors
    /// What does not fit.
    pub fn audit(&self) -> Result<(), String> {
        lock(&self.inner.places).audit()
    }

    /// Changes of any block's state so far: while it stays the same, an audit says the same.
    pub fn moves(&self) -> u64 {
        lock(&self.inner.places).moves
    }

    /// The blocks that have a name, with it, in order of the name. For checks that compare their bytes.
    pub fn named(&self) -> Vec<(BlockHash, u32)> {
        lock(&self.inner.places).index.iter().map(|(hash, index)| (*hash, *index)).collect()
    }

    fn wake(&self) {
        if let Some(waker) = &*lock(&self.inner.freed) {
            waker();
        }
    }
}

/// A poisoned lock means that a thread panicked between two consistent states; counting on is safe.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Places {
    fn id(&self, index: u32) -> BlockId {
        BlockId { index, generation: self.all[index as usize].generation }
    }

    fn audit(&self) -> Result<(), String> {
        let mut free = vec![false; self.all.len()];
        if let Some(twice) = self.free.iter().find(|index| std::mem::replace(&mut free[**index as usize], true)) {
            return Err(format!("block {twice} is free more than once"));
        }
        let mut reserved = 0;
        let (mut listed, mut named) = (0, 0);
        for (index, place) in (0u32..).zip(&self.all) {
            let (is_free, is_cached, name) = match place.state {
                State::Free => (true, false, None),
                State::Reserved => (false, false, None),
                State::Held { hash, .. } => (false, false, hash),
                State::Cached { hash, since } => (false, self.lru.get(&since) == Some(&index), Some(hash)),
            };
            reserved += usize::from(matches!(place.state, State::Reserved));
            listed += usize::from(is_cached);
            named += usize::from(name.is_some());
            if free[index as usize] != is_free {
                return Err(format!("block {index} is {:?}, and the list of free blocks differs", place.state));
            }
            if name.is_some_and(|name| self.index.get(&name) != Some(&index)) {
                return Err(format!("block {index} is {:?}, and its name leads elsewhere", place.state));
            }
        }
        let counts = (reserved, listed, named);
        let lists = (self.in_flight, self.lru.len(), self.index.len());
        match counts == lists {
            true => Ok(()),
            false => Err(format!("(in flight, cached, named) are {counts:?}, and the lists say {lists:?}")),
        }
    }

    /// Another guard on a held or cached block.
    fn take(&mut self, index: u32) {
        self.moves += 1;
        let place = &mut self.all[index as usize];
        place.state = match place.state {
            State::Held { guards, hash } => State::Held { guards: guards + 1, hash },
            State::Cached { hash, since } => {
                self.lru.remove(&since);
                State::Held { guards: 1, hash: Some(hash) }
            }
            State::Free | State::Reserved => unreachable!("guards and the index name filled blocks only"),
        };
    }

    /// A free block, or the longest unused cached one, as reserved. The caller has checked that there is one.
    fn give(&mut self) -> BlockId {
        self.moves += 1;
        let index = self.free.pop().unwrap_or_else(|| self.evict());
        let place = &mut self.all[index as usize];
        place.generation = place.generation.wrapping_add(1);
        (place.state, place.present, place.saved) = (State::Reserved, false, false);
        self.arrived.remove(&index);
        self.in_flight += 1;
        self.id(index)
    }

    fn evict(&mut self) -> u32 {
        let lower = &self.lower;
        let mut oldest = self.lru.extract_if(.., |_, index| lower.may_go(*index));
        let (_, index) = oldest.next().expect("the caller counted the cached blocks");
        drop(oldest);
        let State::Cached { hash, .. } = self.all[index as usize].state else {
            unreachable!("the lru list names cached blocks only")
        };
        self.index.remove(&hash);
        if !self.lower.outlives(hash) {
            self.journal.remove(hash);
        }
        self.evictions += 1;
        index
    }

    /// `outside`: its bytes came from elsewhere than the backend.
    fn fill(&mut self, index: u32, outside: bool) {
        self.moves += 1;
        let place = &mut self.all[index as usize];
        place.state = State::Held { guards: 1, hash: None };
        place.present = outside || !self.elsewhere;
        self.in_flight -= 1;
    }

    fn names(&self, max: usize) -> Vec<BlockHash> {
        match self.lower.names().is_empty() {
            true => self.index.keys().take(max).copied().collect(),
            false => {
                let all: BTreeSet<BlockHash> = self.index.keys().chain(self.lower.names()).copied().collect();
                all.into_iter().take(max).collect()
            }
        }
    }

    /// Names a held block by its content, unless another block has the name already.
    fn publish(&mut self, index: u32, name: BlockHash) {
        self.moves += 1;
        if self.index.contains_key(&name) {
            return;
        }
        if let State::Held { hash: hash @ None, .. } = &mut self.all[index as usize].state {
            *hash = Some(name);
            self.index.insert(name, index);
            self.all[index as usize].saved = self.lower.has(name);
            if !self.lower.has(name) {
                self.journal.add(name);
            }
        }
    }

    fn disown(&mut self, block: BlockId) {
        self.moves += 1;
        let place = &mut self.all[block.index as usize];
        let State::Held { hash, .. } = &mut place.state else { return };
        let Some(name) = hash.take_if(|_| place.generation == block.generation) else { return };
        self.index.remove(&name);
        if !self.lower.has(name) {
            self.journal.remove(name);
        }
    }

    /// One guard less on a held block.
    fn release(&mut self, index: u32) {
        self.moves += 1;
        let state = match self.all[index as usize].state {
            State::Held { guards, hash } if guards > 1 => State::Held { guards: guards - 1, hash },
            State::Held { hash: Some(hash), .. } => {
                self.moment += 1;
                self.lru.insert(self.moment, index);
                State::Cached { hash, since: self.moment }
            }
            State::Held { hash: None, .. } => {
                self.free.push(index);
                State::Free
            }
            State::Free | State::Reserved | State::Cached { .. } => unreachable!("a guard holds its blocks"),
        };
        self.all[index as usize].state = state;
    }

    fn abandon(&mut self, index: u32) {
        self.moves += 1;
        if planted::is(Bug::FreeTwice) {
            self.free.push(index);
        }
        self.all[index as usize].state = State::Free;
        self.free.push(index);
        self.in_flight -= 1;
    }
}

/// Blocks to be written by the holder alone. Dropping frees them.
pub struct Reserved {
    cache: Cache,
    ids: Vec<BlockId>,
}

impl Reserved {
    pub fn ids(&self) -> Vec<BlockId> {
        self.ids.clone()
    }

    /// Writes the block at `position`, all of it.
    ///
    /// # Panics
    /// If there is no such block, or the bytes are not a block's.
    pub fn write(&mut self, position: usize, bytes: &[u8]) {
        let arena = self.cache.arena();
        assert!(bytes.len() == arena.layout().block_bytes(), "{} bytes are no block", bytes.len());
        let to = arena.block(self.ids[position].index);
        // SAFETY: the block is reserved, so nobody but this guard's holder reads or writes it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Frees all blocks from `count` on.
    pub fn truncate(&mut self, count: usize) {
        let ids = self.ids.split_off(count.min(self.ids.len()));
        drop(Reserved { cache: self.cache.clone(), ids });
    }

    /// Declares the blocks written. The first `hashes.len()` of them are full and enter the prefix index under these
    /// names; the rest can be read through the guard only.
    pub fn fill(mut self, hashes: &[BlockHash]) -> Blocks {
        let ids = std::mem::take(&mut self.ids);
        let mut places = lock(&self.cache.inner.places);
        for id in &ids {
            // What a link brought to the device is where the backend computes, as if it had computed it.
            let on_device = self.cache.inner.arena.is_on_device(*id);
            places.fill(id.index, !on_device);
            places.arrived.insert(id.index);
        }
        for (id, hash) in ids.iter().zip(hashes) {
            places.publish(id.index, *hash);
        }
        drop(places);
        Blocks { cache: self.cache.clone(), ids }
    }
}

impl Reserved {
    /// The blocks as those of a sequence that the backend will write.
    pub(crate) fn take(mut self) -> Blocks {
        let ids = std::mem::take(&mut self.ids);
        let mut places = lock(&self.cache.inner.places);
        ids.iter().for_each(|id| places.fill(id.index, false));
        drop(places);
        Blocks { cache: self.cache.clone(), ids }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.ids.is_empty() {
            return;
        }
        let mut places = lock(&self.cache.inner.places);
        self.ids.iter().for_each(|id| places.abandon(id.index));
        drop(places);
        self.cache.wake();
    }
}

/// Filled blocks in the order of a sequence, shared with whoever holds a clone. Dropping the last guard frees them, or
/// leaves them cached when they are in the prefix index.
pub struct Blocks {
    cache: Cache,
    ids: Vec<BlockId>,
}

impl Blocks {
    pub fn ids(&self) -> &[BlockId] {
        &self.ids
    }

    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Adds the blocks of `other` behind these.
    ///
    /// # Panics
    /// If `other` belongs to another cache.
    pub fn append(&mut self, mut other: Blocks) {
        assert!(Arc::ptr_eq(&self.cache.inner, &other.cache.inner), "blocks of two caches");
        self.ids.append(&mut other.ids);
    }

    /// Gives up all blocks from `count` on.
    pub fn truncate(&mut self, count: usize) {
        drop(self.split_off(count));
    }

    /// The blocks from `at` on, as their own guard.
    pub fn split_off(&mut self, at: usize) -> Blocks {
        let ids = self.ids.split_off(at.min(self.ids.len()));
        Blocks { cache: self.cache.clone(), ids }
    }

    /// A guard on some of these blocks, by their position.
    pub(crate) fn part(&self, range: std::ops::Range<usize>) -> Blocks {
        let ids = self.ids[range].to_vec();
        let mut places = lock(&self.cache.inner.places);
        ids.iter().for_each(|id| places.take(id.index));
        drop(places);
        Blocks { cache: self.cache.clone(), ids }
    }

    /// Names the full block at `position` by its content, so that lookups find it.
    pub(crate) fn publish(&self, position: usize, hash: BlockHash) {
        let mut places = lock(&self.cache.inner.places);
        let index = self.ids[position].index;
        // Its last positions were computed, whatever of it had come from outside.
        let elsewhere = places.elsewhere;
        places.all[index as usize].present &= !elsewhere;
        places.publish(index, hash);
    }

    /// Whether no other guard holds the block at `position`, so that its holder may go on writing it.
    pub(crate) fn is_sole(&self, position: usize) -> bool {
        let state = lock(&self.cache.inner.places).all[self.ids[position].index as usize].state;
        matches!(state, State::Held { guards: 1, hash: None })
    }

    /// Puts the one block of `fresh` in place of the block at `position`, which is returned.
    pub(crate) fn replace(&mut self, position: usize, mut fresh: Blocks) -> Blocks {
        assert!(fresh.len() == 1, "one block for one block");
        std::mem::swap(&mut self.ids[position], &mut fresh.ids[0]);
        fresh
    }
}

impl Clone for Blocks {
    fn clone(&self) -> Blocks {
        self.part(0..self.ids.len())
    }
}

impl Drop for Blocks {
    /// The last block goes first, so that eviction shortens a prefix from its end.
    fn drop(&mut self) {
        if self.ids.is_empty() {
            return;
        }
        let mut places = lock(&self.cache.inner.places);
        self.ids.iter().rev().for_each(|id| places.release(id.index));
        let pressed = places.is_pressed();
        drop(places);
        if pressed {
            self.cache.inner.pressure.tell();
        }
        self.cache.wake();
    }
}

impl std::fmt::Debug for Blocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.ids).finish()
    }
}

impl std::fmt::Debug for Reserved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.ids).finish()
    }
}
