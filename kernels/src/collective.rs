//! What the ranks of a tensor-parallel group tell one another: sums, slices and barriers, through memory that all of
//! them map. The ranks are threads of one process or processes of one host; the sums are one binary tree over the ranks,
//! whatever their number and whoever arrives first, so that a group gives the bits that one rank gives.
//!
//! ```text
//! memory   header | per rank: the barrier it is at | two halves, each with `words` f32 per rank
//! exchange own part into this half ─ barrier ─ read everybody's; the next exchange uses the other half
//! ```
//!
//! A half is written again two exchanges later, so behind a barrier that nobody passes before having read it. No wait is
//! without end: a rank that aborts, or is dropped, ends everybody's waiting at once, and one that does not come ends it
//! at the deadline. A process that is killed says nothing: whoever sees its end aborts for it. A group that is broken
//! stays so.

mod region;
mod wait;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::region::Region;

/// Ranks of a group at most: one per segment of K.
pub const RANKS_MAX: usize = crate::SEGMENTS;

/// How long a rank waits for the others beyond the time it worked itself.
const WORK_FACTOR: u32 = 4;

/// One rank's membership in a group. Dropping it aborts the group.
pub struct Collective {
    rank: usize,
    region: Arc<Region>,
    /// Barriers passed so far.
    passed: u32,
    patience: Duration,
    /// When the last one was passed.
    since: Instant,
}

/// The group cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("a rank of the group has ended")]
    Aborted,
    #[error("rank {} of {world} did not come within {waited:?}", Ranks(.missing))]
    TimedOut { missing: Vec<usize>, world: usize, waited: Duration },
}

struct Ranks<'a>(&'a [usize]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(usize::to_string).collect();
        f.write_str(&names.join(", "))
    }
}

impl Collective {
    /// A group of one, which never waits.
    pub fn alone() -> Collective {
        Collective::member(0, Arc::new(Region::heap(1, 0)), Duration::ZERO)
    }

    /// A group of `world` threads of this process. `words` f32 are exchanged at a time; `patience` is how long a rank that
    /// has not worked itself waits for the others.
    ///
    /// # Panics
    /// If there are no ranks, more than `RANKS_MAX`, or no words.
    pub fn threads(world: usize, words: usize, patience: Duration) -> Vec<Collective> {
        assert!((1..=RANKS_MAX).contains(&world) && words > 0, "{world} ranks with {words} words");
        let region = Arc::new(Region::heap(world, words));
        (0..world).map(|rank| Collective::member(rank, region.clone(), patience)).collect()
    }

    /// A group of `world` processes of this host, as `threads`: rank 0, and where the others `join`.
    ///
    /// # Errors
    /// When the system has no memory that processes can share.
    pub fn processes(world: usize, words: usize, patience: Duration) -> io::Result<(Collective, PathBuf)> {
        assert!((1..=RANKS_MAX).contains(&world) && words > 0, "{world} ranks with {words} words");
        let (region, path) = Region::shared(world, words)?;
        Ok((Collective::member(0, Arc::new(region), patience), path))
    }

    /// A further rank of a group of processes. No two have the same number.
    ///
    /// # Errors
    /// When the path is not that of a group with such a rank.
    pub fn join(path: &Path, rank: usize, patience: Duration) -> io::Result<Collective> {
        let region = Region::join(path)?;
        if rank >= region.world() {
            let reason = format!("there is no rank {rank} of {}", region.world());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        Ok(Collective::member(rank, Arc::new(region), patience))
    }

    #[allow(clippy::disallowed_methods, reason = "bounds a wait; no result depends on it")]
    fn member(rank: usize, region: Arc<Region>, patience: Duration) -> Collective {
        Collective { rank, region, passed: 0, patience, since: Instant::now() }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks of the group.
    pub fn world(&self) -> usize {
        self.region.world()
    }

    /// Ends the group: whoever waits, or will wait, is told `Broken::Aborted`.
    pub fn abort(&self) {
        self.region.abort();
    }

    /// Whether the group has been aborted.
    pub fn is_broken(&self) -> bool {
        self.region.is_aborted()
    }

    /// Something that aborts the group from elsewhere.
    pub fn aborter(&self) -> impl Fn() + Send + Sync + 'static {
        let region = self.region.clone();
        move || region.abort()
    }

    /// Returns when all ranks have come here.
    #[allow(clippy::disallowed_methods, reason = "bounds a wait; no result depends on it")]
    pub fn barrier(&mut self) -> Result<(), Broken> {
        if self.world() == 1 {
            return Ok(());
        }
        let limit = self.patience + self.since.elapsed() * WORK_FACTOR;
        self.region.meet(self.rank, self.passed.wrapping_add(1), limit)?;
        self.passed = self.passed.wrapping_add(1);
        self.since = Instant::now();
        Ok(())
    }

    /// data = the ranks' data added as a binary tree: ((0+1)+(2+3))+((4+5)+(6+7)).
    ///
    /// # Panics
    /// If the ranks are no power of two.
    pub fn all_reduce(&mut self, data: &mut [f32]) -> Result<(), Broken> {
        let world = self.world();
        if world == 1 {
            return Ok(());
        }
        assert!(world.is_power_of_two(), "a tree over {world} ranks");
        for data in data.chunks_mut(self.region.words()) {
            let parts = self.exchange(data)?;
            match world {
                2 => add(data, [parts.of(0, data.len()), parts.of(1, data.len())], |[a, b]| a + b),
                4 => {
                    let parts: [&[f32]; 4] = std::array::from_fn(|rank| parts.of(rank, data.len()));
                    add(data, parts, |[a, b, c, d]| (a + b) + (c + d));
                }
                _ => {
                    let parts: [&[f32]; 8] = std::array::from_fn(|rank| parts.of(rank, data.len()));
                    add(data, parts, |[a, b, c, d, e, f, g, h]| ((a + b) + (c + d)) + ((e + f) + (g + h)));
                }
            }
        }
        Ok(())
    }

    /// Hands each rank's `own` to `read` as (rank, offset in that rank's own, values), in order of rank. All ranks give
    /// `longest` alike: the length of the longest own.
    pub fn all_gather(
        &mut self,
        own: &[f32],
        longest: usize,
        lengths: impl Fn(usize) -> usize,
        mut read: impl FnMut(usize, usize, &[f32]),
    ) -> Result<(), Broken> {
        assert!(own.len() == lengths(self.rank) && own.len() <= longest, "an own of {} in {longest}", own.len());
        if self.world() == 1 {
            read(0, 0, own);
            return Ok(());
        }
        let (words, world) = (self.region.words(), self.world());
        for offset in (0..longest).step_by(words) {
            let within = |len: usize| offset.min(len)..(offset + words).min(len);
            let parts = self.exchange(&own[within(own.len())])?;
            for (rank, len) in (0..world).map(|rank| (rank, within(lengths(rank)).len())) {
                if len > 0 {
                    read(rank, offset, parts.of(rank, len));
                }
            }
        }
        Ok(())
    }

    /// data = the root's data.
    pub fn broadcast(&mut self, root: usize, data: &mut [f32]) -> Result<(), Broken> {
        assert!(root < self.world(), "rank {root} of {}", self.world());
        if self.world() == 1 {
            return Ok(());
        }
        for data in data.chunks_mut(self.region.words()) {
            let is_root = self.rank == root;
            let parts = self.exchange(if is_root { data } else { &[] })?;
            if !is_root {
                data.copy_from_slice(parts.of(root, data.len()));
            }
        }
        Ok(())
    }

    /// Puts `own` where the others read it, and returns once all have.
    fn exchange(&mut self, own: &[f32]) -> Result<Parts<'_>, Broken> {
        let half = self.passed as usize % 2;
        // SAFETY: this half was last read before the barrier passed last, and until the next one nobody else touches this
        // rank's part of it.
        unsafe { self.region.part(half, self.rank, own.len()).copy_from_nonoverlapping(own.as_ptr(), own.len()) };
        self.barrier()?;
        Ok(Parts { region: &self.region, half })
    }
}

impl Drop for Collective {
    fn drop(&mut self) {
        self.abort();
    }
}

/// What all ranks have put into one half.
struct Parts<'a> {
    region: &'a Region,
    half: usize,
}

impl<'a> Parts<'a> {
    fn of(&self, rank: usize, len: usize) -> &'a [f32] {
        // SAFETY: written before the barrier that made these parts; nobody writes this half again before its reader has
        // come to the next barrier, and the reader cannot while it borrows the collective.
        unsafe { std::slice::from_raw_parts(self.region.part(self.half, rank, len), len) }
    }
}

#[inline(always)]
fn add<const N: usize>(out: &mut [f32], parts: [&[f32]; N], sum: impl Fn([f32; N]) -> f32) {
    let parts = parts.map(|part| &part[..out.len()]);
    for (i, out) in out.iter_mut().enumerate() {
        *out = sum(parts.map(|part| part[i]));
    }
}

#[cfg(test)]
mod tests;
