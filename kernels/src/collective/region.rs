//! The memory that the ranks of a group map: a header with the barrier, then two halves of everybody's part.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use baton_core::shared::Mapping;

use super::wait::{wait, wake};
use super::{Broken, RANKS_MAX};

/// Set in `Header::state` once the group is broken.
const ABORTED: u32 = 1;
/// What a barrier adds to `Header::state`.
const BARRIER: u32 = 2;

/// All zero at first.
#[repr(C)]
struct Header {
    /// Barriers everybody has come to, doubled, and whether the group is broken. The word that is waited for.
    state: Word,
    /// Ranks that have come to the next barrier.
    arrived: Word,
    /// Ranks asleep.
    sleeping: Word,
    /// The barrier each rank has come to last: who is missing when one does not come.
    at: [Word; RANKS_MAX],
    /// Ranks, and f32 per part, for those that join; 0 in memory of a process's own.
    world: Word,
    words: Word,
}

/// A cache line of its own.
#[repr(C, align(64))]
struct Word(AtomicU32);

const HEADER: usize = size_of::<Header>();
const LINE: usize = 64;

pub(super) struct Region {
    memory: Memory,
    world: usize,
    words: usize,
}

/// A cache line of heap.
#[derive(Clone)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

enum Memory {
    Heap(*mut [Line]),
    /// Other processes have it too.
    Shared(Mapping),
}

// SAFETY: the header is atomic; who may touch which part when is the collective's duty.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    pub(super) fn heap(world: usize, words: usize) -> Region {
        let lines = vec![Line([0; LINE]); Region::bytes(world, words) / LINE].into_boxed_slice();
        Region { memory: Memory::Heap(Box::into_raw(lines)), world, words }
    }

    /// A region that others `join` at the path.
    pub(super) fn shared(world: usize, words: usize) -> io::Result<(Region, PathBuf)> {
        let mapping = Mapping::new(c"baton ranks", Region::bytes(world, words))?;
        let path = mapping.path();
        let region = Region { memory: Memory::Shared(mapping), world, words };
        region.header().world.0.store(world as u32, Ordering::SeqCst);
        region.header().words.0.store(words as u32, Ordering::SeqCst);
        Ok((region, path))
    }

    /// The region of another process.
    pub(super) fn join(path: &Path) -> io::Result<Region> {
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "not the memory of a group of ranks");
        let mapping = Mapping::join(path)?;
        if mapping.bytes() < HEADER {
            return Err(wrong());
        }
        let bytes = mapping.bytes();
        let region = Region { memory: Memory::Shared(mapping), world: 0, words: 0 };
        let [world, words] = [&region.header().world, &region.header().words].map(|word| word.0.load(Ordering::SeqCst));
        let (world, words) = (world as usize, words as usize);
        if !(1..=RANKS_MAX).contains(&world) || words == 0 || Region::bytes(world, words) != bytes {
            return Err(wrong());
        }
        Ok(Region { world, words, ..region })
    }

    /// Size of a region.
    fn bytes(world: usize, words: usize) -> usize {
        HEADER + 2 * world * stride(words)
    }

    fn base(&self) -> *mut u8 {
        match &self.memory {
            Memory::Heap(lines) => lines.cast(),
            Memory::Shared(mapping) => mapping.start(),
        }
    }

    fn header(&self) -> &Header {
        // SAFETY: the region begins with a header, aligned to a line, and all bytes make one.
        unsafe { &*self.base().cast() }
    }

    pub(super) fn world(&self) -> usize {
        self.world
    }

    /// f32 per part.
    pub(super) fn words(&self) -> usize {
        self.words
    }

    /// A rank's part of a half, of which `len` words will be touched.
    pub(super) fn part(&self, half: usize, rank: usize, len: usize) -> *mut f32 {
        assert!(half < 2 && rank < self.world && len <= self.words);
        let offset = HEADER + (half * self.world + rank) * stride(self.words);
        // SAFETY: inside the region by the assertion.
        unsafe { self.base().add(offset).cast() }
    }

    /// Notes that a rank has come to a barrier, and returns when all have. `waited` is how long to wait for them.
    pub(super) fn meet(&self, rank: usize, barrier: u32, limit: Duration) -> Result<(), Broken> {
        let Header { state: Word(state), arrived: Word(arrived), sleeping: Word(sleeping), at, .. } = self.header();
        let before = state.load(Ordering::Acquire);
        if before & ABORTED != 0 {
            return Err(Broken::Aborted);
        }
        at[rank].0.store(barrier, Ordering::Relaxed);
        let after = if arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.world as u32 {
            arrived.store(0, Ordering::Relaxed);
            let after = state.fetch_add(BARRIER, Ordering::SeqCst);
            if sleeping.load(Ordering::SeqCst) > 0 {
                wake(state);
            }
            after
        } else {
            let done = |now: u32| now != before;
            wait(state, sleeping, limit, done).ok_or_else(|| self.missing(barrier, limit))?
        };
        // Aborted after everybody had come is soon enough at the next barrier.
        if after & ABORTED != 0 && after ^ before == ABORTED { Err(Broken::Aborted) } else { Ok(()) }
    }

    fn missing(&self, barrier: u32, waited: Duration) -> Broken {
        self.abort();
        let at = |rank: &usize| self.header().at[*rank].0.load(Ordering::Relaxed);
        let missing = (0..self.world).filter(|rank| at(rank) != barrier).collect();
        Broken::TimedOut { missing, world: self.world, waited }
    }

    pub(super) fn is_aborted(&self) -> bool {
        self.header().state.0.load(Ordering::Acquire) & ABORTED != 0
    }

    pub(super) fn abort(&self) {
        let Header { state: Word(state), .. } = self.header();
        state.fetch_or(ABORTED, Ordering::SeqCst);
        wake(state);
    }
}

/// Bytes from one part to the next.
fn stride(words: usize) -> usize {
    (words * size_of::<f32>()).next_multiple_of(LINE)
}

impl Drop for Memory {
    fn drop(&mut self) {
        match self {
            // SAFETY: made by `Box::into_raw` in `heap`.
            Memory::Heap(lines) => drop(unsafe { Box::from_raw(*lines) }),
            Memory::Shared(_) => {}
        }
    }
}
