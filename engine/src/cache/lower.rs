//! What lies below the cache: slower memory that takes blocks before they are evicted, and gives them back. The cache
//! knows only which names are down there; whoever keeps the lower tiers reads blocks out through `Saving` and brings
//! them back through `Reserved`. Saving runs ahead of eviction, so that a step never waits for it.

use std::collections::BTreeSet;
use std::sync::{Condvar, MutexGuard, PoisonError};

use baton_core::{BlockHash, BlockId};

use super::{Blocks, Cache, Places, State, lock};

/// The lower tiers as the cache sees them.
#[derive(Default)]
pub(super) struct Lower {
    /// Blocks that shall be ready to be given out with nothing lost; 0 while there is nothing below.
    ahead: usize,
    /// Names that are below, whether or not the cache has them as well.
    names: BTreeSet<BlockHash>,
    /// The block that is being read out; it is not evicted meanwhile.
    saving: Option<u32>,
    /// Blocks evicted before anything below had them.
    lost: u64,
}

impl Lower {
    pub(super) fn has(&self, name: BlockHash) -> bool {
        self.names.contains(&name)
    }

    pub(super) fn names(&self) -> &BTreeSet<BlockHash> {
        &self.names
    }

    /// Whether `index` may be evicted now.
    pub(super) fn may_go(&self, index: u32) -> bool {
        self.saving != Some(index)
    }

    /// A block of this name has been evicted. Whether the name is still known.
    pub(super) fn outlives(&mut self, name: BlockHash) -> bool {
        let below = self.has(name);
        self.lost += u64::from(!below && self.ahead > 0);
        below
    }
}

/// Told each time blocks may have to be saved.
#[derive(Default)]
pub(super) struct Pressure {
    waker: std::sync::Mutex<Option<Box<dyn Fn() + Send>>>,
    saved: Condvar,
}

impl Pressure {
    pub(super) fn tell(&self) {
        if let Some(waker) = &*lock(&self.waker) {
            waker();
        }
    }

    /// Until the block that is being read out is not any more.
    pub(super) fn until_saved<'a>(&self, places: MutexGuard<'a, Places>) -> MutexGuard<'a, Places> {
        self.saved.wait_while(places, |places| places.lower.saving.is_some()).unwrap_or_else(PoisonError::into_inner)
    }
}

impl Places {
    /// Whether so few blocks can be given out without loss that some have to be looked at.
    pub(super) fn is_pressed(&self) -> bool {
        self.free.len() < self.lower.ahead
    }

    /// Whether `count` blocks can be given out only together with the one that is being read out.
    pub(super) fn needs_saving_block(&self, count: usize) -> bool {
        self.lower.saving.is_some_and(|index| matches!(self.all[index as usize].state, State::Cached { .. }))
            && count == self.free.len() + self.lru.len()
    }
}

impl Cache {
    /// There is something below from now on. `ahead` blocks are kept ready to be given out without loss; `waker` is told,
    /// from any thread, when `save_next` may have one to save.
    pub fn on_pressure(&self, ahead: usize, waker: impl Fn() + Send + 'static) {
        self.run_ahead(ahead);
        *lock(&self.inner.pressure.waker) = Some(Box::new(waker));
    }

    /// Changes how many blocks are kept ready.
    pub fn run_ahead(&self, ahead: usize) {
        lock(&self.inner.places).lower.ahead = ahead;
    }

    /// The block to save next: of those that would be evicted soon, the first that nothing below has. None: all are
    /// saved, or the last one still is being.
    pub fn save_next(&self) -> Option<Saving> {
        let mut places = lock(&self.inner.places);
        if places.lower.saving.is_some() {
            return None;
        }
        let window = places.lower.ahead.saturating_sub(places.free.len());
        let wanted = |index: &u32| {
            let place = &places.all[*index as usize];
            place.present && !place.saved
        };
        let index = places.lru.values().take(window).copied().find(wanted)?;
        let State::Cached { hash: name, .. } = places.all[index as usize].state else {
            unreachable!("the lru list names cached blocks only")
        };
        places.lower.saving = Some(index);
        let block = places.id(index);
        drop(places);
        Some(Saving { cache: self.clone(), block, name })
    }

    /// A name that lower tiers have already, as after a restart.
    pub fn know(&self, name: BlockHash) {
        lock(&self.inner.places).know(name);
    }

    /// Nothing below has this name any more.
    pub fn forget(&self, name: BlockHash) {
        let mut places = lock(&self.inner.places);
        if !places.lower.names.remove(&name) {
            return;
        }
        match places.index.get(&name).copied() {
            Some(index) => places.all[index as usize].saved = false,
            None => places.journal.remove(name),
        }
    }

    /// How many of `names`, from the first on, are not here but below.
    pub fn below(&self, names: &[BlockHash]) -> usize {
        let places = lock(&self.inner.places);
        let below = |name: &&BlockHash| !places.index.contains_key(name) && places.lower.has(**name);
        names.iter().take_while(below).count()
    }

    /// Blocks that were evicted before anything below had them, since the start.
    pub fn lost(&self) -> u64 {
        lock(&self.inner.places).lower.lost
    }

    /// The backend computes into memory of its own, and the arena has only what came from outside or was exported.
    pub fn computes_elsewhere(&self) {
        lock(&self.inner.places).elsewhere = true;
    }

    /// These blocks' bytes are in the arena, unless they have been given out anew.
    pub(crate) fn is_present(&self, blocks: impl Iterator<Item = BlockId>) {
        let mut places = lock(&self.inner.places);
        for block in blocks {
            let place = &mut places.all[block.index as usize];
            place.present |= place.generation == block.generation;
        }
    }
}

impl Blocks {
    /// Whether all of them are where the backend computed them or a link brought them, on its device, and none is in the arena.
    pub fn are_on_device(&self) -> bool {
        let places = lock(&self.cache.inner.places);
        places.elsewhere && self.ids.iter().all(|id| !places.all[id.index as usize].present)
    }

    /// Whether the arena has the bytes of all of them.
    pub fn are_present(&self) -> bool {
        let places = lock(&self.cache.inner.places);
        self.ids.iter().all(|id| places.all[id.index as usize].present)
    }
}

impl Places {
    fn know(&mut self, name: BlockHash) {
        if self.lower.names.insert(name) && !self.index.contains_key(&name) {
            self.journal.add(name);
        }
    }
}

/// The right to read one cached block in order to save it; the block is not evicted meanwhile.
pub struct Saving {
    cache: Cache,
    block: BlockId,
    pub name: BlockHash,
}

impl Saving {
    /// Its bytes, as in the arena.
    pub fn bytes(&self) -> &[u8] {
        let arena = self.cache.arena();
        // SAFETY: named blocks are not written, and this one is not evicted before `self` is dropped.
        unsafe { std::slice::from_raw_parts(arena.block(self.block.index), arena.layout().block_bytes()) }
    }

    /// Something below has the block now.
    pub fn saved(self) {
        lock(&self.cache.inner.places).know(self.name);
        self.end(true);
    }

    /// Nothing below takes it; it is not offered again.
    pub fn refused(self) {
        self.end(true);
    }

    fn end(&self, saved: bool) {
        let mut places = lock(&self.cache.inner.places);
        places.lower.saving = None;
        places.all[self.block.index as usize].saved |= saved;
        drop(places);
        self.cache.inner.pressure.saved.notify_all();
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        let saving = lock(&self.cache.inner.places).lower.saving;
        if saving == Some(self.block.index) {
            self.end(false);
        }
    }
}
